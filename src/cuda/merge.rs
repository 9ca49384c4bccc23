//! Merging given partials on a GPU.

use std::ffi::c_void;
use std::sync::Arc;

use super::abi;
use super::params::MergeParams;
use super::params::{ROW_THREADS, ROWS_A_BLOCK};
use crate::attention::merge::MergeStep;
use crate::device::cuda::{CudaDevice, CudaStream, Image, Kernel, PointerCheck};
use crate::error::{Error, Result};

/// The merge kernel on a device.
pub(crate) struct Merge {
    kernel: Kernel,
    pointers: PointerCheck,
}

impl Merge {
    /// Makes the kernel resident. Blocks; `Capturing` during a capture.
    pub fn new(device: &Arc<CudaDevice>) -> Result<Merge> {
        let kernel = abi::kernel(&Image::new(device)?, "merge", "treeattn_merge_partials", ROW_THREADS, 0)?;
        Ok(Merge { kernel, pointers: PointerCheck::new() })
    }

    /// The device.
    pub fn device(&self) -> &Arc<CudaDevice> {
        self.kernel.device()
    }

    /// Enqueues a merge. Allocates nothing, waits for nothing, may be captured. Refuses memory that is not the device's.
    ///
    /// # Safety
    /// Until the merge is done, the source holds `count` partials of `tokens` x `heads` rows and the target `tokens` x `heads` rows,
    /// in memory that stays valid; nobody writes the source, and nobody else uses the target.
    pub unsafe fn enqueue(&self, step: &MergeStep, stream: &CudaStream) -> Result<()> {
        let device = self.kernel.device();
        let entered = device.enter()?;
        let rows = step.tokens as u64 * step.heads as u64;
        if rows == 0 {
            return Ok(());
        }
        let blocks = rows.div_ceil(ROWS_A_BLOCK);
        if blocks > i32::MAX as u64 {
            let found = format!("{} x {}", step.tokens, step.heads);
            let wanted = format!("at most {} rows", i32::MAX as u64 * ROWS_A_BLOCK);
            return Err(Error::invalid("query_tokens x heads", found, wanted));
        }
        let (source, target) = (step.source, step.target);
        for (name, address) in
            [("out.data", target.o), ("out_lse.data", target.lse)].into_iter().chain(source.addresses())
        {
            self.pointers.check(device, name, address as *const c_void)?;
        }
        let parameters = MergeParams {
            source,
            target,
            step: step.step,
            partials: step.count,
            tokens: step.tokens,
            heads: step.heads,
        };
        // SAFETY: `MergeParams` is the kernel's only parameter (`abi` compares their layouts). The pointers were checked to be the
        // device's; that what lies there is as large as the step says, and stays until the merge is done, this function was
        // promised.
        unsafe { self.kernel.launch(&entered, stream, blocks as u32, &parameters) }
    }
}
