//! The rounds that come before a step whose ranks pass the queries of their own heads: they bring every rank those of all.

use std::ops::Range;

use parking_lot::Mutex;

use super::exchange::Exchange;
use crate::attention::{QueryInput, Shard, Step, head_range};
use crate::comm::Round;
use crate::device::HostBuffer;
use crate::error::{Error, ErrorKind, Result};
use crate::route::context::StepContext;

/// The gather of a plan's steps, with its memory.
pub(in crate::route) struct Queries {
    /// The queries of all heads of the largest step, [token, head, dim].
    gathered: Mutex<HostBuffer>,
    /// Heads of the rank that has the most.
    most_heads: usize,
    /// Bytes of an element, and of a row.
    size: usize,
    row: usize,
}

/// Rows `begin..begin + n` of each rank, token * its heads + its head.
#[derive(Clone, Copy)]
struct Part {
    begin: usize,
    n: usize,
}

impl Part {
    /// Those of a rank that has `heads`, in a step of `tokens` tokens: each row's place in the part, its token and its head.
    fn rows(self, heads: &Range<usize>, tokens: usize) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let (first, count) = (heads.start, heads.len());
        let end = (self.begin + self.n).min(tokens * count);
        (self.begin..end).map(move |row| (row - self.begin, row / count, first + row % count))
    }
}

impl Queries {
    /// The gather of a plan, if its queries are scattered, with room for its largest step.
    pub fn new(context: &StepContext) -> Result<Option<Queries>> {
        let desc = &context.desc;
        if desc.query_input == QueryInput::Replicated || desc.is_merge_only() || !context.exchanges() {
            return Ok(None);
        }
        let size = desc.q_dtype.size();
        let row = desc.head_dim_qk as usize * size;
        let bytes = desc.most_rows()?.checked_mul(row).ok_or_else(|| {
            let message = "max_query_tokens x q_heads x head_dim_qk: queries of all heads do not fit 64 bits";
            Error::new(ErrorKind::NoMemory, message)
        })?;
        let mut most_heads = 0;
        for rank in 0..context.shard.world {
            most_heads = head_range(desc.q_heads, Shard { rank, ..context.shard })?.len().max(most_heads);
        }
        Ok(Some(Queries { gathered: Mutex::new(HostBuffer::new(bytes)?), most_heads, size, row }))
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        self.gathered.lock().len()
    }

    /// Brings together the queries of a step that was opened. Gives the step with those of all heads, which stay as they are
    /// until the next call.
    ///
    /// # Safety
    /// The step was checked for this plan and the rank's heads, and its queries are host memory that stays valid, and unchanged by
    /// others, until this returns.
    pub unsafe fn gather(&self, exchange: &Exchange<'_>, step: &Step) -> Result<Step> {
        let mut gathered = self.gathered.lock();
        let (tokens, world, row) = (exchange.tokens, exchange.world(), self.row);
        let own = exchange.heads_of(exchange.me());
        let most = (exchange.rounds().capacity() / row).max(1);
        let rows = tokens * self.most_heads;
        for begin in (0..rows).step_by(most) {
            let part = Part { begin, n: most.min(rows - begin) };
            let mut fill = |slot: &mut [u8]| {
                for (at, token, head) in part.rows(&own, tokens) {
                    // SAFETY: a row of the step's queries, of which `Step::new` checked that they lie in their memory.
                    unsafe { self.load(step, token, head - own.start, &mut slot[at * row..][..row]) };
                }
            };
            let all = gathered.bytes_mut();
            let mut take = |round: &dyn Round| {
                for rank in 0..world {
                    let theirs = round.payload(rank);
                    for (at, token, head) in part.rows(&exchange.heads_of(rank), tokens) {
                        all[(token * exchange.heads() + head) * row..][..row]
                            .copy_from_slice(&theirs[at * row..][..row]);
                    }
                }
            };
            exchange.rounds().round(exchange.header, part.n * row, &mut fill, &mut take)?;
            exchange.count(1, world - 1, part.rows(&own, tokens).count() * row * (world - 1));
        }
        Ok(step.with_queries(&exchange.context.desc, gathered.as_mut_ptr().cast()))
    }

    /// Copies a row, its elements side by side.
    ///
    /// # Safety
    /// The step's queries have the row, in memory that is valid.
    unsafe fn load(&self, step: &Step, token: usize, head: usize, to: &mut [u8]) {
        let [token_stride, head_stride, stride, _] = step.q_stride.map(|stride| stride as usize);
        let from = step.args.q.data.cast::<u8>().wrapping_add(token * token_stride + head * head_stride);
        let (length, stride) = if stride == self.size { (self.row, 0) } else { (self.size, stride) };
        for (i, element) in to.chunks_exact_mut(length).enumerate() {
            // SAFETY: element i of a row that is there, as this function was promised, or the whole of it where they lie side by side.
            unsafe { from.wrapping_add(i * stride).copy_to_nonoverlapping(element.as_mut_ptr(), length) };
        }
    }
}
