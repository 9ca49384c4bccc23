//! `ONE_SHOT` and `TWO_SHOT`: rounds of partials.

use std::ops::Range;

use super::{Found, Meeting, Scratch};
use crate::attention::{OutputMode, Shard, head_range};
use crate::comm::Round;
use crate::error::Result;
use crate::partial::{DataFault, merge_ranks};

/// Rows `first..first + n` of a step, of which a rank may own some heads.
#[derive(Clone, Copy)]
struct Chunk {
    first: usize,
    n: usize,
    heads: usize,
}

impl Chunk {
    /// How many rows before `row` of the step are of heads `own`.
    fn before(&self, row: usize, own: &Range<usize>) -> usize {
        row / self.heads * own.len() + (row % self.heads).clamp(own.start, own.end) - own.start
    }

    /// How many rows of the chunk are of heads `own`.
    fn owned(&self, own: &Range<usize>) -> usize {
        self.before(self.first + self.n, own) - self.before(self.first, own)
    }

    /// The rows of heads `own`, counted from the chunk's first.
    fn of(self, own: &Range<usize>) -> impl Iterator<Item = usize> + '_ {
        (0..self.n).filter(move |row| own.contains(&((self.first + row) % self.heads)))
    }
}

/// Every rank merges all partials, or its own heads of them.
pub(super) fn one_shot(meeting: &Meeting<'_>, scratch: &mut Scratch) -> Result<Found> {
    let (plan, rows, dim, world) = (meeting.plan, meeting.rows(), meeting.dim(), meeting.world());
    let (partial, spare) = (&scratch.partial[..rows * (dim + 1)], &mut scratch.rows);
    let mut found = None;
    for chunk in chunks(meeting) {
        let mut failed = None;
        publish(meeting, partial, chunk, &mut |round| {
            found = found.or_else(|| first_fault(world, round));
            let shared = meeting.share(chunk.n, chunk.n * dim * world, spare, &|part, spare| {
                let (scratch, merged) = spare.split_at_mut(dim);
                for row in part {
                    if plan.heads.contains(&((chunk.first + row) % chunk.heads)) {
                        let lse = merge(meeting, round, chunk.n, row, scratch, merged);
                        meeting.write(chunk.first + row, merged, lse);
                    }
                }
            });
            failed = shared.err();
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        meeting.count(1, world - 1, sent(meeting, chunk, plan.desc.output == OutputMode::Scattered));
    }
    Ok(found)
}

/// Every rank merges its own heads, then the merged rows go round.
pub(super) fn two_shot(meeting: &Meeting<'_>, scratch: &mut Scratch) -> Result<Found> {
    let (rows, dim, world, wire) = (meeting.rows(), meeting.dim(), meeting.world(), meeting.plan.wire);
    let Scratch { partial, incoming: merged, rows: spare, .. } = scratch;
    let partial = &partial[..rows * (dim + 1)];
    let spare = &mut spare[..2 * dim];
    let own = heads_of(meeting, meeting.rank());
    let mut found = None;
    for chunk in chunks(meeting) {
        let owned = chunk.owned(&own);
        let (lse, o) = merged[..owned * (dim + 1)].split_at_mut(owned);
        publish(meeting, partial, chunk, &mut |round| {
            found = found.or_else(|| first_fault(world, round));
            for ((row, lse), o) in chunk.of(&own).zip(&mut *lse).zip(o.chunks_exact_mut(dim)) {
                *lse = merge(meeting, round, chunk.n, row, &mut spare[..dim], o);
            }
        })?;
        meeting.count(1, world - 1, sent(meeting, chunk, true));
        let most = (0..world).map(|rank| chunk.owned(&heads_of(meeting, rank))).max().unwrap_or(0);
        let mut fill = |slot: &mut [u8]| wire.encode(slot, lse, o);
        let mut take = |round: &dyn Round| {
            for rank in 0..world {
                let (theirs, payload) = (heads_of(meeting, rank), round.payload(rank));
                let owned = chunk.owned(&theirs);
                for (at, row) in chunk.of(&theirs).enumerate() {
                    let row_o = wire.o(payload, owned, at, &mut spare[..dim]);
                    let row_lse = wire.lse(payload, owned)[at];
                    match row_o {
                        Some(row_o) => meeting.write(chunk.first + row, row_o, row_lse),
                        None => meeting.write(chunk.first + row, &spare[..dim], row_lse),
                    }
                }
            }
        };
        meeting.exchange().round(meeting.header, wire.bytes(most), &mut fill, &mut take)?;
        let bytes = if meeting.exchange().reads_in_place() { wire.bytes(owned) } else { wire.bytes(most) };
        meeting.count(1, world - 1, bytes * (world - 1));
    }
    Ok(found)
}

/// The step in pieces that fit a round; one, without rows, where there are none.
fn chunks(meeting: &Meeting<'_>) -> impl Iterator<Item = Chunk> + use<> {
    let (rows, heads) = (meeting.rows(), meeting.heads());
    let most = meeting.plan.wire.rows(meeting.exchange().capacity());
    let count = rows.div_ceil(most).max(1);
    (0..count).map(move |i| Chunk { first: i * most, n: most.min(rows - i * most), heads })
}

/// One round in which every rank publishes a chunk of its partial.
fn publish(meeting: &Meeting<'_>, partial: &[f32], chunk: Chunk, take: &mut dyn FnMut(&dyn Round)) -> Result<()> {
    let (wire, dim) = (meeting.plan.wire, meeting.dim());
    let (lse, o) = partial.split_at(meeting.rows());
    let (lse, o) = (&lse[chunk.first..][..chunk.n], &o[chunk.first * dim..][..chunk.n * dim]);
    let mut fill = |slot: &mut [u8]| wire.encode(slot, lse, o);
    meeting.exchange().round(meeting.header, wire.bytes(chunk.n), &mut fill, take)
}

/// Merges a row of the chunk in rank order.
fn merge(
    meeting: &Meeting<'_>,
    round: &dyn Round,
    n: usize,
    row: usize,
    scratch: &mut [f32],
    merged: &mut [f32],
) -> f32 {
    let wire = meeting.plan.wire;
    merge_ranks(
        meeting.world(),
        |rank| wire.lse(round.payload(rank), n)[row],
        |rank, scratch| wire.o(round.payload(rank), n, row, scratch),
        scratch,
        merged,
    )
}

/// Bytes of a chunk that go to peers, which read the whole of it or their own heads.
fn sent(meeting: &Meeting<'_>, chunk: Chunk, parts: bool) -> usize {
    let (wire, world) = (meeting.plan.wire, meeting.world());
    if parts && meeting.exchange().reads_in_place() {
        let all: usize = (0..world).map(|rank| chunk.owned(&heads_of(meeting, rank))).sum();
        return wire.bytes(all - chunk.owned(&heads_of(meeting, meeting.rank())));
    }
    wire.bytes(chunk.n) * (world - 1)
}

/// The heads that `rank` merges where heads are shared out.
fn heads_of(meeting: &Meeting<'_>, rank: usize) -> Range<usize> {
    let shard = Shard { rank: rank as i32, world: meeting.world() as i32 };
    // Neither the shard nor the heads of a plan are out of range.
    head_range(meeting.heads() as i32, shard).map_or(0..0, |range| range.start as usize..range.end as usize)
}

fn first_fault(world: usize, round: &dyn Round) -> Found {
    (0..world).find_map(|rank| DataFault::from_word(round.fault(rank)))
}
