//! Where merged rows go: rounded once, into the caller's strides and element type.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::attention::Dtype;
use crate::partial::RowTarget;

impl RowTarget {
    /// Writes one row. `head` counts from the output's own first head.
    ///
    /// # Safety
    /// The target is of host memory and was resolved for a shape that contains (token, head); the row is valid for writes
    /// by this thread.
    pub(super) unsafe fn write(&self, token: usize, head: usize, o: &[f32], lse: f32) {
        let [s_token, s_head, s_dim] = self.o_stride;
        let offset = token as i64 * s_token + head as i64 * s_head;
        debug_assert_eq!(o.len(), self.dim as usize);
        // SAFETY: the offsets lie inside the extent that `Tensor::resolve` checked; alignment was checked with it.
        unsafe {
            let row = (self.o as *mut u8).offset(offset as isize);
            match self.dtype {
                Dtype::F16 if s_dim == 2 => packed::<f16>(row, o.len()).convert_from_f32_slice(o),
                Dtype::F32 => scatter(row.cast::<f32>(), s_dim, o, |x| x),
                Dtype::F16 => scatter(row.cast::<f16>(), s_dim, o, f16::from_f32),
                Dtype::Bf16 => scatter(row.cast::<bf16>(), s_dim, o, bf16::from_f32),
                Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::Q8_0 | Dtype::Q4_0 => {}
            }
            if self.lse != 0 {
                let offset = token as i64 * self.lse_stride[0] + head as i64 * self.lse_stride[1];
                (self.lse as *mut u8).offset(offset as isize).cast::<f32>().write(lse);
            }
        }
    }

    /// Writes NaN to every row: what a step that did not come off leaves behind.
    ///
    /// # Safety
    /// As [`RowTarget::write`] for all rows.
    pub(super) unsafe fn poison(&self, tokens: usize, heads: usize, scratch: &mut [f32]) {
        let row = &mut scratch[..self.dim as usize];
        row.fill(f32::NAN);
        for token in 0..tokens {
            for head in 0..heads {
                // SAFETY: the caller's promise covers every (token, head) below these bounds.
                unsafe { self.write(token, head, row, f32::NAN) };
            }
        }
    }
}

/// A packed row as a slice, for conversions that take several elements at once.
///
/// # Safety
/// `row` is aligned and valid for writes of `len` elements that nothing else uses meanwhile.
unsafe fn packed<'a, T>(row: *mut u8, len: usize) -> &'a mut [T] {
    // SAFETY: as the caller vouches; every bit pattern of the 16-bit floats is a value.
    unsafe { std::slice::from_raw_parts_mut(row.cast(), len) }
}

/// Stores a converted row with a byte stride.
///
/// # Safety
/// `row` is aligned and valid for writes of `o.len()` elements `stride` bytes apart.
unsafe fn scatter<T>(row: *mut T, stride: i64, o: &[f32], convert: impl Fn(f32) -> T) {
    if stride == size_of::<T>() as i64 {
        for (i, &x) in o.iter().enumerate() {
            // SAFETY: packed elements, as the caller vouches.
            unsafe { row.add(i).write(convert(x)) };
        }
    } else {
        for (i, &x) in o.iter().enumerate() {
            // SAFETY: strided elements, as the caller vouches.
            unsafe { row.byte_offset(i as isize * stride as isize).write(convert(x)) };
        }
    }
}
