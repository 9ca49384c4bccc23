//! Gives the ranks of a plan an NCCL communicator, and has NCCL connect for all sizes of a step.

use std::sync::Arc;

use super::GpuAllreduce;
use super::watch::Watch;
use crate::comm::nccl::{NcclLibrary, NcclLimit, NcclRank, Reduction, UNIQUE_ID_BYTES};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::communicator::CommCore;
use crate::runtime::plan::PlanCore;

/// Connects the plans of all ranks of a local group, or of one rank: then collective. Nothing where they need no NCCL.
///
/// Fails with what NCCL says: `Unavailable` where there is none, `Unsupported` where two ranks share a GPU, `Timeout`
/// where a rank does not come within the setup deadline.
pub(in crate::runtime) fn connect(plans: &[&PlanCore]) -> Result<()> {
    let parts: Option<Vec<(&PlanCore, &GpuAllreduce)>> =
        plans.iter().map(|plan| plan.allreduce.as_ref().map(|allreduce| (*plan, allreduce))).collect();
    let Some(parts @ [(first, _), ..]) = parts.as_deref() else { return Ok(()) };
    let limit = NcclLimit::new("setup_timeout", first.comm.config.setup_timeout);
    let comms: Vec<&Arc<CommCore>> = parts.iter().map(|(plan, _)| &plan.comm).collect();
    let ranks = ranks(&comms, limit)?;
    try_out(parts, &ranks, limit)?;
    for ((plan, allreduce), rank) in parts.iter().zip(ranks) {
        allreduce.kernels.clear()?;
        // Nothing was there before: a plan is connected once.
        let _ = allreduce.watch.set(Watch::start(&allreduce.cell, rank, &plan.comm)?);
    }
    Ok(())
}

/// NCCL's ranks of these communicators, which are made where they are not there yet.
fn ranks(comms: &[&Arc<CommCore>], limit: NcclLimit) -> Result<Vec<Arc<NcclRank>>> {
    let known: Option<Vec<_>> = comms.iter().map(|comm| comm.nccl.lock().clone()).collect();
    if let Some(known) = known {
        return Ok(known);
    }
    let world = comms[0].shard().world as usize;
    let name = || NcclLibrary::load(comms[0].config.nccl_path.as_deref())?.unique_id();
    let (id, devices) = if comms.len() == world {
        (name()?, comms.iter().map(|comm| (comm.shard().rank, comm.device.ordinal)).collect())
    } else {
        agree(comms[0], name)?
    };
    alone(devices)?;
    let mut ranks = Vec::with_capacity(comms.len());
    for comm in comms {
        let Some(device) = &comm.cuda else {
            return Err(Error::new(ErrorKind::Internal, "plan: found no GPU, wanted one"));
        };
        let library = NcclLibrary::load(comm.config.nccl_path.as_deref())?;
        // Begun on every rank before one is waited for: this thread may be all of them.
        ranks.push(Arc::new(NcclRank::begin(library, device, &id, comm.shard(), comm.config.step_timeout)?));
    }
    for rank in &ranks {
        rank.settle("creating the NCCL communicator", limit)?;
    }
    for (comm, rank) in comms.iter().zip(&ranks) {
        *comm.nccl.lock() = Some(Arc::clone(rank));
    }
    Ok(ranks)
}

/// What names a communicator to be.
type UniqueId = [u8; UNIQUE_ID_BYTES];

/// A rank and the number of its GPU.
type Place = (i32, i32);

/// The name that rank 0 gave, and every rank with its GPU. Collective.
fn agree(comm: &CommCore, name: impl FnOnce() -> Result<UniqueId>) -> Result<(UniqueId, Vec<Place>)> {
    let mut blob = comm.device.ordinal.to_le_bytes().to_vec();
    if comm.shard().rank == 0 {
        match name() {
            Ok(id) => blob.extend([&0i32.to_le_bytes()[..], &id].concat()),
            Err(error) => blob.extend([&error.kind().code().to_le_bytes()[..], error.message().as_bytes()].concat()),
        }
    }
    let all = comm.end.bootstrap().allgather(&blob)?;
    let number = |blob: &[u8], at: usize| {
        blob.get(at..at + 4).map(|bytes| i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    let devices: Option<Vec<_>> =
        all.iter().enumerate().map(|(rank, blob)| number(blob, 0).map(|device| (rank as i32, device))).collect();
    let (Some(devices), Some(code)) = (devices, number(&all[0], 4)) else {
        return Err(Error::new(ErrorKind::Desync, "plan: found another message than ALLREDUCE3 begins with"));
    };
    if let Some(kind) = ErrorKind::from_code(code) {
        return Err(Error::new(kind, String::from_utf8_lossy(&all[0][8..]).into_owned()).with_rank(0));
    }
    let mut id = [0; UNIQUE_ID_BYTES];
    if all[0].len() != 8 + UNIQUE_ID_BYTES {
        return Err(Error::new(ErrorKind::Desync, "plan: found another message than ALLREDUCE3 begins with"));
    }
    id.copy_from_slice(&all[0][8..]);
    Ok((id, devices))
}

/// NCCL takes a GPU once.
fn alone(mut devices: Vec<Place>) -> Result<()> {
    devices.sort_by_key(|&(rank, device)| (device, rank));
    match devices.windows(2).find(|pair| pair[0].1 == pair[1].1) {
        None => Ok(()),
        Some(pair) => {
            let found = format!("ALLREDUCE3 with cuda:{} on ranks {} and {}", pair[0].1, pair[0].0, pair[1].0);
            Err(Error::unsupported(
                "algorithm",
                found,
                "ALLREDUCE3 where every rank has a GPU of its own, as NCCL wants",
            ))
        }
    }
}

/// Runs every size once, up to a factor of two. NCCL connects ranks when it first meets a way of reducing, and then waits
/// for them: a step that one thread enqueues on several ranks, or that is captured, must not meet one first.
fn try_out(parts: &[(&PlanCore, &GpuAllreduce)], ranks: &[Arc<NcclRank>], limit: NcclLimit) -> Result<()> {
    let largest = |reduction| {
        let reduced = parts[0].1.kernels.reduced(parts[0].0.desc.max_query_tokens);
        match reduction {
            Reduction::Maximum => reduced.rows,
            Reduction::Sum => reduced.elements.max(reduced.weight_count),
        }
    };
    for reduction in [Reduction::Maximum, Reduction::Sum] {
        let most = largest(reduction);
        let mut count = 1;
        while count < 2 * most {
            let all = parts.iter().zip(ranks);
            for ((_, allreduce), rank) in all.clone() {
                allreduce.try_out(rank, count.min(most), reduction)?;
            }
            for (_, rank) in all {
                rank.settle("connecting over NCCL", limit)?;
            }
            count *= 2;
        }
    }
    for ((_, allreduce), rank) in parts.iter().zip(ranks) {
        allreduce.cell.drain("connecting over NCCL", limit).inspect_err(|_| rank.abort(limit.timeout))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_ranks_on_a_gpu_are_named() {
        assert!(alone(vec![(0, 1), (1, 0), (2, 2)]).is_ok());
        let error = alone(vec![(0, 1), (1, 0), (2, 1)]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.message().contains("cuda:1 on ranks 0 and 2"), "{error}");
    }
}
