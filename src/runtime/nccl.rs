//! Communicators whose ranks NCCL connects: one process a GPU, on one machine or several.

use std::ffi::c_void;
use std::sync::Arc;

use super::communicator::{CommCore, Communicator, Neighbours, check_groups, neighbours};
use super::context::{LogLevel, Runtime};
use crate::attention::Shard;
use crate::comm::CommConfig;
use crate::comm::nccl::{NcclBootstrap, NcclDeadline, NcclLibrary, NcclRank, UNIQUE_ID_BYTES};
use crate::device::cuda::{CudaDevice, Staging};
use crate::device::{Device, DeviceKind};
use crate::error::{Error, Result};
use crate::route::rank::{CudaGroup, CudaRank, Rank};

/// Most ranks.
const MAX_RANKS: i32 = 4096;

impl Communicator {
    /// A fresh name for a communicator to be made by [`Communicator::create_nccl`]: made once, and brought to every rank
    /// by the engine in any way. `Unavailable` where there is no NCCL.
    ///
    /// NCCL listens for the ranks in this process, on a socket of its own, until they have come.
    pub fn nccl_unique_id(runtime: &Runtime) -> Result<[u8; UNIQUE_ID_BYTES]> {
        runtime.check_open()?;
        NcclLibrary::load(None)?.unique_id()
    }

    /// One rank of a group that NCCL connects: `rank` of `world`. Collective: blocks until all ranks have come, at most
    /// the setup deadline and a second. `Unavailable` where there is no NCCL of 2.18 or later, or no such GPU;
    /// `Timeout` where ranks did not come; `Mismatch` where they run different versions; `Nccl` for what NCCL says.
    pub fn create_nccl(
        runtime: &Runtime,
        id: &[u8; UNIQUE_ID_BYTES],
        world: i32,
        rank: i32,
        device: Device,
        config: &CommConfig,
    ) -> Result<Communicator> {
        check(runtime, device, config)?;
        if !(1..=MAX_RANKS).contains(&world) {
            return Err(Error::invalid("world", world, format!("1 to {MAX_RANKS}")));
        }
        if rank < 0 || rank >= world {
            return Err(Error::invalid("rank", rank, format!("0 to {}", world - 1)));
        }
        let cuda = open(runtime, device)?;
        let library = NcclLibrary::load(config.nccl_path.as_deref())?;
        let deadline = NcclDeadline::new("setup_timeout_ns", config.setup_timeout);
        let rank = NcclRank::begin(library, &cuda, id, Shard { rank, world }, config.step_timeout)?;
        rank.settle("creating the NCCL communicator", deadline)?;
        let staging = NcclBootstrap::staging(&cuda, world, config)?;
        connect(runtime, rank, staging, config, deadline)
    }

    /// As [`Communicator::create_nccl`], for the ranks of a communicator that the engine made with the NCCL that is loaded
    /// in this process: one that is split off it. Collective over the ranks of `nccl_comm`, which is not used any more
    /// once this returns. A split that does not end within the setup deadline stays behind.
    ///
    /// # Safety
    /// `nccl_comm` is a live `ncclComm_t` of the NCCL that is found, which no other thread uses during the call.
    pub unsafe fn wrap_nccl(
        runtime: &Runtime,
        nccl_comm: *mut c_void,
        device: Device,
        config: &CommConfig,
    ) -> Result<Communicator> {
        check(runtime, device, config)?;
        if nccl_comm.is_null() {
            return Err(Error::invalid("nccl_comm", "NULL", "an ncclComm_t"));
        }
        let cuda = open(runtime, device)?;
        let library = NcclLibrary::loaded(config.nccl_path.as_deref())?;
        let deadline = NcclDeadline::new("setup_timeout_ns", config.setup_timeout);
        // SAFETY: the caller promises a live communicator of this NCCL, which no other thread uses during this call.
        let shard = unsafe { NcclRank::shard_of(library, &cuda, nccl_comm)? };
        let staging = NcclBootstrap::staging(&cuda, shard.world, config)?;
        // SAFETY: as above; that it is not used while a split lives on is this function's contract, too.
        let rank = unsafe { NcclRank::split(library, &cuda, nccl_comm, shard, deadline, config.step_timeout)? };
        connect(runtime, rank, staging, config, deadline)
    }
}

/// The version and the file of the NCCL that communicators would use, `path` or the one that is found. Loads it; opens no
/// socket. `Unavailable` where there is none of 2.18 or later.
pub fn nccl_library(path: Option<&str>) -> Result<String> {
    let library = NcclLibrary::load(path)?;
    Ok(format!("{} ({})", library.version(), library.file()))
}

/// What can be said of the arguments without any library.
fn check(runtime: &Runtime, device: Device, config: &CommConfig) -> Result<()> {
    runtime.check_open()?;
    config.check()?;
    config.check_on_gpus()?;
    if !config.node_groups.is_empty() {
        let found = format!("{} groups", config.node_groups.len());
        return Err(Error::invalid("node_groups", found, "none where each rank has a node_group of its own"));
    }
    if device.kind != DeviceKind::Cuda {
        return Err(Error::unsupported("device", device, "CUDA devices over NCCL"));
    }
    Ok(())
}

fn open(runtime: &Runtime, device: Device) -> Result<Arc<CudaDevice>> {
    runtime.check_device(device)?;
    CudaDevice::get(device)
}

/// What is the same for every rank that NCCL has connected.
fn connect(
    runtime: &Runtime,
    rank: NcclRank,
    staging: Staging,
    config: &CommConfig,
    deadline: NcclDeadline,
) -> Result<Communicator> {
    let (shard, library, device) = (rank.shard(), rank.library(), rank.device().device());
    let bootstrap = NcclBootstrap::new(rank, staging, config, deadline)?;
    let Neighbours { nodes, groups, on_machine: local, .. } = neighbours(&bootstrap, device, config)?;
    check_groups(&groups)?;
    let message = format!(
        "rank {} of {} on {device}, {local} on this machine, over NCCL {} ({})",
        shard.rank,
        shard.world,
        library.version(),
        library.file()
    );
    runtime.log(LogLevel::Info, &message);
    let (nccl, gpu) = (Arc::clone(bootstrap.rank()), Arc::clone(bootstrap.rank().device()));
    let group = CudaGroup::connect_over(Box::new(bootstrap), &gpu, nodes, config)?;
    let rank = CudaRank::new(gpu, 1, group, config.step_timeout);
    *rank.nccl.lock() = Some(nccl);
    Ok(Communicator::of(CommCore::elsewhere(runtime, device, config, Rank::Cuda(Arc::new(rank)))))
}
