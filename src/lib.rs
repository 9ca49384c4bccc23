//! libtreeattn.
pub mod attention;
pub mod device;
pub mod error;
pub mod fault;
pub mod partial;

pub use error::{Error, ErrorKind, Result};
