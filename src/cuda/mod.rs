//! The CUDA backend: exact attention over one rank's shard on a GPU, in one launch a step.
//!
//! [`CudaBackend`] is a plan's part of it: workspace and parameters; `kernels` says which kernels, `terms` what they take beside
//! queries, keys and values; `params` is what they take, `abi` compares it with `kernels/params.cuh`, `merge` launches the
//! merge of given partials, `allreduce` what lies between the allreduces of the baseline, `exchange` the exchange of partials
//! between GPUs, `gather` what lies around an allgather of them over NCCL, `nodes` what
//! comes before that within a node, `check` what comes before and after a step that is checked, `queries` and `gather_queries` what
//! gathers the queries of all heads before a step. Depends on `attention`, `partial` and `device` only:
//! what it knows of other ranks is plain data ([`crate::partial::ExchangeView`]).
//!
//! What enqueues a kernel over a caller's memory is unsafe: a step is no more than addresses here, and only who made it from an
//! engine's arguments knows how long these are good. A step that is captured is not done as long as a graph of it may be launched.

mod abi;
mod allreduce;
mod backend;
mod check;
mod exchange;
mod gather;
mod gather_queries;
mod kernels;
mod merge;
mod nodes;
mod params;
mod queries;
mod terms;

pub(crate) use allreduce::{Allreduce, AllreduceOutput, AllreduceSizes};
pub(crate) use backend::{CAPABILITIES, CudaBackend, Destination, Told};
pub(crate) use check::{CheckKernels, CheckStep};
pub(crate) use exchange::{COMMUNICATORS, ExchangeKernel, ExchangeStep};
pub(crate) use gather::{Gather, GatherSizes, GatherStep, GatherWords, Messages, Senders};
pub(crate) use gather_queries::GatherQueries;
pub(crate) use merge::Merge;
pub(crate) use nodes::NodeExchange;
pub(crate) use params::{STEP_BAD_DATA, STEPS_BEGUN, STEPS_ENDED};
pub(crate) use queries::QueryKernel;
