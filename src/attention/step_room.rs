//! What k, v, their scales and the mask have room for, and whether that is enough for the lengths of a step.

use super::descriptor::{AttentionDesc, KvLayout};
use super::dtype::Dtype;
use super::step::Step;
use super::strided_cache;
use super::tensor::Tensor;
use crate::error::{Error, Result};

impl Step {
    /// Most tokens of sequence `b` that the plan allows, and k and v have room for.
    pub fn room(&self, desc: &AttentionDesc, b: i64) -> i64 {
        if desc.kv_layout != KvLayout::Strided {
            return self.kv_capacity;
        }
        let heads = i64::from(desc.kv_heads);
        let k =
            strided_cache::room(&self.args.k, desc.k_dtype, &self.k_stride, [heads, i64::from(desc.head_dim_qk)], b);
        let v = strided_cache::room(&self.args.v, desc.v_dtype, &self.v_stride, [heads, i64::from(desc.head_dim_v)], b);
        let scales = self.scales().map(|(_, tensor, stride)| match tensor.data.is_null() {
            true => i64::MAX,
            false => strided_cache::room(tensor, Dtype::F32, &stride, [heads, 1], b),
        });
        i64::from(desc.max_kv_length).min(k).min(v).min(scales[0]).min(scales[1])
    }

    /// The largest `b * stride[0] + i * stride[1]` of a token i of sequence b that a strided k has room for, and the same of v and
    /// of their scales; below 0 where there is none.
    pub(crate) fn token_ends(&self, desc: &AttentionDesc) -> [i64; 4] {
        let [(_, k_scale, k_scale_stride), (_, v_scale, v_scale_stride)] = self.scales();
        [
            (&self.args.k, desc.k_dtype, self.k_stride, desc.head_dim_qk),
            (&self.args.v, desc.v_dtype, self.v_stride, desc.head_dim_v),
            (k_scale, Dtype::F32, k_scale_stride, 1),
            (v_scale, Dtype::F32, v_scale_stride, 1),
        ]
        .map(|(tensor, dtype, stride, dim)| {
            strided_cache::token_end(tensor, dtype, &stride, [i64::from(desc.kv_heads), i64::from(dim)])
        })
    }

    /// The scales of k and v with their names and strides.
    fn scales(&self) -> [(&'static str, &Tensor, [i64; 4]); 2] {
        let a = &self.args;
        [("k_scale", &a.k_scale, self.k_scale_stride), ("v_scale", &a.v_scale, self.v_scale_stride)]
    }

    /// What [`Step::room`] lacks for `keys` keys, at most the plan's longest, of sequence `b`: named for what was given.
    /// `what` names the length.
    pub(super) fn check_room(&self, desc: &AttentionDesc, b: i64, keys: i64, what: impl Fn() -> String) -> Result<()> {
        if keys <= self.room(desc, b) {
            return Ok(());
        }
        let a = &self.args;
        if desc.kv_layout != KvLayout::Strided {
            // With a table or lists, a length that does not fit them is bad data of the step, not a wrong argument.
            let none = desc.kv_layout == KvLayout::BlockTable && a.max_pages == 0;
            let wanted = || format!("at least 1 for {}", what());
            return if none { Err(Error::invalid("max_pages", 0, wanted())) } else { Ok(()) };
        }
        let [(k_name, k_scale, k_scale_stride), (v_name, v_scale, v_scale_stride)] = self.scales();
        for (name, tensor, dtype, stride, dim) in [
            ("k", &a.k, desc.k_dtype, &self.k_stride, desc.head_dim_qk),
            ("v", &a.v, desc.v_dtype, &self.v_stride, desc.head_dim_v),
            (k_name, k_scale, Dtype::F32, &k_scale_stride, 1),
            (v_name, v_scale, Dtype::F32, &v_scale_stride, 1),
        ] {
            if tensor.data.is_null() && name.ends_with("_scale") {
                continue;
            }
            let inner = [i64::from(desc.kv_heads), i64::from(dim)];
            if keys <= strided_cache::room(tensor, dtype, stride, inner, b) {
                continue;
            }
            if tensor.bytes == 0 {
                return Err(Error::invalid(format_args!("{name}.bytes"), 0, format_args!("room for {}", what())));
            }
            let end = strided_cache::end_of(dtype, stride, inner, b, keys - 1);
            if i128::from(tensor.bytes) >= end {
                let room = stride[0] / stride[1].max(1);
                let wanted = format!("at least {}: a packed {name} has room for {room} tokens a sequence", what());
                return Err(Error::invalid("kv_capacity", a.kv_capacity, wanted));
            }
            let wanted = format!("at least {end} for {} with byte strides {stride:?}", what());
            return Err(Error::invalid(format_args!("{name}.bytes"), tensor.bytes, wanted));
        }
        Ok(())
    }

    /// What the mask lacks, if the step has one, for `keys` keys and `queries` query tokens of sequence `b`. `what` names the
    /// length.
    pub(super) fn check_mask(&self, b: i64, queries: i64, keys: i64, what: impl Fn() -> String) -> Result<()> {
        let Some(mask) = self.mask.filter(|mask| queries > 0 && keys > mask.room(b, queries)) else { return Ok(()) };
        if self.args.mask.data.is_null() {
            let wanted = format!("a pointer, for {} and {queries} query tokens of a plan with a mask", what());
            return Err(Error::invalid("mask.data", "NULL", wanted));
        }
        let wanted = format!(
            "at least {} for {} and {queries} query tokens with byte strides {:?}",
            mask.end_of(b, queries, keys),
            what(),
            self.args.mask.stride
        );
        Err(Error::invalid("mask.bytes", self.args.mask.bytes, wanted))
    }

    /// Decides where the sequences of a packed k and v begin if `kv_capacity` is not given. The bytes may be those of equally
    /// long sequences, or of sequences of `max_kv_length` of which the last ends early; where both are possible, only the
    /// lengths can tell. `longest` and `last`: the length of the longest sequence and of the last; none where they cannot be
    /// read.
    pub(super) fn settle_packed(&mut self, desc: &AttentionDesc, lengths: Option<(i64, i64)>) -> Result<()> {
        let (batch, max_kv_length) = (i64::from(self.args.batch), i64::from(desc.max_kv_length));
        if desc.kv_layout != KvLayout::Strided || batch < 2 || self.args.kv_capacity > 0 {
            return Ok(());
        }
        for (name, tensor, stride) in [("k", &self.args.k, &mut self.k_stride), ("v", &self.args.v, &mut self.v_stride)]
        {
            if tensor.stride != [0; 4] || tensor.bytes == 0 {
                continue;
            }
            let (token, bytes) = (i128::from(stride[1]), i128::from(tensor.bytes));
            let all = token * i128::from(max_kv_length);
            let early =
                lengths.is_some_and(|(_, last)| bytes == all * i128::from(batch - 1) + token * i128::from(last));
            let exact = bytes == i128::from(stride[0]) * i128::from(batch)
                || strided_cache::is_of_plan(tensor.bytes, stride[1], desc.max_batch, max_kv_length);
            match (exact, early) {
                // Both are possible: only a sequence that is too long for the shorter distance shows that it is not meant.
                (true, true) if i128::from(stride[0]) < all => {
                    if lengths.is_none_or(|(longest, _)| i128::from(longest) * token <= i128::from(stride[0])) {
                        return Err(strided_cache::untold(name, tensor.bytes, batch, max_kv_length, stride[1]));
                    }
                    stride[0] = stride[1] * max_kv_length;
                }
                (false, false) => {
                    return Err(strided_cache::untold(name, tensor.bytes, batch, max_kv_length, stride[1]));
                }
                _ => {}
            }
        }
        self.kv_capacity = self.room(desc, batch - 1);
        Ok(())
    }

    /// Where lengths cannot be read before the step runs: a strided k and v have room for a token of each sequence, if they
    /// are there at all.
    pub fn check_unseen_lengths(&mut self, desc: &AttentionDesc) -> Result<()> {
        self.settle_packed(desc, None)?;
        let (a, last) = (&self.args, i64::from(self.args.batch) - 1);
        if desc.kv_layout != KvLayout::Strided || last < 0 || a.k.bytes == 0 || a.v.bytes == 0 {
            return Ok(());
        }
        self.check_room(desc, last, 1, || format!("a token of each of {} sequences", a.batch))
    }
}
