//! The self-check.

use std::ffi::c_char;

use super::codes::*;
use super::convert;
use super::guard::guard;
use super::handle;
use super::types::*;
use crate::runtime::{self, Runtime};

/// The sizes of a self-check. 0 is the default of every field.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct treeattn_selfcheck_config_t {
    /// sizeof(treeattn_selfcheck_config_t).
    pub struct_size: usize,
    /// Local ranks that the sequences are sharded over. 0: 2.
    pub ranks: i32,
    /// Sequences, at most the descriptor's `max_batch`. The first has `kv_length` keys, the others random lengths up to
    /// that. 0: 2 where the descriptor has room.
    pub batch: i32,
    /// Query tokens of each sequence; batch * query_tokens is at most the descriptor's `max_query_tokens`. 0: 1.
    pub query_tokens: i32,
    /// Keys of the first sequence on all ranks together; each rank's part is at most the descriptor's `max_kv_length`.
    /// 0: 1,000, or `max_kv_length` where that is less.
    pub kv_length: i32,
    /// Seed of the random inputs.
    pub seed: u64,
}

/// What a self-check found. Filled by `treeattn_selfcheck`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_selfcheck_report_t {
    /// sizeof(treeattn_selfcheck_report_t).
    pub struct_size: usize,
    /// 1: every output is within its bounds and all bits repeat.
    pub passed: i32,
    /// 1: a second run gave the same bits, and all ranks hold the same where all hold the whole output.
    pub same_bits: i32,
    /// Output rows (query token x head, of every rank) compared.
    pub rows: u64,
    /// The largest error of an output element over the bound of that element; at most 1 in a check that passes.
    pub max_error_ratio: f64,
    /// The same for the log-sum-exps.
    pub max_lse_error_ratio: f64,
    /// Share of the outputs that are the float64 answer correctly rounded; 1 for f32 outputs, where it is not asked.
    pub correctly_rounded: f64,
    /// Root of the summed squared errors over that of the summed squared outputs.
    pub relative_l2: f64,
    /// The first thing found wrong, or a line that says what passed; cut where it is longer.
    pub message: [c_char; 256],
}

const _: () = assert!(size_of::<treeattn_selfcheck_config_t>() == 32);
const _: () = assert!(size_of::<treeattn_selfcheck_report_t>() == 312);

/// Runs a shape on this machine: random inputs, sharded over local ranks, decoded twice, and held against float64 under
/// the library's error bounds.
///
/// @param runtime the runtime.
/// @param device  where the ranks live.
/// @param desc    the shape. Read during the call only.
/// @param config  the sizes; NULL for defaults.
/// @param report  set up with TREEATTN_SELFCHECK_REPORT_INIT; filled.
/// @return TREEATTN_OK where the check could be run (look at `report->passed`); INVALID_ARGUMENT or UNSUPPORTED, by
///         field; BAD_HANDLE; UNAVAILABLE; NO_MEMORY; SYSTEM (no thread to be had); or what a step returned.
///
/// Thread safety: any thread. Blocks, for a time in proportion to query rows x keys: the reference is float64. Starts
/// and joins its own threads. Not capture-safe. Since 0.1.
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
