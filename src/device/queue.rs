//! The in-order queue behind a CPU stream.

use std::collections::VecDeque;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::numa::Node;
use super::thread::{catch, spawn};
use crate::error::{Error, ErrorKind, ErrorList, Result};
use crate::fault;

/// Bytes that a task's closure may capture: the arguments of a decode step, their strides, and what runs it.
const TASK_BYTES: usize = 2000;
/// Alignment of what a closure captures.
const TASK_ALIGN: usize = 8;

/// Tasks run one after the other, in the order pushed, on a thread of the queue's own.
///
/// A task's error (or panic, as `Internal`) does not stop the queue: those since the last
/// [`synchronize`](Self::synchronize) are kept for it. Dropping finishes what is queued and joins the thread.
#[derive(Debug)]
pub struct Queue {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Signalled when there is a task, or the end.
    work: Condvar,
    /// Signalled when a task is done.
    progress: Condvar,
}

#[derive(Debug)]
struct State {
    tasks: VecDeque<Task>,
    capacity: usize,
    pushed: u64,
    done: u64,
    errors: ErrorList,
    stop: bool,
}

/// A closure kept in place, so that queueing one allocates nothing.
#[repr(C, align(8))]
struct Task {
    closure: MaybeUninit<[u8; TASK_BYTES]>,
    /// Calls the closure, which is then gone.
    call: unsafe fn(*mut u8) -> Result<()>,
    /// Drops it uncalled.
    discard: unsafe fn(*mut u8),
}

// SAFETY: a task is made of a closure that is `Send`, and of two functions.
unsafe impl Send for Task {}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Task")
    }
}

impl Task {
    fn new<F: FnOnce() -> Result<()> + Send + 'static>(closure: F) -> Task {
        const {
            assert!(size_of::<F>() <= TASK_BYTES && align_of::<F>() <= TASK_ALIGN, "a task captures too much");
        }
        /// # Safety
        /// `closure` is an `F` that is not used again.
        unsafe fn call<F: FnOnce() -> Result<()>>(closure: *mut u8) -> Result<()> {
            // SAFETY: `closure` points to an `F`. It is read once and not used again, so that it is dropped once.
            (unsafe { closure.cast::<F>().read() })()
        }
        /// # Safety
        /// As `call`.
        unsafe fn discard<F>(closure: *mut u8) {
            // SAFETY: `closure` points to an `F` that is not used again, so that it is dropped once.
            unsafe { closure.cast::<F>().drop_in_place() };
        }
        let mut task = Task { closure: MaybeUninit::uninit(), call: call::<F>, discard: discard::<F> };
        // SAFETY: the field is the first of a struct aligned to 8 bytes and has room for an `F`, as asserted above.
        unsafe { task.closure.as_mut_ptr().cast::<F>().write(closure) };
        task
    }

    fn run(self) -> Result<()> {
        let mut task = ManuallyDrop::new(self);
        // SAFETY: `new` wrote the closure that `call` was made for, moving a task moves its bytes, and the task is not
        // dropped, so that nothing uses the closure again.
        unsafe { (task.call)(task.closure.as_mut_ptr().cast()) }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        // SAFETY: as in `run`, whose tasks do not come here.
        unsafe { (self.discard)(self.closure.as_mut_ptr().cast()) };
    }
}

impl Queue {
    /// A queue of at most `capacity` waiting tasks (at least 1), whose thread is called `name`.
    /// Errors: `InvalidArgument`, `NoMemory`, `System` where the machine starts no thread.
    pub fn new(capacity: usize, name: &str) -> Result<Queue> {
        Queue::on(None, capacity, name)
    }

    /// As [`Queue::new`], with the thread on the processors of a node.
    pub(crate) fn on(node: Option<&'static Node>, capacity: usize, name: &str) -> Result<Queue> {
        if capacity == 0 {
            return Err(Error::invalid("capacity", capacity, "at least 1"));
        }
        let mut tasks = VecDeque::new();
        if tasks.try_reserve_exact(capacity).is_err() {
            let bytes = capacity.saturating_mul(size_of::<Task>());
            return Err(Error::new(ErrorKind::NoMemory, format!("queue: no {bytes} bytes for {capacity} tasks")));
        }
        let state = State { tasks, capacity, pushed: 0, done: 0, errors: ErrorList::default(), stop: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), work: Condvar::new(), progress: Condvar::new() });
        let serving = Arc::clone(&shared);
        let serve = move || {
            node.into_iter().for_each(Node::bind_thread);
            serving.serve();
        };
        let thread = spawn(name.to_string(), serve)?;
        Ok(Queue { shared, thread: Some(thread) })
    }

    /// Queues a task, whose closure must fit the queue's slots (checked when it is compiled). Allocates nothing. Where the
    /// queue is full it waits for room, at most `timeout`, then gives `Timeout` and drops the task.
    pub fn push<F>(&self, task: F, timeout: Duration) -> Result<()>
    where
        F: FnOnce() -> Result<()> + Send + 'static,
    {
        let mut state = self.shared.lock();
        if state.tasks.len() == state.capacity {
            let deadline = Instant::now().checked_add(timeout);
            while state.tasks.len() == state.capacity {
                let left = match deadline {
                    Some(deadline) => deadline.saturating_duration_since(Instant::now()),
                    None => timeout,
                };
                if left.is_zero() {
                    let text = format!("stream: {} jobs are queued and none ended within {timeout:?}", state.capacity);
                    drop(state);
                    return Err(Error::new(ErrorKind::Timeout, text));
                }
                let waited = self.shared.progress.wait_timeout(state, left);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        state.tasks.push_back(Task::new(task));
        state.pushed += 1;
        drop(state);
        self.shared.work.notify_one();
        Ok(())
    }

    /// Waits until every task pushed before is done, then returns the errors since the last call as one (the first, whose
    /// message tells of the others), and forgets them. From a task of the queue itself it is `Busy`.
    pub fn synchronize(&self) -> Result<()> {
        let mut state = self.wait(None)?;
        state.errors.take().map_or(Ok(()), Err)
    }

    /// Waits until every task pushed before is done, at most `timeout`, and leaves their errors to
    /// [`synchronize`](Self::synchronize). Whether they are done. From a task of the queue itself it is `Busy`.
    pub fn finish(&self, timeout: Duration) -> Result<bool> {
        let last = self.shared.lock().pushed;
        Ok(self.wait(Some(timeout))?.done >= last)
    }

    /// Waits for what was pushed before.
    fn wait(&self, timeout: Option<Duration>) -> Result<MutexGuard<'_, State>> {
        if self.on_own_thread() {
            return Err(Error::new(ErrorKind::Busy, "stream: a job cannot wait for the stream that runs it"));
        }
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.shared.lock();
        let last = state.pushed;
        while state.done < last {
            state = match until.map(|until| until.saturating_duration_since(Instant::now())) {
                None => self.shared.progress.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(left) if left.is_zero() => break,
                Some(left) => self.shared.progress.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
        Ok(state)
    }

    fn on_own_thread(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| thread.thread().id() == std::thread::current().id())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_one();
        let own = self.on_own_thread();
        if let Some(thread) = self.thread.take()
            && !own
        {
            // The thread catches every panic of its tasks, so it ends in order.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if let Some(task) = state.tasks.pop_front() {
                drop(state);
                let result = catch(|| {
                    fault::point("queue.run")?;
                    task.run()
                });
                state = self.lock();
                state.done += 1;
                if let Err(error) = result {
                    state.errors.push(error);
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
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn tasks_run_in_order_and_drop_finishes_them() {
        let (send, receive) = mpsc::channel();
        let queue = Queue::new(4, "test").unwrap();
        for n in 0..1000 {
            let send = send.clone();
            let task = move || send.send(n).map_err(|_| Error::new(ErrorKind::Internal, "nobody listens"));
            queue.push(task, LONG).unwrap();
        }
        drop((queue, send));
        assert_eq!(receive.iter().collect::<Vec<_>>(), (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn the_first_error_is_reported_once_and_a_panic_is_one() {
        let queue = Queue::new(16, "test").unwrap();
        let task = |n: u32| {
            move || match n {
                0 => Ok(()),
                1 => panic!("told to"),
                _ => Err(Error::invalid("n", n, "0")),
            }
        };
        for n in [0, 1, 2, 0] {
            queue.push(task(n), LONG).unwrap();
        }
        let error = queue.synchronize().unwrap_err();
        assert_eq!((error.kind(), error.message().contains("told to")), (ErrorKind::Internal, true));
        queue.synchronize().unwrap();
        queue.push(task(2), LONG).unwrap();
        assert_eq!(queue.synchronize().unwrap_err().kind(), ErrorKind::InvalidArgument);
    }

    #[test]
    fn a_full_queue_waits_then_gives_up() {
        let (open, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let queue = Queue::new(1, "test").unwrap();
        let task = || {
            let gate = Arc::clone(&gate);
            move || gate.lock().unwrap().recv().map_err(|_| Error::new(ErrorKind::Internal, "gate"))
        };
        // The first is taken from the queue at some moment, so at most two fit.
        let results: Vec<_> = (0..3).map(|_| queue.push(task(), Duration::from_millis(30))).collect();
        assert_eq!(results[2].as_ref().unwrap_err().kind(), ErrorKind::Timeout);
        let accepted = results.iter().filter(|r| r.is_ok()).count();
        for _ in 0..accepted {
            open.send(()).unwrap();
        }
        queue.synchronize().unwrap();
        assert!((1..=2).contains(&accepted));
        assert_eq!(Queue::new(0, "test").unwrap_err().kind(), ErrorKind::InvalidArgument);
        assert_eq!(Queue::new(usize::MAX, "test").unwrap_err().kind(), ErrorKind::NoMemory);
    }

    #[test]
    fn what_a_task_captures_is_dropped_once_run_refused_or_panicked() {
        static DROPS: AtomicUsize = AtomicUsize::new(0);
        struct Counted([u64; 100]);
        impl Drop for Counted {
            fn drop(&mut self) {
                assert!(self.0.iter().all(|&word| word == 7));
                DROPS.fetch_add(1, Ordering::Relaxed);
            }
        }
        let (open, gate) = mpsc::channel::<()>();
        let queue = Queue::new(1, "test").unwrap();
        let blocking = move || gate.recv().map_err(|_| Error::new(ErrorKind::Internal, "gate"));
        queue.push(blocking, LONG).unwrap();
        let counted = |panics: bool| {
            let counted = Counted([7; 100]);
            move || {
                // The whole of it is captured, not its numbers.
                let counted = &counted;
                assert!(!panics || counted.0[0] != 7, "told to");
                Ok(())
            }
        };
        // One waits behind the blocking task, which the thread has or has not yet taken; the other is refused.
        let queued = [counted(false), counted(false)].map(|task| queue.push(task, Duration::from_millis(30)));
        let refused = queued.iter().filter(|result| result.is_err()).count();
        assert_eq!(DROPS.load(Ordering::Relaxed), refused);
        open.send(()).unwrap();
        queue.push(counted(true), LONG).unwrap();
        assert_eq!(queue.synchronize().unwrap_err().kind(), ErrorKind::Internal);
        assert_eq!(DROPS.load(Ordering::Relaxed), 3);
    }
}
