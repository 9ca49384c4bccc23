//! What changes from step to step: the arguments of a decode, checked as far as the host can see.

use std::cmp::Reverse;
use std::ffi::c_void;

use super::decode_args::DecodeArgs;
use super::descriptor::{AttentionDesc, KvLayout};
use super::dtype::Dtype;
use super::head_values::HeadValues;
use super::mask::Mask;
use super::placement::{Placement, Shard};
use super::scales;
use super::strided_cache::{self, StridedCache};
use super::tensor::Tensor;
use super::unused_args;
use crate::error::{Error, Result};
use crate::partial::rows::RowTarget;

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
    /// Byte strides of the scales of k: sequence or page, token or slot, kv head.
    pub k_scale_stride: [i64; 4],
    /// Byte strides of the scales of v, as those of k.
    pub v_scale_stride: [i64; 4],
    /// Byte strides of out: token, head, dim.
    pub out_stride: [i64; 4],
    /// Byte strides of lse: token, head.
    pub lse_stride: [i64; 4],
    /// Most tokens of a sequence that the plan allows and that k and v have room for: strided ones in the last sequence,
    /// [`Step::room`] tells of the others; pages, in all.
    pub kv_capacity: i64,
    /// Where the energy is evaluated, see [`Step::at_zeta`]; `data` null: at 0, which is plain attention.
    pub zeta: Tensor,
    /// Byte strides of zeta: token, head, dim.
    pub zeta_stride: [i64; 4],
    /// The sinks, where the shape has them.
    pub sinks: HeadValues,
    /// The slopes of ALiBi, where the shape has them.
    pub slopes: HeadValues,
    /// The mask, where the shape has one.
    pub mask: Option<Mask>,
    /// What the values of an additive mask are multiplied by; none: 1.
    pub mask_factor: HeadValues,
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
            ..RowTarget::NONE
        }
    }

    /// The same step with the queries of all heads, which lie at `data` without gaps.
    pub(crate) fn with_queries(&self, desc: &AttentionDesc, data: *mut c_void) -> Step {
        let size = desc.q_dtype.size() as i64;
        let (row, heads) = (i64::from(desc.head_dim_qk) * size, i64::from(desc.q_heads));
        let q_stride = [heads * row, row, size, 0];
        let bytes = heads as u64 * row as u64 * u64::from(self.args.query_tokens.unsigned_abs());
        let args = DecodeArgs { q: Tensor { data, bytes, stride: q_stride }, ..self.args };
        Step { args, q_stride, ..*self }
    }

    /// Checks everything that the host can see of `args`. `out_heads` is how many heads out and lse hold.
    pub fn new(desc: &AttentionDesc, shard: Shard, args: &DecodeArgs, out_heads: i32) -> Result<Step> {
        bounded("batch", args.batch, 0, desc.max_batch, "max_batch")?;
        bounded("query_tokens", args.query_tokens, 0, desc.max_query_tokens, "max_query_tokens")?;
        unused_args::check(desc, args)?;
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
        let query_heads = desc.query_heads(shard)?.len() as i64;
        let q_stride = args.q.resolve("q", desc.q_dtype, &[tokens, query_heads, dim_qk])?;
        let out_heads = i64::from(out_heads);
        let out_stride = args.out.resolve("out", desc.out_dtype, &[tokens, out_heads, dim_v])?;
        no_overlap("out", desc.out_dtype.size(), &out_stride, &[tokens, out_heads, dim_v])?;
        let lse_stride = if args.lse.data.is_null() {
            [0; 4]
        } else {
            let stride = args.lse.resolve("lse", Dtype::F32, &[tokens, out_heads])?;
            no_overlap("lse", Dtype::F32.size(), &stride, &[tokens, out_heads])?;
            stride
        };

        let per_head = |name, tensor, used| {
            if used { HeadValues::resolve(name, tensor, q_heads) } else { Ok(HeadValues::NONE) }
        };
        let sinks = per_head("sinks", &args.sinks, desc.sinks)?;
        let slopes = per_head("alibi_slopes", &args.alibi_slopes, desc.alibi)?;
        let mask = Mask::resolve(desc, args)?;
        let mask_factor = per_head("mask_factor", &args.mask_factor, !args.mask_factor.data.is_null())?;

        let max_kv_length = i64::from(desc.max_kv_length);
        let (k_stride, v_stride, kv_capacity) = match desc.kv_layout {
            KvLayout::Strided => {
                let cache =
                    StridedCache { batch, max_batch: desc.max_batch, max_kv_length, capacity: args.kv_capacity };
                let k_stride = cache.strides("k", &args.k, desc.k_dtype, [kv_heads, dim_qk])?;
                let v_stride = cache.strides("v", &args.v, desc.v_dtype, [kv_heads, dim_v])?;
                // Of the last sequence, which has room for the fewest.
                (k_stride, v_stride, 0)
            }
            KvLayout::BlockTable | KvLayout::CsrPages => {
                at_least("num_pages", i64::from(args.num_pages), 0)?;
                let (pages, page) = (i64::from(args.num_pages), i64::from(desc.page_size));
                let k_stride = args.k.resolve("k", desc.k_dtype, &[pages, page, kv_heads, dim_qk])?;
                let v_stride = args.v.resolve("v", desc.v_dtype, &[pages, page, kv_heads, dim_v])?;
                strided_cache::no_broadcast_rows("k", desc.k_dtype, &k_stride, dim_qk)?;
                strided_cache::no_broadcast_rows("v", desc.v_dtype, &v_stride, dim_v)?;
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
                (k_stride, v_stride, max_kv_length.min(room))
            }
        };

        let [k_scale_stride, v_scale_stride] = scale_strides(desc, args)?;

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
            let why = match desc {
                AttentionDesc { causal: true, .. } => "causal = 1",
                AttentionDesc { checked: true, .. } => "the plan is CHECKED",
                AttentionDesc { window: 1.., .. } => "window is not 0",
                _ => "alibi = 1",
            };
            let needed = args.query_position.is_null() || desc.checked;
            let and = if desc.checked { "" } else { " and query_position is NULL" };
            because("global_length", args.global_length, needed, why, and)?;
            match desc.placement {
                Placement::Contiguous => {
                    because("kv_start", args.kv_start, shard.world > 1, why, " and there are several ranks")?
                }
                Placement::Explicit => because("kv_position", args.kv_position, true, why, "")?,
                Placement::Interleaved { .. } => {}
            }
        }
        aligned("global_length", args.global_length)?;
        aligned("kv_start", args.kv_start)?;
        aligned("kv_position", args.kv_position)?;
        at_least("kv_position_stride", args.kv_position_stride, 0)?;
        let mut step = Step {
            args: *args,
            q_stride,
            k_stride,
            v_stride,
            k_scale_stride,
            v_scale_stride,
            out_stride,
            lse_stride,
            kv_capacity,
            zeta: Tensor::NULL,
            zeta_stride: [0; 4],
            sinks,
            slopes,
            mask,
            mask_factor,
        };
        if desc.kv_layout == KvLayout::Strided && batch > 0 {
            step.kv_capacity = step.room(desc, batch - 1);
        }
        step.check_aliasing(desc)?;
        Ok(step)
    }

    /// Whether keys (0) and values (1) have scales.
    pub fn scaled(&self) -> [bool; 2] {
        [!self.args.k_scale.data.is_null(), !self.args.v_scale.data.is_null()]
    }

    /// Elements between the rows of `kv_position`.
    pub fn kv_position_stride(&self, desc: &AttentionDesc) -> i64 {
        if self.args.kv_position_stride == 0 { i64::from(desc.max_kv_length) } else { self.args.kv_position_stride }
    }

    /// Where the row of positions of sequence `b` and kv head `head` begins in `kv_position`.
    pub fn kv_position_row(&self, desc: &AttentionDesc, b: i64, head: i64) -> i64 {
        b * self.kv_position_stride(desc) + head * self.args.kv_position_head_stride
    }

    /// Whether kv heads have lists of pages, or positions, of their own.
    pub fn lists_by_head(&self) -> bool {
        self.args.page_index_head_stride != 0 || self.args.kv_position_head_stride != 0
    }

    /// Entries of `page_indices` that the lists of the first kv head may reach.
    pub fn page_index_room(&self, desc: &AttentionDesc) -> i64 {
        let others = self.args.page_index_head_stride.saturating_mul(i64::from(desc.kv_heads) - 1);
        self.args.num_page_indices.saturating_sub(others)
    }

    /// Refuses outputs that overlap inputs or each other.
    fn check_aliasing(&self, desc: &AttentionDesc) -> Result<()> {
        let a = &self.args;
        for (out_name, out) in [("out", &a.out), ("lse", &a.lse)] {
            for (in_name, input) in [
                ("q", &a.q),
                ("k", &a.k),
                ("v", &a.v),
                ("k_scale", &a.k_scale),
                ("v_scale", &a.v_scale),
                ("sinks", &a.sinks),
                ("alibi_slopes", &a.alibi_slopes),
                ("mask", &a.mask),
                ("mask_factor", &a.mask_factor),
            ] {
                disjoint(out_name, out, in_name, input)?;
            }
            for (in_name, data, elements) in self.arrays(desc) {
                let bytes = u64::try_from(elements).unwrap_or(0).saturating_mul(size_of::<i32>() as u64);
                if !data.is_null() && (data as u64).checked_add(bytes).is_none() {
                    let (name, found) = match in_name {
                        "kv_position" => ("kv_position_stride", self.kv_position_stride(desc)),
                        _ => ("num_page_indices", a.num_page_indices),
                    };
                    let wanted = format!("an array {in_name} that ends below 2^64");
                    return Err(Error::invalid(name, found, wanted));
                }
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
        let heads = a.kv_position_head_stride.saturating_mul(i64::from(desc.kv_heads) - 1);
        let rows =
            self.kv_position_stride(desc).saturating_mul((batch - 1).max(0)).saturating_add(heads).saturating_add(1);
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

/// Refuses an output in which two elements of `size` bytes would share one: sorted by stride, each dimension steps over all
/// of those inside it.
pub(crate) fn no_overlap(name: &str, size: usize, stride: &[i64; 4], dims: &[i64]) -> Result<()> {
    if dims.contains(&0) {
        return Ok(());
    }
    let mut order = [0, 1, 2, 3];
    let order = &mut order[..dims.len()];
    order.sort_unstable_by_key(|&dim| (stride[dim], Reverse(dim)));
    let mut span = size as i128;
    for &dim in order.iter().filter(|&&dim| dims[dim] > 1) {
        if i128::from(stride[dim]) < span {
            let wanted =
                format!("at least {span} in an output of dimensions {dims:?}, so that no two elements overlap");
            return Err(Error::invalid(format_args!("{name}.stride[{dim}]"), stride[dim], wanted));
        }
        span += i128::from(stride[dim]) * i128::from(dims[dim] - 1);
    }
    Ok(())
}

/// The strides of the scales of k and v.
fn scale_strides(desc: &AttentionDesc, args: &DecodeArgs) -> Result<[[i64; 4]; 2]> {
    let (outer, inner) = match desc.kv_layout {
        // The last sequence may be empty, and then needs none.
        KvLayout::Strided => (i64::from(args.batch).min(1), 1),
        KvLayout::BlockTable | KvLayout::CsrPages => (i64::from(args.num_pages), i64::from(desc.page_size)),
    };
    let dims = [outer, inner, i64::from(desc.kv_heads)];
    let of = |name: &str, scales: &Tensor, cache: &Tensor, field: &str, dtype: Dtype| {
        let needed = dtype == Dtype::Int8 && cache.bytes > 0 && args.batch > 0;
        let stride = scales::strides(name, scales, dims, needed.then(|| format!("{field} is {}", dtype.name())))?;
        if desc.kv_layout == KvLayout::Strided {
            strided_cache::all_begin_in_range(name, &stride, i64::from(args.batch))?;
        }
        Ok(stride)
    };
    Ok([
        of("k_scale", &args.k_scale, &args.k, "k_dtype", desc.k_dtype)?,
        of("v_scale", &args.v_scale, &args.v, "v_dtype", desc.v_dtype)?,
    ])
}

fn bounded(name: &str, value: i32, low: i32, high: i32, field: &str) -> Result<()> {
    if value < low || value > high {
        Err(Error::invalid(name, value, format!("{low} to the plan's {field} = {high}")))
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

/// As `required`, and says why it is.
fn because(name: &str, pointer: *const i32, needed: bool, why: &str, and: &str) -> Result<()> {
    if needed && pointer.is_null() {
        return Err(Error::invalid(name, "NULL", format_args!("a pointer to int32, because {why}{and}")));
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
