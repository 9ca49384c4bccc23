//! A part of a step that fits a round.

use std::ops::Range;

use crate::comm::Round;
use crate::error::Result;
use crate::partial::{Lse, merge_ranks};
use crate::route::host::exchange::Exchange;

/// Rows `first..first + n` of a step, of which a rank may own some heads.
#[derive(Clone, Copy)]
pub(super) struct Chunk {
    pub first: usize,
    pub n: usize,
    heads: usize,
}

impl Chunk {
    /// The step in pieces that fit a round; one, without rows, where there are none.
    pub fn all(exchange: &Exchange<'_>) -> impl Iterator<Item = Chunk> + use<> {
        let (rows, heads) = (exchange.rows(), exchange.heads());
        let most = exchange.wire.rows(exchange.rounds().capacity());
        let count = rows.div_ceil(most).max(1);
        (0..count).map(move |i| Chunk { first: i * most, n: most.min(rows - i * most), heads })
    }

    /// The head of row `row` of the chunk.
    pub fn head(&self, row: usize) -> usize {
        (self.first + row) % self.heads
    }

    /// How many rows before `row` of the step are of heads `own`.
    fn before(&self, row: usize, own: &Range<usize>) -> usize {
        row / self.heads * own.len() + (row % self.heads).clamp(own.start, own.end) - own.start
    }

    /// How many rows of the chunk are of heads `own`.
    pub fn owned(&self, own: &Range<usize>) -> usize {
        self.before(self.first + self.n, own) - self.before(self.first, own)
    }

    /// The rows of heads `own`, counted from the chunk's first.
    pub fn rows_of(self, own: &Range<usize>) -> impl Iterator<Item = usize> + '_ {
        (0..self.n).filter(move |&row| own.contains(&self.head(row)))
    }

    /// One round in which every rank publishes this chunk of its partial.
    pub fn publish(&self, exchange: &Exchange<'_>, partial: &[f32], take: &mut dyn FnMut(&dyn Round)) -> Result<()> {
        let (wire, dim) = (exchange.wire, exchange.dim());
        let (lse, o) = partial.split_at(exchange.rows() * Lse::FLOATS);
        let lse = Lse::slice(lse);
        let (lse, o) = (&lse[self.first..][..self.n], &o[self.first * dim..][..self.n * dim]);
        let mut fill = |slot: &mut [u8]| wire.encode(slot, lse, o);
        exchange.rounds().round(exchange.header, wire.bytes(self.n), &mut fill, take)
    }

    /// Merges row `row` of the chunk in rank order. Gives its lse.
    pub fn merge(
        &self,
        exchange: &Exchange<'_>,
        round: &dyn Round,
        row: usize,
        scratch: &mut [f32],
        merged: &mut [f32],
    ) -> Lse {
        let (wire, n) = (exchange.wire, self.n);
        merge_ranks(
            exchange.world(),
            |rank| wire.lse(round.payload(rank), n)[row],
            |rank, scratch| wire.o(round.payload(rank), n, row, scratch),
            scratch,
            merged,
        )
    }

    /// Bytes of the chunk that go to peers, which read the whole of it or (`parts`) their own heads.
    pub fn sent(&self, exchange: &Exchange<'_>, parts: bool) -> usize {
        let (wire, world) = (exchange.wire, exchange.world());
        if parts && exchange.rounds().reads_in_place() {
            let all: usize = (0..world).map(|rank| self.owned(&exchange.heads_of(rank))).sum();
            return wire.bytes(all - self.owned(&exchange.heads_of(exchange.me())));
        }
        wire.bytes(self.n) * (world - 1)
    }
}
