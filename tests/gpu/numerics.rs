//! Answers held against float64, and bits against bits.

use treeattn::attention::reference::Comparison;
use treeattn::attention::{AttentionDesc, Dtype, KvLayout, OutputMode};
use treeattn::runtime::{CommConfig, Communicator, Device, DeviceKind, Plan, Stream};

use crate::mirror::{GPU, Gpu, Mirror, Ready};
use crate::space::{self, Shapes};
use crate::support::case::Case;
use crate::support::npy;
use crate::support::rank::Rank;
use crate::support::rng::Rng;
use crate::support::run::{MeanError, judge, judge_on};
use crate::support::values::Values;
use crate::support::{only_case, seed};

#[path = "inputs.rs"]
mod inputs;
pub use inputs::{
    a_last_sequence_that_ends_early, bad_data, bad_data_of_a_plan_that_is_gone, stale_entries, unaligned_bases,
};

/// A shape of 16-bit keys and values with room for what the tests ask.
pub fn shape(q_heads: i32, kv_heads: i32, dim: i32, dtype: Dtype) -> AttentionDesc {
    AttentionDesc {
        k_dtype: dtype,
        v_dtype: dtype,
        q_dtype: dtype,
        out_dtype: dtype,
        ..AttentionDesc::new(q_heads, kv_heads, dim, 1)
    }
}

/// [`MeanError`] on GPUs, where tensor cores cut off the bits of a product that lie below those of the largest beside it.
pub const MEAN_ERROR: f64 = 0.05;

/// Random cases `first..first + count` in one layout.
pub fn random(layout: KvLayout, first: u64, count: u64) {
    random_of(Shapes::All, layout, first, count);
}

/// The same of some shapes.
pub fn random_of(shapes: Shapes, layout: KvLayout, first: u64, count: u64) {
    let gpu = Gpu::new();
    let mut comms: Vec<Vec<Communicator>> =
        (0..=7).map(|world| if world == 0 { Vec::new() } else { gpu.ranks(world) }).collect();
    let (mut by_dtype, mut error): ([Comparison; 3], _) = (Default::default(), MeanError::default());
    let mut failures = Vec::new();
    let seeds = only_case().map_or_else(
        || (first..first + count).map(|index| Rng::derive(seed(), 3 * index + layout as u64)).collect(),
        |case| vec![case],
    );
    for case in seeds {
        let case = space::case(case, layout, shapes);
        if std::env::var_os("TREEATTN_TRACE").is_some() {
            eprintln!("{}", case.describe());
        }
        match run(&gpu, &mut comms[case.world], &case) {
            Ok(found) => {
                error.add(&case, &found);
                by_dtype[case.desc.out_dtype as usize - 1].add(&found);
            }
            Err(what) => {
                failures.push(format!("{what}\n{}\nTREEATTN_CASE={} runs this case alone", case.describe(), case.seed))
            }
        }
    }
    let shown = failures[..failures.len().min(6)].join("\n");
    assert!(failures.is_empty(), "{} of {count} cases failed, among them\n{shown}", failures.len());
    for (found, least) in by_dtype.iter().zip([0.0, 0.98, 0.99]) {
        println!(
            "{layout:?}: {} elements, errors up to {:.3} of the usual one, {:.4} correctly rounded, lse {:.3}",
            found.elements,
            found.worst,
            found.rounded_share(),
            found.worst_lse
        );
        assert!(found.elements < 1000 || found.rounded_share() >= least, "{found:?}");
    }
    println!("{layout:?}: {:.4} of the usual error on average", error.mean());
    error.assert_at_most(MEAN_ERROR, "random cases");
}

/// Runs a case twice on its ranks, one after the other; what must not matter is filled otherwise the second time.
fn run(gpu: &Gpu, comms: &mut [Communicator], case: &Case) -> Result<Comparison, String> {
    let mut ranks: Vec<Rank> = (0..case.world).map(|rank| Rank::new(case, rank)).collect();
    let plans = Plan::create_all(&comms.iter().collect::<Vec<_>>(), &case.desc).map_err(|e| format!("plan: {e}"))?;
    let mut first = Vec::new();
    for fill in [0xff, 0x3c] {
        for (rank, plan) in ranks.iter_mut().zip(&plans) {
            rank.prefill(fill);
            let mirror = Mirror::new(gpu, rank);
            mirror.decode(gpu, plan, rank).map_err(|e| format!("decode: {e}"))?;
            let strays = rank.strays(case, fill);
            if strays > 0 {
                return Err(format!("{strays} bytes beside the outputs were written"));
            }
        }
        let bits: Vec<_> = ranks.iter().map(|rank| rank.bits(case)).collect();
        if fill == 0xff {
            first = bits;
        } else if first != bits {
            return Err("a second run has other bits".into());
        }
    }
    for (rank, comm) in comms.iter().enumerate() {
        if let Some(error) = comm.status().map_err(|e| e.to_string())?.error {
            return Err(format!("rank {rank} reports {error}"));
        }
    }
    // Weights go through tensor cores as 16-bit terms, and f16 ones end at 2^-39 of the largest.
    let found = judge_on(true, case, &ranks)?;
    match found.failure {
        Some(failure) if !found.is_within() => Err(failure),
        _ => Ok(found),
    }
}

/// Real activations: every query of the text against all of it, and against a prefix (causal).
pub fn minilm() {
    let folder = std::env::var_os("TREEATTN_TEST_DATA").map_or_else(|| crate::support::data("minilm"), Into::into);
    for layer in [0, 5] {
        let load = |name: &str| npy::read(&folder.join(format!("layer{layer}_{name}.npy"))).data;
        let (q, k, v, wanted) = (load("q"), load("k"), load("v"), load("out"));
        for causal in [false, true] {
            let desc = AttentionDesc { out_dtype: Dtype::F32, causal, ..shape(12, 12, 32, Dtype::F16) };
            let mut case = Case::plain(desc, 1, &[(512, 512)], Values::Normal, 1);
            case.q.copy_from_slice(&q);
            case.sequences[0].k.copy_from_slice(&k);
            case.sequences[0].v.copy_from_slice(&v);
            let mut ready = Ready::new(case);
            ready.bits();
            let found = judge(&ready.case, std::slice::from_ref(&ready.rank)).unwrap();
            assert_eq!(found.failure, None, "layer {layer}");
            println!(
                "layer {layer}, causal {causal}: largest error {:.3} of its bound, lse {:.3}",
                found.worst, found.worst_lse
            );
            let outputs = (0..512).flat_map(|t| (0..12).map(move |h| (t, h)));
            for (token, head) in outputs.filter(|_| !causal) {
                let row = ready.rank.row(&ready.case, token, head).0;
                for (found, wanted) in row.iter().zip(&wanted[(token * 12 + head) * 32..]) {
                    assert!((found - wanted).abs() <= 2e-5 * wanted.abs().max(1.0), "{found} {wanted}");
                }
            }
        }
    }
}

/// Equal scores over whole numbers: the mean is exact wherever float32 sums are.
pub fn exact() {
    for dtype in [Dtype::F16, Dtype::Bf16] {
        for (heads, kv_heads, dim) in [(2, 2, 64), (8, 2, 128), (16, 1, 256)] {
            for keys in [1, 2, 64, 1024, 65536] {
                let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(heads, kv_heads, dim, dtype) };
                let mut case = Case::plain(desc, 1, &[(keys, 1)], Values::Equal, 3);
                case.q.fill(0.0);
                let (kv_heads, dim) = (kv_heads as usize, dim as usize);
                let mut sums = vec![0.0f64; kv_heads * dim];
                for row in case.sequences[0].v.chunks_exact(kv_heads * dim) {
                    sums.iter_mut().zip(row).for_each(|(sum, &v)| *sum += f64::from(v));
                }
                let mut ready = Ready::new(case);
                ready.bits();
                for head in 0..heads as usize {
                    let row = ready.rank.row(&ready.case, 0, head).0;
                    let kv_head = head * kv_heads / heads as usize;
                    for (d, found) in row.iter().enumerate() {
                        let wanted = (sums[kv_head * dim + d] / keys as f64) as f32;
                        assert_eq!(*found, wanted, "{keys} keys, head {head}, {d}");
                    }
                    let lse = ready.rank.lse_of(&ready.case, 0, head).unwrap();
                    let wanted = (keys as f64).ln();
                    assert!(
                        (f64::from(lse) - wanted).abs() <= 4.0 * 2f64.powi(-23) * wanted.max(1.0),
                        "{lse} {wanted}"
                    );
                }
            }
        }
    }
}

/// The same bits a thousand times, while other work runs beside.
pub fn repeats() {
    let shapes =
        [(32, 8, 128, &[(20_000, 1)][..]), (8, 8, 64, &[(300, 4), (0, 1), (5_000, 2)]), (64, 1, 96, &[(777, 3)])];
    for (heads, kv_heads, dim, sequences) in shapes {
        let desc = AttentionDesc { causal: true, ..shape(heads, kv_heads, dim, Dtype::Bf16) };
        let mut ready = Ready::new(Case::plain(desc, 1, sequences, Values::Normal, 7));
        let mut beside = Ready::new(Case::plain(desc, 1, &[(3_000, 1)], Values::Normal, 8));
        let first = ready.bits();
        for run in 0..1000 {
            if run % 3 == 0 {
                // SAFETY: its device memory outlives the step, which `bits` waits for below.
                unsafe { beside.plan.decode(&beside.mirror.args, Some(&beside.gpu.stream)) }.unwrap();
            }
            assert!(ready.bits() == first, "run {run} has other bits");
        }
        beside.bits();
    }
}

/// Many sequences, their lengths rising and falling, some empty.
pub fn large_batch(batch: usize) {
    for falling in [false, true] {
        for layout in [KvLayout::Strided, KvLayout::BlockTable, KvLayout::CsrPages] {
            let page_size = if layout == KvLayout::Strided { 0 } else { 16 };
            let desc = AttentionDesc { kv_layout: layout, page_size, ..shape(8, 2, 64, Dtype::Bf16) };
            let mut sequences: Vec<_> = (0..batch).map(|b| (if b % 50 == 7 { 0 } else { 5 * b }, 1)).collect();
            if falling {
                sequences.reverse();
            }
            let mut ready = Ready::new(Case::plain(desc, 1, &sequences, Values::Normal, 11));
            ready.bits();
            let found = judge(&ready.case, std::slice::from_ref(&ready.rank)).unwrap();
            assert_eq!(found.failure, None);
        }
    }
}

/// The CPU backend's answers to the same questions are within both bounds.
pub fn like_the_cpu() {
    let gpu = Gpu::new();
    let cpu = Device { kind: DeviceKind::Cpu, ordinal: 0 };
    let cpu_comm = Communicator::create_local(&gpu.runtime, &[cpu], &CommConfig::default()).unwrap().remove(0);
    for (seed, heads, kv_heads, dim) in [(1, 4, 2, 64), (2, 32, 8, 128), (3, 5, 1, 80), (4, 16, 16, 256)] {
        for layout in [KvLayout::Strided, KvLayout::CsrPages] {
            let page_size = if layout == KvLayout::Strided { 0 } else { 5 };
            let base = shape(heads, kv_heads, dim, Dtype::Bf16);
            let desc = AttentionDesc { kv_layout: layout, page_size, causal: true, out_dtype: Dtype::F32, ..base };
            let case = Case::plain(desc, 1, &[(700, 4), (33, 1), (0, 0)], Values::Normal, seed);
            let (on_cpu, mut on_gpu) = (Rank::new(&case, 0), Rank::new(&case, 0));
            let plan = Plan::create(&cpu_comm, &case.desc).unwrap();
            // SAFETY: the rank's memory outlives the blocking call.
            unsafe { plan.decode(&on_cpu.args, None) }.unwrap();
            let (_comm, plan) = gpu.plan(&case.desc);
            Mirror::new(&gpu, &on_gpu).decode(&gpu, &plan, &mut on_gpu).unwrap();
            for rank in [&on_cpu, &on_gpu] {
                assert_eq!(judge(&case, std::slice::from_ref(rank)).unwrap().failure, None);
            }
            for token in 0..case.tokens {
                for head in 0..heads as usize {
                    let (a, b) = (on_cpu.row(&case, token, head).0, on_gpu.row(&case, token, head).0);
                    for (a, b) in a.iter().zip(&b) {
                        assert!((a - b).abs() <= 1e-4 * a.abs().max(1.0), "token {token} head {head}: {a} {b}");
                    }
                }
            }
        }
    }
}

/// NaN in the newest token's V reaches the query that sees it and no other.
pub fn nan_in_the_newest_value() {
    for (heads, kv_heads, dim) in [(2, 2, 64), (8, 2, 128), (32, 1, 128)] {
        for (layout, page_size) in [(KvLayout::Strided, 0), (KvLayout::BlockTable, 3)] {
            let base = shape(heads, kv_heads, dim, Dtype::Bf16);
            let desc = AttentionDesc { kv_layout: layout, page_size, causal: true, out_dtype: Dtype::F32, ..base };
            let clean = Case::plain(desc, 1, &[(1000, 4)], Values::Normal, 5);
            let mut poisoned = clean.clone();
            let last = clean.sequences[0].v.len() - (kv_heads * dim) as usize;
            poisoned.sequences[0].v[last..].fill(f32::NAN);
            let (mut clean, mut poisoned) = (Ready::new(clean), Ready::new(poisoned));
            clean.bits();
            poisoned.bits();
            let found = judge(&clean.case, std::slice::from_ref(&clean.rank)).unwrap();
            assert_eq!(found.failure, None);
            for head in 0..heads as usize {
                for token in 0..4 {
                    let row = poisoned.rank.row(&poisoned.case, token, head).0;
                    assert!(row.iter().all(|x| x.is_nan() == (token == 3)), "token {token} head {head}: {row:?}");
                    if token < 3 {
                        let wanted = clean.rank.row(&clean.case, token, head).0;
                        let close = row.iter().zip(&wanted).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0));
                        assert!(close, "token {token} head {head}");
                    }
                    let lse = poisoned.rank.lse_of(&poisoned.case, token, head).unwrap();
                    assert!(lse.is_finite(), "scores have no NaN");
                }
            }
        }
    }
}

/// Two plans on two streams at once give what each gives alone.
pub fn two_streams() {
    let desc = shape(32, 8, 128, Dtype::Bf16);
    let mut ready: Vec<Ready> =
        (0..2).map(|seed| Ready::new(Case::plain(desc, 1, &[(30_000, 1)], Values::Normal, seed))).collect();
    let alone: Vec<_> = ready.iter_mut().map(Ready::bits).collect();
    for _ in 0..50 {
        for _ in 0..20 {
            for r in &ready {
                // SAFETY: the device memory outlives the steps, which are waited for below.
                unsafe { r.plan.decode(&r.mirror.args, Some(&r.gpu.stream)) }.unwrap();
            }
        }
        for (r, alone) in ready.iter_mut().zip(&alone) {
            r.gpu.stream.synchronize().unwrap();
            r.mirror.fetch(&mut r.rank);
            assert!(&r.rank.bits(&r.case) == alone);
        }
    }
}

/// Merging given partials, against the CPU's merge.
pub fn merge_partials() {
    use half::bf16;
    use treeattn::attention::Tensor;
    use treeattn::runtime::{Buffer, MergeArgs};
    let gpu = Gpu::new();
    let mut r = Rng::new(4);
    // With large log-sum-exps the difference of two is lost where they are rounded before it is taken.
    for (count, tokens, heads, dim, large) in [
        (1, 1, 1, 8, 0.0),
        (2, 3, 5, 64, 0.0),
        (9, 2, 32, 128, 0.0),
        (9, 2, 32, 128, 30_000.0),
        (64, 1, 7, 512, 0.0),
        (300, 1, 2, 24, 0.0),
    ] {
        let rows = count * tokens * heads;
        let o: Vec<f32> = (0..rows * dim).map(|_| bf16::from_f64(r.normal()).to_f32()).collect();
        let lse: Vec<f32> = (0..rows)
            .map(|_| match r.range(0, 9) {
                0 => f32::NEG_INFINITY,
                1 => f32::INFINITY,
                _ => (large + if large > 0.0 { r.normal() } else { 30.0 * r.normal() }) as f32,
            })
            .collect();
        let narrow: Vec<u16> = o.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
        for base in [0, 2] {
            let args = |o: Tensor, lse: Tensor, out: Tensor, out_lse: Tensor| MergeArgs {
                query_tokens: tokens as i32,
                heads: heads as i32,
                head_dim: dim as i32,
                o,
                o_dtype: Dtype::Bf16,
                lse,
                lse_base: base,
                plus_inf_is_empty: true,
                out,
                out_dtype: Some(Dtype::F32),
                out_lse,
                ..MergeArgs::default()
            };
            let (mut out, mut out_lse) = (vec![0f32; tokens * heads * dim], vec![0f32; tokens * heads]);
            let on_host = args(
                Tensor::from_slice(&narrow),
                Tensor::from_slice(&lse),
                Tensor::from_slice_mut(&mut out),
                Tensor::from_slice_mut(&mut out_lse),
            );
            let cpu = Device { kind: DeviceKind::Cpu, ordinal: 0 };
            // SAFETY: the vectors outlive the blocking call.
            unsafe { treeattn::runtime::merge_partials(&gpu.runtime, cpu, &on_host, count, None) }.unwrap();
            let load = |bytes: &[u8]| {
                let buffer = Buffer::alloc(&gpu.runtime, GPU, bytes.len()).unwrap();
                buffer.upload(0, bytes).unwrap();
                buffer
            };
            let bytes_of = |x: &[f32]| x.iter().flat_map(|x| x.to_ne_bytes()).collect::<Vec<u8>>();
            let o_device = load(&narrow.iter().flat_map(|x| x.to_ne_bytes()).collect::<Vec<u8>>());
            let (lse_device, out_device, out_lse_device) =
                (load(&bytes_of(&lse)), load(&bytes_of(&out)), load(&bytes_of(&out_lse)));
            let tensor = |b: &Buffer| Tensor { data: b.data(), bytes: b.bytes() as u64, stride: [0; 4] };
            let poison = vec![0xff; out_device.bytes()];
            out_device.upload(0, &poison).unwrap();
            let on_gpu = args(tensor(&o_device), tensor(&lse_device), tensor(&out_device), tensor(&out_lse_device));
            let stream = Stream::new(&gpu.runtime, GPU).unwrap();
            // SAFETY: the buffers outlive the merge, which is waited for.
            unsafe { treeattn::runtime::merge_partials(&gpu.runtime, GPU, &on_gpu, count, Some(&stream)) }.unwrap();
            stream.synchronize().unwrap();
            let floats = |buffer: &Buffer| -> Vec<f32> {
                let mut bytes = vec![0; buffer.bytes()];
                buffer.download(0, &mut bytes).unwrap();
                bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect()
            };
            for (a, b) in out.iter().zip(floats(&out_device)).chain(out_lse.iter().zip(floats(&out_lse_device))) {
                let same = *a == b || a.is_nan() && b.is_nan() || (a - b).abs() <= 4e-6 * a.abs().max(1.0);
                assert!(same, "{count} partials: {a} {b}");
            }
        }
    }
}

/// Small shapes of every kind, for the checkers of memory, races and initialisation.
pub fn small() {
    for (dtype, layout, page_size) in [
        (Dtype::Bf16, KvLayout::BlockTable, 16),
        (Dtype::F8E4M3, KvLayout::Strided, 0),
        (Dtype::Q8_0, KvLayout::BlockTable, 3),
        (Dtype::Q4_0, KvLayout::CsrPages, 16),
        (Dtype::F32, KvLayout::Strided, 0),
    ] {
        let base = AttentionDesc { k_dtype: dtype, v_dtype: dtype, ..shape(8, 2, 64, Dtype::Bf16) };
        let terms = AttentionDesc { window: 90, sinks: true, alibi: true, softcap: 20.0, ..base };
        let desc = AttentionDesc { kv_layout: layout, page_size, causal: true, output: OutputMode::Local, ..terms };
        let mut ready = Ready::new(Case::plain(desc, 1, &[(70, 2), (300, 2), (0, 0)], Values::Normal, 6));
        ready.bits();
        let found = judge(&ready.case, std::slice::from_ref(&ready.rank)).unwrap();
        assert_eq!(found.failure, None);
    }
    for (heads, kv_heads, dim, tokens) in [(1, 1, 64, 1), (2, 1, 128, 1), (8, 2, 64, 3), (20, 1, 256, 2), (6, 6, 96, 1)]
    {
        for (layout, page_size) in [(KvLayout::Strided, 0), (KvLayout::BlockTable, 3), (KvLayout::CsrPages, 16)] {
            let base = shape(heads, kv_heads, dim, Dtype::Bf16);
            let desc = AttentionDesc { kv_layout: layout, page_size, causal: true, output: OutputMode::Local, ..base };
            let mut ready = Ready::new(Case::plain(desc, 1, &[(70, tokens), (300, tokens), (0, 0)], Values::Normal, 6));
            ready.bits();
            let found = judge(&ready.case, std::slice::from_ref(&ready.rank)).unwrap();
            assert_eq!(found.failure, None);
        }
    }
}
