//! The windows of a group of GPUs: one a rank, in this process or in another.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::geometry::{PAYLOAD, WORD, check_world, slot_words, window_bytes};
use super::local::{HostWords, LocalWindow};
use super::remote::{Notice, RemotePeers, RemoteWindow, Window};
use crate::device::cuda::{CudaDevice, DeviceDrain};
use crate::device::run_bounded;
use crate::error::Result;
use crate::partial::ExchangeView;
use crate::partial::epoch::{Epoch, LAUNCH_SHIFT, SLOTS};
use crate::partial::view::{host, window};

/// The windows of a group of GPUs. Those of this process are freed with the last of its ranks and after all of its kernels,
/// so that no rank writes to memory that is gone; [`super::remote`] says how ranks of several processes release each other's.
/// Any thread may use them.
pub(crate) struct Windows {
    /// In rank order.
    windows: Vec<Window>,
    slot_words: u64,
    /// Ties to ranks of other processes; none where there are none.
    remote: Option<RemotePeers>,
    /// For the GPUs of the ranks of this process, whose kernels write to these windows.
    drains: Vec<DeviceDrain>,
    timeout: Duration,
}

impl Windows {
    /// Zeroed windows for ranks on these devices, in rank order; a device may appear several times. The first epoch comes
    /// after `start`. `Unsupported` where two GPUs cannot access each other's memory, or where there are too many ranks.
    /// Dropping them waits at most `timeout` for steps that are enqueued. Blocks; `Capturing` during a capture.
    pub fn new(devices: &[Arc<CudaDevice>], start: Epoch, timeout: Duration) -> Result<Windows> {
        let world = devices.len();
        check_world(world)?;
        for device in devices {
            for peer in devices {
                device.enable_access_to(peer)?;
            }
        }
        let local: Vec<LocalWindow> =
            devices.iter().map(|device| LocalWindow::new(device, world, start, 1, timeout)).collect::<Result<_>>()?;
        let addresses: Vec<u64> = local.iter().map(|window| window.address).collect();
        for (rank, window) in local.iter().enumerate() {
            // SAFETY: the windows were made just now; nobody has them who could enqueue a step.
            unsafe { window.connect(rank, &addresses) }?;
        }
        let drains = devices.iter().map(|device| DeviceDrain::new(device, timeout)).collect::<Result<_>>()?;
        let windows = local.into_iter().map(|window| Window::Local(Arc::new(window))).collect();
        Ok(Windows { windows, slot_words: slot_words(world), remote: None, drains, timeout })
    }

    /// Windows of which some are in other processes; `drain` is for the GPU of this rank.
    pub(super) fn with_remote(
        windows: Vec<Window>,
        remote: RemotePeers,
        drain: DeviceDrain,
        timeout: Duration,
    ) -> Windows {
        let slot_words = slot_words(windows.len());
        Windows { windows, slot_words, remote: Some(remote), drains: vec![drain], timeout }
    }

    /// Which windows of other processes this one has mapped, in rank order: 1 or 0. The owners must know before they release
    /// a group that did not come about, in which some ranks map nothing.
    pub fn mapped(&self) -> Vec<u8> {
        let is_mapped = |window: &Window| matches!(window, Window::Remote(remote) if remote.memory.is_mapped());
        self.windows.iter().map(|window| u8::from(is_mapped(window))).collect()
    }

    /// [`Windows::mapped`] of every rank. Without it, all ranks of other processes count as having this rank's window mapped.
    pub fn set_mapped(&mut self, mapped: &[Vec<u8>]) {
        if let Some(remote) = &mut self.remote {
            remote.set_users(mapped);
        }
    }

    /// The window of a rank of this process. Panics for a rank of another.
    fn local(&self, rank: usize) -> &Arc<LocalWindow> {
        match &self.windows[rank] {
            Window::Local(window) => window,
            Window::Remote(_) => unreachable!("the window of rank {rank} is in another process"),
        }
    }

    /// Ends the waits of all ranks' kernels with the failure in `word`, unless another came first. Those of this process
    /// first: a notice to another process may have to wait for a call of the driver that such a wait holds up.
    pub fn end_all(&self, word: u64) {
        for (_, window) in self.locals() {
            window.words().raise(host::COMMAND, word);
        }
        for (rank, window, remote) in self.remotes() {
            remote.notify(Notice::Broken, rank, window, word);
        }
    }

    /// Tells all others that `rank` has left, and ends the waits of its own kernels with a failure. Waits for nothing.
    pub fn leave(&self, rank: usize, failure: u64) {
        self.local(rank).words().raise(host::COMMAND, failure);
        for (_, window) in self.locals().filter(|&(peer, _)| peer != rank) {
            window.words().add(host::LOST, 1 << rank);
        }
        for (peer, window, remote) in self.remotes() {
            remote.notify(Notice::Left, peer, window, 1);
        }
    }

    fn locals(&self) -> impl Iterator<Item = (usize, &LocalWindow)> {
        self.windows.iter().enumerate().filter_map(|(rank, window)| match window {
            Window::Local(window) => Some((rank, &**window)),
            Window::Remote(_) => None,
        })
    }

    fn remotes(&self) -> impl Iterator<Item = (usize, &RemoteWindow, &RemotePeers)> {
        self.windows.iter().enumerate().filter_map(|(rank, window)| match (window, &self.remote) {
            (Window::Remote(window), Some(remote)) => Some((rank, window, remote)),
            _ => None,
        })
    }

    /// The processes of ranks of other processes, where their end can be seen.
    pub(super) fn processes(&self) -> impl Iterator<Item = (usize, &OwnedFd)> {
        self.windows.iter().enumerate().filter_map(|(rank, window)| window.process().map(|process| (rank, process)))
    }

    /// Ranks.
    pub fn world(&self) -> usize {
        self.windows.len()
    }

    /// Most payload of a rank in one exchange, bytes.
    pub fn capacity(&self) -> usize {
        (self.slot_words - window::HEADER_WORDS) as usize * PAYLOAD
    }

    /// Bytes of a window.
    pub fn bytes(&self) -> usize {
        window_bytes(self.world())
    }

    /// The GPU of a rank of this process.
    pub fn device(&self, rank: usize) -> &Arc<CudaDevice> {
        &self.local(rank).device
    }

    /// The name of a rank's GPU, for messages.
    pub fn label(&self, rank: usize) -> String {
        match &self.windows[rank] {
            Window::Local(window) => window.device.device().to_string(),
            Window::Remote(window) => window.label.clone(),
        }
    }

    /// How a rank's words reach a peer, for descriptions.
    pub fn link(&self, rank: usize, peer: usize) -> &'static str {
        match (&self.windows[rank], &self.windows[peer]) {
            (Window::Local(own), Window::Local(other)) if own.device.device() == other.device.device() => "same device",
            (_, Window::Local(_)) => "peer access",
            (_, Window::Remote(_)) => "peer access to another process",
        }
    }

    /// The words in host memory of a rank of this process.
    pub fn words(&self, rank: usize) -> HostWords<'_> {
        self.local(rank).words()
    }

    /// The device's address where the attention kernel of a rank leaves the bad data of a step whose partial it leaves in
    /// memory.
    pub fn fault_address(&self, rank: usize) -> u64 {
        self.local(rank).address + window::STEP_FAULT * WORD
    }

    /// Has the next epoch of a rank of this process come after `start`. Blocks.
    ///
    /// # Safety
    /// No step of the rank is enqueued.
    pub unsafe fn restart(&self, rank: usize, start: Epoch) -> Result<()> {
        // SAFETY: this function was promised the same.
        unsafe { self.local(rank).restart(start) }
    }

    /// The last epoch that a rank of this process has read to its end. Blocks.
    pub fn consumed(&self, rank: usize) -> Result<Epoch> {
        Ok(Epoch::after(self.local(rank).control_word(window::CONSUMED)? >> LAUNCH_SHIFT))
    }

    /// What a kernel of `rank` is told of the windows; the step's own fields are zero.
    pub fn view(&self, rank: usize, timeout: Duration) -> ExchangeView {
        let (own, world) = (self.local(rank), self.world() as u64);
        ExchangeView {
            slots: own.tables,
            bases: own.tables + SLOTS as u64 * world * WORD,
            window: own.address,
            host: own.words().address(),
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

impl Drop for Windows {
    fn drop(&mut self) {
        let (windows, drains) = (std::mem::take(&mut self.windows), std::mem::take(&mut self.drains));
        let remote = self.remote.take();
        // A capture may be this thread's to end: it is not kept for that.
        let is_held_up = drains.iter().any(DeviceDrain::is_held_up);
        let timeout = if is_held_up { Duration::ZERO } else { self.timeout };
        run_bounded("treeattn-free", timeout, move || {
            // Freeing a window waits for its own GPU only, but kernels of every rank may be writing to it. So all GPUs are
            // waited for, also where a context is lost: its kernels are dead.
            let drained: Vec<bool> = drains.into_iter().map(|drain| drain.wait().is_ok()).collect();
            if let Some(remote) = remote {
                remote.release(windows, !drained.contains(&false));
            }
        });
    }
}
