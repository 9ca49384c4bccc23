//! Copies of a shard's keys and values, packed [token, kv head, dim], for those who attend them elsewhere.

use std::ops::Range;

use super::backend::CpuBackend;
use super::kernel::args::TILE;
use super::rows::Rows;
use super::sequences::Reader;
use super::shape::RowFormat;
use crate::attention::Step;
use crate::device::Executor;
use crate::error::{Error, Result};
use crate::partial::DataFault;

/// What a rank holds of one sequence of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// First query token.
    pub first_token: usize,
    /// Query tokens.
    pub tokens: usize,
    /// Keys that some query token may see: local slots 0 up to here. None: the sequence has bad data.
    pub keys: Option<usize>,
    /// Contiguous placement, where positions matter: global position of local slot 0.
    pub start: i64,
    /// Without keys here: what is wrong with the positions of its query tokens, should other ranks have keys.
    pub idle_fault: Option<DataFault>,
}

/// Where packed rows of keys or values go.
#[derive(Clone, Copy)]
struct Target {
    data: *mut u8,
    heads: usize,
    row: RowFormat,
    /// Byte strides of the source: head, block of the format.
    stride: [i64; 2],
}

// SAFETY: an address and numbers. Workers write through it, each the tokens of its own range.
unsafe impl Sync for Target {}

impl Target {
    /// Copies kv heads `heads` of the token whose kv head 0 is at `from` to token `token` of the target.
    ///
    /// # Safety
    /// `from` is readable for kv heads `heads` of a token, as the source's strides say; the target has that token, of which
    /// nobody else writes these heads, and shares no byte with the source.
    unsafe fn put(&self, token: usize, heads: Range<usize>, from: *const u8) {
        let (format, dim) = (self.row.format, self.row.dim);
        let bytes = format.row_bytes(dim);
        let [head_stride, stride] = self.stride;
        // SAFETY: `to` is the token of the target, `heads` rows of `bytes` each; every read and write below is of a head
        // in `heads` of one of the two, all of which this function was promised.
        unsafe {
            let to = self.data.add(token * self.heads * bytes);
            let all = heads == (0..self.heads);
            if all && format.is_packed(stride) && (head_stride == bytes as i64 || self.heads == 1) {
                return std::ptr::copy_nonoverlapping(from, to, self.heads * bytes);
            }
            for head in heads {
                let from = from.offset(head as isize * head_stride as isize);
                format.pack_row(from, stride, dim, to.add(head * bytes));
            }
        }
    }
}

impl CpuBackend {
    /// Reads and checks the sequences of a step, as [`CpuBackend::attend`] does. Gives the first with bad data.
    ///
    /// # Safety
    /// As [`CpuBackend::attend`].
    pub unsafe fn survey(&self, step: &Step, held: &mut [Held]) -> Result<Option<DataFault>> {
        let mut scratch = self.scratch.lock();
        let Some(sequences) = scratch.sequences.get_mut(..step.args.batch as usize).filter(|s| s.len() == held.len())
        else {
            return Err(Error::invalid("batch", step.args.batch, format!("{}, at most the plan's", held.len())));
        };
        // SAFETY: the step was made from this descriptor, and its inputs are readable until this function returns, as it was
        // promised; `sequences` has an element for each of the batch.
        let reader = unsafe { Reader::new(&self.desc, self.shard, step) };
        let fault = reader.sequences(sequences);
        for (b, (held, sequence)) in held.iter_mut().zip(&*sequences).enumerate() {
            *held = Held {
                first_token: sequence.first_token,
                tokens: sequence.tokens,
                keys: sequence.fault.is_none().then_some(sequence.visible.hi),
                start: sequence.start,
                idle_fault: reader.idle_positions(b, sequence),
            };
        }
        Ok(fault)
    }

    /// Packs the keys and values of sequence `b` of the step that was surveyed last, on all threads. `k` and `v` are as
    /// long as its keys take.
    ///
    /// # Safety
    /// As [`CpuBackend::attend`], for the very step that was surveyed last, whose lengths and tables have not changed since.
    pub unsafe fn pack(
        &self,
        step: &Step,
        executor: &dyn Executor,
        b: usize,
        k: &mut [u8],
        v: &mut [u8],
    ) -> Result<()> {
        let scratch = self.scratch.lock();
        let Some(sequence) = scratch.sequences.get(b) else {
            return Err(Error::invalid("b", b, format!("below {}", scratch.sequences.len())));
        };
        let (keys, heads) = (sequence.visible.hi, self.desc.kv_heads as usize);
        let target = |data: &mut [u8], row: RowFormat, stride: &[i64; 4]| -> Result<Target> {
            let wanted = keys * heads * row.format.row_bytes(row.dim);
            if data.len() != wanted {
                return Err(Error::invalid("packed keys or values", data.len(), format!("{wanted} bytes")));
            }
            Ok(Target { data: data.as_mut_ptr(), heads, row, stride: [stride[2], stride[3]] })
        };
        let k = target(k, self.shape.kv[0], &step.k_stride)?;
        let v = target(v, self.shape.kv[1], &step.v_stride)?;
        // SAFETY: as in `survey`, which filled `sequence` for this step.
        let reader = unsafe { Reader::new(&self.desc, self.shard, step) };
        let part = |slots: Range<usize>| {
            let mut rows = Rows::EMPTY;
            let by_head = step.args.page_index_head_stride != 0;
            let lists = if by_head { heads } else { 1 };
            for (slot, list) in slots.clone().step_by(TILE).flat_map(|slot| (0..lists).map(move |list| (slot, list))) {
                let count = TILE.min(slots.end - slot);
                let heads = if by_head { list..list + 1 } else { 0..heads };
                // SAFETY: the slots end at or before `visible.hi`, so that the sequence holds them; `list` is a kv head.
                unsafe { rows.fill(&reader, (b, list), sequence, slot, count) };
                for t in 0..count {
                    // SAFETY: `fill` gave the rows of tokens that the sequence holds, which the survey checked to lie inside k
                    // and v; these are readable, as this function was promised. The targets were checked to have room for
                    // every key, they are borrowed exclusively and so apart from the source, and the ranges of the workers do
                    // not overlap.
                    unsafe {
                        k.put(slot + t, heads.clone(), rows.k[t]);
                        v.put(slot + t, heads.clone(), rows.v[t]);
                    }
                }
            }
        };
        let threads = executor.threads();
        executor.run(&|w| part(w * keys / threads..(w + 1) * keys / threads))
    }

    /// Copies the mask of sequence `b` of the step that was surveyed last, [query head, query token, key] without gaps; `to` is
    /// as long as that takes. Nothing where the step has no mask.
    ///
    /// # Safety
    /// As [`CpuBackend::pack`]; `tokens` and `keys`, at least 1, are at most those that the survey found for the sequence, and
    /// `to` has no more rows than query heads times `tokens`.
    pub unsafe fn pack_mask(&self, step: &Step, b: usize, tokens: usize, keys: usize, to: &mut [u8]) {
        let Some(mask) = step.mask else { return };
        let (size, stride) = (mask.element().size(), mask.slot_stride() as usize);
        for (row, to) in to.chunks_exact_mut(keys * size).enumerate() {
            let from = mask.address(b, row / tokens, row % tokens, 0);
            // SAFETY: `from` is the first of `keys` elements of a query head and a query token of the sequence: the survey found
            // the mask to have room for all of them, and the mask is among the inputs that are readable here. `to` is borrowed
            // exclusively, and so shares no byte with it.
            unsafe {
                if stride == size {
                    std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len());
                    continue;
                }
                for (key, to) in to.chunks_exact_mut(size).enumerate() {
                    std::ptr::copy_nonoverlapping(from.add(key * stride), to.as_mut_ptr(), size);
                }
            }
        }
    }

    /// Packs the scales of the keys (0) or values (1) of sequence `b` of the step that was surveyed last, f32 [key, kv head].
    /// The step has them; `to` is as long as its keys take.
    ///
    /// # Safety
    /// As [`CpuBackend::pack`].
    pub unsafe fn pack_scales(&self, step: &Step, b: usize, which: usize, to: &mut [f32]) -> Result<()> {
        let scratch = self.scratch.lock();
        let Some(sequence) = scratch.sequences.get(b) else {
            return Err(Error::invalid("b", b, format!("below {}", scratch.sequences.len())));
        };
        let (keys, heads) = (sequence.visible.hi, self.desc.kv_heads as usize);
        if to.len() != keys * heads || !step.scaled()[which] {
            return Err(Error::invalid("packed scales", to.len(), format!("{} of a step that has them", keys * heads)));
        }
        // SAFETY: as in `survey`, which filled `sequence` for this step.
        let reader = unsafe { Reader::new(&self.desc, self.shard, step) };
        let stride = [step.k_scale_stride, step.v_scale_stride][which][2];
        let mut rows = Rows::EMPTY;
        let by_head = step.args.page_index_head_stride != 0;
        let lists = if by_head { heads } else { 1 };
        for (tile, list) in (0..keys.div_ceil(TILE)).flat_map(|tile| (0..lists).map(move |list| (tile, list))) {
            let to = &mut to[tile * TILE * heads..keys.min((tile + 1) * TILE) * heads];
            // SAFETY: the slots end at or before `visible.hi`, so that the sequence holds them; `list` is a kv head.
            unsafe { rows.fill(&reader, (b, list), sequence, tile * TILE, to.len() / heads) };
            let mine = if by_head { list..list + 1 } else { 0..heads };
            for (to, scale) in to.chunks_exact_mut(heads).zip(rows.scales[which]) {
                for (head, to) in to.iter_mut().enumerate().take(mine.end).skip(mine.start) {
                    // SAFETY: `fill` gave the scale of kv head 0 of a token that the sequence holds; `Step::new` and the survey
                    // checked that the scales reach as far for all kv heads and are aligned. They are readable, as this function
                    // was promised.
                    *to = unsafe { scale.offset((head as i64 * stride) as isize).cast::<f32>().read() };
                }
            }
        }
        Ok(())
    }

    /// Copies the global positions of the keys of sequence `b` for kv head `head` (explicit placement).
    ///
    /// # Safety
    /// As [`CpuBackend::pack`], for a step of a plan that reads positions; `to` has at most as many as the sequence holds keys.
    pub unsafe fn pack_positions(&self, step: &Step, b: usize, head: usize, to: &mut [i32]) {
        let first = step.kv_position_row(&self.desc, b as i64, head as i64);
        for (slot, to) in to.iter_mut().enumerate() {
            // SAFETY: `Step::new` refused a null or unaligned `kv_position` in a plan that reads positions. The row of this
            // sequence and head begins at `first` and has a position for each key held, of which `to` has no more; the array is
            // among the inputs that are readable here.
            *to = unsafe { *step.args.kv_position.offset((first + slot as i64) as isize) };
        }
    }
}
