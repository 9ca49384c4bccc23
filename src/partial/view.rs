//! What a kernel is told of an exchange: where windows, slots and words of a communicator lie, as plain data.
//! `kernels/ll.cuh` says how ranks use them.

/// Addresses are of the device, a word is 64 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct ExchangeView {
    /// Where this rank's slots lie, of either parity, in the windows of the other ranks, from the one after it on, and in its own
    /// window last: a table of pairs of addresses.
    pub slots: u64,
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
        slots: 0,
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
    };
}

/// What lies where in a window, in words.
pub(crate) mod window {
    /// A failure, from a peer that has given up or from the host of one.
    pub const BROKEN: u64 = 0;
    /// A peer's process has let go of the window: one word a rank, which no kernel reads.
    pub const LET_GO: u64 = 16;
    /// Exchanges that the rank has read to their ends, times 2^[`LAUNCH_SHIFT`](super::super::epoch::LAUNCH_SHIFT), and the
    /// blocks of the running one that need its epoch no more.
    pub const CONSUMED: u64 = 128;
    /// The first failure of this rank.
    pub const FAILED: u64 = 129;
    /// Bad data that a launch which pushes rows met, as [`DataFault::word`](super::super::DataFault::word): one word a parity.
    pub const FAULT: u64 = 130;
    /// How many shares of rows the blocks of a launch have drawn that belong to no block: one word a parity.
    pub const TICKETS: u64 = 132;
    /// How many blocks that may not wait have decided whether they merge their shares of rows; above 2^32, how many have left them
    /// over: one word a parity.
    pub const DECIDED: u64 = 136;
    /// A bit a block that has left its share over: so many words a parity.
    pub const LEFT_OVER: u64 = 144;
    pub const LEFT_OVER_WORDS: u64 = 8;
    /// Bad data of a step whose partial lies in memory. The word behind it stays 0: no host is told.
    pub const STEP_FAULT: u64 = 138;
    /// The first bad data of any rank that a launch has told the host: one word a parity.
    pub const TOLD: u64 = 140;
    /// The last bad data that the host was told.
    pub const PENDING: u64 = 142;
    /// u32: blocks that have ended, of a launch that is to clear [`STEP_FAULT`]; 0 between launches.
    pub const ARRIVED: u64 = 135;
    /// A peer of another process has left: one word a rank.
    pub const LEFT: u64 = 192;
    /// Where the slots begin.
    pub const CONTROL_WORDS: u64 = 512;
    /// Words of a slot before its rows; the fingerprint takes two.
    pub const HEADER_WORDS: u64 = 16;
    /// Words of a row before its o: lse, and what that lacks, or bad data where it is no number.
    pub const ROW_HEAD: u64 = 2;
    /// Most ranks.
    pub const MAX_RANKS: usize = 64;
}

/// Words of a rank in mapped host memory.
pub(crate) mod host {
    /// From the host: a [failure](super::super::word::Failure) that ends every wait, 0 until there is one.
    pub const COMMAND: usize = 0;
    /// To the host: the failure that broke the communicator.
    pub const FAILURE: usize = 1;
    /// To the host: bad data that a step met on any rank, as [`DataFault::word`](super::super::DataFault::word); with
    /// [`TAKEN_AFTER`], from the host.
    pub const BAD_DATA: usize = 2;
    /// Distance, in words, from a word that tells of bad data to the one in which the host says what it has taken of it. Each
    /// of the two has one writer, because atomic operations of a GPU on host memory are not atomic for the host.
    pub const TAKEN_AFTER: usize = 1;
    /// From the host: a bit for each rank that has left, or whose process has ended.
    pub const LOST: usize = 4;
    pub const WORDS: usize = 5;
}

/// Words of a plan in mapped host memory: the value that goes with bad data, from its kernels.
pub(crate) mod value {
    /// Whose it is: a [`DataFault::word`](super::super::DataFault::word) of rank 0. 0: nothing, or on its way.
    pub const KEY: usize = 0;
    /// As [`BadValue`](super::super::BadValue) has them.
    pub const INDEX: usize = 1;
    pub const FOUND: usize = 2;
    pub const LEAST: usize = 3;
    pub const MOST: usize = 4;
    pub const WORDS: usize = 5;
}

/// Words of a row of `dim` elements of `size` bytes, an even number.
pub(crate) fn row_words(dim: usize, size: usize) -> usize {
    window::ROW_HEAD as usize + (dim * size).div_ceil(size_of::<u32>()).next_multiple_of(2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partial::epoch::SLOTS;

    #[test]
    fn words_of_a_window_lie_apart() {
        let (ranks, parities) = (window::MAX_RANKS as u64, SLOTS as u64);
        let mut taken = vec![
            (window::LET_GO, ranks),
            (window::LEFT, ranks),
            (window::FAULT, parities),
            (window::TICKETS, parities),
            (window::DECIDED, parities),
            (window::TOLD, parities),
            (window::STEP_FAULT, 2),
            (window::LEFT_OVER, parities * window::LEFT_OVER_WORDS),
        ];
        let words = [window::BROKEN, window::CONSUMED, window::FAILED, window::PENDING, window::ARRIVED];
        taken.extend(words.map(|word| (word, 1)));
        taken.sort_unstable();
        assert!(taken.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{taken:?}");
        assert!(taken.last().is_some_and(|(word, count)| word + count <= window::CONTROL_WORDS));
    }

    #[test]
    fn rows_have_even_words() {
        assert_eq!([(128, 4), (128, 2), (1, 4), (1, 2), (3, 2)].map(|(d, s)| row_words(d, s)), [130, 66, 4, 4, 4]);
    }
}
