//! What the kernels of a plan and the host tell each other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::comm::nccl::NcclDeadline;
use crate::comm::{ANY_FAULT, COUNTS, FAILURE, PlanLease};
use crate::cuda::{STEP_BAD_DATA, STEPS_BEGUN, STEPS_ENDED};
use crate::device::cuda::{CudaDevice, CudaStream, Staging};
use crate::error::Result;

/// How long the word that makes outputs NaN may take to reach the device.
const COPY_TIMEOUT: Duration = Duration::from_millis(200);
/// Pause between two looks at a stream.
const PAUSE: Duration = Duration::from_micros(100);
/// The words of the lease that the kernels count in; their bad data is the lease's.
const BEGUN: usize = COUNTS + STEPS_BEGUN;
const ENDED: usize = COUNTS + STEPS_ENDED;
const _: () = assert!(ANY_FAULT == COUNTS + STEP_BAD_DATA);

/// Counts in mapped host memory, and a device word that ends all steps.
pub(in crate::route) struct StepWords {
    lease: Arc<PlanLease>,
    /// Its device side is a word that is not 0 once outputs shall be NaN.
    failed: Mutex<Staging>,
}

impl StepWords {
    /// The words of a plan. Dropping them waits for the device at most `timeout`. Blocks; `Capturing` during a capture.
    pub fn new(device: &Arc<CudaDevice>, lease: &Arc<PlanLease>, timeout: Duration) -> Result<StepWords> {
        let failed = Mutex::new(Staging::new(device, size_of::<u64>(), timeout)?);
        Ok(StepWords { lease: Arc::clone(lease), failed })
    }

    /// The device's address of the word that says that the communicator is broken.
    pub fn failed(&self) -> u64 {
        self.failed.lock().address()
    }

    /// The device's address of the mapped words: steps begun, steps ended, bad data.
    pub fn host(&self) -> u64 {
        self.lease.address(COUNTS)
    }

    /// The device's address of the mapped word for the failure that a step has found.
    pub fn failure(&self) -> u64 {
        self.lease.address(FAILURE)
    }

    /// Bytes of device memory.
    pub fn memory(&self) -> usize {
        size_of::<u64>()
    }

    /// Steps that kernels have begun, and ended.
    pub fn steps(&self) -> (u64, u64) {
        (self.lease.load(BEGUN), self.lease.load(ENDED))
    }

    /// Calls `body` with a stream apart from the caller's work.
    pub fn with_stream(&self, body: impl FnOnce(&CudaStream) -> Result<()>) -> Result<()> {
        body(self.failed.lock().stream())
    }

    /// Waits until that stream has nothing to do.
    pub fn drain(&self, what: &str, deadline: NcclDeadline) -> Result<()> {
        while !self.failed.lock().is_done()? {
            if Instant::now() >= deadline.until {
                return Err(deadline.expired(what));
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Makes the outputs of steps that end from now on NaN.
    pub fn fail_steps(&self) {
        // A device that takes no copy any more runs no kernel either.
        // SAFETY: nothing else is ever uploaded, and nothing downloaded.
        if unsafe { self.failed.lock().upload(0, &1u64.to_le_bytes()) }.is_ok() {
            let _ = self.drain("", NcclDeadline::new("", COPY_TIMEOUT));
        }
    }
}
