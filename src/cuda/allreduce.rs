//! A GPU's part of `ALLREDUCE3`: its partial, and the kernels between the allreduces (`kernels/allreduce.cu`).

use std::mem::offset_of;
use std::sync::Arc;
use std::time::Duration;

use super::merge::MergeStep;
use crate::attention::{Dtype, Tensor};
use crate::device::cuda::{CudaDevice, CudaStream, Holdings, Image, Kernel, PointerCheck};
use crate::error::{Error, ErrorKind, Result};

/// Rows of a block, one a warp.
const ROWS: u64 = 8;
/// How parts of the workspace are aligned, bytes.
const ALIGN: usize = 256;

/// Where the attention kernel leaves a rank's partial, packed, f32: o [token, head, dim], lse [token, head]; and its bad
/// data.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PartialTarget {
    pub o: u64,
    pub lse: u64,
    pub status: u64,
}

/// What `kernels/allreduce.cu` takes, field by field.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct AllreduceParams {
    o: u64,
    lse: u64,
    most: u64,
    weights: u64,
    out: u64,
    out_lse: u64,
    out_stride: [i64; 3],
    out_lse_stride: [i64; 2],
    status: u64,
    words: u64,
    failed: u64,
    host: u64,
    tokens: i32,
    heads: i32,
    head_dim: i32,
    out_dtype: i32,
    first_head: i32,
    own_heads: i32,
    rank: i32,
    world: i32,
    arrived: u64,
}

// The same offsets and sizes that allreduce.cu asserts.
const _: () = {
    assert!(offset_of!(AllreduceParams, out_stride) == 48);
    assert!(offset_of!(AllreduceParams, status) == 88);
    assert!(offset_of!(AllreduceParams, tokens) == 120);
    assert!(size_of::<AllreduceParams>() == 160);
};

/// The shape of a plan's allreduces.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AllreduceShape {
    /// Most query tokens of a step.
    pub tokens: i32,
    pub heads: i32,
    pub dim: i32,
    /// This rank's output: its dtype, its first head and their number.
    pub out_dtype: Dtype,
    pub first_head: i32,
    pub own_heads: i32,
    pub rank: i32,
    pub world: i32,
}

/// Where this rank's part of the merged output goes. Byte strides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AllreduceOutput {
    pub tokens: i32,
    pub out: Tensor,
    pub out_stride: [i64; 4],
    pub lse: Tensor,
    pub lse_stride: [i64; 4],
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
    shape: AllreduceShape,
    fixed: AllreduceParams,
    bytes: usize,
    _holdings: Holdings,
}

impl Allreduce {
    /// Makes the kernels resident and allocates for the largest step. `failed` is a device word that is not 0 once outputs
    /// shall be NaN, `host` three mapped host words: steps begun, steps ended, bad data. Both outlive this. Blocks;
    /// `Capturing` during a capture. Dropping waits for enqueued steps, at most `patience`.
    pub fn new(
        device: &Arc<CudaDevice>,
        shape: AllreduceShape,
        failed: u64,
        host: u64,
        patience: Duration,
    ) -> Result<Allreduce> {
        let image = Image::new(device)?;
        let kernel = |name: &str, threads| image.kernel(&format!("treeattn_allreduce_{name}"), threads, 0);
        let rows = shape.tokens as usize * shape.heads as usize;
        let too_large = || {
            let found = format!("{} x {} x {}", shape.tokens, shape.heads, shape.dim);
            Error::invalid("max_query_tokens x q_heads x head_dim_v", found, "a size that fits memory")
        };
        let part = |floats: usize| floats.checked_mul(4)?.checked_next_multiple_of(ALIGN);
        let sizes = [
            rows.checked_mul(shape.dim as usize).and_then(part),
            part(rows),
            part(rows),
            rows.checked_add(2 * shape.world as usize).and_then(part),
            // Bad data, steps begun and ended, arrivals.
            Some(ALIGN),
        ];
        let mut holdings = Holdings::new(device, patience);
        let mut at = [0u64; 5];
        let mut bytes = 0usize;
        for (at, size) in at.iter_mut().zip(sizes) {
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
            out: 0,
            out_lse: 0,
            out_stride: [0; 3],
            out_lse_stride: [0; 2],
            status: words,
            words: words + 8,
            failed,
            host,
            tokens: 0,
            heads: shape.heads,
            head_dim: shape.dim,
            out_dtype: shape.out_dtype as i32,
            first_head: shape.first_head,
            own_heads: shape.own_heads,
            rank: shape.rank,
            world: shape.world,
            arrived: words + 24,
        };
        Ok(Allreduce {
            begin: kernel("begin", 32)?,
            weigh: kernel("weigh", 32 * ROWS as u32)?,
            finish: kernel("finish", 32 * ROWS as u32)?,
            pointers: PointerCheck::new(),
            shape,
            fixed,
            bytes,
            _holdings: holdings,
        })
    }

    /// Makes every row the identity, for rows that a step does not write. Blocks; before the first step.
    pub fn clear(&self) -> Result<()> {
        let rows = self.shape.tokens as usize * self.shape.heads as usize;
        let empty: Vec<u8> = f32::NEG_INFINITY.to_le_bytes().repeat(rows);
        // SAFETY: the workspace holds as many lse; no step uses them yet.
        unsafe { self.begin.device().upload(self.fixed.lse, &empty) }
    }

    /// Where a step's partial goes.
    pub fn target(&self) -> PartialTarget {
        PartialTarget { o: self.fixed.o, lse: self.fixed.lse, status: self.fixed.status }
    }

    /// `step`, which merges one given partial, as one that leaves it where a step's partial goes.
    pub fn take_in(&self, step: &MergeStep) -> MergeStep {
        let tensor = |data: u64| Tensor { data: data as *mut _, bytes: u64::MAX, stride: [0; 4] };
        let (dim, heads) = (4 * i64::from(self.shape.dim), i64::from(self.shape.heads));
        MergeStep {
            heads: self.shape.heads,
            out: tensor(self.fixed.o),
            out_stride: [heads * dim, dim, 4, 0],
            out_dtype: Dtype::F32,
            out_lse: tensor(self.fixed.lse),
            out_lse_stride: [heads * 4, 4, 0, 0],
            ..*step
        }
    }

    /// What a step of `tokens` query tokens reduces.
    pub fn reduced(&self, tokens: i32) -> Reduced {
        let rows = tokens as usize * self.shape.heads as usize;
        Reduced {
            lse: self.fixed.lse,
            most: self.fixed.most,
            rows,
            o: self.fixed.o,
            elements: rows * self.shape.dim as usize,
            weights: self.fixed.weights,
            weight_count: rows + 2 * self.shape.world as usize,
        }
    }

    /// Checks where a step's output goes, before anything is enqueued.
    pub fn check(&self, output: &AllreduceOutput) -> Result<()> {
        let device = self.begin.device();
        let _entered = device.enter()?;
        let rows = output.tokens as u64 * self.shape.heads as u64;
        if output.tokens > self.shape.tokens || rows.div_ceil(ROWS) > i32::MAX as u64 {
            return Err(Error::new(
                ErrorKind::Internal,
                format!("plan: {rows} rows in a step, wanted at most the plan's"),
            ));
        }
        for (name, tensor) in [("out.data", output.out), ("lse.data", output.lse)] {
            if tensor.bytes > 0 {
                self.pointers.check(device, name, tensor.data)?;
            }
        }
        Ok(())
    }

    /// Enqueues what comes before the first allreduce.
    pub fn begin(&self, output: &AllreduceOutput, stream: &CudaStream) -> Result<()> {
        self.launch(&self.begin, 1, output, stream)
    }

    /// Enqueues what comes between the first allreduce and the two sums.
    pub fn weigh(&self, output: &AllreduceOutput, stream: &CudaStream) -> Result<()> {
        self.launch(&self.weigh, self.blocks(output), output, stream)
    }

    /// Enqueues what comes after the sums.
    pub fn finish(&self, output: &AllreduceOutput, stream: &CudaStream) -> Result<()> {
        self.launch(&self.finish, self.blocks(output), output, stream)
    }

    fn blocks(&self, output: &AllreduceOutput) -> u32 {
        (output.tokens as u64 * self.shape.heads as u64).div_ceil(ROWS) as u32
    }

    fn launch(&self, kernel: &Kernel, blocks: u32, output: &AllreduceOutput, stream: &CudaStream) -> Result<()> {
        let entered = kernel.device().enter()?;
        let s = output.out_stride;
        let parameters = AllreduceParams {
            out: output.out.data as u64,
            out_lse: output.lse.data as u64,
            out_stride: [s[0], s[1], s[2]],
            out_lse_stride: [output.lse_stride[0], output.lse_stride[1]],
            tokens: output.tokens,
            ..self.fixed
        };
        // SAFETY: what the kernels take; the workspace lives as long as `self`, and the caller of the step vouches for the
        // output.
        unsafe { kernel.launch(&entered, stream, blocks, &parameters) }
    }

    /// Bytes of device memory.
    pub fn memory(&self) -> usize {
        self.bytes
    }
}
