//! Merging partials that the engine made: what is asked, checked as far as the host can see.

use super::descriptor::{AttentionDesc, MAX_HEAD_DIM};
use super::dtype::Dtype;
use super::step::{disjoint, no_overlap};
use super::tensor::Tensor;
use crate::error::{Error, Result};
use crate::partial::Lse;
use crate::partial::rows::{RowSource, RowTarget};

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
    /// Normalised outputs. A row whose lse says empty is never read.
    pub o: Tensor,
    /// Element type of `o`.
    pub o_dtype: Dtype,
    /// Log-sum-exps, f32.
    pub lse: Tensor,
    /// Base of the incoming lse: 0 for e, or 2. The outgoing lse is always natural.
    pub lse_base: i32,
    /// Whether an lse of +inf means empty, too.
    pub plus_inf_is_empty: bool,
    /// Merged output [token, head, dim]; with a scattered plan the rank's own heads.
    pub out: Tensor,
    /// Element type of `out`; None: the plan's `out_dtype`, or that of `o`.
    pub out_dtype: Option<Dtype>,
    /// Merged natural lse [token, head], f32; `data` null: not wanted.
    pub out_lse: Tensor,
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
    /// Bytes from a partial's o, and from its lse, to the next one's.
    pub step: [i64; 2],
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
        let out_dtype = args.out_dtype.unwrap_or(args.o_dtype);
        let step = MergeStep::resolved(args, args.heads, args.head_dim, o_stride, lse_stride, out_dtype)?;
        Ok(MergeStep { count: count as i32, ..step })
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
        if let Some(found) = args.out_dtype.filter(|&dtype| dtype != desc.out_dtype) {
            return Err(Error::invalid("out_dtype", found.name(), format!("the plan's {}", desc.out_dtype.name())));
        }
        let out_heads = out_heads as i32;
        let step = MergeStep::resolved(args, out_heads, desc.head_dim_v, o_stride, lse_stride, desc.out_dtype)?;
        Ok(MergeStep { heads: desc.q_heads, ..step })
    }

    /// One partial of resolved strides, the partial's first, for an output of `heads` heads.
    fn resolved(
        args: &MergeArgs,
        heads: i32,
        dim: i32,
        o_stride: [i64; 4],
        lse_stride: [i64; 4],
        out_dtype: Dtype,
    ) -> Result<MergeStep> {
        let to_natural = match args.lse_base {
            0 => 1.0,
            2 => std::f32::consts::LN_2,
            other => return Err(Error::invalid("lse_base", other, "0 for e, or 2")),
        };
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
                plus_inf_is_empty: i32::from(args.plus_inf_is_empty),
            },
            step: [o_stride[0], lse_stride[0]],
            target: RowTarget {
                o: args.out.data as u64,
                lse: args.out_lse.data as u64,
                o_stride: [out_stride[0], out_stride[1], out_stride[2]],
                lse_stride: [out_lse_stride[0], out_lse_stride[1]],
                dtype: out_dtype,
                dim,
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
        unsafe { self.source.lse(partial as i64 * self.step[1], token, head) }
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
        unsafe { self.source.load(partial as i64 * self.step[0], token, head, to) };
    }
}

fn at_least_no_tokens(args: &MergeArgs) -> Result<()> {
    if args.query_tokens < 0 {
        return Err(Error::invalid("query_tokens", args.query_tokens, "at least 0"));
    }
    Ok(())
}

fn float(name: &str, dtype: Dtype) -> Result<Dtype> {
    if dtype.is_float() { Ok(dtype) } else { Err(Error::invalid(name, dtype.name(), "f32, f16 or bf16")) }
}
