//! Merging partials that the engine made: between ranks ([`Plan::merge`](super::Plan::merge)) or in one place.

use half::{bf16, f16};

use super::context::Runtime;
use super::stream::Stream;
use crate::attention::step::{disjoint, no_broadcast};
use crate::attention::{AttentionDesc, Dtype, MAX_HEAD_DIM, Tensor};
use crate::cuda::MergeStep;
use crate::device::{Device, DeviceKind, FloatState};
use crate::error::{Error, Result};
use crate::partial::{RowSource, RowTarget, merge_ranks};

/// How long enqueueing a merge may wait for room on its stream.
const ENQUEUE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// Partials to merge and where the result goes.
///
/// In [`merge_partials`] o is [partial, token, head, dim] and lse [partial, token, head]; in
/// [`Plan::merge`](super::Plan::merge) each rank passes its own partial, o [token, head, dim] and lse [token, head].
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

/// Checked merge arguments with resolved strides. Input strides have the partial first.
#[derive(Clone, Copy)]
pub(super) struct MergeInput {
    pub tokens: usize,
    pub heads: usize,
    pub dim: usize,
    /// The first partial.
    source: RowSource,
    /// Bytes from a partial's o, and from its lse, to the next one's.
    step: [i64; 2],
    pub output: RowTarget,
}

/// Merges `count` partials in order into one, on `device`.
///
/// Enqueues on the stream; with none (CPU) it runs here. A CUDA stream that was made during a capture
/// loads the kernel at its first merge, which is `Capturing` until the capture is over.
///
/// # Safety
/// The buffers that `args` describes stay valid, and unchanged by others, until the merge is done.
pub unsafe fn merge_partials(
    runtime: &Runtime,
    device: Device,
    args: &MergeArgs,
    count: usize,
    stream: Option<&Stream>,
) -> Result<()> {
    if device.kind == DeviceKind::Cuda && stream.is_some() {
        // The stream is of a device that is there.
        runtime.check_open()?;
    } else {
        runtime.check_device(device)?;
    }
    if args.heads < 1 {
        return Err(Error::invalid("heads", args.heads, "at least 1"));
    }
    if !(1..=MAX_HEAD_DIM).contains(&args.head_dim) {
        return Err(Error::invalid("head_dim", args.head_dim, format!("1 to {MAX_HEAD_DIM}")));
    }
    if count == 0 || count > i32::MAX as usize {
        return Err(Error::invalid("n", count, format!("1 to {}", i32::MAX)));
    }
    let shape = [count as i64, i64::from(args.query_tokens), i64::from(args.heads), i64::from(args.head_dim)];
    let o_stride = args.o.resolve("o", float("o_dtype", args.o_dtype)?, &checked(args, shape)?)?;
    let lse_stride = args.lse.resolve("lse", Dtype::F32, &shape[..3])?;
    let out_dtype = args.out_dtype.unwrap_or(args.o_dtype);
    let input = MergeInput::new(args, args.heads as usize, args.head_dim as usize, o_stride, lse_stride, out_dtype)?;
    if device.kind == DeviceKind::Cuda {
        return Stream::merge(stream, device, &input.on_device(count));
    }
    match stream {
        None => run_partials(&input, count),
        Some(stream) => stream.push(move || run_partials(&input, count), ENQUEUE_TIMEOUT),
    }
}

/// Merges partials of one place.
fn run_partials(input: &MergeInput, count: usize) -> Result<()> {
    let _float = FloatState::enter();
    let (mut scratch, mut merged) = ([0.0f32; MAX_HEAD_DIM as usize], [0.0f32; MAX_HEAD_DIM as usize]);
    let (scratch, merged) = (&mut scratch[..input.dim], &mut merged[..input.dim]);
    for row in 0..input.tokens * input.heads {
        // SAFETY: the tensors were resolved for `count` partials of these rows; the caller keeps them valid.
        unsafe {
            let lse = |partial| input.lse(partial, row);
            let o = |partial, scratch: &mut [f32]| {
                input.load(partial, row, 0.0, scratch);
                None
            };
            let merged_lse = merge_ranks(count, lse, o, scratch, merged);
            input.output.write(row / input.heads, row % input.heads, merged, merged_lse);
        }
    }
    Ok(())
}

impl MergeInput {
    /// Checks one rank's partial for a plan; its output holds `out_heads` heads.
    pub fn for_plan(args: &MergeArgs, desc: &AttentionDesc, out_heads: usize) -> Result<MergeInput> {
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
        let shape = [1, i64::from(args.query_tokens), i64::from(desc.q_heads), i64::from(desc.head_dim_v)];
        checked(args, shape)?;
        // The one partial has no dimension of its own: shift the strides behind a zero.
        let shift = |s: [i64; 4]| [0, s[0], s[1], s[2]];
        let o_stride = shift(args.o.resolve("o", float("o_dtype", args.o_dtype)?, &shape[1..])?);
        let lse_stride = shift(args.lse.resolve("lse", Dtype::F32, &shape[1..3])?);
        if let Some(found) = args.out_dtype.filter(|&dtype| dtype != desc.out_dtype) {
            return Err(Error::invalid("out_dtype", found.name(), format!("the plan's {}", desc.out_dtype.name())));
        }
        let mut input =
            MergeInput::new(args, out_heads, desc.head_dim_v as usize, o_stride, lse_stride, desc.out_dtype)?;
        input.heads = desc.q_heads as usize;
        Ok(input)
    }

    fn new(
        args: &MergeArgs,
        out_heads: usize,
        dim: usize,
        o_stride: [i64; 4],
        lse_stride: [i64; 4],
        out_dtype: Dtype,
    ) -> Result<MergeInput> {
        let to_natural = match args.lse_base {
            0 => 1.0,
            2 => std::f32::consts::LN_2,
            other => return Err(Error::invalid("lse_base", other, "0 for e, or 2")),
        };
        let shape = [i64::from(args.query_tokens), out_heads as i64, dim as i64];
        let out_stride = args.out.resolve("out", float("out_dtype", out_dtype)?, &shape)?;
        no_broadcast("out", &out_stride, &shape)?;
        let out_lse_stride = if args.out_lse.data.is_null() {
            [0; 4]
        } else {
            let stride = args.out_lse.resolve("out_lse", Dtype::F32, &shape[..2])?;
            no_broadcast("out_lse", &stride, &shape[..2])?;
            stride
        };
        for (out_name, out) in [("out", &args.out), ("out_lse", &args.out_lse)] {
            disjoint(out_name, out, "o", &args.o)?;
            disjoint(out_name, out, "lse", &args.lse)?;
        }
        disjoint("out", &args.out, "out_lse", &args.out_lse)?;
        Ok(MergeInput {
            tokens: args.query_tokens as usize,
            heads: out_heads,
            dim,
            source: RowSource {
                o: args.o.data as u64,
                lse: args.lse.data as u64,
                o_stride: [o_stride[1], o_stride[2], o_stride[3]],
                lse_stride: [lse_stride[1], lse_stride[2]],
                dtype: args.o_dtype,
                dim: dim as i32,
                to_natural,
                plus_inf_is_empty: i32::from(args.plus_inf_is_empty),
            },
            step: [o_stride[0], lse_stride[0]],
            output: RowTarget {
                o: args.out.data as u64,
                lse: args.out_lse.data as u64,
                o_stride: [out_stride[0], out_stride[1], out_stride[2]],
                lse_stride: [out_lse_stride[0], out_lse_stride[1]],
                dtype: out_dtype,
                dim: dim as i32,
            },
        })
    }

    /// The same for a GPU, over `count` partials.
    pub fn on_device(&self, count: usize) -> MergeStep {
        MergeStep {
            count: count as i32,
            tokens: self.tokens as i32,
            heads: self.heads as i32,
            source: self.source,
            step: self.step,
            target: self.output,
        }
    }

    /// The natural lse of a row.
    ///
    /// # Safety
    /// The tensors are valid for reads of (partial, row).
    pub unsafe fn lse(&self, partial: usize, row: usize) -> f32 {
        let (token, head) = (row / self.heads, row % self.heads);
        let [s_token, s_head] = self.source.lse_stride;
        let offset = partial as i64 * self.step[1] + token as i64 * s_token + head as i64 * s_head;
        // SAFETY: the offset lies inside the extent that `Tensor::resolve` checked for shapes with (partial, row), and the
        // caller keeps the memory valid.
        let lse = unsafe { (self.source.lse as *const u8).offset(offset as isize).cast::<f32>().read() };
        let is_empty = self.source.plus_inf_is_empty != 0 && lse == f32::INFINITY;
        if is_empty { f32::NEG_INFINITY } else { lse * self.source.to_natural }
    }

    /// Converts a row of o; a row whose `lse` says empty is not read.
    ///
    /// # Safety
    /// The tensors are valid for reads of (partial, row).
    pub unsafe fn load(&self, partial: usize, row: usize, lse: f32, to: &mut [f32]) {
        if lse == f32::NEG_INFINITY {
            to.fill(0.0);
            return;
        }
        let (token, head) = (row / self.heads, row % self.heads);
        let [s_token, s_head, s_dim] = self.source.o_stride;
        let offset = partial as i64 * self.step[0] + token as i64 * s_token + head as i64 * s_head;
        // SAFETY: the offsets lie inside the extent that `Tensor::resolve` checked for shapes with (partial, row), and the
        // caller keeps the memory valid.
        unsafe {
            let from = (self.source.o as *const u8).offset(offset as isize);
            for (i, x) in to.iter_mut().enumerate() {
                let from = from.offset(i as isize * s_dim as isize);
                *x = match self.source.dtype {
                    Dtype::F16 => from.cast::<f16>().read().to_f32(),
                    Dtype::Bf16 => from.cast::<bf16>().read().to_f32(),
                    _ => from.cast::<f32>().read(),
                };
            }
        }
    }
}

fn checked(args: &MergeArgs, shape: [i64; 4]) -> Result<[i64; 4]> {
    if args.query_tokens < 0 {
        return Err(Error::invalid("query_tokens", args.query_tokens, "at least 0"));
    }
    Ok(shape)
}

fn float(name: &str, dtype: Dtype) -> Result<Dtype> {
    if dtype.is_float() { Ok(dtype) } else { Err(Error::invalid(name, dtype.name(), "f32, f16 or bf16")) }
}
