//! What steps over a transport give: the bits of a local group.

use std::thread;

use treeattn::ErrorKind;
use treeattn::attention::{Algorithm, AttentionDesc, OutputMode, QueryInput};
use treeattn::runtime::{CommConfig, Communicator, Plan, Runtime, RuntimeConfig, Transport};

use super::mesh::{LONG, Mesh, connect, unix_pairs};
use super::ranks::*;
use super::watchdog::Watchdog;

#[test]
fn every_algorithm_gives_the_bits_of_a_local_group_over_any_nodes() {
    let mut state = 5u64;
    let mut draw = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    let full = std::env::var("TREEATTN_TEST").is_ok_and(|word| word == "full");
    let worlds: &[usize] = if full { &[2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 16, 24, 33] } else { &[2, 3, 5, 8, 13] };
    for &world in worlds {
        for algorithm in ALGORITHMS {
            // Group 0 would be the machine, on all ranks.
            let kinds = 1 + draw(world);
            let groups: Vec<i32> = (0..world).map(|_| 1 + draw(kinds) as i32).collect();
            let tokens = [1, 2, 300][draw(3)];
            let output = [OutputMode::Replicated, OutputMode::Scattered][draw(2)];
            let query_input = QueryInput::ALL[draw(2)];
            let desc = AttentionDesc { output, query_input, algorithm, ..shape(tokens as i32) };
            let wanted = in_one_process(&desc, &groups, tokens);
            let _watchdog = Watchdog::new("ranks over nodes", 3 * LONG);
            let meshes = Mesh::threads(world, unix_pairs);
            let found: Vec<_> = thread::scope(|scope| {
                let threads: Vec<_> = meshes
                    .iter()
                    .map(|mesh| {
                        let config = CommConfig { node_group: groups[mesh.rank], ..config(LONG) };
                        let desc = &desc;
                        scope.spawn(move || {
                            let plan = Plan::create(&connect(mesh, &config).unwrap(), desc).unwrap();
                            assert_eq!(plan.stats().unwrap().algorithm, algorithm);
                            decode(&plan, mesh.rank, tokens, None).unwrap()
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(found, wanted, "{algorithm:?}, groups {groups:?}, {tokens} tokens, {output:?}");
        }
    }
}

#[test]
fn a_transport_gives_the_bits_of_a_local_group() {
    // 1 token travels with the header; 300 tokens need a second message, and 4,000 several chunks.
    for (world, tokens) in [(1, 1), (2, 1), (3, 300), (5, 2), (2, 5000)] {
        for (output, query_input) in [OutputMode::Replicated, OutputMode::Scattered].into_iter().zip(QueryInput::ALL) {
            let desc = AttentionDesc { output, query_input, ..shape(tokens) };
            let wanted = in_one_process(&desc, &vec![0; world], tokens as usize);
            let found = on_ranks(world, &config(LONG), |mesh, comm| {
                let plan = Plan::create(comm, &desc).unwrap();
                let first = decode(&plan, mesh.rank, tokens as usize, None).unwrap();
                assert_eq!(first, decode(&plan, mesh.rank, tokens as usize, None).unwrap());
                assert_eq!(comm.status().unwrap().error, None);
                first
            });
            assert_eq!(found, wanted, "{world} ranks, {tokens} tokens, {output:?}");
        }
    }
}

#[test]
fn algorithms_that_need_sendrecv_say_so_where_there_is_none() {
    let meshes = Mesh::threads(2, unix_pairs);
    thread::scope(|scope| {
        for mesh in &meshes {
            scope.spawn(|| {
                let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
                let transport = Transport { sendrecv: None, ..mesh.transport(false) };
                let rank = mesh.rank as i32;
                // SAFETY: the mesh outlives the communicator.
                let comm =
                    unsafe { Communicator::create_from_transport(&runtime, transport, 2, rank, CPU, &config(LONG)) }
                        .unwrap();
                let described = comm.describe().unwrap();
                for algorithm in ALGORITHMS {
                    let made = Plan::create(&comm, &AttentionDesc { algorithm, ..shape(1) });
                    let name = format!("{{\"name\":\"{}\",", algorithm.name());
                    assert_eq!(described.contains(&name), made.is_ok(), "{name} in {described}");
                    match algorithm {
                        Algorithm::Tree | Algorithm::Ring => {
                            let error = made.err().unwrap();
                            assert_eq!(error.kind(), ErrorKind::Unsupported);
                            let text = error.message();
                            assert!(text.starts_with("algorithm: found ") && text.contains("sendrecv"), "{error}");
                        }
                        _ => drop(decode(&made.unwrap(), mesh.rank, 1, None).unwrap()),
                    }
                }
            });
        }
    });
}
