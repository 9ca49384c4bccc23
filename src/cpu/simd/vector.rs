//! The vector operations that the kernels are written in.

/// Vectors of f32.
///
/// # Safety
/// The implementation computes what each method says. Every method is unsafe to call for the same reasons: the
/// instruction set must be there, and pointers valid for what is read or written through them, at any alignment.
pub unsafe trait Simd: Copy {
    /// A vector.
    type V: Copy;
    /// Its lanes; divides 16.
    const LANES: usize;

    /// The same value in every lane.
    unsafe fn splat(x: f32) -> Self::V;
    /// Loads LANES floats.
    unsafe fn load(p: *const f32) -> Self::V;
    /// Stores LANES floats.
    unsafe fn store(p: *mut f32, v: Self::V);
    /// Loads and widens LANES f16, exactly.
    unsafe fn load_f16(p: *const u8) -> Self::V;
    /// Loads and widens LANES bf16, exactly.
    unsafe fn load_bf16(p: *const u8) -> Self::V;
    /// Loads and widens LANES int8.
    unsafe fn load_int8(p: *const u8) -> Self::V;
    /// Loads and widens LANES f8_e4m3, exactly; NaN stays NaN.
    unsafe fn load_f8_e4m3(p: *const u8) -> Self::V;
    /// Loads and widens LANES f8_e5m2, exactly; infinities and NaN stay what they are.
    unsafe fn load_f8_e5m2(p: *const u8) -> Self::V;
    /// The entries of `table` at the lower, or the upper, four bits of LANES bytes, widened.
    unsafe fn load_entries(table: &[i8; 16], p: *const u8, upper: bool) -> Self::V;
    /// An f16, widened, in every lane.
    unsafe fn splat_f16(p: *const u8) -> Self::V;
    /// `a` with `x` added to each lane i whose bit `bits >> i & 1` is set.
    unsafe fn add_where(a: Self::V, bits: u32, x: f32) -> Self::V;
    /// a + b.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// a - b.
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// a * b.
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// a * b + c, rounded once where the machine can.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; either where one is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The largest lane; any lane where one is NaN.
    unsafe fn max_lane(v: Self::V) -> f32;
    /// a / b.
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `x` within -`bound` to `bound`; NaN stays NaN.
    unsafe fn clamp(x: Self::V, bound: f32) -> Self::V;
    /// 2^x of whole numbers from -126 to 127; anything of others.
    unsafe fn power_of_two(x: Self::V) -> Self::V;
    /// The nearest whole number; anything below -126 may become -126. NaN stays NaN.
    unsafe fn round(x: Self::V) -> Self::V;
    /// 2^x for x <= 1, within 1 ulp, given as `whole` = round(x) and the rest between -1/2 and 1/2; 0 for x below -126; 0
    /// wherever `score` is -inf, whatever else is; NaN stays NaN.
    unsafe fn exp2_unless_hidden(x: Self::V, whole: Self::V, rest: Self::V, score: Self::V) -> Self::V;
    /// Sums the lanes of each accumulator: `out[q * stride + t]` = sum of `acc[q][t]`. RQ * RT is a multiple of LANES.
    unsafe fn sum_lanes<const RQ: usize, const RT: usize>(acc: &[[Self::V; RT]; RQ], out: *mut f32, stride: usize);
    /// Adds LANES floats to as many f64, and sets them to 0.
    #[inline(always)]
    unsafe fn close(closed: *mut f64, open: *mut f32) {
        for i in 0..Self::LANES {
            // SAFETY: both pointers are valid for the lanes.
            unsafe {
                *closed.add(i) += f64::from(*open.add(i));
                *open.add(i) = 0.0;
            }
        }
    }
    /// Asks for the cache line of `p`, a good while before it is used; never faults.
    unsafe fn prefetch(p: *const u8);
}

/// `2^f - 1 = f (C[0] + C[1] f + ...)` for |f| <= 1/2: minimax, relative error of 2^f below 0.05 * 2^-24.
pub const EXP2: [f32; 6] =
    [0.693_147_24, 0.240_226_52, 0.055_503_104, 0.009_617_693, 0.001_340_664_3, 0.000_155_946_76];

/// (2^f - 1) / f.
///
/// # Safety
/// The instruction set of `S` is there.
#[inline(always)]
unsafe fn exp2_polynomial<S: Simd>(f: S::V) -> S::V {
    // SAFETY: arithmetic on vectors, which asks for the instruction set alone.
    unsafe {
        let mut y = S::splat(EXP2[5]);
        for &c in EXP2[..5].iter().rev() {
            y = S::fma(y, f, S::splat(c));
        }
        y
    }
}

/// The polynomial of 2^f.
///
/// # Safety
/// The instruction set of `S` is there.
#[inline(always)]
pub unsafe fn exp2_fraction<S: Simd>(f: S::V) -> S::V {
    // SAFETY: arithmetic on vectors, which asks for the instruction set alone.
    unsafe { S::fma(exp2_polynomial::<S>(f), f, S::splat(1.0)) }
}

/// The polynomial of 2^f - 1: small where f is.
///
/// # Safety
/// The instruction set of `S` is there.
#[inline(always)]
pub unsafe fn exp2_fraction_less_one<S: Simd>(f: S::V) -> S::V {
    // SAFETY: arithmetic on vectors, which asks for the instruction set alone.
    unsafe { S::mul(exp2_polynomial::<S>(f), f) }
}
