//! Communicators over NCCL, which is loaded at run time.
//!
//! `find` knows where NCCL may be, `library` has its calls, `rank` is one rank's end of a communicator that never blocks
//! beyond a deadline, `bootstrap` an allgather of blobs over it, by which ranks of several processes set up what they share.
//! Depends on `device` and on `comm`'s own words.
//!
//! Communicators are always of our own making: an engine's is split, and never used otherwise.

mod bootstrap;
mod find;
mod library;
mod rank;

pub(crate) use bootstrap::NcclBootstrap;
pub(crate) use library::Library as NcclLibrary;
pub(crate) use rank::{Limit as NcclLimit, NcclRank, Reduction};

/// Bytes of what names a communicator to be, `ncclUniqueId`.
pub const UNIQUE_ID_BYTES: usize = 128;
