//! The queries of steps over NCCL whose ranks have those of their own heads: the kernels before and after the allgather that brings
//! every rank those of all (`kernels/gather_queries.cu`).

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use super::abi;
use super::gather::{Gather, Messages};
use super::params::{GatherParams, ROW_THREADS};
use crate::attention::{AttentionDesc, Dtype, Shard, Step, head_range};
use crate::device::cuda::{Allocations, CudaDevice, CudaStream, Image, Kernel};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::{RowSource, RowTarget};

/// Bytes that a thread moves at a time.
const MOVED_BYTES: usize = 8;
/// Most blocks: what they do is bound by memory.
const MOST_BLOCKS: usize = 512;
/// How parts of the memory are aligned, bytes.
const ALIGN: usize = 256;

/// A plan's kernels and memory.
pub(crate) struct GatherQueries {
    send: Kernel,
    take: Kernel,
    fixed: GatherParams,
    /// Most query tokens of a step.
    tokens: i32,
    /// Heads of this rank, and of the one that has the most.
    own_heads: usize,
    most_heads: usize,
    dtype: Dtype,
    bytes: usize,
    _holdings: Allocations,
}

impl GatherQueries {
    /// Makes the kernels resident and allocates for the largest step of `desc`, on rank `shard` of a communicator of NCCL, beside
    /// `gather`, whose counts of steps they go on with. Blocks; `Capturing` during a capture. Dropping waits for enqueued steps, at
    /// most `timeout`.
    pub fn new(
        device: &Arc<CudaDevice>,
        gather: &Gather,
        desc: &AttentionDesc,
        shard: Shard,
        timeout: Duration,
    ) -> Result<GatherQueries> {
        let image = Image::new(device)?;
        let kernel = |name: &str| abi::kernel(&image, "gather_queries", name, ROW_THREADS, 0);
        let heads_of = |rank| head_range(desc.q_heads, Shard { rank, ..shard }).map(|own| own.len());
        let mut most_heads = 0;
        for rank in 0..shard.world {
            most_heads = heads_of(rank)?.max(most_heads);
        }
        let row = desc.head_dim_qk as usize * desc.q_dtype.size();
        let part = |heads: usize, times: usize| -> Result<usize> {
            let rows = (desc.max_query_tokens as usize).checked_mul(heads);
            let message = rows.and_then(|rows| rows.checked_mul(row)?.checked_next_multiple_of(ALIGN));
            message.and_then(|message| message.checked_mul(times)).ok_or_else(|| {
                let found = format!("{} x {} x {}", desc.max_query_tokens, desc.q_heads, desc.head_dim_qk);
                Error::invalid("max_query_tokens x q_heads x head_dim_qk", found, "a size that fits memory")
            })
        };
        let (message, all) = (part(most_heads, 1)?, part(desc.q_heads as usize, 1)?);
        let received = part(most_heads, shard.world as usize)?;
        let bytes = message.saturating_add(received).saturating_add(all);
        let mut holdings = Allocations::new(device, timeout);
        let memory = holdings.memory(bytes)?;
        let target = RowTarget { o: memory + (message + received) as u64, dim: desc.head_dim_qk, ..RowTarget::NONE };
        let fixed = GatherParams {
            target,
            send: memory,
            received: memory + message as u64,
            row_bytes: row as i64,
            ..gather.nothing()
        };
        Ok(GatherQueries {
            send: kernel("treeattn_send_queries")?,
            take: kernel("treeattn_take_queries")?,
            fixed,
            tokens: desc.max_query_tokens,
            own_heads: heads_of(shard.rank)?,
            most_heads,
            dtype: desc.q_dtype,
            bytes,
            _holdings: holdings,
        })
    }

    /// What a step of `tokens` query tokens gathers.
    pub fn messages(&self, tokens: i32) -> Messages {
        let bytes = tokens.unsigned_abs() as usize * self.most_heads * self.fixed.row_bytes as usize;
        Messages { send: self.fixed.send, received: self.fixed.received, bytes }
    }

    /// Bytes of this rank's queries in such a step.
    pub fn own_bytes(&self, tokens: i32) -> usize {
        tokens.unsigned_abs() as usize * self.own_heads * self.fixed.row_bytes as usize
    }

    /// Where the queries of all heads come to lie, without gaps.
    pub fn gathered(&self) -> *mut c_void {
        self.fixed.target.o as *mut c_void
    }

    /// Enqueues what comes before the allgather of the step's [`Messages`].
    ///
    /// # Safety
    /// The step is one of the plan's, of at least one token, with the queries of this rank's heads in memory of the device that
    /// stays valid, and that nobody writes, until this is done. The words that the [`Gather`] was given stay valid as well. Steps
    /// that are under way together are on one stream.
    pub unsafe fn send(&self, step: &Step, stream: &CudaStream) -> Result<()> {
        let [token, head, dim, _] = step.q_stride;
        let source = RowSource {
            o: step.args.q.data as u64,
            o_stride: [token, head, dim],
            dtype: self.dtype,
            ..RowSource::NONE
        };
        // SAFETY: this function was promised the same.
        unsafe { self.launch(&self.send, self.own_heads, source, step, stream) }
    }

    /// Enqueues what comes after it.
    ///
    /// # Safety
    /// As [`GatherQueries::send`].
    pub unsafe fn take(&self, step: &Step, stream: &CudaStream) -> Result<()> {
        // SAFETY: this function was promised the same.
        unsafe { self.launch(&self.take, self.fixed.heads as usize, RowSource::NONE, step, stream) }
    }

    /// Enqueues one of the kernels, which moves the queries of so many heads.
    ///
    /// # Safety
    /// As [`GatherQueries::send`].
    unsafe fn launch(
        &self,
        kernel: &Kernel,
        heads: usize,
        source: RowSource,
        step: &Step,
        stream: &CudaStream,
    ) -> Result<()> {
        let tokens = step.args.query_tokens;
        if tokens > self.tokens {
            let message = format!("plan: {tokens} query tokens in a step, wanted at most the plan's");
            return Err(Error::new(ErrorKind::Internal, message));
        }
        let message_bytes = self.messages(tokens).bytes as i64;
        let parameters = GatherParams { source, tokens, message_bytes, ..self.fixed };
        let moved = tokens as usize * heads * (self.fixed.row_bytes as usize / MOVED_BYTES);
        let blocks = moved.div_ceil(ROW_THREADS as usize).clamp(1, MOST_BLOCKS);
        let entered = kernel.device().enter()?;
        // SAFETY: `GatherParams` is the only parameter of both kernels (`abi` compares their layouts). The memory has room for the
        // tokens of the plan, of which the step has no more, and is freed only once the device is done with it (`_holdings`).
        // That the queries are there, and stay with the words, this function was promised.
        unsafe { kernel.launch(&entered, stream, blocks as u32, &parameters) }
    }

    /// Bytes of device memory.
    pub fn memory(&self) -> usize {
        self.bytes
    }
}
