//! The CUDA backend: exact attention over one rank's shard on a GPU, in one launch a step.
//!
//! [`CudaBackend`] is a plan's part of it: the kernel, its workspace and its grid, chosen once; `params` is what
//! the kernels take, `abi` compares it with `kernels/params.cuh`, `merge` launches the merge of given partials, `allreduce` what lies between the
//! allreduces of the baseline, `exchange` the exchange of partials between GPUs. Depends on `attention`, `partial` and
//! `device` only: what it knows of other ranks is plain data ([`crate::partial::ExchangeView`]).

mod abi;
mod allreduce;
mod backend;
mod exchange;
mod merge;
mod params;

pub(crate) use allreduce::{Allreduce, AllreduceOutput, AllreduceShape};
pub(crate) use backend::{CAPABILITIES, CudaBackend, Destination};
pub(crate) use exchange::{COMMUNICATORS, ExchangeKernel, ExchangeStep};
pub(crate) use merge::Merge;
