//! The step in two halves: partials handed out, and partials that the engine hands in.

use treeattn::attention::reference::{Comparison, Precision, merge};
use treeattn::attention::{Algorithm, AttentionDesc, Dtype, OutputMode, Tensor};
use treeattn::runtime::MergeArgs;

use crate::support::case::Case;
use crate::support::rank::Rank;
use crate::support::run::{Call, Group, Pool, judge, shard_reference, step};
use crate::support::values::Values;

fn cases() -> impl Iterator<Item = Case> {
    [Values::Normal, Values::Peaky, Values::Subnormal, Values::Outliers].into_iter().enumerate().map(|(i, values)| {
        let mut desc = AttentionDesc::new(6, 2, 40, 1);
        (desc.k_dtype, desc.v_dtype) = (Dtype::Bf16, Dtype::F16);
        Case::plain(desc, 1 + i, &[(130, 2), (0, 1), (77, 1)], values, 900 + i as u64)
    })
}

#[test]
fn partials_are_those_of_the_shards() {
    let mut pool = Pool::default();
    for case in cases() {
        let mut ranks: Vec<Rank> = (0..case.world).map(|rank| Rank::new(&case, rank)).collect();
        for result in pool.step(&case, &mut ranks, Call::Partial) {
            result.expect("a partial");
        }
        let mut local = case.clone();
        local.desc.output = OutputMode::Local;
        let found = judge(&local, &ranks).expect("references that agree");
        assert_eq!(found.failure, None, "{}", case.describe());
    }
}

#[test]
fn merging_handed_in_partials_gives_the_whole() {
    for case in cases() {
        for (output, base, algorithm) in [
            (OutputMode::Replicated, 0, Algorithm::Auto),
            (OutputMode::Scattered, 2, Algorithm::Auto),
            (OutputMode::Replicated, 0, Algorithm::TwoShot),
            (OutputMode::Replicated, 2, Algorithm::Tree),
            (OutputMode::Scattered, 0, Algorithm::Tree),
            (OutputMode::Replicated, 0, Algorithm::Allreduce3),
        ] {
            let mut desc = case.desc;
            (desc.output, desc.algorithm) = (output, algorithm);
            let group = Group::new(&case.isa, case.world, 1);
            let plans = group.plans(&desc).expect("plans");
            let ranks: Vec<Rank> = (0..case.world).map(|rank| Rank::new(&case, rank)).collect();
            for result in step(&group, &group.plans(&case.desc).expect("plans"), &ranks, false, Call::Partial) {
                result.expect("a partial");
            }
            let shards: Vec<_> = (0..case.world).map(|rank| shard_reference(&case, &ranks, rank)).collect();
            let wanted = merge(&shards).expect("shards of one shape");
            let to_base = if base == 2 { std::f32::consts::LOG2_E } else { 1.0 };
            let results: Vec<(Vec<f32>, Vec<f32>)> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..case.world)
                    .map(|rank| (&plans[rank], &ranks[rank], &case))
                    .map(|(plan, memory, case)| scope.spawn(move || hand_in(plan, memory, case, base, to_base)))
                    .collect();
                threads.into_iter().map(|thread| thread.join().expect("a merge")).collect()
            });
            for (plan, (out, lse)) in plans.iter().zip(&results) {
                let heads = plan.heads();
                let mut found = Comparison::default();
                for token in 0..case.tokens {
                    for (n, head) in heads.clone().enumerate() {
                        let row = token * heads.len() + n;
                        let precision = Precision { out: Dtype::F32, wire: Dtype::F32 };
                        let row_lse = (base == 0).then_some(lse[row]);
                        wanted.compare_row(token * 6 + head, &out[row * 40..][..40], row_lse, precision, &mut found);
                        // Another base costs the roundings of the lse that is handed in.
                        let (lse, wanted) = (f64::from(lse[row]), wanted.lse[token * 6 + head]);
                        assert!(lse == wanted || (lse - wanted).abs() <= 1e-6 * wanted.abs().max(1.0));
                    }
                }
                let most = if base == 2 { 2.0 } else { 1.0 };
                assert!(found.worst <= most, "base {base}: {found:?}\n{}", case.describe());
            }
        }
    }
}

/// One rank's merge of what lies in its outputs.
fn hand_in(
    plan: &treeattn::runtime::Plan,
    memory: &Rank,
    case: &Case,
    base: i32,
    to_base: f32,
) -> (Vec<f32>, Vec<f32>) {
    let (mut o, mut lse) = (Vec::new(), Vec::new());
    for token in 0..case.tokens {
        for head in 0..6 {
            o.extend(memory.row(case, token, head).0);
            lse.push(memory.lse_of(case, token, head).expect("an lse") * to_base);
        }
    }
    let rows = case.tokens * plan.heads().len();
    let (mut out, mut out_lse) = (vec![f32::NAN; rows * 40], vec![f32::NAN; rows]);
    let args = MergeArgs {
        query_tokens: case.tokens as i32,
        heads: 0,
        head_dim: 0,
        o: Tensor::from_slice(&o),
        o_dtype: Dtype::F32,
        lse: Tensor::from_slice(&lse),
        lse_base: base,
        out: Tensor::from_slice_mut(&mut out),
        out_dtype: None,
        out_lse: Tensor::from_slice_mut(&mut out_lse),
        ..MergeArgs::default()
    };
    // SAFETY: the arrays outlive the call, which runs here.
    unsafe { plan.merge(&args, None) }.expect("a merge");
    (out, out_lse)
}

/// Large log-sum-exps differ by little: they are subtracted before anything of them is rounded, in either base, whatever the
/// order in which ranks merge.
#[test]
fn large_lse_are_not_rounded_before_they_are_subtracted() {
    let unit = |base: i32| if base == 2 { std::f64::consts::LN_2 } else { 1.0 };
    for world in [2usize, 5, 8] {
        // Not ALLREDUCE3, the baseline, which has one float for the largest lse.
        for algorithm in [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Tree] {
            let mut desc = AttentionDesc::new(1, 1, 8, 1);
            (desc.kv_heads, desc.algorithm) = (0, algorithm);
            let group = Group::new("scalar", world, 1);
            let plans = group.plans(&desc).expect("plans");
            for base in [0, 2] {
                let lse: Vec<f32> = (0..world).map(|rank| 30_000.25 + (rank * 3 % 8) as f32 * 0.375).collect();
                let o: Vec<Vec<f32>> = (0..world).map(|rank| vec![1.0 - 2.0 * (rank % 2) as f32; 8]).collect();
                let natural = |rank: usize| f64::from(lse[rank]) * unit(base);
                let most = (0..world).map(natural).fold(f64::NEG_INFINITY, f64::max);
                let weight = |rank: usize| (natural(rank) - most).exp();
                let sum: f64 = (0..world).map(weight).sum();
                let wanted = (0..world).map(|rank| weight(rank) * f64::from(o[rank][0])).sum::<f64>() / sum;
                let results: Vec<([f32; 8], f32)> = std::thread::scope(|scope| {
                    let merge = |rank: usize| {
                        let (mut out, mut out_lse) = ([0f32; 8], 0f32);
                        let args = MergeArgs {
                            query_tokens: 1,
                            heads: 0,
                            head_dim: 0,
                            o: Tensor::from_slice(&o[rank]),
                            o_dtype: Dtype::F32,
                            lse: Tensor::from_slice(&lse[rank..=rank]),
                            lse_base: base,
                            out: Tensor::from_slice_mut(&mut out),
                            out_dtype: None,
                            out_lse: Tensor::from_slice_mut(std::slice::from_mut(&mut out_lse)),
                            ..MergeArgs::default()
                        };
                        // SAFETY: the arrays outlive the call, which has no stream and so blocks.
                        unsafe { plans[rank].merge(&args, None) }.expect("a merge");
                        (out, out_lse)
                    };
                    let threads: Vec<_> = (0..world).map(|rank| scope.spawn(move || merge(rank))).collect();
                    threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
                });
                for (out, out_lse) in results {
                    let what = format!("{} over {world}, base {base}", algorithm.name());
                    let error = (f64::from(out[0]) - wanted).abs();
                    assert!(error <= 2f64.powi(-24) * (4 + world) as f64, "{what}: {} wanted {wanted}", out[0]);
                    assert_eq!(out_lse, (most + sum.ln()) as f32, "{what}");
                }
            }
        }
    }
}
