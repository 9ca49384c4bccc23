//! `RING`: blocks of keys and values go round, and every rank attends them all. The baseline that trees are compared with.
//!
//! 1. A round announces to every rank how many keys each rank holds of each sequence, and what bad data it met.
//! 2. Every rank packs its keys and values into a [`block`]. Every layout can be packed.
//! 3. p - 1 hops: a rank sends the block that it has to its lower neighbour and receives that of its upper one into its
//!    second block, while it attends the one that it has; then the two change places.
//!
//! A rank attends its own block packed, too, sequence after sequence, as all other ranks do; and partials merge along the
//! one bracketing of [`order`], whatever the order in which blocks come, as soon as two neighbours are there. So all ranks
//! end with the same bits, provided that they have equally many threads and the same instruction set, which creating the
//! plan checks.
//!
//! `route` is the plan's part, `step` one step under way.

mod block;
mod order;
pub(super) mod route;
mod step;
