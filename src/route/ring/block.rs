//! How a rank's keys and values lie while they travel.

use crate::attention::{AttentionDesc, Placement};

/// How a token lies in a block: the positions of all keys where they travel, then keys and values of all sequences without
/// gaps, those with the wider numbers first.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// Whether positions travel: 4 bytes a token.
    pub positions: bool,
    /// Bytes of a token's keys and of its values.
    pub token: [usize; 2],
    /// Whether values come first.
    pub values_first: bool,
}

impl Block {
    /// The blocks of a shape.
    pub fn new(desc: &AttentionDesc) -> Block {
        let heads = desc.kv_heads as usize;
        let (k, v) = (desc.k_format(), desc.v_format());
        Block {
            positions: desc.needs_positions() && desc.placement == Placement::Explicit,
            token: [heads * k.row_bytes(desc.head_dim_qk as usize), heads * v.row_bytes(desc.head_dim_v as usize)],
            values_first: v.alignment() > k.alignment(),
        }
    }

    /// Bytes of a block of that many tokens; none where that overflows.
    pub fn bytes(&self, tokens: usize) -> Option<usize> {
        tokens.checked_mul(self.token[0].checked_add(self.token[1])? + if self.positions { 4 } else { 0 })
    }

    /// Where keys and values begin.
    pub fn begin(&self, tokens: usize) -> [usize; 2] {
        let head = if self.positions { 4 * tokens } else { 0 };
        if self.values_first { [head + tokens * self.token[1], head] } else { [head, head + tokens * self.token[0]] }
    }
}
