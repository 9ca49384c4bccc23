//! What a rank of a communicator has: its end of the group, and what it computes with.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use parking_lot::Mutex;

use super::windows::setup;
use crate::attention::Shard;
use crate::comm::nccl::NcclRank;
use crate::comm::{Bootstrap, CommConfig, GpuRank, LocalRank, Nodes, PlanFault, PlanWords, Rounds};
use crate::cpu::Isa;
use crate::device::Executor;
use crate::device::cuda::CudaDevice;
use crate::error::{Error, Result};
use crate::partial::epoch::Epoch;

/// A rank, by what its steps run on. Clones are the same rank.
#[derive(Clone)]
pub(crate) enum Rank {
    /// On the processors of this machine.
    Cpu(Arc<CpuRank>),
    /// On a GPU.
    Cuda(Arc<CudaRank>),
}

/// A rank on CPUs.
pub(crate) struct CpuRank {
    /// Its end of the group.
    pub rounds: Box<dyn Rounds>,
    /// The threads that compute its steps.
    pub executor: Box<dyn Executor + Send>,
    /// The most threads of a step: those, or a team of the engine's.
    pub most_threads: usize,
    /// The most members of a team.
    pub most_members: usize,
    /// The instruction set of its steps.
    pub isa: Isa,
    /// The node of each rank.
    pub nodes: Vec<usize>,
    /// Exchanging calls so far, part of every step's fingerprint.
    pub calls: AtomicU64,
}

/// A rank on a GPU.
pub(crate) struct CudaRank {
    /// The GPU.
    pub device: Arc<CudaDevice>,
    /// Ranks of this process on the same GPU, this one among them.
    pub sharing: usize,
    /// Words that its plans' kernels write for the host.
    pub words: Arc<PlanWords>,
    /// Its end of the group.
    pub group: CudaGroup,
    /// Its rank of NCCL's communicator, where there is one: made with the communicator, or by its first plan that needs it.
    pub nccl: Mutex<Option<Arc<NcclRank>>>,
    /// The same of the communicator of the ranks that it meets where there are several nodes.
    pub nccl_across: Mutex<Option<Arc<NcclRank>>>,
}

/// The group of a rank on a GPU.
pub(crate) enum CudaGroup {
    /// It has no peers.
    Single(Box<dyn Bootstrap>),
    /// It has peers, whose memory it may reach.
    Peers(Arc<GpuRank>),
}

impl CudaGroup {
    /// The ends of ranks on GPUs of this process: `ends`, `devices` and `nodes` in rank order, the first epoch of their exchanges
    /// after `start`. Where the GPUs cannot exchange, the ends say why when a plan asks. Blocks; `Capturing` during a capture.
    pub fn connect(
        ends: Vec<LocalRank>,
        devices: &[Arc<CudaDevice>],
        nodes: &[usize],
        config: &CommConfig,
        start: Epoch,
    ) -> Result<Vec<CudaGroup>> {
        if ends.len() == 1 {
            return Ok(ends.into_iter().map(|end| CudaGroup::Single(Box::new(end))).collect());
        }
        let peers = setup::connect(ends, devices, nodes, config, start)?;
        Ok(peers.into_iter().map(|peers| CudaGroup::Peers(Arc::new(peers))).collect())
    }

    /// The end of a rank on `device` that `bootstrap` connects to its peers on `nodes`, which may be other processes. Collective. The rest as
    /// [`CudaGroup::connect`].
    pub fn connect_over(
        bootstrap: Box<dyn Bootstrap>,
        device: &Arc<CudaDevice>,
        nodes: Vec<usize>,
        config: &CommConfig,
    ) -> Result<CudaGroup> {
        let shard = bootstrap.shard();
        if shard.world == 1 {
            return Ok(CudaGroup::Single(bootstrap));
        }
        let nodes = Nodes::new(nodes, shard.rank as usize);
        Ok(CudaGroup::Peers(Arc::new(setup::connect_over(bootstrap, device, nodes, config)?)))
    }
}

impl CudaRank {
    /// One of `sharing` ranks on `device`. What it holds is given back when the device is done with it, at most after
    /// `timeout`.
    pub fn new(device: Arc<CudaDevice>, sharing: usize, group: CudaGroup, timeout: Duration) -> CudaRank {
        let rank = match &group {
            CudaGroup::Single(bootstrap) => bootstrap.shard().rank,
            CudaGroup::Peers(rank) => rank.shard().rank,
        };
        let words = PlanWords::new(&device, rank, timeout);
        if let CudaGroup::Peers(peers) = &group {
            peers.watch(&words);
        }
        CudaRank { device, sharing, words, group, nccl: Mutex::new(None), nccl_across: Mutex::new(None) }
    }

    /// Which rank of how many.
    pub fn shard(&self) -> Shard {
        self.bootstrap().shard()
    }

    /// Whether this rank has left its peers.
    pub fn has_left(&self) -> bool {
        matches!(&self.group, CudaGroup::Peers(rank) if rank.has_left())
    }

    /// Ends what its kernels wait for, because of what broke the communicator.
    pub fn end_waits(&self, error: &Error) {
        if let CudaGroup::Peers(rank) = &self.group {
            rank.end_own(error);
        }
    }

    /// Its end of the group.
    pub fn bootstrap(&self) -> &dyn Bootstrap {
        match &self.group {
            CudaGroup::Single(bootstrap) => &**bootstrap,
            CudaGroup::Peers(rank) => &**rank,
        }
    }

    /// Breaks the communicator because a step was enqueued by half, which leaves the peers without this rank. Gives the error
    /// that broke it.
    pub fn fail(&self, error: Error) -> Error {
        let bootstrap = self.bootstrap();
        bootstrap.fail(&error);
        bootstrap.status().unwrap_or(error)
    }
}

impl Rank {
    /// What every end of a group can do.
    pub fn bootstrap(&self) -> &dyn Bootstrap {
        match self {
            Rank::Cpu(rank) => &*rank.rounds,
            Rank::Cuda(rank) => rank.bootstrap(),
        }
    }

    /// Which rank of how many.
    pub fn shard(&self) -> Shard {
        self.bootstrap().shard()
    }

    /// The peers of a rank on a GPU, if it has any: whose failure its streams tell of.
    pub fn gpu_peers(&self) -> Option<&Arc<GpuRank>> {
        match self {
            Rank::Cuda(rank) => match &rank.group {
                CudaGroup::Peers(peers) => Some(peers),
                CudaGroup::Single(_) => None,
            },
            Rank::Cpu(_) => None,
        }
    }

    /// Whether steps may run on a stream's thread.
    pub fn serves_streams(&self) -> bool {
        match self {
            Rank::Cpu(rank) => rank.rounds.serves_streams(),
            Rank::Cuda(_) => true,
        }
    }

    /// The bad data that kernels of this rank have noted since the last time; `last_plan` is that of the last exchange. Waits
    /// for nothing.
    pub fn take_faults(&self, last_plan: u64) -> Vec<PlanFault> {
        let Rank::Cuda(rank) = self else { return Vec::new() };
        let over_windows = self.gpu_peers().and_then(|peers| peers.take_fault());
        let mut found: Vec<PlanFault> =
            over_windows.into_iter().map(|(rank, fault)| PlanFault { rank, plan: last_plan, fault }).collect();
        found.extend(rank.words.take_faults());
        if !found.is_empty() {
            rank.words.add_values(&mut found);
        }
        found
    }

    /// `Capturing` while a capture forbids giving back what a plan holds.
    pub fn check_change(&self) -> Result<()> {
        match self {
            Rank::Cpu(_) => Ok(()),
            Rank::Cuda(rank) => rank.device.check_change(),
        }
    }
}
