//! The guaranteed error on GPUs, on inputs made to reach for it: constants, one sign, many keys, ranks that cancel.

use std::time::Duration;

use treeattn::attention::reference::{Arithmetic, Comparison, Precision};
use treeattn::attention::{DecodeArgs, Dtype, KvFormat, Tensor};
use treeattn::runtime::Buffer;

use crate::group::Group;
use crate::mirror::Gpu;
use crate::support::repeated::Repeated;
use crate::support::rng::Rng;
use crate::support::values::store;

/// A case whose k and v have type `dtype`; queries and outputs are f32.
fn case(group: usize, dim: usize, page: usize, dtype: Dtype) -> Repeated {
    let mut case = Repeated::new(group, dim, dim, page);
    (case.desc.k_dtype, case.desc.v_dtype) = (dtype, dtype);
    case
}

/// Rows as memory of a type holds them.
fn bytes(values: &[f32], dtype: Dtype) -> Vec<u8> {
    let format = KvFormat::of(dtype);
    let mut bytes = vec![0; format.row_bytes(values.len())];
    format.narrow_row(values, &mut bytes);
    let same = held(&bytes, dtype).iter().zip(values).all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(same, "a number that {} does not have", dtype.name());
    bytes
}

/// What such memory stands for.
fn held(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let format = KvFormat::of(dtype);
    let of = |block| (0..format.block_elements()).map(move |i| format.element(block, i));
    bytes.chunks_exact(format.block_bytes()).flat_map(of).collect()
}

/// The nearest numbers that a type has.
fn rounded(values: &[f32], dtype: Dtype) -> Vec<f32> {
    let format = KvFormat::of(dtype);
    let mut bytes = vec![0; format.row_bytes(values.len())];
    format.narrow_row(values, &mut bytes);
    held(&bytes, dtype)
}

fn floats(buffer: &Buffer, count: usize) -> Vec<f32> {
    let mut bytes = vec![0; 4 * count];
    buffer.download(0, &mut bytes).unwrap();
    bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// One rank's memory on its GPU.
struct Memory {
    args: DecodeArgs,
    out: Buffer,
    lse: Buffer,
    length: i32,
    /// The inputs.
    _others: Vec<Buffer>,
}

impl Memory {
    fn new(gpu: &Gpu, case: &Repeated, rank: usize) -> Memory {
        let load = |bytes: &[u8]| {
            let buffer = Buffer::alloc(&gpu.runtime, gpu.device, bytes.len()).unwrap();
            buffer.upload(0, bytes).unwrap();
            buffer
        };
        let desc = &case.desc;
        let ints = |ints: &[i32]| load(&ints.iter().flat_map(|x| x.to_ne_bytes()).collect::<Vec<u8>>());
        let (table, length) = (case.table(rank), case.ranks[rank].1 as i32);
        let others = vec![
            load(&bytes(&case.q, desc.q_dtype)),
            load(&bytes(&case.k, desc.k_dtype)),
            load(&bytes(&case.v, desc.v_dtype)),
            ints(&[length]),
            ints(&table),
            // A scale for each key.
            load(&bytes(&vec![1.0; case.pages() * desc.page_size as usize], Dtype::F32)),
        ];
        let rows = desc.q_heads as usize;
        let out = load(&vec![0xff; 4 * rows * desc.head_dim_v as usize]);
        let lse = load(&vec![0xff; 4 * rows]);
        let tensor = |buffer: &Buffer| Tensor { data: buffer.data(), bytes: buffer.bytes() as u64, stride: [0; 4] };
        let args = DecodeArgs {
            batch: 1,
            query_tokens: 1,
            q: tensor(&others[0]),
            k: tensor(&others[1]),
            v: tensor(&others[2]),
            out: tensor(&out),
            lse: tensor(&lse),
            kv_length: others[3].data().cast::<i32>().cast_const(),
            block_table: others[4].data().cast::<i32>().cast_const(),
            k_scale: if desc.k_dtype == Dtype::Int8 { tensor(&others[5]) } else { Tensor::NULL },
            v_scale: if desc.v_dtype == Dtype::Int8 { tensor(&others[5]) } else { Tensor::NULL },
            max_pages: table.len() as i32,
            num_pages: case.pages() as i32,
            ..DecodeArgs::default()
        };
        Memory { args, out, lse, length, _others: others }
    }
}

/// Holds the library's answer against float64, as every rank has it.
fn check(case: &Repeated) -> Comparison {
    let world = case.ranks.len();
    let group = Group::over(world, 1, Duration::from_secs(60));
    let memories: Vec<Memory> = group.gpus.iter().enumerate().map(|(rank, gpu)| Memory::new(gpu, case, rank)).collect();
    let mut desc = case.desc;
    desc.max_kv_length = memories.iter().map(|memory| memory.length).max().expect("a rank");
    let plans = group.plans(&desc);
    let (rows, dim) = (desc.q_heads as usize, desc.head_dim_v as usize);
    let mut reference = case.reference();
    reference.arithmetic = Arithmetic::Gpu { value_terms: if desc.v_dtype == Dtype::F32 { 3 } else { 1 } };
    reference.scaled = [desc.v_dtype == Dtype::Int8; 2];
    // Weights are multiplied as f16 terms, of which these are the smallest.
    match desc.v_dtype {
        Dtype::F16 => reference.multiply_f16(),
        Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::Int8 => reference.least_weight = 2f64.powi(-39),
        Dtype::Q8_0 | Dtype::Q4_0 => reference.least_weight = 2f64.powi(-38),
        _ => {}
    }
    let (mut found, mut first) = (Comparison::default(), Vec::new());
    for _ in 0..2 {
        for ((gpu, plan), memory) in group.gpus.iter().zip(&plans).zip(&memories) {
            // SAFETY: the device memory outlives the step, which is waited for.
            unsafe { plan.decode(&memory.args, Some(&gpu.stream)) }.unwrap();
        }
        group.gpus.iter().for_each(|gpu| gpu.stream.synchronize().unwrap());
        for memory in &memories {
            let (out, lse) = (floats(&memory.out, rows * dim), floats(&memory.lse, rows));
            let wire = if world > 1 { desc.wire_dtype } else { Dtype::F32 };
            for row in 0..rows {
                let precision = Precision { out: desc.out_dtype, wire };
                reference.compare_row(row, &out[row * dim..][..dim], Some(lse[row]), precision, &mut found);
            }
            let bits: Vec<u32> = out.iter().chain(&lse).map(|x| x.to_bits()).collect();
            if first.is_empty() {
                first = bits;
            } else {
                assert!(bits == first, "other bits on another rank, or in a second run");
            }
        }
    }
    assert!(group.errors().into_iter().flatten().next().is_none());
    found
}

/// The largest shares of the bounds: guaranteed error, usual error.
fn assert_guaranteed(name: &str, found: &Comparison) {
    println!(
        "{name}: {:.3} of the guaranteed error (lse {:.3}), {:.3} of the usual one (lse {:.3})",
        found.worst_guaranteed, found.worst_lse_guaranteed, found.worst, found.worst_lse
    );
    assert!(found.worst_guaranteed.max(found.worst_lse_guaranteed) <= 1.0, "{name}: {found:?}");
}

/// Equal scores and equal values: nothing averages out, and every sum has one sign.
pub fn constants(lengths: &[usize]) {
    let mut all = Comparison::default();
    for &keys in lengths {
        for (group, dim, dtype) in [
            (1, 64, Dtype::Bf16),
            (1, 128, Dtype::F16),
            (4, 64, Dtype::F16),
            (4, 128, Dtype::Bf16),
            (16, 64, Dtype::Bf16),
            (8, 128, Dtype::F8E4M3),
            (4, 64, Dtype::Int8),
            (8, 128, Dtype::Q8_0),
            (4, 64, Dtype::Q4_0),
            (2, 128, Dtype::F8E5M2),
            (4, 64, Dtype::F32),
        ] {
            // Elements that are read where they lie take their time.
            if dtype == Dtype::F32 && keys > 3_000_000 {
                continue;
            }
            let mut r = Rng::new(keys as u64);
            let mut case = case(group, dim, if keys > 1_000_000 { 4096 } else { 64 }, dtype);
            // int8 has whole numbers only.
            let most = if dtype == Dtype::Int8 { 100.0 } else { 1.0 };
            let v: Vec<f32> = (0..dim).map(|_| (1.0 + most * r.unit()) as f32).collect();
            let (k, v) = (rounded(&vec![1.0; dim], dtype), rounded(&v, dtype));
            case.page(|_| k.clone(), |_| v.clone());
            case.rank_of(0, keys);
            let found = check(&case);
            assert_guaranteed(&format!("constant, {keys} keys, {group} rows, {dim} {}", dtype.name()), &found);
            all.add(&found);
        }
    }
    assert_guaranteed("constant", &all);
}

/// Products of one sign, two keys whose values cancel: the rounding of scores is all that is seen.
pub fn one_sign(count: u64) {
    let mut all = Comparison::default();
    for (dim, group) in [(64, 1), (64, 4), (128, 1), (128, 8), (128, 16), (256, 4)] {
        for seed in 0..count {
            let dtype = [Dtype::Bf16, Dtype::F16][(seed % 2) as usize];
            let mut r = Rng::new(seed * 1000 + dim as u64);
            let mut case = case(group, dim, 16, dtype);
            let (q, k) = (1.0 + r.unit() as f32, 1.0 + r.unit());
            let other = k * (1.0 - 0.02 * r.unit());
            case.desc.scale = (0.05 + r.unit() as f32) * 4.0 / (dim as f32).sqrt();
            case.q.fill(if seed % 3 == 0 { -q } else { q });
            // Products of many sizes in every other case.
            let of = |k: f64, d: usize| store(if seed % 4 < 2 { k } else { k / (1 << (d * 5 % 9)) as f64 }, dtype);
            case.page(
                |slot| (0..dim).map(|d| of(if slot == 0 { k } else { other }, d)).collect(),
                |slot| vec![1.0 - 2.0 * slot.min(1) as f32; dim],
            );
            case.rank_of(0, 2);
            all.add(&check(&case));
        }
    }
    assert_guaranteed("one sign", &all);
}

/// Scores that rise from key to key, so that every tile has a new maximum.
pub fn rising_scores() {
    let mut all = Comparison::default();
    for (group, dtype) in [(2, Dtype::Bf16), (8, Dtype::F16), (16, Dtype::Bf16)] {
        for step in [1e-3, 0.03, 1.0] {
            let mut case = case(group, 64, 2048, dtype);
            case.q.fill(1.0);
            let mut r = Rng::new(5);
            let v: Vec<f32> = (0..2048 * 64).map(|_| store(1.0 + r.unit(), dtype)).collect();
            case.page(|slot| vec![store(slot as f64 * step / 8.0, dtype); 64], |slot| v[slot * 64..][..64].to_vec());
            case.rank_of(0, 2048);
            all.add(&check(&case));
        }
    }
    assert_guaranteed("rising", &all);
}

/// Ranks whose values cancel: an lse rounded to f32 on its way would be seen in the output.
pub fn ranks_that_cancel(counts: &[&[usize]]) {
    for wire in [Dtype::F32, Dtype::Bf16] {
        let mut all = Comparison::default();
        for &keys in counts {
            for (group, dtype) in [(1, Dtype::F16), (4, Dtype::Bf16)] {
                let mut case = case(group, 64, if keys[0] > 1_000_000 { 4096 } else { 64 }, dtype);
                case.desc.wire_dtype = wire;
                for sign in [1.0, -1.0] {
                    case.page(|_| vec![1.0; 64], |_| vec![sign; 64]);
                }
                for (rank, &keys) in keys.iter().enumerate() {
                    case.rank_of(rank % 2, keys);
                }
                all.add(&check(&case));
            }
        }
        assert_guaranteed(&format!("ranks that cancel over {}", wire.name()), &all);
    }
}
