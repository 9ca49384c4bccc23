//! What happens to a score between the product q.k and the softmax, in one place for every backend and the reference.
//!
//! The order is fixed: scale, softcap, slopes, bias. A score is
//! `slopes(softcap(scale * q.k)) + bias`, where softcap(s) = cap * tanh(s / cap), slopes subtract a head's slope times the
//! global distance, and a bias is what a mask adds, or zeta.v of the energy. Scale and zeta.v are served; the descriptor's
//! other terms are refused by [`supported`](super::capability::supported).

use super::descriptor::AttentionDesc;

/// The terms of a shape's scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoreMod {
    scale: f32,
    biased: bool,
}

impl ScoreMod {
    /// The terms of `desc`. `biased`: something is added to each score (zeta.v of the energy).
    pub fn of(desc: &AttentionDesc, biased: bool) -> ScoreMod {
        ScoreMod { scale: desc.effective_scale(), biased }
    }

    /// Whether something is added to each score.
    pub fn is_biased(self) -> bool {
        self.biased
    }

    /// The score of a product, in f64.
    #[inline]
    pub fn score(self, product: f64, bias: f64) -> f64 {
        f64::from(self.scale) * product + bias
    }

    /// The largest magnitude that the terms of a score may reach, of the sums of |q_i k_ij| and of the bias's terms.
    pub fn magnitude(self, product: f64, bias: f64) -> f64 {
        f64::from(self.scale.abs()) * product + bias
    }

    /// The power of two that a backend may multiply q with before the product, exactly, and the scores with -power after, so
    /// that scores within float32 come of products beyond it: 0 for every usual scale (2^-32 to 2^32).
    pub fn q_power(self) -> i32 {
        let exponent = if self.scale == 0.0 { 0.0 } else { f64::from(self.scale.abs()).log2().floor() };
        (exponent - exponent.clamp(-32.0, 32.0)) as i32
    }

    /// What a score is a multiple of the product by; None where it is more than that, and [`score`](Self::score) has to be
    /// asked for each.
    pub fn factor(self) -> Option<f64> {
        (!self.biased).then_some(f64::from(self.scale))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_and_their_order() {
        let mut desc = AttentionDesc::new(1, 1, 4, 1);
        assert_eq!(ScoreMod::of(&desc, false).factor(), Some(0.5));
        desc.scale = -0.25;
        let plain = ScoreMod::of(&desc, false);
        assert_eq!((plain.score(3.0, 0.0), plain.magnitude(3.0, 0.0), plain.factor()), (-0.75, 0.75, Some(-0.25)));
        assert_eq!(plain.q_power(), 0);
        for (scale, power) in [(1e-40, -101), (f32::from_bits(1), -117), (3e38, 95), (2f32.powi(-32), 0), (8.0, 0)] {
            desc.scale = scale;
            assert_eq!(ScoreMod::of(&desc, false).q_power(), power, "{scale:e}");
        }
        desc.scale = -0.25;
        let biased = ScoreMod::of(&desc, true);
        assert_eq!((biased.score(3.0, 2.0), biased.magnitude(3.0, 2.0), biased.factor()), (1.25, 2.75, None));
    }
}
