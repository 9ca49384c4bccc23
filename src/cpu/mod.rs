//! The CPU backend: exact attention over one rank's shard on the rank's workers.
//!
//! [`CpuBackend`] turns a step into partials. `sequences` reads and checks what the step says, `partition` cuts the flat
//! line of (sequence, rows, kv heads, tiles) into equal slices, `worker` takes a slice piece by piece and `task` a piece
//! tile by tile (`rows`: where keys and values lie; `ahead`: rows that are asked for early; `tile`: the kernel, over the
//! vectors of `simd`, compiled once an instruction set by `kernels`), and `state` holds unfinished partials. `pack` copies keys
//! and values for ranks that attend them elsewhere. Depends on `attention`, `partial` and `device` only; knows nothing of
//! other ranks.
//!
//! Unfinished partials keep numerator and denominator apart, over a power of two, so that no rescale rounds; they become
//! (o, lse) once, at the end.

mod ahead;
mod backend;
mod isa;
mod kernels;
mod pack;
mod partition;
mod rows;
mod sequences;
mod simd;
mod state;
mod task;
mod tile;
mod worker;

#[cfg(test)]
mod tests;

pub use backend::{CAPABILITIES, CpuBackend};
pub use isa::{ENVIRONMENT, Isa, isa};
pub use pack::Held;
