//! How a rank's memory is made from a case: where its layout puts inputs, and what it leaves out, at random where that is free.

use treeattn::attention::{
    DecodeArgs, Dtype, KvLayout, MaskKind, OutputMode, Placement, QueryInput, Tensor, head_range,
};

use super::case::Case;
use super::memory::Memory;
use super::rank::Rank;
use super::rng::Rng;
use super::terms::MaskValues;
use super::view::{View, blocks, each, lay, put};

impl Rank {
    /// The memory of one rank of a case.
    pub fn new(case: &Case, rank: usize) -> Rank {
        let r = Rng::new(Rng::derive(case.seed, 1000 + rank as u64));
        Builder { case, rank, r, wild: case.wild, order: Vec::new() }.build()
    }
}

struct Builder<'a> {
    case: &'a Case,
    rank: usize,
    r: Rng,
    wild: bool,
    /// The positions that each kv head holds of each sequence, slot by slot.
    order: Vec<Vec<Vec<usize>>>,
}

/// Where the tokens of each sequence lie: outer index (sequence or page) and inner index of each slot.
struct Pages {
    /// Pages of each sequence, in order; of its kv heads, one after the other, where they have lists of their own.
    of: Vec<Vec<usize>>,
    /// Lists of a sequence.
    lists: usize,
    count: usize,
}

impl Builder<'_> {
    fn build(mut self) -> Rank {
        let (case, desc, batch) = (self.case, &self.case.desc, self.case.sequences.len());
        let held: Vec<&[usize]> = case.sequences.iter().map(|s| &s.held[self.rank][..]).collect();
        let mut args = DecodeArgs { batch: batch as i32, query_tokens: case.tokens as i32, ..DecodeArgs::default() };

        let own = head_range(desc.q_heads, case.shard(self.rank)).expect("a rank of the world");
        let own_heads = own.start as usize..own.end as usize;
        self.order = held.iter().map(|slots| vec![slots.to_vec(); desc.kv_heads as usize]).collect();
        if desc.pages_by_head && desc.placement == Placement::Explicit {
            self.order.iter_mut().flatten().for_each(|slots| self.r.shuffle(slots));
        }
        let mut q = self.queries(&mut args, 0..desc.q_heads as usize);
        let mut all_queries = None;
        if desc.query_input == QueryInput::Scattered {
            // Drawn apart, so that all else lies as it would with the queries of all heads.
            let r = std::mem::replace(&mut self.r, Rng::new(Rng::derive(case.seed, 2000 + self.rank as u64)));
            all_queries = Some((q, args.q));
            q = self.queries(&mut args, own_heads.clone());
            self.r = r;
        }
        let pages = self.pages(&held);
        let (k, v) = self.cache(&held, &pages, &mut args);
        let (k_scale, v_scale) = self.scales(&held, &pages, &mut args);
        let heads = if desc.output == OutputMode::Scattered { own_heads } else { 0..desc.q_heads as usize };
        let pad = if self.wild { 30 } else { 0 };
        let size = desc.out_dtype.size();
        let out_view = self.any_order(&[case.tokens, heads.len(), desc.head_dim_v as usize], size, pad);
        let lse_view = self.any_order(&[case.tokens, heads.len()], 4, pad);
        let (out, lse) = (self.memory(out_view.bytes), self.memory(lse_view.bytes));
        args.out = Tensor { data: out.ptr(), bytes: out.len() as u64, stride: out_view.stride };
        if case.want_lse {
            args.lse = Tensor { data: lse.ptr(), bytes: lse.len() as u64, stride: lse_view.stride };
        }

        let mut rank = Rank {
            q,
            all_queries,
            k,
            v,
            k_scale,
            v_scale,
            out,
            lse,
            query_start: Memory::of_ints(&self.query_start()),
            query_position: Memory::of_ints(case.query_position.as_deref().unwrap_or_default()),
            kv_length: Memory::of_ints(&held.iter().map(|slots| slots.len() as i32).collect::<Vec<_>>()),
            global_length: Memory::of_ints(&case.sequences.iter().map(|s| s.keys as i32).collect::<Vec<_>>()),
            kv_start: self.starts(&held),
            kv_position: Memory::of_ints(&[]),
            block_table: Memory::of_ints(&[]),
            page_indptr: Memory::of_ints(&[]),
            page_indices: Memory::of_ints(&[]),
            last_page_len: Memory::of_ints(&[]),
            sinks: Memory::new(0, true),
            slopes: Memory::new(0, true),
            mask: Memory::new(0, true),
            factors: Memory::new(0, true),
            args,
            out_view,
            lse_view,
            heads,
        };
        self.positions(&held, &mut rank);
        self.tables(&held, &pages, &mut rank);
        if desc.sinks {
            (rank.sinks, rank.args.sinks) = self.per_head(&case.terms.sinks);
        }
        if desc.alibi {
            (rank.slopes, rank.args.alibi_slopes) = self.per_head(&case.terms.slopes);
        }
        if !case.terms.factors.is_empty() {
            (rank.factors, rank.args.mask_factor) = self.per_head(&case.terms.factors);
        }
        if let Some(mask) = &case.terms.mask {
            (rank.mask, rank.args.mask) = self.mask(mask, &held);
        }
        rank
    }

    /// The mask by local slots: rows padded as they come, ending where the last slot does. What no slot has is poison: NaN, or a
    /// byte that says visible.
    fn mask(&mut self, mask: &MaskValues, held: &[&[usize]]) -> (Memory, Tensor) {
        let (case, desc) = (self.case, &self.case.desc);
        let size = match (desc.mask, desc.mask_dtype) {
            (MaskKind::Boolean, _) => 1,
            (_, dtype) => dtype.expect("of an additive mask").size(),
        };
        let slots = held.iter().map(|slots| slots.len()).max().unwrap_or(0);
        let tokens = case.sequences.iter().map(|s| s.tokens).max().unwrap_or(0);
        if slots == 0 || tokens == 0 {
            return (Memory::new(0, true), Tensor::NULL);
        }
        let shape = [held.len(), desc.q_heads as usize, tokens, slots];
        let (mut order, mut pad) = (vec![3, 2, 1, 0], 0);
        if self.wild {
            pad = self.r.pick(&[0, 30]);
            if self.r.chance(25) {
                self.r.shuffle(&mut order);
            }
        }
        let [b, h, q] = mask.broadcast;
        let view = lay(&mut self.r, &shape, &order, size, pad, &[b, h, q, false]);
        let mut memory = self.memory(view.bytes);
        for (b, slots) in held.iter().enumerate() {
            let sequence = &case.sequences[b];
            for slot in 0..slots.len() {
                for (head, query) in (0..shape[1]).flat_map(|head| (0..sequence.tokens).map(move |query| (head, query)))
                {
                    let position = self.order[b][head / desc.group() as usize][slot];
                    let (at, x) = (view.at([b, head, query, slot]), mask.at(b, head, query, position, sequence));
                    match desc.mask {
                        MaskKind::Boolean => memory.bytes_mut()[at] = u8::from(x == 0.0),
                        _ => put(&mut memory, at, desc.mask_dtype.expect("of an additive mask"), x),
                    }
                }
            }
        }
        memory.freeze();
        let tensor = Tensor { data: memory.ptr(), bytes: memory.len() as u64, stride: view.stride };
        (memory, tensor)
    }

    /// One number a query head, side by side or apart.
    fn per_head(&mut self, values: &[f32]) -> (Memory, Tensor) {
        let pad = if self.wild { 30 } else { 0 };
        let view = lay(&mut self.r, &[values.len()], &[0], 4, pad, &[]);
        let mut memory = self.memory(view.bytes);
        for (head, &x) in values.iter().enumerate() {
            put(&mut memory, view.at([head, 0, 0, 0]), Dtype::F32, x);
        }
        memory.freeze();
        let tensor = Tensor { data: memory.ptr(), bytes: memory.len() as u64, stride: view.stride };
        (memory, tensor)
    }

    fn memory(&mut self, bytes: usize) -> Memory {
        Memory::new(bytes, self.r.chance(70))
    }

    fn any_order(&mut self, shape: &[usize], size: usize, pad: u64) -> View {
        let mut order: Vec<usize> = (0..shape.len()).rev().collect();
        if self.wild && self.r.chance(30) {
            self.r.shuffle(&mut order);
        }
        lay(&mut self.r, shape, &order, size, pad, &[])
    }

    /// The queries of some heads.
    fn queries(&mut self, args: &mut DecodeArgs, heads: std::ops::Range<usize>) -> Memory {
        let (case, desc) = (self.case, &self.case.desc);
        let (all, dim) = (desc.q_heads as usize, desc.head_dim_qk as usize);
        let shape = [case.tokens, heads.len(), dim];
        let (mut order, pad) = (vec![2, 1, 0], if self.wild { 25 } else { 0 });
        if self.wild && self.r.chance(25) {
            self.r.shuffle(&mut order);
        }
        let view = lay(&mut self.r, &shape, &order, desc.q_dtype.size(), pad, &case.q_broadcast);
        let mut memory = self.memory(view.bytes);
        if view.elements() > 0 {
            each(&shape, |i @ [token, head, d, _]| {
                put(&mut memory, view.at(i), desc.q_dtype, case.q[(token * all + heads.start + head) * dim + d]);
            });
        }
        memory.freeze();
        args.q = Tensor { data: memory.ptr(), bytes: memory.len() as u64, stride: view.stride };
        memory
    }

    /// Gives every sequence its pages: shuffled, with spare ones between, where the case is wild.
    fn pages(&mut self, held: &[&[usize]]) -> Pages {
        let desc = &self.case.desc;
        if desc.kv_layout == KvLayout::Strided {
            return Pages { of: Vec::new(), lists: 1, count: 0 };
        }
        let page_size = desc.page_size as usize;
        let lists = if desc.pages_by_head { desc.kv_heads as usize } else { 1 };
        let needed = lists * held.iter().map(|slots| slots.len().div_ceil(page_size)).sum::<usize>();
        let count = needed + if self.wild { self.r.range(0, 3) } else { 0 };
        let mut all: Vec<usize> = (0..count).collect();
        if self.wild {
            self.r.shuffle(&mut all);
        }
        let sizes = held.iter().flat_map(|slots| vec![slots.len().div_ceil(page_size); lists]);
        let of = sizes.map(|size| all.drain(..size).collect()).collect();
        Pages { of, lists, count }
    }

    /// Lays out k and v and writes the live tokens.
    fn cache(&mut self, held: &[&[usize]], pages: &Pages, args: &mut DecodeArgs) -> (Memory, Option<Memory>) {
        let (case, desc) = (self.case, &self.case.desc);
        let strided = desc.kv_layout == KvLayout::Strided;
        let longest = held.iter().map(|slots| slots.len()).max().unwrap_or(0);
        let (dim_qk, dim_v) = (desc.head_dim_qk as usize, desc.head_dim_v as usize);
        let kv_heads = desc.kv_heads as usize;
        let plain = case.k_broadcast == [false; 4] && case.v_broadcast == [false; 4];
        let packed = strided && plain && !case.v_in_k && (!self.wild || self.r.chance(15));
        let (outer, inner) = if packed {
            (case.sequences.len(), desc.max_kv_length as usize)
        } else if strided {
            // Room for the longest, sometimes for more than the plan allows.
            let room = longest + if self.wild && self.r.chance(40) { self.r.range(0, 20) } else { 0 };
            (case.sequences.len(), room)
        } else {
            (pages.count, desc.page_size as usize)
        };
        if strided && longest == 0 || outer == 0 {
            // An empty shard needs no cache.
            return (Memory::new(0, true), Some(Memory::new(0, true)));
        }
        // Rows are counted in the blocks of their formats.
        let (k_format, v_format) = (desc.k_format(), desc.v_format());
        let (k_blocks, v_blocks) = (k_format.blocks(dim_qk), v_format.blocks(dim_v));
        let (k_dims, v_dims) = ([outer, inner, kv_heads, k_blocks], [outer, inner, kv_heads, v_blocks]);
        let (k_size, v_size) = (desc.k_dtype.size(), desc.v_dtype.size());
        let mut order = vec![3, 2, 1, 0];
        if self.wild && !packed {
            match self.r.range(0, 9) {
                0..=4 => {}
                // HND, and ggml's view of it with heads outermost.
                5..=6 => order = vec![3, 1, 2, 0],
                7 => order = vec![3, 1, 0, 2],
                _ => self.r.shuffle(&mut order),
            }
        }
        let pad = if self.wild && !packed { self.r.pick(&[0, 0, 30]) } else { 0 };
        let joined = !case.v_in_k
            && self.wild
            && plain
            && !packed
            && (k_size, k_blocks) == (v_size, v_blocks)
            && self.r.chance(20);
        let mut k_view = lay(&mut self.r, &k_dims, &order, k_size, pad, &case.k_broadcast);
        let mut v_view = if case.v_in_k || joined {
            View { dims: v_dims.to_vec(), ..k_view.clone() }
        } else {
            lay(&mut self.r, &v_dims, &order, v_size, pad, &case.v_broadcast)
        };
        if packed {
            // The last sequence may end where its tokens do.
            k_view.bytes -= (inner - longest) * kv_heads * k_blocks * k_size;
            v_view.bytes -= (inner - longest) * kv_heads * v_blocks * v_size;
        }
        let mut v_offset = 0;
        if joined {
            // One block for both: K of a token, page or sequence, then its V.
            let dim = self.r.pick(&order[1..]);
            let index = order.iter().position(|&d| d == dim).expect("one of the four");
            let wide = lay(&mut self.r, &k_dims, &order, k_size, 0, &[]);
            v_offset = wide.stride[dim] as usize;
            let mut stride = wide.stride;
            order[index..].iter().for_each(|&d| stride[d] *= 2);
            // Strides of dimensions of one may be anything; they are as they come here.
            let span = |shape: &[usize; 4]| -> usize {
                k_size + (0..4).map(|d| (shape[d] - 1) * stride[d] as usize).sum::<usize>()
            };
            k_view = View { stride, dims: k_dims.to_vec(), bytes: span(&k_dims) };
            v_view = View { stride, dims: v_dims.to_vec(), bytes: span(&v_dims) };
        }
        let mut k = self.memory(if joined { k_view.bytes + v_offset } else { k_view.bytes });
        let mut own_v = (!case.v_in_k && !joined).then(|| self.memory(v_view.bytes));
        for (b, slots) in held.iter().enumerate() {
            let sequence = &case.sequences[b];
            for slot in 0..slots.len() {
                for h in 0..kv_heads {
                    let position = self.order[b][h][slot];
                    let list = b * pages.lists + h % pages.lists;
                    let (o, i) = if strided { (b, slot) } else { (pages.of[list][slot / inner], slot % inner) };
                    let row = position * kv_heads + h;
                    for (n, block) in blocks(&sequence.k, &sequence.k_rows, row, dim_qk, desc.k_dtype).enumerate() {
                        k.bytes_mut()[k_view.at([o, i, h, n])..][..k_size].copy_from_slice(&block);
                    }
                    for (n, block) in blocks(&sequence.v, &sequence.v_rows, row, dim_v, desc.v_dtype).enumerate() {
                        let memory = own_v.as_mut().unwrap_or(&mut k);
                        memory.bytes_mut()[v_offset + v_view.at([o, i, h, n])..][..v_size].copy_from_slice(&block);
                    }
                }
            }
        }
        k.freeze();
        if packed {
            (k_view.stride, v_view.stride) = ([0; 4], [0; 4]);
            // The bytes do not tell, since the last sequence ends early.
            args.kv_capacity = inner as i32;
        }
        let k_bytes = if joined { k_view.bytes } else { k.len() };
        args.k = Tensor { data: k.ptr(), bytes: k_bytes as u64, stride: k_view.stride };
        args.v = match &mut own_v {
            Some(v) => {
                v.freeze();
                Tensor { data: v.ptr(), bytes: v.len() as u64, stride: v_view.stride }
            }
            None => {
                let data = k.ptr().wrapping_byte_add(v_offset);
                Tensor { data, bytes: (k.len() - v_offset) as u64, stride: v_view.stride }
            }
        };
        args.num_pages = pages.count as i32;
        (k, own_v)
    }

    /// Lays out the scales of k and v and writes those of live tokens. An empty shard needs none.
    fn scales(&mut self, held: &[&[usize]], pages: &Pages, args: &mut DecodeArgs) -> (Memory, Memory) {
        let (case, desc) = (self.case, &self.case.desc);
        let strided = desc.kv_layout == KvLayout::Strided;
        let longest = held.iter().map(|slots| slots.len()).max().unwrap_or(0);
        let (outer, inner) = if strided { (held.len(), longest) } else { (pages.count, desc.page_size as usize) };
        let heads = desc.kv_heads as usize;
        let mut made = [case.k_scale, case.v_scale].into_iter().enumerate().map(|(which, own)| {
            let (Some([token, head]), true) = (own, args.k.bytes > 0) else { return Memory::new(0, true) };
            let mut order = vec![2, 1, 0];
            if self.wild && self.r.chance(30) {
                self.r.shuffle(&mut order);
            }
            let pad = if self.wild { 25 } else { 0 };
            let mut view = lay(&mut self.r, &[outer, inner, heads], &order, 4, pad, &[!token, !token, !head]);
            if !token && !head {
                // No packed strides, but one scale for all.
                (view.stride, view.bytes) = ([0; 4], 4);
            }
            let mut memory = self.memory(view.bytes);
            for (b, slots) in held.iter().enumerate() {
                let scales = if which == 0 { &case.sequences[b].k_scales } else { &case.sequences[b].v_scales };
                for slot in 0..slots.len() {
                    for h in 0..heads {
                        let position = self.order[b][h][slot];
                        let list = b * pages.lists + h % pages.lists;
                        let (o, i) = if strided { (b, slot) } else { (pages.of[list][slot / inner], slot % inner) };
                        put(&mut memory, view.at([o, i, h, 0]), Dtype::F32, scales[position * heads + h]);
                    }
                }
            }
            memory.freeze();
            let tensor = Tensor { data: memory.ptr(), bytes: memory.len() as u64, stride: view.stride };
            if which == 0 {
                args.k_scale = tensor
            } else {
                args.v_scale = tensor
            }
            memory
        });
        (made.next().expect("two"), made.next().expect("two"))
    }

    fn query_start(&self) -> Vec<i32> {
        let mut starts: Vec<i32> = self.case.sequences.iter().map(|s| s.first_token as i32).collect();
        starts.push(self.case.sequences.last().map_or(0, |s| (s.first_token + s.tokens) as i32));
        starts
    }

    /// Global position of slot 0 of each sequence; a rank that holds none of it may say anything.
    fn starts(&mut self, held: &[&[usize]]) -> Memory {
        let dead = if self.wild { self.r.pick(&[0, -1, i32::MAX]) } else { 0 };
        let starts: Vec<i32> = held.iter().map(|slots| slots.first().map_or(dead, |&p| p as i32)).collect();
        Memory::of_ints(&starts)
    }

    /// Passes what tells positions, and what may be left out only where it is not needed.
    fn positions(&mut self, held: &[&[usize]], rank: &mut Rank) {
        let (case, desc) = (self.case, &self.case.desc);
        let needless = |r: &mut Rng| self.wild && r.chance(50);
        if case.query_start {
            rank.args.query_start = rank.query_start.ints();
        }
        rank.args.kv_length = rank.kv_length.ints();
        if case.query_position.is_some() {
            rank.args.query_position = rank.query_position.ints();
        }
        if desc.checked || desc.needs_positions() && case.query_position.is_none() || needless(&mut self.r) {
            rank.args.global_length = rank.global_length.ints();
        }
        let alone = case.world == 1 && held.iter().all(|slots| slots.first().is_none_or(|&p| p == 0));
        let has_starts = desc.checked || desc.needs_positions() && !alone;
        if desc.placement == Placement::Contiguous && (has_starts || needless(&mut self.r)) {
            rank.args.kv_start = rank.kv_start.ints();
        }
        if desc.placement == Placement::Explicit {
            let max_kv_length = desc.max_kv_length as usize;
            let longest = held.iter().map(|slots| slots.len()).max().unwrap_or(0);
            // Rows may be narrower than the plan's longest sequence, but not than what is held.
            let own = self.wild && self.r.chance(50) && longest > 0;
            let stride = if own { longest + self.r.range(0, 3) } else { max_kv_length };
            let dead = self.r.pick(&[-1, i32::MAX, i32::MIN]);
            let rows = if desc.pages_by_head { desc.kv_heads as usize } else { 1 };
            let mut table = vec![dead; stride * rows * held.len()];
            let order = self.order.iter().flat_map(|heads| &heads[..rows]);
            for (row, slots) in table.chunks_exact_mut(stride).zip(order) {
                row.iter_mut().zip(slots).for_each(|(to, &position)| *to = position as i32);
            }
            rank.kv_position = Memory::of_ints(&table);
            if desc.checked || desc.needs_positions() || needless(&mut self.r) {
                rank.args.kv_position = rank.kv_position.ints();
                rank.args.kv_position_stride = if own || rows > 1 { (rows * stride) as i64 } else { 0 };
                rank.args.kv_position_head_stride = if desc.pages_by_head { stride as i64 } else { 0 };
            }
        }
    }

    fn tables(&mut self, held: &[&[usize]], pages: &Pages, rank: &mut Rank) {
        let desc = &self.case.desc;
        let page_size = desc.page_size as usize;
        let dead = self.r.pick(&[-1, i32::MAX, pages.count as i32]);
        match desc.kv_layout {
            KvLayout::Strided => {}
            KvLayout::BlockTable => {
                let longest = pages.of.iter().map(Vec::len).max().unwrap_or(0);
                let width = longest + if self.wild { self.r.range(0, 2) } else { 0 };
                let mut table = vec![dead; width * held.len()];
                if width > 0 {
                    for (row, pages) in table.chunks_exact_mut(width).zip(&pages.of) {
                        row.iter_mut().zip(pages).for_each(|(to, &page)| *to = page as i32);
                    }
                }
                rank.block_table = Memory::of_ints(&table);
                rank.args.block_table = rank.block_table.ints();
                rank.args.max_pages = width as i32;
            }
            KvLayout::CsrPages => {
                let by_last_page = self.wild && self.r.chance(50);
                let lead = if self.wild { self.r.range(0, 2) } else { 0 };
                let mut indices = vec![dead; lead];
                let (mut indptr, mut last) = (vec![lead as i32], Vec::new());
                let mut spare = Vec::new();
                for (slots, pages) in held.iter().zip(pages.of.iter().step_by(pages.lists)) {
                    indices.extend(pages.iter().map(|&page| page as i32));
                    spare.push(!by_last_page && self.wild && self.r.chance(30));
                    if spare.last() == Some(&true) {
                        indices.push(dead);
                    }
                    indptr.push(indices.len() as i32);
                    last.push(if slots.is_empty() { dead } else { ((slots.len() - 1) % page_size + 1) as i32 });
                }
                // The lists of the other kv heads, each set as far behind the one before.
                let stride = indices.len() - lead + if self.wild { self.r.range(0, 2) } else { 0 };
                for head in 1..pages.lists {
                    indices.resize(lead + head * stride, dead);
                    for (b, &spare) in spare.iter().enumerate() {
                        indices.extend(pages.of[b * pages.lists + head].iter().map(|&page| page as i32));
                        indices.extend(spare.then_some(dead));
                    }
                }
                if pages.lists > 1 {
                    rank.args.page_index_head_stride = stride as i64;
                }
                if self.wild && self.r.chance(30) {
                    indices.push(dead);
                }
                rank.page_indptr = Memory::of_ints(&indptr);
                rank.page_indices = Memory::of_ints(&indices);
                rank.last_page_len = Memory::of_ints(&last);
                rank.args.page_indptr = rank.page_indptr.ints();
                rank.args.page_indices = rank.page_indices.ints();
                rank.args.num_page_indices = indices.len() as i64;
                if by_last_page {
                    rank.args.last_page_len = rank.last_page_len.ints();
                    rank.args.kv_length = std::ptr::null();
                }
            }
        }
    }
}
