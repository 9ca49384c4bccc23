//! Ends steps over NCCL whose peers do not come: NCCL itself would wait for ever.
//!
//! Kernels count the steps that they begin and end, so that graph replays, which no host code sees, are watched, too.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::comm::nccl::{NcclLimit, NcclRank};
use crate::device::cuda::{CudaDevice, CudaStream, Holdings, Staging, Words};
use crate::device::{Bell, Linger, spawn};
use crate::error::{Error, Result};
use crate::partial::DataFault;
use crate::runtime::communicator::CommCore;

/// How often the watch looks.
const WATCH: Duration = Duration::from_millis(50);
/// How long it waits for the word that makes outputs NaN, and for NCCL's own abort.
const PATIENCE: Duration = Duration::from_millis(200);
/// The mapped words: steps begun, steps ended, bad data.
const BEGUN: usize = 0;
const ENDED: usize = 1;
const FAULT: usize = 2;

/// Where the kernels of a plan and the host meet.
pub(super) struct Cell {
    words: Words,
    _holdings: Holdings,
    /// Its device side is a word that is not 0 once outputs shall be NaN.
    failed: Mutex<Staging>,
}

impl Cell {
    pub fn new(device: &Arc<CudaDevice>, patience: Duration) -> Result<Cell> {
        let mut holdings = Holdings::new(device, patience);
        let words = holdings.words(3)?;
        let failed = Mutex::new(Staging::new(device, size_of::<u64>(), patience)?);
        Ok(Cell { words, _holdings: holdings, failed })
    }

    /// The device's address of the word that says that the communicator is broken.
    pub fn failed(&self) -> u64 {
        self.failed.lock().address()
    }

    /// The device's address of the mapped words.
    pub fn host(&self) -> u64 {
        self.words.address()
    }

    /// Bytes of device memory.
    pub fn memory(&self) -> usize {
        size_of::<u64>()
    }

    /// Calls `body` with a stream apart from the caller's work.
    pub fn with_stream(&self, body: impl FnOnce(&CudaStream) -> Result<()>) -> Result<()> {
        body(self.failed.lock().stream())
    }

    /// Waits until that stream has nothing to do.
    pub fn drain(&self, what: &str, limit: NcclLimit) -> Result<()> {
        while !self.failed.lock().is_done()? {
            if Instant::now() >= limit.until {
                return Err(limit.expired(what));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    fn load(&self, word: usize) -> u64 {
        // SAFETY: the holdings live as long as `self`.
        unsafe { self.words.load(word) }
    }

    /// Makes the outputs of steps that end from now on NaN.
    fn poison(&self) {
        // A device that takes no copy any more runs no kernel either.
        if self.failed.lock().upload(0, &1u64.to_le_bytes()).is_ok() {
            let limit = NcclLimit::new("", PATIENCE);
            let _ = self.drain("", limit);
        }
    }
}

/// A connected plan's steps, as its watch sees them.
pub(in crate::runtime) struct Watched {
    cell: Arc<Cell>,
    rank: Arc<NcclRank>,
    comm: Weak<CommCore>,
    timeout: Duration,
    is_over: AtomicBool,
    bell: Bell,
}

impl Watched {
    /// This rank of NCCL's communicator.
    pub fn rank(&self) -> &NcclRank {
        &self.rank
    }

    /// The bad data that a step of some rank met since the last time, if any, with the rank.
    pub fn take_fault(&self) -> Option<(i32, DataFault)> {
        // SAFETY: the holdings live as long as the cell.
        DataFault::from_word(unsafe { self.cell.words.take(FAULT) })
    }

    /// Looks until the plan is over, or a step is: its peers did not come, or something else broke the communicator.
    fn run(&self) {
        let mut waiting: Option<(u64, Instant)> = None;
        let tick = WATCH.min(self.timeout / 4).max(Duration::from_millis(1));
        while !self.is_over.load(Ordering::Acquire) {
            let seen = self.bell.now();
            let Some(comm) = self.comm.upgrade() else { return };
            let (begun, ended) = (self.cell.load(BEGUN), self.cell.load(ENDED));
            waiting = match waiting {
                _ if begun == ended => None,
                Some((step, since)) if step == begun => Some((step, since)),
                _ => Some((begun, Instant::now())),
            };
            if waiting.is_some_and(|(_, since)| since.elapsed() > self.timeout) {
                let limit = NcclLimit::new("step_timeout", self.timeout);
                comm.end.bootstrap().fail(&expired(limit, begun));
            }
            if comm.end.bootstrap().status().is_some() {
                self.cell.poison();
                self.rank.abort(PATIENCE);
                return;
            }
            drop(comm);
            self.bell.wait(seen, Linger::Park, Some(Instant::now() + tick));
        }
    }
}

fn expired(limit: NcclLimit, step: u64) -> Error {
    limit.expired(&format!("step {step} over NCCL"))
}

/// The thread that watches a plan's steps; over when dropped.
pub(super) struct Watch {
    steps: Arc<Watched>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    pub fn start(cell: &Arc<Cell>, rank: Arc<NcclRank>, comm: &Arc<CommCore>) -> Result<Watch> {
        let steps = Arc::new(Watched {
            cell: Arc::clone(cell),
            rank,
            comm: Arc::downgrade(comm),
            timeout: comm.config.step_timeout,
            is_over: AtomicBool::new(false),
            bell: Bell::default(),
        });
        let watching = Arc::clone(&steps);
        let thread = spawn("treeattn-watch".into(), move || watching.run())?;
        Ok(Watch { steps, thread: Some(thread) })
    }

    pub fn steps(&self) -> &Arc<Watched> {
        &self.steps
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.steps.is_over.store(true, Ordering::Release);
        self.steps.bell.ring();
        if let Some(thread) = self.thread.take() {
            // A panic in it was its own end.
            let _ = thread.join();
        }
    }
}
