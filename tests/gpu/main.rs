//! Tests that need a GPU: *ignored* in the summary where there is none, or where the build carries no kernels for it.
//!
//! `TREEATTN_TEST=full` runs the acceptance counts; `TREEATTN_SEED`, `TREEATTN_CASE` and `TREEATTN_TRACE` are as in the
//! tests of numbers; `TREEATTN_TEST_DATA` is the folder of the real inputs. `tests/gpu/pack.sh` makes a folder of all this
//! that runs where there is no Rust.

mod accuracy;
mod driver;
mod group;
#[path = "../support/mesh.rs"]
mod mesh;
mod mirror;
mod numerics;
mod over_nccl;
#[allow(dead_code)] // one test is for the emulator
mod over_transport;
#[allow(dead_code)] // some tests are for the emulator
mod processes;
mod ranks;
mod space;
mod streams;
#[path = "../support/mod.rs"]
mod support;
mod terms;
mod trial;
mod waits;
mod wide;

use std::process::ExitCode;

use libtest_mimic::Arguments;
use treeattn::attention::KvLayout;

use space::Shapes;
use trial::{Variables, alone, apart, in_turn, missing, test};

/// The random cases are split over this many tests, which run side by side.
const PARTS: u64 = 8;

/// Tests that run in a process of their own: one destroys its CUDA context, a capture forbids other threads to create
/// objects meanwhile, and times are measured with nothing else running.
const APART: [(&str, fn()); 5] = [
    ("dead_context", streams::dead_context),
    ("captures", streams::captures),
    ("replays", streams::replays),
    ("host_time", streams::host_time),
    ("driver_waits", waits::calls),
];

/// Tests of ranks that wait for each other on one GPU: each in a process of its own and one at a time. All of them together
/// have so many kernels and streams that kernels which wait would keep others from starting.
const RANKS: [(&str, fn()); 62] = [
    ("ranks_that_cancel", || {
        accuracy::ranks_that_cancel(&[
            &[48_735, 49_970],
            &[12_345, 54_321, 33_333, 33_332, 1],
            &[16_777_213, 16_777_183],
        ])
    }),
    ("ranks_random_strided_0", || ranks::random(KvLayout::Strided, 0, count())),
    ("ranks_random_strided_1", || ranks::random(KvLayout::Strided, count(), count())),
    ("ranks_random_block_table_0", || ranks::random(KvLayout::BlockTable, 0, count())),
    ("ranks_random_block_table_1", || ranks::random(KvLayout::BlockTable, count(), count())),
    ("ranks_random_csr_pages_0", || ranks::random(KvLayout::CsrPages, 0, count())),
    ("ranks_random_csr_pages_1", || ranks::random(KvLayout::CsrPages, count(), count())),
    ("ranks_same_as_one", ranks::same_as_one),
    ("ranks_wide", ranks::wide),
    ("ranks_wide_random_strided", || ranks::random_of(Shapes::Wide, KvLayout::Strided, 0, count())),
    ("ranks_wide_random_block_table", || ranks::random_of(Shapes::Wide, KvLayout::BlockTable, 0, count())),
    ("ranks_wide_random_csr_pages", || ranks::random_of(Shapes::Wide, KvLayout::CsrPages, 0, count())),
    ("ranks_merges", ranks::merges::merges),
    ("ranks_conventions", ranks::conventions::conventions),
    ("ranks_bad_data", ranks::faults::bad_data),
    ("ranks_a_short_mask", ranks::faults::a_short_mask),
    ("ranks_values_beyond_the_wire", ranks::values_beyond_the_wire),
    ("ranks_many_steps", ranks::order::many_steps),
    ("ranks_numbers_come_again", ranks::order::numbers_come_again),
    ("ranks_two_communicators", ranks::order::two_communicators),
    ("ranks_absent", ranks::faults::a_rank_that_does_not_come),
    ("ranks_out_of_step", ranks::faults::out_of_step),
    ("ranks_aborted", ranks::faults::aborted),
    ("ranks_leave", ranks::faults::leave),
    ("ranks_replays", ranks::order::replays),
    ("ranks_slotfuls", ranks::slotfuls),
    ("ranks_delayed_replays", ranks::order::delayed_replays),
    ("ranks_beside_others", || ranks::order::beside_others(300)),
    ("ranks_leave_before_rows_come", ranks::faults::leave_before_rows_come),
    ("ranks_allocations", ranks::faults::allocations),
    ("ranks_mismatch", ranks::faults::mismatch),
    ("ranks_bad_data_of_others", ranks::faults::bad_data_of_others),
    ("ranks_deadline", ranks::faults::the_deadline_is_kept),
    ("ranks_replayed_after_a_failure", ranks::faults::replayed_after_a_failure),
    ("ranks_another_batch", ranks::faults::another_batch),
    ("ranks_another_call", ranks::faults::another_call),
    ("ranks_another_graph", ranks::faults::another_graph),
    ("ranks_skipped_step", ranks::faults::a_skipped_step),
    ("ranks_module_loading", ranks::faults::module_loading),
    ("ranks_statistics", ranks::accounts::statistics),
    ("ranks_statistics_of_merges", ranks::accounts::statistics_of_merges),
    ("ranks_memory", ranks::accounts::memory),
    ("ranks_queries_same_bits", || ranks::queries::same_bits(if support::full() { 300 } else { 5 })),
    ("ranks_queries_heads_and_shards", ranks::queries::heads_and_shards),
    ("ranks_queries_slotfuls", ranks::queries::slotfuls),
    ("ranks_queries_accounts", ranks::queries::accounts),
    ("ranks_queries_refusals", ranks::queries::refusals),
    ("ranks_weighted", ranks::weighted::parts_add_up),
    ("ranks_weighted_merges", ranks::merges::weighted),
    ("ranks_weighted_bad_data", ranks::weighted::bad_data),
    ("ranks_weighted_absent", ranks::weighted::a_rank_that_does_not_come),
    ("ranks_weighted_accounts", ranks::weighted::accounts),
    ("ranks_weighted_replays", ranks::weighted::replays),
    ("ranks_over_a_transport", over_transport::numbers),
    ("ranks_over_a_transport_faults", over_transport::faults),
    ("ranks_over_a_transport_kinds", over_transport::kinds),
    ("ranks_checked", ranks::checks::disagreements),
    ("ranks_checked_like_cpus", || ranks::checks::like_cpus(if support::full() { 1000 } else { 50 })),
    ("ranks_checked_bad_data", ranks::checks::bad_data),
    ("ranks_checked_replays", ranks::checks::replays),
    ("ranks_checked_absent", ranks::checks::a_rank_that_does_not_come),
    ("ranks_checked_slotfuls", ranks::checks::slotfuls),
];

/// The same for ranks that NCCL connects, on two GPUs or more. NCCL itself asks that kernels of several communicators are
/// launched in the same order everywhere; tests beside each other would break that.
const OVER_NCCL: [(&str, fn()); 18] = [
    ("nccl_nodes_groupings", over_nccl::groupings),
    ("nccl_nodes_of_one", over_nccl::nodes_of_one),
    ("nccl_gather_bits", over_nccl::bits),
    ("nccl_gather_bits_of_windows", over_nccl::bits_of_windows),
    ("nccl_allreduce3_numbers", over_nccl::numbers),
    ("nccl_allreduce3_merges", over_nccl::merges),
    ("nccl_allreduce3_bad_data", over_nccl::bad_data),
    ("nccl_allreduce3_over_an_id", over_nccl::over_an_id),
    ("nccl_allreduce3_created_beside_steps", over_nccl::created_beside_steps),
    ("nccl_allreduce3_a_rank_that_does_not_come", over_nccl::a_rank_that_does_not_come),
    ("nccl_allreduce3_a_rank_that_leaves", over_nccl::a_rank_that_leaves),
    ("nccl_allreduce3_replays", over_nccl::replays),
    ("processes_numbers", processes::numbers),
    ("processes_killed", processes::killed),
    ("processes_leave", processes::leaves),
    ("processes_sleep", processes::sleeps),
    ("processes_stopped", processes::stopped),
    ("processes_abort", processes::aborts),
];

/// The same with [`GATHERED`].
const BY_GATHERING: [(&str, fn()); 14] = [
    ("nccl_queries_bits", over_nccl::queries),
    ("nccl_gather_numbers", over_nccl::numbers),
    ("nccl_gather_merges", over_nccl::merges),
    ("nccl_gather_conventions", ranks::conventions::conventions_of_gpus),
    ("nccl_gather_bad_data", over_nccl::bad_data),
    ("nccl_gather_over_an_id", over_nccl::over_an_id),
    ("nccl_gather_a_rank_that_does_not_come", over_nccl::a_rank_that_does_not_come),
    ("nccl_gather_a_rank_that_leaves", over_nccl::a_rank_that_leaves),
    ("nccl_gather_replays", over_nccl::replays),
    ("nccl_gather_out_of_step", over_nccl::out_of_step),
    ("nccl_gather_is_told", over_nccl::is_told),
    ("nccl_gather_shared_gpus_are_refused", over_nccl::shared_gpus_are_refused),
    ("nccl_gather_processes", processes::numbers),
    ("nccl_gather_random", || ranks::random_apart(KvLayout::BlockTable, 0, count() as usize)),
];
/// Has steps go over NCCL where windows would do.
const GATHERED: Variables = &[("CUDA_DEVICE_MAX_CONNECTIONS", "32"), ("TREEATTN_GPU_EXCHANGE", "nccl")];

/// The same with [`GATHERED_BY_HEADS`].
const BY_HEADS: [(&str, fn()); 6] = [
    ("nccl_queries_numbers", over_nccl::numbers),
    ("nccl_queries_bad_data", over_nccl::bad_data),
    ("nccl_queries_a_rank_that_does_not_come", over_nccl::a_rank_that_does_not_come),
    ("nccl_queries_a_rank_that_leaves", over_nccl::a_rank_that_leaves),
    ("nccl_queries_replays", over_nccl::replays),
    ("nccl_queries_out_of_step", over_nccl::out_of_step),
];
/// The same of ranks that pass the queries of their own heads.
const GATHERED_BY_HEADS: Variables =
    &[("CUDA_DEVICE_MAX_CONNECTIONS", "32"), ("TREEATTN_GPU_EXCHANGE", "nccl"), ("TREEATTN_TEST_QUERIES", "by heads")];

/// The same with [`TWO_NODES`].
const BY_NODES: [(&str, fn()); 7] = [
    ("nccl_nodes_numbers", over_nccl::numbers),
    ("nccl_nodes_merges", over_nccl::merges),
    ("nccl_nodes_bad_data", over_nccl::bad_data),
    ("nccl_nodes_a_rank_that_does_not_come", over_nccl::a_rank_that_does_not_come),
    ("nccl_nodes_a_rank_that_leaves", over_nccl::a_rank_that_leaves),
    ("nccl_nodes_replays", over_nccl::replays),
    ("nccl_nodes_out_of_step", over_nccl::out_of_step),
];
/// Has ranks take turns over two nodes.
const TWO_NODES: Variables = &[("CUDA_DEVICE_MAX_CONNECTIONS", "32"), ("TREEATTN_TEST_NODES", "2")];

/// A hardware queue for each stream: streams that share one wait for each other.
const QUEUES: Variables = &[("CUDA_DEVICE_MAX_CONNECTIONS", "32")];

/// Numbers of equal keys.
const LENGTHS: [usize; 10] =
    [3, 65, 1000, 65_536, 1_500_001, 10_000_019, 3_000_017, 30_000_000, 100_000_001, i32::MAX as usize];

/// Random cases of a test.
fn count() -> u64 {
    if support::full() { 100 } else { 15 }
}

fn main() -> ExitCode {
    if let Ok(role) = std::env::var(processes::ROLE) {
        processes::run(&role);
        return ExitCode::SUCCESS;
    }
    let over_nccl = [&OVER_NCCL[..], &BY_GATHERING[..], &BY_HEADS[..], &BY_NODES[..]].concat();
    if let Some(status) = alone(&[&APART[..], &RANKS[..], &over_nccl[..]].concat()) {
        return status;
    }
    let arguments = Arguments::from_args();
    let missing = missing();
    if let Some(why) = &missing {
        eprintln!("GPU tests are ignored: {why}");
    }
    let count = count();
    let mut tests = Vec::new();
    let layouts =
        [("strided", KvLayout::Strided), ("block_table", KvLayout::BlockTable), ("csr_pages", KvLayout::CsrPages)];
    for (name, layout) in layouts {
        for part in 0..PARTS {
            tests.push(test(format!("random_{name}_{part}"), move || numerics::random(layout, part * count, count)));
        }
        let wide = move || numerics::random_of(Shapes::Wide, layout, 0, 5 * count);
        tests.push(test(format!("wide_random_{name}"), wide));
    }
    tests.extend([
        test("wide_views", wide::views),
        test("wide_parts", || wide::many_parts(&[700, 20_000, 60_000])),
        test("wide_refusals", wide::refusals),
        test("small", numerics::small),
        test("minilm", numerics::minilm),
        test("exact", numerics::exact),
        test("repeats", numerics::repeats),
        test("batch_300", || numerics::large_batch(300)),
        test("like_the_cpu", numerics::like_the_cpu),
        test("nan_in_the_newest_value", numerics::nan_in_the_newest_value),
        test("two_streams", numerics::two_streams),
        test("unaligned_bases", numerics::unaligned_bases),
        test("a_last_sequence_that_ends_early", numerics::a_last_sequence_that_ends_early),
        test("bad_data", numerics::bad_data),
        test("bad_data_of_a_plan_that_is_gone", numerics::bad_data_of_a_plan_that_is_gone),
        test("stale_entries", numerics::stale_entries),
        test("merge_partials", numerics::merge_partials),
        test("terms_windows", terms::windows),
        test("terms_windows_read_no_more", terms::windows_read_no_more),
        test("terms_sinks", terms::sinks),
        test("terms_caps_and_slopes", terms::caps_and_slopes),
        test("terms_masks", terms::masks),
        test("terms_types", terms::types),
        test("terms_bytes", terms::bytes),
        test("terms_blocks", terms::blocks),
        test("terms_lists", terms::lists),
        test("accuracy_constants", || accuracy::constants(if support::full() { &LENGTHS } else { &LENGTHS[..6] })),
        test("accuracy_one_sign", || accuracy::one_sign(if support::full() { 100 } else { 6 })),
        test("accuracy_rising_scores", accuracy::rising_scores),
        test("late_predecessors", || streams::late_predecessors(40)),
        test("current_context", streams::current_context),
        test("refusals", streams::refusals),
        test("drops_in_flight", streams::drops_in_flight),
        test("beyond_4_gib", streams::beyond_4_gib),
        test("five_million_pages", streams::five_million_pages),
    ]);
    tests.extend(RANKS.iter().map(|&(name, _)| in_turn(name, QUEUES)));
    tests.extend(APART.iter().map(|(name, _)| apart(name, &[])));
    let mut tests: Vec<_> = tests.into_iter().map(|test| test.with_ignored_flag(missing.is_some())).collect();
    let no_nccl = missing.clone().or_else(over_nccl::missing);
    if let (Some(why), None) = (&no_nccl, &missing) {
        eprintln!("tests of NCCL are ignored: {why}");
    }
    let gathering = BY_GATHERING.iter().map(|&(name, _)| in_turn(name, GATHERED));
    let by_heads = BY_HEADS.iter().map(|&(name, _)| in_turn(name, GATHERED_BY_HEADS));
    let nodes = BY_NODES.iter().map(|&(name, _)| in_turn(name, TWO_NODES));
    let over_nccl = OVER_NCCL.iter().map(|&(name, _)| in_turn(name, QUEUES)).chain(gathering).chain(by_heads);
    let over_nccl = over_nccl.chain(nodes);
    tests.extend(over_nccl.map(|test| test.with_ignored_flag(no_nccl.is_some())));
    libtest_mimic::run(&arguments, tests).exit_code()
}
