//! A first exchange over the windows of a new group.

use std::time::Duration;

use crate::comm::Windows;
use crate::cuda::{ExchangeKernel, ExchangeStep};
use crate::device::cuda::CudaStream;
use crate::error::{Error, Result};
use crate::partial::ExchangeView;
use crate::partial::epoch::Epoch;
use crate::partial::view::host;
use crate::partial::word::Failure;

/// The fingerprint of the probe.
const PROBE_FINGERPRINT: u64 = 0x7ee5_a77e_0b0e_0001;

/// One exchange without rows, of which some ranks are of this call: that every rank's words reach every other is proven by
/// nothing else.
pub(super) struct Probe {
    /// Kernels are loaded, and unloaded, while no rank waits: both wait for what runs on the GPU.
    ranks: Vec<(usize, ExchangeKernel, CudaStream)>,
}

impl Probe {
    /// Kernels and streams for `ranks`, which are of this process. Blocks; `Capturing` during a capture.
    pub fn new(windows: &Windows, ranks: &[usize]) -> Result<Probe> {
        let ready = |&rank: &usize| {
            let device = windows.device(rank);
            Ok((rank, ExchangeKernel::new(device, 1)?, CudaStream::new(device)?))
        };
        let ranks = ranks.iter().map(ready).collect::<Result<_>>()?;
        Ok(Probe { ranks })
    }

    /// Whether words reach the windows. The first epoch came after `start`.
    pub fn run(self, windows: &Windows, start: Epoch, timeout: Duration) -> Result<()> {
        let ranks = &self.ranks;
        for (rank, kernel, stream) in ranks {
            let view = ExchangeView { fingerprint: PROBE_FINGERPRINT, heads: 1, ..windows.view(*rank, timeout) };
            // SAFETY: the view is that of `rank`, on whose device `new` made the kernel, and the group has no other exchange yet.
            // The windows are freed after all kernels of their ranks, also where this function returns early. There are no rows:
            // source and target are 0.
            unsafe { kernel.enqueue(&view, &ExchangeStep::NOTHING, stream) }?;
        }
        for (_, _, stream) in ranks {
            stream.synchronize()?;
        }
        for &(rank, ..) in ranks {
            let failure = windows.words(rank).load(host::FAILURE);
            if failure == 0 && windows.consumed(rank)? == start.next() {
                continue;
            }
            let here = windows.label(rank);
            let found = match failure {
                0 => format!("{here} (rank {rank}), where a test exchange left nothing"),
                failure => {
                    let other = Failure::from_word(failure).rank.min(windows.world() - 1);
                    let there = windows.label(other);
                    format!(
                        "{here} (rank {rank}), which saw nothing of what {there} (rank {other}) wrote to it within \
                         {timeout:?}, though the driver allows it"
                    )
                }
            };
            return Err(Error::unsupported("devices", found, "GPUs whose writes reach each other"));
        }
        Ok(())
    }
}
