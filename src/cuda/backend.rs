//! A plan on a GPU.

use std::sync::Arc;
use std::time::Duration;

use super::kernels::{Decode, Kernels, MAX_HEAD_DIM, WIDE};
use super::merge::Merge;
use super::params::{self, DecodeParams, PlacementKind, TermsParams, Workspace};
use super::terms;
use crate::attention::merge::MergeStep;
use crate::attention::{
    AttentionDesc, Capabilities, Dtype, KvFormat, KvLayout, MaskKind, Placement, QueryInput, Reproducibility, Shard,
    Step, supported,
};
use crate::device::cuda::{Allocations, CudaDevice, CudaStream, Entered, Image, PointerCheck};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::{ExchangeView, RowTarget};

/// How parts of the workspace are aligned, bytes.
const ALIGN: usize = 256;
/// Of [`Workspace::status`] and, behind it, [`Workspace::found`].
const STATUS_BYTES: usize = 32;

/// What the CUDA backend serves.
pub(crate) const CAPABILITIES: Capabilities = Capabilities {
    suffix: " on a GPU",
    kv_dtypes: &Dtype::ALL,
    head_dim_multiple: 8,
    max_head_dim: MAX_HEAD_DIM,
    wide: Some(WIDE),
    window: true,
    softcap: true,
    alibi: true,
    sinks: true,
    scales: true,
    checked: true,
    pages_by_head: true,
    masks: &MaskKind::ALL,
    query_inputs: &QueryInput::ALL,
    reproducibility: &[Reproducibility::Repeatable],
};

/// Where a step's partial goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Destination<'a> {
    /// To the step's output.
    Output,
    /// To memory. `status`: where bad data is noted, two words as [`Workspace::status`] says. `lse_in_two`: each lse is two
    /// floats, the second what the first lacks.
    Partial { target: &'a RowTarget, status: u64, lse_in_two: bool },
    /// To the ranks of an exchange. `most_waiting`: how many blocks at most may wait for ranks that have not come, to merge
    /// what comes to the step's output; 0: another launch merges.
    Ranks { view: &'a ExchangeView, most_waiting: i64 },
}

/// What a plan with keys attends with.
struct Attention {
    kernels: Kernels,
    /// What is the same in every step.
    fixed: DecodeParams,
}

/// Where kernels of a plan tell the host of bad data: addresses, of the device, of words in mapped host memory that outlive the
/// plan's steps.
#[derive(Clone, Copy)]
pub(crate) struct Told {
    /// Two words for the bad data of steps that have no words of their own for it.
    pub bad_data: u64,
    /// [`value::WORDS`] words for the value that was bad.
    ///
    /// [`value::WORDS`]: crate::partial::view::value::WORDS
    pub value: u64,
}

/// Attention over one rank's shard on a GPU.
pub(crate) struct CudaBackend {
    device: Arc<CudaDevice>,
    desc: AttentionDesc,
    /// None for a merge-only plan.
    attention: Option<Attention>,
    merge: Merge,
    pointers: PointerCheck,
    bytes: usize,
    /// Dropped last: gives the memory back once the device is done with it.
    _holdings: Allocations,
}

impl CudaBackend {
    /// Makes every kernel of a plan resident and allocates its workspace. `sharing` ranks share the GPU, each with its part
    /// of the grid. `told`: where kernels tell the host of bad data. Blocks; `Capturing` during a capture.
    /// Dropping waits for the steps that are enqueued, at most `timeout`.
    pub fn new(
        device: &Arc<CudaDevice>,
        desc: &AttentionDesc,
        shard: Shard,
        sharing: usize,
        told: Told,
        timeout: Duration,
    ) -> Result<CudaBackend> {
        supported(desc, &CAPABILITIES)?;
        let image = Image::new(device)?;
        let merge = Merge::new(device)?;
        let mut holdings = Allocations::new(device, timeout);
        let (mut attention, mut bytes) = (None, 0);
        if !desc.is_merge_only() {
            let kernels = Kernels::new(&image, desc, sharing)?;
            let partials = kernels.all().map(|kernel| kernel.partials(desc)).max().unwrap_or(0).next_multiple_of(ALIGN);
            let counters = kernels.all().map(Decode::counters).max().unwrap_or(0);
            bytes = partials + counters;
            let memory = holdings.memory(bytes)?;
            let status = holdings.memory(STATUS_BYTES)?;
            bytes += STATUS_BYTES;
            let words = [0, told.bad_data, 0, told.value].map(u64::to_ne_bytes).concat();
            // SAFETY: the memory just made, as large as these words, which no kernel knows yet.
            unsafe { device.upload(status, &words)? };
            let found = status + STATUS_BYTES as u64 / 2;
            let workspace = Workspace { partials: memory, counters: memory + partials as u64, status, found };
            attention = Some(Attention { kernels, fixed: fixed(desc, shard, workspace) });
        }
        Ok(CudaBackend {
            device: Arc::clone(device),
            desc: *desc,
            attention,
            merge,
            pointers: PointerCheck::new(),
            bytes,
            _holdings: holdings,
        })
    }

    /// Enqueues a step. Allocates nothing, waits for nothing, may be captured. Refuses memory that is not the device's.
    ///
    /// # Safety
    /// The step was made by [`Step::new`] from the backend's descriptor and shard, for an output of all heads. Until it is done,
    /// its memory is as large as its fields say and stays valid, its inputs are written by nobody, and its output is used by
    /// nobody else. Until then the words that the backend was [told](Told) of stay valid, too. Steps of the backend that are
    /// under way together are on one stream: they share its workspace.
    pub unsafe fn decode(&self, step: &Step, stream: &CudaStream) -> Result<()> {
        // SAFETY: this function was promised the same; the destination names nothing but the step's output.
        unsafe { self.decode_to(step, Destination::Output, stream) }
    }

    /// As [`CudaBackend::decode`], with the shard's partial going elsewhere than to the step's output.
    ///
    /// # Safety
    /// As [`CudaBackend::decode`], but the step's output holds the heads of this rank's merged output where `to` is not
    /// [`Destination::Output`]. What `to` names is memory that the device can write, valid until the step is done: of a target, a
    /// row for every head of every query token of the step, and the two words at `status`; of a view, what
    /// [`ExchangeKernel::enqueue`](super::ExchangeKernel::enqueue) asks of one.
    pub unsafe fn decode_to(&self, step: &Step, to: Destination<'_>, stream: &CudaStream) -> Result<()> {
        let Some(attention) = &self.attention else {
            return Err(Error::new(ErrorKind::Internal, "plan: a step of a merge-only plan"));
        };
        let entered = self.device.enter()?;
        self.check_pointers(step, &entered)?;
        if step.args.query_tokens == 0 {
            return Ok(());
        }
        // How many tokens each sequence has is known to the device only; the mean is known here.
        let each = (step.args.query_tokens as u32).div_ceil(step.args.batch.max(1) as u32);
        let (rows, scaled) = (i64::from(self.desc.group()) * i64::from(each), step.scaled().contains(&true));
        let lies_packed = |decode: &Decode| {
            if decode.takes_blocks {
                let alignment = terms::block_rows_alignment(&self.desc);
                return !scaled && terms::copies_rows(&self.desc, step) && self.rows_begin_at(step, alignment);
            }
            self.lies_in_units(step) && (!decode.takes_view || self.is_v_in_k(step))
        };
        let Some(decode) = attention.kernels.choose(rows, scaled, lies_packed) else {
            return Err(Error::new(ErrorKind::Internal, "plan: found no kernel"));
        };
        let mut parameters = self.parameters(&attention.fixed, step);
        match to {
            Destination::Output => {}
            Destination::Partial { target, status, lse_in_two } => {
                parameters.flags |= if lse_in_two { params::LSE_IN_TWO } else { 0 };
                parameters.target = *target;
                parameters.workspace.status = status;
            }
            Destination::Ranks { view, most_waiting } => {
                // A warp takes a row.
                let warps = i64::from(decode.launch.threads / 32).max(1);
                let rows = i64::from(step.args.query_tokens) * i64::from(view.own_heads);
                parameters.flags |= params::PUSH;
                parameters.waiting = (rows.max(1) + warps - 1).div_euclid(warps).min(most_waiting) as i32;
                parameters.exchange = *view;
            }
        }
        if decode.takes_terms {
            if decode.takes_all_types {
                parameters.flags &= !params::NO_BULK;
                parameters.flags |= if terms::copies_rows(&self.desc, step) { 0 } else { params::NO_BULK };
            }
            if decode.takes_blocks {
                parameters.flags &= !params::NO_BULK;
                parameters.flags |= if self.rows_begin_alike(step) { 0 } else { params::NO_BULK };
            }
            let parameters = TermsParams { step: parameters, terms: terms::of(&self.desc, step) };
            // SAFETY: `TermsParams` is the only parameter of kernels that take terms (`abi` compares the layouts). The workspace
            // was made for steps of the descriptor, of which this one is by promise, and is freed only once the device is done
            // with it (`_holdings`). The step's pointers were checked to be the device's. That the memory there is as large as the
            // step says, and stays, this function was promised, as for the memory that `to` names and the words that `new` was
            // told of.
            return unsafe { decode.kernel.launch(&entered, stream, decode.grid, &parameters) };
        }
        // SAFETY: `DecodeParams` is the only parameter of all other kernels (`abi` compares the layouts); the memory as above.
        unsafe { decode.kernel.launch(&entered, stream, decode.grid, &parameters) }
    }

    /// Refuses a step whose memory is not the device's, before anything of it is enqueued.
    pub fn check(&self, step: &Step) -> Result<()> {
        self.check_pointers(step, &self.device.enter()?)
    }

    /// What kernels are told of a step, whose memory is refused where it is not the device's.
    pub(super) fn decode_params(&self, step: &Step) -> Result<DecodeParams> {
        let Some(attention) = &self.attention else {
            return Err(Error::new(ErrorKind::Internal, "plan: a step of a merge-only plan"));
        };
        let entered = self.device.enter()?;
        self.check_pointers(step, &entered)?;
        Ok(self.parameters(&attention.fixed, step))
    }

    /// Refuses memory that is not the device's.
    fn check_pointers(&self, step: &Step, _entered: &Entered<'_>) -> Result<()> {
        let args = &step.args;
        // Tensors without bytes are never read, whatever they point to.
        let tensors = [
            ("q.data", args.q),
            ("k.data", args.k),
            ("v.data", args.v),
            ("out.data", args.out),
            ("lse.data", args.lse),
            ("sinks.data", args.sinks),
            ("alibi_slopes.data", args.alibi_slopes),
            ("mask.data", args.mask),
            ("mask_factor.data", args.mask_factor),
            ("k_scale.data", args.k_scale),
            ("v_scale.data", args.v_scale),
        ];
        for (name, tensor) in tensors.into_iter().filter(|(_, tensor)| tensor.bytes > 0) {
            self.pointers.check(&self.device, name, tensor.data)?;
        }
        let ints = [
            ("query_start", args.query_start),
            ("kv_length", args.kv_length),
            ("global_length", args.global_length),
            ("kv_start", args.kv_start),
            ("kv_position", args.kv_position),
            ("query_position", args.query_position),
            ("block_table", args.block_table),
            ("page_indptr", args.page_indptr),
            ("page_indices", args.page_indices),
            ("last_page_len", args.last_page_len),
        ];
        for (name, pointer) in ints {
            self.pointers.check(&self.device, name, pointer.cast())?;
        }
        Ok(())
    }

    fn parameters(&self, fixed: &DecodeParams, step: &Step) -> DecodeParams {
        let args = &step.args;
        let ints = |pointer: *const i32| pointer as u64;
        let no_bulk = if self.lies_in_units(step) { 0 } else { params::NO_BULK };
        let [k_end, v_end, ..] = step.token_ends(&self.desc);
        DecodeParams {
            q: args.q.data as u64,
            k: args.k.data as u64,
            v: args.v.data as u64,
            target: step.target(&self.desc),
            q_stride: [step.q_stride[0], step.q_stride[1], step.q_stride[2]],
            k_stride: step.k_stride,
            v_stride: step.v_stride,
            query_start: ints(args.query_start),
            kv_length: ints(args.kv_length),
            global_length: ints(args.global_length),
            kv_start: ints(args.kv_start),
            kv_position: ints(args.kv_position),
            query_position: ints(args.query_position),
            block_table: ints(args.block_table),
            page_indptr: ints(args.page_indptr),
            page_indices: ints(args.page_indices),
            last_page_len: ints(args.last_page_len),
            kv_position_stride: step.kv_position_stride(&self.desc),
            block_table_stride: i64::from(args.max_pages),
            num_page_indices: step.page_index_room(&self.desc),
            // Kernels hold each sequence of a strided cache against the ends of k and v, too.
            kv_capacity: if args.batch > 0 { step.room(&self.desc, 0) } else { 0 },
            k_end,
            v_end,
            batch: args.batch,
            query_tokens: args.query_tokens,
            num_pages: args.num_pages,
            flags: fixed.flags | no_bulk,
            ..*fixed
        }
    }

    /// Whether every row of k and v is packed and begins at a multiple of 16 bytes.
    fn lies_in_units(&self, step: &Step) -> bool {
        let [k, v] = [self.desc.k_dtype, self.desc.v_dtype].map(KvFormat::of);
        k.is_packed(step.k_stride[3]) && v.is_packed(step.v_stride[3]) && self.rows_begin_at(step, 16)
    }

    /// Whether every row of v is a part of its row of k, in whole units of 16 bytes, which rows lie in.
    fn is_v_in_k(&self, step: &Step) -> bool {
        let [k, v] = [step.args.k.data as usize, step.args.v.data as usize];
        let beside = (self.desc.head_dim_qk - self.desc.head_dim_v) as usize * self.desc.k_dtype.size();
        let inside = v.checked_sub(k).is_some_and(|into| into <= beside);
        let strides = step.k_stride.iter().zip(&step.v_stride);
        inside && self.extents(step).iter().zip(strides).all(|(&n, (k, v))| n <= 1 || k == v)
    }

    /// Whether every row of k and v begins at a multiple of `unit` bytes.
    fn rows_begin_at(&self, step: &Step, unit: i64) -> bool {
        let extents = self.extents(step);
        [(step.args.k.data as i64, step.k_stride), (step.args.v.data as i64, step.v_stride)].iter().all(
            |(address, stride)| {
                address % unit == 0 && extents.iter().zip(stride).all(|(&n, &s)| n <= 1 || s % unit == 0)
            },
        )
    }

    /// Whether the rows of a head, in a strided cache those of a sequence, begin as far into a unit of 16 bytes.
    fn rows_begin_alike(&self, step: &Step) -> bool {
        let [outer, tokens, _] = self.extents(step);
        let outer = if self.desc.kv_layout == KvLayout::Strided { 1 } else { outer };
        let alike = |stride: [i64; 4]| (outer <= 1 || stride[0] % 16 == 0) && (tokens <= 1 || stride[1] % 16 == 0);
        alike(step.k_stride) && alike(step.v_stride)
    }

    /// The extents of k and v before a row. The stride of a dimension of one is never used.
    fn extents(&self, step: &Step) -> [i32; 3] {
        match self.desc.kv_layout {
            KvLayout::Strided => [step.args.batch, i32::MAX, self.desc.kv_heads],
            _ => [step.args.num_pages, self.desc.page_size, self.desc.kv_heads],
        }
    }

    /// Enqueues the merge of given partials; as [`Merge::enqueue`].
    ///
    /// # Safety
    /// As [`Merge::enqueue`].
    pub unsafe fn merge(&self, step: &MergeStep, stream: &CudaStream) -> Result<()> {
        // SAFETY: this function was promised the same.
        unsafe { self.merge.enqueue(step, stream) }
    }

    /// Bytes of device memory.
    pub fn memory(&self) -> usize {
        self.bytes
    }
}

/// The parameters that are the same in every step of a plan.
fn fixed(desc: &AttentionDesc, shard: Shard, workspace: Workspace) -> DecodeParams {
    let (placement, interleave) = match desc.placement {
        Placement::Contiguous => (PlacementKind::Contiguous, 1),
        Placement::Interleaved { run } => (PlacementKind::Interleaved, run),
        Placement::Explicit => (PlacementKind::Explicit, 1),
    };
    let flag = |on: bool, flag: u32| if on { flag } else { 0 };
    DecodeParams {
        q: 0,
        k: 0,
        v: 0,
        target: RowTarget::NONE,
        q_stride: [0; 3],
        k_stride: [0; 4],
        v_stride: [0; 4],
        query_start: 0,
        kv_length: 0,
        global_length: 0,
        kv_start: 0,
        kv_position: 0,
        query_position: 0,
        block_table: 0,
        page_indptr: 0,
        page_indices: 0,
        last_page_len: 0,
        kv_position_stride: 0,
        block_table_stride: 0,
        num_page_indices: 0,
        kv_capacity: 0,
        k_end: 0,
        v_end: 0,
        batch: 0,
        query_tokens: 0,
        q_heads: desc.q_heads,
        kv_heads: desc.kv_heads,
        group: desc.group(),
        head_dim_qk: desc.head_dim_qk,
        q_dtype: desc.q_dtype,
        kv_layout: desc.kv_layout,
        page_size: desc.page_size,
        num_pages: 0,
        placement,
        interleave,
        rank: shard.rank,
        world: shard.world,
        scale: desc.effective_scale(),
        flags: flag(desc.causal, params::CAUSAL),
        waiting: 0,
        workspace,
        exchange: ExchangeView::NONE,
    }
}
