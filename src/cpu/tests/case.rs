//! Random steps with everything they point at, and sums in float64 to compare them with.

use half::{bf16, f16};

use crate::attention::placement::interleaved_position;
use crate::attention::{AttentionDesc, DecodeArgs, Dtype, KvFormat, KvLayout, Placement, Shard, Step, Tensor};
use crate::cpu::{CpuBackend, Isa};
use crate::device::Workers;
use crate::partial::{DataFault, Lse, PartialRows};

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

pub fn round(x: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F16 => f16::from_f32(x).to_f32(),
        Dtype::Bf16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// Writes a row of blocks that lie `stride` bytes apart.
pub fn put_row(memory: &mut [u8], at: usize, stride: i64, row: &[f32], dtype: Dtype) {
    let format = KvFormat::of(dtype);
    let mut packed = vec![0; format.row_bytes(row.len())];
    format.narrow_row(row, &mut packed);
    for (i, block) in packed.chunks_exact(format.block_bytes()).enumerate() {
        memory[at + i * stride as usize..][..block.len()].copy_from_slice(block);
    }
}

pub fn put(memory: &mut [u8], at: usize, x: f32, dtype: Dtype) {
    match dtype {
        Dtype::F16 => memory[at..at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes()),
        Dtype::Bf16 => memory[at..at + 2].copy_from_slice(&bf16::from_f32(x).to_le_bytes()),
        _ => memory[at..at + 4].copy_from_slice(&x.to_le_bytes()),
    }
}

/// A step with everything it points at.
pub struct Case {
    pub desc: AttentionDesc,
    pub shard: Shard,
    pub lengths: Vec<i32>,
    pub starts: Vec<i32>,
    pub kv_starts: Vec<i32>,
    pub globals: Vec<i32>,
    pub positions: Vec<i32>,
    pub table: Vec<i32>,
    pub indptr: Vec<i32>,
    pub last: Vec<i32>,
    pub pages: i32,
    pub q: Vec<u8>,
    pub k: Vec<u8>,
    pub v: Vec<u8>,
    pub q_stride: [i64; 4],
    pub k_stride: [i64; 4],
    pub v_stride: [i64; 4],
}

/// How large the numbers are.
#[derive(Clone, Copy)]
pub struct Magnitudes {
    pub q: f32,
    pub v_offset: f32,
}

pub fn strides(random: &mut Random, mut shape: [usize; 4], dtype: Dtype) -> [i64; 4] {
    let size = dtype.size();
    shape[3] = KvFormat::of(dtype).blocks(shape[3]);
    let style = random.below(5);
    if style == 4 {
        // Transposed: tokens innermost.
        let pad = random.below(3) * size;
        let element = shape[1] * size + pad;
        let head = shape[3] * element;
        return [shape[2] * head + pad, size, head, element].map(|stride| stride as i64);
    }
    let element = if style == 3 { size * (1 + random.below(3)) } else { size };
    let pad = if style == 0 { 0 } else { random.below(3) * size };
    let row = shape[3] * element + pad;
    let (token, head) = if random.below(2) == 0 { (row * shape[2], row) } else { (row, row * shape[1]) };
    let sequence = row * shape[1] * shape[2] + pad;
    [sequence as i64, token as i64, head as i64, element as i64]
}

/// Memory of `shape` filled with NaN.
pub fn poison(mut shape: [usize; 4], stride: [i64; 4], dtype: Dtype) -> Vec<u8> {
    shape[3] = KvFormat::of(dtype).blocks(shape[3]);
    let extent: i64 = shape.iter().zip(stride).map(|(&n, s)| (n as i64 - 1).max(0) * s).sum();
    vec![0xff; extent as usize + dtype.size()]
}

pub fn at(stride: &[i64; 4], index: [usize; 4]) -> usize {
    index.iter().zip(stride).map(|(&i, &s)| i as i64 * s).sum::<i64>() as usize
}

impl Case {
    pub fn random(seed: u64) -> Case {
        let r = &mut Random(seed);
        let dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16];
        let dims = [1, 3, 8, 16, 32, 48, 64, 80, 100, 128, 129, 192, 256, 576];
        let kv_heads = r.pick(&[1, 1, 2, 3, 4, 8]);
        let group = r.pick(&[1, 1, 2, 3, 4, 4, 5, 7, 8, 17]);
        let mut desc = AttentionDesc::new(kv_heads * group, kv_heads, r.pick(&dims), 1);
        if r.below(3) == 0 {
            desc.head_dim_v = r.pick(&dims);
        }
        desc.q_dtype = r.pick(&dtypes);
        let mut stored = |dim: &mut i32| loop {
            let dtype = if r.below(2) == 0 { r.pick(&dtypes) } else { r.pick(&Dtype::ALL) };
            if dtype != Dtype::Int8 {
                *dim = (*dim as u32).next_multiple_of(KvFormat::of(dtype).block_elements() as u32) as i32;
                return dtype;
            }
        };
        (desc.k_dtype, desc.v_dtype) = (stored(&mut desc.head_dim_qk), stored(&mut desc.head_dim_v));
        desc.kv_layout = r.pick(&[KvLayout::Strided, KvLayout::BlockTable, KvLayout::CsrPages]);
        desc.page_size = if desc.kv_layout == KvLayout::Strided { 0 } else { r.pick(&[1, 3, 16, 64, 100]) };
        desc.placement = r.pick(&[
            Placement::Contiguous,
            Placement::Interleaved { run: 1 },
            Placement::Interleaved { run: 5 },
            Placement::Explicit,
        ]);
        desc.causal = r.below(2) == 0;
        desc.scale = r.pick(&[0.0, 0.0, 0.3, -0.2]);
        desc.window = if r.below(4) == 0 { r.pick(&[1, 3, 64, 100, 700]) } else { 0 };
        let world = r.pick(&[1, 2, 3]);
        let shard = Shard { rank: r.below(world as usize) as i32, world };
        let batch = r.pick(&[1, 1, 2, 3, 6]);
        let longest = r.pick(&[1, 5, 64, 65, 130, 400, 1500]) / if desc.head_dim_qk > 200 { 4 } else { 1 } + 1;
        let lengths: Vec<i32> =
            (0..batch).map(|_| if r.below(6) == 0 { 0 } else { 1 + r.below(longest) as i32 }).collect();
        let mut starts = vec![r.below(2) as i32];
        for _ in 0..batch {
            starts.push(starts[starts.len() - 1] + r.pick(&[1, 1, 1, 0, 2, 5, 13]));
        }
        (desc.max_batch, desc.max_kv_length) = (batch as i32, longest as i32);
        desc.max_query_tokens = starts[batch] + 1;
        let magnitudes = Magnitudes { q: r.pick(&[0.0, 0.1, 1.0, 1.0, 20.0]), v_offset: r.pick(&[0.0, 0.0, 2.0]) };
        Case::fill(r, desc, shard, lengths, starts, magnitudes)
    }

    pub fn fill(
        r: &mut Random,
        desc: AttentionDesc,
        shard: Shard,
        lengths: Vec<i32>,
        starts: Vec<i32>,
        magnitudes: Magnitudes,
    ) -> Case {
        let batch = lengths.len();
        let page = desc.page_size.max(1) as usize;
        let longest = desc.max_kv_length as usize;
        let used: Vec<usize> = lengths.iter().map(|&n| (n as usize).div_ceil(page)).collect();
        let pages = used.iter().sum::<usize>() + 3;
        let mut order: Vec<i32> = (0..pages as i32).collect();
        for i in (1..pages).rev() {
            order.swap(i, r.below(i + 1));
        }
        let row_entries = longest.div_ceil(page) + 1;
        let (mut table, mut indptr, mut last) = (Vec::new(), vec![0], Vec::new());
        for (b, &n) in used.iter().enumerate() {
            let mine: Vec<i32> = order.drain(..n).collect();
            indptr.push(indptr[b] + n as i32);
            last.push((lengths[b] - (n as i32 - 1) * page as i32).max(0));
            if desc.kv_layout == KvLayout::CsrPages {
                table.extend(mine);
            } else {
                let mut row = mine;
                row.resize(row_entries, i32::MAX);
                table.extend(row);
            }
        }
        let paged = desc.kv_layout != KvLayout::Strided;
        let (heads, tokens) = (desc.kv_heads as usize, starts[batch] as usize);
        let outer = if paged { [pages, page] } else { [batch, longest] };
        let k_dims = [outer[0], outer[1], heads, desc.head_dim_qk as usize];
        let v_dims = [outer[0], outer[1], heads, desc.head_dim_v as usize];
        let q_dims = [1, tokens, desc.q_heads as usize, desc.head_dim_qk as usize];
        let (k_stride, v_stride) = (strides(r, k_dims, desc.k_dtype), strides(r, v_dims, desc.v_dtype));
        let q_stride = strides(r, q_dims, desc.q_dtype);
        let globals: Vec<i32> = (0..batch)
            .map(|b| {
                let world = shard.world;
                (lengths[b] * world + r.below(9) as i32 - 4).max(starts[b + 1] - starts[b])
            })
            .collect();
        let mut case = Case {
            kv_starts: (0..batch).map(|b| r.below(globals[b].max(1) as usize) as i32 / 2).collect(),
            positions: (0..batch * longest).map(|i| r.below(globals[i / longest].max(1) as usize) as i32).collect(),
            q: poison(q_dims, q_stride, desc.q_dtype),
            k: poison(k_dims, k_stride, desc.k_dtype),
            v: poison(v_dims, v_stride, desc.v_dtype),
            pages: pages as i32,
            desc,
            shard,
            lengths,
            starts,
            globals,
            table,
            indptr,
            last,
            q_stride,
            k_stride,
            v_stride,
        };
        for b in 0..batch {
            for slot in 0..case.lengths[b] as usize {
                for h in 0..heads {
                    let row: Vec<f32> = (0..k_dims[3]).map(|_| r.float()).collect();
                    let to = at(&k_stride, case.index(b, slot, h, 0));
                    put_row(&mut case.k, to, k_stride[3], &row, desc.k_dtype);
                    let row: Vec<f32> = (0..v_dims[3]).map(|_| r.float() + magnitudes.v_offset).collect();
                    let to = at(&v_stride, case.index(b, slot, h, 0));
                    put_row(&mut case.v, to, v_stride[3], &row, desc.v_dtype);
                }
            }
        }
        for t in case.starts[0] as usize..tokens {
            for h in 0..q_dims[2] {
                for d in 0..q_dims[3] {
                    let x = r.float() * magnitudes.q;
                    put(&mut case.q, at(&q_stride, [0, t, h, d]), x, desc.q_dtype);
                }
            }
        }
        case
    }

    fn index(&self, b: usize, slot: usize, h: usize, d: usize) -> [usize; 4] {
        let page = self.desc.page_size as usize;
        match self.desc.kv_layout {
            KvLayout::Strided => [b, slot, h, d],
            KvLayout::BlockTable => {
                let row = self.table.len() / self.lengths.len();
                [self.table[b * row + slot / page] as usize, slot % page, h, d]
            }
            KvLayout::CsrPages => [self.table[self.indptr[b] as usize + slot / page] as usize, slot % page, h, d],
        }
    }

    pub fn get(memory: &[u8], at: usize, dtype: Dtype) -> f64 {
        f64::from(KvFormat::of(dtype).element(&memory[at..], 0))
    }

    /// Element `d` of a row.
    fn get_in(memory: &[u8], stride: &[i64; 4], mut index: [usize; 4], dtype: Dtype) -> f64 {
        let (format, d) = (KvFormat::of(dtype), index[3]);
        index[3] = d / format.block_elements();
        f64::from(format.element(&memory[at(stride, index)..], d % format.block_elements()))
    }

    fn tokens(&self) -> usize {
        self.starts[self.lengths.len()] as usize
    }

    pub fn step(&self) -> Step {
        let tensor = |data: &[u8], stride: [i64; 4]| Tensor::from_slice(data).with_strides(stride);
        let csr = self.desc.kv_layout == KvLayout::CsrPages;
        let by_last = csr && self.lengths.iter().sum::<i32>() % 2 == 0;
        let mut args = DecodeArgs {
            batch: self.lengths.len() as i32,
            query_tokens: self.tokens() as i32,
            q: tensor(&self.q, [self.q_stride[1], self.q_stride[2], self.q_stride[3], 0]),
            k: tensor(&self.k, self.k_stride),
            v: tensor(&self.v, self.v_stride),
            query_start: self.starts.as_ptr(),
            global_length: self.globals.as_ptr(),
            ..DecodeArgs::default()
        };
        match self.desc.placement {
            Placement::Contiguous => args.kv_start = self.kv_starts.as_ptr(),
            Placement::Interleaved { .. } => {}
            Placement::Explicit => args.kv_position = self.positions.as_ptr(),
        }
        match self.desc.kv_layout {
            KvLayout::Strided => {}
            KvLayout::BlockTable => {
                args.block_table = self.table.as_ptr();
                args.max_pages = (self.table.len() / self.lengths.len()) as i32;
                args.num_pages = self.pages;
            }
            KvLayout::CsrPages => {
                (args.page_indptr, args.page_indices) = (self.indptr.as_ptr(), self.table.as_ptr());
                (args.num_page_indices, args.num_pages) = (self.table.len() as i64, self.pages);
            }
        }
        if by_last {
            args.last_page_len = self.last.as_ptr()
        } else {
            args.kv_length = self.lengths.as_ptr()
        }
        // The backend does not write out itself; any memory of the right size will do.
        let floats = self.tokens() * self.desc.q_heads as usize * self.desc.head_dim_v as usize;
        let mut out = vec![0f32; floats];
        args.out = Tensor::from_slice_mut(&mut out);
        Step::new(&self.desc, self.shard, &args, self.desc.q_heads).unwrap()
    }

    pub fn run(&self, isa: Isa, threads: usize) -> (Vec<f32>, Vec<f32>, Option<DataFault>) {
        let workers = Workers::new(threads, "test", false).unwrap();
        let backend = CpuBackend::new(&self.desc, self.shard, threads, isa).unwrap();
        let rows = self.tokens() * self.desc.q_heads as usize;
        let dim = self.desc.head_dim_v as usize;
        let (mut o, mut lse) = (vec![7.0; rows * dim], vec![Lse::of(7.0); rows]);
        let rows = PartialRows { o: &mut o, lse: &mut lse, dim };
        // SAFETY: everything that the step points at is in `self`, and nobody writes it meanwhile.
        let fault = unsafe { backend.attend(&self.step(), &workers, rows) }.unwrap();
        (o, lse.into_iter().map(|lse| lse.high).collect(), fault)
    }

    fn sees(&self, b: usize, token: usize, slot: usize) -> bool {
        let n = i64::from(self.starts[b + 1] - self.starts[b]);
        let query = i64::from(self.globals[b]) - n + token as i64;
        let key = match self.desc.placement {
            Placement::Contiguous => i64::from(self.kv_starts[b]) + slot as i64,
            Placement::Interleaved { run } => interleaved_position(i64::from(run), self.shard, slot as i64),
            Placement::Explicit => i64::from(self.positions[b * self.desc.max_kv_length as usize + slot]),
        };
        let window = i64::from(self.desc.window);
        (!self.desc.causal || key <= query) && (window == 0 || query - key < window)
    }

    /// Checks every row against float64; gives the largest error as a part of what is allowed.
    pub fn check(&self, o: &[f32], lse: &[f32], what: &str) -> f64 {
        let (heads, dim) = (self.desc.q_heads as usize, self.desc.head_dim_v as usize);
        let scale = f64::from(self.desc.effective_scale());
        let mut worst = 0f64;
        for b in 0..self.lengths.len() {
            for token in 0..(self.starts[b + 1] - self.starts[b]) as usize {
                for head in 0..heads {
                    let (t, kv) = (self.starts[b] as usize + token, head / self.desc.group() as usize);
                    let slots: Vec<usize> =
                        (0..self.lengths[b] as usize).filter(|&slot| self.sees(b, token, slot)).collect();
                    let dot = |slot: usize| {
                        let (mut s, mut a) = (0.0, 0.0);
                        for d in 0..self.desc.head_dim_qk as usize {
                            let x = Case::get(&self.q, at(&self.q_stride, [0, t, head, d]), self.desc.q_dtype);
                            let index = self.index(b, slot, kv, d);
                            let y = Case::get_in(&self.k, &self.k_stride, index, self.desc.k_dtype);
                            s += x * y;
                            a += (x * y).abs();
                        }
                        (s * scale, a * scale.abs())
                    };
                    let scores: Vec<(f64, f64)> = slots.iter().map(|&slot| dot(slot)).collect();
                    let row = t * heads + head;
                    if slots.is_empty() {
                        assert_eq!(lse[row], f32::NEG_INFINITY, "{what} row {row}");
                        assert!(o[row * dim..(row + 1) * dim].iter().all(|&x| x == 0.0), "{what} row {row}");
                        continue;
                    }
                    let max = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(s.0));
                    let size = scores.iter().fold(0f64, |m, s| m.max(s.1));
                    let sum: f64 = scores.iter().map(|s| (s.0 - max).exp()).sum();
                    let wanted = max + sum.ln();
                    let ulp = wanted.abs().max(size).max(1.0) as f32;
                    let ulp = f64::from(f32::from_bits(ulp.to_bits() + 1) - ulp);
                    worst = worst.max((f64::from(lse[row]) - wanted).abs() / (4.0 * ulp));
                    assert!(
                        worst <= 1.0,
                        "{what} sequence {b} token {token} head {head}: lse {} {wanted} size {size}",
                        lse[row]
                    );
                    let bound = (4.0 + 2.0 * size) / f64::from(1 << 24);
                    for d in 0..dim {
                        let (mut exact, mut absolute, mut largest) = (0.0, 0.0, 0f64);
                        for (&slot, s) in slots.iter().zip(&scores) {
                            let index = self.index(b, slot, kv, d);
                            let v = Case::get_in(&self.v, &self.v_stride, index, self.desc.v_dtype);
                            let x = (s.0 - max).exp() / sum * v;
                            exact += x;
                            absolute += x.abs();
                            largest = largest.max(v.abs());
                        }
                        let error = (f64::from(o[row * dim + d]) - exact).abs();
                        // Weights below 2^-126 may count as none.
                        let allowed = bound * absolute + slots.len() as f64 * 2f64.powi(-125) * largest;
                        let part = if error == 0.0 { 0.0 } else { error / allowed };
                        worst = if part.is_nan() { f64::INFINITY } else { worst.max(part) };
                    }
                    assert!(
                        worst <= 1.0,
                        "{what} sequence {b} token {token} head {head}: {worst} of what is allowed ({} keys, size {size})",
                        slots.len()
                    );
                }
            }
        }
        worst
    }
}
