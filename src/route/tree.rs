//! `TREE`: partials meet two at a time, along the schedule of [`Tree`].

use std::time::Instant;

use parking_lot::Mutex;

use super::context::StepContext;
use super::host::exchange::{Exchange, RankFault};
use super::host::partials::PartialExchange;
use super::host::scratch::{Scratch, floats, split_rows, zeroed};
use super::host::wire::{self, Wire};
use super::rank::CpuRank;
use crate::attention::{Algorithm, Dtype};
use crate::comm::{Hop, Receipt, RoundHeader, Tree};
use crate::error::Result;
use crate::partial::DataFault;

/// Hops along a tree over nodes.
pub(in crate::route) struct TreeExchange {
    tree: Tree,
    buffers: Mutex<Buffers>,
}

/// Words for messages.
struct Buffers {
    /// This rank's partial in the wire type, to send; empty where that is f32.
    outgoing: Vec<f32>,
    /// A peer's partial.
    incoming: Vec<f32>,
}

impl TreeExchange {
    /// This rank's part in the tree, and room for the largest step.
    pub fn new(context: &StepContext, rank: &CpuRank) -> Result<TreeExchange> {
        let what = "max_query_tokens x q_heads x head_dim_v";
        let bytes = Wire::of(&context.desc).bytes(1).checked_mul(context.desc.most_rows()?);
        let words = bytes.map(|bytes| bytes.div_ceil(size_of::<f32>()));
        let narrow = context.desc.wire_dtype != Dtype::F32;
        let outgoing = zeroed(what, if narrow { words } else { Some(0) })?;
        let incoming = zeroed(what, words)?;
        let tree = Tree::new(&rank.nodes, context.shard.rank as usize);
        Ok(TreeExchange { tree, buffers: Mutex::new(Buffers { outgoing, incoming }) })
    }
}

impl PartialExchange for TreeExchange {
    /// Walks the hops of this rank; afterwards its partial is that of all ranks.
    fn run(&self, exchange: &Exchange<'_>, scratch: &mut Scratch) -> Result<RankFault> {
        let (rows, dim, wire) = (exchange.rows(), exchange.dim(), exchange.wire);
        let until = Instant::now() + exchange.rounds().step_timeout();
        let bytes = wire.bytes(rows);
        let mut buffers = self.buffers.lock();
        let Buffers { outgoing, incoming } = &mut *buffers;
        let (outgoing, incoming) = (wire::bytes_mut(outgoing), wire::bytes_mut(incoming));
        let Scratch { partial, spare } = scratch;
        let partial = &mut partial[..floats(rows, dim)];
        let mut fault = exchange.header.fault;
        for hop in &self.tree.hops {
            if hop.sends || hop.receipt == Receipt::Merge {
                narrow(exchange, partial, outgoing);
            }
            let send: &[u8] = match (hop.sends, wire.dtype) {
                (false, _) => &[],
                (true, Dtype::F32) => wire::bytes(partial),
                (true, _) => &outgoing[..bytes],
            };
            let recv = if hop.receipt == Receipt::Nothing { &mut [][..] } else { &mut incoming[..bytes] };
            let header = RoundHeader { fingerprint: exchange.header.fingerprint, fault };
            let message = Hop { index: hop.index, to: hop.peer, from: hop.peer, header, until };
            let theirs = exchange.rounds().hop(&message, send, recv, &mut || Ok(()))?;
            exchange.count(0, usize::from(hop.sends), send.len());
            match hop.receipt {
                Receipt::Nothing => {}
                Receipt::Merge => {
                    exchange.merge(wire, partial, &incoming[..bytes], spare)?;
                    fault = first_fault(fault, theirs);
                }
                Receipt::Replace => {
                    let (lse, o) = split_rows(partial, rows, dim);
                    lse.copy_from_slice(wire.lse(incoming, rows));
                    wire::decode(wire.dtype, wire.all_o(incoming, rows), o);
                    fault = theirs;
                }
            }
        }
        if self.tree.spreads {
            narrow(exchange, partial, outgoing);
        }
        exchange.count(self.tree.levels as usize, 0, 0);
        let (lse, o) = split_rows(partial, rows, dim);
        exchange.write_all(lse, o);
        Ok(DataFault::from_word(fault))
    }

    fn bytes(&self) -> usize {
        let buffers = self.buffers.lock();
        size_of_val(&*buffers.outgoing) + size_of_val(&*buffers.incoming)
    }

    fn algorithm(&self) -> Algorithm {
        Algorithm::Tree
    }
}

/// Takes this rank's partial through the wire type, as its peers will see it; leaves it in `outgoing`, too.
fn narrow(exchange: &Exchange<'_>, partial: &mut [f32], outgoing: &mut [u8]) {
    let wire = exchange.wire;
    if wire.dtype != Dtype::F32 {
        let (lse, o) = split_rows(partial, exchange.rows(), exchange.dim());
        wire.encode(outgoing, lse, o);
        wire::decode(wire.dtype, wire.all_o(outgoing, lse.len()), o);
    }
}

/// Of two fault words that of the lower rank.
fn first_fault(a: u64, b: u64) -> u64 {
    match (DataFault::from_word(a), DataFault::from_word(b)) {
        (Some((rank, _)), Some((other, _))) if other < rank => b,
        (None, _) => b,
        _ => a,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partial::DataFaultCause;

    #[test]
    fn the_bad_data_of_the_lowest_rank_wins() {
        let fault = DataFault::new(i32::MAX, DataFaultCause::Position);
        let word = |rank| fault.word(rank);
        for (a, b, lowest) in [(0, 0, 0), (word(2), 0, word(2)), (0, word(2), word(2)), (word(7), word(2), word(2))] {
            assert_eq!((first_fault(a, b), first_fault(b, a)), (lowest, lowest));
        }
    }
}
