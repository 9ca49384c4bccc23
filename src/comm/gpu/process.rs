//! The end of other processes, seen by file descriptors of theirs.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// A descriptor of a process, by its number; none where the system has no such thing, or no such process.
pub(super) fn open(process: u32) -> Option<OwnedFd> {
    // SAFETY: the call takes two numbers and gives a new descriptor or -1.
    let file = unsafe { libc::syscall(libc::SYS_pidfd_open, process as libc::pid_t, 0) };
    // SAFETY: the call just made the descriptor, and nothing else knows it.
    (file >= 0).then(|| unsafe { OwnedFd::from_raw_fd(file as RawFd) })
}

/// Whether a process has ended.
pub(super) fn has_ended(process: &OwnedFd) -> bool {
    let mut asked = [poll_entry(process)];
    poll(&mut asked, 0);
    asked[0].revents != 0
}

/// An entry for [`poll`] that asks whether `file` can be read; for a process: whether it has ended.
pub(super) fn poll_entry(file: &OwnedFd) -> libc::pollfd {
    libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 }
}

/// Waits until one of `files` can be read, at most so long; -1: for ever. A signal ends it early.
pub(super) fn poll(files: &mut [libc::pollfd], milliseconds: i32) {
    // SAFETY: the slice is borrowed mutably and has as many entries as the call is told of.
    unsafe { libc::poll(files.as_mut_ptr(), files.len() as libc::nfds_t, milliseconds) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_process_is_seen() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = open(child.id()).unwrap();
        assert!(!has_ended(&process));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(has_ended(&process));
        assert!(open(child.id()).is_none());
    }
}
