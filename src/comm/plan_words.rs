//! Words in mapped host memory that the kernels of plans write and the host reads.
//!
//! They belong to the communicator and are leased to plans. So whoever asks for a communicator's status reads them without
//! owning a plan for that time: it is never the one that gives a plan's memory back, which waits for a GPU.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::board::PlanFault;
use crate::device::cuda::{Allocations, CudaDevice, MappedWords};
use crate::error::Result;
use crate::partial::view::{host, value};
use crate::partial::{BadValue, DataFault};

/// Words of a lease.
pub(crate) const WORDS: usize = 16;
/// The word for bad data that this rank met, which kernels write.
pub(crate) const OWN_FAULT: usize = 0;
/// What the host has taken of that.
const OWN_TAKEN: usize = OWN_FAULT + host::TAKEN_AFTER;
/// The first of two words in which kernels count.
pub(crate) const COUNTS: usize = 2;
/// The word for bad data that any rank met, with the rank, where an exchange brings it: stored by one thread a step.
pub(crate) const ANY_FAULT: usize = COUNTS + 2;
/// The first word of the value that was bad, as [`value`] says; of whatever route, where this rank met it.
pub(crate) const BAD_VALUE: usize = ANY_FAULT + 1;
/// The [failure](crate::partial::word::Failure) that a step of the plan has found in what ranks sent each other; 0 for none.
pub(crate) const FAILURE: usize = BAD_VALUE + value::WORDS;
const _: () = assert!(FAILURE < WORDS);
/// Leases that are allocated together: a page.
const LEASES: usize = 4096 / (8 * WORDS);

/// The words of one rank's plans. Any thread may use them.
pub(crate) struct PlanWords {
    rank: i32,
    state: Mutex<State>,
    /// Gives the pages back, after all leases. Locked while a page is allocated, which may wait for a GPU; `state` is not.
    allocations: Mutex<Allocations>,
}

#[derive(Default)]
struct State {
    pages: Vec<MappedWords>,
    /// Free leases, longest free first.
    free: VecDeque<Location>,
    leased: Vec<(u64, Location)>,
}

/// Where the words of a lease are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Location {
    page: usize,
    first: usize,
}

/// A plan's words. They are given back when it is dropped, which must not be before the plan's kernels are done, or given up.
pub(crate) struct PlanLease {
    words: Arc<PlanWords>,
    at: Location,
    address: u64,
}

impl PlanWords {
    /// No words yet, for plans of `rank` on `device`. Dropping them waits for the device at most `timeout`.
    pub fn new(device: &Arc<CudaDevice>, rank: i32, timeout: Duration) -> Arc<PlanWords> {
        let allocations = Mutex::new(Allocations::new(device, timeout));
        Arc::new(PlanWords { rank, state: Mutex::default(), allocations })
    }

    /// Words for plan number `plan`, all 0. May allocate, and block; `Capturing` during a capture.
    pub fn lease(self: &Arc<Self>, plan: u64) -> Result<PlanLease> {
        loop {
            if let Some(lease) = self.lease_free(plan) {
                return Ok(lease);
            }
            let mut allocations = self.allocations.lock();
            if !self.state.lock().free.is_empty() {
                // Another plan was first to allocate.
                continue;
            }
            let words = allocations.words(LEASES * WORDS)?;
            let mut state = self.state.lock();
            let page = state.pages.len();
            state.pages.push(words);
            state.free.extend((0..LEASES).map(|i| Location { page, first: i * WORDS }));
        }
    }

    /// The words that were free for the longest time, if there are any.
    fn lease_free(self: &Arc<Self>, plan: u64) -> Option<PlanLease> {
        let mut state = self.state.lock();
        let at = state.free.pop_front()?;
        state.leased.push((plan, at));
        let address = state.pages[at.page].address() + 8 * at.first as u64;
        Some(PlanLease { words: Arc::clone(self), at, address })
    }

    /// Gives the faults that this rank met the values that were bad, and the plans that met them, as far as kernels have said it.
    /// What they have said of others is forgotten: it belongs to faults that an earlier one hides. Waits for nothing.
    pub fn add_values(&self, faults: &mut [PlanFault]) {
        let state = self.state.lock();
        for &(plan, at) in &state.leased {
            let (page, first) = (&state.pages[at.page], at.first + BAD_VALUE);
            // SAFETY: as in `take_faults`.
            let load = |word: usize| unsafe { page.load(first + word) };
            let key = load(value::KEY);
            let [index, found, least, most] =
                [value::INDEX, value::FOUND, value::LEAST, value::MOST].map(|word| load(word).cast_signed());
            // SAFETY: as in `take_faults`. Where a kernel has begun to write another value meanwhile, the key is no more.
            if key == 0 || unsafe { page.take(first + value::KEY) } != key {
                continue;
            }
            let value = BadValue { index, found, least, most };
            let own = faults.iter_mut().filter(|met| met.rank == self.rank && met.fault.value.is_none());
            // The plan itself, or an exchange that does not know which plan it was.
            let met = own
                .filter_map(|met| Some((met.fault.valued(key, value)?, met)))
                .max_by_key(|(_, met)| met.plan == plan);
            if let Some((fault, met)) = met {
                (met.fault, met.plan) = (fault, plan);
            }
        }
    }

    /// The failure that a step of some plan has found in what ranks sent each other; 0 for none. Waits for nothing.
    pub fn failure(&self) -> u64 {
        let state = self.state.lock();
        let found = state.leased.iter().map(|&(_, at)| {
            // SAFETY: as in `take_faults`.
            unsafe { state.pages[at.page].load(at.first + FAILURE) }
        });
        found.into_iter().find(|&word| word != 0).unwrap_or(0)
    }

    /// The bad data that steps have met since the last time, plan by plan. Waits for nothing.
    pub fn take_faults(&self) -> Vec<PlanFault> {
        let state = self.state.lock();
        let mut found = Vec::new();
        for &(plan, at) in &state.leased {
            let page = &state.pages[at.page];
            // SAFETY: `allocations` gave the page, and lives as long as `self`; a location is of words inside its page.
            let own = unsafe { page.take_told(at.first + OWN_FAULT, at.first + OWN_TAKEN) };
            if let Some((_, fault)) = DataFault::from_told(own) {
                found.push(PlanFault { rank: self.rank, plan, fault });
            }
            // SAFETY: as above.
            let any = unsafe { page.take(at.first + ANY_FAULT) };
            if let Some((rank, fault)) = DataFault::from_word(any) {
                found.push(PlanFault { rank, plan, fault });
            }
        }
        found
    }
}

impl PlanLease {
    /// The device's address of a word.
    pub fn address(&self, word: usize) -> u64 {
        self.address + 8 * word as u64
    }

    /// A word.
    pub fn load(&self, word: usize) -> u64 {
        let state = self.words.state.lock();
        // SAFETY: as in `take_faults`; `self` keeps the words alive.
        unsafe { state.pages[self.at.page].load(self.at.first + word) }
    }
}

impl Drop for PlanLease {
    fn drop(&mut self) {
        let mut state = self.words.state.lock();
        for word in 0..WORDS {
            // SAFETY: as in `take_faults`.
            unsafe { state.pages[self.at.page].take(self.at.first + word) };
        }
        state.leased.retain(|&(_, at)| at != self.at);
        state.free.push_back(self.at);
    }
}
