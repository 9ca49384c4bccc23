//! How each algorithm exchanges, on CPUs and on GPUs: the one table behind what is refused, which route is chosen and what a
//! communicator says of itself.

use super::rank::{CpuRank, CudaGroup, CudaRank, Rank};
use crate::attention::Algorithm;
use crate::comm::Tree;
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
    /// In allreduces of NCCL.
    Nccl,
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

/// How `algorithm` exchanges on GPUs, if it is served there. `AUTO` as what it may become.
pub(super) fn on_gpus(algorithm: Algorithm) -> Option<OnGpus> {
    match algorithm {
        Algorithm::Auto | Algorithm::OneShot | Algorithm::TwoShot => Some(OnGpus::Windows),
        Algorithm::Allreduce3 => Some(OnGpus::Nccl),
        Algorithm::Tree | Algorithm::Ring => None,
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
        DeviceKind::Cuda => (|algorithm| on_gpus(algorithm).is_some(), "a GPU"),
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
        Rank::Cuda(rank) => match (&rank.group, on_gpus(algorithm)) {
            (CudaGroup::Peers(peers), Some(OnGpus::Windows)) => peers.view().map(drop),
            _ => Ok(()),
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
                Rank::Cuda(rank) => on_gpus(algorithm)?.describe(rank),
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

impl OnGpus {
    /// As members of a JSON object.
    fn describe(self, rank: &CudaRank) -> String {
        match (self, &rank.group) {
            (OnGpus::Windows, CudaGroup::Peers(peers)) => {
                format!(r#""by":"windows","chunk_bytes":{}"#, peers.capacity())
            }
            (OnGpus::Windows, CudaGroup::Single(_)) => r#""by":"windows""#.into(),
            (OnGpus::Nccl, _) => r#""by":"nccl""#.into(),
        }
    }
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
