//! Communicators whose ranks the engine connects (MPI, gloo, sockets): on CPUs its callbacks carry every step, on GPUs only what
//! comes before the first.

use std::sync::Arc;

use super::communicator::{CommCore, Communicator, Neighbours, check_groups, cpu_rank, neighbours};
use super::context::{LogLevel, Runtime};
use super::issued::IssueBoard;
use crate::attention::Shard;
use crate::comm::{Bootstrap, CommConfig, Transport, TransportRank, process_token};
use crate::device::cuda::CudaDevice;
use crate::device::{Device, DeviceKind};
use crate::error::{Error, ErrorKind, Result};
use crate::route::rank::{CudaGroup, CudaRank, Rank};

impl Communicator {
    /// One rank of a group whose ranks the engine connects (MPI, gloo, sockets): `rank` of `world`. Collective: blocks
    /// until the engine's allgather has connected all ranks, at most the setup deadline. `threads_per_rank` = 0 is the
    /// cores of the device over the ranks on it.
    ///
    /// The callbacks are called only from threads that call the library, and from the threads of CPU streams where the
    /// transport allows it. `abort` is local on CPUs: peers notice by their deadlines. GPUs, all of them or none, use the
    /// callbacks to set up the communicator and its plans, and no more: their steps go where those of ranks that NCCL connects go.
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
        if !config.node_groups.is_empty() {
            let found = format!("{} groups", config.node_groups.len());
            return Err(Error::invalid("node_groups", found, "none where each rank has a node_group of its own"));
        }
        let shard = Shard { rank, world };
        if device.kind == DeviceKind::Cuda {
            config.check_on_gpus()?;
            // Before the ranks meet: one that opens its device meanwhile may wait for a peer that waits for it.
            let gpu = CudaDevice::get(device)?;
            return on_gpu(runtime, TransportRank::for_setup(transport, shard, config)?, gpu, config);
        }
        let rounds = TransportRank::new(transport, shard, config)?;
        let issues = IssueBoard::of(rounds.token(), world);
        let Neighbours { nodes, devices, on_machine, on_device, .. } = neighbours(&rounds, device, config)?;
        check_kinds(&devices)?;
        let made = cpu_rank(runtime, Box::new(rounds), device, config, on_device, nodes)?;
        if let Rank::Cpu(cpu) = &made {
            let threads = cpu.executor.threads();
            let message =
                format!("rank {rank} of {world}, {on_machine} on this machine, {threads} threads on {device}");
            runtime.log(LogLevel::Info, &message);
        }
        Ok(Communicator::of(CommCore::new(runtime, device, config, made, 0, &issues)))
    }
}

/// Refuses ranks on CPUs and on GPUs together, on all of them: the former have a transport for their steps, the latter have not.
fn check_kinds(devices: &[i32]) -> Result<()> {
    let kind = |code: i32| code >> 16;
    let Some(odd) = devices.iter().position(|&code| kind(code) != kind(devices[0])) else { return Ok(()) };
    let name =
        |code: i32| Device::from_code("device", code).map_or_else(|_| code.to_string(), |device| device.to_string());
    let message = format!(
        "device: found {} on rank {odd} and {} on rank 0, wanted devices of one kind",
        name(devices[odd]),
        name(devices[0])
    );
    Err(Error::new(ErrorKind::Mismatch, message).with_rank(odd as i32))
}

/// A rank on a GPU. Collective.
fn on_gpu(
    runtime: &Runtime,
    bootstrap: TransportRank,
    gpu: Arc<CudaDevice>,
    config: &CommConfig,
) -> Result<Communicator> {
    let (Shard { rank, world }, device) = (bootstrap.shard(), gpu.device());
    let Neighbours { nodes, groups, devices, on_machine, .. } = neighbours(&bootstrap, device, config)?;
    check_kinds(&devices)?;
    check_groups(&groups)?;
    // Ranks of this process that are on the same GPU have a part of its grid each. What other processes call it tells nothing.
    let mine = [&process_token()[..], &device.code().to_le_bytes()].concat();
    let sharing = bootstrap.allgather(&mine)?.iter().filter(|theirs| **theirs == mine).count();
    let message =
        format!("rank {rank} of {world} on {device}, {on_machine} on this machine, over the engine's transport");
    runtime.log(LogLevel::Info, &message);
    let group = CudaGroup::connect_over(Box::new(bootstrap), &gpu, nodes, config)?;
    let rank = CudaRank::new(gpu, sharing, group, config.step_timeout);
    Ok(Communicator::of(CommCore::elsewhere(runtime, device, config, Rank::Cuda(Arc::new(rank)))))
}
