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
pub unsafe trait Versioned: Copy {
    /// Its name in C.
    const NAME: &'static str;
    /// Its size in the first version that had it. No caller was compiled with a shorter one.
    const FIRST_SIZE: usize;
}

/// Reads a struct. One that is shorter than this version's, but not than the first version's, is filled up with zeros; a
/// longer one is refused where its unknown tail is not zero.
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

/// Most ranks that one process holds.
pub const MOST_RANKS: i32 = 1024;

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
    if !(1..=MOST_RANKS).contains(&n) {
        return Err(Error::invalid("n", n, format_args!("1 to {MOST_RANKS} ranks")));
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
    if !(T::FIRST_SIZE..=LARGEST).contains(&size) || !size.is_multiple_of(8) {
        let pointer = if size == size_of::<*const T>() { ", which is that of a pointer to it" } else { "" };
        let wanted =
            format!("sizeof({}), {} in this version and never below {}", T::NAME, size_of::<T>(), T::FIRST_SIZE);
        return Err(Error::invalid(format_args!("{name}.struct_size"), format_args!("{size}{pointer}"), wanted));
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Sized {
        struct_size: usize,
        number: i64,
        flags: [u8; 8],
    }

    // SAFETY: repr(C), numbers only, and the size first.
    unsafe impl Versioned for Sized {
        const NAME: &'static str = "sized_t";
        const FIRST_SIZE: usize = 16;
    }

    /// A caller's struct of another version: as many words, the first of which is the size.
    fn words<const N: usize>(rest: u64) -> [u64; N] {
        std::array::from_fn(|at| if at == 0 { 8 * N as u64 } else { rest })
    }

    fn message<T>(result: Result<T>) -> String {
        result.err().unwrap().message().to_string()
    }

    #[test]
    fn structs_of_other_versions_are_read() {
        // SAFETY: every array is as long as its first word says.
        unsafe {
            let shorter: [u64; 2] = words(7);
            let found = read("s", shorter.as_ptr().cast::<Sized>()).unwrap();
            assert_eq!(found, Sized { struct_size: 16, number: 7, flags: [0; 8] });
            let longer: [u64; 5] = std::array::from_fn(|at| [40, 7, 0, 0, 0][at]);
            assert_eq!(read("s", longer.as_ptr().cast::<Sized>()).unwrap().number, 7);
            let unknown: [u64; 5] = std::array::from_fn(|at| [40, 7, 0, 0, 1 << 8][at]);
            let said = message(read("s", unknown.as_ptr().cast::<Sized>()));
            assert!(said.contains("s.struct_size: found 40 with byte 33 set"), "{said}");
            assert_eq!(read_or_default::<Sized>("s", std::ptr::null()).unwrap().number, 0);
        }
    }

    #[test]
    fn pointers_and_sizes_that_cannot_be_are_refused() {
        // SAFETY: NULL, or readable as far as the first word, and no word promises more than there is and is believed.
        unsafe {
            assert_eq!(message(read::<Sized>("s", std::ptr::null())), "s: found NULL, wanted a pointer");
            let some: [u64; 4] = words(0);
            let odd = some.as_ptr().cast::<u8>().add(4).cast::<Sized>();
            assert!(message(read("s", odd)).contains("wanted a pointer aligned to 8 bytes"));
            let said = message(read("s", words::<1>(0).as_ptr().cast::<Sized>()));
            let wanted = "found 8, which is that of a pointer to it, wanted sizeof(sized_t), 24 in this version";
            assert!(said.contains(wanted), "{said}");
            for size in [0, 1, 7, 12, 20, 1 << 17, u64::MAX] {
                let garbage = [size, 0, 0];
                let said = message(read("s", garbage.as_ptr().cast::<Sized>()));
                assert!(said.contains(&format!("s.struct_size: found {size}, wanted")), "{said}");
            }
            assert!(message(Output::<i32>::new("o", std::ptr::null_mut())).starts_with("o: found NULL"));
            assert!(message(value::<i64>("v", some.as_ptr().cast::<u8>().add(1).cast())).contains("aligned"));
            assert!(message(ranks::<i32>("r", std::ptr::null(), 2)).contains("a pointer to 2 values"));
            for n in [0, -1, 1025] {
                assert!(message(OutputRanks::<i32>::new("r", std::ptr::null_mut(), n)).starts_with("n: found"));
            }
        }
    }

    #[test]
    fn outputs_stay_within_what_the_caller_has() {
        let value = Sized { struct_size: 0, number: 5, flags: [6; 8] };
        let (mut shorter, mut longer) = (words::<2>(9), words::<4>(9));
        let mut number = 0;
        let mut numbers = [0; 3];
        // SAFETY: every array is as long as its first word says; the numbers are writable.
        unsafe {
            OutputStruct::new("s", shorter.as_mut_ptr().cast::<Sized>()).unwrap().set(&value);
            OutputStruct::new("s", longer.as_mut_ptr().cast::<Sized>()).unwrap().set(&value);
            Output::new("n", &mut number).unwrap().set(3);
            OutputRanks::new("n", numbers.as_mut_ptr(), 2).unwrap().set(&[1, 2, 4]);
        }
        assert_eq!((shorter, longer), ([16, 5], [32, 5, 0x0606_0606_0606_0606, 9]));
        assert_eq!((number, numbers), (3, [1, 2, 0]));
    }

    #[test]
    fn texts_are_cut_between_characters() {
        let mut needed = 0;
        for (cap, wanted) in [(0, "x"), (1, ""), (2, "a"), (3, "a"), (4, "aé"), (5, "aéb"), (9, "aéb")] {
            let mut buf = *b"xxxxxxxxx";
            // SAFETY: `buf` has nine bytes.
            unsafe { OutputText::new(buf.as_mut_ptr().cast(), cap, &mut needed) }.unwrap().set("aéb");
            let end = if cap == 0 { 1 } else { buf.iter().position(|&byte| byte == 0).unwrap() };
            assert_eq!((std::str::from_utf8(&buf[..end]).unwrap(), needed), (wanted, 5), "{cap}");
        }
        assert_eq!(fixed::<3>("aéb").map(|c| c as u8), *b"a\0\0");
        // SAFETY: nothing is writable, and nothing is written.
        unsafe {
            assert!(OutputText::new(std::ptr::null_mut(), 1, &mut needed).is_err());
            assert!(OutputText::new(std::ptr::null_mut(), 0, std::ptr::null_mut()).is_err());
            let text = string("t", c"\xff".as_ptr());
            assert!(message(text).contains("UTF-8"));
        }
    }
}
