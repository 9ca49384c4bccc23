//! Which keys a query row sees: the only place that knows what hides them (causality and windows; the lengths and
//! placements that it is asked with).
//!
//! A key is hidden by its global position and the query's. [`VisibilityRule::sees`] is that definition; the others derive
//! from it what a backend needs: the slots that a row can see ([`Visibility`]), the first and last tile of work, and the
//! visible slots of a tile.

use std::ops::Range;

use super::descriptor::AttentionDesc;
use super::placement::{Shard, interleaved_position};

impl AttentionDesc {
    /// Whether global positions matter: to what is seen, or to scores.
    pub fn needs_positions(&self) -> bool {
        VisibilityRule::of(self).reads_positions() || self.alibi
    }
}

/// Global positions of the keys that a rank holds of one sequence, by local slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyPositions<'a> {
    /// Slot s holds position `start` + s.
    Contiguous {
        /// Position of slot 0.
        start: i64,
    },
    /// Runs of `run` positions go to the ranks in turn.
    Interleaved {
        /// Tokens a run, at least 1.
        run: i64,
        /// The rank that holds the keys.
        shard: Shard,
    },
    /// Slot s holds position `positions[s]`; in any order.
    Explicit {
        /// One position a slot that is held.
        positions: &'a [i32],
    },
}

impl KeyPositions<'_> {
    /// The position that `slot` holds.
    #[inline]
    pub fn of(&self, slot: usize) -> i64 {
        match *self {
            KeyPositions::Contiguous { start } => start + slot as i64,
            KeyPositions::Interleaved { run, shard } => interleaved_position(run, shard, slot as i64),
            KeyPositions::Explicit { positions } => i64::from(positions[slot]),
        }
    }

    /// The positions of the slots from `slot` on, which are valid.
    #[inline]
    pub fn fill(&self, slot: usize, out: &mut [i32]) {
        match *self {
            KeyPositions::Contiguous { start } => {
                let first = start + slot as i64;
                out.iter_mut().enumerate().for_each(|(i, out)| *out = (first + i as i64) as i32);
            }
            KeyPositions::Interleaved { run, shard } => {
                let (mut position, mut left) = (self.of(slot), run - slot as i64 % run);
                for out in out {
                    *out = position as i32;
                    (position, left) = (position + 1, left - 1);
                    if left == 0 {
                        (position, left) = (position + i64::from(shard.world - 1) * run, run);
                    }
                }
            }
            KeyPositions::Explicit { positions } => out.copy_from_slice(&positions[slot..][..out.len()]),
        }
    }

    /// Whether the positions of slots 0 to `held` all lie between 0 and 2^31 - 1.
    pub fn are_valid(&self, held: usize) -> bool {
        let valid = |position: i64| (0..=i64::from(i32::MAX)).contains(&position);
        match *self {
            _ if held == 0 => true,
            KeyPositions::Contiguous { .. } | KeyPositions::Interleaved { .. } => {
                valid(self.of(0)) && valid(self.of(held - 1))
            }
            KeyPositions::Explicit { positions } => positions[..held].iter().all(|&position| position >= 0),
        }
    }

    /// How many slots hold positions up to `position`, where positions rise with the slot; None where they need not.
    #[inline]
    fn up_to(&self, position: i64) -> Option<i64> {
        match *self {
            KeyPositions::Contiguous { start } => Some(position - start + 1),
            KeyPositions::Interleaved { run, shard } => {
                let (world, rank) = (i64::from(shard.world), i64::from(shard.rank));
                let (round, length) = (run * world, position + 1);
                Some(length / round * run + (length % round - rank * run).clamp(0, run))
            }
            KeyPositions::Explicit { .. } => None,
        }
    }
}

/// Local slots that a query row, or several, can see: none before `lo`, none from `hi` on. Between them a slot may be
/// hidden still.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Visibility {
    /// The first slot.
    pub lo: usize,
    /// The slot after the last; `lo` where nothing is seen.
    pub hi: usize,
}

impl Visibility {
    /// Nothing.
    pub const NONE: Visibility = Visibility { lo: 0, hi: 0 };

    /// Whether nothing is seen.
    pub fn is_empty(self) -> bool {
        self.lo >= self.hi
    }

    /// The slots that either can see, and those between.
    #[must_use]
    pub fn union(self, other: Visibility) -> Visibility {
        match (self.is_empty(), other.is_empty()) {
            (true, _) => other,
            (_, true) => self,
            _ => Visibility { lo: self.lo.min(other.lo), hi: self.hi.max(other.hi) },
        }
    }

    /// The tiles of `tile` slots (slot 0 begins one) that hold them: first to last.
    pub fn tiles(self, tile: usize) -> Range<usize> {
        if self.is_empty() { 0..0 } else { self.lo / tile..self.hi.div_ceil(tile) }
    }
}

/// What hides keys from queries in a shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VisibilityRule {
    causal: bool,
    /// Keys that a query sees up to its own position; 0: all.
    window: i64,
}

impl VisibilityRule {
    /// The rule of `desc`.
    pub fn of(desc: &AttentionDesc) -> VisibilityRule {
        VisibilityRule { causal: desc.causal, window: i64::from(desc.window) }
    }

    /// Keys that a query sees up to its own position; 0: all.
    pub fn window(self) -> i64 {
        self.window
    }

    /// Whether it looks at positions; where it does not, those that it is asked with may be anything.
    pub fn reads_positions(self) -> bool {
        self.causal || self.window > 0
    }

    /// Whether a query at `position` sees the key in `slot`.
    pub fn sees(self, keys: &KeyPositions<'_>, position: i64, slot: usize) -> bool {
        self.sees_between(keys, slot, position, position)
    }

    /// Whether a query may see the key in `slot` that is at `first`, `last` or a position between.
    #[inline]
    fn sees_between(self, keys: &KeyPositions<'_>, slot: usize, first: i64, last: i64) -> bool {
        if !self.reads_positions() {
            return true;
        }
        let key = keys.of(slot);
        (!self.causal || key <= last) && (self.window == 0 || key > first - self.window)
    }

    /// What a query at `position` can see of the slots 0 to `held`.
    #[inline]
    pub fn visible(self, keys: &KeyPositions<'_>, held: usize, position: i64) -> Visibility {
        self.visible_between(keys, held, position, position)
    }

    /// What queries at positions from `first` to `last` can see of the slots 0 to `held`.
    #[inline]
    pub fn visible_between(self, keys: &KeyPositions<'_>, held: usize, first: i64, last: i64) -> Visibility {
        if !self.reads_positions() {
            return Visibility { lo: 0, hi: held };
        }
        let up_to = |position: i64| keys.up_to(position).map(|slots| slots.clamp(0, held as i64) as usize);
        let (Some(hidden), Some(seen)) = (up_to(first - self.window), up_to(last)) else {
            // Positions in any order: the first and the last slot that any of them sees.
            let sees = |&slot: &usize| self.sees_between(keys, slot, first, last);
            let Some(lo) = (0..held).find(sees) else { return Visibility::NONE };
            return Visibility { lo, hi: (lo..held).rev().find(sees).map_or(lo, |slot| slot + 1) };
        };
        let lo = if self.window > 0 { hidden } else { 0 };
        let hi = if self.causal { seen } else { held };
        Visibility { lo, hi: hi.max(lo) }
    }

    /// Which of the `count` <= 64 slots from `slot` on a query at `position` sees: bit i is `slot` + i. All are held.
    #[inline]
    pub fn mask(self, keys: &KeyPositions<'_>, position: i64, slot: usize, count: usize) -> u64 {
        if self.reads_positions() && matches!(keys, KeyPositions::Explicit { .. }) {
            return (0..count).fold(0, |mask, i| mask | u64::from(self.sees(keys, position, slot + i)) << i);
        }
        let seen = self.visible(keys, slot + count, position);
        low_bits(seen.hi.saturating_sub(slot)) & !low_bits(seen.lo.saturating_sub(slot))
    }
}

/// The lowest `n` bits; all from 64 on.
#[inline]
pub fn low_bits(n: usize) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::placement::Placement;

    /// Every derived answer against the definition, over all placements, around every border.
    #[test]
    fn ranges_and_masks_follow_the_definition() {
        let explicit: Vec<i32> = (0..150).map(|slot| (slot * 37) % 151).collect();
        let mut all = vec![KeyPositions::Explicit { positions: &explicit }];
        all.extend([0, 1, 17, 200].map(|start| KeyPositions::Contiguous { start }));
        for (run, rank, world) in [(1, 0, 1), (1, 2, 3), (4, 0, 2), (4, 1, 2), (64, 1, 3), (7, 4, 5)] {
            all.push(KeyPositions::Interleaved { run, shard: Shard { rank, world } });
        }
        for keys in all {
            for (causal, window) in [(false, 0), (true, 0), (false, 1), (true, 1), (true, 70), (false, 300)] {
                let rule = VisibilityRule { causal, window };
                for position in (-1..400).chain([i64::from(i32::MAX)]) {
                    let sees = |slot: usize| rule.sees(&keys, position, slot);
                    for held in [0usize, 1, 63, 64, 65, 150] {
                        let seen = rule.visible(&keys, held, position);
                        assert!(seen.lo <= seen.hi && seen.hi <= held);
                        let outside = (0..held).filter(|slot| !(seen.lo..seen.hi).contains(slot));
                        assert!(outside.into_iter().all(|slot| !sees(slot)), "{keys:?} {position} {held}");
                        if !matches!(keys, KeyPositions::Explicit { .. }) {
                            assert!((seen.lo..seen.hi).all(sees), "{keys:?} {position} {held}");
                        }
                    }
                    for last in [0, 1, 90].map(|more| position + more).into_iter().filter(|_| position % 37 == 0) {
                        let seen = rule.visible_between(&keys, 150, position, last);
                        let any = |slot: &usize| (position..=last).any(|at| rule.sees(&keys, at, *slot));
                        let (first, end) = ((0..150).find(any), (0..150).rev().find(any).map(|slot| slot + 1));
                        let found = (!seen.is_empty()).then_some((seen.lo, seen.hi));
                        assert_eq!(found, first.zip(end), "{keys:?} {position} to {last}");
                    }
                    for (slot, count) in [(0, 64), (64, 64), (128, 22), (3, 1), (70, 0)] {
                        let mut positions = vec![0; count];
                        keys.fill(slot, &mut positions);
                        assert!(positions.iter().enumerate().all(|(i, &p)| i64::from(p) == keys.of(slot + i)));
                        let wanted = (0..count).fold(0, |mask, i| mask | u64::from(sees(slot + i)) << i);
                        assert_eq!(rule.mask(&keys, position, slot, count), wanted, "{keys:?} {position} {slot}");
                    }
                }
            }
        }
    }

    #[test]
    fn positions_are_those_of_the_placement() {
        use crate::attention::placement::{global_position, local_length};
        let (length, world) = (100, 3);
        for rank in 0..world {
            let shard = Shard { rank, world };
            for run in [1, 4, 64] {
                let placement = Placement::Interleaved { run };
                let keys = KeyPositions::Interleaved { run: i64::from(run), shard };
                for slot in 0..local_length(placement, shard, length).unwrap() {
                    let wanted = global_position(placement, shard, length, slot).unwrap();
                    assert_eq!(keys.of(slot as usize), i64::from(wanted));
                }
            }
        }
        let last = i64::from(i32::MAX);
        assert!(KeyPositions::Contiguous { start: last }.are_valid(1));
        assert!(!KeyPositions::Contiguous { start: last }.are_valid(2));
        assert!(!KeyPositions::Contiguous { start: -1 }.are_valid(1));
        let far = KeyPositions::Interleaved { run: 1 << 30, shard: Shard { rank: 1, world: 2 } };
        assert!(far.are_valid(1 << 30) && !far.are_valid((1 << 30) + 1));
        assert!(KeyPositions::Explicit { positions: &[0, -1] }.are_valid(1));
        assert!(!KeyPositions::Explicit { positions: &[0, -1] }.are_valid(2));
    }

    #[test]
    fn tiles_hold_what_is_seen() {
        let seen = |lo, hi| Visibility { lo, hi };
        assert_eq!(seen(0, 65).tiles(64), 0..2);
        assert_eq!(seen(64, 65).tiles(64), 1..2);
        assert_eq!(seen(130, 130).tiles(64), 0..0);
        assert_eq!(seen(5, 9).union(seen(20, 20)), seen(5, 9));
        assert_eq!(Visibility::NONE.union(seen(5, 9)).union(seen(2, 6)), seen(2, 9));
    }
}
