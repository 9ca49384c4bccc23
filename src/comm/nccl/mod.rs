//! Communicators over NCCL, which is loaded at run time.
//!
//! | module | purpose | uses |
//! |---|---|---|
//! | `find` | where NCCL may be | |
//! | `library` | its calls, its results as errors | `find` |
//! | `rendezvous` | ranks of one process wait for each other | `library` |
//! | `rank` | one rank of a communicator, whose calls do not block beyond a deadline | the above |
//! | `bootstrap` | an allgather of blobs, by which ranks of several processes set up what they share | `rank` |
//!
//! Depends on `device` and on `comm`'s wording of failures. Communicators are always the library's own: an engine's is split,
//! and not used otherwise.

mod bootstrap;
mod find;
mod library;
mod rank;
mod rendezvous;

pub(crate) use bootstrap::NcclBootstrap;
pub(crate) use library::Library as NcclLibrary;
pub use library::UNIQUE_ID_BYTES;
pub(crate) use rank::{NcclDeadline, NcclRank, Reduction};
