//! Teams: who does what once, who leaves with what, and who is missed.

use std::ffi::c_void;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::executor::Executor;
use super::meeting::{Meeting, Phase};
use super::team::Team;
use super::team_member::{BarrierCallback, MemberWait, TeamMember};
use crate::error::{Error, ErrorKind, Result};

const LONG: Duration = Duration::from_secs(20);

/// # Safety
/// `ctx` is a live barrier.
unsafe extern "C" fn barrier(ctx: *mut c_void) {
    // SAFETY: the tests pass a barrier that outlives the team.
    unsafe { &*ctx.cast::<Barrier>() }.wait();
}

fn within(timeout: Duration) -> MemberWait<'static> {
    MemberWait { timeout, field: "timeout", check: &|| Ok(()) }
}

/// What the members of a step of `size` give, the leader doing `step`.
fn step_of(
    team: &Team,
    size: usize,
    meets: Option<&Barrier>,
    step: impl Fn(&dyn Executor) -> Result<()> + Sync,
) -> Vec<Result<()>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..size)
            .map(|index| {
                let step = &step;
                scope.spawn(move || {
                    let ctx = meets.map_or(std::ptr::null_mut(), |meets| std::ptr::from_ref(meets).cast_mut().cast());
                    let function = meets.map(|_| barrier as BarrierCallback);
                    // SAFETY: a barrier of as many threads.
                    let member = unsafe { TeamMember::new(index as i32, size as i32, function, ctx) };
                    match member.leads() {
                        true => team.lead(&member, &within(LONG), |met| step(met?)),
                        false => team.serve(&member, &within(LONG)),
                    }
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn every_member_does_its_part_of_every_job_once() {
    let team = Team::new(5, "team".into()).unwrap();
    for (size, jobs) in [(1, 2), (5, 3), (2, 0), (4, 1), (3, 20), (5, 0), (1, 1)] {
        let meets = Barrier::new(size);
        for meets in [None, Some(&meets)] {
            for _ in 0..30 {
                let counts: Vec<AtomicUsize> = (0..size).map(|_| AtomicUsize::new(0)).collect();
                let results = step_of(&team, size, meets, |executor| {
                    assert_eq!(executor.threads(), size);
                    (1..=jobs).try_for_each(|job| {
                        executor.run(&|index| {
                            counts[index].fetch_add(1, Ordering::Relaxed);
                        })?;
                        assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == job));
                        Ok(())
                    })
                });
                assert_eq!(results, vec![Ok(()); size]);
            }
        }
    }
}

#[test]
fn all_leave_with_the_error_of_the_step_and_the_next_is_good() {
    let team = Team::new(3, "team".into()).unwrap();
    let error = Error::new(ErrorKind::Aborted, "told to");
    assert_eq!(step_of(&team, 3, None, |_| Err(error.clone())), vec![Err(error.clone()); 3]);
    for bad in 0..3 {
        let job = |index: usize| assert_ne!(index, bad, "member {index} was told to");
        let results = step_of(&team, 3, None, |executor| executor.run(&job));
        let message = results[0].as_ref().unwrap_err().message();
        assert!(message.contains(&format!("member {bad} panicked")), "{message}");
        assert_eq!(results, vec![results[0].clone(); 3]);
    }
    let results = step_of(&team, 2, None, |_| panic!("the leader was told to"));
    assert!(results.iter().all(|result| result.as_ref().unwrap_err().kind() == ErrorKind::Internal), "{results:?}");
    assert_eq!(step_of(&team, 3, None, |executor| executor.run(&|_| ())), vec![Ok(()); 3]);
}

#[test]
fn a_member_that_does_not_come_is_named_and_the_team_stays_broken_off() {
    let team = Team::new(3, "team".into()).unwrap();
    // SAFETY: without a barrier.
    let member = |index| unsafe { TeamMember::new(index, 3, None, std::ptr::null_mut()) };
    let short = || within(Duration::from_millis(30));
    let wanted = "team: member 1 of 3 did not come within 30ms (timeout)";
    std::thread::scope(|scope| {
        let other = scope.spawn(|| team.serve(&member(2), &short()));
        let told = Mutex::new(None);
        let result = team.lead(&member(0), &short(), |met| {
            *told.lock() = met.err();
            Ok(())
        });
        let error = result.unwrap_err();
        assert_eq!((error.kind(), error.message()), (ErrorKind::Timeout, wanted));
        assert_eq!(told.into_inner(), Some(error.clone()));
        assert_eq!(other.join().unwrap(), Err(error));
    });
    let late = team.serve(&member(1), &within(LONG)).unwrap_err();
    assert_eq!(late.message(), wanted);
}

#[test]
fn a_wait_for_members_ends_when_there_is_nothing_to_wait_for() {
    let team = Team::new(2, "team".into()).unwrap();
    // SAFETY: without a barrier.
    let member = unsafe { TeamMember::new(1, 2, None, std::ptr::null_mut()) };
    let check = || Err(Error::new(ErrorKind::Aborted, "told to"));
    let wait = MemberWait { timeout: LONG, field: "timeout", check: &check };
    let began = Instant::now();
    assert_eq!(team.serve(&member, &wait).unwrap_err().kind(), ErrorKind::Aborted);
    assert!(began.elapsed() < LONG / 2);
}

#[test]
fn a_meeting_is_one_word() {
    for phase in [Phase::Open, Phase::Running, Phase::Broken] {
        for (step, has_barrier, size, count) in [(0, false, 0, 0), (Meeting::STEPS, true, 1024, 1023), (7, false, 3, 3)]
        {
            let meeting = Meeting { phase, step, has_barrier, size, count };
            assert_eq!(Meeting::of(meeting.word()), meeting);
        }
    }
    assert_eq!(Team::new(1025, "team".into()).unwrap_err().kind(), ErrorKind::NoMemory);
}
