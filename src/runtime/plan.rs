//! Plans: everything a shape needs, allocated once.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::agreement;
use super::communicator::{CommCore, Communicator};
use super::context::{LogLevel, Runtime};
use super::stream::{RunsOn, Stream};
use crate::attention::merge::{MergeArgs, MergeStep};
use crate::attention::{Algorithm, AttentionDesc, DecodeArgs, OutputMode, Step};
use crate::device::cuda::CudaStream;
use crate::device::{Device, Within, spawn_scoped};
use crate::error::{Error, ErrorKind, Result};
use crate::route::choose;
use crate::route::context::StepContext;
use crate::route::{Route, RouteMemory};

/// A shape made ready on one rank. Clones are the same plan. In flight on one stream at a time.
#[derive(Clone)]
pub struct Plan {
    core: Arc<Within<PlanCore>>,
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
    /// Bytes of partials, keys and values sent to peers (each peer counted), headers not. A peer that reads a part of what
    /// lies in shared memory was sent that part.
    pub bytes_sent: u64,
    /// The most bytes held at once: workspace and window.
    pub peak_memory: u64,
    /// Of these, the bytes that the exchange works on: this rank's partial and those that it receives or, with `RING`,
    /// blocks of keys and values and the partials of some. Windows are not among them.
    pub exchange_memory: u64,
    /// The exchange algorithm in use.
    pub algorithm: Algorithm,
    /// Why it was chosen.
    pub reason: String,
    /// This rank.
    pub rank: i32,
}

struct PlanCore {
    route: Box<dyn Route>,
    context: StepContext,
    memory: RouteMemory,
    /// Steps that are enqueued or running on the CPU.
    in_flight: Mutex<usize>,
    idle: Condvar,
    /// After the route, which uses what the communicator has.
    comm: Arc<CommCore>,
}

/// Whether `device` serves `desc`: `Unsupported` names the field that it does not.
pub fn attention_supported(runtime: &Runtime, device: Device, desc: &AttentionDesc) -> Result<()> {
    runtime.check_device(device)?;
    desc.check()?;
    choose::supported(device.kind, desc)
}

impl Plan {
    /// A plan of this rank. Collective: every rank calls it, each from a thread of its own; blocks until all have.
    ///
    /// A difference between the ranks' descriptors is `Mismatch` on every rank, naming the field.
    pub fn create(comm: &Communicator, desc: &AttentionDesc) -> Result<Plan> {
        let core = &comm.core;
        core.check_open()?;
        core.check_unbroken()?;
        let built = PlanCore::build(core, desc);
        if core.shard().world == 1 {
            return Ok(Plan::commit(built?));
        }
        // A rank that fails here still takes part, so that its peers hear of it at once.
        let more = built.as_ref().map(|plan| plan.route.agreement());
        let mine = agreement::encode(core.plans.load(Ordering::Relaxed), desc, more);
        let blobs = core.rank.bootstrap().allgather(&mine)?;
        let plan = built?;
        agreement::compare(&blobs)?;
        plan.route.connect(&plan.context)?;
        Ok(Plan::commit(plan))
    }

    /// The same for all ranks of a local group from one thread. `comms` holds every rank once.
    pub fn create_all(comms: &[&Communicator], desc: &AttentionDesc) -> Result<Vec<Plan>> {
        let Some(first) = comms.first() else {
            return Err(Error::invalid("n", 0, "every rank of the group"));
        };
        let world = first.world();
        let mut seen = vec![false; world as usize];
        for comm in comms {
            comm.core.check_open()?;
            comm.core.check_unbroken()?;
            let rank = comm.rank() as usize;
            let fresh = seen.get_mut(rank).is_some_and(|seen| !std::mem::replace(seen, true));
            if comm.core.group == 0 || comm.core.group != first.core.group || !fresh {
                let found = format!("rank {rank} of another group, or twice");
                return Err(Error::invalid("comms", found, "every rank of one local group, once"));
            }
        }
        if comms.len() != world as usize {
            return Err(Error::invalid("n", comms.len(), format!("{world}, every rank of the group")));
        }
        let next = first.core.plans.load(Ordering::Relaxed);
        if let Some(odd) = comms.iter().find(|comm| comm.core.plans.load(Ordering::Relaxed) != next) {
            let found = odd.core.plans.load(Ordering::Relaxed);
            let message = format!("comms: found {found} plans on rank {}, wanted {next} as on rank 0", odd.rank());
            return Err(Error::new(ErrorKind::Mismatch, message).with_rank(odd.rank()));
        }
        let built: Vec<PlanCore> = comms.iter().map(|comm| PlanCore::build(&comm.core, desc)).collect::<Result<_>>()?;
        connect_all(&built)?;
        Ok(built.into_iter().map(Plan::commit).collect())
    }

    fn commit(core: PlanCore) -> Plan {
        core.comm.plans.store(core.context.plan, Ordering::Relaxed);
        let deadline = core.context.config.step_timeout;
        Plan { core: Arc::new(Within::new(core, deadline)) }
    }

    /// Attends this rank's shard, exchanges the partials and writes the merged output. Allocates nothing.
    ///
    /// With a stream it enqueues; without one (CPU plans) it runs here and blocks, and also returns what went wrong
    /// in the step: after `InvalidData` outputs are written, with NaN for the sequence that the message names.
    ///
    /// # Safety
    /// The buffers that `args` describes stay valid, and unchanged by others, until the step is done.
    pub unsafe fn decode(&self, args: &DecodeArgs, stream: Option<&Stream>) -> Result<()> {
        let core = self.attending()?;
        if core.context.desc.output != OutputMode::Local {
            core.comm.check_unbroken()?;
        }
        let step = Step::new(&core.context.desc, core.context.shard, args, core.context.heads.len() as i32)?;
        // SAFETY: the step was checked for this plan; the caller keeps its buffers valid until it is done.
        self.issue(stream, core.context.exchanges(), move |plan, stream| unsafe {
            plan.route.decode(&plan.context, &step, stream)
        })
    }

    /// Attends this rank's shard only; out and lse hold all heads. No exchange.
    ///
    /// # Safety
    /// As [`Plan::decode`].
    pub unsafe fn partial(&self, args: &DecodeArgs, stream: Option<&Stream>) -> Result<()> {
        let core = self.attending()?;
        let step = Step::new(&core.context.desc, core.context.shard, args, core.context.desc.q_heads)?;
        // SAFETY: as in `decode`, for all heads.
        self.issue(stream, false, move |plan, stream| unsafe { plan.route.partial(&plan.context, &step, stream) })
    }

    /// Exchanges and merges partials that the engine made: every rank passes its own.
    ///
    /// # Safety
    /// As [`Plan::decode`].
    pub unsafe fn merge(&self, args: &MergeArgs, stream: Option<&Stream>) -> Result<()> {
        let core = &*self.core;
        core.comm.check_open()?;
        core.comm.check_unbroken()?;
        core.route.check_merge(&core.context)?;
        let step = MergeStep::for_plan(args, &core.context.desc, core.context.heads.len())?;
        // SAFETY: as in `decode`.
        self.issue(stream, core.context.exchanges(), move |plan, stream| unsafe {
            plan.route.merge(&plan.context, &step, stream)
        })
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
    fn attending(&self) -> Result<&PlanCore> {
        let core = &*self.core;
        core.comm.check_open()?;
        if core.context.desc.is_merge_only() {
            let wanted = "a plan with kv_heads of at least 1 (this one is merge-only)";
            return Err(Error::invalid("plan", "kv_heads = 0", wanted));
        }
        Ok(core)
    }

    /// Runs a step here, or enqueues it. `exchanges`: it may break the communicator, so that a GPU's stream has to tell.
    fn issue<F>(&self, stream: Option<&Stream>, exchanges: bool, step: F) -> Result<()>
    where
        F: FnOnce(&PlanCore, Option<&CudaStream>) -> Result<()> + Send + 'static,
    {
        let core = &*self.core;
        match Stream::runs_on(stream, core.comm.device)? {
            RunsOn::Cuda(cuda) => {
                if let (true, Some(stream), Some(peers)) = (exchanges, stream, core.comm.rank.gpu_peers()) {
                    stream.tell_failures_of(peers);
                }
                step(core, Some(cuda))
            }
            RunsOn::Caller => {
                let _counted = InFlight::new(&self.core);
                core.logged(step(core, None)).map_err(explain_timeout)
            }
            RunsOn::Queue(_) if !core.comm.rank.serves_streams() => {
                let wanted = "none: this transport's callbacks run on calling threads only";
                Err(Error::invalid("stream", "a stream", wanted))
            }
            RunsOn::Queue(queue) => {
                let counted = InFlight::new(&self.core);
                let task = move || {
                    let plan = &*counted.0;
                    plan.logged(step(plan, None))
                };
                queue.push(task, core.context.config.step_timeout)
            }
        }
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

impl PlanCore {
    fn build(comm: &Arc<CommCore>, desc: &AttentionDesc) -> Result<PlanCore> {
        attention_supported(&comm.runtime, comm.device, desc)?;
        let plan = comm.plans.load(Ordering::Relaxed) + 1;
        let context = StepContext::new(plan, desc, comm.shard(), &comm.config, &comm.board)?;
        let route = choose::choose(&context, &comm.rank)?;
        let memory = route.memory();
        Ok(PlanCore { route, context, memory, in_flight: Mutex::new(0), idle: Condvar::new(), comm: Arc::clone(comm) })
    }

    fn memory(&self) -> PlanMemory {
        PlanMemory { workspace: self.memory.workspace as u64, window: self.comm.rank.bootstrap().window_bytes() as u64 }
    }

    /// Logs the bad data of a step on the CPU.
    fn logged(&self, result: Result<()>) -> Result<()> {
        result.inspect_err(|error| {
            if error.kind() == ErrorKind::InvalidData {
                self.comm.runtime.log(LogLevel::Warning, error.message());
            }
        })
    }
}

/// The collective part of making the plans of all ranks of a group, which wait for each other: a thread each.
fn connect_all(plans: &[PlanCore]) -> Result<()> {
    if !plans.iter().any(|plan| plan.route.connects()) {
        return Ok(());
    }
    std::thread::scope(|scope| {
        let connect = |plan: &PlanCore| plan.route.connect(&plan.context);
        let threads: Vec<_> = plans
            .iter()
            .map(|plan| spawn_scoped(scope, "treeattn-connect", move || connect(plan)))
            .collect::<Result<_>>()?;
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(panicked())))
    })
}

fn panicked() -> Error {
    Error::new(ErrorKind::Internal, "plan: a thread that connected a rank panicked")
}

/// Says what a caller without streams most often did wrong.
fn explain_timeout(error: Error) -> Error {
    if error.kind() != ErrorKind::Timeout {
        return error;
    }
    let message = format!(
        "{}; without a stream a step runs on the caller's thread until all ranks have come, so ranks of one process \
         need a thread or a CPU stream each",
        error.message()
    );
    let explained = Error::new(ErrorKind::Timeout, message);
    match error.rank() {
        Some(rank) => explained.with_rank(rank),
        None => explained,
    }
}
