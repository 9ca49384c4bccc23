//! NaN in live data reaches exactly what saw it; NaN anywhere else reaches nothing.

use treeattn::attention::{AttentionDesc, Dtype, KvLayout, Placement};
use treeattn::cpu::Isa;

use crate::support::case::Case;
use crate::support::rank::Rank;
use crate::support::run::{Pool, judge};
use crate::support::values::Values;

const LENGTHS: [(usize, usize); 3] = [(150, 2), (200, 3), (70, 1)];
const TOKENS: usize = 6;
const Q_HEADS: usize = 6;
const GROUP: usize = 3;
const DIM: usize = 40;

/// Cases of two kv heads over all instruction sets, layouts and element types in turn.
fn cases(causal: bool) -> Vec<Case> {
    let layouts = [KvLayout::Strided, KvLayout::BlockTable, KvLayout::CsrPages];
    let dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16];
    let placements = [Placement::Contiguous, Placement::Interleaved { run: 5 }, Placement::Explicit];
    let mut cases = Vec::new();
    for isa in Isa::available() {
        for i in 0..6 {
            let mut desc = AttentionDesc::new(Q_HEADS as i32, 2, DIM as i32, 1);
            (desc.kv_layout, desc.page_size) = (layouts[i % 3], if i % 3 == 0 { 0 } else { 16 });
            (desc.k_dtype, desc.v_dtype) = (dtypes[i % 3], dtypes[(i + i / 3) % 3]);
            (desc.placement, desc.causal) = (placements[(i + i / 3) % 3], causal);
            let mut case = Case::plain(desc, 1 + i % 4, &LENGTHS, Values::Normal, 600 + i as u64);
            (case.isa, case.threads) = (isa.name().into(), 1 + i % 3);
            cases.push(case);
        }
    }
    cases
}

/// Asserts that exactly the elements that `hit` names are NaN, that all others are within their bounds, and that rows
/// for which `touched` is false have the bits of the clean run.
fn check(
    pool: &mut Pool,
    clean: &Case,
    case: &Case,
    hit: impl Fn(usize, usize, usize) -> bool,
    touched: impl Fn(usize, usize) -> bool,
) {
    let before: Vec<Rank> = pool.answers(clean);
    let ranks = pool.answers(case);
    for (memory, before) in ranks.iter().zip(&before) {
        for token in 0..TOKENS {
            for head in 0..Q_HEADS {
                let (row, bits) = memory.row(case, token, head);
                for (d, x) in row.iter().enumerate() {
                    assert_eq!(x.is_nan(), hit(token, head, d), "({token}, {head}, {d})\n{}", case.describe());
                }
                let lse = memory.lse_of(case, token, head).expect("an lse");
                assert_eq!(lse.is_nan(), (0..DIM).all(|d| hit(token, head, d)), "lse\n{}", case.describe());
                if !touched(token, head) {
                    assert_eq!(bits, before.row(clean, token, head).1, "({token}, {head})\n{}", case.describe());
                    assert_eq!(Some(lse), before.lse_of(clean, token, head));
                }
            }
        }
    }
    let found = judge(case, &ranks).expect("references that agree");
    assert_eq!(found.failure, None, "{}", case.describe());
}

#[test]
fn a_nan_key_reaches_its_sequence_and_heads() {
    let mut pool = Pool::default();
    for clean in cases(false) {
        for position in [0, 17, 199] {
            let mut case = clean.clone();
            case.sequences[1].k[(position * 2 + 1) * DIM + 7] = f32::NAN;
            let own = |token: usize, head: usize| (2..5).contains(&token) && head >= GROUP;
            check(&mut pool, &clean, &case, |token, head, _| own(token, head), own);
        }
    }
}

#[test]
fn a_nan_value_reaches_its_element() {
    let mut pool = Pool::default();
    for clean in cases(false) {
        for (position, d) in [(0, 0), (64, 39), (199, 16)] {
            let mut case = clean.clone();
            case.sequences[1].v[(position * 2) * DIM + d] = f32::NAN;
            let own = |token: usize, head: usize| (2..5).contains(&token) && head < GROUP;
            check(&mut pool, &clean, &case, |token, head, e| own(token, head) && e == d, own);
        }
    }
}

#[test]
fn a_nan_query_reaches_its_row() {
    let mut pool = Pool::default();
    for clean in cases(true) {
        let mut case = clean.clone();
        case.q[(3 * Q_HEADS + 4) * DIM + 11] = f32::NAN;
        let own = |token: usize, head: usize| (token, head) == (3, 4);
        check(&mut pool, &clean, &case, |token, head, _| own(token, head), own);
    }
}

#[test]
fn hidden_nan_does_not_leak() {
    let mut pool = Pool::default();
    for clean in cases(true) {
        // The last key of sequence 1 is at the position of its last query token: only that one sees it.
        for in_key in [false, true] {
            let mut case = clean.clone();
            let row = (199 * 2) * DIM;
            let data = if in_key { &mut case.sequences[1].k } else { &mut case.sequences[1].v };
            data[row..row + DIM].fill(f32::NAN);
            let hit = |token: usize, head: usize| token == 4 && head < GROUP;
            let near = |token: usize, head: usize| (2..5).contains(&token) && head < GROUP;
            let lse_too = |token: usize, head: usize, _: usize| hit(token, head);
            if in_key {
                check(&mut pool, &clean, &case, lse_too, near);
            } else {
                let ranks = pool.answers(&case);
                for memory in &ranks {
                    for (token, head) in (0..TOKENS).flat_map(|t| (0..Q_HEADS).map(move |h| (t, h))) {
                        let (row, _) = memory.row(&case, token, head);
                        assert!(
                            row.iter().all(|x| x.is_nan() == hit(token, head)),
                            "{token} {head} {}",
                            case.describe()
                        );
                        assert!(memory.lse_of(&case, token, head).is_some_and(f32::is_finite));
                    }
                }
                assert_eq!(judge(&case, &ranks).expect("references that agree").failure, None);
            }
        }
    }
}

#[test]
fn hidden_infinities_do_not_leak() {
    let mut pool = Pool::default();
    for clean in cases(true) {
        let mut case = clean.clone();
        let row = (199 * 2) * DIM;
        case.sequences[1].v[row..row + DIM].fill(f32::INFINITY);
        for memory in pool.answers(&case) {
            for token in 2..4 {
                let (row, _) = memory.row(&case, token, 0);
                assert!(row.iter().all(|x| x.is_finite()), "{}", case.describe());
            }
        }
    }
}

#[test]
fn an_infinite_score_is_nan_on_every_rank() {
    let mut pool = Pool::default();
    for mut case in cases(false) {
        case.q[..DIM].fill(1.0);
        case.sequences[0].k[0] = f32::INFINITY;
        for memory in pool.answers(&case) {
            assert!(memory.row(&case, 0, 0).0.iter().all(|x| x.is_nan()), "{}", case.describe());
            assert!(memory.row(&case, 0, 5).0.iter().all(|x| x.is_finite()), "{}", case.describe());
        }
    }
}
