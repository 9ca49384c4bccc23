//! Element types and their codes.

use crate::error::{Error, Result};

/// An element type. The discriminants are the codes of the C ABI; 0 is invalid there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Dtype {
    /// IEEE binary32.
    F32 = 1,
    /// IEEE binary16.
    F16 = 2,
    /// bfloat16.
    Bf16 = 3,
    /// OCP fp8 with 4 exponent bits, no infinities.
    F8E4M3 = 4,
    /// OCP fp8 with 5 exponent bits.
    F8E5M2 = 5,
    /// ggml blocks of 32: one f16 scale and 32 int8 (34 bytes).
    Q8_0 = 6,
    /// ggml blocks of 32: one f16 scale and 32 4-bit values (18 bytes).
    Q4_0 = 7,
    /// Whole numbers -128 to 127; scales come beside them.
    Int8 = 8,
    /// ggml blocks of 32: an f16 scale, an f16 minimum and 32 4-bit values (20 bytes).
    Q4_1 = 9,
    /// ggml blocks of 32: an f16 scale and 32 5-bit values (22 bytes).
    Q5_0 = 10,
    /// ggml blocks of 32: an f16 scale, an f16 minimum and 32 5-bit values (24 bytes).
    Q5_1 = 11,
    /// ggml blocks of 32: an f16 scale and 32 4-bit indices into a table (18 bytes).
    Iq4Nl = 12,
}

impl Dtype {
    /// Every type, in the order of the codes.
    pub const ALL: [Dtype; 12] = [
        Dtype::F32,
        Dtype::F16,
        Dtype::Bf16,
        Dtype::F8E4M3,
        Dtype::F8E5M2,
        Dtype::Q8_0,
        Dtype::Q4_0,
        Dtype::Int8,
        Dtype::Q4_1,
        Dtype::Q5_0,
        Dtype::Q5_1,
        Dtype::Iq4Nl,
    ];

    /// The type with this code.
    pub fn from_code(field: &str, code: i32) -> Result<Dtype> {
        let index = usize::try_from(code).ok().and_then(|code| code.checked_sub(1));
        index.and_then(|index| Dtype::ALL.get(index).copied()).ok_or_else(|| {
            Error::invalid(field, code, format_args!("a TREEATTN_DTYPE_ code (1 to {})", Dtype::ALL.len()))
        })
    }

    /// Whether this is one of the plain float types f32, f16 and bf16.
    pub fn is_float(self) -> bool {
        matches!(self, Dtype::F32 | Dtype::F16 | Dtype::Bf16)
    }

    /// The name used in messages and reports.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
            Dtype::F8E4M3 => "f8_e4m3",
            Dtype::F8E5M2 => "f8_e5m2",
            Dtype::Q8_0 => "q8_0",
            Dtype::Q4_0 => "q4_0",
            Dtype::Int8 => "int8",
            Dtype::Q4_1 => "q4_1",
            Dtype::Q5_0 => "q5_0",
            Dtype::Q5_1 => "q5_1",
            Dtype::Iq4Nl => "iq4_nl",
        }
    }
}
