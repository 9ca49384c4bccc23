//! libtreeattn.
pub mod attention;
pub mod error;
pub mod partial;

pub use error::{Error, ErrorKind, Result};
