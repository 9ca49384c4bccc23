//! Gives a rank its end of an NCCL communicator.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::attention::Shard;
use crate::comm::nccl::{NcclDeadline, NcclLibrary, NcclRank, UNIQUE_ID_BYTES};
use crate::comm::{Bootstrap, Nodes, Token, process_token};
use crate::error::{Error, ErrorKind, Result};
use crate::route::context::StepContext;
use crate::route::rank::CudaRank;

/// What names a communicator to be.
type UniqueId = [u8; UNIQUE_ID_BYTES];

/// A rank, and its GPU: the process and the number there.
type RankDevice = (i32, (Token, i32));

/// The ranks of an NCCL communicator, of which this rank is one.
pub(in crate::route) struct Members<'a> {
    /// Their numbers in the plan's communicator.
    pub ranks: Vec<i32>,
    /// Where this rank keeps its end, from plan to plan.
    pub kept: &'a Mutex<Option<Arc<NcclRank>>>,
}

impl Members<'_> {
    /// All ranks.
    pub fn all(rank: &CudaRank) -> Members<'_> {
        Members { ranks: (0..rank.shard().world).collect(), kept: &rank.nccl }
    }

    /// Those that meet across `nodes`.
    pub fn across<'a>(rank: &'a CudaRank, nodes: &Nodes) -> Members<'a> {
        let ranks = nodes.meeting().into_iter().map(|rank| rank as i32).collect();
        Members { ranks, kept: &rank.nccl_across }
    }
}

/// What one rank tells the others.
struct Offer {
    process: Token,
    device: i32,
    /// Whether it has its end of NCCL's communicator already.
    has_nccl: bool,
    /// Where it has none: from the first member of each, the name of a new one; from any rank why it can have none.
    name: Option<Result<UniqueId>>,
}

/// This rank of the NCCL communicator of `members`, which is made where a rank has none yet. Collective over all ranks of the
/// plan's communicator.
///
/// Fails with what NCCL says: `Unavailable` where a rank has none, `Unsupported` where two members share a GPU, `Timeout` where
/// a rank does not come within `deadline`.
pub(in crate::route) fn connect(
    context: &StepContext,
    rank: &CudaRank,
    members: Members<'_>,
    deadline: NcclDeadline,
) -> Result<Arc<NcclRank>> {
    let known = members.kept.lock().clone();
    // That of the communicator that this rank came with, if it did.
    let loaded = rank.nccl.lock().as_ref().map(|nccl| nccl.library());
    let library = || loaded.map_or_else(|| NcclLibrary::load(context.config.nccl_path.as_deref()), Ok);
    let (shard, bootstrap, has_nccl) = (context.shard, rank.bootstrap(), known.is_some());
    let first = members.ranks.first().copied().unwrap_or(shard.rank);
    let new_name = || match library() {
        Ok(library) => (shard.rank == first).then(|| library.unique_id()),
        Err(error) => Some(Err(error)),
    };
    let name = if has_nccl { None } else { new_name() };
    let mine = Offer { process: process_token(), device: rank.device.device().ordinal, has_nccl, name };
    let offers = gather_offers(bootstrap, &mine)?;
    if let Some(known) = known.filter(|_| offers.iter().all(|offer| offer.has_nccl)) {
        return Ok(known);
    }
    let refused = offers.iter().find_map(|offer| offer.name.as_ref()?.as_ref().err());
    if let Some(error) = refused {
        return Err(error.clone());
    }
    let offer_of = |rank: i32| usize::try_from(rank).ok().and_then(|rank| offers.get(rank));
    let Some(Ok(id)) = offer_of(first).and_then(|offer| offer.name.clone()) else {
        let message =
            format!("plan: found an NCCL communicator on rank {first} and not on all, wanted the same on every rank");
        return Err(Error::new(ErrorKind::Desync, message).with_rank(first));
    };
    let gpu_of = |offer: &Offer| (offer.process, offer.device);
    one_gpu_each(members.ranks.iter().filter_map(|&rank| Some((rank, gpu_of(offer_of(rank)?)))).collect())?;
    let position = members.ranks.iter().position(|&member| member == shard.rank).unwrap_or(0);
    let part = Shard { rank: position as i32, world: members.ranks.len() as i32 };
    let nccl = NcclRank::begin(library()?, &rank.device, &id, part, context.config.step_timeout)?;
    nccl.settle("creating the NCCL communicator", deadline)?;
    let nccl = Arc::new(nccl);
    *members.kept.lock() = Some(Arc::clone(&nccl));
    Ok(nccl)
}

/// What every rank offers. Collective.
fn gather_offers(bootstrap: &dyn Bootstrap, mine: &Offer) -> Result<Vec<Offer>> {
    let blobs = bootstrap.allgather(&mine.encode())?;
    blobs
        .iter()
        .enumerate()
        .map(|(rank, blob)| {
            let mut offer = Offer::decode(blob).ok_or_else(|| {
                let message = "plan: found another message than plans over NCCL begin with";
                Error::new(ErrorKind::Desync, message).with_rank(rank as i32)
            })?;
            offer.name = offer.name.map(|name| name.map_err(|error| error.with_rank(rank as i32)));
            Ok(offer)
        })
        .collect()
}

impl Offer {
    fn encode(&self) -> Vec<u8> {
        let mut blob = [&self.process[..], &self.device.to_le_bytes()].concat();
        blob.push(u8::from(self.has_nccl));
        match &self.name {
            None => {}
            Some(Ok(id)) => blob.extend([&0i32.to_le_bytes()[..], id].concat()),
            Some(Err(error)) => {
                blob.extend([&error.kind().code().to_le_bytes()[..], error.message().as_bytes()].concat());
            }
        }
        blob
    }

    fn decode(blob: &[u8]) -> Option<Offer> {
        let (process, blob) = blob.split_first_chunk::<{ size_of::<Token>() }>()?;
        let number = |at: usize| Some(i32::from_le_bytes(blob.get(at..at + 4)?.try_into().ok()?));
        let (device, has_nccl) = (number(0)?, *blob.get(4)? != 0);
        let name = match blob.get(5..)? {
            [] => None,
            _ => Some(match ErrorKind::from_code(number(5)?) {
                Some(kind) => Err(Error::new(kind, String::from_utf8_lossy(&blob[9..]).into_owned())),
                None => Ok(blob[9..].try_into().ok()?),
            }),
        };
        Some(Offer { process: *process, device, has_nccl, name })
    }
}

/// NCCL refuses two ranks on one GPU. Of ranks of several processes it alone knows whether they share one.
fn one_gpu_each(mut devices: Vec<RankDevice>) -> Result<()> {
    devices.sort_by_key(|&(rank, device)| (device, rank));
    match devices.windows(2).find(|pair| pair[0].1 == pair[1].1) {
        None => Ok(()),
        Some(pair) => {
            let found = format!("cuda:{} on ranks {} and {}", pair[0].1.1, pair[0].0, pair[1].0);
            Err(Error::unsupported("devices", found, "a GPU of its own for every rank of an exchange over NCCL"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_ranks_on_a_gpu_are_named() {
        let here = |rank: i32, device: i32| (rank, ([1; 16], device));
        assert!(one_gpu_each(vec![here(0, 1), here(1, 0), (2, ([2; 16], 1))]).is_ok());
        let error = one_gpu_each(vec![here(0, 1), here(1, 0), here(2, 1)]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.message().contains("cuda:1 on ranks 0 and 2"), "{error}");
    }

    #[test]
    fn offers_go_round_and_others_are_refused() {
        let round =
            |name| Offer::decode(&Offer { process: [5; 16], device: 3, has_nccl: true, name }.encode()).unwrap();
        let plain = round(None);
        assert_eq!((plain.process, plain.device, plain.has_nccl, plain.name.is_none()), ([5; 16], 3, true, true));
        assert_eq!(round(Some(Ok([7; UNIQUE_ID_BYTES]))).name, Some(Ok([7; UNIQUE_ID_BYTES])));
        let error = Error::new(ErrorKind::Unavailable, "no NCCL");
        assert_eq!(round(Some(Err(error.clone()))).name, Some(Err(error)));
        for bad in [&[][..], &[1, 0, 0, 0], &[1, 0, 0, 0, 1, 0], &[1, 0, 0, 0, 1, 0, 0, 0, 0, 5]] {
            assert!(Offer::decode(bad).is_none(), "{bad:?}");
            assert!(Offer::decode(&[&[0; 16], bad].concat()).is_none(), "{bad:?}");
        }
    }
}
