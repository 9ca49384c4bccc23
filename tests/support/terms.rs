//! What happens to scores, and what joins the softmax, beside keys: inputs that the descriptor asks for, and their formula.

use half::f16;
use treeattn::attention::{AttentionDesc, Dtype, MaskKind};

use super::case::Sequence;
use super::rng::Rng;

/// The inputs of a case's terms; empty where the descriptor has no use for them.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// f32 [q head].
    pub sinks: Vec<f32>,
    /// f32 [q head].
    pub slopes: Vec<f32>,
    /// f32 [q head]; empty: 1.
    pub factors: Vec<f32>,
    pub mask: Option<MaskValues>,
}

/// A mask by global positions: what is added to scores, -inf where it hides.
#[derive(Clone, Debug)]
pub struct MaskValues {
    /// Which of sequences, heads and query tokens share their values.
    pub broadcast: [bool; 3],
    /// f32 [head or 1, query token or 1, position], a sequence; exact in the mask's type.
    pub values: Vec<Vec<f32>>,
}

impl MaskValues {
    fn draw(r: &mut Rng, desc: &AttentionDesc, sequences: &[Sequence]) -> MaskValues {
        let alike = sequences.windows(2).all(|s| s[0].held == s[1].held && s[0].tokens == s[1].tokens);
        // Heads that have keys in slots of their own share no mask by slot.
        let broadcast = [alike && r.chance(40), !desc.pages_by_head && r.chance(60), r.chance(30)];
        let kind = r.range(0, 4);
        let row = |r: &mut Rng, keys: usize| -> Vec<f32> {
            let (begin, end) = (r.range(0, keys), r.range(0, keys));
            let hidden = begin.min(end)..begin.max(end);
            let share = r.pick(&[0, 5, 60, 100]);
            (0..keys)
                .map(|key| {
                    let hides = match kind {
                        // Everything visible, a range hidden, a range visible, keys here and there.
                        0 => false,
                        1 => hidden.contains(&key),
                        2 => !hidden.contains(&key),
                        _ => r.chance(share),
                    };
                    let bias =
                        if desc.mask == MaskKind::Boolean || kind == 1 { 0.0 } else { (2.0 * r.normal()) as f32 };
                    let bias = if desc.mask_dtype == Some(Dtype::F16) { f16::from_f32(bias).to_f32() } else { bias };
                    if hides { f32::NEG_INFINITY } else { bias }
                })
                .collect()
        };
        let mut values: Vec<Vec<f32>> = Vec::new();
        for sequence in sequences {
            if let Some(first) = values.first().filter(|_| broadcast[0]) {
                values.push(first.clone());
                continue;
            }
            let heads = if broadcast[1] { 1 } else { desc.q_heads as usize };
            let tokens = if broadcast[2] { 1 } else { sequence.tokens };
            values.push((0..heads * tokens).flat_map(|_| row(r, sequence.keys)).collect());
        }
        MaskValues { broadcast, values }
    }

    /// What the key at `position` of sequence `b` is given for a head and a query token of the sequence.
    pub fn at(&self, b: usize, head: usize, query: usize, position: usize, sequence: &Sequence) -> f32 {
        let head = if self.broadcast[1] { 0 } else { head };
        let (query, tokens) = if self.broadcast[2] { (0, 1) } else { (query, sequence.tokens) };
        self.values[b][(head * tokens + query) * sequence.keys + position]
    }
}

impl Terms {
    /// What `desc` asks for.
    pub fn draw(r: &mut Rng, desc: &AttentionDesc, sequences: &[Sequence]) -> Terms {
        let heads = |has: bool| 0..if has { desc.q_heads } else { 0 };
        let sink = |r: &mut Rng| if r.chance(5) { f32::NEG_INFINITY } else { (3.0 * r.normal()) as f32 };
        // Those of models, 2^(-8 h / heads), and any.
        let usual = r.chance(70);
        let slope = |r: &mut Rng, head: i32| {
            if usual { 2f32.powf(-8.0 * (head + 1) as f32 / desc.q_heads as f32) } else { (0.1 * r.normal()) as f32 }
        };
        let factored = desc.mask == MaskKind::Additive && r.chance(30);
        Terms {
            sinks: heads(desc.sinks).map(|_| sink(r)).collect(),
            slopes: heads(desc.alibi).map(|head| slope(r, head)).collect(),
            factors: heads(factored).map(|_| r.pick(&[1.0, 0.5, 0.0, -1.5, 0.0123])).collect(),
            mask: (desc.mask != MaskKind::None).then(|| MaskValues::draw(r, desc, sequences)),
        }
    }

    /// What becomes of scale * q.k for a head and a key that is `distance` away and given `mask`, by the textbook.
    pub fn score(&self, desc: &AttentionDesc, scaled: f64, head: usize, distance: i64, mask: f32) -> f64 {
        let cap = f64::from(desc.softcap);
        let capped = if cap > 0.0 { cap * (scaled / cap).tanh() } else { scaled };
        let slope = self.slopes.get(head).map_or(0.0, |&slope| f64::from(slope));
        let factor = self.factors.get(head).map_or(1.0, |&factor| f64::from(factor));
        capped - slope * distance.abs() as f64 + if mask == 0.0 { 0.0 } else { factor * f64::from(mask) }
    }

    /// The sink of a head, for the whole or for the partial of `rank`.
    pub fn sink(&self, head: usize, rank: Option<usize>) -> f64 {
        let counts = rank.is_none_or(|rank| rank == 0);
        self.sinks.get(head).filter(|_| counts).map_or(f64::NEG_INFINITY, |&sink| f64::from(sink))
    }
}
