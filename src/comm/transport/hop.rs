//! Messages from rank to rank over the engine's sendrecv.

use std::sync::atomic::Ordering;

use super::{Buffers, FIRST, HEADER, Limit, MAGIC, TransportExchange, bytes_of, lock, word};
use crate::comm::{Hop, verdict};
use crate::error::{Error, ErrorKind, Result};

impl TransportExchange {
    /// One call of the engine's sendrecv.
    fn swap(&self, hop: &Hop, send: &[u8], recv: &mut [u8], limit: &Limit<'_>) -> Result<()> {
        let Some(sendrecv) = self.transport.sendrecv else {
            return Err(Error::unsupported("transport.sendrecv", "none", "a function"));
        };
        self.call("sendrecv", limit, |left, abort| {
            let (ctx, to, from) = (self.transport.ctx, hop.to as i32, hop.from as i32);
            let (data, bytes) = (send.as_ptr().cast(), send.len());
            // SAFETY: as in `gather`.
            unsafe { sendrecv(ctx, data, bytes, to, recv.as_mut_ptr().cast(), recv.len(), from, left, abort) }
        })
    }

    /// A hop: a message of a fixed size each way, which tells ranks that are out of step; then what it had no room for.
    pub(super) fn meet(&self, hop: &Hop, send: &[u8], recv: &mut [u8]) -> Result<u64> {
        let (number, steps) = (hop.index, self.steps.load(Ordering::Relaxed));
        let what = || format!("step {steps}, hop {number}");
        let limit = Limit {
            what: &what,
            peer: &[hop.from],
            until: hop.until,
            field: "step_timeout",
            timeout: self.step_timeout,
        };
        let mut buffers = lock(&self.buffers);
        let Buffers { send: own, first, .. } = &mut *buffers;
        let (own, first) = (&mut bytes_of(own)[..HEADER + FIRST], &mut bytes_of(first)[..HEADER + FIRST]);
        let mine = [MAGIC, hop.header.fingerprint, send.len() as u64, hop.header.fault, u64::from(number), steps];
        for (to, value) in own.chunks_exact_mut(8).zip(mine) {
            to.copy_from_slice(&value.to_le_bytes());
        }
        if send.len() <= FIRST {
            own[HEADER..][..send.len()].copy_from_slice(send);
        }
        self.swap(hop, own, first, &limit)?;
        if word(first, 0) != MAGIC {
            let message = format!("{}: rank {} sent no message of this library's version", what(), hop.from);
            return Err(Error::new(ErrorKind::Desync, message).with_rank(hop.from as i32));
        }
        let wanted = [hop.header.fingerprint, recv.len() as u64, u64::from(number), steps];
        if [1, 2, 4, 5].map(|i| word(first, i)) != wanted {
            return Err(verdict::differs(&what(), self.shard.rank as usize, hop.from));
        }
        let fault = word(first, 3);
        let mut rest: (&[u8], &mut [u8]) = (&[], &mut []);
        if send.len() > FIRST {
            rest.0 = send;
        }
        if recv.len() > FIRST {
            rest.1 = recv;
        } else {
            recv.copy_from_slice(&first[HEADER..][..recv.len()]);
        }
        if !rest.0.is_empty() || !rest.1.is_empty() {
            self.swap(hop, rest.0, rest.1, &limit)?;
        }
        Ok(fault)
    }
}
