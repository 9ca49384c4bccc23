//! Plans: everything a shape needs, allocated once.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::communicator::{CommCore, Exchanging};
use super::context::{LogLevel, Runtime};
use super::stream::{RunsOn, Stream};
use crate::attention::merge::{MergeArgs, MergeStep};
use crate::attention::{Algorithm, AttentionDesc, DecodeArgs, Keys, OutputMode, Step};
use crate::device::cuda::CudaStream;
use crate::device::{Device, DeviceKind, Team, Within, catch};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::RowTarget;
use crate::route::backend::{Place, RouteMemory};
use crate::route::choose;
use crate::route::context::StepContext;
use crate::route::rank::Rank;
use crate::route::{MergingRoute, Route};

/// A shape made ready on one rank. Clones are the same plan. In flight on one stream at a time.
#[derive(Clone)]
pub struct Plan {
    pub(super) core: Arc<Within<PlanCore>>,
}

/// Memory that a plan holds, in bytes. None of it depends on the length of the cache, but for the blocks of `RING`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlanMemory {
    /// Scratch of the backend and this rank's partials.
    pub workspace: u64,
    /// This rank's window, shared by all plans of the communicator.
    pub window: u64,
}

/// What a plan has done so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanStats {
    /// The number of this plan on its communicator, from 1.
    pub plan: u64,
    /// Steps run.
    pub steps: u64,
    /// Steps of the exchanges: rounds, one a chunk, and levels of the tree or hops of the ring.
    pub rounds: u64,
    /// Messages sent to peers.
    pub messages: u64,
    /// Bytes of partials, queries, keys and values sent to peers (each peer counted), headers not. A peer that reads a part of what
    /// lies in shared memory was sent that part.
    pub bytes_sent: u64,
    /// The most bytes held at once: workspace and window.
    pub peak_memory: u64,
    /// Of these, the bytes that the exchange works on: this rank's partial and those that it receives or, with `RING`,
    /// blocks of keys and values, with room for their scales and masks, and the partials of some. Windows are not among them.
    pub exchange_memory: u64,
    /// The exchange algorithm in use.
    pub algorithm: Algorithm,
    /// Why it was chosen.
    pub reason: String,
    /// This rank.
    pub rank: i32,
}

/// Where the output of a step goes: query tokens and heads, and their rows.
#[derive(Clone, Copy)]
pub(super) struct StepOutput {
    size: (usize, usize),
    target: RowTarget,
}

pub(super) struct PlanCore {
    pub(super) route: Box<dyn Route>,
    pub(super) context: StepContext,
    /// Where the threads of an engine's team meet. None on a GPU.
    pub(super) team: Option<Team>,
    memory: RouteMemory,
    /// Whether a step that runs on the CPU is under way.
    running: AtomicBool,
    /// Steps that are enqueued or running on the CPU.
    in_flight: Mutex<usize>,
    idle: Condvar,
    /// After the route, which uses what the communicator has.
    pub(super) comm: Arc<CommCore>,
}

/// Whether `device` serves `desc`: `Unsupported` names the field that it does not.
pub fn attention_supported(runtime: &Runtime, device: Device, desc: &AttentionDesc) -> Result<()> {
    runtime.check_device(device)?;
    desc.check()?;
    choose::supported(device.kind, desc)
}

impl Plan {
    /// A plan that its peers know of, too.
    pub(super) fn commit(core: PlanCore) -> Plan {
        core.comm.plans.store(core.context.plan, Ordering::Relaxed);
        let (algorithm, reason) = core.route.algorithm();
        let (plan, rank) = (core.context.plan, core.context.shard.rank);
        core.comm.runtime.log(LogLevel::Info, &format!("plan {plan} on rank {rank}: {}, {reason}", algorithm.name()));
        let deadline = core.context.config.step_timeout;
        Plan { core: Arc::new(Within::new(core, deadline)) }
    }

    /// Attends this rank's shard, exchanges the partials and writes the merged output. Allocates nothing.
    ///
    /// With a stream it enqueues; without one (CPU plans) it runs here and blocks, and also returns what went wrong
    /// in the step: after `InvalidData`, and `Mismatch` of a checked plan, outputs are written, with NaN for the sequence
    /// that the message names.
    ///
    /// A call that is refused (`InvalidArgument`, `Unsupported`, `ParentDestroyed`, `Capturing`, `Busy` while another step of
    /// this rank is under way) leaves outputs as they are. A step that fails, and every later step on its communicator,
    /// writes NaN to all of them; those later steps return the error at once, and on a CPU stream first wait for what is
    /// enqueued there, at most the step deadline.
    ///
    /// # Safety
    /// The buffers that `args` describes stay valid, and unchanged by others, until the step is done. On a GPU, steps of the plan
    /// that are under way together are on one stream, and so are the exchanging steps of its communicator.
    pub unsafe fn decode(&self, args: &DecodeArgs, stream: Option<&Stream>) -> Result<()> {
        let core = self.attending()?;
        // SAFETY: the caller keeps the arrays of `args` valid, and unchanged by others, until the step is done.
        let (step, output) = unsafe { core.decode_step(args) }?;
        // SAFETY: the step was checked for this plan; the caller keeps its buffers valid, and GPU steps on one stream.
        unsafe {
            self.issue(stream, output, core.merges(), move |plan, place| plan.route.decode(&plan.context, &step, place))
        }
    }

    /// Attends this rank's shard only; q, out and lse hold all heads. No exchange.
    ///
    /// # Safety
    /// As [`Plan::decode`].
    pub unsafe fn partial(&self, args: &DecodeArgs, stream: Option<&Stream>) -> Result<()> {
        let core = self.attending()?;
        let desc = &core.context.desc;
        choose::step_supported(core.comm.device.kind, desc, args)?;
        let mut step = Step::new(&desc.with_all_queries(), core.context.shard, args, desc.q_heads)?;
        // SAFETY: the caller keeps the arrays of `args` valid, and unchanged by others, until the step is done.
        unsafe { core.check_arrays(&mut step, Keys::Some) }?;
        let size = (args.query_tokens as usize, desc.q_heads as usize);
        let output = StepOutput { size, target: step.target(desc) };
        // SAFETY: as in `decode`, for all heads.
        unsafe { self.issue(stream, output, false, move |plan, place| plan.route.partial(&plan.context, &step, place)) }
    }

    /// Exchanges and merges partials that the engine made: every rank passes its own.
    ///
    /// # Safety
    /// As [`Plan::decode`].
    pub unsafe fn merge(&self, args: &MergeArgs, stream: Option<&Stream>) -> Result<()> {
        let core = &*self.core;
        core.comm.check_open()?;
        core.merging()?;
        let step = MergeStep::for_plan(args, &core.context.desc, core.context.heads.len())?;
        if core.comm.device.kind == DeviceKind::Cpu {
            // SAFETY: the caller keeps the arrays of `args`, which are host memory, valid and unchanged.
            unsafe { step.check_starts() }?;
        }
        let size = (step.tokens as usize, core.context.heads.len());
        let output = StepOutput { size, target: step.target };
        // SAFETY: as in `decode`.
        unsafe {
            self.issue(stream, output, core.merges(), move |plan, place| {
                plan.merging()?.merge(&plan.context, &step, place.stream())
            })
        }
    }

    /// The descriptor.
    pub fn desc(&self) -> &AttentionDesc {
        &self.core.context.desc
    }

    /// The heads in this rank's merged output.
    pub fn heads(&self) -> Range<usize> {
        self.core.context.heads.clone()
    }

    /// Memory that the plan holds.
    pub fn memory(&self) -> Result<PlanMemory> {
        self.core.comm.check_open()?;
        Ok(self.core.memory())
    }

    /// What the plan has done so far.
    pub fn stats(&self) -> Result<PlanStats> {
        let core = &self.core;
        core.comm.check_open()?;
        let (counters, memory) = (&core.context.counters, core.memory());
        let (algorithm, reason) = core.route.algorithm();
        Ok(PlanStats {
            plan: core.context.plan,
            steps: counters.steps.load(Ordering::Relaxed),
            rounds: counters.rounds.load(Ordering::Relaxed),
            messages: counters.messages.load(Ordering::Relaxed),
            bytes_sent: counters.bytes_sent.load(Ordering::Relaxed),
            peak_memory: memory.workspace + memory.window,
            exchange_memory: core.memory.exchange as u64,
            algorithm,
            reason: reason.to_string(),
            rank: core.context.shard.rank,
        })
    }

    /// Waits until no step of this plan is enqueued or running, at most `timeout`. Whether that came true.
    pub fn wait(&self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        let mut count = self.core.in_flight.lock();
        while *count > 0 {
            if self.core.idle.wait_until(&mut count, until).timed_out() {
                return *count == 0;
            }
        }
        true
    }

    /// `Capturing` while a capture forbids destroying the plan.
    pub fn check_destroy(&self) -> Result<()> {
        self.core.comm.rank.check_change()
    }

    /// How long destroying this plan may wait for its enqueued work.
    pub fn deadline(&self) -> Duration {
        self.core.context.config.step_timeout
    }

    /// The plan, if it is one that attends and its communicator is there.
    pub(super) fn attending(&self) -> Result<&PlanCore> {
        let core = &*self.core;
        core.comm.check_open()?;
        if core.context.desc.is_merge_only() {
            let wanted = "a plan with kv_heads of at least 1 (this one is merge-only)";
            return Err(Error::invalid("plan", "kv_heads = 0", wanted));
        }
        Ok(core)
    }

    /// Runs a step here, or enqueues it. `merges`: its output is that of all ranks, and none of a broken communicator.
    ///
    /// # Safety
    /// `output` is that of `step`, which was checked for this plan, and whose memory stays valid, and unchanged by others, until
    /// the step is done.
    unsafe fn issue<F>(&self, stream: Option<&Stream>, output: StepOutput, merges: bool, step: F) -> Result<()>
    where
        F: FnOnce(&PlanCore, Place<'_>) -> Result<()> + Send + 'static,
    {
        let core = &*self.core;
        let broken = || if merges { core.comm.check_unbroken() } else { Ok(()) };
        let exchanges = merges && core.context.exchanges();
        match Stream::runs_on(stream, core.comm.device)? {
            RunsOn::Cuda(cuda) => {
                let _exchanging = core.begin(exchanges)?;
                if let (true, Some(stream), Some(peers)) = (exchanges, stream, core.comm.rank.gpu_peers()) {
                    stream.tell_errors_of(peers);
                }
                broken().and_then(|()| step(core, Place::Stream(cuda))).inspect_err(|_| {
                    // A call that was refused leaves the communicator unbroken.
                    if broken().is_err() {
                        // SAFETY: the output's memory stays valid until the step is done, and this write is enqueued in its
                        // place. A GPU that takes no launch writes nothing, and says so itself.
                        let _ = unsafe { core.write_nan(&output, Some(cuda)) };
                    }
                })
            }
            RunsOn::Caller => {
                // SAFETY: this function was promised what `run_here` asks for.
                unsafe { self.run_here(&output, merges, |plan| step(plan, Place::Caller)) }
            }
            RunsOn::Queue(_) if !core.comm.rank.serves_streams() => {
                let wanted = "NULL: this transport's flags lack TREEATTN_TRANSPORT_STREAM_THREADS, so that its callbacks run on \
                              calling threads only";
                Err(Error::invalid("stream", "a stream", wanted))
            }
            RunsOn::Queue(queue) => {
                if let Err(error) = broken() {
                    // What is enqueued may write to the same output.
                    if queue.finish(core.context.config.step_timeout).unwrap_or(false) {
                        // SAFETY: the output's memory is host memory that is valid until this returns, and nothing that is
                        // enqueued writes to it any more.
                        unsafe { core.write_nan(&output, None)? };
                    }
                    return Err(error);
                }
                let stream_id = std::ptr::from_ref(queue).addr();
                let issued = exchanges.then(|| core.comm.issue_on(stream_id)).transpose()?;
                let counted = InFlight::new(&self.core);
                let task = move || {
                    let _issued = issued;
                    let plan = &*counted.0;
                    let _exchanging = plan.begin(exchanges)?;
                    let _running = plan.run_alone()?;
                    // SAFETY: the caller's promise, which lasts until this is done.
                    unsafe { plan.run(&output, exchanges, || step(plan, Place::Caller)) }
                };
                queue.push(task, core.context.config.step_timeout)
            }
        }
    }

    /// Runs a step on the calling thread. `merges` as in `issue`.
    ///
    /// # Safety
    /// As `issue`, until this returns.
    pub(super) unsafe fn run_here<F>(&self, output: &StepOutput, merges: bool, step: F) -> Result<()>
    where
        F: FnOnce(&PlanCore) -> Result<()>,
    {
        let core = &*self.core;
        let broken = || if merges { core.comm.check_unbroken() } else { Ok(()) };
        let exchanges = merges && core.context.exchanges();
        let counts = exchanges && broken().is_ok();
        let _issued = counts.then(|| core.comm.issue_on(0)).transpose()?;
        let _exchanging = core.begin(exchanges)?;
        let _running = core.run_alone()?;
        let _counted = InFlight::new(&self.core);
        // SAFETY: this function was promised what `run` asks for.
        let result = unsafe { core.run(output, exchanges, || broken().and_then(|()| step(core))) };
        result
            .inspect_err(|error| {
                // This call returns it, so that the status does not tell it again.
                error.claim();
            })
            .map_err(|error| if core.comm.group == 0 { error } else { explain_timeout(error, STEP_WITHOUT_STREAM) })
    }
}

/// A step that is counted as in flight for as long as this lives: run, refused, dropped or panicked.
struct InFlight(Arc<Within<PlanCore>>);

impl InFlight {
    fn new(plan: &Arc<Within<PlanCore>>) -> InFlight {
        *plan.in_flight.lock() += 1;
        InFlight(Arc::clone(plan))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let mut count = self.0.in_flight.lock();
        *count -= 1;
        if *count == 0 {
            self.0.idle.notify_all();
        }
    }
}

/// A step that runs on the CPU, for as long as this lives.
struct Running<'a>(&'a PlanCore);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.store(false, Ordering::Release);
    }
}

impl PlanCore {
    /// The plan of one rank, which its peers know nothing of yet.
    pub(super) fn build(comm: &Arc<CommCore>, desc: &AttentionDesc) -> Result<PlanCore> {
        attention_supported(&comm.runtime, comm.device, desc)?;
        let plan = comm.plans.load(Ordering::Relaxed) + 1;
        let context = StepContext::new(plan, desc, comm.shard(), &comm.config, &comm.board)?;
        let route = choose::choose(&context, &comm.rank)?;
        let memory = route.memory();
        let team = match &comm.rank {
            Rank::Cpu(rank) => Some(Team::new(rank.most_members, format!("team of rank {}", context.shard.rank))?),
            Rank::Cuda(_) => None,
        };
        Ok(PlanCore {
            route,
            context,
            team,
            memory,
            running: AtomicBool::new(false),
            in_flight: Mutex::new(0),
            idle: Condvar::new(),
            comm: Arc::clone(comm),
        })
    }

    /// Whether the output of steps is that of all ranks.
    pub(super) fn merges(&self) -> bool {
        self.context.desc.output != OutputMode::Local
    }

    /// The route, if it merges partials of the engine's own.
    fn merging(&self) -> Result<&dyn MergingRoute> {
        self.route.merging().ok_or_else(|| {
            let wanted = "a plan with an algorithm that exchanges partials, not keys and values";
            Error::unsupported("algorithm", self.context.desc.algorithm.name(), wanted)
        })
    }

    /// A checked step, and where its output goes.
    ///
    /// # Safety
    /// As [`Plan::decode`].
    pub(super) unsafe fn decode_step(&self, args: &DecodeArgs) -> Result<(Step, StepOutput)> {
        let context = &self.context;
        choose::step_supported(self.comm.device.kind, &context.desc, args)?;
        let mut step = Step::new(&context.desc, context.shard, args, context.heads.len() as i32)?;
        // SAFETY: the caller keeps the arrays of `args` valid, and unchanged by others; `Step::new` checked their pointers.
        unsafe { self.check_arrays(&mut step, Keys::All) }?;
        let size = (args.query_tokens as usize, context.heads.len());
        Ok((step, StepOutput { size, target: step.target(&context.desc) }))
    }

    fn memory(&self) -> PlanMemory {
        PlanMemory { workspace: self.memory.workspace as u64, window: self.comm.rank.bootstrap().window_bytes() as u64 }
    }

    /// Checks what a step's arrays say, as far as the host sees them.
    ///
    /// # Safety
    /// The arrays of a plan on the CPU are as long as the step's fields say, and written by nobody meanwhile.
    unsafe fn check_arrays(&self, step: &mut Step, keys: Keys) -> Result<()> {
        match self.comm.device.kind {
            // SAFETY: this function's contract, and a CPU's memory is host memory.
            DeviceKind::Cpu => unsafe { step.check_arrays(&self.context.desc, self.context.shard, keys) },
            DeviceKind::Cuda => step.check_unseen_lengths(&self.context.desc),
        }
    }

    /// Begins a step; one that exchanges is `Busy` while another call of the rank is.
    fn begin(&self, exchanges: bool) -> Result<Option<Exchanging<'_>>> {
        exchanges.then(|| self.comm.begin_exchange()).transpose()
    }

    /// Begins a step on the CPU: `Busy` while another step of this plan waits for peers with what the plan holds.
    fn run_alone(&self) -> Result<Option<Running<'_>>> {
        if !self.context.exchanges() {
            // Such steps wait for nobody, and so may wait for each other.
            return Ok(None);
        }
        match self.running.swap(true, Ordering::Acquire) {
            false => Ok(Some(Running(self))),
            true => Err(self.comm.busy_with("plan: found another step of it")),
        }
    }

    /// Runs a step on the calling thread. One that fails breaks the communicator, if it `exchanges`: its peers would wait for
    /// this rank. Its output is NaN.
    ///
    /// # Safety
    /// `output` is that of `step`, which was checked for this plan, in host memory that stays valid, and unchanged by others,
    /// until this returns.
    unsafe fn run(&self, output: &StepOutput, exchanges: bool, step: impl FnOnce() -> Result<()>) -> Result<()> {
        // Every later step of a broken communicator fails; only the first is logged.
        let is_news = !exchanges || self.comm.check_unbroken().is_ok();
        catch(step).inspect_err(|error| {
            if matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::Mismatch) {
                // Its sequence is NaN, the others are right.
                self.comm.runtime.log(LogLevel::Warning, error.message());
                return;
            }
            if is_news {
                self.comm.runtime.log(LogLevel::Error, error.message());
            }
            if exchanges {
                self.comm.rank.bootstrap().fail(error);
            }
            // SAFETY: the caller's promise; no worker writes any more. On a CPU it does not fail.
            let _ = unsafe { self.write_nan(output, None) };
        })
    }

    /// Writes NaN to all rows of an output.
    ///
    /// # Safety
    /// It is that of a step which was checked for this plan, in memory of the plan's device that stays valid, and unchanged by
    /// others, until this is done.
    unsafe fn write_nan(&self, output: &StepOutput, stream: Option<&CudaStream>) -> Result<()> {
        // SAFETY: `size` is what the target was checked for, and its memory is as this function was promised.
        unsafe { self.route.write_nan(&self.context, output.size, &output.target, stream) }
    }
}

/// Adds to a timeout what a caller whose ranks live in one process most often did wrong.
pub(super) fn explain_timeout(error: Error, cure: &str) -> Error {
    if error.kind() != ErrorKind::Timeout {
        return error;
    }
    let explained = Error::new(ErrorKind::Timeout, format!("{}; {cure}", error.message()));
    match error.rank() {
        Some(rank) => explained.with_rank(rank),
        None => explained,
    }
}

/// The cure where steps run without a stream.
const STEP_WITHOUT_STREAM: &str = "without a stream a step runs on the caller's thread until all ranks have come, so ranks of \
                                   one process need a thread or a CPU stream each";
