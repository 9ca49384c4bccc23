//! Masks as the backend reads them: which slots of a tile they hide, and whether they add anything to the others.

use half::f16;

use super::kernel::args::TILE;
use super::sequences::Reader;
use crate::attention::visibility::low_bits;
use crate::attention::{Mask, MaskElement, Visibility};

/// What a mask does to some slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskBits {
    /// Bit i: slot i is visible.
    pub visible: u64,
    /// Whether something other than 0 is added to a visible one.
    pub adds: bool,
}

/// Looks at the `slots` <= 64 slots from `slot` on, for query token `query` and query head `head` of sequence `b`.
///
/// # Safety
/// The mask is readable host memory, and has room for the slots ([`Mask::room`]) with as many query tokens as are asked about.
pub unsafe fn look(mask: &Mask, b: usize, head: usize, query: usize, slot: usize, slots: usize) -> MaskBits {
    let (at, stride) = (mask.address(b, head, query, slot), mask.slot_stride() as usize);
    // SAFETY: a mask that has room for the slots has, from `at` on, `slots` elements that lie `stride` bytes apart inside its
    // bytes, and these are readable; arrays of bytes need no alignment.
    unsafe {
        match mask.element() {
            MaskElement::F16 => {
                let infinity = f16::NEG_INFINITY.to_bits();
                look_at(at, stride, slots, |x| u16::from_ne_bytes(x) == infinity, |x| u16::from_ne_bytes(x) << 1 != 0)
            }
            MaskElement::F32 => {
                let infinity = f32::NEG_INFINITY.to_bits();
                look_at(at, stride, slots, |x| u32::from_ne_bytes(x) == infinity, |x| u32::from_ne_bytes(x) << 1 != 0)
            }
            MaskElement::Byte => look_at(at, stride, slots, |[x]: [u8; 1]| x == 0, |_| false),
        }
    }
}

/// # Safety
/// As [`look`]: `slots` elements of N bytes, `stride` bytes apart, are readable from `at` on.
#[inline(always)]
unsafe fn look_at<const N: usize>(
    at: *const u8,
    stride: usize,
    slots: usize,
    hides: impl Fn([u8; N]) -> bool,
    adds: impl Fn([u8; N]) -> bool,
) -> MaskBits {
    if stride == N {
        // SAFETY: the elements lie side by side, and arrays of bytes need no alignment.
        let row = unsafe { std::slice::from_raw_parts(at.cast::<[u8; N]>(), slots) };
        let (mut hidden, mut added) = (0u32, 0u32);
        for &x in row {
            hidden |= u32::from(hides(x));
            added |= u32::from(adds(x));
        }
        if hidden == 0 {
            return MaskBits { visible: low_bits(slots), adds: added != 0 };
        }
    }
    let mut bits = MaskBits { visible: 0, adds: false };
    for i in 0..slots {
        // SAFETY: `i` is below `slots`, as many elements as this function was promised; arrays of bytes need no alignment.
        let x = unsafe { at.add(i * stride).cast::<[u8; N]>().read() };
        if !hides(x) {
            bits.visible |= 1 << i;
            bits.adds |= adds(x);
        }
    }
    bits
}

impl Reader<'_> {
    /// What the mask leaves of `seen`, in whole tiles, for all `tokens` query tokens of sequence `b` together. Masks that
    /// heads have of their own are not asked.
    ///
    /// # Safety
    /// The mask, if the step has one, has room for the slots of `seen` with `tokens` query tokens.
    pub(super) unsafe fn unmasked(&self, b: usize, tokens: usize, seen: Visibility) -> Visibility {
        let Some(mask) = self.step().mask.filter(|mask| !mask.is_by_head()) else { return seen };
        let hides = |tile: usize| {
            let (lo, hi) = ((tile * TILE).max(seen.lo), ((tile + 1) * TILE).min(seen.hi));
            // SAFETY: slots of `seen` and query tokens below `tokens`, which the mask was promised to have room for;
            // `Reader::new` was promised that it stays readable.
            (0..tokens).all(|query| unsafe { look(&mask, b, 0, query, lo, hi - lo) }.visible == 0)
        };
        let tiles = seen.tiles(TILE);
        let Some(first) = tiles.clone().find(|&tile| !hides(tile)) else { return Visibility::NONE };
        let last = tiles.rev().find(|&tile| !hides(tile)).unwrap_or(first);
        Visibility { lo: seen.lo.max(first * TILE), hi: seen.hi.min((last + 1) * TILE) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{AttentionDesc, Dtype, MaskKind};

    #[test]
    fn bits_are_those_of_each_slot() {
        let mut desc = AttentionDesc::new(4, 2, 8, 8);
        desc.mask = MaskKind::Additive;
        for element in [MaskElement::F16, MaskElement::F32, MaskElement::Byte] {
            for (gap, pattern) in (1..4).flat_map(|gap| (0..12u32).map(move |pattern| (gap, pattern))) {
                let size = element.size();
                let stride = (gap * size) as i64;
                let mut bytes = vec![0u8; 64 * gap * size];
                let (mut visible, mut adds) = (0u64, false);
                for i in 0..64 {
                    // 0: all zero; 1: some hidden; 2: something added; further: mixtures.
                    let draw = (i as u32).wrapping_mul(2_654_435_761).wrapping_add(pattern * 40_503) >> 16;
                    let hides = pattern % 3 == 1 && draw.is_multiple_of(3) || pattern == 11;
                    let value = if pattern > 2 && draw.is_multiple_of(5) { -1.5f32 } else { -0.0 };
                    let value = if hides { f32::NEG_INFINITY } else { value };
                    let to = &mut bytes[i * gap * size..][..size];
                    match element {
                        MaskElement::F16 => to.copy_from_slice(&f16::from_f32(value).to_ne_bytes()),
                        MaskElement::F32 => to.copy_from_slice(&value.to_ne_bytes()),
                        MaskElement::Byte => to[0] = if hides { 0 } else { 1 + draw as u8 % 255 },
                    }
                    visible |= u64::from(!hides) << i;
                    adds |= !hides && value != 0.0 && element != MaskElement::Byte;
                }
                desc.mask_dtype = Some(Dtype::F16);
                let mask = Mask::at(bytes.as_ptr(), bytes.len() as u64, [0, 0, 0, stride], element, &desc);
                for slots in [64, 17, 1] {
                    // SAFETY: as many slots as there are bytes for.
                    let found = unsafe { look(&mask, 3, 2, 1, 0, slots) };
                    assert_eq!(found.visible, visible & low_bits(slots), "{element:?} {gap} {pattern}");
                    assert!(slots < 64 || found.adds == adds, "{element:?} {gap} {pattern}");
                }
            }
        }
    }
}
