//! The sequences of a step: what their lengths, starts, tables and positions say, checked before any address is formed.

use crate::attention::{AttentionDesc, KeyPositions, KvLayout, Placement, Shard, Step, Visibility, VisibilityRule};
use crate::partial::{BadValue, DataFault, DataFaultCause};

/// The largest position.
const MOST: i64 = i32::MAX as i64;

/// What is wrong with a sequence.
type Bad = (DataFaultCause, BadValue);

/// One sequence of a step, as read and checked.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sequence {
    /// Its first query token.
    pub first_token: usize,
    /// Its query tokens.
    pub tokens: usize,
    /// Tokens that it holds on this rank.
    pub held: usize,
    /// Which of their slots some query token can see.
    pub visible: Visibility,
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

/// Reads a step's int32 inputs.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    desc: &'a AttentionDesc,
    shard: Shard,
    step: &'a Step,
}

/// Entry `index` of an int32 input of a reader's step. The reader asks for entries that the step's fields say are there: one a
/// sequence, or two where ranges begin and end; one a query token; table entries below the room that was checked.
fn read(pointer: *const i32, index: i64) -> i32 {
    // SAFETY: `Step::new` refused a null or unaligned pointer where a step of this shape needs the array, and arrays that may
    // be left out are asked for null before. `Reader::new` was promised that the array has the entries that the step's fields
    // say, which this is one of, and that nobody writes them.
    unsafe { *pointer.offset(index as isize) }
}

impl<'a> Reader<'a> {
    /// A reader of the step, for keys that `shard` holds.
    ///
    /// # Safety
    /// `step` was made from `desc`, and its inputs are host memory that holds what its fields say, written by nobody, as long
    /// as the reader is used. Its methods are asked about sequences of the step's batch, with what
    /// [`sequences`](Reader::sequences) filled for them.
    pub unsafe fn new(desc: &'a AttentionDesc, shard: Shard, step: &'a Step) -> Reader<'a> {
        Reader { desc, shard, step }
    }

    /// The shape.
    pub fn desc(&self) -> &'a AttentionDesc {
        self.desc
    }

    /// The step.
    pub fn step(&self) -> &'a Step {
        self.step
    }

    /// Fills `out[..batch]`. Gives the first faulty sequence, if any.
    pub fn sequences(&self, out: &mut [Sequence]) -> Option<DataFault> {
        let mut first = None;
        let mut taken = 0;
        for (b, out) in out.iter_mut().enumerate() {
            let mut sequence = Sequence::default();
            let checked =
                self.queries(b, &mut taken, &mut sequence).and_then(|()| self.keys_and_positions(b, &mut sequence));
            if let Err((cause, value)) = checked {
                (sequence.held, sequence.visible) = (0, Visibility::NONE);
                sequence.fault = Some(cause);
                first = first.or(Some(DataFault { sequence: b as i32, cause, value: Some(value) }));
            }
            *out = sequence;
        }
        first
    }

    /// The query tokens of sequence `b`; `taken` is where the sequences before it end, so that no token has two owners.
    fn queries(&self, b: usize, taken: &mut i64, out: &mut Sequence) -> Result<(), Bad> {
        let args = &self.step.args;
        let all = i64::from(args.query_tokens);
        if args.query_start.is_null() {
            out.tokens = (args.query_tokens / args.batch) as usize;
            out.first_token = b * out.tokens;
            return Ok(());
        }
        let begin = i64::from(read(args.query_start, b as i64));
        let end = i64::from(read(args.query_start, b as i64 + 1));
        let bad = if begin < *taken || begin > all {
            // Of the first sequence the begin is at fault, of each later one the end of the one before has been judged.
            Some(DataFaultCause::QueryStart.at(b as i64, begin, *taken, all))
        } else if end < begin || end > all {
            Some(DataFaultCause::QueryStart.at(b as i64 + 1, end, begin, all))
        } else {
            None
        };
        // A faulty sequence still owns the rows that it names and nobody before it does; the last one all that are left, since
        // nothing says where the padding begins.
        let is_last = b as i64 + 1 == i64::from(args.batch);
        let (begin, end) =
            (begin.clamp(*taken, all), if bad.is_some() && is_last { all } else { end.clamp(*taken, all) });
        out.first_token = begin as usize;
        out.tokens = (end - begin).max(0) as usize;
        *taken = end.max(*taken);
        bad.map_or(Ok(()), Err)
    }

    fn keys_and_positions(&self, b: usize, out: &mut Sequence) -> Result<(), Bad> {
        let keys = self.length(b, out)?;
        if keys == 0 || out.tokens == 0 {
            return Ok(());
        }
        if let Some(mask) = self.step.mask {
            let room = mask.room(b as i64, out.tokens as i64);
            if keys > room {
                return Err(DataFaultCause::Mask.at(b as i64, keys, 0, room));
            }
        }
        self.pages(keys, out)?;
        out.held = keys as usize;
        let rule = VisibilityRule::of(self.desc);
        if !self.desc.needs_positions() {
            let all = rule.visible(&KeyPositions::Contiguous { start: 0 }, out.held, 0);
            // SAFETY: `keys` was checked to be at most what the mask has room for, and `all` ends there.
            out.visible = unsafe { self.unmasked(b, out.tokens, all) };
            return Ok(());
        }
        self.positions(b, out)?;
        let (mut first, mut last) = (i64::MAX, i64::MIN);
        for position in (0..out.tokens).map(|i| self.position(out, i)) {
            (first, last) = (first.min(position), last.max(position));
        }
        let seen = (0..self.rows_of_positions())
            .map(|head| rule.visible_between(&self.key_positions(b, out, head as usize), out.held, first, last))
            .fold(Visibility::NONE, Visibility::union);
        // SAFETY: as above: what is seen ends at the last key held.
        out.visible = unsafe { self.unmasked(b, out.tokens, seen) };
        Ok(())
    }

    /// The tokens that sequence `b` holds here, and where its pages begin.
    fn length(&self, b: usize, out: &mut Sequence) -> Result<i64, Bad> {
        let (args, b) = (&self.step.args, b as i64);
        let page = i64::from(self.desc.page_size);
        let mut room = self.step.room(self.desc, b);
        match self.desc.kv_layout {
            KvLayout::Strided => {}
            KvLayout::BlockTable => out.first_page = b * i64::from(args.max_pages),
            KvLayout::CsrPages => {
                let (begin, end) = (i64::from(read(args.page_indptr, b)), i64::from(read(args.page_indptr, b + 1)));
                let entries = self.step.page_index_room(self.desc);
                if begin < 0 || begin > entries {
                    return Err(DataFaultCause::PageIndptr.at(b, begin, 0, entries));
                }
                if end < begin || end > entries {
                    return Err(DataFaultCause::PageIndptr.at(b + 1, end, begin, entries));
                }
                out.first_page = begin;
                if !args.last_page_len.is_null() && end > begin {
                    let last = i64::from(read(args.last_page_len, b));
                    if last < 1 || last > page {
                        return Err(DataFaultCause::LastPageLen.at(b, last, 1, page));
                    }
                    let full = (end - begin - 1) * page;
                    if full >= room {
                        return Err(DataFaultCause::PageIndptr.at(b + 1, end, begin, begin + (room + page - 1) / page));
                    }
                    let most = page.min(room - full);
                    return if last > most {
                        Err(DataFaultCause::LastPageLen.at(b, last, 1, most))
                    } else {
                        Ok(full + last)
                    };
                }
                room = room.min((end - begin) * page);
            }
        }
        if args.kv_length.is_null() {
            return Ok(0);
        }
        let keys = i64::from(read(args.kv_length, b));
        if keys < 0 || keys > room { Err(DataFaultCause::KvLength.at(b, keys, 0, room)) } else { Ok(keys) }
    }

    /// Every page in use exists.
    fn pages(&self, keys: i64, sequence: &Sequence) -> Result<(), Bad> {
        let args = &self.step.args;
        let (cause, table) = match self.desc.kv_layout {
            KvLayout::Strided => return Ok(()),
            KvLayout::BlockTable => (DataFaultCause::BlockTable, args.block_table),
            KvLayout::CsrPages => (DataFaultCause::PageIndices, args.page_indices),
        };
        let used = (keys + i64::from(self.desc.page_size) - 1) / i64::from(self.desc.page_size);
        let bad = (0..self.lists())
            .flat_map(|head| {
                let first = sequence.first_page + head * args.page_index_head_stride;
                first..first + used
            })
            .find(|&entry| !(0..args.num_pages).contains(&read(table, entry)));
        let told = |entry| cause.at(entry, i64::from(read(table, entry)), 0, i64::from(args.num_pages) - 1);
        bad.map_or(Ok(()), |entry| Err(told(entry)))
    }

    /// What is wrong with the positions of the query tokens of a sequence without keys here, which are read only where keys of
    /// other ranks meet them.
    pub fn idle_positions(&self, b: usize, sequence: &Sequence) -> Option<DataFault> {
        if sequence.fault.is_some() || sequence.held > 0 || sequence.tokens == 0 || !self.desc.needs_positions() {
            return None;
        }
        let (cause, value) = self.query_token_positions(b, &mut { *sequence }).err()?;
        Some(DataFault { sequence: b as i32, cause, value: Some(value) })
    }

    /// Reads and checks the positions of the query tokens.
    fn query_token_positions(&self, b: usize, out: &mut Sequence) -> Result<(), Bad> {
        let args = &self.step.args;
        if args.query_position.is_null() {
            let global = i64::from(read(args.global_length, b as i64));
            out.first_position = global - out.tokens as i64;
            if out.first_position < 0 {
                return Err(DataFaultCause::GlobalLength.at(b as i64, global, out.tokens as i64, MOST));
            }
        } else if let Some(i) = (0..out.tokens).find(|&i| self.position(out, i) < 0) {
            let index = (out.first_token + i) as i64;
            return Err(DataFaultCause::QueryPosition.at(index, self.position(out, i), 0, MOST));
        }
        Ok(())
    }

    /// Reads and checks the global positions that visibility needs.
    fn positions(&self, b: usize, out: &mut Sequence) -> Result<(), Bad> {
        self.query_token_positions(b, out)?;
        out.start = self.start(b);
        for head in 0..self.rows_of_positions() {
            let keys = self.key_positions(b, out, head as usize);
            if keys.are_valid(out.held) {
                continue;
            }
            return Err(match keys {
                KeyPositions::Contiguous { start } => {
                    DataFaultCause::KvStart.at(b as i64, start, 0, MOST - out.held as i64 + 1)
                }
                // Runs whose positions end beyond the largest.
                KeyPositions::Interleaved { .. } => {
                    let held = out.held as i64;
                    DataFaultCause::KvLength.at(b as i64, held, 0, held - 1)
                }
                KeyPositions::Explicit { positions } => {
                    let slot = positions.iter().position(|&position| position < 0).unwrap_or(0);
                    let row = self.step.kv_position_row(self.desc, b as i64, head);
                    DataFaultCause::KvPosition.at(row + slot as i64, i64::from(positions[slot]), 0, MOST)
                }
            });
        }
        Ok(())
    }

    /// Lists of pages that a sequence has: one, or one a kv head.
    fn lists(&self) -> i64 {
        if self.step.args.page_index_head_stride == 0 { 1 } else { i64::from(self.desc.kv_heads) }
    }

    /// Rows of positions that a sequence has: one, or one a kv head.
    pub fn rows_of_positions(&self) -> i64 {
        if self.step.args.kv_position_head_stride == 0 { 1 } else { i64::from(self.desc.kv_heads) }
    }

    /// Contiguous placement: the global position of the first key of sequence `b`, 0 where none is given.
    pub fn start(&self, b: usize) -> i64 {
        let given = self.desc.placement == Placement::Contiguous && !self.step.args.kv_start.is_null();
        if given { i64::from(read(self.step.args.kv_start, b as i64)) } else { 0 }
    }

    /// The global length of sequence `b`, 0 where none is given.
    pub fn global_length(&self, b: usize) -> i32 {
        if self.step.args.global_length.is_null() { 0 } else { read(self.step.args.global_length, b as i64) }
    }

    /// The position of query token `i` of a sequence of so many tokens on all ranks, also where the shape looks at none.
    pub fn query_position(&self, sequence: &Sequence, i: usize, global_length: i32) -> i32 {
        let positions = self.step.args.query_position;
        if positions.is_null() {
            // Wraps only where the length has no room for the queries, which is alike on all ranks.
            global_length.wrapping_sub(sequence.tokens as i32).wrapping_add(i as i32)
        } else {
            read(positions, (sequence.first_token + i) as i64)
        }
    }

    /// Where the keys of sequence `b` are, whose start is read, for kv head `head`. Only for shapes that look at positions.
    pub fn key_positions(&self, b: usize, sequence: &Sequence, head: usize) -> KeyPositions<'a> {
        match self.desc.placement {
            Placement::Contiguous => KeyPositions::Contiguous { start: sequence.start },
            Placement::Interleaved { run } => KeyPositions::Interleaved { run: i64::from(run), shard: self.shard },
            Placement::Explicit => {
                let row = self.step.kv_position_row(self.desc, b as i64, head as i64);
                let row = self.step.args.kv_position.wrapping_offset(row as isize);
                // SAFETY: positions are read only where visibility or a check needs them, and there `Step::new` refused a null or
                // unaligned pointer. `Reader::new` was promised that the row has a position for each key of the length that
                // `sequence.held` was read from, written by nobody as long as the reader is used.
                KeyPositions::Explicit { positions: unsafe { std::slice::from_raw_parts(row, sequence.held) } }
            }
        }
    }

    /// The global position of query token `i` of a sequence.
    pub fn position(&self, sequence: &Sequence, i: usize) -> i64 {
        let args = &self.step.args;
        if args.query_position.is_null() {
            sequence.first_position + i as i64
        } else {
            i64::from(read(args.query_position, (sequence.first_token + i) as i64))
        }
    }

    /// Which of `keys` <= 64 slots from `slot` on query token `i` of sequence `b` sees for kv head `head`: bit t is slot + t.
    pub fn visible(&self, (b, head): (usize, usize), sequence: &Sequence, i: usize, slot: usize, keys: usize) -> u64 {
        let rule = VisibilityRule::of(self.desc);
        if !rule.reads_positions() {
            return rule.mask(&KeyPositions::Contiguous { start: 0 }, 0, slot, keys);
        }
        rule.mask(&self.key_positions(b, sequence, head), self.position(sequence, i), slot, keys)
    }
}
