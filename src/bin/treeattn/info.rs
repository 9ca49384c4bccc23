//! `treeattn info`: the library, the devices, and what was chosen for them.

use serde::Serialize;
use treeattn::cpu::{ENVIRONMENT, Isa};
use treeattn::ffi::codes::TREEATTN_ABI_VERSION;
use treeattn::runtime::{Runtime, RuntimeConfig};

use crate::bench::{Ceiling, Pool};
use crate::gpus;
use crate::machine::Machine;
use crate::outcome::{Outcome, print};

/// Bytes that `--bandwidth` reads over.
const READ_BYTES: usize = 1 << 30;

#[derive(clap::Args)]
pub struct Args {
    /// Also measures the read bandwidth of all cores (takes a second or two, and 1 GiB of memory).
    #[arg(long)]
    bandwidth: bool,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Info {
    version: &'static str,
    abi_version: i32,
    machine: Machine,
    isa: String,
    isa_available: Vec<&'static str>,
    /// The driver, the kernels in this build, every GPU, NCCL.
    gpus: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    read_bandwidth: Option<ReadBandwidth>,
}

#[derive(Serialize)]
struct ReadBandwidth {
    gb_per_s: f64,
    kernel: &'static str,
}

pub fn run(args: &Args) -> Outcome<()> {
    let runtime = Runtime::new(RuntimeConfig::default())?;
    let read_bandwidth = if args.bandwidth {
        let pool = Pool::new(READ_BYTES)?;
        let ceiling = Ceiling::measure(&pool)?;
        Some(ReadBandwidth { gb_per_s: ceiling.median() / 1e9, kernel: ceiling.kernel() })
    } else {
        None
    };
    let info = Info {
        version: env!("CARGO_PKG_VERSION"),
        abi_version: TREEATTN_ABI_VERSION,
        machine: Machine::find(&runtime)?,
        isa: runtime.cpu_isa().describe(),
        isa_available: Isa::available().map(Isa::name).collect(),
        gpus: gpus::describe(&runtime)?,
        read_bandwidth,
    };
    if args.json { print(&format!("{}\n", serde_json::to_string_pretty(&info)?)) } else { print(&text(&info)) }
}

fn text(info: &Info) -> String {
    let machine = &info.machine;
    let mut lines = vec![
        format!("treeattn {}, ABI version {}", info.version, info.abi_version),
        format!("cpu:0: {}, {} cores, {:.0} GiB", machine.processor, machine.cores, gib(machine.memory_bytes)),
        format!("  features: {}", machine.features),
        format!("  kernels: {} (of {}; {ENVIRONMENT} overrides)", info.isa, info.isa_available.join(", ")),
    ];
    if !machine.caches.is_empty() {
        let caches: Vec<String> =
            machine.caches.iter().map(|c| format!("{} {} (cores {})", c.name, c.size, c.shared_by)).collect();
        lines.push(format!("  caches: {}", caches.join(", ")));
    }
    if machine.numa_nodes.is_empty() {
        lines.push("  NUMA nodes: one".to_string());
    }
    lines.push(format!("  transparent huge pages: {}", machine.huge_pages));
    if let Some(read) = &info.read_bandwidth {
        lines.push(format!("  read bandwidth, all cores: {:.1} GB/s ({})", read.gb_per_s, read.kernel));
    }
    lines.extend(machine.numa_nodes.iter().map(|node| {
        let memory = match node.memory_bytes {
            0 => "memory unknown".to_string(),
            bytes if bytes < 1 << 30 => format!("{} MiB", bytes >> 20),
            bytes => format!("{:.0} GiB", gib(bytes)),
        };
        format!("{}: NUMA node {}, cpus {}, {memory}; in C {}", node.device, node.number, node.cpus, node.name)
    }));
    lines.extend(info.gpus.iter().cloned());
    lines.join("\n") + "\n"
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}
