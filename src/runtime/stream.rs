//! Streams: in-order queues of steps. On the CPU a stream is a queue with a thread of its own, on a GPU a CUDA stream.

use std::ffi::c_void;
use std::sync::{Arc, Weak};
use std::time::Duration;

use once_cell::sync::OnceCell;
use parking_lot::Mutex;

use super::context::{Resident, Runtime};
use crate::device::cuda::{CudaDevice, CudaStream};
use crate::device::{Device, DeviceKind, Queue, node_of};
use crate::error::{Error, ErrorList, LateError, Result};

/// Steps that a stream holds before enqueueing waits.
const QUEUE_CAPACITY: usize = 1024;

/// An in-order queue of steps on one device. Any thread may use it.
pub struct Stream {
    runtime: Runtime,
    device: Device,
    kind: Kind,
    /// On a GPU, enqueued work that may fail without an error of the device.
    enqueued: Mutex<Vec<Weak<dyn LateError>>>,
    /// On a GPU, what work without a plan launches, graphs of this stream too.
    resident: OnceCell<Resident>,
}

enum Kind {
    Cpu(Queue),
    Cuda(CudaStream),
}

/// Where a step runs.
pub(super) enum RunsOn<'a> {
    /// On the calling thread.
    Caller,
    /// On the thread of a CPU stream.
    Queue(&'a Queue),
    /// On a GPU.
    Cuda(&'a CudaStream),
}

impl Stream {
    /// A stream on `device`. On the CPU it runs its steps on a thread of its own; on a GPU it is a stream that does not
    /// wait for the legacy default stream (`Capturing` during a capture).
    pub fn new(runtime: &Runtime, device: Device) -> Result<Stream> {
        runtime.check_device(device)?;
        let kind = match device.kind {
            DeviceKind::Cpu => Kind::Cpu(Queue::on(node_of(device)?, QUEUE_CAPACITY, "treeattn-stream")?),
            DeviceKind::Cuda => Kind::Cuda(CudaStream::new(&CudaDevice::get(device)?)?),
        };
        Ok(Stream::of(runtime, device, kind))
    }

    /// The caller's own CUDA stream (a `CUstream` or `cudaStream_t`; null is the legacy default stream) of the primary
    /// context of `device`. Enqueues nothing; allowed during a capture of that stream.
    ///
    /// # Safety
    /// `cuda_stream` is alive, and stays so until this object is dropped.
    pub unsafe fn wrap_cuda(runtime: &Runtime, device: Device, cuda_stream: *mut c_void) -> Result<Stream> {
        runtime.check_device(device)?;
        if device.kind != DeviceKind::Cuda {
            return Err(Error::invalid("device", device, "a CUDA device"));
        }
        // SAFETY: the caller's promise; `self` holds the wrapper, and drops it with itself.
        let stream = unsafe { CudaStream::wrap(&CudaDevice::get(device)?, cuda_stream) }?;
        Ok(Stream::of(runtime, device, Kind::Cuda(stream)))
    }

    fn of(runtime: &Runtime, device: Device, kind: Kind) -> Stream {
        let resident = match &kind {
            Kind::Cpu(_) => None,
            Kind::Cuda(stream) => runtime.prepare(stream.device()),
        };
        let resident = resident.map_or_else(OnceCell::new, OnceCell::with_value);
        Stream { runtime: runtime.clone(), device, kind, enqueued: Mutex::default(), resident }
    }

    /// Waits until everything enqueued so far is done, also where the runtime is closed. On the CPU it returns the errors
    /// since the last call as one, the first, whose message tells of the others, and forgets them; on a GPU, an asynchronous
    /// error of the device (`Capturing` while the stream is captured), or why what was enqueued here failed
    /// (see `tell_errors_of`).
    pub fn synchronize(&self) -> Result<()> {
        match &self.kind {
            Kind::Cpu(queue) => queue.synchronize(),
            Kind::Cuda(stream) => {
                stream.synchronize()?;
                let enqueued: Vec<_> = self.enqueued.lock().iter().filter_map(Weak::upgrade).collect();
                let mut errors = ErrorList::default();
                enqueued.iter().filter_map(|work| work.late_error()).for_each(|error| errors.push(error));
                errors.take().map_or(Ok(()), Err)
            }
        }
    }

    /// From now on [`Stream::synchronize`] also returns why `work` failed, which is enqueued here and may be launched again in a
    /// graph. Does not keep `work` alive.
    pub(super) fn tell_errors_of<W: LateError + 'static>(&self, work: &Arc<W>) {
        let mut known = self.enqueued.lock();
        if !known.iter().any(|known| std::ptr::addr_eq(known.as_ptr(), Arc::as_ptr(work))) {
            known.retain(|known| known.strong_count() > 0);
            let work: Weak<W> = Arc::downgrade(work);
            known.push(work);
        }
    }

    /// Keeps what work that is enqueued here launches, for as long as the stream is there.
    pub(super) fn keep(&self, resident: Resident) {
        self.resident.get_or_init(|| resident);
    }

    /// Waits until everything enqueued so far on a stream of the CPU is done, each step within its deadline, and leaves its
    /// errors to [`Stream::synchronize`]. A CUDA stream is not waited for.
    pub fn finish(&self) {
        if let Kind::Cpu(queue) = &self.kind {
            // A task of the stream itself has nothing to wait for.
            let _ = queue.finish(Duration::MAX);
        }
    }

    /// `Capturing` while a capture forbids destroying the stream.
    pub fn check_destroy(&self) -> Result<()> {
        match &self.kind {
            Kind::Cpu(_) => Ok(()),
            Kind::Cuda(stream) => stream.check_destroy(),
        }
    }

    /// The runtime that it was made from.
    pub(super) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// The stream's device.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Where a step of `device` runs. `InvalidArgument` for a stream of another device, and for none where it is a GPU.
    pub(super) fn runs_on(stream: Option<&Stream>, device: Device) -> Result<RunsOn<'_>> {
        let Some(stream) = stream else {
            return match device.kind {
                DeviceKind::Cpu => Ok(RunsOn::Caller),
                DeviceKind::Cuda => Err(Error::invalid("stream", "NULL", format!("a stream of {device}"))),
            };
        };
        stream.runtime.check_open()?;
        match &stream.kind {
            Kind::Cpu(queue) if stream.device == device => Ok(RunsOn::Queue(queue)),
            Kind::Cuda(cuda) if stream.device == device => Ok(RunsOn::Cuda(cuda)),
            _ => {
                let found = format!("a stream of {}", stream.device);
                Err(Error::invalid("stream", found, format!("a stream of {device}")))
            }
        }
    }
}
