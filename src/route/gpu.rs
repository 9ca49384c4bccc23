//! What routes of GPUs share: this rank's shard on its GPU, and the words in which its kernels note bad data.

use std::sync::Arc;

use super::backend::{Backend, Place, RouteMemory};
use super::context::StepContext;
use super::rank::CudaRank;
use crate::attention::Step;
use crate::attention::merge::MergeStep;
use crate::comm::{BAD_VALUE, OWN_FAULT, PlanLease};
use crate::cuda::{CudaBackend, Told};
use crate::device::cuda::CudaStream;
use crate::error::{Error, Result};
use crate::partial::DataFault;

/// The backend of a plan on a GPU.
pub(in crate::route) struct GpuShard {
    /// Declared before `lease`, so that it is dropped first: its kernels write the lease's words.
    pub backend: CudaBackend,
    /// The plan's words in mapped host memory.
    pub lease: Arc<PlanLease>,
    pub rank: Arc<CudaRank>,
}

impl GpuShard {
    /// Kernels and workspace. Blocks; `Capturing` during a capture.
    pub fn new(context: &StepContext, rank: &Arc<CudaRank>) -> Result<GpuShard> {
        let lease = Arc::new(rank.words.lease(context.plan)?);
        let (desc, timeout) = (&context.desc, context.config.step_timeout);
        let told = Told { bad_data: lease.address(OWN_FAULT), value: lease.address(BAD_VALUE) };
        let backend = CudaBackend::new(&rank.device, desc, context.shard, rank.sharing, told, timeout)?;
        Ok(GpuShard { backend, lease, rank: Arc::clone(rank) })
    }

    /// The stream of a step: one of the plan's device.
    pub fn stream<'a>(&self, stream: Option<&'a CudaStream>) -> Result<&'a CudaStream> {
        stream.ok_or_else(|| Error::invalid("stream", "NULL", format!("a stream of {}", self.rank.device.device())))
    }
}

impl Backend for GpuShard {
    unsafe fn attend(&self, step: &Step, place: Place<'_>) -> Result<Option<DataFault>> {
        let stream = self.stream(place.stream())?;
        // SAFETY: the step was checked for the descriptor and shard that the backend was made of, for an output of all heads; its
        // memory, and the streams of other steps, are as `Route::decode` says: all that this function was promised. The words that
        // the backend was told of are those of `lease`, which is dropped after it.
        unsafe { self.backend.decode(step, stream) }?;
        Ok(None)
    }

    unsafe fn write(&self, step: &MergeStep, stream: Option<&CudaStream>) -> Result<()> {
        let stream = self.stream(stream)?;
        // SAFETY: the step was checked for the descriptor, so that source and target have a row for every token and head; that
        // their memory stays valid until it is done, this function was promised.
        unsafe { self.backend.merge(step, stream) }
    }

    fn memory(&self) -> RouteMemory {
        RouteMemory { workspace: self.backend.memory(), exchange: 0 }
    }
}
