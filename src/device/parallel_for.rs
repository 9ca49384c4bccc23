//! The engine's threads, by its own parallel-for.
//!
//! The engine's function is not the library's: it may return before its tasks have ended, leave some out, run one twice, or
//! call one long after the run has ended. So what it passes on to its threads is a [`Gate`], which lives as long as the process.
//! A gate lets each task of a run begin once, and none while no run is open. A run ends when its gate is closed and no task is
//! inside.

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::event_count::{EventCount, WaitStrategy};
use super::executor::{Executor, Job};
use super::float_state::FloatState;
use super::process::PerProcess;
use super::thread::panic_message;
use crate::error::{Error, ErrorKind, Result};
use crate::fault;

/// Most threads of an executor.
const MAX_THREADS: usize = 1024;
/// Most gates that are retained because late tasks may still use them. Beyond that there is no gate for a new run.
const MOST_RETAINED: usize = 4096;

/// A task as the engine calls it.
pub type TaskCallback = unsafe extern "C" fn(data: *mut c_void, i: i32);

/// The engine's parallel-for: calls `task(data, i)` once for every i below `n`, on whatever threads, and returns 0 when all have
/// returned; anything else is a failure.
pub type ParallelCallback =
    unsafe extern "C" fn(ctx: *mut c_void, n: i32, task: Option<TaskCallback>, data: *mut c_void) -> i32;

/// An engine's function that runs tasks on its threads, for [`CommConfig`](crate::comm::CommConfig).
#[derive(Clone, Copy)]
pub struct EngineExecutor {
    ctx: *mut c_void,
    threads: usize,
    parallel: ParallelCallback,
}

// SAFETY: an address that only the engine's function looks at, and that may be called from any thread (`new`).
unsafe impl Send for EngineExecutor {}
// SAFETY: as above.
unsafe impl Sync for EngineExecutor {}

impl EngineExecutor {
    /// Steps are cut into `threads` parts, 1 to 1,024, each a task. `InvalidArgument` for another number.
    ///
    /// # Safety
    /// `parallel` does what [`ParallelCallback`] says with `ctx`, does not unwind, and may be called from every thread that
    /// runs a step, those of several ranks at the same time, until the last communicator with this executor, its plans and their
    /// steps are gone. `data` and `task` go to the engine's threads unchanged.
    pub unsafe fn new(ctx: *mut c_void, threads: i32, parallel: ParallelCallback) -> Result<EngineExecutor> {
        let found = usize::try_from(threads).ok().filter(|threads| (1..=MAX_THREADS).contains(threads));
        let Some(threads) = found else {
            return Err(Error::invalid("executor.threads", threads, format!("1 to {MAX_THREADS}")));
        };
        Ok(EngineExecutor { ctx, threads, parallel })
    }

    /// Parts of a step.
    pub fn threads(&self) -> usize {
        self.threads
    }
}

impl PartialEq for EngineExecutor {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::fn_addr_eq(self.parallel, other.parallel) && (self.ctx, self.threads) == (other.ctx, other.threads)
    }
}

impl Eq for EngineExecutor {}

impl fmt::Debug for EngineExecutor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineExecutor").field("ctx", &self.ctx).field("threads", &self.threads).finish_non_exhaustive()
    }
}

/// Runs jobs by an engine's function.
#[derive(Debug)]
pub struct ParallelFor {
    engine: EngineExecutor,
    /// None after a run in which the engine's function did not do what [`ParallelCallback`] says: that gate was retained.
    /// Locked during a run, so that runs are serialised.
    gate: Mutex<Option<&'static Gate>>,
}

impl ParallelFor {
    /// `NoMemory` where there is none for the gate.
    pub fn new(engine: EngineExecutor) -> Result<ParallelFor> {
        Ok(ParallelFor { engine, gate: Mutex::new(Some(Gate::take(engine.threads)?)) })
    }
}

impl Executor for ParallelFor {
    fn threads(&self) -> usize {
        self.engine.threads
    }

    /// Runs are serialised. `Executor` where the engine's function did not run each task once, or returned anything but 0; that
    /// waits for the tasks that have begun, which are the library's and wait for nobody.
    fn run(&self, job: &Job<'_>) -> Result<()> {
        fault::point("executor.run")?;
        let mut held = self.gate.lock();
        let gate = match *held {
            Some(gate) => gate,
            None => Gate::take(self.engine.threads)?,
        };
        *held = None;
        let open = OpenGate::new(gate, job, self.engine.threads);
        let (n, data) = (self.engine.threads as i32, std::ptr::from_ref(gate).cast_mut().cast());
        // SAFETY: `EngineExecutor::new` was promised that the function may be called with its `ctx` from every thread that runs
        // a step. The gate lives as long as the process, so that the task may be called with it at any time.
        let code = unsafe { (self.engine.parallel)(self.engine.ctx, n, Some(task), data) };
        drop(open);
        let outcome = gate.outcome(code);
        match &outcome {
            Err(error) if error.kind() == ErrorKind::Executor => gate.retain(),
            _ => *held = Some(gate),
        }
        outcome
    }
}

impl Drop for ParallelFor {
    fn drop(&mut self) {
        if let Some(gate) = self.gate.get_mut().take() {
            gate.give_back();
        }
    }
}

/// What the engine's threads call.
///
/// # Safety
/// `data` is a gate.
unsafe extern "C" fn task(data: *mut c_void, i: i32) {
    // SAFETY: this function's contract; gates live as long as the process.
    unsafe { &*data.cast::<Gate>() }.enter(i);
}

/// What tasks go through.
#[repr(align(128))]
struct Gate {
    /// Calls that are inside.
    inside: AtomicUsize,
    open: AtomicBool,
    /// Tasks of the run that is open.
    tasks: AtomicUsize,
    /// The tasks of this run that have begun.
    taken: Box<[AtomicBool]>,
    /// Written while the gate is closed and nobody is inside; read by those who find it open.
    job: UnsafeCell<Option<*const Job<'static>>>,
    /// Notified when the last has left.
    left: EventCount,
    /// The first call of the run that should not have been.
    odd: Mutex<Option<OddCall>>,
    panicked: Mutex<Option<String>>,
}

#[derive(Clone, Copy, Debug)]
enum OddCall {
    OutOfRange(i32),
    Twice(i32),
}

// SAFETY: the only part that is not Sync is `job`. An `OpenGate` writes it while the gate is closed and empty. Who reads it has
// counted itself inside before it found the gate open, and closing waits for whoever is inside; what it points to is Sync.
unsafe impl Sync for Gate {}
// SAFETY: as above.
unsafe impl Send for Gate {}

/// Gates that no executor uses.
static FREE: PerProcess<Mutex<Vec<&'static Gate>>> = PerProcess::new();
/// Gates that late tasks may still use and that no run uses again. They are never freed.
static RETAINED: PerProcess<Mutex<Vec<&'static Gate>>> = PerProcess::new();

impl Gate {
    /// A gate for `tasks` tasks that no one else has.
    fn take(tasks: usize) -> Result<&'static Gate> {
        let mut free = FREE.get().lock();
        if let Some(at) = free.iter().position(|gate| gate.taken.len() >= tasks) {
            return Ok(free.swap_remove(at));
        }
        drop(free);
        let retained = RETAINED.get().lock().len();
        if retained >= MOST_RETAINED {
            let message = format!(
                "executor.parallel: found {retained} runs in this process in which it did not keep its promise, wanted fewer"
            );
            return Err(Error::new(ErrorKind::Executor, message));
        }
        let mut taken = Vec::new();
        if taken.try_reserve_exact(tasks).is_err() {
            return Err(Error::new(ErrorKind::NoMemory, format!("executor.threads: no memory for {tasks}")));
        }
        taken.resize_with(tasks, AtomicBool::default);
        Ok(Box::leak(Box::new(Gate {
            inside: AtomicUsize::new(0),
            open: AtomicBool::new(false),
            tasks: AtomicUsize::new(0),
            taken: taken.into_boxed_slice(),
            job: UnsafeCell::new(None),
            left: EventCount::default(),
            odd: Mutex::new(None),
            panicked: Mutex::new(None),
        })))
    }

    /// Makes the gate free for the next executor.
    fn give_back(&'static self) {
        FREE.get().lock().push(self);
    }

    /// Retains the gate, for tasks of its last run that may come late.
    fn retain(&'static self) {
        RETAINED.get().lock().push(self);
    }

    /// A call of task `i`, from any thread at any time.
    fn enter(&self, i: i32) {
        // Sequentially consistent, as closing: either this call sees the gate closed, or closing sees this call inside.
        self.inside.fetch_add(1, Ordering::SeqCst);
        if self.open.load(Ordering::SeqCst) {
            let tasks = self.tasks.load(Ordering::Relaxed);
            match usize::try_from(i).ok().filter(|&i| i < tasks) {
                None => self.note(OddCall::OutOfRange(i)),
                Some(at) if self.taken[at].swap(true, Ordering::AcqRel) => self.note(OddCall::Twice(i)),
                // SAFETY: the gate was open once this call was inside, so that the job was written before, and neither it nor
                // what it borrows goes before this call has left.
                Some(at) => self.work(at, unsafe { *self.job.get() }),
            }
        }
        if self.inside.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.left.notify();
        }
    }

    fn note(&self, odd: OddCall) {
        self.odd.lock().get_or_insert(odd);
    }

    fn work(&self, index: usize, job: Option<*const Job<'static>>) {
        let Some(job) = job else { return };
        let _default = FloatState::enter();
        let result = catch_unwind(AssertUnwindSafe(|| {
            if let Err(error) = fault::point_at("executor.job", index as i32) {
                panic!("{error}");
            }
            // SAFETY: as in `enter`, from where this is called.
            unsafe { (*job)(index) };
        }));
        if let Err(payload) = result {
            let message = format!("task {index} panicked: {}", panic_message(&*payload));
            self.panicked.lock().get_or_insert(message);
        }
    }

    /// The result of the run that has ended, in which the engine's function returned `code`.
    fn outcome(&self, code: i32) -> Result<()> {
        let tasks = self.tasks.load(Ordering::Relaxed);
        let missing = self.taken[..tasks].iter().position(|taken| !taken.load(Ordering::Acquire));
        let found = match (self.odd.lock().take(), missing) {
            _ if code != 0 => Some((format!("a return value of {code}"), "0".to_string())),
            (Some(OddCall::OutOfRange(i)), _) => {
                Some((format!("a call of task {i}"), format!("calls of tasks 0 to {}", tasks - 1)))
            }
            (Some(OddCall::Twice(i)), _) => Some((format!("two calls of task {i}"), "one of each task".to_string())),
            (None, Some(i)) => {
                let found = format!("no call of task {i} of {tasks} before it returned");
                Some((found, "one of each task".to_string()))
            }
            (None, None) => None,
        };
        if let Some((found, wanted)) = found {
            self.panicked.lock().take();
            let message = format!("executor.parallel: found {found}, wanted {wanted}");
            return Err(Error::new(ErrorKind::Executor, message));
        }
        match self.panicked.lock().take() {
            None => Ok(()),
            Some(message) => Err(Error::new(ErrorKind::Internal, message)),
        }
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gate")
    }
}

/// A gate that lets tasks in for as long as this lives. Dropping waits for those inside.
struct OpenGate(&'static Gate);

impl OpenGate {
    /// Opens a gate that is closed and empty.
    fn new(gate: &'static Gate, job: &Job<'_>, tasks: usize) -> OpenGate {
        for taken in &gate.taken[..tasks] {
            taken.store(false, Ordering::Relaxed);
        }
        gate.tasks.store(tasks, Ordering::Relaxed);
        // SAFETY: only the lifetime in the type changes; nobody uses the pointer once this is dropped, which the borrow outlives.
        let job = unsafe { std::mem::transmute::<*const Job<'_>, *const Job<'static>>(job) };
        // SAFETY: the gate is closed, so that whoever comes does not look at it, and nobody else has the gate.
        unsafe { *gate.job.get() = Some(job) };
        gate.open.store(true, Ordering::SeqCst);
        OpenGate(gate)
    }
}

impl Drop for OpenGate {
    fn drop(&mut self) {
        let gate = self.0;
        gate.open.store(false, Ordering::SeqCst);
        loop {
            let key = gate.left.key();
            if gate.inside.load(Ordering::SeqCst) == 0 {
                break;
            }
            gate.left.wait(key, WaitStrategy::Yield, None);
        }
        // SAFETY: the gate is closed, and nobody is inside who found it open.
        unsafe { *gate.job.get() = None };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;
    use std::time::Duration;

    /// What the engine of a test does with its tasks.
    type Engine = Box<dyn Fn(i32, Call) -> i32 + Sync>;

    /// A task and its data, as the library gave them.
    #[derive(Clone, Copy)]
    struct Call(TaskCallback, usize);

    impl Call {
        fn task(self, i: i32) {
            // SAFETY: may be called at any time, from any thread.
            unsafe { (self.0)(self.1 as *mut c_void, i) }
        }
    }

    /// # Safety
    /// `ctx` is a live engine, and `task` may be called with `data`.
    unsafe extern "C" fn parallel(ctx: *mut c_void, n: i32, task: Option<TaskCallback>, data: *mut c_void) -> i32 {
        // SAFETY: the tests pass an engine that lives on.
        let engine = unsafe { &*ctx.cast::<Engine>() };
        engine(n, Call(task.unwrap(), data as usize))
    }

    fn with(threads: i32, engine: impl Fn(i32, Call) -> i32 + Sync + 'static) -> ParallelFor {
        let engine: Engine = Box::new(engine);
        let engine: &'static Engine = Box::leak(Box::new(engine));
        let ctx = std::ptr::from_ref(engine).cast_mut().cast();
        // SAFETY: the engine lives on; some break their promise on purpose, which `run` withstands.
        ParallelFor::new(unsafe { EngineExecutor::new(ctx, threads, parallel) }.unwrap()).unwrap()
    }

    fn counted(executor: &ParallelFor) -> (Result<()>, Vec<u64>) {
        let counts: Vec<AtomicU64> = (0..executor.threads()).map(|_| AtomicU64::new(0)).collect();
        let result = executor.run(&|i| {
            counts[i].fetch_add(1, Ordering::Relaxed);
        });
        (result, counts.iter().map(|count| count.load(Ordering::Relaxed)).collect())
    }

    fn on_threads(n: i32, call: Call) -> i32 {
        std::thread::scope(|scope| {
            for i in 0..n {
                scope.spawn(move || call.task(i));
            }
        });
        0
    }

    #[test]
    fn every_task_runs_once_on_the_engines_threads() {
        for threads in [1, 2, 7] {
            let executor = with(threads, on_threads);
            for _ in 0..50 {
                assert_eq!(counted(&executor), (Ok(()), vec![1; threads as usize]));
            }
            let here = std::thread::current().id();
            executor.run(&|_| assert_ne!(std::thread::current().id(), here)).unwrap();
        }
        for threads in [0, -1, 1025, i32::MAX, i32::MIN] {
            // SAFETY: nothing is run.
            let error = unsafe { EngineExecutor::new(std::ptr::null_mut(), threads, parallel) }.unwrap_err();
            assert_eq!(error.message(), format!("executor.threads: found {threads}, wanted 1 to 1024"));
        }
    }

    #[test]
    fn a_broken_promise_is_an_error_that_says_which_and_the_next_run_is_good() {
        let before = |i: i32| {
            move |n: i32, call: Call| {
                call.task(i);
                on_threads(n, call)
            }
        };
        let broken: [(Engine, &str); 6] = [
            (Box::new(|n, call| on_threads(n, call) - 3), "found a return value of -3, wanted 0"),
            (
                Box::new(|n, call| on_threads(n - 1, call)),
                "found no call of task 3 of 4 before it returned, wanted one of each task",
            ),
            (Box::new(|_, _| 0), "found no call of task 0 of 4 before it returned, wanted one of each task"),
            (Box::new(|n, call| on_threads(n + 1, call)), "found a call of task 4, wanted calls of tasks 0 to 3"),
            (Box::new(before(-1)), "found a call of task -1, wanted calls of tasks 0 to 3"),
            (Box::new(before(2)), "found two calls of task 2, wanted one of each task"),
        ];
        for (broken, message) in broken {
            let is_good = AtomicBool::new(false);
            let executor = with(4, move |n, call| match is_good.swap(true, Ordering::Relaxed) {
                false => broken(n, call),
                true => on_threads(n, call),
            });
            let (result, counts) = counted(&executor);
            let error = result.unwrap_err();
            assert_eq!(
                (error.kind(), error.message()),
                (ErrorKind::Executor, &*format!("executor.parallel: {message}"))
            );
            assert!(counts.iter().all(|&count| count <= 1), "{counts:?}");
            assert_eq!(counted(&executor), (Ok(()), vec![1; 4]));
        }
    }

    #[test]
    fn tasks_that_outlive_the_call_are_waited_for_and_later_ones_do_nothing() {
        static BEGUN: AtomicUsize = AtomicUsize::new(0);
        static LATE: Mutex<Option<Call>> = Mutex::new(None);
        let executor = with(3, |_, call| {
            (0..2).for_each(|i| drop(std::thread::spawn(move || call.task(i))));
            *LATE.lock() = Some(call);
            while BEGUN.load(Ordering::SeqCst) < 2 {
                std::thread::yield_now();
            }
            0
        });
        let ended = AtomicUsize::new(0);
        let job = |_: usize| {
            BEGUN.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(50));
            ended.fetch_add(1, Ordering::SeqCst);
        };
        let error = executor.run(&job).unwrap_err();
        assert_eq!(ended.load(Ordering::SeqCst), 2, "both were inside");
        assert!(error.message().contains("no call of task 2 of 3"), "{error}");
        drop(executor);
        let late = LATE.lock().take().unwrap();
        (0..3).for_each(|i| late.task(i));
        assert_eq!(ended.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_panic_is_an_error_and_the_executor_goes_on() {
        let executor = with(3, on_threads);
        let error = executor.run(&|i| assert_ne!(i, 1, "task {i} was told to")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Internal);
        assert!(error.message().contains("task 1 panicked") && error.message().contains("was told to"), "{error}");
        assert_eq!(counted(&executor), (Ok(()), vec![1; 3]));
    }
}
