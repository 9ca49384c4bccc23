//! Exchanging partials between GPUs: one kernel pushes this rank's, waits for the others' and writes what they merge to.

use std::ffi::c_void;
use std::sync::Arc;

use super::abi;
use super::params::{
    EXCHANGE_BLOCKS_A_UNIT, ExchangeParams, MAX_SHARES, ROW_THREADS, ROWS_A_BLOCK, ROWS_ELEMENTS, ROWS_MOST_RANKS,
    ROWS_MOST_WORDS,
};
use crate::attention::Dtype;
use crate::device::cuda::{CudaDevice, CudaStream, Image, Kernel, PointerCheck};
use crate::error::Result;
use crate::partial::view::{ExchangeMode, row_words, window};
use crate::partial::{ExchangeView, RowSource, RowTarget};

/// Most blocks that may wait for ranks that have not come, however large the GPU.
const MOST_WAITING: i32 = 64;
/// Communicators whose exchanges may wait on a GPU at the same time, with all blocks that may wait resident, and others may
/// still run there.
pub(crate) const COMMUNICATORS: i32 = 4;

/// Most blocks of an exchange of one of `sharing` ranks on a GPU of `units` multiprocessors, and how many of them may wait for
/// ranks that have not come.
pub(super) fn blocks(units: i32, sharing: usize) -> (u64, u64) {
    let most = units * EXCHANGE_BLOCKS_A_UNIT / sharing.clamp(1, 1 << 16) as i32;
    (most.max(1) as u64, (most / COMMUNICATORS).clamp(1, MOST_WAITING) as u64)
}

/// One exchange.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExchangeStep {
    /// This rank's partial, [token, head, dim]; `o` 0: there is none, or it is pushed.
    pub source: RowSource,
    /// The merged output, [token, own head, dim].
    pub target: RowTarget,
    /// The first row, token * heads + head, and how many: no more than a slot holds.
    pub first_row: i64,
    pub rows: i64,
    /// The attention kernel has pushed the partial.
    pub is_pushed: bool,
    /// No other exchange belongs to the step.
    pub is_last: bool,
    /// Each lse of the source is two floats, the second what the first lacks.
    pub lse_in_two: bool,
    /// Log-sum-exps alone travel, and the output is this rank's part of the merged one: of kernels of [`ExchangeKernel::weighted`].
    pub is_weighted: bool,
}

impl ExchangeStep {
    /// A step without rows.
    pub const NOTHING: ExchangeStep = ExchangeStep {
        source: RowSource::NONE,
        // A row has elements, also where there are no rows.
        target: RowTarget { dim: 1, ..RowTarget::NONE },
        first_row: 0,
        rows: 0,
        is_pushed: false,
        is_last: true,
        lse_in_two: false,
        is_weighted: false,
    };
}

/// The kernels of `kernels/exchange_rows.cu` for the exchanges of a plan: faster where they serve a step.
struct RowKernels {
    /// For two ranks whose rows are f32 in memory and on their way.
    plain: Option<Kernel>,
    any: Kernel,
}

impl RowKernels {
    /// Those for exchanges that `view` tells of; none where they serve no such.
    fn new(image: &Image, view: &ExchangeView) -> Result<Option<RowKernels>> {
        if view.world > ROWS_MOST_RANKS || view.mode == ExchangeMode::TwoShot {
            return Ok(None);
        }
        let load =
            |name: &str| abi::kernel(image, "exchange_rows", &format!("treeattn_exchange_rows_{name}"), ROW_THREADS, 0);
        let plain = view.world == 2 && view.wire_dtype == Dtype::F32 as i32;
        let ranks = view.world.max(2).cast_unsigned().next_power_of_two();
        Ok(Some(RowKernels { plain: plain.then(|| load("2_f32")).transpose()?, any: load(&ranks.to_string())? }))
    }

    /// The kernel for a step of `blocks` blocks, if it serves it.
    fn of(&self, view: &ExchangeView, step: &ExchangeStep, blocks: u64) -> Option<&Kernel> {
        let (source, target) = (&step.source, &step.target);
        // Which of them it is, the words of a row say.
        let wire = if view.wire_dtype == Dtype::F32 as i32 { Dtype::F32 } else { Dtype::F16 };
        let words = row_words(target.dim as usize, wire.size()) - window::ROW_HEAD as usize;
        // Kernels number rows, and heads times ranks, in 32 bits.
        let is_small =
            step.first_row + step.rows <= i64::from(i32::MAX) && view.heads <= i32::MAX / (2 * ROWS_MOST_RANKS);
        let has_source = source.o != 0 && source.sum == 0 && !step.is_pushed && source.dim == target.dim;
        let serves = has_source
            && is_small
            && step.rows > 0
            && step.rows as u64 <= blocks.min(MAX_SHARES) * ROWS_A_BLOCK
            && words <= ROWS_MOST_WORDS
            && i64::from(target.dim) % ROWS_ELEMENTS == 0
            && lies_in_fours(source.o, &source.o_stride, source.dtype)
            && (view.own_heads == 0 || lies_in_fours(target.o, &target.o_stride, target.dtype));
        let is_plain = source.dtype == Dtype::F32 && target.dtype == Dtype::F32;
        serves.then(|| self.plain.as_ref().filter(|_| is_plain).unwrap_or(&self.any))
    }
}

/// Whether the elements of rows lie side by side, and every row begins where four of them may.
fn lies_in_fours(o: u64, stride: &[i64; 3], dtype: Dtype) -> bool {
    let size = dtype.size() as i64;
    let whole = |bytes: i64| bytes % (ROWS_ELEMENTS * size) == 0;
    stride[2] == size && whole(o as i64) && whole(stride[0]) && whole(stride[1])
}

/// The exchange kernels on a device.
pub(crate) struct ExchangeKernel {
    kernel: Kernel,
    rows: Option<RowKernels>,
    weighted: Option<Kernel>,
    pointers: PointerCheck,
    /// Most blocks, and how many of them may wait for ranks that have not come.
    most: u64,
    most_waiting: u64,
}

impl ExchangeKernel {
    /// Makes the kernel resident, for one of `sharing` ranks on the GPU. Blocks; `Capturing` during a capture.
    pub fn new(device: &Arc<CudaDevice>, sharing: usize) -> Result<ExchangeKernel> {
        let kernel = abi::kernel(&Image::new(device)?, "exchange", "treeattn_exchange", ROW_THREADS, 0)?;
        let (most, most_waiting) = blocks(device.units, sharing);
        Ok(ExchangeKernel { kernel, rows: None, weighted: None, pointers: PointerCheck::new(), most, most_waiting })
    }

    /// The same, with the kernels that serve the exchanges which `view` tells of sooner. As [`ExchangeKernel::new`].
    pub fn of(device: &Arc<CudaDevice>, sharing: usize, view: &ExchangeView) -> Result<ExchangeKernel> {
        let rows = RowKernels::new(&Image::new(device)?, view)?;
        Ok(ExchangeKernel { rows, ..ExchangeKernel::new(device, sharing)? })
    }

    /// The same, with the kernel of weighted output. As [`ExchangeKernel::new`].
    pub fn weighted(device: &Arc<CudaDevice>, sharing: usize) -> Result<ExchangeKernel> {
        let weighted = abi::kernel(&Image::new(device)?, "weighted", "treeattn_weighted", ROW_THREADS, 0)?;
        Ok(ExchangeKernel { weighted: Some(weighted), ..ExchangeKernel::new(device, sharing)? })
    }

    /// Refuses memory that is not the device's, by the names of the arguments.
    pub fn check(&self, addresses: &[(&str, u64)]) -> Result<()> {
        let device = self.kernel.device();
        let _entered = device.enter()?;
        for &(name, address) in addresses {
            self.pointers.check(device, name, address as *const c_void)?;
        }
        Ok(())
    }

    /// Enqueues an exchange; every rank enqueues its own. Allocates nothing, waits for nothing, may be captured.
    ///
    /// # Safety
    /// `view` is that of a rank on the kernel's device, and the windows of all ranks that it tells of stay valid until the exchange
    /// is done. A slot of them holds `rows` rows. Until then source and target, where they are not 0, are memory of the device that
    /// stays valid, with the step's rows of all heads of the view in the source, and of its own heads in the target; nobody writes
    /// the source, and nobody else uses the target. Exchanges of a rank that are under way together are on one stream.
    pub unsafe fn enqueue(&self, view: &ExchangeView, step: &ExchangeStep, stream: &CudaStream) -> Result<()> {
        let weighted = self.weighted.as_ref().filter(|_| step.is_weighted);
        // All blocks of a weighted exchange wait.
        let most = if weighted.is_some() { self.most_waiting } else { self.most };
        let blocks = (step.rows as u64).div_ceil(ROWS_A_BLOCK).clamp(1, most);
        let parameters = ExchangeParams {
            source: step.source,
            target: step.target,
            first_row: step.first_row,
            rows: step.rows,
            is_pushed: i32::from(step.is_pushed),
            is_last: i32::from(step.is_last),
            waiting: blocks.min(self.most_waiting) as i32,
            lse_in_two: i32::from(step.lse_in_two),
            view: *view,
        };
        let by_rows = || self.rows.as_ref().and_then(|rows| rows.of(view, step, blocks));
        let kernel = weighted.or_else(by_rows).unwrap_or(&self.kernel);
        let entered = kernel.device().enter()?;
        // SAFETY: `ExchangeParams` is the only parameter of each of the kernels (`abi` compares their layouts); `rows.of` gives one
        // that serves the step. That windows, source and target are memory as large as the parameters say, and stay until the
        // exchange is done, this function was promised.
        unsafe { kernel.launch(&entered, stream, blocks as u32, &parameters) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_begin_anywhere_are_for_the_other_kernel() {
        let lies = |o, stride, dtype| lies_in_fours(o, &stride, dtype);
        assert!(lies(4096, [2048, 512, 4], Dtype::F32) && lies(4104, [1024, 256, 2], Dtype::Bf16));
        assert!(!lies(4104, [2048, 512, 4], Dtype::F32), "the first row");
        assert!(!lies(4096, [2052, 512, 4], Dtype::F32), "tokens");
        assert!(!lies(4096, [2048, 516, 4], Dtype::F32), "heads");
        assert!(!lies(4096, [2048, 512, 8], Dtype::F32), "elements");
    }
}
