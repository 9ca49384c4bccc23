//! What routes over NCCL share.
//!
//! `connect` gives a rank its NCCL communicator, `words` is what kernels and host tell each other, `watchdog` ends steps whose
//! peers do not come, `allgather` gathers the partials of a step and merges them.
//!
//! A step may be captured. Once a step has failed NCCL has given up what its graphs name: they must not be replayed.

pub(super) mod allgather;
pub(super) mod connect;
pub(super) mod watchdog;
pub(super) mod words;

use crate::device::environment;

/// Whether exchanges shall go over NCCL where windows would do: `TREEATTN_GPU_EXCHANGE=nccl` when the process made its first
/// runtime.
pub(super) fn is_asked_for() -> bool {
    environment().gpu_exchange.as_ref().is_some_and(|word| word == "nccl")
}
