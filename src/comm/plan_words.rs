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
use crate::partial::DataFault;

/// Words of a lease.
pub(crate) const WORDS: usize = 4;
/// The word for bad data that this rank met.
pub(crate) const OWN_FAULT: usize = 0;
/// The word for bad data that any rank met, with the rank, where an exchange brings it.
pub(crate) const ANY_FAULT: usize = 3;
/// Leases that are allocated together: a page.
const LEASES: usize = 4096 / (8 * WORDS);

/// The words of one rank's plans. Any thread may use them.
pub(crate) struct PlanWords {
    rank: i32,
    state: Mutex<State>,
}

struct State {
    pages: Vec<MappedWords>,
    /// Free leases, longest free first.
    free: VecDeque<Place>,
    leased: Vec<(u64, Place)>,
    /// Gives the pages back, after all leases.
    holdings: Allocations,
}

/// Where the words of a lease are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    page: usize,
    first: usize,
}

/// A plan's words. They are given back when it is dropped, which must not be before the plan's kernels are done, or given up.
pub(crate) struct PlanLease {
    words: Arc<PlanWords>,
    place: Place,
    address: u64,
}

impl PlanWords {
    /// No words yet, for plans of `rank` on `device`. Dropping them waits for the device at most `patience`.
    pub fn new(device: &Arc<CudaDevice>, rank: i32, patience: Duration) -> Arc<PlanWords> {
        let holdings = Allocations::new(device, patience);
        let state = State { pages: Vec::new(), free: VecDeque::new(), leased: Vec::new(), holdings };
        Arc::new(PlanWords { rank, state: Mutex::new(state) })
    }

    /// Words for plan number `plan`, all 0. May allocate, and block; `Capturing` during a capture.
    pub fn lease(self: &Arc<Self>, plan: u64) -> Result<PlanLease> {
        let mut state = self.state.lock();
        if state.free.is_empty() {
            let page = state.holdings.words(LEASES * WORDS)?;
            state.pages.push(page);
            let page = state.pages.len() - 1;
            state.free.extend((0..LEASES).map(|i| Place { page, first: i * WORDS }));
        }
        let State { pages, free, leased, .. } = &mut *state;
        let place = free.pop_front().unwrap_or(Place { page: 0, first: 0 });
        leased.push((plan, place));
        let address = pages[place.page].address() + 8 * place.first as u64;
        Ok(PlanLease { words: Arc::clone(self), place, address })
    }

    /// The bad data that steps have met since the last time, plan by plan. Waits for nothing.
    pub fn take_faults(&self) -> Vec<PlanFault> {
        let state = self.state.lock();
        let mut found = Vec::new();
        for &(plan, place) in &state.leased {
            // SAFETY: the holdings in `state` gave the page and are alive; the words are inside it.
            let take = |word: usize| unsafe { state.pages[place.page].take(place.first + word) };
            if let Some((_, fault)) = DataFault::from_word(take(OWN_FAULT)) {
                found.push(PlanFault { rank: self.rank, plan, fault });
            }
            if let Some((rank, fault)) = DataFault::from_word(take(ANY_FAULT)) {
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
        // SAFETY: as in `take_faults`; the place is leased for as long as `self`.
        unsafe { state.pages[self.place.page].load(self.place.first + word) }
    }
}

impl Drop for PlanLease {
    fn drop(&mut self) {
        let mut state = self.words.state.lock();
        for word in 0..WORDS {
            // SAFETY: as in `take_faults`.
            unsafe { state.pages[self.place.page].take(self.place.first + word) };
        }
        state.leased.retain(|&(_, place)| place != self.place);
        state.free.push_back(self.place);
    }
}
