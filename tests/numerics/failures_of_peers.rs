//! Failures that other libraries shipped, each as a test of its own.
//!
//! F2 (one communicator on two streams) and F14 to F16 are about other devices or are held by the communicator's tests.

use treeattn::ErrorKind;
use treeattn::attention::{AttentionDesc, Dtype, KvLayout, OutputMode, Placement, Tensor};
use treeattn::runtime::{Device, DeviceKind, MergeArgs, Runtime, RuntimeConfig, merge_partials};

use crate::support::case::Case;
use crate::support::rank::Rank;
use crate::support::run::{Call, Group, Pool, step};
use crate::support::values::Values;

const CPU: Device = Device { kind: DeviceKind::Cpu, ordinal: 0 };

/// Merges two partials of one row of two elements: (o, lse) each. What comes out.
fn merged(partials: [([f32; 2], f32); 2], base: i32, plus_inf_is_empty: bool) -> ([f32; 2], f32) {
    let runtime = Runtime::new(RuntimeConfig::default()).expect("a runtime");
    let o = [partials[0].0, partials[1].0].concat();
    let lse = [partials[0].1, partials[1].1];
    let (mut out, mut out_lse) = ([f32::NAN; 2], [f32::NAN; 1]);
    let args = MergeArgs {
        query_tokens: 1,
        heads: 1,
        head_dim: 2,
        o: Tensor::from_slice(&o),
        o_dtype: Dtype::F32,
        lse: Tensor::from_slice(&lse),
        lse_base: base,
        plus_inf_is_empty,
        out: Tensor::from_slice_mut(&mut out),
        out_dtype: None,
        out_lse: Tensor::from_slice_mut(&mut out_lse),
        ..MergeArgs::default()
    };
    // SAFETY: the arrays outlive the call.
    unsafe { merge_partials(&runtime, CPU, &args, 2, None) }.expect("a merge");
    (out, out_lse[0])
}

#[test]
fn f1_ranks_that_disagree_on_counts_get_an_error_not_an_answer() {
    let case = Case::plain(AttentionDesc::new(4, 2, 16, 1), 2, &[(40, 1), (30, 1)], Values::Normal, 1);
    let group = Group::new(&case.isa, 2, 1);
    let plans = group.plans(&case.desc).expect("plans");
    let mut ranks: Vec<Rank> = (0..2).map(|rank| Rank::new(&case, rank)).collect();
    ranks[1].args.query_tokens = 1;
    ranks[1].args.batch = 1;
    for (memory, result) in ranks.iter().zip(step(&group, &plans, &ranks, false, Call::Decode)) {
        assert_eq!(result.expect_err("the steps differ").kind(), ErrorKind::Desync);
        assert!(memory.row(&case, 0, 0).0.iter().all(|x| x.is_nan()), "no answer is left behind");
    }
}

#[test]
fn f3_two_kinds_of_step_share_one_communicator_for_thousands_of_rounds() {
    let case = Case::plain(AttentionDesc::new(4, 2, 16, 1), 3, &[(40, 1)], Values::Normal, 3);
    let mut desc = case.desc;
    desc.output = OutputMode::Scattered;
    let scattered = Case { desc, ..case.clone() };
    let group = Group::new(&case.isa, 3, 1);
    let (whole, parts) = (group.plans(&case.desc).expect("plans"), group.plans(&desc).expect("plans"));
    let ranks: Vec<Rank> = (0..3).map(|rank| Rank::new(&case, rank)).collect();
    let part: Vec<Rank> = (0..3).map(|rank| Rank::new(&scattered, rank)).collect();
    let mut first = None;
    for _ in 0..2000 {
        for (plans, memory) in [(&whole, &ranks), (&parts, &part)] {
            for result in step(&group, plans, memory, true, Call::Decode) {
                result.expect("a step");
            }
        }
        let bits: Vec<_> = [ranks[2].bits(&case)].into_iter().chain(part.iter().map(|r| r.bits(&scattered))).collect();
        assert_eq!(first.get_or_insert_with(|| bits.clone()), &bits);
    }
}

#[test]
fn f4_scores_far_below_any_sentinel_still_count() {
    let mut pool = Pool::default();
    for below in [-6e4f32, -1e9, -1e30] {
        for world in [1, 2] {
            let mut desc = AttentionDesc::new(2, 1, 4, 1);
            desc.scale = 1.0;
            let mut case = Case::plain(desc, world, &[(64, 1)], Values::Equal, 4);
            case.q.fill(1.0);
            case.sequences[0].k.chunks_exact_mut(4).for_each(|k| k.copy_from_slice(&[below, 0.0, 0.0, 0.0]));
            for memory in pool.answers(&case) {
                let v = &case.sequences[0].v;
                for (d, found) in memory.row(&case, 0, 1).0.into_iter().enumerate() {
                    let mean = (0..64).map(|key| f64::from(v[key * 4 + d])).sum::<f64>() / 64.0;
                    let error = (f64::from(found) - mean).abs();
                    assert!(error <= 8.0 * 2f64.powi(-21), "scores of {below} on {world} ranks: {found}, {mean}");
                }
                let lse = memory.lse_of(&case, 0, 1).expect("an lse");
                assert!((lse - below).abs() <= below.abs() * 1e-6 + 5.0, "{lse} for {below}");
            }
        }
    }
}

#[test]
fn f5_two_empty_partials_merge_to_the_empty_one() {
    let empty = ([f32::NAN; 2], f32::NEG_INFINITY);
    assert_eq!(merged([empty, empty], 0, false), ([0.0; 2], f32::NEG_INFINITY));
}

#[test]
fn f6_plus_infinity_means_empty_only_where_it_is_said_to() {
    let (flash, full) = (([0.0; 2], f32::INFINITY), ([1.0, 2.0], 0.5));
    assert_eq!(merged([flash, full], 0, true), ([1.0, 2.0], 0.5));
    let (o, lse) = merged([flash, full], 0, false);
    assert!(o.iter().all(|x| x.is_nan()) && lse.is_nan());
}

#[test]
fn f7_no_keys_is_zero_and_minus_infinity_beside_full_neighbours() {
    let mut pool = Pool::default();
    for layout in [KvLayout::Strided, KvLayout::BlockTable, KvLayout::CsrPages] {
        let mut desc = AttentionDesc::new(4, 2, 16, 1);
        (desc.kv_layout, desc.page_size) = (layout, if layout == KvLayout::Strided { 0 } else { 4 });
        let case = Case::plain(desc, 2, &[(33, 1), (0, 2), (65, 1)], Values::Normal, 7);
        for memory in pool.answers(&case) {
            for token in [1, 2] {
                assert!(memory.row(&case, token, 3).1.iter().all(|&bits| bits == 0));
                assert_eq!(memory.lse_of(&case, token, 3), Some(f32::NEG_INFINITY));
            }
        }
        pool.check(&case);
    }
}

#[test]
fn f8_nan_in_unused_slots_reaches_nothing() {
    let mut pool = Pool::default();
    for keys in [1, 5, 63, 65, 100] {
        for (layout, page_size) in [(KvLayout::Strided, 0), (KvLayout::BlockTable, 32), (KvLayout::CsrPages, 128)] {
            // Room for more than is held: every slot past the length is NaN, in the last page and in spare ones.
            let mut desc = AttentionDesc::new(2, 1, 16, 200);
            (desc.kv_layout, desc.page_size) = (layout, page_size);
            pool.check(&Case::plain(desc, 1, &[(keys, 1), (keys + 3, 1)], Values::Normal, keys as u64));
        }
    }
}

#[test]
fn f9_base_two_is_converted_and_matters() {
    let natural = [([1.0, 5.0], 0.75f32), ([3.0, -1.0], 2.5)];
    let binary = natural.map(|(o, lse)| (o, lse * std::f32::consts::LOG2_E));
    let (right, converted) = (merged(natural, 0, false), merged(binary, 2, false));
    let (mixed, lse) = merged(binary, 0, false);
    assert!((right.0[0] - converted.0[0]).abs() < 1e-6 && (right.1 - converted.1).abs() < 1e-6);
    assert!((right.0[0] - mixed[0]).abs() > 1e-2 && (right.1 - lse).abs() > 1e-2);
}

#[test]
fn f10_causal_limits_are_global() {
    // With the limit from local lengths, rows of ranks that hold few keys would see too many or too few.
    let mut pool = Pool::default();
    for placement in [Placement::Contiguous, Placement::Interleaved { run: 1 }, Placement::Explicit] {
        for world in [2, 3, 5] {
            let mut desc = AttentionDesc::new(4, 1, 8, 1);
            (desc.placement, desc.causal) = (placement, true);
            pool.check(&Case::plain(desc, world, &[(17, 8), (9, 9), (64, 3)], Values::Normal, 10));
        }
    }
}

#[test]
fn f11_no_token_is_lost_at_any_remainder() {
    let mut pool = Pool::default();
    for world in 2..=8 {
        for length in 5 * world..6 * world {
            let mut case =
                Case::plain(AttentionDesc::new(1, 1, 4, 1), world, &[(length, 1)], Values::Equal, length as u64);
            // Only the last token has a value.
            let last = (length - 1) * 4;
            case.sequences[0].v[..last].fill(0.0);
            case.sequences[0].v[last..].fill(length as f32);
            for memory in pool.answers(&case) {
                for found in memory.row(&case, 0, 0).0 {
                    assert!((found - 1.0).abs() < 1e-5, "{world} ranks, {length} tokens: {found}");
                }
            }
        }
    }
}

#[test]
fn f12_empty_sequences_between_others_write_where_they_belong() {
    let mut pool = Pool::default();
    for (seed, output) in [OutputMode::Replicated, OutputMode::Scattered, OutputMode::Local].into_iter().enumerate() {
        for threads in [1, 3] {
            let mut desc = AttentionDesc::new(6, 2, 16, 1);
            desc.output = output;
            let lengths = [(0, 1), (200, 1), (0, 3), (1, 2), (0, 1), (130, 1), (0, 1)];
            let mut case = Case::plain(desc, 3, &lengths, Values::Normal, seed as u64);
            (case.threads, case.wild) = (threads, true);
            pool.check(&case);
        }
    }
}

#[test]
fn f13_a_broken_partial_does_not_vanish() {
    let (o, lse) = merged([([1.0, 2.0], 0.5), ([3.0, 4.0], f32::NAN)], 0, false);
    assert!(o.iter().all(|x| x.is_nan()) && lse.is_nan());
    // The same over ranks: a key that only one of them holds.
    let mut pool = Pool::default();
    let mut case = Case::plain(AttentionDesc::new(2, 2, 8, 1), 4, &[(64, 1)], Values::Normal, 13);
    case.sequences[0].k[63 * 16] = f32::NAN;
    for memory in pool.answers(&case) {
        assert!(memory.row(&case, 0, 0).0.iter().all(|x| x.is_nan()));
        assert!(memory.row(&case, 0, 1).0.iter().all(|x| x.is_finite()));
    }
}
