//! Communicators: how the ranks of a group find each other, exchange partials, and fail together.
//!
//! [`Bootstrap`] is what every rank's end of a group can do: an allgather of small blobs, and a failure that all share.
//! [`Rounds`] are the ends whose steps exchange in host memory. `local` is the group within one process (shared memory, epochs of
//! [`crate::partial::epoch`]) and `transport` a rank whose peers the engine reaches (MPI, gloo); both have rounds. `nccl`
//! is a rank whose peers NCCL reaches, `gpu` one on a GPU, whose steps exchange in kernels that write into each other's
//! windows. `tree` says who meets whom in a tree over nodes, `errors` makes the messages of failures, in which a [`CallWord`]
//! names the call of a rank. Depends on `device` and `partial`; knows nothing of attention but
//! [`Shard`](crate::attention::Shard), and nothing of backends.
//!
//! # How data flows
//! A step that exchanges begins with [`Rounds::open`], which waits for nobody, and is made of two kinds of movement:
//!
//! - A **round** ([`Rounds::round`]): every rank publishes a payload and, once all have, reads those of all. In a local
//!   group the payloads lie in windows and are read in place; over a transport a round is an allgather.
//! - A **hop** ([`Rounds::hop`]): a rank sends to one peer and receives from one. In a local group the sender posts
//!   where its bytes lie and the receiver copies them, so nothing is staged and a hop may be of any size; over a transport
//!   it is the engine's sendrecv, and without one there are no hops.
//!
//! Rounds and hops carry the same header: a fingerprint of the call, and the bad data that the rank met. Peers that
//! differ are `Desync`. In a local group the openings of all ranks are compared, too, so that ranks that run different
//! algorithms find each other out. A rank that is waited for and has not opened the step is the one that a timeout names.
//!
//! A communicator that has failed is broken: every later call on any rank returns the error that broke it.

mod board;
mod bootstrap;
mod call_word;
mod config;
pub(crate) mod errors;
mod gpu;
mod local;
pub(crate) mod nccl;
mod plan_words;
mod rounds;
mod transport;
mod tree;

#[cfg(test)]
mod hop_tests;
#[cfg(test)]
mod tests;

pub(crate) use board::{PlanFault, StatusBoard};
pub(crate) use bootstrap::{Bootstrap, Token, process_token};
pub(crate) use call_word::CallWord;
pub use config::CommConfig;
pub(crate) use gpu::{GpuRank, Nodes, Offer, Windows};
pub(crate) use local::{LocalRank, MAX_RANKS, local_group};
pub(crate) use plan_words::{ANY_FAULT, BAD_VALUE, COUNTS, FAILURE, OWN_FAULT, PlanLease, PlanWords};
pub(crate) use rounds::{Hop, Round, RoundHeader, Rounds};
pub(crate) use transport::TransportRank;
pub use transport::{AllgatherCallback, SendrecvCallback, Transport};
#[cfg(test)]
pub(crate) use tree::log2;
pub(crate) use tree::{Receipt, Tree, node_numbers};
