//! Sees the processes of peers end.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use super::windows::Windows;
use crate::device::spawn;
use crate::error::{Error, ErrorKind, Result};
use crate::partial::view::host;

/// A process by its number, to watch; none where the system has no such thing, or it is not there.
pub(super) fn open(process: u32) -> Option<OwnedFd> {
    // SAFETY: a plain system call, which gives a new file descriptor or -1.
    let file = unsafe { libc::syscall(libc::SYS_pidfd_open, process as libc::pid_t, 0) };
    // SAFETY: new, and nobody else's.
    (file >= 0).then(|| unsafe { OwnedFd::from_raw_fd(file as RawFd) })
}

/// Whether a process has ended.
pub(super) fn has_exited(process: &OwnedFd) -> bool {
    let mut asked = [entry(process)];
    poll(&mut asked, 0);
    asked[0].revents != 0
}

fn entry(file: &OwnedFd) -> libc::pollfd {
    libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 }
}

fn poll(files: &mut [libc::pollfd], milliseconds: i32) {
    // SAFETY: as many entries as are said.
    unsafe { libc::poll(files.as_mut_ptr(), files.len() as libc::nfds_t, milliseconds) };
}

/// The thread that ends this rank's waits for peers whose process is gone. Over when dropped.
pub(super) struct Exits {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Exits {
    /// Watches the processes of all ranks of other processes, for `rank`. None where there is none to watch.
    pub fn watch(windows: &Arc<Windows>, rank: usize) -> Result<Option<Exits>> {
        let watched: Result<Vec<(usize, OwnedFd)>> = windows
            .processes()
            .map(|(peer, process)| process.try_clone().map(|file| (peer, file)).map_err(|error| refused(&error)))
            .collect();
        let watched = watched?;
        if watched.is_empty() {
            return Ok(None);
        }
        // SAFETY: a plain system call, which gives a new file descriptor or -1.
        let file = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if file < 0 {
            return Err(refused(&std::io::Error::last_os_error()));
        }
        // SAFETY: new, and nobody else's.
        let stop = unsafe { OwnedFd::from_raw_fd(file) };
        let ours = stop.try_clone().map_err(|error| refused(&error))?;
        let windows = Arc::downgrade(windows);
        let thread = spawn("treeattn-exits".into(), move || {
            let mut watched = watched;
            while !watched.is_empty() {
                let mut files: Vec<libc::pollfd> = watched.iter().map(|(_, file)| entry(file)).collect();
                files.push(entry(&ours));
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
        // SAFETY: eight bytes, as an event counter takes them.
        unsafe { libc::write(self.stop.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_process_is_seen() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = open(child.id()).unwrap();
        assert!(!has_exited(&process));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(has_exited(&process));
        assert!(open(child.id()).is_none());
    }
}
