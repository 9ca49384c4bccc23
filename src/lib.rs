//! libtreeattn: exact decode attention over a KV cache that is sharded along the sequence.
//!
//! Each rank (a GPU, a set of CPU workers, a process) attends its own shard and yields a partial, (output,
//! log-sum-exp); partials meet by an associative merge, so they meet in a tree (Tree Attention, arXiv 2408.04093).
//! Also known as decode context parallelism; not the tree *mask* of speculative decoding.
//!
//! The Rust API: a [`Runtime`](runtime::Runtime) a process, a [`Communicator`](runtime::Communicator) a rank, a
//! [`Plan`](runtime::Plan) a shape and rank, and [`Plan::decode`](runtime::Plan::decode) for every layer of every step, with
//! [`DecodeArgs`](attention::DecodeArgs). `examples/decode.rs` shows them at work. Every call returns a [`Result`]; none
//! panics or ends the process. README.md says what is accepted, what errors leave behind, and who runs and waits where.
//!
//! The modules; each may use those below it:
//!
//! | module | holds |
//! |---|---|
//! | `ffi` | the C ABI, one file a section of `include/treeattn.h` |
//! | [`runtime`] | runtimes, streams, buffers, communicators, plans: the Rust API |
//! | `route` | what a plan does with a step, from this rank's shard to the merged output |
//! | [`cpu`], `cuda`, `comm` | the two backends that attend a shard; how ranks find each other, exchange and fail together |
//! | [`device`] | devices, worker threads, queues, host memory; the CUDA driver |
//! | [`partial`] | the monoid of partials, where they lie in memory, and the epoch protocol |
//! | [`attention`] | shapes, tensors, steps, placement, the float64 reference |
//! | [`error`], [`fault`] | the one error type; named points at which tests inject faults |

pub mod attention;
pub(crate) mod comm;
pub mod cpu;
pub(crate) mod cuda;
pub mod device;
pub mod error;
pub mod fault;
pub mod ffi;
pub mod partial;
pub(crate) mod route;
pub mod runtime;

pub use error::{Error, ErrorKind, Result};
