//! One exchange of a step on a CPU rank.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::scratch::floats;
use super::wire::Wire;
use crate::attention::{Shard, head_range};
use crate::comm::{Round, RoundHeader, Rounds};
use crate::device::Executor;
use crate::error::Result;
use crate::partial::{DataFault, Lse, RowTarget, merge_two};
use crate::route::context::{Call, StepContext, fingerprint};
use crate::route::rank::CpuRank;

/// Elements of partials above which all threads of a step share a merge.
const PARALLEL_MERGE: usize = 1 << 17;

/// The first rank that met bad data, and what it met.
pub(in crate::route) type RankFault = Option<(i32, DataFault)>;

/// The exchange of one step.
pub(in crate::route) struct Exchange<'a> {
    pub context: &'a StepContext,
    pub rank: &'a CpuRank,
    /// The threads that compute the step.
    pub executor: &'a dyn Executor,
    /// Query tokens of the step.
    pub tokens: usize,
    /// Where this rank's heads of the merged output go.
    pub target: &'a RowTarget,
    /// The header of this rank's rounds and hops.
    pub header: RoundHeader,
    pub wire: Wire,
    /// Bad data that this rank met, with its value, which does not travel.
    own: Option<DataFault>,
}

/// What a worker does with some rows.
type Work<'a> = dyn Fn(Range<usize>, &mut [f32]) + Sync + 'a;

impl<'a> Exchange<'a> {
    /// A step of `tokens` query tokens, not opened yet.
    ///
    /// # Safety
    /// The target was made for `tokens` query tokens and the context's heads. Its memory stays valid, and nobody else uses
    /// it, until the exchange is dropped.
    pub unsafe fn new(
        context: &'a StepContext,
        rank: &'a CpuRank,
        executor: &'a dyn Executor,
        tokens: usize,
        target: &'a RowTarget,
    ) -> Exchange<'a> {
        let header = RoundHeader { fingerprint: 0, fault: 0 };
        Exchange { context, rank, executor, tokens, target, header, wire: Wire::of(&context.desc), own: None }
    }

    /// Opens the step, in which this rank met `fault`. Waits for nobody.
    pub fn open(&mut self, call: Call, fault: Option<DataFault>) -> Result<()> {
        let number = self.rank.calls.fetch_add(1, Ordering::Relaxed);
        let [kind, size] = call.words();
        let fingerprint = fingerprint(&[self.context.plan, number, kind, size, self.tokens as u64]);
        self.rank.rounds.open(fingerprint, call.told(self.context.plan, self.tokens))?;
        self.header = RoundHeader { fingerprint, fault: 0 };
        self.note(fault);
        Ok(())
    }

    /// Notes bad data that this rank met once the step was open: rounds and hops tell of it from now on.
    pub fn note(&mut self, fault: Option<DataFault>) {
        self.header.fault = fault.map_or(0, |fault| fault.word(self.context.shard.rank));
        self.own = fault;
    }

    /// The group.
    pub fn rounds(&self) -> &dyn Rounds {
        &*self.rank.rounds
    }

    /// Ranks.
    pub fn world(&self) -> usize {
        self.context.world()
    }

    /// This rank.
    pub fn me(&self) -> usize {
        self.context.shard.rank as usize
    }

    /// Heads of a partial.
    pub fn heads(&self) -> usize {
        self.context.desc.q_heads as usize
    }

    /// Rows of a partial: query tokens x heads.
    pub fn rows(&self) -> usize {
        self.tokens * self.heads()
    }

    /// Elements of a row.
    pub fn dim(&self) -> usize {
        self.wire.dim
    }

    /// The heads that `rank` merges where heads are shared out.
    pub fn heads_of(&self, rank: usize) -> Range<usize> {
        let shard = Shard { rank: rank as i32, world: self.world() as i32 };
        // Neither the shard nor the heads of a plan are out of range.
        head_range(self.heads() as i32, shard).map_or(0..0, |range| range.start as usize..range.end as usize)
    }

    /// Counts a part of the exchange.
    pub fn count(&self, rounds: usize, messages: usize, bytes: usize) {
        self.context.counters.add(rounds as u64, messages as u64, bytes as u64);
    }

    /// The bad data of the first rank that met any.
    pub fn first_fault(&self, round: &dyn Round) -> RankFault {
        (0..self.world()).find_map(|rank| DataFault::from_word(round.fault(rank)))
    }

    /// Writes row `row` of the step, if it is one of this rank's. Each row is written by one worker.
    pub fn write(&self, row: usize, o: &[f32], lse: Lse) {
        let (token, head, own) = (row / self.heads(), row % self.heads(), &self.context.heads);
        if own.contains(&head) {
            // SAFETY: `new` was promised a target of these tokens and heads; rows differ between workers.
            unsafe { self.target.write(token, head - own.start, o, lse) };
        }
    }

    /// Writes the merged rows of a partial.
    pub fn write_all(&self, lse: &[Lse], o: &[f32]) {
        for (row, (&lse, o)) in lse.iter().zip(o.chunks_exact(self.dim())).enumerate() {
            self.write(row, o, lse);
        }
    }

    /// Merges the partial `theirs`, as it came over `wire`, into `partial`.
    pub fn merge(&self, wire: Wire, partial: &mut [f32], theirs: &[u8], spare: &mut [f32]) -> Result<()> {
        let (rows, dim) = (self.rows(), self.dim());
        let base = partial.as_mut_ptr() as usize;
        assert!(partial.len() >= floats(rows, dim));
        self.share(rows, 2 * rows * dim, spare, &|part, spare| {
            for row in part {
                // SAFETY: the lse of a row, and its o behind those of all rows, lie inside `partial` by the assertion, which
                // is borrowed until `share` returns; the parts of workers do not overlap, so no other has this row.
                let (lse, o) = unsafe {
                    let o = (base as *mut f32).add(rows * Lse::FLOATS + row * dim);
                    (&mut *(base as *mut Lse).add(row), std::slice::from_raw_parts_mut(o, dim))
                };
                let their_lse = wire.lse(theirs, rows)[row];
                match wire.o(theirs, rows, row, &mut spare[..dim]) {
                    Some(their_o) => merge_two(o, lse, their_o, their_lse),
                    None => merge_two(o, lse, &spare[..dim], their_lse),
                }
            }
        })
    }

    /// Calls `work` for parts of `0..rows`, on all threads where there is much to do, each with two rows of its own.
    pub fn share(&self, rows: usize, cost: usize, spare: &mut [f32], work: &Work<'_>) -> Result<()> {
        let (executor, dim) = (self.executor, self.dim());
        let parts = executor.threads();
        if parts == 1 || cost < PARALLEL_MERGE {
            work(0..rows, &mut spare[..2 * dim]);
            return Ok(());
        }
        assert!(spare.len() >= parts * 2 * dim);
        let base = spare.as_mut_ptr() as usize;
        executor.run(&|part| {
            // SAFETY: `run` calls each `part` below the number of threads once and returns when all are done; their rows lie
            // inside `spare` by the assertion, apart from each other, and `spare` is borrowed meanwhile.
            let own = unsafe { std::slice::from_raw_parts_mut((base as *mut f32).add(part * 2 * dim), 2 * dim) };
            work(part * rows / parts..(part + 1) * rows / parts, own);
        })
    }

    /// Ends the step: returns the error of the bad data that a rank met, if any.
    pub fn finish(self, found: RankFault) -> Result<()> {
        self.context.board.count_step();
        let Some((rank, fault)) = found else { return Ok(()) };
        let is_own = |own: &DataFault| (rank, own.sequence) == (self.context.shard.rank, fault.sequence);
        let own = self.own.filter(|own| is_own(own) && own.cause == fault.cause);
        Err(self.context.report(rank, own.unwrap_or(fault)))
    }
}
