//! Placement as a sequence grows: the helpers are what tells a rank its length.

use treeattn::attention::placement::{local_length, local_slot, owner};
use treeattn::attention::{AttentionDesc, Placement, Shard};

use crate::support::case::Case;
use crate::support::run::Pool;
use crate::support::values::Values;

#[test]
fn a_local_length_does_not_shrink_by_what_the_sequence_does() {
    let mut trap = false;
    for world in 1..=8 {
        for placement in
            [1, 2, 3, 16].map(|run| Placement::Interleaved { run }).into_iter().chain([Placement::Contiguous])
        {
            for length in 1..200 {
                let local = |length| -> Vec<i32> {
                    (0..world)
                        .map(|rank| local_length(placement, Shard { rank, world }, length).expect("a length"))
                        .collect()
                };
                let now = local(length);
                assert_eq!(now.iter().sum::<i32>(), length);
                for k in 0..=length.min(9) {
                    let before = local(length - k);
                    assert_eq!(before.iter().sum::<i32>(), length - k);
                    trap |= before.iter().zip(&now).any(|(&before, &now)| before != now - k);
                }
                if matches!(placement, Placement::Interleaved { .. }) {
                    // A token that is appended goes to the end of its owner's shard, and moves no other.
                    let rank = owner(placement, world, length, length - 1).expect("a position");
                    let slot = local_slot(placement, world, length, length - 1).expect("a position");
                    assert_eq!(slot, now[rank as usize] - 1);
                    let before = local(length - 1);
                    assert!(
                        before.iter().zip(&now).enumerate().all(|(r, (b, n))| n - b == i32::from(r == rank as usize))
                    );
                }
            }
        }
    }
    assert!(trap, "local(L - k) is not local(L) - k");
}

#[test]
fn growing_sequences_decode_right_at_every_length() {
    let mut pool = Pool::default();
    for (world, run) in [(2, 1), (3, 1), (4, 2), (5, 3), (8, 1)] {
        for tokens in [1, 3] {
            let mut desc = AttentionDesc::new(4, 2, 16, 40);
            (desc.placement, desc.causal) = (Placement::Interleaved { run }, true);
            let whole = Case::plain(desc, world, &[(40, tokens)], Values::Normal, 31 + run as u64);
            for length in tokens..=40 {
                let mut case = whole.clone();
                let sequence = &mut case.sequences[0];
                sequence.keys = length;
                sequence.held.iter_mut().for_each(|slots| slots.retain(|&position| position < length));
                let lengths = (0..world as i32).map(|rank| {
                    let shard = Shard { rank, world: world as i32 };
                    local_length(desc.placement, shard, length as i32).expect("a length") as usize
                });
                assert!(lengths.eq(sequence.held.iter().map(Vec::len)), "shards only grow");
                pool.check(&case);
            }
        }
    }
}

#[test]
fn every_length_splits_over_every_world() {
    let mut pool = Pool::default();
    for world in 1..=8 {
        for length in 1..=2 * world + 1 {
            for placement in [Placement::Contiguous, Placement::Interleaved { run: 1 }, Placement::Explicit] {
                let mut desc = AttentionDesc::new(2, 1, 8, 1);
                (desc.placement, desc.causal) = (placement, true);
                let tokens = length.min(2);
                pool.check(&Case::plain(desc, world, &[(length, tokens)], Values::Normal, length as u64));
            }
        }
    }
}
