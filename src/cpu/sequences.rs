//! The sequences of a step: what their lengths, starts, tables and positions say, checked before any address is formed.

use crate::attention::placement::interleaved_position;
use crate::attention::{AttentionDesc, KvLayout, Placement, Shard, Step};
use crate::partial::DataFaultCause;

/// One sequence of a step, as read and checked.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sequence {
    /// Its first query token.
    pub first_token: usize,
    /// Its query tokens.
    pub tokens: usize,
    /// Local slots that some query token may see: 0 up to here.
    pub keys: usize,
    /// Contiguous placement: global position of local slot 0.
    pub start: i64,
    /// Global position of its first query token, where none are given one by one.
    pub first_position: i64,
    /// Its first entry in the page table.
    pub first_page: i64,
    /// Where its work begins in the flat line of all work.
    pub begin: u64,
    /// What was wrong with it; it then has rows but no keys.
    pub fault: Option<DataFaultCause>,
}

/// Reads a step's int32 inputs. The caller of the step vouches that they hold what the step's fields say.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    /// The shape.
    pub desc: &'a AttentionDesc,
    /// This rank.
    pub shard: Shard,
    /// The step.
    pub step: &'a Step,
}

fn read(pointer: *const i32, index: i64) -> i32 {
    // SAFETY: `Step::new` checked the pointer; the caller of the step vouches for the elements, and every index here is
    // within what the step's fields say.
    unsafe { *pointer.offset(index as isize) }
}

impl Reader<'_> {
    /// Fills `out[..batch]`. Gives the first faulty sequence, if any.
    pub fn sequences(&self, out: &mut [Sequence]) -> Option<(usize, DataFaultCause)> {
        let mut first = None;
        let mut taken = 0;
        for (b, out) in out.iter_mut().enumerate() {
            let mut sequence = Sequence::default();
            let checked =
                self.queries(b, &mut taken, &mut sequence).and_then(|()| self.keys_and_positions(b, &mut sequence));
            if let Err(cause) = checked {
                sequence.keys = 0;
                sequence.fault = Some(cause);
                first = first.or(Some((b, cause)));
            }
            *out = sequence;
        }
        first
    }

    /// The query tokens of sequence `b`; `taken` is where the sequences before it end, so that no token has two owners.
    fn queries(&self, b: usize, taken: &mut i64, out: &mut Sequence) -> Result<(), DataFaultCause> {
        let args = &self.step.args;
        let all = i64::from(args.query_tokens);
        if args.query_start.is_null() {
            out.tokens = (args.query_tokens / args.batch) as usize;
            out.first_token = b * out.tokens;
            return Ok(());
        }
        let begin = i64::from(read(args.query_start, b as i64));
        let end = i64::from(read(args.query_start, b as i64 + 1));
        let good = begin >= *taken && end >= begin && end <= all;
        // A faulty sequence still owns the rows that it names and nobody before it does.
        let (begin, end) = (begin.clamp(*taken, all), end.clamp(*taken, all));
        out.first_token = begin as usize;
        out.tokens = (end - begin).max(0) as usize;
        *taken = end.max(*taken);
        if good { Ok(()) } else { Err(DataFaultCause::QueryStart) }
    }

    fn keys_and_positions(&self, b: usize, out: &mut Sequence) -> Result<(), DataFaultCause> {
        let keys = self.length(b, out)?;
        if keys == 0 || out.tokens == 0 {
            return Ok(());
        }
        self.pages(keys, out)?;
        out.keys = keys as usize;
        if self.desc.causal {
            self.positions(b, keys, out)?;
            if self.desc.placement != Placement::Explicit {
                out.keys = (0..out.tokens).map(|i| self.limit(out, i, keys as usize)).max().unwrap_or(0);
            }
        }
        Ok(())
    }

    /// The tokens that sequence `b` holds here, and where its pages begin.
    fn length(&self, b: usize, out: &mut Sequence) -> Result<i64, DataFaultCause> {
        let (args, b) = (&self.step.args, b as i64);
        let page = i64::from(self.desc.page_size);
        let mut room = self.step.kv_capacity;
        match self.desc.kv_layout {
            KvLayout::Strided => {}
            KvLayout::BlockTable => out.first_page = b * i64::from(args.max_pages),
            KvLayout::CsrPages => {
                let (begin, end) = (i64::from(read(args.page_indptr, b)), i64::from(read(args.page_indptr, b + 1)));
                if begin < 0 || end < begin || end > args.num_page_indices {
                    return Err(DataFaultCause::PageRow);
                }
                out.first_page = begin;
                if !args.last_page_len.is_null() && end > begin {
                    let last = i64::from(read(args.last_page_len, b));
                    if last < 1 || last > page {
                        return Err(DataFaultCause::PageRow);
                    }
                    let keys = (end - begin - 1) * page + last;
                    return if keys > room { Err(DataFaultCause::KvLength) } else { Ok(keys) };
                }
                room = room.min((end - begin) * page);
            }
        }
        if args.kv_length.is_null() {
            return Ok(0);
        }
        let keys = i64::from(read(args.kv_length, b));
        if keys < 0 || keys > room { Err(DataFaultCause::KvLength) } else { Ok(keys) }
    }

    /// Every page in use exists.
    fn pages(&self, keys: i64, sequence: &Sequence) -> Result<(), DataFaultCause> {
        let args = &self.step.args;
        let table = match self.desc.kv_layout {
            KvLayout::Strided => return Ok(()),
            KvLayout::BlockTable => args.block_table,
            KvLayout::CsrPages => args.page_indices,
        };
        let used = (keys + i64::from(self.desc.page_size) - 1) / i64::from(self.desc.page_size);
        let bad = (sequence.first_page..sequence.first_page + used)
            .any(|entry| !(0..args.num_pages).contains(&read(table, entry)));
        if bad { Err(DataFaultCause::Page) } else { Ok(()) }
    }

    /// Reads and checks the global positions that causality needs.
    fn positions(&self, b: usize, keys: i64, out: &mut Sequence) -> Result<(), DataFaultCause> {
        let args = &self.step.args;
        let limit = i64::from(i32::MAX);
        if args.query_position.is_null() {
            out.first_position = i64::from(read(args.global_length, b as i64)) - out.tokens as i64;
            if out.first_position < 0 {
                return Err(DataFaultCause::Position);
            }
        } else if (0..out.tokens).any(|i| self.position(out, i) < 0) {
            return Err(DataFaultCause::Position);
        }
        match self.desc.placement {
            Placement::Contiguous => {
                out.start = if args.kv_start.is_null() { 0 } else { i64::from(read(args.kv_start, b as i64)) };
                if out.start < 0 || out.start + keys - 1 > limit {
                    return Err(DataFaultCause::Position);
                }
            }
            Placement::Interleaved { run } => {
                if interleaved_position(i64::from(run), self.shard, keys - 1) > limit {
                    return Err(DataFaultCause::Position);
                }
            }
            Placement::Explicit => {
                let row = self.position_row(b);
                if (0..keys).any(|slot| read(args.kv_position, row + slot) < 0) {
                    return Err(DataFaultCause::Position);
                }
            }
        }
        Ok(())
    }

    fn position_row(&self, b: usize) -> i64 {
        b as i64 * self.step.kv_position_stride(self.desc)
    }

    /// The global position of query token `i` of a sequence.
    fn position(&self, sequence: &Sequence, i: usize) -> i64 {
        let args = &self.step.args;
        if args.query_position.is_null() {
            sequence.first_position + i as i64
        } else {
            i64::from(read(args.query_position, (sequence.first_token + i) as i64))
        }
    }

    /// How many of the first `keys` slots query token `i` sees, where positions rise with the slot.
    fn limit(&self, sequence: &Sequence, i: usize, keys: usize) -> usize {
        let position = self.position(sequence, i);
        let seen = match self.desc.placement {
            Placement::Contiguous => position - sequence.start + 1,
            Placement::Interleaved { run } => {
                let (run, world, rank) = (i64::from(run), i64::from(self.shard.world), i64::from(self.shard.rank));
                let (round, length) = (run * world, position + 1);
                length / round * run + (length % round - rank * run).clamp(0, run)
            }
            Placement::Explicit => keys as i64,
        };
        seen.clamp(0, keys as i64) as usize
    }

    /// Which of `keys` <= 64 slots from `slot` on query token `i` of sequence `b` sees: bit t is slot + t.
    pub fn visible(&self, b: usize, sequence: &Sequence, i: usize, slot: usize, keys: usize) -> u64 {
        if !self.desc.causal {
            return low_bits(keys);
        }
        if self.desc.placement == Placement::Explicit {
            let (row, position) = (self.position_row(b) + slot as i64, self.position(sequence, i));
            let seen = |t: usize| i64::from(read(self.step.args.kv_position, row + t as i64)) <= position;
            return (0..keys).fold(0, |mask, t| mask | u64::from(seen(t)) << t);
        }
        low_bits(self.limit(sequence, i, slot + keys).saturating_sub(slot))
    }
}

/// The lowest `n` <= 64 bits.
pub fn low_bits(n: usize) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}
