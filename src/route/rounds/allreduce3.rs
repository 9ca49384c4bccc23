//! `ALLREDUCE3`: the paper's merge (arXiv 2408.04093, algorithm 3). With m the largest lse of all ranks, a rank weighs
//! exp(lse - m); the weights are summed, and then each rank's o times its share of them. The paper sums numerators and divides
//! at the end; divided first, they stay in the range of the values, which a 16-bit wire has room for.
//!
//! An allreduce is a reduce-scatter and an allgather: each rank reduces its part of all ranks' values, in rank order, then
//! the reduced parts go round. Over a transport's allgather every rank has all values after the first round, and reduces
//! them all itself.

use std::cell::RefCell;

use parking_lot::Mutex;

use crate::attention::{Algorithm, Dtype};
use crate::comm::Round;
use crate::error::Result;
use crate::partial::Lse;
use crate::route::context::StepContext;
use crate::route::host::exchange::{Exchange, RankFault};
use crate::route::host::partials::PartialExchange;
use crate::route::host::scratch::{Scratch, zeroed};
use crate::route::host::wire;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Reduction {
    Maximum,
    Sum,
}

/// Three allreduces.
pub(in crate::route) struct Allreduce3 {
    /// The largest lse of the step's rows, then their denominators.
    reduced: Mutex<Vec<f32>>,
}

impl Allreduce3 {
    /// Room for the largest step.
    pub fn new(context: &StepContext) -> Result<Allreduce3> {
        let reduced = zeroed("max_query_tokens x q_heads x head_dim_v", context.desc.most_rows()?.checked_mul(2))?;
        Ok(Allreduce3 { reduced: Mutex::new(reduced) })
    }
}

impl PartialExchange for Allreduce3 {
    /// Replaces this rank's partial by that of all ranks.
    fn run(&self, exchange: &Exchange<'_>, scratch: &mut Scratch) -> Result<RankFault> {
        let (rows, dim) = (exchange.rows(), exchange.dim());
        let mut reduced = self.reduced.lock();
        let (lse, o) = scratch.rows(rows, dim);
        let (most, weights) = reduced[..2 * rows].split_at_mut(rows);
        let mut found = None;
        most.iter_mut().zip(&*lse).for_each(|(most, lse)| *most = lse.high);
        allreduce(exchange, most, Dtype::F32, Reduction::Maximum, &mut found)?;
        weights.iter_mut().zip(&*lse).zip(&*most).for_each(|((to, &lse), &most)| *to = weight(lse, most));
        allreduce(exchange, weights, Dtype::F32, Reduction::Sum, &mut found)?;
        for (row, o) in o.chunks_exact_mut(dim).enumerate() {
            share(o, lse[row], most[row], weights[row]);
        }
        allreduce(exchange, o, exchange.wire.dtype, Reduction::Sum, &mut found)?;
        for (row, o) in o.chunks_exact(dim).enumerate() {
            exchange.write(row, o, merged_lse(weights[row], most[row]));
        }
        Ok(found)
    }

    fn bytes(&self) -> usize {
        size_of_val(&**self.reduced.lock())
    }

    fn algorithm(&self) -> Algorithm {
        Algorithm::Allreduce3
    }
}

/// A rank's weight, over the largest lse of all ranks; NaN where the row is to be.
fn weight(lse: Lse, most: f32) -> f32 {
    if most.is_nan() || most == f32::INFINITY {
        return f32::NAN;
    }
    if lse.is_empty() {
        return 0.0;
    }
    // The maximum was found of the rounded ones, so the largest weight is 1 but for the rest of its lse. Where that rest is
    // beyond 1, scores are larger than 2^24 and their rounding decides; it must not make the weight overflow.
    ((f64::from(lse.high) - f64::from(most)) + f64::from(lse.low).clamp(-1.0, 1.0)).exp() as f32
}

/// Multiplies a row by its share of all weights, whose sum is `sum`.
fn share(o: &mut [f32], lse: Lse, most: f32, sum: f32) {
    if lse.is_empty() && !sum.is_nan() {
        // An identity's o is never read.
        return o.fill(0.0);
    }
    let share = f64::from(weight(lse, most)) / f64::from(sum);
    for x in o.iter_mut() {
        *x = (share * f64::from(*x)) as f32;
    }
}

/// The lse of all ranks together.
fn merged_lse(sum: f32, most: f32) -> Lse {
    if most == f32::NEG_INFINITY {
        return Lse::EMPTY;
    }
    let rest = f64::from(sum).ln();
    // As much as the rest of one rank's lse and the rounding of its weight may make: then it is that rank's alone.
    let alone = f64::from(most.abs().next_up() - most.abs()) / 2.0 + f64::from(f32::EPSILON) / 2.0;
    if rest.abs() <= alone { Lse { high: most, low: 0.0 } } else { Lse::of(f64::from(most) + rest) }
}

/// Reduces `values` over all ranks, in place, on every rank.
fn allreduce(
    exchange: &Exchange<'_>,
    values: &mut [f32],
    dtype: Dtype,
    reduction: Reduction,
    found: &mut RankFault,
) -> Result<()> {
    let (rounds, world, me) = (exchange.rounds(), exchange.world(), exchange.me());
    let in_place = rounds.reads_in_place();
    let most = (rounds.capacity() / dtype.size()).max(1);
    let count = values.len().div_ceil(most).max(1);
    let all = values.len();
    for chunk in 0..count {
        let n = most.min(all - chunk * most);
        let values = &mut values[chunk * most..][..n];
        let part = |rank: usize| rank * n / world..(rank + 1) * n / world;
        let own = if in_place { part(me) } else { 0..n };
        // `fill` and `take` run one after the other; each borrows the values while it does.
        let shared = RefCell::new(&mut *values);
        let mut fill = |slot: &mut [u8]| wire::encode(dtype, slot, &shared.borrow());
        let mut take = |round: &dyn Round| {
            *found = found.or_else(|| exchange.first_fault(round));
            reduce(&mut shared.borrow_mut()[own.clone()], own.start, round, world, dtype, reduction);
        };
        rounds.round(exchange.header, n * dtype.size(), &mut fill, &mut take)?;
        if !in_place {
            exchange.count(1, world - 1, n * dtype.size() * (world - 1));
            continue;
        }
        exchange.count(1, world - 1, (n - own.len()) * dtype.size());
        let longest = (0..world).map(|rank| part(rank).len()).max().unwrap_or(0);
        let mut fill = |slot: &mut [u8]| {
            let reduced = &shared.borrow()[own.clone()];
            wire::encode(dtype, &mut slot[..reduced.len() * dtype.size()], reduced);
        };
        let mut take = |round: &dyn Round| {
            for rank in 0..world {
                let theirs = &mut shared.borrow_mut()[part(rank)];
                wire::decode(dtype, &round.payload(rank)[..theirs.len() * dtype.size()], theirs);
            }
        };
        rounds.round(exchange.header, longest * dtype.size(), &mut fill, &mut take)?;
        exchange.count(1, world - 1, own.len() * dtype.size() * (world - 1));
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
        assert_eq!((weight(Lse::EMPTY, 1.0), weight(Lse::EMPTY, f32::NEG_INFINITY)), (0.0, 0.0));
        let mut o = [f32::NAN; 2];
        share(&mut o, Lse::EMPTY, 1.0, 1.0);
        assert_eq!((o, merged_lse(0.0, f32::NEG_INFINITY)), ([0.0; 2], Lse::EMPTY));
        for most in [f32::NAN, f32::INFINITY] {
            for lse in [Lse::of(0.0), Lse::EMPTY, Lse::NAN] {
                let mut o = [1.0];
                share(&mut o, lse, most, f32::NAN);
                assert!(weight(lse, most).is_nan() && o[0].is_nan());
            }
            assert!(merged_lse(f32::NAN, most).is_bad());
        }
        let (mut o, lse) = ([1.5, -3.0], Lse { high: 2.0, low: 0.0 });
        share(&mut o, lse, 2.0, 1.0);
        assert_eq!((weight(lse, 2.0), merged_lse(1.0, 2.0), o), (1.0, lse, [1.5, -3.0]));
    }

    #[test]
    fn weights_count_what_rounding_took_from_the_lse_and_never_overflow() {
        let lse = Lse { high: 30_000.0, low: 0.000_9 };
        assert_eq!(weight(lse, 30_000.0), f64::from(lse.low).exp() as f32);
        assert_eq!(weight(Lse { high: 3e32, low: 1e25 }, 3e32), 1f32.exp());
        assert_eq!(weight(Lse { high: 3e32, low: 1e25 }, 3.1e32), 0.0);
    }

    #[test]
    fn the_only_rank_with_keys_keeps_its_bits() {
        for i in 0..100_000u32 {
            let lse = Lse::of(f64::from(i).sin() * 1.1f64.powi((i % 97) as i32));
            let (most, mut o) = (lse.high, [f32::from_bits(0x3f80_0000 + i)]);
            let sum = weight(lse, most);
            share(&mut o, lse, most, sum);
            assert_eq!((merged_lse(sum, most).high, o[0].to_bits()), (lse.high, 0x3f80_0000 + i), "{lse:?}");
        }
    }
}
