//! The entry points of the kernels: one set an instruction set, compiled for it and reached by pointer.

use super::args::{CloseArgs, ScoreArgs, ValueArgs, WeightArgs, WidenArgs};
use super::{merge, scores, values, weights, widen};
use crate::attention::KvFormat;
use crate::attention::dtype::Dtype;
use crate::cpu::isa::Isa;
use crate::cpu::simd::codec::{Bf16, F16, F32};
use crate::cpu::simd::scalar::Scalar;

/// The kernels of one instruction set.
///
/// Calling one needs the instruction set, and arguments that describe valid memory.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    /// Those that read rows, by [`codec_of`] their format.
    pub of_codec: [CodecKernels; CODECS],
    /// [`weights::weights`].
    pub weights: unsafe fn(&WeightArgs) -> bool,
    /// [`merge::close`].
    pub close: unsafe fn(&CloseArgs),
}

/// The kernels that read rows of one format.
#[derive(Clone, Copy, Debug)]
pub struct CodecKernels {
    /// [`scores::scores`], of keys.
    pub scores: unsafe fn(&ScoreArgs),
    /// [`values::values`], of values.
    pub values: unsafe fn(&ValueArgs),
    /// [`widen::widen`], of any rows.
    pub widen: unsafe fn(&WidenArgs),
}

/// Formats with a codec.
pub const CODECS: usize = 3;
/// The codec of f32, which rows are widened to.
pub const WIDE: usize = 0;

/// The codec of a format; None where there is none.
pub fn codec_of(format: KvFormat) -> Option<usize> {
    match format.dtype() {
        Dtype::F32 => Some(WIDE),
        Dtype::F16 => Some(1),
        Dtype::Bf16 => Some(2),
        Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::Q8_0 | Dtype::Q4_0 => None,
    }
}

macro_rules! kernels {
    ($name:ident, $simd:ty, [$($features:meta)?], $t4:literal, $t2:literal, $t1:literal, $w4:literal, $w1:literal) => {
        mod $name {
            use super::*;

            macro_rules! entry {
                ($entry:ident, $args:ty, $body:expr) => {
                    entry!($entry, $args, $body, ());
                };
                ($entry:ident, $args:ty, $body:expr, $output:ty) => {
                    $(#[$features])?
                    unsafe fn $entry(args: &$args) -> $output {
                        // SAFETY: the caller has valid arguments and the instruction set (`Kernels`).
                        unsafe { $body(args) }
                    }
                };
            }
            macro_rules! codec {
                ($codec:ty) => {{
                    entry!(scores_of, ScoreArgs, scores::scores::<$simd, $codec, $t4, $t2, $t1>);
                    entry!(values_of, ValueArgs, values::values::<$simd, $codec, $w4, $w1>);
                    entry!(widen_of, WidenArgs, widen::widen::<$simd, $codec>);
                    CodecKernels { scores: scores_of, values: values_of, widen: widen_of }
                }};
            }
            entry!(weights_of, WeightArgs, weights::weights::<$simd>, bool);
            entry!(close_of, CloseArgs, merge::close::<$simd>);

            pub const KERNELS: Kernels = Kernels {
                of_codec: [codec!(F32), codec!(F16), codec!(Bf16)],
                weights: weights_of,
                close: close_of,
            };
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernels!(
    avx512,
    crate::cpu::simd::avx512::Avx512,
    [target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")],
    4,
    8,
    16,
    4,
    8
);
#[cfg(target_arch = "x86_64")]
kernels!(avx2, crate::cpu::simd::avx2::Avx2, [target_feature(enable = "avx2,fma,f16c")], 2, 4, 8, 2, 8);
#[cfg(target_arch = "aarch64")]
kernels!(neon, crate::cpu::simd::neon::Neon, [target_feature(enable = "neon")], 4, 8, 16, 4, 8);
kernels!(scalar, Scalar, [], 1, 2, 4, 1, 4);

impl Kernels {
    /// The kernels of `isa`; None where this machine lacks it.
    pub fn of(isa: Isa) -> Option<Kernels> {
        if !isa.is_available() {
            return None;
        }
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Some(avx512::KERNELS),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Some(avx2::KERNELS),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Some(neon::KERNELS),
            Isa::Scalar => Some(scalar::KERNELS),
            #[allow(unreachable_patterns)]
            _ => None,
        }
    }
}
