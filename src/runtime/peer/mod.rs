//! Steps of ranks on GPUs that write into each other's memory: attend, push, merge. `connect` brings them together.
//!
//! A step takes one of three [forms](Form), by its size. They follow one protocol, so that the ranks of a communicator need
//! not agree on one.

mod connect;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::exchange::fingerprint;
use super::plan::PlanCore;
use crate::attention::{Algorithm, AttentionDesc, OutputMode, Shard, Step, head_range};
use crate::comm::{GpuRank, Windows};
use crate::cuda::{COMMUNICATORS, CudaBackend, Destination, ExchangeKernel, ExchangeStep, MergeStep};
use crate::device::cuda::{CudaDevice, CudaStream, Holdings};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::view::{ExchangeMode, row_words};
use crate::partial::{ExchangeView, RowSource, RowTarget};

pub(super) use connect::{connect, connect_over};

/// The environment variable that picks a [`Form`] where the step's size allows it: "memory", "push" or "single".
const ENVIRONMENT: &str = "TREEATTN_GPU_EXCHANGE";
/// Rows of a step for which the attention kernel has a block waiting: one a warp.
const ROWS_A_BLOCK: i64 = 8;
/// Most blocks that wait. More rows are merged sooner by an exchange kernel, which has more.
const MOST_WAITING: i64 = 16;

/// How a step's partials come to the exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// Attention leaves the partial in the plan's workspace; an exchange kernel for each slotful of rows pushes and merges.
    Memory,
    /// Attention pushes rows as it completes them; one exchange kernel merges.
    Push,
    /// Attention pushes rows, and its last blocks merge.
    Single,
}

impl Form {
    /// The form that [`ENVIRONMENT`] asks for.
    fn asked() -> Result<Option<Form>> {
        let Some(word) = std::env::var_os(ENVIRONMENT) else { return Ok(None) };
        match word.to_str() {
            Some("memory") => Ok(Some(Form::Memory)),
            Some("push") => Ok(Some(Form::Push)),
            Some("single") => Ok(Some(Form::Single)),
            _ => Err(Error::invalid(ENVIRONMENT, word.display(), "\"memory\", \"push\" or \"single\"")),
        }
    }

    /// What it is, for people.
    fn words(self) -> &'static str {
        match self {
            Form::Memory => "pushed and merged by kernels of their own",
            Form::Push => "pushed by the attention kernel, merged by another",
            Form::Single => "pushed and merged by the attention kernel",
        }
    }
}

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

/// What forms a plan's steps can take.
#[derive(Clone, Copy, Debug)]
struct Forms {
    asked: Option<Form>,
    /// Rows that a slot holds.
    most_rows: i64,
    /// Blocks of the attention kernel that may wait.
    most_waiting: i64,
}

impl Forms {
    /// For one of `sharing` ranks on a GPU of `units` multiprocessors.
    fn new(asked: Option<Form>, most_rows: i64, units: i32, sharing: usize) -> Forms {
        let most_waiting = (i64::from(units) / (i64::from(COMMUNICATORS) * sharing.max(1) as i64)).min(MOST_WAITING);
        Forms { asked, most_rows, most_waiting }
    }

    /// The form of a step of `rows` rows, and how many blocks of its attention kernel wait.
    fn of(&self, rows: i64) -> (Form, i32) {
        let waiting = rows.div_euclid(ROWS_A_BLOCK) + i64::from(rows % ROWS_A_BLOCK > 0);
        match self.asked {
            _ if rows == 0 || rows > self.most_rows => (Form::Memory, 0),
            Some(form @ (Form::Memory | Form::Push)) => (form, 0),
            _ if waiting <= self.most_waiting => (Form::Single, waiting as i32),
            _ => (Form::Push, 0),
        }
    }
}

/// What a plan needs beside its backend.
pub(super) struct GpuExchange {
    kernel: ExchangeKernel,
    forms: Forms,
    /// Where the attention kernel leaves the partial of a step of the form `Memory`; none if the plan has no such.
    target: Option<RowTarget>,
    /// Where bad data of a running step is noted.
    status: u64,
    view: ExchangeView,
    mode: ExchangeMode,
    /// Bytes of a row.
    row_bytes: u64,
    reason: String,
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
        peers: &GpuRank,
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
        let status = windows.as_ref().map_or(0, |windows| windows.fault_address(shard.rank as usize));
        let most_rows = ((windows.as_ref().map_or(0, |windows| windows.capacity()) / row_bytes) as i64).max(1);
        let forms = Forms::new(Form::asked()?, most_rows, device.units, sharing);
        let (form, _) = forms.of(rows as i64);
        let mut holdings = Holdings::new(device, patience);
        let (mut target, mut bytes) = (None, 0);
        if !desc.is_merge_only() && form == Form::Memory {
            let too_large = || {
                let found = format!("{} x {} x {dim}", desc.max_query_tokens, desc.q_heads);
                Error::invalid("max_query_tokens x q_heads x head_dim_v", found, "a size that fits memory")
            };
            let o = rows.checked_mul(4 * dim).and_then(|o| o.checked_next_multiple_of(256)).ok_or_else(too_large)?;
            bytes = o.checked_add(4 * rows).ok_or_else(too_large)?;
            let memory = holdings.memory(bytes)?;
            target = Some(RowTarget::packed(memory, memory + o as u64, desc.q_heads, desc.head_dim_v));
        }
        let reason = match desc.is_merge_only() {
            true => reason.to_string(),
            false => format!("{reason}; the largest step's are {}", form.words()),
        };
        Ok(GpuExchange {
            kernel: ExchangeKernel::new(device, sharing)?,
            forms,
            target,
            status,
            view,
            mode,
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
    pub fn algorithm(&self) -> (Algorithm, String) {
        let algorithm = if self.mode == ExchangeMode::TwoShot { Algorithm::TwoShot } else { Algorithm::OneShot };
        (algorithm, self.reason.clone())
    }

    /// Enqueues a step: attends the shard, exchanges, writes the merged output.
    pub fn decode(&self, plan: &PlanCore, backend: &CudaBackend, step: &Step, stream: &CudaStream) -> Result<()> {
        let (tokens, kind) = (step.args.query_tokens, [1, step.args.batch as u64]);
        let rows = i64::from(tokens) * i64::from(self.view.heads);
        let merged = ExchangeStep { target: step.target(&plan.desc), rows, ..ExchangeStep::NOTHING };
        let (form, waiting) = self.forms.of(rows);
        if form == Form::Memory {
            let step_of_attention = match self.target {
                Some(target) => {
                    backend.decode_to(step, Destination::Partial { target: &target, status: self.status }, stream)?;
                    ExchangeStep { source: RowSource::written(&target), ..merged }
                }
                None if rows == 0 => merged,
                None => return Err(Error::new(ErrorKind::Internal, "plan: a step larger than its largest")),
            };
            return self.exchange(plan, step_of_attention, tokens, kind, stream);
        }
        let view = self.view_of(plan, tokens, kind, 0);
        backend.decode_to(step, Destination::Ranks { view: &view, status: self.status, waiting }, stream)?;
        if form == Form::Push {
            let step = ExchangeStep { is_pushed: true, ..merged };
            self.kernel.enqueue(&view, &step, stream).map_err(|error| self.broke(plan, error))?;
        }
        self.count(plan, rows as u64);
        Ok(())
    }

    /// Enqueues the exchange of a partial that the engine made.
    pub fn merge(&self, plan: &PlanCore, step: &MergeStep, stream: &CudaStream) -> Result<()> {
        let (source, target) = (step.source, step.target);
        // Tensors of no rows may point anywhere.
        if step.tokens > 0 {
            self.kernel.check(&[("o.data", source.o), ("lse.data", source.lse)])?;
        }
        if step.tokens > 0 && self.view.own_heads > 0 {
            self.kernel.check(&[("out.data", target.o), ("out_lse.data", target.lse)])?;
        }
        let exchange = ExchangeStep { source, target, ..ExchangeStep::NOTHING };
        self.exchange(plan, exchange, step.tokens, [2, 0], stream)
    }

    /// The view of a step of `tokens` tokens, for its exchange that begins with `first_row`. `kind` tells steps of different
    /// calls and sizes apart.
    fn view_of(&self, plan: &PlanCore, tokens: i32, kind: [u64; 2], first_row: i64) -> ExchangeView {
        let words = [plan.id, kind[0], kind[1], tokens as u64, first_row as u64];
        ExchangeView { fingerprint: fingerprint(&words), ..self.view }
    }

    /// The exchanges of a step whose partial lies in memory.
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
        for first_row in (0..rows.max(1)).step_by(self.forms.most_rows as usize) {
            let view = self.view_of(plan, tokens, kind, first_row);
            let here = (rows - first_row).min(self.forms.most_rows);
            let step = ExchangeStep { first_row, rows: here, is_last: first_row + here >= rows, ..step };
            self.kernel.enqueue(&view, &step, stream).map_err(|error| self.broke(plan, error))?;
            self.count(plan, step.rows as u64);
        }
        Ok(())
    }

    /// What was half enqueued leaves the peers without this rank: they hear of it.
    fn broke(&self, plan: &PlanCore, error: Error) -> Error {
        plan.comm.end.bootstrap().fail(&error);
        plan.comm.end.bootstrap().status().unwrap_or(error)
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
        if let Some(peers) = plan.comm.end.gpus() {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_follow_the_size_of_a_step_and_leave_room_for_others() {
        let forms = Forms::new(None, 1000, 132, 1);
        let found = [0, 1, 32, 128, 129, 1000, 1001].map(|rows| forms.of(rows));
        use Form::{Memory, Push, Single};
        assert_eq!(found, [(Memory, 0), (Single, 1), (Single, 4), (Single, 16), (Push, 0), (Push, 0), (Memory, 0)]);
        let shared = Forms::new(None, 1000, 132, 8);
        assert_eq!([32, 33].map(|rows| shared.of(rows).0), [Single, Push]);
        assert_eq!(Forms::new(Some(Single), 1000, 4, 2).of(1).0, Push, "no room to wait");
        assert_eq!(Forms::new(Some(Memory), 1000, 132, 1).of(1).0, Memory);
    }

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
