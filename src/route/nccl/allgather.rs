//! One allgather of NCCL that brings every rank the partials of all, and the merge of what came.

use std::sync::{Arc, OnceLock};

use super::watchdog::Watchdog;
use super::words::StepWords;
use crate::attention::{OutputMode, QueryInput, Shard, Step};
use crate::comm::PlanLease;
use crate::comm::nccl::{NcclDeadline, NcclRank};
use crate::cuda::{Gather, GatherQueries, GatherSizes, GatherStep, GatherWords, Messages, Senders};
use crate::device::cuda::CudaStream;
use crate::error::{Error, ErrorKind, Result};
use crate::partial::{RowSource, RowTarget};
use crate::route::context::{Call, StepContext, fingerprint};
use crate::route::rank::CudaRank;

/// A plan's messages and kernels.
pub(in crate::route) struct Allgather {
    gather: Gather,
    /// Of plans whose ranks pass the queries of their own heads.
    queries: Option<GatherQueries>,
    /// After the kernels, whose end waits for steps that only the watchdog can end. There once the plan is connected.
    watchdog: OnceLock<Watchdog>,
    words: Arc<StepWords>,
    rank: Arc<CudaRank>,
}

impl Allgather {
    /// Kernels and workspace of a plan on `rank`, which is not connected yet. `part`: this rank in the communicator that it is to
    /// be connected by; `senders`: where not all of its messages are merged in their order; `why` the plan goes over NCCL. Blocks;
    /// `Capturing` during a capture. `Unsupported` where the plan is checked, its output is weighted, or its queries are scattered over more ranks than those.
    pub fn new(
        context: &StepContext,
        rank: &Arc<CudaRank>,
        lease: &Arc<PlanLease>,
        part: Shard,
        senders: Option<&Senders>,
        why: &str,
    ) -> Result<Allgather> {
        if context.desc.checked {
            let wanted =
                format!("0 where partials go over NCCL, which has no windows in which ranks compare steps: {why}");
            return Err(Error::unsupported("flags", "CHECKED", wanted));
        }
        let (desc, timeout) = (&context.desc, context.config.step_timeout);
        let is_scattered = desc.query_input == QueryInput::Scattered && !desc.is_merge_only();
        if is_scattered && senders.is_some() {
            let wanted = format!("REPLICATED where ranks are of several nodes: {why}");
            return Err(Error::unsupported("query_input", desc.query_input.name(), wanted));
        }
        if desc.output == OutputMode::Weighted {
            let wanted = format!("REPLICATED, SCATTERED or LOCAL where partials go over NCCL: {why}");
            return Err(Error::unsupported("output", desc.output.name(), wanted));
        }
        let sizes = GatherSizes {
            tokens: desc.max_query_tokens,
            heads: desc.q_heads,
            dim: desc.head_dim_v,
            wire: desc.wire_dtype,
            first_head: context.heads.start as i32,
            own_heads: context.heads.len() as i32,
            rank: part.rank,
            world: part.world,
            // Else the kernel of the node makes the message.
            attends: !desc.is_merge_only() && senders.is_none(),
        };
        let words = Arc::new(StepWords::new(&rank.device, lease, timeout)?);
        let told = GatherWords { failed: words.failed(), host: words.host(), failure: words.failure() };
        let gather = Gather::new(&rank.device, sizes, told, senders, timeout)?;
        let queries = match is_scattered {
            true => Some(GatherQueries::new(&rank.device, &gather, desc, part, timeout)?),
            false => None,
        };
        Ok(Allgather { gather, queries, watchdog: OnceLock::new(), words, rank: Arc::clone(rank) })
    }

    /// A step of `tokens` query tokens whose partials are at `source`.
    pub fn step(context: &StepContext, tokens: i32, call: Call, source: RowSource, target: RowTarget) -> GatherStep {
        let [kind, size] = call.words();
        let fingerprint = fingerprint(&[context.plan, kind, size, tokens as u64]);
        GatherStep { tokens, source, lse_in_two: true, target, fingerprint }
    }

    /// Has steps go over `nccl`. Collective over its ranks, within `deadline`. Once.
    pub fn connect(&self, context: &StepContext, nccl: Arc<NcclRank>, deadline: NcclDeadline) -> Result<()> {
        self.try_out(context, &nccl, deadline)?;
        // Nothing was there before: a plan is connected once.
        let _ = self.watchdog.set(Watchdog::start(&self.words, nccl, &self.rank, context.config.step_timeout)?);
        Ok(())
    }

    /// Runs every size once, up to a factor of two. NCCL connects ranks when it first meets a way of gathering, and then waits
    /// for them: a step that one thread enqueues on several ranks, or that is captured, must not meet one first.
    fn try_out(&self, context: &StepContext, nccl: &NcclRank, deadline: NcclDeadline) -> Result<()> {
        let what = "connecting over NCCL";
        let tokens = context.desc.max_query_tokens;
        let (least, most) = (self.gather.messages(0).bytes, self.gather.messages(tokens));
        let queries = self.queries.as_ref().map(|queries| (queries.messages(1).bytes, queries.messages(tokens)));
        for (least, most) in [(least, most)].into_iter().chain(queries) {
            let mut bytes = least;
            while bytes < 2 * most.bytes {
                let here = bytes.min(most.bytes);
                let Messages { send, received, .. } = most;
                // SAFETY: the memory holds a message and those of all ranks, of at least as many bytes. No step uses them: a plan is
                // connected before whoever creates it has it.
                let begin = |stream: &CudaStream| unsafe { nccl.begin_all_gather(send, received, here, stream) };
                self.words.with_stream(begin)?;
                nccl.settle(what, deadline)?;
                bytes *= 2;
            }
        }
        self.words.drain(what, deadline).inspect_err(|_| nccl.abort(deadline.timeout))
    }

    /// Where attention leaves a step's partial, each lse in two floats.
    pub fn target(&self) -> &RowTarget {
        self.gather.target()
    }

    /// Where attention notes bad data.
    pub fn status(&self) -> u64 {
        self.gather.status()
    }

    /// The partial that attention has left, for a step to send.
    pub fn attended(&self) -> RowSource {
        self.gather.attended()
    }

    /// Whether steps begin with a gather of queries.
    pub fn gathers_queries(&self) -> bool {
        self.queries.is_some()
    }

    /// Enqueues the gather of the queries of a step, where ranks pass those of their own heads. Gives the step with those of all, for
    /// what is enqueued next.
    ///
    /// # Safety
    /// The step was checked for the context's descriptor and heads, and its memory to be the device's. That memory, and the streams of
    /// other steps, are as [`Route::decode`](crate::route::Route::decode) asks for.
    pub unsafe fn gather_queries(&self, context: &StepContext, step: &Step, stream: &CudaStream) -> Result<Step> {
        let (Some(queries), tokens @ 1..) = (&self.queries, step.args.query_tokens) else { return Ok(*step) };
        let Some(watchdog) = self.watchdog.get() else {
            return Err(Error::new(ErrorKind::Internal, "plan: found no NCCL communicator, wanted one"));
        };
        let (nccl, timeout) = (watchdog.nccl(), context.config.step_timeout);
        let Messages { send, received, bytes } = queries.messages(tokens);
        // SAFETY: the step's memory and the streams are as this function was promised. `messages` names memory for a message and those
        // of all ranks, which is freed after the device is done with all steps, or is given up with its communicator aborted.
        // The words as in `exchange`.
        unsafe {
            queries.send(step, stream)?;
            nccl.begin_all_gather(send, received, bytes, stream)?;
            nccl.settle("ncclAllGather", NcclDeadline::new("step_timeout_ns", timeout))?;
            queries.take(step, stream)?;
        }
        let others = nccl.shard().world as u64 - 1;
        context.counters.add(1, others, others * queries.own_bytes(tokens) as u64);
        Ok(step.with_queries(&context.desc, queries.gathered()))
    }

    /// Gathers, after `attend` and then `begin` were enqueued, and merges. `attend` leaves this rank's partial where the step says,
    /// `begin` this rank's message: [`Gather::begin`], or another kernel that does so.
    ///
    /// # Safety
    /// The step is one that was checked for the context's descriptor and heads. Its memory, and the streams of other steps, are as
    /// [`Route::decode`](crate::route::Route::decode) asks for.
    pub unsafe fn exchange(
        &self,
        context: &StepContext,
        step: &GatherStep,
        stream: &CudaStream,
        attend: impl FnOnce() -> Result<()>,
        begin: impl FnOnce(&Gather) -> Result<()>,
    ) -> Result<()> {
        let Some(watchdog) = self.watchdog.get() else {
            return Err(Error::new(ErrorKind::Internal, "plan: found no NCCL communicator, wanted one"));
        };
        self.gather.check(step)?;
        attend()?;
        let (nccl, timeout) = (watchdog.nccl(), context.config.step_timeout);
        let messages = self.gather.messages(step.tokens);
        let enqueue = || {
            begin(&self.gather)?;
            // SAFETY: `messages` names parts of the workspace that hold a message and those of all ranks. The workspace is freed
            // after the device is done with all steps, or is given up with its communicator aborted.
            unsafe { nccl.begin_all_gather(messages.send, messages.received, messages.bytes, stream) }?;
            nccl.settle("ncclAllGather", NcclDeadline::new("step_timeout_ns", timeout))?;
            // SAFETY: `check` held the step's tokens against the plan's most and its pointers against the device; its memory and the
            // stream are as this function was promised. The words that the kernels were given are those of `words` and of the lease
            // that it keeps: a field after the kernels, whose end waits for their steps.
            unsafe { self.gather.merge(step, stream) }
        };
        enqueue().map_err(|error| self.rank.fail(error))?;
        let others = nccl.shard().world as u64 - 1;
        let header = self.gather.messages(0).bytes;
        context.counters.add(1, others, others * (messages.bytes - header) as u64);
        Ok(())
    }

    /// Writes NaN to an output of `tokens` query tokens, in the order of the stream. Steps end so once their word says that the
    /// communicator is broken; the allgather is left out.
    ///
    /// # Safety
    /// The target is that of a step that was checked for `tokens` and the plan's heads; its memory as in
    /// [`Allgather::exchange`].
    pub unsafe fn write_nan(&self, tokens: usize, target: &RowTarget, stream: &CudaStream) -> Result<()> {
        let (source, tokens) = (RowSource::NONE, tokens as i32);
        let step = GatherStep { tokens, source, lse_in_two: false, target: *target, fingerprint: 0 };
        self.gather.check(&step)?;
        self.words.fail_steps();
        // SAFETY: the target was checked for `tokens`, which are no more than the plan's most, and for this rank's heads, and is
        // memory of the plan's device that stays until this is done, as this function was promised. The words as in `exchange`.
        unsafe {
            self.gather.begin(&step, stream)?;
            self.gather.merge(&step, stream)
        }
    }

    /// Bytes of device memory, and those that the exchange works on among them.
    pub fn memory(&self) -> (usize, usize) {
        let (all, exchange) = self.gather.memory();
        let queries = self.queries.as_ref().map_or(0, GatherQueries::memory);
        (all + self.words.memory() + queries, exchange + queries)
    }
}
