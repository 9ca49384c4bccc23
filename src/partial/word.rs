//! Failures as one word, for windows and mapped host memory.

/// Where words of failures and of bad data have their rank; below it lies a code or a cause.
pub(crate) const RANK_SHIFT: u32 = 8;
/// Where they have their epoch or sequence.
pub(crate) const HIGH_SHIFT: u32 = 32;
/// Bits of a rank.
pub(crate) const RANK_MASK: u32 = (1 << (HIGH_SHIFT - RANK_SHIFT)) - 1;

/// A bit of a word of bad data that a kernel tells the host. Each word that follows one that the host has taken has it flipped,
/// so that a second fault like the first is another word. No cause is that large.
pub(crate) const TURN: u64 = 1 << 7;

/// Why a communicator broke. The word 0 is no failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// A status code of the C ABI.
    pub code: u8,
    /// The rank that it is about.
    pub rank: usize,
    /// The exchange that ended by it; 0: none.
    pub epoch: u32,
}

impl Failure {
    /// Code, rank and epoch in one word.
    pub fn word(self) -> u64 {
        u64::from(self.code)
            | (self.rank as u64 & u64::from(RANK_MASK)) << RANK_SHIFT
            | u64::from(self.epoch) << HIGH_SHIFT
    }

    /// The failure of a word that is not 0.
    pub fn from_word(word: u64) -> Failure {
        let rank = (word >> RANK_SHIFT) as u32 & RANK_MASK;
        Failure { code: word as u8, rank: rank as usize, epoch: (word >> HIGH_SHIFT) as u32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_go_round() {
        for failure in
            [Failure { code: 9, rank: 63, epoch: 7 }, Failure { code: 255, rank: 0xff_ffff, epoch: u32::MAX }]
        {
            assert_eq!(Failure::from_word(failure.word()), failure);
        }
        assert_eq!(Failure { code: 9, rank: 63, epoch: 7 }.word(), 9 | 63 << 8 | 7 << 32);
    }
}
