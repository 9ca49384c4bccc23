//! f16 and the 8-bit floats in plain code.

/// Widens an f16, exactly, without a branch.
#[inline(always)]
pub fn widen_f16(h: u16) -> f32 {
    let magnitude = u32::from(h & 0x7fff) << 13;
    // 2^112 moves the exponent bias; a subnormal f16 is a subnormal f32 before it.
    let finite = (f32::from_bits(magnitude) * f32::from_bits(0x7780_0000)).to_bits();
    let special = magnitude | 0x7f80_0000;
    let bits = if magnitude >= 0x0f80_0000 { special } else { finite };
    f32::from_bits(bits | u32::from(h & 0x8000) << 16)
}

/// Widens an f8_e4m3, exactly, without a branch.
#[inline(always)]
pub fn widen_f8_e4m3(code: u8) -> f32 {
    let magnitude = u16::from(code & 0x7f);
    // An f16 of the same bits has an exponent that is 8 too small.
    let half = if magnitude == 0x7f { 0x7e00 } else { magnitude << 7 };
    widen_f16(u16::from(code & 0x80) << 8 | half) * 256.0
}

/// Widens an f8_e5m2, exactly, without a branch.
#[inline(always)]
pub fn widen_f8_e5m2(code: u8) -> f32 {
    widen_f16(u16::from(code) << 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_widens_exactly() {
        for h in 0..=u16::MAX {
            let (ours, wanted) = (widen_f16(h), half::f16::from_bits(h).to_f32());
            assert!(ours.to_bits() == wanted.to_bits() || (ours.is_nan() && wanted.is_nan()), "{h:#x}");
        }
    }
}
