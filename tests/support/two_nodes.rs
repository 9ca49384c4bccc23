//! A folder in place of `/sys`, of a machine that has two NUMA nodes.

use std::path::Path;

/// Writes the nodes below `folder`: node n has the processors of the list `cpus[n]` and n + 1 MiB of memory.
pub fn write(folder: &Path, cpus: [&str; 2]) {
    let nodes = folder.join("devices/system/node");
    for (node, cpus) in cpus.iter().enumerate() {
        let node_folder = nodes.join(format!("node{node}"));
        std::fs::create_dir_all(&node_folder).unwrap();
        std::fs::write(node_folder.join("cpulist"), format!("{cpus}\n")).unwrap();
        std::fs::write(node_folder.join("meminfo"), format!("Node {node} MemTotal:  {} kB\n", 1024 * (node + 1)))
            .unwrap();
    }
    std::fs::write(nodes.join("online"), "0-1\n").unwrap();
}
