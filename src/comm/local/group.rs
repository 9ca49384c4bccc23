//! What the ranks of a local group share: windows, slots, blobs of allgathers, and how they wait and fail together.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::message::MessageSlot;
use crate::comm::call_word::CallWord;
use crate::comm::errors;
use crate::comm::rounds::Round;
use crate::device::{EventCount, HostBuffer, WaitStrategy};
use crate::error::{Error, Result};
use crate::partial::epoch::{Arrivals, Cursor, Epoch, Header, SLOTS, Slot};

/// How long past its deadline a wait gives a rank that has published but not yet counted itself.
const GRACE: Duration = Duration::from_millis(50);

/// The shared part of a local group.
pub(super) struct Group {
    pub(super) id: u64,
    pub(super) setup_timeout: Duration,
    pub(super) step_timeout: Duration,
    pub(super) strategy: WaitStrategy,
    pub(super) capacity: usize,
    pub(super) events: EventCount,
    pub(super) arrivals: Padded<Arrivals<AtomicU32>>,
    /// Openings of steps.
    pub(super) openings: Padded<Arrivals<AtomicU32>>,
    /// Set with `error`.
    pub(super) broken: AtomicBool,
    pub(super) error: Mutex<Option<Error>>,
    /// Ranks that came too late for what the others gave up.
    pub(super) late: OnceLock<Vec<usize>>,
    /// Ranks that have left.
    pub(super) gone: AtomicU32,
    /// What each rank gave in its last two allgathers: number and blob, by parity.
    pub(super) blobs: Mutex<Vec<[Blob; SLOTS]>>,
    pub(super) ranks: Vec<RankState>,
    /// The payloads, `SLOTS` x `capacity` bytes a rank; reached by `payload` and `payload_mut` alone.
    pub(super) windows: HostBuffer,
}

/// The number of an allgather, and what a rank gave in it.
pub(super) type Blob = (u64, Vec<u8>);

/// A value on cache lines of its own.
#[repr(align(128))]
#[derive(Default)]
pub(super) struct Padded<T>(pub(super) T);

/// One rank's state. Its peers read the slots and `gone`.
#[repr(align(128))]
#[derive(Default)]
pub(super) struct RankState {
    pub(super) slots: [Padded<Slot<AtomicU64>>; SLOTS],
    pub(super) cursor: Cursor<AtomicU32>,
    /// The headers of the last two steps that it opened, with a [`CallWord`] in place of a fault.
    pub(super) opened: [Padded<Slot<AtomicU64>>; SLOTS],
    /// The epoch of the step that it opened last.
    pub(super) opening: AtomicU32,
    /// Steps that it has opened.
    pub(super) steps: AtomicU64,
    pub(super) message: MessageSlot,
    /// Notified of this rank's hops.
    pub(super) events: EventCount,
    pub(super) rounds: AtomicU64,
    pub(super) gathers: AtomicU64,
    pub(super) busy: AtomicBool,
    pub(super) gone: AtomicBool,
    /// Why this rank failed, where that differs from the group's error.
    pub(super) error: Mutex<Option<Error>>,
}

/// The payloads of one round, in the windows.
pub(super) struct LocalRound<'a> {
    pub(super) group: &'a Group,
    pub(super) epoch: Epoch,
    pub(super) bytes: usize,
}

impl Round for LocalRound<'_> {
    fn payload(&self, rank: usize) -> &[u8] {
        // SAFETY: a `LocalRound` is made when the epoch is complete, with the `bytes` that every rank published in it, and
        // gone before its rank consumes the epoch; until then no rank begins the next epoch of this slot.
        unsafe { self.group.payload(rank, self.epoch.slot(), self.bytes) }
    }

    fn fault(&self, rank: usize) -> u64 {
        self.group.header(rank, self.epoch).map_or(0, |header| header.fault)
    }
}

impl Group {
    /// The first `bytes` bytes of a rank's slot. Panics outside the windows.
    ///
    /// # Safety
    /// Nobody writes the slot while the slice lives.
    pub(super) unsafe fn payload(&self, rank: usize, slot: usize, bytes: usize) -> &[u8] {
        assert!(rank < self.ranks.len() && slot < SLOTS && bytes <= self.capacity);
        // SAFETY: the windows hold SLOTS x capacity bytes a rank, so the range is inside them by the assertion (a slot is a
        // parity); they are initialised and live as long as `self`; the caller keeps writers away.
        unsafe { std::slice::from_raw_parts(self.windows.as_ptr().add((rank * SLOTS + slot) * self.capacity), bytes) }
    }

    /// As [`Group::payload`], to write.
    ///
    /// # Safety
    /// Nobody else reads or writes the slot while the slice lives.
    #[allow(clippy::mut_from_ref)] // the protocol, not the borrow, makes it exclusive
    pub(super) unsafe fn payload_mut(&self, rank: usize, slot: usize, bytes: usize) -> &mut [u8] {
        assert!(rank < self.ranks.len() && slot < SLOTS && bytes <= self.capacity);
        // SAFETY: inside the windows, as in `payload`; the caller keeps everybody else away.
        unsafe {
            std::slice::from_raw_parts_mut(self.windows.as_mut_ptr().add((rank * SLOTS + slot) * self.capacity), bytes)
        }
    }

    /// What `rank` published in `epoch`, if it has and its slot still holds it.
    pub(super) fn header(&self, rank: usize, epoch: Epoch) -> Option<Header> {
        self.ranks[rank].slots[epoch.slot()].0.read(epoch)
    }

    /// Breaks the group, unless it is broken, and ends every wait. Gives the error that broke it.
    pub(super) fn break_with(&self, error: Error) -> Error {
        let first = lock(&self.error).get_or_insert(error).clone();
        if !self.broken.swap(true, Ordering::AcqRel) {
            self.notify_all();
        }
        first
    }

    pub(super) fn notify_all(&self) {
        self.events.notify();
        self.ranks.iter().for_each(|rank| rank.events.notify());
    }

    /// The fingerprint with which `rank` opened step `epoch`, and the call for messages; none if it has not.
    pub(super) fn opening(&self, rank: usize, epoch: Epoch) -> Option<(u64, CallWord)> {
        let header = self.ranks[rank].opened[epoch.slot()].0.read(epoch)?;
        Some((header.fingerprint, CallWord::from_bits(header.fault)))
    }

    /// The error of a step that all ranks have opened, but with different fingerprints: it names the odd rank, as `me` sees it.
    pub(super) fn odd_opening(&self, me: usize, epoch: Epoch) -> Option<Error> {
        let world = self.ranks.len();
        if !(0..world).all(|rank| self.opening(rank, epoch).is_some()) {
            return None;
        }
        let step = self.ranks[me].steps.load(Ordering::Relaxed);
        errors::desync(|| format!("step {step}"), me, world, |rank| self.opening(rank, epoch).unwrap_or_default())
    }

    pub(super) fn broken(&self) -> Option<Error> {
        if !self.broken.load(Ordering::Acquire) {
            return None;
        }
        lock(&self.error).clone()
    }

    /// Waits on the thread of rank `me` until `done`, watching the group's health, whether `me` is still there, and the
    /// deadline. `absence(r)` says how far rank r has come, `what` is for messages.
    pub(super) fn wait(
        &self,
        me: usize,
        done: impl Fn() -> bool,
        absence: impl Fn(usize) -> Absence,
        what: impl Fn() -> String,
        deadline: WaitDeadline<'_>,
    ) -> Result<()> {
        let mut until = deadline.until;
        let mut late = false;
        loop {
            let seen = deadline.events.key();
            if done() {
                return Ok(());
            }
            if self.ranks[me].gone.load(Ordering::Acquire) {
                return Err(errors::left(me));
            }
            if let Some(error) = self.broken() {
                return Err(error);
            }
            if self.gone.load(Ordering::Acquire) > 0 {
                let lost = (0..self.ranks.len())
                    .find(|&r| self.ranks[r].gone.load(Ordering::Acquire) && absence(r) != Absence::Present);
                if let Some(rank) = lost {
                    return Err(self.break_with(errors::peer_lost(&what(), rank)));
                }
            }
            if Instant::now() >= until {
                // Ranks that have not begun the step are blamed before those that have, which may be waiting for them, too.
                let most = (0..self.ranks.len()).map(&absence).max().unwrap_or(Absence::Present);
                let late_ranks = (0..self.ranks.len()).filter(|&r| most != Absence::Present && absence(r) == most);
                let missing: Vec<usize> = late_ranks.collect();
                if !missing.is_empty() || late {
                    let error = errors::timeout(&what(), &missing, deadline.field, deadline.timeout);
                    // If another error comes first, no rank is told that it was late.
                    let _ = self.late.set(missing);
                    return Err(self.break_with(error));
                }
                // Every rank has published, but some have not counted themselves yet.
                (late, until) = (true, until + GRACE);
            }
            deadline.events.wait(seen, self.strategy, Some(until));
        }
    }
}

/// How far a rank is from giving what is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Absence {
    /// It has given it, or need not.
    Present,
    /// It has begun the step.
    Late,
    /// It has not.
    Absent,
}

/// How long a wait may last, and what ends it early.
#[derive(Clone, Copy)]
pub(super) struct WaitDeadline<'a> {
    pub(super) events: &'a EventCount,
    pub(super) until: Instant,
    /// The deadline's name and length, for messages.
    pub(super) field: &'static str,
    pub(super) timeout: Duration,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
