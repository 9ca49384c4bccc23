//! A GPU's part of a step whose partials go over NCCL: its message, and the kernels before and after the allgather
//! (`kernels/gather.cu`).

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use super::abi;
use super::params::{GATHER_HEADER_BYTES, GATHER_ROW_HEAD, GatherParams, ROW_THREADS, ROWS_A_BLOCK};
use crate::attention::Dtype;
use crate::device::cuda::{Allocations, CudaDevice, CudaStream, Image, Kernel, PointerCheck};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::{Lse, RowSource, RowTarget};

/// How parts of the workspace are aligned, bytes.
const ALIGN: usize = 256;
/// How rows of a message are aligned, bytes.
const ROW_ALIGN: usize = 16;

/// The shape of a plan's messages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GatherSizes {
    /// Most query tokens of a step.
    pub tokens: i32,
    pub heads: i32,
    pub dim: i32,
    /// Of o in messages.
    pub wire: Dtype,
    /// This rank's output: its first head and their number.
    pub first_head: i32,
    pub own_heads: i32,
    /// This rank in NCCL's communicator, and its size.
    pub rank: i32,
    pub world: i32,
    /// Whether this rank's own attention leaves its partials here.
    pub attends: bool,
}

/// Where messages come from, and which of them are merged: for those of nodes.
#[derive(Clone, Debug)]
pub(crate) struct Senders {
    /// The rank of each message, by its place.
    pub ranks: Vec<usize>,
    /// The places of the messages to merge, in this order.
    pub merged: Vec<usize>,
}

/// Addresses of mapped words of the host, and of a word of the device, that the kernels write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GatherWords {
    /// A device word that is not 0 once outputs shall be NaN.
    pub failed: u64,
    /// Three words: steps begun, steps ended, bad data.
    pub host: u64,
    /// The failure that a step has found.
    pub failure: u64,
}

/// One step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GatherStep {
    pub tokens: i32,
    /// The partial to send, [token, head, dim]; none: it is in the message.
    pub source: RowSource,
    /// Each lse of the source is two floats, the second what the first lacks.
    pub lse_in_two: bool,
    /// The merged output, [token, own head, dim].
    pub target: RowTarget,
    /// What tells calls apart.
    pub fingerprint: u64,
}

/// What a step gathers: device memory of this rank's message and of those of all ranks, and bytes of one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Messages {
    pub send: u64,
    pub received: u64,
    pub bytes: usize,
}

/// A plan's kernels and workspace.
pub(crate) struct Gather {
    begin: Kernel,
    merge: Kernel,
    pointers: PointerCheck,
    sizes: GatherSizes,
    /// Where attention leaves a step's partial, and whether that is the message itself.
    partial: RowTarget,
    is_sent_as_it_is: bool,
    fixed: GatherParams,
    bytes: usize,
    _holdings: Allocations,
}

impl Gather {
    /// Makes the kernels resident and allocates for the largest step. `senders`: none where every message is merged, in the order of
    /// the ranks. The words outlive this. Blocks; `Capturing` during a capture. Dropping waits for enqueued steps, at most
    /// `timeout`.
    pub fn new(
        device: &Arc<CudaDevice>,
        sizes: GatherSizes,
        words: GatherWords,
        senders: Option<&Senders>,
        timeout: Duration,
    ) -> Result<Gather> {
        let image = Image::new(device)?;
        let kernel = |name: &str| abi::kernel(&image, "gather", &format!("treeattn_gather_{name}"), ROW_THREADS, 0);
        let row_bytes = GATHER_ROW_HEAD + (sizes.dim as usize * sizes.wire.size()).next_multiple_of(ROW_ALIGN);
        let rows = sizes.tokens as usize * sizes.heads as usize;
        let is_sent_as_it_is = sizes.wire == Dtype::F32;
        let (memory, [partial_o, partial_lse, received, counts], mut bytes, mut holdings) = {
            let message = rows.checked_mul(row_bytes).and_then(|rows| rows.checked_add(GATHER_HEADER_BYTES));
            let partial = if sizes.attends && !is_sent_as_it_is { Some(rows) } else { Some(0) };
            let part = |bytes: Option<usize>| bytes?.checked_next_multiple_of(ALIGN);
            let parts = [
                part(message),
                part(partial.and_then(|rows| rows.checked_mul(size_of::<f32>() * sizes.dim as usize))),
                part(partial.and_then(|rows| rows.checked_mul(size_of::<Lse>()))),
                part(message.and_then(|message| message.checked_mul(sizes.world as usize))),
                // Steps begun and ended, arrivals.
                Some(ALIGN),
            ];
            let mut at = [0u64; 5];
            let mut bytes = 0usize;
            for (at, part) in at.iter_mut().zip(parts) {
                *at = bytes as u64;
                bytes = part.and_then(|part| bytes.checked_add(part)).ok_or_else(|| {
                    let found = format!("{} x {} x {}", sizes.tokens, sizes.heads, sizes.dim);
                    Error::invalid("max_query_tokens x q_heads x head_dim_v", found, "a size that fits memory")
                })?;
            }
            let mut holdings = Allocations::new(device, timeout);
            let memory = holdings.memory(bytes)?;
            let [_, others @ ..] = at.map(|at| memory + at);
            (memory, others, bytes, holdings)
        };
        let mut table = |places: &[usize]| -> Result<u64> {
            let numbers: Vec<u8> = places.iter().flat_map(|&place| (place as i32).to_ne_bytes()).collect();
            let table = holdings.memory(numbers.len())?;
            bytes += numbers.len();
            // SAFETY: the memory just made, as large as the table, which no kernel knows yet.
            unsafe { device.upload(table, &numbers) }.map(|()| table)
        };
        let (merged, ranks, partials) = match senders {
            None => (0, 0, sizes.world),
            Some(senders) => (table(&senders.merged)?, table(&senders.ranks)?, senders.merged.len() as i32),
        };
        let row = row_bytes as i64;
        let first = memory + GATHER_HEADER_BYTES as u64;
        let partial = match is_sent_as_it_is {
            true => RowTarget {
                o: first + GATHER_ROW_HEAD as u64,
                lse: first,
                o_stride: [i64::from(sizes.heads) * row, row, size_of::<f32>() as i64],
                lse_stride: [i64::from(sizes.heads) * row, row],
                dim: sizes.dim,
                ..RowTarget::NONE
            },
            false => RowTarget::partial(partial_o, partial_lse, sizes.heads, sizes.dim),
        };
        let fixed = GatherParams {
            source: RowSource::NONE,
            target: RowTarget::NONE,
            send: memory,
            received,
            message_bytes: 0,
            row_bytes: row,
            fingerprint: 0,
            words: counts,
            failed: words.failed,
            host: words.host,
            failure: words.failure,
            arrived: counts + 16,
            merged,
            senders: ranks,
            wire_dtype: sizes.wire as i32,
            lse_in_two: 0,
            tokens: 0,
            heads: sizes.heads,
            first_head: sizes.first_head,
            own_heads: sizes.own_heads,
            rank: sizes.rank,
            world: sizes.world,
            partials,
        };
        Ok(Gather {
            begin: kernel("begin")?,
            merge: kernel("merge")?,
            pointers: PointerCheck::new(),
            sizes,
            partial,
            is_sent_as_it_is,
            fixed,
            bytes,
            _holdings: holdings,
        })
    }

    /// Where attention leaves a step's partial, each lse in two floats.
    pub fn target(&self) -> &RowTarget {
        &self.partial
    }

    /// Where attention notes bad data.
    pub fn status(&self) -> u64 {
        self.fixed.send
    }

    /// The partial that attention has left, for a step to send; none where that lies in the message.
    pub fn attended(&self) -> RowSource {
        if self.is_sent_as_it_is { RowSource::NONE } else { RowSource::written(&self.partial) }
    }

    /// What a step of `tokens` query tokens gathers.
    pub fn messages(&self, tokens: i32) -> Messages {
        let rows = tokens as usize * self.sizes.heads as usize;
        let bytes = GATHER_HEADER_BYTES + rows * self.fixed.row_bytes as usize;
        Messages { send: self.fixed.send, received: self.fixed.received, bytes }
    }

    /// Checks a step before anything is enqueued: its size, where its output goes, and where the engine's partial lies.
    pub fn check(&self, step: &GatherStep) -> Result<()> {
        let device = self.begin.device();
        let _entered = device.enter()?;
        let rows = step.tokens as u64 * self.sizes.heads as u64;
        if step.tokens > self.sizes.tokens || rows.div_ceil(ROWS_A_BLOCK) > i32::MAX as u64 {
            let message = format!("plan: {rows} rows in a step, wanted at most the plan's");
            return Err(Error::new(ErrorKind::Internal, message));
        }
        // A tensor of no rows may point anywhere.
        if step.tokens == 0 {
            return Ok(());
        }
        let source = step.source.addresses();
        let target = [("out.data", step.target.o), ("lse.data", step.target.lse)];
        for (name, address) in source.into_iter().chain(target.into_iter().filter(|_| self.sizes.own_heads > 0)) {
            self.pointers.check(device, name, address as *const c_void)?;
        }
        Ok(())
    }

    /// Enqueues what comes before the allgather.
    ///
    /// # Safety
    /// The step has no more tokens than the sizes. Until it is done, the words that [`Gather::new`] was given stay valid, and so do
    /// source and target, where they are not 0: memory of the device with a row for each of its tokens and heads, of the target its
    /// own heads; nobody writes the source, and nobody else uses the target. Steps that are under way together are on one stream:
    /// they share the workspace.
    pub unsafe fn begin(&self, step: &GatherStep, stream: &CudaStream) -> Result<()> {
        let blocks = if step.source.o == 0 { 1 } else { self.blocks(step) };
        // SAFETY: this function was promised the same.
        unsafe { self.launch(&self.begin, blocks, step, stream) }
    }

    /// Enqueues what comes after the allgather of the step's [`Messages`].
    ///
    /// # Safety
    /// As [`Gather::begin`].
    pub unsafe fn merge(&self, step: &GatherStep, stream: &CudaStream) -> Result<()> {
        // SAFETY: this function was promised the same.
        unsafe { self.launch(&self.merge, self.blocks(step), step, stream) }
    }

    fn blocks(&self, step: &GatherStep) -> u32 {
        (step.tokens as u64 * self.sizes.heads as u64).div_ceil(ROWS_A_BLOCK).max(1) as u32
    }

    /// What kernels are told of any step.
    pub(super) fn nothing(&self) -> GatherParams {
        self.fixed
    }

    /// What kernels are told of a step.
    pub(super) fn parameters(&self, step: &GatherStep) -> GatherParams {
        GatherParams {
            source: step.source,
            target: step.target,
            lse_in_two: i32::from(step.lse_in_two),
            message_bytes: self.messages(step.tokens).bytes as i64,
            fingerprint: step.fingerprint,
            tokens: step.tokens,
            ..self.fixed
        }
    }

    /// Enqueues one of the kernels.
    ///
    /// # Safety
    /// As [`Gather::begin`].
    unsafe fn launch(&self, kernel: &Kernel, blocks: u32, step: &GatherStep, stream: &CudaStream) -> Result<()> {
        let entered = kernel.device().enter()?;
        let parameters = self.parameters(step);
        // SAFETY: `GatherParams` is the only parameter of both kernels (`abi` compares their layouts). The workspace has room for
        // the tokens of the sizes, of which the step was promised to have no more, and is freed only once the device is done with
        // it (`_holdings`). That source and target are memory of the device as large as their strides say, and stay with the
        // words that `new` was given until the step is done, this function was promised, too.
        unsafe { kernel.launch(&entered, stream, blocks, &parameters) }
    }

    /// Bytes of device memory, and those that the exchange works on among them: all but the counts.
    pub fn memory(&self) -> (usize, usize) {
        (self.bytes, self.bytes - ALIGN)
    }
}
