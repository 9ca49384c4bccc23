//! The CPU backend: exact attention over one rank's shard on the rank's workers.
//!
//! `CpuBackend` (`backend`) turns a step into partials. From the outside in:
//!
//! | file | does |
//! |---|---|
//! | `pack` | copies keys and values for ranks that attend them elsewhere |
//! | `records` | what ranks of a checked plan tell each other of their sequences |
//! | `backend` | a step: checks, runs the workers, merges the items that they share |
//! | `slice` | a worker's slice, split by split |
//! | `task` | a split, tile by tile |
//! | `worker` | what a worker works with; loads queries, writes rows; `seen`: which keys of a tile its rows see |
//! | `rows` | where keys and values of a tile lie; `mask`: what masks hide and add |
//! | `partition` | cuts the flat line of (sequence, rows, kv heads, tiles) into equal slices |
//! | `sequences` | reads and checks what the step says |
//! | `shape` | sizes and formats of the plan, and the layout of scratch; `sums`: unfinished partials |
//! | `kernel` | what is done to a tile, compiled once an instruction set; `simd`: vectors and codecs; `isa` |
//!
//! A file imports only files below it. Depends on `attention`, `partial` and `device` only; knows nothing of other ranks.
//!
//! Unfinished partials keep numerator and denominator apart, over a power of two, so that no rescale rounds; they become
//! (o, lse) once, at the end.

mod backend;
mod isa;
mod kernel;
mod mask;
mod pack;
mod partition;
mod records;
mod rows;
mod seen;
mod sequences;
mod shape;
mod simd;
mod slice;
mod sums;
mod task;
mod worker;

#[cfg(test)]
mod format_tests;
#[cfg(test)]
mod tests;

pub(crate) use backend::{CAPABILITIES, CpuBackend};
pub use isa::{ENVIRONMENT, Isa, isa};
pub(crate) use pack::Held;
