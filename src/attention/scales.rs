//! Scales of keys and values: an f32 factor a token and kv head, by strides of which any may be 0.

use super::dtype::Dtype;
use super::tensor::Tensor;
use crate::error::{Error, Result};

/// The byte strides of scales [sequence or page, token or slot, kv head], as they are, checked for `dims`, how many there are of each;
/// zeros where there are none. `needed` says why they must be there.
pub(super) fn strides(name: &str, scales: &Tensor, dims: [i64; 3], needed: Option<String>) -> Result<[i64; 4]> {
    if scales.data.is_null() {
        return match needed {
            Some(why) => Err(Error::invalid(name, "NULL", format_args!("f32 scales, because {why}"))),
            None => Ok([0; 4]),
        };
    }
    let [a, b, c, _] = scales.stride;
    // Unlike other tensors', zeros throughout are no packed strides but one scale for all.
    let all = [a, b, c, Dtype::F32.size() as i64];
    let [x, y, z] = dims;
    scales.with_strides(all).resolve(name, Dtype::F32, &[x, y, z, 1])?;
    Ok([a, b, c, 0])
}

/// A scale as it counts: one that is no finite number makes whatever it scales NaN.
pub fn finite_or_nan(scale: f32) -> f32 {
    if scale.is_finite() { scale } else { f32::NAN }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_are_taken_as_they_are() {
        let data = [1f32; 24];
        let of = |stride, dims| strides("k_scale", &Tensor::from_slice(&data).with_strides(stride), dims, None);
        assert_eq!(of([0; 4], [5, 100, 7]).unwrap(), [0; 4]);
        assert_eq!(of([0, 0, 4, 9], [5, 100, 24]).unwrap(), [0, 0, 4, 0]);
        assert_eq!(of([32, 8, 4, 0], [3, 4, 2]).unwrap(), [32, 8, 4, 0]);
        for (stride, dims) in [([32, 8, 4, 0], [3, 4, 3]), ([0, 0, 2, 0], [1, 1, 2]), ([0, -4, 4, 0], [1, 1, 1])] {
            assert!(of(stride, dims).unwrap_err().message().starts_with("k_scale."), "{stride:?}");
        }
        assert_eq!(strides("k_scale", &Tensor::NULL, [1; 3], None).unwrap(), [0; 4]);
        let error = strides("v_scale", &Tensor::NULL, [1; 3], Some("v_dtype is int8".into())).unwrap_err();
        assert_eq!(error.message(), "v_scale: found NULL, wanted f32 scales, because v_dtype is int8");
    }
}
