//! Queries that ranks have by heads: the bits of steps that every rank passes all queries to.

use treeattn::ErrorKind;
use treeattn::attention::{Algorithm, AttentionDesc, Dtype, KvLayout, OutputMode, QueryInput};

use crate::support::case::Case;
use crate::support::random;
use crate::support::rng::Rng;
use crate::support::run::{Pool, judge};
use crate::support::seed;
use crate::support::values::Values;

/// Asserts that a case has the same bits with queries by heads, and the same statistics but for their rounds.
fn assert_same(case: &Case) {
    let mut pool = Pool::default();
    let of = |query_input| Case { desc: AttentionDesc { query_input, ..case.desc }, ..case.clone() };
    let [wanted, found] = QueryInput::ALL.map(|input| pool.answers(&of(input)));
    for (rank, (wanted, found)) in wanted.iter().zip(&found).enumerate() {
        assert!(wanted.bits(case) == found.bits(case), "rank {rank}: other bits\n{}", case.describe());
    }
}

#[test]
fn random_cases_have_the_same_bits() {
    for (index, algorithm) in
        (0..).zip([Algorithm::Auto, Algorithm::TwoShot, Algorithm::Tree, Algorithm::Ring].repeat(6))
    {
        let layout = [KvLayout::Strided, KvLayout::BlockTable, KvLayout::CsrPages][index as usize % 3];
        let mut case = random::case(Rng::derive(seed() ^ 0x7a, index), layout);
        case.desc.algorithm = algorithm;
        if case.desc.output == OutputMode::Local {
            case.desc.output = OutputMode::Scattered;
        }
        // Queries that are the same for all heads, or are not there at all, are among the cases of their own.
        assert_same(&case);
    }
}

#[test]
fn ranks_without_heads_and_without_keys_take_part() {
    for algorithm in Algorithm::ALL {
        for world in [2, 3, 4, 7] {
            for output in [OutputMode::Replicated, OutputMode::Scattered] {
                let base = AttentionDesc { algorithm, output, causal: true, ..AttentionDesc::new(3, 3, 24, 1) };
                let desc = AttentionDesc { q_dtype: Dtype::Bf16, query_input: QueryInput::Scattered, ..base };
                let mut case = Case::plain(desc, world, &[(60, 1), (9, 4), (0, 1)], Values::Normal, 3);
                for sequence in &mut case.sequences {
                    sequence.held = vec![Vec::new(); world];
                    sequence.held[world / 2] = (0..sequence.keys).collect();
                }
                case.desc.max_kv_length = 60;
                assert_same(&case);
                let answers = Pool::default().answers(&case);
                assert_eq!(judge(&case, &answers).unwrap().failure, None);
            }
        }
    }
}

/// More queries of a rank than a round takes.
#[test]
fn queries_that_fit_no_round_go_in_several() {
    let base = AttentionDesc { output: OutputMode::Scattered, ..AttentionDesc::new(6, 1, 256, 1) };
    let desc = AttentionDesc { head_dim_v: 8, query_input: QueryInput::Scattered, ..base };
    let case = Case::plain(desc, 2, &[(20, 500)], Values::Normal, 8);
    assert_same(&case);
    let mut pool = Pool::default();
    let plans = pool.group(&case).plans(&case.desc).unwrap();
    let all = Pool::default()
        .group(&case)
        .plans(&AttentionDesc { query_input: QueryInput::Replicated, ..case.desc })
        .unwrap();
    let [own, all] = [&plans[0], &all[0]].map(|plan| plan.memory().unwrap().workspace);
    assert_eq!(own - all, 500 * 6 * 256 * 4);
}

#[test]
fn local_outputs_exchange_nothing_and_take_all_queries() {
    let mut pool = Pool::default();
    let base = AttentionDesc { output: OutputMode::Local, ..AttentionDesc::new(4, 2, 16, 1) };
    let case =
        Case::plain(AttentionDesc { query_input: QueryInput::Scattered, ..base }, 2, &[(20, 1)], Values::Normal, 8);
    let error = pool.group(&case).plans(&case.desc).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.message().starts_with("query_input: found SCATTERED"), "{error}");
}
