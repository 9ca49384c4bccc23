//! What a step has beside queries, keys and values, as kernels take it.

use super::params::{self, Terms};
use crate::attention::head_values::HeadValues;
use crate::attention::{AttentionDesc, Dtype, KvFormat, MaskElement, MaskKind, ScoreMod, Step, VisibilityRule};

/// Whether a shape needs kernels that know terms.
pub(super) fn are_in(desc: &AttentionDesc) -> bool {
    let AttentionDesc { sinks, mask, pages_by_head, .. } = *desc;
    let score = ScoreMod::of(desc, false);
    let is_scored = score.softcap() > 0.0 || score.has_slopes();
    VisibilityRule::of(desc).window() > 0 || is_scored || sinks || mask != MaskKind::None || pages_by_head
}

/// The source of the kernels that a shape's rows of k and v have to themselves, where they lie in whole units of 16 bytes
/// (`decode_packed`) or in words (`decode_blocks`).
pub(super) fn packed_family(desc: &AttentionDesc) -> Option<&'static str> {
    let dim = desc.head_dim_qk;
    if desc.v_dtype != desc.k_dtype || !matches!(dim, 64 | 128) || desc.head_dim_v != dim {
        return None;
    }
    match desc.k_dtype {
        Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::Int8 => Some("decode_packed"),
        Dtype::Q8_0 | Dtype::Q4_0 => Some("decode_blocks"),
        _ => None,
    }
}

/// What rows that `kernels/decode_blocks.cu` serves begin at multiples of, bytes: they do not reach into a further unit then.
pub(super) fn block_rows_alignment(desc: &AttentionDesc) -> i64 {
    if desc.head_dim_qk == 128 { 8 } else { 4 }
}

/// Whether a step's rows of k and v come into shared memory as they are, to be widened in registers (`kernels/widen.cuh`):
/// those of some types, where their blocks lie side by side.
pub(super) fn copies_rows(desc: &AttentionDesc, step: &Step) -> bool {
    let is_copied = |dtype: Dtype, dim: i32, stride: [i64; 4]| {
        let format = KvFormat::of(dtype);
        let known = matches!(dtype, Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::Int8 | Dtype::Q8_0 | Dtype::Q4_0);
        // The stride of a dimension of one is never used.
        known && (format.is_packed(stride[3]) || format.blocks(dim as usize) == 1)
    };
    is_copied(desc.k_dtype, desc.head_dim_qk, step.k_stride) && is_copied(desc.v_dtype, desc.head_dim_v, step.v_stride)
}

/// The terms of a step.
pub(super) fn of(desc: &AttentionDesc, step: &Step) -> Terms {
    let heads = |values: HeadValues| {
        let (data, stride) = values.data_and_stride();
        (data as u64, stride)
    };
    let ((sinks, sink_stride), (slopes, slope_stride), (mask_factor, factor_stride)) =
        (heads(step.sinks), heads(step.slopes), heads(step.mask_factor));
    let (mask, mask_bytes, mask_stride) =
        step.mask.map_or((std::ptr::null(), 0, [0; 4]), |mask| mask.data_and_strides());
    let mask_element = match MaskElement::of(desc) {
        None => params::MASK_NONE,
        Some(MaskElement::F16) => params::MASK_F16,
        Some(MaskElement::F32) => params::MASK_F32,
        Some(MaskElement::Byte) => params::MASK_BYTE,
    };
    let scale = |[outer, inner, head, _]: [i64; 4]| [outer, inner, head];
    let [_, _, k_scale_end, v_scale_end] = step.token_ends(desc);
    let softcap = ScoreMod::of(desc, false).softcap();
    let inverse = 1.0 / (f64::from(softcap) * std::f64::consts::LOG2_E);
    Terms {
        sinks,
        slopes,
        mask: mask as u64,
        mask_factor,
        k_scale: step.args.k_scale.data as u64,
        v_scale: step.args.v_scale.data as u64,
        sink_stride,
        slope_stride,
        factor_stride,
        mask_stride,
        mask_bytes,
        k_scale_stride: scale(step.k_scale_stride),
        v_scale_stride: scale(step.v_scale_stride),
        k_scale_end,
        v_scale_end,
        page_index_head_stride: step.args.page_index_head_stride,
        kv_position_head_stride: step.args.kv_position_head_stride,
        mask_element,
        // At most what the shape's field holds.
        window: VisibilityRule::of(desc).window() as i32,
        softcap,
        cap_inverse: inverse.min(f64::from(f32::MAX)) as f32,
        k_dtype: desc.k_dtype,
        v_dtype: desc.v_dtype,
    }
}
