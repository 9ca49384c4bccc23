//! What a rank tells its peers of the sequences of a step, in a plan whose steps are checked.

use super::backend::CpuBackend;
use super::sequences::{Reader, Sequence};
use crate::attention::record::{SequenceRecord, add_powers, mixed};
use crate::attention::{KeyPositions, Placement, Step};
use crate::error::{Error, Result};

impl CpuBackend {
    /// Fills the records of the step that was attended or surveyed last.
    ///
    /// # Safety
    /// As [`CpuBackend::attend`], for the very step that was attended or surveyed last, whose inputs have not changed since.
    pub unsafe fn records(&self, step: &Step, out: &mut [SequenceRecord]) -> Result<()> {
        let scratch = self.scratch.lock();
        let Some(sequences) = scratch.sequences.get(..step.args.batch as usize).filter(|s| s.len() == out.len()) else {
            return Err(Error::invalid("batch", step.args.batch, format!("{}, at most the plan's", out.len())));
        };
        // SAFETY: the step was made from this descriptor, and its inputs are readable until this function returns, as it was
        // promised; `sequences` was filled for this very step.
        let reader = unsafe { Reader::new(&self.desc, self.shard, step) };
        for (b, (out, sequence)) in out.iter_mut().zip(sequences).enumerate() {
            *out = if sequence.fault.is_none() { record(&reader, b, sequence) } else { faulty(sequence) };
        }
        Ok(())
    }
}

fn faulty(sequence: &Sequence) -> SequenceRecord {
    let (first_token, tokens) = (sequence.first_token as i32, sequence.tokens as i32);
    SequenceRecord { first_token, tokens, keys: -1, ..SequenceRecord::default() }
}

fn record(reader: &Reader<'_>, b: usize, sequence: &Sequence) -> SequenceRecord {
    let (desc, length) = (reader.desc(), reader.global_length(b));
    let position = |i: usize| reader.query_position(sequence, i, length);
    let mut record = SequenceRecord {
        query: queries(reader, sequence),
        query_position: (0..sequence.tokens)
            .map(|i| mixed(i as u64, u64::from(position(i).cast_unsigned())))
            .fold(0, u64::wrapping_add),
        global_length: length,
        keys: sequence.held as i32,
        ..faulty(sequence)
    };
    match (desc.placement, reader.key_positions(b, &Sequence { start: reader.start(b), ..*sequence }, 0)) {
        (_, KeyPositions::Contiguous { start }) => record.start = start,
        (Placement::Explicit, KeyPositions::Explicit { positions }) => {
            record.keys = 0;
            for &position in positions.iter().filter(|&&position| (0..length).contains(&position)) {
                record.keys += 1;
                add_powers(&mut record.powers, u64::from(position.unsigned_abs()));
            }
            record.start = sequence.held as i64 - i64::from(record.keys);
        }
        _ => {}
    }
    if desc.surplus_keys && desc.placement != Placement::Explicit {
        let last = (0..sequence.tokens).map(position).max().unwrap_or(-1);
        record.powers[0] = u64::from(last.saturating_add(1).max(0).cast_unsigned());
    }
    record
}

/// The sum over the query rows of a sequence, whatever their strides.
fn queries(reader: &Reader<'_>, sequence: &Sequence) -> u64 {
    let (desc, step) = (reader.desc(), reader.step());
    let (heads, dim, size) = (desc.q_heads as usize, desc.head_dim_qk as usize, desc.q_dtype.size());
    let words = (dim * size).div_ceil(8);
    let mut sum = 0u64;
    for row in 0..sequence.tokens * heads {
        let (token, head) = (sequence.first_token + row / heads, row % heads);
        let offset = token as i64 * step.q_stride[0] + head as i64 * step.q_stride[1];
        let data = step.args.q.data.cast::<u8>().wrapping_offset(offset as isize);
        for word in 0..words {
            // SAFETY: a query token that the sequence was found to own, so one of the step's, and a query head: `Step::new`
            // checked that the rows of all of them lie inside q's bytes, which `Reader::new` was promised to be readable.
            let bits = unsafe { load_word(data, step.q_stride[2], dim, size, word) };
            sum = sum.wrapping_add(mixed((row * words + word) as u64, bits));
        }
    }
    sum
}

/// Word `word` of a row of `dim` elements of `size` bytes, `stride` apart: 8 bytes of elements, the last filled up with
/// zeros.
///
/// # Safety
/// `row` has `dim` such elements.
#[inline]
unsafe fn load_word(row: *const u8, stride: i64, dim: usize, size: usize, word: usize) -> u64 {
    let first = word * (8 / size);
    let count = (8 / size).min(dim - first);
    if stride == size as i64 && count * size == 8 {
        // SAFETY: eight bytes of elements that lie side by side, inside the row; aligned or not.
        return unsafe { row.add(first * size).cast::<u64>().read_unaligned() };
    }
    let mut bits = 0;
    for i in 0..count {
        let element = row.wrapping_offset((first + i) as isize * stride as isize);
        // SAFETY: an element of the row, aligned or not.
        let value = unsafe {
            match size {
                2 => u64::from(element.cast::<u16>().read_unaligned()),
                _ => u64::from(element.cast::<u32>().read_unaligned()),
            }
        };
        bits |= value << (8 * size * i);
    }
    bits
}
