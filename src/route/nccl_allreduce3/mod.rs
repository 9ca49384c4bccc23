//! `ALLREDUCE3` on GPUs: the paper's merge (arXiv 2408.04093, algorithm 3) by three NCCL allreduces on the caller's stream,
//! with the library's own attention kernel. A baseline, to be compared with.
//!
//! `connect` gives a rank its NCCL communicator, `words` is what kernels and host tell each other, `watchdog` ends steps
//! whose peers do not come, `route` is the plan's part.
//!
//! A step may be captured. Once a step has failed NCCL has given up what its graphs name: they must not be replayed.

mod connect;
pub(super) mod route;
mod watchdog;
mod words;
