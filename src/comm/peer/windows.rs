//! The windows of a group: device memory that peers push into, and words in host memory beside it.

use std::sync::Arc;
use std::time::Duration;

use crate::device::cuda::{CudaDevice, Holdings, Words};
use crate::error::{Error, Result};
use crate::partial::ExchangeView;
use crate::partial::epoch::{Epoch, MAX_PAYLOAD, MAX_WINDOWS, SLOTS};
use crate::partial::view::{host, window};

/// Bytes of a word.
const WORD: u64 = 8;
/// Bytes of payload that a word carries.
const PAYLOAD: usize = 4;

/// Most payload of a rank in one exchange of `world` ranks, bytes: what leaves a window its size. A window has a slot for
/// every rank and one for merged rows, each once a parity, and a word carries half its size.
fn capacity(world: usize) -> usize {
    (MAX_WINDOWS / (SLOTS * (world + 1) * (WORD as usize / PAYLOAD))).min(MAX_PAYLOAD) / 64 * 64
}

/// All windows of a group of GPUs in one process. Freed with the last of its ranks, so that no rank writes to memory
/// that is gone.
pub(crate) struct Windows {
    members: Vec<Member>,
    slot_words: u64,
}

/// One rank's.
struct Member {
    device: Arc<CudaDevice>,
    window: u64,
    words: Words,
    /// Addresses in device memory: of this rank's slot in every window, then of every window.
    tables: u64,
    _holdings: Holdings,
}

impl Windows {
    /// Zeroed windows for ranks on these devices, in rank order; a device may appear several times. The first epoch comes
    /// after `start`. `Unsupported` where two GPUs cannot reach each other's memory, or there are too many ranks. Giving
    /// them back waits at most `patience` for steps that are enqueued. Blocks; `Capturing` during a capture.
    pub fn new(devices: &[Arc<CudaDevice>], start: Epoch, patience: Duration) -> Result<Windows> {
        let world = devices.len();
        if world > window::MAX_RANKS {
            let wanted = format!("at most {} ranks that exchange on GPUs", window::MAX_RANKS);
            return Err(Error::unsupported("n", world, wanted));
        }
        for device in devices {
            for peer in devices {
                device.reach(peer)?;
            }
        }
        let slot_words = window::HEADER_WORDS + (capacity(world) / PAYLOAD) as u64;
        let words = window::CONTROL_WORDS + (SLOTS * (world + 1)) as u64 * slot_words;
        let mut members = Vec::with_capacity(world);
        for device in devices {
            let mut holdings = Holdings::new(device, patience);
            let member = Member {
                device: Arc::clone(device),
                window: holdings.memory((words * WORD) as usize)?,
                words: holdings.words(host::WORDS)?,
                tables: holdings.memory(2 * world * WORD as usize)?,
                _holdings: holdings,
            };
            // SAFETY: one word of the window just made.
            unsafe { device.upload(member.window + window::CONSUMED * WORD, &u64::from(start.flag()).to_ne_bytes())? };
            members.push(member);
        }
        let windows = Windows { members, slot_words };
        for (rank, member) in windows.members.iter().enumerate() {
            let slot = (window::CONTROL_WORDS + rank as u64 * slot_words) * WORD;
            let slots = windows.members.iter().map(|peer| peer.window + slot);
            let bases = windows.members.iter().map(|peer| peer.window);
            let tables: Vec<u8> = slots.chain(bases).flat_map(u64::to_ne_bytes).collect();
            // SAFETY: as many bytes as were allocated.
            unsafe { member.device.upload(member.tables, &tables)? };
        }
        Ok(windows)
    }

    /// Ranks.
    pub fn world(&self) -> usize {
        self.members.len()
    }

    /// Most payload of a rank in one exchange, bytes.
    pub fn capacity(&self) -> usize {
        (self.slot_words - window::HEADER_WORDS) as usize * PAYLOAD
    }

    /// Bytes of a window.
    pub fn bytes(&self) -> usize {
        ((window::CONTROL_WORDS + (SLOTS * (self.world() + 1)) as u64 * self.slot_words) * WORD) as usize
    }

    /// The GPU of a rank.
    pub fn device(&self, rank: usize) -> &Arc<CudaDevice> {
        &self.members[rank].device
    }

    /// How a rank's words reach a peer.
    pub fn link(&self, rank: usize, peer: usize) -> &'static str {
        if self.device(rank).device() == self.device(peer).device() { "same device" } else { "peer access" }
    }

    /// The words of a rank in host memory.
    pub fn words(&self, rank: usize) -> HostWords<'_> {
        HostWords(&self.members[rank].words)
    }

    /// Where the attention kernel of a rank leaves the bad data of a step.
    pub fn fault_address(&self, rank: usize) -> u64 {
        self.members[rank].window + window::FAULT * WORD
    }

    /// The last epoch that a rank has read to its end. Blocks.
    pub fn consumed(&self, rank: usize) -> Result<Epoch> {
        let member = &self.members[rank];
        let mut word = [0; WORD as usize];
        // SAFETY: one word of the window.
        unsafe { member.device.download(member.window + window::CONSUMED * WORD, &mut word)? };
        Ok(Epoch::from_flag(u64::from_ne_bytes(word) as u32))
    }

    /// What a kernel of `rank` is told; the step's own fields are zero.
    pub fn view(&self, rank: usize, timeout: Duration) -> ExchangeView {
        let (member, world) = (&self.members[rank], self.world() as u64);
        ExchangeView {
            peers: member.tables,
            bases: member.tables + world * WORD,
            window: member.window,
            host: member.words.address(),
            slot_words: self.slot_words as i64,
            parity_words: (world * self.slot_words) as i64,
            merged_at: (window::CONTROL_WORDS + SLOTS as u64 * world * self.slot_words) as i64,
            timeout_ns: timeout.as_nanos().min(u128::from(u64::MAX / 2)) as u64,
            world: world as i32,
            rank: rank as i32,
            ..ExchangeView::NONE
        }
    }
}

/// A rank's words, while its windows are there.
pub(crate) struct HostWords<'a>(&'a Words);

impl HostWords<'_> {
    /// A word.
    pub fn load(&self, index: usize) -> u64 {
        // SAFETY: the holdings live as long as the windows, which are borrowed.
        unsafe { self.0.load(index) }
    }

    /// A word, which becomes 0.
    pub fn take(&self, index: usize) -> u64 {
        // SAFETY: as above.
        unsafe { self.0.take(index) }
    }

    /// Sets a word.
    pub fn raise(&self, index: usize, value: u64) {
        // SAFETY: as above.
        unsafe { self.0.store(index, value) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_keep_their_size() {
        assert_eq!((capacity(2), capacity(15)), (1 << 20, 1 << 20));
        for world in 2..=window::MAX_RANKS {
            let slot = window::HEADER_WORDS as usize + capacity(world) / PAYLOAD;
            let bytes = (window::CONTROL_WORDS as usize + SLOTS * (world + 1) * slot) * WORD as usize;
            assert!(bytes <= MAX_WINDOWS + (1 << 16), "{world} ranks: {bytes}");
            assert!(capacity(world) >= 240 << 10, "{world} ranks: {}", capacity(world));
        }
    }
}
