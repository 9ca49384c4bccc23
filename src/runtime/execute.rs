//! Runs steps on CPU ranks: attend the shard, exchange the partials, write.

use super::exchange::{self, Found, Method, Scratch};
use super::merge::MergeInput;
use super::plan::{Backend, PlanCore};
use crate::attention::Step;
use crate::device::FloatState;
use crate::error::{Error, ErrorKind, Result};
use crate::partial::{DataFault, PartialRows, RowTarget};

/// A decode step: shard, exchange, output.
pub(super) fn decode(plan: &PlanCore, step: &Step) -> Result<()> {
    let _float = FloatState::enter();
    let mut scratch = plan.scratch.lock();
    let tokens = step.args.query_tokens as usize;
    let output = step.target(&plan.desc);
    if let (Method::Ring(ring), Backend::Cpu(Some(backend))) = (&plan.method, &plan.backend) {
        plan.count_step();
        let sent = exchange::decode_ring(plan, (ring, backend), step, &mut scratch, &output);
        return finish(plan, sent, &mut scratch, tokens, &output);
    }
    let attended = attend(plan, step, &mut scratch);
    plan.count_step();
    if matches!(plan.method, Method::None) {
        let fault = attended?;
        write_own(plan, &mut scratch, tokens, &output);
        return report(plan, plan.shard.rank, fault);
    }
    let sent = attended.and_then(|fault| {
        let kind = [1, step.args.batch as u64, tokens as u64];
        let meeting = exchange::begin(plan, tokens, &output, fault, kind)?;
        exchange::run(&meeting, &mut scratch)
    });
    finish(plan, sent, &mut scratch, tokens, &output)
}

/// This rank's partial alone.
pub(super) fn partial(plan: &PlanCore, step: &Step) -> Result<()> {
    let _float = FloatState::enter();
    let mut scratch = plan.scratch.lock();
    let fault = attend(plan, step, &mut scratch)?;
    write_own(plan, &mut scratch, step.args.query_tokens as usize, &step.target(&plan.desc));
    report(plan, plan.shard.rank, fault)
}

/// The exchange alone, over partials that the engine made.
pub(super) fn merge(plan: &PlanCore, input: &MergeInput) -> Result<()> {
    let _float = FloatState::enter();
    let mut scratch = plan.scratch.lock();
    let dim = input.dim;
    let (lse, o) = scratch.partial(input.tokens * input.heads, dim);
    for row in 0..input.tokens * input.heads {
        let to = &mut o[row * dim..(row + 1) * dim];
        // SAFETY: `MergeInput::for_plan` resolved the tensors for these shapes; the caller keeps them valid.
        unsafe {
            lse[row] = input.lse(0, row);
            input.load(0, row, lse[row], to);
        }
    }
    plan.count_step();
    if matches!(plan.method, Method::None) {
        write_own(plan, &mut scratch, input.tokens, &input.output);
        return Ok(());
    }
    let kind = [2, 0, input.tokens as u64];
    let sent = exchange::begin(plan, input.tokens, &input.output, None, kind)
        .and_then(|meeting| exchange::run(&meeting, &mut scratch));
    finish(plan, sent, &mut scratch, input.tokens, &input.output)
}

/// Turns the shard into partials in the plan's scratch.
fn attend(plan: &PlanCore, step: &Step, scratch: &mut Scratch) -> Result<Option<DataFault>> {
    let Backend::Cpu(Some(backend)) = &plan.backend else {
        return Err(Error::new(ErrorKind::Internal, "plan: a CPU step of a plan without a CPU backend"));
    };
    let dim = plan.desc.head_dim_v as usize;
    let rows = step.args.query_tokens as usize * plan.desc.q_heads as usize;
    let (lse, o) = scratch.partial(rows, dim);
    backend.attend(step, &plan.comm.workers, PartialRows { o, lse, dim })
}

/// Writes this rank's own partial, all heads.
fn write_own(plan: &PlanCore, scratch: &mut Scratch, tokens: usize, output: &RowTarget) {
    let (heads, dim) = (plan.desc.q_heads as usize, plan.desc.head_dim_v as usize);
    let (lse, o) = scratch.partial(tokens * heads, dim);
    for (row, o) in o.chunks_exact(dim).enumerate() {
        // SAFETY: the output was resolved for [tokens, heads].
        unsafe { output.write(row / heads, row % heads, o, lse[row]) };
    }
}

/// Ends an exchanged step: the error of the step, with NaN in the output, or the pending bad data.
fn finish(
    plan: &PlanCore,
    sent: Result<Found>,
    scratch: &mut Scratch,
    tokens: usize,
    output: &RowTarget,
) -> Result<()> {
    match sent {
        Ok(Some((rank, fault))) => report(plan, rank, Some(fault)),
        Ok(None) => Ok(()),
        Err(error) => {
            // A rank that cannot finish its step breaks the communicator, or its peers would wait for the deadline.
            plan.comm.end.bootstrap().fail(&error);
            // SAFETY: the output was resolved for [tokens, this rank's heads].
            unsafe { output.poison(tokens, plan.heads.len(), &mut scratch.rows) };
            Err(error)
        }
    }
}

fn report(plan: &PlanCore, rank: i32, fault: Option<DataFault>) -> Result<()> {
    fault.map_or(Ok(()), |fault| Err(plan.comm.report(rank, plan.id, fault)))
}
