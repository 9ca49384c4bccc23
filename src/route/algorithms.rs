//! How each algorithm exchanges, on CPUs and on GPUs: the one table behind what is refused, which route is chosen and what a
//! communicator says of itself.

use super::nccl;
use super::rank::{CpuRank, CudaGroup, CudaRank, Rank};
use crate::attention::Algorithm;
use crate::comm::{GpuRank, Tree};
use crate::device::DeviceKind;
use crate::error::{Error, Result};

/// How CPU ranks exchange.
pub(super) enum OnCpus {
    /// In rounds: how many for each chunk, where ranks read each other's payloads in place and where an allgather brings them.
    Rounds { in_place: usize, gathered: usize },
    /// In messages between two ranks: how many follow each other.
    Hops(fn(&CpuRank) -> usize),
}

/// How ranks on GPUs exchange.
pub(super) enum OnGpus {
    /// Kernels write into the windows of other GPUs.
    Windows,
    /// One allgather of NCCL; with why windows do not serve.
    Allgather(String),
    /// Windows within nodes, then one allgather of NCCL among ranks of different nodes; with why.
    Nodes(&'static str),
    /// In allreduces of NCCL.
    Allreduces,
}

/// How `algorithm` exchanges on CPUs, if it is served there. `AUTO` as what it may become.
pub(super) fn on_cpus(algorithm: Algorithm) -> Option<OnCpus> {
    Some(match algorithm {
        Algorithm::Auto | Algorithm::OneShot => OnCpus::Rounds { in_place: 1, gathered: 1 },
        Algorithm::TwoShot => OnCpus::Rounds { in_place: 2, gathered: 2 },
        // Three allreduces. The second round of each brings the parts that ranks reduced; where all payloads are gathered every
        // rank reduces all parts itself.
        Algorithm::Allreduce3 => OnCpus::Rounds { in_place: 6, gathered: 3 },
        Algorithm::Tree => {
            OnCpus::Hops(|rank| Tree::new(&rank.nodes, rank.rounds.shard().rank as usize).levels as usize)
        }
        Algorithm::Ring => OnCpus::Hops(|rank| rank.nodes.len() - 1),
    })
}

/// Whether `algorithm` is served on GPUs.
fn is_on_gpus(algorithm: Algorithm) -> bool {
    match algorithm {
        Algorithm::Auto | Algorithm::OneShot | Algorithm::TwoShot | Algorithm::Tree | Algorithm::Allreduce3 => true,
        Algorithm::Ring => false,
    }
}

/// How a rank on a GPU, whose end of the group is `peers`, exchanges by `algorithm`, one that is served. `Unsupported` where its
/// group has not got what that needs.
pub(super) fn on_gpus(peers: &GpuRank, algorithm: Algorithm) -> Result<OnGpus> {
    let (nodes, windows) = (peers.nodes(), peers.view());
    match (algorithm, windows) {
        (Algorithm::Allreduce3, _) => Ok(OnGpus::Allreduces),
        (Algorithm::Auto | Algorithm::OneShot, _) if nccl::is_asked_for() => {
            Ok(OnGpus::Allgather("TREEATTN_GPU_EXCHANGE is nccl".into()))
        }
        (Algorithm::Auto | Algorithm::OneShot, Err(error)) => Ok(OnGpus::Allgather(error.message().to_string())),
        (Algorithm::Tree, Err(error)) if nodes.are_single() => Ok(OnGpus::Allgather(error.message().to_string())),
        (_, Err(error)) => Err(error),
        (Algorithm::Tree, Ok(_)) if nodes.count() == 1 => {
            let wanted = "TREE on GPUs of several nodes (node_group)";
            Err(Error::unsupported("algorithm", "TREE on GPUs of one node", wanted))
        }
        (_, Ok(_)) if nodes.count() == 1 => Ok(OnGpus::Windows),
        (Algorithm::Auto, Ok(_)) => Ok(OnGpus::Nodes("windows do not reach from node to node")),
        (Algorithm::Tree, Ok(_)) => Ok(OnGpus::Nodes("asked for")),
        (Algorithm::OneShot, Ok(_)) => Ok(OnGpus::Allgather("asked for, and ranks are of several nodes".into())),
        (_, Ok(_)) => {
            let wanted = "AUTO, ONE_SHOT, TREE or ALLREDUCE3 on GPUs of several nodes (node_group)";
            Err(Error::unsupported("algorithm", algorithm.name(), wanted))
        }
    }
}

/// Whether `algorithm` exchanges partials, which an engine may have made itself.
pub(super) fn exchanges_partials(algorithm: Algorithm) -> bool {
    match algorithm {
        Algorithm::Auto | Algorithm::OneShot | Algorithm::TwoShot | Algorithm::Tree | Algorithm::Allreduce3 => true,
        Algorithm::Ring => false,
    }
}

/// Whether there are plans with `algorithm` on devices of `kind`: `Unsupported` names those that there are.
pub(super) fn supported(kind: DeviceKind, algorithm: Algorithm) -> Result<()> {
    let (are, device): (fn(Algorithm) -> bool, _) = match kind {
        DeviceKind::Cpu => (|algorithm| on_cpus(algorithm).is_some(), "a CPU"),
        DeviceKind::Cuda => (is_on_gpus, "a GPU"),
    };
    match are(algorithm) {
        true => Ok(()),
        false => Err(Error::unsupported("algorithm", algorithm.name(), format!("{} on {device}", names(are)))),
    }
}

/// Whether a plan on `rank` may exchange by `algorithm`, one that is supported: `Unsupported` where the rank's group has not
/// got what that needs.
pub(super) fn reachable(rank: &Rank, algorithm: Algorithm) -> Result<()> {
    match rank {
        Rank::Cpu(rank) => match on_cpus(algorithm) {
            Some(OnCpus::Hops(_)) if !rank.rounds.has_hops() => {
                let names = names(|algorithm| matches!(on_cpus(algorithm), Some(OnCpus::Rounds { .. })));
                let wanted = format!("{names}: the engine's transport has no sendrecv");
                Err(Error::unsupported("algorithm", algorithm.name(), wanted))
            }
            _ => Ok(()),
        },
        Rank::Cuda(rank) => match &rank.group {
            CudaGroup::Peers(peers) => on_gpus(peers, algorithm).map(drop),
            CudaGroup::Single(_) => Ok(()),
        },
    }
}

/// What connects `rank` to its peers, and the algorithms of its plans, as JSON.
pub(crate) fn describe(rank: &Rank) -> String {
    let is_asked_for = |&algorithm: &Algorithm| algorithm != Algorithm::Auto && reachable(rank, algorithm).is_ok();
    let algorithms: Vec<String> = Algorithm::ALL
        .into_iter()
        .filter(is_asked_for)
        .filter_map(|algorithm| {
            let exchange = match rank {
                Rank::Cpu(rank) => on_cpus(algorithm)?.describe(rank),
                Rank::Cuda(rank) if is_on_gpus(algorithm) => describe_on_gpus(rank, algorithm)?,
                Rank::Cuda(_) => return None,
            };
            Some(format!(r#"{{"name":"{}",{exchange}}}"#, algorithm.name()))
        })
        .collect();
    format!(r#"{{{},"algorithms":[{}]}}"#, rank.bootstrap().describe(), algorithms.join(","))
}

impl OnCpus {
    /// As members of a JSON object.
    fn describe(self, rank: &CpuRank) -> String {
        match self {
            OnCpus::Rounds { in_place, gathered } => {
                let rounds = if rank.rounds.reads_in_place() { in_place } else { gathered };
                format!(r#""by":"rounds","rounds_per_chunk":{rounds},"chunk_bytes":{}"#, rank.rounds.capacity())
            }
            OnCpus::Hops(count) => format!(r#""by":"hops","hops":{}"#, count(rank)),
        }
    }
}

/// How `algorithm`, one that is served, exchanges on `rank`, as members of a JSON object.
fn describe_on_gpus(rank: &CudaRank, algorithm: Algorithm) -> Option<String> {
    let CudaGroup::Peers(peers) = &rank.group else {
        // It would exchange nothing.
        let by = if algorithm == Algorithm::Allreduce3 { "nccl" } else { "windows" };
        return Some(format!(r#""by":"{by}""#));
    };
    Some(match on_gpus(peers, algorithm).ok()? {
        OnGpus::Windows => format!(r#""by":"windows","chunk_bytes":{}"#, peers.capacity()),
        OnGpus::Allgather(_) => r#""by":"nccl","allgathers":1"#.into(),
        OnGpus::Nodes(_) => {
            let (count, met) = (peers.nodes().count(), peers.nodes().meeting());
            format!(r#""by":"windows and nccl","nodes":{count},"allgathers":1,"allgather_ranks":{met:?}"#)
        }
        OnGpus::Allreduces => r#""by":"nccl","allreduces":3"#.into(),
    })
}

/// "A, B or C", of the algorithms that `are`.
fn names(are: impl Fn(Algorithm) -> bool) -> String {
    let names: Vec<&str> =
        Algorithm::ALL.into_iter().filter(|&algorithm| are(algorithm)).map(Algorithm::name).collect();
    match names.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => names.concat(),
    }
}
