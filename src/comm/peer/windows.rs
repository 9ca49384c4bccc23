//! The windows of a group: device memory that peers push into, and words in host memory beside it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::remote::{Far, Letter, Remote};
use crate::device::behind;
use crate::device::cuda::{CudaDevice, Fence, Holdings, Words};
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

/// The windows of a group of GPUs. Those of a process are freed with the last of its ranks and after all of its kernels, so
/// that no rank writes to memory that is gone; how ranks of several processes let go of each other's is said in
/// [`super::remote`].
pub(crate) struct Windows {
    places: Vec<Place>,
    slot_words: u64,
    /// What it takes to deal with ranks of other processes; none where there are none.
    far: Option<Far>,
    /// For the GPUs of the ranks whose kernels this process runs over these windows.
    fences: Vec<Fence>,
    patience: Duration,
}

/// Where a rank's window is.
pub(super) enum Place {
    /// In this process.
    Here(Arc<Member>),
    /// In another one.
    There(Remote),
}

/// A window of this process.
pub(super) struct Member {
    pub device: Arc<CudaDevice>,
    pub window: u64,
    words: Words,
    /// Addresses in device memory: of this rank's slot in every window, then of every window.
    tables: u64,
    _holdings: Holdings,
}

/// Words of a slot in windows of `world` ranks, and words of such a window.
fn sizes(world: usize) -> (u64, u64) {
    let slot_words = window::HEADER_WORDS + (capacity(world) / PAYLOAD) as u64;
    (slot_words, window::CONTROL_WORDS + (SLOTS * (world + 1)) as u64 * slot_words)
}

impl Member {
    /// A zeroed window for one of `world` ranks; the first epoch comes after `start`. `align`: what its size is a multiple
    /// of. Giving it back waits at most `patience` for steps that are enqueued. Blocks; `Capturing` during a capture.
    pub fn new(
        device: &Arc<CudaDevice>,
        world: usize,
        start: Epoch,
        align: usize,
        patience: Duration,
    ) -> Result<Member> {
        let mut holdings = Holdings::new(device, patience);
        let member = Member {
            device: Arc::clone(device),
            window: holdings.memory(((sizes(world).1 * WORD) as usize).next_multiple_of(align))?,
            words: holdings.words(host::WORDS)?,
            tables: holdings.memory(2 * world * WORD as usize)?,
            _holdings: holdings,
        };
        // SAFETY: one word of the window just made.
        unsafe { device.upload(member.window + window::CONSUMED * WORD, &u64::from(start.flag()).to_ne_bytes())? };
        Ok(member)
    }

    /// Tells this rank's kernels where the windows are. Blocks.
    pub fn connect(&self, rank: usize, windows: &[u64]) -> Result<()> {
        let slot = (window::CONTROL_WORDS + rank as u64 * sizes(windows.len()).0) * WORD;
        let slots = windows.iter().map(|window| window + slot);
        let tables: Vec<u8> = slots.chain(windows.iter().copied()).flat_map(u64::to_ne_bytes).collect();
        // SAFETY: as many bytes as were allocated.
        unsafe { self.device.upload(self.tables, &tables) }
    }

    /// Whether `rank` has let go of this window. Blocks.
    pub fn is_let_go(&self, rank: usize) -> Result<bool> {
        let mut word = [0; WORD as usize];
        // SAFETY: one word of the window.
        unsafe { self.device.download(self.window + (window::LET_GO + rank as u64) * WORD, &mut word)? };
        Ok(word != [0; WORD as usize])
    }
}

impl Windows {
    /// Zeroed windows for ranks on these devices, in rank order; a device may appear several times. The first epoch comes
    /// after `start`. `Unsupported` where two GPUs cannot reach each other's memory, or there are too many ranks. Giving
    /// them back waits at most `patience` for steps that are enqueued. Blocks; `Capturing` during a capture.
    pub fn new(devices: &[Arc<CudaDevice>], start: Epoch, patience: Duration) -> Result<Windows> {
        let world = devices.len();
        check_world(world)?;
        for device in devices {
            for peer in devices {
                device.reach(peer)?;
            }
        }
        let members: Result<Vec<Member>> =
            devices.iter().map(|device| Member::new(device, world, start, 1, patience)).collect();
        let members = members?;
        let addresses: Vec<u64> = members.iter().map(|member| member.window).collect();
        for (rank, member) in members.iter().enumerate() {
            member.connect(rank, &addresses)?;
        }
        let fences = devices.iter().map(|device| Fence::new(device, patience)).collect::<Result<_>>()?;
        let places = members.into_iter().map(|member| Place::Here(Arc::new(member))).collect();
        Ok(Windows { places, slot_words: sizes(world).0, far: None, fences, patience })
    }

    /// Windows that are where `places` says, some of them in other processes; `fence` is for the GPU of this rank.
    pub(super) fn over(places: Vec<Place>, far: Far, fence: Fence, patience: Duration) -> Windows {
        let slot_words = sizes(places.len()).0;
        Windows { places, slot_words, far: Some(far), fences: vec![fence], patience }
    }

    /// Which windows of other processes this one has open, in rank order: what these have to know before they let go of a
    /// group that did not come about, in which some open nothing.
    pub fn opened(&self) -> Vec<u8> {
        let is_open = |place: &Place| matches!(place, Place::There(remote) if remote.is_open());
        self.places.iter().map(|place| u8::from(is_open(place))).collect()
    }

    /// The same of every rank. Unless told, this one takes it that all of other processes have its window open.
    pub fn know_opened(&mut self, opened: &[Vec<u8>]) {
        if let Some(far) = &mut self.far {
            far.know_opened(opened);
        }
    }

    /// A window of this process. A rank's own always is.
    fn member(&self, rank: usize) -> &Arc<Member> {
        match &self.places[rank] {
            Place::Here(member) => member,
            Place::There(_) => unreachable!("the window of rank {rank} is in another process"),
        }
    }

    /// Ends the waits of all ranks' kernels with a failure, unless another has. First those of this process: a letter to
    /// another may have to wait for a call of the driver that such a wait holds up.
    pub fn end_all(&self, failure: u64) {
        for (_, member) in self.members() {
            HostWords(&member.words).raise(host::COMMAND, failure);
        }
        for (rank, remote, far) in self.remotes() {
            far.write(Letter::Broken, rank, remote, failure);
        }
    }

    /// Tells all others that `rank` has left. Waits for nothing.
    pub fn leave(&self, rank: usize) {
        for (_, member) in self.members().filter(|&(peer, _)| peer != rank) {
            HostWords(&member.words).add(host::LOST, 1 << rank);
        }
        for (peer, remote, far) in self.remotes() {
            far.write(Letter::Left, peer, remote, 1);
        }
    }

    fn members(&self) -> impl Iterator<Item = (usize, &Member)> {
        self.places.iter().enumerate().filter_map(|(rank, place)| match place {
            Place::Here(member) => Some((rank, &**member)),
            Place::There(_) => None,
        })
    }

    fn remotes(&self) -> impl Iterator<Item = (usize, &Remote, &Far)> {
        self.places.iter().enumerate().filter_map(|(rank, place)| match (place, &self.far) {
            (Place::There(remote), Some(far)) => Some((rank, remote, far)),
            _ => None,
        })
    }

    /// The processes of ranks of other processes, where they can be watched.
    pub(super) fn processes(&self) -> impl Iterator<Item = (usize, &OwnedFd)> {
        self.places.iter().enumerate().filter_map(|(rank, place)| place.process().map(|process| (rank, process)))
    }

    /// Ranks.
    pub fn world(&self) -> usize {
        self.places.len()
    }

    /// Most payload of a rank in one exchange, bytes.
    pub fn capacity(&self) -> usize {
        (self.slot_words - window::HEADER_WORDS) as usize * PAYLOAD
    }

    /// Bytes of a window.
    pub fn bytes(&self) -> usize {
        (sizes(self.world()).1 * WORD) as usize
    }

    /// The GPU of a rank of this process.
    pub fn device(&self, rank: usize) -> &Arc<CudaDevice> {
        &self.member(rank).device
    }

    /// What people call a rank's GPU.
    pub fn label(&self, rank: usize) -> String {
        match &self.places[rank] {
            Place::Here(member) => member.device.device().to_string(),
            Place::There(remote) => remote.label.clone(),
        }
    }

    /// How a rank's words reach a peer.
    pub fn link(&self, rank: usize, peer: usize) -> &'static str {
        match (&self.places[rank], &self.places[peer]) {
            (Place::Here(own), Place::Here(other)) if own.device.device() == other.device.device() => "same device",
            (_, Place::Here(_)) => "peer access",
            (_, Place::There(_)) => "peer access to another process",
        }
    }

    /// The words in host memory of a rank of this process.
    pub fn words(&self, rank: usize) -> HostWords<'_> {
        HostWords(&self.member(rank).words)
    }

    /// Where the attention kernel of a rank leaves the bad data of a step.
    pub fn fault_address(&self, rank: usize) -> u64 {
        self.member(rank).window + window::FAULT * WORD
    }

    /// The last epoch that a rank has read to its end. Blocks.
    pub fn consumed(&self, rank: usize) -> Result<Epoch> {
        let member = self.member(rank);
        let mut word = [0; WORD as usize];
        // SAFETY: one word of the window.
        unsafe { member.device.download(member.window + window::CONSUMED * WORD, &mut word)? };
        Ok(Epoch::from_flag(u64::from_ne_bytes(word) as u32))
    }

    /// What a kernel of `rank` is told; the step's own fields are zero.
    pub fn view(&self, rank: usize, timeout: Duration) -> ExchangeView {
        let (member, world) = (self.member(rank), self.world() as u64);
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

/// `Unsupported` where there are more ranks than a kernel serves.
pub(super) fn check_world(world: usize) -> Result<()> {
    if world <= window::MAX_RANKS {
        return Ok(());
    }
    let wanted = format!("at most {} ranks that exchange on GPUs", window::MAX_RANKS);
    Err(Error::unsupported("n", world, wanted))
}

impl Drop for Windows {
    fn drop(&mut self) {
        let (places, fences) = (std::mem::take(&mut self.places), std::mem::take(&mut self.fences));
        let far = self.far.take();
        // Not kept for the end of a capture, which may be this thread's to bring about.
        let is_shut = fences.iter().any(Fence::is_shut);
        let patience = if is_shut { Duration::ZERO } else { self.patience };
        behind(patience, move || {
            // Freeing a window waits for its own GPU only, and the kernels of any rank may be writing to it. All are waited
            // for, also when a context is lost, whose kernels are dead.
            let passed: Vec<bool> = fences.into_iter().map(|fence| fence.pass().is_ok()).collect();
            if let Some(far) = far {
                far.part(places, !passed.contains(&false));
            }
        });
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

    /// Sets a word that is 0.
    pub fn raise(&self, index: usize, value: u64) {
        // SAFETY: as above.
        unsafe { self.0.raise(index, value) }
    }

    /// Sets bits of a word.
    pub fn add(&self, index: usize, bits: u64) {
        // SAFETY: as above.
        unsafe { self.0.add(index, bits) }
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
