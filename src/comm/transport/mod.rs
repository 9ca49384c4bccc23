//! A rank whose peers only the engine reaches: rounds over the engine's own allgather (MPI, gloo, sockets).
//!
//! A round is one allgather of messages of a fixed size, a header and up to [`FIRST`] bytes of payload, so that ranks
//! that are out of step are found before sizes could differ; a larger payload follows in a second allgather once the
//! headers agree. A hop (`hop`) is the same over the engine's sendrecv, between one rank and the next. Callbacks run on
//! the calling thread only (or on stream threads, where the engine said so). They get what is left until the deadline
//! and a word to watch; `watch` raises that word when the deadline has passed, for callbacks that look at nothing else.

mod hop;
mod watch;

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use self::watch::Watch;
use super::{CommConfig, Exchange, Hop, Round, RoundHeader, verdict};
use crate::attention::Shard;
use crate::device::{Bell, HostBuffer, spawn};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::epoch::{MAX_PAYLOAD, MAX_WINDOWS};

/// Most ranks of a transport.
const MAX_RANKS: i32 = 4096;
/// Bytes of a message's header, a multiple of the alignment of payloads.
const HEADER: usize = 64;
/// Payload of a first message: a decode step of 32 heads of 128 in f32 and its lse, with room to spare.
const FIRST: usize = 16_896;
/// Says that a message is one of these, and which version of them.
const MAGIC: u64 = 0x7ee5_a77e_0000_0001;
/// Longest setup blob.
const MAX_BLOB: u64 = 1 << 20;

/// Gathers `bytes` bytes from every rank into `recv` (world * bytes), in rank order. Returns 0 when done, else anything.
/// Gives up after `timeout_ns`, or as soon as `*abort` is not 0.
pub type AllgatherCallback = unsafe extern "C" fn(
    ctx: *mut c_void,
    send: *const c_void,
    recv: *mut c_void,
    bytes: usize,
    timeout_ns: i64,
    abort: *const i32,
) -> i32;

/// Sends `send_bytes` bytes to rank `to` and receives `recv_bytes` from rank `from` at once; otherwise as
/// [`AllgatherCallback`]. Where one of the sizes is 0 nothing goes that way, and that peer expects nothing.
pub type SendrecvCallback = unsafe extern "C" fn(
    ctx: *mut c_void,
    send: *const c_void,
    send_bytes: usize,
    to: i32,
    recv: *mut c_void,
    recv_bytes: usize,
    from: i32,
    timeout_ns: i64,
    abort: *const i32,
) -> i32;

/// The engine's own way to exchange small blobs in host memory.
#[derive(Clone, Copy, Debug)]
pub struct Transport {
    /// Passed to every callback.
    pub ctx: *mut c_void,
    /// The one that is needed.
    pub allgather: AllgatherCallback,
    /// What the algorithms `TREE` and `RING` need.
    pub sendrecv: Option<SendrecvCallback>,
    /// Whether callbacks may come from the threads of CPU streams, and not only from threads that call the library.
    pub stream_threads: bool,
}

// SAFETY: whoever makes one vouches that its callbacks may be called from the threads that it allows.
unsafe impl Send for Transport {}
// SAFETY: as above; calls are serialised.
unsafe impl Sync for Transport {}

/// One rank's end of an engine's transport.
pub(crate) struct TransportExchange {
    transport: Transport,
    shard: Shard,
    setup_timeout: Duration,
    step_timeout: Duration,
    capacity: usize,
    window_bytes: usize,
    buffers: Mutex<Buffers>,
    error: Mutex<Option<Error>>,
    rounds: AtomicU64,
    steps: AtomicU64,
    gone: AtomicBool,
    watch: Arc<Watch>,
    watcher: Option<JoinHandle<()>>,
}

/// Send and receive sides of both messages of a round.
struct Buffers {
    send: HostBuffer,
    first: HostBuffer,
    rest: HostBuffer,
}

/// How long a callback may take, and for whom.
struct Limit<'a> {
    /// What it is part of, for messages.
    what: &'a dyn Fn() -> String,
    /// The rank that it waits for, where it is one.
    peer: &'a [usize],
    until: Instant,
    /// The deadline's name and length, for messages.
    field: &'static str,
    timeout: Duration,
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
        word(&self.first[rank * (HEADER + FIRST)..], 3)
    }
}

impl TransportExchange {
    /// Rank `shard` of the engine's group. Collective: checks with the peers that ranks and versions agree, within the
    /// setup deadline.
    pub fn new(transport: Transport, shard: Shard, config: &CommConfig) -> Result<TransportExchange> {
        config.check()?;
        if !(1..=MAX_RANKS).contains(&shard.world) {
            return Err(Error::invalid("world", shard.world, format!("1 to {MAX_RANKS}")));
        }
        if shard.rank < 0 || shard.rank >= shard.world {
            return Err(Error::invalid("rank", shard.rank, format!("0 to {}", shard.world - 1)));
        }
        let world = shard.world as usize;
        let capacity = MAX_PAYLOAD.min(MAX_WINDOWS / world) / HEADER * HEADER;
        let buffers = Buffers {
            send: HostBuffer::new((HEADER + FIRST).max(capacity))?,
            first: HostBuffer::new(world * (HEADER + FIRST))?,
            rest: HostBuffer::new(world * capacity)?,
        };
        let watch = Arc::new(Watch {
            abort: AtomicI32::new(0),
            late: AtomicBool::new(false),
            deadline: AtomicU64::new(0),
            start: Instant::now(),
            stop: AtomicBool::new(false),
            bell: Bell::default(),
        });
        let watching = Arc::clone(&watch);
        let watcher = spawn("treeattn-watch".into(), move || watching.run())?;
        let exchange = TransportExchange {
            transport,
            shard,
            setup_timeout: config.setup_timeout,
            step_timeout: config.step_timeout,
            capacity,
            window_bytes: buffers.send.len() + buffers.first.len() + buffers.rest.len(),
            buffers: Mutex::new(buffers),
            error: Mutex::new(None),
            rounds: AtomicU64::new(0),
            steps: AtomicU64::new(0),
            gone: AtomicBool::new(false),
            watch,
            watcher: Some(watcher),
        };
        exchange.check_ranks()?;
        Ok(exchange)
    }

    /// Whether the callbacks connect the ranks that the engine says.
    fn check_ranks(&self) -> Result<()> {
        let mine = [self.shard.rank.to_le_bytes(), self.shard.world.to_le_bytes()].concat();
        for (rank, blob) in self.allgather(&mine)?.iter().enumerate() {
            let wanted = [(rank as i32).to_le_bytes(), self.shard.world.to_le_bytes()].concat();
            if *blob != wanted {
                let message = format!(
                    "transport: place {rank} of the allgather holds another rank or world than {rank} of {}, wanted every \
                     rank in order",
                    self.shard.world
                );
                return Err(Error::new(ErrorKind::Mismatch, message).with_rank(rank as i32));
            }
        }
        Ok(())
    }

    /// One call of the engine's allgather: the bytes of `send` from every rank into `recv`.
    fn gather(&self, send: &[u8], recv: &mut [u8], limit: &Limit<'_>) -> Result<()> {
        assert!(recv.len() >= send.len() * self.shard.world as usize);
        self.call("allgather", limit, |left, abort| {
            let (ctx, send, recv, bytes) = (self.transport.ctx, send.as_ptr(), recv.as_mut_ptr(), send.len());
            // SAFETY: `send` and `recv` have the sizes that the callback is told; the engine vouches for the rest.
            unsafe { (self.transport.allgather)(ctx, send.cast(), recv.cast(), bytes, left, abort) }
        })
    }

    /// Runs a callback, told what time is left, under the eyes of the watch.
    fn call(&self, name: &str, limit: &Limit<'_>, callback: impl FnOnce(i64, *const i32) -> i32) -> Result<()> {
        let left = limit.until.saturating_duration_since(Instant::now());
        if let Some(error) = self.status() {
            return Err(error);
        }
        self.watch.arm(limit.until);
        let code = callback(i64::try_from(left.as_nanos()).unwrap_or(i64::MAX), self.watch.abort.as_ptr());
        self.watch.disarm();
        if code == 0 {
            return Ok(());
        }
        if let Some(error) = self.status() {
            return Err(error);
        }
        let what = (limit.what)();
        if Instant::now() >= limit.until || self.watch.late.load(Ordering::Acquire) {
            return Err(verdict::timeout(&what, limit.peer, limit.field, limit.timeout));
        }
        let message = format!("{what}: the transport's {name} returned {code}, wanted 0");
        let error = Error::new(ErrorKind::Transport, message);
        Err(match limit.peer {
            [peer] => error.with_rank(*peer as i32),
            _ => error,
        })
    }

    fn exchange(
        &self,
        header: RoundHeader,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
        take: &mut dyn FnMut(&dyn Round),
    ) -> Result<()> {
        if bytes > self.capacity {
            return Err(Error::invalid("bytes", bytes, format!("at most {} in a round", self.capacity)));
        }
        let (world, number) = (self.shard.world as usize, self.rounds.load(Ordering::Relaxed) + 1);
        let what = || format!("round {number}");
        let limit = Limit {
            what: &what,
            peer: &[],
            until: Instant::now() + self.step_timeout,
            field: "step_timeout",
            timeout: self.step_timeout,
        };
        let mut buffers = lock(&self.buffers);
        let Buffers { send, first, rest } = &mut *buffers;
        let (send, first, rest) = (bytes_of(send), bytes_of(first), bytes_of(rest));
        let fits = bytes <= FIRST;
        let message = &mut send[..HEADER + FIRST];
        for (i, value) in [MAGIC, header.fingerprint, bytes as u64, header.fault, number].into_iter().enumerate() {
            message[i * 8..][..8].copy_from_slice(&value.to_le_bytes());
        }
        if fits {
            fill(&mut message[HEADER..][..bytes]);
        }
        self.gather(message, first, &limit)?;
        let of = |rank: usize, i: usize| word(&first[rank * (HEADER + FIRST)..], i);
        if let Some(rank) = (0..world).find(|&rank| of(rank, 0) != MAGIC) {
            let message = format!("{}: rank {rank} sent no message of this library's version", what());
            return Err(Error::new(ErrorKind::Desync, message).with_rank(rank as i32));
        }
        let print = |rank: usize| of(rank, 1) ^ of(rank, 2).rotate_left(32) ^ of(rank, 4).rotate_left(48);
        if let Some(error) = verdict::desync(what, self.shard.rank as usize, world, print) {
            return Err(error);
        }
        if fits {
            let stride = HEADER + FIRST;
            take(&Received { first, payloads: first, offset: HEADER, stride, bytes });
        } else {
            let stride = bytes.next_multiple_of(HEADER);
            fill(&mut send[..bytes]);
            self.gather(&send[..stride], rest, &limit)?;
            take(&Received { first, payloads: rest, offset: 0, stride, bytes });
        }
        self.rounds.store(number, Ordering::Relaxed);
        Ok(())
    }

    fn check_here(&self) -> Result<()> {
        if self.gone.load(Ordering::Acquire) { Err(self.left()) } else { Ok(()) }
    }

    fn left(&self) -> Error {
        let message = format!("communicator: rank {} has left it", self.shard.rank);
        Error::new(ErrorKind::ParentDestroyed, message).with_rank(self.shard.rank)
    }

    /// Breaks this end with the first error.
    fn latch(&self, error: &Error) {
        let mut latched = lock(&self.error);
        if latched.is_none() {
            *latched = Some(verdict::failed(self.shard.rank as usize, error));
        }
        drop(latched);
        self.watch.abort.store(1, Ordering::Release);
    }
}

impl Exchange for TransportExchange {
    fn shard(&self) -> Shard {
        self.shard
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn window_bytes(&self) -> usize {
        self.window_bytes
    }

    fn allgather(&self, blob: &[u8]) -> Result<Vec<Vec<u8>>> {
        let limit = Limit {
            what: &|| "setup exchange".to_string(),
            peer: &[],
            until: Instant::now() + self.setup_timeout,
            field: "setup_timeout",
            timeout: self.setup_timeout,
        };
        let world = self.shard.world as usize;
        let gather = |send: &[u8]| -> Result<Vec<u8>> {
            let mut recv = vec![0; send.len() * world];
            self.gather(send, &mut recv, &limit)?;
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
        run().inspect_err(|error| self.latch(error))
    }

    fn round(
        &self,
        header: RoundHeader,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
        take: &mut dyn FnMut(&dyn Round),
    ) -> Result<()> {
        self.check_here()?;
        self.exchange(header, bytes, fill, take).inspect_err(|error| self.latch(error))
    }

    fn open(&self, _fingerprint: u64) -> Result<()> {
        self.check_here()?;
        self.steps.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn hop(&self, hop: &Hop, send: &[u8], recv: &mut [u8], meanwhile: &mut dyn FnMut() -> Result<()>) -> Result<u64> {
        self.check_here()?;
        // Callbacks block, and run on this thread: first the bytes, for which a peer may be waiting.
        self.meet(hop, send, recv).and_then(|fault| meanwhile().map(|()| fault)).inspect_err(|error| self.latch(error))
    }

    fn has_hops(&self) -> bool {
        self.transport.sendrecv.is_some()
    }

    fn reads_in_place(&self) -> bool {
        false
    }

    fn step_timeout(&self) -> Duration {
        self.step_timeout
    }

    fn status(&self) -> Option<Error> {
        lock(&self.error).clone()
    }

    fn step(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    fn abort(&self) {
        self.latch(&verdict::aborted(self.shard.rank as usize));
    }

    fn fail(&self, error: &Error) {
        self.latch(error);
    }

    fn leave(&self) {
        self.gone.store(true, Ordering::Release);
        // Ends a callback that runs.
        self.latch(&self.left());
    }

    fn describe(&self) -> String {
        let rounds = |name: &str, rounds: usize| {
            format!(r#"{{"name":"{name}","rounds_per_chunk":{rounds},"chunk_bytes":{}}}"#, self.capacity)
        };
        let hops = |name: &str, hops: String| format!(r#"{{"name":"{name}","hops":{hops}}}"#);
        let mut algorithms = vec![rounds("ONE_SHOT", 1), rounds("TWO_SHOT", 2), rounds("ALLREDUCE3", 3)];
        if self.has_hops() {
            algorithms.push(hops("TREE", r#""2 ceil(log2 ranks of a node) + ceil(log2 nodes)""#.into()));
            algorithms.push(hops("RING", (self.shard.world - 1).to_string()));
        }
        format!(
            concat!(
                r#"{{"kind":"transport","world":{},"rank":{},"sendrecv":{},"stream_threads":{},"capacity_bytes":{},"#,
                r#""window_bytes":{},"first_message_bytes":{},"setup_timeout_ms":{},"step_timeout_ms":{},"links":[],"#,
                r#""algorithms":[{}]}}"#
            ),
            self.shard.world,
            self.shard.rank,
            self.transport.sendrecv.is_some(),
            self.transport.stream_threads,
            self.capacity,
            self.window_bytes,
            HEADER + FIRST,
            self.setup_timeout.as_millis(),
            self.step_timeout.as_millis(),
            algorithms.join(","),
        )
    }

    fn serves_streams(&self) -> bool {
        self.transport.stream_threads
    }
}

impl Drop for TransportExchange {
    fn drop(&mut self) {
        self.watch.stop.store(true, Ordering::Release);
        self.watch.bell.ring();
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
    }
}

/// A buffer's bytes.
fn bytes_of(buffer: &mut HostBuffer) -> &mut [u8] {
    // SAFETY: the buffer is this long and initialised; the exclusive borrow makes this the only use of it.
    unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr(), buffer.len()) }
}

/// 64-bit word `i` of a message.
fn word(message: &[u8], i: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&message[i * 8..][..8]);
    u64::from_le_bytes(bytes)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
