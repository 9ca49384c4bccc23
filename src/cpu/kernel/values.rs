//! Weighted values of a tile, added to the open sums.

use super::args::{FEW_KEYS, MANY_KEYS, SUM_LANES, TILE, ValueArgs, register_keys};
use super::prefetch::{LINE, Prefetcher, prefetch_lines, share};
use crate::cpu::simd::codec::{Codec, paired};
use crate::cpu::simd::vector::Simd;

/// A block of weighted values: kv head, first row, first key and the key after the last.
#[derive(Clone, Copy)]
struct ValueBlock {
    head: usize,
    row: usize,
    key: usize,
    end: usize,
}

/// `open[h][r]` += sum over keys of `weights[h][r][t] v[t][h]`. W4 and W1: vectors at a time for 4 (and 3, 2) rows and
/// for 1. Walks memory as the scores do.
///
/// # Safety
/// The arguments describe valid memory; the instruction set of `S` is there.
#[inline(always)]
pub unsafe fn values<S: Simd, E: Codec, const W4: usize, const W1: usize>(a: &ValueArgs) {
    // SAFETY: this function was promised valid arguments and the instruction set; DIM is their `dim`, or 0.
    unsafe {
        match a.dim {
            128 => values_of::<S, E, W4, W1, 128>(a),
            _ => values_of::<S, E, W4, W1, 0>(a),
        }
    }
}

/// [`values`] of rows of DIM elements; 0: of any number.
///
/// # Safety
/// As [`values`]; `dim` is DIM where that is not 0.
#[inline(always)]
unsafe fn values_of<S: Simd, E: Codec, const W4: usize, const W1: usize, const DIM: usize>(a: &ValueArgs) {
    // SAFETY: keys, heads and rows of the blocks stay below those of the arguments.
    unsafe {
        let together = register_keys(a.rows);
        for key in (0..a.keys).step_by(together) {
            let end = a.keys.min(key + together);
            let mut prefetcher = Prefetcher::of(&a.prefetch, key, end - key, a.heads);
            for head in 0..a.heads {
                let mut b = ValueBlock { head, row: 0, key, end };
                while b.row + 4 <= a.rows {
                    value_rows::<S, E, 4, W4, DIM>(a, b, &mut prefetcher);
                    b.row += 4;
                }
                match a.rows - b.row {
                    3 => value_rows::<S, E, 3, W4, DIM>(a, b, &mut prefetcher),
                    2 => value_rows::<S, E, 2, W4, DIM>(a, b, &mut prefetcher),
                    1 => value_rows::<S, E, 1, W1, DIM>(a, b, &mut prefetcher),
                    _ => {}
                }
            }
            prefetcher.ask_all::<S>();
        }
    }
}

/// All elements of RQ rows: WIDE vectors at a time, then one by one.
///
/// # Safety
/// As [`values_of`]; the block lies within the arguments.
#[inline(always)]
unsafe fn value_rows<S: Simd, E: Codec, const RQ: usize, const WIDE: usize, const DIM: usize>(
    a: &ValueArgs,
    b: ValueBlock,
    prefetcher: &mut Prefetcher,
) {
    // SAFETY: elements stay below `dim`; blocks of MANY_KEYS and FEW_KEYS keys have that many.
    unsafe {
        let dim = if DIM > 0 { DIM } else { a.dim };
        let mut d = 0;
        while d + WIDE * S::LANES <= dim {
            if b.end - b.key == MANY_KEYS {
                value_block::<S, E, RQ, WIDE, MANY_KEYS>(a, dim, b, d, prefetcher);
            } else if RQ == 1 && b.end - b.key == FEW_KEYS {
                value_block::<S, E, RQ, WIDE, FEW_KEYS>(a, dim, b, d, prefetcher);
            } else {
                value_block::<S, E, RQ, WIDE, 0>(a, dim, b, d, prefetcher);
            }
            d += WIDE * S::LANES;
        }
        while d < dim {
            value_block::<S, E, RQ, 1, 0>(a, dim, b, d, prefetcher);
            d += S::LANES;
        }
    }
}

/// RQ rows, ND vectors of elements from `d` on. KEYS: as many keys as the block has; 0: any number.
///
/// # Safety
/// As [`value_rows`]; the elements are below `dim`, and the block has KEYS keys where that is not 0.
#[inline(always)]
unsafe fn value_block<S: Simd, E: Codec, const RQ: usize, const ND: usize, const KEYS: usize>(
    a: &ValueArgs,
    dim: usize,
    b: ValueBlock,
    d: usize,
    prefetcher: &mut Prefetcher,
) {
    // SAFETY: the block lies within the arguments.
    unsafe {
        let mut sums = [[S::splat(0.0); ND]; RQ];
        let row = b.head * a.rows + b.row;
        let weights = a.weights.add(row * TILE + b.key);
        let from = a.offset + b.head * a.head;
        let rows = a.v.add(b.key);
        let keys = if KEYS > 0 { KEYS } else { b.end - b.key };
        let lines = KEYS * E::FORMAT.row_bytes(ND * S::LANES) / LINE;
        let idle = weights.cast();
        let line = if b.row == 0 { prefetcher.take::<S>(lines, idle) } else { idle };
        for t in 0..keys {
            prefetch_lines::<S>(line, share(lines, t, KEYS));
            let v = (*rows.add(t)).add(from);
            let mut vv = [S::splat(0.0); ND];
            if paired::<S, E>() && ND.is_multiple_of(2) {
                for i in (0..ND).step_by(2) {
                    [vv[i], vv[i + 1]] = E::load_pair::<S>(v, d + i * S::LANES);
                }
            } else {
                for (i, vv) in vv.iter_mut().enumerate() {
                    *vv = E::load::<S>(v, d + i * S::LANES);
                }
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let w = S::splat(*weights.add(i * TILE + t));
                for (sum, &vv) in sums.iter_mut().zip(&vv) {
                    *sum = if KEYS > 0 && t == 0 { S::mul(w, vv) } else { S::fma(w, vv, *sum) };
                }
            }
        }
        let open = a.open.add(row * (dim + SUM_LANES) + d);
        for (i, sums) in sums.iter().enumerate() {
            for (j, &sum) in sums.iter().enumerate() {
                let p = open.add(i * (dim + SUM_LANES) + j * S::LANES);
                S::store(p, S::add(S::load(p), sum));
            }
        }
    }
}
