//! How the steps of ranks on CPUs exchange: rounds among all ranks, hops between two.

use std::time::{Duration, Instant};

use super::bootstrap::Bootstrap;
use super::call_word::CallWord;
use crate::error::Result;

/// What a rank says of a round beside its payload.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RoundHeader {
    /// Identifies the call that the round belongs to. A difference between ranks is `Desync`.
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

/// A group whose steps exchange in host memory. `open`, `round` and `hop` are serialised by the caller.
pub(crate) trait Rounds: Bootstrap {
    /// Most bytes that a rank sends in one round, the same on all ranks.
    fn capacity(&self) -> usize;

    /// Begins a step that exchanges. `fingerprint` identifies the call to the other ranks, `call` describes it in messages. Waits for
    /// nobody. A step that only makes rounds need not be opened, but then all ranks leave it out.
    fn open(&self, fingerprint: u64, call: CallWord) -> Result<()>;

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
    /// communicator. `Unsupported` where there are no hops ([`Rounds::has_hops`]).
    fn hop(&self, hop: &Hop, send: &[u8], recv: &mut [u8], meanwhile: &mut dyn FnMut() -> Result<()>) -> Result<u64>;

    /// Whether there are hops.
    fn has_hops(&self) -> bool;

    /// Whether a rank that reads a part of a round's payloads moves only that part.
    fn reads_in_place(&self) -> bool;

    /// How long a step may wait.
    fn step_timeout(&self) -> Duration;

    /// Whether rounds may run on a stream's thread.
    fn serves_streams(&self) -> bool;
}
