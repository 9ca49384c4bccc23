//! Communicators: how the ranks of a group exchange partials, and how they fail together.
//!
//! [`Exchange`] is what the runtime sees of one rank's end. `local` is the group within one process (shared memory,
//! epochs of [`crate::partial::epoch`]), `transport` a rank whose peers the engine reaches (MPI, gloo), `nccl` one whose
//! peers NCCL reaches; `tree` says who meets whom in a tree over nodes; `verdict` words what ranks say when they fail. Depends on `device` and `partial`;
//! knows nothing of attention and of backends.
//!
//! # How data flows
//! A step that exchanges begins with [`Exchange::open`], which waits for nobody, and is made of two kinds of movement:
//!
//! - A **round** ([`Exchange::round`]): every rank publishes a payload and, once all have, reads those of all. In a local
//!   group the payloads lie in windows and are read in place; over a transport a round is an allgather.
//! - A **hop** ([`Exchange::hop`]): a rank sends to one peer and receives from one. In a local group the sender posts
//!   where its bytes lie and the receiver copies them, so nothing is staged and a hop may be of any size; over a transport
//!   it is the engine's sendrecv, and without one there are no hops.
//!
//! Rounds and hops carry the same header: what the rank takes the step for, and the bad data that it met. Peers that
//! differ are `Desync`. In a local group the openings of all ranks are compared, too, so that ranks that run different
//! algorithms find each other out. A rank that is waited for and has not opened the step is the one that a timeout names.
//!
//! A communicator that has failed is broken: every later call on any rank returns the error that broke it.

mod config;
mod local;
pub(crate) mod nccl;
mod peer;
mod transport;
mod tree;
mod verdict;

#[cfg(test)]
mod hop_tests;
#[cfg(test)]
mod tests;

pub use config::CommConfig;
pub(crate) use local::{LocalExchange, MAX_RANKS, local_group};
pub(crate) use peer::{Offer, PeerExchange, Windows};
pub(crate) use transport::TransportExchange;
pub use transport::{AllgatherCallback, SendrecvCallback, Transport};
#[cfg(test)]
pub(crate) use tree::log2;
pub(crate) use tree::{Receipt, Tree, node_numbers};

use std::time::{Duration, Instant};

use crate::attention::Shard;
use crate::error::{Error, Result};

/// What a rank says of a round beside its payload.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RoundHeader {
    /// What the rank takes the round for. A difference between ranks is `Desync`.
    pub(crate) fingerprint: u64,
    /// Bad data that the rank met, packed; 0 for none.
    pub(crate) fault: u64,
}

/// What all ranks sent in one round; readable until `take` returns.
pub(crate) trait Round: Sync {
    /// What `rank` sent, aligned to 64 bytes. Panics if there is no such rank.
    fn payload(&self, rank: usize) -> &[u8];

    /// The packed fault that `rank` sent, 0 for none. Panics if there is no such rank.
    fn fault(&self, rank: usize) -> u64;
}

/// One exchange of messages with peers, within the step that was opened last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hop {
    /// Its number within the step, the same on both sides, rising on each rank; below [`MAX_HOPS`].
    pub(crate) index: u32,
    /// The rank to send to.
    pub(crate) to: usize,
    /// The rank to receive from.
    pub(crate) from: usize,
    /// As in [`RoundHeader`].
    pub(crate) header: RoundHeader,
    /// When to give up.
    pub(crate) until: Instant,
}

/// Most hops of a step.
pub(crate) const MAX_HOPS: u32 = 1 << 20;

/// One rank's end of a group. Calls are serialised by the caller, except `abort`, `leave`, `status`, `step` and
/// `describe`, which may come from any thread at any time and do not block.
pub(crate) trait Exchange: Send + Sync {
    /// Which rank of how many.
    fn shard(&self) -> Shard;

    /// Most bytes that a rank sends in one round, the same on all ranks.
    fn capacity(&self) -> usize;

    /// Bytes of this rank's window.
    fn window_bytes(&self) -> usize;

    /// Gives every rank's blob in rank order. Collective, for setup: blocks, at most the setup deadline; allocates.
    fn allgather(&self, blob: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Begins a step that exchanges: says what this rank takes it for. Waits for nobody. A step that only makes rounds
    /// need not be opened, but then all ranks leave it out.
    fn open(&self, fingerprint: u64) -> Result<()>;

    /// One round, collective. `fill` writes this rank's payload of `bytes` bytes (64-byte aligned); when every rank has
    /// published its own, `take` reads them all in place. Blocks, at most the step deadline; allocates nothing unless
    /// it fails. Any error but `Busy` breaks the communicator for all ranks.
    fn round(
        &self,
        header: RoundHeader,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
        take: &mut dyn FnMut(&dyn Round),
    ) -> Result<()>;

    /// Sends `send` to `hop.to` while it receives `recv.len()` bytes from `hop.from`; gives the fault word of the
    /// latter. Either may be empty, then only the header travels. `meanwhile` runs once this rank's bytes are on their
    /// way, where the transport can do that, and before the hop is waited for. Returns when both sides are done with the
    /// bytes. Blocks, at most until `hop.until`; allocates nothing unless it fails. Any error but `Busy` breaks the
    /// communicator. Only where [`Exchange::has_hops`].
    fn hop(&self, hop: &Hop, send: &[u8], recv: &mut [u8], meanwhile: &mut dyn FnMut() -> Result<()>) -> Result<u64>;

    /// Whether there are hops.
    fn has_hops(&self) -> bool;

    /// Whether a rank that reads a part of a round's payloads moves only that part.
    fn reads_in_place(&self) -> bool;

    /// How long a step may wait.
    fn step_timeout(&self) -> Duration;

    /// Why the communicator is broken, if it is.
    fn status(&self) -> Option<Error>;

    /// Rounds that this rank completed.
    fn step(&self) -> u64;

    /// Breaks the communicator with `Aborted` and ends every wait on every rank.
    fn abort(&self);

    /// Breaks the communicator because this rank cannot go on; its peers return the error too.
    fn fail(&self, error: &Error);

    /// Leaves the group: peers that need this rank from now on get `PeerLost`.
    fn leave(&self);

    /// Ranks, links, capacity and algorithms, as JSON.
    fn describe(&self) -> String;

    /// The windows of ranks on GPUs, whose steps exchange there.
    fn peers(&self) -> Option<&PeerExchange> {
        None
    }

    /// Whether rounds may run on a stream's thread.
    fn serves_streams(&self) -> bool {
        true
    }
}
