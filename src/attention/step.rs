//! What changes from step to step: the arguments of a decode, checked as far as the host can see.

use std::ffi::c_void;

use super::descriptor::{AttentionDesc, KvLayout};
use super::dtype::Dtype;
use super::format::KvFormat;
use super::placement::{Placement, Shard};
use super::tensor::Tensor;
use crate::error::{Error, Result};
use crate::partial::rows::RowTarget;

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
    /// Entries of `page_indices`.
    pub num_page_indices: i64,
    /// `int32 [batch]`: tokens in each sequence's last page, 1 to page_size. Null: `kv_length` counts.
    pub last_page_len: *const i32,
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
        }
    }
}

/// Decode arguments whose host-visible fields were checked against a descriptor, with resolved byte strides.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// The arguments.
    pub args: DecodeArgs,
    /// Byte strides of q: token, head, dim.
    pub q_stride: [i64; 4],
    /// Byte strides of k: sequence or page, token or slot, kv head, dim.
    pub k_stride: [i64; 4],
    /// Byte strides of v, as k.
    pub v_stride: [i64; 4],
    /// Byte strides of out: token, head, dim.
    pub out_stride: [i64; 4],
    /// Byte strides of lse: token, head.
    pub lse_stride: [i64; 4],
    /// Most tokens of a sequence that k and v have room for and the plan allows; a longer `kv_length` is bad data.
    pub kv_capacity: i64,
    /// Where the energy is evaluated, see [`Step::at_zeta`]; `data` null: at 0, which is plain attention.
    pub zeta: Tensor,
    /// Byte strides of zeta: token, head, dim.
    pub zeta_stride: [i64; 4],
}

impl Step {
    /// Where the step's output goes.
    pub(crate) fn target(&self, desc: &AttentionDesc) -> RowTarget {
        let [token, head, dim, _] = self.out_stride;
        RowTarget {
            o: self.args.out.data as u64,
            lse: self.args.lse.data as u64,
            o_stride: [token, head, dim],
            lse_stride: [self.lse_stride[0], self.lse_stride[1]],
            dtype: desc.out_dtype,
            dim: desc.head_dim_v,
        }
    }

    /// Checks everything that the host can see of `args`. `out_heads` is how many heads out and lse hold.
    pub fn new(desc: &AttentionDesc, shard: Shard, args: &DecodeArgs, out_heads: i32) -> Result<Step> {
        bounded("batch", args.batch, 0, desc.max_batch, "max_batch")?;
        bounded("query_tokens", args.query_tokens, 0, desc.max_query_tokens, "max_query_tokens")?;
        let (batch, tokens) = (i64::from(args.batch), i64::from(args.query_tokens));
        let (q_heads, kv_heads) = (i64::from(desc.q_heads), i64::from(desc.kv_heads));
        let (dim_qk, dim_v) = (i64::from(desc.head_dim_qk), i64::from(desc.head_dim_v));

        if args.query_start.is_null() && batch > 0 && tokens % batch != 0 {
            let wanted = format!("a multiple of batch = {batch} where query_start is NULL");
            return Err(Error::invalid("query_tokens", tokens, wanted));
        }
        if batch == 0 && tokens != 0 {
            return Err(Error::invalid("query_tokens", tokens, "0 where batch is 0"));
        }
        let q_stride = args.q.resolve("q", desc.q_dtype, &[tokens, q_heads, dim_qk])?;
        let out_heads = i64::from(out_heads);
        let out_stride = args.out.resolve("out", desc.out_dtype, &[tokens, out_heads, dim_v])?;
        no_broadcast("out", &out_stride, &[tokens, out_heads, dim_v])?;
        let lse_stride = if args.lse.data.is_null() {
            [0; 4]
        } else {
            let stride = args.lse.resolve("lse", Dtype::F32, &[tokens, out_heads])?;
            no_broadcast("lse", &stride, &[tokens, out_heads])?;
            stride
        };

        let limit = i64::from(desc.max_kv_length);
        let (k_stride, v_stride, kv_capacity) = match desc.kv_layout {
            KvLayout::Strided => {
                let (k_stride, k_cap) = strided("k", &args.k, desc.k_dtype, [batch, limit, kv_heads, dim_qk])?;
                let (v_stride, v_cap) = strided("v", &args.v, desc.v_dtype, [batch, limit, kv_heads, dim_v])?;
                (k_stride, v_stride, limit.min(k_cap).min(v_cap))
            }
            KvLayout::BlockTable | KvLayout::CsrPages => {
                at_least("num_pages", i64::from(args.num_pages), 0)?;
                let (pages, page) = (i64::from(args.num_pages), i64::from(desc.page_size));
                let k_stride = args.k.resolve("k", desc.k_dtype, &[pages, page, kv_heads, dim_qk])?;
                let v_stride = args.v.resolve("v", desc.v_dtype, &[pages, page, kv_heads, dim_v])?;
                let room = if desc.kv_layout == KvLayout::BlockTable {
                    at_least("max_pages", i64::from(args.max_pages), 0)?;
                    required("block_table", args.block_table, batch > 0 && args.max_pages > 0)?;
                    i64::from(args.max_pages) * page
                } else {
                    at_least("num_page_indices", args.num_page_indices, 0)?;
                    required("page_indptr", args.page_indptr, batch > 0)?;
                    required("page_indices", args.page_indices, args.num_page_indices > 0)?;
                    args.num_page_indices.saturating_mul(page)
                };
                (k_stride, v_stride, limit.min(room))
            }
        };

        let csr = desc.kv_layout == KvLayout::CsrPages;
        if csr && batch > 0 && args.kv_length.is_null() == args.last_page_len.is_null() {
            let found = if args.kv_length.is_null() { "neither" } else { "both" };
            return Err(Error::invalid("kv_length, last_page_len", found, "exactly one of the two with CSR_PAGES"));
        }
        required("kv_length", args.kv_length, batch > 0 && !csr)?;
        aligned("last_page_len", args.last_page_len)?;
        aligned("query_start", args.query_start)?;
        aligned("query_position", args.query_position)?;
        if (desc.needs_positions() || desc.checked) && batch > 0 {
            required("global_length", args.global_length, args.query_position.is_null() || desc.checked)?;
            match desc.placement {
                Placement::Contiguous => required("kv_start", args.kv_start, shard.world > 1)?,
                Placement::Explicit => required("kv_position", args.kv_position, true)?,
                Placement::Interleaved { .. } => {}
            }
        }
        aligned("global_length", args.global_length)?;
        aligned("kv_start", args.kv_start)?;
        aligned("kv_position", args.kv_position)?;
        at_least("kv_position_stride", args.kv_position_stride, 0)?;
        let step = Step {
            args: *args,
            q_stride,
            k_stride,
            v_stride,
            out_stride,
            lse_stride,
            kv_capacity,
            zeta: Tensor::NULL,
            zeta_stride: [0; 4],
        };
        step.check_aliasing(desc)?;
        Ok(step)
    }

    /// Elements between the rows of `kv_position`.
    pub fn kv_position_stride(&self, desc: &AttentionDesc) -> i64 {
        if self.args.kv_position_stride == 0 { i64::from(desc.max_kv_length) } else { self.args.kv_position_stride }
    }

    /// Refuses outputs that overlap inputs or each other.
    fn check_aliasing(&self, desc: &AttentionDesc) -> Result<()> {
        let a = &self.args;
        for (out_name, out) in [("out", &a.out), ("lse", &a.lse)] {
            for (in_name, input) in [("q", &a.q), ("k", &a.k), ("v", &a.v)] {
                disjoint(out_name, out, in_name, input)?;
            }
            for (in_name, data, elements) in self.arrays(desc) {
                let bytes = u64::try_from(elements).unwrap_or(0).saturating_mul(4);
                disjoint(out_name, out, in_name, &Tensor { data: data as *mut c_void, bytes, stride: [0; 4] })?;
            }
        }
        disjoint("out", &a.out, "lse", &a.lse)
    }

    /// The int32 arrays that a step of this shape reads, with their elements; what a shape has no use for may be
    /// anything.
    fn arrays(&self, desc: &AttentionDesc) -> [(&'static str, *const i32, i64); 10] {
        let a = &self.args;
        let batch = i64::from(a.batch);
        let when = |used: bool, elements: i64| if used { elements } else { 0 };
        let table = desc.kv_layout == KvLayout::BlockTable;
        let csr = desc.kv_layout == KvLayout::CsrPages;
        let positions = desc.needs_positions() || desc.checked;
        // Of the last row only its beginning is known to exist.
        let rows = self.kv_position_stride(desc).saturating_mul((batch - 1).max(0)).saturating_add(1);
        [
            ("query_start", a.query_start, batch + 1),
            ("kv_length", a.kv_length, batch),
            ("global_length", a.global_length, when(positions, batch)),
            ("kv_start", a.kv_start, when(positions && desc.placement == Placement::Contiguous, batch)),
            ("kv_position", a.kv_position, when(positions && desc.placement == Placement::Explicit, rows)),
            ("query_position", a.query_position, when(positions, i64::from(a.query_tokens))),
            ("block_table", a.block_table, when(table, batch * i64::from(a.max_pages))),
            ("page_indptr", a.page_indptr, when(csr, batch + 1)),
            ("page_indices", a.page_indices, when(csr, a.num_page_indices)),
            ("last_page_len", a.last_page_len, when(csr, batch)),
        ]
    }
}

/// Refuses two buffers that share bytes.
pub(crate) fn disjoint(a_name: &str, a: &Tensor, b_name: &str, b: &Tensor) -> Result<()> {
    let range = |t: &Tensor| (t.data as u64, (t.data as u64).saturating_add(t.bytes));
    let ((a0, a1), (b0, b1)) = (range(a), range(b));
    let empty = a.data.is_null() || b.data.is_null() || a.bytes == 0 || b.bytes == 0;
    if empty || a1 <= b0 || b1 <= a0 {
        return Ok(());
    }
    let found = format!("bytes {a0:#x} to {a1:#x}, which overlap {b_name} at {b0:#x} to {b1:#x}");
    Err(Error::invalid(a_name, found, format!("a buffer that shares no byte with {b_name}")))
}

/// Refuses an output in which two elements would share an address.
pub(crate) fn no_broadcast(name: &str, stride: &[i64; 4], shape: &[i64]) -> Result<()> {
    for (dim, &n) in shape.iter().enumerate() {
        if n > 1 && stride[dim] == 0 {
            return Err(Error::invalid(format_args!("{name}.stride[{dim}]"), 0, "a positive stride in an output"));
        }
    }
    Ok(())
}

/// Strides of a strided cache, and how many tokens a sequence its bytes have room for.
fn strided(name: &str, tensor: &Tensor, dtype: Dtype, shape: [i64; 4]) -> Result<([i64; 4], i64)> {
    if shape[0] == 0 || tensor.bytes == 0 {
        // An empty shard needs no cache; any length above 0 is then bad data.
        return Ok((tensor.stride, 0));
    }
    let one = tensor.resolve(name, dtype, &[shape[0], 1, shape[2], shape[3]]);
    let packed = tensor.stride.iter().all(|&s| s == 0);
    if packed {
        // Packed over the plan's longest sequence; the batch may still be cut short by `bytes`.
        let stride = KvFormat::of(dtype).packed_strides(name, &shape)?;
        let resolved = Tensor { stride, ..*tensor }.resolve(name, dtype, &[shape[0], 1, shape[2], shape[3]])?;
        return Ok((resolved, room(tensor.bytes, dtype, &resolved, &shape)));
    }
    let stride = one?;
    Ok((stride, room(tensor.bytes, dtype, &stride, &shape)))
}

/// Tokens of the last sequence that fit `bytes`.
fn room(bytes: u64, dtype: Dtype, stride: &[i64; 4], shape: &[i64; 4]) -> i64 {
    if stride[1] == 0 {
        return i64::MAX;
    }
    let format = KvFormat::of(dtype);
    let counts = format.block_shape(shape);
    let fixed = format.block_bytes() as i128
        + [0, 2, 3].iter().map(|&d| i128::from(stride[d]) * i128::from(counts[d] - 1)).sum::<i128>();
    let left = i128::from(bytes) - fixed;
    if left < 0 { 0 } else { i64::try_from(left / i128::from(stride[1]) + 1).unwrap_or(i64::MAX) }
}

fn bounded(name: &str, value: i32, low: i32, high: i32, limit: &str) -> Result<()> {
    if value < low || value > high {
        Err(Error::invalid(name, value, format!("{low} to the plan's {limit} = {high}")))
    } else {
        Ok(())
    }
}

fn at_least(name: &str, value: i64, low: i64) -> Result<()> {
    if value < low { Err(Error::invalid(name, value, format!("at least {low}"))) } else { Ok(()) }
}

fn required(name: &str, pointer: *const i32, needed: bool) -> Result<()> {
    if needed && pointer.is_null() {
        return Err(Error::invalid(name, "NULL", "a pointer to int32"));
    }
    aligned(name, pointer)
}

fn aligned(name: &str, pointer: *const i32) -> Result<()> {
    if pointer.is_aligned() {
        Ok(())
    } else {
        Err(Error::invalid(name, format_args!("{pointer:p}"), "a pointer aligned to 4 bytes"))
    }
}
