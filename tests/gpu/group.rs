//! Several ranks on GPUs, driven by one thread.

use std::time::Duration;

use treeattn::attention::AttentionDesc;
use treeattn::runtime::{CommConfig, Communicator, Device, Plan, Runtime, RuntimeConfig, Stream};

use crate::driver::{Current, Pause, RawStream};
use crate::mirror::{GPU, Gpu, Mirror};
use crate::support::case::Case;
use crate::support::rank::Rank;

/// How many nodes the ranks of groups take turns over, where the process was started for that.
pub fn nodes() -> Option<i32> {
    std::env::var("TREEATTN_TEST_NODES").ok()?.parse().ok()
}

/// The ranks of a communicator, each with a stream of its own.
pub struct Group {
    pub gpus: Vec<Gpu>,
    pub comms: Vec<Communicator>,
}

impl Group {
    /// A rank on each of the first `world` GPUs.
    pub fn new(world: usize, step_timeout: Duration) -> Group {
        Group::over(world, world, step_timeout)
    }

    /// `world` ranks that take turns over the first `count` GPUs.
    pub fn over(world: usize, count: usize, step_timeout: Duration) -> Group {
        Group::starting_at(world, count, step_timeout, 0)
    }

    /// The same, with the epoch after `start` first.
    pub fn starting_at(world: usize, count: usize, step_timeout: Duration, start: u32) -> Group {
        let devices: Vec<i32> = (0..world).map(|rank| (rank % count) as i32).collect();
        let node_groups = nodes().map_or(Vec::new(), |nodes| (0..world as i32).map(|rank| rank % nodes).collect());
        let config = CommConfig { step_timeout, node_groups, ..CommConfig::default() };
        Group::on(&devices, &config, start)
    }

    /// Ranks on these GPUs.
    pub fn on(devices: &[i32], config: &CommConfig, start: u32) -> Group {
        let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
        let devices: Vec<Device> = devices.iter().map(|&ordinal| Device { ordinal, ..GPU }).collect();
        let comms = Communicator::create_local_at(&runtime, &devices, config, start).unwrap();
        let gpus = devices.iter().map(|device| Gpu::numbered(&runtime, device.ordinal)).collect();
        Group { gpus, comms }
    }

    pub fn plans(&self, desc: &AttentionDesc) -> Vec<Plan> {
        Plan::create_all(&self.comms.iter().collect::<Vec<_>>(), desc).unwrap()
    }

    /// Enqueues one step of all ranks.
    pub fn enqueue(&self, plans: &[Plan], mirrors: &[Mirror]) {
        for ((gpu, plan), mirror) in self.gpus.iter().zip(plans).zip(mirrors) {
            // SAFETY: the device memory outlives the step: callers wait for it.
            unsafe { plan.decode(&mirror.args, Some(&gpu.stream)) }.unwrap();
        }
    }

    /// One step of all ranks, waited for, with its outputs brought back.
    pub fn step(&self, plans: &[Plan], mirrors: &[Mirror], ranks: &mut [Rank]) {
        self.enqueue(plans, mirrors);
        for ((gpu, mirror), rank) in self.gpus.iter().zip(mirrors).zip(ranks) {
            gpu.stream.synchronize().unwrap();
            mirror.fetch(rank);
        }
    }

    pub fn mirrors(&self, ranks: &[Rank]) -> Vec<Mirror> {
        self.gpus.iter().zip(ranks).map(|(gpu, rank)| Mirror::new(gpu, rank)).collect()
    }

    /// What each rank reports.
    pub fn errors(&self) -> Vec<Option<treeattn::Error>> {
        self.comms.iter().map(|comm| comm.status().unwrap().error).collect()
    }
}

/// A stream of the test's own that a rank's steps can be enqueued on, held up, and captured. A context must be current
/// when it is dropped.
pub struct OwnStream {
    pub stream: Stream,
    pub raw: RawStream,
    pub ordinal: i32,
    pause: Pause,
}

impl OwnStream {
    pub fn new(gpu: &Gpu) -> OwnStream {
        let ordinal = gpu.device.ordinal;
        let _current = Current::new(ordinal);
        let raw = RawStream::new();
        // SAFETY: the raw stream is dropped after the wrapped one.
        let stream = unsafe { Stream::wrap_cuda(&gpu.runtime, gpu.device, raw.pointer()) }.unwrap();
        OwnStream { stream, raw, ordinal, pause: Pause::new(ordinal) }
    }

    /// What is enqueued after this waits for about `time` more.
    pub fn pause(&self, time: Duration) {
        self.pause.enqueue(&self.raw, time);
    }
}

/// The memory of all ranks of a case.
pub fn ranks(case: &Case) -> Vec<Rank> {
    (0..case.world).map(|rank| Rank::new(case, rank)).collect()
}
