//! Prefetching: rows of memory that are asked for before they are used, a few cache lines at a time.
//!
//! Memory reads fastest where it is read in its order and a few rows at a time, with a steady trickle of requests a
//! little ahead: a burst of them holds up the loads behind it, and rows too far ahead push out those in use.

use std::ops::Range;

use crate::cpu::simd::vector::Simd;

/// Bytes of a cache line.
pub const LINE: usize = 64;

/// Rows of memory that will be used soon: as many rows further on in the order in which the worker walks memory.
#[derive(Clone, Copy, Debug)]
pub struct Prefetch {
    /// For the first `split` keys: the rows of the same tensor, some keys on.
    pub same: PrefetchRows,
    /// For the keys from `split` on: the first rows of the tensor that comes next.
    pub next: PrefetchRows,
    /// Keys for which `same` is asked, whole blocks of keys that are walked together.
    pub split: usize,
}

/// Rows of several kv heads.
#[derive(Clone, Copy, Debug)]
pub struct PrefetchRows {
    /// One pointer a key.
    pub rows: *const *const u8,
    /// Bytes added to each for the first kv head.
    pub offset: usize,
    /// Bytes between kv heads.
    pub head: usize,
    /// Bytes of a row; 0: ask for nothing.
    pub bytes: usize,
}

impl PrefetchRows {
    /// Nothing to ask for.
    pub const NONE: PrefetchRows = PrefetchRows { rows: std::ptr::null(), offset: 0, head: 0, bytes: 0 };
}

impl Prefetch {
    /// Nothing to ask for.
    pub const NONE: Prefetch = Prefetch { same: PrefetchRows::NONE, next: PrefetchRows::NONE, split: 0 };
}

/// The cache lines to ask for while a block of keys is worked on, in the order in which they lie in memory: row after
/// row, kv head after kv head.
#[derive(Clone, Copy)]
pub struct Prefetcher {
    /// The next lines, up to the end of a row.
    line: *const u8,
    end: *const u8,
    /// The rows after that: how many, where, and which kv head of the first is next.
    left: usize,
    rows: *const *const u8,
    layout: PrefetchRows,
    heads: usize,
    head: usize,
    /// Lines of a row of a kv head.
    pub row_lines: usize,
}

impl Prefetcher {
    /// For the block of `keys` keys that begins at key `key`; `split` never falls inside a block.
    #[inline(always)]
    pub fn of(prefetch: &Prefetch, key: usize, keys: usize, heads: usize) -> Prefetcher {
        let (from, skip) = if key < prefetch.split { (&prefetch.same, 0) } else { (&prefetch.next, prefetch.split) };
        let (rows, row_lines) = (from.rows.wrapping_add(key - skip), from.bytes.div_ceil(LINE));
        let (mut layout, mut heads) = (*from, heads);
        if from.head == from.bytes {
            // The kv heads of a key lie side by side: one long row.
            (layout.bytes, heads) = (from.bytes * heads, 1);
        }
        let (left, none) = (if row_lines > 0 { keys * heads } else { 0 }, std::ptr::null());
        Prefetcher { line: none, end: none, left, rows, layout, heads, head: 0, row_lines }
    }

    /// `n` lines for the caller to ask for, side by side; where the row has fewer, asks for what is next and gives `idle`.
    ///
    /// # Safety
    /// The instruction set of `S` is there, and the rows that this was made of are still listed.
    #[inline(always)]
    pub unsafe fn take<S: Simd>(&mut self, n: usize, idle: *const u8) -> *const u8 {
        let (line, next) = (self.line, self.line.wrapping_add(n * LINE));
        if next > self.end {
            // SAFETY: `take_over` asks for what this function was promised.
            return unsafe { self.take_over::<S>(n, idle) };
        }
        self.line = next;
        line
    }

    /// [`take`](Self::take) where the row has fewer.
    ///
    /// # Safety
    /// As [`take`](Self::take).
    #[inline(never)]
    unsafe fn take_over<S: Simd>(&mut self, n: usize, idle: *const u8) -> *const u8 {
        if self.line >= self.end && self.left > 0 {
            // SAFETY: rows are left.
            unsafe { self.next_row() };
        }
        let (line, next) = (self.line, self.line.wrapping_add(n * LINE));
        if next > self.end {
            // SAFETY: `ask` asks for what this function was promised.
            unsafe { self.ask::<S>(n) };
            return idle;
        }
        self.line = next;
        line
    }

    /// Goes on to the next row.
    ///
    /// # Safety
    /// `left` is above 0, and the rows that this was made of are still listed.
    #[inline(always)]
    unsafe fn next_row(&mut self) {
        self.left -= 1;
        // SAFETY: `rows` moves on by one for every `heads` rows taken off `left`, so it points at a listed row here.
        let row = unsafe { *self.rows };
        self.line = row.wrapping_add(self.layout.offset + self.head * self.layout.head);
        self.end = self.line.wrapping_add(self.layout.bytes.next_multiple_of(LINE));
        self.head += 1;
        if self.head == self.heads {
            (self.rows, self.head) = (self.rows.wrapping_add(1), 0);
        }
    }

    /// Asks for the next `n` lines, as far as there are so many.
    ///
    /// # Safety
    /// As [`take`](Self::take).
    #[inline(never)]
    pub unsafe fn ask<S: Simd>(&mut self, n: usize) {
        for _ in 0..n {
            if self.line >= self.end {
                if self.left == 0 {
                    return;
                }
                // SAFETY: rows are left.
                unsafe { self.next_row() };
            }
            // SAFETY: the instruction set is there; asking never faults, whatever the address.
            unsafe { S::prefetch(self.line) };
            self.line = self.line.wrapping_add(LINE);
        }
    }

    /// Asks for all that is left.
    ///
    /// # Safety
    /// As [`take`](Self::take).
    #[inline(always)]
    pub unsafe fn ask_all<S: Simd>(&mut self) {
        if self.left > 0 || self.line < self.end {
            // SAFETY: `ask` asks for what this function was promised.
            unsafe { self.ask::<S>(usize::MAX) };
        }
    }
}

/// Step `step`'s share of `lines` lines, of `steps` steps.
#[inline(always)]
pub fn share(lines: usize, step: usize, steps: usize) -> Range<usize> {
    let steps = steps.max(1);
    step * lines / steps..(step + 1) * lines / steps
}

/// Asks for these lines from `line` on.
///
/// # Safety
/// The instruction set of `S` is there.
#[inline(always)]
pub unsafe fn prefetch_lines<S: Simd>(line: *const u8, which: Range<usize>) {
    for i in which {
        // SAFETY: the instruction set is there; asking never faults, whatever the address.
        unsafe { S::prefetch(line.wrapping_add(i * LINE)) };
    }
}
