//! One rank's buffers of a self-check: the shard in the descriptor's layout, with NaN wherever no live data is.

use super::inputs::{Inputs, Random, Sequence, put, room, scale_of};
use crate::attention::{AttentionDesc, DecodeArgs, Dtype, KvFormat, KvLayout, MaskElement, Placement, Shard, Tensor};
use crate::device::Device;
use crate::error::Result;
use crate::runtime::buffer::Buffer;
use crate::runtime::context::Runtime;

/// Every byte of dead memory: NaN in f32, f16 and bf16.
const POISON: u8 = 0xff;

/// The buffers behind the arguments of one rank's step.
pub(super) struct ShardBuffers {
    pub args: DecodeArgs,
    pub out: Buffer,
    pub lse: Buffer,
    /// Kept alive for `args`.
    _inputs: Vec<Buffer>,
}

/// int32 inputs of a step, packed into one buffer.
#[derive(Default)]
struct Integers {
    words: Vec<i32>,
}

impl Integers {
    /// Appends an array and gives where it begins.
    fn push(&mut self, words: &[i32]) -> usize {
        let begin = self.words.len();
        self.words.extend_from_slice(words);
        begin
    }
}

impl ShardBuffers {
    /// Rank `rank`'s shard of `inputs`; its output holds `out_heads` heads.
    pub fn new(
        runtime: &Runtime,
        device: Device,
        desc: &AttentionDesc,
        inputs: &Inputs,
        rank: usize,
        out_heads: usize,
    ) -> Result<ShardBuffers> {
        let sizes = &inputs.sizes;
        let tokens = sizes.batch * sizes.tokens;
        let map = SlotMap::new(desc, inputs, rank);
        let (dim_qk, dim_v) = (desc.head_dim_qk as usize, desc.head_dim_v as usize);
        let load = |bytes: &[u8]| -> Result<Buffer> {
            let buffer = Buffer::alloc(runtime, device, bytes.len())?;
            buffer.upload(0, bytes)?;
            Ok(buffer)
        };
        let size = desc.q_dtype.size();
        let own = desc.query_heads(Shard { rank: rank as i32, world: sizes.ranks as i32 })?;
        let (own, row) = (own.start as usize * dim_qk..own.end as usize * dim_qk, desc.q_heads as usize * dim_qk);
        let mut bytes = vec![0; tokens * own.len() * size];
        for (i, &x) in inputs.q.chunks_exact(row).flat_map(|token| &token[own.clone()]).enumerate() {
            put(&mut bytes, i * size, x, desc.q_dtype);
        }
        // A rank without heads of its own still needs a buffer to point at.
        bytes.resize(bytes.len().max(1), 0);
        let q = load(&bytes)?;
        let k = load(&map.fill(inputs, rank, desc, desc.k_format().row_bytes(dim_qk), |s| &s.k_rows)?)?;
        let v = load(&map.fill(inputs, rank, desc, desc.v_format().row_bytes(dim_v), |s| &s.v_rows)?)?;

        let scale = |dtype| scale_of(dtype).map(|scale| load(&scale.to_ne_bytes())).transpose();
        let (k_scale, v_scale) = (scale(desc.k_dtype)?, scale(desc.v_dtype)?);

        let mut words = Integers::default();
        let lengths: Vec<i32> = inputs.sequences.iter().map(|s| s.slots[rank].len() as i32).collect();
        let globals: Vec<i32> = inputs.sequences.iter().map(|s| s.keys as i32).collect();
        let starts: Vec<i32> =
            inputs.sequences.iter().map(|s| s.slots[rank].first().map_or(0, |&p| p as i32)).collect();
        let queries: Vec<i32> = (0..=sizes.batch).map(|b| (b * sizes.tokens) as i32).collect();
        let (lengths, globals) = (words.push(&lengths), words.push(&globals));
        let (starts, queries) = (words.push(&starts), words.push(&queries));
        let positions = words.push(&map.positions(inputs, rank));
        let table = words.push(&map.table);
        let indptr = words.push(&map.indptr);
        let integers = Buffer::alloc(runtime, device, size_of_val(&words.words[..]))?;
        let bytes: Vec<u8> = words.words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        integers.upload(0, &bytes)?;

        // As for the queries.
        let out = Buffer::alloc(runtime, device, (tokens * out_heads * dim_v * desc.out_dtype.size()).max(1))?;
        let lse = Buffer::alloc(runtime, device, (tokens * out_heads * size_of::<f32>()).max(1))?;
        let at = |begin: usize| integers.data().cast::<i32>().wrapping_add(begin).cast_const();
        let mut args = DecodeArgs {
            batch: sizes.batch as i32,
            query_tokens: tokens as i32,
            q: tensor(&q),
            k: tensor(&k).with_strides(map.strides(desc.k_format(), dim_qk)),
            v: tensor(&v).with_strides(map.strides(desc.v_format(), dim_v)),
            k_scale: k_scale.as_ref().map_or(Tensor::NULL, tensor),
            v_scale: v_scale.as_ref().map_or(Tensor::NULL, tensor),
            out: tensor(&out),
            lse: tensor(&lse),
            query_start: at(queries),
            kv_length: at(lengths),
            global_length: at(globals),
            ..DecodeArgs::default()
        };
        let mut more = Vec::new();
        let terms = &inputs.terms;
        for (has, values, argument) in
            [(desc.sinks, &terms.sinks, &mut args.sinks), (desc.alibi, &terms.slopes, &mut args.alibi_slopes)]
        {
            if has {
                let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_ne_bytes()).collect();
                let buffer = load(&bytes)?;
                *argument = tensor(&buffer);
                more.push(buffer);
            }
        }
        if let Some(element) = MaskElement::of(desc) {
            let row = map.capacity * element.size();
            let mut bytes = vec![POISON; sizes.batch * row];
            for (b, sequence) in inputs.sequences.iter().enumerate() {
                for (slot, &position) in sequence.slots[rank].iter().enumerate() {
                    let (at, x) = (b * row + slot * element.size(), terms.masks[b][position]);
                    match element {
                        MaskElement::F16 => put(&mut bytes, at, x, Dtype::F16),
                        MaskElement::F32 => put(&mut bytes, at, x, Dtype::F32),
                        MaskElement::Byte => bytes[at] = u8::from(x == 0.0),
                    }
                }
            }
            let buffer = load(&bytes)?;
            args.mask = tensor(&buffer).with_strides([row as i64, 0, 0, element.size() as i64]);
            more.push(buffer);
        }
        match desc.placement {
            Placement::Contiguous => args.kv_start = at(starts),
            Placement::Interleaved { .. } => {}
            Placement::Explicit => {
                args.kv_position = at(positions);
                args.kv_position_stride = map.capacity as i64;
            }
        }
        match desc.kv_layout {
            KvLayout::Strided => {}
            KvLayout::BlockTable => {
                args.block_table = at(table);
                args.max_pages = map.max_pages as i32;
                args.num_pages = map.pages as i32;
            }
            KvLayout::CsrPages => {
                args.page_indptr = at(indptr);
                args.page_indices = at(table);
                args.num_page_indices = map.table.len() as i64;
                args.num_pages = map.pages as i32;
            }
        }
        more.extend([q, k, v, integers].into_iter().chain(k_scale).chain(v_scale));
        Ok(ShardBuffers { args, out, lse, _inputs: more })
    }

    /// Fills the outputs with NaN, so that an element nobody writes shows.
    pub fn poison(&self) -> Result<()> {
        for buffer in [&self.out, &self.lse] {
            buffer.upload(0, &vec![POISON; buffer.bytes()])?;
        }
        Ok(())
    }

    /// The bytes of out and lse.
    pub fn results(&self) -> Result<(Vec<u8>, Vec<u8>)> {
        let (mut out, mut lse) = (vec![0; self.out.bytes()], vec![0; self.lse.bytes()]);
        self.out.download(0, &mut out)?;
        self.lse.download(0, &mut lse)?;
        Ok((out, lse))
    }
}

fn tensor(buffer: &Buffer) -> Tensor {
    Tensor { data: buffer.data(), bytes: buffer.bytes() as u64, stride: [0; 4] }
}

/// Where a rank's local slots lie in its cache.
struct SlotMap {
    kv_heads: usize,
    /// Slots of a page, or of a sequence of a strided cache.
    page: usize,
    /// Pages, or sequences of a strided cache.
    pages: usize,
    /// Most local slots of a sequence, at least 1.
    capacity: usize,
    /// Pages of each sequence: a block table's rows, or compressed rows; the sequences of a strided cache.
    table: Vec<i32>,
    indptr: Vec<i32>,
    /// Entries of a row of a block table.
    max_pages: usize,
    /// Where each sequence's row begins in `table`.
    begins: Vec<usize>,
}

impl SlotMap {
    fn new(desc: &AttentionDesc, inputs: &Inputs, rank: usize) -> SlotMap {
        let lengths: Vec<usize> = inputs.sequences.iter().map(|s| s.slots[rank].len()).collect();
        let capacity = lengths.iter().copied().max().unwrap_or(0).max(1);
        let strided = desc.kv_layout == KvLayout::Strided;
        let page = if strided { capacity } else { desc.page_size as usize };
        let used = |length: usize| if strided { 1 } else { length.div_ceil(page) };
        let total: usize = lengths.iter().map(|&length| used(length)).sum();
        // Pages in any order, one more than are used; a strided cache has its sequences in order.
        let pages = if strided { total } else { total + 1 };
        let mut order: Vec<i32> = (0..pages as i32).collect();
        if !strided {
            let mut random = Random(inputs.sizes.seed ^ rank as u64);
            for last in (1..pages).rev() {
                order.swap(last, random.below(last + 1));
            }
        }
        let max_pages = lengths.iter().map(|&length| used(length)).max().unwrap_or(0) + 1;
        let (mut table, mut indptr, mut begins) = (Vec::new(), vec![0], Vec::new());
        let mut next = order.into_iter();
        for &length in &lengths {
            begins.push(table.len());
            table.extend(next.by_ref().take(used(length)));
            if desc.kv_layout == KvLayout::BlockTable {
                // Entries past the length are never used.
                table.resize(begins.len() * max_pages, -1);
            }
            indptr.push(table.len() as i32);
        }
        SlotMap { kv_heads: desc.kv_heads as usize, page, pages, capacity, table, indptr, max_pages, begins }
    }

    /// Byte strides: page, slot, kv head, dim.
    fn strides(&self, format: KvFormat, dim: usize) -> [i64; 4] {
        let row = format.row_bytes(dim);
        [row * self.kv_heads * self.page, row * self.kv_heads, row, format.block_bytes()].map(|stride| stride as i64)
    }

    /// The cache of keys or values, of rows of `size` bytes: live rows in their slots, poison elsewhere.
    fn fill(
        &self,
        inputs: &Inputs,
        rank: usize,
        desc: &AttentionDesc,
        size: usize,
        data: impl Fn(&Sequence) -> &Vec<u8>,
    ) -> Result<Vec<u8>> {
        let token = self.kv_heads * size;
        let all = self.pages.max(1) * self.page * token;
        let mut bytes = room(all)?;
        bytes.resize(all, POISON);
        for (b, sequence) in inputs.sequences.iter().enumerate() {
            for (slot, &position) in sequence.slots[rank].iter().enumerate() {
                let page = match desc.kv_layout {
                    KvLayout::Strided => b,
                    _ => self.table[self.begins[b] + slot / self.page] as usize,
                };
                let to = (page * self.page + slot % self.page) * token;
                bytes[to..to + token].copy_from_slice(&data(sequence)[position * token..(position + 1) * token]);
            }
        }
        Ok(bytes)
    }

    /// Global positions [sequence, slot]; -1 where no slot is.
    fn positions(&self, inputs: &Inputs, rank: usize) -> Vec<i32> {
        let mut positions = vec![-1; inputs.sequences.len() * self.capacity];
        for (b, sequence) in inputs.sequences.iter().enumerate() {
            for (slot, &position) in sequence.slots[rank].iter().enumerate() {
                positions[b * self.capacity + slot] = position as i32;
            }
        }
        positions
    }
}
