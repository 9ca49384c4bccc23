//! The arguments of a decode step, as the caller gives them.

use super::tensor::Tensor;

/// The arguments of one decode step on one rank. Pointers are to memory of the plan's device.
///
/// Tensors: q [token, q head, dim]; k and v [sequence, token, kv head, dim] (strided) or [page, slot, kv head, dim];
/// out [token, q head, dim]; lse [token, q head] f32, optional. With a scattered output, out and lse hold the rank's
/// own heads only.
#[derive(Clone, Copy, Debug)]
pub struct DecodeArgs {
    /// Sequences in this step.
    pub batch: i32,
    /// Query tokens of all sequences together: an upper bound of `query_start[batch]`.
    pub query_tokens: i32,
    /// Queries.
    pub q: Tensor,
    /// Keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
    /// f32 [sequence or page, token or slot, kv head] by strides of which any may be 0: what the elements of a key are
    /// multiplied by. `data` null: 1, where the type of k has values of its own.
    pub k_scale: Tensor,
    /// The same of values.
    pub v_scale: Tensor,
    /// Output.
    pub out: Tensor,
    /// Natural log-sum-exp of the scaled scores, f32; `data` null: not wanted.
    pub lse: Tensor,
    /// `int32 [batch + 1]`: first query token of each sequence. Null: `query_tokens / batch` tokens each.
    pub query_start: *const i32,
    /// `int32 [batch]`: tokens of each sequence on this rank. Null only for CSR pages with `last_page_len`.
    pub kv_length: *const i32,
    /// `int32 [batch]`: tokens of each sequence on all ranks together, the query tokens included. Needed where
    /// global positions matter and `query_position` is null.
    pub global_length: *const i32,
    /// `int32 [batch]`, contiguous placement: global position of local slot 0. Null: 0 in a world of one.
    pub kv_start: *const i32,
    /// int32, explicit placement: global position of each local slot; row b begins at b * `kv_position_stride`.
    pub kv_position: *const i32,
    /// Elements between the rows of `kv_position`; 0: `max_kv_length` of the descriptor.
    pub kv_position_stride: i64,
    /// `int32 [query_tokens]`: global position of each query token. Null: global_length - n_query + i.
    pub query_position: *const i32,
    /// `int32 [batch, max_pages]`: the pages of each sequence.
    pub block_table: *const i32,
    /// Entries of a row of `block_table`.
    pub max_pages: i32,
    /// Pages that exist in k and v.
    pub num_pages: i32,
    /// `int32 [batch + 1]`: first entry of each sequence in `page_indices`.
    pub page_indptr: *const i32,
    /// `int32 [num_page_indices]`: the pages, sequence after sequence.
    pub page_indices: *const i32,
    /// Entries of `page_indices`, those of all kv heads.
    pub num_page_indices: i64,
    /// `int32 [batch]`: tokens in each sequence's last page, 1 to page_size. Null: `kv_length` counts.
    pub last_page_len: *const i32,
    /// Tokens that a packed strided k or v (all strides zero) has room for in each sequence. 0: told by `bytes`, where that
    /// is the size of [batch or `max_batch`, `max_kv_length`, kv head, dim] or, of a full batch, of fewer tokens; or one sequence.
    pub kv_capacity: i32,
    /// `f32 [q head]`, for shapes with sinks: logits that join the softmax once; those of rank 0 count. The same on every rank.
    pub sinks: Tensor,
    /// `f32 [q head]`, for shapes with ALiBi: slopes that the global distance is multiplied by.
    pub alibi_slopes: Tensor,
    /// [sequence, q head, query token of the sequence, local slot], for shapes with a mask: all strides are taken as they are,
    /// 0 broadcasts. `data` may be null where no sequence has keys here.
    pub mask: Tensor,
    /// `f32 [q head]`, for additive masks: what their values are multiplied by. `data` null: 1.
    pub mask_factor: Tensor,
    /// Elements between the lists of kv heads in `page_indices`, where heads have lists of their own: that of head h begins
    /// h times as far behind `page_indptr[b]`.
    pub page_index_head_stride: i64,
    /// Elements between the rows of kv heads in `kv_position`, where heads have lists of their own; 0: they share them.
    pub kv_position_head_stride: i64,
}

// SAFETY: addresses and numbers. Nothing here reads through them; the unsafe code that does says who keeps the memory
// alive until the step is done.
unsafe impl Send for DecodeArgs {}
// SAFETY: as for Send: sharing them shares numbers.
unsafe impl Sync for DecodeArgs {}

impl Default for DecodeArgs {
    fn default() -> Self {
        DecodeArgs {
            batch: 0,
            query_tokens: 0,
            q: Tensor::NULL,
            k: Tensor::NULL,
            v: Tensor::NULL,
            k_scale: Tensor::NULL,
            v_scale: Tensor::NULL,
            out: Tensor::NULL,
            lse: Tensor::NULL,
            query_start: std::ptr::null(),
            kv_length: std::ptr::null(),
            global_length: std::ptr::null(),
            kv_start: std::ptr::null(),
            kv_position: std::ptr::null(),
            kv_position_stride: 0,
            query_position: std::ptr::null(),
            block_table: std::ptr::null(),
            max_pages: 0,
            num_pages: 0,
            page_indptr: std::ptr::null(),
            page_indices: std::ptr::null(),
            num_page_indices: 0,
            last_page_len: std::ptr::null(),
            kv_capacity: 0,
            sinks: Tensor::NULL,
            alibi_slopes: Tensor::NULL,
            mask: Tensor::NULL,
            mask_factor: Tensor::NULL,
            page_index_head_stride: 0,
            kv_position_head_stride: 0,
        }
    }
}
