//! The check of a plan with the flag CHECKED: an exchange of records before each step, NaN after it where they do not fit
//! together. Kernels judge by the rules of [`crate::attention::record`], and note what they found as bad data.

use std::sync::Arc;

use crate::attention::{SequenceRecord, Step};
use crate::comm::GpuRank;
use crate::cuda::{CheckKernels, CheckStep, CudaBackend};
use crate::device::cuda::{Allocations, CudaStream};
use crate::error::Result;
use crate::partial::ExchangeView;
use crate::route::context::StepContext;
use crate::route::rank::CudaRank;

/// The check of a plan's steps.
pub(super) struct Check {
    kernels: CheckKernels,
    /// Records that a slot holds.
    most: i32,
    bytes: usize,
}

impl Check {
    /// The check of a plan on `rank`, if it is checked, with its memory from `allocations`. Blocks; `Capturing` during a capture.
    pub fn new(
        context: &StepContext,
        rank: &CudaRank,
        peers: &Arc<GpuRank>,
        allocations: &mut Allocations,
    ) -> Result<Option<Check>> {
        let desc = &context.desc;
        if !desc.checked || desc.is_merge_only() {
            return Ok(None);
        }
        let bytes = CheckKernels::bytes(desc);
        let kernels = CheckKernels::new(&rank.device, desc, rank.sharing, allocations.memory(bytes)?)?;
        let most = (peers.capacity() / SequenceRecord::BYTES).clamp(1, i32::MAX as usize) as i32;
        Ok(Some(Check { kernels, most, bytes }))
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What kernels are told of a step; refuses memory that is not the device's.
    pub fn step(&self, backend: &CudaBackend, step: &Step) -> Result<CheckStep> {
        self.kernels.step(backend, step)
    }

    /// Enqueues the exchanges of the records of `batch` sequences; `view_of` gives the view of that which begins with a sequence.
    ///
    /// # Safety
    /// `step` is one that [`Check::step`] gave for a step of `batch` sequences; this and the streams of other steps are as
    /// [`Route::decode`](crate::route::Route::decode) asks for. The views are those of this rank, of windows that outlive
    /// the step.
    pub unsafe fn compare(
        &self,
        context: &StepContext,
        step: &CheckStep,
        batch: i32,
        view_of: &dyn Fn(i64) -> ExchangeView,
        stream: &CudaStream,
    ) -> Result<()> {
        let others = context.shard.world as u64 - 1;
        for first in (0..batch).step_by(self.most as usize) {
            let count = (batch - first).min(self.most);
            let view = view_of(i64::from(first));
            // SAFETY: `first` and `count` are of the step's sequences, and `most` is what a slot holds. Its memory, the views and the
            // streams are as this function was promised. The memory at `wrong` is one of the route's allocations, which are freed
            // only once the device is done with them.
            unsafe { self.kernels.compare(&view, step, (first, count), stream) }?;
            context.counters.add(1, others, others * count as u64 * SequenceRecord::BYTES as u64);
        }
        Ok(())
    }

    /// Enqueues what comes after the step: NaN in the rows of the sequences in which ranks do not fit together.
    ///
    /// # Safety
    /// As [`Check::compare`], which came before the step on this stream.
    pub unsafe fn write_nan(&self, view: &ExchangeView, step: &CheckStep, stream: &CudaStream) -> Result<()> {
        // SAFETY: `compare` went through all sequences; the rest as there.
        unsafe { self.kernels.write_nan(view, step, stream) }
    }
}
