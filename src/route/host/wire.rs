//! How partials travel: the lse of every row (f32), then the rows of o in the plan's wire type, without gaps.

use half::{bf16, f16};

use crate::attention::{AttentionDesc, Dtype};

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
        rows * (4 + self.row_bytes())
    }

    /// Most rows that fit `capacity` bytes, at least 1.
    pub fn rows(&self, capacity: usize) -> usize {
        (capacity / self.bytes(1)).max(1)
    }

    /// Writes rows to the front of `to`.
    pub fn encode(&self, to: &mut [u8], lse: &[f32], o: &[f32]) {
        let (head, body) = to.split_at_mut(4 * lse.len());
        floats_mut(head).copy_from_slice(lse);
        encode(self.dtype, &mut body[..o.len() * self.dtype.size()], o);
    }

    /// The lse of the `rows` partials in `bytes`.
    pub fn lse<'a>(&self, bytes: &'a [u8], rows: usize) -> &'a [f32] {
        floats(&bytes[..4 * rows])
    }

    /// Row `row` of the `rows` partials in `bytes`, in place or, where it has to be converted, none and in `scratch`.
    pub fn o<'a>(&self, bytes: &'a [u8], rows: usize, row: usize, scratch: &mut [f32]) -> Option<&'a [f32]> {
        let bytes = &bytes[4 * rows + row * self.row_bytes()..][..self.row_bytes()];
        if self.dtype == Dtype::F32 {
            return Some(floats(bytes));
        }
        decode(self.dtype, bytes, scratch);
        None
    }
}

/// Converts `values` into as many elements of `dtype`.
pub(in crate::route) fn encode(dtype: Dtype, to: &mut [u8], values: &[f32]) {
    let convert: fn(f32) -> u16 = match dtype {
        Dtype::F16 => |x| f16::from_f32(x).to_bits(),
        Dtype::Bf16 => |x| bf16::from_f32(x).to_bits(),
        _ => return floats_mut(to).copy_from_slice(values),
    };
    for (to, &x) in to.chunks_exact_mut(2).zip(values) {
        to.copy_from_slice(&convert(x).to_ne_bytes());
    }
}

/// Converts elements of `dtype` back.
pub(in crate::route) fn decode(dtype: Dtype, from: &[u8], values: &mut [f32]) {
    let convert: fn(u16) -> f32 = match dtype {
        Dtype::F16 => |bits| f16::from_bits(bits).to_f32(),
        Dtype::Bf16 => |bits| bf16::from_bits(bits).to_f32(),
        _ => return values.copy_from_slice(floats(from)),
    };
    for (to, from) in values.iter_mut().zip(from.chunks_exact(2)) {
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
    fn partials_go_round_without_gaps() {
        for (dtype, dim, size) in [(Dtype::F32, 3, 16), (Dtype::F16, 3, 10), (Dtype::Bf16, 5, 14)] {
            let wire = Wire { dtype, dim };
            assert_eq!((wire.bytes(1), wire.bytes(7), wire.rows(50)), (size, 7 * size, 50 / size));
            let (lse, o): (Vec<f32>, Vec<f32>) =
                ((0..7).map(|i| i as f32).collect(), (0..7 * dim).map(|i| i as f32 / 4.0).collect());
            let mut words = vec![0.0; 7 * (dim + 1)];
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
