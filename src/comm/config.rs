//! What a communicator is created with.

use std::time::Duration;

use crate::device::{EngineExecutor, Team, available_cores};
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
    /// Worker threads of a CPU rank, the calling thread among them. 0: the cores of its device over the local ranks on that device,
    /// at least 1.
    pub threads_per_rank: usize,
    /// Ranks of the same group count as one node; the tree algorithm merges within a node first, and GPUs reach each other's memory
    /// within a node only. This one may differ from rank to rank. 0 over an engine's transport or NCCL: the ranks of a machine
    /// are a node; over NCCL all ranks name a group, or none does.
    pub node_group: i32,
    /// The group of each rank of a local communicator, which has one config for all. Empty: `node_group` for all.
    pub node_groups: Vec<i32>,
    /// The NCCL library to load. None: looked for.
    pub nccl_path: Option<String>,
    /// Computes the steps of CPU ranks on the engine's threads, all ranks of a local communicator by the same function, which may
    /// run for several of them at a time; `threads_per_rank` is then 0 or the executor's number. None: the library's own threads.
    /// This one may differ from rank to rank. Not with GPUs.
    pub executor: Option<EngineExecutor>,
    /// The most members of an engine's team that runs steps ([`Plan::decode_team`](crate::runtime::Plan::decode_team)), at most
    /// 1,024. 0: as many as the rank has threads. A plan's scratch grows with it. This one may differ from rank to rank.
    pub max_team: usize,
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
            executor: None,
            max_team: 0,
        }
    }
}

impl CommConfig {
    /// Checks every field; `InvalidArgument` names the first bad one.
    pub fn check(&self) -> Result<()> {
        for (name, value) in [("setup_timeout_ns", self.setup_timeout), ("step_timeout_ns", self.step_timeout)] {
            if value.is_zero() || value > MAX_TIMEOUT {
                let wanted = format!("nanoseconds, above 0 and at most {}, a year", MAX_TIMEOUT.as_nanos());
                return Err(Error::invalid(name, value.as_nanos(), wanted));
            }
        }
        if self.threads_per_rank > MAX_THREADS {
            return Err(Error::invalid("threads_per_rank", self.threads_per_rank, format!("0 to {MAX_THREADS}")));
        }
        if let Some(executor) = &self.executor
            && ![0, executor.threads()].contains(&self.threads_per_rank)
        {
            let wanted = format!("0, or executor.threads = {}", executor.threads());
            return Err(Error::invalid("threads_per_rank", self.threads_per_rank, wanted));
        }
        if self.max_team > Team::MOST {
            return Err(Error::invalid("max_team", self.max_team, format!("0 to {}", Team::MOST)));
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

    /// Checks what GPUs have no use for; `InvalidArgument` names it.
    pub fn check_on_gpus(&self) -> Result<()> {
        match self.executor {
            None if self.max_team == 0 => Ok(()),
            None => Err(Error::invalid("max_team", self.max_team, "0 on GPUs, which compute themselves")),
            Some(_) => Err(Error::invalid("executor", "one", "NULL on GPUs, which compute themselves")),
        }
    }

    /// Threads of each of `local` CPU ranks on this machine.
    pub fn threads(&self, local: usize) -> usize {
        self.threads_of(available_cores(), local)
    }

    /// Threads of each of `local` CPU ranks on the same `cores`.
    pub fn threads_of(&self, cores: usize, local: usize) -> usize {
        match (&self.executor, self.threads_per_rank) {
            (Some(executor), _) => executor.threads(),
            (None, 0) => (cores / local).max(1),
            (None, threads) => threads,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;

    use super::*;
    use crate::device::TaskCallback;

    /// # Safety
    /// None: it reads nothing.
    unsafe extern "C" fn nothing(_: *mut c_void, _: i32, _: Option<TaskCallback>, _: *mut c_void) -> i32 {
        0
    }

    #[test]
    fn an_executor_says_how_many_threads() {
        // SAFETY: nothing is run.
        let executor = unsafe { EngineExecutor::new(std::ptr::null_mut(), 5, nothing) }.unwrap();
        let with =
            |threads_per_rank| CommConfig { executor: Some(executor), threads_per_rank, ..CommConfig::default() };
        for threads in [0, 5] {
            with(threads).check().unwrap();
            assert_eq!(with(threads).threads(3), 5);
        }
        let error = with(4).check().unwrap_err();
        assert_eq!(error.message(), "threads_per_rank: found 4, wanted 0, or executor.threads = 5");
        let error = with(0).check_on_gpus().unwrap_err();
        assert!(error.message().starts_with("executor: found one, wanted NULL"), "{error}");
        CommConfig::default().check_on_gpus().unwrap();
        assert_eq!(CommConfig { threads_per_rank: 7, ..CommConfig::default() }.threads(2), 7);
    }

    #[test]
    fn the_default_is_accepted_and_nonsense_is_named() {
        CommConfig::default().check().unwrap();
        let bad = [
            ("setup_timeout_ns", CommConfig { setup_timeout: Duration::ZERO, ..Default::default() }),
            ("step_timeout_ns", CommConfig { step_timeout: Duration::MAX, ..Default::default() }),
            ("threads_per_rank", CommConfig { threads_per_rank: 1025, ..Default::default() }),
            ("max_team", CommConfig { max_team: 1025, ..Default::default() }),
            ("node_group", CommConfig { node_group: -1, ..Default::default() }),
            ("node_groups[1]", CommConfig { node_groups: vec![0, -3], ..Default::default() }),
            ("nccl_path", CommConfig { nccl_path: Some(String::new()), ..Default::default() }),
        ];
        for (name, config) in bad {
            assert!(config.check().unwrap_err().message().starts_with(name));
        }
        let most = CommConfig {
            setup_timeout: MAX_TIMEOUT,
            step_timeout: Duration::from_nanos(1),
            threads_per_rank: 1024,
            max_team: 1024,
            node_groups: vec![0, i32::MAX],
            ..Default::default()
        };
        most.check().unwrap();
    }
}
