//! Rounds: every rank publishes, every rank reads.
//!
//! | algorithm | moves | what happens |
//! |---|---|---|
//! | `ONE_SHOT` | 1 round | every rank publishes its partial and merges those of all, in rank order |
//! | `TWO_SHOT` | 2 rounds | every rank merges its own heads of all partials, then the merged heads go round |
//! | `ALLREDUCE3` | 3 allreduces | the paper's: the largest lse, then the sums of numerators and of denominators |
//!
//! `chunk` is a part of a step that fits a round, which `one_shot` and `two_shot` publish; `allreduce3` stands alone, and so does
//! `weighted`, one round in which nothing but log-sum-exps travels.

pub(super) mod allreduce3;
mod chunk;
pub(super) mod one_shot;
pub(super) mod two_shot;
pub(super) mod weighted;
