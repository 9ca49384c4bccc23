//! Steps of ranks on GPUs that cannot reach each other's memory: attend, gather all partials by one allgather of NCCL, merge.

use std::sync::Arc;

use super::backend::{Backend, Place, RouteMemory};
use super::context::{Call, StepContext};
use super::gpu::GpuShard;
use super::nccl::allgather::Allgather;
use super::nccl::connect::{Members, connect};
use super::rank::CudaRank;
use super::{MergingRoute, Route};
use crate::attention::merge::MergeStep;
use crate::attention::{Algorithm, Step};
use crate::comm::nccl::NcclDeadline;
use crate::cuda::{Destination, Gather, GatherStep};
use crate::device::cuda::CudaStream;
use crate::error::{Error, ErrorKind, Result};
use crate::partial::RowTarget;

/// Attends, and gathers by NCCL.
pub(in crate::route) struct NcclAllgather {
    allgather: Allgather,
    shard: GpuShard,
    /// Why there are no windows to use, and the route by its name with that.
    why: String,
    reason: String,
    algorithm: Algorithm,
}

impl NcclAllgather {
    /// Kernels and workspace of a plan on `rank`, which is not connected yet; `why` its ranks do not use windows. Blocks;
    /// `Capturing` during a capture. `Unsupported` where the plan is checked.
    pub fn new(context: &StepContext, rank: &Arc<CudaRank>, why: &str) -> Result<NcclAllgather> {
        let shard = GpuShard::new(context, rank)?;
        let allgather = Allgather::new(context, rank, &shard.lease, context.shard, None, why)?;
        // A tree whose nodes have a rank each is one allgather, too.
        let algorithm = if context.desc.algorithm == Algorithm::Tree { Algorithm::Tree } else { Algorithm::OneShot };
        Ok(NcclAllgather {
            allgather,
            shard,
            reason: format!("one allgather of NCCL: {why}"),
            why: why.into(),
            algorithm,
        })
    }

    /// Gathers and merges, after `attend`.
    ///
    /// # Safety
    /// As [`Allgather::exchange`].
    unsafe fn exchange(
        &self,
        context: &StepContext,
        step: &GatherStep,
        stream: &CudaStream,
        attend: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        // SAFETY: the step has been checked where this is called; its memory and the stream are as this function was promised.
        let begin = |gather: &Gather| unsafe { gather.begin(step, stream) };
        // SAFETY: this function was promised the same.
        unsafe { self.allgather.exchange(context, step, stream, attend, begin) }
    }

    fn step(&self, context: &StepContext, tokens: i32, call: Call, target: RowTarget) -> GatherStep {
        Allgather::step(context, tokens, call, self.allgather.attended(), target)
    }
}

impl Route for NcclAllgather {
    fn agreement(&self) -> Vec<(&'static str, String)> {
        vec![("exchange", "NCCL".into())]
    }

    fn connects(&self) -> bool {
        true
    }

    fn connect(&self, context: &StepContext) -> Result<()> {
        let deadline = NcclDeadline::new("setup_timeout_ns", context.config.setup_timeout);
        let rank = &self.shard.rank;
        let nccl = connect(context, rank, Members::all(rank), deadline).map_err(|error| match error.kind() {
            // There is no other way.
            ErrorKind::Unavailable | ErrorKind::Unsupported => {
                Error::new(ErrorKind::Unsupported, format!("{}; over NCCL: {}", self.why, error.message()))
            }
            _ => error,
        })?;
        self.allgather.connect(context, nccl, deadline)
    }

    unsafe fn decode(&self, context: &StepContext, step: &Step, place: Place<'_>) -> Result<()> {
        let stream = self.shard.stream(place.stream())?;
        let call = Call::Decode(step.args.batch);
        let gathered = self.step(context, step.args.query_tokens, call, step.target(&context.desc));
        let (target, status) = (self.allgather.target(), self.allgather.status());
        let attended = Destination::Partial { target, status, lse_in_two: true };
        // SAFETY: the step was checked for the descriptor and shard of which the backend was made; its memory and the streams are as
        // this function was promised. The message holds every row of the plan's largest step, and is freed only once the
        // device is done with it. The words that the backend was told of are those of the shard's lease, which outlives it.
        let attend_to = |step: &Step| unsafe { self.shard.backend.decode_to(step, attended, stream) };
        let attend = || {
            if !self.allgather.gathers_queries() {
                return attend_to(step);
            }
            self.shard.backend.check(step)?;
            // SAFETY: the step is as this function was promised, and its memory was found to be the device's just now.
            let gathered = unsafe { self.allgather.gather_queries(context, step, stream) };
            // Peers have what was enqueued for a step.
            gathered.and_then(|step| attend_to(&step)).map_err(|error| self.shard.rank.fail(error))
        };
        // SAFETY: the step is as this function was promised.
        unsafe { self.exchange(context, &gathered, stream, attend) }?;
        context.count_enqueued();
        Ok(())
    }

    fn shard(&self) -> &dyn Backend {
        &self.shard
    }

    fn merging(&self) -> Option<&dyn MergingRoute> {
        Some(self)
    }

    unsafe fn write_nan(
        &self,
        _context: &StepContext,
        (tokens, _heads): (usize, usize),
        target: &RowTarget,
        stream: Option<&CudaStream>,
    ) -> Result<()> {
        let stream = self.shard.stream(stream)?;
        // SAFETY: this function was promised the same.
        unsafe { self.allgather.write_nan(tokens, target, stream) }
    }

    fn memory(&self) -> RouteMemory {
        let (all, exchange) = self.allgather.memory();
        RouteMemory { workspace: self.shard.memory().workspace + all, exchange }
    }

    fn algorithm(&self) -> (Algorithm, &str) {
        (self.algorithm, &self.reason)
    }
}

impl MergingRoute for NcclAllgather {
    unsafe fn merge(&self, context: &StepContext, step: &MergeStep, stream: Option<&CudaStream>) -> Result<()> {
        let stream = self.shard.stream(stream)?;
        let given = self.step(context, step.tokens, Call::Merge, step.target);
        let given = GatherStep { source: step.source, lse_in_two: false, ..given };
        // SAFETY: source and target were checked for the context's descriptor and heads, and are memory as this function was
        // promised, as are the streams.
        unsafe { self.exchange(context, &given, stream, || Ok(())) }?;
        context.count_enqueued();
        Ok(())
    }
}
