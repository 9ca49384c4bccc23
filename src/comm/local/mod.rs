//! The local group: any number of ranks in one process, exchanging over shared memory.
//!
//! Every rank has a window of two slots. It writes its payload into the slot of the epoch's parity and publishes the
//! header; the last rank to arrive completes the epoch and notifies all; then every rank reads every payload in place. Why two
//! slots suffice is said in [`crate::partial::epoch`]. Ranks wait on their calling thread only, by
//! [`EventCount`](crate::device::EventCount): they spin for at most 20 us where the machine has a core a rank, else they yield as
//! long, then they park, and only the last arrival wakes.
//!
//! A step is opened in slots of the same kind, one for each parity of the step: as no rank ends a step that exchanges
//! before all have opened it, none is more than one ahead. The last to open compares what all said. Each rank has an
//! event count of its own for hops.
//!
//! `group` is what the ranks share and how they wait, `steps` opens steps and makes rounds and hops, `message` hands the
//! bytes of a hop over, `rank` is one rank's end. Each may use those before it.
//!
//! The first failure latches for the whole group and notifies all, so that every wait ends with it.

mod group;
mod message;
mod rank;
mod steps;

#[cfg(test)]
pub(in crate::comm) use rank::local_group_at;
pub(crate) use rank::{LocalRank, MAX_RANKS, local_group};
