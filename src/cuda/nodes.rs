//! A GPU's part of the exchange within a node, of a step whose ranks are of several nodes (`kernels/nodes.cu`).

use std::sync::Arc;
use std::time::Duration;

use super::gather::{Gather, GatherStep};
use super::params::{NodeParams, ROW_THREADS, ROWS_A_BLOCK};
use super::{abi, exchange};
use crate::device::cuda::{Allocations, CudaDevice, CudaStream, Image, Kernel};
use crate::error::{Error, Result};
use crate::partial::{ExchangeView, Lse, RowSource, RowTarget};

/// How parts of the workspace are aligned, bytes.
const ALIGN: usize = 256;

/// A plan's kernel and workspace.
pub(crate) struct NodeExchange {
    kernel: Kernel,
    /// Most blocks, which may all wait for ranks that have not come.
    most_blocks: u64,
    /// Where attention leaves a step's partial; none where no attention does.
    partial: Option<RowTarget>,
    status: u64,
    members: u64,
    bytes: usize,
    _holdings: Allocations,
}

impl NodeExchange {
    /// Makes the kernel resident, for one of `sharing` ranks on the GPU, and allocates. `members`: the node's ranks. `partial`: the
    /// most tokens, heads and elements of the partials that attention leaves here. Blocks; `Capturing` during a capture. Dropping
    /// waits for enqueued steps, at most `timeout`.
    pub fn new(
        device: &Arc<CudaDevice>,
        sharing: usize,
        members: &[usize],
        partial: Option<(i32, i32, i32)>,
        timeout: Duration,
    ) -> Result<NodeExchange> {
        let kernel = abi::kernel(&Image::new(device)?, "nodes", "treeattn_nodes", ROW_THREADS, 0)?;
        let (_, most_blocks) = exchange::blocks(device.units, sharing);
        let mut holdings = Allocations::new(device, timeout);
        let table: Vec<u8> = members.iter().flat_map(|&rank| (rank as i32).to_ne_bytes()).collect();
        let words = holdings.memory(ALIGN + table.len())?;
        let members = words + ALIGN as u64;
        // SAFETY: the memory just made, as large as the table, which no kernel knows yet.
        unsafe { device.upload(members, &table) }?;
        let mut bytes = ALIGN + table.len();
        let partial = match partial {
            None => None,
            Some((tokens, heads, dim)) => {
                let rows = tokens as usize * heads as usize;
                let o =
                    rows.checked_mul(size_of::<f32>() * dim as usize).and_then(|o| o.checked_next_multiple_of(ALIGN));
                let sizes = o.and_then(|o| Some((o, o.checked_add(rows.checked_mul(size_of::<Lse>())?)?)));
                let (o, all) = sizes.ok_or_else(|| {
                    let found = format!("{tokens} x {heads} x {dim}");
                    Error::invalid("max_query_tokens x q_heads x head_dim_v", found, "a size that fits memory")
                })?;
                let memory = holdings.memory(all)?;
                bytes += all;
                Some(RowTarget::partial(memory, memory + o as u64, heads, dim))
            }
        };
        Ok(NodeExchange { kernel, most_blocks, partial, status: words, members, bytes, _holdings: holdings })
    }

    /// Where attention leaves a step's partial, each lse in two floats; none where no attention does.
    pub fn target(&self) -> Option<&RowTarget> {
        self.partial.as_ref()
    }

    /// Where attention notes bad data.
    pub fn status(&self) -> u64 {
        self.status
    }

    /// The partial that attention has left.
    pub fn attended(&self) -> RowSource {
        self.partial.as_ref().map_or(RowSource::NONE, RowSource::written)
    }

    /// Enqueues an exchange of `rows` rows from `first_row` on, whose merged rows go to the step's message; `is_last`: no other
    /// belongs to the step. Every rank of the node enqueues its own. Allocates nothing, waits for nothing, may be captured.
    ///
    /// # Safety
    /// `view` is that of a rank on the kernel's device, and the windows of all ranks that it tells of stay valid until the exchange
    /// is done. A slot of them holds `rows` rows, in f32. The step is as [`Gather::begin`] asks for, with a source, of which the
    /// rows are; exchanges of a rank that are under way together are on one stream.
    pub unsafe fn enqueue(
        &self,
        gather: &Gather,
        step: &GatherStep,
        view: &ExchangeView,
        (first_row, rows, is_last): (i64, i64, bool),
        stream: &CudaStream,
    ) -> Result<()> {
        let parameters = NodeParams {
            gather: gather.parameters(step),
            view: *view,
            status: self.status,
            found: self.status + 16,
            members: self.members,
            arrived: self.status + 32,
            first_row,
            rows,
            is_last: i32::from(is_last),
        };
        let blocks = (rows as u64).div_ceil(ROWS_A_BLOCK).clamp(1, self.most_blocks);
        let entered = self.kernel.device().enter()?;
        // SAFETY: `NodeParams` is the kernel's only parameter (`abi` compares their layouts). That windows, source and message are
        // memory as large as the parameters say, and stay until the exchange is done, this function was promised; the words and
        // the table are freed only once the device is done with them (`_holdings`).
        unsafe { self.kernel.launch(&entered, stream, blocks as u32, &parameters) }
    }

    /// Bytes of device memory.
    pub fn memory(&self) -> usize {
        self.bytes
    }
}
