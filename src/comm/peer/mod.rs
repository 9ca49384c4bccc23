//! Ranks on GPUs that write into each other's memory: windows, and how such ranks fail together.
//!
//! A step's exchange is one kernel a rank (`kernels/exchange.cu`). It pushes into the windows of all ranks and reads its own;
//! `windows` owns these and says in an [`ExchangeView`] where they are. What is not a step (the agreement on a plan, the
//! setup) goes over another [`Exchange`], the *bootstrap*: the local group of a process, or NCCL between processes.
//! `remote` opens the windows of other processes, `exits` sees these end.
//!
//! Faults go both ways through words in mapped host memory: a kernel that gives up says why, once and for good, and a word
//! from the host ends every wait. So an abort, or a rank that leaves, ends waits on a GPU as it does on the CPU, and
//! nothing here ever waits for a device.

mod exits;
mod remote;
mod windows;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use self::exits::Exits;
pub(crate) use remote::Offer;
pub(crate) use windows::Windows;

use super::{CommConfig, Exchange, Hop, Round, RoundHeader, verdict};
use crate::attention::Shard;
use crate::error::{Error, ErrorKind, Result};
use crate::partial::view::{host, verdict as word};
use crate::partial::{DataFault, DataFaultCause, ExchangeView};

/// One rank's end of a group of GPUs.
pub(crate) struct PeerExchange {
    bootstrap: Box<dyn Exchange>,
    rank: usize,
    step_timeout: Duration,
    /// The windows of all ranks, or why there are none: then only steps without an exchange, or over NCCL, are possible.
    windows: Result<Arc<Windows>>,
    error: Mutex<Option<Error>>,
    steps: AtomicU64,
    is_gone: AtomicBool,
    /// Over before the windows are.
    _exits: Option<Exits>,
}

impl PeerExchange {
    /// The end of rank `bootstrap.shard().rank`. Ranks of other processes are watched from now on.
    pub fn new(
        bootstrap: Box<dyn Exchange>,
        windows: Result<Arc<Windows>>,
        config: &CommConfig,
    ) -> Result<PeerExchange> {
        let rank = bootstrap.shard().rank as usize;
        let exits = match &windows {
            Ok(windows) => Exits::watch(windows, rank)?,
            Err(_) => None,
        };
        Ok(PeerExchange {
            rank,
            bootstrap,
            step_timeout: config.step_timeout,
            windows,
            error: Mutex::new(None),
            steps: AtomicU64::new(0),
            is_gone: AtomicBool::new(false),
            _exits: exits,
        })
    }

    /// What a kernel of this rank is told; the step's own fields are still to be filled in. The error that says why there
    /// are no windows.
    pub fn view(&self) -> Result<ExchangeView> {
        let windows = self.windows.as_ref().map_err(Clone::clone)?;
        Ok(windows.view(self.rank, self.step_timeout))
    }

    /// The windows, which live as long as somebody has them.
    pub fn windows(&self) -> Option<&Arc<Windows>> {
        self.windows.as_ref().ok()
    }

    /// Counts an exchange that was enqueued.
    pub fn count_step(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    /// The bad data that steps have met on some rank since the last time, if any. Waits for nothing.
    pub fn take_fault(&self) -> Option<(i32, DataFault)> {
        let status = self.windows()?.words(self.rank).take(host::BAD_DATA);
        let cause = DataFaultCause::from_code(status as u8)?;
        Some(((status >> 8) as u16 as i32, DataFault { sequence: (u32::MAX - (status >> 32) as u32) as i32, cause }))
    }

    /// What this rank's kernels said when they gave up.
    fn failure(&self) -> Option<Error> {
        let failure = self.windows()?.words(self.rank).load(host::FAILURE);
        if failure == 0 {
            return None;
        }
        let (code, rank, epoch) = word::unpack(failure);
        let what = format!("exchange {epoch}");
        Some(match ErrorKind::from_code(i32::from(code)) {
            Some(ErrorKind::Timeout) => verdict::timeout(&what, &[rank], "step_timeout", self.step_timeout),
            Some(ErrorKind::PeerLost) => verdict::peer_lost(&what, rank),
            Some(ErrorKind::Desync) => verdict::out_of_step(&what, rank),
            Some(ErrorKind::Aborted) => verdict::aborted(rank),
            kind => {
                let message = format!("{what}: rank {rank} could not go on; the communicator is broken");
                Error::new(kind.unwrap_or(ErrorKind::Internal), message).with_rank(rank as i32)
            }
        })
    }

    /// Ends the waits of all ranks' kernels with `code`.
    fn end_all(&self, code: ErrorKind) {
        if let Some(windows) = self.windows() {
            windows.end_all(word::pack(code.code() as u8, self.rank));
        }
    }

    fn no_rounds(&self) -> Error {
        Error::new(ErrorKind::Internal, "communicator: a round of CPU ranks on a rank that is a GPU")
    }
}

impl Exchange for PeerExchange {
    fn shard(&self) -> Shard {
        self.bootstrap.shard()
    }

    fn capacity(&self) -> usize {
        self.windows().map_or(0, |windows| windows.capacity())
    }

    fn window_bytes(&self) -> usize {
        self.windows().map_or(0, |windows| windows.bytes())
    }

    fn allgather(&self, blob: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.bootstrap.allgather(blob)
    }

    fn open(&self, _fingerprint: u64) -> Result<()> {
        Err(self.no_rounds())
    }

    fn round(
        &self,
        _header: RoundHeader,
        _bytes: usize,
        _fill: &mut dyn FnMut(&mut [u8]),
        _take: &mut dyn FnMut(&dyn Round),
    ) -> Result<()> {
        Err(self.no_rounds())
    }

    fn hop(
        &self,
        _hop: &Hop,
        _send: &[u8],
        _recv: &mut [u8],
        _meanwhile: &mut dyn FnMut() -> Result<()>,
    ) -> Result<u64> {
        Err(self.no_rounds())
    }

    fn has_hops(&self) -> bool {
        false
    }

    fn reads_in_place(&self) -> bool {
        false
    }

    fn step_timeout(&self) -> Duration {
        self.step_timeout
    }

    fn status(&self) -> Option<Error> {
        let mut latched = self.error.lock();
        if latched.is_none() {
            *latched = self.failure().or_else(|| self.bootstrap.status());
        }
        latched.clone()
    }

    fn step(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    fn abort(&self) {
        // First what runs: the bootstrap may have to call a driver that waits for it.
        self.end_all(ErrorKind::Aborted);
        self.bootstrap.abort();
    }

    fn fail(&self, error: &Error) {
        if self.status().is_none() {
            self.end_all(error.kind());
            self.bootstrap.fail(error);
        }
    }

    fn leave(&self) {
        if !self.is_gone.swap(true, Ordering::AcqRel) {
            if let Some(windows) = self.windows() {
                windows.leave(self.rank);
            }
            self.bootstrap.leave();
        }
    }

    fn describe(&self) -> String {
        let shard = self.shard();
        let links: Vec<String> = match &self.windows {
            Ok(windows) => (0..windows.world())
                .filter(|&peer| peer != self.rank)
                .map(|peer| {
                    let kind = windows.link(self.rank, peer);
                    format!(r#"{{"peer":{peer},"device":"{}","kind":"{kind}"}}"#, windows.label(peer))
                })
                .collect(),
            Err(_) => Vec::new(),
        };
        let reason = match &self.windows {
            Ok(_) => String::new(),
            Err(error) => format!(r#""no_windows":{:?},"#, error.message()),
        };
        let algorithms = match &self.windows {
            Ok(windows) => ["ONE_SHOT", "TWO_SHOT"]
                .map(|name| format!(r#"{{"name":"{name}","chunk_bytes":{}}}"#, windows.capacity()))
                .join(","),
            Err(_) => String::new(),
        };
        format!(
            concat!(
                r#"{{"kind":"gpu","world":{},"rank":{},{}"capacity_bytes":{},"window_bytes":{},"#,
                r#""setup":{},"step_timeout_ms":{},"links":[{}],"algorithms":[{}]}}"#
            ),
            shard.world,
            shard.rank,
            reason,
            self.capacity(),
            self.window_bytes(),
            self.bootstrap.describe(),
            self.step_timeout.as_millis(),
            links.join(","),
            algorithms,
        )
    }

    fn peers(&self) -> Option<&PeerExchange> {
        Some(self)
    }
}

impl Drop for PeerExchange {
    fn drop(&mut self) {
        self.leave();
    }
}
