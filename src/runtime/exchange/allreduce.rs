//! `ALLREDUCE3`: the paper's merge (arXiv 2408.04093, algorithm 3). With m the largest lse of all ranks, every rank weighs
//! its o by exp(lse - m); numerators and weights are summed, and their quotient is the output.
//!
//! An allreduce is a reduce-scatter and an allgather: each rank reduces its part of all ranks' values, in rank order, then
//! the reduced parts go round. Over a transport's allgather every rank has all values after the first round, and reduces
//! them all itself.

use super::{Found, Meeting, Scratch, wire};
use crate::attention::Dtype;
use crate::comm::Round;
use crate::error::Result;
use crate::partial::DataFault;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Reduction {
    Maximum,
    Sum,
}

/// Replaces this rank's partial by that of all ranks, by three allreduces.
pub(super) fn run(meeting: &Meeting<'_>, scratch: &mut Scratch) -> Result<Found> {
    let (rows, dim) = (meeting.rows(), meeting.dim());
    let Scratch { partial, incoming, .. } = scratch;
    let (lse, o) = partial[..rows * (dim + 1)].split_at_mut(rows);
    let (most, weights) = incoming[..2 * rows].split_at_mut(rows);
    let mut found = None;
    most.copy_from_slice(lse);
    allreduce(meeting, most, Dtype::F32, Reduction::Maximum, &mut found)?;
    for (row, o) in o.chunks_exact_mut(dim).enumerate() {
        weights[row] = weigh(o, lse[row], most[row]);
    }
    allreduce(meeting, o, meeting.plan.wire.dtype, Reduction::Sum, &mut found)?;
    allreduce(meeting, weights, Dtype::F32, Reduction::Sum, &mut found)?;
    for (row, o) in o.chunks_exact_mut(dim).enumerate() {
        let lse = divide(o, weights[row], most[row]);
        meeting.write(row, o, lse);
    }
    Ok(found)
}

/// Turns a row into its numerator over the common maximum. Gives its denominator.
fn weigh(o: &mut [f32], lse: f32, most: f32) -> f32 {
    if most.is_nan() || most == f32::INFINITY {
        o.fill(f32::NAN);
        return f32::NAN;
    }
    if lse == f32::NEG_INFINITY {
        o.fill(0.0);
        return 0.0;
    }
    let weight = (f64::from(lse) - f64::from(most)).exp();
    for x in o.iter_mut() {
        *x = (weight * f64::from(*x)) as f32;
    }
    weight as f32
}

/// Turns summed numerators into the output row. Gives its lse.
fn divide(o: &mut [f32], sum: f32, most: f32) -> f32 {
    if most == f32::NEG_INFINITY {
        o.fill(0.0);
        return most;
    }
    for x in o.iter_mut() {
        *x /= sum;
    }
    (f64::from(most) + f64::from(sum).ln()) as f32
}

/// Reduces `values` over all ranks, in place, on every rank.
fn allreduce(
    meeting: &Meeting<'_>,
    values: &mut [f32],
    dtype: Dtype,
    reduction: Reduction,
    found: &mut Found,
) -> Result<()> {
    let (exchange, world, rank) = (meeting.exchange(), meeting.world(), meeting.rank());
    let in_place = exchange.reads_in_place();
    let most = (exchange.capacity() / dtype.size()).max(1);
    let count = values.len().div_ceil(most).max(1);
    let all = values.len();
    for chunk in 0..count {
        let n = most.min(all - chunk * most);
        let values = &mut values[chunk * most..][..n];
        let part = |rank: usize| rank * n / world..(rank + 1) * n / world;
        let mine = if in_place { part(rank) } else { 0..n };
        let shared = std::cell::RefCell::new(&mut *values);
        let mut fill = |slot: &mut [u8]| wire::encode(dtype, slot, &shared.borrow());
        let mut take = |round: &dyn Round| {
            *found = found.or_else(|| (0..world).find_map(|rank| DataFault::from_word(round.fault(rank))));
            reduce(&mut shared.borrow_mut()[mine.clone()], mine.start, round, world, dtype, reduction);
        };
        exchange.round(meeting.header, n * dtype.size(), &mut fill, &mut take)?;
        if !in_place {
            meeting.count(1, world - 1, n * dtype.size() * (world - 1));
            continue;
        }
        meeting.count(1, world - 1, (n - mine.len()) * dtype.size());
        let longest = (0..world).map(|rank| part(rank).len()).max().unwrap_or(0);
        let mut fill = |slot: &mut [u8]| {
            let own = &shared.borrow()[mine.clone()];
            wire::encode(dtype, &mut slot[..own.len() * dtype.size()], own);
        };
        let mut take = |round: &dyn Round| {
            for rank in 0..world {
                let theirs = &mut shared.borrow_mut()[part(rank)];
                wire::decode(dtype, &round.payload(rank)[..theirs.len() * dtype.size()], theirs);
            }
        };
        exchange.round(meeting.header, longest * dtype.size(), &mut fill, &mut take)?;
        meeting.count(1, world - 1, mine.len() * dtype.size() * (world - 1));
    }
    Ok(())
}

/// Reduces elements `first..` of what all ranks sent, in rank order.
fn reduce(to: &mut [f32], first: usize, round: &dyn Round, world: usize, dtype: Dtype, reduction: Reduction) {
    /// Elements that are reduced together.
    const TOGETHER: usize = 256;
    for (i, to) in to.chunks_mut(TOGETHER).enumerate() {
        let begin = (first + i * TOGETHER) * dtype.size();
        let (mut sums, mut theirs) = ([0.0f64; TOGETHER], [0.0f32; TOGETHER]);
        let theirs = &mut theirs[..to.len()];
        for rank in 0..world {
            wire::decode(dtype, &round.payload(rank)[begin..][..to.len() * dtype.size()], theirs);
            for (sum, &x) in sums.iter_mut().zip(&*theirs) {
                let x = f64::from(x);
                *sum = match reduction {
                    _ if rank == 0 => x,
                    Reduction::Sum => *sum + x,
                    Reduction::Maximum if sum.is_nan() || x <= *sum => *sum,
                    Reduction::Maximum => x,
                };
            }
        }
        to.iter_mut().zip(sums).for_each(|(to, sum)| *to = sum as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_without_keys_weigh_nothing_and_bad_ones_are_nan() {
        let mut o = [f32::NAN; 2];
        assert_eq!((weigh(&mut o, f32::NEG_INFINITY, 1.0), o), (0.0, [0.0; 2]));
        assert_eq!((weigh(&mut o, f32::NEG_INFINITY, f32::NEG_INFINITY), o), (0.0, [0.0; 2]));
        assert_eq!((divide(&mut o, 0.0, f32::NEG_INFINITY), o), (f32::NEG_INFINITY, [0.0; 2]));
        for most in [f32::NAN, f32::INFINITY] {
            let mut o = [1.0];
            assert!(weigh(&mut o, 0.0, most).is_nan() && o[0].is_nan());
            assert!(divide(&mut o, f32::NAN, most).is_nan() && o[0].is_nan());
        }
        let mut o = [1.5, -3.0];
        assert_eq!((weigh(&mut o, 2.0, 2.0), divide(&mut o, 1.0, 2.0), o), (1.0, 2.0, [1.5, -3.0]));
    }
}
