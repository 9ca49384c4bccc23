//! The merge (arXiv 2408.04093, section 3: attention as the gradient of log-sum-exp, which is associative).
//!
//! merge((o1, l1), (o2, l2)): m = max(l1, l2), w_i = exp(l_i - m), o = (w1 o1 + w2 o2) / (w1 + w2),
//! lse = m + log(w1 + w2). A partial with lse = -inf is the identity and its o is never read; a NaN lse makes the row NaN.

use super::lse::Lse;

/// Partials in row order (row = query token * heads + head): o packed `f32 [rows, dim]`, lse `f32 [rows]`.
#[derive(Debug)]
pub struct PartialRows<'a> {
    /// Normalised outputs.
    pub o: &'a mut [f32],
    /// Natural log-sum-exps.
    pub lse: &'a mut [Lse],
    /// Elements of an output row.
    pub dim: usize,
}

/// Merges partial (`o`, `lse`) into the accumulated one, with weights and sums in f64, so that each element is rounded once.
/// Merging the identity, on either side, is bitwise the other. Commutative bit for bit: ranks that swap partials end with
/// the same one, whichever of the two is theirs.
pub fn merge_two(acc_o: &mut [f32], acc_lse: &mut Lse, o: &[f32], lse: Lse) {
    if lse.is_empty() {
        return;
    }
    if acc_lse.is_empty() {
        acc_o.copy_from_slice(o);
        *acc_lse = lse;
        return;
    }
    if acc_lse.is_bad() || lse.is_bad() {
        acc_o.fill(f32::NAN);
        *acc_lse = Lse::NAN;
        return;
    }
    let (l1, l2) = (acc_lse.value(), lse.value());
    let max = l1.max(l2);
    let (w1, w2) = ((l1 - max).exp(), (l2 - max).exp());
    let sum = w1 + w2;
    let (a, b) = (w1 / sum, w2 / sum);
    for (acc, &x) in acc_o.iter_mut().zip(o) {
        *acc = (a * f64::from(*acc) + b * f64::from(x)) as f32;
    }
    *acc_lse = Lse::of(max + sum.ln());
}

/// Merges the partials of one row that `count` ranks hold, in rank order: global maximum first, then a left fold.
///
/// `lse(r)` gives rank r's lse. `o(r, scratch)` gives its output row, or fills `scratch` (a row long) with it and gives
/// none; it is not called where the lse is -inf. Writes the merged row to `out` and gives the merged lse.
pub fn merge_ranks<'a>(
    count: usize,
    lse: impl Fn(usize) -> Lse,
    o: impl Fn(usize, &mut [f32]) -> Option<&'a [f32]>,
    scratch: &mut [f32],
    out: &mut [f32],
) -> Lse {
    let mut max = f64::NEG_INFINITY;
    let mut live = 0;
    for r in 0..count {
        let l = lse(r);
        if l.is_bad() {
            out.fill(f32::NAN);
            return Lse::NAN;
        }
        live += usize::from(!l.is_empty());
        max = max.max(l.value());
    }
    if live == 0 {
        out.fill(0.0);
        return Lse::EMPTY;
    }
    // Weights and their sum in f64: they are few, and their rounding would be in every element of the row.
    let (mut sum, mut first) = (0.0f64, true);
    for r in (0..count).filter(|&r| !lse(r).is_empty()) {
        let row = o(r, scratch).unwrap_or(scratch);
        if live == 1 {
            out.copy_from_slice(row);
            return lse(r);
        }
        let weight = (lse(r).value() - max).exp();
        if std::mem::take(&mut first) {
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
    Lse::of(max + sum.ln())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lse(x: f32) -> Lse {
        Lse::of(f64::from(x))
    }

    #[test]
    fn identity_is_bitwise() {
        let x = [1.5f32, -0.0, 3e-40];
        let mine = Lse { high: 0.25, low: 1e-9 };
        let (mut o, mut l) = ([f32::NAN; 3], Lse::EMPTY);
        merge_two(&mut o, &mut l, &x, mine);
        merge_two(&mut o, &mut l, &[f32::NAN; 3], Lse::EMPTY);
        assert_eq!((o.map(f32::to_bits), l), (x.map(f32::to_bits), mine));
        let rows = [&[f32::NAN; 3][..], &x[..]];
        let lses = [Lse::EMPTY, mine];
        let mut out = [0.0; 3];
        assert_eq!(merge_ranks(2, |r| lses[r], |r, _| Some(rows[r]), &mut [0.0; 3], &mut out), mine);
        assert_eq!(out.map(f32::to_bits), x.map(f32::to_bits));
    }

    #[test]
    fn empty_everywhere_is_zero() {
        let mut out = [f32::NAN; 2];
        assert_eq!(merge_ranks(3, |_| Lse::EMPTY, |_, _| unreachable!(), &mut [], &mut out), Lse::EMPTY);
        assert_eq!(out, [0.0; 2]);
    }

    #[test]
    fn nan_is_never_hidden() {
        let rows = [[1.0f32; 2], [2.0; 2]];
        for bad in [f32::NAN, f32::INFINITY] {
            let lses = [lse(0.0), Lse { high: bad, low: 0.0 }];
            let mut out = [0.0; 2];
            assert!(merge_ranks(2, |r| lses[r], |r, _| Some(&rows[r]), &mut [], &mut out).high.is_nan());
            assert!(out.iter().all(|x| x.is_nan()));
            let (mut o, mut l) = ([1.0f32], lse(0.0));
            merge_two(&mut o, &mut l, &[1.0], lses[1]);
            assert!(o[0].is_nan() && l.high.is_nan());
        }
    }

    #[test]
    fn the_merge_of_two_is_commutative() {
        let mut state = 7u32;
        let mut draw = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 22) as f32 - 2.0
        };
        for _ in 0..1000 {
            let (x, y) = ([draw(), draw(), draw()], [draw(), draw(), draw()]);
            let (lx, ly) = (Lse::of(10.0 * f64::from(draw())), Lse::of(10.0 * f64::from(draw())));
            let (mut a, mut la) = (x, lx);
            merge_two(&mut a, &mut la, &y, ly);
            let (mut b, mut lb) = (y, ly);
            merge_two(&mut b, &mut lb, &x, lx);
            assert_eq!((a.map(f32::to_bits), la), (b.map(f32::to_bits), lb));
            let (rows, lses) = ([x, y], [lx, ly]);
            let mut out = [0.0; 3];
            let l = merge_ranks(2, |r| lses[r], |r, _| Some(&rows[r]), &mut [], &mut out);
            assert!(a.iter().zip(out).all(|(a, c)| (a - c).abs() < 1e-6) && (la.value() - l.value()).abs() < 1e-12);
        }
    }

    #[test]
    fn two_halves_make_the_whole() {
        let (mut o, mut l) = ([1.0f32], lse(0.0));
        merge_two(&mut o, &mut l, &[3.0], lse(0.0));
        assert_eq!((o, l.high), ([2.0], 2f32.ln()));
        let mut out = [0.0];
        let l = merge_ranks(2, |_| lse(0.0), |r, _| Some(if r == 0 { &[1.0] } else { &[3.0] }), &mut [], &mut out);
        assert_eq!((out[0], l.high), (2.0, 2f32.ln()));
    }

    #[test]
    fn a_weight_of_nothing_hides_no_nan() {
        for order in [[0, 1], [1, 0]] {
            let (rows, lses) = ([[f32::NAN, 1.0], [2.0, 2.0]], [lse(-1000.0), lse(0.0)]);
            let mut out = [0.0; 2];
            let l = merge_ranks(2, |r| lses[order[r]], |r, _| Some(&rows[order[r]]), &mut [], &mut out);
            assert!(out[0].is_nan() && out[1] == 2.0 && l == lse(0.0), "{out:?} {l:?}");
        }
    }

    /// Large log-sum-exps differ by what an f32 of them could not tell.
    #[test]
    fn weights_are_right_however_large_the_lse() {
        for base in [16.0, 3e4, 3e6] {
            let lses = [Lse::of(base + 1e-4), Lse::of(base)];
            let wanted = (1e-4f64 / 2.0).tanh();
            let mut out = [0.0];
            merge_ranks(2, |r| lses[r], |r, _| Some(if r == 0 { &[1.0] } else { &[-1.0] }), &mut [], &mut out);
            assert!((f64::from(out[0]) - wanted).abs() < 1e-7, "{base}: {} {wanted}", out[0]);
            let (mut o, mut l) = ([1.0], lses[0]);
            merge_two(&mut o, &mut l, &[-1.0], lses[1]);
            assert!((f64::from(o[0]) - wanted).abs() < 1e-7, "{base}: {} {wanted}", o[0]);
        }
    }
}
