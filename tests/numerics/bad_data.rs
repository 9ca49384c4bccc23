//! Lengths, starts, tables and positions out of range: NaN for that sequence on every rank, and nothing else.

use treeattn::attention::{Algorithm, AttentionDesc, DecodeArgs, KvLayout, Placement, Tensor};
use treeattn::error::ErrorKind;

use crate::support::case::Case;
use crate::support::rank::{Ints, Rank};
use crate::support::run::{Call, Group, Pool, assert_bad_data, shard_reference, step};
use crate::support::values::Values;

const LAST: usize = 2;
const HEADS: usize = 4;

fn case(layout: KvLayout, placement: Placement, causal: bool, world: usize) -> Case {
    let mut desc = AttentionDesc::new(HEADS as i32, 2, 32, 64);
    (desc.kv_layout, desc.page_size) = (layout, if layout == KvLayout::Strided { 0 } else { 8 });
    (desc.placement, desc.causal) = (placement, causal);
    Case::plain(desc, world, &[(60, 1), (90, 2), (75, 1)], Values::Normal, 77)
}

/// Sets one value on one rank and asserts what comes of it: `bad` are NaN on all ranks, the first of them named.
fn check(pool: &mut Pool, case: &Case, at: (usize, Ints, usize, i32), bad: &[usize], argument: &str) {
    check_with(pool, case, at, bad, argument, |_| {});
}

fn check_with(
    pool: &mut Pool,
    case: &Case,
    (rank, which, index, value): (usize, Ints, usize, i32),
    bad: &[usize],
    argument: &str,
    prepare: impl Fn(&mut Rank),
) {
    let what = format!("rank {rank} {which:?}[{index}] = {value}\n{}", case.describe());
    let clean = pool.answers(case);
    let mut ranks: Vec<Rank> = (0..case.world).map(|rank| Rank::new(case, rank)).collect();
    ranks.iter_mut().for_each(&prepare);
    ranks[rank].set(which, index, value);
    let results = pool.step(case, &mut ranks, Call::Decode);
    assert_bad_data(&results, bad[0], argument);
    let named = results.iter().map(|result| result.as_ref().err().and_then(|error| error.rank()));
    assert!(named.into_iter().all(|named| named == Some(rank as i32)), "{what}\n{results:?}");
    for (memory, clean) in ranks.iter().zip(&clean) {
        for token in 0..case.tokens {
            let is_bad = case.owner(token).is_some_and(|b| bad.contains(&b));
            for head in 0..HEADS {
                let (row, bits) = memory.row(case, token, head);
                let lse = memory.lse_of(case, token, head).expect("an lse");
                if is_bad {
                    assert!(row.iter().all(|x| x.is_nan()) && lse.is_nan(), "token {token}: {what}");
                } else {
                    assert_eq!(bits, clean.row(case, token, head).1, "token {token}: {what}");
                    assert_eq!(Some(lse), clean.lse_of(case, token, head), "token {token}: {what}");
                }
            }
        }
    }
    let fault = shard_reference(case, &ranks, rank).fault.expect("the reference finds it, too");
    assert_eq!((fault.sequence as usize, fault.cause.argument().contains(argument)), (bad[0], true), "{what}");
}

#[test]
fn lengths() {
    let mut pool = Pool::default();
    for layout in [KvLayout::Strided, KvLayout::BlockTable, KvLayout::CsrPages] {
        for world in [1, 3] {
            let case = case(layout, Placement::Contiguous, false, world);
            let most = case.desc.max_kv_length;
            for value in [-1, i32::MIN, i32::MAX, most + 1] {
                check(&mut pool, &case, (world - 1, Ints::KvLength, 1, value), &[1], "kv_length");
            }
        }
    }
}

/// Keys and values may have room for different numbers of tokens; the smaller one counts, whichever it is.
#[test]
fn lengths_beyond_the_room_of_keys_or_values() {
    let desc = AttentionDesc::new(1, 1, 16, 8);
    let group = Group::new("scalar", 1, 1);
    let plans = group.plans(&desc).expect("plans");
    let (q, mut out) = ([1f32; 16], [7f32; 16]);
    for (k_room, v_room, length, fits) in [(8, 4, 5, false), (4, 8, 5, false), (8, 4, 4, true), (4, 8, 4, true)] {
        let (k, v) = (vec![0f32; k_room * 16], vec![2f32; v_room * 16]);
        let args = DecodeArgs {
            batch: 1,
            query_tokens: 1,
            q: Tensor::from_slice(&q),
            k: Tensor::from_slice(&k),
            v: Tensor::from_slice(&v),
            out: Tensor::from_slice_mut(&mut out),
            kv_length: &length,
            ..DecodeArgs::default()
        };
        // SAFETY: the arrays outlive the call, which has no stream and so blocks; they are as large as the tensors say.
        let result = unsafe { plans[0].decode(&args, None) };
        let what = format!("k {k_room}, v {v_room}, kv_length {length}: {result:?}");
        if fits {
            assert!(result.is_ok() && out == [2.0; 16], "{what}");
        } else {
            // The host sees it before the step begins, and the output stays as the step before left it.
            let error = result.expect_err("refused");
            let name = if k_room < v_room { "k.bytes: found" } else { "v.bytes: found" };
            assert!(error.kind() == ErrorKind::InvalidArgument && error.message().starts_with(name), "{what}");
            assert!(out == [7.0; 16], "{what}");
        }
    }
}

/// What lies behind the end of a table is not looked at: it would be a page that exists.
#[test]
fn lengths_beyond_the_room_of_a_table() {
    let group = Group::new("scalar", 1, 1);
    let (q, mut out) = ([1f32; 16], [0f32; 16]);
    let (k, v, pages) = (vec![0f32; 8 * 4 * 16], vec![2f32; 8 * 4 * 16], [0, 1, 2, 3, 4, 5, 6, 7]);
    for (kv_layout, given) in [(KvLayout::BlockTable, 0), (KvLayout::CsrPages, 0), (KvLayout::CsrPages, 1)] {
        let desc = AttentionDesc { kv_layout, page_size: 4, ..AttentionDesc::new(1, 1, 16, 32) };
        let plans = group.plans(&desc).expect("plans");
        // A table of two pages, whose last may hold so many tokens; in CSR the pages of others come behind it.
        let others = if kv_layout == KvLayout::CsrPages { 6 } else { 0 };
        for (last, fits) in [(1, true), (4, true), (5, false), (24, false)] {
            let (length, indptr) = (4 + last, [0, 2]);
            let mut args = DecodeArgs {
                batch: 1,
                query_tokens: 1,
                q: Tensor::from_slice(&q),
                k: Tensor::from_slice(&k),
                v: Tensor::from_slice(&v),
                out: Tensor::from_slice_mut(&mut out),
                kv_length: if given == 0 { &length } else { std::ptr::null() },
                last_page_len: if given == 0 { std::ptr::null() } else { &last },
                num_pages: 8,
                ..DecodeArgs::default()
            };
            if kv_layout == KvLayout::BlockTable {
                (args.block_table, args.max_pages) = (pages.as_ptr(), 2);
            } else {
                (args.page_indptr, args.page_indices) = (indptr.as_ptr(), pages.as_ptr());
                args.num_page_indices = 2 + others;
            }
            // SAFETY: as above.
            let result = unsafe { plans[0].decode(&args, None) };
            let what = format!("{kv_layout:?}, {last} tokens in the last page: {result:?}");
            if fits {
                assert!(result.is_ok() && out == [2.0; 16], "{what}");
            } else {
                assert_bad_data(&[result], 0, if given == 0 { "kv_length" } else { "page" });
                assert!(out.iter().all(|x| x.is_nan()), "{what}");
            }
        }
    }
}

#[test]
fn lengths_under_every_algorithm() {
    let mut pool = Pool::default();
    for algorithm in [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Tree, Algorithm::Allreduce3, Algorithm::Ring] {
        // On one node, and on two: a rank that does not lead its node hears of the others' bad data from its leader.
        for nodes in [&[][..], &[1, 1, 2]] {
            for rank in 0..3 {
                let mut case = case(KvLayout::BlockTable, Placement::Contiguous, true, 3);
                case.desc.algorithm = algorithm;
                case.nodes = nodes.to_vec();
                check(&mut pool, &case, (rank, Ints::KvLength, 1, -1), &[1], "kv_length");
                check(&mut pool, &case, (rank, Ints::KvStart, LAST, -5), &[LAST], "kv_start");
            }
        }
    }
}

#[test]
fn block_tables() {
    let mut pool = Pool::default();
    for world in [1, 2] {
        let case = case(KvLayout::BlockTable, Placement::Interleaved { run: 8 }, false, world);
        let probe = Rank::new(&case, 0);
        let (width, pages) = (probe.args.max_pages as usize, probe.args.num_pages);
        for value in [-1, pages, i32::MAX, i32::MIN] {
            // The first and the last page in use of the sequence in the middle.
            let used = case.sequences[1].held[0].len().div_ceil(8);
            for page in [0, used - 1] {
                check(&mut pool, &case, (0, Ints::BlockTable, width + page, value), &[1], "block_table");
            }
        }
    }
}

#[test]
fn csr_pages() {
    let mut pool = Pool::default();
    let case = case(KvLayout::CsrPages, Placement::Contiguous, false, 2);
    for value in [-1, 1 << 20, i32::MAX] {
        check(&mut pool, &case, (1, Ints::PageIndices, 0, value), &[0], "page_indices");
        check(&mut pool, &case, (1, Ints::PageIndptr, LAST + 1, value), &[LAST], "page_indptr");
    }
    check(&mut pool, &case, (0, Ints::PageIndptr, 0, -1), &[0], "page_indptr");
    let by_last_page = |rank: &mut Rank| {
        rank.args.last_page_len = rank.last_page_len.ints();
        rank.args.kv_length = std::ptr::null();
    };
    for value in [0, -1, 9, i32::MAX] {
        check_with(&mut pool, &case, (1, Ints::LastPageLen, 1, value), &[1], "last_page_len", by_last_page);
    }
}

#[test]
fn query_starts() {
    let mut pool = Pool::default();
    let case = case(KvLayout::Strided, Placement::Contiguous, false, 2);
    // Sequence 1 would end before it begins; sequence 2 would begin inside it.
    let mut ranks: Vec<Rank> = (0..2).map(|rank| Rank::new(&case, rank)).collect();
    ranks.iter_mut().for_each(|rank| rank.set(Ints::QueryStart, 2, 0));
    let clean = pool.answers(&case);
    let results = pool.step(&case, &mut ranks, Call::Decode);
    assert_bad_data(&results, 1, "query_start");
    for (memory, clean) in ranks.iter().zip(&clean) {
        for head in 0..HEADS {
            assert_eq!(memory.row(&case, 0, head).1, clean.row(&case, 0, head).1);
            // Which rows are sequence 2's is not known, so none has an answer.
            assert!((1..4).all(|token| memory.row(&case, token, head).0.iter().all(|x| x.is_nan())));
        }
    }
    for value in [-1, 5, i32::MAX, i32::MIN] {
        let mut ranks: Vec<Rank> = (0..2).map(|rank| Rank::new(&case, rank)).collect();
        ranks.iter_mut().for_each(|rank| rank.set(Ints::QueryStart, LAST + 1, value));
        let results = pool.step(&case, &mut ranks, Call::Decode);
        assert_bad_data(&results, LAST, "query_start");
        for (memory, clean) in ranks.iter().zip(&clean) {
            for (token, head) in (0..3).flat_map(|t| (0..HEADS).map(move |h| (t, h))) {
                assert_eq!(memory.row(&case, token, head).1, clean.row(&case, token, head).1, "{value}");
            }
        }
    }
}

#[test]
fn positions() {
    let mut pool = Pool::default();
    let contiguous = case(KvLayout::Strided, Placement::Contiguous, true, 2);
    for value in [-1, i32::MIN, i32::MAX] {
        check(&mut pool, &contiguous, (1, Ints::KvStart, 1, value), &[1], "kv_start");
    }
    for value in [1, -1, i32::MIN] {
        check(&mut pool, &contiguous, (0, Ints::GlobalLength, 1, value), &[1], "global_length");
    }
    let explicit = case(KvLayout::BlockTable, Placement::Explicit, true, 2);
    let row = explicit.desc.max_kv_length as usize;
    check(&mut pool, &explicit, (0, Ints::KvPosition, row + 3, -1), &[1], "kv_position");
    let mut given = contiguous.clone();
    given.query_position = Some(vec![59, 88, 89, 74]);
    for token in [1, 2] {
        check(&mut pool, &given, (1, Ints::QueryPosition, token, -1), &[1], "query_position");
    }
}

#[test]
fn the_first_of_several_is_named_and_the_group_goes_on() {
    let case = case(KvLayout::Strided, Placement::Contiguous, false, 2);
    let group = Group::new(&case.isa, 2, 1);
    let plans = group.plans(&case.desc).expect("plans");
    let mut ranks: Vec<Rank> = (0..2).map(|rank| Rank::new(&case, rank)).collect();
    ranks[0].set(Ints::KvLength, 2, -5);
    ranks[1].set(Ints::KvLength, 1, -5);
    ranks[1].set(Ints::KvLength, 2, 1 << 30);
    // The lowest rank that found some speaks for all.
    assert_bad_data(&step(&group, &plans, &ranks, false, Call::Decode), 2, "kv_length");
    for rank in &ranks {
        let is_nan = |token: usize| rank.row(&case, token, 0).0.iter().all(|x| x.is_nan());
        assert_eq!([0, 1, 2, 3].map(is_nan), [false, true, true, true], "every faulty sequence is NaN");
    }
    for comm in &group.ranks {
        assert!(comm.status().expect("a live communicator").error.is_none(), "the step has told it");
    }
    let mut good: Vec<Rank> = (0..2).map(|rank| Rank::new(&case, rank)).collect();
    good.iter_mut().for_each(|rank| rank.prefill(0xff));
    for result in step(&group, &plans, &good, false, Call::Decode) {
        result.expect("the communicator stays usable");
    }
    let (first, second) = (good[0].bits(&case), good[1].bits(&case));
    assert_eq!(first, second);
}
