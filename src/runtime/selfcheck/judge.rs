//! What a self-check should have found, in float64, and how far the step was from it.

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};

use super::inputs::{Inputs, Sequence, Terms};
use super::types::{Results, SelfcheckReport};
use crate::attention::reference::{self, Comparison, Precision, Reference};
use crate::attention::{
    AttentionDesc, DecodeArgs, Dtype, KvLayout, MaskKind, OutputMode, Placement, Shard, Step, Tensor,
};
use crate::device::DeviceKind;
use crate::error::Result;
use crate::partial::sinks;

/// The references of all sequences over some of their keys.
pub(super) struct Expected {
    sequences: Vec<Reference>,
    tokens: usize,
}

impl Expected {
    /// Over the keys that `rank` holds; over all keys where there is no rank. Reads the sequences in whole, never a
    /// rank's buffers, so that a mistake in how shards are laid out shows as well.
    pub fn new(kind: DeviceKind, desc: &AttentionDesc, inputs: &Inputs, rank: Option<usize>) -> Result<Expected> {
        let tokens = inputs.sizes.tokens;
        let row = tokens * desc.q_heads as usize * desc.head_dim_qk as usize;
        let mut sequences = Vec::with_capacity(inputs.sequences.len());
        for (sequence, q) in inputs.sequences.iter().zip(inputs.q.chunks(row)) {
            let slots = rank.map(|rank| &sequence.slots[rank][..]);
            let sinks = desc.sinks && rank.is_none_or(|rank| sinks::belong_to(rank as i32));
            let desc = AttentionDesc { sinks, ..*desc };
            let mask = &inputs.terms.masks[sequences.len()];
            let mut reference = attend(&desc, sequence, (q, tokens), slots, (&inputs.terms, mask))?;
            if kind == DeviceKind::Cuda && desc.v_dtype == Dtype::F16 {
                reference.multiply_f16();
            }
            sequences.push(reference);
        }
        Ok(Expected { sequences, tokens })
    }

    /// The reference of a query token's sequence, and the token's first row in it.
    fn of(&self, token: usize, q_heads: usize) -> (&Reference, usize) {
        (&self.sequences[token / self.tokens], token % self.tokens * q_heads)
    }
}

/// One sequence over the keys at `slots` (global positions), or over all.
fn attend(
    desc: &AttentionDesc,
    sequence: &Sequence,
    (q, tokens): (&[f32], usize),
    slots: Option<&[usize]>,
    (terms, mask): (&Terms, &[f32]),
) -> Result<Reference> {
    let gather = |data: &'_ [f32], dim: i32| -> Vec<f32> {
        let row = (desc.kv_heads * dim) as usize;
        let rows = slots.unwrap_or_default().iter();
        rows.flat_map(|&position| &data[position * row..(position + 1) * row]).copied().collect()
    };
    let (k, v) = match slots {
        None => (Cow::Borrowed(&sequence.k), Cow::Borrowed(&sequence.v)),
        Some(_) => {
            (Cow::Owned(gather(&sequence.k, desc.head_dim_qk)), Cow::Owned(gather(&sequence.v, desc.head_dim_v)))
        }
    };
    let keys = slots.map_or(sequence.keys, <[usize]>::len);
    let positions: Vec<i32> = match slots {
        None => (0..keys as i32).collect(),
        Some(slots) => slots.iter().map(|&position| position as i32).collect(),
    };
    // The same numbers as plain f32, in one piece: every element type in use is exact in f32.
    let plain = AttentionDesc {
        q_dtype: Dtype::F32,
        k_dtype: Dtype::F32,
        v_dtype: Dtype::F32,
        out_dtype: Dtype::F32,
        kv_layout: KvLayout::Strided,
        page_size: 0,
        placement: Placement::Explicit,
        max_batch: 1,
        max_query_tokens: tokens as i32,
        max_kv_length: keys.max(1) as i32,
        output: OutputMode::Local,
        mask: if desc.mask == MaskKind::None { MaskKind::None } else { MaskKind::Additive },
        mask_dtype: (desc.mask != MaskKind::None).then_some(Dtype::F32),
        ..desc.with_all_queries()
    };
    let mask: Vec<f32> = match slots {
        Some(slots) if !mask.is_empty() => slots.iter().map(|&position| mask[position]).collect(),
        _ => mask.to_vec(),
    };
    let mut out = vec![0.0f32; tokens * desc.q_heads as usize * desc.head_dim_v as usize];
    let (lengths, globals) = ([keys as i32], [sequence.keys as i32]);
    let args = DecodeArgs {
        batch: 1,
        query_tokens: tokens as i32,
        q: Tensor::from_slice(q),
        k: Tensor::from_slice(&k),
        v: Tensor::from_slice(&v),
        out: Tensor::from_slice_mut(&mut out),
        kv_length: lengths.as_ptr(),
        global_length: globals.as_ptr(),
        kv_position: positions.as_ptr(),
        sinks: if desc.sinks { Tensor::from_slice(&terms.sinks) } else { Tensor::NULL },
        alibi_slopes: if desc.alibi { Tensor::from_slice(&terms.slopes) } else { Tensor::NULL },
        mask: match &mask[..] {
            [] => Tensor::NULL,
            mask => Tensor::from_slice(mask).with_strides([0, 0, 0, size_of_val(&mask[0]) as i64]),
        },
        ..DecodeArgs::default()
    };
    let step = Step::new(&plain, Shard::ALONE, &args, plain.q_heads)?;
    // SAFETY: everything that `args` points at outlives the call and is as large as its fields say.
    unsafe { reference::attend(&plain, Shard::ALONE, &step) }
}

/// Adds up what the ranks' outputs show.
pub(super) struct Tally<'a> {
    desc: &'a AttentionDesc,
    precision: Precision,
    comparison: Comparison,
    rows: u64,
    squared_error: f64,
    squared_reference: f64,
    /// Why the bits are not the same.
    difference: Option<String>,
    /// The first bound broken, with its rank.
    failure: Option<String>,
}

impl<'a> Tally<'a> {
    pub fn new(desc: &'a AttentionDesc, ranks: usize) -> Tally<'a> {
        let exchanged = ranks > 1 && desc.output != OutputMode::Local;
        let wire = if exchanged { desc.wire_dtype } else { Dtype::F32 };
        Tally {
            desc,
            precision: Precision { out: desc.out_dtype, wire },
            comparison: Comparison::default(),
            rows: 0,
            squared_error: 0.0,
            squared_reference: 0.0,
            difference: None,
            failure: None,
        }
    }

    /// Holds the output of `rank`, over `heads`, against what was expected.
    pub fn rank(&mut self, rank: usize, heads: Range<usize>, (out, lse): &Results, expected: &Expected) {
        let (dim, size) = (self.desc.head_dim_v as usize, self.desc.out_dtype.size());
        let tokens = expected.sequences.len() * expected.tokens;
        let mut row = vec![0.0; dim];
        for token in 0..tokens {
            let (reference, first) = expected.of(token, self.desc.q_heads as usize);
            for (n, head) in heads.clone().enumerate() {
                let at = token * heads.len() + n;
                load(&out[at * dim * size..(at + 1) * dim * size], self.desc.out_dtype, &mut row);
                let lse = lse.as_chunks().0.get(at).map_or(f32::NAN, |&bytes| f32::from_ne_bytes(bytes));
                let mut one = Comparison::default();
                reference.compare_row(first + head, &row, Some(lse), self.precision, &mut one);
                if let Some(failure) = one.failure.as_ref().filter(|_| !one.is_within()) {
                    self.failure.get_or_insert_with(|| {
                        format!("rank {rank}, query token {token}, head {head}: {failure} in its sequence")
                    });
                }
                self.comparison.add(&one);
                self.rows += 1;
                for (&found, &wanted) in row.iter().zip(reference.row(first + head)) {
                    self.squared_error += (f64::from(found) - wanted).powi(2);
                    self.squared_reference += wanted * wanted;
                }
            }
        }
    }

    /// Remembers why the bits are not the same.
    pub fn differs(&mut self, message: String) {
        self.difference.get_or_insert(message);
    }

    pub fn report(self) -> SelfcheckReport {
        let share = if self.desc.out_dtype == Dtype::F32 { 1.0 } else { self.comparison.rounded_share() };
        let rounding = self.rounding();
        let same_bits = self.difference.is_none();
        let relative_l2 =
            if self.squared_error == 0.0 { 0.0 } else { (self.squared_error / self.squared_reference).sqrt() };
        let failed = self.failure.or(rounding).or(self.difference);
        SelfcheckReport {
            passed: failed.is_none(),
            rows: self.rows,
            max_error_ratio: self.comparison.worst,
            max_lse_error_ratio: self.comparison.worst_lse,
            correctly_rounded: share,
            relative_l2,
            same_bits,
            message: failed.unwrap_or_else(|| {
                format!("{} rows within their bounds, the same bits on every rank and run", self.rows)
            }),
        }
    }

    /// What is wrong with the share of correctly rounded outputs, if it is: 16-bit outputs off an f32 wire only.
    fn rounding(&self) -> Option<String> {
        let wrong_share = match self.precision {
            Precision { out: Dtype::Bf16, wire: Dtype::F32 } => 0.01,
            Precision { out: Dtype::F16, wire: Dtype::F32 } => 0.02,
            _ => return None,
        };
        // Averages of a key or two lie just between two numbers too often.
        if self.desc.mask != MaskKind::None || (1..10).contains(&self.desc.window) {
            return None;
        }
        let elements = self.comparison.elements as f64;
        let wrong = elements - self.comparison.correctly_rounded as f64;
        // Few elements may miss the share by chance.
        let allowed = elements * wrong_share + 4.0 * (elements * wrong_share).sqrt();
        (wrong > allowed).then(|| {
            format!("correctly rounded outputs: found {wrong} of {elements} wrong, wanted at most {allowed:.1}")
        })
    }
}

/// Widens a row to f32, which is exact.
fn load(bytes: &[u8], dtype: Dtype, row: &mut [f32]) {
    for (x, bytes) in row.iter_mut().zip(bytes.chunks_exact(dtype.size())) {
        *x = match dtype {
            Dtype::F16 => f16::from_ne_bytes([bytes[0], bytes[1]]).to_f32(),
            Dtype::Bf16 => bf16::from_ne_bytes([bytes[0], bytes[1]]).to_f32(),
            _ => f32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::selfcheck::SelfcheckConfig;
    use crate::runtime::selfcheck::inputs::Sizes;

    /// A wrong element, a wrong lse, an element nobody wrote and many misroundings are all found.
    #[test]
    fn mistakes_are_found() {
        let mut desc = AttentionDesc::new(2, 1, 8, 100);
        desc.out_dtype = Dtype::Bf16;
        desc.max_query_tokens = 40;
        let config = SelfcheckConfig { ranks: 1, query_tokens: 40, kv_length: 50, ..Default::default() };
        let inputs = Inputs::random(&desc, Sizes::resolve(&desc, &config).unwrap()).unwrap();
        let expected = Expected::new(DeviceKind::Cpu, &desc, &inputs, None).unwrap();
        let mut right: Results = (Vec::new(), Vec::new());
        for reference in &expected.sequences {
            right.0.extend(reference.o.iter().flat_map(|&x| bf16::from_f64(x).to_ne_bytes()));
            right.1.extend(reference.lse.iter().flat_map(|&x| (x as f32).to_ne_bytes()));
        }
        let judge = |results: &Results| {
            let mut tally = Tally::new(&desc, 1);
            tally.rank(0, 0..2, results, &expected);
            tally.report()
        };
        let report = judge(&right);
        assert!(report.passed && report.correctly_rounded == 1.0 && report.rows == 80, "{report:?}");
        let mut wrong = right.clone();
        wrong.0[9] ^= 2;
        assert!(judge(&wrong).message.starts_with("rank 0, query token 0, head 0: o["), "{:?}", judge(&wrong));
        let mut wrong = right.clone();
        wrong.1[5] ^= 1;
        assert!(judge(&wrong).message.starts_with("rank 0, query token 0, head 1: lse["), "{:?}", judge(&wrong));
        let mut wrong = right.clone();
        wrong.0[100..102].fill(0xff);
        assert!(!judge(&wrong).passed);
        // Every third element goes to the neighbour on the reference's other side: within the bound, but misrounded.
        let mut wrong = right;
        for (i, &x) in expected.sequences[0].o.iter().enumerate().step_by(3) {
            let bits = bf16::from_f64(x).to_bits();
            let error = |bits: u16| (bf16::from_bits(bits).to_f64() - x).abs();
            let other = if error(bits - 1) < error(bits + 1) { bits - 1 } else { bits + 1 };
            wrong.0[2 * i..2 * i + 2].copy_from_slice(&other.to_ne_bytes());
        }
        let report = judge(&wrong);
        assert!(report.message.starts_with("correctly rounded outputs"), "{report:?}");
    }

    /// Bits that differ between ranks or runs fail a check whose numbers are all right.
    #[test]
    fn different_bits_do_not_pass() {
        let desc = AttentionDesc::new(1, 1, 8, 16);
        let mut tally = Tally::new(&desc, 2);
        assert!(Tally::new(&desc, 2).report().passed);
        tally.differs("rank 1, row 0: found other bits than on rank 0".into());
        tally.differs("rank 1, row 7: found other bits than on rank 0".into());
        let report = tally.report();
        assert!(!report.passed && !report.same_bits, "{report:?}");
        assert!(report.message.contains("row 0"), "the first is told: {report:?}");
    }
}
