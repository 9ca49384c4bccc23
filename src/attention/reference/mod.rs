//! The float64 reference that everything is held against: plain loops, no blocking, no tricks.
//!
//! [`attend()`] reads the very same descriptor and step as a backend, for one shard; [`merge`] joins the shards of all
//! ranks; [`Reference::compare`] holds a computed output against the bounds that the library promises. Shares no code
//! with the backends but the definitions of `format`, `score` and `visibility`, so that a mistake has to be made twice to go
//! unseen. Depends on the other modules of `attention` and on `partial`'s description of bad data.
//!
//! `inputs` reads a step's memory, `attend` works on it, `partials` holds what comes out, `bounds` holds outputs against it;
//! `guarantee` is the error that none exceeds, with its proof, for an `arithmetic`; `floats` knows float types.

mod arithmetic;
mod attend;
mod bounds;
mod floats;
pub mod guarantee;
mod inputs;
mod partials;

pub use arithmetic::Arithmetic;
pub use attend::attend;
pub use bounds::{Comparison, MOST};
pub use floats::{Precision, round_to, ulp};
pub use partials::{Reference, merge};

#[cfg(test)]
mod tests;
