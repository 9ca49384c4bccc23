//! What routes of CPU ranks share: everything is in host memory.
//!
//! `scratch` holds a rank's partial, `wire` says how partials travel, `shard` attends this rank's shard into the scratch,
//! `exchange` is one step's exchange under way, `checked` the round in which ranks compare what they were passed,
//! `queries` those that bring together queries that ranks have by heads, and `partials` the route of every algorithm that exchanges partials. Each uses those before it.
//!
//! The partial lies in the scratch, `lse` before `o`, which is also how it travels as f32, so that it can be sent from where
//! it lies. Rows that the window of a round has no room for go in several rounds; hops are of any size. A rank's own state
//! goes through the wire type like its peers', so that all ranks hold the same bits.
//!
//! Bytes and messages are counted as the algorithm's own: partials, keys and values, not headers and, with `RING`, not the
//! lengths that its round tells. Where ranks share memory, a rank that reads a part of what lies there moved that part;
//! over a transport's allgather all of it moved.

pub(super) mod checked;
pub(super) mod exchange;
pub(super) mod partials;
pub(super) mod queries;
pub(super) mod scratch;
pub(super) mod shard;
pub(super) mod wire;
