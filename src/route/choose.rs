//! Which route a plan takes: the only place that knows them all.

use std::sync::Arc;

use super::Route;
use super::algorithms::{self, OnGpus};
use super::alone::Alone;
use super::context::StepContext;
use super::gpu::GpuShard;
use super::host::partials::PartialRoute;
use super::host::shard::HostShard;
use super::nccl_allgather::NcclAllgather;
use super::nccl_allreduce3::NcclAllreduce3;
use super::nodes::NodeTree;
use super::rank::{CpuRank, CudaGroup, CudaRank, Rank};
use super::ring::route::Ring;
use super::rounds::allreduce3::Allreduce3;
use super::rounds::one_shot::OneShot;
use super::rounds::two_shot::TwoShot;
use super::rounds::weighted::Weighted;
use super::tree::TreeExchange;
use super::windows::route::WindowsRoute;
use crate::attention::{Algorithm, AttentionDesc, Capabilities, DecodeArgs, Dtype, OutputMode, QueryInput};
use crate::comm::GpuRank;
use crate::device::DeviceKind;
use crate::error::{Error, Result};
use crate::{attention, cpu, cuda};

/// Whether plans of `desc`, a checked descriptor, exist on devices of `kind`: `Unsupported` names the field that they do not
/// serve.
pub(crate) fn supported(kind: DeviceKind, desc: &AttentionDesc) -> Result<()> {
    algorithms::supported(kind, desc.algorithm)?;
    if desc.is_merge_only() && !algorithms::exchanges_partials(desc.algorithm) {
        let wanted = "an algorithm that exchanges partials, for a merge-only plan";
        return Err(Error::unsupported("algorithm", desc.algorithm.name(), wanted));
    }
    attention::supported(desc, capabilities(kind))?;
    if desc.output == OutputMode::Weighted && !matches!(desc.algorithm, Algorithm::Auto | Algorithm::OneShot) {
        let wanted = "AUTO or ONE_SHOT with output WEIGHTED, of which log-sum-exps alone travel";
        return Err(Error::unsupported("algorithm", desc.algorithm.name(), wanted));
    }
    if desc.query_input == QueryInput::Scattered && !desc.is_merge_only() && desc.output == OutputMode::Local {
        let wanted = "REPLICATED with output LOCAL, whose steps exchange nothing";
        return Err(Error::unsupported("query_input", desc.query_input.name(), wanted));
    }
    if kind == DeviceKind::Cuda && desc.algorithm == Algorithm::Allreduce3 {
        if desc.query_input == QueryInput::Scattered && !desc.is_merge_only() {
            let wanted = "REPLICATED with algorithm ALLREDUCE3 on a GPU, which has no windows to gather queries in";
            return Err(Error::unsupported("query_input", desc.query_input.name(), wanted));
        }
        if desc.checked {
            let wanted =
                "0 with algorithm ALLREDUCE3 on a GPU: NCCL's allreduces have no windows in which ranks compare steps";
            return Err(Error::unsupported("flags", "CHECKED", wanted));
        }
        if desc.wire_dtype != Dtype::F32 {
            let wanted = "f32 with algorithm ALLREDUCE3 on a GPU: NCCL adds up";
            return Err(Error::unsupported("wire_dtype", desc.wire_dtype.name(), wanted));
        }
    }
    Ok(())
}

/// Whether steps on devices of `kind` may bring what `args` does: `Unsupported` names the argument that they may not.
pub(crate) fn step_supported(kind: DeviceKind, desc: &AttentionDesc, args: &DecodeArgs) -> Result<()> {
    attention::step_supported(desc, args, capabilities(kind))
}

fn capabilities(kind: DeviceKind) -> &'static Capabilities {
    match kind {
        DeviceKind::Cpu => &cpu::CAPABILITIES,
        DeviceKind::Cuda => &cuda::CAPABILITIES,
    }
}

/// The route of a plan on `rank`, with everything allocated that its steps need; not connected yet. Its descriptor is
/// supported. `Unsupported` where the rank's group has not got what the algorithm needs. Blocks; on a GPU `Capturing` during a
/// capture.
pub(crate) fn choose(context: &StepContext, rank: &Rank) -> Result<Box<dyn Route>> {
    if context.exchanges() {
        algorithms::reachable(rank, context.desc.algorithm)?;
    }
    match rank {
        Rank::Cpu(rank) if !context.exchanges() => {
            Ok(Box::new(Alone::new(context, Box::new(HostShard::new(context, rank, 1)?))))
        }
        Rank::Cpu(rank) => on_cpus(context, rank),
        Rank::Cuda(rank) => match &rank.group {
            CudaGroup::Peers(peers) if context.exchanges() => on_gpus(context, rank, peers),
            CudaGroup::Peers(_) | CudaGroup::Single(_) => alone_on_a_gpu(context, rank),
        },
    }
}

fn on_gpus(context: &StepContext, rank: &Arc<CudaRank>, peers: &Arc<GpuRank>) -> Result<Box<dyn Route>> {
    Ok(match algorithms::on_gpus(peers, context.desc.algorithm)? {
        OnGpus::Windows => Box::new(WindowsRoute::new(context, rank, peers)?),
        OnGpus::Allgather(why) => Box::new(NcclAllgather::new(context, rank, &why)?),
        OnGpus::Nodes(why) => Box::new(NodeTree::new(context, rank, peers, why)?),
        OnGpus::Allreduces => Box::new(NcclAllreduce3::new(context, rank)?),
    })
}

fn alone_on_a_gpu(context: &StepContext, rank: &Arc<CudaRank>) -> Result<Box<dyn Route>> {
    let shard = GpuShard::new(context, rank)?;
    Ok(Box::new(Alone::new(context, Box::new(shard))))
}

fn on_cpus(context: &StepContext, rank: &Arc<CpuRank>) -> Result<Box<dyn Route>> {
    let (desc, in_place) = (&context.desc, rank.rounds.reads_in_place());
    let asked = "asked for";
    if desc.output == OutputMode::Weighted {
        let reason = "weighted output: log-sum-exps alone travel, in one round";
        return Ok(Box::new(PartialRoute::new(context, rank, || Ok(Weighted), reason)?));
    }
    Ok(match desc.algorithm {
        Algorithm::Auto => {
            let reason = match desc.output {
                OutputMode::Scattered if in_place => {
                    "ranks share memory: each reads its own heads of every partial in place"
                }
                _ if in_place => {
                    "ranks share memory: every partial is read in place, so one round has the fewest steps"
                }
                _ => "one allgather of the engine's transport has the fewest steps",
            };
            Box::new(PartialRoute::new(context, rank, || Ok(OneShot), reason)?)
        }
        Algorithm::OneShot => Box::new(PartialRoute::new(context, rank, || Ok(OneShot), asked)?),
        Algorithm::TwoShot => Box::new(PartialRoute::new(context, rank, || TwoShot::new(context), asked)?),
        Algorithm::Tree => Box::new(PartialRoute::new(context, rank, || TreeExchange::new(context, rank), asked)?),
        Algorithm::Allreduce3 => Box::new(PartialRoute::new(context, rank, || Allreduce3::new(context), asked)?),
        Algorithm::Ring => Box::new(Ring::new(context, rank)?),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::attention::Shard;
    use crate::comm::{CommConfig, local_group};
    use crate::cpu::Isa;
    use crate::device::Workers;

    /// Rank 0 of two on CPUs, and the end of the other.
    fn cpu_rank() -> (Rank, impl Sized) {
        let mut ends = local_group(2, &CommConfig::default()).unwrap();
        let peer = ends.pop();
        let rank = CpuRank {
            rounds: Box::new(ends.pop().unwrap()),
            executor: Box::new(Workers::new(1, "test", false).unwrap()),
            most_threads: 1,
            most_members: 1,
            isa: Isa::Scalar,
            nodes: vec![0; 2],
            calls: AtomicU64::new(0),
        };
        (Rank::Cpu(Arc::new(rank)), peer)
    }

    #[test]
    fn routes_are_what_the_table_of_algorithms_says() {
        let (rank, _peer) = cpu_rank();
        let described = algorithms::describe(&rank);
        for algorithm in Algorithm::ALL {
            let desc = AttentionDesc { algorithm, ..AttentionDesc::new(8, 2, 64, 100) };
            let merge_only = AttentionDesc { kv_heads: 0, ..desc };
            let shard = Shard { rank: 0, world: 2 };
            let context = StepContext::new(1, &desc, shard, &CommConfig::default(), &Arc::default()).unwrap();
            let route = choose(&context, &rank).unwrap();
            let merges = algorithms::exchanges_partials(algorithm);
            assert_eq!(route.merging().is_some(), merges, "{algorithm:?}");
            for kind in [DeviceKind::Cpu, DeviceKind::Cuda] {
                let is_served = supported(kind, &desc).is_ok();
                assert_eq!(supported(kind, &merge_only).is_ok(), is_served && merges, "{algorithm:?} on {kind:?}");
            }
            let is_chosen = algorithm != Algorithm::Auto;
            assert!(!is_chosen || route.algorithm().0 == algorithm);
            let name = format!(r#"{{"name":"{}","by":"#, algorithm.name());
            assert_eq!(described.contains(&name), is_chosen, "{name} in {described}");
        }
        assert_eq!(described.matches('{').count(), described.matches('}').count());
        let error = supported(
            DeviceKind::Cuda,
            &AttentionDesc { algorithm: Algorithm::Ring, ..AttentionDesc::new(8, 2, 64, 9) },
        );
        let wanted = "algorithm: found RING, this build supports AUTO, ONE_SHOT, TWO_SHOT, TREE or ALLREDUCE3 on a GPU";
        assert_eq!(error.unwrap_err().message(), wanted);
    }

    #[test]
    fn steps_are_checked_on_gpus_but_not_between_allreduces() {
        for (algorithm, checked, is_supported) in [
            (Algorithm::Auto, true, true),
            (Algorithm::TwoShot, true, true),
            (Algorithm::Allreduce3, false, true),
            (Algorithm::Allreduce3, true, false),
        ] {
            let desc = AttentionDesc { algorithm, checked, ..AttentionDesc::new(8, 2, 64, 100) };
            let found = supported(DeviceKind::Cuda, &desc);
            assert_eq!(found.is_ok(), is_supported, "{algorithm:?}, {checked}: {found:?}");
            let message = found.err().map(|error| error.message().to_string());
            assert!(message.is_none_or(|message| message.starts_with("flags: found CHECKED")));
            assert!(supported(DeviceKind::Cpu, &desc).is_ok());
        }
    }

    #[test]
    fn what_nccl_cannot_reduce_is_refused_before_there_is_a_plan() {
        let (algorithm, wire_dtype) = (Algorithm::Allreduce3, Dtype::Bf16);
        let desc = AttentionDesc { algorithm, wire_dtype, ..AttentionDesc::new(8, 2, 64, 100) };
        let error = supported(DeviceKind::Cuda, &desc).unwrap_err();
        assert!(error.message().starts_with("wire_dtype: found bf16"), "{error}");
        assert!(supported(DeviceKind::Cpu, &desc).is_ok());
        assert!(supported(DeviceKind::Cuda, &AttentionDesc { algorithm: Algorithm::Auto, ..desc }).is_ok());
    }
}
