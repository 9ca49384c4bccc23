//! The error that no output exceeds, for any input, at any length, and why.
//!
//! Of one row: s_j are its scores, w_j its normalised weights, A = sum_j w_j |v_j|, S = max_j scale sum_i |q_i k_ij|,
//! u = 2^-24 (half a unit in the last place of 1 in f32), R the partials that are merged. All against exact arithmetic; the
//! float64 reference stands for it. Products of u with u are left out: they are below 2^-10 of what is counted.
//!
//! **Scores.** q.k is summed by chains of fused multiply-adds in L lanes, which then meet in a tree; a chain takes 128
//! elements at most, and longer rows add up chains. Every rounding is at most u times a partial sum. That makes
//! N = ceil(min(d, 128) / L) + ceil(d / 128) + log2 L roundings on a path ([`Arithmetic`](super::arithmetic::Arithmetic); one
//! more where the machine cannot fuse, which rounds products, too). A partial sum is at most sum |q_i k_i| plus what the sum was begun
//! with, a value near the row's largest score m. Begun with -m, the partial sums of key j are at most
//! S + (m - s_j) / 2 + 3, because what lies beyond s_j on the way has to come back. The weight of a key that is t
//! below m falls as e^-t, and 2^31 keys weigh no more than e^21.5 of them: over a row the (m - s_j) / 2 count as
//! 11 at most, and as S at most. Hence |error of s_j| <= u N S' with S' = S + min(S, 16) (`reach`).
//! Scaling and the subtraction of m are done on two floats and cost 2 u S at most, 0 where scores are below 2^22.
//!
//! **Terms.** S is then what [`ScoreMod::magnitude`](crate::attention::ScoreMod::magnitude) makes of its parts. Under a cap
//! sums begin with 0, so that their partial sums are at most sum |q_i k_i|; its error passes the cap times the slope of tanh,
//! 1 at most; the quotient s / cap is rounded once, tanh is within 6 u (`kernel::modify`, checked over its range), its product
//! with the cap and the sum with what is added are rounded once. The distance, the slope over the unit of scores (or the
//! mask's factor over it), their product and its sum with the others are rounded once each, at most 4 u of what they stand
//! for. So terms cost 10 u S more in N S'. What is added to scores that begin with -m meets partial sums of up to S + |m|, and
//! |m| is S at most: S' is 2 S with them.
//!
//! Scales of keys multiply scores: u S more, one N more, and such scores begin with 0 and not with -m.
//!
//! **Weights.** exp2 is within 2 u, its argument's rest within u / 2. So a weight has a relative error of
//! e = u (N S' + 2 S + 3). In the output it counts twice, in numerator and denominator; in the lse once.
//!
//! **Sums.** No float takes in more than a leaf of keys (128) before it is closed into float64, where 2^31 keys cost
//! less than u / 16. Values: 8 keys in a register, and 16 such sums: 24 u A; where values have scales these multiply weights,
//! u A more. Weights: 128 / L of them in a lane.
//! Maxima are whole powers of two, so rescaling never rounds.
//!
//! **Partials.** o is rounded to f32: u A. Between ranks the lse travels as two floats, whose error, u^2 |lse|, is left out;
//! one that an engine hands in is one float, and having been rounded costs up to 2 u |lse| A more.
//! Merged: each weight is rounded once and each product once, R sums, the quotient once: (R + 4) u A.
//! With a 16-bit wire type whose unit is e (2^-11 for f16, 2^-8 for bf16) and whose smallest subnormal is t, each o is
//! rounded to it T times: once, and once more for what is handed back; in a tree once a level, which makes T
//! 1 + ceil(log2 R) in one node and 1 + ceil(log2 of the largest node) + ceil(log2 of the nodes) over several, never more
//! than 2 ceil(log2 R). That costs ((1 + e)^T - 1) A + (R + 1) t. Finite values beyond the type's range become its largest, M:
//! what a rank's o has beyond M is lost in proportion to that rank's weight, sum_j w_j max(0, |v_j| - M) at most.
//!
//! **In all**, |error of o| <= u A (24 + 128 / L + 12 + R + 2 N S' + 4 S), the wire's part, and 1 unit in the last place of
//! a 16-bit output; where x = u (2 N S' + 4 S) is not small, with e^x - 1 in its place, since weights are off by factors;
//! |error of the lse| <= u (128 / L + 12 + R + N S' + 2 S) and half a unit in the last place of the lse, whatever the wire
//! type. This holds for all algorithms.
//!
//! **GPUs.** The same sums with other numbers; nothing there depends on the number of lanes.
//! - Scores: tensor cores sum 16 products in a step, exactly but for what lies below 2^-23 of the largest product's binade, which
//!   is cut off of each of the others, and of the sum; in two halves on some GPUs. That is 36 u of the sum of |q_i k_i| at most,
//!   taken over all steps. Two steps are added, and pairs of steps in a chain: 1 + ceil(d / 32). Queries of other types than
//!   keys go in up to three terms, whose smaller ones cost 2 more. So N = 39 + ceil(d / 32), and on CUDA cores less. Sums begin with 0:
//!   S' = S. The scale, times log2 e, costs 2 u S, as above. The product with it less the maximum is rounded once, by u times
//!   their distance, which over a row counts as min(2 S, 23) at most (as above), and 3 for what the maximum was rounded up
//!   to a whole number.
//! - Terms: tanh is within 4 u, and its argument and what is added have a rounding more each: 16 u S more, as above in N S'.
//! - Weights: exp2 is within 4 u, f16 terms lose 2 u in the output.
//! - Values: a tile has 16 keys, whose products with weights begin with 0 and cost 36 u A, in one to three terms of a weight. An
//!   accumulator takes in K tiles at most, by fp32 additions (three each of values in three terms), K = 1024 or the number of keys,
//!   before it is closed into two floats, which 2^16 closings leave as good as exact; 1 u to come out of them. Up to 12 warps, 16
//!   blocks and 16 groups of blocks follow, whose weights are powers of two. 81 + K in all. Weights likewise, in 26 + K, since
//!   lanes and blocks meet in trees.
//! - Partials: the quotient costs 2 u; between ranks a weight 2 u twice, its log-sum-exp's error and distance 3 u, shares 2 u, and R.
//!   The log-sum-exp: its logarithms and the last sums 13 u, exp2 as above.
//!
//! So |error of o| <= u A (131 + 2 K + R + 4 S + 2 (N S + min(2 S, 23) + 3)) and |error of the lse| <=
//! u (44 + K + R + 2 S + N S + min(2 S, 23) + 3) and half a unit in its last place. `ALLREDUCE3` sends the lse as one float,
//! which costs up to 2 u |lse| A more.
//!
//! **Limits.** An average stays in the range of the values, which is all that is left of these bounds for scores past 2^22.
//! What underflows is lost: weights below 2^-125 of the largest, and 2^-149 of a sum. Tensor cores line up products by exponents
//! that leave the leading zeros of f16 values below 2^-14 alone: such a value counts as 2^-14 in A on a GPU. Scores, and the partial sums of
//! their products, have to be within float32, scores also times log2 e (of scales beyond 2^-32 to 2^32 the products times that
//! power of two): a row with one above it is NaN, and one below it weighs nothing, so that a row with no other counts as one
//! without keys; under a cap both make their row NaN. Values are summed before they are divided, with weights of at most 1:
//! above 3.4e38 / 128, on a GPU above 3.4e38 / the keys of the row there, and above 3.4e38 / R between ranks, sums may be infinite.

use super::floats::{Precision, ulp};
use super::partials::Reference;
use crate::attention::dtype::Dtype;

/// 2^-24.
const U: f64 = 1.0 / 16_777_216.0;
/// From here on float32 scores do not tell which key is the largest.
const LARGEST_SCORE: f64 = 4_194_304.0;

impl Reference {
    /// N: the roundings of a score, its bias included.
    fn score_roundings(&self) -> f64 {
        let bias = if self.biased { self.arithmetic.score_roundings(self.dim) + 2.0 } else { 0.0 };
        let terms = if self.mods.adds() || self.mods.softcap() > 0.0 { self.arithmetic.term_roundings() } else { 0.0 };
        self.arithmetic.score_roundings(self.dim_qk) + bias + terms + f64::from(u8::from(self.scaled[0]))
    }

    /// N S' and what else rounds a score, over u.
    fn of_scores(&self, score: f64) -> f64 {
        let reach = self.arithmetic.reach(score, self.mods.adds());
        self.score_roundings() * reach + self.arithmetic.distance(score)
    }

    /// The error that element `d` of row `row` never exceeds. See the module's text.
    pub fn guarantee(&self, row: usize, d: usize, precision: Precision) -> f64 {
        let at = row * self.dim + d;
        let (o, weighted, largest) = (self.o[at].abs(), self.weighted[at], self.largest[at]);
        if largest == 0.0 {
            return 0.0;
        }
        let (score, partials, keys) = (self.score[row], self.partials as f64, self.keys[row]);
        let sums = self.arithmetic.value_roundings(keys)
            + f64::from(u8::from(self.scaled[1]))
            + self.arithmetic.weight_roundings(keys)
            + self.arithmetic.output_roundings()
            + partials;
        let scores = U * (2.0 * self.of_scores(score) + 4.0 * score);
        let c = if score < LARGEST_SCORE { U * sums + scores.exp_m1() } else { f64::INFINITY };
        let terms = keys as f64 + 64.0;
        // A maximum is rounded up to a whole power of two, so the least weight is that part of twice the largest.
        let underflow = terms * (2.0 * self.least_weight * largest + 2f64.powi(-149));
        let range = o + (1.0 + U * sums) * largest;
        // A bound of infinity times nothing is none.
        let mut bound = if c.is_finite() { (c * (weighted + self.least_value) + underflow).min(range) } else { range };
        if precision.wire != Dtype::F32 {
            let (unit, tiny) = (ulp(1.0, precision.wire) / 2.0, ulp(0.0, precision.wire));
            let times = 2.0 * partials.log2().ceil().max(1.0);
            bound += ((1.0 + unit).powf(times) - 1.0) * weighted + (partials + 1.0) * tiny;
        }
        if precision.out != Dtype::F32 {
            bound += ulp(o + bound, precision.out);
        }
        bound
    }

    /// The error that the lse of row `row` never exceeds. See the module's text.
    pub fn lse_guarantee(&self, row: usize) -> f64 {
        let (score, lse) = (self.score[row], self.lse[row].abs());
        let sums =
            self.arithmetic.weight_roundings(self.keys[row]) + self.arithmetic.lse_roundings() + self.partials as f64;
        let terms = self.keys[row] as f64 + 64.0;
        U * (sums + self.of_scores(score) + 2.0 * score) + 0.5 * ulp(lse, Dtype::F32) + terms * 2.0 * self.least_weight
    }
}
