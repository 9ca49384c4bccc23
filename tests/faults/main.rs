//! Faults injected into groups of ranks: in one process, over sockets between threads, between processes, and between
//! network namespaces. Whatever is done to a rank: no hang, no crash, no wrong output, the right code in time, and a fresh
//! communicator works in the same process afterwards.
//!
//! `TREEATTN_TEST=full` injects a thousand of each; `TREEATTN_SEED` sets the seed, `TREEATTN_CASE` runs one trial alone.

mod processes;
mod rank;
mod trial;

#[path = "../support/mesh.rs"]
mod mesh;
#[path = "../support/rng.rs"]
#[allow(dead_code)] // shared with the tests of numbers
mod rng;

use std::sync::Mutex;
use std::thread;

use treeattn::runtime::{CommConfig, Communicator, Plan, Runtime, RuntimeConfig};

use mesh::Mesh;
use rank::{CPU, Outcome, Way};
use trial::{Place, Tally, Trial};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}: found {text:?}")))
}

fn full() -> bool {
    std::env::var("TREEATTN_TEST").is_ok_and(|word| word == "full")
}

/// Runs `count` trials and sums up what happened.
fn trials(place: Place, count: u64, run: impl Fn(&Trial) -> Vec<Option<Outcome>>) {
    // Faults are about time: one trial at a time.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let seed = number("TREEATTN_SEED").unwrap_or(20_240_804);
    let seeds: Vec<u64> = match number("TREEATTN_CASE") {
        Some(case) => vec![case],
        None => (0..count).map(|index| rng::Rng::derive(seed ^ place as u64, index)).collect(),
    };
    let mut tally = Tally::default();
    for seed in seeds {
        let trial = Trial::new(place, seed);
        let outcomes = run(&trial);
        trial.judge(&outcomes, &mut tally);
    }
    tally.finish(place);
}

/// A group of ranks of one process, a thread each.
fn local(trial: &Trial) -> Vec<Option<Outcome>> {
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let group = |world: usize, config: &CommConfig| {
        let comms = Communicator::create_local(&runtime, &vec![CPU; world], config).unwrap();
        comms.into_iter().map(Some).map(Mutex::new).collect::<Vec<_>>()
    };
    let first = group(trial.world, &trial.config());
    let again = group(trial.survivors().len(), &trial.patient_config());
    let take = |comm: &Mutex<Option<Communicator>>| Ok(comm.lock().unwrap().take().expect("asked for once"));
    on_threads(trial.world, |rank| {
        let first = || take(&first[rank]);
        let again = |rank: usize| take(&again[rank]);
        rank::run(trial, rank, &Way { connect: &first, reconnect: &again, mesh: None })
    })
}

/// Ranks on threads that know each other by sockets only.
fn sockets(trial: &Trial) -> Vec<Option<Outcome>> {
    let pairs = if trial.seed.is_multiple_of(2) { mesh::unix_pairs } else { mesh::tcp_pairs };
    let (first, again) = (Mesh::threads(trial.world, pairs), Mesh::threads(trial.survivors().len(), pairs));
    on_threads(trial.world, |rank| {
        let connect = || mesh::connect(&first[rank], &trial.config());
        let reconnect = |rank: usize| mesh::connect(&again[rank], &trial.patient_config());
        rank::run(trial, rank, &Way { connect: &connect, reconnect: &reconnect, mesh: Some(&first[rank]) })
    })
}

fn on_threads(world: usize, run: impl Fn(usize) -> Outcome + Sync) -> Vec<Option<Outcome>> {
    thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = (0..world).map(|rank| scope.spawn(move || run(rank))).collect();
        threads.into_iter().map(|thread| Some(thread.join().expect("no panic in a rank"))).collect()
    })
}

#[test]
fn ranks_of_one_process() {
    trials(Place::Local, if full() { 1000 } else { 16 }, local);
}

#[test]
fn threads_over_sockets() {
    trials(Place::Sockets, if full() { 1000 } else { 20 }, sockets);
}

#[test]
fn processes_over_sockets() {
    trials(Place::Processes, if full() { 1000 } else { 16 }, |trial| processes::run(trial, &[]));
}

#[test]
fn processes_in_network_namespaces() {
    processes::enter_namespaces("namespaces_inside");
}

/// Not a test of its own: what `processes_in_network_namespaces` runs among its namespaces.
#[test]
fn namespaces_inside() {
    if processes::inside_namespaces() {
        trials(Place::Namespaces, if full() { 1000 } else { 8 }, processes::run_in_namespaces);
    }
}

/// Not a test of its own: a rank that is a process.
#[test]
fn child() {
    processes::child();
}

/// Without a fault all ranks finish, so that what the other tests see comes from their faults.
#[test]
fn nothing_happens_where_nothing_is_injected() {
    for place in [Place::Local, Place::Sockets] {
        for (world, algorithm) in (1..=4).flat_map(|world| trial::ALGORITHMS.map(|algorithm| (world, algorithm))) {
            let trial = Trial::quiet(place, world, algorithm);
            let outcomes = if place == Place::Local { local(&trial) } else { sockets(&trial) };
            for outcome in outcomes.into_iter().flatten() {
                assert!(outcome.error.is_none() && outcome.wrong.is_none() && outcome.fresh, "{outcome:?}");
                assert_eq!(outcome.done, trial.steps());
            }
        }
    }
    // And the comparison that ranks make accepts the answer of one rank, and refuses it as one of two.
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let comms =
        Communicator::create_local(&runtime, &[CPU], &Trial::quiet(Place::Local, 1, trial::Algorithm::Auto).config())
            .unwrap();
    let plan = Plan::create(&comms[0], &rank::shape(trial::Algorithm::Auto)).unwrap();
    let found = rank::decode(&plan, 0, 2).unwrap();
    assert!(rank::right(&found, 1, 2) && !rank::right(&found, 2, 2));
}
