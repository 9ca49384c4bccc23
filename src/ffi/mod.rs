//! The C ABI: one file a section of `include/treeattn.h`, no logic.
//!
//! The only `extern "C"` of the crate. Every export is a plain function (the header generator sees nothing else) whose
//! body is one [`guard::guard`]: it turns panics into `INTERNAL`, keeps the thread's last error message and maps
//! [`Error`](crate::error::Error) to a status. `codes` and `types` are the data of the ABI, `convert` turns them into
//! the runtime's types, `handle` keeps objects behind opaque values. Uses `runtime` and what lies below it.
//!
//! Safety of every export is the header's: each pointer is null or valid for what its parameter says, for as long as it
//! says; handles may be any value. The essay in the header states it once, so the functions do not repeat it.

#![allow(non_camel_case_types)] // C names
#![allow(clippy::missing_safety_doc)] // said once, above

pub mod codes;
pub mod comm;
mod convert;
#[cfg(feature = "fault-injection")]
pub mod fault;
mod guard;
mod handle;
mod layout;
pub mod local;
pub mod nccl;
pub mod plan;
pub mod runtime;
pub mod selfcheck;
pub mod types;
pub mod version;
