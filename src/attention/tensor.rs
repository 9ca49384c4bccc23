//! Tensors: a pointer, the bytes that may be touched behind it, and byte strides.

use std::ffi::c_void;

use super::dtype::Dtype;
use super::format::KvFormat;
use crate::error::{Error, Result};

/// A caller's buffer with byte strides; what the dimensions mean is said where the tensor is used.
///
/// All strides zero means packed (row-major, in the order of the dimensions). Otherwise every stride is taken as it
/// is, so that a zero broadcasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Tensor {
    /// First element.
    pub data: *mut c_void,
    /// Bytes from `data` that the library may touch.
    pub bytes: u64,
    /// Byte strides, outermost dimension first; those past the last dimension are ignored.
    pub stride: [i64; 4],
}

// SAFETY: a Tensor is an address and numbers. Nothing here reads through the address; the unsafe code that does says who
// keeps the memory alive.
unsafe impl Send for Tensor {}
// SAFETY: as for Send: sharing it shares numbers.
unsafe impl Sync for Tensor {}

impl Tensor {
    /// No tensor.
    pub const NULL: Tensor = Tensor { data: std::ptr::null_mut(), bytes: 0, stride: [0; 4] };

    /// A packed tensor over a slice that the library will only read.
    pub fn from_slice<T>(data: &[T]) -> Tensor {
        Tensor { data: data.as_ptr() as *mut c_void, bytes: size_of_val(data) as u64, stride: [0; 4] }
    }

    /// A packed tensor over a slice that the library may write.
    pub fn from_slice_mut<T>(data: &mut [T]) -> Tensor {
        Tensor { data: data.as_mut_ptr().cast(), bytes: size_of_val(data) as u64, stride: [0; 4] }
    }

    /// The same buffer with byte strides.
    #[must_use]
    pub fn with_strides(mut self, stride: [i64; 4]) -> Tensor {
        self.stride = stride;
        self
    }

    /// Checks pointer, alignment, strides and extent for dimensions `dims` (outermost first; at most 4) and gives
    /// the strides to use. A tensor with a zero dimension touches nothing and needs no data.
    pub fn resolve(&self, name: &str, dtype: Dtype, dims: &[i64]) -> Result<[i64; 4]> {
        let format = KvFormat::of(dtype);
        let stride = self.strides_for(name, format, dims)?;
        if dims.contains(&0) {
            return Ok(stride);
        }
        if self.data.is_null() {
            return Err(Error::invalid(format_args!("{name}.data"), "NULL", "a pointer"));
        }
        if !(self.data as usize).is_multiple_of(format.alignment()) {
            let wanted = format!("a pointer aligned to {} bytes", format.alignment());
            return Err(Error::invalid(format_args!("{name}.data"), format_args!("{:p}", self.data), wanted));
        }
        let mut extent = format.block_bytes() as u64;
        let counts = format.block_dims(dims);
        for (dim, (&n, &s)) in counts[..dims.len()].iter().zip(&stride).enumerate() {
            let span = u64::try_from(n - 1).ok().and_then(|n| n.checked_mul(s as u64));
            extent = span.and_then(|span| extent.checked_add(span)).ok_or_else(|| {
                Error::invalid(format_args!("{name}.stride[{dim}]"), s, "an extent that fits 64 bits")
            })?;
        }
        if extent > self.bytes {
            let wanted =
                format!("at least {extent} for dimensions {dims:?} with byte strides {:?}", &stride[..dims.len()]);
            return Err(Error::invalid(format_args!("{name}.bytes"), self.bytes, wanted));
        }
        if (self.data as u64).checked_add(self.bytes).is_none() {
            return Err(Error::invalid(format_args!("{name}.bytes"), self.bytes, "a buffer that ends below 2^64"));
        }
        Ok(stride)
    }

    /// The strides to use for `dims`: the packed ones where all are zero, else these, checked for sign and alignment.
    fn strides_for(&self, name: &str, format: KvFormat, dims: &[i64]) -> Result<[i64; 4]> {
        let mut stride = self.stride;
        if stride[..dims.len()].iter().all(|&s| s == 0) {
            let packed = format.packed_strides(name, dims)?;
            stride[..dims.len()].copy_from_slice(&packed[..dims.len()]);
        }
        for (dim, &s) in stride[..dims.len()].iter().enumerate() {
            let align = format.alignment() as i64;
            if s < 0 || s % align != 0 {
                let wanted = format!("a byte stride of at least 0, a multiple of {align}");
                return Err(Error::invalid(format_args!("{name}.stride[{dim}]"), s, wanted));
            }
        }
        Ok(stride)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn packed_strides_and_extents() {
        let data = [0f32; 24];
        let t = Tensor::from_slice(&data);
        assert_eq!(t.resolve("q", Dtype::F32, &[2, 3, 4]).unwrap()[..3], [48, 16, 4]);
        let err = t.resolve("q", Dtype::F32, &[2, 3, 5]).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::InvalidArgument);
        assert!(err.message().contains("q.bytes: found 96, wanted at least 120"), "{err}");
        assert!(Tensor::NULL.resolve("q", Dtype::F32, &[0, 3, 5]).is_ok());
        assert!(Tensor::NULL.resolve("q", Dtype::F32, &[1, 3, 5]).is_err());
    }

    #[test]
    fn strides_that_overflow_are_refused() {
        let data = [0f32; 24];
        let t = Tensor::from_slice(&data).with_strides([i64::MAX & !3, 4, 4, 0]);
        assert!(
            t.resolve("k", Dtype::F32, &[i64::from(i32::MAX), 2, 2]).unwrap_err().message().contains("k.stride[0]")
        );
        let t = Tensor::from_slice(&data).with_strides([-16, 4, 4, 0]);
        assert!(t.resolve("k", Dtype::F32, &[2, 2, 2]).is_err());
    }
}
