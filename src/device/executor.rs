//! Whose threads compute: the one question that the CPU backend asks of threads.

use crate::error::Result;

/// What one of the threads does, given its number.
pub type Job<'a> = dyn Fn(usize) + Sync + 'a;

/// Threads that run one job together: the library's own ([`Workers`](super::Workers)), or the engine's
/// ([`ParallelFor`](super::ParallelFor), [`Team`](super::Team)). Which thread runs which part makes no difference to a job, whose
/// parts never wait for each other. Any thread may use one.
pub trait Executor: Sync {
    /// Into how many parts a job is cut.
    fn threads(&self) -> usize;

    /// Runs `job(i)` for every i below [`threads`](Executor::threads), under the default floating-point state, and returns when
    /// none of it runs any more. Allocates nothing. A job must not run another here. A panic in one of them is an `Internal`
    /// error.
    fn run(&self, job: &Job<'_>) -> Result<()>;
}
