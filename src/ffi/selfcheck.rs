//! The self-check.

use std::ffi::c_char;

use super::codes::*;
use super::convert;
use super::guard::guard;
use super::handle;
use super::types::*;
use crate::runtime::{self, Runtime};

/// What a self-check runs. Zero means default.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct treeattn_selfcheck_config_t {
    /// sizeof(treeattn_selfcheck_config_t).
    pub struct_size: usize,
    /// Local ranks; 0: 2.
    pub ranks: i32,
    /// Sequences; 0: 2.
    pub batch: i32,
    /// Query tokens of each sequence; 0: 1.
    pub query_tokens: i32,
    /// Tokens of each sequence on all ranks together; 0: 300.
    pub kv_length: i32,
    /// Seed of the random inputs.
    pub seed: u64,
}

/// What a self-check found. Output: set struct_size before the call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_selfcheck_report_t {
    /// sizeof(treeattn_selfcheck_report_t).
    pub struct_size: usize,
    /// Non-zero: every bound held.
    pub passed: i32,
    /// Non-zero: all ranks and a second run gave the same bits.
    pub same_bits: i32,
    /// Rows compared.
    pub rows: u64,
    /// Largest |error| of an output over its bound; at most 1 where the bound holds.
    pub max_error_ratio: f64,
    /// Largest |error| of an lse over its bound.
    pub max_lse_error_ratio: f64,
    /// Share of outputs that are the correctly rounded exact value.
    pub correctly_rounded: f64,
    /// ||error|| / ||exact|| over all outputs.
    pub relative_l2: f64,
    /// The finding in words; cut to fit, terminated.
    pub message: [c_char; 256],
}

const _: () = assert!(size_of::<treeattn_selfcheck_config_t>() == 32);
const _: () = assert!(size_of::<treeattn_selfcheck_report_t>() == 312);

/// Runs a shape on this machine: random inputs, sharded over local ranks, decoded, compared with a float64 reference under
/// the library's error bounds.
///
/// @param config NULL for defaults.
/// @param report set report->struct_size first.
/// @return OK where the check could be run (look at report->passed); UNSUPPORTED naming the field; INVALID_ARGUMENT;
/// BAD_HANDLE; UNAVAILABLE; NO_MEMORY.
///
/// **Threads**: any. Blocks: about (kv_length x q_heads x head_dim) multiply-adds in float64. Not during stream capture.
/// **Since** 0.1.
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
        // SAFETY: as the caller vouches.
        let (desc, config) = unsafe { (convert::read("desc", desc)?, convert::read_or_default("config", config)?) };
        // SAFETY: as the caller vouches.
        unsafe { convert::check_output("report", report) }?;
        let (desc, config) = (convert::attention_desc(&desc)?, convert::selfcheck_config(&config));
        let found = runtime::selfcheck(&runtime, convert::device(device)?, &desc, &config)?;
        let value = treeattn_selfcheck_report_t {
            struct_size: 0,
            passed: i32::from(found.passed),
            same_bits: i32::from(found.same_bits),
            rows: found.rows,
            max_error_ratio: found.max_error_ratio,
            max_lse_error_ratio: found.max_lse_error_ratio,
            correctly_rounded: found.correctly_rounded,
            relative_l2: found.relative_l2,
            message: convert::fixed(&found.message),
        };
        // SAFETY: checked above.
        unsafe { convert::write(report, &value) };
        Ok(())
    })
}
