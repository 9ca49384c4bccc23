//! Where the ranks of a group issue their exchanges: which CPU stream, and how many that are not done.
//!
//! Two orders would be open otherwise. Steps of one rank on two streams have none among themselves. Steps of two ranks on one
//! stream have one, but the first waits for the second, which runs after it. So the ranks of this process share a board: those
//! that one call makes are given it, those that come one by one over a transport find it by the token of their communicator.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::comm::Token;
use crate::device::PerProcess;
use crate::error::{Error, ErrorKind, Result};

/// Exchanges under way or enqueued, rank by rank of those that live in this process. All of them take its lock in every step:
/// one of the standard library, which allocates nothing when a thread first waits for it.
pub(super) struct IssueBoard(Mutex<Vec<Issues>>);

/// A communicator whose ranks come one by one: what they know it by, and how many they are.
type Named = (Token, i32);

/// A communicator and its board.
type NamedBoard = (Named, Weak<IssueBoard>);

/// The boards of communicators whose ranks come one by one, as long as a rank of them lives in this process.
static BOARDS: PerProcess<Mutex<Vec<NamedBoard>>> = PerProcess::new();

/// The exchanges of one rank that are under way or enqueued.
#[derive(Clone, Copy, Default)]
struct Issues {
    /// The CPU stream, 0 for the caller's thread.
    stream: usize,
    count: usize,
}

/// An exchange that is issued, for as long as this lives: until it has run, or is refused or dropped.
pub(super) struct Issued {
    board: Arc<IssueBoard>,
    rank: i32,
}

impl IssueBoard {
    /// The board of a group of `world` ranks, of which those of other processes issue nothing here.
    pub fn new(world: i32) -> Arc<IssueBoard> {
        Arc::new(IssueBoard(Mutex::new(vec![Issues::default(); world.max(0) as usize])))
    }

    /// As [`IssueBoard::new`]; the same one for every rank of this process in the communicator that they know by `token`.
    pub fn of(token: &Token, world: i32) -> Arc<IssueBoard> {
        let mut boards = BOARDS.get().lock().unwrap_or_else(PoisonError::into_inner);
        boards.retain(|(_, board)| board.strong_count() > 0);
        let known = boards.iter().find(|(named, _)| *named == (*token, world)).and_then(|(_, board)| board.upgrade());
        known.unwrap_or_else(|| {
            let new = IssueBoard::new(world);
            boards.push(((*token, world), Arc::downgrade(&new)));
            new
        })
    }

    /// Counts an exchange of `rank` as issued on the CPU stream `stream`, 0 for the caller's thread, for as long as the result
    /// lives. `Busy` while exchanges of the rank are issued elsewhere: nothing says which comes first. `InvalidArgument` where
    /// another rank of the group waits on this stream for it to come: neither would ever be done.
    pub fn issue(self: &Arc<Self>, rank: i32, stream: usize) -> Result<Issued> {
        let mut issues = self.issues();
        let own = issues[rank as usize];
        if own.count > 0 && own.stream != stream {
            return Err(busy("stream: found a step on another stream", rank));
        }
        let waits_here = |of: &Issues| stream != 0 && of.count > 0 && of.stream == stream;
        if let Some(other) = (0..issues.len()).find(|&other| other != rank as usize && waits_here(&issues[other])) {
            let found = format!("one on which rank {other} of this communicator waits for rank {rank}");
            return Err(Error::invalid("stream", found, "a stream of its own for each rank of a communicator"));
        }
        issues[rank as usize] = Issues { stream, count: own.count + 1 };
        Ok(Issued { board: Arc::clone(self), rank })
    }

    fn issues(&self) -> MutexGuard<'_, Vec<Issues>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Issued {
    fn drop(&mut self) {
        self.board.issues()[self.rank as usize].count -= 1;
    }
}

/// The error of a call of `rank` that found `what` under way.
pub(super) fn busy(what: &str, rank: i32) -> Error {
    Error::new(ErrorKind::Busy, format!("{what} on rank {rank} under way, wanted one at a time")).with_rank(rank)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_has_one_stream_at_a_time_and_a_stream_one_rank_of_a_group() {
        let board = IssueBoard::new(2);
        let kind = |issued: Result<Issued>| issued.err().map(|error| error.kind());
        let first = board.issue(0, 16).unwrap();
        let second = board.issue(0, 16).unwrap();
        assert_eq!(kind(board.issue(0, 32)), Some(ErrorKind::Busy));
        assert_eq!(kind(board.issue(0, 0)), Some(ErrorKind::Busy));
        assert_eq!(kind(board.issue(1, 16)), Some(ErrorKind::InvalidArgument));
        let other = board.issue(1, 32).unwrap();
        drop(first);
        assert_eq!(kind(board.issue(0, 48)), Some(ErrorKind::Busy));
        drop(second);
        drop(other);
        // Both on the caller's thread: a thread each.
        let callers = [board.issue(0, 0).unwrap(), board.issue(1, 0).unwrap()];
        drop(callers);
        assert_eq!(kind(board.issue(1, 16)), None);
        // A stream of another group counts for itself.
        assert_eq!(kind(IssueBoard::new(2).issue(1, 16)), None);
    }

    #[test]
    fn ranks_that_come_one_by_one_share_the_board_of_their_communicator() {
        let [token, other] = [*b"of one communica", *b"of another commu"];
        let first = IssueBoard::of(&token, 2);
        let same = |board: &Arc<IssueBoard>| Arc::ptr_eq(&first, board);
        assert!(same(&IssueBoard::of(&token, 2)));
        assert!(!same(&IssueBoard::of(&other, 2)) && !same(&IssueBoard::of(&token, 3)));
        let issued = first.issue(0, 16).unwrap();
        assert!(IssueBoard::of(&token, 2).issue(1, 16).is_err());
        // It lives as long as one of its ranks, or what one has issued.
        let known = || {
            BOARDS
                .get()
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
                .any(|(named, board)| *named == (token, 2) && board.strong_count() > 0)
        };
        drop(first);
        assert!(known());
        drop(issued);
        assert!(!known());
    }
}
