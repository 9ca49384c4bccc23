//! GPUs, over the CUDA driver library, which is loaded at run time: without a driver there are none.
//!
//! | module | purpose | uses |
//! |---|---|---|
//! | `driver` | finds the library; its statuses as errors | |
//! | `query` | what GPUs are there | `driver` |
//! | `resource` | handles that the driver must get back | `driver` |
//! | `context` | the primary context, current for the length of a call; freeing | the above |
//! | `memory` | copies, checks of pointers | `context` |
//! | `allocations` | memory, freed together | `context` |
//! | `drain` | a wait for all work of a GPU | `context` |
//! | `peer_access` | access to other GPUs' memory | `context` |
//! | `stream` | own and borrowed streams | `context` |
//! | `staging` | copies that do not block | `allocations`, `stream` |
//! | `module` | the kernels that build.rs compiled; launches | `stream` |
//!
//! Nothing here changes the caller's current context. Nothing waits for the device unless it says that it blocks. Objects
//! may be used from any thread.

mod allocations;
mod context;
mod drain;
mod driver;
mod memory;
mod module;
mod peer_access;
mod query;
mod resource;
mod staging;
mod stream;

pub(crate) use allocations::{Allocations, FREE_TIMEOUT, MappedWords};
pub(crate) use context::{CudaDevice, Entered};
pub(crate) use drain::DeviceDrain;
pub(crate) use driver::driver;
pub(crate) use memory::PointerCheck;
pub(crate) use module::{Image, Kernel, describe_image};
pub(crate) use peer_access::{HANDLE_BYTES, Imported, SHARED_ALIGN};
pub(crate) use query::{count, info};
pub(crate) use staging::Staging;
pub(crate) use stream::CudaStream;
