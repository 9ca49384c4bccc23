//! Devices, host memory, threads. Depends on nothing of the library but its errors and fault points.
//!
//! `host` says what the machine has, `buffer` holds aligned memory, `workers` a rank's threads, `queue` the in-order
//! queue behind a CPU stream, `bell` the one place that spins, yields and parks, `thread` the one place that starts threads,
//! `float_state` the guard of the floating-point control register, `cuda` the GPUs.

mod bell;
mod buffer;
pub(crate) mod cuda;
mod float_state;
mod host;
mod queue;
mod thread;
mod workers;

pub(crate) use bell::{Bell, Linger};
pub use buffer::HostBuffer;
pub use float_state::FloatState;
pub use host::available_cores;
pub use queue::Queue;
pub(crate) use thread::{Deadline, Within, behind, spawn, spawn_scoped};
pub use workers::Workers;

use crate::error::{Error, Result};

/// What kind of device. The discriminant is the kind's code at the C ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum DeviceKind {
    /// The processors of this machine, as one device.
    Cpu = 0,
    /// A CUDA GPU.
    Cuda = 1,
}

impl DeviceKind {
    /// The kind with this code. `field` is the name that an error gives the argument.
    pub fn from_code(field: &str, code: i32) -> Result<DeviceKind> {
        match code {
            0 => Ok(DeviceKind::Cpu),
            1 => Ok(DeviceKind::Cuda),
            _ => Err(Error::invalid(field, code, "a device kind: 0 (CPU) or 1 (CUDA)")),
        }
    }
}

/// A device by kind and number. It need not exist; [`device_info`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Device {
    /// The kind.
    pub kind: DeviceKind,
    /// Its number among those of the kind, 0 to 65535.
    pub ordinal: i32,
}

impl Device {
    /// The processors of this machine.
    pub const CPU: Device = Device { kind: DeviceKind::Cpu, ordinal: 0 };

    /// The device's code at the C ABI: kind * 65536 + ordinal.
    pub fn code(self) -> i32 {
        self.kind as i32 * 65536 + self.ordinal
    }

    /// The device with this code. `field` is the name that an error gives the argument.
    pub fn from_code(field: &str, code: i32) -> Result<Device> {
        let kind = match code >> 16 {
            0 => DeviceKind::Cpu,
            1 => DeviceKind::Cuda,
            _ => return Err(Error::invalid(field, code, "TREEATTN_CPU or TREEATTN_CUDA(ordinal)")),
        };
        Ok(Device { kind, ordinal: code & 0xffff })
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.kind {
            DeviceKind::Cpu => "cpu",
            DeviceKind::Cuda => "cuda",
        };
        write!(f, "{kind}:{}", self.ordinal)
    }
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The device.
    pub device: Device,
    /// Its maker's name for it.
    pub name: String,
    /// Its memory, bytes.
    pub memory: u64,
    /// Processor cores that this process may use, or streaming multiprocessors.
    pub units: i32,
    /// Vector extensions of the processor that matter here, or the compute capability.
    pub isa: String,
}

/// How many devices of a kind this build can use here.
pub fn device_count(kind: DeviceKind) -> i32 {
    match kind {
        DeviceKind::Cpu => 1,
        DeviceKind::Cuda => cuda::count(),
    }
}

/// What `device` is. `InvalidArgument` for a CPU other than 0, `Unavailable` for a GPU that is not there.
pub fn device_info(device: Device) -> Result<DeviceInfo> {
    match device.kind {
        DeviceKind::Cpu if device.ordinal == 0 => Ok(host::info()),
        DeviceKind::Cpu => Err(Error::invalid("device", device, "cpu:0 (all processors are one device)")),
        DeviceKind::Cuda => cuda::info(device),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn codes_go_round_and_foreign_ones_are_refused() {
        for kind in [DeviceKind::Cpu, DeviceKind::Cuda] {
            for ordinal in [0, 1, 65535] {
                let device = Device { kind, ordinal };
                assert_eq!(Device::from_code("device", device.code()), Ok(device));
            }
        }
        for code in [-1, i32::MIN, i32::MAX, 2 * 65536] {
            assert_eq!(Device::from_code("device", code).unwrap_err().kind(), ErrorKind::InvalidArgument);
        }
    }

    #[test]
    fn the_host_describes_itself() {
        let info = device_info(Device::CPU).unwrap();
        assert!(info.memory > 1 << 20 && info.units >= 1 && !info.name.is_empty() && !info.isa.is_empty(), "{info:?}");
        let second = device_info(Device { kind: DeviceKind::Cpu, ordinal: 1 }).unwrap_err();
        assert_eq!(second.kind(), ErrorKind::InvalidArgument);
        let gpu = device_info(Device { kind: DeviceKind::Cuda, ordinal: 65535 }).unwrap_err();
        assert_eq!((gpu.kind(), gpu.message().contains("libcuda")), (ErrorKind::Unavailable, true));
    }
}
