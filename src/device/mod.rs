//! Devices, host memory and threads. Depends on nothing of the library but its errors and fault points.
//!
//! | module | purpose |
//! |---|---|
//! | `identity` | which device, and what it is |
//! | `host` | the processors of this machine |
//! | `numa` | the nodes of this machine, and what is bound to one |
//! | `buffer` | aligned host memory |
//! | `environment` | environment variables, read once |
//! | `float_state` | a guard of the floating-point control register |
//! | `process` | what a forked child begins without |
//! | `thread` | starts every thread of the library |
//! | `event_count` | how one thread waits for another: spin, yield, park |
//! | `executor` | whose threads compute: the seam between the CPU backend and threads |
//! | `workers` | the library's own: the worker threads of a rank |
//! | `parallel_for` | the engine's, by its own parallel-for |
//! | `team` | the engine's, as a team whose every thread enters the call |
//! | `team_member` | one thread of a team |
//! | `meeting` | who of a team has come, as one word |
//! | `queue` | the in-order queue behind a CPU stream |
//! | `cuda` | GPUs, over the driver library |

mod buffer;
pub(crate) mod cuda;
mod environment;
mod event_count;
mod executor;
mod float_state;
mod host;
mod identity;
mod meeting;
mod numa;
mod parallel_for;
mod process;
mod queue;
mod team;
mod team_member;
#[cfg(test)]
mod team_tests;
mod thread;
#[cfg(test)]
mod thread_tests;
mod workers;

pub use buffer::HostBuffer;
pub(crate) use environment::environment;
pub(crate) use event_count::{EventCount, WaitStrategy};
pub use executor::{Executor, Job};
pub use float_state::FloatState;
pub use host::available_cores;
pub use identity::{Device, DeviceInfo, DeviceKind};
pub(crate) use numa::Node;
pub use parallel_for::{EngineExecutor, ParallelCallback, ParallelFor, TaskCallback};
pub(crate) use process::{PerProcess, count_forks, forks};
pub use queue::Queue;
pub use team::Team;
pub use team_member::{BarrierCallback, MemberWait, TeamMember};
pub(crate) use thread::{Deadline, Within, catch, leave, run_bounded, spawn, spawn_scoped};
pub use workers::Workers;

use crate::error::{Error, Result};

/// How many devices of a kind this build can use here.
pub fn device_count(kind: DeviceKind) -> i32 {
    match kind {
        DeviceKind::Cpu => 1 + i32::try_from(numa::nodes().len()).unwrap_or(0),
        DeviceKind::Cuda => cuda::count(),
    }
}

/// Describes `device`. `InvalidArgument` for a CPU that is neither 0 nor a node, `Unavailable` for a GPU that is not there.
pub fn device_info(device: Device) -> Result<DeviceInfo> {
    match device.kind {
        DeviceKind::Cpu => Ok(host::info(device, node_of(device)?)),
        DeviceKind::Cuda => cuda::info(device),
    }
}

/// A NUMA node as it describes itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NumaNode {
    /// The device that is this node.
    pub device: Device,
    /// The kernel's number of it.
    pub number: usize,
    /// Its processors that this process may use, as the kernel writes a list: "0-3,8".
    pub cpus: String,
    /// Its memory, bytes; 0 where the system does not say.
    pub memory: u64,
}

/// The NUMA nodes that this process may use, where there are several; none otherwise: `cpu:0` is then all there is.
pub fn numa_nodes() -> Vec<NumaNode> {
    let describe = |(node, ordinal): (&Node, i32)| NumaNode {
        device: Device { kind: DeviceKind::Cpu, ordinal },
        number: node.number(),
        cpus: node.cpu_list(),
        memory: node.memory(),
    };
    numa::nodes().iter().zip(1..).map(describe).collect()
}

/// The NUMA node that a CPU device is; none for `cpu:0`, all processors. `InvalidArgument` for one that is not there.
pub(crate) fn node_of(device: Device) -> Result<Option<&'static Node>> {
    let nodes = numa::nodes();
    match usize::try_from(device.ordinal) {
        Ok(0) => Ok(None),
        Ok(ordinal) if ordinal <= nodes.len() => Ok(Some(&nodes[ordinal - 1])),
        _ if nodes.is_empty() => Err(Error::invalid(
            "device",
            device,
            "cpu:0 (this machine has one NUMA node: all processors are one device)",
        )),
        _ => {
            let wanted = format!("cpu:0 (all processors), or cpu:1 to cpu:{} (a NUMA node each)", nodes.len());
            Err(Error::invalid("device", device, wanted))
        }
    }
}

/// What this build needs of a machine with GPUs, apart from GPUs.
#[derive(Clone, Debug)]
pub struct CudaSupport {
    /// The CUDA driver's version; `Unavailable` without a driver.
    pub driver: Result<String>,
    /// What the kernels in this build were compiled for and with; `Unavailable` where there are none.
    pub kernels: Result<String>,
}

/// Looks for the CUDA driver, which it loads, and for kernels. Makes no context on any GPU.
pub fn cuda_support() -> CudaSupport {
    let version = |(major, minor): (i32, i32)| format!("{major}.{minor}");
    CudaSupport { driver: cuda::driver().map(|driver| version(driver.version())), kernels: cuda::describe_image() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn the_host_describes_itself() {
        let info = device_info(Device::CPU).unwrap();
        assert!(info.memory > 1 << 20 && info.units >= 1 && !info.name.is_empty() && !info.isa.is_empty(), "{info:?}");
        let second = device_info(Device { kind: DeviceKind::Cpu, ordinal: device_count(DeviceKind::Cpu) }).unwrap_err();
        assert_eq!(second.kind(), ErrorKind::InvalidArgument);
        let gpu = device_info(Device { kind: DeviceKind::Cuda, ordinal: 65535 }).unwrap_err();
        assert_eq!((gpu.kind(), gpu.message().contains("libcuda")), (ErrorKind::Unavailable, true));
    }
}
