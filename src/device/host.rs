//! The processors of this machine.

use once_cell::sync::Lazy;

use super::identity::{Device, DeviceInfo};
use super::numa::Node;

/// Processor cores that this process may use (affinity and control groups respected), at least 1.
pub fn available_cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// A CPU device: a node, or all processors.
pub(super) fn info(device: Device, node: Option<&Node>) -> DeviceInfo {
    // Read once: every check of a device comes here.
    static NAME: Lazy<String> = Lazy::new(|| model_name().unwrap_or_else(|| std::env::consts::ARCH.to_string()));
    let (name, memory, cores) = match node {
        None => (NAME.clone(), memory(), available_cores()),
        Some(node) => (format!("{}, NUMA node {}", *NAME, node.number()), node.memory(), node.cores()),
    };
    DeviceInfo { device, name, memory, units: i32::try_from(cores).unwrap_or(i32::MAX), isa: isa() }
}

fn model_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name") || line.starts_with("Model"))?;
    Some(line.split_once(':')?.1.trim().to_string()).filter(|name| !name.is_empty())
}

fn memory() -> u64 {
    // SAFETY: sysconf takes a number and gives a number.
    let (pages, size) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    u64::try_from(pages).unwrap_or(0).saturating_mul(u64::try_from(size).unwrap_or(0))
}

#[cfg(target_arch = "x86_64")]
fn isa() -> String {
    let features = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx512vl", is_x86_feature_detected!("avx512vl")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
    ];
    std::iter::once("x86_64").chain(features.iter().filter(|f| f.1).map(|f| f.0)).collect::<Vec<_>>().join(" ")
}

#[cfg(target_arch = "aarch64")]
fn isa() -> String {
    "aarch64 neon".to_string()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn isa() -> String {
    std::env::consts::ARCH.to_string()
}
