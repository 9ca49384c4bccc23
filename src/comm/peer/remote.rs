//! Windows of other processes: how they are offered, opened and let go of.
//!
//! A rank tells the others by which handle its window is opened; a rank of the same process is reached directly. A window
//! outlives its owner's last use of it: a peer's kernels may still be writing. So a rank that is done waits for its own
//! GPU, says to every peer that it has let go of the peer's window, and keeps its own until all have said the same of it or
//! are gone; for the life of the process if one is silent. The word goes through the window, so that it comes before this
//! is closed; hence the owner's [`GRACE`].

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::exits;
use super::windows::{Member, Place, Windows, check_world};
use crate::device::behind;
use crate::device::cuda::{CudaDevice, Fence, HANDLE_BYTES, Imported, SHARED_ALIGN, Staging};
use crate::error::{Error, Result};
use crate::partial::epoch::Epoch;
use crate::partial::view::window;

/// Bytes of a word.
const WORD: u64 = 8;
/// How long a rank that is done waits for the peers' word that they are, too.
const FAREWELL: Duration = Duration::from_millis(200);
/// How long a peer that has let go of a window may take to close it: freed before, what happens is not defined.
const GRACE: Duration = Duration::from_millis(50);

/// A window of another process. It may be shut in a group that did not come about, which is only let go of.
pub(super) struct Remote {
    memory: Imported,
    /// What people call its GPU.
    pub label: String,
    /// By which the end of its process is seen; none where the system has no such thing.
    pub process: Option<OwnedFd>,
}

/// What a rank needs for ranks of other processes.
pub(super) struct Far {
    rank: usize,
    /// Words on their way to other windows, one a rank of each [`Letter`].
    letters: Mutex<Staging>,
    world: usize,
    /// Whether each rank has opened this rank's window from another process; none: not known.
    users: Option<Vec<bool>>,
}

/// What is said to the rank of another process, once each.
#[derive(Clone, Copy)]
pub(super) enum Letter {
    /// A failure that ends its waits.
    Broken,
    /// This rank has left.
    Left,
    /// This rank does not write to the window any more.
    LetGo,
}

impl Letter {
    const COUNT: usize = 3;

    /// The word of the window that takes the letter of `rank`.
    fn word(self, rank: usize) -> u64 {
        match self {
            Letter::Broken => window::BROKEN,
            Letter::Left => window::LEFT + rank as u64,
            Letter::LetGo => window::LET_GO + rank as u64,
        }
    }
}

/// A window that others may open, and what they have to know of it.
pub(crate) struct Offer {
    rank: usize,
    world: usize,
    member: Arc<Member>,
    /// What it takes to let go of what is opened, there before anything is.
    letters: Staging,
    fence: Fence,
    patience: Duration,
    text: String,
}

/// Windows that were offered in this process, by number.
static OFFERED: Mutex<Vec<(u64, Weak<Member>)>> = Mutex::new(Vec::new());
/// Windows that some peer has not let go of.
static KEPT: Mutex<Vec<Kept>> = Mutex::new(Vec::new());

impl Offer {
    /// A zeroed window for `rank` of `world`, as [`Windows::new`] makes them.
    pub fn new(
        device: &Arc<CudaDevice>,
        (rank, world): (usize, usize),
        start: Epoch,
        patience: Duration,
    ) -> Result<Offer> {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        check_world(world)?;
        behind(patience, sweep);
        let letters = Staging::new(device, Letter::COUNT * world * WORD as usize, patience)?;
        let fence = Fence::new(device, patience)?;
        let member = Arc::new(Member::new(device, world, start, SHARED_ALIGN, patience)?);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let handle: String = device.export(member.window)?.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = format!(
            "{}\n{}\n{number}\n{handle}\n{}\n",
            machine(),
            std::process::id(),
            device.device().to_string().replace('\n', " ")
        );
        let mut offered = OFFERED.lock();
        offered.retain(|(_, member)| member.strong_count() > 0);
        offered.push((number, Arc::downgrade(&member)));
        Ok(Offer { rank, world, member, letters, fence, patience, text })
    }

    /// What the other ranks have to know.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Opens the windows that all ranks offer, in rank order. The error is `Unsupported` where one cannot be reached; then
    /// the windows are good for nothing, but must live until no rank can use this one's any more. Blocks; `Capturing`
    /// during a capture.
    pub fn accept(self, texts: &[String]) -> (Windows, Result<()>) {
        let Offer { rank, member, letters, fence, patience, .. } = self;
        let (mut places, mut all) = (Vec::with_capacity(texts.len()), Ok(()));
        for (peer, text) in texts.iter().enumerate() {
            if peer == rank {
                places.push(Place::Here(Arc::clone(&member)));
                continue;
            }
            let mut remote = Remote { memory: Imported::shut(&member.device), label: String::new(), process: None };
            let opened = open(&member.device, text, &mut remote);
            let opened = opened
                .map_err(|error| Error::new(error.kind(), format!("window of rank {peer}: {}", error.message())))
                .map(|here| here.map(Place::Here));
            places.push(match opened {
                Ok(Some(here)) => here,
                Ok(None) => Place::There(remote),
                Err(error) => {
                    all = all.and(Err(error));
                    Place::There(remote)
                }
            });
        }
        let addresses: Vec<u64> = places.iter().map(Place::address).collect();
        let all = all.and_then(|()| member.connect(rank, &addresses));
        let far = Far { rank, letters: Mutex::new(letters), world: texts.len(), users: None };
        (Windows::over(places, far, fence, patience), all)
    }

    /// Keeps the window, since it is not known who has opened it.
    pub fn abandon(self) {
        let peers = (0..self.world).filter(|&peer| peer != self.rank).map(|peer| (peer, None)).collect();
        KEPT.lock().push(Kept { member: self.member, peers, free_at: None });
    }
}

/// Opens the window that a peer offers: that of another process into `remote`.
fn open(device: &Arc<CudaDevice>, text: &str, remote: &mut Remote) -> Result<Option<Arc<Member>>> {
    let lines: Vec<&str> = text.lines().collect();
    let garbled = || Error::unsupported("window", format_args!("{text:?}"), "an offer of this library's version");
    let [place, process, number, handle, label] = lines[..] else { return Err(garbled()) };
    let (Ok(process), Ok(number)) = (process.parse::<u32>(), number.parse::<u64>()) else { return Err(garbled()) };
    if place != machine() {
        let wanted = "ranks of one machine and one PID namespace";
        return Err(Error::unsupported("device", format_args!("{label} of another machine or container"), wanted));
    }
    if process == std::process::id() {
        let known = OFFERED.lock().iter().find(|(known, _)| *known == number).and_then(|(_, member)| member.upgrade());
        let member = known.ok_or_else(garbled)?;
        device.reach(&member.device)?;
        return Ok(Some(member));
    }
    let mut bytes = [0; HANDLE_BYTES];
    if handle.len() != 2 * HANDLE_BYTES || !handle.is_ascii() {
        return Err(garbled());
    }
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&handle[2 * i..][..2], 16).map_err(|_| garbled())?;
    }
    remote.label = label.to_string();
    // First its process, so that no other takes its number meanwhile: it waits for this rank.
    remote.process = exits::open(process);
    remote.memory = device.import(&bytes)?;
    Ok(None)
}

/// Tells machines and PID namespaces apart: memory is shared within one only.
fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    format!("{} {}", read("/proc/sys/kernel/random/boot_id").trim(), namespace.display())
}

impl Remote {
    /// Whether this process can reach it.
    pub fn is_open(&self) -> bool {
        self.memory.is_open()
    }
}

impl Place {
    /// Where this process has the window.
    fn address(&self) -> u64 {
        match self {
            Place::Here(member) => member.window,
            Place::There(remote) => remote.memory.address(),
        }
    }

    /// The process that it is in, if that is another one and can be watched.
    pub fn process(&self) -> Option<&OwnedFd> {
        match self {
            Place::Here(_) => None,
            Place::There(remote) => remote.process.as_ref(),
        }
    }
}

impl Far {
    /// Writes a letter into a peer's window. Waits for nothing that runs on the GPU.
    pub fn write(&self, letter: Letter, peer: usize, remote: &Remote, word: u64) {
        if !remote.is_open() {
            return;
        }
        let to = remote.memory.address() + letter.word(self.rank) * WORD;
        let offset = (letter as usize * self.world + peer) * WORD as usize;
        // A peer that hears nothing ends by its deadline; a GPU that takes no copy has told its process.
        // SAFETY: a word of a window that is open as long as `self`.
        let _ = unsafe { self.letters.lock().send(offset, word, to) };
    }

    /// See [`Windows::know_opened`].
    pub fn know_opened(&mut self, opened: &[Vec<u8>]) {
        self.users = Some(opened.iter().map(|opened| opened.get(self.rank) != Some(&0)).collect());
    }

    /// Lets go of the peers' windows and, once they have done the same, of the own; on a thread of the library. `is_done`:
    /// this rank's kernels are. If not, the context is lost: nothing can be said to anybody.
    pub fn part(self, places: Vec<Place>, is_done: bool) {
        let own = self.rank;
        let Some(Place::Here(member)) = places.get(own) else { return };
        let mut kept = Kept { member: Arc::clone(member), peers: Vec::new(), free_at: None };
        for (peer, place) in places.iter().enumerate() {
            if let Place::There(remote) = place
                && is_done
            {
                self.write(Letter::LetGo, peer, remote, 1);
            }
        }
        if is_done {
            // The letters are there before the windows are closed.
            let _ = self.letters.lock().settle();
        }
        for (peer, place) in places.into_iter().enumerate() {
            let Place::There(remote) = place else { continue };
            if self.users.as_ref().is_none_or(|users| users.get(peer) != Some(&false)) {
                kept.peers.push((peer, remote.process));
            }
            match is_done {
                true => remote.memory.close(),
                false => std::mem::forget(remote.memory),
            }
        }
        if !is_done {
            std::mem::forget(kept);
            return;
        }
        let until = Instant::now() + FAREWELL;
        while !kept.is_free() && (kept.free_at.is_some() || Instant::now() < until) {
            std::thread::sleep(Duration::from_millis(2));
        }
        if !kept.is_free() {
            KEPT.lock().push(kept);
        }
        // A process that makes no other group sweeps nowhere else.
        sweep();
    }
}

/// A window that peers may still write to.
struct Kept {
    member: Arc<Member>,
    /// Those that have not let go of it, and their processes.
    peers: Vec<(usize, Option<OwnedFd>)>,
    /// The end of [`GRACE`], once all of them have, or are gone.
    free_at: Option<Instant>,
}

impl Kept {
    /// Whether nobody has the window any more.
    fn is_free(&mut self) -> bool {
        if self.peers.is_empty() {
            return self.free_at.is_none_or(|free_at| free_at <= Instant::now());
        }
        let member = &self.member;
        self.peers.retain(|(peer, process)| {
            let is_gone = process.as_ref().is_some_and(exits::has_exited);
            !is_gone && !member.is_let_go(*peer).unwrap_or(false)
        });
        if self.peers.is_empty() {
            self.free_at = Some(Instant::now() + GRACE);
        }
        false
    }
}

/// Frees the windows of former groups that nobody has any more. Waits for GPUs, but lets nobody wait for it.
fn sweep() {
    let mut all = std::mem::take(&mut *KEPT.lock());
    all.retain_mut(|kept| !kept.is_free());
    if all.iter().any(|kept| kept.free_at.is_some()) {
        std::thread::sleep(GRACE);
        all.retain_mut(|kept| !kept.is_free());
    }
    KEPT.lock().extend(all);
}
