//! What ranks have to agree on, one difference at a time.

use std::time::Duration;

use treeattn::ErrorKind;
use treeattn::attention::{
    Algorithm, AttentionDesc, DecodeArgs, Dtype, OutputMode, Placement, QueryInput, Reproducibility, Tensor,
};
use treeattn::runtime::{CommConfig, MergeArgs, Plan};

use super::group::*;

#[test]
fn every_difference_of_descriptors_is_named_on_every_rank() {
    let (_runtime, comms) = group(3, &quick(Duration::from_secs(20)));
    let base = shape();
    let changes: Vec<(&str, AttentionDesc)> = vec![
        ("q_heads", AttentionDesc { q_heads: 8, ..base }),
        ("kv_heads", AttentionDesc { kv_heads: 4, ..base }),
        ("head_dim_qk", AttentionDesc { head_dim_qk: 24, ..base }),
        ("head_dim_v", AttentionDesc { head_dim_v: 24, ..base }),
        ("q_dtype", AttentionDesc { q_dtype: Dtype::F16, ..base }),
        ("k_dtype", AttentionDesc { k_dtype: Dtype::F16, ..base }),
        ("v_dtype", AttentionDesc { v_dtype: Dtype::Bf16, ..base }),
        ("out_dtype", AttentionDesc { out_dtype: Dtype::Bf16, ..base }),
        ("placement.kind", AttentionDesc { placement: Placement::Explicit, ..base }),
        ("max_batch", AttentionDesc { max_batch: 5, ..base }),
        ("max_query_tokens", AttentionDesc { max_query_tokens: 5, ..base }),
        ("max_kv_length", AttentionDesc { max_kv_length: 65, ..base }),
        ("scale", AttentionDesc { scale: 0.5, ..base }),
        ("causal", AttentionDesc { causal: true, ..base }),
        ("output", AttentionDesc { output: OutputMode::Scattered, ..base }),
        ("algorithm", AttentionDesc { algorithm: Algorithm::OneShot, ..base }),
        ("wire_dtype", AttentionDesc { wire_dtype: Dtype::Bf16, ..base }),
        ("kv_stable", AttentionDesc { kv_stable: true, ..base }),
        ("checked", AttentionDesc { checked: true, ..base }),
    ];
    for (field, other) in changes {
        let errors = on_threads(3, |r| Plan::create(&comms[r], if r == 1 { &other } else { &base }).err().unwrap());
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::Mismatch, "{field}: {error}");
            assert!(error.message().starts_with(&format!("{field}:")), "{field}: {error}");
            assert!(error.message().contains("[1]") && error.message().contains("[0, 2]"), "{field}: {error}");
            assert_eq!(error.rank(), Some(1));
        }
    }
    // A mismatch leaves the communicator usable.
    assert!(decode_all(&comms, &base, 5).iter().all(Result::is_ok));
}

#[test]
fn a_rank_that_cannot_make_its_plan_tells_the_others() {
    let (_runtime, comms) = group(2, &quick(Duration::from_secs(20)));
    let bad = AttentionDesc { reproducibility: Reproducibility::Canonical, ..shape() };
    let good = shape();
    let errors = on_threads(2, |r| Plan::create(&comms[r], if r == 1 { &bad } else { &good }).err().unwrap());
    assert_eq!(errors[0].kind(), ErrorKind::Mismatch);
    assert!(errors[0].message().contains("rank 1") && errors[0].message().contains("reproducibility"), "{}", errors[0]);
    assert_eq!(errors[1].kind(), ErrorKind::Unsupported);
}

#[test]
fn another_step_is_a_desync_on_every_rank() {
    for odd in 0..3 {
        let (_runtime, comms) = group(3, &quick(Duration::from_secs(20)));
        let desc = shape();
        let errors = on_threads(3, |r| {
            let plan = Plan::create(&comms[r], &desc).unwrap();
            let batch = if r == odd { 2 } else { 1 };
            let mut shard = Shard::new(&desc, batch, 5, r as u32);
            // SAFETY: the shard outlives the blocking call.
            let error = unsafe { plan.decode(&shard.args(batch), None) }.unwrap_err();
            assert!(shard.out.iter().all(|x| x.is_nan()));
            error
        });
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::Desync, "{error}");
            assert_eq!(error.rank(), Some(odd as i32), "{error}");
        }
        let status = comms[0].status().unwrap();
        assert_eq!(status.error.unwrap().kind(), ErrorKind::Desync);
        assert_works(3);
    }
}

#[test]
fn later_capabilities_are_refused_by_name() {
    let (runtime, comms) = group(1, &CommConfig::default());
    let base = shape();
    let cases = [
        (
            "mask_dtype",
            AttentionDesc { mask: treeattn::attention::MaskKind::Additive, mask_dtype: Some(Dtype::Bf16), ..base },
        ),
        ("query_input", AttentionDesc { query_input: QueryInput::Scattered, output: OutputMode::Local, ..base }),
        ("reproducibility", AttentionDesc { reproducibility: Reproducibility::BatchInvariant, ..base }),
        ("algorithm", AttentionDesc { algorithm: Algorithm::Ring, kv_heads: 0, ..base }),
    ];
    for (field, desc) in cases {
        for error in [
            Plan::create(&comms[0], &desc).err().unwrap(),
            treeattn::runtime::attention_supported(&runtime, CPU, &desc).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{field}: {error}");
            assert!(error.message().starts_with(field), "{field}: {error}");
        }
    }
}

/// In what a rank's step differs from its peers'.
#[derive(Clone, Copy, Debug)]
enum Difference {
    /// Another plan of the same shape.
    Plan,
    /// Fewer sequences, with as many query tokens.
    Batch,
    /// Fewer query tokens, with as many sequences.
    Tokens,
    /// A merge of given partials, with as many query tokens.
    Call,
    /// The same in a step without queries, which is told apart by nothing else.
    EmptyCall,
}

#[test]
fn a_step_that_differs_in_one_thing_is_a_desync_on_every_rank_by_any_algorithm() {
    for (algorithm, query_input) in ALGORITHMS.into_iter().flat_map(|by| QueryInput::ALL.map(|input| (by, input))) {
        use Difference::*;
        for difference in [Plan, Batch, Tokens, Call, EmptyCall] {
            for odd in 0..3 {
                // A ring merges no given partials.
                if !matches!((algorithm, difference), (Algorithm::Ring, Call | EmptyCall)) {
                    differing_step((algorithm, query_input), difference, odd);
                }
            }
        }
    }
}

fn differing_step((algorithm, query_input): (Algorithm, QueryInput), difference: Difference, odd: usize) {
    let (_runtime, comms) = group(3, &quick(Duration::from_secs(20)));
    let desc = AttentionDesc { algorithm, query_input, ..shape() };
    let (plans, others) = (plan_all(&comms, &desc), plan_all(&comms, &desc));
    let results = on_threads(3, |r| {
        let mut shard = Shard::new(&desc, 4, 5, r as u32);
        let (partial, lse) = (shard.out.clone(), shard.lse.clone());
        let (batch, query_tokens) = if matches!(difference, Difference::EmptyCall) { (0, 0) } else { (2, 4) };
        let mut args = DecodeArgs { batch, query_tokens, ..shard.args(4) };
        let merge = MergeArgs {
            query_tokens,
            heads: 0,
            head_dim: 0,
            o: Tensor::from_slice(&partial),
            o_dtype: Dtype::F32,
            lse: Tensor::from_slice(&lse),
            lse_base: 0,
            out: args.out,
            out_dtype: None,
            out_lse: args.lse,
            ..MergeArgs::default()
        };
        // SAFETY: the shard and the partial outlive the blocking calls.
        let result = unsafe {
            match difference {
                _ if r != odd => plans[r].decode(&args, None),
                Difference::Plan => others[r].decode(&args, None),
                Difference::Batch => {
                    args.batch = 1;
                    plans[r].decode(&args, None)
                }
                Difference::Tokens => {
                    args.query_tokens = 2;
                    plans[r].decode(&args, None)
                }
                Difference::Call | Difference::EmptyCall => plans[r].merge(&merge, None),
            }
        };
        (result, shard.out)
    });
    for (rank, (result, out)) in results.into_iter().enumerate() {
        let told = format!("{algorithm:?}, {difference:?} on rank {odd}, rank {rank}: {result:?}");
        let Err(error) = result else { panic!("{told}") };
        assert_eq!((error.kind(), error.rank()), (ErrorKind::Desync, Some(odd as i32)), "{told}");
        let decode = |plan, batch, tokens| format!("a decode of plan {plan} with batch {batch}, query_tokens {tokens}");
        let (found, wanted) = match difference {
            Difference::Plan => (decode(2, 2, 4), decode(1, 2, 4)),
            Difference::Batch => (decode(1, 1, 4), decode(1, 2, 4)),
            Difference::Tokens => (decode(1, 2, 2), decode(1, 2, 4)),
            Difference::Call => ("a merge of plan 1 with query_tokens 4".into(), decode(1, 2, 4)),
            Difference::EmptyCall => ("a merge of plan 1 with query_tokens 0".into(), decode(1, 0, 0)),
        };
        let says = [format!("found {found}"), format!("(rank {odd}), wanted {wanted}")];
        assert!(says.iter().all(|text| error.message().contains(text)), "{told}, wanted {says:?}");
        // The odd rank may have fewer rows.
        let rows = if matches!(difference, Difference::EmptyCall) { 0 } else { 2 * 4 };
        assert!(out[..rows * 16].iter().all(|x| x.is_nan()), "{told}");
    }
}
