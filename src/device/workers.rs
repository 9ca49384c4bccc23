//! The worker threads of one rank.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::event_count::{EventCount, WaitStrategy};
use super::executor::{Executor, Job};
use super::float_state::FloatState;
use super::numa::Node;
use super::thread::{panic_message, spawn};
use crate::error::{Error, ErrorKind, Result};
use crate::fault;

/// A fixed set of threads that run one job at a time together. The calling thread takes part as worker 0; the others, the
/// helpers, park between runs (they spin for at most 20 us first where asked). Dropping joins them. Any thread may use it.
#[derive(Debug)]
pub struct Workers {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Held during a run: runs are serialised.
    running: Mutex<()>,
}

#[derive(Debug)]
struct Shared {
    /// Notified when there is a job, or the end.
    start: EventCount,
    /// Notified when the last helper has finished.
    done: EventCount,
    /// Helpers that have not finished the job.
    left: AtomicUsize,
    stop: AtomicBool,
    strategy: WaitStrategy,
    /// Written by `run` while every helper waits for `start`, read by helpers after its notification.
    job: UnsafeCell<Option<*const Job<'static>>>,
    panicked: Mutex<Option<String>>,
}

// SAFETY: the only parts that are not Sync are in `job`. `run` writes it while every helper waits for `start` (`left` is 0, and
// `running` is held), and the notification orders the write before the helpers' reads. What it points to is Sync, and `run`,
// which borrows it, returns after the last helper is done with it.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Workers {
    /// `threads` workers (at least 1), the caller among them, named `name`-1, `name`-2, ... `spin`: helpers and caller
    /// may spin for each other; say so only where the threads of all ranks have a core each. Errors: `InvalidArgument`,
    /// `System` where the machine starts no thread.
    pub fn new(threads: usize, name: &str, spin: bool) -> Result<Workers> {
        Workers::on(None, threads, name, spin)
    }

    /// As [`Workers::new`], with the helpers on the processors of a node. The calling thread runs where it runs.
    pub(crate) fn on(node: Option<&'static Node>, threads: usize, name: &str, spin: bool) -> Result<Workers> {
        if threads == 0 {
            return Err(Error::invalid("threads", threads, "at least 1"));
        }
        let shared = Arc::new(Shared {
            start: EventCount::default(),
            done: EventCount::default(),
            left: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            strategy: if spin { WaitStrategy::Spin } else { WaitStrategy::Park },
            job: UnsafeCell::new(None),
            panicked: Mutex::new(None),
        });
        let first = shared.start.key();
        let mut workers = Workers { shared, helpers: Vec::with_capacity(threads - 1), running: Mutex::new(()) };
        for index in 1..threads {
            let shared = Arc::clone(&workers.shared);
            let help = move || {
                node.into_iter().for_each(Node::bind_thread);
                shared.help(index, first);
            };
            workers.helpers.push(spawn(format!("{name}-{index}"), help)?);
        }
        Ok(workers)
    }
}

impl Executor for Workers {
    /// How many workers a job gets, the caller included.
    fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Runs `job(0)` on the calling thread. Runs are serialised.
    fn run(&self, job: &Job<'_>) -> Result<()> {
        fault::point("workers.run")?;
        let _running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        if !self.helpers.is_empty() {
            // SAFETY: only the lifetime in the type changes. Helpers use the pointer only while `left` counts them, and this call
            // returns, or unwinds, after that: a job's panic is caught in `work`.
            let job: *const Job<'static> = unsafe { std::mem::transmute::<*const Job<'_>, *const Job<'static>>(job) };
            // SAFETY: no helper reads the job now: all of them wait for `start`, since the last run ended with `left` at 0, and
            // `running` keeps other runs out.
            unsafe { *shared.job.get() = Some(job) };
            shared.left.store(self.helpers.len(), Ordering::Release);
            shared.start.notify();
        }
        {
            let _default = FloatState::enter();
            shared.work(0, job);
        }
        loop {
            let key = shared.done.key();
            if shared.left.load(Ordering::Acquire) == 0 {
                break;
            }
            shared.done.wait(key, shared.strategy, None);
        }
        match shared.panicked.lock().unwrap_or_else(PoisonError::into_inner).take() {
            None => Ok(()),
            Some(message) => Err(Error::new(ErrorKind::Internal, message)),
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.start.notify();
        for helper in self.helpers.drain(..) {
            // A helper catches every panic of its jobs, so it ends in order.
            let _ = helper.join();
        }
    }
}

impl Shared {
    /// What helper `index` does until the end; `key` is that of `start` before the first job.
    fn help(&self, index: usize, mut key: u32) {
        loop {
            while self.start.key() == key {
                self.start.wait(key, self.strategy, None);
            }
            // One notification a run, and no run begins before this helper has finished the last.
            key = key.wrapping_add(1);
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            // SAFETY: `run` wrote the job before the notification that this helper saw, and writes it again only after this
            // helper has counted itself out of `left`.
            if let Some(job) = unsafe { *self.job.get() } {
                // SAFETY: `run` borrows the job until `left` is 0.
                self.work(index, unsafe { &*job });
            }
            if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                self.done.notify();
            }
        }
    }

    fn work(&self, index: usize, job: &Job<'_>) {
        let result = catch_unwind(AssertUnwindSafe(|| {
            if let Err(error) = fault::point_at("workers.job", index as i32) {
                panic!("{error}");
            }
            job(index);
        }));
        if let Err(payload) = result {
            let message = format!("worker {index} panicked: {}", panic_message(&*payload));
            self.panicked.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn every_worker_runs_every_job_once() {
        for (threads, spin) in [(1, true), (2, true), (3, false), (8, false)] {
            let workers = Workers::new(threads, "test", spin).unwrap();
            let counts: Vec<AtomicU64> = (0..threads).map(|_| AtomicU64::new(0)).collect();
            for _ in 0..2000 {
                workers
                    .run(&|i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    })
                    .unwrap();
            }
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 2000), "{threads} threads: {counts:?}");
        }
        assert_eq!(Workers::new(0, "test", true).unwrap_err().kind(), ErrorKind::InvalidArgument);
    }

    #[test]
    fn runs_from_several_threads_take_turns() {
        let workers = Workers::new(3, "test", false).unwrap();
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let mine = AtomicUsize::new(0);
                        workers
                            .run(&|_| {
                                assert!(inside.fetch_add(1, Ordering::SeqCst) < 3);
                                mine.fetch_add(1, Ordering::SeqCst);
                                inside.fetch_sub(1, Ordering::SeqCst);
                            })
                            .unwrap();
                        assert_eq!(mine.into_inner(), 3);
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_is_an_error_and_the_workers_go_on() {
        let workers = Workers::new(3, "test", false).unwrap();
        for bad in 0..3 {
            let done = AtomicUsize::new(0);
            let error = workers
                .run(&|i| {
                    if i == bad {
                        panic!("worker {i} was told to");
                    }
                    done.fetch_add(1, Ordering::SeqCst);
                })
                .unwrap_err();
            assert_eq!((error.kind(), done.into_inner()), (ErrorKind::Internal, 2));
            assert!(error.message().contains(&format!("worker {bad} was told to")), "{error}");
            workers.run(&|_| ()).unwrap();
        }
    }

    #[test]
    fn helpers_block_signals() {
        let workers = Workers::new(2, "test", false).unwrap();
        let masks: Vec<Mutex<bool>> = (0..2).map(|_| Mutex::new(false)).collect();
        workers
            .run(&|i| {
                // SAFETY: reads the thread's own mask into a local.
                let blocked = unsafe {
                    let mut set = std::mem::zeroed();
                    libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut set);
                    libc::sigismember(&set, libc::SIGTERM) == 1 && libc::sigismember(&set, libc::SIGUSR1) == 1
                };
                *masks[i].lock().unwrap() = blocked;
            })
            .unwrap();
        assert_eq!((*masks[0].lock().unwrap(), *masks[1].lock().unwrap()), (false, true));
    }
}
