//! The route of the algorithms that exchange partials: they differ in how partials of all ranks become merged rows.

use std::sync::Arc;

use super::checked::Check;
use super::exchange::{Exchange, RankFault};
use super::queries::Queries;
use super::scratch::Scratch;
use super::shard::HostShard;
use crate::attention::merge::MergeStep;
use crate::attention::{Algorithm, Step};
use crate::device::FloatState;
use crate::device::cuda::CudaStream;
use crate::error::Result;
use crate::partial::{DataFault, RowTarget};
use crate::route::backend::{Backend, Place, RouteMemory};
use crate::route::context::{Call, StepContext};
use crate::route::rank::CpuRank;
use crate::route::{MergingRoute, Route};

/// How the partials of all ranks become merged rows.
pub(in crate::route) trait PartialExchange: Send + Sync {
    /// Exchanges the partial in the scratch and writes the merged rows of this rank's heads. Gives the bad data of the first
    /// rank that met any.
    fn run(&self, exchange: &Exchange<'_>, scratch: &mut Scratch) -> Result<RankFault>;

    /// Bytes beside the scratch.
    fn bytes(&self) -> usize;

    /// Its name.
    fn algorithm(&self) -> Algorithm;
}

/// Attends the shard, then exchanges partials.
pub(in crate::route) struct PartialRoute<E> {
    shard: HostShard,
    exchange: E,
    check: Option<Check>,
    queries: Option<Queries>,
    reason: &'static str,
}

impl<E: PartialExchange> PartialRoute<E> {
    /// The route of a plan on `rank`. Allocates everything that its steps need.
    pub fn new(
        context: &StepContext,
        rank: &Arc<CpuRank>,
        exchange: impl FnOnce() -> Result<E>,
        reason: &'static str,
    ) -> Result<PartialRoute<E>> {
        let shard = HostShard::new(context, rank, 1)?;
        let (check, queries) = (Check::new(context)?, Queries::new(context)?);
        Ok(PartialRoute { shard, exchange: exchange()?, check, queries, reason })
    }

    /// Exchanges what `attend` leaves in the scratch: of `step`, once that has the queries of all heads, or of partials that are given.
    ///
    /// # Safety
    /// As [`Exchange::new`]; the inputs of `step` are readable until this returns, and `attend` attends the step that it is given.
    unsafe fn exchange(
        &self,
        context: &StepContext,
        place: Place<'_>,
        (call, tokens): (Call, usize),
        target: &RowTarget,
        attend: impl FnOnce(&mut Scratch, Option<&Step>) -> Result<Option<DataFault>>,
        step: Option<&Step>,
    ) -> Result<()> {
        let _float = FloatState::enter();
        let mut scratch = self.shard.lock();
        // SAFETY: this function was promised what `Exchange::new` asks for of this target and number of tokens, until it returns.
        let mut exchange =
            unsafe { Exchange::new(context, self.shard.rank(), self.shard.executor(place), tokens, target) };
        let gathered = match self.queries.as_ref().zip(step).filter(|_| tokens > 0) {
            Some((queries, step)) => {
                context.count_step();
                exchange.open(call, None)?;
                // SAFETY: the step was checked for this plan, and its inputs are as this function was promised.
                Some(unsafe { queries.gather(&exchange, step) }?)
            }
            None => None,
        };
        let attended = gathered.as_ref().or(step);
        let fault = attend(&mut scratch, attended);
        if gathered.is_some() {
            exchange.note(fault?);
        } else {
            context.count_step();
            exchange.open(call, fault?)?;
        }
        let check = self.check.as_ref().zip(attended);
        let differing = check.map_or(Ok(None), |(check, step)| {
            // SAFETY: `attend` attended this step just now, with this shard's backend, and its inputs are as they were.
            unsafe { check.run(&exchange, self.shard.backend()?, step) }
        })?;
        let found = self.exchange.run(&exchange, &mut scratch)?;
        if let Some((check, _)) = check {
            check.write_nan(&exchange, &mut scratch.spare[..context.desc.head_dim_v as usize]);
        }
        exchange.finish(found.or(differing))
    }
}

impl<E: PartialExchange> Route for PartialRoute<E> {
    unsafe fn decode(&self, context: &StepContext, step: &Step, place: Place<'_>) -> Result<()> {
        let (call, tokens) = (Call::Decode(step.args.batch), step.args.query_tokens as usize);
        let target = step.target(&context.desc);
        // SAFETY: the step was checked for the context's heads, and the caller keeps its memory valid while this runs.
        unsafe {
            let attend = |scratch: &mut Scratch, attended: Option<&Step>| {
                self.shard.attend_into(attended.unwrap_or(step), self.shard.executor(place), scratch)
            };
            self.exchange(context, place, (call, tokens), &target, attend, Some(step))
        }
    }

    fn shard(&self) -> &dyn Backend {
        &self.shard
    }

    fn merging(&self) -> Option<&dyn MergingRoute> {
        Some(self)
    }

    fn memory(&self) -> RouteMemory {
        let RouteMemory { workspace, exchange } = self.shard.memory();
        let more = self.exchange.bytes();
        let check = self.check.as_ref().map_or(0, Check::bytes);
        let queries = self.queries.as_ref().map_or(0, Queries::bytes);
        RouteMemory { workspace: workspace + more + check + queries, exchange: exchange + more + queries }
    }

    fn algorithm(&self) -> (Algorithm, &str) {
        (self.exchange.algorithm(), self.reason)
    }
}

impl<E: PartialExchange> MergingRoute for PartialRoute<E> {
    unsafe fn merge(&self, context: &StepContext, step: &MergeStep, _stream: Option<&CudaStream>) -> Result<()> {
        let load = |scratch: &mut Scratch, _: Option<&Step>| {
            // SAFETY: the caller keeps the step's memory valid while this runs.
            unsafe { self.shard.load(step, scratch) };
            Ok(None)
        };
        // SAFETY: the step was checked for the context's heads, and the caller keeps its memory valid while this runs.
        unsafe { self.exchange(context, Place::Caller, (Call::Merge, step.tokens as usize), &step.target, load, None) }
    }
}
