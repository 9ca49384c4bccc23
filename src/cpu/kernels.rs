//! The entry points of the kernels: one set an instruction set, compiled with its features and reached by pointer.

use super::isa::Isa;
use super::simd::scalar::Scalar;
use super::simd::{Bf16, F16, F32};
use super::tile::{self, MeetArgs, ScoreArgs, ValueArgs, WeighArgs, WidenArgs};
use crate::attention::Dtype;

/// The kernels of one instruction set. By element type: index [`element`].
///
/// Calling one needs the instruction set, and arguments that describe valid memory.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    /// [`tile::scores`] by element type of k.
    pub scores: [unsafe fn(&ScoreArgs); 3],
    /// [`tile::weigh`].
    pub weigh: unsafe fn(&WeighArgs) -> bool,
    /// [`tile::values`] by element type of v.
    pub values: [unsafe fn(&ValueArgs); 3],
    /// [`tile::widen`] by element type.
    pub widen: [unsafe fn(&WidenArgs); 3],
    /// [`tile::meet`].
    pub meet: unsafe fn(&MeetArgs),
}

/// The index of a float type in [`Kernels`].
pub fn element(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F16 => 1,
        Dtype::Bf16 => 2,
        _ => 0,
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
                        // SAFETY: the caller's: valid arguments, and the instruction set is there.
                        unsafe { $body(args) }
                    }
                };
            }
            entry!(scores_f32, ScoreArgs, tile::scores::<$simd, F32, $t4, $t2, $t1>);
            entry!(scores_f16, ScoreArgs, tile::scores::<$simd, F16, $t4, $t2, $t1>);
            entry!(scores_bf16, ScoreArgs, tile::scores::<$simd, Bf16, $t4, $t2, $t1>);
            entry!(weigh, WeighArgs, tile::weigh::<$simd>, bool);
            entry!(values_f32, ValueArgs, tile::values::<$simd, F32, $w4, $w1>);
            entry!(values_f16, ValueArgs, tile::values::<$simd, F16, $w4, $w1>);
            entry!(values_bf16, ValueArgs, tile::values::<$simd, Bf16, $w4, $w1>);
            entry!(widen_f32, WidenArgs, tile::widen::<$simd, F32>);
            entry!(widen_f16, WidenArgs, tile::widen::<$simd, F16>);
            entry!(widen_bf16, WidenArgs, tile::widen::<$simd, Bf16>);
            entry!(meet, MeetArgs, tile::meet::<$simd>);

            pub const KERNELS: Kernels = Kernels {
                scores: [scores_f32, scores_f16, scores_bf16],
                weigh,
                values: [values_f32, values_f16, values_bf16],
                widen: [widen_f32, widen_f16, widen_bf16],
                meet,
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
