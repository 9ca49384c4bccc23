//! Communicators: one rank's end of a group, with its worker threads and its status.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::allreduce3::Watched;
use super::context::{LogLevel, Runtime};
use super::peer;
use crate::attention::{Algorithm, AttentionDesc, Shard};
use crate::comm::nccl::NcclRank;
use crate::comm::{
    Bootstrap, CommConfig, GpuRank, LocalRank, Rounds, Transport, TransportRank, local_group, node_numbers,
};
use crate::cuda::CudaBackend;
use crate::device::cuda::CudaDevice;
use crate::device::{Device, DeviceKind, Workers, available_cores};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::DataFault;
use crate::partial::epoch::Epoch;

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
    /// Exchange steps completed.
    pub step: u64,
    /// The plan of the last step, 0 before the first.
    pub plan: u64,
    /// The sequence that bad data was found in, -1 if none.
    pub sequence: i32,
}

/// Bad data that a step met and nobody has asked about yet.
#[derive(Clone, Copy)]
struct PendingFault {
    rank: i32,
    plan: u64,
    fault: DataFault,
}

/// A rank's end of its group, by what its steps exchange with.
pub(super) enum GroupEnd {
    /// Rounds in host memory: ranks on CPUs.
    Cpu(Box<dyn Rounds>),
    /// Windows of GPUs, or NCCL.
    Gpus(GpuRank),
    /// Nothing: one rank, on a GPU.
    Single(Box<dyn Bootstrap>),
}

impl GroupEnd {
    /// What every end can do.
    pub fn bootstrap(&self) -> &dyn Bootstrap {
        match self {
            GroupEnd::Cpu(rounds) => &**rounds,
            GroupEnd::Gpus(rank) => rank,
            GroupEnd::Single(bootstrap) => &**bootstrap,
        }
    }

    /// The rounds of a rank on CPUs.
    pub fn rounds(&self) -> Option<&dyn Rounds> {
        match self {
            GroupEnd::Cpu(rounds) => Some(&**rounds),
            GroupEnd::Gpus(_) | GroupEnd::Single(_) => None,
        }
    }

    /// The end of a rank on a GPU that has peers.
    pub fn gpus(&self) -> Option<&GpuRank> {
        match self {
            GroupEnd::Gpus(rank) => Some(rank),
            GroupEnd::Cpu(_) | GroupEnd::Single(_) => None,
        }
    }

    /// Exchanges completed on a CPU, enqueued on a GPU.
    fn steps(&self) -> u64 {
        match self {
            GroupEnd::Cpu(rounds) => rounds.completed(),
            GroupEnd::Gpus(rank) => rank.enqueued(),
            GroupEnd::Single(_) => 0,
        }
    }
}

pub(super) struct CommCore {
    pub runtime: Runtime,
    pub device: Device,
    /// The GPU of a CUDA rank.
    pub cuda: Option<Arc<CudaDevice>>,
    /// Plans of a CUDA rank, whose bad data `status` reads, by their numbers.
    cuda_plans: Mutex<Vec<(u64, Weak<CudaBackend>)>>,
    /// Steps over NCCL whose bad data `status` reads, by the numbers of their plans.
    nccl_plans: Mutex<Vec<(u64, Weak<Watched>)>>,
    /// This rank of NCCL's communicator, where there is one: made with the communicator, or by its first plan that needs it.
    pub nccl: Mutex<Option<Arc<NcclRank>>>,
    pub config: CommConfig,
    pub workers: Workers,
    /// This rank's end of the group.
    pub end: GroupEnd,
    /// The node of each rank.
    pub nodes: Vec<usize>,
    /// Ranks in one process share a group; 0 for a rank whose peers are elsewhere.
    pub group: u64,
    /// Ranks of the group on this rank's device.
    pub sharing: usize,
    /// Plans created so far: the next plan's number, the same on all ranks.
    pub plans: AtomicU64,
    /// Exchanging calls so far, part of every step's fingerprint.
    pub calls: AtomicU64,
    last_plan: AtomicU64,
    pending: Mutex<Option<PendingFault>>,
    closed: AtomicBool,
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
        for &device in devices {
            runtime.check_device(device)?;
        }
        if let Some(odd) = devices.iter().find(|device| device.kind != devices[0].kind) {
            return Err(Error::unsupported("devices", format!("{} and {odd}", devices[0]), "devices of one kind"));
        }
        let cores = available_cores();
        let threads = match config.threads_per_rank {
            _ if devices[0].kind == DeviceKind::Cuda => 1,
            0 => (cores / devices.len()).max(1),
            threads => threads,
        };
        let groups = match &config.node_groups[..] {
            [] => vec![config.node_group; devices.len()],
            groups if groups.len() == devices.len() => groups.to_vec(),
            groups => {
                let found = format!("{} groups", groups.len());
                return Err(Error::invalid("node_groups", found, format!("none, or {}", devices.len())));
            }
        };
        let nodes = node_numbers(&groups);
        let group = local_group(devices.len(), config)?;
        let group_id = group.first().map_or(0, LocalRank::group_id);
        let ends: Vec<GroupEnd> = if devices[0].kind == DeviceKind::Cuda && devices.len() > 1 {
            let gpus = devices.iter().map(|&device| CudaDevice::get(device)).collect::<Result<Vec<_>>>()?;
            let ends = peer::connect(group, &gpus, config, start)?;
            ends.into_iter().map(GroupEnd::Gpus).collect()
        } else if devices[0].kind == DeviceKind::Cuda {
            group.into_iter().map(|end| GroupEnd::Single(Box::new(end))).collect()
        } else {
            group.into_iter().map(|end| GroupEnd::Cpu(Box::new(end))).collect()
        };
        let mut ranks = Vec::with_capacity(devices.len());
        for (rank, (end, &device)) in ends.into_iter().zip(devices).enumerate() {
            let spin = threads.saturating_mul(devices.len()) <= cores;
            let sharing = devices.iter().filter(|&&other| other == device).count();
            let workers = Workers::new(threads, &format!("treeattn-{rank}"), spin)?;
            let mut core = CommCore::new(runtime, device, config, workers, end, nodes.clone(), group_id)?;
            core.sharing = sharing;
            ranks.push(Communicator { core: Arc::new(core) });
        }
        let message = format!("local communicator of {} ranks, {threads} threads a rank", devices.len());
        runtime.log(LogLevel::Info, &message);
        Ok(ranks)
    }

    /// One rank of a group whose ranks the engine connects (MPI, gloo, sockets): `rank` of `world`. Collective: blocks
    /// until the engine's allgather has connected all ranks, at most the setup deadline. `threads_per_rank` = 0 is the
    /// cores of the machine over its ranks.
    ///
    /// The callbacks are called only from threads that call the library, and from the threads of CPU streams where the
    /// transport allows it. `abort` is local here: peers notice by their deadlines.
    ///
    /// # Safety
    /// The callbacks do what [`Transport`] says, and `ctx` stays valid until the last clone and plan are gone.
    pub unsafe fn create_from_transport(
        runtime: &Runtime,
        transport: Transport,
        world: i32,
        rank: i32,
        device: Device,
        config: &CommConfig,
    ) -> Result<Communicator> {
        runtime.check_device(device)?;
        if device.kind != DeviceKind::Cpu {
            return Err(Error::unsupported("device", device, "CPU devices"));
        }
        if !config.node_groups.is_empty() {
            let found = format!("{} groups", config.node_groups.len());
            return Err(Error::invalid("node_groups", found, "none where each rank has a node_group of its own"));
        }
        let end = TransportRank::new(transport, Shard { rank, world }, config)?;
        let (nodes, local) = machines(&end, config)?;
        let threads = match config.threads_per_rank {
            0 => (available_cores() / local).max(1),
            threads => threads,
        };
        let spin = threads.saturating_mul(local) <= available_cores();
        runtime
            .log(LogLevel::Info, &format!("rank {rank} of {world}, {local} on this machine, {threads} threads each"));
        Ok(Communicator {
            core: Arc::new(CommCore::new(
                runtime,
                device,
                config,
                Workers::new(threads, &format!("treeattn-{rank}"), spin)?,
                GroupEnd::Cpu(Box::new(end)),
                nodes,
                0,
            )?),
        })
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
        Ok(self.core.end.bootstrap().describe())
    }

    /// The health of the communicator. Never blocks. Reading takes a pending `InvalidData`; a broken communicator
    /// stays broken.
    pub fn status(&self) -> Result<CommStatus> {
        self.core.check_open()?;
        let core = &self.core;
        core.collect_faults();
        let mut status = CommStatus {
            error: core.end.bootstrap().status(),
            rank: -1,
            step: core.end.steps(),
            plan: core.last_plan.load(Ordering::Relaxed),
            sequence: -1,
        };
        if let Some(error) = &status.error {
            status.rank = error.rank().unwrap_or(-1);
        } else if let Some(pending) = core.pending.lock().take() {
            status.error = Some(pending.error());
            status.rank = pending.rank;
            status.plan = pending.plan;
            status.sequence = pending.fault.sequence;
        }
        Ok(status)
    }

    /// Ends every wait on this communicator, on all ranks, at once; they return `Aborted` from now on.
    pub fn abort(&self) -> Result<()> {
        self.core.check_open()?;
        self.core.end.bootstrap().abort();
        Ok(())
    }

    /// Whether this rank has not left, and the runtime is still there.
    pub(crate) fn check_open(&self) -> Result<()> {
        self.core.check_open()
    }

    /// Leaves the group: peers that still wait for this rank get `PeerLost`; plans return `ParentDestroyed`.
    pub fn close(&self) {
        if !self.core.closed.swap(true, Ordering::AcqRel) {
            self.core.end.bootstrap().leave();
        }
    }
}

/// The node of each rank, and how many ranks are on this machine. Collective.
pub(super) fn machines(end: &dyn Bootstrap, config: &CommConfig) -> Result<(Vec<usize>, usize)> {
    let here = end.allgather(boot_id().as_bytes())?;
    let local = here.iter().filter(|id| **id == here[end.shard().rank as usize]).count();
    let groups = end.allgather(&config.node_group.to_le_bytes())?;
    // Ranks without a group of their own are told apart by their machines.
    let unset = 0i32.to_le_bytes();
    let keys: Vec<(&[u8], &[u8])> = groups
        .iter()
        .zip(&here)
        .map(|(group, id)| if **group == unset { (&unset[..], &id[..]) } else { (&group[..], &[][..]) })
        .collect();
    Ok((node_numbers(&keys), local))
}

/// Tells machines apart; empty where the system does not say, which counts all ranks as local.
fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

impl CommCore {
    /// One rank, with what its device needs.
    pub fn new(
        runtime: &Runtime,
        device: Device,
        config: &CommConfig,
        workers: Workers,
        end: GroupEnd,
        nodes: Vec<usize>,
        group: u64,
    ) -> Result<CommCore> {
        Ok(CommCore {
            runtime: runtime.clone(),
            device,
            cuda: if device.kind == DeviceKind::Cuda { Some(CudaDevice::get(device)?) } else { None },
            cuda_plans: Mutex::new(Vec::new()),
            nccl_plans: Mutex::new(Vec::new()),
            nccl: Mutex::new(None),
            config: config.clone(),
            workers,
            end,
            nodes,
            group,
            sharing: 1,
            plans: AtomicU64::new(0),
            calls: AtomicU64::new(0),
            last_plan: AtomicU64::new(0),
            pending: Mutex::new(None),
            closed: AtomicBool::new(false),
        })
    }

    pub fn shard(&self) -> Shard {
        self.end.bootstrap().shard()
    }

    pub fn check_open(&self) -> Result<()> {
        self.runtime.check_open()?;
        if self.closed.load(Ordering::Acquire) {
            let message = "communicator: found destroyed, wanted a live communicator";
            return Err(Error::new(ErrorKind::ParentDestroyed, message));
        }
        Ok(())
    }

    /// The error that broke the communicator, if it is broken.
    pub fn check_whole(&self) -> Result<()> {
        match self.end.bootstrap().status() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Remembers a CUDA plan, to report the bad data that its steps meet.
    pub fn watch(&self, plan: u64, backend: &Arc<CudaBackend>) {
        let mut plans = self.cuda_plans.lock();
        plans.retain(|(_, backend)| backend.strong_count() > 0);
        plans.push((plan, Arc::downgrade(backend)));
    }

    /// The same for a plan whose steps exchange over NCCL.
    pub fn watch_nccl(&self, plan: u64, steps: &Arc<Watched>) {
        let mut plans = self.nccl_plans.lock();
        plans.retain(|(_, steps)| steps.strong_count() > 0);
        plans.push((plan, Arc::downgrade(steps)));
    }

    /// Whether CUDA ranks have no way to make the merged output that a plan asks for.
    pub fn has_no_exchange(&self, desc: &AttentionDesc) -> bool {
        desc.algorithm != Algorithm::Allreduce3 && self.end.gpus().is_none()
    }

    /// Takes what steps on a GPU have found since the last time. Does not wait for them.
    fn collect_faults(&self) {
        if let Some((rank, fault)) = self.end.gpus().and_then(GpuRank::take_fault) {
            self.report(rank, self.last_plan.load(Ordering::Relaxed), fault);
        }
        for (plan, steps) in &*self.nccl_plans.lock() {
            if let Some((rank, fault)) = steps.upgrade().and_then(|steps| steps.take_fault()) {
                self.report(rank, *plan, fault);
            }
        }
        for (plan, backend) in &*self.cuda_plans.lock() {
            if let Some(fault) = backend.upgrade().and_then(|backend| backend.take_fault()) {
                self.report(self.shard().rank, *plan, fault);
            }
        }
    }

    pub fn set_last_plan(&self, plan: u64) {
        self.last_plan.store(plan, Ordering::Relaxed);
    }

    /// Remembers bad data for `status` and gives the error to return.
    pub fn report(&self, rank: i32, plan: u64, fault: DataFault) -> Error {
        let pending = PendingFault { rank, plan, fault };
        let error = pending.error();
        self.runtime.log(LogLevel::Warning, error.message());
        *self.pending.lock() = Some(pending);
        error
    }
}

impl Drop for CommCore {
    fn drop(&mut self) {
        if !*self.closed.get_mut() {
            self.end.bootstrap().leave();
        }
    }
}

impl PendingFault {
    fn error(&self) -> Error {
        let message = format!(
            "{}: found a value out of range in sequence {} on rank {}, wanted values within the plan's limits; the \
             outputs of that sequence are NaN",
            self.fault.cause.argument(),
            self.fault.sequence,
            self.rank
        );
        Error::new(ErrorKind::InvalidData, message).with_rank(self.rank)
    }
}
