//! What ranks say when they fail together: who is missing, who is out of step, who gave up.

use std::fmt::Write;
use std::time::Duration;

use super::call_word::CallWord;
use crate::attention::majority::odd_ranks;
use crate::error::{Error, ErrorKind};

/// Ranks `missing` did not come to `what` before the deadline called `field`.
pub(super) fn timeout(what: &str, missing: &[usize], field: &str, timeout: Duration) -> Error {
    let message =
        format!("{what}: {} did not come within {timeout:?} ({field}); the communicator is broken", ranks(missing));
    let error = Error::new(ErrorKind::Timeout, message);
    missing.first().map_or(error.clone(), |&rank| error.with_rank(rank as i32))
}

/// The same as `rank` itself is told, one of the missing.
pub(super) fn came_late(rank: usize, timeout: &Error) -> Error {
    let message = format!("this rank, {rank}, came too late: {}", timeout.message());
    let late = Error::new(timeout.kind(), message);
    timeout.rank().map_or(late.clone(), |first| late.with_rank(first))
}

/// `rank` left the group while `what` needed it.
pub(crate) fn peer_lost(what: &str, rank: usize) -> Error {
    let message = format!("{what}: rank {rank} has left the communicator, which is broken");
    Error::new(ErrorKind::PeerLost, message).with_rank(rank as i32)
}

/// `rank` itself left the group.
pub(crate) fn left(rank: usize) -> Error {
    let message = format!("communicator: rank {rank} has left it");
    Error::new(ErrorKind::ParentDestroyed, message).with_rank(rank as i32)
}

/// `rank` aborted.
pub(super) fn aborted(rank: usize) -> Error {
    Error::new(ErrorKind::Aborted, format!("the communicator was aborted by rank {rank}")).with_rank(rank as i32)
}

/// `rank` could not go on, with `error`; an error that is already about a rank is passed on as it is.
pub(super) fn failed(rank: usize, error: &Error) -> Error {
    if error.rank().is_some() {
        return error.clone();
    }
    let message = format!("rank {rank} broke the communicator: {}", error.message());
    Error::new(error.kind(), message).with_rank(rank as i32)
}

/// The rank to blame for different fingerprints in `what`, as rank `me` sees it: the first outside the largest
/// party; where no party is the largest, the first that differs from me. None where all agree. `step` gives a rank's
/// fingerprint, and what it took the step for.
pub(super) fn desync(
    what: impl Fn() -> String,
    me: usize,
    world: usize,
    step: impl Fn(usize) -> (u64, CallWord),
) -> Option<Error> {
    let odd = odd_ranks(world, me, |rank| step(rank).0);
    let first = *odd.first()?;
    let rest: Vec<usize> = (0..world).filter(|rank| !odd.contains(rank)).collect();
    let calls = rest.first().and_then(|&right| told(step(first).1, first, step(right).1, right));
    let other = if calls.is_some() { "another call" } else { "another call (or another batch, query_tokens or plan)" };
    let message = format!(
        "{}: {} issued {other} than {}{}; the communicator is broken",
        what(),
        ranks(&odd),
        ranks(&rest),
        calls.unwrap_or_default()
    );
    Some(Error::new(ErrorKind::Desync, message).with_rank(first as i32))
}

/// What two ranks issued, for the middle of a message, where both have told and it differs.
fn told(found: CallWord, by: usize, wanted: CallWord, of: usize) -> Option<String> {
    let is_told = found != wanted && found != CallWord::default() && wanted != CallWord::default();
    is_told.then(|| format!(": found {found} (rank {by}), wanted {wanted} (rank {of})"))
}

/// `rank` is out of step in `what`, as the ranks have told each other.
pub(super) fn out_of_step(what: &str, rank: usize) -> Error {
    let message = format!(
        "{what}: rank {rank} issued another call (or another batch, query_tokens or plan) than most; the communicator is \
         broken"
    );
    Error::new(ErrorKind::Desync, message).with_rank(rank as i32)
}

/// A rank sent `me` something else than `what` wants. With what each of them took the step for.
pub(super) fn differs(what: &str, (me, mine): (usize, CallWord), (peer, theirs): (usize, CallWord)) -> Error {
    let calls = told(theirs, peer, mine, me).unwrap_or_default();
    let message =
        format!("{what}: rank {peer} sent another message than rank {me} waits for{calls}; the communicator is broken");
    Error::new(ErrorKind::Desync, message).with_rank(peer as i32)
}

/// "rank 3", "ranks 1, 2 and 5", or "a rank" where none is known.
fn ranks(list: &[usize]) -> String {
    let mut text = String::from(match list.len() {
        0 => "a rank",
        1 => "rank ",
        _ => "ranks ",
    });
    for (i, rank) in list.iter().enumerate() {
        let separator = match i {
            0 => "",
            _ if i + 1 == list.len() => " and ",
            _ => ", ",
        };
        // Writing to a string cannot fail.
        let _ = write!(text, "{separator}{rank}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_minority_is_blamed_and_a_tie_names_the_peer() {
        let blame = |me: usize, prints: &[u64]| {
            desync(|| "round 9".into(), me, prints.len(), |r| (prints[r], CallWord::default()))
                .map(|e| e.rank().unwrap())
        };
        assert_eq!(blame(0, &[5, 5, 5]), None);
        for me in 0..3 {
            assert_eq!(blame(me, &[5, 6, 5]), Some(1));
            assert_eq!(blame(me, &[6, 5, 5]), Some(0));
        }
        assert_eq!((blame(0, &[5, 6]), blame(1, &[5, 6])), (Some(1), Some(0)));
        assert_eq!((blame(0, &[5, 6, 5, 6]), blame(3, &[5, 6, 5, 6])), (Some(1), Some(0)));
        assert_eq!(blame(2, &[1, 2, 3]), Some(0));
        let nothing = |r: usize| ([1, 2, 1, 3][r], CallWord::default());
        let error = desync(|| "round 9".into(), 0, 4, nothing).unwrap();
        let wanted = "round 9: ranks 1 and 3 issued another call (or another batch, query_tokens or plan) than ranks 0 and 2; the \
                      communicator is broken";
        assert_eq!(error.message(), wanted);
    }

    #[test]
    fn what_was_issued_is_told_where_ranks_have_said_so() {
        let step = |r: usize| ([1, 2, 1][r], CallWord::decode(1, [4, 5, 4][r], 6));
        assert_eq!(
            desync(|| "step 9".into(), 0, 3, step).unwrap().message(),
            "step 9: rank 1 issued another call than ranks 0 and 2: found a decode of plan 1 with batch 5, query_tokens 6 (rank 1), \
             wanted a decode of plan 1 with batch 4, query_tokens 6 (rank 0); the communicator is broken"
        );
        // Calls that look alike differ in what a word has no room for.
        let alike = |r: usize| (r as u64, CallWord::merge(1, 6));
        assert!(!desync(|| "step 9".into(), 0, 2, alike).unwrap().message().contains("found"));
        let (mine, theirs) = (CallWord::merge(1, 6), CallWord::merge(2, 6));
        assert_eq!(
            differs("step 9, hop 1", (0, mine), (3, theirs)).message(),
            "step 9, hop 1: rank 3 sent another message than rank 0 waits for: found a merge of plan 2 with query_tokens 6 (rank 3), \
             wanted a merge of plan 1 with query_tokens 6 (rank 0); the communicator is broken"
        );
    }

    #[test]
    fn messages_list_ranks() {
        let error = timeout("round 3", &[1, 2, 5], "step_timeout_ns", Duration::from_millis(50));
        assert_eq!(error.rank(), Some(1));
        assert!(error.message().contains("ranks 1, 2 and 5 did not come within 50ms (step_timeout_ns)"), "{error}");
        assert_eq!((ranks(&[3]), ranks(&[])), ("rank 3".into(), "a rank".into()));
    }
}
