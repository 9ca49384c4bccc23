//! The backend against sums in float64, on every instruction set of this machine.

use half::{bf16, f16};

use super::{CpuBackend, Isa};
use crate::attention::placement::interleaved_position;
use crate::attention::{
    AttentionDesc, DecodeArgs, Dtype, KvFormat, KvLayout, Mask, MaskElement, MaskKind, Placement, QueryInput, Shard,
    Step, Tensor, supported,
};
use crate::device::Workers;
use crate::partial::{DataFault, DataFaultCause, Lse, PartialRows};

/// SplitMix64.
pub(super) struct Random(pub u64);

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

fn round(x: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F16 => f16::from_f32(x).to_f32(),
        Dtype::Bf16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// Writes a row of blocks that lie `stride` bytes apart.
fn put_row(memory: &mut [u8], at: usize, stride: i64, row: &[f32], dtype: Dtype) {
    let format = KvFormat::of(dtype);
    let mut packed = vec![0; format.row_bytes(row.len())];
    format.narrow_row(row, &mut packed);
    for (i, block) in packed.chunks_exact(format.block_bytes()).enumerate() {
        memory[at + i * stride as usize..][..block.len()].copy_from_slice(block);
    }
}

fn put(memory: &mut [u8], at: usize, x: f32, dtype: Dtype) {
    match dtype {
        Dtype::F16 => memory[at..at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes()),
        Dtype::Bf16 => memory[at..at + 2].copy_from_slice(&bf16::from_f32(x).to_le_bytes()),
        _ => memory[at..at + 4].copy_from_slice(&x.to_le_bytes()),
    }
}

/// A step with everything it points at.
struct Case {
    desc: AttentionDesc,
    shard: Shard,
    lengths: Vec<i32>,
    starts: Vec<i32>,
    kv_starts: Vec<i32>,
    globals: Vec<i32>,
    positions: Vec<i32>,
    table: Vec<i32>,
    indptr: Vec<i32>,
    last: Vec<i32>,
    pages: i32,
    q: Vec<u8>,
    k: Vec<u8>,
    v: Vec<u8>,
    q_stride: [i64; 4],
    k_stride: [i64; 4],
    v_stride: [i64; 4],
}

/// How large the numbers are.
#[derive(Clone, Copy)]
struct Magnitudes {
    q: f32,
    v_offset: f32,
}

fn strides(random: &mut Random, mut shape: [usize; 4], dtype: Dtype) -> [i64; 4] {
    let size = dtype.size();
    shape[3] = KvFormat::of(dtype).blocks(shape[3]);
    let style = random.below(4);
    let element = if style == 3 { size * (1 + random.below(3)) } else { size };
    let pad = if style == 0 { 0 } else { random.below(3) * size };
    let row = shape[3] * element + pad;
    let (token, head) = if random.below(2) == 0 { (row * shape[2], row) } else { (row, row * shape[1]) };
    let sequence = row * shape[1] * shape[2] + pad;
    [sequence as i64, token as i64, head as i64, element as i64]
}

/// Memory of `shape` filled with NaN.
fn poison(mut shape: [usize; 4], stride: [i64; 4], dtype: Dtype) -> Vec<u8> {
    shape[3] = KvFormat::of(dtype).blocks(shape[3]);
    let extent: i64 = shape.iter().zip(stride).map(|(&n, s)| (n as i64 - 1).max(0) * s).sum();
    vec![0xff; extent as usize + dtype.size()]
}

fn at(stride: &[i64; 4], index: [usize; 4]) -> usize {
    index.iter().zip(stride).map(|(&i, &s)| i as i64 * s).sum::<i64>() as usize
}

impl Case {
    fn random(seed: u64) -> Case {
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

    fn fill(
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
        let k_shape = [outer[0], outer[1], heads, desc.head_dim_qk as usize];
        let v_shape = [outer[0], outer[1], heads, desc.head_dim_v as usize];
        let q_shape = [1, tokens, desc.q_heads as usize, desc.head_dim_qk as usize];
        let (k_stride, v_stride) = (strides(r, k_shape, desc.k_dtype), strides(r, v_shape, desc.v_dtype));
        let q_stride = strides(r, q_shape, desc.q_dtype);
        let globals: Vec<i32> = (0..batch)
            .map(|b| {
                let world = shard.world;
                (lengths[b] * world + r.below(9) as i32 - 4).max(starts[b + 1] - starts[b])
            })
            .collect();
        let mut case = Case {
            kv_starts: (0..batch).map(|b| r.below(globals[b].max(1) as usize) as i32 / 2).collect(),
            positions: (0..batch * longest).map(|i| r.below(globals[i / longest].max(1) as usize) as i32).collect(),
            q: poison(q_shape, q_stride, desc.q_dtype),
            k: poison(k_shape, k_stride, desc.k_dtype),
            v: poison(v_shape, v_stride, desc.v_dtype),
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
                    let row: Vec<f32> = (0..k_shape[3]).map(|_| r.float()).collect();
                    let to = at(&k_stride, case.place(b, slot, h, 0));
                    put_row(&mut case.k, to, k_stride[3], &row, desc.k_dtype);
                    let row: Vec<f32> = (0..v_shape[3]).map(|_| r.float() + magnitudes.v_offset).collect();
                    let to = at(&v_stride, case.place(b, slot, h, 0));
                    put_row(&mut case.v, to, v_stride[3], &row, desc.v_dtype);
                }
            }
        }
        for t in case.starts[0] as usize..tokens {
            for h in 0..q_shape[2] {
                for d in 0..q_shape[3] {
                    let x = r.float() * magnitudes.q;
                    put(&mut case.q, at(&q_stride, [0, t, h, d]), x, desc.q_dtype);
                }
            }
        }
        case
    }

    fn place(&self, b: usize, slot: usize, h: usize, d: usize) -> [usize; 4] {
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

    fn get(memory: &[u8], at: usize, dtype: Dtype) -> f64 {
        f64::from(KvFormat::of(dtype).element(&memory[at..], 0))
    }

    /// Element `d` of a row.
    fn get_in(memory: &[u8], stride: &[i64; 4], mut place: [usize; 4], dtype: Dtype) -> f64 {
        let (format, d) = (KvFormat::of(dtype), place[3]);
        place[3] = d / format.block_elements();
        f64::from(format.element(&memory[at(stride, place)..], d % format.block_elements()))
    }

    fn tokens(&self) -> usize {
        self.starts[self.lengths.len()] as usize
    }

    fn step(&self) -> Step {
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

    fn run(&self, isa: Isa, threads: usize) -> (Vec<f32>, Vec<f32>, Option<DataFault>) {
        let workers = Workers::new(threads, "test", false).unwrap();
        let backend = CpuBackend::new(&self.desc, self.shard, threads, isa).unwrap();
        let rows = self.tokens() * self.desc.q_heads as usize;
        let dim = self.desc.head_dim_v as usize;
        let (mut o, mut lse) = (vec![7.0; rows * dim], vec![Lse::of(7.0); rows]);
        let fault = backend.attend(&self.step(), &workers, PartialRows { o: &mut o, lse: &mut lse, dim }).unwrap();
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
    fn check(&self, o: &[f32], lse: &[f32], what: &str) -> f64 {
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
                            let place = self.place(b, slot, kv, d);
                            let y = Case::get_in(&self.k, &self.k_stride, place, self.desc.k_dtype);
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
                            let place = self.place(b, slot, kv, d);
                            let v = Case::get_in(&self.v, &self.v_stride, place, self.desc.v_dtype);
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

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn random_shapes_on_every_isa() {
    let cases = match std::env::var("TREEATTN_TEST").as_deref() {
        Ok("full") => 2000,
        Ok("short") => 50,
        _ => 150,
    };
    for isa in Isa::available() {
        let mut worst = 0f64;
        for seed in 0..cases {
            let case = Case::random(seed * 4 + isa as u64);
            let threads = 1 + seed as usize % 5;
            let what = format!("{} seed {seed} {threads} threads {:?} {:?}", isa.name(), case.desc, case.lengths);
            let (o, lse, fault) = case.run(isa, threads);
            assert_eq!(fault, None, "{what}");
            worst = worst.max(case.check(&o, &lse, &what));
            let (again_o, again_lse, _) = case.run(isa, threads);
            assert_eq!((bits(&o), bits(&lse)), (bits(&again_o), bits(&again_lse)), "{what}: other bits");
        }
        println!("{}: {cases} cases, at most {worst:.3} of what is allowed", isa.name());
    }
}

/// A plain case: one head, dim 16, `n` keys.
fn plain(n: i32, causal: bool) -> Case {
    let mut desc = AttentionDesc::new(2, 1, 16, n);
    desc.causal = causal;
    desc.max_query_tokens = 3;
    let magnitudes = Magnitudes { q: 1.0, v_offset: 0.0 };
    let mut case = Case::fill(&mut Random(n as u64), desc, Shard::ALONE, vec![n], vec![0, 3], magnitudes);
    case.kv_starts[0] = 0;
    case.globals[0] = n;
    case
}

#[test]
fn nan_stays_where_it_is_seen() {
    for isa in Isa::available() {
        for (in_k, value) in [(true, f32::NAN), (false, f32::NAN), (false, f32::INFINITY), (true, f32::INFINITY)] {
            // The last key is seen by the last token only, the one before by the last two.
            for (slot, sees) in [(199usize, 2..3), (198, 1..3), (0, 0..3), (100, 0..3)] {
                let mut case = plain(200, true);
                let clean = case.run(isa, 2);
                let place = at(if in_k { &case.k_stride } else { &case.v_stride }, [0, slot, 0, 3]);
                put(if in_k { &mut case.k } else { &mut case.v }, place, value, Dtype::F32);
                let (o, lse, _) = case.run(isa, 2);
                for row in 0..6 {
                    let of = |v: &[f32]| bits(&v[row * 16..(row + 1) * 16]);
                    if !sees.contains(&(row / 2)) {
                        assert_eq!(
                            (of(&o), lse[row].to_bits()),
                            (of(&clean.0), clean.1[row].to_bits()),
                            "{}",
                            isa.name()
                        );
                    } else if !in_k {
                        assert!(!o[row * 16 + 3].is_finite(), "{} slot {slot}", isa.name());
                        assert_eq!(lse[row].to_bits(), clean.1[row].to_bits());
                    } else if value.is_nan() {
                        assert!(o[row * 16..(row + 1) * 16].iter().all(|x| x.is_nan()) && lse[row].is_nan());
                    }
                }
            }
        }
    }
}

#[test]
fn bad_data_is_nan_in_its_own_sequence() {
    let base = || {
        let mut desc = AttentionDesc::new(2, 1, 16, 100);
        (desc.max_batch, desc.max_query_tokens, desc.causal) = (3, 8, true);
        (desc.kv_layout, desc.page_size) = (KvLayout::BlockTable, 16);
        let magnitudes = Magnitudes { q: 1.0, v_offset: 0.0 };
        let mut case = Case::fill(&mut Random(5), desc, Shard::ALONE, vec![40, 70, 100], vec![0, 2, 5, 6], magnitudes);
        case.kv_starts.fill(0);
        case.globals = case.lengths.clone();
        case
    };
    let row = base().table.len() / 3;
    type Break = fn(&mut Case, usize);
    let breaks: [(Break, DataFaultCause); 8] = [
        (|c, _| c.lengths[1] = -1, DataFaultCause::KvLength),
        (|c, _| c.lengths[1] = 101, DataFaultCause::KvLength),
        (|c, row| c.table[row + 2] = -1, DataFaultCause::BlockTable),
        (|c, row| c.table[row + 4] = c.pages, DataFaultCause::BlockTable),
        (|c, _| c.globals[1] = 2, DataFaultCause::GlobalLength),
        (|c, _| c.kv_starts[1] = -1, DataFaultCause::KvStart),
        (|c, _| c.kv_starts[1] = i32::MAX - 3, DataFaultCause::KvStart),
        (|c, _| c.starts[2] = 99, DataFaultCause::QueryStart),
    ];
    for isa in [Isa::Scalar, Isa::best()] {
        // One worker: a sequence that drops out moves the borders of the others' slices.
        let good = base().run(isa, 1);
        for (i, (broken, cause)) in breaks.iter().enumerate() {
            let mut case = base();
            broken(&mut case, row);
            let (o, lse, fault) = case.run(isa, 1);
            let sequence = 1;
            let fault = fault.expect("bad data");
            assert_eq!((fault.sequence, fault.cause), (sequence, *cause), "{i}");
            assert!(
                fault.value.is_some_and(|value| !(value.least..=value.most).contains(&value.found)),
                "{i}: {fault:?}"
            );
            let dead = if *cause == DataFaultCause::QueryStart { 4..12 } else { 4..10 };
            for r in 0..12 {
                if dead.contains(&r) {
                    assert!(lse[r].is_nan() && o[r * 16..r * 16 + 16].iter().all(|x| x.is_nan()), "{i} row {r}");
                } else {
                    assert_eq!(bits(&o[r * 16..r * 16 + 16]), bits(&good.0[r * 16..r * 16 + 16]), "{i} row {r}");
                    assert_eq!(lse[r].to_bits(), good.1[r].to_bits());
                }
            }
        }
    }
}

#[test]
fn equal_scores_give_the_mean_of_integers() {
    for isa in Isa::available() {
        for n in [1, 2, 63, 64, 65, 1024, 5000] {
            let mut case = plain(n, false);
            case.q.fill(0);
            for slot in 0..n as usize {
                for d in 0..16 {
                    let place = at(&case.v_stride, [0, slot, 0, d]);
                    put(&mut case.v, place, ((slot * 7 + d) % 32) as f32, Dtype::F32);
                }
            }
            let (o, lse, _) = case.run(isa, 3);
            for (d, &o) in o[..16].iter().enumerate() {
                let sum: usize = (0..n as usize).map(|slot| (slot * 7 + d) % 32).sum();
                assert_eq!(o, (sum as f32) / n as f32, "{} n {n}", isa.name());
            }
            assert!((f64::from(lse[0]) - f64::from(n).ln()).abs() < 1e-6 * f64::from(n).ln().max(1.0));
        }
    }
}

#[test]
fn a_million_keys_keep_the_bound() {
    for (q, v_offset) in [(0.0, 1.0), (1.0, 0.0), (30.0, 1.0)] {
        let mut desc = AttentionDesc::new(1, 1, 16, 1 << 20);
        (desc.k_dtype, desc.v_dtype) = (Dtype::F16, Dtype::Bf16);
        let case =
            Case::fill(&mut Random(9), desc, Shard::ALONE, vec![1 << 20], vec![0, 1], Magnitudes { q, v_offset });
        for isa in [Isa::best(), Isa::Scalar] {
            let (o, lse, _) = case.run(isa, 2);
            let worst = case.check(&o, &lse, isa.name());
            println!("{}: q {q} v {v_offset}: {worst:.3} of what is allowed", isa.name());
        }
    }
}

#[test]
fn an_f32_query_is_not_rounded() {
    let mut case = plain(64, false);
    case.desc.k_dtype = Dtype::Bf16;
    let magnitudes = Magnitudes { q: 8.0, v_offset: 0.0 };
    case = Case::fill(&mut Random(3), case.desc, Shard::ALONE, vec![64], vec![0, 3], magnitudes);
    let first = Case::get(&case.q, at(&case.q_stride, [0, 0, 0, 0]), Dtype::F32) as f32;
    assert_ne!(first, round(first, Dtype::Bf16));
    for isa in Isa::available() {
        let (o, lse, _) = case.run(isa, 1);
        case.check(&o, &lse, isa.name());
    }
}

#[test]
fn what_is_not_served_is_named() {
    let desc = AttentionDesc::new(4, 2, 64, 10);
    assert!(supported(&desc, &super::CAPABILITIES).is_ok());
    type Change = fn(&mut AttentionDesc);
    let changes: [(Change, &str); 1] = [(|d| d.query_input = QueryInput::Scattered, "query_input")];
    for (change, name) in changes {
        let mut desc = desc;
        change(&mut desc);
        let error = supported(&desc, &super::CAPABILITIES).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Unsupported);
        assert!(error.message().starts_with(name), "{error}");
    }
}

/// Work follows the window, not the context: tiles outside are no work of anybody's.
#[test]
fn work_follows_the_window() {
    let tiles = |placement: Placement, window: i32, shard: Shard| {
        let mut desc = AttentionDesc::new(2, 1, 16, 4096);
        (desc.placement, desc.causal, desc.window) = (placement, true, window);
        let magnitudes = Magnitudes { q: 1.0, v_offset: 0.0 };
        let mut case = Case::fill(&mut Random(5), desc, shard, vec![4096], vec![0, 1], magnitudes);
        let global = 4096 * shard.world;
        (case.globals[0], case.kv_starts[0]) = (global, 4096 * shard.rank);
        // Slot s holds position s, whatever the number of ranks.
        case.positions = (0..4096).collect();
        let workers = Workers::new(2, "test", false).unwrap();
        let backend = CpuBackend::new(&case.desc, shard, 2, Isa::Scalar).unwrap();
        let (mut o, mut lse) = (vec![0.0; 32], vec![Lse::EMPTY; 2]);
        backend.attend(&case.step(), &workers, PartialRows { o: &mut o, lse: &mut lse, dim: 16 }).unwrap();
        let scratch = backend.scratch.lock();
        scratch.sequences[0].visible.tiles(super::kernel::args::TILE).len()
    };
    let (second, first) = (Shard { rank: 1, world: 2 }, Shard { rank: 0, world: 2 });
    for (window, wanted) in [(0, 64), (1, 1), (64, 1), (65, 2), (1000, 16), (4096, 64), (9000, 64)] {
        assert_eq!(tiles(Placement::Contiguous, window, Shard::ALONE), wanted, "window {window}");
        assert_eq!(tiles(Placement::Explicit, window, Shard::ALONE), wanted, "window {window}");
        assert_eq!(tiles(Placement::Contiguous, window, second), wanted, "window {window}");
    }
    // The first of two shards is hidden whole by a window of the second's keys; one more key shows its last tile.
    assert_eq!(tiles(Placement::Contiguous, 4096, first), 0);
    assert_eq!(tiles(Placement::Contiguous, 4097, first), 1);
    // Round robin: half of the window's keys are here.
    assert_eq!(tiles(Placement::Interleaved { run: 1 }, 1000, first), 8);
}

/// Tiles that a mask hides from all at either end are no work of anybody's.
#[test]
fn work_follows_the_mask() {
    let mut desc = AttentionDesc::new(2, 1, 16, 1000);
    desc.mask = MaskKind::Boolean;
    let magnitudes = Magnitudes { q: 1.0, v_offset: 0.0 };
    let case = Case::fill(&mut Random(5), desc, Shard::ALONE, vec![1000], vec![0, 1], magnitudes);
    let workers = Workers::new(2, "test", false).unwrap();
    let backend = CpuBackend::new(&case.desc, Shard::ALONE, 2, Isa::Scalar).unwrap();
    for (visible, wanted) in [(200..700, 3..11), (0..1000, 0..16), (64..65, 1..2), (5..5, 0..0)] {
        let bytes: Vec<u8> = (0..1000).map(|slot| u8::from(visible.contains(&slot))).collect();
        let mut step = case.step();
        step.mask = Some(Mask::at(bytes.as_ptr(), 1000, [0, 0, 0, 1], MaskElement::Byte, &case.desc));
        let (mut o, mut lse) = (vec![0.0; 32], vec![Lse::EMPTY; 2]);
        backend.attend(&step, &workers, PartialRows { o: &mut o, lse: &mut lse, dim: 16 }).unwrap();
        let scratch = backend.scratch.lock();
        assert_eq!(scratch.sequences[0].visible.tiles(super::kernel::args::TILE), wanted);
        assert_eq!(lse[0].is_empty(), visible.is_empty());
    }
}
