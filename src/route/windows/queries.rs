//! The gather of queries before the steps of plans whose ranks pass those of their own heads: an exchange, in pieces that fit the
//! windows, that leaves the queries of all heads in memory of the plan.

use std::sync::Arc;

use crate::attention::{QueryInput, Shard, Step, head_range};
use crate::comm::GpuRank;
use crate::cuda::QueryKernel;
use crate::device::cuda::{Allocations, CudaStream};
use crate::error::{Error, Result};
use crate::partial::ExchangeView;
use crate::route::context::StepContext;
use crate::route::rank::CudaRank;

/// The gather of a plan's steps.
pub(super) struct Queries {
    kernel: QueryKernel,
    /// Rows that a slot holds.
    most: i64,
    /// Heads of this rank, and of the one that has the most.
    own_heads: i64,
    most_heads: i64,
    row_bytes: usize,
    bytes: usize,
}

impl Queries {
    /// The gather of a plan on `rank`, if its queries are scattered, with its memory from `allocations`. Blocks; `Capturing`
    /// during a capture.
    pub fn new(
        context: &StepContext,
        rank: &CudaRank,
        peers: &Arc<GpuRank>,
        allocations: &mut Allocations,
    ) -> Result<Option<Queries>> {
        let desc = &context.desc;
        if desc.query_input == QueryInput::Replicated || desc.is_merge_only() {
            return Ok(None);
        }
        let row_bytes = QueryKernel::row_bytes(desc);
        let bytes = desc.most_rows()?.checked_mul(row_bytes).ok_or_else(|| {
            let found = format!("{} x {} x {}", desc.max_query_tokens, desc.q_heads, desc.head_dim_qk);
            Error::invalid("max_query_tokens x q_heads x head_dim_qk", found, "a size that fits memory")
        })?;
        let kernel = QueryKernel::new(&rank.device, desc, rank.sharing, allocations.memory(bytes)?)?;
        let heads_of = |rank| head_range(desc.q_heads, Shard { rank, ..context.shard }).map(|own| own.len() as i64);
        let mut most_heads = 0;
        for rank in 0..context.shard.world {
            most_heads = heads_of(rank)?.max(most_heads);
        }
        let most = (peers.capacity() / row_bytes).clamp(1, i32::MAX as usize) as i64;
        Ok(Some(Queries { kernel, most, own_heads: heads_of(context.shard.rank)?, most_heads, row_bytes, bytes }))
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Enqueues the exchange of the queries of a step; `view_of` gives the view of the part that begins with a row of each rank.
    /// Gives the step with the queries of all heads, for what is enqueued next.
    ///
    /// # Safety
    /// The step was checked for this rank's heads, of at least one token, with its queries in memory of the device; this and the
    /// streams of other steps are as [`Route::decode`](crate::route::Route::decode) asks for. The views are those of this rank, of
    /// windows that outlive the step.
    pub unsafe fn gather(
        &self,
        context: &StepContext,
        step: &Step,
        view_of: &dyn Fn(i64) -> ExchangeView,
        stream: &CudaStream,
    ) -> Result<Step> {
        let (tokens, others) = (i64::from(step.args.query_tokens), context.shard.world as u64 - 1);
        let (rows, own) = (tokens * self.most_heads, tokens * self.own_heads);
        for first in (0..rows).step_by(self.most as usize) {
            let count = (rows - first).min(self.most);
            let view = view_of(first);
            // SAFETY: no rank has more rows of the step than `rows`, and `most` is what a slot holds. The memory of the plan's largest
            // step is one of the route's allocations, which are freed only once the device is done with them. The step's memory,
            // the views and the streams are as this function was promised.
            unsafe { self.kernel.enqueue(&view, step, (first, count as i32), stream) }?;
            let sent = (own - first).clamp(0, count) as u64;
            context.counters.add(1, others, others * sent * self.row_bytes as u64);
        }
        Ok(step.with_queries(&context.desc, self.kernel.gathered()))
    }
}
