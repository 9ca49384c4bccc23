//! Brings ranks on GPUs together: windows that reach each other, shown by an exchange.

use std::sync::Arc;
use std::time::Duration;

use super::probe::Probe;
use crate::comm::{Bootstrap, CommConfig, GpuRank, LocalRank, Nodes, Offer, Windows};
use crate::device::cuda::CudaDevice;
use crate::error::{Error, ErrorKind, Result};
use crate::partial::epoch::Epoch;

/// How long the windows of a new group may take to show that they work.
const PROBE: Duration = Duration::from_secs(5);

/// The ends of a group of GPUs in this process: `bootstraps`, `devices` and the `nodes` that they are on in rank order, the first
/// epoch after `start`. Where GPUs of a node cannot exchange, the ends say why when a plan asks. Blocks; `Capturing` during a
/// capture.
pub(crate) fn connect(
    bootstraps: Vec<LocalRank>,
    devices: &[Arc<CudaDevice>],
    nodes: &[usize],
    config: &CommConfig,
    start: Epoch,
) -> Result<Vec<GpuRank>> {
    let nodes_of = |rank: usize| Nodes::new(nodes.to_vec(), rank);
    let make = |node: usize| -> Result<Arc<Windows>> {
        let own: Vec<Arc<CudaDevice>> =
            nodes.iter().zip(devices).filter(|(of, _)| **of == node).map(|(_, device)| Arc::clone(device)).collect();
        let windows = Windows::new(&own, start, config.step_timeout)?;
        let all: Vec<usize> = (0..own.len()).collect();
        Probe::new(&windows, &all)?.run(&windows, start, probe_timeout(config))?;
        Ok(Arc::new(windows))
    };
    let all = match check_nodes(&nodes_of(0)) {
        Ok(()) => (0..nodes_of(0).count()).map(make).collect::<Result<Vec<_>>>(),
        Err(error) => Err(error),
    };
    let all = or_reason(all)?;
    let end = |(rank, bootstrap): (usize, LocalRank)| {
        let windows = all.as_ref().map(|all| Arc::clone(&all[nodes[rank]])).map_err(Clone::clone);
        GpuRank::new(Box::new(bootstrap), nodes_of(rank), windows, config)
    };
    bootstraps.into_iter().enumerate().map(end).collect()
}

/// Refuses windows where no rank has a neighbour.
fn check_nodes(nodes: &Nodes) -> Result<()> {
    match nodes.are_single() {
        true => Err(Error::unsupported("node_group", "a node for each rank", "windows between ranks of one node")),
        false => Ok(()),
    }
}

/// This rank's end of a group whose ranks may be in other processes, which `bootstrap` connects. Collective. Where GPUs of a node
/// cannot exchange, every end says why when a plan asks. Blocks, at most the setup deadline and that of the probe.
pub(crate) fn connect_over(
    bootstrap: Box<dyn Bootstrap>,
    device: &Arc<CudaDevice>,
    nodes: Nodes,
    config: &CommConfig,
) -> Result<GpuRank> {
    let (place, neighbours, start) = (nodes.place(), nodes.neighbours(), Epoch::from_flag(0));
    /// What the ranks of the node say, of what all do.
    fn of<T: Clone>(ranks: &[usize], all: &[T]) -> Vec<T> {
        ranks.iter().filter_map(|&rank| all.get(rank).cloned()).collect()
    }
    let share = || -> Result<Result<Arc<Windows>>> {
        if let Err(error) = check_nodes(&nodes) {
            return Ok(Err(error));
        }
        let offer = Offer::new(device, (place, neighbours.len()), start, config.step_timeout);
        let said = agree(&*bootstrap, offer.as_ref().map(|offer| offer.text().to_string()));
        let (mut windows, opened) = match (offer, said) {
            (Ok(offer), Ok(Ok(texts))) => offer.accept(&of(&neighbours, &texts)),
            (Ok(offer), Err(error)) => {
                offer.abandon();
                return Err(error);
            }
            (Err(_), Err(error)) => return Err(error),
            // All know that one makes no offer, and none opens anything.
            (Err(error), Ok(_)) | (Ok(_), Ok(Err(error))) => return Ok(Err(error)),
        };
        let probe = opened.and_then(|()| Probe::new(&windows, &[place]));
        // Every window is zero, and open everywhere, before the first word is written.
        let ready = agree(&*bootstrap, probe.as_ref().map(|_| String::new()))?;
        if ready.is_err() {
            // A rank that has mapped nothing will not say that it releases it.
            windows.set_mapped(&of(&neighbours, &bootstrap.allgather(&windows.mapped())?));
        }
        let works = match (ready, probe) {
            (Ok(_), Ok(probe)) => probe.run(&windows, start, probe_timeout(config)),
            (_, Err(error)) => Err(error),
            (Err(error), Ok(_)) => Err(error),
        };
        let all = agree(&*bootstrap, works.as_ref().map(|_| String::new()))?;
        // What went wrong here says more than that it did.
        Ok(works.and(all).map(|_| Arc::new(windows)))
    };
    let windows = or_reason(share()?)?;
    GpuRank::new(bootstrap, nodes, windows, config)
}

/// What every rank says, or why one of them cannot go on. Collective.
fn agree(bootstrap: &dyn Bootstrap, mine: std::result::Result<String, &Error>) -> Result<Result<Vec<String>>> {
    let blob = match mine {
        Ok(text) => format!("+{text}"),
        Err(error) => format!("-{}", error.message()),
    };
    let mut texts = Vec::new();
    for (rank, blob) in bootstrap.allgather(blob.as_bytes())?.iter().enumerate() {
        let text = String::from_utf8_lossy(blob);
        match (text.strip_prefix('+'), text.strip_prefix('-')) {
            (Some(text), _) => texts.push(text.to_string()),
            (_, reason) => {
                let message = format!("rank {rank}: {}", reason.unwrap_or("found no word of this library's version"));
                return Ok(Err(Error::new(ErrorKind::Unsupported, message).with_rank(rank as i32)));
            }
        }
    }
    Ok(Ok(texts))
}

/// Lets a reason why GPUs cannot exchange pass, since other steps are still possible.
fn or_reason<T>(windows: Result<T>) -> Result<Result<T>> {
    match windows {
        Err(error) if !matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::Unavailable) => Err(error),
        windows => Ok(windows),
    }
}

fn probe_timeout(config: &CommConfig) -> Duration {
    config.setup_timeout.min(PROBE)
}
