//! Communicators: one rank's end of a group, with what it computes with and its status.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::context::{LogLevel, Runtime};
use super::issued::{IssueBoard, Issued, busy};
use crate::attention::Shard;
use crate::comm::{Bootstrap, CommConfig, LocalRank, Rounds, StatusBoard, local_group, node_numbers};
use crate::device::cuda::CudaDevice;
use crate::device::{Device, DeviceKind, Executor, Node, ParallelFor, Workers, available_cores, node_of};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::epoch::Epoch;
use crate::route::algorithms;
use crate::route::rank::{CpuRank, CudaGroup, CudaRank, Rank};

/// One rank of a communicator. Clones are the same rank. Calls that exchange are serialised by the caller; `abort`
/// and `status` may come from any thread at any time.
#[derive(Clone)]
pub struct Communicator {
    pub(super) core: Arc<CommCore>,
}

/// What is known of a communicator's health.
#[derive(Clone, Debug)]
pub struct CommStatus {
    /// Why the communicator is broken, or the pending bad data of a step, or nothing.
    pub error: Option<Error>,
    /// The rank that the error is about, -1 if none.
    pub rank: i32,
    /// Steps that exchanged: completed on a CPU, enqueued on a GPU. A step counts once, whatever its algorithm.
    pub step: u64,
    /// The plan of the last step, 0 before the first.
    pub plan: u64,
    /// The sequence that bad data was found in, -1 if none.
    pub sequence: i32,
}

pub(super) struct CommCore {
    pub runtime: Runtime,
    pub device: Device,
    pub config: CommConfig,
    /// What this rank has.
    pub rank: Rank,
    /// What plans leave for the status.
    pub board: Arc<StatusBoard>,
    /// Ranks that one call made share a group, never 0; 0 for a rank that came by itself.
    pub group: u64,
    /// Plans created so far: the next plan's number, the same on all ranks.
    pub plans: AtomicU64,
    closed: AtomicBool,
    /// Whether a call of this rank that exchanges is under way.
    busy: AtomicBool,
    /// Where ranks of the group issue their exchanges; shared by those of this process.
    issues: Arc<IssueBoard>,
}

/// A call of a rank that exchanges, for as long as this lives.
pub(super) struct Exchanging<'a>(&'a CommCore);

impl Drop for Exchanging<'_> {
    fn drop(&mut self) {
        self.0.busy.store(false, Ordering::Release);
    }
}

impl Communicator {
    /// One communicator a device, rank by rank, all in this process. A device may appear several times.
    pub fn create_local(runtime: &Runtime, devices: &[Device], config: &CommConfig) -> Result<Vec<Communicator>> {
        Communicator::create_local_at(runtime, devices, config, 0)
    }

    /// As [`Communicator::create_local`]; GPUs begin with the epoch after `start`, which only tests of its wrap choose.
    #[doc(hidden)]
    pub fn create_local_at(
        runtime: &Runtime,
        devices: &[Device],
        config: &CommConfig,
        start: u32,
    ) -> Result<Vec<Communicator>> {
        let start = Epoch::from_flag(start);
        runtime.check_open()?;
        config.check()?;
        if devices.is_empty() {
            return Err(Error::invalid("n", 0, "at least 1 device"));
        }
        for (i, &device) in devices.iter().enumerate() {
            runtime.check_device(device).map_err(|error| {
                let message = format!("devices[{i}]: {}", error.message().trim_start_matches("device: "));
                if error.kind() == ErrorKind::ParentDestroyed { error } else { Error::new(error.kind(), message) }
            })?;
        }
        if let Some(odd) = devices.iter().position(|device| device.kind != devices[0].kind) {
            let wanted = format!("devices of one kind, as devices[0] = {}", devices[0]);
            return Err(Error::unsupported(format_args!("devices[{odd}]"), devices[odd], wanted));
        }
        if devices[0].kind == DeviceKind::Cuda {
            config.check_on_gpus()?;
        }
        let groups = match &config.node_groups[..] {
            [] => vec![config.node_group; devices.len()],
            groups if groups.len() == devices.len() => groups.to_vec(),
            groups => {
                let found = format!("{} groups", groups.len());
                return Err(Error::invalid("node_groups", found, format!("none, or {}", devices.len())));
            }
        };
        let group = local_group(devices.len(), config)?;
        let number = group.first().map_or(0, LocalRank::group_id);
        let ranks = match devices[0].kind {
            DeviceKind::Cpu => cpu_ranks(runtime, group, devices, config, &node_numbers(&groups))?,
            DeviceKind::Cuda => cuda_ranks(group, devices, config, &node_numbers(&groups), start)?,
        };
        let threads = match &ranks[0] {
            Rank::Cpu(rank) => rank.executor.threads(),
            Rank::Cuda(_) => 1,
        };
        let whose = if config.executor.is_some() { " of the engine" } else { "" };
        let message = format!("local communicator of {} ranks, {threads} threads{whose} a rank", devices.len());
        runtime.log(LogLevel::Info, &message);
        let issues = IssueBoard::new(devices.len() as i32);
        let core = |(rank, &device)| CommCore::new(runtime, device, config, rank, number, &issues);
        Ok(ranks.into_iter().zip(devices).map(core).map(Communicator::of).collect())
    }

    pub(super) fn of(core: CommCore) -> Communicator {
        Communicator { core: Arc::new(core) }
    }

    /// This rank.
    pub fn rank(&self) -> i32 {
        self.core.shard().rank
    }

    /// The number of ranks.
    pub fn world(&self) -> i32 {
        self.core.shard().world
    }

    /// The device of this rank.
    pub fn device(&self) -> Device {
        self.core.device
    }

    /// Links, capacities and the algorithm table, as JSON.
    pub fn describe(&self) -> Result<String> {
        self.core.check_open()?;
        Ok(algorithms::describe(&self.core.rank))
    }

    /// Has a rank on a GPU go on with the epoch after `start`: for tests of numbers that come again.
    ///
    /// # Safety
    /// No step of the rank is enqueued.
    #[doc(hidden)]
    pub unsafe fn restart_at(&self, start: u32) -> Result<()> {
        match self.core.rank.gpu_peers().and_then(|peers| Some((peers.nodes().place(), peers.windows()?))) {
            // SAFETY: this function was promised the same.
            Some((place, windows)) => unsafe { windows.restart(place, Epoch::from_flag(start)) },
            None => Ok(()),
        }
    }

    /// The health of the communicator, also where the runtime is closed. Never blocks. Bad data is told once, here or by the
    /// step; a broken communicator stays broken.
    pub fn status(&self) -> Result<CommStatus> {
        self.core.check_here()?;
        let core = &self.core;
        let board = &core.board;
        for fault in core.rank.take_faults(board.last_plan()) {
            core.runtime.log(LogLevel::Warning, board.report(fault).message());
        }
        let mut status = CommStatus {
            error: core.rank.bootstrap().status(),
            rank: -1,
            step: board.steps(),
            plan: board.last_plan(),
            sequence: -1,
        };
        if let Some(error) = &status.error {
            status.rank = error.rank().unwrap_or(-1);
        } else if let Some((pending, error)) = board.take() {
            status.error = Some(error);
            status.rank = pending.rank;
            status.plan = pending.plan;
            status.sequence = pending.fault.sequence;
        }
        Ok(status)
    }

    /// Ends every wait on this communicator, on all ranks, at once; they return `Aborted` from now on. Also where the runtime
    /// is closed.
    pub fn abort(&self) -> Result<()> {
        self.core.check_here()?;
        self.core.rank.bootstrap().abort();
        Ok(())
    }

    /// Whether this rank has not left, and the runtime is still there.
    pub(crate) fn check_open(&self) -> Result<()> {
        self.core.check_open()
    }

    /// Leaves the group: peers that still need this rank get `PeerLost`; plans return `ParentDestroyed`, as does a step that is
    /// under way, at once.
    pub fn close(&self) {
        if !self.core.closed.swap(true, Ordering::AcqRel) {
            self.core.rank.bootstrap().leave();
        }
    }
}

/// One of `local` CPU ranks on a device of this machine.
pub(super) fn cpu_rank(
    runtime: &Runtime,
    rounds: Box<dyn Rounds>,
    device: Device,
    config: &CommConfig,
    local: usize,
    nodes: Vec<usize>,
) -> Result<Rank> {
    let executor: Box<dyn Executor + Send> = match config.executor {
        Some(engine) => Box::new(ParallelFor::new(engine)?),
        None => {
            let node = node_of(device)?;
            let cores = node.map_or_else(available_cores, Node::cores);
            let threads = config.threads_of(cores, local);
            let spin = threads.saturating_mul(local) <= cores;
            Box::new(Workers::on(node, threads, &format!("treeattn-{}", rounds.shard().rank), spin)?)
        }
    };
    let threads = executor.threads();
    let most_members = if config.max_team == 0 { threads } else { config.max_team };
    Ok(Rank::Cpu(Arc::new(CpuRank {
        rounds,
        executor,
        most_threads: threads.max(most_members),
        most_members,
        isa: runtime.cpu_isa(),
        nodes,
        calls: AtomicU64::new(0),
    })))
}

fn cpu_ranks(
    runtime: &Runtime,
    group: Vec<LocalRank>,
    devices: &[Device],
    config: &CommConfig,
    nodes: &[usize],
) -> Result<Vec<Rank>> {
    let local = |device: Device| devices.iter().filter(|&&other| other == device).count();
    let rank = |(end, &device): (LocalRank, &Device)| {
        cpu_rank(runtime, Box::new(end), device, config, local(device), nodes.to_vec())
    };
    group.into_iter().zip(devices).map(rank).collect()
}

/// The first epoch of their exchanges comes after `start`.
fn cuda_ranks(
    group: Vec<LocalRank>,
    devices: &[Device],
    config: &CommConfig,
    nodes: &[usize],
    start: Epoch,
) -> Result<Vec<Rank>> {
    let gpus = devices.iter().map(|&device| CudaDevice::get(device)).collect::<Result<Vec<_>>>()?;
    let ends = CudaGroup::connect(group, &gpus, nodes, config, start)?;
    let sharing = |gpu: &CudaDevice| devices.iter().filter(|&&other| other == gpu.device()).count();
    let rank = |(end, gpu): (CudaGroup, Arc<CudaDevice>)| {
        let sharing = sharing(&gpu);
        Rank::Cuda(Arc::new(CudaRank::new(gpu, sharing, end, config.step_timeout)))
    };
    Ok(ends.into_iter().zip(gpus).map(rank).collect())
}

/// Where the ranks of a group are.
pub(super) struct Neighbours {
    /// The node of each rank.
    pub nodes: Vec<usize>,
    /// The group that each rank named its node by; 0: none.
    pub groups: Vec<i32>,
    /// The device of each.
    pub devices: Vec<i32>,
    /// How many are on this machine.
    pub on_machine: usize,
    /// How many of those are on the same device.
    pub on_device: usize,
}

/// Finds out, for a rank on `device`. Collective.
pub(super) fn neighbours(end: &dyn Bootstrap, device: Device, config: &CommConfig) -> Result<Neighbours> {
    let here = end.allgather(boot_id().as_bytes())?;
    let mine = &here[end.shard().rank as usize];
    let on_machine = here.iter().filter(|id| *id == mine).count();
    // A group and a device each.
    let words = end.allgather(&[config.node_group.to_le_bytes(), device.code().to_le_bytes()].concat())?;
    let words: Vec<(&[u8], &[u8])> = words.iter().map(|words| words.split_at(words.len().min(4))).collect();
    let is_near = |(id, word): &(&_, &(&[u8], &[u8]))| *id == mine && word.1 == device.code().to_le_bytes();
    let on_device = here.iter().zip(&words).filter(is_near).count();
    // Ranks without a group of their own are told apart by their machines.
    let unset = 0i32.to_le_bytes();
    let keys: Vec<(&[u8], &[u8])> = words
        .iter()
        .zip(&here)
        .map(|((group, _), id)| if **group == unset { (&unset[..], &id[..]) } else { (*group, &[][..]) })
        .collect();
    let number = |word: &[u8]| word.try_into().map_or(0, i32::from_le_bytes);
    let groups = words.iter().map(|(group, _)| number(group)).collect();
    let devices = words.iter().map(|(_, device)| number(device)).collect();
    Ok(Neighbours { nodes: node_numbers(&keys), groups, devices, on_machine, on_device })
}

/// Ranks name the groups of their nodes all or none, or some would be told apart by what others mean their machine to be.
pub(super) fn check_groups(groups: &[i32]) -> Result<()> {
    let position = |named: bool| groups.iter().position(|&group| (group != 0) == named);
    let (Some(named), Some(unnamed)) = (position(true), position(false)) else { return Ok(()) };
    let count = groups.iter().filter(|&&group| group != 0).count();
    let odd = if 2 * count < groups.len() { named } else { unnamed };
    let message = format!(
        "node_group: found {} on rank {named} and none on rank {unnamed}, wanted one on every rank or on none",
        groups[named]
    );
    Err(Error::new(ErrorKind::Mismatch, message).with_rank(odd as i32))
}

/// Tells machines apart; empty where the system does not say, which counts all ranks as local.
fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

impl CommCore {
    /// One rank. Those of its group that live in this process share `issues`.
    pub fn new(
        runtime: &Runtime,
        device: Device,
        config: &CommConfig,
        rank: Rank,
        group: u64,
        issues: &Arc<IssueBoard>,
    ) -> CommCore {
        CommCore {
            runtime: runtime.clone(),
            device,
            config: config.clone(),
            rank,
            board: Arc::default(),
            group,
            plans: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            issues: Arc::clone(issues),
        }
    }

    /// One rank that has `issues` of its own.
    pub fn elsewhere(runtime: &Runtime, device: Device, config: &CommConfig, rank: Rank) -> CommCore {
        let issues = IssueBoard::new(rank.shard().world);
        CommCore::new(runtime, device, config, rank, 0, &issues)
    }

    /// Which rank of how many.
    pub fn shard(&self) -> Shard {
        self.rank.shard()
    }

    /// `ParentDestroyed` once the communicator or its runtime is closed.
    pub fn check_open(&self) -> Result<()> {
        self.runtime.check_open()?;
        self.check_here()
    }

    /// `ParentDestroyed` once the communicator is closed.
    fn check_here(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            let message = "communicator: found destroyed, wanted a live communicator";
            return Err(Error::new(ErrorKind::ParentDestroyed, message));
        }
        Ok(())
    }

    /// Begins a call that exchanges. `Busy`, with nothing changed, while another is under way.
    pub fn begin_exchange(&self) -> Result<Exchanging<'_>> {
        match self.busy.swap(true, Ordering::Acquire) {
            false => Ok(Exchanging(self)),
            true => Err(self.busy_with("communicator: found another call")),
        }
    }

    /// Counts an exchange of this rank as issued on a CPU stream, 0 for the caller's thread: see [`IssueBoard::issue`].
    pub fn issue_on(&self, stream: usize) -> Result<Issued> {
        self.issues.issue(self.shard().rank, stream)
    }

    /// [`CommCore::begin_exchange`] for the creation of a plan, which exchanges where there are peers.
    pub fn begin_creation(&self) -> Result<Option<Exchanging<'_>>> {
        (self.shard().world > 1).then(|| self.begin_exchange()).transpose()
    }

    /// The error of a call that found `what` under way.
    pub fn busy_with(&self, what: &str) -> Error {
        busy(what, self.shard().rank)
    }

    /// The error that broke the communicator, if it is broken.
    pub fn check_unbroken(&self) -> Result<()> {
        self.rank.bootstrap().status().map_or(Ok(()), Err)
    }
}

impl Drop for CommCore {
    fn drop(&mut self) {
        if !*self.closed.get_mut() {
            self.rank.bootstrap().leave();
        }
    }
}
