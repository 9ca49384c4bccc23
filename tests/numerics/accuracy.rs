//! The guaranteed error, on inputs made to reach for it: constants, one sign, many keys, two sides that cancel.

use treeattn::attention::reference::{Arithmetic, Comparison, Precision, ulp};
use treeattn::attention::{Algorithm, DecodeArgs, Dtype, Tensor};
use treeattn::cpu::Isa;

use crate::support::full;
use crate::support::repeated::Repeated;
use crate::support::rng::Rng;
use crate::support::run::Group;

/// The library's answer on CPUs: o and lse of every rank.
fn answers(case: &Repeated, isa: Isa, algorithm: Algorithm, threads: usize) -> Vec<(Vec<f32>, Vec<f32>)> {
    let mut desc = case.desc;
    desc.algorithm = algorithm;
    let (heads, dim) = (desc.q_heads as usize, desc.head_dim_v as usize);
    let group = Group::new(isa.name(), case.ranks.len(), threads);
    let plans = group.plans(&desc).expect("plans");
    std::thread::scope(|scope| {
        let threads: Vec<_> = case
            .ranks
            .iter()
            .zip(&plans)
            .map(|((runs, keys), plan)| {
                scope.spawn(move || {
                    let table: Vec<i32> =
                        runs.iter().flat_map(|&(page, count)| std::iter::repeat_n(page as i32, count)).collect();
                    let (mut out, mut lse) = (vec![0f32; heads * dim], vec![0f32; heads]);
                    let length = *keys as i32;
                    let args = DecodeArgs {
                        batch: 1,
                        query_tokens: 1,
                        q: Tensor::from_slice(&case.q),
                        k: Tensor::from_slice(&case.k),
                        v: Tensor::from_slice(&case.v),
                        out: Tensor::from_slice_mut(&mut out),
                        lse: Tensor::from_slice_mut(&mut lse),
                        kv_length: &length,
                        block_table: table.as_ptr(),
                        max_pages: table.len() as i32,
                        num_pages: case.pages() as i32,
                        ..DecodeArgs::default()
                    };
                    // SAFETY: everything that the arguments point at outlives the call, which blocks.
                    unsafe { plan.decode(&args, None) }.expect("a step");
                    (out, lse)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

/// Holds the library's answer against float64.
fn check(case: &Repeated, isa: Isa, algorithm: Algorithm, threads: usize) -> Comparison {
    let (desc, outputs) = (&case.desc, answers(case, isa, algorithm, threads));
    let (heads, dim) = (desc.q_heads as usize, desc.head_dim_v as usize);
    let mut reference = case.reference();
    reference.arithmetic = match isa {
        Isa::Avx512 => Arithmetic::Cpu { lanes: 16, fused: true },
        Isa::Avx2 => Arithmetic::Cpu { lanes: 8, fused: true },
        Isa::Neon => Arithmetic::Cpu { lanes: 4, fused: true },
        Isa::Scalar => Arithmetic::Cpu { lanes: 8, fused: false },
    };
    let wire = if case.ranks.len() > 1 { desc.wire_dtype } else { Dtype::F32 };
    let mut found = Comparison::default();
    for (out, lse) in &outputs {
        for head in 0..heads {
            let precision = Precision { out: desc.out_dtype, wire };
            reference.compare_row(head, &out[head * dim..][..dim], Some(lse[head]), precision, &mut found);
        }
    }
    found
}

const ALGORITHMS: [Algorithm; 5] =
    [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Tree, Algorithm::Allreduce3, Algorithm::Ring];

/// The largest shares of the bounds: usual error, guaranteed error.
fn assert_guaranteed(name: &str, found: &Comparison) {
    println!(
        "{name}: {:.3} of the guaranteed error (lse {:.3}), {:.3} of the usual one (lse {:.3})",
        found.worst_guaranteed, found.worst_lse_guaranteed, found.worst, found.worst_lse
    );
    assert!(found.worst_guaranteed.max(found.worst_lse_guaranteed) <= 1.0, "{name}: {found:?}");
}

/// `dim` numbers from 1.5 to 2.5, whose roundings differ.
fn constants(dim: usize, seed: u64) -> Vec<f32> {
    let mut r = Rng::new(seed);
    (0..dim).map(|_| 1.5 + r.unit() as f32).collect()
}

/// Equal scores and equal values: nothing averages out, and every sum has one sign.
#[test]
fn constant_values_at_any_length() {
    let mut lengths = vec![3, 64, 65, 128, 513, 1000, 100_000, 1_500_001, 3_000_017];
    if full() {
        lengths.extend([10_000_019, 16_777_216, 30_000_000, 100_000_001, i32::MAX as usize]);
    }
    let mut all = Comparison::default();
    for keys in lengths {
        for isa in Isa::available() {
            for group in [1, 4] {
                let long = keys > 1_000_000;
                if (long && isa != Isa::best() && !full()) || (keys > 20_000_000 && isa != Isa::best()) {
                    continue;
                }
                let dim = if long { 16 } else { 256 };
                let mut case = Repeated::new(group, 16, dim, if long { 4096 } else { 64 });
                let v = constants(dim, keys as u64);
                case.page(|_| vec![1.0; 16], |_| v.clone());
                case.rank_of(0, keys);
                let found = check(&case, isa, Algorithm::Auto, if long { 2 } else { 1 });
                assert_guaranteed(&format!("constant, {keys} keys, {} rows, {}", group, isa.name()), &found);
                all.add(&found);
            }
        }
    }
    // Sums may not drift: by today's leaves this is how far a constant comes, at any length.
    assert!(all.worst_guaranteed <= 0.3 && all.worst_lse_guaranteed <= 0.5, "{all:?}");
}

/// Products of one sign, two keys whose values cancel: the rounding of scores is all that is seen.
#[test]
fn scores_of_one_sign() {
    let mut all = Comparison::default();
    for isa in Isa::available() {
        for (dim, group) in [(16, 1), (64, 4), (128, 1), (128, 8), (256, 4), (576, 1), (1024, 2)] {
            for seed in 0..if full() { 400 } else { 40 } {
                let mut r = Rng::new(seed * 1000 + dim as u64);
                let mut case = Repeated::new(group, dim, 16, 2);
                let (q, k) = (1.0 + r.unit() as f32, 1.0 + r.unit() as f32);
                let other = k * (1.0 - 0.01 * r.unit() as f32 / (dim as f32).sqrt());
                case.desc.scale = (0.05 + r.unit() as f32) * 4.0 / (dim as f32).sqrt();
                case.q.fill(if seed % 3 == 0 { -q } else { q });
                case.page(
                    |slot| vec![if slot == 0 { k } else { other }; dim],
                    |slot| vec![1.0 - 2.0 * slot as f32; 16],
                );
                case.rank_of(0, 2);
                all.add(&check(&case, isa, Algorithm::Auto, 1));
            }
        }
    }
    // What a search for the worst case found once.
    for isa in Isa::available() {
        let mut case = Repeated::new(1, 128, 16, 2);
        (case.desc.scale, case.q) = (0.354_089_17, vec![1.568_991_8; 128]);
        case.page(
            |slot| vec![if slot == 0 { 1.407_098_9 } else { 1.405_568_2 }; 128],
            |slot| vec![1.0 - 2.0 * slot as f32; 16],
        );
        case.rank_of(0, 2);
        all.add(&check(&case, isa, Algorithm::Auto, 1));
    }
    assert_guaranteed("one sign", &all);
}

/// Scores that rise from key to key, so that every tile has a new maximum; and most of the weight far below the largest.
#[test]
fn rising_scores_and_weight_far_from_the_maximum() {
    let mut all = Comparison::default();
    for isa in Isa::available() {
        for step in [1e-6, 1e-3, 0.03, 1.0] {
            let mut case = Repeated::new(2, 64, 64, 8192);
            case.q.fill(1.0);
            let mut r = Rng::new(5);
            let v: Vec<f32> = (0..8192 * 64).map(|_| 1.0 + r.unit() as f32).collect();
            case.page(|slot| vec![slot as f32 * step / 8.0; 64], |slot| v[slot * 64..][..64].to_vec());
            case.rank_of(0, 8192);
            all.add(&check(&case, isa, Algorithm::Auto, 2));
        }
        // One key at 14, and 2^20 keys at 0, which weigh about as much; values cancel.
        let mut case = Repeated::new(1, 128, 32, 64);
        case.q.fill(1.25);
        case.desc.scale = 1.0 / 128.0;
        case.page(
            |slot| vec![if slot == 0 { 11.2 } else { 1e-6 }; 128],
            |slot| vec![if slot == 0 { 1.0 } else { -1.0 }; 32],
        );
        case.page(|_| vec![1e-6; 128], |_| vec![-1.0; 32]);
        case.ranks.push((vec![(1, 8000), (0, 1), (1, 8383)], 8384 * 64 + 8000 * 64));
        all.add(&check(&case, isa, Algorithm::Auto, 1));
    }
    assert_guaranteed("rising, and far from the maximum", &all);
}

/// Scores within float32 whose products are beyond it, and the other way round.
#[test]
fn products_beyond_float32() {
    let mut all = Comparison::default();
    for isa in Isa::available() {
        for (scale, q, k) in [(1e-40, 3e20, 3e20), (-1e-40, 3e20, 3e20), (1e-44, 1e22, 1e22), (1e38, 3e-20, 3e-20)] {
            let mut case = Repeated::new(2, 32, 16, 4);
            case.desc.scale = scale;
            let mut r = Rng::new(11);
            case.q.iter_mut().for_each(|x| *x = q * (2.0 * r.unit() - 1.0) as f32);
            let keys: Vec<f32> = (0..4 * 32).map(|_| k * (2.0 * r.unit() - 1.0) as f32).collect();
            case.page(|slot| keys[slot * 32..][..32].to_vec(), |slot| vec![slot as f32 - 1.5; 16]);
            case.rank_of(0, 4);
            all.add(&check(&case, isa, Algorithm::Auto, 1));
        }
    }
    assert_guaranteed("products beyond float32", &all);
}

/// Ranks whose values cancel: an lse rounded to f32 on its way would be seen in the output.
#[test]
fn ranks_that_cancel() {
    for algorithm in ALGORITHMS {
        let mut all = Comparison::default();
        let mut counts = vec![vec![48_735, 49_970], vec![12_345, 54_321, 33_333, 33_332, 1]];
        if full() && algorithm != Algorithm::Ring {
            counts.push(vec![16_777_213, 16_777_183]);
        }
        for keys in counts {
            let page = if keys[0] > 1_000_000 { 4096 } else { 64 };
            let mut case = Repeated::new(1, 16, 16, page);
            case.desc.max_kv_length = *keys.iter().max().expect("ranks") as i32;
            for sign in [1.0, -1.0] {
                case.page(|_| vec![1.0; 16], |_| vec![sign; 16]);
            }
            for (rank, &keys) in keys.iter().enumerate() {
                case.rank_of(rank % 2, keys);
            }
            all.add(&check(&case, Isa::best(), algorithm, 1));
        }
        assert_guaranteed(&format!("ranks that cancel, {}", algorithm.name()), &all);
        assert!(all.worst <= 1.2, "{}: {all:?}", algorithm.name());
    }
}

/// The exchanges that have a wire type.
const NARROW: [Algorithm; 4] = [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Tree, Algorithm::Allreduce3];

/// A rank that hardly counts has values beyond the wire's type.
#[test]
fn values_beyond_the_wire_type() {
    for algorithm in NARROW {
        for (dtype, far) in [(Dtype::F16, 7e4), (Dtype::F16, 1e9), (Dtype::Bf16, 3.4e38)] {
            let mut case = Repeated::new(1, 16, 16, 4);
            case.desc.wire_dtype = dtype;
            case.desc.scale = 1.0;
            case.q.fill(1.0);
            // Scores of 0 and of -250, whose weight no float has.
            case.page(|_| vec![0.0; 16], |slot| vec![0.3 + slot as f32; 16]);
            case.page(|_| vec![-250.0 / 16.0; 16], |_| vec![far; 16]);
            case.rank_of(0, 4);
            case.rank_of(1, 1);
            assert_guaranteed(
                &format!("{far:e} as {}, {}", dtype.name(), algorithm.name()),
                &check(&case, Isa::best(), algorithm, 1),
            );
        }
    }
}

/// Values halfway between numbers of the wire's type, all rounded the same way; also where those are subnormal, and where a
/// sum over ranks would be beyond the type.
#[test]
fn roundings_on_the_wire_that_add_up() {
    for algorithm in NARROW {
        let mut all = Comparison::default();
        for dtype in [Dtype::F16, Dtype::Bf16] {
            let (unit, tiny) = (ulp(1.0, dtype), ulp(0.0, dtype));
            for world in [2, 3, 8] {
                for seed in 0..20 {
                    let mut r = Rng::new(seed * 100 + world as u64);
                    let mut case = Repeated::new(1, 16, 16, 1);
                    (case.desc.wire_dtype, case.desc.max_kv_length) = (dtype, 1);
                    case.q.fill(1.0);
                    for rank in 0..world {
                        let k = if seed % 2 == 0 { 1.0 } else { r.unit() as f32 };
                        let v = (0..16).map(|d| match d % 4 {
                            0 => 1.0 + unit / 2.0,
                            1 => 1.0 + unit * (r.range(0, 60) as f64 + 0.5),
                            2 => tiny * (r.range(0, 2000) as f64 + 0.5),
                            _ => 40_000.0 + 20_000.0 * r.unit(),
                        });
                        let v: Vec<f32> = v.map(|x| x as f32).collect();
                        case.page(|_| vec![k; 16], |_| v.clone());
                        case.rank_of(rank, 1);
                    }
                    all.add(&check(&case, Isa::best(), algorithm, 1));
                }
            }
        }
        assert_guaranteed(&format!("16-bit wires, {}", algorithm.name()), &all);
        assert!(all.worst_guaranteed >= 0.2, "the bound is not made for this: {all:?}");
    }
}

/// Many keys whose weight is just too small for a float32 beside the largest, and whose values are all that counts.
#[test]
fn weights_that_no_float_has() {
    let mut all = Comparison::default();
    for isa in Isa::available() {
        for s in [1e-3f32, 0.3, 0.999] {
            let mut case = Repeated::new(1, 16, 16, 4096);
            // Scores in powers of two: s, and 126 and a little below what the maximum is rounded up to.
            (case.desc.scale, case.q[0]) = (std::f32::consts::LN_2, 1.0);
            let score = |x: f32| (0..16).map(|d| if d == 0 { x } else { 0.0 }).collect::<Vec<f32>>();
            case.page(
                |slot| score(if slot == 0 { s } else { -125.001 }),
                |slot| vec![if slot == 0 { 0.0 } else { 1e37 }; 16],
            );
            case.rank_of(0, 4096);
            all.add(&check(&case, isa, Algorithm::Auto, 1));
        }
    }
    assert_guaranteed("weights that no float has", &all);
    assert!(all.worst_guaranteed > 0.25, "they are lost, or this tests nothing: {all:?}");
}

/// The limit of scores: a row with one above float32 is NaN; one below it weighs nothing, and a row of nothing else counts as
/// one without keys, on its own and beside other ranks.
#[test]
fn scores_beyond_float32() {
    for isa in Isa::available() {
        for world in [1, 2] {
            let answer = |keys: &[f32]| {
                let mut case = Repeated::new(1, 16, 16, keys.len());
                (case.desc.scale, case.q[0]) = (1.0, 1e30);
                let row = |x: f32| (0..16).map(|d| if d == 0 { x } else { 0.0 }).collect::<Vec<f32>>();
                case.page(|slot| row(keys[slot]), |slot| vec![1.0 + slot as f32; 16]);
                case.rank_of(0, keys.len());
                if world == 2 {
                    case.page(|_| row(-1e20), |_| vec![7.0; 16]);
                    case.rank_of(1, keys.len());
                }
                answers(&case, isa, Algorithm::Auto, 1)
            };
            for (o, lse) in answer(&[1e-30, 1e20]).iter().chain(&answer(&[1e20, 1e20])) {
                assert!(o.iter().all(|x| x.is_nan()) && lse[0].is_nan(), "{o:?} {lse:?}");
            }
            for (o, lse) in answer(&[-1e20, 1e-30, -2e20]) {
                assert!(o == [2.0; 16] && (lse[0] - 1.0).abs() < 1e-6, "{o:?} {lse:?}");
            }
            for (o, lse) in answer(&[-1e20, -2e20]) {
                assert_eq!((o, lse), (vec![0.0; 16], vec![f32::NEG_INFINITY]));
            }
        }
    }
}
