//! Bytes to and from a device on a stream of their own, so that who waits for them can give up.

use std::sync::Arc;
use std::time::Duration;

use super::context::CudaDevice;
use super::holdings::{Holdings, Words};
use super::stream::CudaStream;
use crate::error::{Error, Result};

/// What `cuStreamQuery` says of a stream that still has work.
const NOT_READY: u32 = 600;

/// Device memory with as much page-locked host memory, and a stream for the copies between them. Neither enqueueing nor
/// asking blocks.
pub(crate) struct Staging {
    stream: CudaStream,
    words: Words,
    data: u64,
    bytes: usize,
    /// After the stream: freed once it is gone.
    _holdings: Holdings,
}

impl Staging {
    /// `bytes` bytes on both sides. Giving them back waits at most `patience` for the device. Blocks; `Capturing` during
    /// a capture.
    pub fn new(device: &Arc<CudaDevice>, bytes: usize, patience: Duration) -> Result<Staging> {
        let stream = CudaStream::new(device)?;
        let mut holdings = Holdings::new(device, patience);
        let data = holdings.memory(bytes)?;
        let words = holdings.words(bytes.div_ceil(size_of::<u64>()))?;
        Ok(Staging { stream, words, data, bytes, _holdings: holdings })
    }

    /// The stream of the copies.
    pub fn stream(&self) -> &CudaStream {
        &self.stream
    }

    /// Where the device side begins.
    pub fn address(&self) -> u64 {
        self.data
    }

    /// Enqueues `bytes` for the device side from `offset` on. The stream must have no work that uses them.
    pub fn upload(&mut self, offset: usize, bytes: &[u8]) -> Result<()> {
        self.check(offset, bytes.len())?;
        let device = self.stream.device();
        let entered = device.enter()?;
        // SAFETY: inside both sides; the host side lives as long as the stream, and nothing else uses it now.
        let status = unsafe {
            let host = self.words.host().cast::<u8>().add(offset);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), host, bytes.len());
            let to = self.data + offset as u64;
            (device.driver.memcpy_htod_async)(to, host.cast(), bytes.len(), self.stream.handle())
        };
        device.check(status, "cuMemcpyHtoDAsync")?;
        drop(entered);
        Ok(())
    }

    /// Enqueues a word for memory elsewhere, by way of the host side at `offset`.
    ///
    /// # Safety
    /// `to` is memory that this device reaches, of 8 bytes, and stays so until the stream is done.
    pub unsafe fn send(&mut self, offset: usize, word: u64, to: u64) -> Result<()> {
        self.check(offset, size_of::<u64>())?;
        let device = self.stream.device();
        let entered = device.enter()?;
        // SAFETY: inside the host side, which lives as long as the stream; the rest is the caller's.
        let status = unsafe {
            let host = self.words.host().cast::<u8>().add(offset).cast::<u64>();
            host.write_volatile(word);
            (device.driver.memcpy_htod_async)(to, host.cast(), size_of::<u64>(), self.stream.handle())
        };
        device.check(status, "cuMemcpyHtoDAsync")?;
        drop(entered);
        Ok(())
    }

    /// Enqueues the copy of `len` bytes from `offset` on to the host side.
    pub fn download(&mut self, offset: usize, len: usize) -> Result<()> {
        self.check(offset, len)?;
        let device = self.stream.device();
        let entered = device.enter()?;
        // SAFETY: inside both sides; the host side lives as long as the stream.
        let status = unsafe {
            let host = self.words.host().cast::<u8>().add(offset);
            (device.driver.memcpy_dtoh_async)(host.cast(), self.data + offset as u64, len, self.stream.handle())
        };
        device.check(status, "cuMemcpyDtoHAsync")?;
        drop(entered);
        Ok(())
    }

    /// Whether everything enqueued so far is done.
    pub fn is_done(&self) -> Result<bool> {
        let device = self.stream.device();
        let entered = device.enter()?;
        // SAFETY: our own stream.
        let status = unsafe { (device.driver.stream_query)(self.stream.handle()) };
        drop(entered);
        match status {
            NOT_READY => Ok(false),
            status => device.check_wait(status, "cuStreamQuery").map(|()| true),
        }
    }

    /// Waits until everything enqueued so far is done; before that, for the end of captures that forbid it. For threads of
    /// the library.
    pub fn settle(&self) -> Result<()> {
        let device = self.stream.device();
        let changing = device.enter_between_captures()?;
        // SAFETY: our own stream.
        let status = unsafe { (device.driver.stream_synchronize)(self.stream.handle()) };
        device.check_wait(status, "cuStreamSynchronize")?;
        drop(changing);
        Ok(())
    }

    /// `len` bytes of the host side from `offset` on. The stream must be done with them.
    pub fn read(&self, offset: usize, len: usize) -> Result<Vec<u8>> {
        self.check(offset, len)?;
        let mut bytes = vec![0; len];
        // SAFETY: inside the host side, which nothing writes now.
        unsafe {
            let host = self.words.host().cast::<u8>().add(offset);
            std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), len);
        }
        Ok(bytes)
    }

    fn check(&self, offset: usize, len: usize) -> Result<()> {
        if offset.checked_add(len).is_some_and(|end| end <= self.bytes) {
            return Ok(());
        }
        Err(Error::invalid("staging", format_args!("{len} bytes at {offset}"), format_args!("{} in all", self.bytes)))
    }
}
