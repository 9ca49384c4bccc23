//! Who meets whom when partials meet in a tree over nodes.
//!
//! Ranks are grouped into nodes in any way. Within each node the partials are merged towards its lowest rank, its leader
//! (a binomial tree); the leaders merge by recursive doubling, after which each has the whole; then each spreads it
//! through its node. A group that is one node doubles among all its ranks, and has nothing to spread.
//!
//! **Any number of leaders doubles in ceil(log2 n) steps.** The list is halved, the lower half being the larger by at
//! most one, and so on down. When both halves have come to one partial each, rank i of the lower half swaps with rank i
//! of the upper; a lower rank left over is given the upper partial by the last of the upper half, which sends twice.
//!
//! Every merge is of two neighbouring runs of the list, and every rank follows the same halving, so the bracketing is one
//! for the whole group; since the merge of two is commutative bit for bit
//! ([`merge_two`](crate::partial::merge_two)), all ranks end with the same bits.

/// What a rank does with what it receives in a hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Receipt {
    /// It receives a header only.
    Nothing,
    /// Merges it with its own.
    Merge,
    /// Takes it instead of its own.
    Replace,
}

/// One hop of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TreeHop {
    /// Number of the hop in the step: two a level.
    pub(crate) index: u32,
    /// Whom it meets.
    pub(crate) peer: usize,
    /// Whether it sends its partial.
    pub(crate) sends: bool,
    /// What it does with the peer's.
    pub(crate) receipt: Receipt,
}

/// One rank's part in the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tree {
    /// Its hops, in order.
    pub(crate) hops: Vec<TreeHop>,
    /// Levels: the steps between the first message of a rank and the last of another.
    pub(crate) levels: u32,
    /// Whether what leaders hold is spread within nodes at the end.
    pub(crate) spreads: bool,
}

/// Numbers nodes in the order of their lowest ranks. `keys` tells the nodes of the ranks apart.
pub(crate) fn node_numbers<K: PartialEq>(keys: &[K]) -> Vec<usize> {
    let mut seen: Vec<&K> = Vec::new();
    keys.iter()
        .map(|key| {
            seen.iter().position(|known| *known == key).unwrap_or_else(|| {
                seen.push(key);
                seen.len() - 1
            })
        })
        .collect()
}

/// ceil(log2(n)), 0 for 0 and 1.
pub(crate) fn log2(n: usize) -> u32 {
    n.max(1).next_power_of_two().trailing_zeros()
}

impl Tree {
    /// The part of `rank` where rank r is on node `nodes[r]`, numbered as by [`node_numbers`].
    pub(crate) fn new(nodes: &[usize], rank: usize) -> Tree {
        let members = |node: usize| -> Vec<usize> { (0..nodes.len()).filter(|&r| nodes[r] == node).collect() };
        let count = nodes.iter().max().map_or(0, |last| last + 1);
        if count <= 1 {
            let mut hops = Vec::new();
            double(&members(0), rank, 0, &mut hops);
            return Tree { hops, levels: log2(nodes.len()), spreads: false };
        }
        let all: Vec<Vec<usize>> = (0..count).map(members).collect();
        let inner = all.iter().map(|node| log2(node.len())).max().unwrap_or(0);
        let outer = log2(count);
        let own = &all[nodes[rank]];
        let position = own.iter().position(|&r| r == rank).unwrap_or(0);
        let mut hops = Vec::new();
        gather(own, position, &mut hops);
        if position == 0 {
            let leaders: Vec<usize> = all.iter().map(|node| node[0]).collect();
            double(&leaders, rank, inner, &mut hops);
        }
        spread(own, position, inner + outer, inner, &mut hops);
        Tree { hops, levels: 2 * inner + outer, spreads: inner > 0 }
    }
}

/// Merges a node's partials towards its first member.
fn gather(members: &[usize], position: usize, hops: &mut Vec<TreeHop>) {
    for level in 0..log2(members.len()) {
        let (half, index) = (1 << level, 2 * level);
        if position % (2 * half) == half {
            hops.push(TreeHop { index, peer: members[position - half], sends: true, receipt: Receipt::Nothing });
            return;
        }
        if position.is_multiple_of(2 * half) && position + half < members.len() {
            hops.push(TreeHop { index, peer: members[position + half], sends: false, receipt: Receipt::Merge });
        }
    }
}

/// Spreads the first member's partial through its node: [`gather`] backwards, from level `first` on.
fn spread(members: &[usize], position: usize, first: u32, levels: u32, hops: &mut Vec<TreeHop>) {
    for level in (0..log2(members.len())).rev() {
        let (half, index) = (1 << level, 2 * (first + levels - 1 - level));
        if position % (2 * half) == half {
            hops.push(TreeHop { index, peer: members[position - half], sends: false, receipt: Receipt::Replace });
        } else if position.is_multiple_of(2 * half) && position + half < members.len() {
            hops.push(TreeHop { index, peer: members[position + half], sends: true, receipt: Receipt::Nothing });
        }
    }
}

/// Recursive doubling among `list`, whose first level is `first`.
fn double(list: &[usize], rank: usize, first: u32, hops: &mut Vec<TreeHop>) {
    if list.len() <= 1 {
        return;
    }
    let (lower, upper) = list.split_at(list.len().div_ceil(2));
    let own = if lower.contains(&rank) { lower } else { upper };
    double(own, rank, first, hops);
    // The rank that sends twice gives to the one left over first, before it merges.
    let index = 2 * (first + log2(list.len()) - 1);
    let swap = |peer: usize| TreeHop { index: index + 1, peer, sends: true, receipt: Receipt::Merge };
    if let Some(position) = upper.iter().position(|&r| r == rank) {
        if position + 1 == upper.len() && lower.len() > upper.len() {
            let peer = lower[lower.len() - 1];
            hops.push(TreeHop { index, peer, sends: true, receipt: Receipt::Nothing });
        }
        hops.push(swap(lower[position]));
    } else if let Some(position) = lower.iter().position(|&r| r == rank) {
        let left_over = TreeHop { index, peer: upper[upper.len() - 1], sends: false, receipt: Receipt::Merge };
        hops.push(upper.get(position).map_or(left_over, |&peer| swap(peer)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the tree over symbols: every rank begins with its own bracket; gives what each ends with.
    fn run(nodes: &[usize]) -> Vec<String> {
        let trees: Vec<Tree> = (0..nodes.len()).map(|rank| Tree::new(nodes, rank)).collect();
        let mut held: Vec<(Vec<usize>, String)> = (0..nodes.len()).map(|r| (vec![r], r.to_string())).collect();
        let last = trees.iter().flat_map(|tree| &tree.hops).map(|hop| hop.index + 1).max().unwrap_or(0);
        for index in 0..last {
            let before = held.clone();
            for (rank, tree) in trees.iter().enumerate() {
                let mine: Vec<_> = tree.hops.iter().filter(|hop| hop.index == index).collect();
                assert!(mine.len() <= 1, "rank {rank} meets two at once");
                let Some(hop) = mine.first() else { continue };
                let other = trees[hop.peer].hops.iter().find(|hop| hop.index == index).unwrap();
                assert_eq!((other.peer, other.sends), (rank, hop.receipt != Receipt::Nothing));
                let theirs = &before[hop.peer];
                match hop.receipt {
                    Receipt::Nothing => {}
                    Receipt::Replace => held[rank] = theirs.clone(),
                    Receipt::Merge => {
                        // Commutative: the lower one first.
                        let mut both = [&before[rank], theirs];
                        both.sort();
                        let set = [&both[0].0[..], &both[1].0[..]].concat();
                        held[rank] = (set, format!("({} {})", both[0].1, both[1].1));
                    }
                }
            }
        }
        for tree in &trees {
            assert!(tree.hops.windows(2).all(|pair| pair[0].index < pair[1].index));
            assert!(tree.hops.iter().all(|hop| hop.index < 2 * tree.levels));
        }
        for (set, _) in &held {
            let mut set = set.clone();
            set.sort_unstable();
            assert_eq!(set, (0..nodes.len()).collect::<Vec<_>>(), "every partial once");
        }
        held.into_iter().map(|(_, bracket)| bracket).collect()
    }

    #[test]
    fn one_node_of_any_size_doubles_in_the_fewest_steps() {
        for world in 1..=70 {
            let brackets = run(&vec![0; world]);
            assert!(brackets.iter().all(|b| *b == brackets[0]), "{brackets:?}");
            let tree = Tree::new(&vec![0; world], 0);
            assert!(1usize << tree.levels >= world && (1usize << tree.levels) < 2 * world && !tree.spreads);
        }
        assert_eq!(run(&[0; 5])[3], "(((0 1) 2) (3 4))");
        for rank in 0..8 {
            let tree = Tree::new(&[0; 8], rank);
            assert_eq!((tree.hops.iter().filter(|hop| hop.sends).count(), tree.levels), (3, 3));
        }
    }

    #[test]
    fn any_grouping_gives_every_rank_the_same_bracket() {
        let mut state = 1u64;
        let mut next = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        for _ in 0..500 {
            let world = 1 + next(64);
            let kinds = 1 + next(world);
            let keys: Vec<usize> = (0..world).map(|_| next(kinds)).collect();
            let nodes = node_numbers(&keys);
            let brackets = run(&nodes);
            assert!(brackets.iter().all(|b| *b == brackets[0]), "{nodes:?}: {brackets:?}");
        }
    }

    #[test]
    fn nodes_are_merged_before_they_meet() {
        let nodes = node_numbers(&["b", "a", "b", "a", "c"]);
        assert_eq!(nodes, [0, 1, 0, 1, 2]);
        assert_eq!(run(&nodes)[4], "(((0 2) (1 3)) 4)");
        // Only leaders send to other nodes.
        let crossing = |rank: usize| {
            Tree::new(&nodes, rank).hops.iter().filter(|hop| nodes[hop.peer] != nodes[rank] && hop.sends).count()
        };
        assert_eq!((0..5).map(crossing).collect::<Vec<_>>(), [2, 1, 0, 0, 2]);
    }
}
