//! What the bytes of a block stand for, in plain code: the definition of every format, which the backends' codecs keep to
//! bit by bit, and an encoder for self-checks, benchmarks and tests.
//!
//! Every element stands for one f32. Those of the ggml types are what ggml's own `dequantize_row_*` give: one product of
//! an f16 scale with a whole number, exact in f32, and where a block has a minimum the f32 sum of both.

use half::{bf16, f16};

use super::dtype::Dtype;

/// The 16 values of IQ4_NL.
pub const IQ4_NL: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// f8_e4m3fn: sign, 4 exponent bits of bias 7, 3 mantissa bits; all ones is NaN, and there is no infinity.
fn f8_e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// f8_e5m2: the upper half of an f16.
fn f8_e5m2(code: u8) -> f32 {
    f16::from_bits(u16::from(code) << 8).to_f32()
}

/// The code of an 8-bit float nearest to `x`, the even one of two; `top` is the code of the largest number.
fn narrow_f8(x: f32, top: u8, nan: u8, value: fn(u8) -> f32) -> u8 {
    if x.is_nan() {
        return nan;
    }
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    // Codes ascend with their values.
    let (mut low, mut high) = (0, top);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if value(middle) <= x.abs() { low = middle } else { high = middle }
    }
    let (below, above) = (f64::from(x.abs()) - f64::from(value(low)), f64::from(value(high)) - f64::from(x.abs()));
    let up = above < below || above == below && high % 2 == 0;
    sign | if up { high } else { low }
}

fn read_f16(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The 4 bits of element `i` of 32 whose low halves come first: bytes 0 to 15 hold elements 0 to 15 below, 16 to 31 above.
fn nibble(bytes: &[u8], i: usize) -> u8 {
    if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 }
}

/// The 5 bits of element `i`: four as [`nibble`], the highest in 32 bits before them.
fn five_bits(bytes: &[u8], i: usize) -> u8 {
    nibble(&bytes[4..], i) | (bytes[i / 8] >> (i % 8) & 1) << 4
}

/// What element `i` of a block stands for.
pub(super) fn element(dtype: Dtype, block: &[u8], i: usize) -> f32 {
    match dtype {
        Dtype::F32 => f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
        Dtype::F16 => read_f16(block, 0),
        Dtype::Bf16 => bf16::from_le_bytes([block[0], block[1]]).to_f32(),
        Dtype::F8E4M3 => f8_e4m3(block[0]),
        Dtype::F8E5M2 => f8_e5m2(block[0]),
        Dtype::Int8 => f32::from(block[0] as i8),
        Dtype::Q8_0 => f32::from(block[2 + i] as i8) * read_f16(block, 0),
        Dtype::Q4_0 => (f32::from(nibble(&block[2..], i)) - 8.0) * read_f16(block, 0),
        Dtype::Q4_1 => f32::from(nibble(&block[4..], i)) * read_f16(block, 0) + read_f16(block, 2),
        Dtype::Q5_0 => (f32::from(five_bits(&block[2..], i)) - 16.0) * read_f16(block, 0),
        Dtype::Q5_1 => f32::from(five_bits(&block[4..], i)) * read_f16(block, 0) + read_f16(block, 2),
        Dtype::Iq4Nl => f32::from(IQ4_NL[usize::from(nibble(&block[2..], i))]) * read_f16(block, 0),
    }
}

/// Widens a block to as many values as `out` has, at most those of the block.
pub(super) fn widen(dtype: Dtype, block: &[u8], out: &mut [f64]) {
    for (i, out) in out.iter_mut().enumerate() {
        *out = f64::from(element(dtype, block, i));
    }
}

/// A block near to as many values as the block has.
pub(super) fn narrow(dtype: Dtype, values: &[f32], out: &mut [u8]) {
    let x = values.first().copied().unwrap_or(0.0);
    match dtype {
        Dtype::F32 => out.copy_from_slice(&x.to_le_bytes()),
        Dtype::F16 => out.copy_from_slice(&f16::from_f32(clamp(x, 65504.0)).to_le_bytes()),
        Dtype::Bf16 => out.copy_from_slice(&bf16::from_f32(clamp(x, bf16::MAX.to_f32())).to_le_bytes()),
        Dtype::F8E4M3 => out[0] = narrow_f8(x, 0x7e, 0x7f, f8_e4m3),
        Dtype::F8E5M2 => out[0] = narrow_f8(x, 0x7b, 0x7e, f8_e5m2),
        Dtype::Int8 => out[0] = x.round_ties_even().clamp(-127.0, 127.0) as i8 as u8,
        Dtype::Q8_0 => {
            let scale = put_scale(out, 0, largest(values) / 127.0);
            for (out, &x) in out[2..].iter_mut().zip(values) {
                *out = whole(x, scale, -127.0, 127.0) as i8 as u8;
            }
        }
        Dtype::Q4_0 | Dtype::Q5_0 => {
            let half: f32 = if dtype == Dtype::Q4_0 { 8.0 } else { 16.0 };
            // The value of the largest magnitude is the lowest whole number, of which there is one more.
            let most = values.iter().fold(0f32, |most, &x| if x.abs() > most.abs() { x } else { most });
            let scale = put_scale(out, 0, most / -half);
            put_bits(out, 2, dtype == Dtype::Q5_0, |i| (whole(values[i], scale, -half, half - 1.0) + half) as u8);
        }
        Dtype::Q4_1 | Dtype::Q5_1 => {
            let most: f32 = if dtype == Dtype::Q4_1 { 15.0 } else { 31.0 };
            let (low, high) = values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &x| (l.min(x), h.max(x)));
            let (low, scale) = (put_scale(out, 2, low), put_scale(out, 0, (high - low) / most));
            put_bits(out, 4, dtype == Dtype::Q5_1, |i| whole(values[i] - low, scale, 0.0, most) as u8);
        }
        Dtype::Iq4Nl => {
            let scale = put_scale(out, 0, largest(values) / 127.0);
            let nearest = |x: f32| {
                let distance = |i: &usize| (x - f32::from(IQ4_NL[*i])).abs();
                (0..16).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(0) as u8
            };
            put_bits(out, 2, false, |i| nearest(if scale == 0.0 { 0.0 } else { values[i] / scale }));
        }
    }
}

fn clamp(x: f32, most: f32) -> f32 {
    x.clamp(-most, most)
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most, x| most.max(x.abs()))
}

/// Stores a scale or a minimum, and gives what was stored.
fn put_scale(out: &mut [u8], at: usize, x: f32) -> f32 {
    let stored = f16::from_f32(clamp(x, 65504.0));
    out[at..at + 2].copy_from_slice(&stored.to_le_bytes());
    stored.to_f32()
}

fn whole(x: f32, scale: f32, low: f32, high: f32) -> f32 {
    if scale == 0.0 { 0f32.clamp(low, high) } else { (x / scale).round_ties_even().clamp(low, high) }
}

/// Stores the codes of 32 elements from byte `at` on, as [`nibble`] and [`five_bits`] read them.
fn put_bits(out: &mut [u8], at: usize, five: bool, code: impl Fn(usize) -> u8) {
    let at = if five {
        let high = (0..32).fold(0u32, |bits, i| bits | u32::from(code(i) >> 4 & 1) << i);
        out[at..at + 4].copy_from_slice(&high.to_le_bytes());
        at + 4
    } else {
        at
    };
    for i in 0..16 {
        out[at + i] = code(i) & 15 | (code(i + 16) & 15) << 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::format::KvFormat;

    #[test]
    fn the_8_bit_floats() {
        // Sign, exponent and mantissa by the formula of the OCP document, in f64.
        for code in 0..=255u8 {
            let sign = if code < 128 { 1.0 } else { -1.0 };
            let of = |bits: i32, bias: i32| {
                let (e, m) = (i32::from(code & 0x7f) >> bits, f64::from(i32::from(code) & ((1 << bits) - 1)));
                let part = m / f64::from(1 << bits);
                sign * if e == 0 { part * 2f64.powi(1 - bias) } else { (1.0 + part) * 2f64.powi(e - bias) }
            };
            let (a, b) = (f8_e4m3(code), f8_e5m2(code));
            if code & 0x7f == 0x7f {
                assert!(a.is_nan())
            } else {
                assert_eq!(f64::from(a), of(3, 7), "{code:#x}")
            }
            match code & 0x7f {
                0x7c => assert_eq!(f64::from(b), sign * f64::INFINITY),
                0x7d.. => assert!(b.is_nan()),
                _ => assert_eq!(f64::from(b), of(2, 15), "{code:#x}"),
            }
            assert!(a.is_nan() || a.is_sign_negative() == (code >= 128));
            // Every number is its own nearest.
            for (dtype, x) in [(Dtype::F8E4M3, a), (Dtype::F8E5M2, b)] {
                let mut found = [0];
                narrow(dtype, &[x], &mut found);
                assert!(found[0] == code || !x.is_finite(), "{dtype:?} {code:#x}: {found:x?}");
            }
        }
        let nearest = |dtype, x| {
            let mut found = [0];
            narrow(dtype, &[x], &mut found);
            element(dtype, &found, 0)
        };
        assert_eq!((nearest(Dtype::F8E4M3, 1e9), nearest(Dtype::F8E4M3, -1.07)), (448.0, -1.125));
        assert_eq!((nearest(Dtype::F8E4M3, 1.0625), nearest(Dtype::F8E5M2, 1.125)), (1.0, 1.0));
    }

    #[test]
    fn narrowed_rows_are_near() {
        let values: Vec<f32> = (0..64).map(|i| ((i * 37 % 64) as f32 - 29.0) * 0.125).collect();
        for (dtype, step) in [
            (Dtype::Q8_0, 0.04),
            (Dtype::Q4_0, 0.6),
            (Dtype::Q4_1, 0.6),
            (Dtype::Q5_0, 0.3),
            (Dtype::Q5_1, 0.3),
            (Dtype::Iq4Nl, 1.0),
            (Dtype::F8E4M3, 0.5),
            (Dtype::Int8, 1.0),
        ] {
            let format = KvFormat::of(dtype);
            let (mut bytes, mut wide) = (vec![0; format.row_bytes(64)], vec![0.0; 64]);
            format.narrow_row(&values, &mut bytes);
            // SAFETY: a packed row of 64 elements.
            unsafe { format.widen_row(bytes.as_ptr(), format.block_bytes() as i64, &mut wide) };
            for (x, y) in values.iter().zip(wide) {
                assert!((f64::from(*x) - y).abs() <= step / 2.0, "{dtype:?}: {x} {y}");
            }
        }
    }
}
