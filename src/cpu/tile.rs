//! The tile kernel: scores of a tile of keys, their weights, and the weighted values, written once over [`Simd`].
//!
//! A tile is up to [`TILE`] keys of one kv head against the rows (query token x query head of the group) of one row
//! block. Weights are 2^(score * scale * log2 e - m) with m a running maximum rounded up to an integer, so that every
//! rescale is by a power of two and exact. Everything here is `#[inline(always)]` and reached through `kernels`; plain
//! loops fill the arrays of vectors, because a closure handed to the standard library is not compiled for the features.

use super::ahead::{Ahead, Asking, LINE, prefetch, share};
use super::simd::{Element, Simd};

/// Keys a tile.
pub const TILE: usize = 64;
/// Keys whose weighted values meet in registers before they are added to the accumulator: bounds the rounding of
/// equal-sign sums. Where there is one row to each kv head, memory sets the pace and is read better in shorter runs.
pub fn run(rows: usize) -> usize {
    if rows == 1 { SHORT } else { LONG }
}
const SHORT: usize = 4;
const LONG: usize = 8;
/// Elements of q.k that meet in one set of accumulators: bounds the rounding of long dot products.
const DOT: usize = 128;
/// Maxima from here on have no fraction to round up; the product with a score must then be rounded just as the maximum
/// was, or what is left of the largest score would be rounding alone, and any power of two.
const FAR: f32 = 4_194_304.0;
/// Floats that hold a row's sum of weights, one a lane of the widest vector.
pub const SUM_LANES: usize = 16;

/// Arguments of [`scores`].
#[derive(Clone, Copy, Debug)]
pub struct ScoreArgs {
    /// Queries, f32 [heads, rows, dim].
    pub q: *const f32,
    /// kv heads.
    pub heads: usize,
    /// Query rows of a kv head.
    pub rows: usize,
    /// Elements of a row, padded to a multiple of 16.
    pub dim: usize,
    /// One pointer a key, valid up to the next multiple of 16 above `keys`.
    pub k: *const *const u8,
    /// Bytes added to each pointer for the first kv head.
    pub offset: usize,
    /// Bytes between kv heads.
    pub head: usize,
    /// Keys.
    pub keys: usize,
    /// What each lane of a row's sums begins with: the scores come out that much (times the lanes) larger.
    /// f32 [heads, rows].
    pub start: *const f32,
    /// Scores, f32 [heads, rows, TILE]; written up to the next multiple of 16 above `keys`.
    pub scores: *mut f32,
    /// What to ask for meanwhile.
    pub ahead: Ahead,
}

/// Arguments of [`weigh`].
#[derive(Clone, Copy, Debug)]
pub struct WeighArgs {
    /// In: scores, -inf where hidden and past the last key. Out: weights. f32 [rows, TILE].
    pub scores: *mut f32,
    /// Query rows.
    pub rows: usize,
    /// Keys.
    pub keys: usize,
    /// scale * log2 e as a sum of two floats, above 0.
    pub factor: [f32; 2],
    /// What the scores are taken against, as in [`ScoreArgs`]: in and out.
    pub start: *mut f32,
    /// How far (in powers of two) the maximum of a row may be from what its scores are taken against.
    pub near: f32,
    /// f32 [rows], for the kernel's own use.
    pub tops: *mut f32,
    /// Running maximum of each row, an integer or -inf.
    pub max: *mut f32,
    /// Open sums, f32 [rows, dim + SUM_LANES]: weighted values, then weights lane by lane.
    pub open: *mut f32,
    /// Elements of a value, padded to a multiple of 16.
    pub dim: usize,
}

/// Arguments of [`values`].
#[derive(Clone, Copy, Debug)]
pub struct ValueArgs {
    /// Weights, f32 [heads, rows, TILE].
    pub weights: *const f32,
    /// kv heads.
    pub heads: usize,
    /// Query rows of a kv head.
    pub rows: usize,
    /// Elements of a row, padded to a multiple of 16.
    pub dim: usize,
    /// One pointer a key.
    pub v: *const *const u8,
    /// Bytes added to each pointer for the first kv head.
    pub offset: usize,
    /// Bytes between kv heads.
    pub head: usize,
    /// Keys.
    pub keys: usize,
    /// Open sums, f32 [heads, rows, dim + SUM_LANES].
    pub open: *mut f32,
    /// What to ask for meanwhile.
    pub ahead: Ahead,
}

/// Arguments of [`widen`].
#[derive(Clone, Copy, Debug)]
pub struct WidenArgs {
    /// One pointer a key.
    pub rows: *const *const u8,
    /// Bytes added to each pointer.
    pub offset: usize,
    /// Keys.
    pub keys: usize,
    /// Elements of a row.
    pub dim: usize,
    /// Bytes between elements.
    pub stride: i64,
    /// f32 [keys, dim padded to a multiple of 16], zero past `dim`.
    pub out: *mut f32,
}

/// Arguments of [`meet`].
#[derive(Clone, Copy, Debug)]
pub struct MeetArgs {
    /// The sums that take the others in, f32 [rows, width]: their high and low parts.
    pub to: [*mut f32; 2],
    /// Running maximum of each row.
    pub to_max: *mut f32,
    /// The sums taken in: high parts and low parts; open sums have no low parts (null) and are emptied.
    pub from: [*mut f32; 2],
    /// Their running maxima.
    pub from_max: *const f32,
    /// Rows.
    pub rows: usize,
    /// Elements of a row, a multiple of 16.
    pub width: usize,
}

/// Keys that are walked together for so many rows: the fewer, the more memory is read in its order.
pub fn keys_together(rows: usize) -> usize {
    if rows.is_multiple_of(4) { 4 } else { 16 }
}

/// A block of scores: first kv head, first row, first key.
#[derive(Clone, Copy)]
struct ScoreBlock {
    head: usize,
    row: usize,
    key: usize,
}

/// Scores of RQ rows with RT keys: keys are widened once for all rows.
#[inline(always)]
unsafe fn score_block<S: Simd, E: Element, const RQ: usize, const RT: usize, const DIM: usize>(
    a: &ScoreArgs,
    b: ScoreBlock,
    asking: &mut Asking,
) {
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
            let (steps, lines) = (DIM / S::LANES, RT * DIM * E::SIZE / LINE);
            let idle = a.q.cast();
            let line = if b.row == 0 { asking.take::<S>(lines, idle) } else { idle };
            let mut acc = begin_sums::<S, RQ, RT>(a, row);
            for half in 0..2 {
                // Half a row at a time: short enough to be unrolled.
                for step in 0..steps / 2 {
                    let step = half * (steps / 2) + step;
                    prefetch::<S>(line, share(lines, step, steps));
                    score_step::<S, E, RQ, RT>(q, dim, &k, step * S::LANES, &mut acc);
                }
            }
            S::sum_lanes(&acc, out, TILE);
            return;
        }
        if b.row == 0 {
            asking.some::<S>(RT * asking.row);
        }
        let mut sums = begin_sums::<S, RQ, RT>(a, row);
        if dim <= DOT {
            for d in (0..dim).step_by(S::LANES) {
                score_step::<S, E, RQ, RT>(q, dim, &k, d, &mut sums);
            }
            return S::sum_lanes(&sums, out, TILE);
        }
        for begin in (0..dim).step_by(DOT) {
            let mut acc = [[S::splat(0.0); RT]; RQ];
            for d in (begin..dim.min(begin + DOT)).step_by(S::LANES) {
                score_step::<S, E, RQ, RT>(q, dim, &k, d, &mut acc);
            }
            for (sums, acc) in sums.iter_mut().zip(&acc) {
                for (sum, &acc) in sums.iter_mut().zip(acc) {
                    *sum = S::add(*sum, acc);
                }
            }
        }
        S::sum_lanes(&sums, out, TILE);
    }
}

/// What the sums of RQ rows from `row` on begin with.
#[inline(always)]
unsafe fn begin_sums<S: Simd, const RQ: usize, const RT: usize>(a: &ScoreArgs, row: usize) -> [[S::V; RT]; RQ] {
    unsafe {
        let mut acc = [[S::splat(0.0); RT]; RQ];
        for (i, acc) in acc.iter_mut().enumerate() {
            *acc = [S::splat(*a.start.add(row + i)); RT];
        }
        acc
    }
}

/// Adds the products of LANES elements from `d` on.
#[inline(always)]
unsafe fn score_step<S: Simd, E: Element, const RQ: usize, const RT: usize>(
    q: *const f32,
    dim: usize,
    k: &[*const u8; RT],
    d: usize,
    acc: &mut [[S::V; RT]; RQ],
) {
    unsafe {
        let mut kv = [S::splat(0.0); RT];
        for (i, kv) in kv.iter_mut().enumerate() {
            *kv = E::load::<S>(k[i].add(d * E::SIZE));
        }
        for (i, acc) in acc.iter_mut().enumerate() {
            let qv = S::load(q.add(i * dim + d));
            for (acc, &kv) in acc.iter_mut().zip(&kv) {
                *acc = S::fma(qv, kv, *acc);
            }
        }
    }
}

/// Scores of one row of each of RH kv heads with RT keys. Nothing is shared between them, so memory is read in its
/// order: key after key, head after head.
#[inline(always)]
unsafe fn score_heads<S: Simd, E: Element, const RH: usize, const RT: usize>(
    a: &ScoreArgs,
    b: ScoreBlock,
    asking: &mut Asking,
) {
    unsafe {
        let mut acc = [[S::splat(0.0); RT]; RH];
        for i in 0..RT {
            let k = (*a.k.add(b.key + i)).add(a.offset + b.head * a.head);
            for (h, acc) in acc.iter_mut().enumerate() {
                if b.row == 0 {
                    asking.some::<S>(asking.row);
                }
                let row = (b.head + h) * a.rows + b.row;
                let (q, k) = (a.q.add(row * a.dim), k.add(h * a.head));
                acc[i] = S::splat(*a.start.add(row));
                for begin in (0..a.dim).step_by(DOT) {
                    let end = a.dim.min(begin + DOT);
                    let mut sum = S::splat(0.0);
                    let mut d = begin;
                    while d < end {
                        sum = S::fma(S::load(q.add(d)), E::load::<S>(k.add(d * E::SIZE)), sum);
                        d += S::LANES;
                    }
                    acc[i] = S::add(acc[i], sum);
                }
            }
        }
        S::sum_lanes(&acc, a.scores.add((b.head * a.rows + b.row) * TILE + b.key), a.rows * TILE);
    }
}

/// scores[h][r][t] = q[h][r] . k[t][h]. T4, T2, T1: keys at a time for 4, 2 and 1 rows. Walks a few keys, then their kv
/// heads, which is how most caches lie in memory.
///
/// # Safety
/// The arguments describe valid memory; the instruction set of `S` is there.
#[inline(always)]
pub unsafe fn scores<S: Simd, E: Element, const T4: usize, const T2: usize, const T1: usize>(a: &ScoreArgs) {
    unsafe {
        // The usual length known to the compiler, and its loop unrolled: 4 % of a step that is bound by arithmetic.
        match a.dim {
            128 => scores_of::<S, E, T4, T2, T1, 128>(a),
            _ => scores_of::<S, E, T4, T2, T1, 0>(a),
        }
    }
}

/// [`scores`] of rows of DIM elements; 0: of any number.
#[inline(always)]
unsafe fn scores_of<S: Simd, E: Element, const T4: usize, const T2: usize, const T1: usize, const DIM: usize>(
    a: &ScoreArgs,
) {
    unsafe {
        let fours = a.rows / 4 * 4;
        let together = keys_together(a.rows);
        for block in (0..a.keys).step_by(together) {
            let keys = block..block + together;
            if a.rows == 1 && a.heads.is_multiple_of(4) {
                for key in keys.step_by(T4) {
                    let mut asking = Asking::of(&a.ahead, key, T4, a.heads);
                    for head in (0..a.heads).step_by(4) {
                        score_heads::<S, E, 4, T4>(a, ScoreBlock { head, row: 0, key }, &mut asking);
                    }
                    asking.rest::<S>();
                }
                continue;
            }
            let mut asking = Asking::of(&a.ahead, block, together, a.heads);
            for head in 0..a.heads {
                if fours > 0 {
                    for key in keys.clone().step_by(T4) {
                        for row in (0..fours).step_by(4) {
                            score_block::<S, E, 4, T4, DIM>(a, ScoreBlock { head, row, key }, &mut asking);
                        }
                    }
                }
                let mut row = fours;
                if a.rows - row >= 2 {
                    for key in keys.clone().step_by(T2) {
                        score_block::<S, E, 2, T2, DIM>(a, ScoreBlock { head, row, key }, &mut asking);
                    }
                    row += 2;
                }
                if a.rows > row {
                    for key in keys.clone().step_by(T1) {
                        score_heads::<S, E, 1, T1>(a, ScoreBlock { head, row, key }, &mut asking);
                    }
                }
            }
            asking.rest::<S>();
        }
    }
}

/// 2^d for an integer d <= 0, or NaN.
#[inline(always)]
fn power_of_two(d: f32) -> f32 {
    if d >= -126.0 { f32::from_bits(((d as i32 + 127) as u32) << 23) } else { 0.0 * d.abs() }
}

#[inline(always)]
unsafe fn rescale<S: Simd>(p: *mut f32, n: usize, factor: f32) {
    unsafe {
        let f = S::splat(factor);
        for i in (0..n).step_by(S::LANES) {
            S::store(p.add(i), S::mul(S::load(p.add(i)), f));
        }
    }
}

/// Turns scores into weights, raises the running maxima and adds to the sums of weights. True: some maxima are so far
/// from what the scores were taken against that all are to be taken anew, against `start` as it is now.
///
/// # Safety
/// As [`scores`].
#[inline(always)]
pub unsafe fn weigh<S: Simd>(a: &WeighArgs) -> bool {
    unsafe {
        let mut repeat = false;
        for r in 0..a.rows {
            let top = top::<S>(a, r);
            *a.tops.add(r) = top;
            repeat |= (top - against::<S>(a, r) as f32).abs() > a.near && top.is_finite();
        }
        if repeat && set_starts::<S>(a) {
            return true;
        }
        for r in 0..a.rows {
            let (before, top) = (*a.max.add(r), *a.tops.add(r));
            if top > before {
                rescale::<S>(a.open.add(r * (a.dim + SUM_LANES)), a.dim + SUM_LANES, factor(before, top));
                *a.max.add(r) = top;
            }
        }
        let n = a.keys.next_multiple_of(16);
        let (high, low) = (S::splat(a.factor[0]), S::splat(a.factor[1]));
        for r in 0..a.rows {
            let row = a.scores.add(r * TILE);
            let sum = a.open.add(r * (a.dim + SUM_LANES) + a.dim);
            let max = *a.max.add(r);
            let (base, part) = base(against::<S>(a, r), max);
            let (base, part) = (S::splat(base), S::splat(part));
            let far = max.abs() >= FAR;
            let mut total = S::load(sum);
            for t in (0..n).step_by(S::LANES) {
                let score = S::load(row.add(t));
                let (x, whole, rest) = if far {
                    let x = S::add(S::mul(score, high), base);
                    let whole = S::round(x);
                    (x, whole, S::sub(x, whole))
                } else {
                    // The rest is not rounded as x is: that would cost a small weight more than its score does.
                    let small = S::fma(score, low, part);
                    let x = S::add(S::fma(score, high, base), small);
                    let whole = S::round(x);
                    (x, whole, S::add(S::fma(score, high, S::sub(base, whole)), small))
                };
                let weight = S::exp2_unless_hidden(x, whole, rest, score);
                S::store(row.add(t), weight);
                total = S::add(total, weight);
            }
            S::store(sum, total);
        }
        false
    }
}

/// The maximum of row `r` with the scores at hand, rounded up to a whole power of two.
#[inline(always)]
unsafe fn top<S: Simd>(a: &WeighArgs, r: usize) -> f32 {
    unsafe {
        let row = a.scores.add(r * TILE);
        let mut top = S::load(row);
        for t in (S::LANES..a.keys.next_multiple_of(16)).step_by(S::LANES) {
            top = S::max(top, S::load(row.add(t)));
        }
        let top = S::max_lane(top);
        let found = if *a.start.add(r) == 0.0 {
            (top * a.factor[0]).ceil()
        } else {
            (against::<S>(a, r) + f64::from(top) * wide(a.factor)).ceil() as f32
        };
        (*a.max.add(r)).max(found)
    }
}

/// Has the scores of all rows taken against the maxima found. The maxima themselves have to wait for scores that are
/// rounded like those which they will be subtracted from. False: nothing to be done.
#[inline(never)]
unsafe fn set_starts<S: Simd>(a: &WeighArgs) -> bool {
    let mut changed = false;
    for r in 0..a.rows {
        // SAFETY: the rows of the arguments.
        let (top, start) = unsafe { (*a.tops.add(r), &mut *a.start.add(r)) };
        let lane = -top / (a.factor[0] * S::LANES as f32);
        // Far maxima have a rounding of their own; below 1e-30 a lane might not hold it exactly.
        let fits = top.abs() < FAR && lane.is_finite() && lane.abs() > 1e-30;
        let lane = if fits { lane } else { 0.0 };
        changed |= lane != *start;
        *start = lane;
    }
    changed
}

/// What the scores of row `r` are taken against, as a power of two.
#[inline(always)]
unsafe fn against<S: Simd>(a: &WeighArgs, r: usize) -> f64 {
    // SAFETY: a row of the arguments.
    -f64::from(unsafe { *a.start.add(r) }) * S::LANES as f64 * wide(a.factor)
}

/// The sum of two floats.
#[inline(always)]
fn wide(parts: [f32; 2]) -> f64 {
    f64::from(parts[0]) + f64::from(parts[1])
}

/// What is added to a score (taken against 2^`middle`) times the factor: a whole number, and the small part that is left.
#[inline(always)]
fn base(middle: f64, max: f32) -> (f32, f32) {
    if max == f32::NEG_INFINITY {
        // Nothing visible yet: every score is -inf (or NaN), and no maximum to subtract.
        return (0.0, 0.0);
    }
    let whole = middle.round_ties_even();
    ((whole - f64::from(max)) as f32, (middle - whole) as f32)
}

/// Where a block of weighted values lies: kv head, first row, first and last key.
#[derive(Clone, Copy)]
struct Block {
    head: usize,
    row: usize,
    key: usize,
    end: usize,
}

/// RQ rows, ND vectors of elements from `d` on. KEYS: as many keys as the block has; 0: any number.
#[inline(always)]
unsafe fn value_block<S: Simd, E: Element, const RQ: usize, const ND: usize, const KEYS: usize>(
    a: &ValueArgs,
    dim: usize,
    b: Block,
    d: usize,
    asking: &mut Asking,
) {
    unsafe {
        let mut acc = [[S::splat(0.0); ND]; RQ];
        let row = b.head * a.rows + b.row;
        let weights = a.weights.add(row * TILE + b.key);
        let from = a.offset + b.head * a.head + d * E::SIZE;
        let rows = a.v.add(b.key);
        let keys = if KEYS > 0 { KEYS } else { b.end - b.key };
        let lines = KEYS * ND * S::LANES * E::SIZE / LINE;
        let idle = weights.cast();
        let line = if b.row == 0 { asking.take::<S>(lines, idle) } else { idle };
        for t in 0..keys {
            prefetch::<S>(line, share(lines, t, KEYS));
            let v = (*rows.add(t)).add(from);
            let mut vv = [S::splat(0.0); ND];
            for (i, vv) in vv.iter_mut().enumerate() {
                *vv = E::load::<S>(v.add(i * S::LANES * E::SIZE));
            }
            for (i, acc) in acc.iter_mut().enumerate() {
                let w = S::splat(*weights.add(i * TILE + t));
                for (acc, &vv) in acc.iter_mut().zip(&vv) {
                    *acc = if KEYS > 0 && t == 0 { S::mul(w, vv) } else { S::fma(w, vv, *acc) };
                }
            }
        }
        let open = a.open.add(row * (dim + SUM_LANES) + d);
        for (i, acc) in acc.iter().enumerate() {
            for (j, &acc) in acc.iter().enumerate() {
                let p = open.add(i * (dim + SUM_LANES) + j * S::LANES);
                S::store(p, S::add(S::load(p), acc));
            }
        }
    }
}

/// All elements of RQ rows: WIDE vectors at a time, then one by one.
#[inline(always)]
unsafe fn value_rows<S: Simd, E: Element, const RQ: usize, const WIDE: usize, const DIM: usize>(
    a: &ValueArgs,
    b: Block,
    asking: &mut Asking,
) {
    unsafe {
        let dim = if DIM > 0 { DIM } else { a.dim };
        let mut d = 0;
        while d + WIDE * S::LANES <= dim {
            if b.end - b.key == LONG {
                value_block::<S, E, RQ, WIDE, LONG>(a, dim, b, d, asking);
            } else if RQ == 1 && b.end - b.key == SHORT {
                value_block::<S, E, RQ, WIDE, SHORT>(a, dim, b, d, asking);
            } else {
                value_block::<S, E, RQ, WIDE, 0>(a, dim, b, d, asking);
            }
            d += WIDE * S::LANES;
        }
        while d < dim {
            value_block::<S, E, RQ, 1, 0>(a, dim, b, d, asking);
            d += S::LANES;
        }
    }
}

/// open[h][r] += sum over keys of weights[h][r][t] v[t][h]. W4 and W1: vectors at a time for 4 (and 3, 2) rows and for 1.
/// Walks memory as [`scores`] does.
///
/// # Safety
/// As [`scores`].
#[inline(always)]
pub unsafe fn values<S: Simd, E: Element, const W4: usize, const W1: usize>(a: &ValueArgs) {
    unsafe {
        match a.dim {
            128 => values_of::<S, E, W4, W1, 128>(a),
            _ => values_of::<S, E, W4, W1, 0>(a),
        }
    }
}

/// [`values`] of rows of DIM elements; 0: of any number.
#[inline(always)]
unsafe fn values_of<S: Simd, E: Element, const W4: usize, const W1: usize, const DIM: usize>(a: &ValueArgs) {
    unsafe {
        let run = run(a.rows);
        for key in (0..a.keys).step_by(run) {
            let end = a.keys.min(key + run);
            let mut asking = Asking::of(&a.ahead, key, end - key, a.heads);
            for head in 0..a.heads {
                let mut b = Block { head, row: 0, key, end };
                while b.row + 4 <= a.rows {
                    value_rows::<S, E, 4, W4, DIM>(a, b, &mut asking);
                    b.row += 4;
                }
                match a.rows - b.row {
                    3 => value_rows::<S, E, 3, W4, DIM>(a, b, &mut asking),
                    2 => value_rows::<S, E, 2, W4, DIM>(a, b, &mut asking),
                    1 => value_rows::<S, E, 1, W1, DIM>(a, b, &mut asking),
                    _ => {}
                }
            }
            asking.rest::<S>();
        }
    }
}

/// Widens rows to packed f32, zero-padded to a multiple of 16 elements. Serves any element stride.
///
/// # Safety
/// As [`scores`].
#[inline(always)]
pub unsafe fn widen<S: Simd, E: Element>(a: &WidenArgs) {
    unsafe {
        let padded = a.dim.next_multiple_of(16);
        for t in 0..a.keys {
            let from = (*a.rows.add(t)).add(a.offset);
            let to = a.out.add(t * padded);
            let mut d = 0;
            if a.stride == E::SIZE as i64 {
                while d + S::LANES <= a.dim {
                    S::store(to.add(d), E::load::<S>(from.add(d * E::SIZE)));
                    d += S::LANES;
                }
            }
            while d < a.dim {
                *to.add(d) = E::load_one(from.offset(d as isize * a.stride as isize));
                d += 1;
            }
            while d < padded {
                *to.add(d) = 0.0;
                d += 1;
            }
        }
    }
}

/// Takes sums into others: the merge, on numerators and denominators over a power of two, with the rounding error of
/// each sum kept in its low part.
///
/// # Safety
/// As [`scores`].
#[inline(always)]
pub unsafe fn meet<S: Simd>(a: &MeetArgs) {
    unsafe {
        for r in 0..a.rows {
            let (ours, theirs) = (*a.to_max.add(r), *a.from_max.add(r));
            let max = ours.max(theirs);
            *a.to_max.add(r) = max;
            let at = r * a.width;
            if ours == theirs && a.from[1].is_null() {
                // The usual case: the maximum stood still.
                for i in (at..at + a.width).step_by(S::LANES) {
                    let (sum, lost) = exact_sum::<S>(S::load(a.to[0].add(i)), S::load(a.from[0].add(i)));
                    S::store(a.to[0].add(i), sum);
                    S::store(a.to[1].add(i), S::add(S::load(a.to[1].add(i)), lost));
                    S::store(a.from[0].add(i), S::splat(0.0));
                }
                continue;
            }
            let (f, g) = (S::splat(factor(ours, max)), S::splat(factor(theirs, max)));
            for i in (at..at + a.width).step_by(S::LANES) {
                let (x, y) = (S::mul(S::load(a.to[0].add(i)), f), S::mul(S::load(a.from[0].add(i)), g));
                let (sum, lost) = exact_sum::<S>(x, y);
                let mut rest = S::fma(S::load(a.to[1].add(i)), f, lost);
                if a.from[1].is_null() {
                    S::store(a.from[0].add(i), S::splat(0.0));
                } else {
                    rest = S::fma(S::load(a.from[1].add(i)), g, rest);
                }
                S::store(a.to[0].add(i), sum);
                S::store(a.to[1].add(i), rest);
            }
        }
    }
}

/// x + y, and what rounding took from it.
#[inline(always)]
unsafe fn exact_sum<S: Simd>(x: S::V, y: S::V) -> (S::V, S::V) {
    unsafe {
        let sum = S::add(x, y);
        let y_in = S::sub(sum, x);
        let x_in = S::sub(sum, y_in);
        (sum, S::add(S::sub(x, x_in), S::sub(y, y_in)))
    }
}

/// What sums over 2^m become over 2^max.
#[inline(always)]
fn factor(m: f32, max: f32) -> f32 {
    if m == max {
        1.0
    } else if m == f32::NEG_INFINITY {
        0.0
    } else {
        power_of_two(m - max)
    }
}
