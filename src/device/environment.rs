//! The environment variables that the library looks at.
//!
//! An engine may call `setenv` on another thread at any time, and a read beside it is undefined. So all of them are read in
//! one place, once: when a process makes its first runtime.

use std::ffi::OsString;
use std::sync::OnceLock;

/// What the environment said when it was read.
#[derive(Debug)]
pub(crate) struct Environment {
    /// `TREEATTN_CPU_ISA`, where it is UTF-8.
    pub cpu_isa: Option<String>,
    /// `TREEATTN_GPU_EXCHANGE`.
    pub gpu_exchange: Option<OsString>,
    /// `TREEATTN_SYSFS`: read in place of `/sys`, so that tests have the nodes that they need.
    pub sysfs: Option<OsString>,
    /// `VIRTUAL_ENV`.
    pub virtual_env: Option<OsString>,
    /// `PATH`.
    pub path: Option<OsString>,
}

/// Reads the environment, if it is the first call.
pub(crate) fn environment() -> &'static Environment {
    static READ: OnceLock<Environment> = OnceLock::new();
    READ.get_or_init(|| Environment {
        cpu_isa: std::env::var("TREEATTN_CPU_ISA").ok(),
        gpu_exchange: std::env::var_os("TREEATTN_GPU_EXCHANGE"),
        sysfs: std::env::var_os("TREEATTN_SYSFS"),
        virtual_env: std::env::var_os("VIRTUAL_ENV"),
        path: std::env::var_os("PATH"),
    })
}
