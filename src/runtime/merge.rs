//! Merging partials that lie in one place.

use std::time::Duration;

use super::context::Runtime;
use super::stream::{RunsOn, Stream};
use crate::attention::MAX_HEAD_DIM;
use crate::attention::merge::{MergeArgs, MergeStep};
use crate::device::{Device, DeviceKind, FloatState};
use crate::error::Result;
use crate::partial::{Lse, merge_ranks};

/// How long enqueueing a merge may wait for room on its stream.
const ENQUEUE_TIMEOUT: Duration = Duration::from_secs(10);

/// Merges `count` partials in order into one, on `device`.
///
/// Enqueues on the stream; with none (CPU) it runs here. A CUDA stream that was made during a capture
/// loads the kernel at its first merge, which is `Capturing` until the capture is over.
///
/// # Safety
/// The buffers that `args` describes stay valid, and unchanged by others, until the merge is done.
pub unsafe fn merge_partials(
    runtime: &Runtime,
    device: Device,
    args: &MergeArgs,
    count: usize,
    stream: Option<&Stream>,
) -> Result<()> {
    if device.kind == DeviceKind::Cuda && stream.is_some() {
        // The stream is of a device that is there.
        runtime.check_open()?;
    } else {
        runtime.check_device(device)?;
    }
    let step = MergeStep::of_partials(args, count)?;
    if device.kind == DeviceKind::Cpu {
        // SAFETY: the caller keeps the buffers, which are host memory, valid and unchanged.
        unsafe { step.check_starts() }?;
    }
    match Stream::runs_on(stream, device)? {
        // SAFETY: the caller keeps the buffers valid while this runs.
        RunsOn::Caller => unsafe { merge_here(&step) },
        // SAFETY: the caller keeps the buffers valid until the merge is done.
        RunsOn::Queue(queue) => queue.push(move || unsafe { merge_here(&step) }, ENQUEUE_TIMEOUT),
        RunsOn::Cuda(cuda) => {
            // The stream's own runtime: the stream keeps the kernel that this runtime has given it.
            let runtime = stream.map_or(runtime, Stream::runtime);
            let kernel = runtime.merge_kernel(cuda.device())?;
            if let Some(stream) = stream {
                stream.keep(kernel.clone());
            }
            // SAFETY: `of_partials` checked strides and extents of all partials and of the output; the caller keeps their buffers
            // valid, and unchanged by others, until the merge is done.
            unsafe { kernel.enqueue(&step, cuda) }
        }
    }
}

/// Merges on the calling thread.
///
/// # Safety
/// The step's memory is host memory that stays valid, and unchanged by others, until this returns.
unsafe fn merge_here(step: &MergeStep) -> Result<()> {
    let _float = FloatState::enter();
    let (mut scratch, mut merged) = ([0.0f32; MAX_HEAD_DIM as usize], [0.0f32; MAX_HEAD_DIM as usize]);
    let dim = step.target.dim as usize;
    let (scratch, merged) = (&mut scratch[..dim], &mut merged[..dim]);
    let heads = step.heads as usize;
    for row in 0..step.rows() {
        // SAFETY: rows and partials below the step's own numbers, of memory that the caller keeps valid.
        let lse = |partial| unsafe { step.lse(partial, row) };
        let o = |partial, scratch: &mut [f32]| {
            // SAFETY: as above.
            unsafe { step.load(partial, row, Lse::of(0.0), scratch) };
            None
        };
        let merged_lse = merge_ranks(step.count as usize, lse, o, scratch, merged);
        // SAFETY: as above, for the output.
        unsafe { step.target.write(row / heads, row % heads, merged, merged_lse) };
    }
    Ok(())
}
