//! One rank, or `LOCAL` output: this rank's partial is the output.

use super::backend::{Backend, Place, RouteMemory};
use super::context::StepContext;
use super::{MergingRoute, Route};
use crate::attention::merge::MergeStep;
use crate::attention::{Algorithm, OutputMode, Step};
use crate::device::cuda::CudaStream;
use crate::error::Result;

/// Nothing is exchanged.
pub(crate) struct Alone {
    backend: Box<dyn Backend>,
    algorithm: Algorithm,
    reason: &'static str,
}

impl Alone {
    /// The route of a plan that needs no other rank.
    pub fn new(context: &StepContext, backend: Box<dyn Backend>) -> Alone {
        let algorithm = match context.desc.algorithm {
            Algorithm::Auto => Algorithm::OneShot,
            asked => asked,
        };
        let reason = match context.desc.output {
            OutputMode::Local => "local output: nothing to exchange",
            OutputMode::Replicated | OutputMode::Scattered | OutputMode::Weighted => "one rank: nothing to exchange",
        };
        Alone { backend, algorithm, reason }
    }
}

impl Route for Alone {
    unsafe fn decode(&self, context: &StepContext, step: &Step, place: Place<'_>) -> Result<()> {
        // SAFETY: `decode` was promised what `attend` asks for; the output of a plan without exchange holds all heads.
        let fault = unsafe { self.backend.attend(step, place) }?;
        context.count_step();
        context.report_own(fault)
    }

    fn shard(&self) -> &dyn Backend {
        &*self.backend
    }

    fn merging(&self) -> Option<&dyn MergingRoute> {
        Some(self)
    }

    fn memory(&self) -> RouteMemory {
        self.backend.memory()
    }

    fn algorithm(&self) -> (Algorithm, &str) {
        (self.algorithm, self.reason)
    }
}

impl MergingRoute for Alone {
    unsafe fn merge(&self, context: &StepContext, step: &MergeStep, stream: Option<&CudaStream>) -> Result<()> {
        // SAFETY: `merge` was promised what `write` asks for; the output of a plan without exchange holds all heads.
        unsafe { self.backend.write(step, stream) }?;
        context.count_step();
        Ok(())
    }
}
