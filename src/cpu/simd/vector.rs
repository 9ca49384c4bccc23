//! The vector operations that the kernels are written in.

/// Vectors of f32.
///
/// # Safety
/// An implementation computes what each method says, and reads and writes no memory but what the method says.
///
/// Who calls a method is on a processor that has the instruction set of the implementation. Pointers are valid for what the
/// method reads or writes through them, at any alignment; nobody writes that memory meanwhile, nor reads what is written.
pub unsafe trait Simd: Copy {
    /// A vector.
    type V: Copy;
    /// Its lanes; divides 16.
    const LANES: usize;

    /// The same value in every lane.
    ///
    /// # Safety
    /// As [`Simd`] says.
    unsafe fn splat(x: f32) -> Self::V;
    /// Loads LANES floats.
    ///
    /// # Safety
    /// As [`Simd`] says; `p` is good for reading LANES f32.
    unsafe fn load(p: *const f32) -> Self::V;
    /// Stores LANES floats.
    ///
    /// # Safety
    /// As [`Simd`] says; `p` is good for writing LANES f32.
    unsafe fn store(p: *mut f32, v: Self::V);
    /// Stores lane t of vector i at `to[t * pitch + i]`.
    ///
    /// # Safety
    /// As [`Simd`] says; `to` is good for writing 4 f32 at each of its first LANES multiples of `pitch`.
    #[inline(always)]
    unsafe fn store_columns(columns: [Self::V; 4], to: *mut f32, pitch: usize) {
        for (i, column) in columns.into_iter().enumerate() {
            let mut lanes = [0.0; 16];
            // SAFETY: LANES divides 16, so that the lanes fit; the caller gave room for each.
            unsafe {
                Self::store(lanes.as_mut_ptr(), column);
                for (t, &lane) in lanes[..Self::LANES].iter().enumerate() {
                    *to.add(t * pitch + i) = lane;
                }
            }
        }
    }
    /// Loads and widens LANES f16, exactly.
    ///
    /// # Safety
    /// As [`Simd`] says; `p` is good for reading 2 LANES bytes.
    unsafe fn load_f16(p: *const u8) -> Self::V;
    /// Loads and widens LANES bf16, exactly.
    ///
    /// # Safety
    /// As [`Simd`] says; `p` is good for reading 2 LANES bytes.
    unsafe fn load_bf16(p: *const u8) -> Self::V;
    /// Loads and widens LANES int8.
    ///
    /// # Safety
    /// As [`Simd`] says; `p` is good for reading LANES bytes.
    unsafe fn load_int8(p: *const u8) -> Self::V;
    /// Loads and widens LANES f8_e4m3, exactly; NaN stays NaN.
    ///
    /// # Safety
    /// As [`Simd`] says; `p` is good for reading LANES bytes.
    unsafe fn load_f8_e4m3(p: *const u8) -> Self::V;
    /// Loads and widens 2 LANES f8_e4m3, exactly; NaN stays NaN.
    ///
    /// # Safety
    /// As [`Simd`] says; `p` is good for reading 2 LANES bytes. With AVX-512 the processor has VBMI, too.
    #[inline(always)]
    unsafe fn load_f8_e4m3_pair(p: *const u8) -> [Self::V; 2] {
        // SAFETY: the caller's.
        unsafe { [Self::load_f8_e4m3(p), Self::load_f8_e4m3(p.add(Self::LANES))] }
    }
    /// Loads and widens LANES f8_e5m2, exactly; infinities and NaN stay what they are.
    ///
    /// # Safety
    /// As [`Simd`] says; `p` is good for reading LANES bytes.
    unsafe fn load_f8_e5m2(p: *const u8) -> Self::V;
    /// The entries of `table` at the lower, or the upper, four bits of LANES bytes, widened.
    ///
    /// # Safety
    /// As [`Simd`] says; `p` is good for reading LANES bytes.
    unsafe fn load_entries(table: &[i8; 16], p: *const u8, upper: bool) -> Self::V;
    /// The entries of `table` at the lower four bits of LANES bytes, and those at the upper, widened, times `scale`.
    ///
    /// # Safety
    /// As [`Simd`] says; `p` is good for reading LANES bytes.
    #[inline(always)]
    unsafe fn load_entry_pair(table: &[i8; 16], p: *const u8, scale: Self::V) -> [Self::V; 2] {
        // SAFETY: the caller's.
        unsafe {
            let (lower, upper) = (Self::load_entries(table, p, false), Self::load_entries(table, p, true));
            [Self::mul(lower, scale), Self::mul(upper, scale)]
        }
    }
    /// An f16, widened, in every lane.
    ///
    /// # Safety
    /// As [`Simd`] says; `p` is good for reading 2 bytes.
    unsafe fn splat_f16(p: *const u8) -> Self::V;
    /// `a` with `x` added to each lane i whose bit `bits >> i & 1` is set.
    ///
    /// # Safety
    /// As [`Simd`] says.
    unsafe fn add_where(a: Self::V, bits: u32, x: f32) -> Self::V;
    /// a + b.
    ///
    /// # Safety
    /// As [`Simd`] says.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// a - b.
    ///
    /// # Safety
    /// As [`Simd`] says.
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// a * b.
    ///
    /// # Safety
    /// As [`Simd`] says.
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// a * b + c, rounded once where the machine can.
    ///
    /// # Safety
    /// As [`Simd`] says.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; either where one is NaN.
    ///
    /// # Safety
    /// As [`Simd`] says.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The largest lane; any lane where one is NaN.
    ///
    /// # Safety
    /// As [`Simd`] says.
    unsafe fn max_lane(v: Self::V) -> f32;
    /// a / b.
    ///
    /// # Safety
    /// As [`Simd`] says.
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `x` within -`bound` to `bound`; NaN stays NaN.
    ///
    /// # Safety
    /// As [`Simd`] says.
    unsafe fn clamp(x: Self::V, bound: f32) -> Self::V;
    /// 2^x of whole numbers from -126 to 127; anything of others.
    ///
    /// # Safety
    /// As [`Simd`] says.
    unsafe fn power_of_two(x: Self::V) -> Self::V;
    /// The nearest whole number; anything below -126 may become -126. NaN stays NaN.
    ///
    /// # Safety
    /// As [`Simd`] says.
    unsafe fn round(x: Self::V) -> Self::V;
    /// 2^x for x <= 1, within 1 ulp, given as `whole` = round(x) and the rest between -1/2 and 1/2; 0 for x below -126; 0
    /// wherever `score` is -inf, whatever else is; NaN stays NaN.
    ///
    /// # Safety
    /// As [`Simd`] says.
    unsafe fn exp2_unless_hidden(x: Self::V, whole: Self::V, rest: Self::V, score: Self::V) -> Self::V;
    /// Sums the lanes of each accumulator: `out[q * stride + t]` = sum of `acc[q][t]`. RQ * RT is a multiple of LANES.
    ///
    /// # Safety
    /// As [`Simd`] says; `out` is good for writing RT f32 at each of its first RQ multiples of `stride`.
    unsafe fn sum_lanes<const RQ: usize, const RT: usize>(acc: &[[Self::V; RT]; RQ], out: *mut f32, stride: usize);
    /// Adds LANES floats to as many f64, and sets them to 0.
    ///
    /// # Safety
    /// As [`Simd`] says; `closed` is good for reading and writing LANES f64, and `open` LANES f32.
    #[inline(always)]
    unsafe fn close(closed: *mut f64, open: *mut f32) {
        for i in 0..Self::LANES {
            // SAFETY: the caller gave pointers to LANES f64 and f32; i is below that.
            unsafe {
                *closed.add(i) += f64::from(*open.add(i));
                *open.add(i) = 0.0;
            }
        }
    }
    /// Asks for the cache line of `p`, a good while before it is used; never faults.
    ///
    /// # Safety
    /// As [`Simd`] says; `p` may be any address.
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
