//! Runs one step on every rank at once, again and again, and times it from the release of the ranks to the last return.

use std::time::Instant;

use treeattn::device::available_cores;

use super::barrier::Barrier;
use crate::outcome::Outcome;

/// Calls `step(rank, turn)` for `turns` turns on a thread a rank; the ranks start each turn together. Seconds of each
/// turn: from the moment the last rank was ready until the last rank returned.
pub fn time(
    ranks: usize,
    turns: usize,
    step: &(dyn Fn(usize, usize) -> treeattn::Result<()> + Sync),
) -> Outcome<Vec<f64>> {
    if ranks == 1 {
        let mut times = Vec::with_capacity(turns);
        for turn in 0..turns {
            let begin = Instant::now();
            step(0, turn)?;
            times.push(begin.elapsed().as_secs_f64());
        }
        return Ok(times);
    }
    let barrier = Barrier::new(ranks, available_cores());
    let base = Instant::now();
    let run = |rank: usize| {
        let mut times = Vec::with_capacity(turns);
        let mut failed = None;
        for turn in 0..turns {
            let ready = base.elapsed();
            barrier.wait();
            // A rank that fails keeps coming to the barrier; its peers fail with it.
            if failed.is_none() {
                failed = step(rank, turn).err();
            }
            times.push((ready, base.elapsed()));
        }
        match failed {
            None => Ok(times),
            Some(error) => Err(error),
        }
    };
    let ranks: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || run(rank))).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let mut all = Vec::with_capacity(ranks.len());
    for rank in ranks {
        all.push(rank.map_err(|_| "a rank of the bench panicked")??);
    }
    let latest = |turn: usize, of: fn(&(std::time::Duration, std::time::Duration)) -> std::time::Duration| {
        all.iter().map(|times| of(&times[turn])).max().unwrap_or_default()
    };
    Ok((0..turns).map(|turn| (latest(turn, |t| t.1) - latest(turn, |t| t.0)).as_secs_f64()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_rank_takes_every_turn_and_errors_come_out() {
        let calls = AtomicUsize::new(0);
        let count = |_: usize, _: usize| {
            calls.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        assert_eq!(time(3, 50, &count).unwrap().len(), 50);
        assert_eq!(calls.load(Ordering::Relaxed), 150);
        let fail = |rank: usize, turn: usize| match (rank, turn) {
            (1, 2) => Err(treeattn::Error::invalid("turn", turn, "another")),
            _ => Ok(()),
        };
        assert!(time(2, 5, &fail).is_err());
    }
}
