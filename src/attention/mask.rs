//! A step's mask, [sequence, query head, query token of the sequence, local slot] by byte strides.

use half::f16;

use super::decode_args::DecodeArgs;
use super::descriptor::{AttentionDesc, MaskKind};
use super::dtype::Dtype;
use crate::error::{Error, Result};

/// What an element of a mask is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaskElement {
    /// Added; -inf hides.
    F16,
    /// Added; -inf hides.
    F32,
    /// A byte; 0 hides.
    Byte,
}

impl MaskElement {
    /// That of a shape; None without a mask.
    pub fn of(desc: &AttentionDesc) -> Option<MaskElement> {
        match (desc.mask, desc.mask_dtype) {
            (MaskKind::None, _) => None,
            (MaskKind::Boolean, _) => Some(MaskElement::Byte),
            (MaskKind::Additive, Some(Dtype::F16)) => Some(MaskElement::F16),
            (MaskKind::Additive, _) => Some(MaskElement::F32),
        }
    }

    /// Bytes.
    pub fn size(self) -> usize {
        match self {
            MaskElement::F16 => Dtype::F16.size(),
            MaskElement::F32 => Dtype::F32.size(),
            MaskElement::Byte => size_of::<u8>(),
        }
    }
}

/// A mask whose pointer and strides were checked. How far it reaches depends on lengths: see [`Mask::room`].
#[derive(Clone, Copy, Debug)]
pub struct Mask {
    data: *const u8,
    bytes: u64,
    stride: [i64; 4],
    element: MaskElement,
    heads: i64,
}

// SAFETY: an address and numbers. Nothing here reads through the address but `get`, whose caller says who keeps it alive.
unsafe impl Send for Mask {}
// SAFETY: as for Send: sharing it shares numbers.
unsafe impl Sync for Mask {}

impl Mask {
    /// The mask of `args` for `desc`, which has one; checks what does not depend on lengths.
    pub(super) fn resolve(desc: &AttentionDesc, args: &DecodeArgs) -> Result<Option<Mask>> {
        let Some(element) = MaskElement::of(desc) else { return Ok(None) };
        let (mask, size) = (&args.mask, element.size() as i64);
        let none = Mask::at(std::ptr::null(), 0, [0, 0, 0, size], element, desc);
        if mask.data.is_null() {
            // Where no sequence has keys here, none is needed.
            return Ok(Some(none));
        }
        if !(mask.data as usize).is_multiple_of(size as usize) {
            let wanted = format!("a pointer aligned to {size} bytes");
            return Err(Error::invalid("mask.data", format_args!("{:p}", mask.data), wanted));
        }
        if mask.stride == [0; 4] {
            let wanted = "byte strides, 0 where it broadcasts: a mask has no packed form";
            return Err(Error::invalid("mask.stride", "[0, 0, 0, 0]", wanted));
        }
        for (dim, &stride) in mask.stride.iter().enumerate() {
            if stride < 0 || stride % size != 0 {
                let wanted = format!("a byte stride of at least 0, a multiple of {size}");
                return Err(Error::invalid(format_args!("mask.stride[{dim}]"), stride, wanted));
            }
        }
        if (mask.data as u64).checked_add(mask.bytes).is_none() {
            return Err(Error::invalid("mask.bytes", mask.bytes, "a buffer that ends below 2^64"));
        }
        Ok(Some(Mask::at(mask.data.cast_const().cast(), mask.bytes, mask.stride, element, desc)))
    }

    /// A mask of `bytes` bytes at `data`, unchecked.
    pub(crate) fn at(
        data: *const u8,
        bytes: u64,
        stride: [i64; 4],
        element: MaskElement,
        desc: &AttentionDesc,
    ) -> Mask {
        Mask { data, bytes, stride, element, heads: i64::from(desc.q_heads) }
    }

    /// What its elements are.
    pub fn element(&self) -> MaskElement {
        self.element
    }

    /// Where it begins, its bytes, and its byte strides.
    pub(crate) fn data_and_strides(&self) -> (*const u8, u64, [i64; 4]) {
        (self.data, self.bytes, self.stride)
    }

    /// Bytes from slot to slot.
    pub fn slot_stride(&self) -> i64 {
        self.stride[3]
    }

    /// Whether query heads have masks of their own.
    pub fn is_by_head(&self) -> bool {
        self.stride[1] != 0 && self.heads > 1
    }

    /// Bytes that it takes for `slots` >= 1 slots and `queries` >= 1 query tokens of sequence `b`.
    pub(super) fn end_of(&self, b: i64, queries: i64, slots: i64) -> i128 {
        let last = [b, self.heads - 1, queries - 1, slots - 1];
        let offset: i128 = self.stride.iter().zip(last).map(|(&s, n)| i128::from(s) * i128::from(n)).sum();
        offset + self.element.size() as i128
    }

    /// Slots of sequence `b` that it has room for, if the sequence has `queries` query tokens.
    pub fn room(&self, b: i64, queries: i64) -> i64 {
        let left = i128::from(self.bytes) - self.end_of(b, queries.max(1), 1);
        match self.stride[3] {
            _ if left < 0 => 0,
            0 => i64::MAX,
            slot => i64::try_from(left / i128::from(slot) + 1).unwrap_or(i64::MAX),
        }
    }

    /// Where the element of a slot lies: of sequence `b`, query head `head`, query token `query` of the sequence.
    #[inline]
    pub fn address(&self, b: usize, head: usize, query: usize, slot: usize) -> *const u8 {
        let [s_b, s_head, s_query, s_slot] = self.stride;
        let offset = b as i64 * s_b + head as i64 * s_head + query as i64 * s_query + slot as i64 * s_slot;
        self.data.wrapping_offset(offset as isize)
    }

    /// What a slot is given: -inf hides it; of a boolean mask 0 or -inf.
    ///
    /// # Safety
    /// The slot is below [`Mask::room`] for as many query tokens as the sequence has, and the mask is host memory, valid for
    /// reads.
    pub unsafe fn get(&self, b: usize, head: usize, query: usize, slot: usize) -> f64 {
        let at = self.address(b, head, query, slot);
        // SAFETY: `room` ends slots where the mask's bytes end, so that the element of one below it lies inside them, and
        // they are readable; reads need no alignment.
        unsafe {
            match self.element {
                MaskElement::F16 => at.cast::<f16>().read_unaligned().to_f64(),
                MaskElement::F32 => f64::from(at.cast::<f32>().read_unaligned()),
                MaskElement::Byte if at.read() == 0 => f64::NEG_INFINITY,
                MaskElement::Byte => 0.0,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::tensor::Tensor;

    fn mask(bytes: u64, stride: [i64; 4]) -> Result<Option<Mask>> {
        let data = 64usize as *mut std::ffi::c_void;
        let desc =
            AttentionDesc { mask: MaskKind::Additive, mask_dtype: Some(Dtype::F16), ..AttentionDesc::new(4, 2, 8, 8) };
        Mask::resolve(&desc, &DecodeArgs { mask: Tensor { data, bytes, stride }, ..DecodeArgs::default() })
    }

    #[test]
    fn room_is_what_the_strides_reach() {
        // Two sequences, broadcast heads, two queries, ten slots.
        let of = |bytes, b, queries| mask(bytes, [40, 0, 20, 2]).unwrap().unwrap().room(b, queries);
        assert_eq!((of(80, 1, 2), of(80, 0, 2), of(78, 1, 2), of(80, 1, 1)), (10, 30, 9, 20));
        assert_eq!((of(60, 1, 2), of(61, 1, 2), of(62, 1, 2), of(0, 0, 1)), (0, 0, 1, 0));
        assert_eq!(mask(2, [0, 0, 0, 2]).unwrap().unwrap().room(100, 100), 1);
        assert_eq!(mask(2, [2, 0, 0, 0]).unwrap().unwrap().room(0, 7), i64::MAX);
        assert_eq!(mask(u64::MAX - 64, [i64::MAX & !1; 4]).unwrap().unwrap().room(1 << 31, 1 << 31), 0);
        assert!(mask(80, [40, 20, 20, 2]).unwrap().unwrap().is_by_head());
    }

    #[test]
    fn strides_that_cannot_be_meant_are_refused() {
        for (stride, name) in [
            ([0; 4], "mask.stride: found [0, 0, 0, 0], wanted byte strides"),
            ([0, 0, 0, 1], "mask.stride[3]: found 1, wanted a byte stride of at least 0, a multiple of 2"),
            ([0, -2, 0, 2], "mask.stride[1]: found -2"),
        ] {
            let error = mask(80, stride).unwrap_err();
            assert!(error.message().starts_with(name), "{error}");
        }
        assert!(mask(u64::MAX, [0, 0, 0, 2]).unwrap_err().message().starts_with("mask.bytes"));
    }
}
