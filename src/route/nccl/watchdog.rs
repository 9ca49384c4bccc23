//! Ends steps over NCCL whose peers do not come: NCCL itself would wait for ever.
//!
//! Kernels count the steps that they begin and end, so that graph replays, which no host code sees, are watched, too.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::words::StepWords;
use crate::comm::errors;
use crate::comm::nccl::{NcclDeadline, NcclRank};
use crate::device::{EventCount, WaitStrategy, spawn};
use crate::error::{Error, Result};
use crate::route::rank::CudaRank;

/// How often the watchdog looks.
const INTERVAL: Duration = Duration::from_millis(50);
/// How long a step goes on without a peer that has left.
const GRACE: Duration = Duration::from_millis(250);
/// How long it waits for NCCL's own abort.
const ABORT_TIMEOUT: Duration = Duration::from_millis(200);

/// The thread that watches a plan's steps. Dropping it ends and joins the thread.
pub(in crate::route) struct Watchdog {
    watched: Arc<Watched>,
    thread: Option<JoinHandle<()>>,
}

/// A connected plan's steps.
struct Watched {
    words: Arc<StepWords>,
    nccl: Arc<NcclRank>,
    /// Also held by the route, which outlives the thread: the thread is never the one to give it back.
    rank: Arc<CudaRank>,
    timeout: Duration,
    is_over: AtomicBool,
    events: EventCount,
}

impl Watchdog {
    /// Watches the steps of a plan on `rank`, each of which may take `timeout`. `System` where the machine starts no thread.
    pub fn start(
        words: &Arc<StepWords>,
        nccl: Arc<NcclRank>,
        rank: &Arc<CudaRank>,
        timeout: Duration,
    ) -> Result<Watchdog> {
        let watched = Arc::new(Watched {
            words: Arc::clone(words),
            nccl,
            rank: Arc::clone(rank),
            timeout,
            is_over: AtomicBool::new(false),
            events: EventCount::default(),
        });
        let watching = Arc::clone(&watched);
        let thread = spawn("treeattn-watch".into(), move || watching.run())?;
        Ok(Watchdog { watched, thread: Some(thread) })
    }

    /// This rank of NCCL's communicator.
    pub fn nccl(&self) -> &NcclRank {
        &self.watched.nccl
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.watched.is_over.store(true, Ordering::Release);
        self.watched.events.notify();
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has ended it already.
            let _ = thread.join();
        }
    }
}

impl Watched {
    /// Looks until the plan is over, or a step is: its peers did not come, or something else broke the communicator.
    fn run(&self) {
        let mut waiting: Option<(u64, Instant)> = None;
        let mut lost: Option<(usize, Instant)> = None;
        let tick = INTERVAL.min(self.timeout / 4).max(Duration::from_millis(1));
        let bootstrap = self.rank.bootstrap();
        while !self.is_over.load(Ordering::Acquire) {
            let seen = self.events.key();
            let (begun, ended) = self.words.steps();
            waiting = match waiting {
                _ if begun == ended => None,
                Some((step, since)) if step == begun => Some((step, since)),
                _ => Some((begun, Instant::now())),
            };
            if waiting.is_some_and(|(_, since)| since.elapsed() > self.timeout) {
                bootstrap.fail(&expired(begun, self.timeout));
            }
            if waiting.is_some() && self.rank.has_left() {
                bootstrap.fail(&errors::left(self.rank.shard().rank as usize));
            }
            // A peer may leave after its last step while this rank is still in that step, which then ends soon.
            lost = match bootstrap.left_peer() {
                Some(peer) if waiting.is_some() => Some(lost.unwrap_or((peer, Instant::now()))),
                _ => None,
            };
            if let Some((peer, _)) = lost.filter(|(_, since)| since.elapsed() > GRACE) {
                bootstrap.fail(&errors::peer_lost(&format!("step {begun} over NCCL"), peer));
            }
            if let Some(error) = bootstrap.status() {
                self.rank.end_waits(&error);
                self.words.fail_steps();
                self.nccl.abort(ABORT_TIMEOUT);
                return;
            }
            self.events.wait(seen, WaitStrategy::Park, Some(Instant::now() + tick));
        }
    }
}

fn expired(step: u64, timeout: Duration) -> Error {
    NcclDeadline::new("step_timeout_ns", timeout).expired(&format!("step {step} over NCCL"))
}
