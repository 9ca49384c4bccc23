//! What a plan is made for: where tensors lie, how tokens are placed, the descriptor.

use std::ffi::c_void;

use crate::ffi::codes::{
    treeattn_algorithm_t, treeattn_dtype_t, treeattn_kv_layout_t, treeattn_mask_kind_t, treeattn_output_t,
    treeattn_placement_kind_t, treeattn_query_input_t, treeattn_reproducibility_t,
};

/// A caller's buffer with byte strides; what the dimensions are is said where the tensor is used. Frozen: no
/// struct_size.
///
/// All strides zero means packed, row-major; how many tokens a packed cache has room for is said at `kv_capacity` of
/// `treeattn_decode_args_t`. Otherwise every stride is taken as it is, so that a zero broadcasts (inputs only, and not the
/// elements of a row of keys or values). The library touches nothing outside `bytes` bytes from `data`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_tensor_t {
    /// First element, on the plan's device. Aligned to the element (to 4 bytes at most).
    pub data: *mut c_void,
    /// Bytes from `data` that the library may touch.
    pub bytes: u64,
    /// Byte strides, outermost dimension first, each at least 0 and a multiple of the element's size; those past the last
    /// dimension are ignored.
    pub stride: [i64; 4],
}

/// Which rank holds which token. Frozen: no struct_size.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_placement_t {
    /// The kind.
    pub kind: treeattn_placement_kind_t,
    /// Tokens a run with TREEATTN_PLACEMENT_INTERLEAVED, at least 1; else 0.
    pub interleave: i32,
}

/// An attention shape: what stays the same from step to step, and is the same on every rank.
///
/// `kv_heads` = 0 describes a merge-only plan: the engine makes the partials, and only `q_heads`, `head_dim_v`,
/// `max_query_tokens`, `out_dtype`, `wire_dtype`, `output` and `algorithm` count. A field whose capability this build
/// lacks is TREEATTN_ERROR_UNSUPPORTED, by name.
///
/// The score of a query at global position i and a key at j, of query head h, is
///
/// `s = cap(scale * q.k) - slope[h] * |i - j| + factor[h] * mask[i][j]`, where `cap(x) = softcap * tanh(x / softcap)`,
///
/// and the output is the mean of the values under the softmax of the scores of the keys that the query sees, with `exp(sink[h])`
/// in its denominator. Terms that are off drop out, the others may be combined; this is also the order of ggml (whose ALiBi is
/// `factor[h] * mask`) and of FlashAttention. A key that `causal`, `window`, or a mask of -inf or boolean 0 hides has no influence
/// on the row, whatever it holds. Scores times log2 e have to be within float32: one above makes its row NaN, one below weighs
/// nothing. "Accuracy" in README.md has the error that no output exceeds.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_attention_desc_t {
    /// sizeof(treeattn_attention_desc_t).
    pub struct_size: usize,
    /// Query heads, at least 1.
    pub q_heads: i32,
    /// Key and value heads, a divisor of `q_heads`. 0: a merge-only plan.
    pub kv_heads: i32,
    /// Dimension of q and k, 1 to 1024.
    pub head_dim_qk: i32,
    /// Dimension of v and of the output, 1 to 1024. May differ from `head_dim_qk`.
    pub head_dim_v: i32,
    /// Element type of q: f32, f16 or bf16.
    pub q_dtype: treeattn_dtype_t,
    /// Element type of k.
    pub k_dtype: treeattn_dtype_t,
    /// Element type of v.
    pub v_dtype: treeattn_dtype_t,
    /// Element type of the output: f32, f16 or bf16.
    pub out_dtype: treeattn_dtype_t,
    /// Layout of k and v.
    pub kv_layout: treeattn_kv_layout_t,
    /// Tokens a page, at least 1; 0 for the strided layout.
    pub page_size: i32,
    /// Which rank holds which token.
    pub placement: treeattn_placement_t,
    /// Most sequences in a step, at least 1.
    pub max_batch: i32,
    /// Most query tokens in a step, all sequences together, at least 1.
    pub max_query_tokens: i32,
    /// Most tokens of one sequence on one rank, at least 1. Costs no memory but with TREEATTN_ALGORITHM_RING, whose blocks it
    /// sizes.
    pub max_kv_length: i32,
    /// Multiplies q.k; 0: 1/sqrt(head_dim_qk).
    pub scale: f32,
    /// 1: a query does not see keys at later global positions. Its own token is a key like the others: put it into the
    /// cache first.
    pub causal: i32,
    /// A query at global position p sees no key before p - window + 1: with `causal` = 1 the last `window` keys up to its
    /// own, its own token among them, whatever ranks hold them. With `causal` = 0 it sees all later keys, too. 0: no window.
    /// Keys outside the windows of all query tokens of a sequence are not read, but for explicit positions on GPUs. At least 0.
    pub window: i32,
    /// Scores become softcap * tanh(score / softcap), after `scale`. 0: off. Finite, at least 0.
    pub softcap: f32,
    /// 1: the slope of the query head (`alibi_slopes`) times the distance of the global positions is subtracted.
    pub alibi: i32,
    /// 1: a sink for each query head joins the softmax of every row, once and not per rank (`sinks` of
    /// `treeattn_decode_args_t`): lse = log(exp(sink) + sum_j exp(s_j)), and the outputs shrink accordingly. A row that sees no
    /// key is 0 with lse = sink; rows of no sequence stay 0 with lse -inf. The partial of rank 0 holds the sinks, also with
    /// TREEATTN_OUTPUT_LOCAL and from `treeattn_plan_partial`, so that merging all partials counts them once.
    pub sinks: i32,
    /// A mask of the step (`mask` of `treeattn_decode_args_t`), beside `causal` and `window`: a key is seen where all agree.
    pub mask: treeattn_mask_kind_t,
    /// Element type of an additive mask: f16 or f32; 0 with none and with a boolean one.
    pub mask_dtype: treeattn_dtype_t,
    /// What each rank passes as q.
    pub query_input: treeattn_query_input_t,
    /// Who gets the merged output.
    pub output: treeattn_output_t,
    /// How partials meet.
    pub algorithm: treeattn_algorithm_t,
    /// Which bits are promised to be the same.
    pub reproducibility: treeattn_reproducibility_t,
    /// Element type of partial outputs on their way between ranks: f32, f16 or bf16. 0: f32. Finite values
    /// beyond its range travel as its largest number. The lse always travels as f32, two of them but with ALLREDUCE3 on GPUs.
    pub wire_dtype: treeattn_dtype_t,
    /// TREEATTN_ATTENTION_ flags.
    pub flags: u32,
    /// Zero; keeps the size a multiple of 8.
    pub reserved: u32,
}
