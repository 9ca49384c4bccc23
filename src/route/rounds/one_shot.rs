//! `ONE_SHOT`: every rank merges all partials, or its own heads of them.

use super::chunk::Chunk;
use crate::attention::{Algorithm, OutputMode};
use crate::error::Result;
use crate::route::host::exchange::{Exchange, RankFault};
use crate::route::host::partials::PartialExchange;
use crate::route::host::scratch::{Scratch, floats};

/// One round a chunk.
pub(in crate::route) struct OneShot;

impl PartialExchange for OneShot {
    fn run(&self, exchange: &Exchange<'_>, scratch: &mut Scratch) -> Result<RankFault> {
        let (context, rows, dim, world) = (exchange.context, exchange.rows(), exchange.dim(), exchange.world());
        let Scratch { partial, spare } = scratch;
        let partial = &partial[..floats(rows, dim)];
        let mut found = None;
        for chunk in Chunk::all(exchange) {
            let mut failed = None;
            chunk.publish(exchange, partial, &mut |round| {
                found = found.or_else(|| exchange.first_fault(round));
                let shared = exchange.share(chunk.n, chunk.n * dim * world, spare, &|part, spare| {
                    let (scratch, merged) = spare.split_at_mut(dim);
                    for row in part {
                        if context.heads.contains(&chunk.head(row)) {
                            let lse = chunk.merge(exchange, round, row, scratch, merged);
                            exchange.write(chunk.first + row, merged, lse);
                        }
                    }
                });
                failed = shared.err();
            })?;
            if let Some(error) = failed {
                return Err(error);
            }
            exchange.count(1, world - 1, chunk.sent(exchange, context.desc.output == OutputMode::Scattered));
        }
        Ok(found)
    }

    fn bytes(&self) -> usize {
        0
    }

    fn algorithm(&self) -> Algorithm {
        Algorithm::OneShot
    }
}
