//! Copies of a shard's keys and values, packed [token, kv head, dim], for those who attend them elsewhere.

use std::ops::Range;

use super::backend::CpuBackend;
use super::rows::Rows;
use super::sequences::Reader;
use super::tile::TILE;
use crate::attention::Step;
use crate::device::Workers;
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
}

/// Where packed rows go, one kind of tensor.
#[derive(Clone, Copy)]
struct Target {
    data: *mut u8,
    heads: usize,
    dim: usize,
    size: usize,
    /// Byte strides of the source: head, element.
    stride: [i64; 2],
}

// SAFETY: every worker writes tokens of its own.
unsafe impl Sync for Target {}

impl Target {
    /// Copies the token whose kv head 0 is at `from` to place `token`.
    ///
    /// # Safety
    /// Source and target are valid for a token.
    unsafe fn put(&self, token: usize, from: *const u8) {
        let row = self.dim * self.size;
        let [head_stride, stride] = self.stride;
        // SAFETY: as the caller vouches; strides are those of the source.
        unsafe {
            let to = self.data.add(token * self.heads * row);
            if stride == self.size as i64 && (head_stride == row as i64 || self.heads == 1) {
                return std::ptr::copy_nonoverlapping(from, to, self.heads * row);
            }
            for head in 0..self.heads {
                let (from, to) = (from.offset(head as isize * head_stride as isize), to.add(head * row));
                for i in 0..self.dim {
                    let from = from.offset(i as isize * stride as isize);
                    std::ptr::copy_nonoverlapping(from, to.add(i * self.size), self.size);
                }
            }
        }
    }
}

impl CpuBackend {
    /// Reads and checks the sequences of a step, as [`CpuBackend::attend`] does. Gives the first with bad data.
    pub fn survey(&self, step: &Step, held: &mut [Held]) -> Result<Option<DataFault>> {
        let mut scratch = self.scratch.lock();
        let Some(sequences) = scratch.sequences.get_mut(..step.args.batch as usize).filter(|s| s.len() == held.len())
        else {
            return Err(Error::invalid("batch", step.args.batch, format!("{}, at most the plan's", held.len())));
        };
        let fault = Reader { desc: &self.desc, shard: self.shard, step }.sequences(sequences);
        for (held, sequence) in held.iter_mut().zip(&*sequences) {
            *held = Held {
                first_token: sequence.first_token,
                tokens: sequence.tokens,
                keys: sequence.fault.is_none().then_some(sequence.keys),
                start: sequence.start,
            };
        }
        Ok(fault.map(|(first, cause)| DataFault { sequence: first as i32, cause }))
    }

    /// Packs the keys and values of sequence `b` of the step that was surveyed last, on all workers. `k` and `v` are as
    /// long as its keys take.
    pub fn pack(&self, step: &Step, workers: &Workers, b: usize, k: &mut [u8], v: &mut [u8]) -> Result<()> {
        let scratch = self.scratch.lock();
        let Some(sequence) = scratch.sequences.get(b) else {
            return Err(Error::invalid("b", b, format!("below {}", scratch.sequences.len())));
        };
        let desc = &self.desc;
        let [k_size, v_size] = self.shape.size;
        let heads = desc.kv_heads as usize;
        let target = |data: &mut [u8], dim: usize, size: usize, stride: &[i64; 4]| -> Result<Target> {
            let wanted = sequence.keys * heads * dim * size;
            if data.len() != wanted {
                return Err(Error::invalid("packed keys or values", data.len(), format!("{wanted} bytes")));
            }
            Ok(Target { data: data.as_mut_ptr(), heads, dim, size, stride: [stride[2], stride[3]] })
        };
        let k = target(k, self.shape.dim_qk, k_size, &step.k_stride)?;
        let v = target(v, self.shape.dim_v, v_size, &step.v_stride)?;
        let part = |slots: Range<usize>| {
            let mut rows = Rows::EMPTY;
            for slot in slots.clone().step_by(TILE) {
                let keys = TILE.min(slots.end - slot);
                rows.fill(desc, step, b, sequence, slot, keys);
                for t in 0..keys {
                    // SAFETY: slots within the checked length; the caller of the step vouches for its memory, and the
                    // targets have room for all of them.
                    unsafe {
                        k.put(slot + t, rows.k[t]);
                        v.put(slot + t, rows.v[t]);
                    }
                }
            }
        };
        let (keys, threads) = (sequence.keys, workers.threads());
        workers.run(&|w| part(w * keys / threads..(w + 1) * keys / threads))
    }

    /// Copies the global positions of the keys of sequence `b` (explicit placement).
    pub fn pack_positions(&self, step: &Step, b: usize, to: &mut [i32]) {
        let first = b as i64 * step.kv_position_stride(&self.desc);
        for (slot, to) in to.iter_mut().enumerate() {
            // SAFETY: the caller of the step vouches for as many positions as the sequence has keys.
            *to = unsafe { *step.args.kv_position.offset((first + slot as i64) as isize) };
        }
    }
}
