//! Steps of ranks on GPUs that write into each other's memory: attend, push, merge.
//!
//! A step takes one of three [`forms`], by its size. They follow one protocol, so that the ranks of a communicator need not
//! agree on one. `route` is the plan's part; `setup` brings the ranks of a new communicator together, and `probe` shows that
//! their words reach each other. `check` is what comes before and after the steps of plans with the flag CHECKED,
//! `queries` what comes before those of plans whose ranks pass the queries of their own heads.

mod check;
mod forms;
mod probe;
mod queries;
pub(super) mod route;
pub(crate) mod setup;
