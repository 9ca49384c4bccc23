//! What a route needs of a backend: to attend the shard of a rank where a step is run.

use crate::attention::Step;
use crate::attention::merge::MergeStep;
use crate::device::Executor;
use crate::device::cuda::CudaStream;
use crate::error::Result;
use crate::partial::DataFault;

/// Bytes that a route holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RouteMemory {
    /// All of them.
    pub workspace: usize,
    /// Those that the exchange works on, among them.
    pub exchange: usize,
}

/// Where a step is attended.
#[derive(Clone, Copy)]
pub(crate) enum Place<'a> {
    /// On a CUDA stream of the plan's device, where it is enqueued.
    Stream(&'a CudaStream),
    /// On the calling thread and the threads of its rank.
    Caller,
    /// On the calling thread and other threads of the engine, for this step alone.
    Team(&'a dyn Executor),
}

impl<'a> Place<'a> {
    /// The stream, if it is one.
    pub fn stream(self) -> Option<&'a CudaStream> {
        match self {
            Place::Stream(stream) => Some(stream),
            Place::Caller | Place::Team(_) => None,
        }
    }

    /// The threads of a step on a CPU rank, whose own are `own`.
    pub fn executor(self, own: &'a dyn Executor) -> &'a dyn Executor {
        match self {
            Place::Team(team) => team,
            Place::Caller | Place::Stream(_) => own,
        }
    }
}

/// A rank's means to attend its shard and to merge given partials, without other ranks. `place` and `stream` as in
/// [`Route`](super::Route).
pub(crate) trait Backend: Send + Sync {
    /// Attends the shard and writes this rank's partial, all heads, to the step's output. Gives the bad data that it met, if
    /// that is known when the call returns; else the communicator's status finds it.
    ///
    /// # Safety
    /// As [`Route::partial`](super::Route::partial).
    unsafe fn attend(&self, step: &Step, place: Place<'_>) -> Result<Option<DataFault>>;

    /// Writes the one partial of `step` to its output.
    ///
    /// # Safety
    /// As [`MergingRoute::merge`](super::MergingRoute::merge), for a step whose output holds all heads.
    unsafe fn write(&self, step: &MergeStep, stream: Option<&CudaStream>) -> Result<()>;

    /// Bytes held.
    fn memory(&self) -> RouteMemory;
}
