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
        }
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
        let q_stride = args.q.resolve("q", desc.q_dtype, &[tokens, q_heads, dim_qk])?;
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

        let limit = i64::from(desc.max_kv_length);
        let (k_stride, v_stride, kv_capacity) = match desc.kv_layout {
            KvLayout::Strided => {
                let cache = StridedCache { batch, max_batch: desc.max_batch, limit, capacity: args.kv_capacity };
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
                (k_stride, v_stride, limit.min(room))
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

    /// Most tokens of sequence `b` that the plan allows, and k and v have room for.
    pub fn room(&self, desc: &AttentionDesc, b: i64) -> i64 {
        if desc.kv_layout != KvLayout::Strided {
            return self.kv_capacity;
        }
        let heads = i64::from(desc.kv_heads);
        let k =
            strided_cache::room(&self.args.k, desc.k_dtype, &self.k_stride, [heads, i64::from(desc.head_dim_qk)], b);
        let v = strided_cache::room(&self.args.v, desc.v_dtype, &self.v_stride, [heads, i64::from(desc.head_dim_v)], b);
        let scales = self.scales().map(|(_, tensor, stride)| match tensor.data.is_null() {
            true => i64::MAX,
            false => strided_cache::room(tensor, Dtype::F32, &stride, [heads, 1], b),
        });
        i64::from(desc.max_kv_length).min(k).min(v).min(scales[0]).min(scales[1])
    }

    /// The largest `b * stride[0] + i * stride[1]` of a token i of sequence b that a strided k has room for, and the same of v and
    /// of their scales; below 0 where there is none.
    pub(crate) fn token_ends(&self, desc: &AttentionDesc) -> [i64; 4] {
        let [(_, k_scale, k_scale_stride), (_, v_scale, v_scale_stride)] = self.scales();
        [
            (&self.args.k, desc.k_dtype, self.k_stride, desc.head_dim_qk),
            (&self.args.v, desc.v_dtype, self.v_stride, desc.head_dim_v),
            (k_scale, Dtype::F32, k_scale_stride, 1),
            (v_scale, Dtype::F32, v_scale_stride, 1),
        ]
        .map(|(tensor, dtype, stride, dim)| {
            strided_cache::token_end(tensor, dtype, &stride, [i64::from(desc.kv_heads), i64::from(dim)])
        })
    }

    /// Whether keys (0) and values (1) have scales.
    pub fn scaled(&self) -> [bool; 2] {
        [!self.args.k_scale.data.is_null(), !self.args.v_scale.data.is_null()]
    }

    /// The scales of k and v with their names and strides.
    fn scales(&self) -> [(&'static str, &Tensor, [i64; 4]); 2] {
        let a = &self.args;
        [("k_scale", &a.k_scale, self.k_scale_stride), ("v_scale", &a.v_scale, self.v_scale_stride)]
    }

    /// What [`Step::room`] lacks for `keys` keys, at most the plan's longest, of sequence `b`: named for what was given.
    /// `what` names the length.
    pub(super) fn check_room(&self, desc: &AttentionDesc, b: i64, keys: i64, what: impl Fn() -> String) -> Result<()> {
        if keys <= self.room(desc, b) {
            return Ok(());
        }
        let a = &self.args;
        if desc.kv_layout != KvLayout::Strided {
            // Where there is a table, or are lists, they and the length are data against each other.
            let none = desc.kv_layout == KvLayout::BlockTable && a.max_pages == 0;
            let wanted = || format!("at least 1 for {}", what());
            return if none { Err(Error::invalid("max_pages", 0, wanted())) } else { Ok(()) };
        }
        let [(k_name, k_scale, k_scale_stride), (v_name, v_scale, v_scale_stride)] = self.scales();
        for (name, tensor, dtype, stride, dim) in [
            ("k", &a.k, desc.k_dtype, &self.k_stride, desc.head_dim_qk),
            ("v", &a.v, desc.v_dtype, &self.v_stride, desc.head_dim_v),
            (k_name, k_scale, Dtype::F32, &k_scale_stride, 1),
            (v_name, v_scale, Dtype::F32, &v_scale_stride, 1),
        ] {
            if tensor.data.is_null() && name.ends_with("_scale") {
                continue;
            }
            let inner = [i64::from(desc.kv_heads), i64::from(dim)];
            if keys <= strided_cache::room(tensor, dtype, stride, inner, b) {
                continue;
            }
            if tensor.bytes == 0 {
                return Err(Error::invalid(format_args!("{name}.bytes"), 0, format_args!("room for {}", what())));
            }
            let end = strided_cache::end_of(dtype, stride, inner, b, keys - 1);
            if i128::from(tensor.bytes) >= end {
                let room = stride[0] / stride[1].max(1);
                let wanted = format!("at least {}: a packed {name} has room for {room} tokens a sequence", what());
                return Err(Error::invalid("kv_capacity", a.kv_capacity, wanted));
            }
            let wanted = format!("at least {end} for {} with byte strides {stride:?}", what());
            return Err(Error::invalid(format_args!("{name}.bytes"), tensor.bytes, wanted));
        }
        Ok(())
    }

    /// What the mask lacks, if the step has one, for `keys` keys and `queries` query tokens of sequence `b`. `what` names the
    /// length.
    pub(super) fn check_mask(&self, b: i64, queries: i64, keys: i64, what: impl Fn() -> String) -> Result<()> {
        let Some(mask) = self.mask.filter(|mask| queries > 0 && keys > mask.room(b, queries)) else { return Ok(()) };
        if self.args.mask.data.is_null() {
            let wanted = format!("a pointer, for {} and {queries} query tokens of a plan with a mask", what());
            return Err(Error::invalid("mask.data", "NULL", wanted));
        }
        let wanted = format!(
            "at least {} for {} and {queries} query tokens with byte strides {:?}",
            mask.end_of(b, queries, keys),
            what(),
            self.args.mask.stride
        );
        Err(Error::invalid("mask.bytes", self.args.mask.bytes, wanted))
    }

    /// Settles where the sequences of a packed k and v begin whose `kv_capacity` is not given, and whose bytes told it only if
    /// they end where the last sequence does. `longest` and `last`: the length of the longest sequence and of the last; none
    /// where they cannot be read.
    pub(super) fn settle_packed(&mut self, desc: &AttentionDesc, lengths: Option<(i64, i64)>) -> Result<()> {
        let (batch, limit) = (i64::from(self.args.batch), i64::from(desc.max_kv_length));
        if desc.kv_layout != KvLayout::Strided || batch < 2 || self.args.kv_capacity > 0 {
            return Ok(());
        }
        for (name, tensor, stride) in [("k", &self.args.k, &mut self.k_stride), ("v", &self.args.v, &mut self.v_stride)]
        {
            if tensor.stride != [0; 4] || tensor.bytes == 0 {
                continue;
            }
            let (token, bytes) = (i128::from(stride[1]), i128::from(tensor.bytes));
            let all = token * i128::from(limit);
            let early =
                lengths.is_some_and(|(_, last)| bytes == all * i128::from(batch - 1) + token * i128::from(last));
            let exact = bytes == i128::from(stride[0]) * i128::from(batch)
                || strided_cache::is_of_plan(tensor.bytes, stride[1], desc.max_batch, limit);
            match (exact, early) {
                // Both: only where a sequence is too long for the one is it the other.
                (true, true) if i128::from(stride[0]) < all => {
                    if lengths.is_none_or(|(longest, _)| i128::from(longest) * token <= i128::from(stride[0])) {
                        return Err(strided_cache::untold(name, tensor.bytes, batch, limit, stride[1]));
                    }
                    stride[0] = stride[1] * limit;
                }
                (false, false) => return Err(strided_cache::untold(name, tensor.bytes, batch, limit, stride[1])),
                _ => {}
            }
        }
        self.kv_capacity = self.room(desc, batch - 1);
        Ok(())
    }

    /// Where lengths cannot be read before the step runs: a strided k and v have room for a token of each sequence, if they
    /// are there at all.
    pub fn check_unseen_lengths(&mut self, desc: &AttentionDesc) -> Result<()> {
        self.settle_packed(desc, None)?;
        let (a, last) = (&self.args, i64::from(self.args.batch) - 1);
        if desc.kv_layout != KvLayout::Strided || last < 0 || a.k.bytes == 0 || a.v.bytes == 0 {
            return Ok(());
        }
        self.check_room(desc, last, 1, || format!("a token of each of {} sequences", a.batch))
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
                let bytes = u64::try_from(elements).unwrap_or(0).saturating_mul(4);
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
pub(crate) fn no_overlap(name: &str, size: usize, stride: &[i64; 4], shape: &[i64]) -> Result<()> {
    if shape.contains(&0) {
        return Ok(());
    }
    let mut order = [0, 1, 2, 3];
    let order = &mut order[..shape.len()];
    order.sort_unstable_by_key(|&dim| (stride[dim], Reverse(dim)));
    let mut span = size as i128;
    for &dim in order.iter().filter(|&&dim| shape[dim] > 1) {
        if i128::from(stride[dim]) < span {
            let wanted = format!("at least {span} in an output of shape {shape:?}, so that no two elements overlap");
            return Err(Error::invalid(format_args!("{name}.stride[{dim}]"), stride[dim], wanted));
        }
        span += i128::from(stride[dim]) * i128::from(shape[dim] - 1);
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
    let shape = [outer, inner, i64::from(desc.kv_heads)];
    let of = |name: &str, scales: &Tensor, cache: &Tensor, field: &str, dtype: Dtype| {
        let needed = dtype == Dtype::Int8 && cache.bytes > 0 && args.batch > 0;
        scales::strides(name, scales, shape, needed.then(|| format!("{field} is {}", dtype.name())))
    };
    Ok([
        of("k_scale", &args.k_scale, &args.k, "k_dtype", desc.k_dtype)?,
        of("v_scale", &args.v_scale, &args.v, "v_dtype", desc.v_dtype)?,
    ])
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
