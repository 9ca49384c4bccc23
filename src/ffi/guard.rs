//! What every export runs in: panics become `INTERNAL`, errors a status and the thread's last message, and the thread has
//! the default floating-point state, whatever the caller's is.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::codes::{TREEATTN_ERROR_INTERNAL, TREEATTN_OK, treeattn_status_t};
use crate::device::{FloatState, catch};
use crate::error::{Error, Result};
use crate::fault;

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Runs the body of export `name`. Nothing unwinds past it, and the body writes its outputs last, so that they are
/// untouched on error. `name` is also the point at which tests inject faults.
pub fn guard(name: &'static str, body: impl FnOnce() -> Result<()>) -> treeattn_status_t {
    // Before anything else: a caller that traps floating-point exceptions would trap in the body, too.
    let _float = FloatState::enter();
    let body = || {
        fault::point(name)?;
        body()
    };
    let Err(error) = catch(body) else { return TREEATTN_OK };
    // Recording the message may itself panic where memory is out; the status still holds.
    let recorded = catch_unwind(AssertUnwindSafe(|| record(name, &error)));
    if recorded.is_ok() { treeattn_status_t(error.kind().code()) } else { TREEATTN_ERROR_INTERNAL }
}

/// As [`guard`] for a getter: gives what `body` gives, or `fallback` where it panics.
pub fn guard_value<T>(name: &'static str, fallback: T, body: impl FnOnce() -> T) -> T {
    let mut value = fallback;
    // The getter has no status; the message is kept all the same.
    let _ = guard(name, || {
        value = body();
        Ok(())
    });
    value
}

fn record(name: &str, error: &Error) {
    let message = format!("{name}: {}", error.message()).replace('\0', " ");
    // A thread that is going down records no message.
    let _ = LAST_ERROR.try_with(|last| *last.borrow_mut() = CString::new(message).unwrap_or_default());
}

/// The calling thread's last message; empty before its first error.
pub fn last_error() -> *const c_char {
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}
