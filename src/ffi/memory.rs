//! The caller's memory: every pointer that an export reads or writes goes through here.
//!
//! A pointer is checked when the call begins (null, alignment, the size that a struct says it has), and outputs are
//! written when its work is done. So outputs are untouched on error, and nothing fails after the work.

use std::ffi::{CStr, c_char};
use std::mem::{MaybeUninit, size_of};
use std::ptr::NonNull;

use crate::error::{Error, Result};

/// A struct of the ABI that says its size.
///
/// # Safety
/// The type is `repr(C)` and plain data, all zeros are a value of it, and its first field is `struct_size: usize`.
pub unsafe trait Versioned: Copy {}

/// Reads a struct. A shorter one than this version's is filled up with zeros; a longer one is refused where its unknown
/// tail is not zero.
///
/// # Safety
/// `from` is null, or points at a readable `struct_size` and as many bytes as it says.
pub unsafe fn read<T: Versioned>(name: &str, from: *const T) -> Result<T> {
    // SAFETY: this function's contract is that of `struct_size`.
    let size = unsafe { struct_size(name, from) }?;
    let known = size.min(size_of::<T>());
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: `from` has `size` readable bytes and the local `size_of::<T>()`; `known` is at most either.
    unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), value.as_mut_ptr().cast::<u8>(), known) };
    for offset in known..size {
        // SAFETY: `offset` is below `size`, and `from` has as many readable bytes.
        let byte = unsafe { from.cast::<u8>().add(offset).read() };
        if byte != 0 {
            let found = format!("{size} with byte {offset} set");
            let wanted = format!("zeros past the {} bytes that this version knows", size_of::<T>());
            return Err(Error::invalid(format_args!("{name}.struct_size"), found, wanted));
        }
    }
    // SAFETY: zeros are a value of `T`, and so is what a caller puts over them: `T` is plain data (`Versioned`).
    Ok(unsafe { value.assume_init() })
}

/// As [`read`]; null is all defaults, which are zeros.
///
/// # Safety
/// As [`read`].
pub unsafe fn read_or_default<T: Versioned>(name: &str, from: *const T) -> Result<T> {
    if from.is_null() {
        // SAFETY: zeros are a value of `T` (`Versioned`).
        return Ok(unsafe { MaybeUninit::<T>::zeroed().assume_init() });
    }
    // SAFETY: this function's contract is that of `read`.
    unsafe { read(name, from) }
}

/// Reads one plain value.
///
/// # Safety
/// `from` is null or points at a readable `T`.
pub unsafe fn value<T: Copy>(name: &str, from: *const T) -> Result<T> {
    check(name, from, format_args!("a pointer to {} bytes", size_of::<T>()))?;
    // SAFETY: not null and aligned, as checked; readable by the contract.
    Ok(unsafe { from.read() })
}

/// An array with one value a rank, as its caller has it. `n` is bounded before anything is read.
///
/// # Safety
/// `data` is null or points at `n` values, readable and unchanged while the slice is in use.
pub unsafe fn ranks<'a, T>(name: &str, data: *const T, n: i32) -> Result<&'a [T]> {
    let n = number_of_ranks(n)?;
    check(name, data, format_args!("a pointer to {n} values"))?;
    // SAFETY: not null and aligned, as checked; `n` values by the contract, at most 1,024 of them.
    Ok(unsafe { std::slice::from_raw_parts(data, n) })
}

/// A string; null is none.
///
/// # Safety
/// `text` is null, or ends with a zero byte.
pub unsafe fn string(name: &str, text: *const c_char) -> Result<Option<String>> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: not null, as checked; ended by the contract. It is copied before this call returns.
    let text = unsafe { CStr::from_ptr(text) };
    match text.to_str() {
        Ok(text) => Ok(Some(text.to_owned())),
        Err(_) => Err(Error::invalid(name, format_args!("{text:?}"), "UTF-8")),
    }
}

/// Where one plain value goes.
pub struct Output<T>(NonNull<T>);

impl<T> Output<T> {
    /// Checks the pointer.
    ///
    /// # Safety
    /// `to` is null, or stays writable until the output is set or dropped.
    pub unsafe fn new(name: &str, to: *mut T) -> Result<Self> {
        check(name, to, "a pointer to the result").map(Output)
    }

    /// Writes the value.
    pub fn set(self, value: T) {
        // SAFETY: `new` found it neither null nor misaligned, and its caller keeps it writable until now.
        unsafe { self.0.write(value) }
    }
}

/// Where one value a rank goes.
pub struct OutputRanks<T> {
    to: NonNull<T>,
    n: usize,
}

impl<T: Copy> OutputRanks<T> {
    /// Checks the pointer and the number of values.
    ///
    /// # Safety
    /// `to` is null, or `n` values from it stay writable until the output is set or dropped.
    pub unsafe fn new(name: &str, to: *mut T, n: i32) -> Result<Self> {
        let n = number_of_ranks(n)?;
        Ok(OutputRanks { to: check(name, to, format_args!("a pointer to room for {n} values"))?, n })
    }

    /// Writes the values; as many as `new` was told, or fewer.
    pub fn set(self, values: &[T]) {
        // SAFETY: `new` found it neither null nor misaligned, and its caller keeps `n` values writable until now. A slice
        // of this library does not overlap them.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.to.as_ptr(), values.len().min(self.n)) }
    }
}

/// Where a struct goes that says its size.
pub struct OutputStruct<T> {
    to: NonNull<T>,
    size: usize,
}

impl<T: Versioned> OutputStruct<T> {
    /// Checks the pointer and the size. What lies past the bytes that this version knows is neither read nor written.
    ///
    /// # Safety
    /// `to` is null, or points at a readable `struct_size`, and as many bytes as it says stay writable until the output
    /// is set or dropped.
    pub unsafe fn new(name: &str, to: *mut T) -> Result<Self> {
        // SAFETY: this function's contract is that of `struct_size`.
        let size = unsafe { struct_size(name, to) }?;
        Ok(OutputStruct { to: check(name, to, "a pointer")?, size })
    }

    /// Writes as much of the value as the caller's struct has room for, but not its `struct_size`.
    pub fn set(self, value: &T) {
        let head = size_of::<usize>();
        let known = self.size.min(size_of::<T>());
        // SAFETY: `new` found `size` bytes, at least `head`, and its caller keeps them writable until now. `known` is at
        // most the size of either struct, and the two do not overlap: `value` is of this library.
        unsafe {
            let (from, to) = (std::ptr::from_ref(value).cast::<u8>(), self.to.cast::<u8>().as_ptr());
            std::ptr::copy_nonoverlapping(from.add(head), to.add(head), known - head);
        }
    }
}

/// Where a text goes, as with snprintf: cut where it does not fit, and always ended where there is room for anything.
pub struct OutputText {
    buf: *mut c_char,
    cap: usize,
    needed: Option<Output<usize>>,
}

impl OutputText {
    /// Checks the pointers. `needed` gets the size of the whole text with its end; one of the two may be null.
    ///
    /// # Safety
    /// Until the output is set or dropped, `buf` is null or has `cap` writable bytes, and `needed` is null or writable.
    pub unsafe fn new(buf: *mut c_char, cap: usize, needed: *mut usize) -> Result<Self> {
        if buf.is_null() && cap > 0 {
            return Err(Error::invalid("buf", "NULL", "a pointer, or cap = 0"));
        }
        if buf.is_null() && needed.is_null() {
            return Err(Error::invalid("needed", "NULL", "a pointer where buf is NULL"));
        }
        // SAFETY: this function's contract holds for `needed`, too.
        let needed = if needed.is_null() { None } else { Some(unsafe { Output::new("needed", needed) }?) };
        Ok(OutputText { buf, cap, needed })
    }

    /// Writes the text.
    pub fn set(self, text: &str) {
        if self.cap > 0 {
            let part = cut(text, self.cap - 1);
            // SAFETY: `buf` is not null where `cap` is not 0 (`new`), its caller keeps `cap` bytes writable until now, and
            // the part is shorter than that by at least one.
            unsafe {
                std::ptr::copy_nonoverlapping(part.as_ptr().cast(), self.buf, part.len());
                self.buf.add(part.len()).write(0);
            }
        }
        if let Some(needed) = self.needed {
            needed.set(text.len() + 1);
        }
    }
}

/// Text for a fixed array of a struct: cut where it is longer, and ended.
pub fn fixed<const N: usize>(text: &str) -> [c_char; N] {
    let mut out = [0; N];
    for (to, &byte) in out.iter_mut().zip(cut(text, N - 1).as_bytes()) {
        *to = byte as c_char;
    }
    out
}

/// As much of a text as fits in `most` bytes without cutting a character.
fn cut(text: &str, most: usize) -> &str {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn number_of_ranks(n: i32) -> Result<usize> {
    /// Most ranks that one process holds.
    const MOST: i32 = 1024;
    if !(1..=MOST).contains(&n) {
        return Err(Error::invalid("n", n, format_args!("1 to {MOST} ranks")));
    }
    Ok(n as usize)
}

fn check<T>(name: &str, pointer: *const T, wanted: impl std::fmt::Display) -> Result<NonNull<T>> {
    if !pointer.is_aligned() {
        let wanted = format_args!("a pointer aligned to {} bytes", align_of::<T>());
        return Err(Error::invalid(name, format_args!("{pointer:p}"), wanted));
    }
    NonNull::new(pointer.cast_mut()).ok_or_else(|| Error::invalid(name, "NULL", wanted))
}

/// The size that a struct says it has.
///
/// # Safety
/// `from` is null or points at a readable `struct_size`.
unsafe fn struct_size<T: Versioned>(name: &str, from: *const T) -> Result<usize> {
    /// No struct of this library comes near it; garbage does.
    const LARGEST: usize = 1 << 16;
    check(name, from, "a pointer")?;
    // SAFETY: not null and aligned, as checked; `struct_size` is the first field (`Versioned`), readable by the contract.
    let size = unsafe { from.cast::<usize>().read() };
    // Every version's size is a multiple of 8; another one would cut a field in two.
    if !(size_of::<usize>()..=LARGEST).contains(&size) || !size.is_multiple_of(8) {
        let wanted = format!("sizeof of the struct, {} in this version", size_of::<T>());
        return Err(Error::invalid(format_args!("{name}.struct_size"), size, wanted));
    }
    Ok(size)
}
