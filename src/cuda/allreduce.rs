//! A GPU's part of `ALLREDUCE3`: its partial, and the kernels between the allreduces (`kernels/allreduce.cu`).

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use super::abi;
use super::params::{AllreduceParams, ROW_THREADS, ROWS_A_BLOCK};
use crate::attention::merge::MergeStep;
use crate::device::cuda::{Allocations, CudaDevice, CudaStream, Image, Kernel, PointerCheck};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::RowTarget;

/// How parts of the workspace are aligned, bytes.
const ALIGN: usize = 256;

/// The sizes of a plan's allreduces.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AllreduceSizes {
    /// Most query tokens of a step.
    pub tokens: i32,
    pub heads: i32,
    pub dim: i32,
    /// This rank's output: its first head and their number.
    pub first_head: i32,
    pub own_heads: i32,
    pub rank: i32,
    pub world: i32,
}

/// Where this rank's part of the merged output goes, [token, own head, dim].
#[derive(Clone, Copy, Debug)]
pub(crate) struct AllreduceOutput {
    pub tokens: i32,
    pub target: RowTarget,
}

/// Device memory of the values to reduce, f32, and how many they are in a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reduced {
    pub lse: u64,
    pub most: u64,
    pub rows: usize,
    pub o: u64,
    pub elements: usize,
    pub weights: u64,
    /// Rows, and the bad data of every rank.
    pub weight_count: usize,
}

/// A plan's kernels and workspace.
pub(crate) struct Allreduce {
    begin: Kernel,
    weigh: Kernel,
    finish: Kernel,
    pointers: PointerCheck,
    sizes: AllreduceSizes,
    partial: RowTarget,
    fixed: AllreduceParams,
    bytes: usize,
    _holdings: Allocations,
}

impl Allreduce {
    /// Makes the kernels resident and allocates for the largest step. `failed` is a device word that is not 0 once outputs
    /// shall be NaN, `host` three mapped host words: steps begun, steps ended, bad data. Both outlive this. Blocks;
    /// `Capturing` during a capture. Dropping waits for enqueued steps, at most `timeout`.
    pub fn new(
        device: &Arc<CudaDevice>,
        sizes: AllreduceSizes,
        failed: u64,
        host: u64,
        timeout: Duration,
    ) -> Result<Allreduce> {
        let image = Image::new(device)?;
        let kernel =
            |name: &str, threads| abi::kernel(&image, "allreduce", &format!("treeattn_allreduce_{name}"), threads, 0);
        let rows = sizes.tokens as usize * sizes.heads as usize;
        let too_large = || {
            let found = format!("{} x {} x {}", sizes.tokens, sizes.heads, sizes.dim);
            Error::invalid("max_query_tokens x q_heads x head_dim_v", found, "a size that fits memory")
        };
        let part = |floats: usize| floats.checked_mul(4)?.checked_next_multiple_of(ALIGN);
        let parts = [
            rows.checked_mul(sizes.dim as usize).and_then(part),
            part(rows),
            part(rows),
            rows.checked_add(2 * sizes.world as usize).and_then(part),
            // Bad data and a word that stays 0, steps begun and ended, arrivals.
            Some(ALIGN),
        ];
        let mut holdings = Allocations::new(device, timeout);
        let mut at = [0u64; 5];
        let mut bytes = 0usize;
        for (at, size) in at.iter_mut().zip(parts) {
            *at = bytes as u64;
            bytes = size.and_then(|size| bytes.checked_add(size)).ok_or_else(too_large)?;
        }
        let memory = holdings.memory(bytes)?;
        let [o, lse, most, weights, words] = at.map(|at| memory + at);
        let fixed = AllreduceParams {
            o,
            lse,
            most,
            weights,
            target: RowTarget::NONE,
            status: words,
            words: words + 16,
            failed,
            host,
            tokens: 0,
            heads: sizes.heads,
            head_dim: sizes.dim,
            first_head: sizes.first_head,
            own_heads: sizes.own_heads,
            rank: sizes.rank,
            world: sizes.world,
            arrived: words + 32,
        };
        Ok(Allreduce {
            begin: kernel("begin", 32)?,
            weigh: kernel("weigh", ROW_THREADS)?,
            finish: kernel("finish", ROW_THREADS)?,
            pointers: PointerCheck::new(),
            sizes,
            partial: RowTarget::packed(o, lse, sizes.heads, sizes.dim),
            fixed,
            bytes,
            _holdings: holdings,
        })
    }

    /// Makes every row the identity, for rows that a step does not write. Blocks.
    ///
    /// # Safety
    /// No step was enqueued yet.
    pub unsafe fn clear(&self) -> Result<()> {
        let rows = self.sizes.tokens as usize * self.sizes.heads as usize;
        let empty: Vec<u8> = f32::NEG_INFINITY.to_le_bytes().repeat(rows);
        // SAFETY: the workspace holds an lse for every row of these sizes, and lives as long as `self`; no step uses it yet, as this
        // function was promised.
        unsafe { self.begin.device().upload(self.fixed.lse, &empty) }
    }

    /// Where a step's partial goes.
    pub fn target(&self) -> &RowTarget {
        &self.partial
    }

    /// Where its bad data is noted.
    pub fn status(&self) -> u64 {
        self.fixed.status
    }

    /// `step`, which merges one given partial, as one that leaves it where a step's partial goes.
    pub fn take_in(&self, step: &MergeStep) -> MergeStep {
        MergeStep { heads: self.sizes.heads, target: self.partial, ..*step }
    }

    /// What a step of `tokens` query tokens reduces.
    pub fn reduced(&self, tokens: i32) -> Reduced {
        let rows = tokens as usize * self.sizes.heads as usize;
        Reduced {
            lse: self.fixed.lse,
            most: self.fixed.most,
            rows,
            o: self.fixed.o,
            elements: rows * self.sizes.dim as usize,
            weights: self.fixed.weights,
            weight_count: rows + 2 * self.sizes.world as usize,
        }
    }

    /// Checks where a step's output goes, before anything is enqueued.
    pub fn check(&self, output: &AllreduceOutput) -> Result<()> {
        let device = self.begin.device();
        let _entered = device.enter()?;
        let rows = output.tokens as u64 * self.sizes.heads as u64;
        if output.tokens > self.sizes.tokens || rows.div_ceil(ROWS_A_BLOCK) > i32::MAX as u64 {
            return Err(Error::new(
                ErrorKind::Internal,
                format!("plan: {rows} rows in a step, wanted at most the plan's"),
            ));
        }
        // A tensor of no rows may point anywhere.
        if output.tokens > 0 && self.sizes.own_heads > 0 {
            for (name, address) in [("out.data", output.target.o), ("lse.data", output.target.lse)] {
                self.pointers.check(device, name, address as *const c_void)?;
            }
        }
        Ok(())
    }

    /// Enqueues what comes before the first allreduce.
    ///
    /// # Safety
    /// The output has no more tokens than the sizes. Until the step is done, `failed` and `host`, which [`Allreduce::new`] was
    /// given, stay valid, and so does the output: memory of the device with a row for each of its tokens and own heads, which nobody
    /// else uses. Steps that are under way together are on one stream: they share the workspace.
    pub unsafe fn begin(&self, output: &AllreduceOutput, stream: &CudaStream) -> Result<()> {
        // SAFETY: this function was promised the same.
        unsafe { self.launch(&self.begin, 1, output, stream) }
    }

    /// Enqueues what comes between the first allreduce and the two sums.
    ///
    /// # Safety
    /// As [`Allreduce::begin`].
    pub unsafe fn weigh(&self, output: &AllreduceOutput, stream: &CudaStream) -> Result<()> {
        // SAFETY: this function was promised the same.
        unsafe { self.launch(&self.weigh, self.blocks(output), output, stream) }
    }

    /// Enqueues what comes after the sums.
    ///
    /// # Safety
    /// As [`Allreduce::begin`].
    pub unsafe fn finish(&self, output: &AllreduceOutput, stream: &CudaStream) -> Result<()> {
        // SAFETY: this function was promised the same.
        unsafe { self.launch(&self.finish, self.blocks(output), output, stream) }
    }

    fn blocks(&self, output: &AllreduceOutput) -> u32 {
        (output.tokens as u64 * self.sizes.heads as u64).div_ceil(ROWS_A_BLOCK) as u32
    }

    /// Enqueues one of the kernels.
    ///
    /// # Safety
    /// As [`Allreduce::begin`].
    unsafe fn launch(&self, kernel: &Kernel, blocks: u32, output: &AllreduceOutput, stream: &CudaStream) -> Result<()> {
        let entered = kernel.device().enter()?;
        let parameters = AllreduceParams { target: output.target, tokens: output.tokens, ..self.fixed };
        // SAFETY: `AllreduceParams` is the only parameter of each of these kernels (`abi` compares their layouts). The workspace
        // has room for the tokens of these sizes, of which the output was promised to have no more, and is freed only once the
        // device is done with it (`_holdings`). That the output is memory of the device as large as its strides say, and stays
        // with the words that `new` was given until the step is done, this function was promised, too.
        unsafe { kernel.launch(&entered, stream, blocks, &parameters) }
    }

    /// Bytes of device memory.
    pub fn memory(&self) -> usize {
        self.bytes
    }
}
