//! The energy of which attention is the gradient (arXiv 2408.04093, observation 1).
//!
//! F(zeta) = log sum_j exp(scale q.k_j + zeta.v_j), for every query token and head, is the cumulant generating function
//! of the values under the softmax of the scores. F(0) is the log-sum-exp of attention, the gradient of F at 0 its output;
//! elsewhere the gradient is the mean of the values under the weights that zeta tilts. F is convex. (gradient, F) is a
//! partial: those of several shards merge as any others do. With keys that are values, a gradient at 0 is one retrieval
//! step of a modern Hopfield network.
//!
//! A step carries zeta ([`Step::at_zeta`]); the CPU backend and the float64 reference read it there.

use super::descriptor::AttentionDesc;
use super::dtype::Dtype;
use super::step::{Step, disjoint};
use super::tensor::Tensor;
use crate::error::Result;

impl Step {
    /// The same step at `zeta`, f32 [token, query head, head_dim_v]: its output is then the gradient of F there, and
    /// its lse is F. `data` null is 0. `desc` is the one that the step was made from.
    pub fn at_zeta(mut self, desc: &AttentionDesc, zeta: &Tensor) -> Result<Step> {
        if zeta.data.is_null() {
            return Ok(self);
        }
        let dims = [i64::from(self.args.query_tokens), i64::from(desc.q_heads), i64::from(desc.head_dim_v)];
        self.zeta_stride = zeta.resolve("zeta", Dtype::F32, &dims)?;
        disjoint("out", &self.args.out, "zeta", zeta)?;
        disjoint("lse", &self.args.lse, "zeta", zeta)?;
        self.zeta = *zeta;
        Ok(self)
    }
}
