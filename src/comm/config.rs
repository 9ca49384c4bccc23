//! What a communicator is created with.

use std::time::Duration;

use crate::error::{Error, Result};

/// Longest deadline, a year: beyond it clocks overflow.
const MAX_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);
/// Most worker threads of a rank.
const MAX_THREADS: usize = 1024;

/// How a communicator waits and what it may use. The same on every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommConfig {
    /// How long creating the communicator and its plans may wait for the other ranks.
    pub setup_timeout: Duration,
    /// How long a step may wait for the other ranks.
    pub step_timeout: Duration,
    /// Worker threads of a CPU rank, the calling thread among them. 0: the cores over the local ranks, at least 1.
    pub threads_per_rank: usize,
    /// Ranks of the same group count as one node; the tree algorithm merges within a node first. This one may differ from
    /// rank to rank. 0 over an engine's transport: the ranks of a machine are a node.
    pub node_group: i32,
    /// The group of each rank of a local communicator, which has one config for all. Empty: `node_group` for all.
    pub node_groups: Vec<i32>,
    /// The NCCL library to load. None: looked for.
    pub nccl_path: Option<String>,
}

impl Default for CommConfig {
    fn default() -> Self {
        CommConfig {
            setup_timeout: Duration::from_secs(30),
            step_timeout: Duration::from_secs(10),
            threads_per_rank: 0,
            node_group: 0,
            node_groups: Vec::new(),
            nccl_path: None,
        }
    }
}

impl CommConfig {
    /// Checks every field; `InvalidArgument` names the first bad one.
    pub fn check(&self) -> Result<()> {
        for (name, value) in [("setup_timeout_ns", self.setup_timeout), ("step_timeout_ns", self.step_timeout)] {
            if value.is_zero() || value > MAX_TIMEOUT {
                return Err(Error::invalid(name, format!("{value:?}"), "above 0, at most a year"));
            }
        }
        if self.threads_per_rank > MAX_THREADS {
            return Err(Error::invalid("threads_per_rank", self.threads_per_rank, format!("0 to {MAX_THREADS}")));
        }
        if self.node_group < 0 {
            return Err(Error::invalid("node_group", self.node_group, "at least 0"));
        }
        if let Some(rank) = self.node_groups.iter().position(|&group| group < 0) {
            return Err(Error::invalid(format!("node_groups[{rank}]"), self.node_groups[rank], "at least 0"));
        }
        if let Some(path) = &self.nccl_path
            && (path.is_empty() || path.contains('\0'))
        {
            return Err(Error::invalid("nccl_path", format!("{path:?}"), "a path, or none"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_accepted_and_nonsense_is_named() {
        CommConfig::default().check().unwrap();
        let bad = [
            ("setup_timeout_ns", CommConfig { setup_timeout: Duration::ZERO, ..Default::default() }),
            ("step_timeout_ns", CommConfig { step_timeout: Duration::MAX, ..Default::default() }),
            ("threads_per_rank", CommConfig { threads_per_rank: 1025, ..Default::default() }),
            ("node_group", CommConfig { node_group: -1, ..Default::default() }),
            ("node_groups[1]", CommConfig { node_groups: vec![0, -3], ..Default::default() }),
            ("nccl_path", CommConfig { nccl_path: Some(String::new()), ..Default::default() }),
        ];
        for (name, config) in bad {
            assert!(config.check().unwrap_err().message().starts_with(name));
        }
    }
}
