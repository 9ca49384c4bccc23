//! libtreeattn.
pub mod attention;
#[allow(dead_code, unused_imports)] // until the runtime is part of the crate
pub mod comm;
pub mod cpu;
pub mod device;
pub mod error;
pub mod fault;
pub mod partial;

pub use error::{Error, ErrorKind, Result};
