//! What every communicator has: an allgather of small blobs, and a failure that all ranks share.

use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;
use std::time::SystemTime;

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

    /// Ranks, links, capacities and deadlines, as the members of a JSON object.
    fn describe(&self) -> String;
}

/// Identifies one object among those of all processes, on any machine.
pub(crate) type Token = [u8; 16];

/// The token of this process.
pub(crate) fn process_token() -> Token {
    static PROCESS: OnceLock<Token> = OnceLock::new();
    *PROCESS.get_or_init(new_token)
}

/// A token that no other call makes, in this process or another. A forked child inherits the state of its parent's random
/// numbers, so these alone would not do.
pub(crate) fn new_token() -> Token {
    let half = || RandomState::new().hash_one((std::process::id(), SystemTime::now())).to_ne_bytes();
    let mut token = [0; 16];
    token[..8].copy_from_slice(&half());
    token[8..].copy_from_slice(&half());
    token
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn tokens_differ() {
        let make = || (0..1000).map(|_| new_token()).collect::<Vec<_>>();
        let threads = [0, 1].map(|_| std::thread::spawn(make));
        let all: HashSet<_> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        assert_eq!(all.len(), 2000);
    }
}
