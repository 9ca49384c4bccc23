//! Windows, sinks and what happens to scores, where the answer is known by hand.

use treeattn::attention::{Algorithm, AttentionDesc, Dtype, KvLayout, MaskKind, OutputMode, Placement, Tensor};
use treeattn::cpu::Isa;

use crate::support::case::Case;
use crate::support::memory::Memory;
use crate::support::rank::{Ints, Rank};
use crate::support::run::{Call, Pool};
use crate::support::terms::MaskValues;
use crate::support::values::Values;

const PLACEMENTS: [Placement; 4] =
    [Placement::Contiguous, Placement::Interleaved { run: 1 }, Placement::Interleaved { run: 7 }, Placement::Explicit];
const ALGORITHMS: [Algorithm; 5] =
    [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Tree, Algorithm::Allreduce3, Algorithm::Ring];

const MASKS: [(MaskKind, Option<Dtype>); 3] =
    [(MaskKind::Boolean, None), (MaskKind::Additive, Some(Dtype::F16)), (MaskKind::Additive, Some(Dtype::F32))];

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
                if world.is_multiple_of(2) {
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

/// Scores far past the cap weigh alike, and the lse is the cap and the number of keys.
#[test]
fn huge_scores_end_at_the_cap() {
    let mut pool = Pool::default();
    for (i, isa) in Isa::available().enumerate() {
        for (cap, sign) in [(30.0, 1.0), (50.0, -1.0), (1e-3, 1.0)] {
            let desc = AttentionDesc { softcap: cap, algorithm: ALGORITHMS[i % 5], ..desc(Placement::Contiguous) };
            let mut case = Case::plain(desc, 1 + i, &[(64, 1)], Values::Equal, 8);
            case.isa = isa.name().into();
            case.q.fill(1e15);
            case.sequences[0].k.fill(sign * 1e15);
            for rank in pool.answers(&case) {
                for head in 0..6 {
                    let values = |d: usize| (0..64).map(move |key| (key * 2 + head / 3) * 24 + d);
                    let row = rank.row(&case, 0, head).0;
                    for (d, &x) in row.iter().enumerate() {
                        let sum: f64 = values(d).map(|at| f64::from(case.sequences[0].v[at])).sum();
                        assert!((f64::from(x) - sum / 64.0).abs() < 1e-5, "{} cap {cap}: {x}", isa.name());
                    }
                    let wanted = f64::from(sign * cap) + 64f64.ln();
                    let lse = f64::from(rank.lse_of(&case, 0, head).expect("an lse"));
                    assert!((lse - wanted).abs() <= 4e-7 * wanted.abs().max(1.0), "{} {lse} {wanted}", isa.name());
                }
            }
            pool.check(&case);
        }
    }
}

/// Keys at the first and the last position that there is: distances of 0 and 2^31 - 2.
#[test]
fn slopes_reach_over_all_positions() {
    const LAST: i32 = i32::MAX - 1;
    let mut pool = Pool::default();
    for (query, far) in [(LAST, 0), (0, LAST)] {
        for world in [1, 2] {
            let desc = AttentionDesc { alibi: true, causal: false, ..AttentionDesc::new(2, 1, 8, 2) };
            let desc = AttentionDesc { placement: Placement::Explicit, ..desc };
            let mut case = Case::plain(desc, world, &[(2, 1)], Values::Equal, 3);
            case.sequences[0].held = if world == 1 { vec![vec![0, 1]] } else { vec![vec![0], vec![1]] };
            case.q.fill(0.0);
            case.sequences[0].v = vec![1.0; 8].into_iter().chain([-3.0; 8]).collect();
            case.query_position = Some(vec![query]);
            // A slope of 2^-31 makes the distance 1; a usual one hides the far key.
            case.terms.slopes = vec![2f32.powi(-31), 0.5];
            let mut ranks: Vec<Rank> = (0..world).map(|rank| Rank::new(&case, rank)).collect();
            for (slot, position) in [(0, far), (1, query)] {
                let (rank, slot) = if world == 1 { (0, slot) } else { (slot, 0) };
                ranks[rank].set(Ints::KvPosition, slot, position);
            }
            for result in pool.step(&case, &mut ranks, Call::Decode) {
                result.expect("positions that are valid");
            }
            let weight = (-f64::from(LAST) / 2f64.powi(31)).exp();
            for rank in &ranks {
                let row = |head: usize| rank.row(&case, 0, head).0;
                let wanted = (weight - 3.0) / (weight + 1.0);
                assert!(row(0).iter().all(|&x| (f64::from(x) - wanted).abs() < 1e-6), "{:?} {wanted}", row(0));
                assert!(row(1).iter().all(|&x| x == -3.0), "{:?}", row(1));
                assert_eq!(rank.lse_of(&case, 0, 1), Some(0.0));
            }
        }
    }
}

/// A desc with a mask.
fn masked(kind: MaskKind, dtype: Option<Dtype>) -> AttentionDesc {
    AttentionDesc { mask: kind, mask_dtype: dtype, ..desc(Placement::Interleaved { run: 5 }) }
}

/// A mask that all heads and query tokens share.
fn shared(values: Vec<Vec<f32>>) -> Option<MaskValues> {
    Some(MaskValues { broadcast: [false, true, true], values })
}

#[test]
fn a_mask_that_hides_all_from_one_head_leaves_the_others() {
    let mut pool = Pool::default();
    for (i, (kind, dtype)) in MASKS.into_iter().enumerate() {
        for sinks in [false, true] {
            let desc = AttentionDesc { sinks, algorithm: ALGORITHMS[i + 2], ..masked(kind, dtype) };
            let mut case = Case::plain(desc, 3, &[(150, 2)], Values::Normal, 4);
            let mut values = vec![0.0; 6 * 2 * 150];
            values[4 * 300..5 * 300].fill(f32::NEG_INFINITY);
            case.terms.mask = Some(MaskValues { broadcast: [false; 3], values: vec![values] });
            case.terms.factors.clear();
            for rank in pool.answers(&case) {
                for token in 0..2 {
                    assert!(rank.row(&case, token, 4).1.iter().all(|&bits| bits == 0));
                    let wanted = if sinks { case.terms.sinks[4] } else { f32::NEG_INFINITY };
                    assert_eq!(rank.lse_of(&case, token, 4), Some(wanted));
                    assert!(rank.row(&case, token, 3).0.iter().any(|&x| x != 0.0));
                }
            }
            pool.check(&case);
        }
    }
}

/// Bytes and -inf say the same; 0 and any other bias that a row shares throughout change no more than rounding does.
#[test]
fn masks_of_all_types_hide_alike() {
    let mut pool = Pool::default();
    let pattern = |keys: usize| -> Vec<f32> {
        (0..keys).map(|key| if key % 7 == 3 || (64..140).contains(&key) { f32::NEG_INFINITY } else { 0.0 }).collect()
    };
    let mut found = Vec::new();
    for (kind, dtype) in MASKS {
        let mut case = Case::plain(masked(kind, dtype), 2, &[(300, 2), (70, 1)], Values::Normal, 12);
        case.terms.mask = shared(vec![pattern(300), pattern(70)]);
        case.terms.factors.clear();
        found.push(bits(&mut pool, &case));
        pool.check(&case);
    }
    assert!(found.iter().all(|bits| *bits == found[0]));
}

/// Keys and values that a mask hides influence nothing, NaN included.
#[test]
fn what_a_mask_hides_may_be_anything() {
    let mut pool = Pool::default();
    for (kind, dtype) in MASKS {
        for isa in Isa::available() {
            let mut clean = Case::plain(masked(kind, dtype), 2, &[(300, 2)], Values::Normal, 12);
            clean.isa = isa.name().into();
            let hidden = |key: usize| key % 5 == 1 || (100..200).contains(&key);
            let values = (0..300).map(|key| if hidden(key) { f32::NEG_INFINITY } else { 0.0 }).collect();
            clean.terms.mask = shared(vec![values]);
            clean.terms.factors.clear();
            let mut case = clean.clone();
            for key in (0..300).filter(|&key| hidden(key)) {
                let fill = if key.is_multiple_of(2) { f32::NAN } else { f32::INFINITY };
                case.sequences[0].k[key * 48..][..48].fill(fill);
                case.sequences[0].v[key * 48..][..48].fill(fill);
            }
            assert_eq!(bits(&mut pool, &clean), bits(&mut pool, &case), "{}", isa.name());
        }
    }
}

/// A NaN in a mask is live data of the rows that would see its key, and nothing to the others.
#[test]
fn a_nan_in_a_mask_reaches_the_rows_that_see_its_key() {
    let mut pool = Pool::default();
    for dtype in [Dtype::F16, Dtype::F32] {
        for (bad, algorithm) in [(f32::NAN, Algorithm::OneShot), (f32::INFINITY, Algorithm::Ring)] {
            let desc = AttentionDesc { algorithm, ..masked(MaskKind::Additive, Some(dtype)) };
            let mut case = Case::plain(desc, 2, &[(200, 2)], Values::Normal, 12);
            let mut values = vec![0.0; 200];
            // The last key, which the last query alone sees.
            values[199] = bad;
            case.terms.mask = shared(vec![values]);
            case.terms.factors.clear();
            for rank in pool.answers(&case) {
                for head in 0..6 {
                    assert!(rank.row(&case, 0, head).0.iter().all(|x| x.is_finite()));
                    assert!(rank.row(&case, 1, head).0.iter().all(|x| x.is_nan()));
                }
            }
        }
    }
}

/// ALiBi as ggml has it: a mask of negative distances, times the slope of the head.
#[test]
fn a_mask_of_distances_times_slopes_is_alibi() {
    let mut pool = Pool::default();
    for placement in PLACEMENTS {
        let alibi = AttentionDesc { alibi: true, ..desc(placement) };
        let one = Case::plain(alibi, 3, &[(200, 1)], Values::Normal, 2);
        let mut other = one.clone();
        (other.desc.alibi, other.desc.mask, other.desc.mask_dtype) = (false, MaskKind::Additive, Some(Dtype::F16));
        other.terms.factors = std::mem::take(&mut other.terms.slopes);
        other.terms.mask = shared(vec![(0..200).map(|key| -(199.0 - key as f32)).collect()]);
        let (ours, theirs) = (pool.answers(&one), pool.answers(&other));
        for head in 0..6 {
            let (a, b) = (ours[0].row(&one, 0, head).0, theirs[0].row(&other, 0, head).0);
            assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5), "{a:?} {b:?}");
        }
        pool.check(&one);
        pool.check(&other);
    }
}

/// All terms together, over 1 to 9 ranks in every algorithm: the answer of float64, whatever the number of ranks.
#[test]
fn terms_together_are_the_same_over_any_number_of_ranks() {
    let mut pool = Pool::default();
    for (a, algorithm) in ALGORITHMS.into_iter().enumerate() {
        let mut first: Option<Vec<f32>> = None;
        for world in 1..=9 {
            let (kind, dtype) = MASKS[a % 3];
            let mut desc = AttentionDesc { algorithm, softcap: 20.0, alibi: true, ..masked(kind, dtype) };
            (desc.sinks, desc.window, desc.placement) = (true, 120, PLACEMENTS[a % 4]);
            let mut case = Case::plain(desc, 1, &[(260, 3), (40, 1)], Values::Normal, 21);
            let whole = Case::plain(desc, world, &[(260, 3), (40, 1)], Values::Normal, 21);
            case.world = world;
            for (sequence, whole) in case.sequences.iter_mut().zip(&whole.sequences) {
                sequence.held = whole.held.clone();
            }
            pool.check(&case);
            let ranks = pool.answers(&case);
            let rows: Vec<f32> = (0..4)
                .flat_map(|t| (0..6).map(move |h| (t, h)))
                .flat_map(|(t, h)| ranks[0].row(&case, t, h).0)
                .collect();
            let first = first.get_or_insert_with(|| rows.clone());
            assert!(first.iter().zip(&rows).all(|(a, b)| (a - b).abs() < 2e-5), "{}", case.describe());
        }
        pool.forget();
    }
}

/// Each kv head attends keys of its own choice: as if the others were hidden from it.
#[test]
fn heads_that_select_keys_attend_these_and_no_others() {
    const CHOSEN: usize = 30;
    let mut pool = Pool::default();
    for (a, algorithm) in ALGORITHMS.into_iter().enumerate() {
        for world in [1, 3] {
            let base = AttentionDesc {
                algorithm,
                window: [0, 150][a % 2],
                alibi: a.is_multiple_of(2),
                ..desc(Placement::Explicit)
            };
            let (layout, page_size) = (KvLayout::CsrPages, 1);
            let mut all = Case::plain(
                AttentionDesc { kv_layout: layout, page_size, ..base },
                world,
                &[(240, 2)],
                Values::Normal,
                3,
            );
            // Of every rank's keys, kv head 0 and 1 choose as many, but others.
            let mut values = vec![f32::NEG_INFINITY; 6 * 240];
            for held in &all.sequences[0].held {
                for head in 0..6 {
                    for choice in 0..CHOSEN {
                        values[head * 240 + held[(choice * 2 + head / 3) % held.len()]] = 0.0;
                    }
                }
            }
            (all.desc.mask, all.terms.mask) =
                (MaskKind::Boolean, Some(MaskValues { broadcast: [false, false, true], values: vec![values] }));
            let wanted = pool.answers(&all);
            // The same memory; the lists name the chosen ones, in another order, and nothing reads past them.
            let mut some = all.clone();
            (some.desc.mask, some.terms.mask, some.desc.pages_by_head) = (MaskKind::None, None, true);
            let mut ranks: Vec<Rank> = (0..world).map(|rank| Rank::new(&all, rank)).collect();
            let mut lists = Vec::new();
            for (rank, memory) in ranks.iter_mut().enumerate() {
                let held = &all.sequences[0].held[rank];
                let ints = |memory: &Memory| -> Vec<i32> {
                    memory.bytes().chunks_exact(4).map(|b| i32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect()
                };
                let (pages, positions) = (ints(&memory.page_indices), ints(&memory.kv_position));
                let slots = |head: usize| (0..CHOSEN).rev().map(move |choice| (choice * 2 + head) % held.len());
                let of = |values: &[i32]| -> Vec<i32> { (0..2).flat_map(slots).map(|slot| values[slot]).collect() };
                let made = [of(&pages), of(&positions), vec![0, CHOSEN as i32], vec![CHOSEN as i32]];
                lists.push(made.map(|ints| Memory::of_ints(&ints)));
                let [pages, positions, indptr, length] = lists.last().expect("just made");
                let args = &mut memory.args;
                args.mask = Tensor::NULL;
                (args.page_indices, args.num_page_indices) = (pages.ints(), 2 * CHOSEN as i64);
                (args.page_indptr, args.kv_length, args.last_page_len) =
                    (indptr.ints(), length.ints(), std::ptr::null());
                (args.kv_position, args.kv_position_stride) = (positions.ints(), 2 * CHOSEN as i64);
                (args.page_index_head_stride, args.kv_position_head_stride) = (CHOSEN as i64, CHOSEN as i64);
            }
            for result in pool.step(&some, &mut ranks, Call::Decode) {
                result.unwrap_or_else(|error| panic!("{error}\n{}", some.describe()));
            }
            for (found, wanted) in ranks.iter().zip(&wanted) {
                for (token, head) in (0..2).flat_map(|token| (0..6).map(move |head| (token, head))) {
                    let (a, b) = (found.row(&some, token, head).0, wanted.row(&all, token, head).0);
                    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5), "{}\n{a:?}\n{b:?}", some.describe());
                }
            }
        }
    }
}

/// What windows and masks hide is held all the same: ranks of a checked plan that hold every position fit together.
#[test]
fn checked_plans_count_keys_that_nobody_sees() {
    let mut pool = Pool::default();
    for (i, placement) in PLACEMENTS.into_iter().enumerate() {
        let desc = AttentionDesc { checked: true, window: 20, ..desc(placement) };
        let desc = AttentionDesc { mask: MaskKind::Boolean, algorithm: ALGORITHMS[i], ..desc };
        let mut case = Case::plain(desc, 3, &[(200, 2), (0, 0), (64, 1)], Values::Normal, 14);
        case.terms.mask = shared((0..3).map(|b| vec![f32::NEG_INFINITY; [200, 0, 64][b]]).collect());
        pool.check(&case);
    }
}
