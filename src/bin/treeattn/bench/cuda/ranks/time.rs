//! Times one kind of step on all ranks together: replayed from a graph on each, and eager.

use std::time::Instant;

use treeattn::attention::{AttentionDesc, DecodeArgs, Dtype, Tensor};
use treeattn::device::DeviceInfo;
use treeattn::runtime::{self, Buffer, Device, MergeArgs, Plan, Runtime};

use super::meeting::Meeting;
use crate::bench::cuda::decode::{GRAPH, MOST_STEPS, Pace, Timed};
use crate::bench::cuda::driver::{Current, Stream};
use crate::bench::samples::Samples;
use crate::outcome::Outcome;

/// Heads of the partials whose exchange is timed, and their elements.
const HEADS: usize = 32;
const DIM: usize = 128;

/// One rank's GPU and memory.
pub struct Rank {
    pub runtime: Runtime,
    pub device: Device,
    pub info: DeviceInfo,
    pub pool: Buffer,
}

impl Rank {
    pub fn new(runtime: &Runtime, device: Device, info: DeviceInfo, pool: Buffer) -> Rank {
        Rank { runtime: runtime.clone(), device, info, pool }
    }
}

/// What a rank does in a step; the steps of a graph take the arguments in turn.
#[derive(Clone, Copy)]
pub enum Work<'a> {
    Decode { plan: &'a Plan, args: &'a [DecodeArgs] },
    Merge { plan: &'a Plan, args: &'a MergeArgs },
}

impl Work<'_> {
    /// Different steps.
    fn copies(&self) -> usize {
        match self {
            Work::Decode { args, .. } => args.len(),
            Work::Merge { .. } => 1,
        }
    }

    /// Enqueues that many steps.
    ///
    /// # Safety
    /// The memory that the arguments name outlives the steps, and `stream` is the only one that steps of the plan are on.
    unsafe fn enqueue(&self, steps: usize, stream: &runtime::Stream) -> Outcome<()> {
        for step in 0..steps {
            // SAFETY: memory and stream are as this function was promised.
            unsafe {
                match *self {
                    Work::Decode { plan, args } => plan.decode(&args[step % args.len()], Some(stream))?,
                    Work::Merge { plan, args } => plan.merge(args, Some(stream))?,
                }
            }
        }
        Ok(())
    }
}

/// Runs `works`, one a rank, at the same time; the slowest rank's times.
///
/// # Safety
/// The memory that the works' arguments name outlives this call, and whoever frees it waits for the device.
pub unsafe fn run(ranks: &[Rank], works: &[Work<'_>], pace: &Pace) -> Outcome<Timed> {
    let meeting = Meeting::new(ranks.len());
    let results: Vec<Result<Timed, String>> = std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .iter()
            .zip(works)
            .enumerate()
            .map(|(number, (rank, &work))| {
                let meeting = &meeting;
                scope.spawn(move || {
                    // SAFETY: this function was promised the same; each rank has its own plan.
                    let timed = unsafe { measure(number, rank, &work, pace, meeting) };
                    if timed.is_err() {
                        meeting.fail();
                    }
                    timed.map_err(|error| format!("rank {number}: {error}"))
                })
            })
            .collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|result| result.unwrap_or_else(|_| Err("a rank of the bench panicked".into()))).collect()
    });
    // The first failure, not that of those who only heard of it.
    if let Some(error) =
        results.iter().filter_map(|result| result.as_ref().err()).min_by_key(|text| text.contains("another rank"))
    {
        return Err(error.clone().into());
    }
    results.into_iter().flatten().next().ok_or_else(|| "no ranks".into())
}

/// One rank's part of [`run`]; all ranks find the same times.
///
/// # Safety
/// As [`run`]; nobody else has steps of the work's plan.
unsafe fn measure(number: usize, rank: &Rank, work: &Work<'_>, pace: &Pace, meeting: &Meeting) -> Outcome<Timed> {
    let _current = Current::new(rank.device.ordinal)?;
    let stream = Stream::new()?;
    // SAFETY: `stream` is a local declared before the wrapped one, and so dropped after it.
    let wrapped = unsafe { runtime::Stream::wrap_cuda(&rank.runtime, rank.device, stream.pointer()) }?;
    let together = |run: &dyn Fn() -> Outcome<()>| -> Outcome<f64> {
        meeting.wait()?;
        meeting.largest(number, stream.time(run)?)
    };
    // SAFETY: this function was promised the same; all steps are on the one stream.
    let enqueue = |steps: usize| unsafe { work.enqueue(steps, &wrapped) };
    let (copies, probe) = (work.copies(), work.copies().min(8));
    together(&|| enqueue(copies))?;
    let about = together(&|| enqueue(probe))? / probe as f64;
    let steps = ((GRAPH / about.max(1e-7)) as usize).clamp(copies, MOST_STEPS.max(copies));

    meeting.wait()?;
    let graph = stream.capture(|| enqueue(steps))?;
    // SAFETY: the graph's steps use the memory that this function was promised.
    let replay_once = || unsafe { stream.replay(&graph) };
    together(&replay_once)?;
    let (mut replay, mut spent) = (Samples::default(), 0.0);
    let mut turns = 0;
    while turns < pace.least || spent < pace.block {
        let seconds = together(&replay_once)?;
        spent += seconds;
        turns += 1;
        replay.push(seconds / steps as f64);
    }

    let calls = ((GRAPH / about.max(1e-7)) as usize).clamp(8, MOST_STEPS);
    let (mut eager, mut host) = (Samples::default(), Samples::default());
    for _ in 0..pace.least {
        let mut enqueued = 0.0;
        meeting.wait()?;
        let seconds = stream.time(|| {
            let began = Instant::now();
            enqueue(calls)?;
            enqueued = began.elapsed().as_secs_f64();
            Ok(())
        })?;
        eager.push(meeting.largest(number, seconds)? / calls as f64);
        host.push(meeting.largest(number, enqueued)? / calls as f64);
    }
    Ok(Timed { replay: replay.summary(), eager: eager.summary(), host: host.summary(), steps, copies })
}

/// Bytes of a partial of that many query tokens.
pub fn partial_bytes(tokens: usize) -> usize {
    tokens * HEADS * (DIM + 1) * 4
}

/// A merge-only plan for such partials.
pub fn merge_desc(tokens: usize) -> Outcome<AttentionDesc> {
    let mut desc = AttentionDesc::new(HEADS as i32, 0, DIM as i32, 1);
    desc.max_query_tokens = i32::try_from(tokens)?;
    desc.out_dtype = Dtype::F32;
    Ok(desc)
}

/// One rank's partial on its GPU, and where the merged one goes.
pub struct Partial {
    pub args: MergeArgs,
    /// Held for the steps.
    _buffers: [Buffer; 4],
}

impl Partial {
    pub fn new(runtime: &Runtime, rank: &Rank, tokens: usize) -> Outcome<Partial> {
        let rows = tokens * HEADS;
        let alloc = |floats: usize| Buffer::alloc(runtime, rank.device, 4 * floats);
        let buffers = [alloc(rows * DIM)?, alloc(rows)?, alloc(rows * DIM)?, alloc(rows)?];
        let mut random = crate::bench::pool::Random(7 + rank.device.ordinal as u64);
        for (buffer, floats) in buffers.iter().zip([rows * DIM, rows]) {
            let bytes: Vec<u8> = (0..floats).flat_map(|_| random.float().to_ne_bytes()).collect();
            buffer.upload(0, &bytes)?;
        }
        let whole = |buffer: &Buffer| Tensor { data: buffer.data(), bytes: buffer.bytes() as u64, stride: [0; 4] };
        let args = MergeArgs {
            query_tokens: i32::try_from(tokens)?,
            heads: 0,
            head_dim: 0,
            o: whole(&buffers[0]),
            o_dtype: Dtype::F32,
            lse: whole(&buffers[1]),
            lse_base: 0,
            out: whole(&buffers[2]),
            out_dtype: None,
            out_lse: whole(&buffers[3]),
            ..MergeArgs::default()
        };
        Ok(Partial { args, _buffers: buffers })
    }
}
