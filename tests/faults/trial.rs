//! A trial: which fault, where, when; and which results are right.

use std::collections::BTreeMap;
use std::time::Duration;

pub use treeattn::attention::Algorithm;

use treeattn::ErrorKind;
use treeattn::runtime::CommConfig;

use crate::mesh::LONG;
use crate::rank::Outcome;
use crate::rng::Rng;

/// Where the ranks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Threads that share memory.
    Local,
    /// Threads with sockets between them.
    Sockets,
    /// Processes with sockets between them.
    Processes,
    /// Processes in network namespaces of their own.
    Namespaces,
}

/// What happens to one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Nothing.
    None,
    /// It does not come to a step, but is there.
    Silent,
    /// It ends: its process, its sockets, or its communicator.
    Killed,
    /// It comes late, but in time.
    Slow,
    /// It comes after the others have given up.
    Late,
    /// It issues another step than the others.
    Batch,
    /// It asks for another plan than the others.
    Descriptor,
    /// It aborts, while others wait or before they do.
    Aborted,
    /// Its callback fails.
    Failing,
    /// Its connections end within a message.
    Cut,
    /// Its callback brings garbage.
    Garbage,
    /// Its network link goes down.
    Unplugged,
}

/// The algorithm that AUTO picks most often comes more often.
pub const ALGORITHMS: [Algorithm; 7] = [
    Algorithm::Auto,
    Algorithm::OneShot,
    Algorithm::OneShot,
    Algorithm::TwoShot,
    Algorithm::Tree,
    Algorithm::Allreduce3,
    Algorithm::Ring,
];

/// One fault in one group.
#[derive(Clone, Debug)]
pub struct Trial {
    pub place: Place,
    pub seed: u64,
    pub world: usize,
    pub fault: Fault,
    /// The rank that it happens to.
    pub victim: usize,
    /// The step at which it happens.
    pub at: usize,
    /// Whether the others' callbacks wait for the abort word alone.
    pub deaf: bool,
    pub algorithm: Algorithm,
}

impl Trial {
    pub fn new(place: Place, seed: u64) -> Trial {
        let mut r = Rng::new(seed);
        let shared =
            [Fault::Silent, Fault::Killed, Fault::Slow, Fault::Late, Fault::Batch, Fault::Descriptor, Fault::Aborted];
        let over_sockets = [Fault::Failing, Fault::Cut, Fault::Garbage];
        let mut faults = shared.to_vec();
        match place {
            Place::Local => {}
            Place::Sockets => faults.extend(over_sockets),
            // Killed most often: a signal ends a process at any moment.
            Place::Processes => faults.extend([over_sockets.as_slice(), &[Fault::Killed; 4]].concat()),
            Place::Namespaces => {
                faults = vec![Fault::Killed, Fault::Unplugged, Fault::Unplugged, Fault::Slow, Fault::Cut]
            }
        }
        let world = if place == Place::Namespaces { 3 } else { r.range(2, 5) };
        Trial {
            place,
            seed,
            world,
            fault: r.pick(&faults),
            victim: r.range(0, world - 1),
            at: r.range(0, 5),
            deaf: place != Place::Local && r.chance(30),
            algorithm: r.pick(&ALGORITHMS),
        }
    }

    /// A trial without a fault.
    pub fn quiet(place: Place, world: usize, algorithm: Algorithm) -> Trial {
        let fault = Fault::None;
        Trial { place, seed: 0, world, fault, victim: 0, at: 0, deaf: false, algorithm }
    }

    pub fn in_processes(&self) -> bool {
        matches!(self.place, Place::Processes | Place::Namespaces)
    }

    /// How many steps a rank that nothing ends would do.
    pub fn steps(&self) -> usize {
        match self.fault {
            Fault::None | Fault::Slow => self.at + 4,
            _ => 1_000_000,
        }
    }

    /// The step deadline: short where it has to pass.
    pub fn deadline(&self) -> Duration {
        if matches!(self.fault, Fault::None | Fault::Slow) { LONG / 2 } else { Duration::from_millis(200) }
    }

    /// A moment within a few steps.
    pub fn pause(&self) -> Duration {
        Duration::from_micros(self.seed % 3000)
    }

    /// How late a slow rank is.
    pub fn slowness(&self) -> Duration {
        Duration::from_millis(self.seed % 40)
    }

    /// The ranks that still are when it is over.
    pub fn survivors(&self) -> Vec<usize> {
        let gone = matches!(self.fault, Fault::Unplugged) || self.fault == Fault::Killed && self.in_processes();
        (0..self.world).filter(|&rank| !gone || rank != self.victim).collect()
    }

    pub fn config(&self) -> CommConfig {
        let step_timeout = self.deadline();
        CommConfig { step_timeout, setup_timeout: LONG, threads_per_rank: 1, ..CommConfig::default() }
    }

    /// For a communicator to which nothing happens.
    pub fn patient_config(&self) -> CommConfig {
        CommConfig { step_timeout: LONG, ..self.config() }
    }

    /// The errors that a rank may end with.
    fn expected(&self, victim: bool) -> &'static [ErrorKind] {
        use ErrorKind::{Aborted, Desync, Mismatch, ParentDestroyed, PeerLost, Timeout, Transport};
        let local = self.place == Place::Local;
        match (self.fault, local, victim) {
            (Fault::None | Fault::Slow, ..) | (Fault::Silent, _, true) => &[],
            (Fault::Silent | Fault::Late, true, _) => &[Timeout],
            (Fault::Killed, true, false) => &[PeerLost],
            (Fault::Killed, true, true) => &[ParentDestroyed],
            (Fault::Descriptor, ..) => &[Mismatch],
            // In a tree only those that meet the odd one see it; the others wait for them.
            (Fault::Batch, false, _) if self.algorithm == Algorithm::Tree => &[Desync, Timeout, Transport],
            (Fault::Batch, ..) => &[Desync],
            (Fault::Aborted, true, _) | (Fault::Aborted, false, true) => &[Aborted],
            (Fault::Failing, _, true) => &[Transport],
            (Fault::Garbage, _, true) => &[Desync],
            // Over an engine's transport: a connection that ends, or silence.
            _ => &[Transport, Timeout],
        }
    }

    /// Holds what the ranks tell against what has to be. None: the rank is gone.
    pub fn judge(&self, outcomes: &[Option<Outcome>], tally: &mut Tally) {
        let told = || format!("{self:?}: {outcomes:#?}\nTREEATTN_CASE={} runs this trial alone", self.seed);
        for (rank, outcome) in outcomes.iter().enumerate() {
            let victim = rank == self.victim;
            let Some(outcome) = outcome else {
                assert!(
                    victim && self.fault == Fault::Killed && self.in_processes(),
                    "rank {rank} is gone: {}",
                    told()
                );
                continue;
            };
            assert_eq!(outcome.wrong, None, "rank {rank}: {}", told());
            assert_eq!(outcome.fresh, self.survivors().contains(&rank), "rank {rank}: {}", told());
            let expected = self.expected(victim);
            let Some((kind, blamed, took)) = outcome.error else {
                assert!(expected.is_empty(), "rank {rank} ended without an error: {}", told());
                continue;
            };
            // On a busy machine a rank may honestly be late.
            let local = self.place == Place::Local;
            let late = kind == ErrorKind::Timeout && (local || took >= self.deadline());
            if late && !expected.contains(&kind) {
                tally.late += 1;
                continue;
            }
            assert!(expected.contains(&kind), "rank {rank}: {kind:?}, wanted {expected:?}: {}", told());
            // Of two that differ, either may be the odd one.
            let odd = matches!(self.fault, Fault::Batch | Fault::Descriptor);
            let by_number = self.place == Place::Local && (self.world > 2 || !odd);
            if by_number && !victim {
                assert_eq!(blamed, Some(self.victim as i32), "rank {rank}: {}", told());
            }
            let over = took.saturating_sub(self.deadline());
            assert!(over < LONG / 2, "rank {rank} took {took:?}: {}", told());
            tally.longest = tally.longest.max(over);
            tally.overdue += usize::from(over > Duration::from_secs(1));
        }
        tally.trials += 1;
        *tally.faults.entry(self.fault).or_default() += 1;
    }
}

/// What the trials of a place added up to.
#[derive(Debug, Default)]
pub struct Tally {
    trials: usize,
    faults: BTreeMap<Fault, usize>,
    /// Ranks that timed out where something else was to come.
    late: usize,
    /// The longest that a call went on after its deadline.
    longest: Duration,
    /// Calls that went on for more than a second after it. The library promises none; a machine may stop for a while.
    overdue: usize,
}

impl Tally {
    pub fn finish(&self, place: Place) {
        println!(
            "{place:?}: {} faults, {:?}; at most {:?} past the deadline; {} ranks late by themselves",
            self.trials, self.faults, self.longest, self.late
        );
        assert!(self.overdue <= self.trials / 100, "{} calls were overdue", self.overdue);
        assert!(self.late <= 2 + self.trials / 20, "{} of {} trials were late", self.late, self.trials);
    }
}
