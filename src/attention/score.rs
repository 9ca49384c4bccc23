//! What happens to a score between the product q.k and the softmax, in one place for every backend and the reference.
//!
//! The order is fixed: scale, softcap, slopes, bias. A score is
//! `softcap(scale * q.k) - slope * distance + factor * mask + zeta.v`, where softcap(s) = cap * tanh(s / cap), distance is
//! that of the global positions of query and key, and zeta.v is what the energy adds.

use super::descriptor::{AttentionDesc, MaskKind};

/// The terms of a shape's scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoreMod {
    scale: f32,
    /// 0: none.
    softcap: f32,
    alibi: bool,
    /// Whether a mask adds to scores.
    masked: bool,
    /// Whether zeta.v is added.
    biased: bool,
}

/// What one score has beside its product.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ScoreTerms {
    /// slope * distance, subtracted.
    pub slope: f64,
    /// factor * mask + zeta.v, added.
    pub bias: f64,
}

impl ScoreMod {
    /// Nothing but a scale of 1.
    pub const PLAIN: ScoreMod = ScoreMod { scale: 1.0, softcap: 0.0, alibi: false, masked: false, biased: false };

    /// The terms of `desc`. `biased`: zeta.v of the energy is added to each score.
    pub fn of(desc: &AttentionDesc, biased: bool) -> ScoreMod {
        let masked = desc.mask == MaskKind::Additive;
        ScoreMod { scale: desc.effective_scale(), softcap: desc.softcap, alibi: desc.alibi, masked, biased }
    }

    /// Whether zeta.v is added to each score.
    pub fn is_biased(self) -> bool {
        self.biased
    }

    /// Whether slopes times distances are subtracted.
    pub fn has_slopes(self) -> bool {
        self.alibi
    }

    /// Whether a mask adds to scores.
    pub fn has_mask(self) -> bool {
        self.masked
    }

    /// The cap; 0: none.
    pub fn softcap(self) -> f32 {
        self.softcap
    }

    /// Whether anything is added to scores, or may be.
    pub fn adds(self) -> bool {
        self.alibi || self.masked || self.biased
    }

    /// The score of a product, in f64.
    #[inline]
    pub fn score(self, product: f64, terms: ScoreTerms) -> f64 {
        let scaled = f64::from(self.scale) * product;
        let capped = if self.softcap > 0.0 {
            let cap = f64::from(self.softcap);
            cap * (scaled / cap).tanh()
        } else {
            scaled
        };
        capped - terms.slope + terms.bias
    }

    /// The magnitude that rounding errors of a score are measured by: of what is scaled and summed, whose terms' magnitudes
    /// add up to `sum`, and of what is added, whose terms' magnitudes add up to `added`.
    ///
    /// A cap takes away errors as it flattens: what is left of them is the largest slope of tanh where the score may be.
    pub fn magnitude(self, product: f64, sum: f64, added: f64) -> f64 {
        /// More than the error of a product, as a part of `sum`.
        const ERROR: f64 = 1.0 / 131_072.0;
        let scale = f64::from(self.scale.abs());
        let (scaled, sum) = (scale * product.abs(), scale * sum);
        if self.softcap == 0.0 {
            return sum + added;
        }
        let cap = f64::from(self.softcap);
        let least = (scaled - ERROR * sum).max(0.0) / cap;
        let slope = least.cosh().powi(-2);
        // 0 times an infinity is no error.
        let passed = if slope > 0.0 { slope * sum } else { 0.0 };
        passed + scaled.min(cap) + added
    }

    /// The power of two that a backend may multiply q with before the product, exactly, and the scores with -power after, so
    /// that scores within float32 come of products beyond it: 0 for every usual scale (2^-32 to 2^32). Where something is added
    /// to scores it is that of the scale from 2^-64 to 1: what is added is divided by what is left of the scale, and should
    /// stay within float32, too.
    pub fn q_power(self) -> i32 {
        let exponent = if self.scale == 0.0 { 0.0 } else { f64::from(self.scale.abs()).log2().floor() };
        let power = exponent - exponent.clamp(-32.0, 32.0);
        if self.adds() && self.softcap == 0.0 { power.min(exponent.max(-64.0)) as i32 } else { power as i32 }
    }

    /// The factor on q.k.
    pub fn scale(self) -> f32 {
        self.scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_and_their_order() {
        let none = ScoreTerms::default();
        let mut desc = AttentionDesc::new(1, 1, 4, 1);
        assert_eq!(ScoreMod::of(&desc, false).scale(), 0.5);
        desc.scale = -0.25;
        let plain = ScoreMod::of(&desc, false);
        assert_eq!((plain.score(3.0, none), plain.magnitude(3.0, 4.0, 0.0), plain.adds()), (-0.75, 1.0, false));
        assert_eq!(plain.q_power(), 0);
        for (scale, power) in [(1e-40, -101), (f32::from_bits(1), -117), (3e38, 95), (2f32.powi(-32), 0), (8.0, 0)] {
            desc.scale = scale;
            assert_eq!(ScoreMod::of(&desc, false).q_power(), power, "{scale:e}");
        }
        let added = [(0.125, -3), (0.09, -4), (1.0, 0), (8.0, 0), (2f32.powi(-33), -33), (1e-40, -101), (3e38, 95)];
        for (scale, power) in added {
            desc.scale = scale;
            assert_eq!(ScoreMod::of(&desc, true).q_power(), power, "{scale:e}");
            desc.softcap = 1.0;
            assert_eq!(ScoreMod::of(&desc, true).q_power(), ScoreMod::of(&desc, false).q_power(), "{scale:e}");
            desc.softcap = 0.0;
        }
        desc.scale = -0.25;
        let terms = ScoreTerms { slope: 0.5, bias: 2.0 };
        let biased = ScoreMod::of(&desc, true);
        assert_eq!((biased.score(3.0, terms), biased.magnitude(3.0, 3.0, 2.5), biased.adds()), (0.75, 3.25, true));
        // Slopes and bias come after the cap.
        (desc.softcap, desc.alibi, desc.mask) = (2.0, true, MaskKind::Additive);
        let all = ScoreMod::of(&desc, false);
        assert_eq!(all.score(-4e9, terms), 2.0 - 0.5 + 2.0);
        assert!((all.score(-4.0, none) - 2.0 * 0.5f64.tanh()).abs() < 1e-15);
        assert!(all.adds() && all.has_slopes() && all.softcap() == 2.0);
    }

    #[test]
    fn a_cap_takes_away_errors_where_it_is_flat() {
        let desc = AttentionDesc { softcap: 2.0, scale: 1.0, ..AttentionDesc::new(1, 1, 4, 1) };
        let capped = ScoreMod::of(&desc, false);
        assert_eq!(capped.magnitude(0.0, 8.0, 0.0), 8.0);
        assert_eq!((capped.magnitude(1e9, 1e9, 1.0), capped.magnitude(-1e300, 1e300, 0.0)), (3.0, 2.0));
        // A sum that cancels may lie anywhere.
        assert!(capped.magnitude(10.0, 1e9, 0.0) > 1e8);
    }
}
