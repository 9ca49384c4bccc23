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
}

impl Dtype {
    /// The type with this code.
    pub fn from_code(field: &str, code: i32) -> Result<Dtype> {
        Ok(match code {
            1 => Dtype::F32,
            2 => Dtype::F16,
            3 => Dtype::Bf16,
            4 => Dtype::F8E4M3,
            5 => Dtype::F8E5M2,
            6 => Dtype::Q8_0,
            7 => Dtype::Q4_0,
            _ => return Err(Error::invalid(field, code, "a TREEATTN_DTYPE_ code (1 to 7)")),
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
        }
    }
}
