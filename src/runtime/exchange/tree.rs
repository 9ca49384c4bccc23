//! `TREE`: partials meet two at a time, along the schedule of [`Tree`].

use std::time::Instant;

use super::{Found, Meeting, Scratch, first_fault, wire};
use crate::attention::Dtype;
use crate::comm::{Hop, Receipt, RoundHeader, Tree};
use crate::error::Result;
use crate::partial::DataFault;

/// Walks the hops of this rank; afterwards its partial is that of all ranks.
pub(super) fn run(meeting: &Meeting<'_>, tree: &Tree, scratch: &mut Scratch) -> Result<Found> {
    let (rows, dim, wire) = (meeting.rows(), meeting.dim(), meeting.plan.wire);
    let until = Instant::now() + meeting.exchange().step_timeout();
    let bytes = wire.bytes(rows);
    let Scratch { partial, outgoing, incoming, rows: spare } = scratch;
    let partial = &mut partial[..rows * (dim + 1)];
    let outgoing = wire::bytes_mut(outgoing);
    let incoming = wire::bytes_mut(incoming);
    let mut fault = meeting.header.fault;
    for hop in &tree.hops {
        let round_trip = hop.sends || hop.receipt == Receipt::Merge;
        if round_trip {
            narrow(meeting, partial, outgoing);
        }
        let send: &[u8] = match (hop.sends, wire.dtype) {
            (false, _) => &[],
            (true, Dtype::F32) => wire::bytes(partial),
            (true, _) => &outgoing[..bytes],
        };
        let recv = if hop.receipt == Receipt::Nothing { &mut [][..] } else { &mut incoming[..bytes] };
        let header = RoundHeader { fingerprint: meeting.header.fingerprint, fault };
        let message = Hop { index: hop.index, to: hop.peer, from: hop.peer, header, until };
        let theirs = meeting.exchange().hop(&message, send, recv, &mut || Ok(()))?;
        meeting.count(0, usize::from(hop.sends), send.len());
        match hop.receipt {
            Receipt::Nothing => {}
            Receipt::Merge => {
                meeting.merge(wire, partial, &incoming[..bytes], spare)?;
                fault = first_fault(fault, theirs);
            }
            Receipt::Replace => {
                let (lse, o) = partial.split_at_mut(rows);
                lse.copy_from_slice(wire.lse(incoming, rows));
                wire::decode(wire.dtype, &incoming[4 * rows..bytes], o);
                fault = theirs;
            }
        }
    }
    if tree.spreads {
        narrow(meeting, partial, outgoing);
    }
    meeting.count(tree.levels as usize, 0, 0);
    let (lse, o) = partial.split_at(rows);
    for (row, &lse) in lse.iter().enumerate() {
        meeting.write(row, &o[row * dim..][..dim], lse);
    }
    Ok(DataFault::from_word(fault))
}

/// Takes this rank's partial through the wire type, as its peers will see it; leaves it in `outgoing`, too.
fn narrow(meeting: &Meeting<'_>, partial: &mut [f32], outgoing: &mut [u8]) {
    let wire = meeting.plan.wire;
    if wire.dtype != Dtype::F32 {
        let (lse, o) = partial.split_at_mut(meeting.rows());
        wire.encode(outgoing, lse, o);
        wire::decode(wire.dtype, &outgoing[4 * lse.len()..wire.bytes(lse.len())], o);
    }
}
