//! What steps over a transport send, to the byte. An allgather moves all of a payload to every peer, also where a peer
//! needs a part of it only.

use treeattn::attention::{Algorithm, AttentionDesc, Dtype, OutputMode};
use treeattn::runtime::{Plan, PlanStats};

use super::mesh::LONG;
use super::ranks::*;

/// Query tokens of a step, heads, elements of a row.
const TOKENS: u64 = 3;
const HEADS: u64 = 4;
const DIM: u64 = 16;
const ROWS: u64 = TOKENS * HEADS;
/// Bytes of a row of a partial in f32, its lse included.
const ROW: u64 = 4 * (DIM + 2);

/// The statistics of every rank after two steps.
fn two_steps(world: usize, desc: &AttentionDesc) -> Vec<PlanStats> {
    on_ranks(world, &config(LONG), |mesh, comm| {
        let plan = Plan::create(comm, desc).unwrap();
        for _ in 0..2 {
            decode(&plan, mesh.rank, TOKENS as usize, None).unwrap();
        }
        let (stats, memory) = (plan.stats().unwrap(), plan.memory().unwrap());
        assert_eq!((stats.steps, stats.peak_memory), (2, memory.workspace + memory.window));
        stats
    })
}

#[test]
fn every_algorithm_sends_what_it_must() {
    for world in [2u64, 3, 4] {
        let peers = world - 1;
        for algorithm in ALGORITHMS {
            let all = two_steps(world as usize, &AttentionDesc { algorithm, ..shape(TOKENS as i32) });
            let levels = u64::from(world.next_power_of_two().trailing_zeros());
            // Rounds, messages and bytes of one step.
            let wanted = match algorithm {
                Algorithm::TwoShot => {
                    // The merged rows of the rank that has most heads, and as many from each.
                    let merged = TOKENS * HEADS.div_ceil(world) * ROW;
                    (2, 2 * peers, peers * (ROWS * ROW + merged))
                }
                Algorithm::Allreduce3 => (3, 3 * peers, peers * ROWS * 4 * (DIM + 2)),
                Algorithm::Tree if world == 3 => {
                    // The rank that sends twice is not the same as the one left over.
                    let messages: u64 = all.iter().map(|stats| stats.messages).sum();
                    assert_eq!(messages, 2 * 5, "a swap of two ranks twice, and one message to the third");
                    assert!(all.iter().all(|stats| stats.bytes_sent == stats.messages * ROWS * ROW));
                    continue;
                }
                Algorithm::Tree => (levels, levels, levels * ROWS * ROW),
                // 9 keys a sequence and their values, 2 heads of 16.
                Algorithm::Ring => (world, peers, peers * TOKENS * 9 * 2 * (2 * DIM) * 4),
                _ => (1, peers, peers * ROWS * ROW),
            };
            for stats in all {
                let found = (stats.rounds / 2, stats.messages / 2, stats.bytes_sent / 2);
                assert_eq!(found, wanted, "{algorithm:?} over {world} ranks");
                assert_eq!((stats.bytes_sent % 2, stats.algorithm), (0, algorithm));
            }
        }
    }
}

#[test]
fn scattered_outputs_and_narrow_wires_send_what_they_must() {
    let base = shape(TOKENS as i32);
    for stats in two_steps(3, &AttentionDesc { output: OutputMode::Scattered, algorithm: Algorithm::OneShot, ..base }) {
        assert_eq!((stats.rounds, stats.bytes_sent), (2, 2 * 2 * ROWS * ROW));
    }
    for wire_dtype in [Dtype::F16, Dtype::Bf16] {
        for stats in two_steps(2, &AttentionDesc { wire_dtype, algorithm: Algorithm::OneShot, ..base }) {
            assert_eq!(stats.bytes_sent, 2 * ROWS * (8 + 2 * DIM));
        }
    }
}
