//! Where the ranks of one process wait for each other before an exchange of the setup.
//!
//! Such an exchange is an NCCL kernel on every rank's GPU, which runs until all ranks have launched theirs. What a rank does
//! between two of them (it allocates, loads modules, opens peer access) may wait for kernels that run, on its own GPU or, as
//! it concerns all contexts of the process, on another. Were a rank to launch its kernel while another of its process is
//! still at that, each would wait for the other. So no rank of a process launches before all of them are about to.
//!
//! Ranks of other processes need not be waited for: their contexts are not this process's. Ranks that were split off an
//! engine's communicator have no name at first. They have allocated what they need before the split, agree on a name in their
//! first exchanges, and meet from then on.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

/// How often a wait looks whether something else ends it.
const CHECK: Duration = Duration::from_millis(2);

/// The name of a communicator to be, `ncclUniqueId`.
type Id = [u8; super::library::UNIQUE_ID_BYTES];

/// The communicators that have ranks in this process.
static ALL: Mutex<Vec<(Id, Weak<Rendezvous>)>> = Mutex::new(Vec::new());

/// The ranks of this process in one communicator.
#[derive(Default)]
struct Rendezvous {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    members: Vec<i32>,
    arrived: Vec<i32>,
    /// Exchanges for which all have arrived.
    turn: u64,
}

/// One rank's membership, from before the communicator is made. Dropping it leaves.
pub(super) struct Member {
    rank: i32,
    shared: Arc<Rendezvous>,
}

impl Member {
    /// Rank `rank` of the communicator called `id`. `members`: the ranks that are known to join in this process, at any time;
    /// nobody goes on without them. Where none are, all must have joined before the first waits; NCCL sees to that, as it
    /// takes every rank to make a communicator.
    pub fn join(id: &Id, rank: i32, members: &[i32]) -> Member {
        let mut all = ALL.lock();
        all.retain(|(_, known)| known.strong_count() > 0);
        let known = all.iter().find(|(known, _)| known == id).and_then(|(_, known)| known.upgrade());
        let shared = known.unwrap_or_else(|| {
            let new: Arc<Rendezvous> = Arc::default();
            new.state.lock().members.extend(members);
            all.push((*id, Arc::downgrade(&new)));
            new
        });
        let mut state = shared.state.lock();
        if !state.members.contains(&rank) {
            state.members.push(rank);
        }
        drop(state);
        Member { rank, shared }
    }

    /// Waits until all members have come here as often as this one, or until `until`: then it gives the first rank that has
    /// not. `check` is called every now and then; its error ends the wait.
    pub fn wait<E>(&self, until: Instant, check: impl Fn() -> Result<(), E>) -> Result<Result<(), i32>, E> {
        let mut state = self.shared.state.lock();
        let turn = state.turn;
        state.arrived.push(self.rank);
        self.shared.advance(&mut state);
        while state.turn == turn {
            let now = Instant::now();
            let result = match MutexGuard::unlocked(&mut state, &check) {
                Ok(()) if now < until => {
                    self.shared.changed.wait_until(&mut state, until.min(now + CHECK));
                    continue;
                }
                // All may have come while the lock was not held.
                _ if state.turn != turn => break,
                Ok(()) => Ok(Err(state.first_missing().unwrap_or(self.rank))),
                Err(error) => Err(error),
            };
            state.arrived.retain(|&rank| rank != self.rank);
            return result;
        }
        Ok(Ok(()))
    }
}

impl State {
    fn first_missing(&self) -> Option<i32> {
        self.members.iter().copied().filter(|rank| !self.arrived.contains(rank)).min()
    }
}

impl Rendezvous {
    /// Lets all go on once all have arrived.
    fn advance(&self, state: &mut State) {
        if state.arrived.len() >= state.members.len() {
            state.arrived.clear();
            state.turn += 1;
            self.changed.notify_all();
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.members.retain(|&rank| rank != self.rank);
        state.arrived.retain(|&rank| rank != self.rank);
        // The others do not wait for one that is gone; NCCL tells them of it.
        self.shared.advance(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const LONG: Duration = Duration::from_secs(20);

    fn id(name: u8) -> Id {
        [name; super::super::library::UNIQUE_ID_BYTES]
    }

    fn wait(member: &Member, timeout: Duration) -> Result<Result<(), i32>, ()> {
        member.wait(Instant::now() + timeout, || Ok(()))
    }

    #[test]
    fn nobody_goes_on_before_all_are_there() {
        let members = [0, 1, 2].map(|rank| Member::join(&id(1), rank, &[]));
        let other = Member::join(&id(2), 0, &[]);
        assert_eq!(wait(&other, LONG), Ok(Ok(())), "another communicator");
        let arrived = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for member in &members {
                scope.spawn(|| {
                    for turn in 1..=200 {
                        if member.rank as usize == turn % 3 {
                            std::thread::yield_now();
                        }
                        arrived.fetch_add(1, Ordering::SeqCst);
                        assert_eq!(wait(member, LONG), Ok(Ok(())));
                        assert!(arrived.load(Ordering::SeqCst) >= 3 * turn, "turn {turn}");
                    }
                });
            }
        });
    }

    #[test]
    fn members_that_are_known_to_come_are_waited_for() {
        let first = Member::join(&id(4), 0, &[0, 1]);
        assert_eq!(wait(&first, Duration::from_millis(5)), Ok(Err(1)));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| wait(&first, LONG));
            let second = Member::join(&id(4), 1, &[0, 1]);
            assert_eq!(wait(&second, LONG), Ok(Ok(())));
            assert_eq!(waiting.join().unwrap(), Ok(Ok(())));
        });
    }

    #[test]
    fn a_wait_ends_by_time_by_error_and_by_leaving() {
        let [first, second] = [0, 1].map(|rank| Member::join(&id(3), rank, &[]));
        assert_eq!(wait(&first, Duration::from_millis(5)), Ok(Err(1)));
        assert_eq!(first.wait(Instant::now() + LONG, || Err("over")), Err("over"));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| wait(&first, LONG));
            std::thread::sleep(Duration::from_millis(5));
            drop(second);
            assert_eq!(waiting.join().unwrap(), Ok(Ok(())));
        });
    }
}
