//! Scores of a tile: dot products of query rows with keys.

use std::ops::Range;

use super::args::{ScoreArgs, TILE, keys_together};
use super::prefetch::{LINE, Prefetcher, prefetch_lines, share};
use crate::cpu::simd::codec::{Codec, paired};
use crate::cpu::simd::vector::Simd;

/// Elements of q.k that are summed in one set of accumulators: bounds the rounding of long dot products.
const DOT: usize = 128;

/// A block of scores: first kv head, first row, first key.
#[derive(Clone, Copy)]
struct ScoreBlock {
    head: usize,
    row: usize,
    key: usize,
}

/// `scores[h][r][t] = q[h][r] . k[t][h]`. T4, T2, T1: keys at a time for 4, 2 and 1 rows. Walks a few keys, then their
/// kv heads, which is how most caches lie in memory.
///
/// # Safety
/// The arguments describe valid memory; the instruction set of `S` is there.
#[inline(always)]
pub unsafe fn scores<S: Simd, E: Codec, const T4: usize, const T2: usize, const T1: usize>(a: &ScoreArgs) {
    // SAFETY: this function was promised valid arguments and the instruction set; DIM is their `dim`, or 0.
    unsafe {
        // The usual length known to the compiler, and its loop unrolled: 4 % of a step that is bound by arithmetic.
        match a.dim {
            128 => scores_of::<S, E, T4, T2, T1, 128>(a),
            _ => scores_of::<S, E, T4, T2, T1, 0>(a),
        }
    }
}

/// [`scores`] of rows of DIM elements; 0: of any number.
///
/// # Safety
/// As [`scores`]; `dim` is DIM where that is not 0.
#[inline(always)]
unsafe fn scores_of<S: Simd, E: Codec, const T4: usize, const T2: usize, const T1: usize, const DIM: usize>(
    a: &ScoreArgs,
) {
    // SAFETY: blocks end at the next multiple of 16 above `keys`, up to where the arguments are valid, and rows and heads
    // stay below theirs.
    unsafe {
        let fours = a.rows / 4 * 4;
        let together = keys_together(a.rows);
        for block in (0..a.keys).step_by(together) {
            let keys = block..block + together;
            if a.rows == 1 && a.heads.is_multiple_of(4) {
                for key in keys.step_by(T4) {
                    let mut prefetcher = Prefetcher::of(&a.prefetch, key, T4, a.heads);
                    for head in (0..a.heads).step_by(4) {
                        score_heads::<S, E, 4, T4>(a, ScoreBlock { head, row: 0, key }, &mut prefetcher);
                    }
                    prefetcher.ask_all::<S>();
                }
                continue;
            }
            let mut prefetcher = Prefetcher::of(&a.prefetch, block, together, a.heads);
            for head in 0..a.heads {
                if fours > 0 {
                    for key in keys.clone().step_by(T4) {
                        for row in (0..fours).step_by(4) {
                            score_block::<S, E, 4, T4, DIM>(a, ScoreBlock { head, row, key }, &mut prefetcher);
                        }
                    }
                }
                let mut row = fours;
                if a.rows - row >= 2 {
                    for key in keys.clone().step_by(T2) {
                        score_block::<S, E, 2, T2, DIM>(a, ScoreBlock { head, row, key }, &mut prefetcher);
                    }
                    row += 2;
                }
                if a.rows > row {
                    for key in keys.clone().step_by(T1) {
                        score_heads::<S, E, 1, T1>(a, ScoreBlock { head, row, key }, &mut prefetcher);
                    }
                }
            }
            prefetcher.ask_all::<S>();
        }
    }
}

/// Scores of RQ rows with RT keys: keys are widened once for all rows.
///
/// # Safety
/// As [`scores_of`]; the block lies within the arguments.
#[inline(always)]
unsafe fn score_block<S: Simd, E: Codec, const RQ: usize, const RT: usize, const DIM: usize>(
    a: &ScoreArgs,
    b: ScoreBlock,
    prefetcher: &mut Prefetcher,
) {
    // SAFETY: the block lies within the arguments, and elements stay below `dim`.
    unsafe {
        let dim = if DIM > 0 { DIM } else { a.dim };
        let row = b.head * a.rows + b.row;
        let q = a.q.add(row * dim);
        let mut k = [std::ptr::null::<u8>(); RT];
        for (i, k) in k.iter_mut().enumerate() {
            *k = (*a.k.add(b.key + i)).add(a.offset + b.head * a.head);
        }
        let out = a.scores.add(row * TILE + b.key);
        if DIM > 0 {
            let (steps, lines) = (DIM / S::LANES, RT * E::FORMAT.row_bytes(DIM) / LINE);
            let idle = a.q.cast();
            let line = if b.row == 0 { prefetcher.take::<S>(lines, idle) } else { idle };
            let mut sums = begin_sums::<S, RQ, RT>(a, row);
            for half in 0..2 {
                // Half a row at a time: short enough to be unrolled.
                for step in 0..steps / 2 {
                    let step = half * (steps / 2) + step;
                    prefetch_lines::<S>(line, share(lines, step, steps));
                    let d = step * S::LANES;
                    if !paired::<S, E>() {
                        score_step::<S, E, RQ, RT>(q, dim, &k, d, &mut sums);
                    } else if step.is_multiple_of(2) {
                        score_pair::<S, E, RQ, RT>(q, dim, &k, d, &mut sums);
                    }
                }
            }
            S::sum_lanes(&sums, out, TILE);
            return;
        }
        if b.row == 0 {
            prefetcher.ask::<S>(RT * prefetcher.row_lines);
        }
        let mut sums = begin_sums::<S, RQ, RT>(a, row);
        if dim <= DOT {
            score_steps::<S, E, RQ, RT>(q, dim, &k, 0..dim, &mut sums);
            return S::sum_lanes(&sums, out, TILE);
        }
        for begin in (0..dim).step_by(DOT) {
            let mut part = [[S::splat(0.0); RT]; RQ];
            score_steps::<S, E, RQ, RT>(q, dim, &k, begin..dim.min(begin + DOT), &mut part);
            for (sums, part) in sums.iter_mut().zip(&part) {
                for (sum, &part) in sums.iter_mut().zip(part) {
                    *sum = S::add(*sum, part);
                }
            }
        }
        S::sum_lanes(&sums, out, TILE);
    }
}

/// What the sums of RQ rows from `row` on begin with.
///
/// # Safety
/// As [`score_block`].
#[inline(always)]
unsafe fn begin_sums<S: Simd, const RQ: usize, const RT: usize>(a: &ScoreArgs, row: usize) -> [[S::V; RT]; RQ] {
    // SAFETY: the rows are the block's.
    unsafe {
        let mut sums = [[S::splat(0.0); RT]; RQ];
        for (i, sums) in sums.iter_mut().enumerate() {
            *sums = [S::splat(*a.origin.add(row + i)); RT];
        }
        sums
    }
}

/// Adds the products of the elements in `range`, which begins at a multiple of [`DOT`].
///
/// # Safety
/// `q` and the keys have these elements, a multiple of LANES.
#[inline(always)]
unsafe fn score_steps<S: Simd, E: Codec, const RQ: usize, const RT: usize>(
    q: *const f32,
    dim: usize,
    k: &[*const u8; RT],
    range: Range<usize>,
    sums: &mut [[S::V; RT]; RQ],
) {
    // SAFETY: elements stay in the range.
    unsafe {
        let mut d = range.start;
        if paired::<S, E>() {
            while d + 2 * S::LANES <= range.end {
                score_pair::<S, E, RQ, RT>(q, dim, k, d, sums);
                d += 2 * S::LANES;
            }
        }
        while d < range.end {
            score_step::<S, E, RQ, RT>(q, dim, k, d, sums);
            d += S::LANES;
        }
    }
}

/// Adds the products of LANES elements from `d` on.
///
/// # Safety
/// `q` and the keys have `d` + LANES elements at least.
#[inline(always)]
unsafe fn score_step<S: Simd, E: Codec, const RQ: usize, const RT: usize>(
    q: *const f32,
    dim: usize,
    k: &[*const u8; RT],
    d: usize,
    sums: &mut [[S::V; RT]; RQ],
) {
    // SAFETY: queries and keys have the elements `d` to `d` + LANES, rows of queries being `dim` apart.
    unsafe {
        let mut kv = [S::splat(0.0); RT];
        for (i, kv) in kv.iter_mut().enumerate() {
            *kv = E::load::<S>(k[i], d);
        }
        for (i, sums) in sums.iter_mut().enumerate() {
            let qv = S::load(q.add(i * dim + d));
            for (sum, &kv) in sums.iter_mut().zip(&kv) {
                *sum = S::fma(qv, kv, *sum);
            }
        }
    }
}

/// Adds the products of 2 LANES elements from `d` on, a multiple of that.
///
/// # Safety
/// `q` and the keys have `d` + 2 LANES elements at least.
#[inline(always)]
unsafe fn score_pair<S: Simd, E: Codec, const RQ: usize, const RT: usize>(
    q: *const f32,
    dim: usize,
    k: &[*const u8; RT],
    d: usize,
    sums: &mut [[S::V; RT]; RQ],
) {
    // SAFETY: queries and keys have the elements, rows of queries being `dim` apart.
    unsafe {
        let mut kv = [[S::splat(0.0); 2]; RT];
        for (i, kv) in kv.iter_mut().enumerate() {
            *kv = E::load_pair::<S>(k[i], d);
        }
        for j in 0..2 {
            for (i, sums) in sums.iter_mut().enumerate() {
                let qv = S::load(q.add(i * dim + d + j * S::LANES));
                for (sum, kv) in sums.iter_mut().zip(&kv) {
                    *sum = S::fma(qv, kv[j], *sum);
                }
            }
        }
    }
}

/// Scores of one row of each of RH kv heads with RT keys. Nothing is shared between them, so memory is read in its
/// order: key after key, head after head.
///
/// # Safety
/// As [`score_block`].
#[inline(always)]
unsafe fn score_heads<S: Simd, E: Codec, const RH: usize, const RT: usize>(
    a: &ScoreArgs,
    b: ScoreBlock,
    prefetcher: &mut Prefetcher,
) {
    // SAFETY: the block lies within the arguments, and elements stay below `dim`.
    unsafe {
        let mut sums = [[S::splat(0.0); RT]; RH];
        for i in 0..RT {
            let k = (*a.k.add(b.key + i)).add(a.offset + b.head * a.head);
            for (h, sums) in sums.iter_mut().enumerate() {
                if b.row == 0 {
                    prefetcher.ask::<S>(prefetcher.row_lines);
                }
                let row = (b.head + h) * a.rows + b.row;
                let (q, k) = (a.q.add(row * a.dim), k.add(h * a.head));
                sums[i] = S::splat(*a.origin.add(row));
                for begin in (0..a.dim).step_by(DOT) {
                    let end = a.dim.min(begin + DOT);
                    let mut part = [[S::splat(0.0)]];
                    score_steps::<S, E, 1, 1>(q, a.dim, &[k], begin..end, &mut part);
                    sums[i] = S::add(sums[i], part[0][0]);
                }
            }
        }
        S::sum_lanes(&sums, a.scores.add((b.head * a.rows + b.row) * TILE + b.key), a.rows * TILE);
    }
}
