//! Merging partials that the engine made: what is asked, checked as far as the host can see.

use super::descriptor::{AttentionDesc, MAX_HEAD_DIM};
use super::dtype::Dtype;
use super::step::{disjoint, no_overlap};
use super::tensor::Tensor;
use crate::error::{Error, Result};
use crate::partial::Lse;
use crate::partial::rows::{NAN_IS_EMPTY, PLUS_INF_IS_EMPTY, RowSource, RowTarget};

/// Partials to merge and where the result goes.
///
/// In [`merge_partials`](crate::runtime::merge_partials) o is [partial, token, head, dim] and lse [partial, token, head];
/// in [`Plan::merge`](crate::runtime::Plan::merge) each rank passes its own partial, o [token, head, dim] and lse
/// [token, head].
#[derive(Clone, Copy, Debug)]
pub struct MergeArgs {
    /// Query tokens.
    pub query_tokens: i32,
    /// Heads of the partials; 0: the plan's `q_heads`.
    pub heads: i32,
    /// Elements of a row; 0: the plan's `head_dim_v`.
    pub head_dim: i32,
    /// Outputs, normalised but where there is a `sum`. A row that is empty is never read.
    pub o: Tensor,
    /// Element type of `o`.
    pub o_dtype: Dtype,
    /// Log-sum-exps, f32; with a `sum` the largest scores, or whatever was subtracted from all.
    pub lse: Tensor,
    /// Base of the incoming lse: 0 for e, or 2.
    pub lse_base: i32,
    /// Whether an lse of +inf means empty, too.
    pub plus_inf_is_empty: bool,
    /// Whether an lse that is NaN means empty, too.
    pub nan_is_empty: bool,
    /// Sums of exp(score - `lse`), f32 as `lse`, by which o is still to be divided; `data` null: o is normalised.
    pub sum: Tensor,
    /// Sequences that `query_start` and `kv_length` tell of.
    pub batch: i32,
    /// `i32 [batch + 1]`: the first token of each sequence, ascending; tokens from the last entry on are padding. Null: each has
    /// as many.
    pub query_start: *const i32,
    /// `i32 [batch]`: rows of sequences with 0 or less are empty. Null: none is known to be.
    pub kv_length: *const i32,
    /// Merged output [token, head, dim]; with a scattered plan the rank's own heads.
    pub out: Tensor,
    /// Element type of `out`; None: the plan's `out_dtype`, or that of `o`.
    pub out_dtype: Option<Dtype>,
    /// Merged lse [token, head], f32; `data` null: not wanted.
    pub out_lse: Tensor,
    /// Base of the merged lse: 0 for e, or 2.
    pub out_lse_base: i32,
}

// SAFETY: addresses and numbers. Nothing here reads through the addresses; the unsafe code that does says who keeps the memory
// alive.
unsafe impl Send for MergeArgs {}
// SAFETY: as for Send: sharing them shares numbers.
unsafe impl Sync for MergeArgs {}

impl Default for MergeArgs {
    /// No tokens of f32, by the conventions of this library.
    fn default() -> MergeArgs {
        MergeArgs {
            query_tokens: 0,
            heads: 0,
            head_dim: 0,
            o: Tensor::NULL,
            o_dtype: Dtype::F32,
            lse: Tensor::NULL,
            lse_base: 0,
            plus_inf_is_empty: false,
            nan_is_empty: false,
            sum: Tensor::NULL,
            batch: 0,
            query_start: std::ptr::null(),
            kv_length: std::ptr::null(),
            out: Tensor::NULL,
            out_dtype: None,
            out_lse: Tensor::NULL,
            out_lse_base: 0,
        }
    }
}

/// Checked merge arguments: partials in memory and where their merge goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MergeStep {
    /// Partials; 1 where every rank of a plan gives one.
    pub count: i32,
    /// Query tokens.
    pub tokens: i32,
    /// Heads of the partials. The target may hold fewer: a rank's own.
    pub heads: i32,
    /// The first partial.
    pub source: RowSource,
    /// Bytes from a partial's o, from its lse and from its sum to the next one's.
    pub step: [i64; 3],
    /// The merged output.
    pub target: RowTarget,
}

impl MergeStep {
    /// Checks `count` partials that are merged in one place.
    pub fn of_partials(args: &MergeArgs, count: usize) -> Result<MergeStep> {
        if args.heads < 1 {
            return Err(Error::invalid("heads", args.heads, "at least 1"));
        }
        if !(1..=MAX_HEAD_DIM).contains(&args.head_dim) {
            return Err(Error::invalid("head_dim", args.head_dim, format!("1 to {MAX_HEAD_DIM}")));
        }
        if count == 0 || count > i32::MAX as usize {
            return Err(Error::invalid("n", count, format!("1 to {}", i32::MAX)));
        }
        at_least_no_tokens(args)?;
        let dims = [count as i64, i64::from(args.query_tokens), i64::from(args.heads), i64::from(args.head_dim)];
        let o_stride = args.o.resolve("o", float("o_dtype", args.o_dtype)?, &dims)?;
        let lse_stride = args.lse.resolve("lse", Dtype::F32, &dims[..3])?;
        let sum_stride = sum_strides(args, &dims[..3])?;
        let out_dtype = args.out_dtype.unwrap_or(args.o_dtype);
        let strides = [o_stride, lse_stride, sum_stride];
        let step = MergeStep::resolved(args, args.heads, args.head_dim, strides, out_dtype)?;
        Ok(MergeStep { count: count as i32, ..step })
    }

    /// Checks `query_start`, if there is one.
    ///
    /// # Safety
    /// It is in host memory, of batch + 1 entries, and written by nobody meanwhile.
    pub unsafe fn check_starts(&self) -> Result<()> {
        if self.source.query_start == 0 {
            return Ok(());
        }
        let mut least = 0;
        for i in 0..=self.source.batch as usize {
            // SAFETY: an entry of the array, which is aligned (`tokens_each`) and as this function was promised.
            let start = unsafe { (self.source.query_start as *const i32).add(i).read() };
            let most = if i == 0 { 0 } else { self.tokens };
            if start < least || start > most {
                let wanted = format!("{least} to {most}: it ascends from 0 to at most query_tokens = {}", self.tokens);
                return Err(Error::invalid(format_args!("query_start[{i}]"), start, wanted));
            }
            least = start;
        }
        Ok(())
    }

    /// Checks one rank's partial for a plan of `desc`; its output holds `out_heads` heads.
    pub fn for_plan(args: &MergeArgs, desc: &AttentionDesc, out_heads: usize) -> Result<MergeStep> {
        if args.query_tokens > desc.max_query_tokens {
            let wanted = format!("0 to the plan's max_query_tokens = {}", desc.max_query_tokens);
            return Err(Error::invalid("query_tokens", args.query_tokens, wanted));
        }
        for (name, found, wanted) in [("heads", args.heads, desc.q_heads), ("head_dim", args.head_dim, desc.head_dim_v)]
        {
            if found != 0 && found != wanted {
                return Err(Error::invalid(name, found, format!("0, or the plan's {wanted}")));
            }
        }
        at_least_no_tokens(args)?;
        let dims = [i64::from(args.query_tokens), i64::from(desc.q_heads), i64::from(desc.head_dim_v)];
        // The one partial has no dimension of its own: its strides come behind a zero.
        let behind_zero = |s: [i64; 4]| [0, s[0], s[1], s[2]];
        let o_stride = behind_zero(args.o.resolve("o", float("o_dtype", args.o_dtype)?, &dims)?);
        let lse_stride = behind_zero(args.lse.resolve("lse", Dtype::F32, &dims[..2])?);
        let sum_stride = behind_zero(sum_strides(args, &dims[..2])?);
        if let Some(found) = args.out_dtype.filter(|&dtype| dtype != desc.out_dtype) {
            return Err(Error::invalid("out_dtype", found.name(), format!("the plan's {}", desc.out_dtype.name())));
        }
        let out_heads = out_heads as i32;
        let strides = [o_stride, lse_stride, sum_stride];
        let step = MergeStep::resolved(args, out_heads, desc.head_dim_v, strides, desc.out_dtype)?;
        Ok(MergeStep { heads: desc.q_heads, ..step })
    }

    /// One partial of resolved strides of o, lse and sum, the partial's first, for an output of `heads` heads.
    fn resolved(
        args: &MergeArgs,
        heads: i32,
        dim: i32,
        [o_stride, lse_stride, sum_stride]: [[i64; 4]; 3],
        out_dtype: Dtype,
    ) -> Result<MergeStep> {
        let to_natural = if is_base_two("lse_base", args.lse_base)? { std::f32::consts::LN_2 } else { 1.0 };
        let from_natural = if is_base_two("out_lse_base", args.out_lse_base)? { std::f32::consts::LOG2_E } else { 1.0 };
        let tokens_each = tokens_each(args)?;
        let dims = [i64::from(args.query_tokens), i64::from(heads), i64::from(dim)];
        let out_stride = args.out.resolve("out", float("out_dtype", out_dtype)?, &dims)?;
        no_overlap("out", out_dtype.size(), &out_stride, &dims)?;
        let out_lse_stride = if args.out_lse.data.is_null() {
            [0; 4]
        } else {
            let stride = args.out_lse.resolve("out_lse", Dtype::F32, &dims[..2])?;
            no_overlap("out_lse", Dtype::F32.size(), &stride, &dims[..2])?;
            stride
        };
        for (out_name, out) in [("out", &args.out), ("out_lse", &args.out_lse)] {
            disjoint(out_name, out, "o", &args.o)?;
            disjoint(out_name, out, "lse", &args.lse)?;
            disjoint(out_name, out, "sum", &args.sum)?;
        }
        disjoint("out", &args.out, "out_lse", &args.out_lse)?;
        Ok(MergeStep {
            count: 1,
            tokens: args.query_tokens,
            heads,
            source: RowSource {
                o: args.o.data as u64,
                lse: args.lse.data as u64,
                o_stride: [o_stride[1], o_stride[2], o_stride[3]],
                lse_stride: [lse_stride[1], lse_stride[2]],
                dtype: args.o_dtype,
                dim,
                to_natural,
                empties: if args.plus_inf_is_empty { PLUS_INF_IS_EMPTY } else { 0 }
                    | if args.nan_is_empty { NAN_IS_EMPTY } else { 0 },
                sum: args.sum.data as u64,
                sum_stride: [sum_stride[1], sum_stride[2]],
                query_start: args.query_start as u64,
                kv_length: args.kv_length as u64,
                batch: args.batch,
                tokens_each,
            },
            step: [o_stride[0], lse_stride[0], sum_stride[0]],
            target: RowTarget {
                o: args.out.data as u64,
                lse: args.out_lse.data as u64,
                o_stride: [out_stride[0], out_stride[1], out_stride[2]],
                lse_stride: [out_lse_stride[0], out_lse_stride[1]],
                dtype: out_dtype,
                dim,
                from_natural,
                reserved: 0,
            },
        })
    }

    /// Rows of a partial.
    pub fn rows(&self) -> usize {
        self.tokens as usize * self.heads as usize
    }

    /// The natural lse of row `row` (token * heads + head) of partial `partial`.
    ///
    /// # Safety
    /// `partial` and `row` exist, and the step's memory is host memory that stays valid.
    pub unsafe fn lse(&self, partial: usize, row: usize) -> Lse {
        let (token, head) = (row / self.heads as usize, row % self.heads as usize);
        // SAFETY: `resolve` checked extents and alignment for every (partial, token, head); the caller promises that this is
        // one of them and that the memory is valid.
        unsafe { self.source.lse([1, 2].map(|i| partial as i64 * self.step[i]), token, head) }
    }

    /// Converts the same row of o to f32; one whose `lse` says empty is zeros, and is not read.
    ///
    /// # Safety
    /// As [`MergeStep::lse`].
    pub unsafe fn load(&self, partial: usize, row: usize, lse: Lse, to: &mut [f32]) {
        if lse.is_empty() {
            to.fill(0.0);
            return;
        }
        let (token, head) = (row / self.heads as usize, row % self.heads as usize);
        // SAFETY: as in `lse`; `to` is as long as a row.
        unsafe { self.source.load([0, 2].map(|i| partial as i64 * self.step[i]), token, head, to) };
    }
}

fn at_least_no_tokens(args: &MergeArgs) -> Result<()> {
    if args.query_tokens < 0 {
        return Err(Error::invalid("query_tokens", args.query_tokens, "at least 0"));
    }
    Ok(())
}

fn is_base_two(name: &str, base: i32) -> Result<bool> {
    match base {
        0 => Ok(false),
        2 => Ok(true),
        other => Err(Error::invalid(name, other, "0 for e, or 2")),
    }
}

fn sum_strides(args: &MergeArgs, dims: &[i64]) -> Result<[i64; 4]> {
    if args.sum.data.is_null() { Ok([0; 4]) } else { args.sum.resolve("sum", Dtype::F32, dims) }
}

/// Tokens of a sequence, where that is what tells which are of which; else 0.
fn tokens_each(args: &MergeArgs) -> Result<i32> {
    if args.query_start.is_null() && args.kv_length.is_null() {
        let none = args.batch == 0;
        return if none {
            Ok(0)
        } else {
            Err(Error::invalid("batch", args.batch, "0 without query_start and kv_length"))
        };
    }
    for (name, array) in [("query_start", args.query_start), ("kv_length", args.kv_length)] {
        if !array.is_aligned() {
            return Err(Error::invalid(name, format_args!("{array:p}"), "a pointer to int32, a multiple of 4"));
        }
    }
    let wanted = if args.query_start.is_null() { 1 } else { 0 };
    if args.batch < wanted {
        return Err(Error::invalid("batch", args.batch, format!("at least {wanted}")));
    }
    if !args.query_start.is_null() {
        return Ok(0);
    }
    if args.query_tokens % args.batch != 0 {
        let wanted = format!("query_start, or a multiple of batch = {}", args.batch);
        return Err(Error::invalid("query_tokens", args.query_tokens, wanted));
    }
    Ok(args.query_tokens / args.batch)
}

fn float(name: &str, dtype: Dtype) -> Result<Dtype> {
    if dtype.is_float() { Ok(dtype) } else { Err(Error::invalid(name, dtype.name(), "f32, f16 or bf16")) }
}
