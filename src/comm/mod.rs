//! Communicators: how the ranks of a group exchange partials, and how they fail together.
//!
//! [`Exchange`] is what the runtime sees of one rank's end. `local` is the group within one process (shared memory,
//! epochs of [`crate::partial::epoch`]), `transport` a rank whose peers the engine reaches (MPI, gloo); `verdict` words what ranks say when they fail. Depends on `device` and
//! `partial`; knows nothing of attention and of backends.
//!
//! A communicator that has failed is broken: every later call on any rank returns the error that broke it.

mod config;
mod local;
mod transport;
mod verdict;

#[cfg(test)]
mod tests;

pub use config::CommConfig;
pub(crate) use local::{MAX_RANKS, local_group};
pub(crate) use transport::TransportExchange;
pub use transport::{AllgatherCallback, SendrecvCallback, Transport};

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

    /// Whether rounds may run on a stream's thread.
    fn serves_streams(&self) -> bool {
        true
    }
}
