//! The backend: a plan's share of the work on the CPU.

use parking_lot::Mutex;

use super::isa::Isa;
use super::kernels::{Kernels, element};
use super::partition::Line;
use super::sequences::{Reader, Sequence};
use super::tile::TILE;
use super::worker::{Layout, Output, Shape, Worker};
use crate::attention::{
    Algorithm, AttentionDesc, Capabilities, Dtype, KvLayout, MAX_HEAD_DIM, MaskKind, QueryInput, Reproducibility,
    Shard, Step, supported,
};
use crate::device::{HostBuffer, Workers};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::{DataFault, PartialRows};

/// Most rows of a row block.
const ROW_BLOCK: usize = 32;
const _: () = assert!(ROW_BLOCK <= TILE);
/// Most rows of a row block for which k and v are widened in every row group instead of once.
const WIDEN_ABOVE: usize = 8;
/// Bytes of accumulators that one worker keeps going at a time.
const STATE_BYTES: usize = 64 << 10;
/// Tiles a worker should have before the kv heads of a tile are kept together.
const TILES_TO_BLOCK: u64 = 8;

/// What the CPU backend serves.
pub const CAPABILITIES: Capabilities = Capabilities {
    place: "",
    kv_dtypes: &[Dtype::F32, Dtype::F16, Dtype::Bf16],
    head_dim_multiple: 1,
    head_dim_limit: MAX_HEAD_DIM,
    window: false,
    softcap: false,
    alibi: false,
    sinks: false,
    masks: &[MaskKind::None],
    query_inputs: &[QueryInput::Replicated],
    reproducibility: &[Reproducibility::Repeatable],
    algorithms: &Algorithm::ALL,
};

/// Attention over one rank's shard on CPU workers.
///
/// Owns all scratch that a step needs; its size depends on heads, dimensions, threads and batch, not on the KV length.
#[derive(Debug)]
pub struct CpuBackend {
    pub(super) desc: AttentionDesc,
    pub(super) shard: Shard,
    threads: usize,
    kernels: Kernels,
    pub(super) shape: Shape,
    layout: Layout,
    pub(super) scratch: Mutex<Scratch>,
}

#[derive(Debug)]
pub(super) struct Scratch {
    floats: HostBuffer,
    pub(super) sequences: Vec<Sequence>,
}

/// A worker's scratch by index.
#[derive(Clone, Copy)]
struct Base(*mut f32);

// SAFETY: every worker takes its own part.
unsafe impl Sync for Base {}

impl CpuBackend {
    /// The backend of a checked shape for `threads` workers. Errors: `Unsupported` by field, `Unavailable` where the
    /// machine lacks `isa`, `NoMemory`.
    pub fn new(desc: &AttentionDesc, shard: Shard, threads: usize, isa: Isa) -> Result<CpuBackend> {
        CpuBackend::of(desc, shard, threads, isa, false)
    }

    /// As [`CpuBackend::new`], for steps that have a zeta (and for no others).
    pub fn for_energy(desc: &AttentionDesc, shard: Shard, threads: usize, isa: Isa) -> Result<CpuBackend> {
        CpuBackend::of(desc, shard, threads, isa, true)
    }

    fn of(desc: &AttentionDesc, shard: Shard, threads: usize, isa: Isa, tilted: bool) -> Result<CpuBackend> {
        desc.check()?;
        supported(desc, &CAPABILITIES)?;
        if desc.is_merge_only() {
            return Err(Error::invalid("kv_heads", 0, "at least 1 where keys are attended"));
        }
        if threads == 0 {
            return Err(Error::invalid("threads", threads, "at least 1"));
        }
        let Some(kernels) = Kernels::of(isa) else {
            let message = format!("isa: found {}, this machine has not got it", isa.name());
            return Err(Error::new(ErrorKind::Unavailable, message));
        };
        let shape = shape(desc, tilted);
        let too_large = || Error::new(ErrorKind::NoMemory, "cpu scratch: its size does not fit the address space");
        let layout = Layout::of(&shape).ok_or_else(too_large)?;
        let bytes = layout.floats.checked_mul(4 * threads).ok_or_else(too_large)?;
        let mut sequences = Vec::new();
        sequences
            .try_reserve_exact(desc.max_batch as usize)
            .map_err(|_| Error::new(ErrorKind::NoMemory, format!("max_batch: no memory for {}", desc.max_batch)))?;
        sequences.resize(desc.max_batch as usize, Sequence::default());
        let scratch = Mutex::new(Scratch { floats: HostBuffer::new(bytes)?, sequences });
        Ok(CpuBackend { desc: *desc, shard, threads, kernels, shape, layout, scratch })
    }

    /// Bytes of scratch.
    pub fn memory(&self) -> usize {
        let scratch = self.scratch.lock();
        scratch.floats.len() + scratch.sequences.capacity() * size_of::<Sequence>()
    }

    /// Attends the shard: writes the partial of every row of the step, row = query token * q heads + head. Blocks until
    /// done; allocates nothing. `workers` has as many threads as the backend was made for.
    ///
    /// A sequence with bad data has NaN rows and is reported (the first one); rows of no sequence are the identity. The
    /// caller of the step vouches for its memory. Errors: `InvalidArgument` for rows or workers of the wrong size,
    /// `Internal` for a panic in a worker.
    pub fn attend(&self, step: &Step, workers: &Workers, rows: PartialRows<'_>) -> Result<Option<DataFault>> {
        self.attend_shard(self.shard, step, workers, rows)
    }

    /// As [`CpuBackend::attend`], over keys that `shard` holds.
    pub fn attend_shard(
        &self,
        shard: Shard,
        step: &Step,
        workers: &Workers,
        rows: PartialRows<'_>,
    ) -> Result<Option<DataFault>> {
        let count = step.args.query_tokens as usize * self.shape.q_heads;
        if workers.threads() != self.threads {
            return Err(Error::invalid("workers", workers.threads(), format!("{} threads", self.threads)));
        }
        if step.zeta.data.is_null() == self.shape.tilt.is_some() {
            return Err(Error::new(ErrorKind::Internal, "step: with a zeta in a plan without, or the other way round"));
        }
        if rows.dim != self.shape.dim_v || rows.lse.len() != count || rows.o.len() != count * rows.dim {
            let found = format!("{} o, {} lse, dim {}", rows.o.len(), rows.lse.len(), rows.dim);
            return Err(Error::invalid("rows", found, format!("{count} rows of {}", self.shape.dim_v)));
        }
        let mut scratch = self.scratch.lock();
        let Scratch { floats, sequences } = &mut *scratch;
        let Some(sequences) = sequences.get_mut(..step.args.batch as usize) else {
            return Err(Error::invalid("batch", step.args.batch, format!("at most {}", self.desc.max_batch)));
        };
        rows.o.fill(0.0);
        rows.lse.fill(f32::NEG_INFINITY);
        let reader = Reader { desc: &self.desc, shard, step };
        let fault = reader.sequences(sequences);
        let (heads, group) = (self.desc.kv_heads as usize, self.shape.group);
        let most = sequences.iter().map(|s| s.tokens * group).max().unwrap_or(0);
        let row_block = most.clamp(1, self.shape.row_block);
        let total = Line::lay(sequences, heads, group, row_block);
        if total > 0 {
            let line = Line {
                sequences,
                total,
                workers: self.threads,
                heads,
                head_block: self.head_block(step, total, row_block),
                group,
                row_block,
            };
            let output = Output { o: rows.o.as_mut_ptr(), lse: rows.lse.as_mut_ptr(), dim: rows.dim };
            self.run(reader, &line, Base(floats.as_mut_ptr().cast()), output, workers)?;
        }
        let Some((first, cause)) = fault else { return Ok(None) };
        for sequence in sequences.iter().filter(|s| s.fault.is_some()) {
            let bad = sequence.first_token * self.shape.q_heads;
            let bad = bad..bad + sequence.tokens * self.shape.q_heads;
            rows.o[bad.start * rows.dim..bad.end * rows.dim].fill(f32::NAN);
            rows.lse[bad].fill(f32::NAN);
        }
        Ok(Some(DataFault { sequence: first as i32, cause }))
    }

    fn run(&self, reader: Reader<'_>, line: &Line<'_>, base: Base, output: Output, workers: &Workers) -> Result<()> {
        let worker = |w: usize| {
            let base = &base;
            let scratch = base.0.wrapping_add(w * self.layout.floats);
            Worker { shape: &self.shape, kernels: &self.kernels, reader, line, layout: &self.layout, scratch, output }
        };
        // SAFETY: each worker has its part of the scratch; the caller of the step vouches for the step's memory.
        workers.run(&|w| unsafe { worker(w).run(w) })?;
        line.splits(|item, first, last| {
            let main = worker(first);
            // SAFETY: the workers are done; first and last are workers with scratch of this layout.
            unsafe {
                let total = self.layout.split(main.scratch, &self.shape, 1);
                for w in (first + 1..=last).filter(|&w| line.has_rest(w)) {
                    let rest = self.layout.split(worker(w).scratch, &self.shape, 0);
                    total.meet(&self.kernels, &rest, item.rows * item.heads);
                }
                main.write(item, &total);
            }
        });
        Ok(())
    }

    /// kv heads that a worker takes through a tile together, as many as the scratch holds at `row_block` rows each. Where
    /// the heads of a token lie side by side, this walks memory in order; short work is cut finer instead.
    fn head_block(&self, step: &Step, total: u64, row_block: usize) -> usize {
        let heads = self.desc.kv_heads as usize;
        let paged = self.desc.kv_layout != KvLayout::Strided;
        let side_by_side = step.k_stride[2] < step.k_stride[1] || paged;
        let tiles = total / heads as u64;
        if !side_by_side || tiles < TILES_TO_BLOCK * self.threads as u64 {
            return 1;
        }
        let together = (self.shape.states().rows / row_block).clamp(1, heads);
        heads.div_ceil(heads.div_ceil(together))
    }
}

fn shape(desc: &AttentionDesc, tilted: bool) -> Shape {
    let group = desc.group() as usize;
    let row_block = (group.saturating_mul(desc.max_query_tokens as usize)).min(ROW_BLOCK);
    let heads = desc.kv_heads as usize;
    let row_bytes = 4 * (desc.head_dim_v as usize).next_multiple_of(16);
    let together = (STATE_BYTES / (row_bytes * row_block)).clamp(1, heads);
    let head_block = heads.div_ceil(heads.div_ceil(together));
    let scale = f64::from(desc.effective_scale());
    Shape {
        q_heads: desc.q_heads as usize,
        group,
        row_block,
        head_block,
        dim_qk: desc.head_dim_qk as usize,
        dim_v: desc.head_dim_v as usize,
        size: [desc.k_dtype.size(), desc.v_dtype.size()],
        element: [element(desc.q_dtype), element(desc.k_dtype), element(desc.v_dtype)],
        factor: split(if tilted { 1.0 } else { scale.abs() } * std::f64::consts::LOG2_E),
        negate: scale < 0.0,
        widen_above: WIDEN_ABOVE,
        tilt: tilted.then_some(desc.effective_scale().abs()),
    }
}

/// `x` as a sum of two floats.
fn split(x: f64) -> [f32; 2] {
    let high = x as f32;
    [high, (x - f64::from(high)) as f32]
}
