//! What queries, keys and values are made of.

use half::{bf16, f16};
use treeattn::attention::Dtype;

use super::rng::Rng;

/// A way to fill q, k and v.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Values {
    /// Standard normal throughout.
    Normal,
    /// Scores of tens to hundreds, both signs.
    Peaky,
    /// All scores equal, whole numbers in V.
    Equal,
    /// Nearly equal scores over values that cancel.
    Cancelling,
    /// q, k and v anywhere up to where float32 scores still fit.
    Huge,
    /// Subnormal K and V.
    Subnormal,
    /// Scores that rise from key to key, so that the maximum moves all the time.
    Rising,
    /// Scores that fall from key to key.
    Falling,
    /// A few keys far above the others.
    Outliers,
}

impl Values {
    pub const ALL: [Values; 9] = [
        Values::Normal,
        Values::Peaky,
        Values::Equal,
        Values::Cancelling,
        Values::Huge,
        Values::Subnormal,
        Values::Rising,
        Values::Falling,
        Values::Outliers,
    ];
}

/// `x` as the nearest finite number of a type.
pub fn store(x: f64, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F16 => f16::from_f64(x.clamp(-65504.0, 65504.0)).to_f32(),
        Dtype::Bf16 => {
            let top = f64::from(bf16::MAX.to_f32());
            bf16::from_f64(x.clamp(-top, top)).to_f32()
        }
        _ => x.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32,
    }
}

/// Fills one tensor's worth at a time.
pub struct Maker<'a> {
    pub values: Values,
    pub rng: &'a mut Rng,
    pub dim_qk: usize,
    pub scale: f64,
    /// The largest |v| to make.
    pub v_most: f64,
}

impl Maker<'_> {
    /// Element of q.
    pub fn q(&mut self) -> f64 {
        let unit = 1.0 / (self.scale.abs() * (self.dim_qk as f64).sqrt());
        match self.values {
            Values::Peaky => self.rng.normal() * unit.clamp(1e-3, 1e3) * 60.0,
            Values::Equal => 0.5,
            Values::Cancelling => self.rng.normal() * 0.01,
            Values::Huge => self.rng.normal() * 10f64.powf(self.rng.unit() * 17.0),
            Values::Rising | Values::Falling => 1.0 + 0.3 * self.rng.normal(),
            _ => self.rng.normal(),
        }
    }

    /// Element of the key at `position` of `keys`.
    pub fn k(&mut self, position: usize, keys: usize) -> f64 {
        let slope = 100.0 * position as f64 / keys.max(1) as f64 / (self.scale.abs() * self.dim_qk as f64);
        match self.values {
            Values::Equal => 0.25,
            Values::Huge => self.rng.normal() * 10f64.powf(self.rng.unit() * 17.0),
            Values::Subnormal => self.rng.normal() * 2f64.powi(-130),
            Values::Rising => slope * (1.0 + 0.3 * self.rng.normal()),
            Values::Falling => -slope * (1.0 + 0.3 * self.rng.normal()),
            Values::Outliers if self.rng.chance(2) => self.rng.normal() * 20.0,
            _ => self.rng.normal(),
        }
    }

    /// Element of the value at `position`.
    pub fn v(&mut self, position: usize) -> f64 {
        let x = match self.values {
            Values::Equal => self.rng.range(0, 16) as f64 - 8.0,
            Values::Cancelling => {
                let sign = if position.is_multiple_of(2) { 1.0 } else { -1.0 };
                sign * 1000.0 * (1.0 + 0.001 * self.rng.normal())
            }
            Values::Huge => self.rng.normal() * 10f64.powf(self.rng.unit() * 45.0 - 20.0),
            Values::Subnormal => self.rng.normal() * 2f64.powi(self.rng.pick(&[-133, -140, -16, -24])),
            _ => self.rng.normal(),
        };
        x.clamp(-self.v_most, self.v_most)
    }
}
