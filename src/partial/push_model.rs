//! Interleavings of a few ranks that exchange as GPUs do, by loom, up to a bound of preemptions.
//!
//! In `epoch_model` ranks publish at home and read what others hold. Here every rank pushes packets into the windows of all
//! and reads its own, by relaxed words alone: a word that carries the epoch carries its data. `kernels/ll.cuh` has the
//! rules, and [`World::launch`] follows `kernels/exchange.cu`, `kernels/exchange_rows.cu` and `kernels/exchange.cuh` step by step.
//! The last block of a launch is the one that may wait. What a launch leaves undone when a communicator breaks is not modelled,
//! nor are rows that are drawn from a counter.
//!
//! Loom never moves a store before an earlier load. Neither does a GPU here: whether a rank goes on to store hangs on what
//! it loaded. Run with `RUSTFLAGS="--cfg loom --cfg unit_tests" cargo test --release --lib push_model`.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use loom::sync::atomic::{AtomicU64, fence};
use loom::sync::{Condvar, Mutex};
use loom::thread;

use super::epoch::{Epoch, LAUNCH_SHIFT, SLOTS, data_of, epoch_of, packet};
use super::view::ExchangeMode;

mod cases;

/// The wrap lies between the first and the second epoch.
const START: Epoch = Epoch::from_flag(u32::MAX - 1);

/// A rule that a broken protocol lacks.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Without {
    /// A launch waits for the end of the one before, and takes the epoch after those that `consumed` counts.
    Guard,
    /// Words of an epoch and of the next lie apart.
    Parity,
    /// A launch ends after the headers of all ranks have come, also of those whose rows it does not need.
    Headers,
    /// A block looks for what others have left over after all have decided.
    Decisions,
    /// Slots of the next epoch are cleaned before peers hear that this rank has come for the running one.
    CleanFirst,
    /// A rank that tells its peers again does not clean again.
    CleanOnce,
}

#[derive(Clone, Copy)]
struct Case {
    ranks: usize,
    /// Blocks of a launch. The last one pushes headers; rows go round.
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
    /// A block merges the rows that it pushed, and keeps this rank's part of them in registers (`kernels/exchange_rows.cu`):
    /// that part goes to the own window only where the block leaves its rows to others.
    keeps: bool,
    /// Every launch cleans the slots of the next epoch.
    cleans: bool,
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
    /// By parity: blocks that have decided, and above 2^32 those that have left their rows over.
    decided: [AtomicU64; SLOTS],
    /// By parity: a bit for each of those.
    left_over: [AtomicU64; SLOTS],
    /// Not a word of a window: the GPU itself tells a launch that the one before has ended.
    progress: (Mutex<Progress>, Condvar),
}

#[derive(Default)]
struct Progress {
    /// Launches that have ended.
    ended: usize,
    /// Of the running one, blocks that are done, and rows that were merged.
    blocks: usize,
    rows: usize,
}

struct World {
    case: Case,
    windows: Vec<Window>,
}

fn words(count: usize) -> Vec<AtomicU64> {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}

/// Whether all words are of the epoch at one look, as a warp does it; checks what they say.
fn look<'a>(epoch: Epoch, expected: impl Iterator<Item = (&'a AtomicU64, u32)>) -> bool {
    let mut come = true;
    for (word, expected) in expected {
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
    come
}

/// Waits until all words are of the epoch at one look.
fn wait<'a>(epoch: Epoch, expected: impl Iterator<Item = (&'a AtomicU64, u32)> + Clone) {
    while !look(epoch, expected.clone()) {
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
            consumed: AtomicU64::new(u64::from(START.flag()) << LAUNCH_SHIFT),
            decided: std::array::from_fn(|_| AtomicU64::new(0)),
            left_over: std::array::from_fn(|_| AtomicU64::new(0)),
            progress: (Mutex::new(Progress::default()), Condvar::new()),
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

    /// Words of the headers of all ranks in a window, and what they say.
    fn headers(&self, rank: usize, epoch: Epoch) -> impl Iterator<Item = (&AtomicU64, u32)> + Clone {
        let parity = self.parity(epoch);
        self.windows[rank].slots.iter().enumerate().flat_map(move |(sender, slots)| {
            let header = slots[parity].header.iter().enumerate();
            header.map(move |(half, word)| (word, Word::Header(half).data(sender, epoch)))
        })
    }

    /// What a block takes of these rows.
    fn share(&self, block: usize, rows: impl Iterator<Item = usize>) -> impl Iterator<Item = usize> {
        rows.skip(block).step_by(self.case.blocks)
    }

    fn push_row_to(&self, epoch: Epoch, rank: usize, to: usize, row: usize) {
        let word = packet(Word::Row(row).data(rank, epoch), epoch);
        self.windows[to].slots[rank][self.parity(epoch)].rows[row].store(word, Relaxed);
    }

    fn push_row(&self, epoch: Epoch, rank: usize, row: usize) {
        let to = |to: usize| {
            if !self.case.keeps || to != rank {
                self.push_row_to(epoch, rank, to, row);
            }
        };
        if self.case.mode == ExchangeMode::OneShot {
            self.others_first(rank).for_each(to);
        } else {
            to(self.owner(row));
        }
    }

    /// Waits for what all ranks sent of a row; `has_own`: all others.
    fn merge_row(&self, epoch: Epoch, rank: usize, row: usize, has_own: bool) {
        let slots = self.windows[rank].slots.iter().enumerate().filter(|&(sender, _)| !has_own || sender != rank);
        wait(
            epoch,
            slots.map(|(sender, slots)| (&slots[self.parity(epoch)].rows[row], Word::Row(row).data(sender, epoch))),
        );
    }

    /// Empties the slots of `next` in a rank's own window: those of every launch here, a piece of them now and then on a GPU.
    fn clean(&self, rank: usize, next: Epoch) {
        let (window, parity) = (&self.windows[rank], self.parity(next));
        let slots = window.slots.iter().flat_map(|slots| slots[parity].header.iter().chain(&slots[parity].rows));
        for word in slots.chain(&window.merged[parity]) {
            let before = word.swap(0, Relaxed);
            assert_ne!(epoch_of(before), next, "a word is cleaned away before it was read");
        }
        fence(Release);
    }

    /// Tells all ranks that this one has come; cleans before, if it has not told them yet.
    fn announce(&self, rank: usize, epoch: Epoch) {
        let parity = self.parity(epoch);
        let own = &self.windows[rank].slots[rank][parity].header[0];
        let has_announced = epoch_of(own.load(Relaxed)) == epoch && !self.lacks(Without::CleanOnce);
        let cleans = self.case.cleans && !has_announced;
        if cleans && !self.lacks(Without::CleanFirst) {
            self.clean(rank, epoch.next());
        }
        for to in self.others_first(rank) {
            for (half, word) in self.windows[to].slots[rank][parity].header.iter().enumerate() {
                word.store(packet(Word::Header(half).data(rank, epoch), epoch), Relaxed);
            }
        }
        if cleans && self.lacks(Without::CleanFirst) {
            self.clean(rank, epoch.next());
        }
    }

    /// One block of a rank's launch `n`.
    fn launch(&self, rank: usize, block: usize, n: usize) {
        let case = &self.case;
        let window = &self.windows[rank];
        let epoch = (0..=n).fold(START, |epoch, _| epoch.next());
        let rows = 0..self.rows(n);
        if !self.lacks(Without::Guard) {
            let mut progress = window.progress.0.lock().unwrap();
            while progress.ended < n {
                progress = window.progress.1.wait(progress).unwrap();
            }
            drop(progress);
            let begun = Epoch::after(window.consumed.load(Relaxed) >> LAUNCH_SHIFT).next();
            assert_eq!(begun, epoch, "a block takes another epoch than its launch has");
        }
        let may_wait = block == case.blocks - 1;
        if may_wait {
            // What the next epoch counts and notes.
            window.decided[epoch.next().slot()].store(0, Relaxed);
            window.left_over[epoch.next().slot()].store(0, Relaxed);
            self.announce(rank, epoch);
        }
        for row in self.share(block, rows.clone()) {
            self.push_row(epoch, rank, row);
        }
        // A block with several items says so with each.
        if may_wait && case.cleans {
            self.announce(rank, epoch);
        }
        let others = case.blocks as u64 - 1;
        window.consumed.fetch_add(if may_wait { (1 << LAUNCH_SHIFT) - others } else { 1 }, Relaxed);
        let merged = match case.mode {
            ExchangeMode::TwoShot if may_wait => self.receive_two_shot(rank, epoch, rows.clone()),
            ExchangeMode::TwoShot => 0,
            ExchangeMode::OneShot => self.receive(rank, block, epoch, rows.clone()),
            ExchangeMode::Scattered => {
                self.receive(rank, block, epoch, rows.clone().filter(|&row| self.owner(row) == rank))
            }
        };
        // The end of a launch is a fence: what the next one stores comes after all that this one has seen, cleaned words too.
        fence(Acquire);
        let mut progress = window.progress.0.lock().unwrap();
        progress.blocks += 1;
        progress.rows += merged;
        if progress.blocks == case.blocks {
            let owned = if case.mode == ExchangeMode::Scattered {
                rows.filter(|&row| self.owner(row) == rank).count()
            } else {
                rows.count()
            };
            assert_eq!(progress.rows, owned, "rows that were merged");
            *progress = Progress { ended: n + 1, ..Progress::default() };
            window.progress.1.notify_all();
        }
    }

    /// What a block merges of these rows, after its pushes. How many that were.
    fn receive(&self, rank: usize, block: usize, epoch: Epoch, rows: impl Iterator<Item = usize> + Clone) -> usize {
        let window = &self.windows[rank];
        let (last, keeps) = (self.case.blocks - 1, self.case.keeps);
        let slot = epoch.slot();
        let share_of = |block| -> Vec<usize> {
            // A block that keeps its rows takes those that it pushed, if they are its rank's.
            if keeps {
                let own: Vec<usize> = rows.clone().collect();
                return self.share(block, 0..self.case.rows).filter(|row| own.contains(row)).collect();
            }
            self.share(block, rows.clone()).collect()
        };
        let merge = |of: usize| {
            let share = share_of(of);
            share.iter().for_each(|&row| self.merge_row(epoch, rank, row, keeps && of == block));
            share.len()
        };
        if block != last {
            // It does not wait for ranks that have not come.
            let comes = look(epoch, self.headers(rank, epoch));
            if !comes {
                window.left_over[slot].fetch_or(1 << block, Relaxed);
                fence(Release);
            }
            window.decided[slot].fetch_add(if comes { 1 } else { 1 | 1 << 32 }, Relaxed);
            if keeps && !comes {
                share_of(block).into_iter().for_each(|row| self.push_row_to(epoch, rank, rank, row));
            }
            return if comes { merge(block) } else { 0 };
        }
        let decided = loop {
            let decided = window.decided[slot].load(Relaxed);
            if decided as u32 as usize == last || self.lacks(Without::Decisions) {
                break decided;
            }
            thread::yield_now();
        };
        if !self.lacks(Without::Headers) {
            wait(epoch, self.headers(rank, epoch));
        }
        let mut merged = merge(last);
        if decided >> 32 != 0 {
            fence(Acquire);
            for block in 0..last {
                if window.left_over[slot].load(Relaxed) >> block & 1 != 0 {
                    merged += merge(block);
                }
            }
        }
        merged
    }

    /// What the last block does in two shots. How many rows it was.
    fn receive_two_shot(&self, rank: usize, epoch: Epoch, rows: impl Iterator<Item = usize> + Clone) -> usize {
        let (window, parity) = (&self.windows[rank], self.parity(epoch));
        wait(epoch, self.headers(rank, epoch));
        for row in rows.clone().filter(|&row| self.owner(row) == rank) {
            self.merge_row(epoch, rank, row, false);
            for to in self.others_first(rank) {
                let word = packet(Word::Merged(row).data(rank, epoch), epoch);
                self.windows[to].merged[parity][row].store(word, Relaxed);
            }
        }
        rows.inspect(|&row| {
            let data = Word::Merged(row).data(self.owner(row), epoch);
            wait(epoch, [(&window.merged[parity][row], data)].into_iter());
        })
        .count()
    }

    /// What one thread of a rank does.
    fn run(&self, rank: usize, thread: usize) {
        let Case { blocks, threads, launches, .. } = self.case;
        for turn in (thread..blocks * launches).step_by(threads) {
            self.launch(rank, turn % blocks, turn / blocks);
        }
    }
}
