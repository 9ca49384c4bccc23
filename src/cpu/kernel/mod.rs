//! The kernels: what is done to a tile of keys, written once over [`Simd`](super::simd::vector::Simd).
//!
//! A tile is up to [`TILE`](args::TILE) keys of one or several kv heads against the rows (query token x query head of the
//! group) of one row block. Its scores are computed (`scores`), multiplied by the scales of their keys (`scale`, which does
//! the same to weights and the scales of values), modified where the shape has terms (`modify`), turned into weights
//! 2^(score * scale * log2 e - m) with m a running maximum (`weights`), and the weighted values summed (`values`) in f32; `merge`
//! closes such sums into f64. m is rounded up to an integer, so that every rescale is by a power of two and exact. `widen`
//! makes packed f32 of rows in any format.
//!
//! All kernels take plain arguments (`args`), ask for memory ahead of its use (`prefetch`), are `#[inline(always)]`, and
//! are reached through `table`, which compiles them once an instruction set. Plain loops fill the arrays of vectors,
//! because a closure handed to the standard library is not compiled for the instruction set.

pub mod args;
pub mod merge;
mod modify;
pub mod prefetch;
mod scale;
mod scores;
pub mod table;
mod values;
mod weights;
mod widen;
