//! Windows of other processes: notices to their owners, and how windows are released.
//!
//! A peer's kernels may write to a window after its owner's last use of it. So a rank that is done waits for its own GPU,
//! tells every peer that it has released the peer's window, and unmaps that. It keeps its own window until every peer has
//! said the same or its process has ended; for the life of the process if one stays silent. The notice goes through the
//! window itself, before that is unmapped: the owner waits for [`UNMAP_TIME`] after it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::geometry::WORD;
use super::local::LocalWindow;
use super::process;
use crate::device::cuda::{Imported, Staging};
use crate::partial::view::window;

/// How long a rank that is done waits for its peers to release its window, before it leaves that to [`sweep`].
const RELEASE_TIME: Duration = Duration::from_millis(200);
/// How long a peer may take from its notice to unmapping a window. Memory that is freed while another process has it mapped
/// is undefined.
const UNMAP_TIME: Duration = Duration::from_millis(50);

/// A window of another process. In a group that did not come about it may be unmapped; such a window is only released.
pub(super) struct RemoteWindow {
    pub memory: Imported,
    /// The name of its GPU, for messages.
    pub label: String,
    /// Its process, whose end is seen by this; none where the system has no such thing.
    pub process: Option<OwnedFd>,
}

/// Where the window of a rank is.
pub(super) enum Window {
    /// In this process.
    Local(Arc<LocalWindow>),
    /// In another process.
    Remote(RemoteWindow),
}

impl Window {
    /// The address for kernels of this process's rank.
    pub fn address(&self) -> u64 {
        match self {
            Window::Local(window) => window.address,
            Window::Remote(window) => window.memory.address(),
        }
    }

    /// The process that it is in, if that is another one whose end can be seen.
    pub fn process(&self) -> Option<&OwnedFd> {
        match self {
            Window::Local(_) => None,
            Window::Remote(window) => window.process.as_ref(),
        }
    }
}

/// What a rank tells a rank of another process, each at most once.
#[derive(Clone, Copy)]
pub(super) enum Notice {
    /// The group is broken: the word that ends waits, as kernels write it.
    Broken,
    /// This rank has left.
    Left,
    /// This rank has released the window.
    Released,
}

impl Notice {
    const COUNT: usize = 3;

    /// The word of the receiver's window that a notice of `rank` is written to.
    fn word(self, rank: usize) -> u64 {
        match self {
            Notice::Broken => window::BROKEN,
            Notice::Left => window::LEFT + rank as u64,
            Notice::Released => window::LET_GO + rank as u64,
        }
    }

    /// Bytes of staging for the notices to `world` ranks: a word each, so that none is overwritten on its way.
    pub fn staging_bytes(world: usize) -> usize {
        Notice::COUNT * world * WORD as usize
    }
}

/// One rank's ties to ranks of other processes.
pub(super) struct RemotePeers {
    rank: usize,
    world: usize,
    /// Notices on their way.
    staging: Mutex<Staging>,
    /// Whether each rank has this rank's window mapped from another process; none: not known, all may have.
    users: Option<Vec<bool>>,
}

impl RemotePeers {
    /// `staging` has [`Notice::staging_bytes`].
    pub fn new(rank: usize, world: usize, staging: Staging) -> RemotePeers {
        RemotePeers { rank, world, staging: Mutex::new(staging), users: None }
    }

    /// Writes a notice into the window of `peer`. Waits for nothing that runs on the GPU.
    pub fn notify(&self, notice: Notice, peer: usize, window: &RemoteWindow, word: u64) {
        if !window.memory.is_mapped() {
            return;
        }
        let to = window.memory.address() + notice.word(self.rank) * WORD;
        let offset = (notice as usize * self.world + peer) * WORD as usize;
        // Errors are left alone: a peer that is not told ends by its deadline, and a lost context is reported elsewhere.
        // SAFETY: `to` is a control word of a window that is mapped; `release` synchronises the stream before it unmaps.
        let _ = unsafe { self.staging.lock().send(offset, word, to) };
    }

    /// `mapped`: for every rank, which windows of other processes it has mapped. Without it, all may have this rank's.
    pub fn set_users(&mut self, mapped: &[Vec<u8>]) {
        self.users = Some(mapped.iter().map(|mapped| mapped.get(self.rank) != Some(&0)).collect());
    }

    /// Releases the windows of peers and, once they have done the same, this rank's own. Blocks: for threads of the library.
    /// `is_drained`: this rank's kernels are done. If not, its context is lost, and nobody can be told.
    pub fn release(self, windows: Vec<Window>, is_drained: bool) {
        let Some(Window::Local(own)) = windows.get(self.rank) else { return };
        let mut retained = RetainedWindow { window: Arc::clone(own), users: Vec::new(), free_at: None };
        for (peer, window) in windows.iter().enumerate() {
            if let Window::Remote(window) = window
                && is_drained
            {
                self.notify(Notice::Released, peer, window, 1);
            }
        }
        if is_drained {
            // The notices have arrived before the windows are unmapped.
            let _ = self.staging.lock().synchronize();
        }
        for (peer, window) in windows.into_iter().enumerate() {
            let Window::Remote(window) = window else { continue };
            if self.users.as_ref().is_none_or(|users| users.get(peer) != Some(&false)) {
                retained.users.push((peer, window.process));
            }
            match is_drained {
                true => window.memory.close(),
                false => std::mem::forget(window.memory),
            }
        }
        if !is_drained {
            std::mem::forget(retained);
            return;
        }
        let until = Instant::now() + RELEASE_TIME;
        while !retained.is_free() && (retained.free_at.is_some() || Instant::now() < until) {
            std::thread::sleep(Duration::from_millis(2));
        }
        if !retained.is_free() {
            retain(retained);
        }
        // A process that makes no other group sweeps nowhere else.
        sweep();
    }
}

/// Windows of former groups that some peer has not released.
static RETAINED: Mutex<Vec<RetainedWindow>> = Mutex::new(Vec::new());

/// A window of a former group that peers may still write to.
struct RetainedWindow {
    window: Arc<LocalWindow>,
    /// The ranks that have not released it, with their processes.
    users: Vec<(usize, Option<OwnedFd>)>,
    /// The end of [`UNMAP_TIME`], once all of them have, or their processes have ended.
    free_at: Option<Instant>,
}

impl RetainedWindow {
    /// Whether nobody has the window any more.
    fn is_free(&mut self) -> bool {
        if self.users.is_empty() {
            return self.free_at.is_none_or(|free_at| free_at <= Instant::now());
        }
        let window = &self.window;
        self.users.retain(|(peer, process)| {
            let has_ended = process.as_ref().is_some_and(process::has_ended);
            let released = || window.control_word(window::LET_GO + *peer as u64).unwrap_or(0) != 0;
            !has_ended && !released()
        });
        if self.users.is_empty() {
            self.free_at = Some(Instant::now() + UNMAP_TIME);
        }
        false
    }
}

/// Keeps `window` of `rank`, since nobody knows which of the `world` ranks have mapped it.
pub(super) fn retain_unknown(window: Arc<LocalWindow>, rank: usize, world: usize) {
    let users = (0..world).filter(|&peer| peer != rank).map(|peer| (peer, None)).collect();
    retain(RetainedWindow { window, users, free_at: None });
}

fn retain(window: RetainedWindow) {
    RETAINED.lock().push(window);
}

/// Frees the windows of former groups that nobody has any more. Waits for GPUs, without a lock.
pub(super) fn sweep() {
    let mut all = std::mem::take(&mut *RETAINED.lock());
    all.retain_mut(|retained| !retained.is_free());
    if all.iter().any(|retained| retained.free_at.is_some()) {
        std::thread::sleep(UNMAP_TIME);
        all.retain_mut(|retained| !retained.is_free());
    }
    RETAINED.lock().extend(all);
}
