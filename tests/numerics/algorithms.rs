//! Every exchange algorithm gives the exact answer, and the same bits on every rank.

use treeattn::attention::{Algorithm, AttentionDesc, Dtype, KvLayout, OutputMode, QueryInput};

use crate::support::case::Case;
use crate::support::rng::Rng;
use crate::support::run::Pool;
use crate::support::values::Values;
use crate::support::{full, only_case, random, seed};

const LAYOUTS: [KvLayout; 3] = [KvLayout::Strided, KvLayout::BlockTable, KvLayout::CsrPages];

/// A random grouping of ranks into nodes; sometimes none.
fn nodes(r: &mut Rng, world: usize) -> Vec<i32> {
    let kinds = r.range(1, world);
    if r.chance(20) { Vec::new() } else { (0..world).map(|_| r.range(0, kinds - 1) as i32).collect() }
}

fn random_case(algorithm: Algorithm, seed: u64) -> Case {
    let mut case = random::case(seed, LAYOUTS[(seed % 3) as usize]);
    case.desc.algorithm = algorithm;
    if case.desc.output == OutputMode::Local {
        case.desc.output = OutputMode::Replicated;
    }
    case.desc.query_input = QueryInput::ALL[(seed / 3 % 2) as usize];
    case.nodes = nodes(&mut Rng::new(seed), case.world);
    case
}

fn random_cases(algorithm: Algorithm, count: u64) {
    let (seed, mut pool) = (seed(), Pool::default());
    if let Some(case) = only_case() {
        return pool.check(&random_case(algorithm, case));
    }
    let count = if full() { 12 * count } else { count };
    println!("{}: {count} cases, TREEATTN_SEED={seed}", algorithm.name());
    for index in 0..count {
        let case = random_case(algorithm, Rng::derive(seed, 7 * index + algorithm as u64));
        if std::env::var_os("TREEATTN_TRACE").is_some() {
            eprintln!("{}", case.describe());
        }
        pool.check(&case);
        pool.forget();
    }
    pool.tally.finish_random(algorithm.name());
}

/// Worlds of every size; ranks without keys and, as 5 heads are less than most worlds, ranks without heads.
fn many_ranks(algorithm: Algorithm) {
    let mut pool = Pool::default();
    let mut rng = Rng::new(seed() ^ algorithm as u64);
    let worlds: Vec<usize> = if full() { (1..=64).collect() } else { vec![1, 2, 3, 5, 7, 8, 11, 13, 16, 23, 33, 64] };
    for world in worlds {
        for (output, query_input) in [OutputMode::Replicated, OutputMode::Scattered].into_iter().zip(QueryInput::ALL) {
            let desc = AttentionDesc { output, query_input, algorithm, ..AttentionDesc::new(5, 1, 8, 1) };
            let seed = rng.range(0, 1 << 30) as u64;
            let mut case = Case::plain(desc, world, &[(40, 1), (0, 1), (3, 2)], Values::Normal, seed);
            case.nodes = nodes(&mut rng, world);
            pool.check(&case);
            pool.forget();
        }
    }
    pool.tally.finish(algorithm.name());
}

macro_rules! algorithms {
    ($($name:ident: $algorithm:ident, $count:literal;)*) => {$(
        mod $name {
            use super::*;

            #[test]
            fn random() {
                random_cases(Algorithm::$algorithm, $count);
            }

            #[test]
            fn one_to_64_ranks() {
                many_ranks(Algorithm::$algorithm);
            }
        }
    )*};
}

algorithms! {
    one_shot: OneShot, 30;
    two_shot: TwoShot, 60;
    tree: Tree, 80;
    allreduce3: Allreduce3, 60;
    ring: Ring, 80;
}

/// One rank has all the keys, then none but one has: merging with what is empty changes nothing.
#[test]
fn the_only_rank_with_keys_gives_the_bits_of_one_rank_alone() {
    for algorithm in [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Tree, Algorithm::Allreduce3] {
        for out_dtype in [Dtype::F32, Dtype::Bf16] {
            let desc = AttentionDesc { algorithm, out_dtype, ..AttentionDesc::new(4, 2, 16, 1) };
            let mut pool = Pool::default();
            let mut case = Case::plain(desc, 5, &[(77, 1)], Values::Normal, 3);
            let alone = Case { world: 1, ..Case::plain(desc, 1, &[(77, 1)], Values::Normal, 3) };
            let wanted = pool.answers(&alone)[0].bits(&alone);
            for holder in 0..5 {
                case.desc.max_kv_length = 77;
                case.sequences = alone.sequences.clone();
                case.q = alone.q.clone();
                case.sequences[0].held = (0..5).map(|r| if r == holder { (0..77).collect() } else { vec![] }).collect();
                for rank in pool.answers(&case) {
                    assert_eq!(rank.bits(&case), wanted, "{algorithm:?}, keys on rank {holder}");
                }
            }
        }
    }
}
