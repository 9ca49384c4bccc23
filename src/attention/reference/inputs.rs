//! What a step's memory says, one value at a time: lengths, tables, positions, and rows of q, k and v.

use crate::attention::descriptor::{AttentionDesc, KvLayout};
use crate::attention::dtype::Dtype;
use crate::attention::format::KvFormat;
use crate::attention::placement::{Placement, Shard};
use crate::attention::scales::finite_or_nan;
use crate::attention::step::Step;
use crate::attention::tensor::Tensor;
use crate::attention::visibility::{KeyPositions, VisibilityRule};
use crate::partial::DataFaultCause;

/// The inputs of one rank's step, readable as long as this lives ([`Inputs::new`]).
#[derive(Clone, Copy, Debug)]
pub(super) struct Inputs<'a> {
    pub desc: &'a AttentionDesc,
    pub shard: Shard,
    pub step: &'a Step,
}

/// One sequence as its lengths and starts describe it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sequence {
    /// Its number in the batch.
    pub index: usize,
    pub first_token: usize,
    pub tokens: usize,
    /// Keys on this rank.
    pub keys: usize,
    /// Its first entry in the page table.
    first_page: i64,
    pub fault: Option<DataFaultCause>,
}

impl<'a> Inputs<'a> {
    /// The inputs of `step`.
    ///
    /// # Safety
    /// `step` was made from `desc`, and its inputs are host memory as large as its fields say, written by nobody as long as the
    /// result is used. Its methods are asked about tokens and heads of the step, and about sequences that they gave.
    pub unsafe fn new(desc: &'a AttentionDesc, shard: Shard, step: &'a Step) -> Inputs<'a> {
        Inputs { desc, shard, step }
    }

    /// Reads and checks sequence `b`. `taken` is the end of the query tokens that sequences before it own.
    pub fn sequence(&self, b: usize, taken: &mut i64) -> Sequence {
        let args = &self.step.args;
        let all = i64::from(args.query_tokens);
        let (begin, end) = if args.query_start.is_null() {
            let each = all / i64::from(args.batch);
            (b as i64 * each, (b as i64 + 1) * each)
        } else {
            (read(args.query_start, b as i64), read(args.query_start, b as i64 + 1))
        };
        let ordered = *taken <= begin && begin <= end && end <= all;
        let (first, last) = (begin.clamp(*taken, all), end.clamp(*taken, all));
        *taken = last;
        let mut sequence = Sequence {
            index: b,
            first_token: first as usize,
            tokens: (last - first).max(0) as usize,
            keys: 0,
            first_page: 0,
            fault: None,
        };
        let checked = if ordered { self.check(&mut sequence) } else { Err(DataFaultCause::QueryStart) };
        if let Err(cause) = checked {
            sequence.keys = 0;
            sequence.fault = Some(cause);
        }
        sequence
    }

    /// Reads the length, and checks all that would be used for it.
    fn check(&self, sequence: &mut Sequence) -> Result<(), DataFaultCause> {
        let (args, b) = (&self.step.args, sequence.index as i64);
        let page_size = i64::from(self.desc.page_size);
        let mut room = self.step.room(self.desc, b);
        let mut length = None;
        match self.desc.kv_layout {
            KvLayout::Strided => {}
            KvLayout::BlockTable => sequence.first_page = b * i64::from(args.max_pages),
            KvLayout::CsrPages => {
                let (begin, end) = (read(args.page_indptr, b), read(args.page_indptr, b + 1));
                if !(0 <= begin && begin <= end && end <= self.step.page_index_room(self.desc)) {
                    return Err(DataFaultCause::PageRow);
                }
                sequence.first_page = begin;
                let pages = end - begin;
                if args.last_page_len.is_null() {
                    room = room.min(pages * page_size);
                } else if pages == 0 {
                    length = Some(0);
                } else {
                    let last = read(args.last_page_len, b);
                    if !(1..=page_size).contains(&last) {
                        return Err(DataFaultCause::PageRow);
                    }
                    length = Some((pages - 1) * page_size + last);
                }
            }
        }
        let length = length.unwrap_or_else(|| read(args.kv_length, b));
        if !(0..=room).contains(&length) {
            return Err(DataFaultCause::KvLength);
        }
        if length == 0 || sequence.tokens == 0 {
            return Ok(());
        }
        if self.step.mask.is_some_and(|mask| length > mask.room(b, sequence.tokens as i64)) {
            return Err(DataFaultCause::KvLength);
        }
        sequence.keys = length as usize;
        if self.desc.kv_layout != KvLayout::Strided {
            let pages = (length + page_size - 1) / page_size;
            let is_page = |page: i64| (0..i64::from(args.num_pages)).contains(&page);
            if !self.kv_heads().all(|head| (0..pages).all(|n| is_page(self.page(sequence, n, head)))) {
                return Err(DataFaultCause::Page);
            }
        }
        if !self.desc.needs_positions() {
            return Ok(());
        }
        let positions = 0..=i64::from(i32::MAX);
        let queries_fit = (0..sequence.tokens).all(|i| self.query_position(sequence, i) >= 0);
        let keys_fit = |head: usize| {
            let keys = self.key_positions(sequence, head);
            (0..sequence.keys).all(|slot| positions.contains(&keys.of(slot)))
        };
        if queries_fit && self.kv_heads().all(keys_fit) { Ok(()) } else { Err(DataFaultCause::Position) }
    }

    /// The kv heads, each of which may have pages and positions of its own; the first where all share them.
    fn kv_heads(&self) -> std::ops::Range<usize> {
        0..if self.step.lists_by_head() { self.desc.kv_heads as usize } else { 1 }
    }

    /// The slots that query token `token` of the sequence sees for kv head `head`, but for the mask.
    pub fn visible(&self, sequence: &Sequence, token: usize, head: usize) -> impl Iterator<Item = usize> {
        let rule = VisibilityRule::of(self.desc);
        let read = rule.reads_positions();
        let position = if read { self.query_position(sequence, token) } else { 0 };
        let keys = if read { self.key_positions(sequence, head) } else { KeyPositions::Contiguous { start: 0 } };
        (0..sequence.keys).filter(move |&slot| rule.sees(&keys, position, slot))
    }

    /// What the mask adds to the score of a visible slot; -inf hides it.
    pub fn bias(&self, sequence: &Sequence, token: usize, head: usize, slot: usize) -> f64 {
        let Some(mask) = self.step.mask else { return 0.0 };
        // SAFETY: a slot of the sequence's length, which was checked against the mask's room; a query head, for each of which
        // `Step::new` found a factor. `Inputs::new` was promised that both are readable.
        let (value, factor) =
            unsafe { (mask.get(sequence.index, head, token, slot), f64::from(self.step.mask_factor.get(head, 1.0))) };
        if value == f64::NEG_INFINITY { value } else { factor * value }
    }

    /// Slope times distance of a visible slot.
    pub fn slope(&self, sequence: &Sequence, token: usize, head: usize, slot: usize) -> f64 {
        if !self.desc.alibi {
            return 0.0;
        }
        let kv_head = head / self.desc.group() as usize;
        let distance = self.query_position(sequence, token) - self.key_positions(sequence, kv_head).of(slot);
        // SAFETY: a query head, for each of which `Step::new` found a slope; `Inputs::new` was promised that they are readable.
        f64::from(unsafe { self.step.slopes.get(head, 0.0) }) * distance.abs() as f64
    }

    fn query_position(&self, sequence: &Sequence, token: usize) -> i64 {
        let args = &self.step.args;
        if args.query_position.is_null() {
            read(args.global_length, sequence.index as i64) - sequence.tokens as i64 + token as i64
        } else {
            read(args.query_position, (sequence.first_token + token) as i64)
        }
    }

    /// Where the keys of the sequence, which has some, are for kv head `head`.
    fn key_positions(&self, sequence: &Sequence, head: usize) -> KeyPositions<'_> {
        let (args, b) = (&self.step.args, sequence.index as i64);
        match self.desc.placement {
            Placement::Contiguous if args.kv_start.is_null() => KeyPositions::Contiguous { start: 0 },
            Placement::Contiguous => KeyPositions::Contiguous { start: read(args.kv_start, b) },
            Placement::Interleaved { run } => KeyPositions::Interleaved { run: i64::from(run), shard: self.shard },
            Placement::Explicit => {
                let row = self.step.kv_position_row(self.desc, b, head as i64);
                let row = args.kv_position.wrapping_offset(row as isize);
                // SAFETY: `Step::new` refused a null or unaligned pointer where positions are read; `Inputs::new` was promised
                // that the row has one for each key of the sequence's length, written by nobody.
                let positions = unsafe { std::slice::from_raw_parts(row, sequence.keys) };
                KeyPositions::Explicit { positions }
            }
        }
    }

    fn page(&self, sequence: &Sequence, n: i64, head: usize) -> i64 {
        let args = &self.step.args;
        let table = if self.desc.kv_layout == KvLayout::BlockTable { args.block_table } else { args.page_indices };
        read(table, sequence.first_page + head as i64 * args.page_index_head_stride + n)
    }

    /// Loads the query of a token of the step and a query head.
    pub fn query(&self, token: usize, head: usize, out: &mut [f64]) {
        let (step, dtype) = (self.step, self.desc.q_dtype);
        let at = token as i64 * step.q_stride[0] + head as i64 * step.q_stride[1];
        // SAFETY: a token and a head of the step, whose rows `Step::new` checked to lie inside q; `Inputs::new` was promised that
        // q is readable.
        unsafe { load_row(&step.args.q, dtype, at, step.q_stride[2], out) }
    }

    /// Loads the zeta of a token of the step, which has one, and a query head.
    pub fn zeta(&self, token: usize, head: usize, out: &mut [f64]) {
        let step = self.step;
        let at = token as i64 * step.zeta_stride[0] + head as i64 * step.zeta_stride[1];
        // SAFETY: as in `query`; `Step::at_zeta` checked the rows of zeta.
        unsafe { load_row(&step.zeta, Dtype::F32, at, step.zeta_stride[2], out) }
    }

    /// Loads the key in `slot`, times its scale.
    pub fn key(&self, sequence: &Sequence, slot: usize, kv_head: usize, out: &mut [f64]) {
        let step = self.step;
        let at = self.offset(&step.k_stride, sequence, slot, kv_head);
        // SAFETY: a slot below the sequence's length, which was checked against the room of k, in a page that was checked to be
        // one; `Inputs::new` was promised that k is readable.
        unsafe { load_row(&step.args.k, self.desc.k_dtype, at, step.k_stride[3], out) }
        let scale = self.scale(0, sequence, slot, kv_head);
        out.iter_mut().for_each(|x| *x *= scale);
    }

    /// Loads the value in `slot`, times its scale.
    pub fn value(&self, sequence: &Sequence, slot: usize, kv_head: usize, out: &mut [f64]) {
        let step = self.step;
        let at = self.offset(&step.v_stride, sequence, slot, kv_head);
        // SAFETY: as in `key`, of v.
        unsafe { load_row(&step.args.v, self.desc.v_dtype, at, step.v_stride[3], out) }
        let scale = self.scale(1, sequence, slot, kv_head);
        out.iter_mut().for_each(|x| *x *= scale);
    }

    /// The sink of a query head, where the shape has sinks.
    pub fn sink(&self, head: usize) -> f64 {
        // SAFETY: a query head, for each of which `Step::new` found a sink; `Inputs::new` was promised that they are readable.
        f64::from(unsafe { self.step.sinks.get(head, f32::NEG_INFINITY) })
    }

    /// What the elements of the key (0) or value (1) in `slot` are multiplied by.
    fn scale(&self, which: usize, sequence: &Sequence, slot: usize, kv_head: usize) -> f64 {
        let (args, step) = (&self.step.args, self.step);
        let (scales, stride) = [(&args.k_scale, &step.k_scale_stride), (&args.v_scale, &step.v_scale_stride)][which];
        if scales.data.is_null() {
            return 1.0;
        }
        let mut scale = [0.0];
        // SAFETY: as in `key`: the room that the length was checked against ends where the scales do, too.
        unsafe { load_row(scales, Dtype::F32, self.offset(stride, sequence, slot, kv_head), 0, &mut scale) };
        f64::from(finite_or_nan(scale[0] as f32))
    }

    fn offset(&self, stride: &[i64; 4], sequence: &Sequence, slot: usize, kv_head: usize) -> i64 {
        let slot = slot as i64;
        let (outer, inner) = if self.desc.kv_layout == KvLayout::Strided {
            (sequence.index as i64, slot)
        } else {
            let page_size = i64::from(self.desc.page_size);
            (self.page(sequence, slot / page_size, kv_head), slot % page_size)
        };
        outer * stride[0] + inner * stride[1] + kv_head as i64 * stride[2]
    }
}

/// Entry `index` of an int32 input of a step: one a sequence, or two where ranges begin and end; one a query token; table
/// entries below the room that was checked.
fn read(pointer: *const i32, index: i64) -> i64 {
    // SAFETY: `Step::new` refused a null or unaligned pointer where a step of this shape needs the array, and arrays that may
    // be left out are asked for null before. `Inputs::new` was promised that the array has the entries that the step's fields
    // say, which this is one of, and that nobody writes them.
    i64::from(unsafe { *pointer.offset(index as isize) })
}

/// Loads a row of `out.len()` elements that begins `offset` bytes into the tensor.
///
/// # Safety
/// The tensor is readable host memory, and the row, its blocks `stride` bytes apart, lies inside its bytes.
pub(super) unsafe fn load_row(tensor: &Tensor, dtype: Dtype, offset: i64, stride: i64, out: &mut [f64]) {
    let row = tensor.data.cast::<u8>().cast_const().wrapping_offset(offset as isize);
    // SAFETY: the row has a block for all elements of `out`, as this function was promised.
    unsafe { KvFormat::of(dtype).widen_row(row, stride, out) };
}
