//! Partials in float64, with what error bounds are made of, and their merge.

use super::arithmetic::Arithmetic;
use crate::attention::score::ScoreMod;
use crate::error::{Error, ErrorKind, Result};
use crate::partial::DataFault;

/// Partials of all rows of a step in float64, with what the error bounds are made of.
///
/// Row = query token * q_heads + head. Rows that no sequence owns, or without visible keys, are the identity: o 0,
/// lse -inf. Rows of a sequence with bad data are NaN.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    /// Elements of a row of `o`, `weighted` and `largest`.
    pub dim: usize,
    /// `f64 [rows, dim]`: the normalised outputs.
    pub o: Vec<f64>,
    /// `f64 [rows]`: the natural log-sum-exps of the scaled scores.
    pub lse: Vec<f64>,
    /// `f64 [rows, dim]`: A = sum_j w_j |v_j|, with the normalised weights w.
    pub weighted: Vec<f64>,
    /// `f64 [rows, dim]`: max_j |v_j|.
    pub largest: Vec<f64>,
    /// `f64 [rows]`: max_j scale sum_i |q_i k_ij|, with what is added to scores: [`ScoreMod::magnitude`].
    pub score: Vec<f64>,
    /// The keys that each row sees.
    pub keys: Vec<u64>,
    /// Weights below this part of the largest may count as none: 2^-126, what float32 weights have; to be set where a
    /// backend's are narrower.
    pub least_weight: f64,
    /// Values below this count as large as it: 0; to be set where a backend loses lower bits of such values.
    pub least_value: f64,
    /// Elements of q and k.
    pub dim_qk: usize,
    /// Whether zeta.v is added to each score.
    pub biased: bool,
    /// What happens to scores.
    pub mods: ScoreMod,
    /// Whether keys and values have scales.
    pub scaled: [bool; 2],
    /// The partials that were merged; 1: one shard.
    pub partials: u32,
    /// The arithmetic that the guarantee is for: the one with the largest errors, unless it is set.
    pub arithmetic: Arithmetic,
    /// The first sequence with bad data.
    pub fault: Option<DataFault>,
}

/// Merges the references of all shards of a step into the one over the whole cache.
///
/// Errors: `InvalidArgument` where there are none or their sizes differ.
pub fn merge(shards: &[Reference]) -> Result<Reference> {
    let Some(first) = shards.first() else {
        return Err(Error::invalid("shards", 0, "at least 1"));
    };
    let mut merged = Reference::identity(first.lse.len(), first.dim)?;
    (merged.dim_qk, merged.biased, merged.arithmetic) = (first.dim_qk, first.biased, first.arithmetic);
    merged.mods = first.mods;
    merged.partials = shards.iter().map(|shard| shard.partials).sum();
    for shard in shards {
        if (shard.lse.len(), shard.dim) != (first.lse.len(), first.dim) {
            let found = format!("[{}, {}]", shard.lse.len(), shard.dim);
            return Err(Error::invalid("shards", found, format!("[{}, {}]", first.lse.len(), first.dim)));
        }
        merged.fault = merged.fault.or(shard.fault);
        for (all, one) in merged.scaled.iter_mut().zip(shard.scaled) {
            *all |= one;
        }
    }
    for row in 0..first.lse.len() {
        merge_row(shards, row, &mut merged);
    }
    Ok(merged)
}

fn merge_row(shards: &[Reference], row: usize, merged: &mut Reference) {
    let max = maximum(shards.iter().map(|shard| shard.lse[row]));
    merged.keys[row] = shards.iter().map(|shard| shard.keys[row]).sum();
    let at = row * merged.dim..(row + 1) * merged.dim;
    let mut sum = 0.0;
    for shard in shards.iter().filter(|shard| shard.lse[row] != f64::NEG_INFINITY) {
        let weight = (shard.lse[row] - max).exp();
        sum += weight;
        merged.score[row] = merged.score[row].max(shard.score[row]);
        for d in at.clone() {
            merged.o[d] += weight * shard.o[d];
            merged.weighted[d] += weight * shard.weighted[d];
            merged.largest[d] = merged.largest[d].max(shard.largest[d]);
        }
    }
    merged.finish(row, max, sum);
}

impl Reference {
    pub(super) fn identity(rows: usize, dim: usize) -> Result<Reference> {
        let elements = rows.checked_mul(dim).ok_or_else(|| no_memory("rows x head_dim_v"))?;
        let mut lse = zeroed(rows)?;
        lse.fill(f64::NEG_INFINITY);
        let mut keys = Vec::new();
        reserve(&mut keys, rows)?;
        keys.resize(rows, 0);
        Ok(Reference {
            dim,
            o: zeroed(elements)?,
            lse,
            weighted: zeroed(elements)?,
            largest: zeroed(elements)?,
            score: zeroed(rows)?,
            keys,
            least_weight: 2f64.powi(-126),
            least_value: 0.0,
            dim_qk: 0,
            biased: false,
            mods: ScoreMod::PLAIN,
            scaled: [false; 2],
            partials: 1,
            arithmetic: Arithmetic::ANY,
            fault: None,
        })
    }

    /// The rows of the step.
    pub fn rows(&self) -> usize {
        self.lse.len()
    }

    /// Row `row` of `o`.
    pub fn row(&self, row: usize) -> &[f64] {
        &self.o[row * self.dim..(row + 1) * self.dim]
    }

    pub(super) fn add(&mut self, row: usize, weight: f64, v: &[f64]) {
        let first = row * self.dim;
        for (d, &v) in v.iter().enumerate() {
            self.o[first + d] += weight * v;
            self.weighted[first + d] += weight * v.abs();
            self.largest[first + d] = self.largest[first + d].max(v.abs());
        }
    }

    /// Turns sums over weights exp(score - max) into a partial.
    pub(super) fn finish(&mut self, row: usize, max: f64, sum: f64) {
        let at = row * self.dim..(row + 1) * self.dim;
        if max == f64::NEG_INFINITY {
            self.o[at.clone()].fill(0.0);
            self.weighted[at].fill(0.0);
            self.lse[row] = f64::NEG_INFINITY;
            return;
        }
        if !max.is_finite() {
            return self.poison(row);
        }
        for d in at {
            self.o[d] /= sum;
            self.weighted[d] /= sum;
        }
        self.lse[row] = max + sum.ln();
    }

    /// Merges the partial (0, `sink`) into row `row`.
    pub(super) fn merge_sink(&mut self, row: usize, sink: f64) {
        let lse = self.lse[row];
        if sink == f64::NEG_INFINITY || lse.is_nan() {
            return;
        }
        if !sink.is_finite() {
            return self.poison(row);
        }
        let max = lse.max(sink);
        let (own, other) = ((lse - max).exp(), (sink - max).exp());
        for d in row * self.dim..(row + 1) * self.dim {
            self.o[d] *= own / (own + other);
            self.weighted[d] *= own / (own + other);
        }
        self.lse[row] = max + (own + other).ln();
    }

    pub(super) fn poison(&mut self, row: usize) {
        self.o[row * self.dim..(row + 1) * self.dim].fill(f64::NAN);
        self.lse[row] = f64::NAN;
    }
}

/// The largest value, -inf of none, NaN if any is NaN.
pub(super) fn maximum(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(f64::NEG_INFINITY, |max, x| if max.is_nan() || x.is_nan() { f64::NAN } else { max.max(x) })
}

pub(super) fn zeroed(count: usize) -> Result<Vec<f64>> {
    let mut floats = Vec::new();
    reserve(&mut floats, count)?;
    floats.resize(count, 0.0);
    Ok(floats)
}

pub(super) fn reserve<T>(vec: &mut Vec<T>, count: usize) -> Result<()> {
    vec.try_reserve_exact(count).map_err(|_| no_memory(format_args!("{count} values")))
}

fn no_memory(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::NoMemory, format!("float64 reference: no memory for {what}"))
}
