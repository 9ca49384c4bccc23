//! The merge (arXiv 2408.04093, section 3: attention as the gradient of log-sum-exp, which is associative).
//!
//! merge((o1, l1), (o2, l2)): m = max(l1, l2), w_i = exp(l_i - m), o = (w1 o1 + w2 o2) / (w1 + w2),
//! lse = m + log(w1 + w2). A partial with lse = -inf is the identity and its o is never read; a NaN lse makes the row NaN.

/// Partials in row order (row = query token * heads + head): o packed `f32 [rows, dim]`, lse `f32 [rows]`.
#[derive(Debug)]
pub struct PartialRows<'a> {
    /// Normalised outputs.
    pub o: &'a mut [f32],
    /// Natural log-sum-exps.
    pub lse: &'a mut [f32],
    /// Elements of an output row.
    pub dim: usize,
}

/// Merges partial (`o`, `lse`) into the accumulated one. Merging the identity, on either side, is bitwise the other.
pub fn merge_into(acc_o: &mut [f32], acc_lse: &mut f32, o: &[f32], lse: f32) {
    if lse == f32::NEG_INFINITY {
        return;
    }
    if *acc_lse == f32::NEG_INFINITY {
        acc_o.copy_from_slice(o);
        *acc_lse = lse;
        return;
    }
    let max = acc_lse.max(lse);
    if acc_lse.is_nan() || lse.is_nan() || max == f32::INFINITY {
        acc_o.fill(f32::NAN);
        *acc_lse = f32::NAN;
        return;
    }
    let (w1, w2) = ((*acc_lse - max).exp(), (lse - max).exp());
    let sum = w1 + w2;
    let (a, b) = (w1 / sum, w2 / sum);
    for (acc, &x) in acc_o.iter_mut().zip(o) {
        *acc = a * *acc + b * x;
    }
    *acc_lse = max + sum.ln();
}

/// As [`merge_into`], with weights and sums in f64, so that each element is rounded once. Commutative bit for bit: ranks
/// that swap partials end with the same one, whichever of the two is theirs.
pub fn merge_two(acc_o: &mut [f32], acc_lse: &mut f32, o: &[f32], lse: f32) {
    if lse == f32::NEG_INFINITY {
        return;
    }
    if *acc_lse == f32::NEG_INFINITY {
        acc_o.copy_from_slice(o);
        *acc_lse = lse;
        return;
    }
    let (l1, l2) = (f64::from(*acc_lse), f64::from(lse));
    let max = l1.max(l2);
    if l1.is_nan() || l2.is_nan() || max == f64::INFINITY {
        acc_o.fill(f32::NAN);
        *acc_lse = f32::NAN;
        return;
    }
    let (w1, w2) = ((l1 - max).exp(), (l2 - max).exp());
    let sum = w1 + w2;
    let (a, b) = (w1 / sum, w2 / sum);
    for (acc, &x) in acc_o.iter_mut().zip(o) {
        *acc = (a * f64::from(*acc) + b * f64::from(x)) as f32;
    }
    *acc_lse = (max + sum.ln()) as f32;
}

/// Merges the partials of one row that `count` ranks hold, in rank order: global maximum first, then a left fold.
///
/// `lse(r)` gives rank r's lse. `o(r, scratch)` gives its output row, or fills `scratch` (a row long) with it and gives
/// none; it is not called where the lse is -inf. Writes the merged row to `out` and gives the merged lse.
pub fn merge_ranks<'a>(
    count: usize,
    lse: impl Fn(usize) -> f32,
    o: impl Fn(usize, &mut [f32]) -> Option<&'a [f32]>,
    scratch: &mut [f32],
    out: &mut [f32],
) -> f32 {
    let mut max = f32::NEG_INFINITY;
    let mut live = 0;
    for r in 0..count {
        let l = lse(r);
        if l.is_nan() || l == f32::INFINITY {
            out.fill(f32::NAN);
            return f32::NAN;
        }
        live += usize::from(l != f32::NEG_INFINITY);
        max = max.max(l);
    }
    if live == 0 {
        out.fill(0.0);
        return max;
    }
    // Weights and their sum in f64: they are a few a row, and their rounding would meet every element of it.
    let mut sum = 0.0f64;
    for r in (0..count).filter(|&r| lse(r) != f32::NEG_INFINITY) {
        let row = o(r, scratch).unwrap_or(scratch);
        if live == 1 {
            out.copy_from_slice(row);
            return max;
        }
        let weight = (f64::from(lse(r)) - f64::from(max)).exp();
        if sum == 0.0 {
            out.fill(0.0);
        }
        sum += weight;
        let w = weight as f32;
        for (acc, &x) in out.iter_mut().zip(row) {
            *acc += w * x;
        }
    }
    let scale = 1.0 / sum;
    for acc in out.iter_mut() {
        *acc = (f64::from(*acc) * scale) as f32;
    }
    (f64::from(max) + sum.ln()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_is_bitwise() {
        let x = [1.5f32, -0.0, 3e-40];
        let (mut o, mut lse) = ([f32::NAN; 3], f32::NEG_INFINITY);
        merge_into(&mut o, &mut lse, &x, 0.25);
        merge_into(&mut o, &mut lse, &[f32::NAN; 3], f32::NEG_INFINITY);
        assert_eq!((o.map(f32::to_bits), lse), (x.map(f32::to_bits), 0.25));
        let rows = [&[f32::NAN; 3][..], &x[..]];
        let lses = [f32::NEG_INFINITY, 0.25];
        let mut out = [0.0; 3];
        assert_eq!(merge_ranks(2, |r| lses[r], |r, _| Some(rows[r]), &mut [0.0; 3], &mut out), 0.25);
        assert_eq!(out.map(f32::to_bits), x.map(f32::to_bits));
    }

    #[test]
    fn empty_everywhere_is_zero() {
        let mut out = [f32::NAN; 2];
        assert_eq!(merge_ranks(3, |_| f32::NEG_INFINITY, |_, _| unreachable!(), &mut [], &mut out), f32::NEG_INFINITY);
        assert_eq!(out, [0.0; 2]);
    }

    #[test]
    fn nan_is_never_hidden() {
        let rows = [[1.0f32; 2], [2.0; 2]];
        let lses = [0.0, f32::NAN];
        let mut out = [0.0; 2];
        assert!(merge_ranks(2, |r| lses[r], |r, _| Some(&rows[r]), &mut [], &mut out).is_nan());
        assert!(out.iter().all(|x| x.is_nan()));
    }

    #[test]
    fn the_merge_of_two_is_commutative_and_knows_its_identity() {
        let mut state = 7u32;
        let mut draw = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 22) as f32 - 2.0
        };
        for _ in 0..1000 {
            let (x, y) = ([draw(), draw(), draw()], [draw(), draw(), draw()]);
            let (lx, ly) = (10.0 * draw(), 10.0 * draw());
            let (mut a, mut la) = (x, lx);
            merge_two(&mut a, &mut la, &y, ly);
            let (mut b, mut lb) = (y, ly);
            merge_two(&mut b, &mut lb, &x, lx);
            assert_eq!((a.map(f32::to_bits), la.to_bits()), (b.map(f32::to_bits), lb.to_bits()));
            let (mut c, mut lc) = (x, lx);
            merge_into(&mut c, &mut lc, &y, ly);
            assert!(a.iter().zip(c).all(|(a, c)| (a - c).abs() < 1e-6) && (la - lc).abs() < 1e-5);
        }
        for (lse, other) in [(f32::NEG_INFINITY, 0.5), (0.5, f32::NEG_INFINITY)] {
            let (mut o, mut l) = ([-0.0f32, 3e-40], lse);
            merge_two(&mut o, &mut l, &[-0.0, 3e-40], other);
            assert_eq!((o.map(f32::to_bits), l), ([-0.0f32, 3e-40].map(f32::to_bits), 0.5));
        }
        for bad in [f32::NAN, f32::INFINITY] {
            let (mut o, mut l) = ([1.0f32], 0.0);
            merge_two(&mut o, &mut l, &[1.0], bad);
            assert!(o[0].is_nan() && l.is_nan());
        }
    }

    #[test]
    fn two_halves_make_the_whole() {
        let (mut o, mut lse) = ([1.0f32], 0.0f32);
        merge_into(&mut o, &mut lse, &[3.0], 0.0);
        assert_eq!(o, [2.0]);
        assert!((lse - 2f32.ln()).abs() < 1e-7);
        let mut out = [0.0];
        let l = merge_ranks(2, |_| 0.0, |r, _| Some(if r == 0 { &[1.0] } else { &[3.0] }), &mut [], &mut out);
        assert_eq!((out[0], l), (2.0, 2f32.ln()));
    }
}
