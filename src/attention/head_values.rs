//! One number a query head: sinks, slopes and factors of masks.

use super::dtype::Dtype;
use super::tensor::Tensor;
use crate::error::Result;

/// f32 numbers, one a query head, in a step's memory.
#[derive(Clone, Copy, Debug)]
pub struct HeadValues {
    data: *const f32,
    stride: i64,
}

// SAFETY: an address and a number. Nothing here reads through the address but `get`, whose caller says who keeps it alive.
unsafe impl Send for HeadValues {}
// SAFETY: as for Send: sharing it shares numbers.
unsafe impl Sync for HeadValues {}

impl HeadValues {
    /// None.
    pub const NONE: HeadValues = HeadValues { data: std::ptr::null(), stride: 0 };

    /// The numbers of `heads` heads in `tensor`, checked for pointer, alignment and extent. `name` names it in errors.
    pub(super) fn resolve(name: &str, tensor: &Tensor, heads: i64) -> Result<HeadValues> {
        let stride = tensor.resolve(name, Dtype::F32, &[heads])?;
        Ok(HeadValues { data: tensor.data.cast_const().cast(), stride: stride[0] })
    }

    /// Whether there are none.
    pub fn is_none(self) -> bool {
        self.data.is_null()
    }

    /// Where that of head 0 lies, and the bytes to the next one's.
    pub(crate) fn data_and_stride(self) -> (*const f32, i64) {
        (self.data, self.stride)
    }

    /// That of head `head`; `default` where there are none.
    ///
    /// # Safety
    /// `head` is below the number of heads that it was resolved for, and the tensor is host memory, valid for reads.
    pub unsafe fn get(self, head: usize, default: f32) -> f32 {
        if self.data.is_null() {
            return default;
        }
        // SAFETY: inside the extent that `resolve` checked, aligned as it checked; the caller keeps it valid.
        unsafe { self.data.byte_offset(head as isize * self.stride as isize).read() }
    }
}
