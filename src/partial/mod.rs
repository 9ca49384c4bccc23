//! The monoid of partials: (o, lse), its identity (0, -inf) and its merge.
//!
//! Finished partials (those of ranks, of nodes, and the engine's own) are merged by [`merge_two`] or [`merge_ranks`], with
//! an [`Lse`] of two floats. Inside a rank a backend has folds of its own, by the same algebra on sums that are not normalised
//! yet (`cpu::sums`, and the kernels of a GPU). The order is fixed by the caller throughout. `sinks` says whose partial holds the
//! sinks. `epoch` holds the rules of an exchange of partials, whatever carries it; `view` is what a GPU's kernel is told of one.
//! `rows` says where partials and outputs lie in memory, `fault` what bad data is. Depends on nothing but plain data
//! (`attention::dtype`).

pub(crate) mod epoch;
#[cfg(all(test, loom))]
mod epoch_model;
mod fault;
mod host_rows;
mod lse;
mod merge;
#[cfg(all(test, loom))]
mod push_model;
pub(crate) mod rows;
pub(crate) mod sinks;
pub(crate) mod view;
pub(crate) mod word;

pub(crate) use rows::{RowSource, RowTarget};
pub(crate) use view::ExchangeView;

pub use fault::{BadValue, DataFault, DataFaultCause};
pub use lse::Lse;
pub use merge::{PartialRows, merge_ranks, merge_two};
