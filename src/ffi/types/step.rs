//! What a step brings: a decode step, a team of the engine's threads, a merge of given partials.

use std::ffi::c_void;

use super::shape::treeattn_tensor_t;
use crate::ffi::codes::treeattn_dtype_t;

/// The arguments of one decode step on one rank. Pointers are to memory of the plan's device.
///
/// Lengths, starts, positions and tables are read while the step runs, and checked there before any address is formed
/// from them: what is out of range gives NaN for that sequence and TREEATTN_ERROR_INVALID_DATA. Rows that see no key, and
/// rows from `query_start[batch]` on, are valid padding: out 0, lse -inf. A position, start or `global_length` on which nothing
/// depends may be anything. Of a `query_start` that does not ascend the first bad sequence is named; sequences behind it that begin
/// before all that came are bad, too, and a row that two of them claim belongs to the first.
///
/// An argument that the layout or the placement has no use for (a block table with a strided cache, `kv_start` with
/// interleaved placement) is TREEATTN_ERROR_INVALID_ARGUMENT. On CPUs, whose memory the call can read, so is what cannot be
/// meant: `k.bytes` too small for the lengths, `max_pages` or `num_pages` 0; `query_start[0]` other than 0; of a sequence with
/// queries and a `global_length` also kv_start + length above it and, with interleaved placement, a length other than what
/// the rank holds of it (for `treeattn_plan_partial` and `treeattn_energy`: more than that); of plans that are CHECKED the
/// ranks find the latter together, as MISMATCH. What lies in a GPU's memory the
/// call cannot read: there the former are INVALID_DATA of the step, but for `query_start[0]` (rows before it get 0 and an lse of
/// -inf), and the latter are looked at only by steps of plans that are CHECKED.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_decode_args_t {
    /// sizeof(treeattn_decode_args_t).
    pub struct_size: usize,
    /// Sequences in this step, 0 to `max_batch`.
    pub batch: i32,
    /// Query tokens of all sequences together, 0 to `max_query_tokens`: an upper bound of `query_start[batch]`.
    pub query_tokens: i32,
    /// Queries [token, query head, dim]; with TREEATTN_QUERY_INPUT_SCATTERED the rank's own heads only, but for
    /// `treeattn_plan_partial`.
    pub q: treeattn_tensor_t,
    /// Keys [sequence, token, kv head, dim], or [page, slot, kv head, dim]. Packed (all strides 0) and strided, the tokens of a
    /// sequence are as many as `kv_capacity` says. `bytes` may end where the tokens of the last sequence do. Last
    /// stride 0 with dim above 1 is refused.
    pub k: treeattn_tensor_t,
    /// Values, as the keys. May be a view of the keys.
    pub v: treeattn_tensor_t,
    /// Output [token, query head, dim]; with a scattered output the rank's own heads only. Its `bytes` bytes, gaps between rows
    /// included, overlap those of no input and not those of `lse`. No two elements share a byte: each dimension steps over the
    /// whole of those with smaller strides.
    pub out: treeattn_tensor_t,
    /// Natural log-sum-exp of the scaled scores, f32 [token, query head], heads as `out`. data NULL: not wanted.
    pub lse: treeattn_tensor_t,
    /// `int32 [batch + 1]`: first query token of each sequence, ascending from 0. NULL: query_tokens / batch each, which then
    /// leaves no remainder.
    pub query_start: *const i32,
    /// `int32 [batch]`: tokens of each sequence on this rank, 0 to `max_kv_length`. NULL only for CSR pages, which take exactly
    /// one of `kv_length` and `last_page_len`.
    pub kv_length: *const i32,
    /// `int32 [batch]`: tokens of each sequence on all ranks together, this step's query tokens included. Required where
    /// global positions matter (causal, window, ALiBi) and `query_position` is NULL; elsewhere welcome, since the lengths of
    /// this rank are held against it. Keys past it: see TREEATTN_ATTENTION_SURPLUS_KEYS.
    pub global_length: *const i32,
    /// `int32 [batch]`, contiguous placement: global position of local slot 0. NULL: 0, with one rank.
    pub kv_start: *const i32,
    /// int32, explicit placement: global position of each local slot; row b begins at element b * kv_position_stride.
    pub kv_position: *const i32,
    /// Elements between the rows of `kv_position`. 0: `max_kv_length`.
    pub kv_position_stride: i64,
    /// `int32 [query_tokens]`: global position of each query token. NULL: the last of the sequence, in order.
    pub query_position: *const i32,
    /// `int32 [batch, max_pages]`, block table layout: the pages of each sequence. Entries past its length are unused.
    pub block_table: *const i32,
    /// Entries of a row of `block_table`.
    pub max_pages: i32,
    /// Pages that exist in k and v.
    pub num_pages: i32,
    /// `int32 [batch + 1]`, CSR pages: first entry of each sequence in `page_indices`.
    pub page_indptr: *const i32,
    /// `int32 [num_page_indices]`, CSR pages: the pages, sequence after sequence.
    pub page_indices: *const i32,
    /// Entries of `page_indices`.
    pub num_page_indices: i64,
    /// `int32 [batch]`, CSR pages: tokens in each sequence's last page, 1 to page_size, instead of `kv_length`.
    pub last_page_len: *const i32,
    /// Scales of keys, f32 [sequence or page, token or slot, kv head], of any `k_dtype`: key = scale * what k holds. Strides are
    /// taken as they are, any may be 0: {0, 0, 0} is one scale for all, {0, 0, 4} one a kv head. `bytes` may end where the
    /// last sequence does, as those of k; nothing past a length is read. A scale that is no finite number makes NaN of what
    /// sees it. Products of queries with what k holds have to be within f32. Each rank has its own. data NULL: 1, but with
    /// TREEATTN_DTYPE_INT8, whose keys need scales, TREEATTN_ERROR_INVALID_ARGUMENT.
    pub k_scale: treeattn_tensor_t,
    /// Scales of values, as `k_scale`: value = scale * what v holds.
    pub v_scale: treeattn_tensor_t,
    /// `f32 [query head]`: the slopes of `alibi`, at any stride. Required with `alibi` = 1, the same on every rank; NULL without.
    pub alibi_slopes: treeattn_tensor_t,
    /// `f32 [query head]`: logits that join the softmax, not scaled. Required where the plan has sinks. The same on every rank.
    /// -inf is none. NaN and +inf make their rows NaN. NULL without sinks.
    pub sinks: treeattn_tensor_t,
    /// Mask [sequence, query head, query token of the sequence, local slot] of `mask_dtype`, or bytes of a boolean one.
    /// Strides are taken as they are, 0 broadcasts; all four 0 is refused. Slots are those of this rank: the element for the
    /// key in its slot s of sequence b, whatever pages it lies in. Additive: added to the score; -inf hides, whatever the
    /// factor; NaN makes the rows NaN that would see the key. Boolean: 0 hides, all else is visible. `bytes` covers what the
    /// lengths and query tokens of the step reach; elements past a length are not read, so that rows may be padded. On
    /// CPUs tiles of 64 keys that are hidden from all rows are not read; on GPUs a mask that does not reach so far is
    /// TREEATTN_ERROR_INVALID_DATA of the sequence. data NULL: no sequence with queries has keys here.
    pub mask: treeattn_tensor_t,
    /// Tokens that a packed strided k or v (all strides 0) has room for in each sequence: it is [batch, kv_capacity, kv head,
    /// dim]. May be 0 for one sequence, and where `bytes` is just the size of [batch or `max_batch`, `max_kv_length`, kv head,
    /// dim] or, with batch = `max_batch`, of fewer tokens. 0 where k and v have strides, and in other layouts. Since 0.2.
    pub kv_capacity: i32,
    /// Zero; keeps the size a multiple of 8.
    pub reserved: i32,
    /// `f32 [query head]`, additive masks: what their values are multiplied by, as the slopes of ggml's ALiBi. data NULL: 1. The
    /// same on every rank. Since 0.2.
    pub mask_factor: treeattn_tensor_t,
    /// With TREEATTN_ATTENTION_PAGES_BY_HEAD, elements between the lists of kv heads in `page_indices`: kv head h reads the page of
    /// slot s of sequence b from entry `page_indptr[b] + h * page_index_head_stride + s / page_size`. All heads of a sequence have
    /// the same number of tokens; a mask takes out what a head lacks. 0: they share their lists. `num_page_indices` counts the
    /// entries of all heads. Entries past a list are not read. Since 0.2.
    pub page_index_head_stride: i64,
    /// With TREEATTN_ATTENTION_PAGES_BY_HEAD and explicit placement, elements between the rows of kv heads in `kv_position`: that of
    /// kv head h of sequence b begins at element b * kv_position_stride + h * kv_position_head_stride. 0: they share them. Since
    /// 0.2.
    pub kv_position_head_stride: i64,
}

/// One thread of an engine's team, of which every thread enters `treeattn_plan_decode_team`. Set up with TREEATTN_TEAM_INIT.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_team_t {
    /// sizeof(treeattn_team_t).
    pub struct_size: usize,
    /// Which member this thread is, 0 to size - 1, each once.
    pub index: i32,
    /// Members of the team in this step, the same for all, 1 to the `max_team` of the communicator. May differ from step to step,
    /// once the step before has returned on all of its members.
    pub size: i32,
    /// The team's barrier: returns when every member has called it as often as this one. Called only when all members have come,
    /// by each of them equally often. Only how members wait: what they wait for the library sees itself. It must not call the
    /// library, unwind or jump out. One function for all members; NULL, for all: they spin for at most 20 us, then sleep.
    pub barrier: Option<unsafe extern "C" fn(ctx: *mut c_void)>,
    /// Passed to `barrier`; each member has its own.
    pub ctx: *mut c_void,
}

/// Partials to merge and where the result goes.
///
/// For `treeattn_merge_partials` o is [partial, token, head, dim] and lse [partial, token, head]; for
/// `treeattn_plan_merge` each rank passes its own partial, o [token, head, dim] and lse [token, head].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_merge_args_t {
    /// sizeof(treeattn_merge_args_t).
    pub struct_size: usize,
    /// Query tokens.
    pub query_tokens: i32,
    /// Heads of the partials. 0: the plan's `q_heads`.
    pub heads: i32,
    /// Elements of a row. 0: the plan's `head_dim_v`.
    pub head_dim: i32,
    /// Element type of `o`: f32, f16 or bf16.
    pub o_dtype: treeattn_dtype_t,
    /// Element type of `out`. 0: the plan's `out_dtype`; for `treeattn_merge_partials` that of `o`.
    pub out_dtype: treeattn_dtype_t,
    /// Base of the incoming lse: 0 for e, or 2.
    pub lse_base: i32,
    /// TREEATTN_MERGE_ flags.
    pub flags: u32,
    /// Base of the outgoing lse: 0 for e, or 2. Since 0.2; zero before.
    pub out_lse_base: i32,
    /// Outputs of the partials, normalised unless there is a `sum`. A row that is empty (its lse is -inf, or what a flag or
    /// `kv_length` says) is never read.
    pub o: treeattn_tensor_t,
    /// Log-sum-exps of the partials, f32, at any strides. NaN makes its row NaN, and so does +inf, unless
    /// TREEATTN_MERGE_NAN_IS_EMPTY or TREEATTN_MERGE_PLUS_INF_IS_EMPTY says that such a partial is empty.
    pub lse: treeattn_tensor_t,
    /// Merged output [token, head, dim]; with a scattered plan the rank's own heads. Its `bytes` bytes overlap those of no other
    /// tensor.
    pub out: treeattn_tensor_t,
    /// Merged log-sum-exp to the base `out_lse_base`, f32 [token, head]. data NULL: not wanted.
    pub out_lse: treeattn_tensor_t,
    /// For partials of the form (max, sum), f32 as `lse`: o is then sum_j exp(s_j - m) v_j, `lse` holds m (to the base `lse_base`; it
    /// need not be the maximum) and this sum_j exp(s_j - m). Pairs side by side are two tensors of the same strides. An m of -inf
    /// or a sum of 0 is an empty partial, whose o is not read. data NULL: `lse` holds log-sum-exps. Since 0.2.
    pub sum: treeattn_tensor_t,
    /// `int32 [batch + 1]`, on the device, read during the step: first token of each sequence, ascending from 0 (else, on CPUs,
    /// TREEATTN_ERROR_INVALID_ARGUMENT; on GPUs rows then count to the last sequence that begins at or before them). Rows of tokens from
    /// `query_start[batch]` on are padding: empty, whatever `lse` and o hold. NULL: with `kv_length` query_tokens / batch each,
    /// which then leaves no remainder. Since 0.2.
    pub query_start: *const i32,
    /// `int32 [batch]`, on the device, read during the step: keys of each sequence on this rank. Rows of sequences with 0 or less are
    /// empty, whatever `lse` and o hold. NULL: nothing is known of keys. Since 0.2.
    pub kv_length: *const i32,
    /// Sequences that `query_start` and `kv_length` tell of; 0 without both. Since 0.2.
    pub batch: i32,
    /// Zero; keeps the size a multiple of 8.
    pub reserved: i32,
}
