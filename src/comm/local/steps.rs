//! Steps of a local group's rank: how one is opened, its rounds and its hops.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::group::{Absence, Group, LocalRound, WaitDeadline};
use crate::comm::call_word::CallWord;
use crate::comm::errors;
use crate::comm::rounds::{Hop, MAX_HOPS, Round, RoundHeader};
use crate::device::EventCount;
use crate::error::{Error, ErrorKind, Result};
use crate::fault;
use crate::partial::epoch::{Epoch, Header};

impl Group {
    /// The step that rank `me` opened last.
    fn opened(&self, me: usize) -> Epoch {
        Epoch::from_flag(self.ranks[me].opening.load(Ordering::Relaxed))
    }

    /// As [`Group::odd_opening`], for the step that `me` opened last.
    pub(super) fn odd(&self, me: usize) -> Option<Error> {
        self.odd_opening(me, self.opened(me))
    }

    /// Opens a step of rank `me`; the last rank to do so compares what all said.
    pub(super) fn open(&self, me: usize, fingerprint: u64, call: CallWord) -> Result<()> {
        let own = &self.ranks[me];
        let epoch = self.opened(me).next();
        own.opening.store(epoch.flag(), Ordering::Relaxed);
        own.steps.fetch_add(1, Ordering::Relaxed);
        own.opened[epoch.slot()].0.publish(epoch, Header { fingerprint, fault: call.bits() });
        if self.openings.0.arrive(epoch, self.ranks.len())
            && let Some(error) = self.odd(me)
        {
            return Err(error);
        }
        Ok(())
    }

    /// One round of rank `me`.
    pub(super) fn round(
        &self,
        me: usize,
        header: RoundHeader,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
        take: &mut dyn FnMut(&dyn Round),
    ) -> Result<()> {
        let (own, world) = (&self.ranks[me], self.ranks.len());
        if bytes > self.capacity {
            return Err(Error::invalid("bytes", bytes, format!("at most {} in a round", self.capacity)));
        }
        let epoch = own.cursor.begin().ok_or_else(|| {
            Error::new(ErrorKind::Internal, format!("rank {} began a round before it consumed the last", me))
        })?;
        fault::point_at("comm.publish", me as i32)?;
        // SAFETY: the slot's last readers are those of the epoch two back. `begin` gave this epoch because this rank has
        // consumed the one between, which was complete only once every rank had published it, and no rank publishes an
        // epoch before it has consumed the one before (see `partial::epoch`). This epoch's readers come after `publish`.
        fill(unsafe { self.payload_mut(me, epoch.slot(), bytes) });
        let fingerprint = tag(header.fingerprint, bytes);
        own.slots[epoch.slot()].0.publish(epoch, Header { fingerprint, fault: header.fault });
        let last = self.arrivals.0.arrive(epoch, world);
        if last && world > 1 {
            self.events.notify();
        }
        fault::point_at("comm.wait", me as i32)?;
        let number = own.rounds.load(Ordering::Relaxed) + 1;
        if !last {
            self.wait(
                me,
                || self.arrivals.0.is_complete(epoch),
                |rank| if self.header(rank, epoch).is_none() { Absence::Absent } else { Absence::Present },
                || format!("round {number}"),
                self.step_deadline(&self.events, Instant::now() + self.step_timeout),
            )?;
        }
        fault::point_at("comm.take", me as i32)?;
        if let Some(absent) = (0..world).find(|&rank| self.header(rank, epoch).is_none()) {
            return Err(Error::new(
                ErrorKind::Internal,
                format!("round {number}: rank {absent} arrived without header"),
            ));
        }
        let fingerprint = |rank: usize| self.header(rank, epoch).map_or(0, |header| header.fingerprint);
        if let Some(error) =
            errors::desync(|| format!("round {number}"), me, world, |rank| (fingerprint(rank), CallWord::default()))
        {
            return Err(error);
        }
        take(&LocalRound { group: self, epoch, bytes });
        own.cursor.consume(epoch);
        own.rounds.store(number, Ordering::Relaxed);
        Ok(())
    }

    /// A hop of rank `me`: posts its bytes, does what is to be done meanwhile, copies the peer's, and waits until its own
    /// are taken.
    pub(super) fn hop(
        &self,
        me: usize,
        hop: &Hop,
        send: &[u8],
        recv: &mut [u8],
        meanwhile: &mut dyn FnMut() -> Result<()>,
    ) -> Result<u64> {
        let (own, step) = (&self.ranks[me], self.opened(me));
        let world = self.ranks.len();
        if hop.to >= world || hop.from >= world || hop.index >= MAX_HOPS {
            let found = format!("to {}, from {}, index {}", hop.to, hop.from, hop.index);
            return Err(Error::invalid("hop", found, format!("ranks below {world}, an index below {MAX_HOPS}")));
        }
        let number = own.steps.load(Ordering::Relaxed);
        let key = number * u64::from(MAX_HOPS) + u64::from(hop.index);
        fault::point_at("comm.post", me as i32)?;
        let header = RoundHeader { fingerprint: tag(hop.header.fingerprint, send.len()), fault: hop.header.fault };
        // SAFETY: `send` is borrowed until this function returns or unwinds, and `posted` is dropped before on every such
        // way: it is a local that nothing moves out of or forgets. Steps and hops rise, so that no key comes again.
        let posted = unsafe { own.message.put(key, hop.to, header, send) };
        self.ranks[hop.to].events.notify();
        let began = Instant::now();
        meanwhile()?;
        fault::point_at("comm.hop", me as i32)?;
        let from = &self.ranks[hop.from];
        let absent = |rank: usize| self.opening(rank, step).is_none();
        let what = || format!("step {number}, hop {}", hop.index);
        // What this rank did meanwhile was no waiting.
        let deadline = self.step_deadline(&own.events, hop.until + began.elapsed());
        let unsent = |rank: usize| match rank {
            _ if absent(rank) => Absence::Absent,
            _ if rank == hop.from && !from.message.is_for(key, me) => Absence::Late,
            _ => Absence::Present,
        };
        let claim = loop {
            self.wait(me, || from.message.is_for(key, me), unsent, what, deadline)?;
            // A message that was taken back in between: its sender has failed, and is about to say why.
            if let Some(claim) = from.message.claim(key, me) {
                break claim;
            }
        };
        let theirs = claim.header();
        if theirs.fingerprint != tag(hop.header.fingerprint, recv.len()) || claim.len() != recv.len() {
            drop(claim);
            // The openings tell who is odd, once all are there.
            let unopened = |rank: usize| if absent(rank) { Absence::Absent } else { Absence::Present };
            self.wait(me, || !(0..world).any(absent), unopened, what, deadline)?;
            let odd = self.odd(me);
            return Err(odd.unwrap_or_else(|| {
                errors::differs(&what(), (me, CallWord::default()), (hop.from, CallWord::default()))
            }));
        }
        claim.copy(recv);
        drop(claim);
        from.events.notify();
        fault::point_at("comm.copied", me as i32)?;
        let unread = |rank: usize| match rank {
            _ if absent(rank) => Absence::Absent,
            _ if rank == hop.to && !posted.is_taken() => Absence::Late,
            _ => Absence::Present,
        };
        self.wait(me, || posted.is_taken(), unread, what, deadline)?;
        Ok(theirs.fault)
    }

    fn step_deadline<'a>(&self, events: &'a EventCount, until: Instant) -> WaitDeadline<'a> {
        WaitDeadline { events, until, field: "step_timeout_ns", timeout: self.step_timeout }
    }
}

/// A fingerprint that also tells payloads of different sizes apart.
fn tag(fingerprint: u64, bytes: usize) -> u64 {
    fingerprint ^ (bytes as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
