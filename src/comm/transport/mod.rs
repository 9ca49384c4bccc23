//! A rank whose peers only the engine reaches: rounds over the engine's own allgather (MPI, gloo, sockets).
//!
//! A round is one allgather of messages of a fixed size, a header and up to
//! [`INLINE_BYTES`](message::INLINE_BYTES) of payload, so that ranks that are out of step are found before sizes could
//! differ; a larger payload follows in a second allgather once the headers agree. A hop is the same over the engine's
//! sendrecv, between one rank and the next. Callbacks run on the calling thread only (or on stream threads, where the
//! engine said so). They get what is left until the deadline and a word to look at; the watchdog raises that word when the
//! deadline has passed, for callbacks that look at nothing else.
//!
//! `callbacks` is what the engine gives, `message` the layout of messages, `watchdog` the thread that ends callbacks,
//! `calls` makes them under its eyes, `rank` is one rank's end.

mod callbacks;
mod calls;
mod message;
mod rank;
#[cfg(test)]
mod tests;
mod watchdog;

pub use callbacks::{AllgatherCallback, SendrecvCallback, Transport};
pub(crate) use rank::TransportRank;
