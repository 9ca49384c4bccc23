//! What a kernel is told of an exchange: where windows, slots and words of a communicator lie, as plain data. The same as
//! `ExchangeView` in `kernels/params.cuh`; `kernels/ll.cuh` says what a window holds.

/// Addresses are of the device, a word is 64 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct ExchangeView {
    /// Where this rank's slot of parity 0 lies in each rank's window: a table of addresses.
    pub peers: u64,
    /// Where each rank's window begins: a table of addresses.
    pub bases: u64,
    /// This rank's window.
    pub window: u64,
    /// Its words in mapped host memory.
    pub host: u64,
    /// Words between slots.
    pub slot_words: i64,
    /// Words between a rank's slots in one parity and in the other.
    pub parity_words: i64,
    /// The word of a window at which the slots of merged rows begin, one a parity.
    pub merged_at: i64,
    /// What this rank takes the step for.
    pub fingerprint: u64,
    /// How long a wait may last, nanoseconds.
    pub timeout_ns: u64,
    pub world: i32,
    pub rank: i32,
    /// Element type of o on its way, as a code of the C ABI.
    pub wire_dtype: i32,
    /// Who gets which rows.
    pub mode: ExchangeMode,
    /// Heads of a partial.
    pub heads: i32,
    /// The first head of this rank's output, and their number.
    pub first_head: i32,
    pub own_heads: i32,
    pub reserved: [i32; 7],
}

/// Who gets which rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum ExchangeMode {
    /// Every rank gets every row and merges it.
    #[default]
    OneShot = 0,
    /// The owner of a head gets its rows and merges them, and nobody else has them.
    Scattered = 1,
    /// The owner of a head merges its rows and sends them to all.
    TwoShot = 2,
}

impl ExchangeView {
    /// There is no exchange.
    pub const NONE: ExchangeView = ExchangeView {
        peers: 0,
        bases: 0,
        window: 0,
        host: 0,
        slot_words: 0,
        parity_words: 0,
        merged_at: 0,
        fingerprint: 0,
        timeout_ns: 0,
        world: 0,
        rank: 0,
        wire_dtype: 0,
        mode: ExchangeMode::OneShot,
        heads: 0,
        first_head: 0,
        own_heads: 0,
        reserved: [0; 7],
    };
}

/// What lies where in a window, in words; `kernels/ll.cuh` has the same.
pub(crate) mod window {
    /// A peer's process has let go of the window: one word a rank, which no kernel reads.
    pub const LET_GO: u64 = 16;
    /// A verdict from a peer that has given up.
    pub const BROKEN: u64 = 0;
    /// A peer of another process has left: one word a rank.
    pub const LEFT: u64 = 192;
    /// The last epoch that the rank has read to its end.
    pub const CONSUMED: u64 = 128;
    /// Bad data that the running step's attention met.
    pub const FAULT: u64 = 131;
    /// Where the slots begin.
    pub const CONTROL_WORDS: u64 = 512;
    /// Words of a slot before its rows.
    pub const HEADER_WORDS: u64 = 16;
    /// Words of a row before its o.
    pub const ROW_HEAD: u64 = 2;
    /// Most ranks.
    pub const MAX_RANKS: usize = 64;
}

/// Words of a rank in mapped host memory; `kernels/ll.cuh` has the same.
pub(crate) mod host {
    /// From the host: a [verdict](super::verdict) that ends every wait.
    pub const COMMAND: usize = 0;
    /// To the host: the verdict that broke the communicator.
    pub const FAILURE: usize = 1;
    /// To the host: bad data that a step met on any rank.
    pub const BAD_DATA: usize = 2;
    /// From the host: a bit for each rank that has left, or whose process has ended.
    pub const LOST: usize = 3;
    pub const WORDS: usize = 4;
}

/// Why a wait ended, as one word: a status code of the C ABI, the rank it is about, and the epoch.
pub(crate) mod verdict {
    /// The word of a code and a rank.
    pub fn pack(code: u8, rank: usize) -> u64 {
        u64::from(code) | (rank as u64) << 8
    }

    /// Code, rank and epoch.
    pub fn unpack(word: u64) -> (u8, usize, u32) {
        (word as u8, (word >> 8) as u16 as usize, (word >> 32) as u32)
    }
}

/// Words of a row of `dim` elements of `size` bytes, an even number.
pub(crate) fn row_words(dim: usize, size: usize) -> usize {
    window::ROW_HEAD as usize + (dim * size).div_ceil(4).next_multiple_of(2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::partial::epoch::{Epoch, SLOTS, packet};

    fn source(name: &str) -> String {
        std::fs::read_to_string(format!("{}/kernels/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    /// The value of a constant or of an enumerator that is a plain number.
    fn value(source: &str, name: &str) -> u64 {
        let at = source.find(&format!(" {name} = ")).unwrap_or_else(|| panic!("{name} is not there"));
        let text = &source[at + name.len() + 4..];
        text[..text.find([',', ';', '}']).unwrap()].trim().parse().unwrap()
    }

    #[test]
    fn the_kernels_have_the_same_constants() {
        let source = source("ll.cuh");
        let wanted = [
            ("kBroken", window::BROKEN),
            ("kConsumed", window::CONSUMED),
            ("kLeft", window::LEFT),
            ("kFault", window::FAULT),
            ("kControlWords", window::CONTROL_WORDS),
            ("kHeaderWords", window::HEADER_WORDS),
            ("kRowHead", window::ROW_HEAD),
            ("kSlots", SLOTS as u64),
            ("kCommand", host::COMMAND as u64),
            ("kFailure", host::FAILURE as u64),
            ("kBadData", host::BAD_DATA as u64),
            ("kLost", host::LOST as u64),
            ("kDesync", ErrorKind::Desync as u64),
            ("kTimeout", ErrorKind::Timeout as u64),
            ("kPeerLost", ErrorKind::PeerLost as u64),
        ];
        for (name, wanted) in wanted {
            assert_eq!(value(&source, name), wanted, "{name}");
        }
        // Words that only kernels, or only hosts, know lie apart from the others.
        let let_go = window::LET_GO..window::LET_GO + window::MAX_RANKS as u64;
        let mut words = ["kBroken", "kConsumed", "kArrived", "kFailed", "kFault"].map(|name| value(&source, name));
        assert!(words.iter().all(|word| !let_go.contains(word) && *word < window::CONTROL_WORDS));
        assert!(let_go.end <= window::CONTROL_WORDS);
        words.sort_unstable();
        assert!(words.windows(2).all(|pair| pair[0] < pair[1]), "{words:?}");
        // packet and next_epoch say the same.
        assert!(source.contains("static_cast<uint64_t>(epoch) << 32 | data;"));
        assert_eq!(packet(5, Epoch::from_flag(7)), 7 << 32 | 5);
        assert!(source.contains("epoch == 0xffffffffu ? 2u : epoch + 1"));
        assert_eq!(Epoch::from_flag(u32::MAX).next(), Epoch::from_flag(2));
    }

    #[test]
    fn the_kernels_have_the_same_modes() {
        let source = source("params.cuh");
        for (name, mode) in [
            ("kOneShot", ExchangeMode::OneShot),
            ("kScattered", ExchangeMode::Scattered),
            ("kTwoShot", ExchangeMode::TwoShot),
        ] {
            assert_eq!(value(&source, name), mode as u64, "{name}");
        }
    }

    #[test]
    fn verdicts_go_round_and_rows_have_even_words() {
        assert_eq!(verdict::unpack(verdict::pack(9, 63) | 7 << 32), (9, 63, 7));
        assert_eq!([(128, 4), (128, 2), (1, 4), (1, 2), (3, 2)].map(|(d, s)| row_words(d, s)), [130, 66, 4, 4, 4]);
    }
}
