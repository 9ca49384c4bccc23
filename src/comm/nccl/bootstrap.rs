//! An allgather of blobs over NCCL: what ranks of several processes need to set up what they share.
//!
//! It serves setup only: steps of GPUs exchange on the GPUs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::library::UNIQUE_ID_BYTES;
use super::rank::{END_TIMEOUT, NcclDeadline, NcclRank};
use crate::attention::Shard;
use crate::comm::bootstrap::{Bootstrap, new_token, process_token};
use crate::comm::config::CommConfig;
use crate::comm::errors;
use crate::device::cuda::{CudaDevice, Staging};
use crate::error::{Error, ErrorKind, Result};

/// Bytes that a rank sends at a time. Longer blobs go in several.
const CHUNK: usize = 4096;
/// Says that a message is one of these, and which version of them.
const MAGIC: u64 = 0x7ee5_a77e_0001_0001;
/// Longest blob.
const MAX_BLOB: u64 = 1 << 20;
/// Pause between two looks at the stream.
const PAUSE: Duration = Duration::from_micros(50);

/// One rank's end of a group over NCCL.
pub(crate) struct NcclBootstrap {
    rank: Arc<NcclRank>,
    setup_timeout: Duration,
    step_timeout: Duration,
    /// This rank's chunk, then those of all.
    staging: Mutex<Staging>,
    bytes: usize,
    error: Mutex<Option<Error>>,
    is_gone: AtomicBool,
}

impl NcclBootstrap {
    /// What the exchanges of `world` ranks work on. For a communicator that has no name yet made before it is: a rank that
    /// allocates while a peer's first exchange runs on another GPU may wait for it.
    pub fn staging(device: &Arc<CudaDevice>, world: i32, config: &CommConfig) -> Result<Staging> {
        Staging::new(device, bytes(world), config.step_timeout)
    }

    /// The group of a communicator that is there. Collective: compares the versions of all ranks, of this library and of
    /// NCCL, within `deadline`.
    pub fn new(rank: NcclRank, staging: Staging, config: &CommConfig, deadline: NcclDeadline) -> Result<NcclBootstrap> {
        let bytes = bytes(rank.shard().world);
        let bootstrap = NcclBootstrap {
            staging: Mutex::new(staging),
            rank: Arc::new(rank),
            setup_timeout: config.setup_timeout,
            step_timeout: config.step_timeout,
            bytes,
            error: Mutex::new(None),
            is_gone: AtomicBool::new(false),
        };
        let mine = format!("libtreeattn {}, NCCL {}", env!("CARGO_PKG_VERSION"), bootstrap.rank.library().version());
        let all = bootstrap.gather(mine.as_bytes(), deadline).inspect_err(|error| bootstrap.latch(error))?;
        if let Some(odd) = all.iter().position(|theirs| *theirs != all[0]) {
            let text = |rank: usize| String::from_utf8_lossy(&all[rank]).into_owned();
            let message =
                format!("versions: found {} on rank {odd} and {} on rank 0, wanted the same", text(odd), text(0));
            let error = Error::new(ErrorKind::Mismatch, message).with_rank(odd as i32);
            bootstrap.latch(&error);
            return Err(error);
        }
        if !bootstrap.rank.is_named() {
            bootstrap.agree_on_name(deadline).inspect_err(|error| bootstrap.latch(error))?;
        }
        Ok(bootstrap)
    }

    /// Gives the communicator a name by which the ranks of one process find each other: one that rank 0 made up.
    fn agree_on_name(&self, deadline: NcclDeadline) -> Result<()> {
        let process = process_token();
        let all = self.gather(&[process, new_token()].concat(), deadline)?;
        let mut name = [0; UNIQUE_ID_BYTES];
        name[..16].copy_from_slice(&all[0][16..]);
        let members: Vec<i32> = (0..).zip(&all).filter(|(_, theirs)| theirs[..16] == process).map(|(r, _)| r).collect();
        self.rank.name(&name, &members);
        Ok(())
    }

    /// The communicator below.
    pub fn rank(&self) -> &Arc<NcclRank> {
        &self.rank
    }

    /// Every rank's blob. The lengths first, then the blobs in chunks, all of the longest's size.
    fn gather(&self, blob: &[u8], deadline: NcclDeadline) -> Result<Vec<Vec<u8>>> {
        if blob.len() as u64 > MAX_BLOB {
            return Err(Error::invalid("blob", blob.len(), format!("at most {MAX_BLOB} bytes")));
        }
        let mut sizes = Vec::new();
        let first = [MAGIC.to_le_bytes(), (blob.len() as u64).to_le_bytes()].concat();
        for (rank, message) in self.chunk(&first, deadline)?.iter().enumerate() {
            let [magic, size] = [0, 8].map(|at| word(&message[at..]));
            if magic != MAGIC || size > MAX_BLOB {
                let text = format!("setup exchange: rank {rank} sent no message of this library's version");
                return Err(Error::new(ErrorKind::Desync, text).with_rank(rank as i32));
            }
            sizes.push(size as usize);
        }
        let longest = sizes.iter().copied().max().unwrap_or(0);
        let mut padded = blob.to_vec();
        padded.resize(longest, 0);
        let mut all = vec![Vec::with_capacity(longest); sizes.len()];
        for chunk in padded.chunks(CHUNK) {
            for (all, part) in all.iter_mut().zip(self.chunk(chunk, deadline)?) {
                all.extend(part);
            }
        }
        all.iter_mut().zip(sizes).for_each(|(all, size)| all.truncate(size));
        Ok(all)
    }

    /// One allgather of at most [`CHUNK`] bytes a rank, the same number on all.
    fn chunk(&self, send: &[u8], deadline: NcclDeadline) -> Result<Vec<Vec<u8>>> {
        let world = self.rank.shard().world as usize;
        let mut staging = self.staging.lock();
        // SAFETY: a chunk ends with an idle stream, or with an error that breaks this end, after which there is no other.
        unsafe { staging.upload(0, send) }?;
        let (from, to) = (staging.address(), staging.address() + CHUNK as u64);
        // SAFETY: the device side holds world + 1 chunks, and lives as long as its stream.
        unsafe { self.rank.all_gather(from, to, send.len(), staging.stream(), deadline)? };
        staging.download(CHUNK, world * send.len())?;
        while !staging.is_done()? {
            if let Some(error) = self.status() {
                self.rank.abort(END_TIMEOUT);
                return Err(error);
            }
            // Also tells that a peer has failed.
            self.rank.state("ncclAllGather")?;
            if Instant::now() >= deadline.until {
                self.rank.abort(END_TIMEOUT);
                return Err(deadline.expired("setup exchange"));
            }
            std::thread::sleep(PAUSE);
        }
        // SAFETY: the stream is idle, as seen just now, and the lock keeps others from enqueueing.
        let all = unsafe { staging.read(CHUNK, world * send.len()) }?;
        Ok(all.chunks(send.len()).map(<[u8]>::to_vec).collect())
    }

    /// Breaks this end with the first error.
    fn latch(&self, error: &Error) {
        let mut latched = self.error.lock();
        if latched.is_none() {
            *latched = Some(error.clone());
        }
    }
}

impl Bootstrap for NcclBootstrap {
    fn shard(&self) -> Shard {
        self.rank.shard()
    }

    fn window_bytes(&self) -> usize {
        self.bytes
    }

    fn allgather(&self, blob: &[u8]) -> Result<Vec<Vec<u8>>> {
        if let Some(error) = self.status() {
            return Err(error);
        }
        self.gather(blob, NcclDeadline::new("setup_timeout_ns", self.setup_timeout)).map_err(|error| {
            self.latch(&error);
            // An abort on another thread ends the wait with NCCL's words for it.
            self.status().unwrap_or(error)
        })
    }

    fn status(&self) -> Option<Error> {
        self.error.lock().clone()
    }

    fn abort(&self) {
        self.latch(&errors::aborted(self.rank.shard().rank as usize));
        self.rank.abort(Duration::ZERO);
    }

    fn fail(&self, error: &Error) {
        self.latch(error);
    }

    fn leave(&self) {
        if !self.is_gone.swap(true, Ordering::AcqRel) {
            self.latch(&errors::left(self.rank.shard().rank as usize));
        }
    }

    fn describe(&self) -> String {
        let (shard, library) = (self.rank.shard(), self.rank.library());
        format!(
            concat!(
                r#""kind":"nccl","world":{},"rank":{},"nccl_version":"{}","nccl_library":{:?},"window_bytes":{},"#,
                r#""setup_timeout_ms":{},"step_timeout_ms":{},"links":[]"#
            ),
            shard.world,
            shard.rank,
            library.version(),
            library.file(),
            self.bytes,
            self.setup_timeout.as_millis(),
            self.step_timeout.as_millis(),
        )
    }
}

/// Bytes on each side for the exchanges of `world` ranks: this rank's chunk, then those of all.
fn bytes(world: i32) -> usize {
    (world as usize + 1) * CHUNK
}

/// The 64-bit word that a message begins with.
fn word(message: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&message[..8]);
    u64::from_le_bytes(bytes)
}
