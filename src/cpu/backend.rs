//! The backend: a plan's share of the work on the CPU.

use parking_lot::Mutex;

use super::isa::Isa;
use super::kernel::table::Kernels;
use super::partition::Partition;
use super::sequences::{Reader, Sequence};
use super::shape::{Layout, Shape, SumsOf};
use super::slice;
use super::worker::{Output, Worker};
use crate::attention::{
    AttentionDesc, Capabilities, Dtype, KvLayout, MAX_HEAD_DIM, MaskKind, QueryInput, Reproducibility, Shard, Step,
    supported,
};
use crate::device::{Executor, HostBuffer};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::{DataFault, Lse, PartialRows, sinks};

/// Tiles a worker should have before the kv heads of a tile are kept together.
const TILES_TO_BLOCK: u64 = 8;

/// What the CPU backend serves.
pub const CAPABILITIES: Capabilities = Capabilities {
    suffix: "",
    kv_dtypes: &Dtype::ALL,
    head_dim_multiple: 1,
    max_head_dim: MAX_HEAD_DIM,
    wide: None,
    window: true,
    softcap: true,
    alibi: true,
    sinks: true,
    scales: true,
    checked: true,
    pages_by_head: true,
    masks: &MaskKind::ALL,
    query_inputs: &QueryInput::ALL,
    reproducibility: &[Reproducibility::Repeatable],
};

/// Attention over one rank's shard on the threads of an [`Executor`].
///
/// Owns all scratch that a step needs; its size depends on heads, dimensions, threads and batch, not on the KV length.
///
/// What takes a [`Step`] reads the memory that it points at, and is unsafe: the step is no more than addresses, and only who
/// made it from an engine's arguments knows how long these are good.
#[derive(Debug)]
pub struct CpuBackend {
    pub(super) desc: AttentionDesc,
    pub(super) shard: Shard,
    most_threads: usize,
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

/// The scratch of all workers.
#[derive(Clone, Copy)]
struct ScratchBase(*mut f32);

// SAFETY: an address. Workers write through it, each to its own part ([`Layout::floats`] apart).
unsafe impl Sync for ScratchBase {}

impl CpuBackend {
    /// The backend of a checked shape for at most `threads` threads. Errors: `Unsupported` by field, `Unavailable` where the
    /// machine lacks `isa`, `NoMemory`.
    pub fn new(desc: &AttentionDesc, shard: Shard, threads: usize, isa: Isa) -> Result<CpuBackend> {
        CpuBackend::of(desc, shard, threads, isa, false)
    }

    /// As [`CpuBackend::new`], for steps that have a zeta (and for no others).
    pub fn for_energy(desc: &AttentionDesc, shard: Shard, threads: usize, isa: Isa) -> Result<CpuBackend> {
        CpuBackend::of(desc, shard, threads, isa, true)
    }

    fn of(desc: &AttentionDesc, shard: Shard, threads: usize, isa: Isa, with_zeta: bool) -> Result<CpuBackend> {
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
        let shape = Shape::new(desc, with_zeta);
        let too_large = || Error::new(ErrorKind::NoMemory, "cpu scratch: its size does not fit the address space");
        let layout = Layout::of(&shape).ok_or_else(too_large)?;
        let bytes = layout.floats.checked_mul(size_of::<f32>() * threads).ok_or_else(too_large)?;
        let mut sequences = Vec::new();
        sequences
            .try_reserve_exact(desc.max_batch as usize)
            .map_err(|_| Error::new(ErrorKind::NoMemory, format!("max_batch: no memory for {}", desc.max_batch)))?;
        sequences.resize(desc.max_batch as usize, Sequence::default());
        let scratch = Mutex::new(Scratch { floats: HostBuffer::new(bytes)?, sequences });
        Ok(CpuBackend { desc: *desc, shard, most_threads: threads, kernels, shape, layout, scratch })
    }

    /// Bytes of scratch.
    pub fn memory(&self) -> usize {
        let scratch = self.scratch.lock();
        scratch.floats.len() + scratch.sequences.capacity() * size_of::<Sequence>()
    }

    /// Attends the shard: writes the partial of every row of the step, row = query token * q heads + head. Blocks until
    /// done; allocates nothing. `executor` has at most as many threads as the backend was made for, and as many
    /// parts is the work cut into.
    ///
    /// A sequence with bad data has NaN rows and is reported (the first one); rows of no sequence are the identity. Errors:
    /// `InvalidArgument` for rows or threads of the wrong number, `Internal` for a panic in a worker, `Executor`.
    ///
    /// # Safety
    /// The step was made by [`Step::new`], or for tensors of as many bytes as that asks for, from the backend's descriptor. Its
    /// inputs are host memory that holds what its fields say, stays valid, and is written by nobody until this returns. Its
    /// output is not touched.
    pub unsafe fn attend(
        &self,
        step: &Step,
        executor: &dyn Executor,
        rows: PartialRows<'_>,
    ) -> Result<Option<DataFault>> {
        // SAFETY: this function was promised the same of the step.
        unsafe { self.attend_shard(self.shard, step, executor, rows) }
    }

    /// As [`CpuBackend::attend`], over keys that `shard` holds.
    ///
    /// # Safety
    /// As [`CpuBackend::attend`].
    pub unsafe fn attend_shard(
        &self,
        shard: Shard,
        step: &Step,
        executor: &dyn Executor,
        rows: PartialRows<'_>,
    ) -> Result<Option<DataFault>> {
        let count = step.args.query_tokens as usize * self.shape.q_heads;
        if executor.threads() > self.most_threads {
            let wanted = format!("at most {} threads", self.most_threads);
            return Err(Error::invalid("executor", executor.threads(), wanted));
        }
        if step.zeta.data.is_null() == self.shape.mods.is_biased() {
            return Err(Error::new(ErrorKind::Internal, "step: with a zeta in a plan without, or the other way round"));
        }
        if rows.dim != self.shape.kv[1].dim || rows.lse.len() != count || rows.o.len() != count * rows.dim {
            let found = format!("{} o, {} lse, dim {}", rows.o.len(), rows.lse.len(), rows.dim);
            return Err(Error::invalid("rows", found, format!("{count} rows of {}", self.shape.kv[1].dim)));
        }
        let mut scratch = self.scratch.lock();
        let Scratch { floats, sequences } = &mut *scratch;
        let Some(sequences) = sequences.get_mut(..step.args.batch as usize) else {
            return Err(Error::invalid("batch", step.args.batch, format!("at most {}", self.desc.max_batch)));
        };
        rows.o.fill(0.0);
        rows.lse.fill(Lse::EMPTY);
        // SAFETY: the step was made from this descriptor, and its inputs hold what its fields say until this function returns,
        // which outlives the reader: that is what this function was promised. `sequences` has an element for each of the batch.
        let reader = unsafe { Reader::new(&self.desc, shard, step) };
        let fault = reader.sequences(sequences);
        let (heads, group) = (self.desc.kv_heads as usize, self.shape.group);
        let most = sequences.iter().map(|s| s.tokens * group).max().unwrap_or(0);
        let row_block = most.clamp(1, self.shape.row_block);
        let total = Partition::measure(sequences, heads, group, row_block);
        if total > 0 {
            let partition = Partition {
                sequences,
                total,
                workers: executor.threads(),
                heads,
                head_block: self.head_block(step, total, row_block, executor.threads()),
                group,
                row_block,
            };
            let output = Output { o: rows.o.as_mut_ptr(), lse: rows.lse.as_mut_ptr(), dim: rows.dim };
            // SAFETY: the reader's step is readable, as above; `floats` has `layout.floats` for each of at most `most_threads`
            // workers, which the executor was checked not to exceed, and is locked; `rows` was checked to have every row.
            unsafe { self.run(reader, &partition, ScratchBase(floats.as_mut_ptr().cast()), output, executor) }?;
        }
        if self.desc.sinks && sinks::belong_to(shard.rank) {
            // SAFETY: the descriptor has sinks, and the step's inputs are readable, as this function was promised.
            unsafe { self.merge_sinks(step, sequences, rows.o, rows.lse) };
        }
        let Some(fault) = fault else { return Ok(None) };
        for sequence in sequences.iter().filter(|s| s.fault.is_some()) {
            let bad = sequence.first_token * self.shape.q_heads;
            let bad = bad..bad + sequence.tokens * self.shape.q_heads;
            rows.o[bad.start * rows.dim..bad.end * rows.dim].fill(f32::NAN);
            rows.lse[bad].fill(Lse::NAN);
        }
        Ok(Some(fault))
    }

    /// Merges the sinks into the rows of all sequences; rows of none stay as they are.
    ///
    /// # Safety
    /// The step is one of a plan with sinks, readable as for [`CpuBackend::attend`].
    unsafe fn merge_sinks(&self, step: &Step, sequences: &[Sequence], o: &mut [f32], lse: &mut [Lse]) {
        let (heads, dim) = (self.shape.q_heads, self.shape.kv[1].dim);
        for sequence in sequences {
            for row in sequence.first_token * heads..(sequence.first_token + sequence.tokens) * heads {
                // SAFETY: the remainder is a query head of the plan, and `Step::new` checked that the sinks have a number for
                // each; their memory is among the inputs that this function was promised to be readable.
                let sink = unsafe { step.sinks.get(row % heads, f32::NEG_INFINITY) };
                sinks::merge_sink(&mut o[row * dim..][..dim], &mut lse[row], sink);
            }
        }
    }

    /// Has every worker do its slice, and merges the items that several of them began or ended.
    ///
    /// # Safety
    /// The reader's step is readable as for [`CpuBackend::attend`]. `base` has `layout.floats` for each of the executor's
    /// threads, used by nobody else; `output` has every row of the step.
    unsafe fn run(
        &self,
        reader: Reader<'_>,
        partition: &Partition<'_>,
        base: ScratchBase,
        output: Output,
        executor: &dyn Executor,
    ) -> Result<()> {
        let (shape, kernels, layout) = (&self.shape, &self.kernels, &self.layout);
        let worker = |w: usize| {
            let base = &base;
            let scratch = base.0.wrapping_add(w * layout.floats);
            Worker { shape, kernels, reader, partition, layout, scratch, output }
        };
        // SAFETY: `w` is below the executor's threads, so that `worker(w)` has scratch of its own; the step is readable and the
        // output whole, as this function was promised; slices are apart, so that no row is written twice.
        executor.run(&|w| unsafe { slice::run(&worker(w), w) })?;
        partition.shared_items(|item, first, last| {
            let main = worker(first);
            // SAFETY: the workers are done. The first left the beginning of the item in its scratch, those after it that
            // begin inside the item its end; nobody else writes the item's rows.
            unsafe {
                let sums = layout.sums(main.scratch, shape, SumsOf::Beginning);
                for w in (first + 1..=last).filter(|&w| partition.begins_inside(w)) {
                    let more = layout.sums(worker(w).scratch, shape, SumsOf::End);
                    sums.merge(&more, item.rows * item.heads);
                }
                main.write(item, &sums);
            }
        });
        Ok(())
    }

    /// kv heads that a worker takes through a tile together, as many as the scratch holds at `row_block` rows each. Where
    /// the heads of a token lie side by side, this walks memory in order; short work is cut finer instead. Heads are taken one by
    /// one where they see keys of their own, and in a transposed cache, where each element of a head is on a page of its own:
    /// translations of the pages of all heads would not outlast a tile.
    fn head_block(&self, step: &Step, total: u64, row_block: usize, threads: usize) -> usize {
        let heads = self.desc.kv_heads as usize;
        let paged = self.desc.kv_layout != KvLayout::Strided;
        if step.mask.is_some_and(|mask| mask.is_by_head()) || step.lists_by_head() {
            return 1;
        }
        let is_transposed = |stride: [i64; 4]| stride[3] > stride[1];
        if is_transposed(step.k_stride) || is_transposed(step.v_stride) {
            return 1;
        }
        let side_by_side = step.k_stride[2] < step.k_stride[1] || paged;
        let tiles = total / heads as u64;
        if !side_by_side || tiles < TILES_TO_BLOCK * threads as u64 {
            return 1;
        }
        let together = (self.shape.sums().rows / row_block).clamp(1, heads);
        heads.div_ceil(heads.div_ceil(together))
    }
}
