//! The offset of every field of the structs that the library and its kernels share.

use std::mem::{offset_of, size_of};

use crate::cuda::params::{
    AllreduceParams, CheckParams, DecodeParams, ExchangeParams, GatherParams, KernelLaunch, MergeParams, NodeParams,
    QueryParams, Terms, TermsParams, Workspace,
};
use crate::partial::view::ExchangeView;
use crate::partial::{RowSource, RowTarget};

/// Where the fields of a struct lie.
pub struct Layout {
    pub name: &'static str,
    pub size: u64,
    pub fields: &'static [(&'static str, u64)],
}

macro_rules! layout {
    ($type:ident { $($field:ident),* $(,)? }) => {{
        // Does not compile where a field is missing.
        const _: fn($type) = |$type { $($field: _),* }| {};
        Layout {
            name: stringify!($type),
            size: size_of::<$type>() as u64,
            fields: &[$((stringify!($field), offset_of!($type, $field) as u64)),*],
        }
    }};
}

/// Those of all kernels.
pub const LAYOUTS: &[Layout] = &[
    layout!(KernelLaunch {
        threads,
        dynamic_smem,
        blocks_per_sm,
        partial_bytes,
        counters,
        rows,
        open_tiles,
        long_bytes
    }),
    layout!(Workspace { partials, counters, status, found }),
    layout!(RowTarget { o, lse, o_stride, lse_stride, dtype, dim, from_natural, reserved }),
    layout!(RowSource {
        o,
        lse,
        o_stride,
        lse_stride,
        dtype,
        dim,
        to_natural,
        empties,
        sum,
        sum_stride,
        query_start,
        kv_length,
        batch,
        tokens_each
    }),
    layout!(ExchangeView {
        slots,
        bases,
        window,
        host,
        slot_words,
        parity_words,
        merged_at,
        fingerprint,
        timeout_ns,
        world,
        rank,
        wire_dtype,
        mode,
        heads,
        first_head,
        own_heads,
    }),
    layout!(DecodeParams {
        q,
        k,
        v,
        q_stride,
        k_stride,
        v_stride,
        target,
        query_start,
        kv_length,
        global_length,
        kv_start,
        kv_position,
        query_position,
        block_table,
        page_indptr,
        page_indices,
        last_page_len,
        kv_position_stride,
        block_table_stride,
        num_page_indices,
        kv_capacity,
        k_end,
        v_end,
        batch,
        query_tokens,
        q_heads,
        kv_heads,
        group,
        head_dim_qk,
        q_dtype,
        kv_layout,
        page_size,
        num_pages,
        placement,
        interleave,
        rank,
        world,
        scale,
        flags,
        waiting,
        workspace,
        exchange,
    }),
    layout!(MergeParams { source, target, step, partials, tokens, heads }),
    layout!(ExchangeParams { source, target, first_row, rows, is_pushed, is_last, waiting, lse_in_two, view }),
    layout!(AllreduceParams {
        o,
        lse,
        most,
        weights,
        target,
        status,
        words,
        failed,
        host,
        arrived,
        tokens,
        heads,
        head_dim,
        first_head,
        own_heads,
        rank,
        world,
    }),
];

/// What those with terms take beside that.
pub const TERMS_LAYOUTS: &[Layout] = &[
    layout!(Terms {
        sinks,
        slopes,
        mask,
        mask_factor,
        k_scale,
        v_scale,
        sink_stride,
        slope_stride,
        factor_stride,
        mask_stride,
        mask_bytes,
        k_scale_stride,
        v_scale_stride,
        k_scale_end,
        v_scale_end,
        page_index_head_stride,
        kv_position_head_stride,
        mask_element,
        window,
        softcap,
        cap_inverse,
        k_dtype,
        v_dtype,
    }),
    layout!(TermsParams { step, terms }),
];

/// What those that check steps take beside that.
pub const CHECK_LAYOUTS: &[Layout] =
    &[layout!(CheckParams { step, wrong, first, count, needs_positions, surplus_keys })];

/// What those that gather queries take beside that.
pub const QUERY_LAYOUTS: &[Layout] =
    &[layout!(QueryParams { q, gathered, q_stride, first_row, rows, tokens, words, element_bytes, view })];

/// What those of messages over NCCL take beside that.
pub const GATHER_LAYOUTS: &[Layout] = &[
    layout!(GatherParams {
        source,
        target,
        send,
        received,
        message_bytes,
        row_bytes,
        fingerprint,
        words,
        failed,
        host,
        failure,
        arrived,
        merged,
        senders,
        wire_dtype,
        lse_in_two,
        tokens,
        heads,
        first_head,
        own_heads,
        rank,
        world,
        partials,
    }),
    layout!(NodeParams { gather, view, status, found, members, arrived, first_row, rows, is_last }),
];
