//! The engine's threads, as a team: each of them enters the same call with an index of its own.
//!
//! Member 0 leads. Members meet by counting themselves in, with a deadline; only when all have come does the leader begin, and
//! hand out jobs, and at the end the result, which all leave with. Until then anyone may break the meeting off: by its
//! deadline, or because two members do not fit together. A team that was broken off stays so, because nobody knows which of
//! its members are still to come.
//!
//! Between jobs members wait at the engine's barrier, if it has one. That is only how they wait: what has come and what is done
//! is counted here, so that a barrier that lets members through too early does no harm.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::event_count::{EventCount, WaitStrategy};
use super::executor::{Executor, Job};
use super::float_state::FloatState;
use super::host::available_cores;
use super::meeting::{Meeting, Phase};
use super::team_member::{MemberWait, TeamMember};
use super::thread::{catch, panic_message};
use crate::error::{Error, ErrorKind, Result};
use crate::fault;

/// How long a member that waits for others goes without looking whether there is still something to wait for.
const LOOK: Duration = Duration::from_millis(20);

/// Where the members of a team meet, once a step.
#[derive(Debug)]
pub struct Team {
    /// Whose team it is, for messages.
    name: String,
    /// A [`Meeting`].
    meeting: AtomicU64,
    /// Counts what the leader has posted.
    turn: AtomicU32,
    /// Notified when something was posted, or the meeting is another one.
    posted: EventCount,
    /// Notified for the leader: when the last member has come, has done its job, or has left.
    told: EventCount,
    /// Members that have done the job.
    done: AtomicUsize,
    /// Members that have left the step before, and how many will.
    left: AtomicUsize,
    leaving: AtomicUsize,
    /// Written by the leader while all members wait for `turn`.
    post: UnsafeCell<Post>,
    slots: Box<[MemberSlot]>,
    has_failed: AtomicBool,
    failed: Mutex<Option<Error>>,
    /// Why the meeting was broken off.
    broken: Mutex<Option<Error>>,
    panicked: Mutex<Option<String>>,
    cores: usize,
}

/// What a member tells the others, in a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct MemberSlot {
    has_entered: AtomicBool,
    /// The address of the member's barrier, 0 for none: written before the member counts itself in.
    barrier: AtomicUsize,
}

#[derive(Clone, Copy, Debug)]
enum Post {
    Job(*const Job<'static>),
    /// The step has ended.
    End,
}

// SAFETY: the only part that is not Sync is `post`. The leader writes it when every member of the step has done what it read
// there last, and has left the step before (`done`, `left`); `turn` orders that write before the members' reads. A job is Sync,
// and its leader waits for `done` before it lets go of what it borrows.
unsafe impl Sync for Team {}
// SAFETY: as above.
unsafe impl Send for Team {}

/// A member's slot, for as long as this lives.
struct Entered<'a>(&'a MemberSlot);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.0.has_entered.store(false, Ordering::Release);
    }
}

impl Team {
    /// Most members of a team.
    pub const MOST: usize = 1024;

    /// For teams of at most `most` members, at most [`Team::MOST`]. `NoMemory`.
    pub fn new(most: usize, name: String) -> Result<Team> {
        let mut slots = Vec::new();
        if most > Team::MOST || slots.try_reserve_exact(most).is_err() {
            return Err(Error::new(ErrorKind::NoMemory, format!("max_team: no memory for {most}")));
        }
        slots.resize_with(most, MemberSlot::default);
        Ok(Team {
            name,
            meeting: AtomicU64::new(0),
            turn: AtomicU32::new(0),
            posted: EventCount::default(),
            told: EventCount::default(),
            done: AtomicUsize::new(0),
            left: AtomicUsize::new(0),
            leaving: AtomicUsize::new(0),
            post: UnsafeCell::new(Post::End),
            slots: slots.into_boxed_slice(),
            has_failed: AtomicBool::new(false),
            failed: Mutex::new(None),
            broken: Mutex::new(None),
            panicked: Mutex::new(None),
            cores: available_cores(),
        })
    }

    /// What member 0 does: waits until all have come, runs `step` with them, and ends it for all with its result. A team that
    /// cannot meet is an error for all, of which `step` is told in place of the team: `Timeout` names the member that is missing,
    /// `InvalidArgument` what does not fit together. A member that is none is refused, and `step` not called.
    pub fn lead(
        &self,
        member: &TeamMember,
        wait: &MemberWait<'_>,
        step: impl FnOnce(Result<&dyn Executor>) -> Result<()>,
    ) -> Result<()> {
        let (_, size, _entered) = self.enter(member)?;
        if let Err(error) = self.gather(member, size, wait) {
            // The error is that of all members, whatever comes of it here.
            let _ = catch(|| step(Err(error.clone())));
            return Err(error);
        }
        let leader = Leader {
            team: self,
            member,
            size,
            thread: std::thread::current().id(),
            has_posted: AtomicBool::new(false),
        };
        let result = catch(|| step(Ok(&leader)));
        leader.end(result.as_ref().err());
        result
    }

    /// What the other members do: take part in the step until the leader ends it. Gives its result.
    pub fn serve(&self, member: &TeamMember, wait: &MemberWait<'_>) -> Result<()> {
        let (index, size, entered) = self.enter(member)?;
        let mut turn = self.come(member, size, wait)?;
        let is_posted = || self.turn.load(Ordering::Acquire) != turn;
        self.wait_for_members(&self.posted, size, wait, || {
            is_posted() || Meeting::of(self.meeting.load(Ordering::Acquire)).phase == Phase::Broken
        })?;
        if !is_posted() {
            return Err(self.why());
        }
        loop {
            turn = turn.wrapping_add(1);
            // SAFETY: the leader wrote it before it counted `turn` up, and writes it again only when this member has done its
            // job or has left.
            match unsafe { *self.post.get() } {
                Post::End => break,
                Post::Job(job) => {
                    self.work(index, job);
                    if self.done.fetch_add(1, Ordering::AcqRel) + 2 == size {
                        self.told.notify();
                    }
                }
            }
            member.wait_for_all();
            member.wait_for_all();
            self.wait(&self.posted, size, None, || self.turn.load(Ordering::Acquire) != turn);
        }
        let failed = if self.has_failed.load(Ordering::Relaxed) { self.failed.lock().clone() } else { None };
        drop(entered);
        if self.left.fetch_add(1, Ordering::AcqRel) + 2 == size {
            self.told.notify();
        }
        failed.map_or(Ok(()), Err)
    }

    /// Checks a member and takes its slot. Gives its index and the size of its team.
    fn enter(&self, member: &TeamMember) -> Result<(usize, usize, Entered<'_>)> {
        self.slot(member).inspect_err(|error| {
            // This member will not come: those who wait for it need not.
            let _ = self.break_off(error, |meeting| meeting.count > 0);
        })
    }

    fn slot(&self, member: &TeamMember) -> Result<(usize, usize, Entered<'_>)> {
        let most = self.slots.len();
        let Some(size) = usize::try_from(member.size).ok().filter(|size| (1..=most).contains(size)) else {
            let wanted = format!("1 to {most}, the most that this communicator was made for (max_team)");
            return Err(Error::invalid("team.size", member.size, wanted));
        };
        let Some(index) = usize::try_from(member.index).ok().filter(|&index| index < size) else {
            return Err(Error::invalid("team.index", member.index, format!("0 to {}", size - 1)));
        };
        if self.slots[index].has_entered.swap(true, Ordering::AcqRel) {
            let found = format!("{index} of two members at a time");
            return Err(Error::invalid("team.index", found, format!("each of 0 to {} once", size - 1)));
        }
        self.slots[index].barrier.store(member.barrier_address(), Ordering::Relaxed);
        Ok((index, size, Entered(&self.slots[index])))
    }

    /// Counts a member in. Gives the turn before the first of its step.
    fn come(&self, member: &TeamMember, size: usize, wait: &MemberWait<'_>) -> Result<u32> {
        let until = Instant::now() + wait.timeout;
        loop {
            let word = self.meeting.load(Ordering::Acquire);
            // Not before the word, which says that no step is under way.
            let turn = self.turn.load(Ordering::Acquire);
            let found = Meeting::of(word);
            match found.phase {
                Phase::Open => {}
                Phase::Broken => return Err(self.why()),
                Phase::Running => {
                    // The step before is about to end, for all but those who have left it.
                    let is_over = || self.meeting.load(Ordering::Acquire) != word;
                    if self.wait(&self.posted, size, Some(until), is_over) {
                        continue;
                    }
                    let (name, timeout) = (&self.name, wait.timeout);
                    let message = format!("{name}: the step before did not end within {timeout:?} ({})", wait.field);
                    return Err(Error::new(ErrorKind::Timeout, message));
                }
            }
            let has_barrier = member.barrier.is_some();
            if let Some(error) = misfit(&found, size, has_barrier) {
                if let Some(error) = self.break_off(&error, |meeting| meeting == found) {
                    return Err(error);
                }
                continue;
            }
            let joined = Meeting { size, has_barrier, count: found.count + 1, ..found };
            if self.meeting.compare_exchange(word, joined.word(), Ordering::AcqRel, Ordering::Acquire).is_ok() {
                if joined.count == size {
                    self.told.notify();
                }
                return Ok(turn);
            }
        }
    }

    /// Counts the leader in, waits until all have come, and begins the step.
    fn gather(&self, member: &TeamMember, size: usize, wait: &MemberWait<'_>) -> Result<()> {
        self.come(member, size, wait)?;
        self.wait_for_members(&self.told, size, wait, || {
            let found = Meeting::of(self.meeting.load(Ordering::Acquire));
            found.phase == Phase::Broken || found.count == size
        })?;
        if let Some(error) = self.other_barrier(member, size) {
            return Err(self.break_off(&error, |_| true).unwrap_or(error));
        }
        let word = self.meeting.load(Ordering::Acquire);
        let running = Meeting { phase: Phase::Running, ..Meeting::of(word) };
        // Nobody counts itself in where all have come: another word is that of a meeting that was broken off.
        if Meeting::of(word).phase == Phase::Broken
            || self.meeting.compare_exchange(word, running.word(), Ordering::AcqRel, Ordering::Acquire).is_err()
        {
            return Err(self.why());
        }
        // A member of the step before that is not in this one may still be on its way out.
        let leaving = self.leaving.load(Ordering::Relaxed);
        self.wait(&self.told, size, None, || self.left.load(Ordering::Acquire) == leaving);
        self.left.store(0, Ordering::Relaxed);
        self.leaving.store(size - 1, Ordering::Relaxed);
        Ok(())
    }

    /// Which member would wait at another barrier than the leader, for ever. Called when all have counted themselves in, which
    /// orders what they wrote to their slots before this.
    fn other_barrier(&self, leader: &TeamMember, size: usize) -> Option<Error> {
        let wanted = leader.barrier_address();
        let odd = self.slots[..size].iter().position(|slot| slot.barrier.load(Ordering::Relaxed) != wanted)?;
        let found = format!("another function of member {odd} than of member 0");
        Some(Error::invalid("team.barrier", found, "the same for all members"))
    }

    /// Waits until `there`, or breaks the meeting off. Every member calls it, each until its own deadline.
    fn wait_for_members(
        &self,
        events: &EventCount,
        size: usize,
        wait: &MemberWait<'_>,
        there: impl Fn() -> bool,
    ) -> Result<()> {
        let until = Instant::now() + wait.timeout;
        while !self.wait(events, size, Some(Instant::now() + LOOK.min(wait.timeout)), &there) {
            let error = match (wait.check)() {
                Err(error) => error,
                Ok(()) if Instant::now() < until => continue,
                Ok(()) => self.late(size, wait),
            };
            if let Some(error) = self.break_off(&error, |_| true) {
                return Err(error);
            }
            // All have come meanwhile: the step has begun, and its own deadlines count.
        }
        Ok(())
    }

    /// Waits until `there`, at most until `until`. Whether it came true.
    fn wait(&self, events: &EventCount, size: usize, until: Option<Instant>, there: impl Fn() -> bool) -> bool {
        let strategy = if size <= self.cores { WaitStrategy::Spin } else { WaitStrategy::Yield };
        loop {
            let key = events.key();
            if there() {
                return true;
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return false;
            }
            events.wait(key, strategy, until);
        }
    }

    /// That a member of `size` did not come.
    fn late(&self, size: usize, wait: &MemberWait<'_>) -> Error {
        let missing = self.slots[..size].iter().position(|slot| !slot.has_entered.load(Ordering::Acquire));
        let who = missing.map_or("a member".to_string(), |index| format!("member {index}"));
        let message = format!("{}: {who} of {size} did not come within {:?} ({})", self.name, wait.timeout, wait.field);
        Error::new(ErrorKind::Timeout, message)
    }

    /// Breaks the meeting off, if it has not begun the step and `applies`. Gives why it is broken off, if it is.
    fn break_off(&self, error: &Error, applies: impl Fn(Meeting) -> bool) -> Option<Error> {
        // Held while the word says so, so that whoever finds it broken finds out why.
        let mut broken = self.broken.lock();
        loop {
            let word = self.meeting.load(Ordering::Acquire);
            let found = Meeting::of(word);
            match found.phase {
                Phase::Broken => return broken.clone(),
                Phase::Open if applies(found) => {}
                Phase::Open | Phase::Running => return None,
            }
            let now = Meeting { phase: Phase::Broken, ..found };
            if self.meeting.compare_exchange(word, now.word(), Ordering::AcqRel, Ordering::Acquire).is_ok() {
                *broken = Some(error.clone());
                self.posted.notify();
                self.told.notify();
                return broken.clone();
            }
        }
    }

    /// Why the meeting was broken off.
    fn why(&self) -> Error {
        let unknown = || Error::new(ErrorKind::Internal, format!("{}: broken off for no reason", self.name));
        self.broken.lock().clone().unwrap_or_else(unknown)
    }

    fn work(&self, index: usize, job: *const Job<'static>) {
        let _default = FloatState::enter();
        let result = catch_unwind(AssertUnwindSafe(|| {
            if let Err(error) = fault::point_at("team.job", index as i32) {
                panic!("{error}");
            }
            // SAFETY: the leader, which borrows the job, waits for this member's part of it.
            unsafe { (*job)(index) };
        }));
        if let Err(payload) = result {
            let message = format!("member {index} panicked: {}", panic_message(&*payload));
            self.panicked.lock().get_or_insert(message);
        }
    }
}

/// What does not fit between a member and those who have come before.
fn misfit(found: &Meeting, size: usize, has_barrier: bool) -> Option<Error> {
    let name = |has| if has { "one" } else { "NULL" };
    let as_before = |what: &dyn std::fmt::Display| format!("{what}, as of the members that came before");
    if found.size == 0 {
        None
    } else if found.size != size {
        Some(Error::invalid("team.size", size, as_before(&found.size)))
    } else if found.has_barrier != has_barrier {
        Some(Error::invalid("team.barrier", name(has_barrier), as_before(&name(found.has_barrier))))
    } else {
        None
    }
}

/// A team whose members have all come, for its leader.
struct Leader<'a> {
    team: &'a Team,
    member: &'a TeamMember,
    size: usize,
    /// The leader's.
    thread: ThreadId,
    /// Whether members wait at the barrier, which they do after the first job.
    has_posted: AtomicBool,
}

// SAFETY: what is not Sync is the engine's context in `member`, which is used on the leader's own thread alone: `run` refuses
// others, and `end` takes the leader itself, which does not leave its thread.
unsafe impl Sync for Leader<'_> {}

impl Leader<'_> {
    /// Shows all members what `post` says, and calls those who wait.
    fn post(&self, post: Post, then: impl FnOnce()) {
        // SAFETY: every member waits for `turn`: those of the step before have left, and those of this one have done what was
        // posted last.
        unsafe { *self.team.post.get() = post };
        self.team.turn.fetch_add(1, Ordering::Release);
        then();
        self.team.posted.notify();
    }

    /// Ends the step for all, with this error if any.
    fn end(self, error: Option<&Error>) {
        let team = self.team;
        *team.failed.lock() = error.cloned();
        team.has_failed.store(error.is_some(), Ordering::Relaxed);
        let step = (Meeting::of(team.meeting.load(Ordering::Acquire)).step + 1) & Meeting::STEPS;
        let next = Meeting { phase: Phase::Open, step, has_barrier: false, size: 0, count: 0 };
        // The next meeting after the turn, so that nobody who comes to it takes this for its own.
        self.post(Post::End, || team.meeting.store(next.word(), Ordering::Release));
        if self.has_posted.load(Ordering::Relaxed) {
            self.member.wait_for_all();
        }
    }
}

impl Executor for Leader<'_> {
    /// The members, the leader included.
    fn threads(&self) -> usize {
        self.size
    }

    /// Runs `job(i)` on member i.
    fn run(&self, job: &Job<'_>) -> Result<()> {
        if std::thread::current().id() != self.thread {
            return Err(Error::new(ErrorKind::Internal, "team: a job that is not its leader's"));
        }
        fault::point("team.run")?;
        let team = self.team;
        // SAFETY: only the lifetime in the type changes. Members use the pointer before they count themselves done, and this
        // call returns after that.
        let job: *const Job<'static> = unsafe { std::mem::transmute::<*const Job<'_>, *const Job<'static>>(job) };
        team.done.store(0, Ordering::Relaxed);
        self.post(Post::Job(job), || ());
        if self.has_posted.swap(true, Ordering::Relaxed) {
            self.member.wait_for_all();
        }
        team.work(0, job);
        self.member.wait_for_all();
        team.wait(&team.told, self.size, None, || team.done.load(Ordering::Acquire) == self.size - 1);
        match team.panicked.lock().take() {
            None => Ok(()),
            Some(message) => Err(Error::new(ErrorKind::Internal, message)),
        }
    }
}
