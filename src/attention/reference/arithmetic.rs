//! What worst errors depend on, of the machine that computes.

/// What an output's worst error depends on, of the machine that computed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// A processor.
    Cpu {
        /// Lanes of a vector.
        lanes: usize,
        /// Whether multiply-adds are rounded once.
        fused: bool,
    },
    /// A GPU.
    Gpu {
        /// 16-bit terms that an element of v is multiplied as: 1, or 3 where neither bf16 nor f16 holds it.
        value_terms: usize,
    },
}

impl Arithmetic {
    /// The one with the largest errors of all CPUs.
    pub const ANY: Arithmetic = Arithmetic::Cpu { lanes: 4, fused: false };

    /// The roundings on a path through a dot product of `dim` elements.
    pub(super) fn score_roundings(self, dim: usize) -> f64 {
        match self {
            Arithmetic::Cpu { lanes, fused } => {
                let chain = dim.min(128).div_ceil(lanes) + dim.div_ceil(128);
                chain as f64 + (lanes as f64).log2() + f64::from(u8::from(!fused))
            }
            Arithmetic::Gpu { .. } => 39.0 + dim.div_ceil(32) as f64,
        }
    }

    /// Roundings of a score with terms beyond those of its products.
    pub(super) fn term_roundings(self) -> f64 {
        match self {
            Arithmetic::Cpu { .. } => 10.0,
            Arithmetic::Gpu { .. } => 16.0,
        }
    }

    /// What a partial sum of a score may reach, whose magnitude is `score`.
    pub(super) fn reach(self, score: f64, adds: bool) -> f64 {
        match self {
            _ if adds => 2.0 * score,
            Arithmetic::Cpu { .. } => score + score.min(16.0),
            Arithmetic::Gpu { .. } => score,
        }
    }

    /// The rounding of a score's distance from the maximum, over a row of magnitude `score`.
    pub(super) fn distance(self, score: f64) -> f64 {
        match self {
            Arithmetic::Cpu { .. } => 0.0,
            Arithmetic::Gpu { .. } => (2.0 * score).min(23.0) + 3.0,
        }
    }

    /// The roundings on a path through the sum of the weights of `keys` keys.
    pub(super) fn weight_roundings(self, keys: u64) -> f64 {
        match self {
            Arithmetic::Cpu { lanes, .. } => 128.0 / lanes as f64,
            Arithmetic::Gpu { .. } => 26.0 + open_tiles(keys),
        }
    }

    /// The roundings on a path through a sum of values.
    pub(super) fn value_roundings(self, keys: u64) -> f64 {
        match self {
            Arithmetic::Cpu { .. } => 24.0,
            Arithmetic::Gpu { value_terms } => 81.0 + value_terms as f64 * open_tiles(keys),
        }
    }

    /// Roundings of weights (twice), quotients and merges, beyond one a partial: in an output.
    pub(super) fn output_roundings(self) -> f64 {
        match self {
            Arithmetic::Cpu { .. } => 12.0,
            Arithmetic::Gpu { .. } => 24.0,
        }
    }

    /// The same in a log-sum-exp.
    pub(super) fn lse_roundings(self) -> f64 {
        match self {
            Arithmetic::Cpu { .. } => 12.0,
            Arithmetic::Gpu { .. } => 18.0,
        }
    }
}

/// Tiles that a GPU's sum takes in before it is closed: each has a key that counts.
fn open_tiles(keys: u64) -> f64 {
    keys.min(1024) as f64
}
