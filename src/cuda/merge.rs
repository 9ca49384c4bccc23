//! Merging given partials on a GPU.

use std::sync::Arc;

use super::params::MergeParams;
use crate::attention::{Dtype, Tensor};
use crate::device::cuda::{CudaDevice, CudaStream, Image, Kernel, PointerCheck};
use crate::error::{Error, Result};

/// Rows of a block, one a warp.
const ROWS: u64 = 8;

/// Checked arguments of a merge, as the runtime resolved them. Byte strides; those of inputs have the partial first.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MergeStep {
    /// Partials.
    pub count: i32,
    /// Query tokens.
    pub tokens: i32,
    /// Heads.
    pub heads: i32,
    /// Elements of a row.
    pub dim: i32,
    /// Normalised outputs [partial, token, head, dim].
    pub o: Tensor,
    pub o_stride: [i64; 4],
    pub o_dtype: Dtype,
    /// Log-sum-exps [partial, token, head], f32.
    pub lse: Tensor,
    pub lse_stride: [i64; 4],
    /// What makes an incoming lse a natural one.
    pub to_natural: f32,
    /// Whether +inf means empty, too.
    pub plus_inf_is_empty: bool,
    /// Merged output [token, head, dim].
    pub out: Tensor,
    pub out_stride: [i64; 4],
    pub out_dtype: Dtype,
    /// Merged natural lse [token, head], f32; null: not wanted.
    pub out_lse: Tensor,
    pub out_lse_stride: [i64; 4],
}

/// The merge kernel on a device.
pub(crate) struct Merge {
    kernel: Kernel,
    pointers: PointerCheck,
}

impl Merge {
    /// Makes the kernel resident. Blocks; `Capturing` during a capture.
    pub fn new(device: &Arc<CudaDevice>) -> Result<Merge> {
        let kernel = Image::new(device)?.kernel("treeattn_merge_partials", 32 * ROWS as u32, 0)?;
        Ok(Merge { kernel, pointers: PointerCheck::new() })
    }

    /// Enqueues a merge. Allocates nothing, waits for nothing, may be captured.
    pub fn enqueue(&self, step: &MergeStep, stream: &CudaStream) -> Result<()> {
        let device = self.kernel.device();
        let entered = device.enter()?;
        let rows = step.tokens as u64 * step.heads as u64;
        if rows == 0 {
            return Ok(());
        }
        let blocks = rows.div_ceil(ROWS);
        if blocks > i32::MAX as u64 {
            let found = format!("{} x {}", step.tokens, step.heads);
            let wanted = format!("at most {} rows", i32::MAX as u64 * ROWS);
            return Err(Error::invalid("query_tokens x heads", found, wanted));
        }
        for (name, tensor) in
            [("o.data", step.o), ("lse.data", step.lse), ("out.data", step.out), ("out_lse.data", step.out_lse)]
        {
            self.pointers.check(device, name, tensor.data)?;
        }
        let three = |s: [i64; 4]| [s[0], s[1], s[2]];
        let parameters = MergeParams {
            o: step.o.data as u64,
            lse: step.lse.data as u64,
            out: step.out.data as u64,
            out_lse: step.out_lse.data as u64,
            o_stride: step.o_stride,
            lse_stride: three(step.lse_stride),
            out_stride: three(step.out_stride),
            out_lse_stride: [step.out_lse_stride[0], step.out_lse_stride[1]],
            partials: step.count,
            tokens: step.tokens,
            heads: step.heads,
            head_dim: step.dim,
            o_dtype: step.o_dtype as i32,
            out_dtype: step.out_dtype as i32,
            to_natural: step.to_natural,
            plus_inf_is_empty: i32::from(step.plus_inf_is_empty),
        };
        // SAFETY: what the kernel takes; the caller of the merge vouches for the memory.
        unsafe { self.kernel.launch(&entered, stream, blocks as u32, &parameters) }
    }
}
