//! The CUDA backend: exact attention over one rank's shard on a GPU, in one launch a step.
//!
//! [`CudaBackend`] is a plan's part of it: the kernel, its workspace and its grid, chosen once; `params` mirrors what
//! the kernels take (`kernels/params.cuh`), `merge` launches the merge of given partials. Depends on `attention`,
//! `partial` and `device` only; knows nothing of other ranks.

mod backend;
mod merge;
mod params;

pub(crate) use backend::{CudaBackend, supported};
pub(crate) use merge::{Merge, MergeStep};
