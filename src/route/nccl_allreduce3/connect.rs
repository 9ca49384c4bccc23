//! Gives a rank its NCCL communicator.

use std::sync::Arc;

use crate::comm::Bootstrap;
use crate::comm::nccl::{NcclDeadline, NcclLibrary, NcclRank, UNIQUE_ID_BYTES};
use crate::error::{Error, ErrorKind, Result};
use crate::route::context::StepContext;
use crate::route::rank::CudaRank;

/// What names a communicator to be.
type UniqueId = [u8; UNIQUE_ID_BYTES];

/// A rank and the number of its GPU.
type RankDevice = (i32, i32);

/// What one rank tells the others.
struct Offer {
    device: i32,
    /// Whether it has an NCCL communicator already.
    has_nccl: bool,
    /// From rank 0, if some rank has none: the name of a new one, or why there is none.
    name: Option<Result<UniqueId>>,
}

/// This rank of NCCL's communicator, which is made where a rank has none yet. Collective.
///
/// Fails with what NCCL says: `Unavailable` where there is none, `Unsupported` where two ranks share a GPU, `Timeout` where a
/// rank does not come within `deadline`.
pub(super) fn connect(context: &StepContext, rank: &CudaRank, deadline: NcclDeadline) -> Result<Arc<NcclRank>> {
    let known = rank.nccl.lock().clone();
    let library = || NcclLibrary::load(context.config.nccl_path.as_deref());
    let (shard, bootstrap, has_nccl) = (context.shard, rank.bootstrap(), known.is_some());
    let name = (shard.rank == 0 && !has_nccl).then(|| library()?.unique_id());
    let mine = Offer { device: rank.device.device().ordinal, has_nccl, name };
    let offers = gather_offers(bootstrap, &mine)?;
    if let Some(known) = known.filter(|_| offers.iter().all(|offer| offer.has_nccl)) {
        return Ok(known);
    }
    let id = match &offers[0].name {
        Some(name) => name.clone()?,
        None => {
            let message = "plan: found an NCCL communicator on rank 0 and not on all, wanted the same on every rank";
            return Err(Error::new(ErrorKind::Desync, message).with_rank(0));
        }
    };
    one_gpu_each(offers.iter().enumerate().map(|(rank, offer)| (rank as i32, offer.device)).collect())?;
    let nccl = NcclRank::begin(library()?, &rank.device, &id, shard, context.config.step_timeout)?;
    nccl.settle("creating the NCCL communicator", deadline)?;
    let nccl = Arc::new(nccl);
    *rank.nccl.lock() = Some(Arc::clone(&nccl));
    Ok(nccl)
}

/// What every rank offers. Collective.
fn gather_offers(bootstrap: &dyn Bootstrap, mine: &Offer) -> Result<Vec<Offer>> {
    let blobs = bootstrap.allgather(&mine.encode())?;
    blobs
        .iter()
        .enumerate()
        .map(|(rank, blob)| {
            Offer::decode(blob).ok_or_else(|| {
                let message = "plan: found another message than ALLREDUCE3 begins with";
                Error::new(ErrorKind::Desync, message).with_rank(rank as i32)
            })
        })
        .collect()
}

impl Offer {
    fn encode(&self) -> Vec<u8> {
        let mut blob = self.device.to_le_bytes().to_vec();
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
        let number = |at: usize| Some(i32::from_le_bytes(blob.get(at..at + 4)?.try_into().ok()?));
        let (device, has_nccl) = (number(0)?, *blob.get(4)? != 0);
        let name = match blob.get(5..)? {
            [] => None,
            _ => Some(match ErrorKind::from_code(number(5)?) {
                Some(kind) => Err(Error::new(kind, String::from_utf8_lossy(&blob[9..]).into_owned()).with_rank(0)),
                None => Ok(blob[9..].try_into().ok()?),
            }),
        };
        Some(Offer { device, has_nccl, name })
    }
}

/// NCCL refuses two ranks on one GPU.
fn one_gpu_each(mut devices: Vec<RankDevice>) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_ranks_on_a_gpu_are_named() {
        assert!(one_gpu_each(vec![(0, 1), (1, 0), (2, 2)]).is_ok());
        let error = one_gpu_each(vec![(0, 1), (1, 0), (2, 1)]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.message().contains("cuda:1 on ranks 0 and 2"), "{error}");
    }

    #[test]
    fn offers_go_round_and_others_are_refused() {
        let round = |name| Offer::decode(&Offer { device: 3, has_nccl: true, name }.encode()).unwrap();
        let plain = round(None);
        assert_eq!((plain.device, plain.has_nccl, plain.name.is_none()), (3, true, true));
        assert_eq!(round(Some(Ok([7; UNIQUE_ID_BYTES]))).name, Some(Ok([7; UNIQUE_ID_BYTES])));
        let error = Error::new(ErrorKind::Unavailable, "no NCCL");
        assert_eq!(round(Some(Err(error.clone()))).name, Some(Err(error.with_rank(0))));
        for bad in [&[][..], &[1, 0, 0, 0], &[1, 0, 0, 0, 1, 0], &[1, 0, 0, 0, 1, 0, 0, 0, 0, 5]] {
            assert!(Offer::decode(bad).is_none(), "{bad:?}");
        }
    }
}
