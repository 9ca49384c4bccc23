//! The float64 reference that everything is held against: plain loops, no blocking, no tricks.
//!
//! [`attend`] reads the very same descriptor and step as a backend, for one shard; [`merge`] joins the shards of all
//! ranks; [`Reference::compare`] holds a computed output against the bounds that the library promises. Shares no code
//! with the backends, so that a mistake has to be made twice to go unseen. Depends on the other modules of `attention`
//! and on `partial`'s description of bad data.

mod bounds;
mod inputs;

pub use bounds::{Comparison, Precision, round_to, ulp};

use self::inputs::{Inputs, Sequence, load_row};
use super::descriptor::{AttentionDesc, MaskKind, QueryInput};
use super::dtype::Dtype;
use super::placement::Shard;
use super::step::Step;
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
    /// f64 [rows, dim]: the normalised outputs.
    pub o: Vec<f64>,
    /// f64 [rows]: the natural log-sum-exps of the scaled scores.
    pub lse: Vec<f64>,
    /// f64 [rows, dim]: A = sum_j w_j |v_j|, with the normalised weights w.
    pub weighted: Vec<f64>,
    /// f64 [rows, dim]: max_j |v_j|.
    pub largest: Vec<f64>,
    /// f64 [rows]: max_j scale sum_i |q_i k_ij| (+ sum_i |zeta_i v_ij|).
    pub score: Vec<f64>,
    /// The keys that each row sees.
    pub keys: Vec<u64>,
    /// Weights below this part of the largest may count as none: 2^-126, what float32 weights have; to be set where a
    /// backend's are narrower.
    pub least_weight: f64,
    /// The first sequence with bad data.
    pub fault: Option<DataFault>,
}

/// Attends one shard in float64; at the step's zeta, if it has one. Blocks; its time grows with rows x keys x dimensions.
///
/// Errors: `Unsupported` by field for what the reference does not know, `InvalidArgument` for a merge-only descriptor,
/// `NoMemory`. Bad data is no error: see [`Reference::fault`].
///
/// # Safety
/// `step` was made from `desc`, and its inputs are host memory as large as its fields say, written by nobody meanwhile.
pub unsafe fn attend(desc: &AttentionDesc, shard: Shard, step: &Step) -> Result<Reference> {
    supported(desc)?;
    let inputs = Inputs { desc, shard, step };
    let rows = step.args.query_tokens as usize * desc.q_heads as usize;
    let mut reference = Reference::identity(rows, desc.head_dim_v as usize)?;
    let mut taken = 0;
    for b in 0..step.args.batch as usize {
        let sequence = inputs.sequence(b, &mut taken);
        if let Some(cause) = sequence.fault {
            let first = sequence.first_token * desc.q_heads as usize;
            (first..first + sequence.tokens * desc.q_heads as usize).for_each(|row| reference.poison(row));
            reference.fault = reference.fault.or(Some(DataFault { sequence: b as i32, cause }));
        } else {
            attend_sequence(&inputs, &sequence, &mut reference)?;
        }
    }
    Ok(reference)
}

/// Merges the references of all shards of a step into the one over the whole cache.
///
/// Errors: `InvalidArgument` where there are none or their shapes differ.
pub fn merge(shards: &[Reference]) -> Result<Reference> {
    let Some(first) = shards.first() else {
        return Err(Error::invalid("shards", 0, "at least 1"));
    };
    let mut merged = Reference::identity(first.lse.len(), first.dim)?;
    for shard in shards {
        if (shard.lse.len(), shard.dim) != (first.lse.len(), first.dim) {
            let found = format!("[{}, {}]", shard.lse.len(), shard.dim);
            return Err(Error::invalid("shards", found, format!("[{}, {}]", first.lse.len(), first.dim)));
        }
        merged.fault = merged.fault.or(shard.fault);
    }
    for row in 0..first.lse.len() {
        merge_row(shards, row, &mut merged);
    }
    Ok(merged)
}

fn supported(desc: &AttentionDesc) -> Result<()> {
    if desc.is_merge_only() {
        return Err(Error::invalid("kv_heads", 0, "at least 1 where keys are attended"));
    }
    let refuse = |field: &str, found: String, wanted: &str| Err(Error::unsupported(field, found, wanted));
    for (field, dtype) in [("k_dtype", desc.k_dtype), ("v_dtype", desc.v_dtype)] {
        if !dtype.is_float() {
            return refuse(field, dtype.name().into(), "f32, f16 and bf16");
        }
    }
    for (field, on) in [
        ("window", desc.window != 0),
        ("softcap", desc.softcap != 0.0),
        ("alibi", desc.alibi),
        ("sinks", desc.sinks),
        ("mask", desc.mask != MaskKind::None),
        ("query_input", desc.query_input != QueryInput::Replicated),
    ] {
        if on {
            return refuse(field, "a value that turns it on".into(), "the default");
        }
    }
    Ok(())
}

/// All rows of one sequence without bad data.
fn attend_sequence(inputs: &Inputs<'_>, sequence: &Sequence, reference: &mut Reference) -> Result<()> {
    let (desc, step) = (inputs.desc, inputs.step);
    let (group, dim_qk, dim_v) = (desc.group() as usize, desc.head_dim_qk as usize, desc.head_dim_v as usize);
    let scale = f64::from(desc.effective_scale());
    let mut q = zeroed(group * dim_qk)?;
    let (mut k, mut v) = (zeroed(dim_qk)?, zeroed(dim_v)?);
    let tilted = !step.zeta.data.is_null();
    let mut zeta = zeroed(if tilted { group * dim_v } else { 0 })?;
    let mut scores = zeroed(group * sequence.keys)?;
    let (mut visible, mut sums) = (Vec::new(), Vec::new());
    reserve(&mut visible, sequence.keys)?;
    reserve(&mut sums, group)?;
    sums.resize(group, (0.0, 0.0));
    for token in 0..sequence.tokens {
        visible.clear();
        visible.extend((0..sequence.keys).filter(|&slot| inputs.sees(sequence, token, slot)));
        for kv_head in 0..desc.kv_heads as usize {
            let first_row = (sequence.first_token + token) * desc.q_heads as usize + kv_head * group;
            for (g, q) in q.chunks_exact_mut(dim_qk).enumerate() {
                let at = (sequence.first_token + token) as i64 * step.q_stride[0]
                    + (kv_head * group + g) as i64 * step.q_stride[1];
                load_row(&step.args.q, desc.q_dtype, at, step.q_stride[2], q);
            }
            for (g, zeta) in zeta.chunks_exact_mut(dim_v).enumerate() {
                let at = (sequence.first_token + token) as i64 * step.zeta_stride[0]
                    + (kv_head * group + g) as i64 * step.zeta_stride[1];
                load_row(&step.zeta, Dtype::F32, at, step.zeta_stride[2], zeta);
            }
            for (n, &slot) in visible.iter().enumerate() {
                load_row(&step.args.k, desc.k_dtype, inputs.key(sequence, slot, kv_head), step.k_stride[3], &mut k);
                if tilted {
                    let at = inputs.value(sequence, slot, kv_head);
                    load_row(&step.args.v, desc.v_dtype, at, step.v_stride[3], &mut v);
                }
                for (g, q) in q.chunks_exact(dim_qk).enumerate() {
                    let (qk, qk_magnitude) = dot(q, &k);
                    let zeta = if tilted { &zeta[g * dim_v..][..dim_v] } else { &[] };
                    let (tilt, tilt_magnitude) = dot(zeta, &v);
                    scores[g * visible.len() + n] = scale * qk + tilt;
                    let score = &mut reference.score[first_row + g];
                    *score = score.max(scale.abs() * qk_magnitude + tilt_magnitude);
                }
            }
            for (g, (max, sum)) in sums.iter_mut().enumerate() {
                (*max, *sum) = (maximum(scores[g * visible.len()..][..visible.len()].iter().copied()), 0.0);
            }
            for (n, &slot) in visible.iter().enumerate() {
                load_row(&step.args.v, desc.v_dtype, inputs.value(sequence, slot, kv_head), step.v_stride[3], &mut v);
                for (g, (max, sum)) in sums.iter_mut().enumerate() {
                    // A score of -inf under a maximum of -inf weighs nothing either.
                    let score = scores[g * visible.len() + n];
                    let weight = if score == f64::NEG_INFINITY { 0.0 } else { (score - *max).exp() };
                    *sum += weight;
                    reference.add(first_row + g, weight, &v);
                }
            }
            for (g, &(max, sum)) in sums.iter().enumerate() {
                reference.keys[first_row + g] = visible.len() as u64;
                reference.finish(first_row + g, max, sum);
            }
        }
    }
    Ok(())
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
    fn identity(rows: usize, dim: usize) -> Result<Reference> {
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

    fn add(&mut self, row: usize, weight: f64, v: &[f64]) {
        let first = row * self.dim;
        for (d, &v) in v.iter().enumerate() {
            self.o[first + d] += weight * v;
            self.weighted[first + d] += weight * v.abs();
            self.largest[first + d] = self.largest[first + d].max(v.abs());
        }
    }

    /// Turns sums over weights exp(score - max) into a partial.
    fn finish(&mut self, row: usize, max: f64, sum: f64) {
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

    fn poison(&mut self, row: usize) {
        self.o[row * self.dim..(row + 1) * self.dim].fill(f64::NAN);
        self.lse[row] = f64::NAN;
    }
}

/// sum q k and sum |q k|, in four running sums each.
fn dot(q: &[f64], k: &[f64]) -> (f64, f64) {
    let (mut sum, mut magnitude) = ([0.0; 4], [0.0; 4]);
    for (q, k) in q.chunks(4).zip(k.chunks(4)) {
        for (i, (q, k)) in q.iter().zip(k).enumerate() {
            sum[i] += q * k;
            magnitude[i] += (q * k).abs();
        }
    }
    ((sum[0] + sum[1]) + (sum[2] + sum[3]), (magnitude[0] + magnitude[1]) + (magnitude[2] + magnitude[3]))
}

/// The largest value, -inf of none, NaN if any is NaN.
fn maximum(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(f64::NEG_INFINITY, |max, x| if max.is_nan() || x.is_nan() { f64::NAN } else { max.max(x) })
}

fn zeroed(count: usize) -> Result<Vec<f64>> {
    let mut floats = Vec::new();
    reserve(&mut floats, count)?;
    floats.resize(count, 0.0);
    Ok(floats)
}

fn reserve<T>(vec: &mut Vec<T>, count: usize) -> Result<()> {
    vec.try_reserve_exact(count).map_err(|_| no_memory(format_args!("{count} values")))
}

fn no_memory(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::NoMemory, format!("float64 reference: no memory for {what}"))
}

#[cfg(test)]
mod tests;
