//! How partials travel: the lse of every row (two f32), then the rows of o in the plan's wire type, without gaps.

use half::{bf16, f16};

use crate::attention::{AttentionDesc, Dtype};
use crate::partial::Lse;

/// The layout of a shape's partials on the wire.
#[derive(Clone, Copy, Debug)]
pub(in crate::route) struct Wire {
    pub dtype: Dtype,
    /// Elements of a row of o.
    pub dim: usize,
}

impl Wire {
    /// The wire of a shape.
    pub fn of(desc: &AttentionDesc) -> Wire {
        Wire { dtype: desc.wire_dtype, dim: desc.head_dim_v as usize }
    }

    /// Bytes of a row of o.
    pub fn row_bytes(&self) -> usize {
        self.dim * self.dtype.size()
    }

    /// Bytes of `rows` partials.
    pub fn bytes(&self, rows: usize) -> usize {
        rows * (LSE_BYTES + self.row_bytes())
    }

    /// Most rows that fit `capacity` bytes, at least 1.
    pub fn rows(&self, capacity: usize) -> usize {
        (capacity / self.bytes(1)).max(1)
    }

    /// Writes rows to the front of `to`.
    pub fn encode(&self, to: &mut [u8], lse: &[Lse], o: &[f32]) {
        let (head, body) = to.split_at_mut(LSE_BYTES * lse.len());
        Lse::slice_mut(floats_mut(head)).copy_from_slice(lse);
        encode(self.dtype, &mut body[..o.len() * self.dtype.size()], o);
    }

    /// The lse of the `rows` partials in `bytes`.
    pub fn lse<'a>(&self, bytes: &'a [u8], rows: usize) -> &'a [Lse] {
        Lse::slice(floats(&bytes[..LSE_BYTES * rows]))
    }

    /// The o of the `rows` partials in `bytes`, in the wire type.
    pub fn all_o<'a>(&self, bytes: &'a [u8], rows: usize) -> &'a [u8] {
        &bytes[LSE_BYTES * rows..self.bytes(rows)]
    }

    /// Row `row` of the `rows` partials in `bytes`, in place or, where it has to be converted, none and in `scratch`.
    pub fn o<'a>(&self, bytes: &'a [u8], rows: usize, row: usize, scratch: &mut [f32]) -> Option<&'a [f32]> {
        let bytes = &self.all_o(bytes, rows)[row * self.row_bytes()..][..self.row_bytes()];
        if self.dtype == Dtype::F32 {
            return Some(floats(bytes));
        }
        decode(self.dtype, bytes, scratch);
        None
    }
}

/// Bytes of the lse of a row.
const LSE_BYTES: usize = size_of::<Lse>();

/// Converts `values` into as many elements of `dtype`; finite ones beyond its range become its largest, so that a value whose
/// weight is small does no more harm than that.
pub(in crate::route) fn encode(dtype: Dtype, to: &mut [u8], values: &[f32]) {
    let convert: fn(f32) -> u16 = match dtype {
        Dtype::F16 => |x| f16::from_f32(clamp_finite(x, f16::MAX.to_f32())).to_bits(),
        Dtype::Bf16 => |x| bf16::from_f32(clamp_finite(x, bf16::MAX.to_f32())).to_bits(),
        _ => return floats_mut(to).copy_from_slice(values),
    };
    for (to, &x) in to.chunks_exact_mut(size_of::<u16>()).zip(values) {
        to.copy_from_slice(&convert(x).to_ne_bytes());
    }
}

/// A finite `x` within -`most` to `most`.
fn clamp_finite(x: f32, most: f32) -> f32 {
    if x.is_finite() { x.clamp(-most, most) } else { x }
}

/// Converts elements of `dtype` back.
pub(in crate::route) fn decode(dtype: Dtype, from: &[u8], values: &mut [f32]) {
    let convert: fn(u16) -> f32 = match dtype {
        Dtype::F16 => |bits| f16::from_bits(bits).to_f32(),
        Dtype::Bf16 => |bits| bf16::from_bits(bits).to_f32(),
        _ => return values.copy_from_slice(floats(from)),
    };
    for (to, from) in values.iter_mut().zip(from.chunks_exact(size_of::<u16>())) {
        *to = convert(u16::from_ne_bytes([from[0], from[1]]));
    }
}

/// Bytes as floats; they begin at a multiple of 4.
pub(in crate::route) fn floats(bytes: &[u8]) -> &[f32] {
    // SAFETY: every bit pattern is an f32, and `align_to` gives aligned parts of the slice; what comes before the first is
    // not among the floats, which only debug builds notice.
    let (head, floats, _) = unsafe { bytes.align_to::<f32>() };
    debug_assert!(head.is_empty());
    floats
}

/// As [`floats`], to write.
pub(in crate::route) fn floats_mut(bytes: &mut [u8]) -> &mut [f32] {
    // SAFETY: as in `floats`; and every float that is written is four bytes.
    let (head, floats, _) = unsafe { bytes.align_to_mut::<f32>() };
    debug_assert!(head.is_empty());
    floats
}

/// Bytes as int32; they begin at a multiple of 4.
pub(in crate::route) fn ints_mut(bytes: &mut [u8]) -> &mut [i32] {
    // SAFETY: as in `floats_mut`, for int32.
    let (head, ints, _) = unsafe { bytes.align_to_mut::<i32>() };
    debug_assert!(head.is_empty());
    ints
}

/// Floats as bytes.
pub(in crate::route) fn bytes(floats: &[f32]) -> &[u8] {
    // SAFETY: a float is four initialised bytes, and bytes have no alignment; the length is that of the same memory.
    unsafe { std::slice::from_raw_parts(floats.as_ptr().cast(), size_of_val(floats)) }
}

/// As [`bytes`], to write.
pub(in crate::route) fn bytes_mut(floats: &mut [f32]) -> &mut [u8] {
    // SAFETY: as in `bytes`; the borrow is exclusive, and every bit pattern that is written is an f32.
    unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), size_of_val(floats)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_beyond_a_16_bit_type_become_its_largest() {
        for (dtype, most) in [(Dtype::F16, 65504.0), (Dtype::Bf16, f32::from_bits(0x7f7f_0000))] {
            let values = [7e4, -7e4, 65519.0, f32::MAX, f32::MIN, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1.0];
            let (mut bytes, mut back) = ([0; 18], [0.0; 9]);
            encode(dtype, &mut bytes, &values);
            decode(dtype, &bytes, &mut back);
            assert_eq!((back[3], back[4], back[8]), (most, -most, 1.0));
            assert!(back[..3].iter().all(|x| x.is_finite()), "{back:?}");
            assert!(back[5] == f32::INFINITY && back[6] == f32::NEG_INFINITY && back[7].is_nan());
        }
    }

    #[test]
    fn partials_go_round_without_gaps() {
        for (dtype, dim, size) in [(Dtype::F32, 3, 20), (Dtype::F16, 3, 14), (Dtype::Bf16, 5, 18)] {
            let wire = Wire { dtype, dim };
            assert_eq!((wire.bytes(1), wire.bytes(7), wire.rows(50)), (size, 7 * size, 50 / size));
            let lse: Vec<Lse> = (0..7).map(|i| Lse { high: i as f32, low: i as f32 / 1e9 }).collect();
            let o: Vec<f32> = (0..7 * dim).map(|i| i as f32 / 4.0).collect();
            let mut words = vec![0.0; 7 * (dim + 2)];
            wire.encode(bytes_mut(&mut words), &lse, &o);
            let found = bytes(&words);
            assert_eq!(wire.lse(found, 7), lse);
            for row in 0..7 {
                let mut scratch = vec![0.0; dim];
                let row_o = wire.o(found, 7, row, &mut scratch).map(<[f32]>::to_vec).unwrap_or(scratch);
                assert_eq!(row_o, o[row * dim..][..dim]);
            }
        }
        assert_eq!(Wire { dtype: Dtype::F32, dim: 1024 }.rows(16), 1);
    }
}
