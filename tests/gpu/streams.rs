//! Graphs, early starts, other streams, and what the host pays.

use std::time::Instant;

use treeattn::ErrorKind;
use treeattn::attention::{AttentionDesc, DecodeArgs, Dtype, KvLayout, Tensor};
use treeattn::runtime::{Buffer, Plan, Stream};

use crate::driver::{Current, Pinned, RawKernel, RawStream, current};
use crate::mirror::{GPU, Gpu, Mirror, Ready};
use crate::numerics::shape;
use crate::support::case::Case;
use crate::support::rank::{Ints, Rank};
use crate::support::run::judge;
use crate::support::values::Values;

/// Captured once, replayed over other lengths, query starts, tables and empty rows: the bits of eager calls.
pub fn replays() {
    let _current = Current::new(0);
    for (layout, page_size) in [(KvLayout::Strided, 0), (KvLayout::BlockTable, 8), (KvLayout::CsrPages, 1)] {
        let desc = AttentionDesc { kv_layout: layout, page_size, causal: true, ..shape(16, 4, 128, Dtype::Bf16) };
        let desc = AttentionDesc { max_batch: 4, max_query_tokens: 8, max_kv_length: 2000, ..desc };
        // The same sequences of which less and less is used, so that the memory stays where it is.
        let whole = Case::plain(desc, 1, &[(2000, 2), (1600, 2), (1200, 2), (400, 2)], Values::Normal, 1);
        let mut ready = Ready::new(whole);
        let raw = RawStream::new();
        // SAFETY: the raw stream is declared before, and so outlives, the wrapped one.
        let stream = unsafe { Stream::wrap_cuda(&ready.gpu.runtime, GPU, raw.pointer()) }.unwrap();
        let graph = raw.capture(|| {
            // SAFETY: the device memory outlives the replays, which are waited for.
            unsafe { ready.plan.decode(&ready.mirror.args, Some(&stream)) }.unwrap();
        });
        let changes: [([i32; 4], [i32; 5]); 5] = [
            ([2000, 1600, 1200, 400], [0, 2, 4, 6, 8]),
            ([1, 0, 17, 399], [0, 1, 1, 5, 8]),
            ([0, 0, 0, 0], [0, 0, 0, 0, 0]),
            ([1999, 64, 65, 1], [2, 4, 5, 6, 6]),
            ([2, 1200, 1199, 400], [0, 2, 2, 2, 8]),
        ];
        let table = match layout {
            KvLayout::Strided => None,
            KvLayout::BlockTable => Some((Ints::BlockTable, ready.rank.block_table.len() / 4)),
            KvLayout::CsrPages => Some((Ints::PageIndices, ready.rank.page_indices.len() / 4)),
        };
        for (round, (lengths, starts)) in changes.into_iter().enumerate() {
            // Other pages in every round: any page will do, since bits are held against bits.
            if let Some((ints, entries)) = table {
                let pages = ready.rank.args.num_pages as usize;
                (0..entries).for_each(|entry| ready.rank.set(ints, entry, ((entry * 7 + round) % pages) as i32));
            }
            for (b, &length) in lengths.iter().enumerate() {
                ready.rank.set(Ints::KvLength, b, length);
                ready.rank.set(Ints::GlobalLength, b, length.max(starts[b + 1] - starts[b]));
            }
            starts.iter().enumerate().for_each(|(b, &start)| ready.rank.set(Ints::QueryStart, b, start));
            ready.rank.prefill(0xff);
            ready.mirror.update_all(&ready.rank);
            ready.mirror.decode(&ready.gpu, &ready.plan, &mut ready.rank).unwrap();
            let eager = ready.rank.bits(&ready.case);
            for _ in 0..3 {
                ready.rank.prefill(0xff);
                ready.mirror.update_all(&ready.rank);
                graph.replay(&raw);
                raw.synchronize();
                ready.mirror.fetch(&mut ready.rank);
                assert!(ready.rank.bits(&ready.case) == eager, "{layout:?} {lengths:?}: other bits in a replay");
            }
            assert!(ready.comm.status().unwrap().error.is_none());
        }
        drop(graph);
    }
}

/// A predecessor that lets dependents start at once, and only then writes lengths, keys, values and queries.
pub fn late_predecessors(runs: usize) {
    let _current = Current::new(0);
    let copy = RawKernel::new("late_copy");
    for sequences in [&[(400, 1)][..], &[(30_000, 1), (5, 1)], &[(64, 4), (900, 2), (0, 1)]] {
        let desc = AttentionDesc { causal: true, ..shape(8, 2, 128, Dtype::Bf16) };
        let mut ready = Ready::new(Case::plain(desc, 1, sequences, Values::Normal, 21));
        let wanted = ready.bits();
        // Everything as it should be, and memory that is wrong until the copy.
        let good = Mirror::new(&ready.gpu, &ready.rank);
        let raw = RawStream::new();
        // SAFETY: the raw stream outlives the wrapped one.
        let stream = unsafe { Stream::wrap_cuda(&ready.gpu.runtime, GPU, raw.pointer()) }.unwrap();
        let words = (good.bytes() / 16) as u64;
        for run in 0..runs {
            let work = Mirror::new(&ready.gpu, &ready.rank);
            work.fill(0);
            copy.launch(&raw, if run % 2 == 0 { 4 } else { 264 }, &[good.address(), work.address(), words, 200_000]);
            // SAFETY: the device memory outlives the step.
            unsafe { ready.plan.decode(&work.args, Some(&stream)) }.unwrap();
            raw.synchronize();
            work.fetch(&mut ready.rank);
            assert!(ready.rank.bits(&ready.case) == wanted, "run {run}: the step read what was not written yet");
        }
        assert!(ready.comm.status().unwrap().error.is_none());
    }
}

/// Creating and destroying during a capture is refused and leaves it intact; a capture of a stream that the library
/// does not know is left intact, too.
pub fn captures() {
    let _current = Current::new(0);
    let mut ready = Ready::new(Case::plain(shape(8, 2, 128, Dtype::Bf16), 1, &[(500, 1)], Values::Normal, 3));
    let wanted = ready.bits();
    let raw = RawStream::new();
    // SAFETY: the raw stream outlives the wrapped one.
    let stream = unsafe { Stream::wrap_cuda(&ready.gpu.runtime, GPU, raw.pointer()) }.unwrap();
    let graph = raw.capture(|| {
        let refused = [
            Plan::create(&ready.comm, &ready.case.desc).err(),
            Stream::new(&ready.gpu.runtime, GPU).err(),
            Buffer::alloc(&ready.gpu.runtime, GPU, 100).err(),
            stream.synchronize().err(),
            ready.plan.check_destroy().err(),
        ];
        for (i, error) in refused.into_iter().enumerate() {
            assert_eq!(error.map(|e| e.kind()), Some(ErrorKind::Capturing), "call {i}");
        }
        // SAFETY: the device memory outlives the replay.
        unsafe { ready.plan.decode(&ready.mirror.args, Some(&stream)) }.unwrap();
        assert!(ready.comm.status().unwrap().error.is_none());
    });
    graph.replay(&raw);
    raw.synchronize();
    ready.mirror.fetch(&mut ready.rank);
    assert!(ready.rank.bits(&ready.case) == wanted);
    drop((graph, stream));

    let unknown = RawStream::new();
    let graph = unknown.capture(|| {
        let (_comm, plan) = ready.gpu.plan(&ready.case.desc);
        drop(plan);
    });
    graph.replay(&unknown);
    unknown.synchronize();
}

/// The caller's current context stays what it was, none included.
pub fn current_context() {
    let gpu = Gpu::new();
    assert_eq!(current(), 0);
    let case = Case::plain(shape(8, 2, 64, Dtype::Bf16), 1, &[(100, 1)], Values::Normal, 3);
    let mut ready = Ready::new(case.clone());
    ready.bits();
    assert_eq!(current(), 0);
    {
        let _current = Current::new(0);
        let mine = current();
        let mut ready = Ready::new(case);
        ready.bits();
        drop(ready);
        assert_eq!(current(), mine);
    }
    drop((ready, gpu));
    assert_eq!(current(), 0);
}

/// Host memory is refused by name, pinned or not, and a missing stream, too; nothing is written.
pub fn refusals() {
    let ready = Ready::new(Case::plain(shape(8, 2, 64, Dtype::Bf16), 1, &[(100, 1)], Values::Normal, 3));
    let args = ready.mirror.args;
    let _current = Current::new(0);
    let host = vec![0u8; 1 << 20];
    let pinned = Pinned::new(1 << 20);
    let cases = [
        ("q.data", DecodeArgs { q: Tensor::from_slice(&host), ..args }),
        ("k.data", DecodeArgs { k: Tensor { data: pinned.0, ..args.k }, ..args }),
        ("v.data", DecodeArgs { v: Tensor { data: host.as_ptr() as *mut _, ..args.v }, ..args }),
        ("out.data", DecodeArgs { out: Tensor { data: pinned.0, ..args.out }, ..args }),
        ("kv_length", DecodeArgs { kv_length: ready.rank.kv_length.ints(), ..args }),
        ("kv_length", DecodeArgs { kv_length: pinned.0.cast(), ..args }),
    ];
    for (name, args) in cases {
        // SAFETY: refused before anything is enqueued.
        let error = unsafe { ready.plan.decode(&args, Some(&ready.gpu.stream)) }.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.message().starts_with(name), "{error}");
    }
    // SAFETY: as above.
    let error = unsafe { ready.plan.decode(&args, None) }.unwrap_err();
    assert!(error.message().starts_with("stream: found NULL"), "{error}");
}

/// A plan may be dropped with steps enqueued: it waits for them.
pub fn drops_in_flight() {
    let mut ready = Ready::new(Case::plain(shape(32, 8, 128, Dtype::Bf16), 1, &[(200_000, 1)], Values::Equal, 3));
    let wanted = ready.bits();
    for _ in 0..20 {
        let (comm, plan) = ready.gpu.plan(&ready.case.desc);
        for _ in 0..50 {
            // SAFETY: the device memory outlives the steps.
            unsafe { plan.decode(&ready.mirror.args, Some(&ready.gpu.stream)) }.unwrap();
        }
        drop((plan, comm));
    }
    ready.gpu.stream.synchronize().unwrap();
    ready.mirror.fetch(&mut ready.rank);
    assert!(ready.rank.bits(&ready.case) == wanted);
}

/// Says what an eager call costs the host; nothing is asserted of it.
pub fn host_time() {
    let desc = AttentionDesc { kv_layout: KvLayout::BlockTable, page_size: 16, ..shape(32, 8, 128, Dtype::Bf16) };
    let ready = Ready::new(Case::plain(desc, 1, &[(512, 1)], Values::Normal, 3));
    let mut best = f64::INFINITY;
    let mut all = Vec::new();
    for _ in 0..200 {
        let began = Instant::now();
        for _ in 0..100 {
            // SAFETY: the device memory outlives the steps.
            unsafe { ready.plan.decode(&ready.mirror.args, Some(&ready.gpu.stream)) }.unwrap();
        }
        let each = began.elapsed().as_secs_f64() * 1e6 / 100.0;
        ready.gpu.stream.synchronize().unwrap();
        best = best.min(each);
        all.push(each);
    }
    all.sort_by(f64::total_cmp);
    println!("host time of an eager call: best {best:.2} us, median {:.2} us", all[all.len() / 2]);
}

/// A dead context: the error says that earlier work caused it, every later call is refused, and drops return.
/// Runs in a process of its own.
pub fn dead_context() {
    let _current = Current::new(0);
    let ready = Ready::new(Case::plain(shape(8, 2, 64, Dtype::Bf16), 1, &[(100, 1)], Values::Normal, 3));
    let raw = RawStream::new();
    RawKernel::new("write_to").launch(&raw, 1, &[8]);
    // The error shows some time after the kernel ran.
    let begin = Instant::now();
    let mut first = None;
    while first.is_none() && begin.elapsed().as_secs() < 10 {
        // SAFETY: the device memory outlives the step.
        first = unsafe { ready.plan.decode(&ready.mirror.args, Some(&ready.gpu.stream)) }.err();
    }
    let first = first.expect("an error of the context");
    assert_eq!(first.kind(), ErrorKind::CudaPrior, "{first}");
    println!("{first}");
    // SAFETY: refused.
    let second = unsafe { ready.plan.decode(&ready.mirror.args, Some(&ready.gpu.stream)) }.unwrap_err();
    assert_eq!(second.kind(), ErrorKind::CudaFatal, "{second}");
    assert_eq!(ready.gpu.stream.synchronize().unwrap_err().kind(), ErrorKind::CudaFatal);
    assert!(ready.plan.check_destroy().is_ok());
    drop(ready);
}

/// Large views: more than 4 GiB between sequences, between tokens, and between pages.
pub fn beyond_4_gib() {
    let gpu = Gpu::new();
    let (heads, kv_heads, dim) = (8, 2, 128);
    let desc = shape(heads, kv_heads, dim, Dtype::Bf16);
    let case = Case::plain(desc, 1, &[(700, 1), (650, 1)], Values::Normal, 31);
    let mut rank = Rank::new(&case, 0);
    let compact = Mirror::new(&gpu, &rank);
    let (_comm, plan) = gpu.plan(&case.desc);
    compact.decode(&gpu, &plan, &mut rank).unwrap();
    assert_eq!(judge(&case, std::slice::from_ref(&rank)).unwrap().failure, None);
    let wanted = rank.bits(&case);

    let row = (kv_heads * dim * 2) as usize;
    let capacity = case.desc.max_kv_length as usize;
    for token_stride in [row, 8 << 20] {
        let sequence_stride = if token_stride == row { 5usize << 30 } else { row };
        let bytes = sequence_stride + (capacity - 1) * token_stride + row;
        let mut args = DecodeArgs { kv_capacity: 0, ..compact.args };
        let mut buffers = Vec::new();
        for (tensor, memory) in [(&mut args.k, &rank.k), (&mut args.v, rank.v.as_ref().unwrap())] {
            let large = Buffer::alloc(&gpu.runtime, GPU, bytes).unwrap();
            for b in 0..2 {
                for token in 0..if b == 0 { 700 } else { 650 } {
                    let from = &memory.bytes()[(b * capacity + token) * row..][..row];
                    if token_stride != row {
                        large.upload(b * sequence_stride + token * token_stride, from).unwrap();
                    } else if token == 0 {
                        let all = &memory.bytes()[b * capacity * row..][..if b == 0 { 700 } else { 650 } * row];
                        large.upload(b * sequence_stride, all).unwrap();
                    }
                }
            }
            let stride = [sequence_stride as i64, token_stride as i64, (dim * 2) as i64, 2];
            *tensor = Tensor { data: large.data(), bytes: large.bytes() as u64, stride };
            buffers.push(large);
        }
        // SAFETY: the buffers outlive the step.
        unsafe { plan.decode(&args, Some(&gpu.stream)) }.unwrap();
        gpu.stream.synchronize().unwrap();
        compact.fetch(&mut rank);
        assert!(rank.bits(&case) == wanted, "token stride {token_stride}");
    }

    // The same keys in pages of 16, the pages 96 MiB apart.
    let paged = AttentionDesc { kv_layout: KvLayout::BlockTable, page_size: 16, ..case.desc };
    let (_comm, plan) = gpu.plan(&paged);
    let (step, lengths) = (96usize << 20, [700usize, 650]);
    let width = lengths[0].div_ceil(16);
    let table: Vec<i32> = (0..2 * width).map(|i| ((i * 37 + 5) % (2 * width)) as i32).collect();
    let bytes = (2 * width - 1) * step + 16 * row;
    let mut args = DecodeArgs { kv_capacity: 0, ..compact.args };
    let mut buffers = Vec::new();
    for (tensor, memory) in [(&mut args.k, &rank.k), (&mut args.v, rank.v.as_ref().unwrap())] {
        let large = Buffer::alloc(&gpu.runtime, GPU, bytes).unwrap();
        for (i, &page) in table.iter().enumerate() {
            let (b, first) = (i / width, i % width * 16);
            let tokens = lengths[b].saturating_sub(first).min(16);
            let from = &memory.bytes()[(b * capacity + first) * row..][..tokens * row];
            large.upload(page as usize * step, from).unwrap();
        }
        let stride = [step as i64, row as i64, (dim * 2) as i64, 2];
        *tensor = Tensor { data: large.data(), bytes: large.bytes() as u64, stride };
        buffers.push(large);
    }
    let entries = Buffer::alloc(&gpu.runtime, GPU, 4 * table.len()).unwrap();
    entries.upload(0, &table.iter().flat_map(|page| page.to_ne_bytes()).collect::<Vec<u8>>()).unwrap();
    args.block_table = entries.data().cast_const().cast();
    (args.max_pages, args.num_pages) = (width as i32, table.len() as i32);
    // SAFETY: the buffers outlive the step.
    unsafe { plan.decode(&args, Some(&gpu.stream)) }.unwrap();
    gpu.stream.synchronize().unwrap();
    compact.fetch(&mut rank);
    assert_eq!(judge(&case, std::slice::from_ref(&rank)).unwrap().failure, None, "pages");
}

/// Pages of one token, 5.12 million of them in a random order.
pub fn five_million_pages() {
    let gpu = Gpu::new();
    let keys = 5_120_000usize;
    let dim = 64usize;
    let base = shape(2, 1, dim as i32, Dtype::Bf16);
    let desc = AttentionDesc { max_kv_length: keys as i32, out_dtype: Dtype::F32, ..base };
    let paged = AttentionDesc { kv_layout: KvLayout::CsrPages, page_size: 1, ..desc };
    // Values that repeat with a period that no tile has, cheap to make and to sum in float64.
    let period = 9973usize;
    let mut r = crate::support::rng::Rng::new(8);
    let mut draw = |n: usize| -> Vec<f32> { (0..n).map(|_| half::bf16::from_f64(r.normal()).to_f32()).collect() };
    let (q, k, v) = (draw(2 * dim), draw(period * dim), draw(period * dim));
    let bits = |x: f32| half::bf16::from_f32(x).to_ne_bytes();
    let order: Vec<usize> = {
        let mut order: Vec<usize> = (0..keys).collect();
        let mut r = crate::support::rng::Rng::new(9);
        r.shuffle(&mut order);
        order
    };
    let rows = |data: &[f32]| -> Vec<Vec<u8>> {
        data.chunks_exact(dim).map(|row| row.iter().flat_map(|&x| bits(x)).collect()).collect()
    };
    let (k_rows, v_rows) = (rows(&k), rows(&v));
    let spread = |rows: &[Vec<u8>]| -> Buffer {
        let mut bytes = vec![0xffu8; keys * dim * 2];
        for (slot, &page) in order.iter().enumerate() {
            bytes[page * dim * 2..][..dim * 2].copy_from_slice(&rows[slot % period]);
        }
        let buffer = Buffer::alloc(&gpu.runtime, GPU, bytes.len()).unwrap();
        buffer.upload(0, &bytes).unwrap();
        buffer
    };
    let (k_device, v_device) = (spread(&k_rows), spread(&v_rows));
    let ints = |values: &[i32]| -> Buffer {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_ne_bytes()).collect();
        let buffer = Buffer::alloc(&gpu.runtime, GPU, bytes.len()).unwrap();
        buffer.upload(0, &bytes).unwrap();
        buffer
    };
    let table: Vec<i32> = order.iter().map(|&page| page as i32).collect();
    let (table, indptr, length) = (ints(&table), ints(&[0, keys as i32]), ints(&[keys as i32]));
    let q_device = Buffer::alloc(&gpu.runtime, GPU, 4 * dim).unwrap();
    q_device.upload(0, &q.iter().flat_map(|&x| bits(x)).collect::<Vec<u8>>()).unwrap();
    let (out, lse) = (Buffer::alloc(&gpu.runtime, GPU, 8 * dim).unwrap(), Buffer::alloc(&gpu.runtime, GPU, 8).unwrap());
    let tensor = |b: &Buffer| Tensor { data: b.data(), bytes: b.bytes() as u64, stride: [0; 4] };
    let args = DecodeArgs {
        batch: 1,
        query_tokens: 1,
        q: tensor(&q_device),
        k: tensor(&k_device),
        v: tensor(&v_device),
        out: tensor(&out),
        lse: tensor(&lse),
        kv_length: length.data().cast_const().cast(),
        page_indptr: indptr.data().cast_const().cast(),
        page_indices: table.data().cast_const().cast(),
        num_page_indices: keys as i64,
        num_pages: keys as i32,
        ..Default::default()
    };
    let (_comm, plan) = gpu.plan(&paged);
    // SAFETY: the buffers outlive the step.
    unsafe { plan.decode(&args, Some(&gpu.stream)) }.unwrap();
    gpu.stream.synchronize().unwrap();
    let mut bytes = vec![0; 8 * dim];
    out.download(0, &mut bytes).unwrap();
    let found: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect();
    for head in 0..2 {
        // Each of the repeating rows counts as often as it is there.
        let q = &q[head * dim..][..dim];
        let (mut sum, mut o, mut a) = (0.0f64, vec![0.0f64; dim], vec![0.0f64; dim]);
        for row in 0..period {
            let times = (keys / period + usize::from(row < keys % period)) as f64;
            let dot: f64 = (0..dim).map(|i| f64::from(q[i]) * f64::from(k[row * dim + i])).sum();
            let weight = times * (dot / (dim as f64).sqrt()).exp();
            sum += weight;
            for d in 0..dim {
                o[d] += weight * f64::from(v[row * dim + d]);
                a[d] += weight * f64::from(v[row * dim + d]).abs();
            }
        }
        for d in 0..dim {
            let (found, wanted, bound) =
                (f64::from(found[head * dim + d]), o[d] / sum, 2f64.powi(-24) * 40.0 * a[d] / sum);
            assert!((found - wanted).abs() <= bound, "head {head}, {d}: {found} {wanted} within {bound}");
        }
    }
}
