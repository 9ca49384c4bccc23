//! Which device, and what it is: plain data that the rest of `device` and the layers above share.

use crate::error::{Error, Result};

/// The kind of a device. The discriminant is its code at the C ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum DeviceKind {
    /// The processors of this machine, as one device, or those of a NUMA node.
    Cpu = 0,
    /// A CUDA GPU.
    Cuda = 1,
}

impl DeviceKind {
    /// The kind with this code. `field` names the argument in an error. `InvalidArgument` for an unknown code.
    pub fn from_code(field: &str, code: i32) -> Result<DeviceKind> {
        match code {
            0 => Ok(DeviceKind::Cpu),
            1 => Ok(DeviceKind::Cuda),
            _ => Err(Error::invalid(field, code, "a device kind: 0 (CPU) or 1 (CUDA)")),
        }
    }
}

/// A device by kind and number. It need not exist; [`device_info`](super::device_info) tells.
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

    /// The device with this code. `field` names the argument in an error. `InvalidArgument` for an unknown kind.
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

/// A device as it describes itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The device.
    pub device: Device,
    /// The name that its maker gives it.
    pub name: String,
    /// Its memory, bytes.
    pub memory: u64,
    /// Processor cores that this process may use, or streaming multiprocessors.
    pub units: i32,
    /// Vector extensions of the processor that matter here, or the compute capability.
    pub isa: String,
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
}
