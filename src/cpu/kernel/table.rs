//! The entry points of the kernels: one set an instruction set, compiled for it and reached by pointer.

use super::args::{CloseArgs, ModifyArgs, ScaleArgs, ScoreArgs, ValueArgs, WeightArgs, WidenArgs};
use super::{merge, modify, scale, scores, values, weights, widen};
use crate::attention::KvFormat;
use crate::attention::dtype::Dtype;
use crate::cpu::isa::Isa;
use crate::cpu::simd::codec::{Bf16, F8E4M3, F8E5M2, F16, F32, Int8, Iq4Nl, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
use crate::cpu::simd::scalar::Scalar;

/// The kernels of one instruction set.
///
/// # Safety
/// Who calls one is on a processor that has the instruction set. The arguments are as the generic function asks for that the
/// field names: their pointers are good for all that their numbers say, and nobody writes that memory meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    /// Those that read rows as they lie, by [`codec_of`] their format.
    pub direct: [DirectKernels; DIRECT],
    /// [`widen::widen`], by [`codec_of`] the format.
    pub widen: [unsafe fn(&WidenArgs); CODECS],
    /// [`weights::weights`].
    pub weights: unsafe fn(&WeightArgs) -> bool,
    /// [`modify::modify`].
    pub modify: unsafe fn(&ModifyArgs),
    /// [`scale::scale`].
    pub scale: unsafe fn(&ScaleArgs),
    /// [`merge::close`].
    pub close: unsafe fn(&CloseArgs),
}

/// The kernels that read rows of one format as they lie.
#[derive(Clone, Copy, Debug)]
pub struct DirectKernels {
    /// [`scores::scores`], of keys.
    pub scores: unsafe fn(&ScoreArgs),
    /// [`values::values`], of values.
    pub values: unsafe fn(&ValueArgs),
}

/// Formats with a codec.
pub const CODECS: usize = 12;
/// Those with direct kernels come first; rows of the others are always widened before they are used, which costs a
/// store and a load an element and saves the code.
pub const DIRECT: usize = 8;
/// The codec of f32, which rows are widened to.
pub const WIDE: usize = 0;

/// The codec of a format: the index of its kernels among those of an instruction set.
pub fn codec_of(format: KvFormat) -> usize {
    match format.dtype() {
        Dtype::F32 => WIDE,
        Dtype::F16 => 1,
        Dtype::Bf16 => 2,
        Dtype::F8E4M3 => 3,
        Dtype::F8E5M2 => 4,
        Dtype::Int8 => 5,
        Dtype::Q8_0 => 6,
        Dtype::Q4_0 => 7,
        Dtype::Q4_1 => 8,
        Dtype::Q5_0 => 9,
        Dtype::Q5_1 => 10,
        Dtype::Iq4Nl => 11,
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
                    /// # Safety
                    /// As [`Kernels`] says.
                    $(#[$features])?
                    unsafe fn $entry(args: &$args) -> $output {
                        // SAFETY: the caller has valid arguments and the instruction set (`Kernels`).
                        unsafe { $body(args) }
                    }
                };
            }
            macro_rules! direct {
                ($codec:ty) => {{
                    entry!(scores_of, ScoreArgs, scores::scores::<$simd, $codec, $t4, $t2, $t1>);
                    entry!(values_of, ValueArgs, values::values::<$simd, $codec, $w4, $w1>);
                    DirectKernels { scores: scores_of, values: values_of }
                }};
            }
            macro_rules! widen {
                ($codec:ty) => {{
                    entry!(widen_of, WidenArgs, widen::widen::<$simd, $codec>);
                    widen_of
                }};
            }
            entry!(weights_of, WeightArgs, weights::weights::<$simd>, bool);
            entry!(modify_of, ModifyArgs, modify::modify::<$simd>);
            entry!(scale_of, ScaleArgs, scale::scale::<$simd>);
            entry!(close_of, CloseArgs, merge::close::<$simd>);

            pub const KERNELS: Kernels = Kernels {
                direct: [
                    direct!(F32),
                    direct!(F16),
                    direct!(Bf16),
                    direct!(F8E4M3),
                    direct!(F8E5M2),
                    direct!(Int8),
                    direct!(Q8_0),
                    direct!(Q4_0),
                ],
                widen: [
                    widen!(F32),
                    widen!(F16),
                    widen!(Bf16),
                    widen!(F8E4M3),
                    widen!(F8E5M2),
                    widen!(Int8),
                    widen!(Q8_0),
                    widen!(Q4_0),
                    widen!(Q4_1),
                    widen!(Q5_0),
                    widen!(Q5_1),
                    widen!(Iq4Nl),
                ],
                weights: weights_of,
                modify: modify_of,
                scale: scale_of,
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

/// The AVX-512 kernels of f8_e4m3 for processors that have VBMI, too, as those since Ice Lake and Zen 4 do.
#[cfg(target_arch = "x86_64")]
mod avx512_vbmi {
    use super::{DirectKernels, ScoreArgs, ValueArgs, scores, values};
    use crate::cpu::simd::avx512::Avx512;
    use crate::cpu::simd::codec::F8E4M3InPairs;

    pub const F8_E4M3: DirectKernels = DirectKernels { scores: scores_of, values: values_of };

    /// # Safety
    /// As [`Kernels`](super::Kernels) says; the processor has VBMI.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c")]
    unsafe fn scores_of(args: &ScoreArgs) {
        // SAFETY: the caller has valid arguments and the instruction sets.
        unsafe { scores::scores::<Avx512, F8E4M3InPairs, 4, 8, 16>(args) }
    }

    /// # Safety
    /// As [`Kernels`](super::Kernels) says; the processor has VBMI.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c")]
    unsafe fn values_of(args: &ValueArgs) {
        // SAFETY: the caller has valid arguments and the instruction sets.
        unsafe { values::values::<Avx512, F8E4M3InPairs, 4, 8>(args) }
    }
}

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
            Isa::Avx512 => {
                let mut kernels = avx512::KERNELS;
                if is_x86_feature_detected!("avx512vbmi") {
                    kernels.direct[codec_of(KvFormat::of(Dtype::F8E4M3))] = avx512_vbmi::F8_E4M3;
                }
                Some(kernels)
            }
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
