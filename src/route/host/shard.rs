//! This rank's shard on CPU threads.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use super::scratch::Scratch;
use crate::attention::merge::MergeStep;
use crate::attention::{AttentionDesc, Step};
use crate::cpu::CpuBackend;
use crate::device::cuda::CudaStream;
use crate::device::{Executor, FloatState};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::{DataFault, PartialRows, RowTarget};
use crate::route::backend::{Backend, Place, RouteMemory};
use crate::route::context::StepContext;
use crate::route::rank::CpuRank;

/// The backend of a plan, with a partial in scratch memory.
pub(in crate::route) struct HostShard {
    desc: AttentionDesc,
    /// None for a merge-only plan.
    backend: Option<CpuBackend>,
    rank: Arc<CpuRank>,
    scratch: Mutex<Scratch>,
}

impl HostShard {
    /// The shard of `rank`, with room for as many partials as `partials` says.
    pub fn new(context: &StepContext, rank: &Arc<CpuRank>, partials: usize) -> Result<HostShard> {
        let desc = context.desc;
        let backend = match desc.is_merge_only() {
            true => None,
            false => Some(CpuBackend::new(&desc, context.shard, rank.most_threads, rank.isa)?),
        };
        let dim = desc.head_dim_v as usize;
        let scratch = Scratch::new(context.desc.most_rows()?, dim, partials, rank.most_threads)?;
        Ok(HostShard { desc, backend, rank: Arc::clone(rank), scratch: Mutex::new(scratch) })
    }

    /// The rank.
    pub fn rank(&self) -> &CpuRank {
        &self.rank
    }

    /// The backend of a plan that is not merge-only.
    pub fn backend(&self) -> Result<&CpuBackend> {
        let none = || Error::new(ErrorKind::Internal, "plan: found no backend in a plan that attends, wanted one");
        self.backend.as_ref().ok_or_else(none)
    }

    /// The scratch of the step that runs.
    pub fn lock(&self) -> MutexGuard<'_, Scratch> {
        self.scratch.lock()
    }

    /// The threads of a step at `place`.
    pub fn executor<'a>(&'a self, place: Place<'a>) -> &'a dyn Executor {
        place.executor(&*self.rank.executor)
    }

    /// Attends the shard into the scratch.
    ///
    /// # Safety
    /// As [`Backend::attend`]; the output is not touched.
    pub unsafe fn attend_into(
        &self,
        step: &Step,
        executor: &dyn Executor,
        scratch: &mut Scratch,
    ) -> Result<Option<DataFault>> {
        let dim = self.desc.head_dim_v as usize;
        let rows = step.args.query_tokens as usize * self.desc.q_heads as usize;
        let (lse, o) = scratch.rows(rows, dim);
        // SAFETY: the step was checked for this plan's descriptor and its memory stays readable, as this function was promised.
        unsafe { self.backend()?.attend(step, executor, PartialRows { o, lse, dim }) }
    }

    /// Loads the one partial of `step` into the scratch.
    ///
    /// # Safety
    /// As [`Backend::write`]; the output is not touched.
    pub unsafe fn load(&self, step: &MergeStep, scratch: &mut Scratch) {
        let dim = self.desc.head_dim_v as usize;
        let (lse, o) = scratch.rows(step.rows(), dim);
        for (row, (lse, o)) in lse.iter_mut().zip(o.chunks_exact_mut(dim)).enumerate() {
            // SAFETY: a row of partial 0 of a step whose memory the caller keeps valid; the step was checked for the plan's
            // `head_dim_v`, which is how long `o` is.
            unsafe {
                *lse = step.lse(0, row);
                step.load(0, row, *lse, o);
            }
        }
    }

    /// Writes the partial in the scratch, all heads, to `target`.
    ///
    /// # Safety
    /// The target was made for `tokens` query tokens and all heads; nobody else uses its memory meanwhile.
    unsafe fn write_scratch(&self, tokens: usize, target: &RowTarget, scratch: &mut Scratch) {
        let (heads, dim) = (self.desc.q_heads as usize, self.desc.head_dim_v as usize);
        let (lse, o) = scratch.rows(tokens * heads, dim);
        for (row, (&mut lse, o)) in lse.iter_mut().zip(o.chunks_exact(dim)).enumerate() {
            // SAFETY: the scratch has as many rows as the target has tokens and heads, and nobody else uses the target's memory.
            unsafe { target.write(row / heads, row % heads, o, lse) };
        }
    }
}

impl Backend for HostShard {
    unsafe fn attend(&self, step: &Step, place: Place<'_>) -> Result<Option<DataFault>> {
        let _float = FloatState::enter();
        let mut scratch = self.lock();
        // SAFETY: this function was promised that the step was checked for this plan and all heads, and that its memory, the
        // output too, is its own until it returns; what `attend_into` and `write_scratch` ask for.
        unsafe {
            let fault = self.attend_into(step, self.executor(place), &mut scratch)?;
            self.write_scratch(step.args.query_tokens as usize, &step.target(&self.desc), &mut scratch);
            Ok(fault)
        }
    }

    unsafe fn write(&self, step: &MergeStep, _stream: Option<&CudaStream>) -> Result<()> {
        let _float = FloatState::enter();
        let mut scratch = self.lock();
        // SAFETY: this function was promised that the step was checked for this plan, and that its memory, the output too, is
        // its own until it returns; a plan without exchange holds all heads.
        unsafe {
            self.load(step, &mut scratch);
            self.write_scratch(step.tokens as usize, &step.target, &mut scratch);
        }
        Ok(())
    }

    fn memory(&self) -> RouteMemory {
        let backend = self.backend.as_ref().map_or(0, CpuBackend::memory);
        let scratch = self.lock();
        let exchange = scratch.partial_bytes();
        RouteMemory { workspace: backend + scratch.spare_bytes() + exchange, exchange }
    }
}
