//! How a rank's keys and values lie while they travel.

use crate::attention::{AttentionDesc, MaskElement, Placement};

/// Bytes of a position.
pub(super) const POSITION: usize = size_of::<i32>();
/// Bytes of a scale.
pub(super) const SCALE: usize = size_of::<f32>();

/// How a block lies in memory. Each part holds sequence after sequence, without gaps, in this order:
///
/// 1. positions of keys, where they travel: [kv head, key];
/// 2. scales of keys and of values, where the rank's step has them;
/// 3. keys and values, those with the wider numbers first;
/// 4. masks, where the shape has them: [query head, query token, key].
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// Bytes of a token's positions, where these travel: of one, or of one a kv head.
    pub positions: usize,
    /// Bytes of a token's keys and of its values.
    pub token: [usize; 2],
    /// Bytes of a token's scales of keys or of values, where these travel.
    pub scales: usize,
    /// Whether values come first.
    pub values_first: bool,
    /// Bytes of the mask of all query heads for a key and a query token.
    pub mask: usize,
}

impl Block {
    /// The blocks of a shape.
    pub fn new(desc: &AttentionDesc) -> Block {
        let heads = desc.kv_heads as usize;
        let (k, v) = (desc.k_format(), desc.v_format());
        Block {
            positions: match desc.needs_positions() && desc.placement == Placement::Explicit {
                false => 0,
                true if desc.pages_by_head => heads * POSITION,
                true => POSITION,
            },
            token: [heads * k.row_bytes(desc.head_dim_qk as usize), heads * v.row_bytes(desc.head_dim_v as usize)],
            scales: heads * SCALE,
            values_first: v.alignment() > k.alignment(),
            mask: MaskElement::of(desc).map_or(0, |element| element.size() * desc.q_heads as usize),
        }
    }

    /// Bytes of a block of that many tokens and pairs of a query token and a key; none where that overflows. `scaled`: whether
    /// scales of keys and of values travel.
    pub fn bytes(&self, tokens: usize, pairs: usize, scaled: [bool; 2]) -> Option<usize> {
        self.mask_begin(tokens, scaled)?.checked_add(pairs.checked_mul(self.mask)?)
    }

    /// Where the masks begin.
    pub fn mask_begin(&self, tokens: usize, scaled: [bool; 2]) -> Option<usize> {
        let scales = self.scales * scaled.iter().filter(|&&scaled| scaled).count();
        tokens.checked_mul(self.token[0].checked_add(self.token[1])? + self.positions + scales)
    }

    /// Where the scales of keys and of values begin.
    pub fn scales_begin(&self, tokens: usize, scaled: [bool; 2]) -> [usize; 2] {
        let head = self.positions * tokens;
        [head, head + if scaled[0] { tokens * self.scales } else { 0 }]
    }

    /// Where keys and values begin.
    pub fn begin(&self, tokens: usize, scaled: [bool; 2]) -> [usize; 2] {
        let head = self.scales_begin(tokens, scaled)[1] + if scaled[1] { tokens * self.scales } else { 0 };
        if self.values_first { [head + tokens * self.token[1], head] } else { [head, head + tokens * self.token[0]] }
    }
}
