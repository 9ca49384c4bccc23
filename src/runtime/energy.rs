//! The energy and its gradient over keys that lie in one place ([`crate::attention::energy`]).

use super::context::Runtime;
use super::stream::{RunsOn, Stream};
use crate::attention::{AttentionDesc, DecodeArgs, Keys, Shard, Step, Tensor, supported};
use crate::cpu::{self, CpuBackend, Isa};
use crate::device::{Device, DeviceKind, FloatState, Workers, available_cores};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::{Lse, PartialRows};

/// How long enqueueing may wait for room on the stream.
const ENQUEUE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);
/// Bytes of keys and values from which on all cores are worth starting.
const LARGE: u64 = 4 << 20;
/// One shard, the caller's: whose it is makes no difference here.
const ALONE: Shard = Shard { rank: 0, world: 1 };

/// A checked evaluation.
#[derive(Clone, Copy)]
struct EnergyStep {
    desc: AttentionDesc,
    step: Step,
    isa: Isa,
}

/// F(zeta) = log sum_j exp(scale q.k_j + zeta.v_j) of every query token and head over the keys in `args`, and its
/// gradient by zeta: `args.lse` gets F, `args.out` the gradient, both for all query heads. `zeta` is f32 [token, query
/// head, head_dim_v]; `data` null is 0, where F is attention's lse and the gradient its output.
///
/// Everything else is as in a decode step of a plan of one rank; of `desc`, output, algorithm, wire dtype and
/// reproducibility do not count. Where the keys are a shard of several and positions matter, pass `kv_start` or
/// explicit positions; (gradient, F) is this shard's partial, to be merged by
/// [`merge_partials`](super::merge_partials) or [`Plan::merge`](super::Plan::merge).
///
/// CPU devices. Without a stream it runs here and returns `InvalidData` where a length or a table is bad (its sequence
/// is NaN then). Allocates scratch, and starts a thread a core for the call where the keys are many.
///
/// # Safety
/// The buffers that `args` and `zeta` describe stay valid, and unchanged by others, until the evaluation is done.
pub unsafe fn energy(
    runtime: &Runtime,
    device: Device,
    desc: &AttentionDesc,
    args: &DecodeArgs,
    zeta: &Tensor,
    stream: Option<&Stream>,
) -> Result<()> {
    runtime.check_device(device)?;
    if device.kind != DeviceKind::Cpu {
        return Err(Error::unsupported("device", device, "CPU devices"));
    }
    desc.check()?;
    if desc.is_merge_only() {
        return Err(Error::invalid("kv_heads", 0, "at least 1 where keys are attended"));
    }
    supported(desc, &cpu::CAPABILITIES)?;
    let mut step = Step::new(desc, ALONE, args, desc.q_heads)?.at_zeta(desc, zeta)?;
    // SAFETY: the caller's promise, and a CPU's memory is host memory.
    unsafe { step.check_arrays(desc, ALONE, Keys::Some) }?;
    let energy = EnergyStep { desc: *desc, step, isa: runtime.cpu_isa() };
    match Stream::runs_on(stream, device)? {
        // SAFETY: the caller keeps the buffers valid while this runs.
        RunsOn::Caller => unsafe { run(&energy) },
        // SAFETY: the caller keeps the buffers valid until the evaluation is done.
        RunsOn::Queue(queue) => queue.push(move || unsafe { run(&energy) }, ENQUEUE_TIMEOUT).map(drop),
        RunsOn::Cuda(_) => Err(Error::unsupported("device", device, "CPU devices")),
    }
}

/// Evaluates on the calling thread and, if there is much to read, on others.
///
/// # Safety
/// The step's memory is host memory that stays valid, and unchanged by others, until this returns.
unsafe fn run(energy: &EnergyStep) -> Result<()> {
    let _float = FloatState::enter();
    let EnergyStep { desc, step, isa } = energy;
    let threads = if step.args.k.bytes.saturating_add(step.args.v.bytes) < LARGE { 1 } else { available_cores() };
    let make = if step.zeta.data.is_null() { CpuBackend::new } else { CpuBackend::for_energy };
    let backend = make(desc, ALONE, threads, *isa)?;
    let workers = Workers::new(threads, "treeattn-energy", false)?;
    let (heads, dim) = (desc.q_heads as usize, desc.head_dim_v as usize);
    let rows = (step.args.query_tokens as usize).checked_mul(heads);
    let mut o = zeroed(rows.and_then(|rows| rows.checked_mul(dim)))?;
    let mut lse = zeroed(rows.and_then(|rows| rows.checked_mul(Lse::FLOATS)))?;
    let lse = Lse::slice_mut(&mut lse);
    // SAFETY: the step was checked for this descriptor, and its memory is readable until this returns, as this function was
    // promised.
    let fault = unsafe { backend.attend(step, &workers, PartialRows { o: &mut o, lse, dim }) }?;
    let target = step.target(desc);
    for (row, (o, &lse)) in o.chunks_exact(dim).zip(&*lse).enumerate() {
        // SAFETY: `Step::new` resolved the output for these tokens and heads; the caller keeps it valid.
        unsafe { target.write(row / heads, row % heads, o, lse) };
    }
    let Some(fault) = fault else { return Ok(()) };
    Err(Error::new(ErrorKind::InvalidData, fault.message("")))
}

/// `count` zeros (none: too many for 64 bits), or `NoMemory`.
fn zeroed(count: Option<usize>) -> Result<Vec<f32>> {
    let mut floats = Vec::new();
    let Some(count) = count.filter(|&count| floats.try_reserve_exact(count).is_ok()) else {
        let message = "query_tokens x q_heads x head_dim_v: found more rows than memory has room for, wanted fewer";
        return Err(Error::new(ErrorKind::NoMemory, message));
    };
    floats.resize(count, 0.0);
    Ok(floats)
}
