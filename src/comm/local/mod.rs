//! The local group: any number of ranks in one process, exchanging over shared memory.
//!
//! Every rank has a window of two slots. It writes its payload into the slot of the epoch's parity and publishes the
//! header; the last rank to arrive completes the epoch and rings; then every rank reads every payload in place. Why two
//! slots suffice is said in [`crate::partial::epoch`]. Ranks wait on their calling thread only, by [`Bell`]: they spin
//! for at most 20 us where the machine has a core a rank, else they yield as long, then they park, and only the last
//! arrival wakes.
//!
//! A step is opened in slots of the same kind, one for each parity of the step: as no rank ends a step that exchanges
//! before all have opened it, none is more than one ahead. The last to open compares what all said. Hops wait on a bell
//! of each rank's own. `group` is what the ranks share, `hop` opens steps and carries messages, which `post` hands over.
//!
//! The first failure latches for the whole group and rings the bell, so that every wait ends with it.

mod group;
mod hop;
mod post;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use self::group::{Absence, Group, Limit, Line, LocalRound, Rank, lock};
use super::{CommConfig, Exchange, Hop, Round, RoundHeader, verdict};
use crate::attention::Shard;
use crate::device::{Bell, HostBuffer, Linger, available_cores};
use crate::error::{Error, ErrorKind, Result};
use crate::fault;
use crate::partial::epoch::{Arrivals, Cursor, Epoch, Header, MAX_PAYLOAD, MAX_WINDOWS, SLOTS};

/// Most ranks of a local group.
pub(crate) const MAX_RANKS: usize = 1024;
/// Alignment of payloads, bytes.
const ALIGN: usize = 64;

/// One rank's end of a local group.
pub(crate) struct LocalExchange {
    group: Arc<Group>,
    rank: usize,
}

/// A group of `world` ranks in this process, in rank order. Errors: `InvalidArgument`, `NoMemory`.
pub(crate) fn local_group(world: usize, config: &CommConfig) -> Result<Vec<LocalExchange>> {
    local_group_at(world, config, Epoch::START)
}

/// As [`local_group`], with the first epoch after `start`.
pub(super) fn local_group_at(world: usize, config: &CommConfig, start: Epoch) -> Result<Vec<LocalExchange>> {
    static GROUPS: AtomicU64 = AtomicU64::new(0);
    config.check()?;
    if world == 0 || world > MAX_RANKS {
        return Err(Error::invalid("n", world, format!("1 to {MAX_RANKS} ranks")));
    }
    let capacity = MAX_PAYLOAD.min(MAX_WINDOWS / (SLOTS * world)) / ALIGN * ALIGN;
    let windows = HostBuffer::new(world * SLOTS * capacity)?;
    let rank = || Rank {
        cursor: Cursor::starting_at(AtomicU32::new(0), AtomicU32::new(0), start),
        opening: AtomicU32::new(start.flag()),
        ..Rank::default()
    };
    let group = Arc::new(Group {
        id: GROUPS.fetch_add(1, Ordering::Relaxed) + 1,
        setup_timeout: config.setup_timeout,
        step_timeout: config.step_timeout,
        linger: if world <= available_cores() { Linger::Spin } else { Linger::Yield },
        capacity,
        bell: Bell::default(),
        arrivals: Line(Arrivals::starting_at(Default::default(), AtomicU32::new(0), start)),
        openings: Line(Arrivals::starting_at(Default::default(), AtomicU32::new(0), start)),
        broken: AtomicBool::new(false),
        error: Mutex::new(None),
        gone: AtomicU32::new(0),
        board: Mutex::new((0..world).map(|_| Default::default()).collect()),
        ranks: (0..world).map(|_| rank()).collect(),
        windows,
    });
    Ok((0..world).map(|rank| LocalExchange { group: Arc::clone(&group), rank }).collect())
}

impl LocalExchange {
    /// Tells groups of a process apart; never 0.
    pub(crate) fn group_id(&self) -> u64 {
        self.group.id
    }

    fn own(&self) -> &Rank {
        &self.group.ranks[self.rank]
    }

    /// Takes this rank's turn; the guard ends it, and breaks the group if the call unwinds.
    fn enter(&self) -> Result<Turn<'_>> {
        let own = self.own();
        if own.busy.swap(true, Ordering::Acquire) {
            let message =
                format!("communicator: another call on rank {} is under way; wanted one at a time", self.rank);
            return Err(Error::new(ErrorKind::Busy, message));
        }
        let mut turn = Turn { exchange: self, unwinding: false };
        if own.gone.load(Ordering::Acquire) {
            let message = format!("communicator: rank {} has left it", self.rank);
            return Err(Error::new(ErrorKind::ParentDestroyed, message));
        }
        if let Some(error) = self.status() {
            return Err(error);
        }
        turn.unwinding = true;
        Ok(turn)
    }

    fn step_limit<'a>(&self, bell: &'a Bell, until: Instant) -> Limit<'a> {
        Limit { bell, until, field: "step_timeout", timeout: self.group.step_timeout }
    }

    fn exchange(
        &self,
        header: RoundHeader,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
        take: &mut dyn FnMut(&dyn Round),
    ) -> Result<()> {
        let (group, own, world) = (&*self.group, self.own(), self.group.ranks.len());
        if bytes > group.capacity {
            return Err(Error::invalid("bytes", bytes, format!("at most {} in a round", group.capacity)));
        }
        let epoch = own.cursor.begin().ok_or_else(|| {
            Error::new(ErrorKind::Internal, format!("rank {} began a round before it consumed the last", self.rank))
        })?;
        fault::point_at("comm.publish", self.rank as i32)?;
        // SAFETY: of this slot's last epoch, two back, every rank has consumed what it held (see `partial::epoch`); this
        // epoch's readers come after the publication.
        fill(unsafe { group.payload_mut(self.rank, epoch.slot(), bytes) });
        let fingerprint = tag(header.fingerprint, bytes);
        own.slots[epoch.slot()].0.publish(epoch, Header { fingerprint, fault: header.fault });
        let last = group.arrivals.0.arrive(epoch, world);
        if last && world > 1 {
            group.bell.ring();
        }
        fault::point_at("comm.wait", self.rank as i32)?;
        let number = own.rounds.load(Ordering::Relaxed) + 1;
        if !last {
            group.wait(
                || group.arrivals.0.is_complete(epoch),
                |rank| if group.header(rank, epoch).is_none() { Absence::Absent } else { Absence::Here },
                || format!("round {number}"),
                self.step_limit(&group.bell, Instant::now() + group.step_timeout),
            )?;
        }
        fault::point_at("comm.take", self.rank as i32)?;
        if let Some(absent) = (0..world).find(|&rank| group.header(rank, epoch).is_none()) {
            return Err(Error::new(
                ErrorKind::Internal,
                format!("round {number}: rank {absent} arrived without header"),
            ));
        }
        let fingerprint = |rank: usize| group.header(rank, epoch).map_or(0, |header| header.fingerprint);
        if let Some(error) = verdict::desync(|| format!("round {number}"), self.rank, world, fingerprint) {
            return Err(error);
        }
        take(&LocalRound { group, epoch, bytes });
        own.cursor.consume(epoch);
        own.rounds.store(number, Ordering::Relaxed);
        Ok(())
    }
}

impl Exchange for LocalExchange {
    fn shard(&self) -> Shard {
        Shard { rank: self.rank as i32, world: self.group.ranks.len() as i32 }
    }

    fn capacity(&self) -> usize {
        self.group.capacity
    }

    fn window_bytes(&self) -> usize {
        SLOTS * self.group.capacity
    }

    fn allgather(&self, blob: &[u8]) -> Result<Vec<Vec<u8>>> {
        let turn = self.enter()?;
        let group = &*self.group;
        let number = self.own().gathers.load(Ordering::Relaxed) + 1;
        self.own().gathers.store(number, Ordering::Relaxed);
        let parity = number as usize % SLOTS;
        let complete = {
            let mut board = lock(&group.board);
            // Two back: every rank has read it, for every rank gave its next only after that.
            board[self.rank][parity] = (number, blob.to_vec());
            board.iter().all(|rank| rank[parity].0 == number)
        };
        if complete {
            group.bell.ring();
        }
        let waited = group.wait(
            || lock(&group.board).iter().all(|rank| rank[parity].0 == number),
            |rank| if lock(&group.board)[rank][parity].0 != number { Absence::Absent } else { Absence::Here },
            || format!("setup exchange {number}"),
            Limit {
                bell: &group.bell,
                until: Instant::now() + group.setup_timeout,
                field: "setup_timeout",
                timeout: group.setup_timeout,
            },
        );
        turn.end(waited.map(|()| lock(&group.board).iter().map(|rank| rank[parity].1.clone()).collect()))
    }

    fn round(
        &self,
        header: RoundHeader,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
        take: &mut dyn FnMut(&dyn Round),
    ) -> Result<()> {
        let turn = self.enter()?;
        let result = self.exchange(header, bytes, fill, take);
        turn.end(result)
    }

    fn open(&self, fingerprint: u64) -> Result<()> {
        let turn = self.enter()?;
        let result = self.open_step(fingerprint);
        turn.end(result)
    }

    fn hop(&self, hop: &Hop, send: &[u8], recv: &mut [u8], meanwhile: &mut dyn FnMut() -> Result<()>) -> Result<u64> {
        let turn = self.enter()?;
        let result = self.meet(hop, send, recv, meanwhile);
        turn.end(result)
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

    fn status(&self) -> Option<Error> {
        let group = self.group.broken()?;
        let own = lock(&self.own().error).clone();
        let odd = || if group.kind() == ErrorKind::Desync { self.odd() } else { None };
        Some(own.or_else(odd).unwrap_or(group))
    }

    fn step(&self) -> u64 {
        self.own().rounds.load(Ordering::Relaxed)
    }

    fn abort(&self) {
        self.group.break_with(verdict::aborted(self.rank));
    }

    fn fail(&self, error: &Error) {
        let own = self.own();
        if own.gone.load(Ordering::Acquire) || self.status().is_some() {
            return;
        }
        let error = verdict::failed(self.rank, error);
        *lock(&own.error) = Some(error.clone());
        self.group.break_with(error);
    }

    fn leave(&self) {
        if !self.own().gone.swap(true, Ordering::AcqRel) {
            self.group.gone.fetch_add(1, Ordering::AcqRel);
            self.group.ring_all();
        }
    }

    fn describe(&self) -> String {
        let (group, world) = (&*self.group, self.group.ranks.len());
        let links: Vec<String> = (0..world)
            .filter(|&peer| peer != self.rank)
            .map(|peer| format!(r#"{{"peer":{peer},"kind":"shared_memory"}}"#))
            .collect();
        let algorithm = |name: &str, rounds: usize, reads: &str| {
            format!(
                r#"{{"name":"{name}","rounds_per_chunk":{rounds},"chunk_bytes":{},"reads":"{reads}"}}"#,
                group.capacity
            )
        };
        let hops = |name: &str, hops: String| format!(r#"{{"name":"{name}","hops":{hops}}}"#);
        let algorithms = [
            algorithm("ONE_SHOT", 1, "every payload in place; with SCATTERED output the own heads of every payload"),
            algorithm("TWO_SHOT", 2, "own heads of every payload, then the merged heads"),
            hops("TREE", r#""2 ceil(log2 ranks of a node) + ceil(log2 nodes)""#.into()),
            algorithm("ALLREDUCE3", 6, "own part of every payload, then the reduced parts, three times"),
            hops("RING", (world - 1).to_string()),
        ];
        format!(
            concat!(
                r#"{{"kind":"local","group":{},"world":{},"rank":{},"wait":"{}","capacity_bytes":{},"#,
                r#""window_bytes":{},"setup_timeout_ms":{},"step_timeout_ms":{},"links":[{}],"algorithms":[{}]}}"#
            ),
            group.id,
            world,
            self.rank,
            if group.linger == Linger::Spin { "spin 20 us, then park" } else { "yield 20 us, then park" },
            group.capacity,
            self.window_bytes(),
            group.setup_timeout.as_millis(),
            group.step_timeout.as_millis(),
            links.join(","),
            algorithms.join(","),
        )
    }
}

impl Drop for LocalExchange {
    fn drop(&mut self) {
        self.leave();
    }
}

/// One call of a rank.
struct Turn<'a> {
    exchange: &'a LocalExchange,
    unwinding: bool,
}

impl Turn<'_> {
    /// Ends the call; an error breaks the group (or is what broke it).
    fn end<T>(mut self, result: Result<T>) -> Result<T> {
        self.unwinding = false;
        let result = result.map_err(|error| match error.kind() {
            ErrorKind::Desync => self.exchange.odd().unwrap_or(error),
            _ => error,
        });
        if let Err(error) = &result {
            if error.kind() == ErrorKind::Desync {
                *lock(&self.exchange.own().error) = Some(error.clone());
                self.exchange.group.break_with(error.clone());
            } else {
                self.exchange.fail(error);
            }
        }
        result
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.unwinding {
            let message = format!("rank {} panicked during a round", self.exchange.rank);
            self.exchange.fail(&Error::new(ErrorKind::Internal, message));
        }
        self.exchange.own().busy.store(false, Ordering::Release);
    }
}

/// A fingerprint that also tells payloads of different sizes apart.
fn tag(fingerprint: u64, bytes: usize) -> u64 {
    fingerprint ^ (bytes as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
