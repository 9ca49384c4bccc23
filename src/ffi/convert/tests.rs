//! Every bit of a struct of the ABI has a part in what it is converted to, in the field that it names.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use super::*;

/// The fields of a struct in its pretty `Debug` text, by name.
fn fields(value: &impl Debug) -> BTreeMap<String, String> {
    let text = format!("{value:#?}");
    let (mut found, mut name) = (BTreeMap::new(), String::new());
    for line in text.lines() {
        let is_field = line.starts_with("    ") && !line.starts_with("     ");
        if let Some((field, rest)) = line.split_once(':').filter(|_| is_field) {
            name = field.trim().to_owned();
            found.insert(name.clone(), rest.to_owned());
        } else {
            found.entry(name.clone()).or_default().push_str(line);
        }
    }
    found
}

/// Flips each bit of `base` behind `struct_size`. Either it is refused, or the field that it belongs to differs, alone. `offsets`:
/// where each field begins. `flags`: what the bits of the field `flags` are called.
fn check_bits<T: Copy, U: Debug>(
    base: T,
    offsets: &[(usize, &'static str)],
    flags: &[(u32, &'static str)],
    convert: impl Fn(&T) -> Result<U>,
) {
    let plain = fields(&convert(&base).unwrap());
    let mut seen = BTreeSet::new();
    for bit in usize::BITS as usize..8 * size_of::<T>() {
        let mut changed = base;
        // SAFETY: the structs of the ABI are numbers, pointers and optional functions, of which none here is called, without
        // padding (`layout`): a bit of the local is one of these.
        unsafe { *(&raw mut changed).cast::<u8>().add(bit / 8) ^= 1 << (bit % 8) };
        let (begin, field) =
            *offsets.iter().filter(|(offset, _)| *offset <= bit / 8).max_by_key(|(offset, _)| *offset).unwrap();
        let wanted = match flags
            .iter()
            .find(|(flag, _)| field == "flags" && flag.trailing_zeros() as usize == bit - 8 * begin)
        {
            Some((_, name)) => name,
            None => field,
        };
        let Ok(found) = convert(&changed) else { continue };
        let found = fields(&found);
        let names: Vec<&String> = plain.keys().filter(|name| plain[*name] != found[*name]).collect();
        assert_eq!(names, [wanted], "bit {} of {field}", bit - 8 * begin);
        seen.insert(wanted);
    }
    let missing: Vec<&String> = plain.keys().filter(|name| !name.is_empty() && !seen.contains(name.as_str())).collect();
    assert!(missing.is_empty(), "nothing sets {missing:?}");
}

macro_rules! offsets {
    ($type:ty: $($field:ident),* $(,)?) => { [$((std::mem::offset_of!($type, $field), stringify!($field))),*] };
}

#[test]
fn every_bit_of_a_descriptor_counts() {
    let offsets = offsets!(treeattn_attention_desc_t:
        q_heads, kv_heads, head_dim_qk, head_dim_v, q_dtype, k_dtype, v_dtype, out_dtype, kv_layout, page_size, placement,
        max_batch, max_query_tokens, max_kv_length, scale, causal, window, softcap, alibi, sinks, mask, mask_dtype, query_input,
        output, algorithm, reproducibility, wire_dtype, flags, reserved,
    );
    let flags = [
        (TREEATTN_ATTENTION_KV_STABLE, "kv_stable"),
        (TREEATTN_ATTENTION_CHECKED, "checked"),
        (TREEATTN_ATTENTION_SURPLUS_KEYS, "surplus_keys"),
        (TREEATTN_ATTENTION_PAGES_BY_HEAD, "pages_by_head"),
    ];
    // SAFETY: zeros are a value of every struct of the ABI (`Versioned`).
    let mut base: treeattn_attention_desc_t = unsafe { std::mem::zeroed() };
    base.kv_heads = 1 << 30;
    (base.q_dtype, base.k_dtype) = (treeattn_dtype_t(1), treeattn_dtype_t(1));
    (base.v_dtype, base.out_dtype) = (treeattn_dtype_t(1), treeattn_dtype_t(1));
    // A dtype of 0 would be f32, too.
    base.wire_dtype = treeattn_dtype_t(2);
    base.placement.kind = TREEATTN_PLACEMENT_INTERLEAVED;
    check_bits(base, &offsets, &flags, attention_desc);
}

#[test]
fn every_bit_of_the_arguments_of_a_step_counts() {
    let offsets = offsets!(treeattn_decode_args_t:
        batch, query_tokens, q, k, v, out, lse, query_start, kv_length, global_length, kv_start, kv_position,
        kv_position_stride, query_position, block_table, max_pages, num_pages, page_indptr, page_indices, num_page_indices,
        last_page_len, kv_capacity, reserved, k_scale, v_scale, sinks, alibi_slopes, mask, mask_factor,
        page_index_head_stride, kv_position_head_stride,
    );
    // SAFETY: as above.
    check_bits(unsafe { std::mem::zeroed() }, &offsets, &[], decode_args);
}

#[test]
fn every_bit_of_the_arguments_of_a_merge_counts() {
    let offsets = offsets!(treeattn_merge_args_t:
        query_tokens, heads, head_dim, o_dtype, o, lse, lse_base, flags, out, out_dtype, out_lse_base, out_lse, sum, query_start,
        kv_length, batch, reserved,
    );
    // SAFETY: as above.
    let mut base: treeattn_merge_args_t = unsafe { std::mem::zeroed() };
    base.o_dtype = treeattn_dtype_t(1);
    let flags =
        [(TREEATTN_MERGE_PLUS_INF_IS_EMPTY, "plus_inf_is_empty"), (TREEATTN_MERGE_NAN_IS_EMPTY, "nan_is_empty")];
    check_bits(base, &offsets, &flags, merge_args);
}
