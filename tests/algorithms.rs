//! What exchange algorithms send and hold, to the byte, against the formulas of arXiv 2408.04093 (section 6).
//!
//! b sequences of one query, t keys a rank, d = n_h x head dimension (as many kv heads as query heads), p ranks.

#[path = "support/mod.rs"]
mod support;

use support::case::Case;
use support::rank::Rank;
use support::run::{Call, Group, step};
use support::values::Values;
use treeattn::attention::{Algorithm, AttentionDesc, Dtype, KvLayout, OutputMode};
use treeattn::runtime::PlanStats;

const HEADS: u64 = 16;
const DIM: u64 = 8;
const D: u64 = HEADS * DIM;
const BATCH: u64 = 3;
const KEYS: u64 = 10;
/// Bytes of an element.
const F32: u64 = 4;
/// Elements of a partial: its o, and an lse of two floats a head: as much as the paper's output, numerator and denominator.
const PARTIAL: u64 = BATCH * D + 2 * BATCH * HEADS;

fn desc(algorithm: Algorithm) -> AttentionDesc {
    AttentionDesc { algorithm, ..AttentionDesc::new(HEADS as i32, HEADS as i32, DIM as i32, 1) }
}

/// The statistics of every rank after `steps` steps over `keys` keys in all, and what one step of them is.
fn run(desc: AttentionDesc, nodes: &[i32], world: usize, keys: &[u64], steps: usize) -> Vec<PlanStats> {
    let sequences: Vec<(usize, usize)> = keys.iter().map(|&keys| (keys as usize, 1)).collect();
    run_sequences(desc, nodes, world, &sequences, steps)
}

/// As [`run`], over sequences of so many keys and query tokens.
fn run_sequences(
    desc: AttentionDesc,
    nodes: &[i32],
    world: usize,
    sequences: &[(usize, usize)],
    steps: usize,
) -> Vec<PlanStats> {
    let case = Case::plain(desc, world, sequences, Values::Normal, 11);
    let group = Group::over_nodes(&case.isa, world, 1, nodes);
    let plans = group.plans(&case.desc).unwrap();
    let ranks: Vec<Rank> = (0..world).map(|rank| Rank::new(&case, rank)).collect();
    for _ in 0..steps {
        step(&group, &plans, &ranks, false, Call::Decode).into_iter().for_each(|result| result.unwrap());
    }
    let stats: Vec<PlanStats> = plans.iter().map(|plan| plan.stats().unwrap()).collect();
    for (plan, stats) in plans.iter().zip(&stats) {
        let memory = plan.memory().unwrap();
        assert_eq!((stats.steps, stats.peak_memory), (steps as u64, memory.workspace + memory.window));
        assert!(stats.exchange_memory <= memory.workspace);
    }
    stats
}

fn even(algorithm: Algorithm, world: u64, steps: usize) -> Vec<PlanStats> {
    run(desc(algorithm), &[], world as usize, &[KEYS * world; BATCH as usize], steps)
}

#[test]
fn one_shot_sends_its_partial_to_all_in_one_step() {
    for world in [2, 5, 8] {
        for stats in even(Algorithm::OneShot, world, 3) {
            assert_eq!((stats.rounds, stats.messages), (3, 3 * (world - 1)));
            assert_eq!(stats.bytes_sent, 3 * (world - 1) * PARTIAL * F32);
            assert_eq!(stats.exchange_memory, PARTIAL * F32);
            assert_eq!((stats.algorithm, &*stats.reason), (Algorithm::OneShot, "asked for"));
        }
    }
}

#[test]
fn a_tree_of_8_ranks_takes_3_steps_and_holds_what_the_paper_says() {
    for (world, levels) in [(2, 1), (4, 2), (8, 3), (16, 4)] {
        for stats in even(Algorithm::Tree, world, 5) {
            assert_eq!((stats.algorithm, stats.rounds, stats.messages), (Algorithm::Tree, 5 * levels, 5 * levels));
            assert_eq!(stats.bytes_sent, 5 * levels * PARTIAL * F32);
            // The paper's 2bd + 2b n_h beside the keys and values, which are the engine's own here; each lse in two floats.
            assert_eq!(stats.exchange_memory, (2 * BATCH * D + 4 * BATCH * HEADS) * F32);
        }
    }
    // Any number of ranks: ceil(log2 p) steps, and p - 1 merges on each way to the root.
    for world in [3u64, 5, 6, 7, 11, 13] {
        let all = even(Algorithm::Tree, world, 1);
        assert!(all.iter().all(|stats| stats.rounds == u64::from(world.next_power_of_two().trailing_zeros())));
    }
}

#[test]
fn a_tree_over_nodes_crosses_them_with_leaders_only() {
    // Nodes of 3, 3 and 2: two levels in, two between, two out.
    let stats = run(desc(Algorithm::Tree), &[4, 4, 9, 9, 4, 9, 0, 0], 8, &[80; BATCH as usize], 1);
    assert!(stats.iter().all(|stats| stats.rounds == 6));
    let messages: Vec<u64> = stats.iter().map(|stats| stats.messages).collect();
    // Leaders 0, 2 and 6 double (2, 1 and 2 messages) and spread to 2, 2 and 1; everyone else sends in once.
    assert_eq!(messages, [4, 1, 3, 1, 1, 1, 3, 1]);
    assert!(stats.iter().all(|stats| stats.bytes_sent == stats.messages * PARTIAL * F32));
}

#[test]
fn a_narrow_wire_halves_what_is_sent_of_o() {
    let desc = AttentionDesc { wire_dtype: Dtype::Bf16, ..desc(Algorithm::Tree) };
    for stats in run(desc, &[], 8, &[80; BATCH as usize], 2) {
        let partial = BATCH * D * 2 + BATCH * HEADS * 8;
        assert_eq!(stats.bytes_sent, 2 * 3 * partial);
        // As f32, to send and to receive.
        assert_eq!(stats.exchange_memory, PARTIAL * F32 + 2 * partial);
    }
}

#[test]
fn three_allreduces_move_what_the_paper_says() {
    let formula = |world: u64| 2 * (world - 1) * (BATCH * D + 2 * BATCH * HEADS) * F32;
    for world in [2, 4, 8] {
        for stats in even(Algorithm::Allreduce3, world, 1) {
            assert_eq!((stats.rounds, stats.messages), (6, 6 * (world - 1)));
            assert_eq!(stats.bytes_sent, formula(world) / world, "2 (p - 1) / p (bd + 2b n_h)");
            assert_eq!(stats.exchange_memory, (BATCH * D + 4 * BATCH * HEADS) * F32);
        }
    }
    // Where p does not divide the rows, ranks differ, but not their sum.
    for world in [3, 7, 13] {
        assert_eq!(even(Algorithm::Allreduce3, world, 1).iter().map(|s| s.bytes_sent).sum::<u64>(), formula(world));
    }
}

#[test]
fn two_shots_move_two_partials_whatever_the_ranks() {
    for world in [2, 4, 8] {
        for stats in even(Algorithm::TwoShot, world, 1) {
            assert_eq!((stats.rounds, stats.messages), (2, 2 * (world - 1)));
            assert_eq!(stats.bytes_sent, 2 * (world - 1) * PARTIAL * F32 / world);
            assert_eq!(stats.exchange_memory, (PARTIAL + PARTIAL / world) * F32);
        }
    }
    // Scattered: the first of the two.
    for algorithm in [Algorithm::OneShot, Algorithm::TwoShot] {
        let desc = AttentionDesc { output: OutputMode::Scattered, ..desc(algorithm) };
        for stats in run(desc, &[], 4, &[40; BATCH as usize], 1) {
            assert_eq!((stats.rounds, stats.bytes_sent), (1, 3 * PARTIAL * F32 / 4));
        }
    }
}

#[test]
fn a_ring_moves_exactly_the_keys_and_values_it_must() {
    for world in [2, 4, 8] {
        for stats in even(Algorithm::Ring, world, 3) {
            assert_eq!((stats.rounds, stats.messages), (3 * world, 3 * (world - 1)));
            // The paper's 2btd a hop; its p hops bring each block home again, which takes no hop here.
            assert_eq!(stats.bytes_sent, 3 * (world - 1) * 2 * BATCH * KEYS * D * F32);
            // Its 4btd + 2bd, and the log-sum-exps that go with 2bd; more partials from 3 ranks on. Each of the two blocks has
            // room for a scale of each key and value and head, too, which steps without scales neither use nor send.
            let scales = 2 * 2 * BATCH * KEYS * HEADS * F32;
            let partials = stats.exchange_memory - scales - 4 * BATCH * KEYS * D * F32;
            assert_eq!(partials % (PARTIAL * F32), 0);
            let log = u64::from(world.trailing_zeros());
            assert!((log + 1..=2 * log + 1).contains(&(partials / (PARTIAL * F32))));
            if world == 2 {
                assert_eq!(partials, (2 * BATCH * D + 4 * BATCH * HEADS) * F32);
            }
        }
    }
}

#[test]
fn a_ring_of_uneven_blocks_passes_each_on_as_it_is() {
    // Pages, keys in bf16 and values in f32, grouped heads, two ranks without keys.
    let desc = AttentionDesc {
        kv_layout: KvLayout::BlockTable,
        page_size: 4,
        kv_heads: 2,
        head_dim_v: 5,
        k_dtype: Dtype::Bf16,
        v_dtype: Dtype::F32,
        ..desc(Algorithm::Ring)
    };
    let token = 2 * (DIM * 2 + 5 * 4);
    // Contiguous: rank r holds floor((r + 1) L / p) - floor(r L / p) keys of each sequence.
    let held = |r: u64| [3u64, 7].map(|keys| (r + 1) * keys / 5 - r * keys / 5).iter().sum::<u64>();
    for (rank, stats) in run(desc, &[], 5, &[3, 7], 1).iter().enumerate() {
        // Everything but the block of the rank above, which ends here.
        let passed: u64 = (0..4).map(|hop| held((rank as u64 + hop) % 5)).sum();
        assert_eq!(stats.bytes_sent, passed * token);
    }
}

#[test]
fn a_ring_passes_no_keys_that_nobody_asks_for() {
    let token = 2 * D * F32;
    for (asked, unasked) in [(12, 30), (0, 30)] {
        for stats in run_sequences(desc(Algorithm::Ring), &[], 3, &[(unasked, 0), (asked, 1)], 1) {
            let messages = if asked > 0 { 2 } else { 0 };
            assert_eq!((stats.messages, stats.bytes_sent), (messages, 2 * (asked as u64 / 3) * token));
        }
    }
}
