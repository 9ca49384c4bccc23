//! What the driver says of its GPUs. Makes no context.

use cudarc::driver::sys;

use super::driver::{Driver, Meaning, Status, driver, meaning};
use crate::device::identity::{Device, DeviceInfo};
use crate::error::{Error, ErrorKind, Result};

/// The number of GPUs that the driver shows; 0 without a driver.
pub(crate) fn count() -> i32 {
    let Ok(driver) = driver() else { return 0 };
    let mut count = 0;
    // SAFETY: the driver is initialised; the call writes one int to a local.
    if unsafe { (driver.device_get_count)(&mut count) } == 0 { count.min(65536) } else { 0 }
}

/// Describes GPU `device`. `Unavailable` where there is no driver or no such GPU.
pub(crate) fn info(device: Device) -> Result<DeviceInfo> {
    let driver = driver_for(device)?;
    let handle = handle(driver, device)?;
    let mut name = [0u8; 128];
    let mut memory = 0;
    // SAFETY: the handle is the driver's own. The name call writes at most the 128 bytes it is told of, with a zero at the
    // end; the other writes one size to a local.
    unsafe {
        check(driver, (driver.device_get_name)(name.as_mut_ptr().cast(), 128, handle), "cuDeviceGetName")?;
        check(driver, (driver.device_total_mem)(&mut memory, handle), "cuDeviceTotalMem")?;
    }
    let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
    let (major, minor) = compute_capability(driver, handle)?;
    Ok(DeviceInfo {
        device,
        name: String::from_utf8_lossy(name).into_owned(),
        memory: memory as u64,
        units: multiprocessors(driver, handle)?,
        isa: format!("sm_{major}{minor}"),
    })
}

/// The driver. The error names the device that needs it.
pub(super) fn driver_for(device: Device) -> Result<&'static Driver> {
    driver().map_err(|error| {
        let message = format!("device: found {device}, wanted a machine with a CUDA driver; {}", error.message());
        Error::new(error.kind(), message)
    })
}

/// The driver's handle of `device`. `Unavailable` where there is no such GPU.
pub(super) fn handle(driver: &Driver, device: Device) -> Result<sys::CUdevice> {
    let count = count();
    if device.ordinal < 0 || device.ordinal >= count {
        let message = format!("device: found {device}, wanted one of the {count} CUDA devices that libcuda.so.1 shows");
        return Err(Error::new(ErrorKind::Unavailable, message));
    }
    let mut handle = 0;
    // SAFETY: the ordinal was checked against the count; the call writes one handle to a local.
    check(driver, unsafe { (driver.device_get)(&mut handle, device.ordinal) }, "cuDeviceGet")?;
    Ok(handle)
}

/// Streaming multiprocessors of a GPU.
pub(super) fn multiprocessors(driver: &Driver, handle: sys::CUdevice) -> Result<i32> {
    attribute(driver, handle, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
}

/// Compute capability of a GPU, major and minor.
pub(super) fn compute_capability(driver: &Driver, handle: sys::CUdevice) -> Result<(i32, i32)> {
    Ok((
        attribute(driver, handle, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(driver, handle, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}

fn attribute(driver: &Driver, handle: sys::CUdevice, which: sys::CUdevice_attribute) -> Result<i32> {
    let mut value = 0;
    // SAFETY: `handle` came from cuDeviceGet; the call writes one int to a local.
    check(driver, unsafe { (driver.device_get_attribute)(&mut value, which, handle) }, "cuDeviceGetAttribute")?;
    Ok(value)
}

/// The error of a failed call that is made without a context.
pub(super) fn check(driver: &Driver, status: Status, call: &str) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    let kind = if let Meaning::Call(kind) = meaning(status) { kind } else { ErrorKind::Cuda };
    Err(Error::new(kind, format!("{call}: found {}, wanted success", driver.describe(status))))
}
