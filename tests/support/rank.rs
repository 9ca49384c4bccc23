//! One rank's memory for a case: inputs where its layout puts them, everything else poisoned.

use treeattn::attention::{DecodeArgs, Dtype, Tensor};

use super::case::Case;
use super::memory::Memory;
use super::view::{View, each, load};

/// One rank's memory.
pub struct Rank {
    pub q: Memory,
    /// The queries of all heads, where `q` has the rank's own only.
    pub all_queries: Option<(Memory, Tensor)>,
    pub k: Memory,
    /// None: V lies in `k`'s memory.
    pub v: Option<Memory>,
    pub k_scale: Memory,
    pub v_scale: Memory,
    pub out: Memory,
    pub lse: Memory,
    pub query_start: Memory,
    pub query_position: Memory,
    pub kv_length: Memory,
    pub global_length: Memory,
    pub kv_start: Memory,
    pub kv_position: Memory,
    pub block_table: Memory,
    pub page_indptr: Memory,
    pub page_indices: Memory,
    pub last_page_len: Memory,
    pub sinks: Memory,
    pub slopes: Memory,
    pub mask: Memory,
    pub factors: Memory,
    pub args: DecodeArgs,
    pub out_view: View,
    pub lse_view: View,
    /// The heads of the output.
    pub heads: std::ops::Range<usize>,
}

/// An int32 input by name, to be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ints {
    QueryStart,
    QueryPosition,
    KvLength,
    GlobalLength,
    KvStart,
    KvPosition,
    BlockTable,
    PageIndptr,
    PageIndices,
    LastPageLen,
}

impl Rank {
    /// An int32 input.
    pub fn ints(&mut self, which: Ints) -> &mut Memory {
        match which {
            Ints::QueryStart => &mut self.query_start,
            Ints::QueryPosition => &mut self.query_position,
            Ints::KvLength => &mut self.kv_length,
            Ints::GlobalLength => &mut self.global_length,
            Ints::KvStart => &mut self.kv_start,
            Ints::KvPosition => &mut self.kv_position,
            Ints::BlockTable => &mut self.block_table,
            Ints::PageIndptr => &mut self.page_indptr,
            Ints::PageIndices => &mut self.page_indices,
            Ints::LastPageLen => &mut self.last_page_len,
        }
    }

    /// Changes entry `index` of an int32 input.
    pub fn set(&mut self, which: Ints, index: usize, value: i32) {
        let memory = self.ints(which);
        memory.thaw();
        memory.bytes_mut()[index * 4..][..4].copy_from_slice(&value.to_ne_bytes());
        memory.freeze();
    }

    /// Fills out and lse, gaps too, so that a later look tells what was written.
    pub fn prefill(&mut self, byte: u8) {
        self.out.bytes_mut().fill(byte);
        self.lse.bytes_mut().fill(byte);
    }

    /// Bytes of out or lse that belong to no element and are not `byte` any more.
    pub fn strays(&self, case: &Case, byte: u8) -> usize {
        let mut strays = 0;
        let out = (&self.out, &self.out_view, case.desc.out_dtype.size(), true);
        for (memory, view, size, written) in [out, (&self.lse, &self.lse_view, 4, case.want_lse)] {
            let mut live = vec![false; memory.len()];
            if written {
                each(&view.dims, |index| live[view.at(index)..][..size].fill(true));
            }
            strays += memory.bytes().iter().zip(&live).filter(|&(&b, &live)| !live && b != byte).count();
        }
        strays
    }

    /// The output's row for one of its heads, widened to f32, and the raw bits.
    pub fn row(&self, case: &Case, token: usize, head: usize) -> (Vec<f32>, Vec<u32>) {
        let dtype = case.desc.out_dtype;
        (0..case.desc.head_dim_v as usize)
            .map(|d| load(&self.out, self.out_view.at([token, head - self.heads.start, d, 0]), dtype))
            .unzip()
    }

    /// The lse of a row, where it was wanted.
    pub fn lse_of(&self, case: &Case, token: usize, head: usize) -> Option<f32> {
        case.want_lse.then(|| load(&self.lse, self.lse_view.at([token, head - self.heads.start, 0, 0]), Dtype::F32).0)
    }

    /// All bits that a step wrote.
    pub fn bits(&self, case: &Case) -> Vec<u32> {
        let mut bits = Vec::new();
        for token in 0..case.tokens {
            for head in self.heads.clone() {
                bits.extend(self.row(case, token, head).1);
                bits.extend(self.lse_of(case, token, head).map(f32::to_bits));
            }
        }
        bits
    }
}
