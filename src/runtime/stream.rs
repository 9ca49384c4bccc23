//! Streams: in-order queues of steps. On the CPU a stream is a queue with a thread of its own.

use std::time::Duration;

use super::context::Runtime;
use super::execute;
use super::merge::{self, MergeInput};
use super::plan::InFlight;
use crate::attention::Step;
use crate::device::{Device, DeviceKind, Queue};
use crate::error::{Error, Result};

/// Steps that a stream holds before enqueueing waits.
const QUEUE_CAPACITY: usize = 1024;

/// One piece of work on a stream, by value, so that enqueueing allocates nothing.
#[allow(clippy::large_enum_variant)] // boxing would allocate on every step
pub(super) enum Job {
    Decode { plan: InFlight, step: Step },
    Partial { plan: InFlight, step: Step },
    Merge { plan: InFlight, input: MergeInput },
    MergePartials { input: MergeInput, count: usize },
}

/// An in-order queue of steps on one device.
pub struct Stream {
    runtime: Runtime,
    device: Device,
    queue: Queue<Job>,
}

impl Stream {
    /// A stream on `device`. On the CPU it runs its steps on a thread of its own.
    pub fn new(runtime: &Runtime, device: Device) -> Result<Stream> {
        runtime.check_device(device)?;
        let queue = Queue::new(QUEUE_CAPACITY, "treeattn-stream", run)?;
        Ok(Stream { runtime: runtime.clone(), device, queue })
    }

    /// Waits until everything enqueued so far is done. Returns the first error since the last call and forgets it.
    pub fn synchronize(&self) -> Result<()> {
        self.runtime.check_open()?;
        self.queue.synchronize()
    }

    /// The stream's device.
    pub fn device(&self) -> Device {
        self.device
    }

    pub(super) fn push(&self, job: Job, timeout: Duration) -> Result<()> {
        self.queue.push(job, timeout)
    }

    pub(super) fn check_kind(&self, kind: DeviceKind) -> Result<()> {
        self.runtime.check_open()?;
        if self.device.kind != kind {
            let wanted = format!("a stream of a {kind:?} device");
            return Err(Error::invalid("stream", format!("a stream of a {:?} device", self.device.kind), wanted));
        }
        Ok(())
    }
}

fn run(job: Job) -> Result<()> {
    match job {
        Job::Decode { plan, step } => execute::decode(plan.plan(), &step),
        Job::Partial { plan, step } => execute::partial(plan.plan(), &step),
        Job::Merge { plan, input } => execute::merge(plan.plan(), &input),
        Job::MergePartials { input, count } => merge::run_partials(&input, count),
    }
}
