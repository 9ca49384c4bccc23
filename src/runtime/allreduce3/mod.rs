//! `ALLREDUCE3` on GPUs: the paper's merge (arXiv 2408.04093, algorithm 3) by three NCCL allreduces on the caller's stream,
//! with the library's own attention kernel. A baseline, to be compared with.
//!
//! `connect` gives the ranks of a plan their NCCL communicator, `watch` ends steps whose peers do not come.
//!
//! A step may be captured. Once a step has failed NCCL has given up what its graphs name: they must not be replayed.

mod connect;
mod watch;

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

pub(super) use connect::connect;
pub(super) use watch::Watched;
use watch::{Cell, Watch};

use super::communicator::CommCore;
use super::plan::PlanCore;
use crate::attention::{AttentionDesc, Dtype, Shard, Step};
use crate::comm::nccl::{NcclLimit, NcclRank, Reduction};
use crate::cuda::{Allreduce, AllreduceOutput, AllreduceShape, CudaBackend, Destination, MergeStep};
use crate::device::cuda::{CudaDevice, CudaStream};
use crate::error::{Error, ErrorKind, Result};

/// What a plan needs beside its backend.
pub(in crate::runtime) struct GpuAllreduce {
    kernels: Allreduce,
    /// Where kernels and the watch meet; taken into the watch once the plan is connected.
    cell: Arc<Cell>,
    /// After the kernels, whose end waits for steps that only the watch can end.
    watch: OnceLock<Watch>,
}

impl GpuAllreduce {
    /// Kernels and workspace; the plan is not connected yet. Blocks; `Capturing` during a capture.
    pub fn new(
        device: &Arc<CudaDevice>,
        desc: &AttentionDesc,
        comm: &CommCore,
        shard: Shard,
        heads: &Range<i32>,
    ) -> Result<GpuAllreduce> {
        if desc.wire_dtype != Dtype::F32 {
            let wanted = "f32 where NCCL adds up";
            return Err(Error::unsupported("wire_dtype", desc.wire_dtype.name(), wanted));
        }
        let patience = comm.config.step_timeout;
        let shape = AllreduceShape {
            tokens: desc.max_query_tokens,
            heads: desc.q_heads,
            dim: desc.head_dim_v,
            first_head: heads.start,
            own_heads: heads.len() as i32,
            rank: shard.rank,
            world: shard.world,
        };
        let cell = Arc::new(Cell::new(device, patience)?);
        let kernels = Allreduce::new(device, shape, cell.failed(), cell.host(), patience)?;
        Ok(GpuAllreduce { kernels, cell, watch: OnceLock::new() })
    }

    /// Bytes of device memory.
    pub fn memory(&self) -> usize {
        self.kernels.memory() + self.cell.memory()
    }

    /// Where the bad data of steps is found, once the plan is connected.
    pub fn steps(&self) -> Option<&Arc<Watched>> {
        self.watch.get().map(Watch::steps)
    }

    /// Enqueues a step: attends the shard, reduces, writes the merged output.
    pub fn decode(&self, plan: &PlanCore, backend: &CudaBackend, step: &Step, stream: &CudaStream) -> Result<()> {
        let output = AllreduceOutput { tokens: step.args.query_tokens, target: step.target(&plan.desc) };
        let attended = Destination::Partial { target: self.kernels.target(), status: self.kernels.status() };
        self.exchange(plan, &output, stream, || backend.decode_to(step, attended, stream))
    }

    /// Enqueues the same for a partial that the engine made.
    pub fn merge(&self, plan: &PlanCore, backend: &CudaBackend, step: &MergeStep, stream: &CudaStream) -> Result<()> {
        let output = AllreduceOutput { tokens: step.tokens, target: step.target };
        self.exchange(plan, &output, stream, || backend.merge(&self.kernels.take_in(step), stream))
    }

    /// What `attend` leaves in the workspace, reduced over all ranks.
    fn exchange(
        &self,
        plan: &PlanCore,
        output: &AllreduceOutput,
        stream: &CudaStream,
        attend: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Some(watch) = self.watch.get() else {
            return Err(Error::new(ErrorKind::Internal, "plan: found no NCCL communicator, wanted one"));
        };
        self.kernels.check(output)?;
        attend()?;
        if output.tokens == 0 {
            return Ok(());
        }
        let rank = watch.steps().rank();
        let reduced = self.kernels.reduced(output.tokens);
        self.kernels.begin(output, stream)?;
        let reduce = |send, recv, count, reduction| {
            // SAFETY: parts of the workspace that hold as many f32, and outlive the step.
            unsafe { rank.begin_all_reduce(send, recv, count, reduction, stream) }?;
            rank.settle("ncclAllReduce", NcclLimit::new("step_timeout", plan.comm.config.step_timeout))
        };
        let enqueue = || {
            reduce(reduced.lse, reduced.most, reduced.rows, Reduction::Maximum)?;
            self.kernels.weigh(output, stream)?;
            reduce(reduced.o, reduced.o, reduced.elements, Reduction::Sum)?;
            reduce(reduced.weights, reduced.weights, reduced.weight_count, Reduction::Sum)?;
            self.kernels.finish(output, stream)
        };
        enqueue().map_err(|error| {
            // What was half enqueued leaves the peers without this rank.
            plan.comm.end.bootstrap().fail(&error);
            plan.comm.end.bootstrap().status().unwrap_or(error)
        })?;
        // What a ring moves: every rank sends each part 2 (p - 1) / p times.
        let world = plan.shard.world as u64;
        let bytes = 4 * (reduced.rows + reduced.elements + reduced.weight_count) as u64;
        plan.counters.rounds.fetch_add(3, Ordering::Relaxed);
        plan.counters.messages.fetch_add(6 * (world - 1), Ordering::Relaxed);
        plan.counters.bytes_sent.fetch_add(2 * (world - 1) * bytes / world, Ordering::Relaxed);
        Ok(())
    }

    /// Enqueues one reduction of `count` elements of the workspace, all of them zeros, to have NCCL connect for it.
    fn try_out(&self, rank: &NcclRank, count: usize, reduction: Reduction) -> Result<()> {
        let o = self.kernels.target().o;
        // SAFETY: the workspace, which begins with o, holds at least as many f32; no step uses them yet.
        self.cell.with_stream(|stream| unsafe { rank.begin_all_reduce(o, o, count, reduction, stream) })
    }
}
