//! Which route a plan takes: the only place that knows them all.

use std::sync::Arc;

use super::Route;
use super::alone::Alone;
use super::context::StepContext;
use super::gpu::GpuShard;
use super::host::partials::PartialRoute;
use super::host::shard::HostShard;
use super::nccl_allreduce3::route::NcclAllreduce3;
use super::rank::{CpuRank, CudaGroup, CudaRank, Rank};
use super::ring::route::Ring;
use super::rounds::allreduce3::Allreduce3;
use super::rounds::one_shot::OneShot;
use super::rounds::two_shot::TwoShot;
use super::tree::TreeExchange;
use super::windows::route::WindowsRoute;
use crate::attention::{Algorithm, AttentionDesc, Capabilities, DecodeArgs, Dtype, OutputMode};
use crate::device::DeviceKind;
use crate::error::{Error, Result};
use crate::{attention, cpu, cuda};

/// Whether plans of `desc`, a checked descriptor, exist on devices of `kind`: `Unsupported` names the field that they do not
/// serve.
pub(crate) fn supported(kind: DeviceKind, desc: &AttentionDesc) -> Result<()> {
    attention::supported(desc, capabilities(kind))?;
    if kind == DeviceKind::Cuda && desc.algorithm == Algorithm::Allreduce3 {
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
pub(crate) fn step_supported(kind: DeviceKind, args: &DecodeArgs) -> Result<()> {
    attention::step_supported(args, capabilities(kind))
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
    match rank {
        Rank::Cpu(rank) if !context.exchanges() => {
            Ok(Box::new(Alone::new(context, Box::new(HostShard::new(context, rank, 1)?))))
        }
        Rank::Cpu(rank) => on_cpus(context, rank),
        Rank::Cuda(rank) => match &rank.group {
            CudaGroup::Peers(_) if context.exchanges() && context.desc.algorithm == Algorithm::Allreduce3 => {
                Ok(Box::new(NcclAllreduce3::new(context, rank)?))
            }
            CudaGroup::Peers(peers) if context.exchanges() => Ok(Box::new(WindowsRoute::new(context, rank, peers)?)),
            CudaGroup::Peers(_) | CudaGroup::Single(_) => alone_on_a_gpu(context, rank),
        },
    }
}

fn alone_on_a_gpu(context: &StepContext, rank: &Arc<CudaRank>) -> Result<Box<dyn Route>> {
    let shard = GpuShard::new(context, rank)?;
    Ok(Box::new(Alone::new(context, Box::new(shard))))
}

fn on_cpus(context: &StepContext, rank: &Arc<CpuRank>) -> Result<Box<dyn Route>> {
    let (desc, in_place) = (&context.desc, rank.rounds.reads_in_place());
    if matches!(desc.algorithm, Algorithm::Tree | Algorithm::Ring) && !rank.rounds.has_hops() {
        let wanted = "AUTO, ONE_SHOT, TWO_SHOT or ALLREDUCE3: the engine's transport has no sendrecv";
        return Err(Error::unsupported("algorithm", desc.algorithm.name(), wanted));
    }
    let asked = "asked for";
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
    use super::*;

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
