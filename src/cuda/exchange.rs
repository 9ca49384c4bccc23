//! Exchanging partials between GPUs: one kernel pushes this rank's, waits for the others' and writes what they merge to.

use std::ffi::c_void;
use std::sync::Arc;

use super::abi;
use super::params::ExchangeParams;
use crate::device::cuda::{CudaDevice, CudaStream, Image, Kernel, PointerCheck};
use crate::error::Result;
use crate::partial::{ExchangeView, RowSource, RowTarget};

/// Threads of a block; a warp takes a row.
const THREADS: u32 = 256;
/// Rows that a block takes at a time.
const ROWS: u64 = THREADS as u64 / 32;
/// Most blocks that may wait for ranks that have not come, however large the GPU.
const MOST_WAITING: i32 = 64;
/// Blocks that a multiprocessor holds at least, by the kernel's launch bounds.
const BLOCKS_A_UNIT: i32 = 2;
/// Communicators whose exchanges may wait on a GPU at the same time, with all blocks that may wait resident, and others may
/// still run there.
pub(crate) const COMMUNICATORS: i32 = 4;

/// Most blocks of an exchange of one of `sharing` ranks on a GPU of `units` multiprocessors, and how many of them may wait for
/// ranks that have not come.
pub(super) fn blocks(units: i32, sharing: usize) -> (u64, u64) {
    let most = units * BLOCKS_A_UNIT / sharing.clamp(1, 1 << 16) as i32;
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
    };
}

/// The exchange kernel on a device.
pub(crate) struct ExchangeKernel {
    kernel: Kernel,
    pointers: PointerCheck,
    /// Most blocks, and how many of them may wait for ranks that have not come.
    most: u64,
    most_waiting: u64,
}

impl ExchangeKernel {
    /// Makes the kernel resident, for one of `sharing` ranks on the GPU. Blocks; `Capturing` during a capture.
    pub fn new(device: &Arc<CudaDevice>, sharing: usize) -> Result<ExchangeKernel> {
        let kernel = abi::kernel(&Image::new(device)?, "exchange", "treeattn_exchange", THREADS, 0)?;
        let (most, most_waiting) = blocks(device.units, sharing);
        Ok(ExchangeKernel { kernel, pointers: PointerCheck::new(), most, most_waiting })
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
    pub fn enqueue(&self, view: &ExchangeView, step: &ExchangeStep, stream: &CudaStream) -> Result<()> {
        let blocks = (step.rows as u64).div_ceil(ROWS).clamp(1, self.most);
        let parameters = ExchangeParams {
            source: step.source,
            target: step.target,
            first_row: step.first_row,
            rows: step.rows,
            is_pushed: i32::from(step.is_pushed),
            is_last: i32::from(step.is_last),
            waiting: blocks.min(self.most_waiting) as i32,
            view: *view,
        };
        let entered = self.kernel.device().enter()?;
        // SAFETY: what the kernel takes; the window outlives its communicator's work, and the caller of the step vouches
        // for the rest.
        unsafe { self.kernel.launch(&entered, stream, blocks as u32, &parameters) }
    }
}
