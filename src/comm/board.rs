//! What a communicator's status tells of its plans: plain data that plans write and `status` reads.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::error::{Error, ErrorKind};
use crate::partial::DataFault;

/// Bad data that a step of a plan met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlanFault {
    /// The rank that met it.
    pub rank: i32,
    /// The plan, by its number on the communicator.
    pub plan: u64,
    /// What it met.
    pub fault: DataFault,
}

impl PlanFault {
    /// The error to tell of it.
    fn error(&self) -> Error {
        if let Some(found) = self.fault.cause.disagreement() {
            let rank = if self.rank >= 0 { format!("rank {}", self.rank) } else { "the ranks together".into() };
            let message = format!(
                "{}: found {found} in sequence {} on {rank}, wanted the same queries and lengths on every rank and each \
                 position once on all together; the outputs of that sequence are NaN",
                self.fault.cause.argument(),
                self.fault.sequence
            );
            let error = Error::new(ErrorKind::Mismatch, message);
            return if self.rank >= 0 { error.with_rank(self.rank) } else { error };
        }
        let message = self.fault.message(&format!(" on rank {}", self.rank));
        Error::new(ErrorKind::InvalidData, message).with_rank(self.rank)
    }
}

/// Shared by a communicator and its plans; owns neither. Nothing here waits but for a lock that is held for a copy.
#[derive(Debug, Default)]
pub(crate) struct StatusBoard {
    last_plan: AtomicU64,
    steps: AtomicU64,
    pending: Mutex<Option<(PlanFault, Error)>>,
}

impl StatusBoard {
    /// The plan of the last step, 0 before the first.
    pub fn last_plan(&self) -> u64 {
        self.last_plan.load(Ordering::Relaxed)
    }

    /// A step of `plan` ran, or was enqueued.
    pub fn set_last_plan(&self, plan: u64) {
        self.last_plan.store(plan, Ordering::Relaxed);
    }

    /// Steps that exchanged: completed on a CPU, enqueued on a GPU.
    pub fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    /// Counts one.
    pub fn count_step(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    /// Keeps bad data for the next status, instead of what nobody has asked about yet. The error, which is told once: by the
    /// status, or by whoever else gets it.
    pub fn report(&self, fault: PlanFault) -> Error {
        let error = fault.error().told_once();
        *self.pending.lock() = Some((fault, error.clone()));
        error
    }

    /// The bad data reported last, unless somebody was told, which is then forgotten.
    pub fn take(&self) -> Option<(PlanFault, Error)> {
        self.pending.lock().take().filter(|(_, error)| error.claim())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partial::DataFaultCause;

    #[test]
    fn bad_data_is_told_once_and_names_rank_and_sequence() {
        let board = StatusBoard::default();
        assert_eq!((board.take(), board.last_plan()), (None, 0));
        let fault = DataFault::new(5, DataFaultCause::KvLength);
        board.report(PlanFault { rank: 2, plan: 9, fault });
        let (found, error) = board.take().unwrap();
        assert_eq!((found.plan, board.take()), (9, None));
        assert_eq!((error.kind(), error.rank()), (ErrorKind::InvalidData, Some(2)));
        assert!(error.message().starts_with("kv_length: ") && error.message().contains("sequence 5"), "{error}");
        assert!(board.report(PlanFault { rank: 2, plan: 9, fault }).claim());
        assert_eq!(board.take(), None);
    }
}
