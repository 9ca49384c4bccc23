//! Streams: in-order queues of steps. On the CPU a stream is a queue with a thread of its own, on a GPU a CUDA stream.

use std::ffi::c_void;
use std::sync::{Arc, Weak};
use std::time::Duration;

use once_cell::sync::OnceCell;
use parking_lot::Mutex;

use super::communicator::CommCore;
use super::context::Runtime;
use crate::cuda::{Merge, MergeStep};
use crate::device::cuda::{CudaDevice, CudaStream};
use crate::device::{Device, DeviceKind, Queue};
use crate::error::{Error, Result};

/// Steps that a stream holds before enqueueing waits.
const QUEUE_CAPACITY: usize = 1024;

/// An in-order queue of steps on one device.
pub struct Stream {
    runtime: Runtime,
    device: Device,
    kind: Kind,
    /// On a GPU, the communicator whose exchange was enqueued last.
    exchanged: Mutex<Weak<CommCore>>,
}

enum Kind {
    Cpu(Queue),
    /// With what merges given partials on it.
    Cuda(CudaStream, OnceCell<Merge>),
}

impl Stream {
    /// A stream on `device`. On the CPU it runs its steps on a thread of its own; on a GPU it is a stream that does not
    /// wait for the legacy default stream (`Capturing` during a capture).
    pub fn new(runtime: &Runtime, device: Device) -> Result<Stream> {
        runtime.check_device(device)?;
        let kind = match device.kind {
            DeviceKind::Cpu => Kind::Cpu(Queue::new(QUEUE_CAPACITY, "treeattn-stream")?),
            DeviceKind::Cuda => Kind::cuda(CudaStream::new(&CudaDevice::get(device)?)?),
        };
        Ok(Stream { runtime: runtime.clone(), device, kind, exchanged: Mutex::default() })
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
        // SAFETY: as the caller vouches.
        let stream = unsafe { CudaStream::wrap(&CudaDevice::get(device)?, cuda_stream) }?;
        Ok(Stream { runtime: runtime.clone(), device, kind: Kind::cuda(stream), exchanged: Mutex::default() })
    }

    /// Waits until everything enqueued so far is done. On the CPU it returns the first error since the last call and
    /// forgets it; on a GPU, an asynchronous error of the device (`Capturing` while the stream is captured), or why the
    /// communicator is broken whose exchange was enqueued here last.
    pub fn synchronize(&self) -> Result<()> {
        self.runtime.check_open()?;
        match &self.kind {
            Kind::Cpu(queue) => queue.synchronize(),
            Kind::Cuda(stream, _) => {
                stream.synchronize()?;
                let exchanged = self.exchanged.lock().upgrade();
                exchanged.map_or(Ok(()), |comm| comm.check_whole())
            }
        }
    }

    /// Remembers whose exchange was enqueued, to tell of its failure.
    pub(super) fn exchanged(&self, comm: &Arc<CommCore>) {
        let mut last = self.exchanged.lock();
        if !std::ptr::eq(last.as_ptr(), Arc::as_ptr(comm)) {
            *last = Arc::downgrade(comm);
        }
    }

    /// `Capturing` while a capture forbids destroying the stream.
    pub fn check_destroy(&self) -> Result<()> {
        match &self.kind {
            Kind::Cpu(_) => Ok(()),
            Kind::Cuda(stream, _) => stream.check_destroy(),
        }
    }

    /// The stream's device.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Puts a step of a CPU device on the stream.
    pub(super) fn push<F>(&self, step: F, timeout: Duration) -> Result<()>
    where
        F: FnOnce() -> Result<()> + Send + 'static,
    {
        self.runtime.check_open()?;
        match &self.kind {
            Kind::Cpu(queue) => queue.push(step, timeout),
            Kind::Cuda(..) => Err(self.foreign(Device::CPU)),
        }
    }

    /// The CUDA stream of a step of `device`.
    pub(super) fn cuda(stream: Option<&Stream>, device: Device) -> Result<&CudaStream> {
        Ok(Stream::cuda_parts(stream, device)?.0)
    }

    /// Merges given partials on a GPU.
    pub(super) fn merge(stream: Option<&Stream>, device: Device, step: &MergeStep) -> Result<()> {
        let (stream, merge) = Stream::cuda_parts(stream, device)?;
        merge.get_or_try_init(|| Merge::new(stream.device()))?.enqueue(step, stream)
    }

    fn cuda_parts(stream: Option<&Stream>, device: Device) -> Result<(&CudaStream, &OnceCell<Merge>)> {
        let Some(stream) = stream else {
            return Err(Error::invalid("stream", "NULL", format!("a stream of {device}")));
        };
        stream.runtime.check_open()?;
        match &stream.kind {
            Kind::Cuda(cuda, merge) if stream.device == device => Ok((cuda, merge)),
            _ => Err(stream.foreign(device)),
        }
    }

    fn foreign(&self, wanted: Device) -> Error {
        Error::invalid("stream", format!("a stream of {}", self.device), format!("a stream of {wanted}"))
    }
}

impl Kind {
    /// Makes the merge ready, if it can be now: in a capture it cannot, and a build may have no kernels.
    fn cuda(stream: CudaStream) -> Kind {
        let merge = Merge::new(stream.device()).map_or_else(|_| OnceCell::new(), OnceCell::with_value);
        Kind::Cuda(stream, merge)
    }
}
