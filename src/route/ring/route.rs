//! The route of a plan with `RING`.

use std::sync::Arc;

use parking_lot::Mutex;

use super::block::Block;
use super::order::Order;
use super::step::{ANNOUNCED_BYTES, Announced, RingStep};
use crate::attention::{Algorithm, AttentionDesc, KvLayout, Step};
use crate::cpu::{CpuBackend, Held};
use crate::device::{FloatState, HostBuffer};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::RowTarget;
use crate::route::backend::{Backend, Place, RouteMemory};
use crate::route::context::{Call, StepContext};
use crate::route::host::checked::Check;
use crate::route::host::exchange::{Exchange, RankFault};
use crate::route::host::queries::Queries;
use crate::route::host::scratch::Scratch;
use crate::route::host::shard::HostShard;
use crate::route::rank::CpuRank;
use crate::route::{MergingRoute, Route};

/// Passes keys and values round.
pub(in crate::route) struct Ring {
    shard: HostShard,
    /// Attends one sequence of a block.
    backend: CpuBackend,
    order: Order,
    block: Block,
    check: Option<Check>,
    queries: Option<Queries>,
    state: Mutex<State>,
}

/// What a step works on beside the partials.
struct State {
    own: Vec<Held>,
    /// What all ranks announced, rank by rank.
    announced: Vec<Announced>,
    blocks: [HostBuffer; 2],
}

impl Ring {
    /// The route of a plan on `rank`. Allocates everything that its steps need. `Unsupported` where the batch is larger than
    /// a round can announce.
    pub fn new(context: &StepContext, rank: &Arc<CpuRank>) -> Result<Ring> {
        let (desc, shard) = (&context.desc, context.shard);
        let (batch, most) = (desc.max_batch as usize, rank.rounds.capacity() / ANNOUNCED_BYTES);
        if batch > most {
            return Err(Error::unsupported("max_batch", batch, format!("at most {most} with RING")));
        }
        let one =
            AttentionDesc { kv_layout: KvLayout::Strided, page_size: 0, max_batch: 1, pages_by_head: false, ..*desc };
        let block = Block::new(desc);
        let most = desc.max_kv_length as usize;
        let pairs = if block.mask > 0 { most.checked_mul(desc.max_query_tokens as usize) } else { Some(0) };
        let bytes =
            batch.checked_mul(most).zip(pairs).and_then(|(tokens, pairs)| block.bytes(tokens, pairs, [true; 2]));
        let bytes = bytes.ok_or_else(|| {
            let message = "max_batch x max_kv_length: a block of keys and values does not fit 64 bits";
            Error::new(ErrorKind::NoMemory, message)
        })?;
        let order = Order::new(context.world(), shard.rank as usize);
        let state = State {
            own: filled(batch, Held::default())?,
            announced: filled(batch * context.world(), Announced::default())?,
            blocks: [HostBuffer::new(bytes)?, HostBuffer::new(bytes)?],
        };
        Ok(Ring {
            shard: HostShard::new(context, rank, order.count)?,
            backend: CpuBackend::new(&one, shard, rank.most_threads, rank.isa)?,
            order,
            block,
            check: Check::new(context)?,
            queries: Queries::new(context)?,
            state: Mutex::new(state),
        })
    }

    /// Runs a step whose keys and values are all there.
    ///
    /// # Safety
    /// The step was checked for this plan, and its inputs are host memory that stays valid, and unchanged by others, until this
    /// returns.
    unsafe fn run(&self, exchange: &mut Exchange<'_>, step: &Step, scratch: &mut Scratch) -> Result<RankFault> {
        let mut state = self.state.lock();
        let State { own, announced, blocks } = &mut *state;
        let (batch, world) = (step.args.batch as usize, exchange.world());
        let (own, announced) = (&mut own[..batch], &mut announced[..batch * world]);
        let backend = self.shard.backend()?;
        // SAFETY: this function was promised what `survey` asks for.
        let fault = unsafe { backend.survey(step, own) }?;
        // Every rank works out the same partials, whose bits depend on the number of threads.
        exchange.open(Call::DecodeOn(step.args.batch, exchange.executor.threads()), fault)?;
        let gathered = match self.queries.as_ref().filter(|_| exchange.tokens > 0) {
            // SAFETY: the step was checked for this plan, and its inputs are as this function was promised.
            Some(queries) => Some(unsafe { queries.gather(exchange, step) }?),
            None => None,
        };
        let step = gathered.as_ref().unwrap_or(step);
        // SAFETY: `backend` surveyed this step just now, whose inputs are as they were but for queries, which it has not seen.
        let differing = self.check.as_ref().map_or(Ok(None), |check| unsafe { check.run(exchange, backend, step) })?;
        let found = RingStep::announce(exchange, step, own, announced)?;
        if let Some(check) = &self.check {
            // Ranks that count other query tokens to a sequence work out other sizes for its part of a block.
            check.for_each_wrong(|b| announced.iter_mut().skip(b).step_by(batch).for_each(|of| of.keys = 0));
        }
        let ring =
            RingStep { exchange, order: &self.order, block: self.block, backend: &self.backend, step, own, announced };
        // SAFETY: `backend` surveyed this step, its inputs are as they were, and `announce` told of what it found.
        unsafe { ring.run(backend, blocks, scratch) }?;
        if let Some(check) = &self.check {
            check.write_nan(exchange, &mut scratch.spare[..exchange.dim()]);
        }
        Ok(found.or(differing))
    }

    /// Runs a step and ends it.
    ///
    /// # Safety
    /// As [`Exchange::new`], and as [`Ring::run`].
    unsafe fn exchange(&self, context: &StepContext, place: Place<'_>, step: &Step, target: &RowTarget) -> Result<()> {
        let _float = FloatState::enter();
        let mut scratch = self.shard.lock();
        // SAFETY: this function was promised what `Exchange::new` asks for of this target and number of tokens, until it returns.
        let mut exchange = unsafe {
            let tokens = step.args.query_tokens as usize;
            Exchange::new(context, self.shard.rank(), self.shard.executor(place), tokens, target)
        };
        context.count_step();
        // SAFETY: this function was promised what `run` asks for.
        let found = unsafe { self.run(&mut exchange, step, &mut scratch) }?;
        exchange.finish(found)
    }
}

/// So many of `value`, or `NoMemory`.
fn filled<T: Clone>(count: usize, value: T) -> Result<Vec<T>> {
    let mut all = Vec::new();
    all.try_reserve_exact(count).map_err(|_| {
        Error::new(ErrorKind::NoMemory, format!("max_batch x ranks: found {count}, wanted what memory has room for"))
    })?;
    all.resize(count, value);
    Ok(all)
}

impl Route for Ring {
    /// Every rank works out the same partials; other slices of the work would give them other bits.
    fn agreement(&self) -> Vec<(&'static str, String)> {
        let rank = self.shard.rank();
        vec![("threads_per_rank", rank.executor.threads().to_string()), ("cpu_isa", rank.isa.name().to_string())]
    }

    unsafe fn decode(&self, context: &StepContext, step: &Step, place: Place<'_>) -> Result<()> {
        let target = step.target(&context.desc);
        // SAFETY: the step was checked for the context's heads, and the caller keeps its memory valid while this runs.
        unsafe { self.exchange(context, place, step, &target) }
    }

    fn shard(&self) -> &dyn Backend {
        &self.shard
    }

    fn merging(&self) -> Option<&dyn MergingRoute> {
        None
    }

    fn memory(&self) -> RouteMemory {
        let RouteMemory { workspace, exchange } = self.shard.memory();
        let state = self.state.lock();
        let blocks: usize = state.blocks.iter().map(HostBuffer::len).sum();
        let others = self.backend.memory() + size_of_val(&*state.own) + size_of_val(&*state.announced);
        let others = others + self.check.as_ref().map_or(0, Check::bytes);
        let queries = self.queries.as_ref().map_or(0, Queries::bytes);
        RouteMemory { workspace: workspace + blocks + others + queries, exchange: exchange + blocks + queries }
    }

    fn algorithm(&self) -> (Algorithm, &str) {
        (Algorithm::Ring, "asked for")
    }
}
