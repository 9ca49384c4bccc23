//! Every wait ends: by what it waits for, by its own deadline, by an abort, by a rank that leaves.

use std::thread;
use std::time::{Duration, Instant};

use treeattn::attention::{AttentionDesc, QueryInput};
use treeattn::runtime::{CommConfig, Communicator, Plan, Stream};
use treeattn::{ErrorKind, Result};

use super::group::*;

/// The deadline of waits that are to reach it.
const DEADLINE: Duration = Duration::from_millis(1500);
/// When such a wait is over even on a busy machine; below twice the deadline.
const LATE: Duration = Duration::from_millis(2900);
/// When a wait that something ends is over even on a busy machine; far below [`HANG`], its deadline.
const SOON: Duration = Duration::from_secs(10);

/// Waits by other deadlines are too short or too long to pass for this one.
fn step_deadline() -> CommConfig {
    CommConfig { setup_timeout: HANG, ..quick(DEADLINE) }
}

fn setup_deadline() -> CommConfig {
    CommConfig { setup_timeout: DEADLINE, ..quick(HANG) }
}

/// Asserts that a wait ended by its deadline, and neither before nor long after.
fn assert_timed_out(what: &str, error: &treeattn::Error, took: Duration) {
    assert_eq!(error.kind(), ErrorKind::Timeout, "{what}: {error}");
    assert!((DEADLINE..LATE).contains(&took), "{what} took {took:?}");
}

/// Runs one step of a rank to its end.
fn step(plan: &Plan, rank: usize, stream: Option<&Stream>) -> Result<()> {
    let mut shard = Shard::new(plan.desc(), 1, 5, rank as u32);
    // SAFETY: the shard outlives the step, which is waited for.
    unsafe { plan.decode(&shard.args(1), stream)? };
    stream.map_or(Ok(()), Stream::synchronize)
}

#[test]
fn a_step_without_a_rank_ends_by_its_deadline_by_any_algorithm() {
    on_threads(4 * ALGORITHMS.len(), |i| {
        let (algorithm, query_input, streamed) = (ALGORITHMS[i / 4], QueryInput::ALL[i / 2 % 2], i % 2 == 1);
        let (runtime, comms) = group(3, &step_deadline());
        let plans = plan_all(&comms, &AttentionDesc { algorithm, query_input, ..shape() });
        let stream = streamed.then(|| Stream::new(&runtime, CPU).unwrap());
        let began = Instant::now();
        let error = step(&plans[0], 0, stream.as_ref()).unwrap_err();
        assert_timed_out(&format!("{algorithm:?}, {query_input:?}, stream {streamed}"), &error, began.elapsed());
    });
}

#[test]
fn steps_that_wait_on_a_stream_end_by_the_deadline_of_the_first() {
    let (runtime, comms) = group(2, &step_deadline());
    let plans = plan_all(&comms, &shape());
    let stream = Stream::new(&runtime, CPU).unwrap();
    let mut shards: Vec<_> = (0..10).map(|_| Shard::new(plans[0].desc(), 1, 5, 0)).collect();
    let began = Instant::now();
    for shard in &mut shards {
        // SAFETY: the shards outlive the steps, which are waited for.
        unsafe { plans[0].decode(&shard.args(1), Some(&stream)).unwrap() };
    }
    let error = stream.synchronize().unwrap_err();
    assert_timed_out("ten steps", &error, began.elapsed());
    assert!(shards.iter().all(|shard| shard.out.iter().all(|x| x.is_nan())));
}

#[test]
fn a_plan_without_a_rank_ends_by_the_setup_deadline() {
    let (_runtime, comms) = group(2, &setup_deadline());
    let began = Instant::now();
    let error = Plan::create(&comms[0], &shape()).err().unwrap();
    assert_timed_out("a plan", &error, began.elapsed());
    assert!(error.message().contains("setup_timeout"), "{error}");
}

#[test]
fn a_rank_that_plans_after_the_step_deadline_is_waited_for() {
    let config = CommConfig { setup_timeout: HANG, ..quick(Duration::from_millis(100)) };
    let (_runtime, comms) = group(2, &config);
    on_threads(2, |r| {
        if r == 1 {
            thread::sleep(Duration::from_millis(400));
        }
        Plan::create(&comms[r], &shape()).unwrap();
    });
}

#[test]
fn a_full_stream_refuses_a_step_by_its_deadline() {
    let (runtime, comms) = group(2, &quick(HANG));
    let blocker = plan_all(&comms, &shape());
    let own = Communicator::create_local(&runtime, &[CPU], &step_deadline()).unwrap();
    let plan = Plan::create(&own[0], &shape()).unwrap();
    let stream = Stream::new(&runtime, CPU).unwrap();
    let (mut first, mut shard) = (Shard::new(&shape(), 1, 5, 0), Shard::new(&shape(), 1, 5, 0));
    // SAFETY: the shards outlive the steps, which are waited for.
    unsafe { blocker[0].decode(&first.args(1), Some(&stream)).unwrap() };
    let began = Instant::now();
    let (error, took) = loop {
        let asked = Instant::now();
        // SAFETY: as above; all steps write the same values.
        if let Err(error) = unsafe { plan.decode(&shard.args(1), Some(&stream)) } {
            break (error, asked.elapsed());
        }
        assert!(began.elapsed() < SOON, "a stream without end");
    };
    assert_timed_out("a full stream", &error, took);
    assert!(error.message().contains("1024 jobs are queued"), "{error}");
    comms[1].abort().unwrap();
    assert_eq!(stream.synchronize().unwrap_err().kind(), ErrorKind::Aborted);
    assert!(shard.lse.iter().all(|lse| lse.is_finite()), "what was queued is done");
}

/// What another thread does to end a wait.
#[derive(Clone, Copy, Debug)]
enum End {
    Abort,
    PeerAborts,
    PeerLeaves,
}

#[test]
fn an_abort_and_a_rank_that_leaves_end_every_wait_at_once() {
    let ends = [End::Abort, End::PeerAborts, End::PeerLeaves];
    let waits: Vec<_> = ALGORITHMS.into_iter().map(Some).chain([None]).collect();
    on_threads(2 * ends.len() * waits.len(), |i| {
        let (end, streamed, algorithm) = (ends[i % 3], i / 3 % 2 == 1, waits[i / 6]);
        let what = format!("{end:?}, stream {streamed}, {algorithm:?}");
        let (runtime, comms) = group(2, &CommConfig { setup_timeout: HANG, ..quick(HANG) });
        let plans = algorithm.map(|algorithm| plan_all(&comms, &AttentionDesc { algorithm, ..shape() }));
        let stream = streamed.then(|| Stream::new(&runtime, CPU).unwrap());
        let (error, ended) = thread::scope(|scope| {
            let waiting = scope.spawn(|| match &plans {
                Some(plans) => step(&plans[0], 0, stream.as_ref()).unwrap_err(),
                // The wait of a plan for its peers.
                None => Plan::create(&comms[0], &shape()).err().unwrap(),
            });
            thread::sleep(Duration::from_millis(100));
            let ended = Instant::now();
            match end {
                End::Abort => comms[0].abort().unwrap(),
                End::PeerAborts => comms[1].abort().unwrap(),
                End::PeerLeaves => comms[1].close(),
            }
            (waiting.join().unwrap(), ended)
        });
        assert!(ended.elapsed() < SOON, "{what} took {:?}", ended.elapsed());
        let wanted = match end {
            End::Abort => (ErrorKind::Aborted, Some(0)),
            End::PeerAborts => (ErrorKind::Aborted, Some(1)),
            End::PeerLeaves => (ErrorKind::PeerLost, Some(1)),
        };
        assert_eq!((error.kind(), error.rank()), wanted, "{what}: {error}");
        if !matches!(end, End::PeerLeaves) {
            assert_eq!(comms[1].status().unwrap().error.unwrap().kind(), ErrorKind::Aborted, "{what}");
        }
    });
    assert_works(2);
}

#[test]
fn waiting_for_a_plan_ends_with_its_last_step_and_by_its_deadline() {
    let (runtime, comms) = group(2, &quick(HANG));
    let plans = plan_all(&comms, &shape());
    let streams: Vec<_> = comms.iter().map(|_| Stream::new(&runtime, CPU).unwrap()).collect();
    let mut shards: Vec<_> = (0..2).map(|r| Shard::new(&shape(), 1, 5, r)).collect();
    // SAFETY: the shards outlive the steps, which are waited for.
    unsafe { plans[0].decode(&shards[0].args(1), Some(&streams[0])).unwrap() };
    let began = Instant::now();
    assert!(!plans[0].wait(DEADLINE), "its step waits for rank 1");
    assert!((DEADLINE..LATE).contains(&began.elapsed()), "{:?}", began.elapsed());
    let ended = thread::scope(|scope| {
        let waiting = scope.spawn(|| plans[0].wait(HANG));
        thread::sleep(Duration::from_millis(100));
        // SAFETY: as above.
        unsafe { plans[1].decode(&shards[1].args(1), Some(&streams[1])).unwrap() };
        let ended = Instant::now();
        assert!(waiting.join().unwrap());
        ended.elapsed()
    });
    assert!(ended < SOON, "{ended:?}");
    streams.iter().for_each(|stream| stream.synchronize().unwrap());
}

#[test]
fn null_streams_from_one_thread_time_out_and_say_why() {
    let (_runtime, comms) = group(4, &quick(Duration::from_millis(100)));
    let desc = shape();
    let plans = plan_all(&comms, &desc);
    let mut shard = Shard::new(&desc, 1, 6, 0);
    // SAFETY: the shard outlives the blocking call.
    let error = unsafe { plans[0].decode(&shard.args(1), None) }.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.message().contains("thread or a CPU stream each"), "{error}");
    assert!(error.rank().is_some_and(|rank| rank > 0), "{error}");
    assert!(shard.out[..64].iter().all(|x| x.is_nan()), "a failed step leaves NaN");
    assert_works(2);
}

#[test]
fn a_rank_that_never_comes_is_named_and_the_process_goes_on() {
    let (_runtime, comms) = group(3, &quick(Duration::from_millis(150)));
    let desc = shape();
    let plans = plan_all(&comms, &desc);
    let errors = on_threads(2, |r| {
        let mut shard = Shard::new(&desc, 1, 5, r as u32);
        // SAFETY: the shard outlives the blocking call.
        unsafe { plans[r].decode(&shard.args(1), None) }.unwrap_err()
    });
    for error in errors {
        assert_eq!((error.kind(), error.rank()), (ErrorKind::Timeout, Some(2)), "{error}");
    }
    // Broken for good, on the late rank too.
    let mut shard = Shard::new(&desc, 1, 5, 2);
    // SAFETY: the shard outlives the blocking call.
    let error = unsafe { plans[2].decode(&shard.args(1), None) }.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert_works(3);
}
