//! Ranks on threads over a mesh of sockets, and their steps.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use treeattn::Result;
use treeattn::attention::{Algorithm, AttentionDesc, DecodeArgs, Tensor};
use treeattn::runtime::{CommConfig, Communicator, Device, DeviceKind, Plan, Runtime, RuntimeConfig, Stream};

use super::mesh::{LONG, Mesh, connect, unix_pairs};
use super::watchdog::Watchdog;

pub const CPU: Device = Device { kind: DeviceKind::Cpu, ordinal: 0 };

pub const ALGORITHMS: [Algorithm; 5] =
    [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Tree, Algorithm::Allreduce3, Algorithm::Ring];

pub fn shape(tokens: i32) -> AttentionDesc {
    AttentionDesc { max_batch: tokens, max_query_tokens: tokens, ..AttentionDesc::new(4, 2, 16, 64) }
}

pub fn config(step: Duration) -> CommConfig {
    CommConfig { step_timeout: step, setup_timeout: LONG, threads_per_rank: 1, ..CommConfig::default() }
}

/// Decodes `batch` sequences of pseudo-random shards, the same for the same rank.
pub fn decode(plan: &Plan, rank: usize, batch: usize, stream: Option<&Stream>) -> Result<(Vec<f32>, Vec<f32>)> {
    decode_as(plan, rank, batch, batch, stream)
}

/// The same with `tokens` query tokens.
pub fn decode_as(
    plan: &Plan,
    rank: usize,
    batch: usize,
    tokens: usize,
    stream: Option<&Stream>,
) -> Result<(Vec<f32>, Vec<f32>)> {
    let mut step = Step::new(plan, rank, batch, tokens);
    // SAFETY: the buffers outlive the step, which is waited for.
    unsafe { step.issue(plan, stream)? };
    if let Some(stream) = stream {
        stream.synchronize()?;
    }
    Ok((step.out, step.lse))
}

/// The buffers of a step.
pub struct Step {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    length: Vec<i32>,
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
}

impl Step {
    /// Of `batch` sequences of pseudo-random shards, the same for the same rank.
    pub fn new(plan: &Plan, rank: usize, batch: usize, tokens: usize) -> Step {
        let desc = plan.desc();
        let mut state = 77 * rank as u32 + 1;
        let mut draw = |n: usize| -> Vec<f32> {
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            (0..n).map(|_| next()).collect()
        };
        let cache = batch * desc.max_kv_length as usize * (desc.kv_heads * desc.head_dim_v) as usize;
        Step {
            k: draw(cache),
            v: draw(cache),
            q: (0..tokens * 64).map(|i| (i % 7) as f32 / 7.0).collect(),
            length: vec![9; batch],
            out: vec![7.0; tokens * plan.heads().len() * 16],
            lse: vec![7.0; tokens * plan.heads().len()],
        }
    }

    /// # Safety
    /// The buffers outlive the step, and are left alone until it is done.
    pub unsafe fn issue(&mut self, plan: &Plan, stream: Option<&Stream>) -> Result<()> {
        let args = DecodeArgs {
            batch: self.length.len() as i32,
            query_tokens: (self.q.len() / 64) as i32,
            q: Tensor::from_slice(&self.q),
            k: Tensor::from_slice(&self.k),
            v: Tensor::from_slice(&self.v),
            out: Tensor::from_slice_mut(&mut self.out),
            lse: Tensor::from_slice_mut(&mut self.lse),
            kv_length: self.length.as_ptr(),
            ..DecodeArgs::default()
        };
        // SAFETY: as above.
        unsafe { plan.decode(&args, stream) }
    }
}

pub fn on_ranks<T: Send>(world: usize, config: &CommConfig, run: impl Fn(&Mesh, &Communicator) -> T + Sync) -> Vec<T> {
    let _watchdog = Watchdog::new("ranks over a transport", 3 * LONG);
    let meshes = Mesh::threads(world, unix_pairs);
    thread::scope(|scope| {
        let threads: Vec<_> = meshes
            .iter()
            .map(|mesh| {
                let run = &run;
                scope.spawn(move || run(mesh, &connect(mesh, config).unwrap()))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// What the ranks of a local group give, rank by rank, as nodes of these groups.
pub fn in_one_process(desc: &AttentionDesc, groups: &[i32], tokens: usize) -> Vec<(Vec<f32>, Vec<f32>)> {
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let config = CommConfig { node_groups: groups.to_vec(), ..config(LONG) };
    let comms = Communicator::create_local(&runtime, &vec![CPU; groups.len()], &config).unwrap();
    let plans = Plan::create_all(&comms.iter().collect::<Vec<_>>(), desc).unwrap();
    thread::scope(|scope| {
        let ranks = plans.iter().enumerate();
        let threads: Vec<_> =
            ranks.map(|(r, plan)| scope.spawn(move || decode(plan, r, tokens, None).unwrap())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// One rank less is to be waited for when this goes.
pub struct Undone<'a>(pub &'a AtomicUsize);

impl Drop for Undone<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Waits until no rank is left. Who panics is done, too.
pub fn wait_for_all(undone: &AtomicUsize) {
    while undone.load(Ordering::SeqCst) > 0 {
        thread::sleep(Duration::from_millis(5));
    }
}
