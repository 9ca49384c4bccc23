//! How an output is held against the float64 reference.
//!
//! Against two bounds: the error that no output exceeds (`guarantee`), and the usual error, which tells a mistake much sooner.
//! Nearly all outputs of random inputs keep to the usual error, and none is known to exceed it [`MOST`] times; a few exceed it
//! once, those of one row together, since a score that was rounded badly is part of them all. So how many do is no measure of
//! anything, and how large errors are on average ([`Comparison::mean`]) is.

use std::ops::Range;

use super::floats::{Precision, round_to, ulp};
use super::inputs::load_row;
use super::partials::Reference;
use crate::attention::descriptor::AttentionDesc;
use crate::attention::dtype::Dtype;
use crate::attention::step::Step;

/// How many times the usual error an output or an lse of random inputs may err. The largest seen is 1.9, of 334 million outputs.
pub const MOST: f64 = 3.0;

/// What a comparison found. Several outputs may be added up in one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Comparison {
    /// Output elements compared.
    pub elements: u64,
    /// Those equal to the reference rounded to the output's type.
    pub correctly_rounded: u64,
    /// The largest error of an output element, as a part of the usual one.
    pub worst: f64,
    /// The errors of all output elements, as parts of the usual ones, added up; correctly rounded ones count as none.
    pub sum: f64,
    /// The same for the lse.
    pub worst_lse: f64,
    /// Outputs and lses that err by more than the usual error.
    pub broken: u64,
    /// The largest error of an output element, as a part of what is guaranteed; above 1 the guarantee is broken.
    pub worst_guaranteed: f64,
    /// The same for the lse.
    pub worst_lse_guaranteed: f64,
    /// The output or lse that exceeds the usual error most, in words.
    pub failure: Option<String>,
    /// How many times it does.
    excess: f64,
}

impl Comparison {
    /// The part of elements that are correctly rounded; 1 of none.
    pub fn rounded_share(&self) -> f64 {
        if self.elements == 0 { 1.0 } else { self.correctly_rounded as f64 / self.elements as f64 }
    }

    /// The mean error of output elements, as a part of the usual one; 0 of none.
    pub fn mean(&self) -> f64 {
        if self.elements == 0 { 0.0 } else { self.sum / self.elements as f64 }
    }

    /// Whether no output and no lse exceeds the usual error more than [`MOST`] times.
    pub fn is_within(&self) -> bool {
        self.worst.max(self.worst_lse) <= MOST
    }

    /// Adds what another comparison found.
    pub fn add(&mut self, other: &Comparison) {
        self.elements += other.elements;
        self.correctly_rounded += other.correctly_rounded;
        self.worst = self.worst.max(other.worst);
        self.sum += other.sum;
        self.worst_lse = self.worst_lse.max(other.worst_lse);
        self.broken += other.broken;
        self.worst_guaranteed = self.worst_guaranteed.max(other.worst_guaranteed);
        self.worst_lse_guaranteed = self.worst_lse_guaranteed.max(other.worst_lse_guaranteed);
        if other.excess > self.excess {
            (self.failure, self.excess) = (other.failure.clone(), other.excess);
        }
    }

    fn exceed(&mut self, part: f64, message: impl FnOnce() -> String) {
        self.broken += 1;
        if part > self.excess {
            (self.failure, self.excess) = (Some(message()), part);
        }
    }
}

impl Reference {
    /// Makes the bounds those of f16 values on tensor cores: weights are terms of f16, scaled by 2^15, and of values below 2^-14
    /// lower bits are lost.
    pub fn multiply_f16(&mut self) {
        (self.least_weight, self.least_value) = (2f64.powi(-39), 2f64.powi(-14));
    }

    /// How far element `d` of row `row` usually lies from the reference at most: 2^-24 (4 + 2 score) A (3 score where
    /// keys have scales, which round scores once more), what the wire rounds off,
    /// 1 ulp of a 16-bit output, and what underflow may take (a weight below `least_weight` counts as none, and A as `least_value`
    /// more); never so far that
    /// an average would leave the range of the values, which is all that holds for scores past 2^23.
    pub fn bound(&self, row: usize, d: usize, precision: Precision) -> f64 {
        let at = row * self.dim + d;
        let (o, weighted, largest) = (self.o[at].abs(), self.weighted[at], self.largest[at]);
        if largest == 0.0 {
            return 0.0;
        }
        let terms = self.keys[row] as f64 + 64.0;
        let underflow = terms * (self.least_weight * largest + 2f64.powi(-149));
        let c = 2f64.powi(-24) * (4.0 + if self.scaled[0] { 3.0 } else { 2.0 } * self.score[row]);
        let range = o + 1.0001 * largest;
        // From c = 1 on float32 scores no longer tell which key is the largest: all that is left is the range, and
        // anything in it may be what is rounded.
        let (mut bound, o, weighted) = if c < 1.0 {
            ((c * (weighted + self.least_value) + underflow).min(range), o, weighted)
        } else {
            (range, largest, largest)
        };
        if precision.wire != Dtype::F32 {
            bound += 2.0 * ulp(weighted, precision.wire);
        }
        if precision.out != Dtype::F32 {
            bound += ulp(o, precision.out);
        }
        bound
    }

    /// How far the lse of row `row` usually lies from the reference at most: 4 ulp of max(1, |lse|, score).
    pub fn lse_bound(&self, row: usize) -> f64 {
        4.0 * ulp(self.score[row].max(self.lse[row].abs()).max(1.0), Dtype::F32)
    }

    /// Holds row `row` of an output (widened to f32, which is exact) against its bounds.
    pub fn compare_row(&self, row: usize, o: &[f32], lse: Option<f32>, precision: Precision, to: &mut Comparison) {
        if let Some(lse) = lse {
            self.compare_lse(row, lse, to);
        }
        for (d, (&found, &wanted)) in o.iter().zip(self.row(row)).enumerate() {
            let found = f64::from(found);
            to.elements += 1;
            if found == round_to(wanted, precision.out) || (found.is_nan() && wanted.is_nan()) {
                to.correctly_rounded += 1;
                continue;
            }
            let bound = self.bound(row, d, precision);
            let part = error_part(found, wanted, bound, precision.out);
            to.worst = to.worst.max(part);
            to.sum += part;
            let guaranteed = error_part(found, wanted, self.guarantee(row, d, precision), precision.out);
            to.worst_guaranteed = to.worst_guaranteed.max(guaranteed);
            if part > 1.0 {
                let (a, score, keys) = (self.weighted[row * self.dim + d], self.score[row], self.keys[row]);
                to.exceed(part, || {
                    format!(
                        "o[row {row}, {d}]: found {found:e}, wanted {wanted:e} within {bound:e} (A {a:e}, score \
                         {score:e}, {keys} keys)"
                    )
                });
            }
        }
    }

    fn compare_lse(&self, row: usize, found: f32, to: &mut Comparison) {
        let (found, wanted) = (f64::from(found), self.lse[row]);
        if found == wanted || (found.is_nan() && wanted.is_nan()) {
            return;
        }
        let (error, bound) = ((found - wanted).abs(), self.lse_bound(row));
        let part = |bound: f64| if error.is_finite() { error / bound } else { f64::INFINITY };
        let usual = part(bound);
        to.worst_lse = to.worst_lse.max(usual);
        to.worst_lse_guaranteed = to.worst_lse_guaranteed.max(part(self.lse_guarantee(row)));
        if usual > 1.0 {
            let (score, keys) = (self.score[row], self.keys[row]);
            to.exceed(usual, || {
                format!(
                    "lse[row {row}]: found {found:e}, wanted {wanted:e} within {bound:e} (score {score:e}, {keys} keys)"
                )
            });
        }
    }

    /// Holds the output that a step wrote, over heads `heads` (those of the rank's output), against the bounds.
    ///
    /// # Safety
    /// `step` was made from `desc` for that many heads; out and lse are host memory as large as its fields say and the
    /// step is done.
    pub unsafe fn compare(&self, desc: &AttentionDesc, step: &Step, heads: Range<usize>) -> Comparison {
        let precision = Precision { out: desc.out_dtype, wire: desc.wire_dtype };
        let mut found = Comparison::default();
        let mut wide = vec![0.0; self.dim];
        let mut lse = [0.0];
        for token in 0..step.args.query_tokens as i64 {
            for (n, head) in heads.clone().enumerate() {
                let n = n as i64;
                let at = token * step.out_stride[0] + n * step.out_stride[1];
                // SAFETY: a token and a head that the step was made for, whose rows `Step::new` checked to lie inside out; it is
                // readable, as this function was promised.
                unsafe { load_row(&step.args.out, desc.out_dtype, at, step.out_stride[2], &mut wide) };
                let row: Vec<f32> = wide.iter().map(|&x| x as f32).collect();
                let wanted = token as usize * desc.q_heads as usize + head;
                let with_lse = !step.args.lse.data.is_null();
                if with_lse {
                    let at = token * step.lse_stride[0] + n * step.lse_stride[1];
                    // SAFETY: as above, of lse.
                    unsafe { load_row(&step.args.lse, Dtype::F32, at, 0, &mut lse) };
                }
                self.compare_row(wanted, &row, with_lse.then_some(lse[0] as f32), precision, &mut found);
            }
        }
        found
    }
}

/// An error as a part of its bound; infinite where no bound can allow it.
fn error_part(found: f64, wanted: f64, bound: f64, dtype: Dtype) -> f64 {
    let allowed = if wanted.is_infinite() {
        !found.is_finite()
    } else if found.is_infinite() {
        // Rounding up may leave the type.
        round_to(wanted + found.signum() * bound, dtype) == found
    } else if wanted.is_finite() && found.is_finite() {
        return if found == wanted { 0.0 } else { (found - wanted).abs() / bound };
    } else {
        false
    };
    if allowed { 0.0 } else { f64::INFINITY }
}
