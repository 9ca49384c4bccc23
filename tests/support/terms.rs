//! What happens to scores, and what joins the softmax, beside keys: inputs that the descriptor asks for, and their formula.

use treeattn::attention::AttentionDesc;

use super::rng::Rng;

/// The inputs of a case's terms; empty where the descriptor has no use for them.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// f32 [q head].
    pub sinks: Vec<f32>,
}

impl Terms {
    /// What `desc` asks for.
    pub fn draw(r: &mut Rng, desc: &AttentionDesc) -> Terms {
        let heads = desc.q_heads as usize;
        let sink = |r: &mut Rng| if r.chance(5) { f32::NEG_INFINITY } else { (3.0 * r.normal()) as f32 };
        Terms { sinks: (0..if desc.sinks { heads } else { 0 }).map(|_| sink(r)).collect() }
    }

    /// The sink of a head, for the whole or for the partial of `rank`.
    pub fn sink(&self, head: usize, rank: Option<usize>) -> f64 {
        let counts = rank.is_none_or(|rank| rank == 0);
        self.sinks.get(head).filter(|_| counts).map_or(f64::NEG_INFINITY, |&sink| f64::from(sink))
    }
}
