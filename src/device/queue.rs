//! The in-order queue behind a CPU stream.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::thread::{panic_message, spawn};
use crate::error::{Error, ErrorKind, Result};
use crate::fault;

/// Jobs run one after the other, in the order pushed, on a thread of the queue's own.
///
/// A job's error (or panic, as `Internal`) does not stop the queue: the first one since the last
/// [`synchronize`](Self::synchronize) is kept for it. Dropping finishes what is queued and joins the thread.
#[derive(Debug)]
pub struct Queue<J: Send + 'static> {
    shared: Arc<Shared<J>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared<J> {
    state: Mutex<State<J>>,
    /// Signalled when there is a job, or the end.
    work: Condvar,
    /// Signalled when a job is done.
    progress: Condvar,
}

#[derive(Debug)]
struct State<J> {
    jobs: VecDeque<J>,
    capacity: usize,
    pushed: u64,
    done: u64,
    error: Option<Error>,
    stop: bool,
}

impl<J: Send + 'static> Queue<J> {
    /// A queue of at most `capacity` waiting jobs (at least 1), whose thread is called `name` and hands each to `run`.
    /// Errors: `InvalidArgument`, `NoMemory`, `System` where the machine starts no thread.
    pub fn new(capacity: usize, name: &str, mut run: impl FnMut(J) -> Result<()> + Send + 'static) -> Result<Self> {
        if capacity == 0 {
            return Err(Error::invalid("capacity", capacity, "at least 1"));
        }
        let mut jobs = VecDeque::new();
        if jobs.try_reserve_exact(capacity).is_err() {
            let bytes = capacity.saturating_mul(size_of::<J>());
            return Err(Error::new(ErrorKind::NoMemory, format!("queue: no {bytes} bytes for {capacity} jobs")));
        }
        let state = State { jobs, capacity, pushed: 0, done: 0, error: None, stop: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), work: Condvar::new(), progress: Condvar::new() });
        let mine = Arc::clone(&shared);
        let thread = spawn(name.to_string(), move || mine.serve(&mut run))?;
        Ok(Queue { shared, thread: Some(thread) })
    }

    /// Queues a job. Allocates nothing. Where the queue is full it waits for room, at most `timeout`, then gives
    /// `Timeout` and drops the job.
    pub fn push(&self, job: J, timeout: Duration) -> Result<()> {
        let mut state = self.shared.lock();
        if state.jobs.len() == state.capacity {
            let deadline = Instant::now().checked_add(timeout);
            while state.jobs.len() == state.capacity {
                let left = match deadline {
                    Some(deadline) => deadline.saturating_duration_since(Instant::now()),
                    None => timeout,
                };
                if left.is_zero() {
                    let text = format!("stream: {} jobs are queued and none ended within {timeout:?}", state.capacity);
                    return Err(Error::new(ErrorKind::Timeout, text));
                }
                let waited = self.shared.progress.wait_timeout(state, left);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        state.jobs.push_back(job);
        state.pushed += 1;
        drop(state);
        self.shared.work.notify_one();
        Ok(())
    }

    /// Waits until every job pushed before is done, then returns the first error since the last call, and forgets it.
    /// From a job of the queue itself it is `Busy`.
    pub fn synchronize(&self) -> Result<()> {
        if self.on_own_thread() {
            return Err(Error::new(ErrorKind::Busy, "stream: a job cannot wait for the stream that runs it"));
        }
        let mut state = self.shared.lock();
        let last = state.pushed;
        while state.done < last {
            state = self.shared.progress.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.error.take().map_or(Ok(()), Err)
    }

    fn on_own_thread(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| thread.thread().id() == std::thread::current().id())
    }
}

impl<J: Send + 'static> Drop for Queue<J> {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_one();
        let own = self.on_own_thread();
        if let Some(thread) = self.thread.take()
            && !own
        {
            // The thread catches every panic of its jobs, so it ends in order.
            let _ = thread.join();
        }
    }
}

impl<J> Shared<J> {
    fn lock(&self) -> MutexGuard<'_, State<J>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, run: &mut impl FnMut(J) -> Result<()>) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                let result = catch_unwind(AssertUnwindSafe(|| {
                    fault::point("queue.run")?;
                    run(job)
                }));
                let result = result.unwrap_or_else(|payload| {
                    let text = format!("a job of the stream panicked: {}", panic_message(&*payload));
                    Err(Error::new(ErrorKind::Internal, text))
                });
                state = self.lock();
                state.done += 1;
                if let Err(error) = result {
                    state.error.get_or_insert(error);
                }
                self.progress.notify_all();
            } else if state.stop {
                return;
            } else {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn jobs_run_in_order_and_drop_finishes_them() {
        let (send, receive) = mpsc::channel();
        let queue = Queue::new(4, "test", move |n: u32| {
            send.send(n).map_err(|_| Error::new(ErrorKind::Internal, "nobody listens"))
        })
        .unwrap();
        for n in 0..1000 {
            queue.push(n, LONG).unwrap();
        }
        drop(queue);
        assert_eq!(receive.iter().collect::<Vec<_>>(), (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn the_first_error_is_reported_once_and_a_panic_is_one() {
        let queue = Queue::new(16, "test", |n: u32| match n {
            0 => Ok(()),
            1 => panic!("told to"),
            _ => Err(Error::invalid("n", n, "0")),
        })
        .unwrap();
        for n in [0, 1, 2, 0] {
            queue.push(n, LONG).unwrap();
        }
        let error = queue.synchronize().unwrap_err();
        assert_eq!((error.kind(), error.message().contains("told to")), (ErrorKind::Internal, true));
        queue.synchronize().unwrap();
        queue.push(2, LONG).unwrap();
        assert_eq!(queue.synchronize().unwrap_err().kind(), ErrorKind::InvalidArgument);
    }

    #[test]
    fn a_full_queue_waits_then_gives_up() {
        let (open, gate) = mpsc::channel::<()>();
        let queue = Queue::new(1, "test", move |()| gate.recv().map_err(|_| Error::new(ErrorKind::Internal, "gate")));
        let queue = queue.unwrap();
        // The first is taken from the queue at some moment, so at most two fit.
        let results: Vec<_> = (0..3).map(|_| queue.push((), Duration::from_millis(30))).collect();
        assert_eq!(results[2].as_ref().unwrap_err().kind(), ErrorKind::Timeout);
        let accepted = results.iter().filter(|r| r.is_ok()).count();
        for _ in 0..accepted {
            open.send(()).unwrap();
        }
        queue.synchronize().unwrap();
        assert!((1..=2).contains(&accepted));
        assert_eq!(Queue::new(0, "test", |()| Ok(())).unwrap_err().kind(), ErrorKind::InvalidArgument);
        assert_eq!(Queue::new(usize::MAX, "test", |_: u64| Ok(())).unwrap_err().kind(), ErrorKind::NoMemory);
    }
}
