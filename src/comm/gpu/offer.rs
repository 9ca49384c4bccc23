//! How ranks of several processes open each other's windows.
//!
//! A rank offers its window as a text: machine, process, number within the process, driver's handle, name of the GPU. Ranks
//! of other processes map it by the handle; ranks of the same process find it by its number.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;

use super::geometry::check_world;
use super::local::LocalWindow;
use super::process;
use super::remote::{Notice, RemotePeers, RemoteWindow, Window, retain_unknown, sweep};
use super::windows::Windows;
use crate::device::cuda::{CudaDevice, DeviceDrain, HANDLE_BYTES, Imported, SHARED_ALIGN, Staging};
use crate::device::run_bounded;
use crate::error::{Error, Result};
use crate::partial::epoch::Epoch;

/// A window that other ranks may open, and what they have to know of it.
pub(crate) struct Offer {
    rank: usize,
    world: usize,
    window: Arc<LocalWindow>,
    /// For notices to ranks of other processes. Made before anything is mapped, as `drain`: releasing must not fail.
    staging: Staging,
    drain: DeviceDrain,
    timeout: Duration,
    text: String,
}

/// Windows that were offered in this process, by number.
static OFFERED: Mutex<Vec<(u64, Weak<LocalWindow>)>> = Mutex::new(Vec::new());

impl Offer {
    /// A zeroed window for `rank` of `world`; the first epoch comes after `start`. `Unsupported` where there are too many
    /// ranks. Giving it back waits at most `timeout` for steps that are enqueued. Blocks; `Capturing` during a capture.
    pub fn new(
        device: &Arc<CudaDevice>,
        (rank, world): (usize, usize),
        start: Epoch,
        timeout: Duration,
    ) -> Result<Offer> {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        check_world(world)?;
        run_bounded("treeattn-free", timeout, sweep);
        let staging = Staging::new(device, Notice::staging_bytes(world), timeout)?;
        let drain = DeviceDrain::new(device, timeout)?;
        let window = Arc::new(LocalWindow::new(device, world, start, SHARED_ALIGN, timeout)?);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let handle: String = device.export(window.address)?.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = format!(
            "{}\n{}\n{number}\n{handle}\n{}\n",
            machine(),
            std::process::id(),
            device.device().to_string().replace('\n', " ")
        );
        let mut offered = OFFERED.lock();
        offered.retain(|(_, window)| window.strong_count() > 0);
        offered.push((number, Arc::downgrade(&window)));
        Ok(Offer { rank, world, window, staging, drain, timeout, text })
    }

    /// The text that the other ranks need.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Opens the windows that all ranks offer, in rank order. The error is `Unsupported` where one cannot be reached. The
    /// windows then serve no exchange, but must live until no rank can use this one's any more. Blocks; `Capturing` during
    /// a capture.
    pub fn accept(self, texts: &[String]) -> (Windows, Result<()>) {
        let Offer { rank, window: own, staging, drain, timeout, .. } = self;
        let (mut windows, mut all) = (Vec::with_capacity(texts.len()), Ok(()));
        for (peer, text) in texts.iter().enumerate() {
            if peer == rank {
                windows.push(Window::Local(Arc::clone(&own)));
                continue;
            }
            let none = Imported::none(&own.device);
            let mut remote = RemoteWindow { memory: none, label: String::new(), process: None };
            windows.push(match open(&own.device, text, &mut remote) {
                Ok(Some(local)) => Window::Local(local),
                Ok(None) => Window::Remote(remote),
                Err(error) => {
                    let message = format!("window of rank {peer}: {}", error.message());
                    all = all.and(Err(Error::new(error.kind(), message)));
                    Window::Remote(remote)
                }
            });
        }
        let addresses: Vec<u64> = windows.iter().map(Window::address).collect();
        // SAFETY: the window has no views before this function returns, so that no step of its rank is enqueued.
        let all = all.and_then(|()| unsafe { own.connect(rank, &addresses) });
        let remote = RemotePeers::new(rank, texts.len(), staging);
        (Windows::with_remote(windows, remote, drain, timeout), all)
    }

    /// Retains the window: the other ranks may have opened it, and none has said so.
    pub fn abandon(self) {
        retain_unknown(self.window, self.rank, self.world);
    }
}

/// Opens the window that a peer offers. One of this process is returned; one of another is mapped into `remote`.
fn open(device: &Arc<CudaDevice>, text: &str, remote: &mut RemoteWindow) -> Result<Option<Arc<LocalWindow>>> {
    let lines: Vec<&str> = text.lines().collect();
    let garbled = || Error::unsupported("window", format_args!("{text:?}"), "an offer of this library's version");
    let [its_machine, process, number, handle, label] = lines[..] else { return Err(garbled()) };
    let (Ok(process), Ok(number)) = (process.parse::<u32>(), number.parse::<u64>()) else { return Err(garbled()) };
    if its_machine != machine() {
        let wanted = "ranks of one machine and one PID namespace";
        return Err(Error::unsupported("device", format_args!("{label} of another machine or container"), wanted));
    }
    if process == std::process::id() {
        let known = OFFERED.lock().iter().find(|(known, _)| *known == number).and_then(|(_, window)| window.upgrade());
        let window = known.ok_or_else(garbled)?;
        device.enable_access_to(&window.device)?;
        return Ok(Some(window));
    }
    let mut bytes = [0; HANDLE_BYTES];
    if handle.len() != 2 * HANDLE_BYTES || !handle.is_ascii() {
        return Err(garbled());
    }
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&handle[2 * i..][..2], 16).map_err(|_| garbled())?;
    }
    remote.label = label.to_string();
    // The process waits for this rank now. So it lives, and its number is not another's yet.
    remote.process = process::open(process);
    remote.memory = device.import(&bytes)?;
    Ok(None)
}

/// Tells machines and PID namespaces apart: memory can be shared within one only.
fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    format!("{} {}", read("/proc/sys/kernel/random/boot_id").trim(), namespace.display())
}
