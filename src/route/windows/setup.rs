//! Brings ranks on GPUs together: windows that reach each other, shown by an exchange.

use std::sync::Arc;
use std::time::Duration;

use super::probe::Probe;
use crate::comm::{Bootstrap, CommConfig, GpuRank, LocalRank, Offer, Windows};
use crate::device::cuda::CudaDevice;
use crate::error::{Error, ErrorKind, Result};
use crate::partial::epoch::Epoch;

/// How long the windows of a new group may take to show that they work.
const PROBE: Duration = Duration::from_secs(5);

/// The ends of a group of GPUs in this process: `bootstraps` and `devices` in rank order, the first epoch after `start`.
/// Where the GPUs cannot exchange, the ends say why when a plan asks. Blocks; `Capturing` during a capture.
pub(crate) fn connect(
    bootstraps: Vec<LocalRank>,
    devices: &[Arc<CudaDevice>],
    config: &CommConfig,
    start: Epoch,
) -> Result<Vec<GpuRank>> {
    let all: Vec<usize> = (0..devices.len()).collect();
    let windows = Windows::new(devices, start, config.step_timeout).and_then(|windows| {
        Probe::new(&windows, &all)?.run(&windows, start, probe_timeout(config))?;
        Ok(Arc::new(windows))
    });
    let windows = or_reason(windows)?;
    bootstraps.into_iter().map(|bootstrap| GpuRank::new(Box::new(bootstrap), windows.clone(), config)).collect()
}

/// This rank's end of a group whose ranks may be in other processes, which `bootstrap` connects. Collective. Where the GPUs
/// cannot exchange, every end says why when a plan asks. Blocks, at most the setup deadline and that of the probe.
pub(crate) fn connect_over(
    bootstrap: Box<dyn Bootstrap>,
    device: &Arc<CudaDevice>,
    config: &CommConfig,
) -> Result<GpuRank> {
    let shard = bootstrap.shard();
    let (rank, start) = (shard.rank as usize, Epoch::from_flag(0));
    let share = || -> Result<Result<Arc<Windows>>> {
        let offer = Offer::new(device, (rank, shard.world as usize), start, config.step_timeout);
        let said = agree(&*bootstrap, offer.as_ref().map(|offer| offer.text().to_string()));
        let (mut windows, opened) = match (offer, said) {
            (Ok(offer), Ok(Ok(texts))) => offer.accept(&texts),
            (Ok(offer), Err(error)) => {
                offer.abandon();
                return Err(error);
            }
            (Err(_), Err(error)) => return Err(error),
            // All know that one makes no offer, and none opens anything.
            (Err(error), Ok(_)) | (Ok(_), Ok(Err(error))) => return Ok(Err(error)),
        };
        let probe = opened.and_then(|()| Probe::new(&windows, &[rank]));
        // Every window is zero, and open everywhere, before the first word is written.
        let ready = agree(&*bootstrap, probe.as_ref().map(|_| String::new()))?;
        if ready.is_err() {
            // A rank that has mapped nothing will not say that it releases it.
            windows.set_mapped(&bootstrap.allgather(&windows.mapped())?);
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
    GpuRank::new(bootstrap, windows, config)
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
fn or_reason(windows: Result<Arc<Windows>>) -> Result<Result<Arc<Windows>>> {
    match windows {
        Err(error) if !matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::Unavailable) => Err(error),
        windows => Ok(windows),
    }
}

fn probe_timeout(config: &CommConfig) -> Duration {
    config.setup_timeout.min(PROBE)
}
