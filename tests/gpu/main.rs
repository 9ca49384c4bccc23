//! Tests that need a GPU: *ignored* in the summary where there is none, or where the build carries no kernels for it.
//!
//! `TREEATTN_TEST=full` runs the acceptance counts; `TREEATTN_SEED`, `TREEATTN_CASE` and `TREEATTN_TRACE` are as in the
//! tests of numbers; `TREEATTN_TEST_DATA` is the folder of the real inputs. `tests/gpu/pack.sh` makes a folder of all this
//! that runs where there is no Rust.

mod allreduce;
mod driver;
mod group;
mod mirror;
mod numerics;
#[allow(dead_code)] // some tests are for the emulator
mod processes;
mod ranks;
mod space;
mod streams;
#[path = "../support/mod.rs"]
mod support;
mod trial;

use std::process::ExitCode;

use libtest_mimic::Arguments;
use treeattn::attention::KvLayout;

use trial::{alone, apart, missing, test};

/// Random cases are run by as many tests, side by side.
const PARTS: u64 = 8;

/// Tests that want a process of their own: one ends its CUDA context, a capture forbids others to create things
/// meanwhile, a clock wants no neighbours.
const APART: [(&str, fn()); 5] = [
    ("dead_context", streams::dead_context),
    ("captures", streams::captures),
    ("replays", streams::replays),
    ("host_time", streams::host_time),
    ("ranks_replays", ranks::replays),
];

fn main() -> ExitCode {
    if let Ok(role) = std::env::var(processes::ROLE) {
        processes::run(&role);
        return ExitCode::SUCCESS;
    }
    if let Some(status) = alone(&[&APART[..], &[("allreduce3_replays", allreduce::replays)]].concat()) {
        return status;
    }
    let arguments = Arguments::from_args();
    let missing = missing();
    if let Some(why) = &missing {
        eprintln!("GPU tests are ignored: {why}");
    }
    let count = if support::full() { 100 } else { 15 };
    let mut tests = Vec::new();
    let layouts =
        [("strided", KvLayout::Strided), ("block_table", KvLayout::BlockTable), ("csr_pages", KvLayout::CsrPages)];
    for (name, layout) in layouts {
        for part in 0..PARTS {
            tests.push(test(format!("random_{name}_{part}"), move || numerics::random(layout, part * count, count)));
        }
    }
    tests.extend([
        test("small", numerics::small),
        test("minilm", numerics::minilm),
        test("exact", numerics::exact),
        test("repeats", numerics::repeats),
        test("batch_300", || numerics::large_batch(300)),
        test("like_the_cpu", numerics::like_the_cpu),
        test("nan_in_the_newest_value", numerics::nan_in_the_newest_value),
        test("two_streams", numerics::two_streams),
        test("bad_data", numerics::bad_data),
        test("stale_entries", numerics::stale_entries),
        test("merge_partials", numerics::merge_partials),
        test("late_predecessors", || streams::late_predecessors(40)),
        test("current_context", streams::current_context),
        test("refusals", streams::refusals),
        test("drops_in_flight", streams::drops_in_flight),
        test("beyond_4_gib", streams::beyond_4_gib),
        test("five_million_pages", streams::five_million_pages),
    ]);
    for (name, layout) in layouts {
        for part in 0..2 {
            let body = move || ranks::random(layout, part * count, count);
            tests.push(test(format!("ranks_random_{name}_{part}"), body));
        }
    }
    tests.extend([
        test("ranks_same_as_one", ranks::same_as_one),
        test("ranks_merges", ranks::merges),
        test("ranks_bad_data", ranks::bad_data),
        test("ranks_many_steps", ranks::many_steps),
        test("ranks_two_communicators", ranks::two_communicators),
        test("ranks_absent", ranks::a_rank_that_does_not_come),
        test("ranks_out_of_step", ranks::out_of_step),
        test("ranks_aborted", ranks::aborted),
        test("ranks_leave", ranks::leave),
    ]);
    tests.extend(APART.iter().map(|(name, _)| apart(name, &[])));
    let mut tests: Vec<_> = tests.into_iter().map(|test| test.with_ignored_flag(missing.is_some())).collect();
    let no_nccl = missing.clone().or_else(allreduce::missing);
    if let (Some(why), None) = (&no_nccl, &missing) {
        eprintln!("tests of NCCL are ignored: {why}");
    }
    let over_nccl = [
        test("allreduce3_numbers", allreduce::numbers),
        test("allreduce3_merges", allreduce::merges),
        test("allreduce3_bad_data", allreduce::bad_data),
        test("allreduce3_over_an_id", allreduce::over_an_id),
        test("allreduce3_a_rank_that_does_not_come", allreduce::a_rank_that_does_not_come),
        apart("allreduce3_replays", &[]),
        test("processes_numbers", processes::numbers),
        test("processes_killed", processes::killed),
        test("processes_leave", processes::leaves),
        test("processes_sleep", processes::sleeps),
        test("processes_abort", processes::aborts),
    ];
    tests.extend(over_nccl.map(|test| test.with_ignored_flag(no_nccl.is_some())));
    libtest_mimic::run(&arguments, tests).exit_code()
}
