//! Plans: everything a shape needs, allocated once.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::allreduce3::{self, GpuAllreduce};
use super::communicator::{CommCore, Communicator};
use super::context::Runtime;
use super::exchange::{Method, Scratch, Wire};
use super::execute;
use super::merge::{MergeArgs, MergeInput};
use super::peer::GpuExchange;
use super::stream::Stream;
use crate::attention::{Algorithm, AttentionDesc, DecodeArgs, OutputMode, Shard, Step, head_range, supported};
use crate::cpu::{self, CpuBackend};
use crate::cuda::{self, CudaBackend};
use crate::device::{Device, DeviceKind, Within};
use crate::error::{Error, ErrorKind, Result};
use crate::fault;

/// A shape made ready on one rank. Clones are the same plan. In flight on one stream at a time.
#[derive(Clone)]
pub struct Plan {
    core: PlanRef,
}

pub(super) type PlanRef = Arc<Within<PlanCore>>;

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

pub(super) struct PlanCore {
    pub comm: Arc<CommCore>,
    pub desc: AttentionDesc,
    pub shard: Shard,
    pub id: u64,
    /// Heads that this rank's merged output holds.
    pub heads: Range<usize>,
    /// What a step over NCCL needs beside the backend.
    pub allreduce: Option<GpuAllreduce>,
    /// What a step over the windows of GPUs needs.
    windows: Option<GpuExchange>,
    pub backend: Backend,
    pub wire: Wire,
    pub method: Method,
    pub scratch: Mutex<Scratch>,
    pub counters: Counters,
    algorithm: Algorithm,
    reason: String,
    memory: PlanMemory,
    exchange_memory: u64,
    in_flight: Mutex<usize>,
    idle: Condvar,
}

/// What turns a shard into partials, where the plan's rank is.
#[allow(clippy::large_enum_variant)] // one a plan, never moved about
pub(super) enum Backend {
    /// A CPU rank; none for a merge-only plan.
    Cpu(Option<CpuBackend>),
    /// A CUDA rank; a merge-only plan only merges.
    Cuda(Arc<CudaBackend>),
}

#[derive(Default)]
pub(super) struct Counters {
    pub steps: AtomicU64,
    pub rounds: AtomicU64,
    pub messages: AtomicU64,
    pub bytes_sent: AtomicU64,
}

/// Whether `device` serves `desc`: `Unsupported` names the field that it does not.
pub fn attention_supported(runtime: &Runtime, device: Device, desc: &AttentionDesc) -> Result<()> {
    runtime.check_device(device)?;
    desc.check()?;
    let backend = match device.kind {
        DeviceKind::Cpu => &cpu::CAPABILITIES,
        DeviceKind::Cuda => &cuda::CAPABILITIES,
    };
    supported(desc, backend)
}

impl Plan {
    /// A plan of this rank. Collective: every rank calls it, each from a thread of its own; blocks until all have.
    ///
    /// A difference between the ranks' descriptors is `Mismatch` on every rank, naming the field.
    pub fn create(comm: &Communicator, desc: &AttentionDesc) -> Result<Plan> {
        let core = &comm.core;
        core.check_open()?;
        core.check_whole()?;
        let mine = PlanCore::build(core, desc);
        if core.shard().world > 1 {
            // A rank that fails here still takes part, so that its peers hear of it at once.
            let blobs = core.end.bootstrap().allgather(&agreement(core, desc, mine.as_ref().err()))?;
            let core = mine?;
            compare(&blobs)?;
            allreduce3::connect(&[&core])?;
            return Ok(Plan::commit(core));
        }
        Ok(Plan::commit(mine?))
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
            comm.core.check_whole()?;
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
        let built: Result<Vec<_>> = comms.iter().map(|comm| PlanCore::build(&comm.core, desc)).collect();
        let built = built?;
        allreduce3::connect(&built.iter().collect::<Vec<_>>())?;
        Ok(built.into_iter().map(Plan::commit).collect())
    }

    fn commit(core: PlanCore) -> Plan {
        core.comm.plans.store(core.id, Ordering::Relaxed);
        if let Backend::Cuda(backend) = &core.backend {
            core.comm.watch(core.id, backend);
        }
        if let Some(steps) = core.allreduce.as_ref().and_then(GpuAllreduce::steps) {
            core.comm.watch_nccl(core.id, steps);
        }
        let deadline = core.comm.config.step_timeout;
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
        let core = self.enter(args)?;
        if core.desc.output != OutputMode::Local {
            core.comm.check_whole()?;
        }
        let step = Step::new(&core.desc, core.shard, args, core.heads.len() as i32)?;
        if let Backend::Cuda(backend) = &core.backend {
            let cuda = Stream::cuda(stream, core.comm.device)?;
            core.enqueues_on(stream);
            match (&core.allreduce, &core.windows) {
                (Some(allreduce), _) => allreduce.decode(core, backend, &step, cuda)?,
                (_, Some(windows)) => windows.decode(core, backend, &step, cuda)?,
                _ => backend.decode(&step, cuda)?,
            }
            core.count_step();
            return Ok(());
        }
        self.submit(stream, move |plan| execute::decode(plan, &step))
    }

    /// Attends this rank's shard only; out and lse hold all heads. No exchange.
    ///
    /// # Safety
    /// As [`Plan::decode`].
    pub unsafe fn partial(&self, args: &DecodeArgs, stream: Option<&Stream>) -> Result<()> {
        let core = self.enter(args)?;
        let step = Step::new(&core.desc, core.shard, args, core.desc.q_heads)?;
        if let Backend::Cuda(backend) = &core.backend {
            return backend.decode(&step, Stream::cuda(stream, core.comm.device)?);
        }
        self.submit(stream, move |plan| execute::partial(plan, &step))
    }

    /// Exchanges and merges partials that the engine made: every rank passes its own.
    ///
    /// # Safety
    /// As [`Plan::decode`].
    pub unsafe fn merge(&self, args: &MergeArgs, stream: Option<&Stream>) -> Result<()> {
        let core = &*self.core;
        core.comm.check_open()?;
        core.comm.check_whole()?;
        if let Method::Ring(_) = core.method {
            let wanted = "a plan with another algorithm: a ring exchanges keys and values, not partials";
            return Err(Error::unsupported("algorithm", core.desc.algorithm.name(), wanted));
        }
        let input = MergeInput::for_plan(args, &core.desc, core.heads.len())?;
        if let Backend::Cuda(backend) = &core.backend {
            let (step, cuda) = (input.on_device(1), Stream::cuda(stream, core.comm.device)?);
            core.enqueues_on(stream);
            match (&core.allreduce, &core.windows) {
                (Some(allreduce), _) => allreduce.merge(core, backend, &step, cuda)?,
                (_, Some(windows)) => windows.merge(core, &step, cuda)?,
                _ => backend.merge(&step, cuda)?,
            }
            core.count_step();
            return Ok(());
        }
        self.submit(stream, move |plan| execute::merge(plan, &input))
    }

    /// The descriptor.
    pub fn desc(&self) -> &AttentionDesc {
        &self.core.desc
    }

    /// The heads in this rank's merged output.
    pub fn heads(&self) -> Range<usize> {
        self.core.heads.clone()
    }

    /// Memory that the plan holds.
    pub fn memory(&self) -> Result<PlanMemory> {
        self.core.comm.check_open()?;
        Ok(self.core.memory)
    }

    /// What the plan has done so far.
    pub fn stats(&self) -> Result<PlanStats> {
        let core = &self.core;
        core.comm.check_open()?;
        Ok(PlanStats {
            plan: core.id,
            steps: core.counters.steps.load(Ordering::Relaxed),
            rounds: core.counters.rounds.load(Ordering::Relaxed),
            messages: core.counters.messages.load(Ordering::Relaxed),
            bytes_sent: core.counters.bytes_sent.load(Ordering::Relaxed),
            peak_memory: core.memory.workspace + core.memory.window,
            exchange_memory: core.exchange_memory,
            algorithm: core.algorithm,
            reason: core.reason.clone(),
            rank: core.shard.rank,
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
        match &self.core.backend {
            Backend::Cpu(_) => Ok(()),
            Backend::Cuda(backend) => backend.check_destroy(),
        }
    }

    /// How long destroying this plan may wait for its enqueued work.
    pub fn deadline(&self) -> Duration {
        self.core.comm.config.step_timeout
    }

    fn enter(&self, _args: &DecodeArgs) -> Result<&PlanCore> {
        let core = &*self.core;
        core.comm.check_open()?;
        if core.desc.is_merge_only() {
            let wanted = "a plan with kv_heads of at least 1 (this one is merge-only)";
            return Err(Error::invalid("plan", "kv_heads = 0", wanted));
        }
        Ok(core)
    }

    fn submit(
        &self,
        stream: Option<&Stream>,
        step: impl FnOnce(&PlanCore) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let Some(stream) = stream else {
            let _counted = InFlight::new(&self.core);
            return step(&self.core).map_err(explain_timeout);
        };
        if !self.core.comm.end.rounds().is_none_or(|rounds| rounds.serves_streams()) {
            let wanted = "none: this transport's callbacks run on calling threads only";
            return Err(Error::invalid("stream", "a stream", wanted));
        }
        let plan = InFlight::new(&self.core);
        stream.push(move || step(&plan.0), self.core.comm.config.step_timeout)
    }
}

/// A step that is counted as in flight for as long as this lives: run, refused, dropped or panicked.
pub(super) struct InFlight(PlanRef);

impl InFlight {
    fn new(plan: &PlanRef) -> InFlight {
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
        let shard = comm.shard();
        let heads = match desc.output {
            OutputMode::Scattered => head_range(desc.q_heads, shard)?,
            OutputMode::Replicated | OutputMode::Local => 0..desc.q_heads,
        };
        let backend = match &comm.cuda {
            Some(_) if desc.output != OutputMode::Local && shard.world > 1 && comm.has_no_exchange(desc) => {
                let found = format!("{} over {} ranks", desc.output.name(), shard.world);
                return Err(Error::unsupported("output", found, "LOCAL, or ALLREDUCE3 for several CUDA ranks"));
            }
            Some(device) => {
                let (patience, sharing) = (comm.config.step_timeout, comm.sharing);
                Backend::Cuda(Arc::new(CudaBackend::new(device, desc, shard, sharing, patience)?))
            }
            None if desc.is_merge_only() => Backend::Cpu(None),
            None => {
                let (threads, isa) = (comm.workers.threads(), comm.runtime.cpu_isa());
                Backend::Cpu(Some(CpuBackend::new(desc, shard, threads, isa)?))
            }
        };
        let rows = product("max_query_tokens x q_heads", desc.max_query_tokens, desc.q_heads)?;
        let (method, reason) = Method::choose(desc, comm)?;
        let scratch = match &backend {
            Backend::Cpu(_) => {
                let own = head_range(desc.q_heads, shard)?.len();
                Scratch::new(desc, &method, rows, own, comm.workers.threads())?
            }
            Backend::Cuda(_) => Scratch::default(),
        };
        let backend_bytes = match &backend {
            Backend::Cpu(backend) => backend.as_ref().map_or(0, CpuBackend::memory),
            Backend::Cuda(backend) => backend.memory(),
        };
        let allreduce = match (&comm.cuda, &method) {
            (Some(device), Method::Allreduce3) => Some(GpuAllreduce::new(device, desc, comm, shard, &heads)?),
            _ => None,
        };
        let windows = match (&comm.cuda, &method, comm.end.gpus()) {
            (Some(device), Method::Windows, Some(peers)) => {
                Some(GpuExchange::new(device, desc, peers, shard, &heads, (comm.sharing, comm.config.step_timeout))?)
            }
            _ => None,
        };
        let (algorithm, reason) = match &windows {
            Some(windows) => windows.algorithm(),
            None => (method.algorithm(desc.algorithm), reason.to_string()),
        };
        let backend_bytes = backend_bytes + windows.as_ref().map_or(0, GpuExchange::memory);
        let backend_bytes = backend_bytes + allreduce.as_ref().map_or(0, GpuAllreduce::memory);
        let (blocks, others) = method.bytes();
        let memory = PlanMemory {
            workspace: (backend_bytes + scratch.bytes() + blocks + others) as u64,
            window: comm.end.bootstrap().window_bytes() as u64,
        };
        Ok(PlanCore {
            comm: Arc::clone(comm),
            desc: *desc,
            shard,
            id: comm.plans.load(Ordering::Relaxed) + 1,
            heads: heads.start as usize..heads.end as usize,
            allreduce,
            windows,
            backend,
            wire: Wire::of(desc),
            algorithm,
            method,
            exchange_memory: (scratch.exchange_bytes() + blocks) as u64,
            scratch: Mutex::new(scratch),
            counters: Counters::default(),
            reason,
            memory,
            in_flight: Mutex::new(0),
            idle: Condvar::new(),
        })
    }

    /// Has a GPU's stream tell of the communicator's failure, if steps of this plan can break it.
    fn enqueues_on(&self, stream: Option<&Stream>) {
        if let (Some(stream), true) = (stream, self.allreduce.is_some() || self.windows.is_some()) {
            stream.exchanged(&self.comm);
        }
    }

    /// Counts a step of this plan.
    pub fn count_step(&self) {
        self.counters.steps.fetch_add(1, Ordering::Relaxed);
        self.comm.set_last_plan(self.id);
    }
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

fn product(name: &str, a: i32, b: i32) -> Result<usize> {
    (a as usize)
        .checked_mul(b as usize)
        .filter(|&n| n <= i32::MAX as usize)
        .ok_or_else(|| Error::invalid(name, format!("{a} x {b}"), format!("at most {}", i32::MAX)))
}

/// A buffer of `count` zeros (none: the count overflowed), or `NoMemory`.
pub(super) fn zeroed(what: &str, count: Option<usize>) -> Result<Vec<f32>> {
    fault::point("plan.scratch")?;
    let mut floats = Vec::new();
    let reserved = count.filter(|&count| floats.try_reserve_exact(count).is_ok());
    let Some(count) = reserved else {
        let found = count.map_or("more than 64 bits".into(), |count| format!("{count} floats"));
        return Err(Error::new(ErrorKind::NoMemory, format!("{what}: found {found}, wanted what memory has room for")));
    };
    floats.resize(count, 0.0);
    Ok(floats)
}

/// What a rank tells its peers before a plan exists: the fields of its descriptor, or why it cannot make it.
fn agreement(comm: &CommCore, desc: &AttentionDesc, error: Option<&Error>) -> Vec<u8> {
    let mut text = String::new();
    if let Some(error) = error {
        text.push_str(&format!("error={}\n", error.message().replace('\n', " ")));
    }
    text.push_str(&format!("library version={}\n", env!("CARGO_PKG_VERSION")));
    text.push_str(&format!("plans created before={}\n", comm.plans.load(Ordering::Relaxed)));
    for (name, value) in desc.fields() {
        text.push_str(&format!("{name}={value}\n"));
    }
    if desc.algorithm == Algorithm::Ring {
        // Every rank works out the same partials; other slices would give them other bits.
        text.push_str(&format!("threads_per_rank={}\n", comm.workers.threads()));
        text.push_str(&format!("cpu_isa={}\n", comm.runtime.cpu_isa().name()));
    }
    text.into_bytes()
}

/// Finds the first field in which the ranks differ.
fn compare(blobs: &[Vec<u8>]) -> Result<()> {
    let texts: Vec<String> = blobs.iter().map(|blob| String::from_utf8_lossy(blob).into_owned()).collect();
    for (rank, text) in texts.iter().enumerate() {
        if let Some(error) = text.strip_prefix("error=") {
            let reason = error.lines().next().unwrap_or_default();
            let message = format!("rank {rank} could not make the plan: {reason}");
            return Err(Error::new(ErrorKind::Mismatch, message).with_rank(rank as i32));
        }
    }
    let first: Vec<_> = texts[0].lines().collect();
    for (line, &wanted) in first.iter().enumerate() {
        let values: Vec<_> = texts.iter().map(|text| text.lines().nth(line).unwrap_or_default()).collect();
        if values.iter().all(|&value| value == wanted) {
            continue;
        }
        let name = wanted.split('=').next().unwrap_or_default();
        let mut groups: Vec<(&str, Vec<usize>)> = Vec::new();
        for (rank, value) in values.iter().enumerate() {
            let value = value.split_once('=').map_or(*value, |(_, value)| value);
            match groups.iter_mut().find(|(seen, _)| *seen == value) {
                Some((_, ranks)) => ranks.push(rank),
                None => groups.push((value, vec![rank])),
            }
        }
        let odd = groups.iter().min_by_key(|(_, ranks)| ranks.len()).map_or(0, |(_, ranks)| ranks[0]);
        let listed: Vec<_> = groups.iter().map(|(value, ranks)| format!("{value} on ranks {ranks:?}")).collect();
        let message = format!("{name}: found {}, wanted the same on every rank", listed.join(" and "));
        return Err(Error::new(ErrorKind::Mismatch, message).with_rank(odd as i32));
    }
    Ok(())
}
