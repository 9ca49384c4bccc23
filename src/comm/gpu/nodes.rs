//! How the ranks of a group of GPUs are spread over nodes, as one rank sees it.
//!
//! Ranks of a node reach each other's memory. Ranks of different nodes meet over NCCL, each those whose place in their own node
//! is the same; nodes of unequal size are cut by the smallest, beyond which places begin anew.

/// The nodes of a group, and this rank's place.
#[derive(Clone, Debug)]
pub(crate) struct Nodes {
    /// The node of each rank, numbered in the order of their lowest ranks.
    of: Vec<usize>,
    rank: usize,
}

impl Nodes {
    /// The nodes of the ranks, `of`, as rank `rank` sees them.
    pub fn new(of: Vec<usize>, rank: usize) -> Nodes {
        Nodes { of, rank }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.of.iter().max().map_or(0, |last| last + 1)
    }

    /// Whether every rank is a node of its own.
    pub fn are_single(&self) -> bool {
        self.count() == self.of.len()
    }

    /// Their numbers by rank.
    pub fn by_rank(&self) -> &[usize] {
        &self.of
    }

    /// The ranks of a node.
    fn ranks_of(&self, node: usize) -> Vec<usize> {
        (0..self.of.len()).filter(|&rank| self.of[rank] == node).collect()
    }

    /// The ranks of this rank's node.
    pub fn neighbours(&self) -> Vec<usize> {
        self.ranks_of(self.of[self.rank])
    }

    /// This rank's place among them.
    pub fn place(&self) -> usize {
        self.neighbours().iter().position(|&rank| rank == self.rank).unwrap_or(0)
    }

    /// The ranks that this one meets over NCCL, itself among them: node by node, at least one of each.
    pub fn meeting(&self) -> Vec<usize> {
        let nodes: Vec<Vec<usize>> = (0..self.count()).map(|node| self.ranks_of(node)).collect();
        let smallest = nodes.iter().map(Vec::len).min().unwrap_or(1).max(1);
        let class = self.place() % smallest;
        nodes.iter().flat_map(|node| node.iter().skip(class).step_by(smallest).copied()).collect()
    }

    /// Of [`Nodes::meeting`], the positions of the first rank of each node.
    pub fn first_met(&self) -> Vec<usize> {
        let meeting = self.meeting();
        let is_first = |&at: &usize| at == 0 || self.of[meeting[at]] != self.of[meeting[at - 1]];
        (0..meeting.len()).filter(is_first).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_meets_one_of_each_node() {
        for of in
            [vec![0, 0, 1, 1], vec![0, 1, 0, 1], vec![0, 0, 0, 1], vec![0, 1, 1, 2, 1, 2, 0], vec![0, 1, 2], vec![0; 5]]
        {
            let views: Vec<Nodes> = (0..of.len()).map(|rank| Nodes::new(of.clone(), rank)).collect();
            for (rank, nodes) in views.iter().enumerate() {
                let meeting = nodes.meeting();
                assert!(meeting.contains(&rank), "{of:?}");
                for &other in &meeting {
                    assert_eq!(views[other].meeting(), meeting, "{of:?}: the same for all that meet");
                }
                let firsts: Vec<usize> = nodes.first_met().into_iter().map(|at| of[meeting[at]]).collect();
                assert_eq!(firsts, (0..nodes.count()).collect::<Vec<_>>(), "{of:?}: each node once, in order");
                assert_eq!(nodes.neighbours()[nodes.place()], rank);
            }
        }
        let nodes = Nodes::new(vec![0, 1, 0, 1], 2);
        assert_eq!((nodes.meeting(), nodes.neighbours(), nodes.place()), (vec![2, 3], vec![0, 2], 1));
        assert!(!nodes.are_single() && Nodes::new(vec![0, 1], 0).are_single());
    }
}
