//! When the partials of a ring's blocks merge.

/// Where the partial of each block goes, and when partials merge: the bracketing that halves the ranks, the lower half
/// being the larger.
pub(super) struct Order {
    /// By turn: the slot for the partial of the block that has come.
    pub slots: Vec<usize>,
    pub merges: Vec<OrderedMerge>,
    /// Slots.
    pub count: usize,
}

/// A merge of two neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OrderedMerge {
    /// The turn after which both are there.
    pub turn: usize,
    /// The slot to merge into, and the slot that is free then.
    pub into: usize,
    pub from: usize,
}

/// The partial of ranks `low..high`, in a slot.
#[derive(Clone, Copy)]
struct Held {
    low: usize,
    high: usize,
    slot: usize,
}

impl Order {
    /// The order of `rank`, to which the blocks come from its own upwards.
    pub fn new(world: usize, rank: usize) -> Order {
        let mut order = Order { slots: Vec::new(), merges: Vec::new(), count: 0 };
        let mut all: Vec<Held> = Vec::new();
        for turn in 0..world {
            let origin = (rank + turn) % world;
            let slot = (0..).find(|slot| all.iter().all(|held| held.slot != *slot)).unwrap_or(0);
            order.slots.push(slot);
            order.count = order.count.max(slot + 1);
            let mut held = Held { low: origin, high: origin + 1, slot };
            while let Some((low, high)) = sibling(world, held.low, held.high) {
                let Some(at) = all.iter().position(|other| (other.low, other.high) == (low, high)) else { break };
                let other = all.swap_remove(at);
                order.merges.push(OrderedMerge { turn, into: held.slot, from: other.slot });
                held = Held { low: held.low.min(low), high: held.high.max(high), slot: held.slot };
            }
            all.push(held);
        }
        order
    }

    /// The slot of the merged partial of all ranks.
    pub fn last(&self) -> usize {
        self.slots.last().copied().unwrap_or(0)
    }
}

/// The other half of what the ranks `from..to` are a half of.
fn sibling(world: usize, from: usize, to: usize) -> Option<(usize, usize)> {
    let (mut low, mut high) = (0, world);
    while (low, high) != (from, to) {
        let middle = low + (high - low).div_ceil(2);
        if (from, to) == (low, middle) {
            return Some((middle, high));
        }
        if (from, to) == (middle, high) {
            return Some((low, middle));
        }
        (low, high) = if from < middle { (low, middle) } else { (middle, high) };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_in_any_order_merge_in_one_bracketing() {
        for world in 1..=40 {
            let mut brackets = Vec::new();
            for rank in 0..world {
                let order = Order::new(world, rank);
                let mut slots = vec![String::new(); order.count];
                for turn in 0..world {
                    slots[order.slots[turn]] = ((rank + turn) % world).to_string();
                    for merge in order.merges.iter().filter(|merge| merge.turn == turn) {
                        // Merging is commutative: the one with the lower ranks is written first.
                        let mut both = [slots[merge.into].clone(), slots[merge.from].clone()];
                        both.sort_by_key(|text| {
                            text.trim_matches(['(', ')'])
                                .split(' ')
                                .next()
                                .unwrap()
                                .replace('(', "")
                                .parse::<usize>()
                                .unwrap()
                        });
                        slots[merge.into] = format!("({} {})", both[0], both[1]);
                    }
                }
                brackets.push(slots[order.last()].clone());
                let most = 2 * crate::comm::log2(world) as usize + 1;
                assert!(order.count <= most, "{world} ranks: {} slots", order.count);
            }
            assert!(brackets.iter().all(|b| *b == brackets[0]), "{brackets:?}");
            assert_eq!(brackets[0].matches(' ').count(), world - 1);
        }
        assert_eq!(Order::new(2, 1).count, 2);
    }
}
