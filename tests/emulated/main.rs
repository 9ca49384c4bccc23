//! The tests of a GPU (`tests/gpu`) on the emulator of `tests/emulator`, with counts that a CPU can bear, and tests of the
//! emulator where others build on it. *Ignored* where there is no compiler for it, or where the build carries no kernels.
//!
//! Variables are those of `tests/gpu` and of the emulator; TREEATTN_TEST_EMULATED scales the number of random cases.

#[path = "../gpu/accuracy.rs"]
mod accuracy;
#[path = "../gpu/driver.rs"]
#[allow(dead_code)] // as below
mod driver;
#[path = "../gpu/group.rs"]
mod group;
#[path = "../support/mesh.rs"]
mod mesh;
#[path = "../gpu/mirror.rs"]
mod mirror;
#[path = "../gpu/numerics.rs"]
#[allow(dead_code)] // some tests are too much for a CPU
mod numerics;
#[path = "../gpu/over_nccl/mod.rs"]
#[allow(dead_code)] // as below
mod over_nccl;
#[path = "../gpu/over_transport.rs"]
mod over_transport;
mod peers;
#[path = "../gpu/processes.rs"]
mod processes;
#[path = "../gpu/ranks/mod.rs"]
#[allow(dead_code)] // as above
mod ranks;
#[path = "../gpu/space.rs"]
mod space;
#[path = "../gpu/streams.rs"]
#[allow(dead_code)] // as above
mod streams;
#[path = "../support/mod.rs"]
mod support;
#[path = "../gpu/terms.rs"]
mod terms;
#[path = "../support/threads.rs"]
mod threads;
#[path = "../gpu/trial.rs"]
mod trial;
#[path = "../gpu/wide.rs"]
mod wide;

use std::process::ExitCode;

use libtest_mimic::Arguments;
use treeattn::attention::{Algorithm, AttentionDesc, Dtype, KvLayout, OutputMode, QueryInput};

use mirror::Ready;
use space::Shapes;
use support::case::Case;
use support::run::judge;
use support::values::Values;
use trial::{Variables, alone, apart, missing, test};

const LAYOUTS: [KvLayout; 3] = [KvLayout::Strided, KvLayout::BlockTable, KvLayout::CsrPages];
/// As many blocks as it takes for partials to merge in two levels.
const MANY_SMS: Variables = &[("EMULATOR_SMS", "40"), ("EMULATOR_SEED", "2")];
/// One multiprocessor, whose warps close their sums.
const ONE_SM: Variables = &[("EMULATOR_SMS", "1")];
/// As many as two levels of merges cannot take: two blocks each are more than 16 x 16.
const MOST_SMS: Variables = &[("EMULATOR_SMS", "140")];

/// The driver waits for all kernels wherever it may.
const STRICT: Variables = &[("EMULATOR_STRICT", "1")];
/// Kernels hold back at random points of an exchange.
const DELAYS: Variables = &[("EMULATOR_DELAYS", "200000"), ("EMULATOR_SEED", "3")];

/// Steps go over NCCL where windows would do.
const GATHERED: Variables = &[("TREEATTN_GPU_EXCHANGE", "nccl"), ("EMULATOR_DEVICES", "4")];
/// The same of ranks that pass the queries of their own heads.
const GATHERED_BY_HEADS: Variables =
    &[("TREEATTN_GPU_EXCHANGE", "nccl"), ("TREEATTN_TEST_QUERIES", "by heads"), ("EMULATOR_DEVICES", "4")];
const FOUR_GPUS: Variables = &[("EMULATOR_DEVICES", "4")];
/// Ranks take turns over two nodes, on two GPUs or on four.
const TWO_NODES: Variables = &[("TREEATTN_TEST_NODES", "2")];
const TWO_NODES_APART: Variables = &[("TREEATTN_TEST_NODES", "2"), ("EMULATOR_DEVICES", "4")];
const TWO_NODES_DELAYED: Variables =
    &[("TREEATTN_TEST_NODES", "2"), ("EMULATOR_DELAYS", "200000"), ("EMULATOR_SEED", "3")];
/// No GPU reaches the memory of another.
const NO_PEERS: Variables = &[("EMULATOR_PEERS", "0"), ("EMULATOR_DEVICES", "4")];

/// Tests in processes of their own, with what is set there.
const APART: [(&str, fn(), Variables); 74] = [
    ("accuracy_long", || accuracy::constants(&[200_001]), ONE_SM),
    ("dead_context", streams::dead_context, &[]),
    ("captures", streams::captures, &[]),
    ("replays", streams::replays, &[]),
    ("many_blocks", many_blocks, MANY_SMS),
    ("most_blocks", most_blocks, MOST_SMS),
    ("wide_many_blocks", || wide::many_parts(&[1600]), MANY_SMS),
    ("wide_most_blocks", || wide::many_parts(&[4300]), MOST_SMS),
    ("wide_long", || wide::many_parts(&[33_300]), ONE_SM),
    ("peers", peers::peers, &[]),
    ("ranks_replays", ranks::order::replays, &[]),
    ("ranks_delayed_replays", ranks::order::delayed_replays, &[]),
    ("delays_random", delays_random, DELAYS),
    ("delays_replays", ranks::order::delayed_replays, DELAYS),
    ("delays_many_steps", ranks::order::many_steps, DELAYS),
    ("delays_merges", ranks::merges::merges, DELAYS),
    ("delays_bad_data", ranks::faults::bad_data, DELAYS),
    ("delays_leave", ranks::faults::leave, DELAYS),
    ("no_peers", peers::no_peers, &[("EMULATOR_PEERS", "0")]),
    ("memory_of_processes", peers::processes, &[]),
    ("ranks_weighted_replays", ranks::weighted::replays, &[]),
    ("delays_weighted", ranks::weighted::parts_add_up, DELAYS),
    ("delays_queries", ranks::queries::heads_and_shards, DELAYS),
    ("ranks_checked_replays", ranks::checks::replays, &[]),
    ("delays_checked", || ranks::checks::like_cpus(8), DELAYS),
    ("nccl_allreduce3_replays", over_nccl::replays, &[]),
    ("processes_captures", processes::captures, &[]),
    ("processes_refused", processes::refused, &[]),
    ("windows_outlive_kernels", peers::windows_outlive_kernels, &[]),
    ("ranks_deadline", ranks::faults::the_deadline_is_kept, &[]),
    ("ranks_replayed_after_a_failure", ranks::faults::replayed_after_a_failure, &[]),
    ("ranks_another_graph", ranks::faults::another_graph, &[]),
    ("ranks_module_loading", ranks::faults::module_loading, &[]),
    ("memory_is_what_is_said", memory_is_what_is_said, &[]),
    ("nccl_allreduce3_threads", threads_over_nccl, &[]),
    ("strict_over_an_id", over_nccl::over_an_id, STRICT),
    ("nccl_gather_bits", over_nccl::bits, &[]),
    ("nccl_gather_bits_of_windows", over_nccl::bits_of_windows, &[]),
    ("nccl_gather_numbers", over_nccl::numbers, GATHERED),
    ("nccl_gather_merges", over_nccl::merges, GATHERED),
    ("nccl_gather_conventions", ranks::conventions::conventions_of_gpus, GATHERED),
    ("nccl_gather_bad_data", over_nccl::bad_data, GATHERED),
    ("nccl_gather_over_an_id", over_nccl::over_an_id, GATHERED),
    ("nccl_gather_a_rank_that_does_not_come", over_nccl::a_rank_that_does_not_come, GATHERED),
    ("nccl_gather_a_rank_that_leaves", over_nccl::a_rank_that_leaves, GATHERED),
    ("nccl_gather_replays", over_nccl::replays, GATHERED),
    ("nccl_gather_out_of_step", over_nccl::out_of_step, GATHERED),
    ("nccl_gather_is_told", over_nccl::is_told, GATHERED),
    ("nccl_gather_shared_gpus_are_refused", over_nccl::shared_gpus_are_refused, GATHERED),
    ("nccl_gather_processes", processes::numbers, GATHERED),
    ("nccl_queries_numbers", over_nccl::numbers, GATHERED_BY_HEADS),
    ("nccl_queries_bits", over_nccl::queries, GATHERED),
    ("nccl_queries_bad_data", over_nccl::bad_data, GATHERED_BY_HEADS),
    ("nccl_queries_over_an_id", over_nccl::over_an_id, GATHERED_BY_HEADS),
    ("nccl_queries_a_rank_that_does_not_come", over_nccl::a_rank_that_does_not_come, GATHERED_BY_HEADS),
    ("nccl_queries_a_rank_that_leaves", over_nccl::a_rank_that_leaves, GATHERED_BY_HEADS),
    ("nccl_queries_replays", over_nccl::replays, GATHERED_BY_HEADS),
    ("nccl_queries_out_of_step", over_nccl::out_of_step, GATHERED_BY_HEADS),
    ("nccl_nodes_groupings", over_nccl::groupings, FOUR_GPUS),
    ("nccl_nodes_groupings_on_two_gpus", over_nccl::groupings, &[]),
    ("nccl_nodes_of_one", over_nccl::nodes_of_one, &[]),
    ("nccl_nodes_numbers", over_nccl::numbers, TWO_NODES),
    ("nccl_nodes_merges", over_nccl::merges, TWO_NODES),
    ("nccl_nodes_bad_data", over_nccl::bad_data, TWO_NODES),
    ("nccl_nodes_over_an_id", over_nccl::over_an_id, TWO_NODES_APART),
    ("nccl_nodes_a_rank_that_does_not_come", over_nccl::a_rank_that_does_not_come, TWO_NODES),
    ("nccl_nodes_a_rank_that_leaves", over_nccl::a_rank_that_leaves, TWO_NODES),
    ("nccl_nodes_replays", over_nccl::replays, TWO_NODES),
    ("nccl_nodes_out_of_step", over_nccl::out_of_step, TWO_NODES),
    ("nccl_nodes_delayed", over_nccl::replays, TWO_NODES_DELAYED),
    ("nccl_gather_over_a_transport", over_transport::over_nccl, GATHERED),
    ("nccl_without_peers", over_nccl::is_told, NO_PEERS),
    ("nccl_without_peers_random", without_peers, NO_PEERS),
    ("nccl_without_peers_in_processes", processes::numbers, NO_PEERS),
];

fn many_blocks() {
    for layout in LAYOUTS {
        numerics::random(layout, 1000, 6 * scale());
    }
    in_bits(8, 2, &[&[(12_000, 1)], &[(9_000, 1), (50, 1), (14_000, 2)]]);
}

fn most_blocks() {
    in_bits(2, 1, &[&[(30_000, 1)], &[(30_000, 1), (10, 1)]]);
}

/// Batches of (keys, query tokens), over so many heads, come out within their bound and the same again.
fn in_bits(q_heads: i32, kv_heads: i32, batches: &[&[(usize, usize)]]) {
    for sequences in batches {
        let desc = numerics::shape(q_heads, kv_heads, 64, Dtype::Bf16);
        let mut ready = Ready::new(Case::plain(desc, 1, sequences, Values::Normal, 4));
        let first = ready.bits();
        assert_eq!(judge(&ready.case, std::slice::from_ref(&ready.rank)).unwrap().failure, None);
        assert!(ready.bits() == first, "other bits");
    }
}

/// Memory of groups and plans against what the driver has given out.
fn memory_is_what_is_said() {
    let _current = driver::Current::new(0);
    for world in [2u64, 3] {
        let before = driver::used() as u64;
        let group = group::Group::over(world as usize, 1, std::time::Duration::from_secs(60));
        let windows = driver::used() as u64 - before;
        let desc = |output| AttentionDesc {
            max_batch: 2,
            max_query_tokens: 512,
            max_kv_length: 64,
            output,
            ..numerics::shape(8, 2, 64, Dtype::F16)
        };
        let shapes = [OutputMode::Local, OutputMode::Replicated, OutputMode::Scattered].map(desc);
        let by_heads = AttentionDesc { query_input: QueryInput::Scattered, ..desc(OutputMode::Scattered) };
        for desc in shapes.iter().chain([&by_heads]) {
            let before = driver::used() as u64;
            let plans = group.plans(desc);
            let memory = plans[0].memory().unwrap();
            assert_eq!(driver::used() as u64 - before, world * memory.workspace, "{desc:?}");
            // Beside its window, a rank has tables of three addresses a rank and what it waits for its GPU by.
            let others = world * (3 * 8 * world + 1);
            assert_eq!(windows, world * memory.window + others, "{world} ranks");
        }
    }
}

/// Threads that watch steps over NCCL are joined by the end of their plans.
fn threads_over_nccl() {
    threads::on_one_core();
    let group = group::Group::over(2, 2, std::time::Duration::from_secs(60));
    let desc = AttentionDesc { algorithm: Algorithm::Allreduce3, ..numerics::shape(8, 2, 64, Dtype::F16) };
    // The emulator has a thread of its own from its first launch on.
    drop(group.plans(&desc));
    threads::come_and_go("plans over NCCL", 2, || group.plans(&desc));
}

/// Random cases over GPUs that do not reach each other.
fn without_peers() {
    for (layout, first) in LAYOUTS.into_iter().zip([0, 100, 200]) {
        ranks::random_apart(layout, first, 6 * scale() as usize);
    }
}

fn delays_random() {
    ranks::random(KvLayout::BlockTable, 500, 4 * scale());
}

fn scale() -> u64 {
    std::env::var("TREEATTN_TEST_EMULATED").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

fn main() -> ExitCode {
    let emulator = support::emulator::enter(&[]);
    if let Ok(role) = std::env::var(processes::ROLE) {
        processes::run(&role);
        return ExitCode::SUCCESS;
    }
    let bodies = APART.map(|(name, body, _)| (name, body));
    let others = [("peer_process", peers::peer_process as fn()), ("deadlock", peers::deadlock)];
    if let Some(status) = alone(&[&bodies[..], &others].concat()) {
        return status;
    }
    let arguments = Arguments::from_args();
    let missing = emulator.err().or_else(missing);
    if let Some(why) = &missing {
        eprintln!("tests on emulated GPUs are ignored: {why}");
    }
    let mut tests: Vec<_> = APART.iter().map(|&(name, _, variables)| apart(name, variables)).collect();
    for (name, layout) in ["strided", "block_table", "csr_pages"].into_iter().zip(LAYOUTS) {
        let count = 25 * scale();
        tests.extend(
            [0, 1].map(|part| {
                test(format!("random_{name}_{part}"), move || numerics::random(layout, part * count, count))
            }),
        );
    }
    for (name, layout) in ["strided", "block_table", "csr_pages"].into_iter().zip(LAYOUTS) {
        let count = 4 * scale();
        tests.push(test(format!("ranks_random_{name}"), move || ranks::random(layout, 0, count)));
        let wide = Shapes::Wide;
        tests.push(test(format!("wide_random_{name}"), move || numerics::random_of(wide, layout, 0, 3 * count)));
        tests.push(test(format!("wide_ranks_random_{name}"), move || ranks::random_of(wide, layout, 0, count / 2)));
    }
    tests.extend([
        test("ranks_same_as_one", ranks::same_as_one),
        test("ranks_merges", ranks::merges::merges),
        test("ranks_conventions", ranks::conventions::conventions),
        test("ranks_bad_data", ranks::faults::bad_data),
        test("ranks_a_short_mask", ranks::faults::a_short_mask),
        test("ranks_values_beyond_the_wire", ranks::values_beyond_the_wire),
        test("ranks_bad_data_of_others", ranks::faults::bad_data_of_others),
        test("ranks_many_steps", ranks::order::many_steps),
        test("ranks_numbers_come_again", ranks::order::numbers_come_again),
        test("ranks_two_communicators", ranks::order::two_communicators),
        test("ranks_absent", ranks::faults::a_rank_that_does_not_come),
        test("ranks_out_of_step", ranks::faults::out_of_step),
        test("ranks_aborted", ranks::faults::aborted),
        test("ranks_leave", ranks::faults::leave),
        test("ranks_slotfuls", ranks::slotfuls),
        test("ranks_beside_others", || ranks::order::beside_others(40)),
        test("ranks_leave_before_rows_come", ranks::faults::leave_before_rows_come),
        test("ranks_allocations", ranks::faults::allocations),
        test("ranks_mismatch", ranks::faults::mismatch),
        test("ranks_another_batch", ranks::faults::another_batch),
        test("ranks_another_call", ranks::faults::another_call),
        test("ranks_skipped_step", ranks::faults::a_skipped_step),
        test("ranks_statistics", ranks::accounts::statistics),
        test("ranks_statistics_of_merges", ranks::accounts::statistics_of_merges),
        test("ranks_memory", ranks::accounts::memory),
        test("ranks_queries_same_bits", || ranks::queries::same_bits(3 * scale())),
        test("ranks_queries_heads_and_shards", ranks::queries::heads_and_shards),
        test("ranks_queries_slotfuls", ranks::queries::slotfuls),
        test("ranks_queries_accounts", ranks::queries::accounts),
        test("ranks_queries_refusals", ranks::queries::refusals),
        test("ranks_weighted", ranks::weighted::parts_add_up),
        test("ranks_weighted_merges", ranks::merges::weighted),
        test("ranks_weighted_bad_data", ranks::weighted::bad_data),
        test("ranks_weighted_absent", ranks::weighted::a_rank_that_does_not_come),
        test("ranks_weighted_accounts", ranks::weighted::accounts),
        test("ranks_checked", ranks::checks::disagreements),
        test("ranks_checked_like_cpus", || ranks::checks::like_cpus(25 * scale())),
        test("ranks_checked_bad_data", ranks::checks::bad_data),
        test("ranks_checked_absent", ranks::checks::a_rank_that_does_not_come),
        test("nccl_allreduce3_numbers", over_nccl::numbers),
        test("nccl_allreduce3_merges", over_nccl::merges),
        test("nccl_allreduce3_bad_data", over_nccl::bad_data),
        test("nccl_allreduce3_over_an_id", over_nccl::over_an_id),
        test("nccl_allreduce3_created_beside_steps", over_nccl::created_beside_steps),
        test("nccl_allreduce3_a_rank_that_does_not_come", over_nccl::a_rank_that_does_not_come),
        test("nccl_allreduce3_a_rank_that_leaves", over_nccl::a_rank_that_leaves),
        test("transport_numbers", over_transport::numbers),
        test("transport_faults", over_transport::faults),
        test("transport_kinds", over_transport::kinds),
        test("processes_numbers", processes::numbers),
        test("processes_killed", processes::killed),
        test("processes_leave", processes::leaves),
        test("processes_sleep", processes::sleeps),
        test("processes_stopped", processes::stopped),
        test("processes_abort", processes::aborts),
        test("wide_views", wide::views),
        test("wide_parts", || wide::many_parts(&[700])),
        test("wide_refusals", wide::refusals),
        test("wide_ranks", ranks::wide),
        test("small", numerics::small),
        test("minilm", numerics::minilm),
        test("exact", numerics::exact),
        test("unaligned_bases", numerics::unaligned_bases),
        test("a_last_sequence_that_ends_early", numerics::a_last_sequence_that_ends_early),
        test("batch_60", || numerics::large_batch(60)),
        test("like_the_cpu", numerics::like_the_cpu),
        test("nan_in_the_newest_value", numerics::nan_in_the_newest_value),
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
        test("accuracy_constants", || accuracy::constants(&[3, 65, 1000])),
        test("accuracy_one_sign", || accuracy::one_sign(2)),
        test("accuracy_rising_scores", accuracy::rising_scores),
        test("ranks_that_cancel", || accuracy::ranks_that_cancel(&[&[487, 500], &[123, 543, 333, 332, 1]])),
        test("late_predecessors", || streams::late_predecessors(4)),
        test("current_context", streams::current_context),
        test("refusals", streams::refusals),
        test("a_deadlock_is_explained", peers::a_deadlock_is_explained),
    ]);
    let tests = tests.into_iter().map(|test| test.with_ignored_flag(missing.is_some())).collect();
    libtest_mimic::run(&arguments, tests).exit_code()
}
