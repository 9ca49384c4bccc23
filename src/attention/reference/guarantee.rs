//! The error that no output exceeds, for any input, at any length, and why.
//!
//! Of one row: s_j are its scores, w_j its normalised weights, A = sum_j w_j |v_j|, S = max_j scale sum_i |q_i k_ij|,
//! u = 2^-24 (half a unit in the last place of 1 in f32), R the partials that are merged. All against exact arithmetic; the
//! float64 reference stands for it. Products of u with u are left out: they are below 2^-10 of what is counted.
//!
//! **Scores.** q.k is summed by chains of fused multiply-adds in L lanes, which then meet in a tree; a chain takes 128
//! elements at most, and longer rows add up chains. Every rounding is at most u times a partial sum. That makes
//! N = ceil(min(d, 128) / L) + ceil(d / 128) + log2 L roundings on a path ([`Arithmetic`](super::arithmetic::Arithmetic); one more where
//! the machine cannot fuse, which rounds products, too). A partial sum is at most sum |q_i k_i| plus what the sum was begun
//! with, a value near the row's largest score m. Begun with -m, the partial sums of key j are at most
//! S + (m - s_j) / 2 + 3, because what lies beyond s_j on the way has to come back. The weight of a key that is t
//! below m falls as e^-t, and 2^31 keys weigh no more than e^21.5 of them: over a row the (m - s_j) / 2 count as
//! 11 at most, and as S at most. Hence |error of s_j| <= u N S' with S' = S + min(S, 16) (`reach`).
//! Scaling and the subtraction of m are done on two floats and cost 2 u S at most, 0 where scores are below 2^22.
//!
//! **Weights.** exp2 is within 2 u, its argument's rest within u / 2. So a weight has a relative error of
//! e = u (N S' + 2 S + 3). In the output it counts twice, in numerator and denominator; in the lse once.
//!
//! **Sums.** No float takes in more than a leaf of keys (128) before it is closed into float64, where 2^31 keys cost
//! less than u / 16. Values: 8 keys in a register, and 16 such sums: 24 u A. Weights: 128 / L of them in a lane.
//! Maxima are whole powers of two, so rescaling never rounds.
//!
//! **Partials.** o is rounded to f32: u A. Between CPU ranks the lse travels as two floats, whose
//! error is u^2 |lse|; `ALLREDUCE3`, the paper's baseline, has one, which costs up to 2 u |lse| A more. Merged: each weight is
//! rounded once and each product once, R sums, the quotient once: (R + 4) u A. On a 16-bit wire each o is rounded to it,
//! in a tree once a level and once more for what is handed back: (1 + ceil(log2 R)) units in the last place of A.
//!
//! **In all**, |error of o| <= u A (24 + 128 / L + 12 + R + 2 N S' + 4 S), the wire's part, and 1 unit in the last place of
//! a 16-bit output; |error of the lse| <= u (128 / L + 12 + R + N S' + 2 S) and half a unit in the last place of the lse.
//! Besides, an average stays in the range of the values; and what underflows is lost: weights below 2^-126 of the largest,
//! and 2^-149 of a sum.

use super::floats::{Precision, ulp};
use super::partials::Reference;
use crate::attention::dtype::Dtype;

/// What a partial sum of a score may reach.
fn reach(score: f64) -> f64 {
    score + score.min(16.0)
}

/// 2^-24.
const U: f64 = 1.0 / 16_777_216.0;
/// Roundings of weights (twice), quotients and merges, beyond one a partial.
const ROUNDINGS: f64 = 12.0;
/// Roundings on a path through a sum of values.
const VALUE_ROUNDINGS: f64 = 24.0;

impl Reference {
    /// N: the roundings of a score, its bias included.
    fn score_roundings(&self) -> f64 {
        let bias = if self.biased { self.arithmetic.score_roundings(self.dim) + 2.0 } else { 0.0 };
        self.arithmetic.score_roundings(self.dim_qk) + bias
    }

    /// The error that element `d` of row `row` never exceeds. See the module's text.
    pub fn guarantee(&self, row: usize, d: usize, precision: Precision) -> f64 {
        let at = row * self.dim + d;
        let (o, weighted, largest) = (self.o[at].abs(), self.weighted[at], self.largest[at]);
        if largest == 0.0 {
            return 0.0;
        }
        let (score, partials) = (self.score[row], self.partials as f64);
        let sums = VALUE_ROUNDINGS + self.arithmetic.weight_roundings() + ROUNDINGS + partials;
        let c = U * (sums + 2.0 * self.score_roundings() * reach(score) + 4.0 * score);
        let terms = self.keys[row] as f64 + 64.0;
        let underflow = terms * (self.least_weight * largest + 2f64.powi(-149));
        let range = o + (1.0 + U * sums) * largest;
        let mut bound = (c * weighted + underflow).min(range);
        if precision.wire != Dtype::F32 {
            bound += (1.0 + partials.log2().ceil()) * ulp(weighted, precision.wire);
        }
        if precision.out != Dtype::F32 {
            bound += ulp(o + bound, precision.out);
        }
        bound
    }

    /// The error that the lse of row `row` never exceeds. See the module's text.
    pub fn lse_guarantee(&self, row: usize) -> f64 {
        let (score, lse) = (self.score[row], self.lse[row].abs());
        let sums = self.arithmetic.weight_roundings() + ROUNDINGS + self.partials as f64;
        let terms = self.keys[row] as f64 + 64.0;
        U * (sums + self.score_roundings() * reach(score) + 2.0 * score)
            + 0.5 * ulp(lse, Dtype::F32)
            + terms * self.least_weight
    }
}
