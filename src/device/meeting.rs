//! The meeting of a team, as one word that members change by compare and swap.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Members come.
    Open,
    /// All have come, and the step is under way.
    Running,
    /// Broken off, for good.
    Broken,
}

/// A meeting, as one word: the phase, the number of the step (which a word of an earlier one never equals), what the members
/// agreed on, and how many have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Meeting {
    pub phase: Phase,
    pub step: u64,
    pub has_barrier: bool,
    /// 0 before the first has come.
    pub size: usize,
    pub count: usize,
}

impl Meeting {
    /// The largest number of a step; the next is 0.
    pub const STEPS: u64 = (1 << 37) - 1;

    /// The meeting that a word stands for.
    pub fn of(word: u64) -> Meeting {
        let phase = match word & 3 {
            0 => Phase::Open,
            1 => Phase::Running,
            _ => Phase::Broken,
        };
        let part = |shift: u32| (word >> shift & 0xfff) as usize;
        Meeting { phase, has_barrier: word & 4 != 0, size: part(3), count: part(15), step: word >> 27 }
    }

    /// It, as a word.
    pub fn word(self) -> u64 {
        let phase = match self.phase {
            Phase::Open => 0,
            Phase::Running => 1,
            Phase::Broken => 2,
        };
        phase | u64::from(self.has_barrier) << 2 | (self.size as u64) << 3 | (self.count as u64) << 15 | self.step << 27
    }
}
