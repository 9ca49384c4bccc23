//! Attention over one shard in float64.

use super::inputs::{Inputs, Sequence};
use super::partials::{Reference, maximum, reserve, zeroed};
use crate::attention::capability::{Capabilities, supported};
use crate::attention::descriptor::{AttentionDesc, MaskKind, QueryInput, Reproducibility};
use crate::attention::dtype::Dtype;
use crate::attention::placement::Shard;
use crate::attention::score::{ScoreMod, ScoreTerms};
use crate::attention::step::Step;
use crate::error::{Error, Result};
use crate::partial::{DataFault, sinks};

/// What the reference supports. Algorithms and reproducibility do not concern it.
const CAPABILITIES: Capabilities = Capabilities {
    suffix: " in the float64 reference",
    kv_dtypes: &Dtype::ALL,
    head_dim_multiple: 1,
    max_head_dim: i32::MAX,
    wide: None,
    window: true,
    softcap: true,
    alibi: true,
    sinks: true,
    scales: true,
    checked: true,
    pages_by_head: true,
    masks: &MaskKind::ALL,
    query_inputs: &[QueryInput::Replicated],
    reproducibility: &[Reproducibility::Repeatable, Reproducibility::BatchInvariant, Reproducibility::Canonical],
};

/// Attends one shard in float64; at the step's zeta, if it has one. Blocks; its time grows with rows x keys x dimensions.
///
/// Errors: `Unsupported` by field for what the reference does not know, `InvalidArgument` for a merge-only descriptor,
/// `NoMemory`. Bad data is no error: see [`Reference::fault`].
///
/// # Safety
/// `step` was made from `desc`, and its inputs are host memory as large as its fields say, written by nobody meanwhile.
pub unsafe fn attend(desc: &AttentionDesc, shard: Shard, step: &Step) -> Result<Reference> {
    supported(desc, &CAPABILITIES)?;
    if desc.is_merge_only() {
        return Err(Error::invalid("kv_heads", 0, "at least 1 where keys are attended"));
    }
    // SAFETY: this function was promised what `Inputs::new` asks for, until it returns.
    let inputs = unsafe { Inputs::new(desc, shard, step) };
    let rows = step.args.query_tokens as usize * desc.q_heads as usize;
    let mut reference = Reference::identity(rows, desc.head_dim_v as usize)?;
    reference.scaled = step.scaled();
    (reference.dim_qk, reference.biased) = (desc.head_dim_qk as usize, !step.zeta.data.is_null());
    reference.mods = ScoreMod::of(desc, reference.biased);
    // The sinks are a partial of their own.
    reference.partials += u32::from(desc.sinks && sinks::belong_to(shard.rank));
    let mut taken = 0;
    for b in 0..step.args.batch as usize {
        let sequence = inputs.sequence(b, &mut taken);
        if let Some(cause) = sequence.fault {
            let first = sequence.first_token * desc.q_heads as usize;
            (first..first + sequence.tokens * desc.q_heads as usize).for_each(|row| reference.poison(row));
            reference.fault = reference.fault.or(Some(DataFault::new(b as i32, cause)));
        } else {
            attend_sequence(&inputs, &sequence, &mut reference)?;
        }
    }
    Ok(reference)
}

/// All rows of one sequence without bad data.
fn attend_sequence(inputs: &Inputs<'_>, sequence: &Sequence, reference: &mut Reference) -> Result<()> {
    let (desc, step) = (inputs.desc, inputs.step);
    let (group, dim_qk, dim_v) = (desc.group() as usize, desc.head_dim_qk as usize, desc.head_dim_v as usize);
    let mut q = zeroed(group * dim_qk)?;
    let (mut k, mut v) = (zeroed(dim_qk)?, zeroed(dim_v)?);
    let tilted = !step.zeta.data.is_null();
    let has_sinks = desc.sinks && sinks::belong_to(inputs.shard.rank);
    let mods = ScoreMod::of(desc, tilted);
    let mut zeta = zeroed(if tilted { group * dim_v } else { 0 })?;
    let mut scores = zeroed(group * sequence.keys)?;
    let (mut visible, mut sums) = (Vec::new(), Vec::new());
    // Keys that the mask hides from a head.
    let mut masked = Vec::new();
    reserve(&mut masked, group * sequence.keys)?;
    reserve(&mut visible, sequence.keys)?;
    reserve(&mut sums, group)?;
    sums.resize(group, (0.0, 0.0));
    for token in 0..sequence.tokens {
        for kv_head in 0..desc.kv_heads as usize {
            visible.clear();
            visible.extend(inputs.visible(sequence, token, kv_head));
            let first_row = (sequence.first_token + token) * desc.q_heads as usize + kv_head * group;
            for (g, q) in q.chunks_exact_mut(dim_qk).enumerate() {
                inputs.query(sequence.first_token + token, kv_head * group + g, q);
            }
            for (g, zeta) in zeta.chunks_exact_mut(dim_v).enumerate() {
                inputs.zeta(sequence.first_token + token, kv_head * group + g, zeta);
            }
            masked.clear();
            masked.resize(group * visible.len(), false);
            for (n, &slot) in visible.iter().enumerate() {
                inputs.key(sequence, slot, kv_head, &mut k);
                if tilted {
                    inputs.value(sequence, slot, kv_head, &mut v);
                }
                for (g, q) in q.chunks_exact(dim_qk).enumerate() {
                    let head = kv_head * group + g;
                    let (bias, slope) =
                        (inputs.bias(sequence, token, head, slot), inputs.slope(sequence, token, head, slot));
                    if bias == f64::NEG_INFINITY {
                        masked[g * visible.len() + n] = true;
                        scores[g * visible.len() + n] = bias;
                        continue;
                    }
                    let (qk, qk_magnitude) = dot(q, &k);
                    let zeta = if tilted { &zeta[g * dim_v..][..dim_v] } else { &[] };
                    let (tilt, tilt_magnitude) = dot(zeta, &v);
                    scores[g * visible.len() + n] = mods.score(qk, ScoreTerms { slope, bias: bias + tilt });
                    let score = &mut reference.score[first_row + g];
                    *score = score.max(mods.magnitude(qk, qk_magnitude, slope.abs() + bias.abs() + tilt_magnitude));
                }
            }
            for (g, (max, sum)) in sums.iter_mut().enumerate() {
                (*max, *sum) = (maximum(scores[g * visible.len()..][..visible.len()].iter().copied()), 0.0);
            }
            for (n, &slot) in visible.iter().enumerate() {
                inputs.value(sequence, slot, kv_head, &mut v);
                for (g, (max, sum)) in sums.iter_mut().enumerate() {
                    if masked[g * visible.len() + n] {
                        continue;
                    }
                    // A score of -inf under a maximum of -inf weighs nothing either.
                    let score = scores[g * visible.len() + n];
                    let weight = if score == f64::NEG_INFINITY { 0.0 } else { (score - *max).exp() };
                    *sum += weight;
                    reference.add(first_row + g, weight, &v);
                }
            }
            for (g, &(max, sum)) in sums.iter().enumerate() {
                let seen = masked[g * visible.len()..][..visible.len()].iter().filter(|&&masked| !masked).count();
                reference.keys[first_row + g] = seen as u64;
                reference.finish(first_row + g, max, sum);
                if has_sinks {
                    reference.merge_sink(first_row + g, inputs.sink(kv_head * group + g));
                }
            }
        }
    }
    Ok(())
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
