//! Faults from C. Only with the feature `fault-injection`, and in no header: a test declares it itself.

use std::ffi::c_char;

use super::codes::treeattn_status_t;
use super::guard::guard;
use super::memory;
use crate::fault;

/// Arms faults by a text (see [`fault`]); NULL disarms all. Every export is a point of its own name.
///
/// # Safety
/// `text` is null or ends with a zero byte.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn treeattn_fault_arm(text: *const c_char) -> treeattn_status_t {
    guard("treeattn_fault_arm", || {
        // SAFETY: null or ended by this function's contract.
        match unsafe { memory::string("text", text) }? {
            Some(text) => fault::arm(&text),
            None => {
                fault::disarm();
                Ok(())
            }
        }
    })
}
