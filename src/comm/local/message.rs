//! The messages of a local group: a rank posts where its bytes lie, and the receiver copies them from there.
//!
//! A rank has one [`MessageSlot`], and so one message under way at a time. The sender goes on when its message was taken, or
//! withdraws it: bytes are never read after [`PostedMessage`] is gone. Only a receiver that is copying at that moment is waited
//! for, and it waits for nobody.

use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};

use crate::comm::rounds::RoundHeader;

const FREE: u64 = 0;
const POSTED: u64 = 1;
const COPYING: u64 = 2;
const TAKEN: u64 = 3;

/// Where a rank leaves its message. All words are written by the rank itself, but for the state, which the receiver
/// moves on.
#[repr(align(128))]
#[derive(Debug, Default)]
pub(super) struct MessageSlot {
    /// The key of the message, shifted by two, and one of the states.
    state: AtomicU64,
    to: AtomicUsize,
    data: AtomicPtr<u8>,
    len: AtomicUsize,
    fingerprint: AtomicU64,
    fault: AtomicU64,
}

/// A message that a receiver has claimed; it is the only one to read it until it is finished.
pub(super) struct ClaimedMessage<'a> {
    slot: &'a MessageSlot,
    key: u64,
}

/// A posted message. Dropping it takes it back, and waits for a copy under way.
pub(super) struct PostedMessage<'a> {
    slot: &'a MessageSlot,
    key: u64,
}

impl MessageSlot {
    /// Posts `bytes` to rank `to`. Keys never come again.
    ///
    /// # Safety
    /// `bytes` outlives the returned value, which is dropped and not forgotten.
    pub unsafe fn put(&self, key: u64, to: usize, header: RoundHeader, bytes: &[u8]) -> PostedMessage<'_> {
        self.to.store(to, Ordering::Relaxed);
        self.data.store(bytes.as_ptr().cast_mut(), Ordering::Relaxed);
        self.len.store(bytes.len(), Ordering::Relaxed);
        self.fingerprint.store(header.fingerprint, Ordering::Relaxed);
        self.fault.store(header.fault, Ordering::Relaxed);
        self.state.store(key << 2 | POSTED, Ordering::Release);
        PostedMessage { slot: self, key }
    }

    /// Whether the message of this key lies here for rank `me`.
    pub fn is_for(&self, key: u64, me: usize) -> bool {
        self.state.load(Ordering::Acquire) == key << 2 | POSTED && self.to.load(Ordering::Relaxed) == me
    }

    /// Claims the message, unless it was taken back.
    pub fn claim(&self, key: u64, me: usize) -> Option<ClaimedMessage<'_>> {
        if !self.is_for(key, me) {
            return None;
        }
        let copying =
            self.state.compare_exchange(key << 2 | POSTED, key << 2 | COPYING, Ordering::AcqRel, Ordering::Relaxed);
        copying.ok().map(|_| ClaimedMessage { slot: self, key })
    }
}

impl ClaimedMessage<'_> {
    pub fn header(&self) -> RoundHeader {
        RoundHeader {
            fingerprint: self.slot.fingerprint.load(Ordering::Relaxed),
            fault: self.slot.fault.load(Ordering::Relaxed),
        }
    }

    pub fn len(&self) -> usize {
        self.slot.len.load(Ordering::Relaxed)
    }

    /// Copies the message, which has that many bytes.
    pub fn copy(&self, to: &mut [u8]) {
        assert_eq!(to.len(), self.len());
        // SAFETY: `put` promised that the bytes live as long as the posted message, whose drop waits while the state says
        // COPYING, which it does until this claim is dropped; they are borrowed, so nobody writes them. The length was
        // compared above, and `to` is another rank's exclusive borrow. A message of no bytes copies nothing.
        unsafe { std::ptr::copy_nonoverlapping(self.slot.data.load(Ordering::Relaxed), to.as_mut_ptr(), to.len()) };
    }
}

impl Drop for ClaimedMessage<'_> {
    fn drop(&mut self) {
        self.slot.state.store(self.key << 2 | TAKEN, Ordering::Release);
    }
}

impl PostedMessage<'_> {
    /// Whether the receiver is done with it.
    pub fn is_taken(&self) -> bool {
        self.slot.state.load(Ordering::Acquire) == self.key << 2 | TAKEN
    }
}

impl Drop for PostedMessage<'_> {
    fn drop(&mut self) {
        let (posted, free) = (self.key << 2 | POSTED, self.key << 2 | FREE);
        if self.slot.state.compare_exchange(posted, free, Ordering::AcqRel, Ordering::Acquire).is_err() {
            while !self.is_taken() {
                std::thread::yield_now();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: RoundHeader = RoundHeader { fingerprint: 5, fault: 6 };

    #[test]
    fn a_message_is_taken_once_by_whom_it_is_for() {
        let slot = MessageSlot::default();
        let bytes = [1, 2, 3];
        // SAFETY: the bytes live to the end of the test.
        let posted = unsafe { slot.put(9, 4, HEADER, &bytes) };
        assert!(slot.claim(9, 3).is_none() && slot.claim(8, 4).is_none() && !posted.is_taken());
        let claim = slot.claim(9, 4).unwrap();
        assert!(slot.claim(9, 4).is_none());
        let mut copy = [0; 3];
        claim.copy(&mut copy);
        assert_eq!((copy, claim.header().fingerprint, claim.header().fault), (bytes, 5, 6));
        drop(claim);
        assert!(posted.is_taken());
    }

    #[test]
    fn a_message_taken_back_is_gone_and_a_copy_under_way_is_waited_for() {
        let slot = MessageSlot::default();
        // SAFETY: the message is dropped at once.
        drop(unsafe { slot.put(1, 0, HEADER, &[7]) });
        assert!(slot.claim(1, 0).is_none());
        for key in 2..200 {
            let bytes = vec![key as u8; 4096];
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for _ in 0..50 {
                        if let Some(claim) = slot.claim(key, 0) {
                            let mut copy = vec![0; 4096];
                            claim.copy(&mut copy);
                            assert!(copy.iter().all(|&byte| byte == key as u8));
                            return;
                        }
                    }
                });
                // SAFETY: the bytes outlive the message.
                drop(unsafe { slot.put(key, 0, HEADER, &bytes) });
            });
            drop(bytes);
        }
    }
}
