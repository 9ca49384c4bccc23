//! What a plan says that it holds.

use std::time::Duration;

use treeattn::attention::{Algorithm, AttentionDesc, OutputMode};
use treeattn::runtime::{CommConfig, Communicator, Plan, PlanMemory};

use super::group::*;

#[test]
fn plan_memory_does_not_depend_on_the_cache_length() {
    let (_runtime, comms) = group(1, &CommConfig::default());
    let memory = |length| {
        let desc = AttentionDesc { max_kv_length: length, ..shape() };
        Plan::create(&comms[0], &desc).unwrap().memory().unwrap()
    };
    assert_eq!(memory(64), memory(i32::MAX));
}

/// Bytes of a float.
const FLOAT: u64 = 4;

/// A number in what a communicator says of itself.
fn described(comm: &Communicator, field: &str) -> u64 {
    let text = comm.describe().unwrap();
    let after = text.split_once(&format!("\"{field}\":")).unwrap_or_else(|| panic!("no {field} in {text}")).1;
    let digits = after.find(|c: char| !c.is_ascii_digit()).unwrap();
    after[..digits].parse().unwrap()
}

fn memory_of_all(comms: &[Communicator], desc: &AttentionDesc) -> Vec<PlanMemory> {
    plan_all(comms, desc).iter().map(|plan| plan.memory().unwrap()).collect()
}

#[test]
fn a_plans_window_is_its_communicators() {
    for world in [1, 2, 5] {
        let (_runtime, comms) = group(world, &CommConfig::default());
        for (comm, memory) in comms.iter().zip(memory_of_all(&comms, &shape())) {
            assert_eq!(memory.window, described(comm, "window_bytes"));
            // A slot for each parity of the epoch.
            assert_eq!(memory.window, 2 * described(comm, "capacity_bytes"));
        }
    }
}

#[test]
fn a_plans_workspace_is_that_of_its_backend_and_its_algorithm() {
    const THREADS: usize = 3;
    let config = CommConfig { threads_per_rank: THREADS, ..quick(Duration::from_secs(20)) };
    // 5 heads over 3 ranks: 1, 2 and 2.
    let base = AttentionDesc { max_batch: 4, max_query_tokens: 7, ..AttentionDesc::new(5, 5, 24, 64) };
    let (rows, row) = (7 * 5, 24 + 2);
    let (_runtime, comms) = group(3, &config);
    let local = AttentionDesc { output: OutputMode::Local, ..base };
    let alone = memory_of_all(&comms, &local)[0].workspace;
    // A row that was received and one that is merged, for each worker; the rank's partial.
    let partial = FLOAT * rows * row;
    let scratch = FLOAT * THREADS as u64 * 2 * 24 + partial;
    for algorithm in [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Tree, Algorithm::Allreduce3] {
        let desc = AttentionDesc { algorithm, ..base };
        let merge_only = memory_of_all(&comms, &AttentionDesc { kv_heads: 0, ..desc });
        let whole = memory_of_all(&comms, &desc);
        for (rank, (merge_only, whole)) in merge_only.iter().zip(&whole).enumerate() {
            let received = match algorithm {
                // The merged rows of this rank's heads.
                Algorithm::TwoShot => FLOAT * 7 * [1, 2, 2][rank] * row,
                Algorithm::Tree => partial,
                // The largest lse, and the denominators.
                Algorithm::Allreduce3 => FLOAT * 2 * rows,
                _ => 0,
            };
            assert_eq!(merge_only.workspace, scratch + received, "{algorithm:?} on rank {rank}");
            // What attends the shard is the same whatever becomes of its partial.
            let attends = whole.workspace - merge_only.workspace;
            assert_eq!(attends, alone - scratch, "{algorithm:?} on rank {rank}");
            assert!(attends > 0);
        }
    }
}
