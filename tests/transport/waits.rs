//! Every wait for a callback ends by its own deadline.

use std::ffi::c_void;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use treeattn::ErrorKind;
use treeattn::attention::{Algorithm, AttentionDesc};
use treeattn::runtime::{CommConfig, Communicator, Plan, Runtime, RuntimeConfig, Transport};

use super::mesh::{LONG, Mesh, STUCK, WHOLE, connect, unix_pairs};
use super::ranks::*;
use super::watchdog::Watchdog;

/// The deadline of waits that are to reach it.
const DEADLINE: Duration = Duration::from_millis(1500);
/// When such a wait is over even on a busy machine; below twice the deadline.
const LATE: Duration = Duration::from_millis(2900);

/// Asserts that a wait ended by its deadline, and neither before nor long after.
fn assert_timed_out(what: &str, error: &treeattn::Error, took: Duration) {
    assert_eq!(error.kind(), ErrorKind::Timeout, "{what}: {error}");
    assert!((DEADLINE..LATE).contains(&took), "{what} took {took:?}");
}

/// Runs each on a thread of its own, for they only wait.
fn together(cases: impl IntoIterator<Item = impl FnOnce() + Send>) {
    thread::scope(|scope| cases.into_iter().for_each(|case| drop(scope.spawn(case))));
}

#[test]
fn a_rank_that_never_comes_ends_the_step_by_its_deadline() {
    // Callbacks that look at the time they are given, or at the abort word alone.
    let cases = ALGORITHMS.into_iter().flat_map(|algorithm| [(algorithm, 0), (algorithm, 1)]);
    together(cases.map(|(algorithm, deaf)| {
        move || {
            let undone = AtomicUsize::new(2);
            on_ranks(3, &config(DEADLINE), |mesh, comm| {
                let _undone = (mesh.rank != 1).then(|| Undone(&undone));
                let plan = Plan::create(comm, &AttentionDesc { algorithm, ..shape(1) }).unwrap();
                if mesh.rank == 1 {
                    // The others would see its sockets close.
                    return wait_for_all(&undone);
                }
                mesh.deaf.store(deaf, Ordering::Relaxed);
                let began = Instant::now();
                let error = decode(&plan, mesh.rank, 1, None).err().unwrap();
                let took = began.elapsed();
                let what = format!("{algorithm:?}, deaf {deaf}, rank {}", mesh.rank);
                assert_timed_out(&what, &error, took);
                assert_eq!(comm.status().unwrap().error.unwrap().kind(), error.kind(), "{what}");
                assert_eq!(decode(&plan, mesh.rank, 1, None).err().unwrap().kind(), error.kind(), "{what}");
            });
        }
    }));
}

#[test]
fn a_rank_that_stops_within_the_step_ends_it_by_its_deadline() {
    let cases = [Algorithm::Tree, Algorithm::Ring].into_iter().flat_map(|algorithm| [(algorithm, 0), (algorithm, 1)]);
    together(cases.map(|(algorithm, deaf)| {
        move || {
            let undone = AtomicUsize::new(3);
            on_ranks(3, &config(DEADLINE), |mesh, comm| {
                let own = Undone(&undone);
                let plan = Plan::create(comm, &AttentionDesc { algorithm, ..shape(1) }).unwrap();
                decode(&plan, mesh.rank, 1, None).unwrap();
                mesh.deaf.store(deaf, Ordering::Relaxed);
                mesh.fault.store(if mesh.rank == 1 { STUCK } else { WHOLE }, Ordering::Relaxed);
                let began = Instant::now();
                let error = decode(&plan, mesh.rank, 1, None).err().unwrap();
                let what = format!("{algorithm:?}, deaf {deaf}, rank {}", mesh.rank);
                assert_timed_out(&what, &error, began.elapsed());
                if algorithm == Algorithm::Ring {
                    assert_eq!(error.rank(), Some((mesh.rank as i32 + 1) % 3), "{what}: {error}");
                }
                drop(own);
                wait_for_all(&undone);
            });
        }
    }));
}

#[test]
fn a_rank_that_never_comes_ends_what_is_created_by_the_setup_deadline() {
    let config = CommConfig { step_timeout: LONG, setup_timeout: DEADLINE, ..config(LONG) };
    let config = &config;
    together([0, 1].map(|deaf| {
        move || {
            let meshes = Mesh::threads(2, unix_pairs);
            meshes[0].deaf.store(deaf, Ordering::Relaxed);
            let _watchdog = Watchdog::new("a communicator without a peer", LONG);
            let began = Instant::now();
            let error = connect(&meshes[0], config).err().unwrap();
            assert_timed_out(&format!("a communicator, deaf {deaf}"), &error, began.elapsed());
        }
    }));
    together([0, 1].map(|deaf| {
        move || {
            let undone = AtomicUsize::new(1);
            on_ranks(2, config, |mesh, comm| {
                if mesh.rank == 1 {
                    return wait_for_all(&undone);
                }
                let _undone = Undone(&undone);
                mesh.deaf.store(deaf, Ordering::Relaxed);
                let began = Instant::now();
                let error = Plan::create(comm, &shape(1)).err().unwrap();
                assert_timed_out(&format!("a plan, deaf {deaf}"), &error, began.elapsed());
            });
        }
    }));
}

#[test]
fn a_rank_that_comes_to_create_after_the_step_deadline_is_waited_for() {
    let config = config(Duration::from_millis(100));
    let _watchdog = Watchdog::new("late ranks", LONG);
    let meshes = Mesh::threads(2, unix_pairs);
    thread::scope(|scope| {
        for mesh in &meshes {
            let config = &config;
            scope.spawn(move || {
                let late = || thread::sleep(Duration::from_millis(400 * mesh.rank as u64));
                late();
                let comm = connect(mesh, config).unwrap();
                late();
                Plan::create(&comm, &shape(1)).unwrap();
            });
        }
    });
}

/// How long the callback below takes.
const SLOW: Duration = Duration::from_millis(20);

/// An allgather of one rank, which notes the time that it is given.
///
/// # Safety
/// `ctx` is a live list; `send` is good for reading `bytes` bytes, and `recv` for writing as many.
unsafe extern "C" fn slow_gather(
    ctx: *mut c_void,
    send: *const c_void,
    recv: *mut c_void,
    bytes: usize,
    timeout_ns: i64,
    _abort: *const i32,
) -> i32 {
    // SAFETY: the context is the list of the test below, which outlives the communicator.
    unsafe { &*ctx.cast::<Mutex<Vec<i64>>>() }.lock().unwrap().push(timeout_ns);
    thread::sleep(SLOW);
    // SAFETY: the library gives `bytes` bytes on both sides, which do not overlap.
    unsafe { std::ptr::copy_nonoverlapping(send.cast::<u8>(), recv.cast::<u8>(), bytes) };
    0
}

#[test]
fn a_callback_is_given_what_the_ones_before_have_left_of_the_deadline() {
    let given: Mutex<Vec<i64>> = Mutex::default();
    let transport = Transport {
        ctx: (&raw const given).cast_mut().cast(),
        allgather: slow_gather,
        sendrecv: None,
        stream_threads: false,
    };
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    // SAFETY: the callback does what an allgather of one rank does; the list outlives the communicator.
    drop(unsafe { Communicator::create_from_transport(&runtime, transport, 1, 0, CPU, &config(LONG)) }.unwrap());
    let given = given.into_inner().unwrap();
    // What ranks tell each other goes in two messages: its sizes first.
    assert!(given[0] as u128 <= LONG.as_nanos(), "{given:?}");
    assert!(given[1] as u128 + SLOW.as_nanos() <= given[0] as u128, "{given:?}");
}
