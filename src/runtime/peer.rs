//! Steps of ranks on GPUs that write into each other's memory: attend, push, merge.
//!
//! The attention kernel leaves this rank's partial in the plan's workspace, then one dependent exchange kernel pushes it
//! into the windows of all ranks, waits for theirs in its own, and writes the merged rows. A step with more rows than a
//! slot of a window holds makes several such exchanges.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::exchange::fingerprint;
use super::plan::PlanCore;
use crate::attention::{Algorithm, AttentionDesc, Dtype, OutputMode, Shard, Step, head_range};
use crate::comm::{CommConfig, Exchange, LocalExchange, Offer, PeerExchange, Windows};
use crate::cuda::{CudaBackend, ExchangeKernel, ExchangeStep, MergeStep, PartialTarget};
use crate::device::cuda::{CudaDevice, CudaStream, Holdings};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::epoch::Epoch;
use crate::partial::view::{ExchangeMode, host, row_words, verdict};
use crate::partial::{DataFault, ExchangeView};

/// How long the windows of a new group may take to show that they work.
const PROBE: Duration = Duration::from_secs(5);
/// What ranks take the probe for.
const PROBE_FINGERPRINT: u64 = 0x7ee5_a77e_0b0e_0001;
/// Payload of a rank above which an exchange of `world` ranks goes in two shots.
///
/// One shot sends (p - 1) S from a rank and two send 2 (p - 1) / p S, so that the second saves (p - 1) (1 - 2 / p) S of a
/// link's time for the price of another hop: it pays above hop x bandwidth / ((p - 1) (1 - 2 / p)). With a hop of 2 us,
/// 350 GB/s, and words that carry half their size, that is 350 KB / ((p - 1) (1 - 2 / p)). Computed, not measured.
fn two_shots_above(world: usize) -> usize {
    const HOP_BYTES: f64 = 350e3;
    let p = world as f64;
    if world <= 2 { usize::MAX } else { (HOP_BYTES / ((p - 1.0) * (1.0 - 2.0 / p))) as usize }
}

/// The ends of a group of GPUs in this process: `bootstraps` and `devices` in rank order, the first epoch after `start`.
/// Where the GPUs cannot exchange, the ends say why when a plan asks. Blocks; `Capturing` during a capture.
pub(super) fn connect(
    bootstraps: Vec<LocalExchange>,
    devices: &[Arc<CudaDevice>],
    config: &CommConfig,
    start: Epoch,
) -> Result<Vec<PeerExchange>> {
    let all: Vec<usize> = (0..devices.len()).collect();
    let windows = Windows::new(devices, start, config.step_timeout)
        .and_then(|windows| probe(&windows, &all, start, probe_timeout(config)).map(|()| Arc::new(windows)));
    let windows = or_reason(windows)?;
    bootstraps.into_iter().map(|bootstrap| PeerExchange::new(Box::new(bootstrap), windows.clone(), config)).collect()
}

/// This rank's end of a group whose ranks may be in other processes, which `bootstrap` connects. Collective. Where the GPUs
/// cannot exchange, every end says why when a plan asks. Blocks, at most the setup deadline and that of the probe.
pub(super) fn connect_over(
    bootstrap: Box<dyn Exchange>,
    device: &Arc<CudaDevice>,
    config: &CommConfig,
) -> Result<PeerExchange> {
    let shard = bootstrap.shard();
    let (rank, start) = (shard.rank as usize, Epoch::from_flag(0));
    let share = || -> Result<Result<Arc<Windows>>> {
        let offer = Offer::new(device, shard.world as usize, start, config.step_timeout);
        let said = offer.as_ref().map(|offer| offer.text().to_string());
        let texts = match (agree(&*bootstrap, said)?, offer) {
            (Ok(texts), Ok(offer)) => offer.accept(rank, &texts, config.step_timeout),
            (_, Err(error)) => Err(error),
            (Err(error), _) => Err(error),
        };
        // Every window is zero, and open everywhere, before the first word is written.
        let ready = agree(&*bootstrap, texts.as_ref().map(|_| String::new()))?;
        let probed = match (ready, texts) {
            (Ok(_), Ok(windows)) => probe(&windows, &[rank], start, probe_timeout(config)).map(|()| Arc::new(windows)),
            (_, Err(error)) => Err(error),
            (Err(error), Ok(_)) => Err(error),
        };
        let all = agree(&*bootstrap, probed.as_ref().map(|_| String::new()))?;
        Ok(all.and(probed))
    };
    let windows = or_reason(share()?)?;
    PeerExchange::new(bootstrap, windows, config)
}

/// What every rank says, or why one of them cannot go on. Collective.
fn agree(bootstrap: &dyn Exchange, mine: std::result::Result<String, &Error>) -> Result<Result<Vec<String>>> {
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

/// One exchange without rows, of which `ranks` are of this call: that every rank's words reach every other is proven by
/// nothing else.
fn probe(windows: &Windows, ranks: &[usize], start: Epoch, timeout: Duration) -> Result<()> {
    let mut streams = Vec::with_capacity(ranks.len());
    for &rank in ranks {
        let device = windows.device(rank);
        let view = ExchangeView { fingerprint: PROBE_FINGERPRINT, heads: 1, ..windows.view(rank, timeout) };
        let stream = CudaStream::new(device)?;
        ExchangeKernel::new(device, 1)?.enqueue(&view, &ExchangeStep::NOTHING, &stream)?;
        streams.push(stream);
    }
    for stream in &streams {
        stream.synchronize()?;
    }
    for &rank in ranks {
        let failure = windows.words(rank).load(host::FAILURE);
        if failure == 0 && windows.consumed(rank)? == start.next() {
            continue;
        }
        let here = windows.label(rank);
        let found = match failure {
            0 => format!("{here} (rank {rank}), where a test exchange left nothing"),
            failure => {
                let other = verdict::unpack(failure).1.min(windows.world() - 1);
                let there = windows.label(other);
                format!(
                    "{here} (rank {rank}), which saw nothing of what {there} (rank {other}) wrote to it within {timeout:?}, \
                     though the driver allows it"
                )
            }
        };
        return Err(Error::unsupported("devices", found, "GPUs whose writes reach each other"));
    }
    Ok(())
}

/// What a plan needs beside its backend.
pub(super) struct GpuExchange {
    kernel: ExchangeKernel,
    /// Where the attention kernel leaves the partial; none for a merge-only plan.
    target: Option<PartialTarget>,
    view: ExchangeView,
    mode: ExchangeMode,
    dim: i32,
    out_dtype: Dtype,
    /// Rows that a slot holds, and the bytes of one.
    most_rows: i64,
    row_bytes: u64,
    reason: &'static str,
    bytes: usize,
    /// Held for the kernels that are enqueued.
    _windows: Option<Arc<Windows>>,
    _holdings: Holdings,
}

impl GpuExchange {
    /// The kernel and the workspace, for one of `sharing` ranks on the GPU. Blocks; `Capturing` during a capture. The error says why, where ranks cannot exchange.
    pub fn new(
        device: &Arc<CudaDevice>,
        desc: &AttentionDesc,
        peers: &PeerExchange,
        shard: Shard,
        heads: &Range<i32>,
        (sharing, patience): (usize, Duration),
    ) -> Result<GpuExchange> {
        let windows = peers.windows().cloned();
        let (dim, rows) = (desc.head_dim_v as usize, desc.max_query_tokens as usize * desc.q_heads as usize);
        let row_bytes = 4 * row_words(dim, desc.wire_dtype.size());
        let (mode, reason) = choose(desc, shard.world as usize, rows.saturating_mul(row_bytes));
        let view = ExchangeView {
            wire_dtype: desc.wire_dtype as i32,
            mode,
            heads: desc.q_heads,
            first_head: heads.start,
            own_heads: heads.len() as i32,
            ..peers.view()?
        };
        let mut holdings = Holdings::new(device, patience);
        let (mut target, mut bytes) = (None, 0);
        if !desc.is_merge_only() {
            let too_large = || {
                let found = format!("{} x {} x {dim}", desc.max_query_tokens, desc.q_heads);
                Error::invalid("max_query_tokens x q_heads x head_dim_v", found, "a size that fits memory")
            };
            let o = rows.checked_mul(4 * dim).and_then(|o| o.checked_next_multiple_of(256)).ok_or_else(too_large)?;
            bytes = o.checked_add(4 * rows).ok_or_else(too_large)?;
            let memory = holdings.memory(bytes)?;
            let status = windows.as_ref().map_or(0, |windows| windows.fault_address(shard.rank as usize));
            target = Some(PartialTarget { o: memory, lse: memory + o as u64, status });
        }
        Ok(GpuExchange {
            kernel: ExchangeKernel::new(device, sharing)?,
            target,
            view,
            mode,
            dim: desc.head_dim_v,
            out_dtype: desc.out_dtype,
            most_rows: ((peers.windows().map_or(0, |windows| windows.capacity()) / row_bytes) as i64).max(1),
            row_bytes: row_bytes as u64,
            reason,
            bytes,
            _windows: windows,
            _holdings: holdings,
        })
    }

    /// Bytes of device memory.
    pub fn memory(&self) -> usize {
        self.bytes
    }

    /// The algorithm, and why it was chosen.
    pub fn algorithm(&self) -> (Algorithm, &'static str) {
        let algorithm = if self.mode == ExchangeMode::TwoShot { Algorithm::TwoShot } else { Algorithm::OneShot };
        (algorithm, self.reason)
    }

    /// Enqueues a step: attends the shard, exchanges, writes the merged output.
    pub fn decode(&self, plan: &PlanCore, backend: &CudaBackend, step: &Step, stream: &CudaStream) -> Result<()> {
        let Some(target) = self.target else {
            return Err(Error::new(ErrorKind::Internal, "plan: a step of a merge-only plan"));
        };
        let (row, heads) = (4 * i64::from(self.dim), i64::from(self.view.heads));
        let exchange = ExchangeStep {
            o: target.o,
            o_stride: [heads * row, row, 4],
            o_dtype: Dtype::F32,
            lse: target.lse,
            lse_stride: [heads * 4, 4],
            dim: self.dim,
            out: step.args.out,
            out_stride: step.out_stride,
            out_dtype: self.out_dtype,
            out_lse: step.args.lse,
            out_lse_stride: step.lse_stride,
            ..ExchangeStep::NOTHING
        };
        backend.decode_to(step, target, stream)?;
        self.exchange(plan, exchange, step.args.query_tokens, [1, step.args.batch as u64], stream)
    }

    /// Enqueues the exchange of a partial that the engine made.
    pub fn merge(&self, plan: &PlanCore, step: &MergeStep, stream: &CudaStream) -> Result<()> {
        self.kernel.check(&[("o.data", &step.o), ("lse.data", &step.lse)])?;
        self.kernel.check(&[("out.data", &step.out), ("out_lse.data", &step.out_lse)])?;
        let exchange = ExchangeStep {
            o: step.o.data as u64,
            o_stride: [step.o_stride[1], step.o_stride[2], step.o_stride[3]],
            o_dtype: step.o_dtype,
            lse: step.lse.data as u64,
            lse_stride: [step.lse_stride[1], step.lse_stride[2]],
            to_natural: step.to_natural,
            plus_inf_is_empty: step.plus_inf_is_empty,
            dim: step.dim,
            out: step.out,
            out_stride: step.out_stride,
            out_dtype: step.out_dtype,
            out_lse: step.out_lse,
            out_lse_stride: step.out_lse_stride,
            ..ExchangeStep::NOTHING
        };
        self.exchange(plan, exchange, step.tokens, [2, 0], stream)
    }

    /// The exchanges of a step of `tokens` tokens. `kind` tells steps of different calls and sizes apart.
    fn exchange(
        &self,
        plan: &PlanCore,
        step: ExchangeStep,
        tokens: i32,
        kind: [u64; 2],
        stream: &CudaStream,
    ) -> Result<()> {
        let rows = i64::from(tokens) * i64::from(self.view.heads);
        // A step without rows is an exchange, too: the others wait for it.
        for first_row in (0..rows.max(1)).step_by(self.most_rows as usize) {
            let words = [plan.id, kind[0], kind[1], tokens as u64, first_row as u64];
            let view = ExchangeView { fingerprint: fingerprint(&words), ..self.view };
            let step = ExchangeStep { first_row, rows: (rows - first_row).min(self.most_rows), ..step };
            self.kernel.enqueue(&view, &step, stream).map_err(|error| {
                // What was half enqueued leaves the peers without this rank.
                plan.comm.exchange.fail(&error);
                plan.comm.exchange.status().unwrap_or(error)
            })?;
            self.count(plan, step.rows as u64);
        }
        Ok(())
    }

    /// Counts what this rank sends to others in an exchange of `rows` rows.
    fn count(&self, plan: &PlanCore, rows: u64) {
        let (world, heads) = (plan.shard.world as u64, self.view.heads as u64);
        let own = head_range(self.view.heads, plan.shard).map_or(0, |own| own.len() as u64);
        let (rounds, messages, sent) = match self.mode {
            ExchangeMode::OneShot => (1, world - 1, (world - 1) * rows),
            ExchangeMode::Scattered => (1, world - 1, rows * (heads - own) / heads),
            ExchangeMode::TwoShot => {
                (2, 2 * (world - 1), rows * (heads - own) / heads + (world - 1) * rows * own / heads)
            }
        };
        plan.counters.rounds.fetch_add(rounds, Ordering::Relaxed);
        plan.counters.messages.fetch_add(messages, Ordering::Relaxed);
        plan.counters.bytes_sent.fetch_add(sent * self.row_bytes, Ordering::Relaxed);
        if let Some(peers) = plan.comm.exchange.peers() {
            peers.count_step();
        }
    }
}

/// Who gets which rows of a plan whose largest partial takes `bytes`, and why.
fn choose(desc: &AttentionDesc, world: usize, bytes: usize) -> (ExchangeMode, &'static str) {
    match (desc.output, desc.algorithm) {
        (OutputMode::Scattered, _) => {
            (ExchangeMode::Scattered, "scattered output: rows go to the owners of their heads")
        }
        (_, Algorithm::TwoShot) => (ExchangeMode::TwoShot, "asked for"),
        (_, Algorithm::OneShot) => (ExchangeMode::OneShot, "asked for"),
        _ if bytes > two_shots_above(world) => (
            ExchangeMode::TwoShot,
            "the largest partial is above the size where a second hop costs less than its copies",
        ),
        _ => (ExchangeMode::OneShot, "one hop: the largest partial is small for a link"),
    }
}

/// The bad data that steps over windows have met, with the rank.
pub(super) fn take_fault(peers: Option<&PeerExchange>) -> Option<(i32, DataFault)> {
    peers.and_then(PeerExchange::take_fault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_shots_pay_the_sooner_the_more_ranks_there_are() {
        assert_eq!(two_shots_above(2), usize::MAX);
        assert_eq!((two_shots_above(4), two_shots_above(8)), (233_333, 66_666));
        let mut desc = AttentionDesc::new(32, 8, 128, 1024);
        assert_eq!(choose(&desc, 8, 16_640).0, ExchangeMode::OneShot);
        assert_eq!(choose(&desc, 8, 133_120).0, ExchangeMode::TwoShot);
        desc.output = OutputMode::Scattered;
        assert_eq!(choose(&desc, 8, 133_120).0, ExchangeMode::Scattered);
    }
}
