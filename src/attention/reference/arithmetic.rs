//! What worst errors depend on, of the machine that computes.

/// What an output's worst error depends on, of the machine that computed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arithmetic {
    /// Lanes of a vector.
    pub lanes: usize,
    /// Whether multiply-adds are rounded once.
    pub fused: bool,
}

impl Arithmetic {
    /// The one with the largest errors of all that the library has.
    pub const ANY: Arithmetic = Arithmetic { lanes: 4, fused: false };

    /// The roundings on a path through a dot product of `dim` elements.
    pub fn score_roundings(self, dim: usize) -> f64 {
        let chain = dim.min(128).div_ceil(self.lanes) + dim.div_ceil(128);
        chain as f64 + (self.lanes as f64).log2() + f64::from(u8::from(!self.fused))
    }

    /// The roundings on a path through a sum of weights.
    pub fn weight_roundings(self) -> f64 {
        128.0 / self.lanes as f64
    }
}
