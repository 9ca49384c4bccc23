//! One rank's end of a local group.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::group::{Absence, Group, Padded, RankState, WaitDeadline, lock};
use crate::attention::Shard;
use crate::comm::bootstrap::Bootstrap;
use crate::comm::call_word::CallWord;
use crate::comm::config::CommConfig;
use crate::comm::errors;
use crate::comm::rounds::{Hop, Round, RoundHeader, Rounds};
use crate::device::{EventCount, HostBuffer, WaitStrategy, available_cores};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::epoch::{Arrivals, Cursor, Epoch, MAX_PAYLOAD, MAX_WINDOWS, SLOTS};

/// Most ranks of a local group.
pub(crate) const MAX_RANKS: usize = 1024;
/// Alignment of payloads, bytes.
const ALIGN: usize = 64;

/// One rank's end of a local group.
pub(crate) struct LocalRank {
    group: Arc<Group>,
    rank: usize,
}

/// A group of `world` ranks in this process, in rank order. Errors: `InvalidArgument`, `NoMemory`.
pub(crate) fn local_group(world: usize, config: &CommConfig) -> Result<Vec<LocalRank>> {
    local_group_at(world, config, Epoch::START)
}

/// As [`local_group`], with the first epoch after `start`.
pub(in crate::comm) fn local_group_at(world: usize, config: &CommConfig, start: Epoch) -> Result<Vec<LocalRank>> {
    static GROUPS: AtomicU64 = AtomicU64::new(0);
    config.check()?;
    if world == 0 || world > MAX_RANKS {
        return Err(Error::invalid("n", world, format!("1 to {MAX_RANKS} ranks")));
    }
    let capacity = MAX_PAYLOAD.min(MAX_WINDOWS / (SLOTS * world)) / ALIGN * ALIGN;
    let windows = HostBuffer::new(world * SLOTS * capacity)?;
    let rank = || RankState {
        cursor: Cursor::starting_at(AtomicU32::new(0), AtomicU32::new(0), start),
        opening: AtomicU32::new(start.flag()),
        ..RankState::default()
    };
    let group = Arc::new(Group {
        id: GROUPS.fetch_add(1, Ordering::Relaxed) + 1,
        setup_timeout: config.setup_timeout,
        step_timeout: config.step_timeout,
        strategy: if world <= available_cores() { WaitStrategy::Spin } else { WaitStrategy::Yield },
        capacity,
        events: EventCount::default(),
        arrivals: Padded(Arrivals::starting_at(Default::default(), AtomicU32::new(0), start)),
        openings: Padded(Arrivals::starting_at(Default::default(), AtomicU32::new(0), start)),
        broken: AtomicBool::new(false),
        error: Mutex::new(None),
        late: OnceLock::new(),
        gone: AtomicU32::new(0),
        blobs: Mutex::new((0..world).map(|_| Default::default()).collect()),
        ranks: (0..world).map(|_| rank()).collect(),
        windows,
    });
    Ok((0..world).map(|rank| LocalRank { group: Arc::clone(&group), rank }).collect())
}

impl LocalRank {
    /// Rounds that this rank completed.
    #[cfg(test)]
    pub(in crate::comm) fn completed(&self) -> u64 {
        self.own().rounds.load(Ordering::Relaxed)
    }

    /// Tells groups of a process apart; never 0.
    pub(crate) fn group_id(&self) -> u64 {
        self.group.id
    }

    fn own(&self) -> &RankState {
        &self.group.ranks[self.rank]
    }

    /// Begins a call of this rank; the guard ends it, and breaks the group if the call unwinds.
    fn enter(&self) -> Result<CallGuard<'_>> {
        let own = self.own();
        if own.busy.swap(true, Ordering::Acquire) {
            let message =
                format!("communicator: another call on rank {} is under way; wanted one at a time", self.rank);
            return Err(Error::new(ErrorKind::Busy, message));
        }
        let mut call = CallGuard { rank: self, unwinding: false };
        if own.gone.load(Ordering::Acquire) {
            return Err(errors::left(self.rank));
        }
        if let Some(error) = self.status() {
            return Err(error);
        }
        call.unwinding = true;
        Ok(call)
    }
}

impl Bootstrap for LocalRank {
    fn shard(&self) -> Shard {
        Shard { rank: self.rank as i32, world: self.group.ranks.len() as i32 }
    }

    fn window_bytes(&self) -> usize {
        SLOTS * self.group.capacity
    }

    fn allgather(&self, blob: &[u8]) -> Result<Vec<Vec<u8>>> {
        let call = self.enter()?;
        let group = &*self.group;
        let number = self.own().gathers.load(Ordering::Relaxed) + 1;
        self.own().gathers.store(number, Ordering::Relaxed);
        let parity = number as usize % SLOTS;
        let complete = {
            let mut blobs = lock(&group.blobs);
            // Replaces the blob of the allgather before the last. Every rank has read that one, because each gave its blob of
            // the last allgather only afterwards.
            blobs[self.rank][parity] = (number, blob.to_vec());
            blobs.iter().all(|rank| rank[parity].0 == number)
        };
        if complete {
            group.events.notify();
        }
        let waited = group.wait(
            self.rank,
            || lock(&group.blobs).iter().all(|rank| rank[parity].0 == number),
            |rank| if lock(&group.blobs)[rank][parity].0 != number { Absence::Absent } else { Absence::Present },
            || format!("setup exchange {number}"),
            WaitDeadline {
                events: &group.events,
                until: Instant::now() + group.setup_timeout,
                field: "setup_timeout_ns",
                timeout: group.setup_timeout,
            },
        );
        call.end(waited.map(|()| lock(&group.blobs).iter().map(|rank| rank[parity].1.clone()).collect()))
    }

    fn status(&self) -> Option<Error> {
        let group = self.group.broken()?;
        let own = lock(&self.own().error).clone();
        let odd = || if group.kind() == ErrorKind::Desync { self.group.odd(self.rank) } else { None };
        let error = own.or_else(odd).unwrap_or(group);
        let is_late =
            error.kind() == ErrorKind::Timeout && self.group.late.get().is_some_and(|late| late.contains(&self.rank));
        Some(if is_late { errors::came_late(self.rank, &error) } else { error })
    }

    fn abort(&self) {
        self.group.break_with(errors::aborted(self.rank));
    }

    fn fail(&self, error: &Error) {
        let own = self.own();
        if own.gone.load(Ordering::Acquire) {
            // It left during a step, which its peers may have begun.
            self.group.break_with(errors::peer_lost("a step", self.rank));
            return;
        }
        if self.status().is_some() {
            return;
        }
        let error = errors::failed(self.rank, error);
        *lock(&own.error) = Some(error.clone());
        self.group.break_with(error);
    }

    fn left_peer(&self) -> Option<usize> {
        let has_left = |&rank: &usize| rank != self.rank && self.group.ranks[rank].gone.load(Ordering::Acquire);
        (0..self.group.ranks.len()).find(has_left)
    }

    fn leave(&self) {
        if !self.own().gone.swap(true, Ordering::AcqRel) {
            self.group.gone.fetch_add(1, Ordering::AcqRel);
            self.group.notify_all();
        }
    }

    fn describe(&self) -> String {
        let (group, world) = (&*self.group, self.group.ranks.len());
        let links: Vec<String> = (0..world)
            .filter(|&peer| peer != self.rank)
            .map(|peer| format!(r#"{{"peer":{peer},"kind":"shared_memory"}}"#))
            .collect();
        format!(
            concat!(
                r#""kind":"local","group":{},"world":{},"rank":{},"wait":"{}","capacity_bytes":{},"#,
                r#""window_bytes":{},"setup_timeout_ms":{},"step_timeout_ms":{},"links":[{}]"#
            ),
            group.id,
            world,
            self.rank,
            if group.strategy == WaitStrategy::Spin { "spin 20 us, then park" } else { "yield 20 us, then park" },
            group.capacity,
            self.window_bytes(),
            group.setup_timeout.as_millis(),
            group.step_timeout.as_millis(),
            links.join(","),
        )
    }
}

impl Rounds for LocalRank {
    fn capacity(&self) -> usize {
        self.group.capacity
    }

    fn open(&self, fingerprint: u64, call: CallWord) -> Result<()> {
        let guard = self.enter()?;
        let result = self.group.open(self.rank, fingerprint, call);
        guard.end(result)
    }

    fn round(
        &self,
        header: RoundHeader,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
        take: &mut dyn FnMut(&dyn Round),
    ) -> Result<()> {
        let call = self.enter()?;
        let result = self.group.round(self.rank, header, bytes, fill, take);
        call.end(result)
    }

    fn hop(&self, hop: &Hop, send: &[u8], recv: &mut [u8], meanwhile: &mut dyn FnMut() -> Result<()>) -> Result<u64> {
        let call = self.enter()?;
        let result = self.group.hop(self.rank, hop, send, recv, meanwhile);
        call.end(result)
    }

    fn has_hops(&self) -> bool {
        true
    }

    fn reads_in_place(&self) -> bool {
        true
    }

    fn step_timeout(&self) -> Duration {
        self.group.step_timeout
    }

    fn serves_streams(&self) -> bool {
        true
    }
}

impl Drop for LocalRank {
    fn drop(&mut self) {
        self.leave();
    }
}

/// One call of a rank.
struct CallGuard<'a> {
    rank: &'a LocalRank,
    unwinding: bool,
}

impl CallGuard<'_> {
    /// Ends the call; an error breaks the group (or is what broke it).
    fn end<T>(mut self, result: Result<T>) -> Result<T> {
        self.unwinding = false;
        let result = result.map_err(|error| match error.kind() {
            ErrorKind::Desync => self.rank.group.odd(self.rank.rank).unwrap_or(error),
            _ => error,
        });
        if let Err(error) = &result {
            if error.kind() == ErrorKind::Desync {
                *lock(&self.rank.own().error) = Some(error.clone());
                self.rank.group.break_with(error.clone());
            } else {
                self.rank.fail(error);
            }
        }
        result
    }
}

impl Drop for CallGuard<'_> {
    fn drop(&mut self) {
        if self.unwinding {
            let message = format!("rank {} panicked during a round", self.rank.rank);
            self.rank.fail(&Error::new(ErrorKind::Internal, message));
        }
        self.rank.own().busy.store(false, Ordering::Release);
    }
}
