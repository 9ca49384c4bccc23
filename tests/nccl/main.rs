//! Communicators over NCCL, without GPUs: the loader, the ranks' meeting, deadlines and errors, against a stand-in
//! (`mock_nccl/nccl.c`) over the driver without a GPU (`mock_driver/cuda.c`).

mod creation;
#[path = "../mock_driver/build.rs"]
mod driver;
mod plans;
mod stand_in;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Trial};
use treeattn::Error;
use treeattn::attention::{AttentionDesc, Dtype, OutputMode};
use treeattn::runtime::{CommConfig, Communicator, Device, DeviceKind, Plan, Runtime, RuntimeConfig};

use creation::*;
use plans::*;
use stand_in::{Mode, mode};

/// The longest that anything here may take; far more than it does.
const HANG: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_millis(300);

fn main() -> ExitCode {
    if let [_, role, rest @ ..] = &std::env::args().collect::<Vec<_>>()[..]
        && role == "--rank"
    {
        return rank_process(rest);
    }
    let mut arguments = Arguments::from_args();
    let with_mock = stand_in::is_ready() || stand_in::build();
    // The stand-in's mode is the same for all.
    arguments.test_threads = Some(1);
    let has_kernels = with_mock && {
        let comm = &Communicator::create_local(&runtime(), &[gpu(0)], &CommConfig::default()).unwrap()[0];
        Plan::create(comm, &AttentionDesc { kv_heads: 0, ..shape() }).is_ok()
    };
    let test = |name: &str, plans: bool, body: fn()| {
        Trial::test(name, move || {
            let result = driver::outcome(body);
            mode(Mode::None);
            result
        })
        .with_ignored_flag(!with_mock || (plans && !has_kernels))
    };
    libtest_mimic::run(
        &arguments,
        vec![
            test("names_differ", false, names_differ),
            test("libraries_that_do_not_fit_are_explained", false, libraries_that_do_not_fit_are_explained),
            test("ranks_meet_on_threads", false, ranks_meet_on_threads),
            test("ranks_meet_in_processes", false, ranks_meet_in_processes),
            test("setup_does_not_wait_in_the_driver_for_ranks_of_the_process", true, setup_beside_kernels),
            test("versions_that_differ_are_a_mismatch", false, versions_that_differ_are_a_mismatch),
            test("nodes_that_only_some_name_are_a_mismatch", false, nodes_that_only_some_name_are_a_mismatch),
            test("a_rank_that_does_not_come_is_a_timeout", false, a_rank_that_does_not_come_is_a_timeout),
            test("errors_of_nccl_are_told_in_its_words", false, errors_of_nccl_are_told_in_its_words),
            test("a_wrapped_communicator_is_left_alone", false, a_wrapped_communicator_is_left_alone),
            test("a_split_that_does_not_end_is_a_timeout", false, a_split_that_does_not_end_is_a_timeout),
            test("plans_of_different_shapes_are_a_mismatch", true, plans_of_different_shapes_are_a_mismatch),
            test("a_peer_that_does_not_plan_is_a_timeout", false, a_peer_that_does_not_plan_is_a_timeout),
            test("an_abort_ends_a_wait", false, an_abort_ends_a_wait),
            test("leaving_does_not_wait_for_peers", false, leaving_does_not_wait_for_peers),
            test("local_ranks_connect_for_allreduces", true, local_ranks_connect_for_allreduces),
            test("allreduces_that_cannot_be_are_explained", true, allreduces_that_cannot_be_are_explained),
        ],
    )
    .exit_code()
}

fn gpu(ordinal: i32) -> Device {
    Device { kind: DeviceKind::Cuda, ordinal }
}

fn runtime() -> Runtime {
    Runtime::new(RuntimeConfig::default()).unwrap()
}

fn shape() -> AttentionDesc {
    AttentionDesc {
        max_batch: 4,
        max_query_tokens: 4,
        k_dtype: Dtype::Bf16,
        v_dtype: Dtype::Bf16,
        output: OutputMode::Local,
        ..AttentionDesc::new(8, 2, 64, 1024)
    }
}

fn config(setup_timeout: Duration) -> CommConfig {
    CommConfig { setup_timeout, step_timeout: Duration::from_secs(2), ..Default::default() }
}

/// What `body` gives on the thread of each rank, within the time that nothing takes.
fn on_ranks<T: Send>(world: i32, body: impl Fn(i32) -> T + Sync) -> Vec<T> {
    let started = Instant::now();
    let results = std::thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> = (0..world).map(|rank| scope.spawn(move || body(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(started.elapsed() < HANG);
    results
}

fn group(world: i32, config: &CommConfig) -> Vec<Communicator> {
    let (runtime, id) = (runtime(), Communicator::nccl_unique_id(&runtime()).unwrap());
    on_ranks(world, |rank| Communicator::create_nccl(&runtime, &id, world, rank, gpu(rank), config).unwrap())
}

fn error<T>(result: Result<T, Error>) -> Error {
    result.err().expect("an error")
}
