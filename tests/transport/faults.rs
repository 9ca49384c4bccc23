//! Ranks over a transport that differ, abort or fail.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use treeattn::ErrorKind;
use treeattn::attention::{Algorithm, AttentionDesc};
use treeattn::cpu::Isa;
use treeattn::runtime::{CommConfig, Communicator, Plan, Runtime, RuntimeConfig};

use super::mesh::{FAIL, LIE, LONG, Mesh, connect, connect_as, unix_pairs};
use super::ranks::*;

/// Every rank of a ring works out all partials, and slices of other sizes would round otherwise.
#[test]
fn a_ring_wants_equally_many_threads_on_every_rank() {
    let meshes = Mesh::threads(3, unix_pairs);
    thread::scope(|scope| {
        for mesh in &meshes {
            scope.spawn(move || {
                let config = CommConfig { threads_per_rank: if mesh.rank == 2 { 2 } else { 1 }, ..config(LONG) };
                let comm = connect(mesh, &config).unwrap();
                let desc = AttentionDesc { algorithm: Algorithm::Ring, ..shape(1) };
                let error = Plan::create(&comm, &desc).err().unwrap();
                assert_eq!((error.kind(), error.rank()), (ErrorKind::Mismatch, Some(2)));
                assert!(error.message().starts_with("threads_per_rank: found 1 on ranks [0, 1] and 2"), "{error}");
                Plan::create(&comm, &AttentionDesc { algorithm: Algorithm::Tree, ..shape(1) }).unwrap();
            });
        }
    });
}

/// The same for instruction sets.
#[test]
fn a_ring_wants_one_instruction_set_on_every_rank() {
    if Isa::best().name() == "scalar" {
        return;
    }
    let meshes = Mesh::threads(3, unix_pairs);
    thread::scope(|scope| {
        for mesh in &meshes {
            scope.spawn(move || {
                let cpu_isa = (mesh.rank == 2).then(|| "scalar".to_string());
                let runtime = Runtime::new(RuntimeConfig { cpu_isa }).unwrap();
                let (transport, rank) = (mesh.transport(false), mesh.rank as i32);
                // SAFETY: the mesh outlives the communicator.
                let comm = unsafe {
                    Communicator::create_from_transport(&runtime, transport, 3, rank, CPU, &config(LONG)).unwrap()
                };
                let desc = AttentionDesc { algorithm: Algorithm::Ring, ..shape(1) };
                let error = Plan::create(&comm, &desc).err().unwrap();
                assert_eq!((error.kind(), error.rank()), (ErrorKind::Mismatch, Some(2)));
                assert!(error.message().starts_with("cpu_isa: found"), "{error}");
                Plan::create(&comm, &AttentionDesc { algorithm: Algorithm::Tree, ..shape(1) }).unwrap();
            });
        }
    });
}

#[test]
fn ranks_that_differ_are_named() {
    for kind in [ErrorKind::Desync, ErrorKind::Mismatch] {
        let errors = on_ranks(3, &config(LONG), |mesh, comm| {
            let odd = mesh.rank == 2;
            if kind == ErrorKind::Mismatch {
                let desc = AttentionDesc { causal: odd, ..shape(4) };
                return Plan::create(comm, &desc).err().unwrap();
            }
            let plan = Plan::create(comm, &shape(4)).unwrap();
            decode(&plan, mesh.rank, if odd { 2 } else { 1 }, None).err().unwrap()
        });
        for error in errors {
            assert_eq!((error.kind(), error.rank()), (kind, Some(2)), "{error}");
        }
    }
}

#[test]
fn abort_ends_a_callback() {
    let undone = AtomicUsize::new(1);
    on_ranks(2, &config(LONG), |mesh, comm| {
        let _undone = (mesh.rank == 0).then(|| Undone(&undone));
        let plan = Plan::create(comm, &shape(1)).unwrap();
        if mesh.rank == 0 {
            let began = Instant::now();
            thread::scope(|scope| {
                scope.spawn(|| {
                    thread::sleep(Duration::from_millis(100));
                    comm.abort().unwrap();
                });
                let error = decode(&plan, 0, 1, None).err().unwrap();
                assert_eq!(error.kind(), ErrorKind::Aborted, "{error}");
                assert!(began.elapsed() < LONG / 3, "{:?}", began.elapsed());
            });
        } else {
            // Its sockets stay open, so that nothing but the abort ends the callback.
            wait_for_all(&undone);
        }
    });
}

#[test]
fn a_failing_callback_is_a_transport_error_and_the_process_goes_on() {
    for round in 0..20 {
        on_ranks(2, &config(LONG), |mesh, comm| {
            let plan = Plan::create(comm, &shape(1)).unwrap();
            for _ in 0..round {
                decode(&plan, mesh.rank, 1, None).unwrap();
            }
            mesh.fault.store(FAIL, Ordering::Relaxed);
            let error = decode(&plan, mesh.rank, 1, None).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Transport, "{error}");
            assert!(error.message().contains("returned 4242"), "{error}");
        });
    }
}

/// A ring takes in as much as it has room for, whatever it was told to expect.
#[test]
fn a_ring_is_not_told_of_more_keys_than_a_plan_holds() {
    on_ranks(2, &config(LONG), |mesh, comm| {
        let plan = Plan::create(comm, &AttentionDesc { algorithm: Algorithm::Ring, ..shape(1) }).unwrap();
        decode(&plan, mesh.rank, 1, None).unwrap();
        mesh.fault.store(LIE, Ordering::Relaxed);
        let error = decode(&plan, mesh.rank, 1, None).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Desync, "{error}");
        let found = format!("kv_length: rank {} announced 1000000, above the plan's ", 1 - mesh.rank);
        assert!(error.message().contains(&found), "{error}");
    });
}

#[test]
fn ranks_out_of_order_are_refused() {
    let errors: Vec<_> = {
        let meshes = Mesh::threads(2, unix_pairs);
        thread::scope(|scope| {
            let threads: Vec<_> = meshes
                .iter()
                .map(|mesh| scope.spawn(|| connect_as(mesh, 1 - mesh.rank, &config(LONG)).err().unwrap()))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    };
    assert!(errors.iter().all(|error| error.kind() == ErrorKind::Mismatch), "{errors:?}");
}

#[test]
fn a_step_that_differs_in_one_thing_is_a_desync_by_any_algorithm() {
    for algorithm in ALGORITHMS {
        // Another plan of the same shape, fewer query tokens, or fewer sequences with as many of them.
        for difference in ["plan", "tokens", "batch"] {
            let found = on_ranks(2, &config(LONG), |mesh, comm| {
                let desc = AttentionDesc { algorithm, ..shape(4) };
                let (plan, other) = (Plan::create(comm, &desc).unwrap(), Plan::create(comm, &desc).unwrap());
                match difference {
                    _ if mesh.rank == 0 => decode_as(&plan, 0, 2, 4, None),
                    "plan" => decode_as(&other, 1, 2, 4, None),
                    "tokens" => decode_as(&plan, 1, 2, 2, None),
                    _ => decode_as(&plan, 1, 1, 4, None),
                }
                .map(drop)
            });
            for (rank, result) in found.into_iter().enumerate() {
                let told = format!("{algorithm:?}, another {difference}, rank {rank}: {result:?}");
                let Err(error) = result else { panic!("{told}") };
                assert_eq!((error.kind(), error.rank()), (ErrorKind::Desync, Some(1 - rank as i32)), "{told}");
                let decode = |[plan, batch, tokens]: [i32; 3]| {
                    format!("a decode of plan {plan} with batch {batch}, query_tokens {tokens}")
                };
                let odd = match difference {
                    "plan" => [2, 2, 4],
                    "tokens" => [1, 2, 2],
                    _ => [1, 1, 4],
                };
                let (mine, theirs) = if rank == 0 { ([1, 2, 4], odd) } else { (odd, [1, 2, 4]) };
                let says = [format!("found {}", decode(theirs)), format!("wanted {}", decode(mine))];
                assert!(says.iter().all(|text| error.message().contains(text)), "{told}, wanted {says:?}");
            }
        }
    }
}
