//! Codecs: how the rows of a format become f32, a vector at a time.

use super::half_float::{widen_f8_e4m3, widen_f8_e5m2, widen_f16};
use super::vector::Simd;
use crate::attention::IQ4_NL;
use crate::attention::dtype::Dtype;
use crate::attention::format::KvFormat;

/// Elements of a ggml block.
const BLOCK: usize = 32;

/// Whether rows are widened by [`Codec::load_pair`] as far as they have whole pairs: where that is less work than two loads
/// and both vectors are of one block.
#[inline(always)]
pub const fn paired<S: Simd, E: Codec>() -> bool {
    E::PAIRED && 2 * S::LANES == BLOCK
}

/// Widens rows of one format.
pub trait Codec: Copy {
    /// The format.
    const FORMAT: KvFormat;
    /// Whether [`load_pair`](Self::load_pair) is less work than two loads.
    const PAIRED: bool = Self::FORMAT.block_elements() == BLOCK;
    /// Widens elements `d` to `d` + LANES of a packed row. `d` is a multiple of the lanes.
    ///
    /// # Safety
    /// The instruction set is there, and the row is valid for reads of the blocks that hold the elements.
    unsafe fn load<S: Simd>(row: *const u8, d: usize) -> S::V;
    /// Widens elements `d` to `d` + 2 LANES of a packed row. `d` is a multiple of twice the lanes, of which a block has no
    /// more ([`paired`]).
    ///
    /// # Safety
    /// As [`load`](Self::load).
    #[inline(always)]
    unsafe fn load_pair<S: Simd>(row: *const u8, d: usize) -> [S::V; 2] {
        // SAFETY: the caller's.
        unsafe { [Self::load::<S>(row, d), Self::load::<S>(row, d + S::LANES)] }
    }
    /// Widens element `d` of a row whose blocks lie `stride` bytes apart.
    ///
    /// # Safety
    /// The row is valid for reads of the block that holds the element.
    #[inline(always)]
    unsafe fn load_one(row: *const u8, stride: i64, d: usize) -> f32 {
        let (n, bytes) = (Self::FORMAT.block_elements(), Self::FORMAT.block_bytes());
        // SAFETY: element `d` is in block `d / n`, which is readable and that many strides from the row.
        let block = unsafe { std::slice::from_raw_parts(row.offset((d / n) as isize * stride as isize), bytes) };
        Self::FORMAT.element(block, d % n)
    }
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
        // SAFETY: the row is packed and has the elements `d` to `d` + LANES, which begin that many elements from it.
        unsafe { S::load(row.add(d * 4).cast()) }
    }
    #[inline(always)]
    unsafe fn load_one(row: *const u8, stride: i64, d: usize) -> f32 {
        // SAFETY: a block of this format is one element, so that element `d` is `d` strides from the row, and readable.
        unsafe { row.offset(d as isize * stride as isize).cast::<f32>().read_unaligned() }
    }
}

impl Codec for F16 {
    const FORMAT: KvFormat = KvFormat::of(Dtype::F16);
    #[inline(always)]
    unsafe fn load<S: Simd>(row: *const u8, d: usize) -> S::V {
        // SAFETY: the row is packed and has the elements `d` to `d` + LANES, which begin that many elements from it.
        unsafe { S::load_f16(row.add(d * 2)) }
    }
    #[inline(always)]
    unsafe fn load_one(row: *const u8, stride: i64, d: usize) -> f32 {
        // SAFETY: a block of this format is one element, so that element `d` is `d` strides from the row, and readable.
        widen_f16(unsafe { row.offset(d as isize * stride as isize).cast::<u16>().read_unaligned() })
    }
}

impl Codec for Bf16 {
    const FORMAT: KvFormat = KvFormat::of(Dtype::Bf16);
    #[inline(always)]
    unsafe fn load<S: Simd>(row: *const u8, d: usize) -> S::V {
        // SAFETY: the row is packed and has the elements `d` to `d` + LANES, which begin that many elements from it.
        unsafe { S::load_bf16(row.add(d * 2)) }
    }
    #[inline(always)]
    unsafe fn load_one(row: *const u8, stride: i64, d: usize) -> f32 {
        // SAFETY: a block of this format is one element, so that element `d` is `d` strides from the row, and readable.
        let bits = unsafe { row.offset(d as isize * stride as isize).cast::<u16>().read_unaligned() };
        f32::from_bits(u32::from(bits) << 16)
    }
}

/// Rows of bytes that are numbers by themselves.
macro_rules! of_bytes {
    ($($name:ident: $dtype:ident, $load:ident, $one:expr;)+) => {$(
        #[doc = concat!(stringify!($dtype), " rows.")]
        #[derive(Clone, Copy)]
        pub struct $name;

        impl Codec for $name {
            const FORMAT: KvFormat = KvFormat::of(Dtype::$dtype);
            #[inline(always)]
            unsafe fn load<S: Simd>(row: *const u8, d: usize) -> S::V {
                // SAFETY: the row is packed and has the elements `d` to `d` + LANES, which begin that many elements from it.
                unsafe { S::$load(row.add(d)) }
            }
            #[inline(always)]
            unsafe fn load_one(row: *const u8, stride: i64, d: usize) -> f32 {
                let one: fn(u8) -> f32 = $one;
                // SAFETY: a block of this format is one element, so that element `d` is `d` strides from the row, and readable.
                one(unsafe { row.offset(d as isize * stride as isize).read() })
            }
        }
    )+};
}

of_bytes! {
    F8E4M3: F8E4M3, load_f8_e4m3, widen_f8_e4m3;
    F8E5M2: F8E5M2, load_f8_e5m2, widen_f8_e5m2;
    Int8: Int8, load_int8, |byte| f32::from(byte as i8);
}

/// f8_e4m3 rows on processors that have [`Simd::load_f8_e4m3_pair`].
#[derive(Clone, Copy)]
pub struct F8E4M3InPairs;

impl Codec for F8E4M3InPairs {
    const FORMAT: KvFormat = F8E4M3::FORMAT;
    const PAIRED: bool = true;
    #[inline(always)]
    unsafe fn load<S: Simd>(row: *const u8, d: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { F8E4M3::load::<S>(row, d) }
    }
    #[inline(always)]
    unsafe fn load_pair<S: Simd>(row: *const u8, d: usize) -> [S::V; 2] {
        // SAFETY: the row is packed and has the elements `d` to `d` + 2 LANES, which begin that many bytes from it; kernels of
        // this codec are for processors that have the method (`kernel::table`).
        unsafe { S::load_f8_e4m3_pair(row.add(d)) }
    }
}

/// Rows of ggml blocks.
#[derive(Clone, Copy)]
pub struct Q8_0;

impl Codec for Q8_0 {
    const FORMAT: KvFormat = KvFormat::of(Dtype::Q8_0);
    #[inline(always)]
    unsafe fn load<S: Simd>(row: *const u8, d: usize) -> S::V {
        // SAFETY: the caller's; a vector never ends past its block, whose 32 elements the lanes divide.
        unsafe {
            let block = block::<Q8_0>(row, d);
            S::mul(S::load_int8(block.add(2 + d % 32)), S::splat_f16(block))
        }
    }
    #[inline(always)]
    unsafe fn load_pair<S: Simd>(row: *const u8, d: usize) -> [S::V; 2] {
        // SAFETY: the caller's; the two vectors are those of the block.
        unsafe {
            let block = block::<Q8_0>(row, d);
            let (scale, codes) = (S::splat_f16(block), block.add(2));
            [S::mul(S::load_int8(codes), scale), S::mul(S::load_int8(codes.add(S::LANES)), scale)]
        }
    }
}

/// 0 to 15, from `low` on.
const fn count_from(low: i8) -> [i8; 16] {
    let mut table = [low; 16];
    let mut i = 0;
    while i < 16 {
        table[i] += i as i8;
        i += 1;
    }
    table
}

/// Rows of ggml blocks of 4 bits, and of a fifth one, by table: what the block's scale is multiplied by where the fifth bit
/// is not set. `minimum`: 2 bytes behind the scale.
macro_rules! of_four_bits {
    ($($name:ident: $dtype:ident, $table:expr, $minimum:literal, $fifth:literal;)+) => {$(
        #[doc = concat!("Rows of ", stringify!($dtype), " blocks.")]
        #[derive(Clone, Copy)]
        pub struct $name;

        impl Codec for $name {
            const FORMAT: KvFormat = KvFormat::of(Dtype::$dtype);
            #[inline(always)]
            unsafe fn load<S: Simd>(row: *const u8, d: usize) -> S::V {
                const TABLE: [i8; 16] = $table;
                // SAFETY: the caller's; a vector never ends past half a block, whose 16 bytes the lanes divide.
                unsafe {
                    let block = block::<$name>(row, d);
                    let bits = block.add(if $minimum { 4 } else { 2 });
                    let codes = bits.add(if $fifth { 4 } else { 0 });
                    let mut q = S::load_entries(&TABLE, codes.add(d % 16), d % 32 >= 16);
                    if $fifth {
                        q = S::add_where(q, bits.cast::<u32>().read_unaligned() >> (d % 32), 16.0);
                    }
                    let scale = S::splat_f16(block);
                    // The product is exact in f32, so that the sum is rounded once, fused or not.
                    if $minimum { S::fma(q, scale, S::splat_f16(block.add(2))) } else { S::mul(q, scale) }
                }
            }
            #[inline(always)]
            unsafe fn load_pair<S: Simd>(row: *const u8, d: usize) -> [S::V; 2] {
                const TABLE: [i8; 16] = $table;
                // SAFETY: the caller's; the two vectors are those of the block: of the lower and the upper bits of its bytes.
                unsafe {
                    if $minimum || $fifth {
                        return [Self::load::<S>(row, d), Self::load::<S>(row, d + S::LANES)];
                    }
                    let block = block::<$name>(row, d);
                    S::load_entry_pair(&TABLE, block.add(2), S::splat_f16(block))
                }
            }
        }
    )+};
}

of_four_bits! {
    Q4_0: Q4_0, count_from(-8), false, false;
    Q4_1: Q4_1, count_from(0), true, false;
    Q5_0: Q5_0, count_from(-16), false, true;
    Q5_1: Q5_1, count_from(0), true, true;
    Iq4Nl: Iq4Nl, IQ4_NL, false, false;
}

/// The block that holds element `d` of a packed row.
///
/// # Safety
/// The row has that block.
#[inline(always)]
unsafe fn block<E: Codec>(row: *const u8, d: usize) -> *const u8 {
    // SAFETY: the row is packed and has the block, which begins that many whole blocks from it.
    unsafe { row.add(d / E::FORMAT.block_elements() * E::FORMAT.block_bytes()) }
}
