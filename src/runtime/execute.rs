//! Runs steps on CPU ranks: attend the shard, send the partials round, merge, write.

use std::sync::atomic::Ordering;

use half::{bf16, f16};

use super::merge::MergeInput;
use super::output::Output;
use super::plan::{Backend, PlanCore, Scratch};
use crate::attention::{Dtype, OutputMode, Step};
use crate::comm::{Round, RoundHeader};
use crate::device::FloatState;
use crate::error::{Error, ErrorKind, Result};
use crate::partial::{DataFault, PartialRows, merge_ranks};

/// Elements of partials above which all workers of a rank share the merge.
const PARALLEL_MERGE: usize = 1 << 17;

/// How partials are laid out in a round: the lse of every row (f32, padded to 64 bytes), then the rows of o.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunks {
    /// Most rows of a round.
    rows: usize,
    row_bytes: usize,
    wire: Dtype,
}

impl Chunks {
    pub fn new(capacity: usize, dim: usize, wire: Dtype) -> Chunks {
        let row_bytes = dim * wire.size();
        Chunks { rows: (capacity.saturating_sub(64) / (row_bytes + 4)).max(1), row_bytes, wire }
    }

    fn lse_bytes(rows: usize) -> usize {
        (rows * 4).next_multiple_of(64)
    }

    fn bytes(&self, rows: usize) -> usize {
        Self::lse_bytes(rows) + rows * self.row_bytes
    }
}

/// A decode step: shard, exchange, output.
pub(super) fn decode(plan: &PlanCore, step: &Step) -> Result<()> {
    let _float = FloatState::enter();
    let mut scratch = plan.scratch.lock();
    let tokens = step.args.query_tokens as usize;
    let output = step_output(plan, step);
    let attended = attend(plan, step, &mut scratch);
    plan.count_step();
    if plan.desc.output == OutputMode::Local || plan.shard.world == 1 {
        let fault = attended?;
        write_own(plan, &scratch, tokens, &output);
        return report(plan, plan.shard.rank, fault);
    }
    let sent = attended.and_then(|fault| {
        let kind = [1, step.args.batch as u64, tokens as u64];
        exchange(plan, &mut scratch, tokens, &output, fault, kind)
    });
    finish(plan, sent, &mut scratch, tokens, &output)
}

/// This rank's partial alone.
pub(super) fn partial(plan: &PlanCore, step: &Step) -> Result<()> {
    let _float = FloatState::enter();
    let mut scratch = plan.scratch.lock();
    let fault = attend(plan, step, &mut scratch)?;
    write_own(plan, &scratch, step.args.query_tokens as usize, &step_output(plan, step));
    report(plan, plan.shard.rank, fault)
}

/// The exchange alone, over partials that the engine made.
pub(super) fn merge(plan: &PlanCore, input: &MergeInput) -> Result<()> {
    let _float = FloatState::enter();
    let mut scratch = plan.scratch.lock();
    let Scratch { o, lse, .. } = &mut *scratch;
    let dim = input.dim;
    for row in 0..input.tokens * input.heads {
        let to = &mut o[row * dim..(row + 1) * dim];
        // SAFETY: `MergeInput::for_plan` resolved the tensors for these shapes; the caller keeps them valid.
        unsafe {
            lse[row] = input.lse(0, row);
            input.load(0, row, lse[row], to);
        }
    }
    plan.count_step();
    if plan.desc.output == OutputMode::Local || plan.shard.world == 1 {
        write_own(plan, &scratch, input.tokens, &input.output);
        return Ok(());
    }
    let kind = [2, 0, input.tokens as u64];
    let sent = exchange(plan, &mut scratch, input.tokens, &input.output, None, kind);
    finish(plan, sent, &mut scratch, input.tokens, &input.output)
}

fn step_output(plan: &PlanCore, step: &Step) -> Output {
    Output {
        o: step.args.out,
        o_stride: step.out_stride,
        dtype: plan.desc.out_dtype,
        lse: step.args.lse,
        lse_stride: step.lse_stride,
        dim: plan.desc.head_dim_v as usize,
    }
}

/// Turns the shard into partials in the plan's scratch.
fn attend(plan: &PlanCore, step: &Step, scratch: &mut Scratch) -> Result<Option<DataFault>> {
    let Backend::Cpu(Some(backend)) = &plan.backend else {
        return Err(Error::new(ErrorKind::Internal, "plan: a CPU step of a plan without a CPU backend"));
    };
    let dim = plan.desc.head_dim_v as usize;
    let rows = step.args.query_tokens as usize * plan.desc.q_heads as usize;
    let rows = PartialRows { o: &mut scratch.o[..rows * dim], lse: &mut scratch.lse[..rows], dim };
    backend.attend(step, &plan.comm.workers, rows)
}

/// Writes this rank's own partial, all heads.
fn write_own(plan: &PlanCore, scratch: &Scratch, tokens: usize, output: &Output) {
    let (heads, dim) = (plan.desc.q_heads as usize, plan.desc.head_dim_v as usize);
    for row in 0..tokens * heads {
        // SAFETY: the output was resolved for [tokens, heads].
        unsafe { output.write(row / heads, row % heads, &scratch.o[row * dim..(row + 1) * dim], scratch.lse[row]) };
    }
}

/// Sends the partials round in chunks and merges each as it comes. Gives the first rank's fault, if any.
fn exchange(
    plan: &PlanCore,
    scratch: &mut Scratch,
    tokens: usize,
    output: &Output,
    fault: Option<DataFault>,
    kind: [u64; 3],
) -> Result<Option<(i32, DataFault)>> {
    let comm = &plan.comm;
    let call = comm.calls.fetch_add(1, Ordering::Relaxed);
    let header = RoundHeader {
        fingerprint: fingerprint(&[plan.id, call, kind[0], kind[1], kind[2]]),
        fault: DataFault::pack(fault),
    };
    let (heads, dim, world) = (plan.desc.q_heads as usize, plan.desc.head_dim_v as usize, plan.shard.world as usize);
    let rows = tokens * heads;
    let Scratch { o, lse, rows: spare } = scratch;
    let mut found = None;
    let mut first = 0;
    loop {
        let n = plan.chunks.rows.min(rows - first);
        let bytes = plan.chunks.bytes(n);
        let mut failed = None;
        let mut fill = |slot: &mut [u8]| {
            fill_payload(&plan.chunks, slot, &o[first * dim..(first + n) * dim], &lse[first..first + n]);
        };
        let mut take = |round: &dyn Round| {
            found = found
                .or_else(|| (0..world).find_map(|rank| Some((rank as i32, DataFault::unpack(round.fault(rank))?))));
            failed = merge_chunk(plan, round, first, n, output, spare).err();
        };
        comm.exchange.round(header, bytes, &mut fill, &mut take)?;
        if let Some(error) = failed {
            return Err(error);
        }
        plan.counters.rounds.fetch_add(1, Ordering::Relaxed);
        plan.counters.messages.fetch_add(world as u64 - 1, Ordering::Relaxed);
        plan.counters.bytes_sent.fetch_add((bytes * (world - 1)) as u64, Ordering::Relaxed);
        first += n;
        if first == rows {
            return Ok(found);
        }
    }
}

/// Merges rows `first..first + n` of a round, in rank order, and writes those of this rank's heads.
fn merge_chunk(
    plan: &PlanCore,
    round: &dyn Round,
    first: usize,
    n: usize,
    output: &Output,
    spare: &mut [f32],
) -> Result<()> {
    let (heads, dim, world) = (plan.desc.q_heads as usize, plan.desc.head_dim_v as usize, plan.shard.world as usize);
    let merge_rows = |rows: std::ops::Range<usize>, spare: &mut [f32]| {
        let (scratch, merged) = spare.split_at_mut(dim);
        for row in rows {
            let (token, head) = ((first + row) / heads, (first + row) % heads);
            if !plan.heads.contains(&head) {
                continue;
            }
            let lse = |rank: usize| floats(&round.payload(rank)[..n * 4])[row];
            let o = |rank: usize| &round.payload(rank)[Chunks::lse_bytes(n) + row * plan.chunks.row_bytes..];
            let merged_lse = merge_ranks(
                world,
                lse,
                |rank, scratch| decode_row(plan.chunks.wire, o(rank), scratch),
                scratch,
                merged,
            );
            // SAFETY: the output was resolved for this rank's heads; no other worker writes this row.
            unsafe { output.write(token, head - plan.heads.start, merged, merged_lse) };
        }
    };
    let workers = &plan.comm.workers;
    let parts = workers.threads();
    if parts == 1 || n * dim * world < PARALLEL_MERGE {
        merge_rows(0..n, &mut spare[..2 * dim]);
        return Ok(());
    }
    let base = spare.as_mut_ptr() as usize;
    workers.run(&|part| {
        // SAFETY: `spare` holds two rows a worker, and each worker takes its own.
        let own = unsafe { std::slice::from_raw_parts_mut((base as *mut f32).add(part * 2 * dim), 2 * dim) };
        merge_rows(part * n / parts..(part + 1) * n / parts, own);
    })
}

/// Ends an exchanged step: the error of the step, with NaN in the output, or the pending bad data.
fn finish(
    plan: &PlanCore,
    sent: Result<Option<(i32, DataFault)>>,
    scratch: &mut Scratch,
    tokens: usize,
    output: &Output,
) -> Result<()> {
    match sent {
        Ok(Some((rank, fault))) => report(plan, rank, Some(fault)),
        Ok(None) => Ok(()),
        Err(error) => {
            // A rank that cannot finish its step breaks the communicator, or its peers would wait for the deadline.
            plan.comm.exchange.fail(&error);
            // SAFETY: the output was resolved for [tokens, this rank's heads].
            unsafe { output.poison(tokens, plan.heads.len(), &mut scratch.rows) };
            Err(error)
        }
    }
}

fn report(plan: &PlanCore, rank: i32, fault: Option<DataFault>) -> Result<()> {
    fault.map_or(Ok(()), |fault| Err(plan.comm.report(rank, plan.id, fault)))
}

/// FNV-1a over the words that all ranks must agree on.
fn fingerprint(words: &[u64]) -> u64 {
    words
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

fn fill_payload(chunks: &Chunks, slot: &mut [u8], o: &[f32], lse: &[f32]) {
    let (head, body) = slot.split_at_mut(Chunks::lse_bytes(lse.len()));
    floats_mut(head)[..lse.len()].copy_from_slice(lse);
    match chunks.wire {
        Dtype::F16 => encode(body, o, |x| f16::from_f32(x).to_bits()),
        Dtype::Bf16 => encode(body, o, |x| bf16::from_f32(x).to_bits()),
        _ => floats_mut(body)[..o.len()].copy_from_slice(o),
    }
}

fn encode(body: &mut [u8], o: &[f32], convert: impl Fn(f32) -> u16) {
    for (to, &x) in body.chunks_exact_mut(2).zip(o) {
        to.copy_from_slice(&convert(x).to_ne_bytes());
    }
}

/// The row at the front of `bytes` as f32: in place, or none and converted into `scratch`.
fn decode_row<'a>(wire: Dtype, bytes: &'a [u8], scratch: &mut [f32]) -> Option<&'a [f32]> {
    let convert: fn(u16) -> f32 = match wire {
        Dtype::F16 => |bits| f16::from_bits(bits).to_f32(),
        Dtype::Bf16 => |bits| bf16::from_bits(bits).to_f32(),
        _ => return Some(floats(&bytes[..scratch.len() * 4])),
    };
    for (to, from) in scratch.iter_mut().zip(bytes.chunks_exact(2)) {
        *to = convert(u16::from_ne_bytes([from[0], from[1]]));
    }
    None
}

/// Bytes of a window as floats: slots are aligned to 64 bytes and cut at multiples of 4.
fn floats(bytes: &[u8]) -> &[f32] {
    // SAFETY: every bit pattern is an f32; `align_to` keeps alignment, and an unaligned head would be cut off.
    let (head, floats, _) = unsafe { bytes.align_to::<f32>() };
    debug_assert!(head.is_empty());
    floats
}

/// As [`floats`], to write.
fn floats_mut(bytes: &mut [u8]) -> &mut [f32] {
    // SAFETY: as in `floats`.
    let (head, floats, _) = unsafe { bytes.align_to_mut::<f32>() };
    debug_assert!(head.is_empty());
    floats
}
