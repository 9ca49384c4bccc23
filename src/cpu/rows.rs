//! Where the keys and values of a tile lie: one pointer a key, from strides or through page tables.

use std::ops::Range;

use super::kernel::args::TILE;
use super::sequences::{Reader, Sequence};
use super::simd::ask_for_line;
use crate::attention::{KvLayout, Step};

/// Pointers to kv head 0 of each key and value of a tile; past the last key, up to a multiple of 16, they repeat it.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Keys.
    pub k: [*const u8; TILE],
    /// Values.
    pub v: [*const u8; TILE],
    /// Scales of keys and of values, where the step has them.
    pub scales: [[*const u8; TILE]; 2],
}

impl Rows {
    /// No rows.
    pub const EMPTY: Rows =
        Rows { k: [std::ptr::null(); TILE], v: [std::ptr::null(); TILE], scales: [[std::ptr::null(); TILE]; 2] };

    /// Points at slots `slot` to `slot + keys` of sequence `b`, `keys` from 1 to TILE, all of them held, as the pages of kv head
    /// `head` have them; the rows are those of kv head 0 there.
    ///
    /// # Safety
    /// `sequence` is what the reader filled for sequence `b`, which holds these slots; `head` is a kv head.
    pub unsafe fn fill(
        &mut self,
        reader: &Reader<'_>,
        (b, head): (usize, usize),
        sequence: &Sequence,
        slot: usize,
        keys: usize,
    ) {
        let (desc, step) = (reader.desc(), reader.step());
        let args = &step.args;
        let (k_data, v_data) = (args.k.data.cast::<u8>().cast_const(), args.v.data.cast::<u8>().cast_const());
        let (ks, vs) = (&step.k_stride, &step.v_stride);
        if desc.kv_layout == KvLayout::Strided {
            let at = |s: &[i64; 4]| (b as i64 * s[0] + slot as i64 * s[1]) as isize;
            self.run(0, keys, k_data.wrapping_offset(at(ks)), v_data.wrapping_offset(at(vs)), ks[1], vs[1]);
            self.run_of_scales(step, 0..keys, b as i64, slot);
        } else {
            let table = if desc.kv_layout == KvLayout::BlockTable { args.block_table } else { args.page_indices };
            let page_size = desc.page_size as usize;
            let list = sequence.first_page + head as i64 * args.page_index_head_stride;
            let (mut entry, mut inside, mut t) = (slot / page_size, slot % page_size, 0);
            while t < keys {
                let run = (page_size - inside).min(keys - t);
                // SAFETY: the entry is that of a slot that the sequence holds, for a kv head. The reader read all of these when
                // it filled the sequence, having checked that they lie inside the table, and `Reader::new` was promised that the
                // table stays readable.
                let page = unsafe { *table.offset((list + entry as i64) as isize) };
                // Checked before; the clamp keeps the address inside should the table have changed since.
                let page = i64::from(page.clamp(0, args.num_pages - 1));
                let at = |s: &[i64; 4]| (page * s[0] + inside as i64 * s[1]) as isize;
                self.run(t, run, k_data.wrapping_offset(at(ks)), v_data.wrapping_offset(at(vs)), ks[1], vs[1]);
                self.run_of_scales(step, t..t + run, page, inside);
                (t, entry, inside) = (t + run, entry + 1, 0);
            }
            self.ask_for_pages(keys, page_size);
        }
        for t in keys..keys.next_multiple_of(16) {
            (self.k[t], self.v[t]) = (self.k[keys - 1], self.v[keys - 1]);
        }
    }

    /// Asks for a line of the first key and value of each page. A tile is pointed at one before it is worked on: time to find where
    /// the page lies in memory. With pages of one token that costs a walk through the processor's tables for each row, and a row
    /// that has to wait for it holds up all those that are asked for after it.
    #[inline(never)]
    fn ask_for_pages(&self, keys: usize, page_size: usize) {
        for t in (0..keys).step_by(page_size) {
            ask_for_line(self.k[t]);
            ask_for_line(self.v[t]);
        }
    }

    /// Points scales `which` at those of tokens from `inside` on of sequence or page `outer`.
    fn run_of_scales(&mut self, step: &Step, which: Range<usize>, outer: i64, inside: usize) {
        let args = &step.args;
        let of = [(&args.k_scale, &step.k_scale_stride), (&args.v_scale, &step.v_scale_stride)];
        for (scales, (tensor, stride)) in self.scales.iter_mut().zip(of) {
            if tensor.data.is_null() {
                continue;
            }
            let data = tensor.data.cast::<u8>().cast_const();
            for (i, scale) in scales[which.clone()].iter_mut().enumerate() {
                let at = outer * stride[0] + (inside + i) as i64 * stride[1];
                *scale = data.wrapping_offset(at as isize);
            }
        }
    }

    #[inline(always)]
    fn run(&mut self, from: usize, n: usize, k: *const u8, v: *const u8, k_step: i64, v_step: i64) {
        let targets = self.k[from..from + n].iter_mut().zip(&mut self.v[from..from + n]);
        for (i, (to_k, to_v)) in targets.enumerate() {
            *to_k = k.wrapping_offset(i as isize * k_step as isize);
            *to_v = v.wrapping_offset(i as isize * v_step as isize);
        }
    }
}
