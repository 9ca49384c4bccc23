//! Which ranks to name where ranks differ in what must be the same.

/// The ranks outside the largest party of those with equal values, as rank `me` sees it: where no party is the largest,
/// those that differ from `me`. Empty, and nothing is allocated, where all are equal.
pub fn odd_ranks<T: PartialEq>(world: usize, me: usize, value: impl Fn(usize) -> T) -> Vec<usize> {
    if (1..world).all(|rank| value(rank) == value(0)) {
        return Vec::new();
    }
    let party = |rank: usize| (0..world).filter(|&other| value(other) == value(rank)).count();
    let largest = (0..world).map(party).max().unwrap_or(0);
    let mut leading = (0..world).filter(|&rank| party(rank) == largest);
    let first = leading.next().unwrap_or(me);
    let right = if leading.all(|rank| value(rank) == value(first)) { first } else { me };
    (0..world).filter(|&rank| value(rank) != value(right)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_minority_is_odd_and_a_tie_is_settled_by_whoever_asks() {
        let odd = |me: usize, values: &[u64]| odd_ranks(values.len(), me, |rank| values[rank]);
        assert!(odd(0, &[5, 5, 5]).is_empty() && odd(0, &[]).is_empty());
        for me in 0..3 {
            assert_eq!((odd(me, &[5, 6, 5]), odd(me, &[6, 5, 5])), (vec![1], vec![0]));
        }
        assert_eq!((odd(0, &[5, 6]), odd(1, &[5, 6])), (vec![1], vec![0]));
        assert_eq!((odd(0, &[5, 6, 5, 6]), odd(3, &[5, 6, 5, 6])), (vec![1, 3], vec![0, 2]));
    }
}
