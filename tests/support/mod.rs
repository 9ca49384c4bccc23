//! What the tests of numbers share: seeded cases over everything that is accepted, their memory, and how they are run.
//!
//! A [`case::Case`] is the question as a whole: global sequences, queries, and which rank holds which key. A
//! [`rank::Rank`] is one rank's memory for it, with every byte that is not live poisoned by NaN and every buffer ended
//! by a page that must not be touched. A [`run::Pool`] runs cases on all ranks and holds the answers against float64.

#![allow(dead_code)] // every test executable uses its own part

pub mod builder;
pub mod case;
pub mod emulator;
pub mod memory;
pub mod npy;
pub mod random;
pub mod rank;
pub mod repeated;
pub mod rng;
pub mod run;
pub mod terms;
pub mod values;
pub mod view;

use std::path::PathBuf;

/// The seed that all random cases derive from: `TREEATTN_SEED`, or a fixed one.
pub fn seed() -> u64 {
    number("TREEATTN_SEED").unwrap_or(20_240_804)
}

/// The seed of the one case to run, to look into a failure.
pub fn only_case() -> Option<u64> {
    number("TREEATTN_CASE")
}

/// Whether the acceptance counts are asked for (`TREEATTN_TEST=full`).
pub fn full() -> bool {
    std::env::var("TREEATTN_TEST").is_ok_and(|word| word == "full")
}

/// A file of `tests/data`.
pub fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}: found {text:?}, wanted a whole number")))
}
