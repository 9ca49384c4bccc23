//! Tests of numbers: every answer is held against float64 under the bounds that the library promises.
//!
//! `TREEATTN_SEED` sets the seed of the random cases, `TREEATTN_CASE` runs one case alone, `TREEATTN_TEST=full` runs the
//! acceptance counts.

#[path = "../support/mod.rs"]
mod support;

mod accuracy;
mod algorithms;
mod bad_data;
mod descriptor;
mod energy;
mod engine_partials;
mod exact;
mod failures_of_peers;
mod ggml;
mod long;
mod minilm;
mod nan;
mod placement;
mod queries;
mod random;
mod terms;
