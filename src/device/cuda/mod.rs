//! CUDA devices through the driver API, loaded at run time: without a driver there are simply none.
//!
//! `driver` finds the library and turns its errors into ours, `context` retains the primary context and makes it
//! current for the length of a call, `holdings` frees what was allocated, `memory` copies and looks at pointers,
//! `stream` wraps streams, `staging` moves bytes without a blocking call, `module` loads and launches the kernels that build.rs compiled, `peer` lets
//! GPUs reach each other's memory.
//!
//! Nothing here changes the caller's current device or waits for the device, unless it says that it blocks.

mod context;
mod driver;
mod holdings;
mod memory;
mod module;
mod peer;
mod staging;
mod stream;

pub(crate) use context::{CudaDevice, Entered, count, info};
pub(crate) use holdings::{Fence, Holdings, PATIENCE, Words};
pub(crate) use memory::PointerCheck;
pub(crate) use module::{Image, Kernel};
pub(crate) use peer::{HANDLE_BYTES, Imported, SHARED_ALIGN};
pub(crate) use staging::Staging;
pub(crate) use stream::CudaStream;
