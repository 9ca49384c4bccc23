//! Steps over a transport that are put on streams.

use std::thread;
use std::time::{Duration, Instant};

use treeattn::ErrorKind;
use treeattn::runtime::{Communicator, Plan, Runtime, RuntimeConfig, Stream};

use super::mesh::{LONG, Mesh, unix_pairs};
use super::ranks::*;
use super::watchdog::Watchdog;

/// The deadline of steps: not reached, unless ranks wait for each other on one stream.
const DEADLINE: Duration = Duration::from_secs(10);

#[test]
fn callbacks_run_on_stream_threads_only_where_allowed() {
    let meshes = Mesh::threads(1, unix_pairs);
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let stream = Stream::new(&runtime, CPU).unwrap();
    for allowed in [false, true] {
        let transport = meshes[0].transport(allowed);
        // SAFETY: the mesh outlives the communicator.
        let comm =
            unsafe { Communicator::create_from_transport(&runtime, transport, 1, 0, CPU, &config(LONG)) }.unwrap();
        let plan = Plan::create(&comm, &shape(1)).unwrap();
        let result = decode(&plan, 0, 1, Some(&stream));
        assert_eq!(result.is_ok(), allowed);
        if let Err(error) = result {
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.message().starts_with("stream:"), "{error}");
        }
    }
}

/// The plans of ranks of one communicator over these meshes, all in this process, each by a runtime of its own.
fn plans(meshes: &[Mesh]) -> Vec<Plan> {
    thread::scope(|scope| {
        let make = |mesh: &Mesh| {
            let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
            let (transport, world, rank) = (mesh.transport(true), mesh.world() as i32, mesh.rank as i32);
            // SAFETY: the mesh outlives the communicator, which lives as long as the plan.
            let comm = unsafe {
                Communicator::create_from_transport(&runtime, transport, world, rank, CPU, &config(DEADLINE)).unwrap()
            };
            Plan::create(&comm, &shape(1)).unwrap()
        };
        let threads: Vec<_> = meshes.iter().map(|mesh| scope.spawn(move || make(mesh))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Ranks of one communicator on one stream: the second is refused while the first waits for it, and the first goes on.
#[test]
fn a_stream_on_which_another_rank_of_the_communicator_waits_is_refused() {
    let _watchdog = Watchdog::new("two ranks on one stream", LONG);
    let meshes = [Mesh::threads(2, unix_pairs), Mesh::threads(2, unix_pairs)];
    let plans = [plans(&meshes[0]), plans(&meshes[1])];
    let mut steps = [0, 1].map(|comm| [0, 1].map(|rank| Step::new(&plans[comm][rank], rank, 1, 1)));
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let streams = [0, 1].map(|_| Stream::new(&runtime, CPU).unwrap());
    let mut issue = |comm: usize, rank: usize, stream: usize| {
        // SAFETY: the steps outlive the streams, which end what is enqueued, and are looked at after that alone.
        unsafe { steps[comm][rank].issue(&plans[comm][rank], Some(&streams[stream])) }
    };
    let began = Instant::now();
    issue(0, 0, 0).unwrap();
    let error = issue(0, 1, 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    let text = "stream: found one on which rank 0 of this communicator waits for rank 1, wanted a stream of its own for each \
                rank of a communicator";
    assert_eq!(error.message(), text);
    // A rank of another communicator may have it: the step before is not its peer's.
    issue(1, 1, 0).unwrap();
    issue(0, 1, 1).unwrap();
    issue(1, 0, 1).unwrap();
    streams.iter().for_each(|stream| stream.synchronize().unwrap());
    assert!(began.elapsed() < DEADLINE, "{:?}", began.elapsed());
    let [first, second] = steps.map(|steps| steps.map(|step| (step.out, step.lse)));
    assert_eq!(first, second);
    assert_eq!(first[0], first[1]);
    assert_eq!(first[0], in_one_process(&shape(1), &[0, 0], 1)[0]);
}

/// What is done waits for nobody: ranks that take turns may share a stream.
#[test]
fn a_stream_serves_ranks_of_a_communicator_one_after_the_other() {
    let _watchdog = Watchdog::new("two ranks that take turns", LONG);
    let meshes = Mesh::threads(2, unix_pairs);
    let plans = plans(&meshes);
    let mut steps = [0, 1].map(|rank| Step::new(&plans[rank], rank, 1, 1));
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let streams = [0, 1].map(|_| Stream::new(&runtime, CPU).unwrap());
    for turn in 0..4 {
        for (rank, step) in steps.iter_mut().enumerate() {
            // SAFETY: the steps outlive the streams, which end what is enqueued, and are left alone until that is done.
            unsafe { step.issue(&plans[rank], Some(&streams[(rank + turn) % 2])).unwrap() };
        }
        streams.iter().for_each(|stream| stream.synchronize().unwrap());
    }
}
