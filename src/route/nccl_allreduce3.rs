//! `ALLREDUCE3` on GPUs: the paper's merge (arXiv 2408.04093, algorithm 3) by three NCCL allreduces on the caller's stream,
//! with the library's own attention kernel. A baseline, to be compared with.

use std::sync::{Arc, OnceLock};

use super::backend::{Backend, Place, RouteMemory};
use super::context::StepContext;
use super::gpu::GpuShard;
use super::nccl::connect::{Members, connect};
use super::nccl::watchdog::Watchdog;
use super::nccl::words::StepWords;
use super::rank::CudaRank;
use super::{MergingRoute, Route};
use crate::attention::merge::MergeStep;
use crate::attention::{Algorithm, Step};
use crate::comm::nccl::{NcclDeadline, NcclRank, Reduction};
use crate::cuda::{Allreduce, AllreduceOutput, AllreduceSizes, Destination};
use crate::device::cuda::CudaStream;
use crate::error::{Error, ErrorKind, Result};
use crate::partial::RowTarget;

/// Attends, and reduces by NCCL.
pub(in crate::route) struct NcclAllreduce3 {
    kernels: Allreduce,
    shard: GpuShard,
    /// After the kernels, whose end waits for steps that only the watchdog can end. There once the plan is connected.
    watchdog: OnceLock<Watchdog>,
    words: Arc<StepWords>,
    rank: Arc<CudaRank>,
}

impl NcclAllreduce3 {
    /// Kernels and workspace of a plan on `rank`, which is not connected yet. Blocks; `Capturing` during a capture.
    pub fn new(context: &StepContext, rank: &Arc<CudaRank>) -> Result<NcclAllreduce3> {
        let shard = GpuShard::new(context, rank)?;
        let (desc, timeout) = (&context.desc, context.config.step_timeout);
        let sizes = AllreduceSizes {
            tokens: desc.max_query_tokens,
            heads: desc.q_heads,
            dim: desc.head_dim_v,
            first_head: context.heads.start as i32,
            own_heads: context.heads.len() as i32,
            rank: context.shard.rank,
            world: context.shard.world,
        };
        let words = Arc::new(StepWords::new(&rank.device, &shard.lease, timeout)?);
        let kernels = Allreduce::new(&rank.device, sizes, words.failed(), words.host(), timeout)?;
        Ok(NcclAllreduce3 { kernels, shard, watchdog: OnceLock::new(), words, rank: Arc::clone(rank) })
    }

    /// Reduces over all ranks what `attend` leaves in the workspace.
    ///
    /// # Safety
    /// The output is that of a step that was checked for the context's descriptor and heads. Its memory, and the streams of other
    /// steps, are as [`Route::decode`] asks for.
    unsafe fn exchange(
        &self,
        context: &StepContext,
        output: &AllreduceOutput,
        stream: &CudaStream,
        attend: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Some(watchdog) = self.watchdog.get() else {
            return Err(Error::new(ErrorKind::Internal, "plan: found no NCCL communicator, wanted one"));
        };
        self.kernels.check(output)?;
        attend()?;
        if output.tokens == 0 {
            return Ok(());
        }
        let nccl = watchdog.nccl();
        let reduced = self.kernels.reduced(output.tokens);
        let timeout = context.config.step_timeout;
        // SAFETY: `check` held the output's tokens against the plan's most and its pointers against the device; its memory and the
        // stream are as this function was promised. The words that the kernels were given are those of `words` and of the lease
        // that it keeps: a field after the kernels, whose end waits for their steps.
        unsafe { self.kernels.begin(output, stream) }?;
        let reduce = |send, recv, count, reduction| {
            // SAFETY: `reduced` names parts of the workspace that hold as many f32. The workspace is freed after the device is
            // done with all steps, or is given up with its communicator aborted.
            unsafe { nccl.begin_all_reduce(send, recv, count, reduction, stream) }?;
            nccl.settle("ncclAllReduce", NcclDeadline::new("step_timeout_ns", timeout))
        };
        let enqueue = || {
            reduce(reduced.lse, reduced.most, reduced.rows, Reduction::Maximum)?;
            // SAFETY: as `begin`.
            unsafe { self.kernels.weigh(output, stream) }?;
            reduce(reduced.o, reduced.o, reduced.elements, Reduction::Sum)?;
            reduce(reduced.weights, reduced.weights, reduced.weight_count, Reduction::Sum)?;
            // SAFETY: as `begin`.
            unsafe { self.kernels.finish(output, stream) }
        };
        enqueue().map_err(|error| self.rank.fail(error))?;
        // What a ring moves: every rank sends each part 2 (p - 1) / p times.
        let world = context.shard.world as u64;
        let bytes = (size_of::<f32>() * (reduced.rows + reduced.elements + reduced.weight_count)) as u64;
        context.counters.add(3, 6 * (world - 1), 2 * (world - 1) * bytes / world);
        Ok(())
    }

    /// Runs every size once, up to a factor of two. NCCL connects ranks when it first meets a way of reducing, and then waits
    /// for them: a step that one thread enqueues on several ranks, or that is captured, must not meet one first.
    fn try_out(&self, context: &StepContext, nccl: &NcclRank, deadline: NcclDeadline) -> Result<()> {
        let what = "connecting over NCCL";
        let reduced = self.kernels.reduced(context.desc.max_query_tokens);
        let sizes = [(Reduction::Maximum, reduced.rows), (Reduction::Sum, reduced.elements.max(reduced.weight_count))];
        for (reduction, most) in sizes {
            let mut count = 1;
            while count < 2 * most {
                let (o, count_here) = (reduced.o, count.min(most));
                // SAFETY: the workspace, which begins with o, holds at least as many f32, all of them zeros. No step uses them:
                // a plan is connected before whoever creates it has it.
                let begin = |stream: &CudaStream| unsafe { nccl.begin_all_reduce(o, o, count_here, reduction, stream) };
                self.words.with_stream(begin)?;
                nccl.settle(what, deadline)?;
                count *= 2;
            }
        }
        self.words.drain(what, deadline).inspect_err(|_| nccl.abort(deadline.timeout))
    }
}

impl Route for NcclAllreduce3 {
    fn agreement(&self) -> Vec<(&'static str, String)> {
        vec![("exchange", "NCCL".into())]
    }

    fn connects(&self) -> bool {
        true
    }

    fn connect(&self, context: &StepContext) -> Result<()> {
        let deadline = NcclDeadline::new("setup_timeout_ns", context.config.setup_timeout);
        let nccl = connect(context, &self.rank, Members::all(&self.rank), deadline)?;
        self.try_out(context, &nccl, deadline)?;
        // SAFETY: no step was enqueued yet, as in `try_out`, whose reductions `drain` waited for.
        unsafe { self.kernels.clear() }?;
        // Nothing was there before: a plan is connected once.
        let _ = self.watchdog.set(Watchdog::start(&self.words, nccl, &self.rank, context.config.step_timeout)?);
        Ok(())
    }

    unsafe fn decode(&self, context: &StepContext, step: &Step, place: Place<'_>) -> Result<()> {
        let stream = self.shard.stream(place.stream())?;
        let output = AllreduceOutput { tokens: step.args.query_tokens, target: step.target(&context.desc) };
        let attended =
            Destination::Partial { target: self.kernels.target(), status: self.kernels.status(), lse_in_two: false };
        // SAFETY: the step was checked for the descriptor and shard of which the backend was made; its memory and the streams are as
        // this function was promised. The workspace holds every row of the plan's largest step, and is freed only once the
        // device is done with it. The words that the backend was told of are those of the shard's lease, which outlives it.
        let attend = || unsafe { self.shard.backend.decode_to(step, attended, stream) };
        // SAFETY: the output is the step's, as above.
        unsafe { self.exchange(context, &output, stream, attend) }?;
        context.count_enqueued();
        Ok(())
    }

    fn shard(&self) -> &dyn Backend {
        &self.shard
    }

    fn merging(&self) -> Option<&dyn MergingRoute> {
        Some(self)
    }

    /// Steps end with NaN once their word says so; the allreduces between their kernels are left out.
    unsafe fn write_nan(
        &self,
        _context: &StepContext,
        (tokens, _heads): (usize, usize),
        target: &RowTarget,
        stream: Option<&CudaStream>,
    ) -> Result<()> {
        let stream = self.shard.stream(stream)?;
        let output = AllreduceOutput { tokens: tokens as i32, target: *target };
        if tokens == 0 {
            return Ok(());
        }
        self.kernels.check(&output)?;
        self.words.fail_steps();
        // SAFETY: the target was checked for `tokens`, which are no more than the plan's most, and for this rank's heads, and is
        // memory of the plan's device that stays until this is done, as this function was promised. The words as in `exchange`.
        unsafe {
            self.kernels.begin(&output, stream)?;
            self.kernels.finish(&output, stream)
        }
    }

    fn memory(&self) -> RouteMemory {
        let RouteMemory { workspace, exchange } = self.shard.memory();
        RouteMemory { workspace: workspace + self.kernels.memory() + self.words.memory(), exchange }
    }

    fn algorithm(&self) -> (Algorithm, &str) {
        (Algorithm::Allreduce3, "asked for")
    }
}

impl MergingRoute for NcclAllreduce3 {
    unsafe fn merge(&self, context: &StepContext, step: &MergeStep, stream: Option<&CudaStream>) -> Result<()> {
        let stream = self.shard.stream(stream)?;
        let output = AllreduceOutput { tokens: step.tokens, target: step.target };
        let taken = self.kernels.take_in(step);
        // SAFETY: the source was checked for the context's descriptor, and is memory as this function was promised; the target is
        // the workspace, which holds every row of the plan's largest step and is freed only once the device is done with it.
        let attend = || unsafe { self.shard.backend.merge(&taken, stream) };
        // SAFETY: the output is the step's, which was checked for the context's heads; its memory and the streams as promised.
        unsafe { self.exchange(context, &output, stream, attend) }?;
        context.count_enqueued();
        Ok(())
    }
}
