//! `TWO_SHOT`: every rank merges its own heads, then the merged rows go round.

use parking_lot::Mutex;

use super::chunk::Chunk;
use super::one_shot::OneShot;
use crate::attention::{Algorithm, OutputMode, head_range};
use crate::comm::Round;
use crate::error::Result;
use crate::partial::Lse;
use crate::route::context::StepContext;
use crate::route::host::exchange::{Exchange, RankFault};
use crate::route::host::partials::PartialExchange;
use crate::route::host::scratch::{Scratch, floats, split_rows, zeroed};

/// Two rounds a chunk; with scattered output the first is all that is needed, and is `ONE_SHOT`'s.
pub(in crate::route) struct TwoShot {
    /// The merged rows of this rank's heads: their lse, then their o.
    merged: Mutex<Vec<f32>>,
}

impl TwoShot {
    /// Room for the largest step.
    pub fn new(context: &StepContext) -> Result<TwoShot> {
        let desc = &context.desc;
        let own = head_range(desc.q_heads, context.shard)?.len();
        let rows = context.desc.most_rows()? / desc.q_heads as usize * own;
        let width = desc.head_dim_v as usize + Lse::FLOATS;
        let merged = zeroed("max_query_tokens x q_heads x head_dim_v", rows.checked_mul(width))?;
        Ok(TwoShot { merged: Mutex::new(merged) })
    }
}

impl PartialExchange for TwoShot {
    fn run(&self, exchange: &Exchange<'_>, scratch: &mut Scratch) -> Result<RankFault> {
        if exchange.context.desc.output == OutputMode::Scattered {
            return OneShot.run(exchange, scratch);
        }
        let (rows, dim, world, wire) = (exchange.rows(), exchange.dim(), exchange.world(), exchange.wire);
        let Scratch { partial, spare } = scratch;
        let (partial, spare) = (&partial[..floats(rows, dim)], &mut spare[..2 * dim]);
        let mut merged = self.merged.lock();
        let own = exchange.heads_of(exchange.me());
        let mut found = None;
        for chunk in Chunk::all(exchange) {
            let owned = chunk.owned(&own);
            let (lse, o) = split_rows(&mut merged, owned, dim);
            chunk.publish(exchange, partial, &mut |round| {
                found = found.or_else(|| exchange.first_fault(round));
                for ((row, lse), o) in chunk.rows_of(&own).zip(&mut *lse).zip(o.chunks_exact_mut(dim)) {
                    *lse = chunk.merge(exchange, round, row, &mut spare[..dim], o);
                }
            })?;
            exchange.count(1, world - 1, chunk.sent(exchange, true));
            let most = (0..world).map(|rank| chunk.owned(&exchange.heads_of(rank))).max().unwrap_or(0);
            let mut fill = |slot: &mut [u8]| wire.encode(slot, lse, o);
            let mut take = |round: &dyn Round| {
                for rank in 0..world {
                    let (theirs, payload) = (exchange.heads_of(rank), round.payload(rank));
                    let owned = chunk.owned(&theirs);
                    for (at, row) in chunk.rows_of(&theirs).enumerate() {
                        let row_lse = wire.lse(payload, owned)[at];
                        match wire.o(payload, owned, at, &mut spare[..dim]) {
                            Some(row_o) => exchange.write(chunk.first + row, row_o, row_lse),
                            None => exchange.write(chunk.first + row, &spare[..dim], row_lse),
                        }
                    }
                }
            };
            exchange.rounds().round(exchange.header, wire.bytes(most), &mut fill, &mut take)?;
            let bytes = if exchange.rounds().reads_in_place() { wire.bytes(owned) } else { wire.bytes(most) };
            exchange.count(1, world - 1, bytes * (world - 1));
        }
        Ok(found)
    }

    fn bytes(&self) -> usize {
        size_of_val(&**self.merged.lock())
    }

    fn algorithm(&self) -> Algorithm {
        Algorithm::TwoShot
    }
}
