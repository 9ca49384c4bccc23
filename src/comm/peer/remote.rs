//! Windows of other processes: how they are offered, opened and let go of.
//!
//! A rank tells the others by which handle its window is opened; a rank of the same process is reached directly. A window
//! outlives its owner's last use of it: a peer's kernels may still be writing. So a rank that is done waits for its own
//! GPU, says to every peer that it has let go of the peer's window, and keeps its own until all have said the same of it or
//! are gone; for the life of the process if one is silent.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak, mpsc};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::exits;
use super::windows::{Member, Place, Windows, check_world};
use crate::device::cuda::{CudaDevice, HANDLE_BYTES, Imported, SHARED_ALIGN, Staging};
use crate::device::spawn;
use crate::error::{Error, Result};
use crate::partial::epoch::Epoch;
use crate::partial::view::window;

/// Bytes of a word.
const WORD: u64 = 8;
/// How long a rank that is done waits for the peers' word that they are, too.
const FAREWELL: Duration = Duration::from_millis(200);

/// A window of another process.
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
    patience: Duration,
}

/// What is said to the rank of another process, once each.
#[derive(Clone, Copy)]
pub(super) enum Letter {
    /// A verdict that ends its waits.
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
    member: Arc<Member>,
    text: String,
}

/// Windows that were offered in this process, by number.
static OFFERED: Mutex<Vec<(u64, Weak<Member>)>> = Mutex::new(Vec::new());
/// Windows that some peer has not let go of.
static KEPT: Mutex<Vec<Kept>> = Mutex::new(Vec::new());

impl Offer {
    /// A zeroed window for one of `world` ranks, as [`Windows::new`] makes them.
    pub fn new(device: &Arc<CudaDevice>, world: usize, start: Epoch, patience: Duration) -> Result<Offer> {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        check_world(world)?;
        sweep();
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
        Ok(Offer { member, text })
    }

    /// What the other ranks have to know.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Opens the windows that all ranks offer, in rank order; `rank` is this one. `Unsupported` where one cannot be
    /// reached. Blocks; `Capturing` during a capture.
    pub fn accept(self, rank: usize, texts: &[String], patience: Duration) -> Result<Windows> {
        let device = &self.member.device;
        let letters = Staging::new(device, Letter::COUNT * texts.len() * WORD as usize, patience)?;
        let mut places = Vec::with_capacity(texts.len());
        for (peer, text) in texts.iter().enumerate() {
            let place = match peer == rank {
                true => Place::Here(Arc::clone(&self.member)),
                false => open(device, text)
                    .map_err(|error| Error::new(error.kind(), format!("window of rank {peer}: {}", error.message())))?,
            };
            places.push(place);
        }
        let addresses: Vec<u64> = places.iter().map(Place::address).collect();
        self.member.connect(rank, &addresses)?;
        Ok(Windows::over(places, Far { rank, letters: Mutex::new(letters), world: texts.len(), patience }))
    }
}

/// Opens the window that a peer offers.
fn open(device: &Arc<CudaDevice>, text: &str) -> Result<Place> {
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
        return Ok(Place::Here(member));
    }
    let mut bytes = [0; HANDLE_BYTES];
    if handle.len() != 2 * HANDLE_BYTES || !handle.is_ascii() {
        return Err(garbled());
    }
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&handle[2 * i..][..2], 16).map_err(|_| garbled())?;
    }
    // First its process, so that no other takes its number meanwhile: it waits for this rank.
    let process = exits::open(process);
    Ok(Place::There(Remote { memory: device.import(&bytes)?, label: label.to_string(), process }))
}

/// Tells machines and PID namespaces apart: memory is shared within one only.
fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    format!("{} {}", read("/proc/sys/kernel/random/boot_id").trim(), namespace.display())
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
        let to = remote.memory.address() + letter.word(self.rank) * WORD;
        let offset = (letter as usize * self.world + peer) * WORD as usize;
        // A peer that hears nothing ends by its deadline; a GPU that takes no copy has told its process.
        // SAFETY: a word of a window that is open as long as `self`.
        let _ = unsafe { self.letters.lock().send(offset, word, to) };
    }

    /// Lets go of the peers' windows and, once they have done the same, of the own. Keeps its caller at most the patience;
    /// it may go on behind it.
    pub fn let_go(self, places: Vec<Place>) {
        let patience = self.patience;
        let (done, wait) = mpsc::channel();
        let started = spawn("treeattn-free".into(), move || {
            self.part(places);
            // Nobody listens any more once the patience is over.
            let _ = done.send(());
        });
        if let Ok(thread) = started
            && wait.recv_timeout(patience) != Err(mpsc::RecvTimeoutError::Timeout)
        {
            // It has nothing left to do; a panic in it was its own end.
            let _ = thread.join();
        }
    }

    /// What letting go is; may take as long as this GPU's work does.
    fn part(self, places: Vec<Place>) {
        let own = self.rank;
        let Some(Place::Here(member)) = places.get(own) else { return };
        let member = Arc::clone(member);
        let mut kept = Kept { member: Arc::clone(&member), peers: Vec::new() };
        // A lost context, or a capture: kernels of this rank may yet write, so that nothing is said to anybody.
        let is_done = member.device.drain().is_ok();
        for (peer, place) in places.iter().enumerate() {
            let Place::There(remote) = place else { continue };
            if is_done {
                self.write(Letter::LetGo, peer, remote, 1);
            }
        }
        if is_done {
            // The letters are there before the windows are closed.
            let _ = member.device.drain();
        }
        for (peer, place) in places.into_iter().enumerate() {
            match place {
                Place::Here(_) => {}
                Place::There(remote) if is_done => {
                    drop(remote.memory);
                    kept.peers.push((peer, remote.process));
                }
                Place::There(remote) => {
                    kept.peers.push((peer, remote.process));
                    std::mem::forget(remote.memory);
                }
            }
        }
        if !is_done {
            std::mem::forget(kept);
            return;
        }
        let until = Instant::now() + FAREWELL;
        while !kept.is_free() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
        if !kept.is_free() {
            KEPT.lock().push(kept);
        }
    }
}

/// A window that peers may still write to.
struct Kept {
    member: Arc<Member>,
    /// Those that have not let go of it, and their processes.
    peers: Vec<(usize, Option<OwnedFd>)>,
}

impl Kept {
    /// Whether nobody has the window any more.
    fn is_free(&mut self) -> bool {
        let member = &self.member;
        self.peers.retain(|(peer, process)| {
            let is_gone = process.as_ref().is_some_and(exits::has_exited);
            !is_gone && !member.is_let_go(*peer).unwrap_or(false)
        });
        self.peers.is_empty()
    }
}

/// Frees the windows of former groups that nobody has any more.
fn sweep() {
    KEPT.lock().retain_mut(|kept| !kept.is_free());
}
