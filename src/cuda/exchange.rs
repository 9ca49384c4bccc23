//! Exchanging partials between GPUs: one kernel pushes this rank's, waits for the others' and writes what they merge to.

use std::sync::Arc;

use super::params::ExchangeParams;
use crate::attention::{Dtype, Tensor};
use crate::device::cuda::{CudaDevice, CudaStream, Image, Kernel, PointerCheck};
use crate::error::Result;
use crate::partial::ExchangeView;

/// Threads of a block; a warp takes a row.
const THREADS: u32 = 256;
/// Rows that a block takes at a time.
const ROWS: u64 = THREADS as u64 / 32;
/// Most blocks, however large the GPU: enough for a link.
const MOST_BLOCKS: i32 = 64;
/// Blocks that a multiprocessor holds at least, by the kernel's launch bounds.
const BLOCKS_A_UNIT: i32 = 2;
/// Communicators whose exchanges may wait on a GPU at the same time: all blocks of a rank must be resident for its peers to
/// go on, whatever other ranks wait.
pub(crate) const COMMUNICATORS: i32 = 4;

/// One exchange. Byte strides; the first of `o_stride` and of `lse_stride` is that of the token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExchangeStep {
    /// This rank's partial: normalised outputs [token, head, dim] and log-sum-exps [token, head], f32.
    pub o: u64,
    pub o_stride: [i64; 3],
    pub o_dtype: Dtype,
    pub lse: u64,
    pub lse_stride: [i64; 2],
    /// What makes an incoming lse a natural one.
    pub to_natural: f32,
    /// Whether +inf means empty, too.
    pub plus_inf_is_empty: bool,
    /// Elements of a row.
    pub dim: i32,
    /// Merged output [token, own head, dim].
    pub out: Tensor,
    pub out_stride: [i64; 4],
    pub out_dtype: Dtype,
    /// Merged natural lse [token, own head], f32; null: not wanted.
    pub out_lse: Tensor,
    pub out_lse_stride: [i64; 4],
    /// The first row, token * heads + head, and how many: no more than a slot holds.
    pub first_row: i64,
    pub rows: i64,
    /// The attention kernel has pushed the partial.
    pub is_pushed: bool,
    /// No other exchange belongs to the step.
    pub is_last: bool,
}

impl ExchangeStep {
    /// A step without rows.
    pub const NOTHING: ExchangeStep = ExchangeStep {
        o: 0,
        o_stride: [0; 3],
        o_dtype: Dtype::F32,
        lse: 0,
        lse_stride: [0; 2],
        to_natural: 1.0,
        plus_inf_is_empty: false,
        dim: 1,
        out: Tensor::NULL,
        out_stride: [0; 4],
        out_dtype: Dtype::F32,
        out_lse: Tensor::NULL,
        out_lse_stride: [0; 4],
        first_row: 0,
        rows: 0,
        is_pushed: false,
        is_last: true,
    };
}

/// The exchange kernel on a device.
pub(crate) struct ExchangeKernel {
    kernel: Kernel,
    pointers: PointerCheck,
    /// Most blocks: those of all ranks on the GPU are resident together, because they wait for each other.
    most: u64,
}

impl ExchangeKernel {
    /// Makes the kernel resident, for one of `sharing` ranks on the GPU. Blocks; `Capturing` during a capture.
    pub fn new(device: &Arc<CudaDevice>, sharing: usize) -> Result<ExchangeKernel> {
        let kernel = Image::new(device)?.kernel("treeattn_exchange", THREADS, 0)?;
        let ranks = COMMUNICATORS * sharing.clamp(1, 1 << 16) as i32;
        let most = (device.units * BLOCKS_A_UNIT / ranks).clamp(1, MOST_BLOCKS) as u64;
        Ok(ExchangeKernel { kernel, pointers: PointerCheck::new(), most })
    }

    /// Refuses memory that is not the device's. Tensors without bytes are never touched, whatever they point to.
    pub fn check(&self, tensors: &[(&str, &Tensor)]) -> Result<()> {
        let device = self.kernel.device();
        let entered = device.enter()?;
        for (name, tensor) in tensors.iter().filter(|(_, tensor)| tensor.bytes > 0) {
            self.pointers.check(device, name, tensor.data)?;
        }
        drop(entered);
        Ok(())
    }

    /// Enqueues an exchange; every rank enqueues its own. Allocates nothing, waits for nothing, may be captured.
    pub fn enqueue(&self, view: &ExchangeView, step: &ExchangeStep, stream: &CudaStream) -> Result<()> {
        let three = |s: [i64; 4]| [s[0], s[1], s[2]];
        let parameters = ExchangeParams {
            o: step.o,
            lse: step.lse,
            out: step.out.data as u64,
            out_lse: step.out_lse.data as u64,
            o_stride: step.o_stride,
            lse_stride: step.lse_stride,
            out_stride: three(step.out_stride),
            out_lse_stride: [step.out_lse_stride[0], step.out_lse_stride[1]],
            first_row: step.first_row,
            rows: step.rows,
            head_dim: step.dim,
            o_dtype: step.o_dtype as i32,
            out_dtype: step.out_dtype as i32,
            to_natural: step.to_natural,
            plus_inf_is_empty: i32::from(step.plus_inf_is_empty),
            is_pushed: i32::from(step.is_pushed),
            is_last: i32::from(step.is_last),
            reserved: 0,
            view: *view,
        };
        let blocks = (step.rows as u64).div_ceil(ROWS).clamp(1, self.most);
        let entered = self.kernel.device().enter()?;
        // SAFETY: what the kernel takes; the window outlives its communicator's work, and the caller of the step vouches
        // for the rest.
        unsafe { self.kernel.launch(&entered, stream, blocks as u32, &parameters) }
    }
}
