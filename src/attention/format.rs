//! How the elements of a row lie in memory: the only place that knows that an element has a size.
//!
//! Tensors, steps, the packed copies that ranks pass round and the reference ask here; the CPU's and the GPU's own
//! widening (`cpu::simd`, `kernels/loads.cuh`) are chosen by the format. A new format is a new arm in each function here
//! and in `block`, which says what the bytes of a block stand for, and a codec in each backend that is to serve it.

use half::{bf16, f16};

use super::block;
use super::dtype::Dtype;
use crate::error::{Error, Result};

/// The memory format of rows: elements are stored in blocks of a fixed number of elements and bytes, one after the other.
///
/// A plain float is a block of one element. Strides along a row count from block to block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvFormat {
    dtype: Dtype,
}

impl Dtype {
    /// Bytes of an element of a plain float type; of a block of any other.
    pub const fn size(self) -> usize {
        KvFormat::of(self).block_bytes()
    }
}

impl KvFormat {
    /// The format of an element type.
    pub const fn of(dtype: Dtype) -> KvFormat {
        KvFormat { dtype }
    }

    /// The element type.
    pub const fn dtype(self) -> Dtype {
        self.dtype
    }

    /// Elements of a block.
    pub const fn block_elements(self) -> usize {
        match self.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::Bf16 | Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::Int8 => 1,
            Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q4_1 | Dtype::Q5_0 | Dtype::Q5_1 | Dtype::Iq4Nl => 32,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self.dtype {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::Int8 => 1,
            Dtype::Q8_0 => 2 + 32,
            Dtype::Q4_0 | Dtype::Iq4Nl => 2 + 16,
            Dtype::Q4_1 => 4 + 16,
            Dtype::Q5_0 => 2 + 4 + 16,
            Dtype::Q5_1 => 4 + 4 + 16,
        }
    }

    /// What addresses and strides are multiples of, in bytes: the size of the largest number in a block.
    pub const fn alignment(self) -> usize {
        match self.dtype {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q4_1 | Dtype::Q5_0 | Dtype::Q5_1 | Dtype::Iq4Nl => 2,
            Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::Int8 => 1,
        }
    }

    /// Blocks of a row of `dim` elements.
    pub const fn blocks(self, dim: usize) -> usize {
        dim.div_ceil(self.block_elements())
    }

    /// Bytes of a packed row of `dim` elements.
    pub const fn row_bytes(self, dim: usize) -> usize {
        self.blocks(dim) * self.block_bytes()
    }

    /// Whether the blocks of a row with this byte stride lie side by side.
    pub const fn is_packed(self, stride: i64) -> bool {
        stride == self.block_bytes() as i64
    }

    /// Byte strides of a packed tensor of dimensions `dims`, outermost dimension first, a row of elements last; at most 4
    /// dimensions. `name` names the tensor in the error for sizes beyond 63 bits.
    pub fn packed_strides(self, name: &str, dims: &[i64]) -> Result<[i64; 4]> {
        let mut stride = [0; 4];
        let mut next = self.block_bytes() as i64;
        for (dim, count) in self.block_dims(dims).into_iter().enumerate().take(dims.len()).rev() {
            stride[dim] = next;
            next = next.checked_mul(count.max(1)).ok_or_else(|| {
                Error::invalid(format_args!("{name} dimensions"), format_args!("{dims:?}"), "a size that fits 63 bits")
            })?;
        }
        Ok(stride)
    }

    /// `dims` with the last dimension counted in blocks; 0 past its end.
    pub fn block_dims(self, dims: &[i64]) -> [i64; 4] {
        let mut counts = [0; 4];
        counts[..dims.len()].copy_from_slice(dims);
        if let Some(last) = dims.len().checked_sub(1) {
            counts[last] = self.blocks(usize::try_from(dims[last]).unwrap_or(0)) as i64;
        }
        counts
    }

    /// Widens a row to f64 in plain code: the reference's way. Each element is the f32 that the format stands for.
    ///
    /// # Safety
    /// `row` is valid for reads of every block of `out.len()` elements, `stride` bytes from block to block.
    pub unsafe fn widen_row(self, row: *const u8, stride: i64, out: &mut [f64]) {
        let at = |i: usize| row.wrapping_offset(i as isize * stride as isize);
        for (i, out) in out.chunks_mut(self.block_elements()).enumerate() {
            // SAFETY: `chunks_mut` gives as many chunks as the elements take blocks, and each of these is readable; reads need
            // no alignment.
            unsafe {
                match (self.dtype, &mut *out) {
                    (Dtype::F32, [out]) => *out = f64::from(at(i).cast::<f32>().read_unaligned()),
                    (Dtype::F16, [out]) => *out = at(i).cast::<f16>().read_unaligned().to_f64(),
                    (Dtype::Bf16, [out]) => *out = at(i).cast::<bf16>().read_unaligned().to_f64(),
                    _ => block::widen(self.dtype, std::slice::from_raw_parts(at(i), self.block_bytes()), out),
                }
            }
        }
    }

    /// What element `i` of a block, which holds as many bytes as [`block_bytes`](Self::block_bytes), stands for.
    pub fn element(self, block: &[u8], i: usize) -> f32 {
        block::element(self.dtype, block, i)
    }

    /// The nearest that a packed row of this format has to these values, as bytes: as many as [`row_bytes`](Self::row_bytes).
    /// NaN becomes NaN where the format has one; what is beyond a format's range becomes its largest.
    pub fn narrow_row(self, values: &[f32], out: &mut [u8]) {
        for (values, out) in values.chunks(self.block_elements()).zip(out.chunks_exact_mut(self.block_bytes())) {
            block::narrow(self.dtype, values, out);
        }
    }

    /// Copies a row of `dim` elements block by block to packed memory.
    ///
    /// # Safety
    /// `from` is valid for reads of every block, `stride` bytes from block to block; `to` is valid for writes of
    /// [`row_bytes`](Self::row_bytes); the two do not overlap.
    pub unsafe fn pack_row(self, from: *const u8, stride: i64, dim: usize, to: *mut u8) {
        let bytes = self.block_bytes();
        for i in 0..self.blocks(dim) {
            // SAFETY: `i` is below the blocks of `dim` elements: block `i` of `from` is readable, and `to` has room for as many
            // packed ones, which do not overlap it.
            unsafe {
                let from = from.offset(i as isize * stride as isize);
                std::ptr::copy_nonoverlapping(from, to.add(i * bytes), bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_and_rows() {
        let sizes = |dtype, dim| (KvFormat::of(dtype).blocks(dim), KvFormat::of(dtype).row_bytes(dim));
        assert_eq!(sizes(Dtype::F32, 3), (3, 12));
        assert_eq!(sizes(Dtype::Bf16, 128), (128, 256));
        assert_eq!(sizes(Dtype::F8E4M3, 5), (5, 5));
        assert_eq!(sizes(Dtype::Q8_0, 128), (4, 136));
        assert_eq!(sizes(Dtype::Q4_0, 64), (2, 36));
        assert_eq!((sizes(Dtype::Q4_1, 32), sizes(Dtype::Iq4Nl, 32)), ((1, 20), (1, 18)));
        assert_eq!((sizes(Dtype::Q5_0, 96), sizes(Dtype::Q5_1, 32), sizes(Dtype::Int8, 7)), ((3, 66), (1, 24), (7, 7)));
    }

    #[test]
    fn packed_strides_count_blocks() {
        let strides = |dtype, dims: &[i64]| KvFormat::of(dtype).packed_strides("k", dims).unwrap();
        assert_eq!(strides(Dtype::F16, &[2, 5, 3, 8]), [240, 48, 16, 2]);
        assert_eq!(strides(Dtype::Q8_0, &[2, 5, 3, 64]), [1020, 204, 68, 34]);
        assert_eq!(strides(Dtype::F32, &[7, 2]), [8, 4, 0, 0]);
        assert_eq!(strides(Dtype::F32, &[7, 0, 2]), [8, 8, 4, 0]);
        let error = KvFormat::of(Dtype::F32).packed_strides("k", &[1, i64::MAX / 2, 3, 2]).unwrap_err();
        assert!(error.message().starts_with("k dimensions"), "{error}");
    }

    #[test]
    fn rows_are_packed_and_widened_by_stride() {
        let strided: Vec<u8> =
            [1.5f32, -2.0, 7.0].iter().flat_map(|&x| [f16::from_f32(x), f16::NAN]).flat_map(f16::to_ne_bytes).collect();
        let (mut packed, mut wide, format) = ([0u8; 6], [0.0; 3], KvFormat::of(Dtype::F16));
        // SAFETY: three blocks of 2 bytes, 4 apart, then side by side.
        unsafe {
            format.pack_row(strided.as_ptr(), 4, 3, packed.as_mut_ptr());
            format.widen_row(packed.as_ptr(), 2, &mut wide);
        }
        assert_eq!(wide, [1.5, -2.0, 7.0]);
    }
}
