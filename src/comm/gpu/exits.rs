//! The thread that ends a rank's waits for ranks whose process has ended.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use super::process::{poll, poll_entry};
use super::windows::Windows;
use crate::device::spawn;
use crate::error::{Error, ErrorKind, Result};
use crate::partial::view::host;

/// The thread, while it lives. Dropping it ends and joins the thread.
pub(super) struct Exits {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Exits {
    /// Watches the processes of all ranks of other processes, for `rank`. None where there is none to watch. `System` where
    /// the system refuses.
    pub fn watch(windows: &Arc<Windows>, rank: usize) -> Result<Option<Exits>> {
        let watched: Result<Vec<(usize, OwnedFd)>> = windows
            .processes()
            .map(|(peer, process)| process.try_clone().map(|file| (peer, file)).map_err(|error| refused(&error)))
            .collect();
        let watched = watched?;
        if watched.is_empty() {
            return Ok(None);
        }
        // SAFETY: the call takes two numbers and gives a new descriptor or -1.
        let file = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if file < 0 {
            return Err(refused(&std::io::Error::last_os_error()));
        }
        // SAFETY: the call just made the descriptor, and nothing else knows it.
        let stop = unsafe { OwnedFd::from_raw_fd(file) };
        let stopped = stop.try_clone().map_err(|error| refused(&error))?;
        // Weak: the windows go with the last rank, not with this thread.
        let windows = Arc::downgrade(windows);
        let thread = spawn("treeattn-exits".into(), move || {
            let mut watched = watched;
            while !watched.is_empty() {
                let mut files: Vec<libc::pollfd> = watched.iter().map(|(_, file)| poll_entry(file)).collect();
                files.push(poll_entry(&stopped));
                poll(&mut files, -1);
                let Some(windows) = windows.upgrade() else { return };
                if files.pop().is_none_or(|stop| stop.revents != 0) {
                    return;
                }
                let mut ended = files.iter().map(|file| file.revents != 0);
                watched.retain(|(peer, _)| {
                    let has_ended = ended.next().unwrap_or(false);
                    if has_ended {
                        windows.words(rank).add(host::LOST, 1 << *peer);
                    }
                    !has_ended
                });
            }
        })?;
        Ok(Some(Exits { stop, thread: Some(thread) }))
    }
}

fn refused(error: &std::io::Error) -> Error {
    Error::new(ErrorKind::System, format!("communicator: the system refused to watch its peers: {error}"))
}

impl Drop for Exits {
    fn drop(&mut self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: the descriptor is open, and eight bytes are read from a local, as an event counter takes them. The counter
        // cannot overflow: this is its only write.
        unsafe { libc::write(self.stop.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
