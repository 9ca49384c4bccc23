//! The self-check.

use super::codes::*;
use super::convert;
use super::guard::guard;
use super::handle;
use super::memory::{self, OutputStruct};
use super::types::*;
use crate::runtime::{self, Runtime};

/// Runs a shape on this machine: random inputs, sharded over local ranks, decoded twice, and held against float64 under
/// the library's error bounds.
///
/// @param runtime the runtime.
/// @param device  where the ranks live; those of `config->devices`, the first of which this is, live where that says.
/// @param desc    the shape. Read during the call only.
/// @param config  the sizes; NULL for defaults.
/// @param report  set up with TREEATTN_SELFCHECK_REPORT_INIT; filled.
/// @return TREEATTN_OK where the check could be run (look at `report->passed`); INVALID_ARGUMENT or UNSUPPORTED, by
///         field; BAD_HANDLE; UNAVAILABLE; NO_MEMORY; SYSTEM (no thread to be had); or what a step returned.
///
/// Thread safety: any thread. Blocks, for a time in proportion to query rows x keys: the reference is float64. Starts
/// and joins its own threads. Not capture-safe. Since 0.1.
///
/// # Safety
/// `desc` and `config` are null or as long as their `struct_size` says; `config->devices` is null or holds `config->ranks`
/// devices; `report` is null or writable for as many bytes as
/// its `struct_size` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_selfcheck(
    runtime: *mut treeattn_runtime_t,
    device: treeattn_device_t,
    desc: *const treeattn_attention_desc_t,
    config: *const treeattn_selfcheck_config_t,
    report: *mut treeattn_selfcheck_report_t,
) -> treeattn_status_t {
    guard("treeattn_selfcheck", || {
        let runtime = handle::get::<Runtime>("runtime", runtime)?;
        // SAFETY: `desc` and `config` are null or as long as they say, by this function's contract.
        let (desc, config) = unsafe { (memory::read("desc", desc)?, memory::read_or_default("config", config)?) };
        // SAFETY: `report` is null or writable for its size until this call returns, by this function's contract.
        let report = unsafe { OutputStruct::new("report", report) }?;
        // SAFETY: `config.devices` is null or holds `config.ranks` devices, by this function's contract.
        let devices = unsafe { convert::selfcheck_devices(device, &config) }?;
        let (desc, config) = (convert::attention_desc(&desc)?, convert::selfcheck_config(&config));
        let found = runtime::selfcheck(&runtime, &devices, &desc, &config)?;
        report.set(&treeattn_selfcheck_report_t {
            struct_size: 0,
            passed: i32::from(found.passed),
            same_bits: i32::from(found.same_bits),
            rows: found.rows,
            max_error_ratio: found.max_error_ratio,
            max_lse_error_ratio: found.max_lse_error_ratio,
            correctly_rounded: found.correctly_rounded,
            relative_l2: found.relative_l2,
            message: memory::fixed(&found.message),
        });
        Ok(())
    })
}
