//! A window of this process, and the words in host memory beside it.

use std::sync::Arc;
use std::time::Duration;

use super::geometry::{WORD, slot_words, window_bytes};
use crate::device::cuda::{Allocations, CudaDevice, MappedWords};
use crate::error::Result;
use crate::partial::epoch::{Epoch, LAUNCH_SHIFT, SLOTS};
use crate::partial::view::{host, window};

/// The window of one rank: device memory that all ranks push into. Any thread may use it.
pub(super) struct LocalWindow {
    pub device: Arc<CudaDevice>,
    /// The device's address of the window.
    pub address: u64,
    /// The device's address of two tables: of this rank's slots as [`ExchangeView::slots`] says, then of every window.
    ///
    /// [`ExchangeView::slots`]: crate::partial::ExchangeView::slots
    pub tables: u64,
    words: MappedWords,
    _allocations: Allocations,
}

impl LocalWindow {
    /// A zeroed window for one of `world` ranks; the first epoch comes after `start`. Its size is a multiple of `align`.
    /// Dropping it waits at most `timeout` for steps that are enqueued. Blocks; `Capturing` during a capture.
    pub fn new(
        device: &Arc<CudaDevice>,
        world: usize,
        start: Epoch,
        align: usize,
        timeout: Duration,
    ) -> Result<LocalWindow> {
        let mut allocations = Allocations::new(device, timeout);
        let new = LocalWindow {
            device: Arc::clone(device),
            address: allocations.memory(window_bytes(world).next_multiple_of(align))?,
            tables: allocations.memory((SLOTS + 1) * world * WORD as usize)?,
            words: allocations.words(host::WORDS)?,
            _allocations: allocations,
        };
        // SAFETY: nobody else knows the window yet.
        unsafe { new.restart(start) }?;
        Ok(new)
    }

    /// Makes the epoch after `start` the next one. Blocks.
    ///
    /// # Safety
    /// No step of the rank is enqueued.
    pub unsafe fn restart(&self, start: Epoch) -> Result<()> {
        let consumed = u64::from(start.flag()) << LAUNCH_SHIFT;
        // SAFETY: CONSUMED lies among the control words of the window, which lives as long as `self`; the rank's kernels alone
        // read and write it, and none is enqueued, as this function was promised.
        unsafe { self.device.upload(self.address + window::CONSUMED * WORD, &consumed.to_ne_bytes()) }
    }

    /// Tells the kernels of `rank`, which owns this window, where the windows of all ranks are. Blocks.
    ///
    /// # Safety
    /// No step of the rank was enqueued yet.
    pub unsafe fn connect(&self, rank: usize, windows: &[u64]) -> Result<()> {
        let (world, words) = (windows.len() as u64, slot_words(windows.len()));
        let slot =
            |window: u64, parity: u64| window + (window::CONTROL_WORDS + (parity * world + rank as u64) * words) * WORD;
        let (before, after) = windows.split_at(rank + 1);
        let slots =
            after.iter().chain(before).flat_map(|&window| (0..SLOTS as u64).map(move |parity| slot(window, parity)));
        let tables: Vec<u8> = slots.chain(windows.iter().copied()).flat_map(u64::to_ne_bytes).collect();
        // SAFETY: `new` allocated these three addresses a rank, `windows` has one a rank, and no kernel reads
        // them yet, as this function was promised.
        unsafe { self.device.upload(self.tables, &tables) }
    }

    /// A control word of the window. Blocks.
    pub fn control_word(&self, index: u64) -> Result<u64> {
        assert!(index < window::CONTROL_WORDS);
        let mut word = [0; WORD as usize];
        // SAFETY: the word is inside the window, which lives as long as `self`. A kernel may write it meanwhile, as one
        // aligned word: the copy has the old value or the new one.
        unsafe { self.device.download(self.address + index * WORD, &mut word)? };
        Ok(u64::from_ne_bytes(word))
    }

    /// The words of the rank in host memory.
    pub fn words(&self) -> HostWords<'_> {
        HostWords(&self.words)
    }
}

/// A rank's words in mapped host memory, borrowed from its window.
#[derive(Clone, Copy)]
pub(crate) struct HostWords<'a>(&'a MappedWords);

impl HostWords<'_> {
    /// The device's address of the first word.
    pub(super) fn address(&self) -> u64 {
        self.0.address()
    }

    /// The value of a word.
    pub fn load(&self, index: usize) -> u64 {
        // SAFETY: the allocations are a field of the window that `self` borrows from.
        unsafe { self.0.load(index) }
    }

    /// The value of a word that the device writes, if it has not been taken yet, else 0; word `taken` says what has.
    pub fn take_told(&self, index: usize, taken: usize) -> u64 {
        // SAFETY: as in `load`.
        unsafe { self.0.take_told(index, taken) }
    }

    /// Sets a word that is 0.
    pub fn raise(&self, index: usize, value: u64) {
        // SAFETY: as in `load`.
        unsafe { self.0.raise(index, value) }
    }

    /// Sets bits of a word.
    pub fn add(&self, index: usize, bits: u64) {
        // SAFETY: as in `load`.
        unsafe { self.0.add(index, bits) }
    }
}
