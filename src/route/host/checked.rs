//! The round of a checked plan in which ranks exchange records of their arguments and compare them.

use std::ops::Range;

use parking_lot::Mutex;

use super::exchange::{Exchange, RankFault};
use crate::attention::record::judge;
use crate::attention::{SequenceRecord, Step};
use crate::comm::Round;
use crate::cpu::CpuBackend;
use crate::error::{Error, ErrorKind, Result};
use crate::partial::{DataFault, Lse};
use crate::route::context::StepContext;

/// The check of a plan's steps, with its buffers.
pub(in crate::route) struct Check(Mutex<State>);

struct State {
    /// This rank's records, by sequence.
    own: Vec<SequenceRecord>,
    /// Those of all ranks, sequence after sequence.
    all: Vec<SequenceRecord>,
    /// The sequences in which ranks do not fit together.
    wrong: Vec<Wrong>,
}

/// A sequence in which ranks do not fit together, and the query tokens that any of them counts to it. Where ranks agree on a
/// sequence's tokens none of them is among these: on every rank it comes wholly before or after.
struct Wrong {
    sequence: usize,
    tokens: Range<usize>,
}

impl Wrong {
    fn new(sequence: usize, records: &[SequenceRecord]) -> Wrong {
        let begin = records.iter().map(|record| record.first_token).min().unwrap_or(0);
        let end = records.iter().map(|record| record.first_token + record.tokens).max().unwrap_or(0);
        Wrong { sequence, tokens: begin as usize..end as usize }
    }
}

impl Check {
    /// The check of a plan, if it is checked, with room for its largest step.
    pub fn new(context: &StepContext) -> Result<Option<Check>> {
        let desc = &context.desc;
        if !desc.checked || desc.is_merge_only() || !context.exchanges() {
            return Ok(None);
        }
        let batch = desc.max_batch as usize;
        let mut state = State { own: Vec::new(), all: Vec::new(), wrong: Vec::new() };
        let reserved = state.own.try_reserve_exact(batch).is_ok()
            && batch.checked_mul(context.world()).is_some_and(|all| state.all.try_reserve_exact(all).is_ok())
            && state.wrong.try_reserve_exact(batch).is_ok();
        if !reserved {
            let message =
                format!("max_batch x ranks: found {batch} x {}, wanted what memory has room for", context.world());
            return Err(Error::new(ErrorKind::NoMemory, message));
        }
        Ok(Some(Check(Mutex::new(state))))
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        let State { own, all, wrong } = &*self.0.lock();
        (own.capacity() + all.capacity()) * size_of::<SequenceRecord>() + wrong.capacity() * size_of::<Wrong>()
    }

    /// Sends the records of this rank's arguments to the step that `backend` attended or surveyed last, and compares those of all
    /// ranks. Gives the first sequence in which they do not fit together, the same on every rank.
    ///
    /// # Safety
    /// The step's inputs are still readable, and as they were when `backend` attended or surveyed them.
    pub unsafe fn run(&self, exchange: &Exchange<'_>, backend: &CpuBackend, step: &Step) -> Result<RankFault> {
        let mut state = self.0.lock();
        let State { own, all, wrong } = &mut *state;
        let (batch, world) = (step.args.batch as usize, exchange.world());
        own.resize(batch, SequenceRecord::default());
        all.resize(batch * world, SequenceRecord::default());
        wrong.clear();
        // SAFETY: this function was promised what `records` asks for.
        unsafe { backend.records(step, own) }?;
        let most = (exchange.rounds().capacity() / SequenceRecord::BYTES).max(1);
        for (chunk, own) in own.chunks(most).enumerate() {
            let mut fill = |slot: &mut [u8]| {
                let slots = slot.as_chunks_mut::<{ SequenceRecord::BYTES }>().0;
                slots.iter_mut().zip(own).for_each(|(to, record)| record.store(to));
            };
            let mut take = |round: &dyn Round| {
                for rank in 0..world {
                    let theirs = round.payload(rank).as_chunks::<{ SequenceRecord::BYTES }>().0;
                    for (b, from) in theirs.iter().take(own.len()).enumerate() {
                        all[(chunk * most + b) * world + rank] = SequenceRecord::load(from);
                    }
                }
            };
            exchange.rounds().round(exchange.header, own.len() * SequenceRecord::BYTES, &mut fill, &mut take)?;
        }
        let (desc, mut found) = (&exchange.context.desc, None);
        for (b, records) in all.chunks(world).enumerate() {
            if let Some((rank, cause)) = judge(desc.placement, desc.surplus_keys, records) {
                wrong.push(Wrong::new(b, records));
                found = found.or(Some((rank, DataFault::new(b as i32, cause))));
            }
        }
        Ok(found)
    }

    /// Calls `found` with every sequence in which ranks did not fit together.
    pub fn for_each_wrong(&self, found: impl FnMut(usize)) {
        self.0.lock().wrong.iter().map(|wrong| wrong.sequence).for_each(found);
    }

    /// Writes NaN to the rows that any rank counts to a sequence in which ranks did not fit together: peers may have merged
    /// into them what this rank took for padding. `row` is one row of scratch.
    pub fn write_nan(&self, exchange: &Exchange<'_>, row: &mut [f32]) {
        let state = self.0.lock();
        if state.wrong.is_empty() {
            return;
        }
        row.fill(f32::NAN);
        for Wrong { tokens, .. } in &state.wrong {
            for row_index in tokens.start * exchange.heads()..tokens.end * exchange.heads() {
                exchange.write(row_index, row, Lse::NAN);
            }
        }
    }
}
