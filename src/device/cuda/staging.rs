//! Copies to and from a device on a stream of their own, which never block: whoever waits for one can give up.

use std::sync::Arc;
use std::time::Duration;

use super::allocations::{Allocations, MappedWords};
use super::context::CudaDevice;
use super::stream::CudaStream;
use crate::error::{Error, Result};

/// `CUDA_ERROR_NOT_READY`: the stream still has work.
const NOT_READY: u32 = 600;

/// A piece of device memory, as much page-locked host memory, and a stream for the copies between them. Enqueueing and asking
/// do not block.
pub(crate) struct Staging {
    stream: CudaStream,
    words: MappedWords,
    data: u64,
    bytes: usize,
    /// Declared after the stream, so that the memory is freed after its work.
    _allocations: Allocations,
}

impl Staging {
    /// `bytes` bytes on both sides. Dropping it waits at most `timeout` for the device. Blocks; `Capturing` during a capture.
    pub fn new(device: &Arc<CudaDevice>, bytes: usize, timeout: Duration) -> Result<Staging> {
        let stream = CudaStream::new(device)?;
        let mut allocations = Allocations::new(device, timeout);
        let data = allocations.memory(bytes)?;
        let words = allocations.words(bytes.div_ceil(size_of::<u64>()))?;
        Ok(Staging { stream, words, data, bytes, _allocations: allocations })
    }

    /// The stream of the copies.
    pub fn stream(&self) -> &CudaStream {
        &self.stream
    }

    /// The address of the device side.
    pub fn address(&self) -> u64 {
        self.data
    }

    /// Enqueues the copy of `bytes` to the device side from `offset` on.
    ///
    /// # Safety
    /// The stream has no work under way that uses that part of either side, unless it is an upload of the same bytes.
    pub unsafe fn upload(&mut self, offset: usize, bytes: &[u8]) -> Result<()> {
        self.check(offset, bytes.len())?;
        let device = self.stream.device();
        let entered = device.enter()?;
        // SAFETY: `check` keeps the range inside both sides, which are freed after the stream's work. The host side is written
        // under `&mut self`; the stream's work does not use this part, or reads the bytes that are there already.
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

    /// Enqueues the copy of a word to `to`, which lies elsewhere, by way of the host side at `offset`, a multiple of 8.
    ///
    /// # Safety
    /// `to` is 8 bytes of memory that this device can write, until the stream is done.
    pub unsafe fn send(&mut self, offset: usize, word: u64, to: u64) -> Result<()> {
        self.check(offset, size_of::<u64>())?;
        let device = self.stream.device();
        let entered = device.enter()?;
        // SAFETY: `check` keeps the word inside the host side, which begins at a page and is freed after the stream's work; the
        // caller keeps `to` alive until the copy is done.
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
        // SAFETY: `check` keeps the range inside both sides, which are freed after the stream's work.
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
        // SAFETY: the context is current; the stream lives as long as `self`.
        let status = unsafe { (device.driver.stream_query)(self.stream.handle()) };
        drop(entered);
        match status {
            NOT_READY => Ok(false),
            status => device.check_wait(status, "cuStreamQuery").map(|()| true),
        }
    }

    /// Waits until everything enqueued so far is done; before that, until no capture forbids it. For threads of the library.
    pub fn synchronize(&self) -> Result<()> {
        let device = self.stream.device();
        let changing = device.enter_between_captures()?;
        // SAFETY: the context is current; the stream lives as long as `self`.
        let status = unsafe { (device.driver.stream_synchronize)(self.stream.handle()) };
        device.check_wait(status, "cuStreamSynchronize")?;
        drop(changing);
        Ok(())
    }

    /// `len` bytes of the host side from `offset` on.
    ///
    /// # Safety
    /// The stream has no work under way that writes them.
    pub unsafe fn read(&self, offset: usize, len: usize) -> Result<Vec<u8>> {
        self.check(offset, len)?;
        let mut bytes = vec![0; len];
        // SAFETY: `check` keeps the range inside the host side, which this object owns; no work writes it, as this
        // function was promised.
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
