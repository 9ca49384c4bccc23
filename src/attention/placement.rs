//! Placement: which rank holds which token, and the global position of each local slot.
//!
//! Note that `local(L - k) != local(L) - k`: always ask these functions.

use crate::error::{Error, Result};

/// Which rank holds which token of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Placement {
    /// Each rank holds one run of consecutive tokens; its first global position comes with each step (`kv_start`).
    #[default]
    Contiguous,
    /// Runs of `run` tokens go to the ranks in turn; `run` = 1 is round robin.
    Interleaved {
        /// Tokens a run, at least 1.
        run: i32,
    },
    /// Every local slot carries its own global position (`kv_position`).
    Explicit,
}

impl Placement {
    /// The name used in messages.
    pub fn name(self) -> &'static str {
        match self {
            Placement::Contiguous => "CONTIGUOUS",
            Placement::Interleaved { .. } => "INTERLEAVED",
            Placement::Explicit => "EXPLICIT",
        }
    }
}

/// A rank, and how many ranks its communicator has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shard {
    /// This rank, 0 to `world` - 1.
    pub rank: i32,
    /// The number of ranks.
    pub world: i32,
}

impl Shard {
    /// The only rank of a world of one.
    pub const ALONE: Shard = Shard { rank: 0, world: 1 };

    fn check(self) -> Result<()> {
        if self.world < 1 {
            return Err(Error::invalid("world", self.world, "at least 1"));
        }
        if self.rank < 0 || self.rank >= self.world {
            return Err(Error::invalid("rank", self.rank, format!("0 to {}", self.world - 1)));
        }
        Ok(())
    }
}

/// The rank that holds global position `position` of a sequence of `global_length` tokens.
///
/// Contiguous placement here is the even split that [`local_length`] and [`global_position`] describe: rank r holds
/// positions floor(r L / p) up to floor((r + 1) L / p).
pub fn owner(placement: Placement, world: i32, global_length: i32, position: i32) -> Result<i32> {
    Shard { rank: 0, world }.check()?;
    check_length(global_length)?;
    if position < 0 || position >= global_length {
        return Err(Error::invalid("position", position, format!("0 to global_length - 1 = {}", global_length - 1)));
    }
    let (p, length, position) = (i64::from(world), i64::from(global_length), i64::from(position));
    match placement {
        Placement::Contiguous => {
            // The largest r with floor(r L / p) <= position.
            Ok((((position + 1) * p - 1) / length) as i32)
        }
        Placement::Interleaved { run } => Ok(((position / check_run(run)?) % p) as i32),
        Placement::Explicit => Err(explicit()),
    }
}

/// How many tokens of a sequence of `global_length` tokens the shard holds.
pub fn local_length(placement: Placement, shard: Shard, global_length: i32) -> Result<i32> {
    shard.check()?;
    check_length(global_length)?;
    let (p, r, length) = (i64::from(shard.world), i64::from(shard.rank), i64::from(global_length));
    match placement {
        Placement::Contiguous => Ok(((r + 1) * length / p - r * length / p) as i32),
        Placement::Interleaved { run } => {
            let run = check_run(run)?;
            let round = p * run;
            Ok((length / round * run + (length % round - r * run).clamp(0, run)) as i32)
        }
        Placement::Explicit => Err(explicit()),
    }
}

/// The local slot in which the owner of `position` holds it.
pub fn local_slot(placement: Placement, world: i32, global_length: i32, position: i32) -> Result<i32> {
    let rank = owner(placement, world, global_length, position)?;
    match placement {
        Placement::Contiguous => {
            Ok((i64::from(position) - i64::from(rank) * i64::from(global_length) / i64::from(world)) as i32)
        }
        Placement::Interleaved { run } => {
            let (position, run) = (i64::from(position), check_run(run)?);
            Ok((position / (run * i64::from(world)) * run + position % run) as i32)
        }
        Placement::Explicit => Err(explicit()),
    }
}

/// The global position of local slot `slot` of the shard.
pub fn global_position(placement: Placement, shard: Shard, global_length: i32, slot: i32) -> Result<i32> {
    let held = local_length(placement, shard, global_length)?;
    if slot < 0 || slot >= held {
        return Err(Error::invalid("slot", slot, format!("0 to local_length - 1 = {}", i64::from(held) - 1)));
    }
    match placement {
        Placement::Contiguous => {
            let start = i64::from(shard.rank) * i64::from(global_length) / i64::from(shard.world);
            Ok((start + i64::from(slot)) as i32)
        }
        Placement::Interleaved { run } => Ok(interleaved_position(i64::from(run), shard, i64::from(slot)) as i32),
        Placement::Explicit => Err(explicit()),
    }
}

/// The global position of `slot` under interleaved placement, unchecked.
#[inline]
pub(crate) fn interleaved_position(run: i64, shard: Shard, slot: i64) -> i64 {
    (slot / run * i64::from(shard.world) + i64::from(shard.rank)) * run + slot % run
}

/// The heads that `rank` owns in a scattered output: floor(r H / p) up to floor((r + 1) H / p), possibly none.
pub fn head_range(heads: i32, shard: Shard) -> Result<std::ops::Range<i32>> {
    shard.check()?;
    if heads < 0 {
        return Err(Error::invalid("heads", heads, "at least 0"));
    }
    let edge = |r: i32| (i64::from(r) * i64::from(heads) / i64::from(shard.world)) as i32;
    Ok(edge(shard.rank)..edge(shard.rank + 1))
}

fn check_run(run: i32) -> Result<i64> {
    if run < 1 { Err(Error::invalid("placement.interleave", run, "at least 1")) } else { Ok(i64::from(run)) }
}

fn check_length(global_length: i32) -> Result<()> {
    if global_length < 0 { Err(Error::invalid("global_length", global_length, "at least 0")) } else { Ok(()) }
}

fn explicit() -> Error {
    Error::invalid("placement.kind", "EXPLICIT", "CONTIGUOUS or INTERLEAVED (explicit positions are the engine's own)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_has_one_owner_and_one_slot() {
        for world in [1, 2, 3, 5, 8] {
            for length in [0, 1, 2, 7, 16, 33, 100] {
                for placement in
                    [Placement::Contiguous, Placement::Interleaved { run: 1 }, Placement::Interleaved { run: 4 }]
                {
                    let mut counts = vec![0; world as usize];
                    for position in 0..length {
                        let rank = owner(placement, world, length, position).unwrap();
                        let slot = local_slot(placement, world, length, position).unwrap();
                        let shard = Shard { rank, world };
                        assert_eq!(global_position(placement, shard, length, slot).unwrap(), position);
                        counts[rank as usize] += 1;
                    }
                    for rank in 0..world {
                        let held = local_length(placement, Shard { rank, world }, length).unwrap();
                        assert_eq!(held, counts[rank as usize], "{placement:?} world {world} length {length}");
                    }
                }
            }
        }
    }

    #[test]
    fn head_ranges_cover_all_heads() {
        for (heads, world) in [(32, 4), (5, 3), (2, 8), (0, 3)] {
            let mut next = 0;
            for rank in 0..world {
                let range = head_range(heads, Shard { rank, world }).unwrap();
                assert_eq!(range.start, next);
                next = range.end;
            }
            assert_eq!(next, heads);
        }
    }
}
