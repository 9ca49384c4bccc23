//! What comes before and after a step of a plan with the flag CHECKED on GPUs: one kernel by which ranks tell each other what
//! they were passed and judge it, one that writes NaN where it does not fit together.

use std::sync::Arc;

use super::backend::CudaBackend;
use super::params::{CheckParams, ROW_THREADS};
use super::{abi, exchange};
use crate::attention::{AttentionDesc, Step};
use crate::device::cuda::{CudaDevice, CudaStream, Image, Kernel};
use crate::error::Result;
use crate::partial::ExchangeView;

/// Most blocks that write NaN: where all is well each has two numbers to read a sequence.
const MOST_WRITING: i32 = 32;
/// Bytes that the first kernel leaves of a sequence for the second, as `CheckParams::wrong` says.
const WRONG_BYTES: usize = 8;

/// The kernels on a device.
pub(crate) struct CheckKernels {
    compare: Kernel,
    outputs: Kernel,
    /// Most blocks of the first, which may all wait for ranks that have not come.
    most_waiting: u64,
    /// What the first leaves for the second, [`CheckParams::wrong`].
    wrong: u64,
    needs_positions: bool,
    surplus_keys: bool,
}

/// A step that is to be checked: its memory is the device's.
pub(crate) struct CheckStep(CheckParams);

impl CheckKernels {
    /// Bytes of device memory that plans of `desc` need for what the first kernel leaves for the second.
    pub fn bytes(desc: &AttentionDesc) -> usize {
        desc.max_batch as usize * WRONG_BYTES
    }

    /// Makes the kernels resident for plans of `desc`, for one of `sharing` ranks on the GPU. `wrong` is the address of
    /// [`CheckKernels::bytes`] of its memory, which outlives the steps. Blocks; `Capturing` during a capture.
    pub fn new(device: &Arc<CudaDevice>, desc: &AttentionDesc, sharing: usize, wrong: u64) -> Result<CheckKernels> {
        let image = Image::new(device)?;
        let (_, most_waiting) = exchange::blocks(device.units, sharing);
        Ok(CheckKernels {
            compare: abi::kernel(&image, "check", "treeattn_check", ROW_THREADS, 0)?,
            outputs: abi::kernel(&image, "check", "treeattn_check_outputs", ROW_THREADS, 0)?,
            most_waiting,
            wrong,
            needs_positions: desc.needs_positions(),
            surplus_keys: desc.surplus_keys,
        })
    }

    /// What the kernels are told of a step of `backend`. Refuses memory that is not the device's.
    pub fn step(&self, backend: &CudaBackend, step: &Step) -> Result<CheckStep> {
        Ok(CheckStep(CheckParams {
            step: backend.decode_params(step)?,
            wrong: self.wrong,
            first: 0,
            count: 0,
            needs_positions: i32::from(self.needs_positions),
            surplus_keys: i32::from(self.surplus_keys),
        }))
    }

    /// Enqueues the exchange over sequences `first` to `first + count` - 1, no more than a slot has room for, before the step.
    /// Allocates nothing, waits for nothing, may be captured.
    ///
    /// # Safety
    /// The step is one of [`CheckKernels::step`] of these kernels, and has those sequences. Its memory is as
    /// [`CudaBackend::decode`] asks for, but that the output holds the view's own heads; with the memory at `wrong` that
    /// [`CheckKernels::new`] was given it stays valid until what comes after the step is done. The view is as
    /// [`ExchangeKernel::enqueue`](super::ExchangeKernel::enqueue) asks for. Steps that are under way together are on one stream.
    pub unsafe fn compare(
        &self,
        view: &ExchangeView,
        step: &CheckStep,
        (first, count): (i32, i32),
        stream: &CudaStream,
    ) -> Result<()> {
        let mut parameters = CheckParams { first, count, ..step.0 };
        parameters.step.exchange = *view;
        let blocks = u64::from(count.unsigned_abs()).clamp(1, self.most_waiting);
        let entered = self.compare.device().enter()?;
        // SAFETY: `CheckParams` is the kernel's only parameter (`abi` compares their layouts). `step` checked the pointers to be the
        // device's, and the step has no more sequences than there are pairs of numbers at `wrong`. That the memory is as large as
        // the parameters say, and stays, this function was promised.
        unsafe { self.compare.launch(&entered, stream, blocks as u32, &parameters) }
    }

    /// Enqueues what comes after the step of `view`; as [`CheckKernels::compare`].
    ///
    /// # Safety
    /// As [`CheckKernels::compare`], which was enqueued for all of the step's sequences on this stream.
    pub unsafe fn write_nan(&self, view: &ExchangeView, step: &CheckStep, stream: &CudaStream) -> Result<()> {
        let mut parameters = step.0;
        parameters.step.exchange = *view;
        let blocks = parameters.step.batch.clamp(1, MOST_WRITING);
        let entered = self.outputs.device().enter()?;
        // SAFETY: as in `compare`; the step's output is the step's alone to write until this is done, as promised.
        unsafe { self.outputs.launch(&entered, stream, blocks as u32, &parameters) }
    }
}
