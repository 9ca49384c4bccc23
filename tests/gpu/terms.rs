//! Windows, sinks, masks, what happens to scores, and types of keys and values, where the answer is known by hand.

use half::f16;
use treeattn::ErrorKind;
use treeattn::attention::{AttentionDesc, Dtype, KvFormat, KvLayout, MaskKind, OutputMode, Placement};

use crate::mirror::Ready;
use crate::support::case::Case;
use crate::support::rank::Ints;
use crate::support::rng::Rng;
use crate::support::run::judge;
use crate::support::terms::MaskValues;
use crate::support::values::Values;

const PLACEMENTS: [Placement; 4] =
    [Placement::Contiguous, Placement::Interleaved { run: 1 }, Placement::Interleaved { run: 7 }, Placement::Explicit];
const MASKS: [(MaskKind, Option<Dtype>); 3] =
    [(MaskKind::Boolean, None), (MaskKind::Additive, Some(Dtype::F16)), (MaskKind::Additive, Some(Dtype::F32))];
/// Layouts, with the slots of a page.
const LAYOUTS: [(KvLayout, i32); 5] = [
    (KvLayout::Strided, 0),
    (KvLayout::BlockTable, 16),
    (KvLayout::BlockTable, 32),
    (KvLayout::CsrPages, 1),
    (KvLayout::CsrPages, 12),
];

/// A shape of two kv heads with 3 query heads each.
fn desc(placement: Placement) -> AttentionDesc {
    let types = AttentionDesc { k_dtype: Dtype::Bf16, v_dtype: Dtype::Bf16, ..AttentionDesc::new(6, 2, 24, 1) };
    AttentionDesc { placement, causal: true, q_dtype: Dtype::F32, out_dtype: Dtype::F32, ..types }
}

/// Runs a case of one rank, and holds it against float64.
fn checked(case: Case) -> Ready {
    let mut ready = Ready::new(case);
    ready.bits();
    let found = judge(&ready.case, std::slice::from_ref(&ready.rank)).unwrap();
    let is_within = found.is_within();
    let failure = found.failure.filter(|_| !is_within);
    assert_eq!(failure, None, "{}", ready.case.describe());
    ready
}

/// A window of one key, and of all.
pub fn windows() {
    for (i, placement) in PLACEMENTS.into_iter().enumerate() {
        let base = Case::plain(desc(placement), 1, &[(200, 3), (0, 1), (70, 2)], Values::Normal, 60 + i as u64);
        let of = |window: i32| {
            let mut case = base.clone();
            case.desc.window = window;
            checked(case)
        };
        let one = of(1);
        for (token, head) in (0..3).flat_map(|token| (0..6).map(move |head| (token, head))) {
            let own = &one.case.sequences[0].v[((197 + token) * 2 + head / 3) * 24..][..24];
            let (row, _) = one.rank.row(&one.case, token, head);
            // Its weight is below 1, since maxima are rounded up.
            assert!(row.iter().zip(own).all(|(x, v)| (x - v).abs() <= 4.0 * f32::EPSILON * v.abs()), "{row:?} {own:?}");
        }
        // The windows of all queries hold everything.
        let bits = [200, 201, i32::MAX].map(|window| of(window).bits());
        assert!(bits.windows(2).all(|pair| pair[0] == pair[1]));
        for window in [16, 17, 40, 199] {
            let mut case = base.clone();
            (case.desc.window, case.desc.causal) = (window, window % 2 == 0);
            checked(case.clone());
            // Far before the end; and past it, where nothing is left to see.
            case.query_position = Some(vec![57, 199 + window, 20, 5, 69, 69 + window]);
            checked(case);
        }
    }
}

/// What a window hides is not read: neither keys nor entries of page tables.
pub fn windows_read_no_more() {
    for layout in [KvLayout::Strided, KvLayout::BlockTable, KvLayout::CsrPages] {
        let page_size = if layout == KvLayout::Strided { 0 } else { 16 };
        let desc = AttentionDesc { kv_layout: layout, page_size, window: 20, ..desc(Placement::Contiguous) };
        let clean = Case::plain(desc, 1, &[(4000, 1), (33, 1)], Values::Normal, 5);
        let mut case = clean.clone();
        case.sequences[0].k[..3900 * 48].fill(f32::NAN);
        case.sequences[0].v[..3900 * 48].fill(f32::NAN);
        let wanted = checked(clean).bits();
        let mut ready = Ready::new(case);
        let table = match layout {
            KvLayout::Strided => None,
            KvLayout::BlockTable => Some(Ints::BlockTable),
            KvLayout::CsrPages => Some(Ints::PageIndices),
        };
        for entry in 0..if table.is_some() { 240 } else { 0 } {
            ready.rank.set(table.unwrap_or(Ints::BlockTable), entry, -1);
        }
        ready.mirror.update_all(&ready.rank);
        assert!(ready.bits() == wanted, "{layout:?}");
        assert!(ready.comm.status().unwrap().error.is_none());
    }
}

/// Sinks without keys, of NaN and of infinities.
pub fn sinks() {
    let desc = AttentionDesc { sinks: true, window: 4, ..desc(Placement::Interleaved { run: 1 }) };
    let mut case = Case::plain(desc, 1, &[(0, 2), (100, 1)], Values::Normal, 5);
    case.query_position = Some(vec![0, 0, 300]);
    case.terms.sinks = vec![0.5, -3.0, f32::NEG_INFINITY, 1e30, -1e-3, -3e38];
    let mut alone = Ready::new(case);
    alone.bits();
    for (token, head) in (0..3).flat_map(|token| (0..6).map(move |head| (token, head))) {
        assert!(alone.rank.row(&alone.case, token, head).1.iter().all(|&bits| bits == 0));
        assert_eq!(alone.rank.lse_of(&alone.case, token, head), Some(alone.case.terms.sinks[head]));
    }
    let mut case = Case::plain(AttentionDesc { window: 0, ..desc }, 1, &[(70, 1), (0, 1)], Values::Normal, 5);
    case.terms.sinks = vec![0.5, f32::NAN, f32::NEG_INFINITY, f32::INFINITY, -1e-3, 700.0];
    let mut bad = Ready::new(case);
    bad.bits();
    for (token, head) in (0..2).flat_map(|token| (0..6).map(move |head| (token, head))) {
        let is_bad = head == 1 || head == 3;
        assert!(bad.rank.row(&bad.case, token, head).0.iter().all(|x| x.is_nan() == is_bad), "{token} {head}");
        assert_eq!(bad.rank.lse_of(&bad.case, token, head).map(f32::is_nan), Some(is_bad));
    }
}

/// Scores far past the cap weigh alike; distances of 0 and 2^31 - 2.
pub fn caps_and_slopes() {
    for (cap, sign) in [(30.0, 1.0), (50.0, -1.0), (1e-3, 1.0), (3e38, 0.0)] {
        let desc = AttentionDesc { softcap: cap, causal: false, ..desc(Placement::Contiguous) };
        let mut case = Case::plain(desc, 1, &[(64, 1)], Values::Equal, 8);
        case.q.fill(1e15);
        case.sequences[0].k.fill(sign * (1u64 << 50) as f32);
        let ready = checked(case);
        let lse = f64::from(ready.rank.lse_of(&ready.case, 0, 0).unwrap());
        let wanted = if sign == 0.0 { 0.0 } else { f64::from(sign * cap) } + 64f64.ln();
        assert!((lse - wanted).abs() <= 4e-7 * wanted.abs().max(1.0), "{lse} {wanted}");
    }
    const LAST: i32 = i32::MAX - 1;
    for (query, far) in [(LAST, 0), (0, LAST)] {
        let mut case = Case::plain(
            AttentionDesc { alibi: true, causal: false, ..desc(Placement::Explicit) },
            1,
            &[(2, 1)],
            Values::Equal,
            3,
        );
        case.q.fill(0.0);
        case.sequences[0].v = [vec![1.0; 48], vec![-3.0; 48]].concat();
        case.query_position = Some(vec![query]);
        // A slope of 2^-31 makes the distance 1; a usual one hides the far key.
        case.terms.slopes = vec![2f32.powi(-31), 0.5, 0.0, 0.5, 0.5, 0.5];
        let mut ready = Ready::new(case);
        ready.rank.set(Ints::KvPosition, 0, far);
        ready.rank.set(Ints::KvPosition, 1, query);
        ready.mirror.update_all(&ready.rank);
        ready.bits();
        let weight = (-f64::from(LAST) / 2f64.powi(31)).exp();
        let row = |head: usize| ready.rank.row(&ready.case, 0, head).0;
        let wanted = (weight - 3.0) / (weight + 1.0);
        assert!(row(0).iter().all(|&x| (f64::from(x) - wanted).abs() < 1e-6), "{:?} {wanted}", row(0));
        assert!(row(1).iter().all(|&x| x == -3.0) && row(2).iter().all(|&x| x == -1.0), "{:?}", row(1));
        assert_eq!(ready.rank.lse_of(&ready.case, 0, 1), Some(0.0));
    }
}

/// Masks that hide all from one head, whose keys are anything where they hide, and that hold what is no number.
pub fn masks() {
    for (kind, dtype) in MASKS {
        for sinks in [false, true] {
            let desc =
                AttentionDesc { mask: kind, mask_dtype: dtype, sinks, ..desc(Placement::Interleaved { run: 5 }) };
            let mut case = Case::plain(desc, 1, &[(150, 2)], Values::Normal, 4);
            let mut values = vec![0.0; 6 * 2 * 150];
            values[4 * 300..5 * 300].fill(f32::NEG_INFINITY);
            case.terms.mask = Some(MaskValues { broadcast: [false; 3], values: vec![values] });
            case.terms.factors.clear();
            let ready = checked(case);
            for token in 0..2 {
                assert!(ready.rank.row(&ready.case, token, 4).1.iter().all(|&bits| bits == 0));
                let wanted = if sinks { ready.case.terms.sinks[4] } else { f32::NEG_INFINITY };
                assert_eq!(ready.rank.lse_of(&ready.case, token, 4), Some(wanted));
            }
            let shared = |values| Some(MaskValues { broadcast: [false, true, true], values: vec![values] });
            let mut clean = Case::plain(desc, 1, &[(300, 2)], Values::Normal, 12);
            let hidden = |key: usize| key % 5 == 1 || (100..200).contains(&key);
            clean.terms.mask = shared((0..300).map(|key| if hidden(key) { f32::NEG_INFINITY } else { 0.0 }).collect());
            clean.terms.factors.clear();
            let mut wild = clean.clone();
            for key in (0..300).filter(|&key| hidden(key)) {
                let fill = if key % 2 == 0 { f32::NAN } else { f32::INFINITY };
                wild.sequences[0].k[key * 48..][..48].fill(fill);
                wild.sequences[0].v[key * 48..][..48].fill(fill);
            }
            assert!(checked(clean.clone()).bits() == Ready::new(wild).bits());
            if kind == MaskKind::Boolean {
                continue;
            }
            for bad in [f32::NAN, f32::INFINITY] {
                let mut case = clean.clone();
                let mut values = vec![0.0; 300];
                // The last key, which the last query alone sees.
                values[299] = bad;
                case.terms.mask = shared(values);
                let mut ready = Ready::new(case);
                ready.bits();
                for head in 0..6 {
                    assert!(ready.rank.row(&ready.case, 0, head).0.iter().all(|x| x.is_finite()));
                    assert!(ready.rank.row(&ready.case, 1, head).0.iter().all(|x| x.is_nan()));
                }
            }
        }
    }
    // A mask that ends before the slots do is bad data, and not read past its end.
    let desc = AttentionDesc { mask: MaskKind::Boolean, ..desc(Placement::Contiguous) };
    let mut case = Case::plain(desc, 1, &[(64, 1)], Values::Normal, 4);
    case.desc.max_kv_length = 90;
    let mut ready = Ready::new(case);
    ready.mirror.args.mask.bytes = 60;
    ready.bits();
    assert!(ready.rank.row(&ready.case, 0, 0).0.iter().all(|x| x.is_nan()));
    let error = ready.comm.status().unwrap().error.unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidData);
    assert!(
        error.message().starts_with("mask.bytes: found room for 0 keys of sequence 0 on rank 0, wanted for its 64"),
        "{error}"
    );
}

/// Changes the blocks of a case's keys and values (`true`), the n-th of a sequence's at a time.
fn change_blocks(case: &mut Case, change: impl Fn(usize, bool, &mut [u8])) {
    for (of_v, dtype) in [(false, case.desc.k_dtype), (true, case.desc.v_dtype)] {
        let format = KvFormat::of(dtype);
        for sequence in &mut case.sequences {
            let (values, rows) =
                if of_v { (&mut sequence.v, &mut sequence.v_rows) } else { (&mut sequence.k, &mut sequence.k_rows) };
            for (n, block) in rows.chunks_exact_mut(format.block_bytes()).enumerate() {
                change(n, of_v, block);
                for (i, value) in values[n * 32..][..32].iter_mut().enumerate() {
                    *value = format.element(block, i);
                }
            }
        }
    }
}

/// Blocks of f16 scales in every layout, where rows begin as far into a unit of 16 bytes and where they do not, with all terms
/// and without, and with values' scales that are far apart.
pub fn blocks() {
    const SHAPES: [(Dtype, i32, i32); 6] = [
        (Dtype::Q8_0, 128, 2),
        (Dtype::Q4_0, 128, 2),
        (Dtype::Q8_0, 64, 4),
        (Dtype::Q4_0, 64, 4),
        (Dtype::Q8_0, 128, 1),
        (Dtype::Q4_0, 64, 1),
    ];
    for (n, (dtype, dim, kv_heads)) in SHAPES.into_iter().enumerate() {
        for (i, (kv_layout, page_size)) in LAYOUTS.into_iter().enumerate() {
            let (mask, mask_dtype) = MASKS[(n + i) % 3];
            let base = AttentionDesc {
                q_heads: 3 * kv_heads,
                kv_heads,
                k_dtype: dtype,
                v_dtype: dtype,
                q_dtype: [Dtype::Bf16, Dtype::F16, Dtype::F32][(n / 2 + i) % 3],
                head_dim_qk: dim,
                head_dim_v: dim,
                kv_layout,
                page_size,
                ..desc(PLACEMENTS[(n + i) % 4])
            };
            let window = if i % 2 == 1 { 40 } else { 0 };
            let all = AttentionDesc { alibi: true, sinks: true, softcap: 20.0, mask, mask_dtype, window, ..base };
            let desc = if (n + i) % 2 == 0 { base } else { all };
            let sequences: &[_] = if i == 0 { &[(300, 1)] } else { &[(150, 2), (0, 1), (33, 3)] };
            let mut case = Case::plain(desc, 1, sequences, Values::Normal, (n * LAYOUTS.len() + i) as u64);
            if i == 0 {
                checked(case.clone());
            }
            change_blocks(&mut case, |n, of_v, block| {
                if of_v {
                    let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
                    let power = [0, -5, 5, -8, 3, 0, 0][n % 7];
                    block[..2].copy_from_slice(&f16::from_f32(scale * 2f32.powi(power)).to_le_bytes());
                }
            });
            checked(case);
        }
    }
    // A key that nobody sees, with the largest scales.
    let desc = AttentionDesc {
        k_dtype: Dtype::Q8_0,
        v_dtype: Dtype::Q8_0,
        head_dim_qk: 128,
        head_dim_v: 128,
        mask: MaskKind::Boolean,
        ..desc(Placement::Contiguous)
    };
    let mut case = Case::plain(desc, 1, &[(90, 2)], Values::Normal, 7);
    let values = (0..90).map(|key| if key == 3 { f32::NEG_INFINITY } else { 0.0 }).collect();
    case.terms.mask = Some(MaskValues { broadcast: [false, true, true], values: vec![values] });
    for scale in [f16::MAX, f16::INFINITY, f16::NAN] {
        let mut case = case.clone();
        change_blocks(&mut case, |n, _, block| {
            if n / 8 == 3 {
                block[..2].copy_from_slice(&scale.to_le_bytes());
            }
        });
        checked(case);
    }
}

/// Codes of fp8 that are no numbers, in keys that are seen and in others; blocks with scales of 0, infinity and NaN, and the
/// ends of what they hold.
pub fn types() {
    let of = |dtype: Dtype| {
        let types = AttentionDesc {
            k_dtype: dtype,
            v_dtype: dtype,
            head_dim_qk: 64,
            head_dim_v: 64,
            ..desc(Placement::Contiguous)
        };
        Case::plain(types, 1, &[(90, 2)], Values::Normal, 7)
    };
    for (dtype, bad) in [(Dtype::F8E4M3, 0x7f), (Dtype::F8E4M3, 0xff), (Dtype::F8E5M2, 0x7d), (Dtype::F8E5M2, 0x7c)] {
        // A sequence alone, most of whose keys lie after what its query sees.
        let window = AttentionDesc { window: 5, ..of(dtype).desc };
        let mut early = Case::plain(window, 1, &[(1900, 1)], Values::Normal, 7);
        (early.query_start, early.query_position) = (false, Some(vec![20]));
        checked(early);
        // The last key, hidden from the first query; its first head.
        let mut clean = of(dtype);
        clean.desc.mask = MaskKind::Boolean;
        let hides = |key: usize| key == 3;
        let values = (0..90).map(|key| if hides(key) { f32::NEG_INFINITY } else { 0.0 }).collect();
        clean.terms.mask = Some(MaskValues { broadcast: [false, true, true], values: vec![values] });
        let mut hidden = clean.clone();
        let sequence = &mut hidden.sequences[0];
        for rows in [&mut sequence.k_rows, &mut sequence.v_rows] {
            rows[3 * 128..][..128].fill(bad);
        }
        assert!(checked(clean.clone()).bits() == Ready::new(hidden).bits(), "{dtype:?}");
        let mut live = clean.clone();
        live.sequences[0].v_rows[89 * 128 + 5] = bad;
        let mut ready = Ready::new(live);
        ready.bits();
        for (token, head) in (0..2).flat_map(|token| (0..6).map(move |head| (token, head))) {
            let row = ready.rank.row(&ready.case, token, head).0;
            let odd: Vec<usize> = (0..64).filter(|&d| !row[d].is_finite()).collect();
            assert_eq!(odd, if token == 1 && head < 3 { vec![5] } else { vec![] }, "{dtype:?} {token} {head}");
        }
    }
    for dtype in [Dtype::Q8_0, Dtype::Q4_0, Dtype::Q5_1] {
        let format = KvFormat::of(dtype);
        let row = format.row_bytes(64);
        // After the scale, and the minimum where there is one.
        let codes = if dtype == Dtype::Q5_1 { 4 } else { 2 };
        // Scales of 0, and the least and the largest numbers of the others.
        let mut case = of(dtype);
        change_blocks(&mut case, |n, _, block| match n % 5 {
            0 => block[..2].fill(0),
            1 => block[codes..].fill(0x80),
            2 => block[codes..].fill(0x7f),
            _ => {}
        });
        checked(case.clone());
        for scale in [0x7c00u16, 0x7e00, 0xfc00] {
            let mut case = case.clone();
            // The first block of the last key's first head, which the first query does not see.
            case.sequences[0].v_rows[89 * 2 * row..][..2].copy_from_slice(&scale.to_le_bytes());
            let mut ready = Ready::new(case);
            ready.bits();
            for (token, head) in (0..2).flat_map(|token| (0..6).map(move |head| (token, head))) {
                let row = ready.rank.row(&ready.case, token, head).0;
                let bad = token == 1 && head < 3;
                assert!((0..64).all(|d| row[d].is_finite() != (bad && d < 32)), "{dtype:?} {token} {head} {row:?}");
            }
        }
    }
}

/// Rows of bytes in whole units, with scales and whatever else there is, in every layout.
pub fn bytes() {
    let types = [Dtype::F8E4M3, Dtype::F8E5M2, Dtype::Int8];
    for (n, (dtype, dim)) in types.into_iter().flat_map(|t| [(t, 64), (t, 128)]).enumerate() {
        for (i, (kv_layout, page_size)) in LAYOUTS.into_iter().enumerate() {
            let (mask, mask_dtype) = MASKS[(n + i) % 3];
            let base = AttentionDesc {
                k_dtype: dtype,
                v_dtype: dtype,
                q_dtype: [Dtype::F16, Dtype::Bf16, Dtype::F32][(n / 2 + i) % 3],
                head_dim_qk: dim,
                head_dim_v: dim,
                kv_layout,
                page_size,
                ..desc(PLACEMENTS[(n + i) % 4])
            };
            let window = if i % 2 == 1 { 40 } else { 0 };
            let all = AttentionDesc { alibi: true, sinks: true, softcap: 20.0, mask, mask_dtype, window, ..base };
            let plain = (dtype == Dtype::Int8).then_some([i % 2 == 0, true]);
            for (desc, scales) in [(base, plain), (all, Some([true, i % 2 == 0]))] {
                let seed = (n * LAYOUTS.len() + i) as u64;
                let mut case = Case::plain(desc, 1, &[(150, 2), (0, 1), (33, 3)], Values::Normal, seed);
                (case.k_scale, case.v_scale) = (scales, scales);
                case.fill(&mut Rng::new(seed));
                checked(case);
            }
        }
    }
}

/// Lists of kv heads, with a sink and slopes; ranks that attend alone.
pub fn lists() {
    for placement in [Placement::Contiguous, Placement::Explicit] {
        for page_size in [1, 16] {
            let desc = AttentionDesc {
                kv_layout: KvLayout::CsrPages,
                page_size,
                pages_by_head: true,
                sinks: true,
                alibi: true,
                output: OutputMode::Local,
                ..desc(placement)
            };
            checked(Case::plain(desc, 1, &[(150, 2), (0, 1), (33, 1)], Values::Normal, 3));
        }
    }
}
