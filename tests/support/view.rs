//! Tensors in memory: how they are laid out, and their elements.

use std::borrow::Cow;

use half::{bf16, f16};
use treeattn::attention::{Dtype, KvFormat};

use super::memory::Memory;
use super::rng::Rng;

/// A tensor in memory: byte strides, outermost dimension first, and the bytes it spans.
#[derive(Clone, Debug, Default)]
pub struct View {
    pub stride: [i64; 4],
    pub dims: Vec<usize>,
    pub bytes: usize,
}

impl View {
    /// The byte offset of an element.
    pub fn at(&self, index: [usize; 4]) -> usize {
        self.dims.iter().zip(index).zip(self.stride).map(|((_, i), s)| i * s as usize).sum()
    }

    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }
}

/// Lays a tensor out: dimensions in `order`, innermost first, `pad` percent of them followed by a gap, those to be
/// broadcast with a stride of 0.
pub fn lay(r: &mut Rng, dims: &[usize], order: &[usize], size: usize, pad: u64, broadcast: &[bool]) -> View {
    let mut stride = [0i64; 4];
    let (mut next, mut bytes) = (size, size);
    for &dim in order {
        if broadcast.get(dim) == Some(&true) {
            continue;
        }
        let gap = if r.chance(pad) { r.range(1, 9) * size } else { 0 };
        let step = next + gap;
        stride[dim] = step as i64;
        bytes += step * dims[dim].saturating_sub(1);
        next = step * dims[dim].max(1);
    }
    if dims.contains(&0) {
        bytes = 0;
    }
    if stride[..dims.len()].iter().all(|&s| s == 0) {
        // All zero would mean packed.
        let last = dims.len() - 1;
        stride[last] = size as i64;
        bytes = size * dims[last];
        if dims.contains(&0) {
            bytes = 0;
        }
    }
    for (dim, &n) in dims.iter().enumerate() {
        // The stride of a dimension of one is never used.
        if n == 1 && r.chance(pad / 4) {
            stride[dim] = 1 << 45;
        }
    }
    View { stride, dims: dims.to_vec(), bytes }
}

/// Calls `visit` with every index of up to four dimensions.
pub fn each(dims: &[usize], mut visit: impl FnMut([usize; 4])) {
    let n = |dim: usize| dims.get(dim).copied().unwrap_or(1);
    for a in 0..n(0) {
        for b in 0..n(1) {
            for c in 0..n(2) {
                for d in 0..n(3) {
                    visit([a, b, c, d]);
                }
            }
        }
    }
}

/// The blocks of row `row` of `dim` elements: of `rows` where the type is no plain float, else of `values`.
pub fn blocks<'a>(
    values: &'a [f32],
    rows: &'a [u8],
    row: usize,
    dim: usize,
    dtype: Dtype,
) -> impl Iterator<Item = Cow<'a, [u8]>> {
    let format = KvFormat::of(dtype);
    let (size, blocks) = (format.block_bytes(), format.blocks(dim));
    (0..blocks).map(move |n| {
        if dtype.is_float() {
            let x = values[row * dim + n];
            let mut bytes = match dtype {
                Dtype::F16 => f16::from_f32(x).to_ne_bytes().to_vec(),
                Dtype::Bf16 => bf16::from_f32(x).to_ne_bytes().to_vec(),
                _ => x.to_ne_bytes().to_vec(),
            };
            bytes.truncate(size);
            Cow::Owned(bytes)
        } else {
            Cow::Borrowed(&rows[(row * blocks + n) * size..][..size])
        }
    })
}

/// Writes an element; `x` is exact in the type, or NaN.
pub fn put(memory: &mut Memory, at: usize, dtype: Dtype, x: f32) {
    match dtype {
        Dtype::F16 => memory.bytes_mut()[at..at + 2].copy_from_slice(&f16::from_f32(x).to_ne_bytes()),
        Dtype::Bf16 => memory.bytes_mut()[at..at + 2].copy_from_slice(&bf16::from_f32(x).to_ne_bytes()),
        _ => memory.bytes_mut()[at..at + 4].copy_from_slice(&x.to_ne_bytes()),
    }
}

pub fn load(memory: &Memory, at: usize, dtype: Dtype) -> (f32, u32) {
    let two = || [memory.bytes()[at], memory.bytes()[at + 1]];
    match dtype {
        Dtype::F16 => {
            let x = f16::from_ne_bytes(two());
            (x.to_f32(), u32::from(x.to_bits()))
        }
        Dtype::Bf16 => {
            let x = bf16::from_ne_bytes(two());
            (x.to_f32(), u32::from(x.to_bits()))
        }
        _ => {
            let b = memory.bytes();
            let x = f32::from_ne_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
            (x, x.to_bits())
        }
    }
}
