//! What this machine is and how busy it is, as far as the system says.

use std::fs::read_to_string;

use serde::Serialize;
use treeattn::runtime::{Device, Runtime};

use crate::outcome::Outcome;

/// The machine that a report was made on.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub processor: String,
    /// What the processor can do.
    pub features: String,
    /// Cores that this process may use.
    pub cores: i32,
    pub memory_bytes: u64,
    /// Empty where there is one.
    pub numa_nodes: Vec<NumaNode>,
    pub caches: Vec<Cache>,
    /// The system's setting for transparent huge pages.
    pub huge_pages: String,
}

/// A NUMA node that this process may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NumaNode {
    /// The kernel's number.
    pub number: usize,
    /// The device that binds to it, as the command line and as C names it.
    pub device: String,
    pub name: String,
    /// Its processors that this process may use: "0-3,8".
    pub cpus: String,
    /// 0 where the system does not say.
    pub memory_bytes: u64,
}

/// One kind of cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cache {
    pub name: String,
    /// The system's words, such as "32768K".
    pub size: String,
    /// The cores that share one.
    pub shared_by: String,
}

impl Machine {
    pub fn find(runtime: &Runtime) -> Outcome<Machine> {
        let info = runtime.device_info(Device::CPU)?;
        Ok(Machine {
            processor: info.name,
            features: treeattn::device::device_info(Device::CPU)?.isa,
            cores: info.units,
            memory_bytes: info.memory,
            numa_nodes: treeattn::device::numa_nodes().into_iter().map(NumaNode::from).collect(),
            caches: caches(),
            huge_pages: huge_pages(),
        })
    }

    /// Where ranks on `cpu:0` run, a line; empty where there is one NUMA node.
    pub fn where_ranks_run(&self) -> String {
        if self.numa_nodes.is_empty() {
            return String::new();
        }
        let nodes: Vec<String> =
            self.numa_nodes.iter().map(|node| format!("{} (cpus {})", node.number, node.cpus)).collect();
        format!("ranks run on cpu:0, which is NUMA nodes {}, and are bound to none\n", nodes.join(" and "))
    }
}

impl From<treeattn::device::NumaNode> for NumaNode {
    fn from(node: treeattn::device::NumaNode) -> NumaNode {
        NumaNode {
            number: node.number,
            name: format!("TREEATTN_CPU_NODE({})", node.device.ordinal - 1),
            device: node.device.to_string(),
            cpus: node.cpus,
            memory_bytes: node.memory,
        }
    }
}

/// The caches of the first core; empty where the system does not say.
fn caches() -> Vec<Cache> {
    let word = |index: usize, name: &str| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{name}");
        read_to_string(path).ok().map(|text| text.trim().to_string())
    };
    (0..8)
        .filter_map(|index| {
            let kind = match word(index, "type")?.as_str() {
                "Data" => "d",
                "Instruction" => "i",
                _ => "",
            };
            Some(Cache {
                name: format!("L{}{kind}", word(index, "level")?),
                size: word(index, "size")?,
                shared_by: word(index, "shared_cpu_list")?,
            })
        })
        .collect()
}

fn huge_pages() -> String {
    let text = read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let chosen = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    chosen.map_or("unknown", |(word, _)| word).to_string()
}

/// Processor time since the start of the machine, in ticks: all cores, all processes, and this process.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    total: u64,
    busy: u64,
    own: u64,
}

impl Usage {
    /// None where the system does not say.
    pub fn now() -> Option<Usage> {
        let stat = read_to_string("/proc/stat").ok()?;
        let ticks: Vec<u64> =
            stat.lines().next()?.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
        // user nice system idle iowait irq softirq steal; guest time is part of user time.
        let total: u64 = ticks.iter().take(8).sum();
        let idle: u64 = ticks.iter().skip(3).take(2).sum();
        let own = read_to_string("/proc/self/stat").ok()?;
        // The name, in brackets, may hold spaces; utime and stime are fields 14 and 15.
        let fields: Vec<&str> = own.rsplit_once(')')?.1.split_whitespace().collect();
        let own = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
        Some(Usage { total, busy: total.checked_sub(idle)?, own })
    }

    /// The share of all cores that others (processes, or the host below this machine) used from `self` to `later`.
    pub fn others(&self, later: &Usage) -> Option<f64> {
        let total = later.total.checked_sub(self.total).filter(|&total| total > 0)?;
        let busy = later.busy.checked_sub(self.busy)?;
        let own = later.own.checked_sub(self.own)?;
        Some(busy.saturating_sub(own) as f64 / total as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_are_what_is_busy_and_not_ours() {
        let before = Usage { total: 100, busy: 50, own: 10 };
        let after = Usage { total: 300, busy: 200, own: 60 };
        assert_eq!(before.others(&after), Some(0.5));
        assert_eq!(before.others(&before), None);
    }
}
