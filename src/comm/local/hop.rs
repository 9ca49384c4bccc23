//! Opening steps, and messages from rank to rank.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::group::Absence;
use super::{LocalExchange, tag};
use crate::comm::{Hop, MAX_HOPS, RoundHeader, verdict};
use crate::error::{Error, Result};
use crate::fault;
use crate::partial::epoch::{Epoch, Header};

impl LocalExchange {
    /// The step that was opened last.
    pub(super) fn opened(&self) -> Epoch {
        Epoch::from_flag(self.own().opening.load(Ordering::Relaxed))
    }

    /// The rank that this one takes for odd in the openings of that step: each has its own view.
    pub(super) fn odd(&self) -> Option<Error> {
        self.group.odd_opening(self.rank, self.opened())
    }

    /// Opens a step; the last rank to do so compares what all said.
    pub(super) fn open_step(&self, fingerprint: u64) -> Result<()> {
        let (group, own) = (&*self.group, self.own());
        let epoch = self.opened().next();
        own.opening.store(epoch.flag(), Ordering::Relaxed);
        own.steps.fetch_add(1, Ordering::Relaxed);
        own.opened[epoch.slot()].0.publish(epoch, Header { fingerprint, fault: 0 });
        if group.openings.0.arrive(epoch, group.ranks.len())
            && let Some(error) = self.odd()
        {
            return Err(error);
        }
        Ok(())
    }

    /// A hop: posts this rank's bytes, does what is to be done meanwhile, copies the peer's, and waits until its own are
    /// taken.
    pub(super) fn meet(
        &self,
        hop: &Hop,
        send: &[u8],
        recv: &mut [u8],
        meanwhile: &mut dyn FnMut() -> Result<()>,
    ) -> Result<u64> {
        let (group, own, step) = (&*self.group, self.own(), self.opened());
        let world = group.ranks.len();
        if hop.to >= world || hop.from >= world || hop.index >= MAX_HOPS {
            let found = format!("to {}, from {}, index {}", hop.to, hop.from, hop.index);
            return Err(Error::invalid("hop", found, format!("ranks below {world}, an index below {MAX_HOPS}")));
        }
        let number = own.steps.load(Ordering::Relaxed);
        let key = number * u64::from(MAX_HOPS) + u64::from(hop.index);
        fault::point_at("comm.post", self.rank as i32)?;
        let header = RoundHeader { fingerprint: tag(hop.header.fingerprint, send.len()), fault: hop.header.fault };
        // SAFETY: `send` is borrowed for longer than the message, which this function drops on every way out.
        let posted = unsafe { own.post.put(key, hop.to, header, send) };
        group.ranks[hop.to].bell.ring();
        let began = Instant::now();
        meanwhile()?;
        fault::point_at("comm.hop", self.rank as i32)?;
        let from = &group.ranks[hop.from];
        let absent = |rank: usize| group.opening(rank, step).is_none();
        let what = || format!("step {number}, hop {}", hop.index);
        // What this rank did meanwhile was no waiting.
        let limit = self.step_limit(&own.bell, hop.until + began.elapsed());
        let unsent = |rank: usize| match rank {
            _ if absent(rank) => Absence::Absent,
            _ if rank == hop.from && !from.post.is_for(key, self.rank) => Absence::Waited,
            _ => Absence::Here,
        };
        let claim = loop {
            group.wait(|| from.post.is_for(key, self.rank), unsent, what, limit)?;
            // A message that was taken back in between: its sender has failed, and is about to say why.
            if let Some(claim) = from.post.claim(key, self.rank) {
                break claim;
            }
        };
        let theirs = claim.header();
        if theirs.fingerprint != tag(hop.header.fingerprint, recv.len()) || claim.len() != recv.len() {
            drop(claim);
            // The openings tell who is odd, once all are there.
            let unopened = |rank: usize| if absent(rank) { Absence::Absent } else { Absence::Here };
            group.wait(|| !(0..world).any(absent), unopened, what, limit)?;
            let odd = self.odd();
            return Err(odd.unwrap_or_else(|| verdict::differs(&what(), self.rank, hop.from)));
        }
        claim.copy(recv);
        drop(claim);
        from.bell.ring();
        fault::point_at("comm.copied", self.rank as i32)?;
        let unread = |rank: usize| match rank {
            _ if absent(rank) => Absence::Absent,
            _ if rank == hop.to && !posted.is_taken() => Absence::Waited,
            _ => Absence::Here,
        };
        group.wait(|| posted.is_taken(), unread, what, limit)?;
        Ok(theirs.fault)
    }
}
