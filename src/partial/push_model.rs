//! Interleavings of a few ranks that exchange as GPUs do, by loom, up to a bound of preemptions.
//!
//! In `epoch_model` ranks publish at home and read what others hold. Here every rank pushes packets into the windows of all
//! and reads its own, by relaxed words alone: a word that carries the epoch carries its data. `kernels/ll.cuh` has the
//! rules, and [`World::launch`] follows `kernels/exchange.cu` step by step. What a launch leaves undone when a communicator
//! breaks is not modelled.
//!
//! Loom never moves a store before an earlier load. Neither does a GPU here: whether a rank goes on to store hangs on what
//! it loaded. Run with `RUSTFLAGS="--cfg loom" cargo test --release --lib push_model`.

use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Relaxed};

use loom::sync::atomic::{AtomicU32, AtomicU64};
use loom::sync::{Condvar, Mutex};
use loom::thread;

use super::epoch::{Epoch, SLOTS, data_of, epoch_of, packet};
use super::epoch_model::bounded;
use super::view::ExchangeMode;

/// The wrap lies between the first and the second epoch.
const START: Epoch = Epoch::from_flag(u32::MAX - 1);

/// A rule that a broken protocol lacks.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Without {
    /// A launch waits for the end of the one before, which wrote `consumed`, and takes the epoch after that.
    Guard,
    /// Words of an epoch and of the next lie apart.
    Parity,
    /// A block waits for the header of every rank, also of those whose rows it does not need.
    Headers,
}

#[derive(Clone, Copy)]
struct Case {
    ranks: usize,
    /// Blocks of a launch. The first pushes headers; rows go round.
    blocks: usize,
    /// Threads of a rank, which take the blocks of its launches in turn. With more threads than blocks, a launch comes up
    /// while the one before runs.
    threads: usize,
    /// With three, one slot is written again; with four, both.
    launches: usize,
    /// Rows of a partial, each of a head of its own and with one word. Where they are fewer than ranks, some own none.
    rows: usize,
    /// Every other launch is a step without rows.
    gaps: bool,
    /// Words of a header. A GPU sends two; each carries its own flag, and one leaves fewer interleavings.
    header_words: usize,
    mode: ExchangeMode,
    without: Option<Without>,
    /// With 0, a thread runs until it waits; what it then saw of the others may still be old.
    preemptions: usize,
}

/// What a word says. The data of a word tells it, its sender and its epoch.
#[derive(Clone, Copy)]
enum Word {
    Header(usize),
    Row(usize),
    Merged(usize),
}

impl Word {
    fn data(self, sender: usize, epoch: Epoch) -> u32 {
        let code = match self {
            Word::Header(half) => half,
            Word::Row(row) => 4 + row,
            Word::Merged(row) => 8 + row,
        };
        epoch.flag() << 8 | (sender << 4 | code) as u32
    }
}

/// What a rank pushes into the window of another, for one parity.
struct Slot {
    header: Vec<AtomicU64>,
    rows: Vec<AtomicU64>,
}

/// The memory of a rank.
struct Window {
    /// By sender and parity.
    slots: Vec<[Slot; SLOTS]>,
    /// Rows that their owners have merged, by parity.
    merged: [Vec<AtomicU64>; SLOTS],
    consumed: AtomicU64,
    /// Blocks of the running launch that are done.
    arrived: AtomicU32,
    /// Launches that have ended. Not a word of a window: the GPU itself tells a launch that the one before has.
    ended: (Mutex<usize>, Condvar),
}

struct World {
    case: Case,
    windows: Vec<Window>,
}

fn words(count: usize) -> Vec<AtomicU64> {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}

/// Waits until all words are of the epoch at one look, as a warp does, and checks what they say.
fn wait<'a>(epoch: Epoch, expected: impl Iterator<Item = (&'a AtomicU64, u32)> + Clone) {
    loop {
        let mut come = true;
        for (word, expected) in expected.clone() {
            let word = word.load(Relaxed);
            match data_of(word, epoch) {
                Some(data) => assert_eq!(data, expected, "a word has the flag of its epoch and other data"),
                None => {
                    let other = epoch_of(word);
                    let early = other == Epoch::START || !other.reached(epoch);
                    assert!(early, "a word of epoch {} was overwritten before it was read", epoch.flag());
                    come = false;
                }
            }
        }
        if come {
            return;
        }
        thread::yield_now();
    }
}

impl World {
    fn new(case: Case) -> World {
        let slot = || Slot { header: words(case.header_words), rows: words(case.rows) };
        let merged = if case.mode == ExchangeMode::TwoShot { case.rows } else { 0 };
        let window = || Window {
            slots: (0..case.ranks).map(|_| std::array::from_fn(|_| slot())).collect(),
            merged: std::array::from_fn(|_| words(merged)),
            consumed: AtomicU64::new(u64::from(START.flag())),
            arrived: AtomicU32::new(0),
            ended: (Mutex::new(0), Condvar::new()),
        };
        World { case, windows: (0..case.ranks).map(|_| window()).collect() }
    }

    fn lacks(&self, rule: Without) -> bool {
        self.case.without == Some(rule)
    }

    fn parity(&self, epoch: Epoch) -> usize {
        if self.lacks(Without::Parity) { 0 } else { epoch.slot() }
    }

    fn rows(&self, launch: usize) -> usize {
        if self.case.gaps && launch % 2 == 1 { 0 } else { self.case.rows }
    }

    fn owner(&self, row: usize) -> usize {
        ((row + 1) * self.case.ranks).div_ceil(self.case.rows) - 1
    }

    /// All ranks, `rank` last.
    fn others_first(&self, rank: usize) -> impl Iterator<Item = usize> {
        let ranks = self.case.ranks;
        (1..=ranks).map(move |n| (rank + n) % ranks)
    }

    /// What a block takes of these rows.
    fn share(&self, block: usize, rows: impl Iterator<Item = usize>) -> impl Iterator<Item = usize> {
        rows.skip(block).step_by(self.case.blocks)
    }

    fn push_row(&self, epoch: Epoch, rank: usize, row: usize) {
        let to = |to: usize| {
            let word = packet(Word::Row(row).data(rank, epoch), epoch);
            self.windows[to].slots[rank][self.parity(epoch)].rows[row].store(word, Relaxed);
        };
        if self.case.mode == ExchangeMode::OneShot {
            self.others_first(rank).for_each(to);
        } else {
            to(self.owner(row));
        }
    }

    /// Waits for what all ranks sent of a row.
    fn merge_row(&self, epoch: Epoch, rank: usize, row: usize) {
        let slots = self.windows[rank].slots.iter().enumerate();
        wait(
            epoch,
            slots.map(|(sender, slots)| (&slots[self.parity(epoch)].rows[row], Word::Row(row).data(sender, epoch))),
        );
    }

    /// One block of a rank's launch `n`.
    fn launch(&self, rank: usize, block: usize, n: usize) {
        let case = &self.case;
        let window = &self.windows[rank];
        let epoch = (0..=n).fold(START, |epoch, _| epoch.next());
        let parity = self.parity(epoch);
        let rows = 0..self.rows(n);
        let owned = rows.clone().filter(|&row| self.owner(row) == rank);
        if !self.lacks(Without::Guard) {
            let mut ended = window.ended.0.lock().unwrap();
            while *ended < n {
                ended = window.ended.1.wait(ended).unwrap();
            }
            drop(ended);
            let begun = Epoch::from_flag(window.consumed.load(Relaxed) as u32).next();
            assert_eq!(begun, epoch, "a block takes another epoch than its launch has");
        }
        if block == 0 {
            for to in self.others_first(rank) {
                for (half, word) in self.windows[to].slots[rank][parity].header.iter().enumerate() {
                    word.store(packet(Word::Header(half).data(rank, epoch), epoch), Relaxed);
                }
            }
        }
        for row in self.share(block, rows.clone()) {
            self.push_row(epoch, rank, row);
        }
        if !self.lacks(Without::Headers) {
            let slots = window.slots.iter().enumerate();
            wait(
                epoch,
                slots.flat_map(|(sender, slots)| {
                    let header = slots[parity].header.iter().enumerate();
                    header.map(move |(half, word)| (word, Word::Header(half).data(sender, epoch)))
                }),
            );
        }
        match case.mode {
            ExchangeMode::OneShot => {
                for row in self.share(block, rows.clone()) {
                    self.merge_row(epoch, rank, row);
                }
            }
            ExchangeMode::Scattered => {
                for row in self.share(block, owned) {
                    self.merge_row(epoch, rank, row);
                }
            }
            ExchangeMode::TwoShot => {
                for row in self.share(block, owned) {
                    self.merge_row(epoch, rank, row);
                    for to in self.others_first(rank) {
                        let word = packet(Word::Merged(row).data(rank, epoch), epoch);
                        self.windows[to].merged[parity][row].store(word, Relaxed);
                    }
                }
                for row in self.share(block, rows.clone()) {
                    let data = Word::Merged(row).data(self.owner(row), epoch);
                    wait(epoch, [(&window.merged[parity][row], data)].into_iter());
                }
            }
        }
        if window.arrived.fetch_add(1, AcqRel) as usize + 1 == case.blocks {
            window.arrived.store(0, Relaxed);
            window.consumed.store(u64::from(epoch.flag()), Relaxed);
            *window.ended.0.lock().unwrap() = n + 1;
            window.ended.1.notify_all();
        }
    }

    /// What one thread of a rank does.
    fn run(&self, rank: usize, thread: usize) {
        let Case { blocks, threads, launches, .. } = self.case;
        for turn in (thread..blocks * launches).step_by(threads) {
            self.launch(rank, turn % blocks, turn / blocks);
        }
    }
}

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
fn words_of_three_ranks_are_read_before_they_are_overwritten() {
    check_modes(THREE);
    // The first rank owns nothing.
    check(Case { rows: 2, mode: ExchangeMode::Scattered, ..THREE });
    check(Case { rows: 2, mode: ExchangeMode::TwoShot, ..THREE });
    check(Case { preemptions: 1, launches: 3, ..THREE });
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
#[should_panic(expected = "was overwritten before it was read")]
fn a_block_ahead_of_another_is_caught() {
    check(Case { without: Some(Without::Guard), rows: 1, mode: ExchangeMode::Scattered, ..BLOCKS });
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
