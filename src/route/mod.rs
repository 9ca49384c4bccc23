//! Routes: what a plan does with a step, from this rank's shard to the merged output. One file (or folder) each.
//!
//! | route | ranks on | what happens |
//! |---|---|---|
//! | `alone` | CPUs, GPUs | one rank, or LOCAL output: nothing is exchanged |
//! | `rounds` | CPUs | `ONE_SHOT`, `TWO_SHOT`, `ALLREDUCE3`: all ranks publish, all read |
//! | `tree` | CPUs | `TREE`: two partials at a time, within nodes, between them, back |
//! | `ring` | CPUs | `RING`: keys and values go round instead of partials |
//! | `windows` | GPUs | `ONE_SHOT`, `TWO_SHOT`: kernels write into each other's memory |
//! | `nccl_allgather` | GPUs | `ONE_SHOT` where they cannot write into each other's memory: one allgather of NCCL, and a merge |
//! | `nodes` | GPUs | `TREE`: windows within nodes, then one allgather of NCCL among ranks of different nodes |
//! | `nccl_allreduce3` | GPUs | `ALLREDUCE3`: the paper's merge, over NCCL |
//!
//! [`choose::choose`] makes the route of a plan, and is the only place that knows them all; whoever owns a route does not ask
//! which it is. `algorithms` says how each algorithm exchanges, for `choose` and for what communicators say of themselves. `rank`
//! is what a rank has (its end of the group, its workers or its GPU), `context` what is the same in every step of a plan. `backend`
//! attends a shard without peers, and says where; `host` is what routes of CPU ranks share, `gpu` what those of GPUs share, `nccl`
//! what those over NCCL share.
//!
//! Depends on `cpu`, `cuda`, `comm` and what lies below them; knows nothing of plans, streams and communicators. Nothing is
//! re-exported here, since routes import the trait from here.

use crate::attention::merge::MergeStep;
use crate::attention::{Algorithm, Step};
use crate::device::cuda::CudaStream;
use crate::error::Result;
use crate::partial::RowTarget;
use backend::{Backend, Place, RouteMemory};
use context::StepContext;

pub(crate) mod algorithms;
pub(crate) mod alone;
pub(crate) mod backend;
pub(crate) mod choose;
pub(crate) mod context;
pub(crate) mod gpu;
pub(crate) mod host;
pub(crate) mod nccl;
pub(crate) mod nccl_allgather;
pub(crate) mod nccl_allreduce3;
pub(crate) mod nodes;
pub(crate) mod rank;
pub(crate) mod ring;
pub(crate) mod rounds;
pub(crate) mod tree;
pub(crate) mod windows;

/// What one plan does with a step, on one rank. Steps of a plan are serialised by the caller; the other calls may come from
/// any thread.
///
/// `stream`, or a `place` that is one, is the CUDA stream of the plan's device to enqueue on. None: the step runs on the calling
/// thread and is done when the call returns, also with the error of the step. Routes of GPUs refuse none. No step allocates.
///
/// A step that fails on the calling thread leaves its output as it is, and its group unbroken unless its own exchange broke it.
/// The caller then breaks the group and writes NaN ([`Route::write_nan`]), for all routes alike.
pub(crate) trait Route: Send + Sync {
    /// What must be the same on all ranks beside the descriptor: names and values.
    fn agreement(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    /// Whether [`Route::connect`] has something to do, and waits for the other ranks.
    fn connects(&self) -> bool {
        false
    }

    /// The collective part of making the plan, once its ranks agree. Blocks, at most the setup deadline.
    fn connect(&self, _context: &StepContext) -> Result<()> {
        Ok(())
    }

    /// Attends this rank's shard, exchanges and writes the merged output.
    ///
    /// # Safety
    /// The step was checked for the context's descriptor, shard and heads. Its memory is the plan's device's, and stays
    /// valid, and unchanged by others, until the step is done. On a GPU, steps of the plan that are under way together are on one
    /// stream, and so are exchanges of its rank.
    unsafe fn decode(&self, context: &StepContext, step: &Step, place: Place<'_>) -> Result<()>;

    /// This rank's shard, as it is attended without peers.
    fn shard(&self) -> &dyn Backend;

    /// Attends this rank's shard and writes its own partial, all heads.
    ///
    /// # Safety
    /// As [`Route::decode`], for a step whose output holds all heads.
    unsafe fn partial(&self, context: &StepContext, step: &Step, place: Place<'_>) -> Result<()> {
        // SAFETY: `attend` asks for what this function was promised.
        let fault = unsafe { self.shard().attend(step, place) }?;
        context.report_own(fault)
    }

    /// The route as one that merges partials of the engine's own; none where it exchanges something else than partials.
    fn merging(&self) -> Option<&dyn MergingRoute>;

    /// Writes NaN to an output of `tokens` query tokens: what a step leaves that failed, or that its communicator had failed
    /// before. Once it is written where there is no stream, else in the order of the stream.
    ///
    /// # Safety
    /// The target is that of a step of this plan: it was checked for `tokens` and `heads`. Its memory as in
    /// [`Route::decode`].
    unsafe fn write_nan(
        &self,
        _context: &StepContext,
        (tokens, heads): (usize, usize),
        target: &RowTarget,
        stream: Option<&CudaStream>,
    ) -> Result<()> {
        if stream.is_none() {
            // SAFETY: the caller's promise; without a stream the memory is the host's.
            unsafe { target.write_nan(tokens, heads) };
        }
        Ok(())
    }

    /// Bytes held.
    fn memory(&self) -> RouteMemory;

    /// The algorithm in use, and why it was chosen.
    fn algorithm(&self) -> (Algorithm, &str);
}

/// A route that exchanges partials, and so can also exchange those that the engine made.
pub(crate) trait MergingRoute {
    /// Exchanges a partial that the engine made and writes the merged output.
    ///
    /// # Safety
    /// The step was checked for the context's descriptor and heads; its memory as in [`Route::decode`].
    unsafe fn merge(&self, context: &StepContext, step: &MergeStep, stream: Option<&CudaStream>) -> Result<()>;
}
