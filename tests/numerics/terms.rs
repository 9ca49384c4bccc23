//! Windows, sinks and what happens to scores, where the answer is known by hand.

use treeattn::attention::{Algorithm, AttentionDesc, KvLayout, OutputMode, Placement};
use treeattn::cpu::Isa;

use crate::support::case::Case;
use crate::support::run::Pool;
use crate::support::values::Values;

const PLACEMENTS: [Placement; 4] =
    [Placement::Contiguous, Placement::Interleaved { run: 1 }, Placement::Interleaved { run: 7 }, Placement::Explicit];
const ALGORITHMS: [Algorithm; 5] =
    [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Tree, Algorithm::Allreduce3, Algorithm::Ring];

/// A shape of two kv heads with 3 query heads each.
fn desc(placement: Placement) -> AttentionDesc {
    AttentionDesc { placement, causal: true, ..AttentionDesc::new(6, 2, 24, 1) }
}

/// The bits of rank 0.
fn bits(pool: &mut Pool, case: &Case) -> Vec<u32> {
    pool.answers(case)[0].bits(case)
}

#[test]
fn a_window_of_one_key_gives_the_value_of_the_query_itself() {
    let mut pool = Pool::default();
    for (i, (placement, world)) in PLACEMENTS.into_iter().flat_map(|p| [1, 2, 5].map(|w| (p, w))).enumerate() {
        let desc = AttentionDesc { window: 1, algorithm: ALGORITHMS[i % 5], ..desc(placement) };
        let case = Case::plain(desc, world, &[(200, 3)], Values::Normal, 60 + i as u64);
        for rank in pool.answers(&case) {
            for (token, head) in (0..3).flat_map(|token| (0..6).map(move |head| (token, head))) {
                let own = &case.sequences[0].v[((197 + token) * 2 + head / 3) * 24..][..24];
                let (row, _) = rank.row(&case, token, head);
                // Weighted and divided by the weight again.
                assert!(
                    row.iter().zip(own).all(|(x, v)| (x - v).abs() <= f32::EPSILON * v.abs()),
                    "{}",
                    case.describe()
                );
            }
        }
    }
}

#[test]
fn a_window_of_the_whole_sequence_changes_no_bit() {
    let mut pool = Pool::default();
    for placement in PLACEMENTS {
        for window in [200, 201, i32::MAX] {
            let plain = Case::plain(desc(placement), 3, &[(200, 1), (70, 2)], Values::Normal, 71);
            let mut wide = plain.clone();
            wide.desc.window = window;
            assert_eq!(bits(&mut pool, &plain), bits(&mut pool, &wide), "{}", wide.describe());
        }
    }
}

/// Not causal: a window hides what lies before it and nothing after.
#[test]
fn windows_end_inside_shards_and_hide_whole_ones() {
    let mut pool = Pool::default();
    for causal in [true, false] {
        for (i, placement) in PLACEMENTS.into_iter().enumerate() {
            for (world, window) in [(1, 40), (2, 100), (2, 99), (3, 30), (4, 1), (5, 77), (9, 12)] {
                let algorithm = ALGORITHMS[(i + world + usize::from(causal)) % 5];
                let desc = AttentionDesc { causal, window, algorithm, ..desc(placement) };
                let mut case = Case::plain(desc, world, &[(200, 2), (64, 1), (0, 0)], Values::Normal, i as u64);
                pool.check(&case);
                // Queries far before the end, and past it, where nothing is left to see.
                case.query_position = Some(vec![57, 199 + window, 20]);
                pool.check(&case);
            }
        }
    }
}

#[test]
fn a_window_tells_positions_from_slots() {
    // Each rank holds 50 keys; a window of 60 by slots would hide none of them.
    let mut pool = Pool::default();
    let desc = AttentionDesc { window: 60, output: OutputMode::Local, ..desc(Placement::Contiguous) };
    let case = Case::plain(desc, 4, &[(200, 1)], Values::Normal, 9);
    let ranks = pool.answers(&case);
    for (rank, memory) in ranks.iter().enumerate() {
        let lse = memory.lse_of(&case, 0, 0).expect("an lse");
        assert_eq!(lse == f32::NEG_INFINITY, rank < 2, "rank {rank}: {lse}");
    }
    pool.check(&case);
}

/// 1 to 9 ranks in every algorithm, empty ones among them.
#[test]
fn a_sink_counts_once_whatever_the_ranks() {
    let mut pool = Pool::default();
    for algorithm in ALGORITHMS {
        for world in 1..=9 {
            for output in [OutputMode::Replicated, OutputMode::Scattered, OutputMode::Local] {
                let layout = [KvLayout::Strided, KvLayout::BlockTable, KvLayout::CsrPages][world % 3];
                let mut desc = AttentionDesc { algorithm, sinks: true, output, ..desc(PLACEMENTS[world % 4]) };
                (desc.kv_layout, desc.page_size) = (layout, if layout == KvLayout::Strided { 0 } else { 16 });
                let mut case = Case::plain(desc, world, &[(5, 1), (0, 2), (150, 2)], Values::Normal, world as u64);
                if world % 2 == 0 {
                    // Rank 0, which has the sinks, holds no key.
                    for sequence in &mut case.sequences {
                        let moved = std::mem::take(&mut sequence.held[0]);
                        sequence.held[1].splice(0..0, moved);
                    }
                    case.desc.max_kv_length = 150;
                    if case.desc.placement != Placement::Explicit {
                        (case.desc.placement, case.desc.causal) = (Placement::Explicit, false);
                    }
                }
                pool.check(&case);
            }
        }
        pool.forget();
    }
}

#[test]
fn a_sink_alone_is_the_lse() {
    let mut pool = Pool::default();
    for (world, algorithm) in [(1, Algorithm::Auto), (3, Algorithm::Auto), (3, Algorithm::Ring), (2, Algorithm::Tree)] {
        for isa in Isa::available() {
            // No keys at all; and keys that a window hides from queries past the end.
            let desc = AttentionDesc { sinks: true, window: 4, algorithm, ..desc(Placement::Interleaved { run: 1 }) };
            let mut case = Case::plain(desc, world, &[(0, 2), (100, 1)], Values::Normal, 5);
            case.query_position = Some(vec![0, 0, 300]);
            case.terms.sinks = vec![0.5, -3.0, f32::NEG_INFINITY, 1e30, -1e-3, 7.0];
            case.isa = isa.name().into();
            for rank in pool.answers(&case) {
                for (token, head) in (0..3).flat_map(|token| (0..6).map(move |head| (token, head))) {
                    assert!(rank.row(&case, token, head).1.iter().all(|&bits| bits == 0));
                    assert_eq!(rank.lse_of(&case, token, head), Some(case.terms.sinks[head]));
                }
            }
        }
    }
}

#[test]
fn sinks_that_are_nan_or_infinite_make_their_rows_nan() {
    let mut pool = Pool::default();
    for algorithm in ALGORITHMS {
        let desc = AttentionDesc { sinks: true, algorithm, ..desc(Placement::Contiguous) };
        let mut case = Case::plain(desc, 3, &[(70, 1), (0, 1)], Values::Normal, 5);
        case.terms.sinks = vec![0.5, f32::NAN, f32::NEG_INFINITY, f32::INFINITY, -1e-3, 7.0];
        for rank in pool.answers(&case) {
            for (token, head) in (0..2).flat_map(|token| (0..6).map(move |head| (token, head))) {
                let bad = head == 1 || head == 3;
                assert!(rank.row(&case, token, head).0.iter().all(|x| x.is_nan() == bad), "{token} {head}");
                assert_eq!(rank.lse_of(&case, token, head).map(f32::is_nan), Some(bad));
            }
        }
    }
}
