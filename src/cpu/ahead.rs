//! Asking for rows of memory before they are wanted: what lies ahead, and a walk over it a few lines at a time.
//!
//! Memory reads fastest where it is read in its order and a few rows at a time, with a steady trickle of requests a
//! little ahead: a burst of them holds up the loads behind it, and rows too far ahead push out those in use.

use std::ops::Range;

use super::simd::Simd;

/// Bytes of a cache line.
pub const LINE: usize = 64;

/// Rows of memory that will be wanted soon: as many rows further on in the order in which the worker walks memory.
#[derive(Clone, Copy, Debug)]
pub struct Ahead {
    /// For the first `split` keys: the rows of the same tensor, some keys on.
    pub near: Lines,
    /// For the keys from `split` on: the first rows of what comes next.
    pub far: Lines,
    /// Keys for which `near` is asked, whole blocks of keys that are walked together.
    pub split: usize,
}

/// Rows of several kv heads.
#[derive(Clone, Copy, Debug)]
pub struct Lines {
    /// One pointer a key.
    pub rows: *const *const u8,
    /// Bytes added to each for the first kv head.
    pub offset: usize,
    /// Bytes between kv heads.
    pub head: usize,
    /// Bytes of a row; 0: ask for nothing.
    pub bytes: usize,
}

impl Lines {
    /// Nothing to ask for.
    pub const NOTHING: Lines = Lines { rows: std::ptr::null(), offset: 0, head: 0, bytes: 0 };
}

impl Ahead {
    /// Nothing to ask for.
    pub const NOTHING: Ahead = Ahead { near: Lines::NOTHING, far: Lines::NOTHING, split: 0 };
}

/// What to ask for while a block of keys is worked on, in the order in which it lies in memory: row after row, kv head
/// after kv head; a few lines at a time, because a burst holds up the loads behind it.
#[derive(Clone, Copy)]
pub struct Asking {
    /// The next lines, up to the end of a row.
    line: *const u8,
    end: *const u8,
    /// The rows after that: how many, where, and which kv head of the first is next.
    left: usize,
    rows: *const *const u8,
    lines: Lines,
    heads: usize,
    head: usize,
    /// Lines of a row of a kv head.
    pub row: usize,
}

impl Asking {
    /// For the block of `keys` keys that begins at key `key`; `split` never falls inside a block.
    #[inline(always)]
    pub fn of(ahead: &Ahead, key: usize, keys: usize, heads: usize) -> Asking {
        let (from, skip) = if key < ahead.split { (&ahead.near, 0) } else { (&ahead.far, ahead.split) };
        let (rows, row) = (from.rows.wrapping_add(key - skip), from.bytes.div_ceil(LINE));
        let (mut lines, mut heads) = (*from, heads);
        if from.head == from.bytes {
            // The kv heads of a key lie side by side: one long row.
            (lines.bytes, heads) = (from.bytes * heads, 1);
        }
        let (left, none) = (if row > 0 { keys * heads } else { 0 }, std::ptr::null());
        Asking { line: none, end: none, left, rows, lines, heads, head: 0, row }
    }

    /// `n` lines to ask for, side by side; where there are none such, asks for what is next and gives `idle`.
    #[inline(always)]
    pub unsafe fn take<S: Simd>(&mut self, n: usize, idle: *const u8) -> *const u8 {
        let (line, next) = (self.line, self.line.wrapping_add(n * LINE));
        if next > self.end {
            return unsafe { self.take_over::<S>(n, idle) };
        }
        self.line = next;
        line
    }

    /// [`take`](Self::take) where the row has fewer.
    #[inline(never)]
    unsafe fn take_over<S: Simd>(&mut self, n: usize, idle: *const u8) -> *const u8 {
        unsafe {
            if self.line >= self.end && self.left > 0 {
                self.turn();
            }
            let (line, next) = (self.line, self.line.wrapping_add(n * LINE));
            if next > self.end {
                self.some::<S>(n);
                return idle;
            }
            self.line = next;
            line
        }
    }

    /// Goes on to the next row; there must be one.
    #[inline(always)]
    unsafe fn turn(&mut self) {
        self.left -= 1;
        // SAFETY: the caller's: rows are left.
        let row = unsafe { *self.rows };
        self.line = row.wrapping_add(self.lines.offset + self.head * self.lines.head);
        self.end = self.line.wrapping_add(self.lines.bytes.next_multiple_of(LINE));
        self.head += 1;
        if self.head == self.heads {
            (self.rows, self.head) = (self.rows.wrapping_add(1), 0);
        }
    }

    /// Asks for the next `n` lines, as far as there are so many.
    #[inline(never)]
    pub unsafe fn some<S: Simd>(&mut self, n: usize) {
        for _ in 0..n {
            if self.line >= self.end {
                if self.left == 0 {
                    return;
                }
                // SAFETY: rows are left.
                unsafe { self.turn() };
            }
            // SAFETY: asking never faults.
            unsafe { S::prefetch(self.line) };
            self.line = self.line.wrapping_add(LINE);
        }
    }

    /// Asks for all that is left.
    #[inline(always)]
    pub unsafe fn rest<S: Simd>(&mut self) {
        if self.left > 0 || self.line < self.end {
            unsafe { self.some::<S>(usize::MAX) };
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
#[inline(always)]
pub unsafe fn prefetch<S: Simd>(line: *const u8, which: Range<usize>) {
    for i in which {
        // SAFETY: asking never faults.
        unsafe { S::prefetch(line.wrapping_add(i * LINE)) };
    }
}
