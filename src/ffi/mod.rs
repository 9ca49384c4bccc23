//! The C ABI: one file a section of `include/treeattn.h`, no logic.
//!
//! The only `extern "C"` of the crate. Every export is a plain function (the header generator sees nothing else) whose
//! body is one `guard::guard`, which turns panics into `INTERNAL`, keeps the thread's last error message and maps
//! [`Error`](crate::error::Error) to a status. Uses `runtime` and what lies below it.
//!
//! | file | holds |
//! |---|---|
//! | `version`, `runtime`, `comm`, `nccl`, `plan`, `local`, `selfcheck` | the exports, a section of the header each |
//! | `codes`, `types` | the data of the ABI: int32 types with their values, structs |
//! | `layout` | what engines were compiled with: sizes, offsets and values, checked at build time |
//! | `memory` | the caller's pointers: read, checked, written |
//! | `convert` | data of the ABI into the runtime's types |
//! | `handle` | objects behind opaque values |
//! | `guard` | what every export runs under |
//!
//! The exports use the other files, never each other; `convert` and `handle` use the data and `memory`.
//!
//! The `# Safety` section of an export says what its pointers must be; handles may be any value. The header says the same
//! once for all functions, under POINTERS, so the sections stay out of it.

#![allow(non_camel_case_types)] // C names

pub mod codes;
pub mod comm;
mod convert;
#[cfg(feature = "fault-injection")]
pub mod fault;
mod guard;
mod handle;
mod layout;
pub mod local;
mod memory;
pub mod nccl;
pub mod plan;
pub mod runtime;
pub mod selfcheck;
pub mod types;
pub mod version;
