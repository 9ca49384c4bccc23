//! The log-sum-exp of a partial, in two floats.

/// A natural log-sum-exp as the sum of two floats.
///
/// Weights are differences of these, exponentiated: one f32 of 1,000 would make them wrong by 2^-15, and one of 20 by 2^-20.
/// `high` is the nearest f32, which is what callers get; `low` what it lacks, 0 where it is not finite. This is also how it
/// lies in memory and travels.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Lse {
    /// The nearest f32.
    pub high: f32,
    /// The rest.
    pub low: f32,
}

impl Lse {
    /// That of the identity: no keys.
    pub const EMPTY: Lse = Lse { high: f32::NEG_INFINITY, low: 0.0 };
    /// That of a row that went wrong.
    pub const NAN: Lse = Lse { high: f32::NAN, low: 0.0 };
    /// Floats that it takes.
    pub const FLOATS: usize = 2;

    /// The nearest to `x`.
    pub fn of(x: f64) -> Lse {
        let high = x as f32;
        let low = if high.is_finite() { (x - f64::from(high)) as f32 } else { 0.0 };
        Lse { high, low }
    }

    /// The sum.
    pub fn value(self) -> f64 {
        f64::from(self.high) + f64::from(self.low)
    }

    /// Whether this is the identity's.
    pub fn is_empty(self) -> bool {
        self.high == f32::NEG_INFINITY
    }

    /// Whether it makes its row NaN: NaN or +inf.
    pub fn is_bad(self) -> bool {
        self.high.is_nan() || self.high == f32::INFINITY
    }

    /// Pairs of floats as log-sum-exps; an odd last one is left out.
    pub fn slice(floats: &[f32]) -> &[Lse] {
        // SAFETY: an `Lse` is two floats side by side with the alignment of one, and every bit pattern is a value; the length
        // is that of the same memory.
        unsafe { std::slice::from_raw_parts(floats.as_ptr().cast(), floats.len() / Lse::FLOATS) }
    }

    /// As [`Lse::slice`], to write.
    pub fn slice_mut(floats: &mut [f32]) -> &mut [Lse] {
        // SAFETY: as in `slice`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), floats.len() / Lse::FLOATS) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_floats_hold_48_bits() {
        for x in [0.0, 1.0, -30_000.250_001, 1e-30, 88.123_456_789_012_3, f64::from(f32::MAX)] {
            let lse = Lse::of(x);
            assert_eq!(lse.high, x as f32);
            assert!((lse.value() - x).abs() <= x.abs() * 2f64.powi(-48), "{x}");
        }
        assert_eq!(Lse::of(f64::NEG_INFINITY), Lse::EMPTY);
        assert!(Lse::of(f64::NAN).is_bad() && Lse::of(1e300).is_bad() && !Lse::EMPTY.is_bad() && Lse::EMPTY.is_empty());
        let mut floats = [1.0, 2.0, 3.0];
        Lse::slice_mut(&mut floats)[0] = Lse { high: 7.0, low: 8.0 };
        assert_eq!((floats, Lse::slice(&floats).len()), ([7.0, 8.0, 3.0], 1));
    }
}
