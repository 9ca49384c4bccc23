//! The queries of all heads, for steps of ranks that were passed those of their own: one kernel pushes this rank's to all others,
//! waits for theirs, and leaves all of them where the step reads them.

use std::ffi::c_void;
use std::sync::Arc;

use super::params::{QueryParams, ROW_THREADS};
use super::{abi, exchange};
use crate::attention::{AttentionDesc, Step};
use crate::device::cuda::{CudaDevice, CudaStream, Image, Kernel};
use crate::error::Result;
use crate::partial::ExchangeView;

/// Bytes that a thread moves at a time.
const MOVED_BYTES: u64 = 8;

/// The kernel on a device, and where it leaves a step's queries.
pub(crate) struct QueryKernel {
    kernel: Kernel,
    /// Most blocks, which may all wait for ranks that have not come.
    most_waiting: u64,
    /// The address of the queries of all heads, [token, head, dim] without gaps.
    gathered: u64,
    /// Bytes of a row, and of an element.
    row: usize,
    element: usize,
}

impl QueryKernel {
    /// Bytes of a row.
    pub fn row_bytes(desc: &AttentionDesc) -> usize {
        desc.head_dim_qk as usize * desc.q_dtype.size()
    }

    /// Makes the kernel resident for plans of `desc`, for one of `sharing` ranks on the GPU. `gathered` is the address of memory of
    /// the device for the rows of the plan's largest step, which outlives the steps. Blocks; `Capturing` during a capture.
    pub fn new(device: &Arc<CudaDevice>, desc: &AttentionDesc, sharing: usize, gathered: u64) -> Result<QueryKernel> {
        let (_, most_waiting) = exchange::blocks(device.units, sharing);
        Ok(QueryKernel {
            kernel: abi::kernel(&Image::new(device)?, "queries", "treeattn_gather_queries", ROW_THREADS, 0)?,
            most_waiting,
            gathered,
            row: QueryKernel::row_bytes(desc),
            element: desc.q_dtype.size(),
        })
    }

    /// Where the kernel leaves the queries of all heads.
    pub fn gathered(&self) -> *mut c_void {
        self.gathered as *mut c_void
    }

    /// Enqueues the exchange of the rows `first` to `first + count` - 1 of each rank, token * its heads + its head, where it has
    /// so many; `count` is at least 1. Allocates nothing, waits for nothing, may be captured.
    ///
    /// # Safety
    /// The step has the queries of this rank's heads, in memory of the device that stays valid until this is done, and that nobody
    /// writes. It has no more tokens than the plan's largest, for which there is memory at `gathered`. A slot holds `count` rows.
    /// The view is as [`ExchangeKernel::enqueue`](super::ExchangeKernel::enqueue) asks for. Steps that are under way together are
    /// on one stream.
    pub unsafe fn enqueue(
        &self,
        view: &ExchangeView,
        step: &Step,
        (first, count): (i64, i32),
        stream: &CudaStream,
    ) -> Result<()> {
        let parameters = QueryParams {
            q: step.args.q.data as u64,
            gathered: self.gathered,
            q_stride: [step.q_stride[0], step.q_stride[1], step.q_stride[2]],
            first_row: first,
            rows: count,
            tokens: step.args.query_tokens,
            words: (self.row / size_of::<u32>()) as i32,
            element_bytes: self.element as i32,
            view: *view,
        };
        let moved = count.unsigned_abs() as u64 * (self.row as u64 / MOVED_BYTES);
        // What comes is as much as goes, from each of the others.
        let blocks = (moved * (view.world as u64 - 1)).div_ceil(u64::from(ROW_THREADS)).clamp(1, self.most_waiting);
        let entered = self.kernel.device().enter()?;
        // SAFETY: `QueryParams` is the kernel's only parameter (`abi` compares their layouts). That queries, windows and the memory
        // at `gathered` are as large as the parameters say, and stay, this function was promised.
        unsafe { self.kernel.launch(&entered, stream, blocks as u32, &parameters) }
    }
}
