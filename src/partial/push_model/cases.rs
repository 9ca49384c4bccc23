//! The cases that the model is checked in, and protocols that lack a rule, which it must catch.

use std::sync::Arc;

use loom::thread;

use super::super::epoch_model::bounded;
use super::super::view::ExchangeMode;
use super::{Case, Without, World};

fn check(case: Case) {
    bounded(case.preemptions).check(move || {
        let world = Arc::new(World::new(case));
        let all = (0..case.ranks).flat_map(|rank| (0..case.threads).map(move |thread| (rank, thread)));
        let others: Vec<_> = all
            .skip(1)
            .map(|(rank, thread)| {
                let world = Arc::clone(&world);
                thread::spawn(move || world.run(rank, thread))
            })
            .collect();
        world.run(0, 0);
        for thread in others {
            thread.join().unwrap();
        }
    });
}

fn check_modes(case: Case) {
    for mode in [ExchangeMode::OneShot, ExchangeMode::Scattered, ExchangeMode::TwoShot] {
        check(Case { mode, ..case });
    }
}

/// Two ranks of one block. Under [`ExchangeMode::Scattered`] the row is the second's, and the first gets headers only.
const PLAIN: Case = Case {
    ranks: 2,
    blocks: 1,
    threads: 1,
    launches: 4,
    rows: 1,
    gaps: false,
    keeps: false,
    cleans: false,
    header_words: 2,
    mode: ExchangeMode::OneShot,
    without: None,
    preemptions: 2,
};
/// Launches that come up early.
const EARLY: Case = Case { threads: 2, header_words: 1, preemptions: 0, ..PLAIN };
/// Two ranks of two blocks.
const BLOCKS: Case = Case { blocks: 2, threads: 2, rows: 2, header_words: 1, preemptions: 0, ..PLAIN };
/// Three ranks of one block.
const THREE: Case = Case { ranks: 3, header_words: 1, preemptions: 0, ..PLAIN };

#[test]
fn words_of_two_ranks_are_read_before_they_are_overwritten() {
    check_modes(PLAIN);
}

#[test]
fn a_launch_that_comes_up_early_waits_for_the_one_before() {
    check_modes(EARLY);
    check(Case { preemptions: 1, launches: 3, ..EARLY });
}

#[test]
fn an_epoch_ends_with_its_last_block() {
    check_modes(BLOCKS);
    // The first rank gets headers only; of the second, one block has no row.
    check(Case { rows: 1, mode: ExchangeMode::Scattered, ..BLOCKS });
}

#[test]
fn rows_that_blocks_keep_are_merged_by_whoever_takes_them() {
    for mode in [ExchangeMode::OneShot, ExchangeMode::Scattered] {
        for case in [PLAIN, EARLY, BLOCKS, THREE] {
            check(Case { keeps: true, mode, ..case });
        }
        check(Case { keeps: true, mode, preemptions: 1, launches: 2, ..BLOCKS });
    }
}

#[test]
fn words_of_three_ranks_are_read_before_they_are_overwritten() {
    check_modes(THREE);
    // The first rank owns nothing.
    check(Case { rows: 2, mode: ExchangeMode::Scattered, ..THREE });
    check(Case { rows: 2, mode: ExchangeMode::TwoShot, ..THREE });
    check(Case { preemptions: 1, launches: 3, ..THREE });
}

#[test]
fn slots_are_cleaned_while_nobody_uses_them() {
    check_modes(Case { cleans: true, header_words: 1, preemptions: 1, ..PLAIN });
    check_modes(Case { cleans: true, ..EARLY });
    for case in [BLOCKS, THREE] {
        check(Case { cleans: true, mode: ExchangeMode::Scattered, ..case });
    }
}

#[test]
// What was cleaned away is waited for without an end.
#[should_panic(expected = "exceeded maximum number of branches")]
fn cleaning_after_peers_have_been_told_is_caught() {
    // The first rank waits for the second's header only.
    let case = Case { cleans: true, mode: ExchangeMode::Scattered, ..PLAIN };
    check(Case { without: Some(Without::CleanFirst), ..case });
}

#[test]
#[should_panic(expected = "exceeded maximum number of branches")]
fn cleaning_again_is_caught() {
    let case = Case { cleans: true, mode: ExchangeMode::Scattered, ..PLAIN };
    check(Case { without: Some(Without::CleanOnce), ..case });
}

#[test]
fn steps_without_rows_keep_ranks_in_step() {
    check_modes(Case { gaps: true, ..PLAIN });
    check_modes(Case { gaps: true, ..BLOCKS });
    check_modes(Case { gaps: true, ..THREE });
}

#[test]
#[should_panic(expected = "was overwritten before it was read")]
fn beginning_before_the_last_launch_has_ended_is_caught() {
    check(Case { without: Some(Without::Guard), ..EARLY });
}

#[test]
#[should_panic(expected = "rows that were merged")]
fn a_block_ahead_of_another_is_caught() {
    check(Case { without: Some(Without::Guard), rows: 1, mode: ExchangeMode::Scattered, ..BLOCKS });
}

#[test]
#[should_panic(expected = "rows that were merged")]
fn what_is_left_over_before_all_have_decided_is_caught() {
    check(Case { without: Some(Without::Decisions), preemptions: 1, launches: 1, ..BLOCKS });
}

#[test]
#[should_panic(expected = "was overwritten before it was read")]
fn one_slot_for_two_ranks_is_caught() {
    check(Case { without: Some(Without::Parity), ..PLAIN });
}

#[test]
#[should_panic(expected = "was overwritten before it was read")]
fn one_slot_for_ranks_of_two_blocks_is_caught() {
    check(Case { without: Some(Without::Parity), ..BLOCKS });
}

#[test]
#[should_panic(expected = "was overwritten before it was read")]
fn one_slot_for_three_ranks_is_caught() {
    check(Case { without: Some(Without::Parity), ..THREE });
}

#[test]
#[should_panic(expected = "was overwritten before it was read")]
fn rows_alone_do_not_keep_ranks_in_step() {
    check(Case { without: Some(Without::Headers), mode: ExchangeMode::Scattered, ..PLAIN });
}
