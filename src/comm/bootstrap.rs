//! What every communicator has: an allgather of small blobs, and a failure that all ranks share.

use crate::attention::Shard;
use crate::error::{Error, Result};

/// One rank's end of a group. `allgather` is serialised by the caller; every other call may come from any thread at any
/// time and does not block.
pub(crate) trait Bootstrap: Send + Sync {
    /// Which rank of how many.
    fn shard(&self) -> Shard;

    /// Bytes that this end holds for exchanges, whatever plans there are.
    fn window_bytes(&self) -> usize;

    /// Gives every rank's blob in rank order. Collective, for setup: blocks, at most the setup deadline; allocates.
    fn allgather(&self, blob: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Why the communicator is broken, if it is.
    fn status(&self) -> Option<Error>;

    /// Breaks the communicator with `Aborted` and ends every wait on every rank.
    fn abort(&self);

    /// Breaks the communicator because this rank cannot go on; its peers return the error too.
    fn fail(&self, error: &Error);

    /// Leaves the group: peers that need this rank from now on get `PeerLost`, and what it waits for itself ends with
    /// `ParentDestroyed`.
    fn leave(&self);

    /// A rank that has left, as far as this one knows without being told in a step.
    fn left_peer(&self) -> Option<usize> {
        None
    }

    /// Ranks, links, capacity and algorithms, as JSON.
    fn describe(&self) -> String;
}
