//! Steps of ranks on GPUs of several nodes: attend, merge within the node through its windows, gather what nodes have merged by
//! one allgather of NCCL, merge that.
//!
//! Every rank of a node has the same partial of it, and meets one rank of each other node or, where nodes are of unequal size,
//! several that have the same. So nothing has to be spread within a node afterwards, and all ranks hold the same bits. Rows go as
//! f32 within a node, and in the plan's wire type between nodes.

use std::sync::Arc;

use super::backend::{Backend, Place, RouteMemory};
use super::context::{Call, StepContext, fingerprint};
use super::gpu::GpuShard;
use super::nccl::allgather::Allgather;
use super::nccl::connect::{Members, connect};
use super::rank::CudaRank;
use super::{MergingRoute, Route};
use crate::attention::merge::MergeStep;
use crate::attention::{Algorithm, Dtype, Shard, Step};
use crate::comm::GpuRank;
use crate::comm::nccl::NcclDeadline;
use crate::cuda::{Destination, Gather, GatherStep, NodeExchange, Senders};
use crate::device::cuda::CudaStream;
use crate::error::{Error, ErrorKind, Result};
use crate::partial::view::{ExchangeMode, row_words};
use crate::partial::{ExchangeView, RowSource, RowTarget};

/// Attends, merges in the node, gathers by NCCL.
pub(in crate::route) struct NodeTree {
    allgather: Allgather,
    node: NodeExchange,
    shard: GpuShard,
    view: ExchangeView,
    /// Bytes of a row in a slot, and how many rows a slot holds.
    row_bytes: usize,
    most_rows: i64,
    reason: String,
    /// Its windows outlive the kernels that are enqueued.
    peers: Arc<GpuRank>,
}

impl NodeTree {
    /// Kernels and workspace of a plan on `rank`, which is not connected yet; `why` it goes this way. Blocks; `Capturing` during a
    /// capture. `Unsupported` where the plan is checked.
    pub fn new(context: &StepContext, rank: &Arc<CudaRank>, peers: &Arc<GpuRank>, why: &str) -> Result<NodeTree> {
        let (desc, nodes) = (&context.desc, peers.nodes());
        let (met, neighbours) = (nodes.meeting(), nodes.neighbours());
        let place = met.iter().position(|&met| met as i32 == context.shard.rank).unwrap_or(0);
        let part = Shard { rank: place as i32, world: met.len() as i32 };
        let senders = Senders { ranks: met, merged: nodes.first_met() };
        let shard = GpuShard::new(context, rank)?;
        let allgather = Allgather::new(context, rank, &shard.lease, part, Some(&senders), "several nodes")?;
        let attended = (!desc.is_merge_only()).then_some((desc.max_query_tokens, desc.q_heads, desc.head_dim_v));
        let timeout = context.config.step_timeout;
        let node = NodeExchange::new(&rank.device, rank.sharing, &neighbours, attended, timeout)?;
        let view = ExchangeView {
            wire_dtype: Dtype::F32 as i32,
            mode: ExchangeMode::OneShot,
            heads: desc.q_heads,
            first_head: 0,
            own_heads: desc.q_heads,
            ..peers.view()?
        };
        let row_bytes = size_of::<u32>() * row_words(desc.head_dim_v as usize, Dtype::F32.size());
        let most_rows = ((peers.capacity() / row_bytes) as i64).max(1);
        let count = nodes.count();
        let reason = format!("{count} nodes: windows within, one allgather of NCCL between them; {why}");
        Ok(NodeTree { allgather, node, shard, view, row_bytes, most_rows, reason, peers: Arc::clone(peers) })
    }

    /// Merges in the node the partial that `attend` leaves where the step's source is, then across nodes.
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
        let rows = i64::from(step.tokens) * i64::from(self.view.heads);
        let neighbours = self.view.world as u64 - 1;
        let begin = |gather: &Gather| {
            // A step without rows is an exchange, too: the others wait for it.
            for first_row in (0..rows.max(1)).step_by(self.most_rows as usize) {
                let here = (rows - first_row).min(self.most_rows);
                let part = (first_row, here, first_row + here >= rows);
                let view =
                    ExchangeView { fingerprint: fingerprint(&[step.fingerprint, first_row as u64]), ..self.view };
                // SAFETY: the view is this rank's, of windows that `peers` keeps and that are freed after all kernels of their
                // ranks. A slot holds `most_rows` rows. The step is as this function was promised.
                unsafe { self.node.enqueue(gather, step, &view, part, stream) }?;
                context.counters.add(1, neighbours, neighbours * here as u64 * self.row_bytes as u64);
            }
            Ok(())
        };
        // SAFETY: this function was promised the same.
        unsafe { self.allgather.exchange(context, step, stream, attend, begin) }
    }

    fn step(&self, context: &StepContext, tokens: i32, call: Call, target: RowTarget) -> GatherStep {
        Allgather::step(context, tokens, call, self.node.attended(), target)
    }
}

impl Route for NodeTree {
    fn agreement(&self) -> Vec<(&'static str, String)> {
        vec![("exchange", format!("nodes {:?}", self.peers.nodes().by_rank()))]
    }

    fn connects(&self) -> bool {
        true
    }

    fn connect(&self, context: &StepContext) -> Result<()> {
        let deadline = NcclDeadline::new("setup_timeout_ns", context.config.setup_timeout);
        let rank = &self.shard.rank;
        let members = Members::across(rank, self.peers.nodes());
        let nccl = connect(context, rank, members, deadline).map_err(|error| match error.kind() {
            // There is no other way.
            ErrorKind::Unavailable | ErrorKind::Unsupported => {
                let message = format!("ranks of several nodes (node_group) need NCCL: {}", error.message());
                Error::new(ErrorKind::Unsupported, message)
            }
            _ => error,
        })?;
        self.allgather.connect(context, nccl, deadline)
    }

    unsafe fn decode(&self, context: &StepContext, step: &Step, place: Place<'_>) -> Result<()> {
        let stream = self.shard.stream(place.stream())?;
        let call = Call::Decode(step.args.batch);
        let gathered = self.step(context, step.args.query_tokens, call, step.target(&context.desc));
        let Some(target) = self.node.target() else {
            return Err(Error::new(ErrorKind::Internal, "plan: a step of a merge-only plan"));
        };
        let attended = Destination::Partial { target, status: self.node.status(), lse_in_two: true };
        // SAFETY: the step was checked for the descriptor and shard of which the backend was made; its memory and the streams are as
        // this function was promised. The target holds every row of the plan's largest step, and is freed only once the device
        // is done with it. The words that the backend was told of are those of the shard's lease, which outlives it.
        let attend = || unsafe { self.shard.backend.decode_to(step, attended, stream) };
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
        let node = self.node.memory();
        RouteMemory { workspace: self.shard.memory().workspace + all + node, exchange: exchange + node }
    }

    fn algorithm(&self) -> (Algorithm, &str) {
        (Algorithm::Tree, &self.reason)
    }
}

impl MergingRoute for NodeTree {
    unsafe fn merge(&self, context: &StepContext, step: &MergeStep, stream: Option<&CudaStream>) -> Result<()> {
        let stream = self.shard.stream(stream)?;
        let given = self.step(context, step.tokens, Call::Merge, step.target);
        let source = if step.tokens == 0 { RowSource::NONE } else { step.source };
        let given = GatherStep { source, lse_in_two: false, ..given };
        // SAFETY: source and target were checked for the context's descriptor and heads, and are memory as this function was
        // promised, as are the streams.
        unsafe { self.exchange(context, &given, stream, || Ok(())) }?;
        context.count_enqueued();
        Ok(())
    }
}
