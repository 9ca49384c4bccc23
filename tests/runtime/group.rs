//! Groups of ranks on threads, and what each rank holds.

use std::thread;
use std::time::Duration;

use treeattn::Result;
use treeattn::attention::{Algorithm, AttentionDesc, DecodeArgs, Tensor};
use treeattn::runtime::{CommConfig, Communicator, Device, DeviceKind, Plan, Runtime, RuntimeConfig};

use super::watchdog::Watchdog;

pub const CPU: Device = Device { kind: DeviceKind::Cpu, ordinal: 0 };
/// No wait of these tests may come near this; it only guards against a hang.
pub const HANG: Duration = Duration::from_secs(60);

pub fn group(world: usize, config: &CommConfig) -> (Runtime, Vec<Communicator>) {
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let comms = Communicator::create_local(&runtime, &vec![CPU; world], config).unwrap();
    (runtime, comms)
}

pub fn quick(step: Duration) -> CommConfig {
    CommConfig { step_timeout: step, threads_per_rank: 1, ..CommConfig::default() }
}

/// A shard of pseudo-random values and room for the outputs of one rank.
pub struct Shard {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
    pub length: Vec<i32>,
}

impl Shard {
    pub fn new(desc: &AttentionDesc, batch: usize, length: i32, seed: u32) -> Shard {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
        let mut draw = |n: usize| -> Vec<f32> {
            (0..n)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / (1 << 23) as f32 - 1.0
                })
                .collect()
        };
        let (heads, kv, dim) = (desc.q_heads as usize, desc.kv_heads as usize, desc.head_dim_v as usize);
        let cache = batch * desc.max_kv_length as usize * kv * dim;
        let mut shard = Shard {
            q: Vec::new(),
            k: draw(cache),
            v: draw(cache),
            out: vec![7.0; batch * heads * dim],
            lse: vec![7.0; batch * heads],
            length: vec![length; batch],
        };
        // Queries are the same on every rank.
        state = 99;
        shard.q = (0..batch * heads * dim)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect();
        shard
    }

    pub fn args(&mut self, batch: usize) -> DecodeArgs {
        DecodeArgs {
            batch: batch as i32,
            query_tokens: batch as i32,
            q: Tensor::from_slice(&self.q),
            k: Tensor::from_slice(&self.k),
            v: Tensor::from_slice(&self.v),
            out: Tensor::from_slice_mut(&mut self.out),
            lse: Tensor::from_slice_mut(&mut self.lse),
            kv_length: self.length.as_ptr(),
            ..DecodeArgs::default()
        }
    }
}

pub fn shape() -> AttentionDesc {
    AttentionDesc { max_batch: 4, max_query_tokens: 4, ..AttentionDesc::new(4, 2, 16, 64) }
}

/// Every algorithm of CPU ranks.
pub const ALGORITHMS: [Algorithm; 5] =
    [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Tree, Algorithm::Allreduce3, Algorithm::Ring];

/// The plans of all ranks.
pub fn plan_all(comms: &[Communicator], desc: &AttentionDesc) -> Vec<Plan> {
    Plan::create_all(&comms.iter().collect::<Vec<_>>(), desc).unwrap()
}

/// Runs `rank` once a rank, each on a thread of its own, and gives what each returned.
pub fn on_threads<T: Send>(world: usize, rank: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let _watchdog = Watchdog::new("ranks on threads", HANG + HANG);
    thread::scope(|scope| {
        let rank = &rank;
        let threads: Vec<_> = (0..world).map(|r| scope.spawn(move || rank(r))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

pub fn decode_all(comms: &[Communicator], desc: &AttentionDesc, length: i32) -> Vec<Result<(Vec<f32>, Vec<f32>)>> {
    on_threads(comms.len(), |r| {
        let plan = Plan::create(&comms[r], desc)?;
        let mut shard = Shard::new(desc, 2, length, r as u32);
        // SAFETY: the shard outlives the blocking call.
        unsafe { plan.decode(&shard.args(2), None)? };
        Ok((shard.out, shard.lse))
    })
}

pub fn assert_works(world: usize) {
    let (_runtime, comms) = group(world, &quick(Duration::from_secs(20)));
    let results = decode_all(&comms, &shape(), 5);
    let first = results[0].as_ref().unwrap();
    for result in &results {
        assert_eq!(result.as_ref().unwrap(), first);
    }
}
