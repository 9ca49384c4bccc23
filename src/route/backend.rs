//! What a route without peers needs of a backend.

use crate::attention::Step;
use crate::attention::merge::MergeStep;
use crate::device::cuda::CudaStream;
use crate::error::Result;
use crate::partial::DataFault;

use super::{Place, RouteMemory};

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
    /// As [`MergingRoute::merge`](super::MergingRoute::merge).
    unsafe fn write(&self, step: &MergeStep, stream: Option<&CudaStream>) -> Result<()>;

    /// Bytes held.
    fn memory(&self) -> RouteMemory;
}
