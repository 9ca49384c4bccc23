//! The route of a plan over windows.

use std::sync::Arc;

use super::check::Check;
use super::forms::{Form, Forms};
use super::queries::Queries;
use crate::attention::merge::MergeStep;
use crate::attention::{Algorithm, AttentionDesc, Dtype, OutputMode, Step, head_range};
use crate::comm::GpuRank;
use crate::cost::Machine;
use crate::cuda::{Destination, ExchangeKernel, ExchangeStep};
use crate::device::cuda::{Allocations, CudaStream};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::view::{ExchangeMode, row_words};
use crate::partial::{ExchangeView, Lse, RowSource, RowTarget};
use crate::route::backend::{Backend, Place, RouteMemory};
use crate::route::context::{Call, StepContext, fingerprint};
use crate::route::gpu::GpuShard;
use crate::route::rank::CudaRank;
use crate::route::{MergingRoute, Route};

/// Kernels of all ranks push partials into each other's windows and merge what comes.
pub(in crate::route) struct WindowsRoute {
    kernel: ExchangeKernel,
    forms: Forms,
    /// Where the attention kernel leaves the partial of a step of the form `Memory`; none if the plan has no such.
    target: Option<RowTarget>,
    /// Where bad data of a running step is noted.
    status: u64,
    view: ExchangeView,
    mode: ExchangeMode,
    /// Bytes of a row as it travels, and how many of them a slot holds.
    row_bytes: u64,
    slot_rows: i64,
    /// Log-sum-exps alone travel.
    is_weighted: bool,
    reason: String,
    bytes: usize,
    /// Of plans with the flag CHECKED.
    check: Option<Check>,
    /// Of plans whose ranks pass the queries of their own heads.
    queries: Option<Queries>,
    _allocations: Allocations,
    shard: GpuShard,
    /// Its windows outlive the kernels that are enqueued.
    _peers: Arc<GpuRank>,
}

impl WindowsRoute {
    /// Kernels and workspace of a plan on `rank`. Blocks; `Capturing` during a capture. Where its peers cannot be reached the
    /// error says why.
    pub fn new(context: &StepContext, rank: &Arc<CudaRank>, peers: &Arc<GpuRank>) -> Result<WindowsRoute> {
        let shard = GpuShard::new(context, rank)?;
        let (desc, rows) = (&context.desc, context.desc.most_rows()?);
        let dim = desc.head_dim_v as usize;
        let whole_row = size_of::<u32>() * row_words(dim, desc.wire_dtype.size());
        let is_weighted = desc.output == OutputMode::Weighted;
        let row_bytes = if is_weighted { size_of::<u32>() * row_words(0, 0) } else { whole_row };
        let (mode, reason) = choose(desc, context.world(), rows.saturating_mul(row_bytes));
        let view = ExchangeView {
            wire_dtype: desc.wire_dtype as i32,
            mode,
            heads: desc.q_heads,
            first_head: context.heads.start as i32,
            own_heads: context.heads.len() as i32,
            ..peers.view()?
        };
        let room = |bytes: usize| ((peers.capacity() / bytes) as i64).max(1);
        // Attention does not push what does not travel.
        let asked = Form::asked()?.filter(|_| !is_weighted).or(is_weighted.then_some(Form::Memory));
        let forms = Forms::new(asked, room(whole_row), rank.device.units, rank.sharing);
        let form = forms.of(rows as i64);
        let mut allocations = Allocations::new(&rank.device, context.config.step_timeout);
        let (mut target, mut bytes) = (None, 0);
        if !desc.is_merge_only() && form == Form::Memory {
            let too_large = || {
                let found = format!("{} x {} x {dim}", desc.max_query_tokens, desc.q_heads);
                Error::invalid("max_query_tokens x q_heads x head_dim_v", found, "a size that fits memory")
            };
            let o = rows
                .checked_mul(Dtype::F32.size() * dim)
                .and_then(|o| o.checked_next_multiple_of(256))
                .ok_or_else(too_large)?;
            bytes = o.checked_add(size_of::<Lse>() * rows).ok_or_else(too_large)?;
            let memory = allocations.memory(bytes)?;
            target = Some(RowTarget::partial(memory, memory + o as u64, desc.q_heads, desc.head_dim_v));
        }
        let check = Check::new(context, rank, peers, &mut allocations)?;
        let queries = Queries::new(context, rank, peers, &mut allocations)?;
        bytes += check.as_ref().map_or(0, Check::bytes) + queries.as_ref().map_or(0, Queries::bytes);
        let reason = match desc.is_merge_only() || is_weighted {
            true => reason,
            false => format!("{reason}; the largest step's are {}", form.words()),
        };
        Ok(WindowsRoute {
            kernel: match is_weighted {
                true => ExchangeKernel::weighted(&rank.device, rank.sharing)?,
                false => ExchangeKernel::of(&rank.device, rank.sharing, &view)?,
            },
            forms,
            target,
            status: peers.fault_address(),
            view,
            mode,
            row_bytes: row_bytes as u64,
            slot_rows: room(row_bytes),
            is_weighted,
            reason,
            bytes,
            check,
            queries,
            _allocations: allocations,
            shard,
            _peers: Arc::clone(peers),
        })
    }

    /// The view of a step of `tokens` tokens, for its exchange that begins with `first_row`.
    fn view_of(&self, context: &StepContext, tokens: i32, call: Call, first_row: i64) -> ExchangeView {
        let [kind, size] = call.words();
        let words = [context.plan, kind, size, tokens as u64, first_row as u64];
        ExchangeView { fingerprint: fingerprint(&words), ..self.view }
    }

    /// The exchanges of a step whose partial lies in memory.
    ///
    /// # Safety
    /// Of a step of `tokens` query tokens, source and target, and the streams of other steps, are as [`Route::decode`] and
    /// [`ExchangeKernel::enqueue`] ask for.
    unsafe fn exchange(
        &self,
        context: &StepContext,
        step: ExchangeStep,
        tokens: i32,
        call: Call,
        stream: &CudaStream,
    ) -> Result<()> {
        let rows = i64::from(tokens) * i64::from(self.view.heads);
        // A step without rows is an exchange, too: the others wait for it.
        for first_row in (0..rows.max(1)).step_by(self.slot_rows as usize) {
            let view = self.view_of(context, tokens, call, first_row);
            let here = (rows - first_row).min(self.slot_rows);
            let (is_weighted, is_last) = (self.is_weighted, first_row + here >= rows);
            let step = ExchangeStep { first_row, rows: here, is_last, is_weighted, ..step };
            // SAFETY: the view is this rank's, of windows that `_peers` keeps and that are freed after all kernels of their ranks.
            // A slot holds `slot_rows` rows. Source and target hold the rows of all tokens, as this function was promised.
            let enqueued = unsafe { self.kernel.enqueue(&view, &step, stream) };
            enqueued.map_err(|error| self.shard.rank.fail(error))?;
            self.count(context, step.rows as u64);
        }
        Ok(())
    }

    /// Enqueues a decode step, after the gather of its queries where ranks pass those of their own heads.
    ///
    /// # Safety
    /// As [`Route::decode`].
    unsafe fn enqueue(&self, context: &StepContext, step: &Step, stream: &CudaStream) -> Result<()> {
        // A step without tokens has nothing to gather.
        let Some(queries) = self.queries.as_ref().filter(|_| step.args.query_tokens > 0) else {
            // SAFETY: this function was promised the same.
            return unsafe { self.attend_checked(context, step, stream) };
        };
        self.shard.backend.check(step)?;
        let (tokens, call) = (step.args.query_tokens, Call::Queries(step.args.batch));
        let view_of = |first| self.view_of(context, tokens, call, first);
        // SAFETY: the step is as `Route::decode` asks for, as this function was promised, and its pointers were checked just now. The
        // views are this rank's, of windows that `_peers` keeps and that are freed after all kernels of their ranks. What attends
        // comes after the gather on this stream, to queries of all heads in memory of the route's.
        let enqueued = unsafe {
            queries
                .gather(context, step, &view_of, stream)
                .and_then(|gathered| self.attend_checked(context, &gathered, stream))
        };
        // Peers have what was enqueued for a step.
        enqueued.map_err(|error| self.shard.rank.fail(error))
    }

    /// Enqueues a step that has the queries of all heads, with what comes before and after it where the plan is checked.
    ///
    /// # Safety
    /// As [`Route::decode`], for a step with the queries of all heads.
    unsafe fn attend_checked(&self, context: &StepContext, step: &Step, stream: &CudaStream) -> Result<()> {
        // A step without sequences has nothing to compare.
        let Some(check) = self.check.as_ref().filter(|_| step.args.batch > 0) else {
            // SAFETY: this function was promised the same.
            return unsafe { self.attend(context, step, stream) };
        };
        let checked = check.step(&self.shard.backend, step)?;
        let (tokens, call) = (step.args.query_tokens, Call::Check(step.args.batch));
        let view_of = |first| self.view_of(context, tokens, call, first);
        // SAFETY: the step is as `Route::decode` asks for, as this function was promised, and `checked` is what the check made of it.
        // The views are this rank's, of windows that `_peers` keeps and that are freed after all kernels of their ranks.
        let enqueued = unsafe {
            check
                .compare(context, &checked, step.args.batch, &view_of, stream)
                .and_then(|()| self.attend(context, step, stream))
                .and_then(|()| check.write_nan(&self.view, &checked, stream))
        };
        // Peers have what was enqueued for a step.
        enqueued.map_err(|error| self.shard.rank.fail(error))
    }

    /// Enqueues attention and the exchange of partials.
    ///
    /// # Safety
    /// As [`WindowsRoute::attend_checked`].
    unsafe fn attend(&self, context: &StepContext, step: &Step, stream: &CudaStream) -> Result<()> {
        let (tokens, call) = (step.args.query_tokens, Call::Decode(step.args.batch));
        let rows = i64::from(tokens) * i64::from(self.view.heads);
        let merged = ExchangeStep { target: step.target(&context.desc), rows, ..ExchangeStep::NOTHING };
        let form = self.forms.of(rows);
        if form == Form::Memory {
            let given = match self.target {
                Some(target) => {
                    let destination = Destination::Partial { target: &target, status: self.status, lse_in_two: true };
                    // SAFETY: the step is as `Route::decode` asks for, as this function was promised, and the backend was made of
                    // the context's descriptor and shard. The target was made for the rows of the plan's largest step, `status` is
                    // two words of the window; both are freed only once the device is done with them. The words that the backend
                    // was told of are those of the shard's lease, which is dropped after it.
                    unsafe { self.shard.backend.decode_to(step, destination, stream) }?;
                    ExchangeStep { source: RowSource::written(&target), lse_in_two: true, ..merged }
                }
                None if rows == 0 => merged,
                None => return Err(Error::new(ErrorKind::Internal, "plan: a step larger than its largest")),
            };
            // SAFETY: the source is none, or the target that attention just before on this stream writes every row to; the
            // step's output was checked for its tokens and the context's heads, and is memory as this function was promised.
            return unsafe { self.exchange(context, given, tokens, call, stream) };
        }
        let view = self.view_of(context, tokens, call, 0);
        let most_waiting = if form == Form::Single { self.forms.most_waiting } else { 0 };
        // SAFETY: step and backend as above. The view is this rank's, of windows that `_peers` keeps and that are freed after all
        // kernels of their ranks; `forms` gives this form to steps only whose rows a slot holds.
        unsafe { self.shard.backend.decode_to(step, Destination::Ranks { view: &view, most_waiting }, stream) }?;
        if form == Form::Push {
            let step = ExchangeStep { is_pushed: true, ..merged };
            // SAFETY: the view as above. There is no source; the target is the step's output, as in `exchange` above.
            let enqueued = unsafe { self.kernel.enqueue(&view, &step, stream) };
            enqueued.map_err(|error| self.shard.rank.fail(error))?;
        }
        self.count(context, rows as u64);
        Ok(())
    }

    /// Refuses a target of `tokens` tokens that is not the device's memory, by the names of the arguments.
    fn check_target(&self, tokens: i32, target: &RowTarget, lse: &str) -> Result<()> {
        // A tensor of no rows may point anywhere.
        if tokens == 0 || self.view.own_heads == 0 {
            return Ok(());
        }
        self.kernel.check(&[("out.data", target.o), (lse, target.lse)])
    }

    /// Counts what this rank sends to others in an exchange of `rows` rows.
    fn count(&self, context: &StepContext, rows: u64) {
        let (world, heads) = (context.shard.world as u64, self.view.heads as u64);
        let own = head_range(self.view.heads, context.shard).map_or(0, |own| own.len() as u64);
        let (rounds, messages, sent) = match self.mode {
            ExchangeMode::OneShot => (1, world - 1, (world - 1) * rows),
            ExchangeMode::Scattered => (1, world - 1, rows * (heads - own) / heads),
            ExchangeMode::TwoShot => {
                (2, 2 * (world - 1), rows * (heads - own) / heads + (world - 1) * rows * own / heads)
            }
        };
        context.counters.add(rounds, messages, sent * self.row_bytes);
    }
}

/// Who gets which rows of a plan whose largest partial takes `bytes`, and why.
///
/// One shot sends (p - 1) S from a rank and two send 2 (p - 1) / p S: the second saves of a link's time for the price of another
/// hop. What that comes to is predicted from exchanges alone of two ranks, not measured for more.
fn choose(desc: &AttentionDesc, world: usize, bytes: usize) -> (ExchangeMode, String) {
    match (desc.output, desc.algorithm) {
        (OutputMode::Weighted, _) => {
            (ExchangeMode::OneShot, "weighted output: log-sum-exps alone travel, in one round".into())
        }
        (OutputMode::Scattered, _) => {
            (ExchangeMode::Scattered, "scattered output: rows go to the owners of their heads".into())
        }
        (_, Algorithm::TwoShot) => (ExchangeMode::TwoShot, "asked for".into()),
        (_, Algorithm::OneShot) => (ExchangeMode::OneShot, "asked for".into()),
        _ => {
            let (two, one) = Machine::H200.shots(world, bytes as f64);
            let (mode, words) = match two < one {
                true => (ExchangeMode::TwoShot, "two hops"),
                false => (ExchangeMode::OneShot, "one hop"),
            };
            let reason = format!("{words}: of the largest partial one is predicted to take {one:.1} us, two {two:.1}");
            (mode, reason)
        }
    }
}

impl Route for WindowsRoute {
    fn agreement(&self) -> Vec<(&'static str, String)> {
        vec![("exchange", "windows".into())]
    }

    unsafe fn decode(&self, context: &StepContext, step: &Step, place: Place<'_>) -> Result<()> {
        let stream = self.shard.stream(place.stream())?;
        // SAFETY: this function was promised the same.
        unsafe { self.enqueue(context, step, stream) }?;
        context.count_enqueued();
        Ok(())
    }

    fn shard(&self) -> &dyn Backend {
        &self.shard
    }

    fn merging(&self) -> Option<&dyn MergingRoute> {
        Some(self)
    }

    /// Kernels whose communicator has failed write NaN without having read or waited for anything. One that has not heard of
    /// the failure hears of it in its wait.
    unsafe fn write_nan(
        &self,
        context: &StepContext,
        (tokens, _heads): (usize, usize),
        target: &RowTarget,
        stream: Option<&CudaStream>,
    ) -> Result<()> {
        let stream = self.shard.stream(stream)?;
        self.check_target(tokens as i32, target, "lse.data")?;
        let rows = (tokens * self.view.heads as usize) as i64;
        for first_row in (0..rows).step_by(self.forms.most_rows as usize) {
            let view = self.view_of(context, tokens as i32, Call::Merge, first_row);
            let here = (rows - first_row).min(self.forms.most_rows);
            let is_last = first_row + here >= rows;
            // As if pushed: peers may not know of the failure yet, and would take a header of this launch for another step.
            let given = ExchangeStep { target: *target, first_row, rows: here, ..ExchangeStep::NOTHING };
            let step = ExchangeStep { is_pushed: true, is_last, ..given };
            // SAFETY: the view is this rank's, of windows that `_peers` keeps and that are freed after all kernels of their ranks. A
            // slot holds `most_rows` rows. There is no source; the target was checked for `tokens` and this rank's heads, and is
            // memory of the plan's device that stays until this is done, as this function was promised.
            unsafe { self.kernel.enqueue(&view, &step, stream) }?;
        }
        Ok(())
    }

    fn memory(&self) -> RouteMemory {
        let RouteMemory { workspace, exchange } = self.shard.memory();
        RouteMemory { workspace: workspace + self.bytes, exchange }
    }

    fn algorithm(&self) -> (Algorithm, &str) {
        let algorithm = match self.mode {
            ExchangeMode::TwoShot => Algorithm::TwoShot,
            ExchangeMode::OneShot | ExchangeMode::Scattered => Algorithm::OneShot,
        };
        (algorithm, &self.reason)
    }
}

impl MergingRoute for WindowsRoute {
    unsafe fn merge(&self, context: &StepContext, step: &MergeStep, stream: Option<&CudaStream>) -> Result<()> {
        let stream = self.shard.stream(stream)?;
        let (source, target) = (step.source, step.target);
        if step.tokens > 0 {
            self.kernel.check(&source.addresses())?;
        }
        self.check_target(step.tokens, &target, "out_lse.data")?;
        let given = ExchangeStep { source, target, ..ExchangeStep::NOTHING };
        // SAFETY: the step was checked for the context's descriptor and heads, its pointers just now to be the device's; that the
        // memory stays, and on which streams other steps are, is as this function was promised.
        unsafe { self.exchange(context, given, step.tokens, Call::Merge, stream) }?;
        context.count_enqueued();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_shots_pay_the_sooner_the_more_ranks_there_are() {
        let mut desc = AttentionDesc::new(32, 8, 128, 1024);
        let least =
            |world| (1..1000).map(|n| n << 10).find(|&bytes| choose(&desc, world, bytes).0 == ExchangeMode::TwoShot);
        assert!(least(2).is_none() && least(4).unwrap() > least(8).unwrap(), "{:?} {:?}", least(4), least(8));
        let (mode, reason) = choose(&desc, 8, 16_640);
        assert_eq!(
            (mode, &*reason),
            (ExchangeMode::OneShot, "one hop: of the largest partial one is predicted to take 3.3 us, two 5.5")
        );
        assert_eq!(choose(&desc, 8, 133_120).0, ExchangeMode::TwoShot);
        desc.output = OutputMode::Scattered;
        assert_eq!(choose(&desc, 8, 133_120).0, ExchangeMode::Scattered);
    }
}
