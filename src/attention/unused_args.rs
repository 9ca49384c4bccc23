//! Arguments that the layout or the placement of a shape has no use for: a caller who passes one means something else, and gets
//! an error.

use super::decode_args::DecodeArgs;
use super::descriptor::{AttentionDesc, KvLayout, MaskKind};
use super::placement::Placement;
use super::tensor::Tensor;
use crate::error::{Error, Result};

/// What a field holds, and whether that is nothing.
trait Given {
    fn is_given(&self) -> bool;
    fn found(&self) -> String;
    const NOTHING: &'static str;
}

impl Given for *const i32 {
    fn is_given(&self) -> bool {
        !self.is_null()
    }
    fn found(&self) -> String {
        format!("{self:p}")
    }
    const NOTHING: &'static str = "NULL";
}

impl Given for Tensor {
    fn is_given(&self) -> bool {
        !self.data.is_null()
    }
    fn found(&self) -> String {
        format!("{:p}", self.data)
    }
    const NOTHING: &'static str = "NULL";
}

macro_rules! given_numbers {
    ($($number:ty)+) => {
        $(impl Given for $number {
            fn is_given(&self) -> bool {
                *self != 0
            }
            fn found(&self) -> String {
                self.to_string()
            }
            const NOTHING: &'static str = "0";
        })+
    };
}

given_numbers! { i32 i64 }

/// Refuses what is given where the shape does not look at it.
pub(super) fn check(desc: &AttentionDesc, args: &DecodeArgs) -> Result<()> {
    // Without `..`, so that the compiler asks for every new field here.
    let DecodeArgs {
        // Used by every shape. Lengths and positions that no mask needs are still held against each other.
        batch: _,
        query_tokens: _,
        q: _,
        k,
        v,
        k_scale: _,
        v_scale: _,
        out: _,
        lse: _,
        query_start: _,
        kv_length: _,
        global_length: _,
        query_position: _,
        kv_start,
        kv_position,
        kv_position_stride,
        block_table,
        max_pages,
        num_pages,
        page_indptr,
        page_indices,
        num_page_indices,
        last_page_len,
        kv_capacity,
        sinks,
        alibi_slopes,
        mask,
        mask_factor,
        page_index_head_stride,
        kv_position_head_stride,
    } = args;
    let layout = FieldValue("kv_layout", desc.kv_layout.name());
    let (table, csr) = (desc.kv_layout == KvLayout::BlockTable, desc.kv_layout == KvLayout::CsrPages);
    unused("block_table", block_table, table, layout)?;
    unused("max_pages", max_pages, table, layout)?;
    unused("num_pages", num_pages, table || csr, layout)?;
    unused("page_indptr", page_indptr, csr, layout)?;
    unused("page_indices", page_indices, csr, layout)?;
    unused("num_page_indices", num_page_indices, csr, layout)?;
    unused("last_page_len", last_page_len, csr, layout)?;
    let placement = FieldValue("placement", desc.placement.name());
    let explicit = desc.placement == Placement::Explicit;
    unused("kv_start", kv_start, desc.placement == Placement::Contiguous, placement)?;
    unused("kv_position", kv_position, explicit, placement)?;
    unused("kv_position_stride", kv_position_stride, explicit, placement)?;
    unused("sinks", sinks, desc.sinks, FieldValue("sinks", "0"))?;
    unused("alibi_slopes", alibi_slopes, desc.alibi, FieldValue("alibi", "0"))?;
    let kind = FieldValue("mask", desc.mask.name());
    unused("mask", mask, desc.mask != MaskKind::None, kind)?;
    unused("mask_factor", mask_factor, desc.mask == MaskKind::Additive, kind)?;
    let lists = FieldValue("flags", "without PAGES_BY_HEAD");
    unused("page_index_head_stride", page_index_head_stride, desc.pages_by_head, lists)?;
    unused("kv_position_head_stride", kv_position_head_stride, desc.pages_by_head, lists)?;
    unused("kv_position_head_stride", kv_position_head_stride, explicit, placement)?;
    for (name, stride) in
        [("page_index_head_stride", page_index_head_stride), ("kv_position_head_stride", kv_position_head_stride)]
    {
        if *stride < 0 {
            return Err(Error::invalid(name, stride, "at least 0"));
        }
    }
    if *kv_capacity < 0 {
        return Err(Error::invalid("kv_capacity", kv_capacity, "at least 0"));
    }
    let packed = k.stride == [0; 4] || v.stride == [0; 4];
    let cache = if desc.kv_layout == KvLayout::Strided { FieldValue("strides", "of k and v") } else { layout };
    unused("kv_capacity", kv_capacity, desc.kv_layout == KvLayout::Strided && packed, cache)
}

/// What has no use for an argument: a field and its value.
#[derive(Clone, Copy)]
struct FieldValue(&'static str, &'static str);

/// Allocates nothing unless it refuses.
fn unused<T: Given>(name: &str, value: &T, used: bool, FieldValue(field, of): FieldValue) -> Result<()> {
    if used || !value.is_given() {
        return Ok(());
    }
    Err(Error::invalid(name, value.found(), format_args!("{} with {field} {of}", T::NOTHING)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_that_a_shape_ignores_is_refused_by_name() {
        type Set = fn(&mut DecodeArgs, *const i32);
        let at: *const i32 = &7;
        let set: [(&str, Set); 17] = [
            ("block_table", |args, at| args.block_table = at),
            ("max_pages", |args, _| args.max_pages = 1),
            ("num_pages", |args, _| args.num_pages = 1),
            ("page_indptr", |args, at| args.page_indptr = at),
            ("page_indices", |args, at| args.page_indices = at),
            ("num_page_indices", |args, _| args.num_page_indices = 1),
            ("last_page_len", |args, at| args.last_page_len = at),
            ("kv_start", |args, at| args.kv_start = at),
            ("kv_position", |args, at| args.kv_position = at),
            ("kv_position_stride", |args, _| args.kv_position_stride = 1),
            ("kv_capacity", |args, _| args.kv_capacity = 1),
            ("page_index_head_stride", |args, _| args.page_index_head_stride = 1),
            ("kv_position_head_stride", |args, _| args.kv_position_head_stride = 1),
            ("sinks", |args, at| args.sinks.data = at.cast_mut().cast()),
            ("alibi_slopes", |args, at| args.alibi_slopes.data = at.cast_mut().cast()),
            ("mask", |args, at| args.mask.data = at.cast_mut().cast()),
            ("mask_factor", |args, at| args.mask_factor.data = at.cast_mut().cast()),
        ];
        let pages = ["block_table", "max_pages", "num_pages"];
        let csr = ["num_pages", "page_indptr", "page_indices", "num_page_indices", "last_page_len"];
        let explicit = ["kv_position", "kv_position_stride"];
        for (layout, of_layout) in
            [(KvLayout::Strided, &["kv_capacity"][..]), (KvLayout::BlockTable, &pages), (KvLayout::CsrPages, &csr)]
        {
            for (placement, of_placement) in [
                (Placement::Contiguous, &["kv_start"][..]),
                (Placement::Interleaved { run: 1 }, &[]),
                (Placement::Explicit, &explicit),
            ] {
                let desc = AttentionDesc { kv_layout: layout, placement, ..AttentionDesc::new(1, 1, 8, 8) };
                check(&desc, &DecodeArgs::default()).unwrap();
                for (name, set) in set {
                    let mut args = DecodeArgs::default();
                    set(&mut args, at);
                    let result = check(&desc, &args);
                    let used = of_layout.contains(&name) || of_placement.contains(&name);
                    assert_eq!(result.is_ok(), used, "{name}: {layout:?}, {placement:?}: {result:?}");
                    assert!(result.err().is_none_or(|error| error.message().starts_with(name)));
                }
            }
        }
        let (plain, mut args) = (AttentionDesc::new(1, 1, 8, 8), DecodeArgs::default());
        (args.sinks.data, args.alibi_slopes.data) = (at.cast_mut().cast(), at.cast_mut().cast());
        args.mask.data = args.sinks.data;
        let all = AttentionDesc { sinks: true, alibi: true, mask: MaskKind::Boolean, ..plain };
        check(&all, &args).unwrap();
        args.mask_factor.data = args.sinks.data;
        let error = check(&all, &args).unwrap_err();
        assert!(error.message().ends_with("wanted NULL with mask BOOLEAN"), "{error}");
        check(&AttentionDesc { mask: MaskKind::Additive, ..all }, &args).unwrap();
        let desc = AttentionDesc::new(1, 1, 8, 8);
        let mut args = DecodeArgs { kv_capacity: 4, ..DecodeArgs::default() };
        (args.k.stride, args.v.stride) = ([64, 32, 32, 4], [64, 32, 32, 4]);
        let error = check(&desc, &args).unwrap_err();
        assert_eq!(error.message(), "kv_capacity: found 4, wanted 0 with strides of k and v");
        args.v.stride = [0; 4];
        check(&desc, &args).unwrap();
        assert!(check(&desc, &DecodeArgs { kv_capacity: -1, ..args }).is_err());
    }
}
