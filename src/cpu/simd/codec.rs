//! Codecs: how the rows of a format become f32, a vector at a time.

use super::half_float::widen_f16;
use super::vector::Simd;
use crate::attention::dtype::Dtype;
use crate::attention::format::KvFormat;

/// Widens rows of one format.
pub trait Codec: Copy {
    /// The format.
    const FORMAT: KvFormat;
    /// Widens elements `d` to `d` + LANES of a packed row. `d` is a multiple of the lanes.
    ///
    /// # Safety
    /// The instruction set is there, and the row is valid for reads of the blocks that hold the elements.
    unsafe fn load<S: Simd>(row: *const u8, d: usize) -> S::V;
    /// Widens element `d` of a row whose blocks lie `stride` bytes apart.
    ///
    /// # Safety
    /// The row is valid for reads of the block that holds the element.
    unsafe fn load_one(row: *const u8, stride: i64, d: usize) -> f32;
}

/// f32 rows.
#[derive(Clone, Copy)]
pub struct F32;
/// f16 rows.
#[derive(Clone, Copy)]
pub struct F16;
/// bf16 rows.
#[derive(Clone, Copy)]
pub struct Bf16;

impl Codec for F32 {
    const FORMAT: KvFormat = KvFormat::of(Dtype::F32);
    #[inline(always)]
    unsafe fn load<S: Simd>(row: *const u8, d: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load(row.add(d * 4).cast()) }
    }
    #[inline(always)]
    unsafe fn load_one(row: *const u8, stride: i64, d: usize) -> f32 {
        // SAFETY: the caller's.
        unsafe { row.offset(d as isize * stride as isize).cast::<f32>().read_unaligned() }
    }
}

impl Codec for F16 {
    const FORMAT: KvFormat = KvFormat::of(Dtype::F16);
    #[inline(always)]
    unsafe fn load<S: Simd>(row: *const u8, d: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load_f16(row.add(d * 2)) }
    }
    #[inline(always)]
    unsafe fn load_one(row: *const u8, stride: i64, d: usize) -> f32 {
        // SAFETY: the caller's.
        widen_f16(unsafe { row.offset(d as isize * stride as isize).cast::<u16>().read_unaligned() })
    }
}

impl Codec for Bf16 {
    const FORMAT: KvFormat = KvFormat::of(Dtype::Bf16);
    #[inline(always)]
    unsafe fn load<S: Simd>(row: *const u8, d: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load_bf16(row.add(d * 2)) }
    }
    #[inline(always)]
    unsafe fn load_one(row: *const u8, stride: i64, d: usize) -> f32 {
        // SAFETY: the caller's.
        let bits = unsafe { row.offset(d as isize * stride as isize).cast::<u16>().read_unaligned() };
        f32::from_bits(u32::from(bits) << 16)
    }
}
