//! One rank's end of an engine's transport.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::callbacks::Transport;
use super::calls::{CallDeadline, Calls};
use super::message::{FIRST_BYTES, HEADER_BYTES, INLINE_BYTES, MAGIC, MAX_BLOB, put_words, word};
use crate::attention::Shard;
use crate::comm::bootstrap::{Bootstrap, Token, new_token};
use crate::comm::call_word::CallWord;
use crate::comm::config::CommConfig;
use crate::comm::errors;
use crate::comm::rounds::{Hop, Round, RoundHeader, Rounds};
use crate::device::HostBuffer;
use crate::error::{Error, ErrorKind, Result};
use crate::partial::epoch::{MAX_PAYLOAD, MAX_WINDOWS};

/// Most ranks of a transport.
const MAX_RANKS: i32 = 4096;

/// One rank's end of an engine's transport.
pub(crate) struct TransportRank {
    calls: Calls,
    token: Token,
    setup_timeout: Duration,
    step_timeout: Duration,
    capacity: usize,
    window_bytes: usize,
    buffers: Mutex<Buffers>,
    rounds: AtomicU64,
    steps: AtomicU64,
    /// The [`CallWord`] of the step that this rank opened last.
    call: AtomicU64,
    gone: AtomicBool,
}

/// Send and receive sides of both messages of a round.
struct Buffers {
    send: HostBuffer,
    first: HostBuffer,
    rest: HostBuffer,
}

/// The payloads of one round, in the receive buffer.
struct Received<'a> {
    first: &'a [u8],
    payloads: &'a [u8],
    offset: usize,
    stride: usize,
    bytes: usize,
}

impl Round for Received<'_> {
    fn payload(&self, rank: usize) -> &[u8] {
        &self.payloads[rank * self.stride + self.offset..][..self.bytes]
    }

    fn fault(&self, rank: usize) -> u64 {
        word(&self.first[rank * FIRST_BYTES..], 3)
    }
}

impl TransportRank {
    /// Rank `shard` of the engine's group. Collective: checks with the peers that ranks and versions agree, within the
    /// setup deadline.
    pub fn new(transport: Transport, shard: Shard, config: &CommConfig) -> Result<TransportRank> {
        TransportRank::with_capacity(transport, shard, config, MAX_PAYLOAD)
    }

    /// The same for ranks whose steps do not go over the transport: its rounds hold next to nothing.
    pub fn for_setup(transport: Transport, shard: Shard, config: &CommConfig) -> Result<TransportRank> {
        TransportRank::with_capacity(transport, shard, config, HEADER_BYTES)
    }

    /// The same, with rounds of at most `most` bytes.
    fn with_capacity(transport: Transport, shard: Shard, config: &CommConfig, most: usize) -> Result<TransportRank> {
        config.check()?;
        if !(1..=MAX_RANKS).contains(&shard.world) {
            return Err(Error::invalid("world", shard.world, format!("1 to {MAX_RANKS}")));
        }
        if shard.rank < 0 || shard.rank >= shard.world {
            return Err(Error::invalid("rank", shard.rank, format!("0 to {}", shard.world - 1)));
        }
        let world = shard.world as usize;
        let capacity = most.min(MAX_WINDOWS / world) / HEADER_BYTES * HEADER_BYTES;
        let buffers = Buffers {
            send: HostBuffer::new(FIRST_BYTES.max(capacity))?,
            first: HostBuffer::new(world * FIRST_BYTES)?,
            rest: HostBuffer::new(world * capacity)?,
        };
        let mut rank = TransportRank {
            calls: Calls::new(transport, shard)?,
            token: new_token(),
            setup_timeout: config.setup_timeout,
            step_timeout: config.step_timeout,
            capacity,
            window_bytes: buffers.send.len() + buffers.first.len() + buffers.rest.len(),
            buffers: Mutex::new(buffers),
            rounds: AtomicU64::new(0),
            steps: AtomicU64::new(0),
            call: AtomicU64::new(0),
            gone: AtomicBool::new(false),
        };
        rank.token = rank.check_ranks()?;
        Ok(rank)
    }

    /// What the ranks of this communicator know it by, and no other rank: made up by rank 0.
    pub fn token(&self) -> &Token {
        &self.token
    }

    /// Whether the callbacks connect the ranks that the engine says. Gives the token of rank 0.
    fn check_ranks(&self) -> Result<Token> {
        let identity = |rank: i32| [rank.to_le_bytes(), self.calls.shard.world.to_le_bytes()].concat();
        let mine = [&identity(self.calls.shard.rank)[..], &self.token].concat();
        let mut tokens = Vec::new();
        for (rank, blob) in self.allgather(&mine)?.iter().enumerate() {
            let token = blob.strip_prefix(&identity(rank as i32)[..]).and_then(|token| Token::try_from(token).ok());
            let Some(token) = token else {
                let message = format!(
                    "transport: place {rank} of the allgather holds another rank or world than {rank} of {}, wanted every \
                     rank in order",
                    self.calls.shard.world
                );
                return Err(Error::new(ErrorKind::Mismatch, message).with_rank(rank as i32));
            };
            tokens.push(token);
        }
        Ok(tokens[0])
    }

    /// A round, see the module.
    fn make_round(
        &self,
        header: RoundHeader,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
        take: &mut dyn FnMut(&dyn Round),
    ) -> Result<()> {
        if bytes > self.capacity {
            return Err(Error::invalid("bytes", bytes, format!("at most {} in a round", self.capacity)));
        }
        let (world, number) = (self.calls.shard.world as usize, self.rounds.load(Ordering::Relaxed) + 1);
        let what = || format!("round {number}");
        let deadline = CallDeadline {
            what: &what,
            peer: &[],
            until: Instant::now() + self.step_timeout,
            field: "step_timeout_ns",
            timeout: self.step_timeout,
        };
        let mut buffers = lock(&self.buffers);
        let Buffers { send, first, rest } = &mut *buffers;
        let (send, first, rest) = (send.bytes_mut(), first.bytes_mut(), rest.bytes_mut());
        let fits = bytes <= INLINE_BYTES;
        let message = &mut send[..FIRST_BYTES];
        let me = self.calls.shard.rank as usize;
        let call = self.call.load(Ordering::Relaxed);
        let words = [MAGIC, header.fingerprint, bytes as u64, header.fault, number, me as u64, call];
        put_words(message, &words);
        if fits {
            fill(&mut message[HEADER_BYTES..][..bytes]);
        }
        self.calls.gather(message, first, &deadline)?;
        let of = |rank: usize, i: usize| word(&first[rank * FIRST_BYTES..], i);
        if let Some(rank) = (0..world).find(|&rank| of(rank, 0) != MAGIC) {
            let message = format!("{}: rank {rank} sent no message of this library's version", what());
            return Err(Error::new(ErrorKind::Desync, message).with_rank(rank as i32));
        }
        // A callback that brought nothing leaves the messages of the round before, which fit together.
        if let Some(rank) = (0..world).find(|&rank| of(rank, 5) != rank as u64) {
            return Err(misplaced(&what(), rank));
        }
        if (0..words.len()).any(|i| of(me, i) != words[i]) {
            return Err(misplaced(&what(), me));
        }
        let print = |rank: usize| of(rank, 1) ^ of(rank, 2).rotate_left(32) ^ of(rank, 4).rotate_left(48);
        if let Some(error) = errors::desync(what, me, world, |rank| (print(rank), CallWord::from_bits(of(rank, 6)))) {
            return Err(error);
        }
        if fits {
            let stride = FIRST_BYTES;
            take(&Received { first, payloads: first, offset: HEADER_BYTES, stride, bytes });
        } else {
            let stride = bytes.next_multiple_of(HEADER_BYTES);
            fill(&mut send[..bytes]);
            self.calls.gather(&send[..stride], rest, &deadline)?;
            take(&Received { first, payloads: rest, offset: 0, stride, bytes });
        }
        self.rounds.store(number, Ordering::Relaxed);
        Ok(())
    }

    /// A hop: a message of a fixed size each way, which tells ranks that are out of step; then what it had no room for.
    fn make_hop(&self, hop: &Hop, send: &[u8], recv: &mut [u8]) -> Result<u64> {
        let (number, steps) = (hop.index, self.steps.load(Ordering::Relaxed));
        let what = || format!("step {steps}, hop {number}");
        let deadline = CallDeadline {
            what: &what,
            peer: &[hop.from],
            until: hop.until,
            field: "step_timeout_ns",
            timeout: self.step_timeout,
        };
        let mut buffers = lock(&self.buffers);
        let Buffers { send: own, first, .. } = &mut *buffers;
        let (own, first) = (&mut own.bytes_mut()[..FIRST_BYTES], &mut first.bytes_mut()[..FIRST_BYTES]);
        let (me, number_word) = (self.calls.shard.rank as u64, u64::from(number));
        let call = self.call.load(Ordering::Relaxed);
        let words = [MAGIC, hop.header.fingerprint, send.len() as u64, hop.header.fault, number_word, steps, me, call];
        put_words(own, &words);
        if send.len() <= INLINE_BYTES {
            own[HEADER_BYTES..][..send.len()].copy_from_slice(send);
        }
        self.calls.swap((hop.to, hop.from), own, first, &deadline)?;
        if word(first, 0) != MAGIC {
            let message = format!("{}: rank {} sent no message of this library's version", what(), hop.from);
            return Err(Error::new(ErrorKind::Desync, message).with_rank(hop.from as i32));
        }
        let wanted = [hop.header.fingerprint, recv.len() as u64, number_word, steps, hop.from as u64];
        if [1, 2, 4, 5, 6].map(|i| word(first, i)) != wanted {
            let [mine, theirs] = [call, word(first, 7)].map(CallWord::from_bits);
            return Err(errors::differs(&what(), (me as usize, mine), (hop.from, theirs)));
        }
        let fault = word(first, 3);
        let mut rest: (&[u8], &mut [u8]) = (&[], &mut []);
        if send.len() > INLINE_BYTES {
            rest.0 = send;
        }
        if recv.len() > INLINE_BYTES {
            rest.1 = recv;
        } else {
            recv.copy_from_slice(&first[HEADER_BYTES..][..recv.len()]);
        }
        if !rest.0.is_empty() || !rest.1.is_empty() {
            self.calls.swap((hop.to, hop.from), rest.0, rest.1, &deadline)?;
        }
        Ok(fault)
    }

    fn check_here(&self) -> Result<()> {
        if self.gone.load(Ordering::Acquire) { Err(errors::left(self.calls.shard.rank as usize)) } else { Ok(()) }
    }
}

impl Bootstrap for TransportRank {
    fn shard(&self) -> Shard {
        self.calls.shard
    }

    fn window_bytes(&self) -> usize {
        self.window_bytes
    }

    fn allgather(&self, blob: &[u8]) -> Result<Vec<Vec<u8>>> {
        let deadline = CallDeadline {
            what: &|| "setup exchange".to_string(),
            peer: &[],
            until: Instant::now() + self.setup_timeout,
            field: "setup_timeout_ns",
            timeout: self.setup_timeout,
        };
        let world = self.calls.shard.world as usize;
        let gather = |send: &[u8]| -> Result<Vec<u8>> {
            let mut recv = vec![0; send.len() * world];
            self.calls.gather(send, &mut recv, &deadline)?;
            Ok(recv)
        };
        let run = || {
            let sizes = gather(&[MAGIC.to_le_bytes(), (blob.len() as u64).to_le_bytes()].concat())?;
            let mut longest = 0;
            for (rank, message) in sizes.chunks_exact(16).enumerate() {
                if word(message, 0) != MAGIC || word(message, 1) > MAX_BLOB {
                    let text = format!("setup exchange: rank {rank} sent no message of this library's version");
                    return Err(Error::new(ErrorKind::Desync, text).with_rank(rank as i32));
                }
                longest = longest.max(word(message, 1) as usize);
            }
            let mut padded = blob.to_vec();
            padded.resize(longest, 0);
            let all = if longest == 0 { Vec::new() } else { gather(&padded)? };
            let size = |rank: usize| word(&sizes[rank * 16..], 1) as usize;
            Ok((0..world).map(|rank| all[rank * longest..][..size(rank)].to_vec()).collect())
        };
        run().inspect_err(|error| self.calls.latch(error))
    }

    fn status(&self) -> Option<Error> {
        self.calls.status()
    }

    fn abort(&self) {
        self.calls.latch(&errors::aborted(self.calls.shard.rank as usize));
    }

    fn fail(&self, error: &Error) {
        self.calls.latch(error);
    }

    fn leave(&self) {
        self.gone.store(true, Ordering::Release);
        // Ends a callback that runs.
        self.calls.latch(&errors::left(self.calls.shard.rank as usize));
    }

    fn describe(&self) -> String {
        format!(
            concat!(
                r#""kind":"transport","world":{},"rank":{},"sendrecv":{},"stream_threads":{},"capacity_bytes":{},"#,
                r#""window_bytes":{},"first_message_bytes":{},"setup_timeout_ms":{},"step_timeout_ms":{},"links":[]"#
            ),
            self.calls.shard.world,
            self.calls.shard.rank,
            self.calls.transport.sendrecv.is_some(),
            self.calls.transport.stream_threads,
            self.capacity,
            self.window_bytes,
            FIRST_BYTES,
            self.setup_timeout.as_millis(),
            self.step_timeout.as_millis(),
        )
    }
}

impl Rounds for TransportRank {
    fn capacity(&self) -> usize {
        self.capacity
    }

    fn open(&self, _fingerprint: u64, call: CallWord) -> Result<()> {
        self.check_here()?;
        self.call.store(call.bits(), Ordering::Relaxed);
        self.steps.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn round(
        &self,
        header: RoundHeader,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
        take: &mut dyn FnMut(&dyn Round),
    ) -> Result<()> {
        self.check_here()?;
        self.make_round(header, bytes, fill, take).inspect_err(|error| self.calls.latch(error))
    }

    fn hop(&self, hop: &Hop, send: &[u8], recv: &mut [u8], meanwhile: &mut dyn FnMut() -> Result<()>) -> Result<u64> {
        self.check_here()?;
        // Callbacks block, and run on this thread: first the bytes, for which a peer may be waiting.
        self.make_hop(hop, send, recv)
            .and_then(|fault| meanwhile().map(|()| fault))
            .inspect_err(|error| self.calls.latch(error))
    }

    fn has_hops(&self) -> bool {
        self.calls.transport.sendrecv.is_some()
    }

    fn reads_in_place(&self) -> bool {
        false
    }

    fn step_timeout(&self) -> Duration {
        self.step_timeout
    }

    fn serves_streams(&self) -> bool {
        self.calls.transport.stream_threads
    }
}

/// The transport's allgather brought something else from `rank` than it sent.
fn misplaced(what: &str, rank: usize) -> Error {
    let message = format!(
        "{what}: the transport's allgather returned 0, but place {rank} does not hold what rank {rank} sends, wanted the \
         message of every rank in rank order"
    );
    Error::new(ErrorKind::Transport, message).with_rank(rank as i32)
}

fn lock(buffers: &Mutex<Buffers>) -> MutexGuard<'_, Buffers> {
    buffers.lock().unwrap_or_else(PoisonError::into_inner)
}
