//! What the ranks of a plan with the flag CHECKED tell each other of a sequence in a step, and whether it fits together.
//!
//! Queries are compared by a 64-bit sum over their bits. That every position is held once is exact under contiguous and
//! interleaved placement. Under explicit placement it is judged by how many positions below `global_length` the ranks hold
//! together and by the sums of their first, second and third powers: one wrong position always shows, several would have to
//! keep all four numbers. Keys outside the positions 0 to `global_length` - 1 do not fit, unless the plan allows surplus keys.
//! Of those the ones that queries see, at positions that `query_position` puts beyond, have to be there once, too; but not under
//! explicit placement, where they may be the nodes of a tree of drafts, of which several have one depth.

use super::majority::odd_ranks;
use super::placement::{Placement, Shard, local_length};
use crate::partial::DataFaultCause;

/// What one rank tells of one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SequenceRecord {
    /// Sum of [`mixed`] over the words of its query rows.
    pub query: u64,
    /// The same over the positions of its query tokens, given by `query_position` or not.
    pub query_position: u64,
    /// Contiguous placement: the position of its first key here. Explicit placement: its keys here whose positions are not
    /// below `global_length`, or below 0.
    pub start: i64,
    /// Explicit placement: sums of the first, second and third powers of the positions here below `global_length`,
    /// modulo 2^64. Else, where the plan allows surplus keys: in the first how many positions its queries see, from 0 on.
    pub powers: [u64; 3],
    /// Its first query token.
    pub first_token: i32,
    /// Its query tokens.
    pub tokens: i32,
    /// Its `global_length`.
    pub global_length: i32,
    /// Its keys here, with explicit placement those below `global_length`; -1: bad data, which is told apart.
    pub keys: i32,
}

impl SequenceRecord {
    /// Bytes that it travels as.
    pub const BYTES: usize = 64;

    /// Writes it to `to`.
    pub fn store(&self, to: &mut [u8; Self::BYTES]) {
        let words = [self.query, self.query_position, self.start.cast_unsigned()];
        let ints = [self.first_token, self.tokens, self.global_length, self.keys];
        let pairs = ints
            .as_chunks::<2>()
            .0
            .iter()
            .map(|&[low, high]| u64::from(low.cast_unsigned()) | u64::from(high.cast_unsigned()) << 32);
        let words = words.into_iter().chain(self.powers).chain(pairs);
        to.as_chunks_mut::<8>().0.iter_mut().zip(words).for_each(|(to, word)| *to = word.to_le_bytes());
    }

    /// Reads it from where [`SequenceRecord::store`] wrote it.
    pub fn load(from: &[u8; Self::BYTES]) -> SequenceRecord {
        let word = |i: usize| u64::from_le_bytes(from.as_chunks::<8>().0[i]);
        let int = |i: usize| i32::from_le_bytes(from.as_chunks::<4>().0[12 + i]);
        SequenceRecord {
            query: word(0),
            query_position: word(1),
            start: word(2).cast_signed(),
            powers: [word(3), word(4), word(5)],
            first_token: int(0),
            tokens: int(1),
            global_length: int(2),
            keys: int(3),
        }
    }
}

/// Word `index` of an input, mixed so that sums of such words tell inputs apart: the finaliser of MurmurHash3,
/// by Austin Appleby, in the public domain.
#[inline]
pub fn mixed(index: u64, word: u64) -> u64 {
    let mut x = word.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ x >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ x >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ x >> 33
}

/// Adds a position to sums of powers.
#[inline]
pub fn add_powers(powers: &mut [u64; 3], position: u64) {
    let square = position.wrapping_mul(position);
    for (sum, power) in powers.iter_mut().zip([position, square, square.wrapping_mul(position)]) {
        *sum = sum.wrapping_add(power);
    }
}

/// The sums of powers of the positions 0 to `length` - 1.
fn all_powers(length: i32) -> [u64; 3] {
    let n = length.max(0).unsigned_abs() as u128;
    let first = n * n.saturating_sub(1) / 2;
    let second = first * (2 * n).saturating_sub(1) / 3;
    [first as u64, second as u64, (first * first) as u64]
}

/// Judges the records of one sequence, rank by rank: the rank to blame (-1 where none can be told) and what it is blamed
/// for. Where ranks differ in what must be the same, the first outside the largest party is to blame, and where there is no
/// largest party, the first that differs from rank 0. `surplus_keys`: keys at or beyond `global_length` are allowed.
pub fn judge(placement: Placement, surplus_keys: bool, records: &[SequenceRecord]) -> Option<(i32, DataFaultCause)> {
    if records.iter().any(|record| record.keys < 0) {
        return None;
    }
    let same = [
        (DataFaultCause::QueryStartDiffers, odd(records, |r| (r.first_token, r.tokens))),
        (DataFaultCause::GlobalLengthDiffers, odd(records, |r| r.global_length)),
        (DataFaultCause::QueryPositionDiffers, odd(records, |r| r.query_position)),
        (DataFaultCause::QueryDiffers, odd(records, |r| r.query)),
    ];
    for (cause, odd) in same {
        if let Some(rank) = odd {
            return Some((rank as i32, cause));
        }
    }
    let first = records.first()?;
    if first.tokens == 0 {
        // Nothing is attended.
        return None;
    }
    if let Some(rank) = records.iter().enumerate().position(|(rank, record)| {
        let shard = Shard { rank: rank as i32, world: records.len() as i32 };
        holds_outside(placement, shard, surplus_keys, record)
    }) {
        return Some((rank as i32, DataFaultCause::KeysOutside));
    }
    // How many positions the ranks are to hold. Queries that were passed alike see as far.
    let length = match placement {
        Placement::Explicit => first.global_length,
        Placement::Contiguous | Placement::Interleaved { .. } => first.global_length.max(first.powers[0] as i32),
    };
    match placement {
        Placement::Contiguous => contiguous(i64::from(length), records),
        Placement::Interleaved { .. } => records.iter().enumerate().find_map(|(rank, record)| {
            let shard = Shard { rank: rank as i32, world: records.len() as i32 };
            let wanted = local_length(placement, shard, length).ok()?;
            (record.keys < wanted).then_some((rank as i32, DataFaultCause::KeysMissing))
        }),
        Placement::Explicit => {
            let mut powers = [0u64; 3];
            let mut keys = 0i64;
            for record in records {
                keys += i64::from(record.keys);
                powers.iter_mut().zip(record.powers).for_each(|(sum, power)| *sum = sum.wrapping_add(power));
            }
            let wanted = i64::from(first.global_length);
            let twice = keys > wanted || keys == wanted && powers != all_powers(first.global_length);
            let cause = if twice { DataFaultCause::KeysTwice } else { DataFaultCause::KeysMissing };
            (twice || keys < wanted).then_some((-1, cause))
        }
    }
}

/// The first rank whose value is not that of the others.
fn odd<T: PartialEq>(records: &[SequenceRecord], value: impl Fn(&SequenceRecord) -> T) -> Option<usize> {
    odd_ranks(records.len(), 0, |rank| value(&records[rank])).first().copied()
}

/// Whether a rank holds keys at positions that the sequence does not have.
fn holds_outside(placement: Placement, shard: Shard, surplus_keys: bool, record: &SequenceRecord) -> bool {
    match placement {
        _ if surplus_keys => false,
        Placement::Contiguous => {
            let end = record.start + i64::from(record.keys);
            record.keys > 0 && (record.start < 0 || end > i64::from(record.global_length))
        }
        Placement::Interleaved { .. } => {
            record.keys > local_length(placement, shard, record.global_length).unwrap_or(0)
        }
        Placement::Explicit => record.start > 0,
    }
}

/// Whether the ranks' ranges hold the positions 0 to `length` - 1, each once. What lies beyond is not seen.
fn contiguous(length: i64, records: &[SequenceRecord]) -> Option<(i32, DataFaultCause)> {
    let range = |record: &SequenceRecord| record.start..(record.start + i64::from(record.keys)).min(length);
    let held = || records.iter().map(range).enumerate().filter(|(_, range)| !range.is_empty());
    // Most often ranks hold them in their order.
    let in_order = held().try_fold(0, |covered, (_, range)| (range.start == covered).then_some(range.end));
    if in_order == Some(length) {
        return None;
    }
    for (rank, range) in held() {
        if held().take_while(|&(other, _)| other < rank).any(|(_, o)| o.start < range.end && range.start < o.end) {
            return Some((rank as i32, DataFaultCause::KeysTwice));
        }
    }
    let mut covered = 0;
    let mut last = None;
    while let Some((rank, range)) = held().find(|(_, range)| range.start == covered) {
        (covered, last) = (range.end, Some(rank));
    }
    if covered >= length {
        return None;
    }
    // Whoever ends too early, or begins too late.
    let next = || held().filter(|(_, range)| range.start > covered).min_by_key(|(_, range)| range.start);
    let rank = last.or_else(|| next().map(|(rank, _)| rank)).map_or(-1, |rank| rank as i32);
    Some((rank, DataFaultCause::KeysMissing))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partial::DataFaultCause::*;

    fn record(start: i64, keys: i32, global_length: i32) -> SequenceRecord {
        SequenceRecord { start, keys, global_length, tokens: 1, query: 7, ..SequenceRecord::default() }
    }

    #[test]
    fn a_record_travels_whole() {
        let record = SequenceRecord {
            query: u64::MAX - 1,
            query_position: 2,
            start: -3,
            powers: [4, u64::MAX, 6],
            first_token: 7,
            tokens: -8,
            global_length: i32::MAX,
            keys: -1,
        };
        let mut bytes = [0; SequenceRecord::BYTES];
        record.store(&mut bytes);
        assert_eq!(SequenceRecord::load(&bytes), record);
    }

    #[test]
    fn contiguous_ranges_hold_every_position_once() {
        let judge = |length: i32, ranges: &[(i64, i32)]| {
            let records: Vec<_> = ranges.iter().map(|&(start, keys)| record(start, keys, length)).collect();
            judge(Placement::Contiguous, false, &records)
        };
        assert_eq!(judge(10, &[(0, 4), (4, 6)]), None);
        assert_eq!(judge(10, &[(4, 6), (0, 4)]), None);
        assert_eq!(judge(10, &[(0, 10), (0, 0), (9, 0)]), None);
        assert_eq!(judge(10, &[(0, 4), (4, 7)]), Some((1, KeysOutside)));
        assert_eq!(judge(10, &[(-1, 5), (4, 6)]), Some((0, KeysOutside)));
        assert_eq!(judge(10, &[(0, 10), (10, 1)]), Some((1, KeysOutside)));
        assert_eq!(judge(0, &[(0, 0), (0, 3)]), Some((1, KeysOutside)));
        assert_eq!(judge(-1, &[(0, 0), (0, 3)]), Some((1, KeysOutside)));
        assert_eq!(judge(10, &[(0, 10), (20, 0)]), None, "no key, no position");
        assert_eq!(judge(10, &[(0, 5), (4, 6)]), Some((1, KeysTwice)));
        assert_eq!(judge(10, &[(0, 5), (0, 5)]), Some((1, KeysTwice)));
        assert_eq!(judge(10, &[(0, 10), (3, 2), (5, 5)]), Some((1, KeysTwice)));
        assert_eq!(judge(10, &[(0, 4), (5, 5)]), Some((0, KeysMissing)));
        assert_eq!(judge(10, &[(0, 5), (5, 4)]), Some((1, KeysMissing)));
        assert_eq!(judge(10, &[(0, 0), (1, 9)]), Some((1, KeysMissing)));
        assert_eq!(judge(10, &[(0, 0), (0, 0)]), Some((-1, KeysMissing)));
    }

    #[test]
    fn interleaved_ranks_hold_what_the_length_asks_for() {
        let judge =
            |keys: [i32; 2]| judge(Placement::Interleaved { run: 1 }, false, &keys.map(|keys| record(0, keys, 10)));
        assert_eq!(judge([5, 5]), None);
        assert_eq!(judge([8, 2]), Some((0, KeysOutside)));
        assert_eq!(judge([5, 2]), Some((1, KeysMissing)));
        assert_eq!(judge([5, 6]), Some((1, KeysOutside)));
        assert_eq!(judge([4, 5]), Some((0, KeysMissing)));
    }

    #[test]
    fn explicit_positions_are_each_held_once() {
        let held = |positions: &[u64]| {
            let mut record = record(0, positions.len() as i32, 10);
            positions.iter().for_each(|&position| add_powers(&mut record.powers, position));
            record
        };
        let judge = |a: &[u64], b: &[u64]| judge(Placement::Explicit, false, &[held(a), held(b)]);
        assert_eq!(judge(&[9, 0, 3, 7], &[1, 2, 4, 5, 6, 8]), None);
        assert_eq!(judge(&[9, 0, 3, 7], &[1, 2, 4, 5, 6]), Some((-1, KeysMissing)));
        assert_eq!(judge(&[9, 0, 3, 7], &[1, 2, 4, 5, 6, 7]), Some((-1, KeysTwice)));
        assert_eq!(judge(&[9, 0, 3, 7], &[1, 2, 4, 5, 6, 8, 8]), Some((-1, KeysTwice)));
        // Three slots whose positions keep the sum and the sum of squares: 0, 4, 5 for 1, 2, 6.
        assert_eq!(judge(&[0, 4, 5, 3, 7], &[0, 4, 5, 8, 9]), Some((-1, KeysTwice)));
        let mut outside = held(&[9, 0, 3, 7]);
        outside.start = 1;
        let records = [held(&[1, 2, 4, 5, 6, 8]), outside];
        assert_eq!(super::judge(Placement::Explicit, false, &records), Some((1, KeysOutside)));
        assert_eq!(super::judge(Placement::Explicit, true, &records), None);
        for length in [0, 1, 2, 1000] {
            let mut powers = [0; 3];
            (0..length as u64).for_each(|position| add_powers(&mut powers, position));
            assert_eq!(powers, all_powers(length));
        }
        assert_eq!(all_powers(i32::MAX)[0], (i32::MAX as u64) * ((1 << 30) - 1));
    }

    #[test]
    fn surplus_keys_are_not_seen_where_the_plan_allows_them() {
        let records = [record(0, 4, 10), record(4, 9, 10)];
        assert_eq!(judge(Placement::Contiguous, true, &records), None);
        assert_eq!(judge(Placement::Contiguous, true, &[record(0, 4, 10), record(5, 9, 10)]), Some((0, KeysMissing)));
        let run = Placement::Interleaved { run: 1 };
        assert_eq!(judge(run, true, &[record(0, 8, 10), record(0, 5, 10)]), None);
        assert_eq!(judge(run, true, &[record(0, 8, 10), record(0, 2, 10)]), Some((1, KeysMissing)));
        // But as far as queries see.
        let seen = |start, keys| SequenceRecord { powers: [13, 0, 0], ..record(start, keys, 10) };
        assert_eq!(judge(Placement::Contiguous, true, &[seen(0, 4), seen(4, 9)]), None);
        assert_eq!(judge(Placement::Contiguous, true, &[seen(0, 4), seen(4, 10)]), None);
        assert_eq!(judge(Placement::Contiguous, true, &[seen(0, 4), seen(4, 8)]), Some((1, KeysMissing)));
        assert_eq!(judge(Placement::Contiguous, true, &[seen(0, 12), seen(11, 2)]), Some((1, KeysTwice)));
        assert_eq!(judge(run, true, &[seen(0, 7), seen(0, 6)]), None);
        assert_eq!(judge(run, true, &[seen(0, 7), seen(0, 5)]), Some((1, KeysMissing)));
        assert_eq!(judge(run, true, &[seen(0, 6), seen(0, 9)]), Some((0, KeysMissing)));
    }

    #[test]
    fn what_must_be_the_same_is_compared_and_the_minority_is_to_blame() {
        let good = record(0, 0, 0);
        type Change = fn(&mut SequenceRecord);
        let changes: [(Change, DataFaultCause); 5] = [
            (|r| r.first_token = 1, QueryStartDiffers),
            (|r| r.tokens = 2, QueryStartDiffers),
            (|r| r.global_length = 5, GlobalLengthDiffers),
            (|r| r.query_position = 1, QueryPositionDiffers),
            (|r| r.query = 8, QueryDiffers),
        ];
        for (change, cause) in changes {
            for rank in 0..3 {
                let mut records = [good; 3];
                change(&mut records[rank]);
                assert_eq!(judge(Placement::Contiguous, false, &records), Some((rank as i32, cause)));
                records[(rank + 1) % 3].keys = -1;
                assert_eq!(judge(Placement::Contiguous, false, &records), None, "bad data is told apart");
            }
            let mut records = [good; 2];
            change(&mut records[0]);
            assert_eq!(judge(Placement::Contiguous, false, &records), Some((1, cause)));
        }
        assert_eq!(judge(Placement::Contiguous, false, &[SequenceRecord { tokens: 0, ..record(0, 0, 5) }; 2]), None);
    }

    #[test]
    fn words_are_told_apart_by_value_and_place() {
        assert_ne!(mixed(0, 1), mixed(0, 2));
        assert_ne!(mixed(0, 1).wrapping_add(mixed(1, 2)), mixed(0, 2).wrapping_add(mixed(1, 1)));
        assert_ne!(mixed(0, 0), 0);
    }
}
