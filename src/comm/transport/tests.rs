//! Messages over a transport whose words are not what the peer sent, one word at a time.

use std::cell::Cell;
use std::ffi::c_void;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use super::callbacks::Transport;
use super::message::MAX_BLOB;
use super::rank::TransportRank;
use crate::attention::Shard;
use crate::comm::bootstrap::Bootstrap;
use crate::comm::call_word::CallWord;
use crate::comm::config::CommConfig;
use crate::comm::rounds::{Hop, Round, RoundHeader, Rounds};
use crate::error::{ErrorKind, Result};

/// Long enough that only a hang reaches it.
const LONG: Duration = Duration::from_secs(60);
const HEADER: RoundHeader = RoundHeader { fingerprint: 7, fault: 5 };
/// What a word is changed by.
const OTHER: u64 = 1 << 21;

/// One of two ranks' way to the other.
struct Line {
    me: usize,
    to: Sender<Vec<u8>>,
    from: Receiver<Vec<u8>>,
    /// The rank in whose next message a word arrives changed, and which word.
    change: Cell<Option<(usize, usize)>>,
}

impl Line {
    /// The peer's message in exchange for `own`, then both as they arrive, in rank order; none where the peer has left.
    fn swap(&self, own: &[u8]) -> Option<[Vec<u8>; 2]> {
        self.to.send(own.to_vec()).ok()?;
        let theirs = self.from.recv_timeout(LONG).ok()?;
        let mut all = if self.me == 0 { [own.to_vec(), theirs] } else { [theirs, own.to_vec()] };
        if let Some((rank, word)) = self.change.take() {
            let bytes = &mut all[rank][word * 8..][..8];
            let changed = u64::from_le_bytes((&*bytes).try_into().unwrap()) ^ OTHER;
            bytes.copy_from_slice(&changed.to_le_bytes());
        }
        Some(all)
    }
}

/// # Safety
/// As [`AllgatherCallback`](super::AllgatherCallback); `ctx` is the line of the rank on whose thread this runs.
unsafe extern "C" fn allgather(
    ctx: *mut c_void,
    send: *const c_void,
    recv: *mut c_void,
    bytes: usize,
    _timeout_ns: i64,
    _abort: *const i32,
) -> i32 {
    // SAFETY: `ctx` is a line that nobody else uses; the rank passes `bytes` bytes, and room for those of two ranks.
    let (line, send, recv) = unsafe {
        let recv = std::slice::from_raw_parts_mut(recv.cast::<u8>(), 2 * bytes);
        (&*ctx.cast::<Line>(), std::slice::from_raw_parts(send.cast::<u8>(), bytes), recv)
    };
    match line.swap(send) {
        Some(all) if all.iter().all(|message| message.len() == bytes) => {
            recv.copy_from_slice(&all.concat());
            0
        }
        _ => 1,
    }
}

/// # Safety
/// As [`SendrecvCallback`](super::SendrecvCallback); `ctx` as in [`allgather`].
unsafe extern "C" fn sendrecv(
    ctx: *mut c_void,
    send: *const c_void,
    send_bytes: usize,
    to: i32,
    recv: *mut c_void,
    recv_bytes: usize,
    from: i32,
    _timeout_ns: i64,
    _abort: *const i32,
) -> i32 {
    // SAFETY: as in `allgather`, with a size for each way.
    let (line, send, recv) = unsafe {
        let recv = std::slice::from_raw_parts_mut(recv.cast::<u8>(), recv_bytes);
        (&*ctx.cast::<Line>(), std::slice::from_raw_parts(send.cast::<u8>(), send_bytes), recv)
    };
    let peer = 1 - line.me;
    match line.swap(send) {
        Some(all) if all[peer].len() == recv_bytes && [to, from] == [peer as i32; 2] => {
            recv.copy_from_slice(&all[peer]);
            0
        }
        _ => 1,
    }
}

/// Runs `body` on two connected ranks, each on a thread of its own.
fn two<T: Send>(body: impl Fn(&Line, &TransportRank) -> T + Sync) -> [T; 2] {
    let ((to_1, from_0), (to_0, from_1)) = (channel(), channel());
    let run = |me: usize, to, from| {
        let line = Line { me, to, from, change: Cell::new(None) };
        let ctx = (&raw const line).cast_mut().cast();
        let transport = Transport { ctx, allgather, sendrecv: Some(sendrecv), stream_threads: false };
        let config = CommConfig { step_timeout: LONG, setup_timeout: LONG, ..CommConfig::default() };
        let rank = TransportRank::new(transport, Shard { rank: me as i32, world: 2 }, &config).unwrap();
        body(&line, &rank)
    };
    std::thread::scope(|scope| {
        let first = scope.spawn(|| run(0, to_1, from_1));
        let second = scope.spawn(|| run(1, to_0, from_0));
        [first.join().unwrap(), second.join().unwrap()]
    })
}

/// Kind and rank of the error.
fn told<T>(result: Result<T>) -> std::result::Result<T, (ErrorKind, Option<i32>)> {
    result.map_err(|error| (error.kind(), error.rank()))
}

#[test]
fn every_word_of_a_hop_is_compared_or_handed_on() {
    const WORDS: usize = 8;
    for word in 0..=WORDS {
        let [found, unchanged] = two(|line, rank| {
            let peer = 1 - line.me;
            rank.open(7, CallWord::default()).unwrap();
            if line.me == 0 && word < WORDS {
                line.change.set(Some((1, word)));
            }
            let hop = Hop { index: 3, to: peer, from: peer, header: HEADER, until: Instant::now() + LONG };
            let mut recv = [0; 8];
            let fault = told(rank.hop(&hop, &[9; 8], &mut recv, &mut || Ok(())))?;
            assert_eq!(recv, [9; 8]);
            Ok(fault)
        });
        let wanted = match word {
            3 => Ok(HEADER.fault ^ OTHER),
            // The call is for messages alone.
            7 | WORDS => Ok(HEADER.fault),
            _ => Err((ErrorKind::Desync, Some(1))),
        };
        assert_eq!(found, wanted, "word {word}");
        assert_eq!(unchanged, Ok(HEADER.fault));
    }
}

#[test]
fn ranks_in_other_steps_do_not_hop() {
    let found = two(|line, rank| {
        let peer = 1 - line.me;
        for _ in 0..=line.me {
            rank.open(7, CallWord::default()).unwrap();
        }
        let hop = Hop { index: 0, to: peer, from: peer, header: HEADER, until: Instant::now() + LONG };
        told(rank.hop(&hop, &[], &mut [], &mut || Ok(())))
    });
    assert_eq!(found, [1, 0].map(|peer| Err((ErrorKind::Desync, Some(peer)))));
}

#[test]
fn every_word_of_a_round_is_compared_or_handed_on() {
    const WORDS: usize = 7;
    for (whose, word) in (0..2).flat_map(|whose| (0..=WORDS).map(move |word| (whose, word))) {
        let [found, unchanged] = two(|line, rank| {
            rank.open(7, CallWord::default()).unwrap();
            if line.me == 0 && word < WORDS {
                line.change.set(Some((whose, word)));
            }
            let mut faults = [0; 2];
            let mut take = |round: &dyn Round| {
                faults = [0, 1].map(|rank| round.fault(rank));
                assert!((0..2).all(|rank| round.payload(rank) == [9; 64]));
            };
            told(rank.round(HEADER, 64, &mut |to| to.fill(9), &mut take))?;
            Ok(faults)
        });
        let fault = HEADER.fault;
        let wanted = match (whose, word) {
            (_, WORDS) | (1, 6) => Ok([fault; 2]),
            (1, 3) => Ok([fault, fault ^ OTHER]),
            // No message of this version, whoever sent it.
            (_, 0) => Err((ErrorKind::Desync, Some(whose as i32))),
            // A rank knows its own message, and where those of others belong.
            (0, _) | (1, 5) => Err((ErrorKind::Transport, Some(whose as i32))),
            (_, _) => Err((ErrorKind::Desync, Some(1))),
        };
        assert_eq!(found, wanted, "word {word} of rank {whose}");
        assert_eq!(unchanged, Ok([fault; 2]));
    }
}

#[test]
fn what_an_allgather_says_of_itself_is_checked() {
    for word in 0..2 {
        let [found, _] = two(|line, rank| {
            if line.me == 0 {
                line.change.set(Some((1, word)));
            }
            told(rank.allgather(&[3; 5]))
        });
        assert_eq!(found, Err((ErrorKind::Desync, Some(1))), "word {word}");
    }
    let longest = MAX_BLOB as usize;
    for (bytes, is_sent) in [(longest, true), (longest + 1, false)] {
        let found = two(|line, rank| {
            let blob = vec![line.me as u8; if line.me == 1 { bytes } else { 0 }];
            told(rank.allgather(&blob)).map(|all| [0, 1].map(|rank: usize| all[rank].len()))
        });
        let wanted = if is_sent { Ok([0, bytes]) } else { Err((ErrorKind::Desync, Some(1))) };
        assert_eq!(found, [wanted; 2], "{bytes} bytes");
    }
}
