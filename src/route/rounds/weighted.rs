//! Output `WEIGHTED`: the log-sum-exps alone go round, and every rank scales its own output.

use crate::attention::{Algorithm, Dtype};
use crate::error::Result;
use crate::partial::{Lse, merge_ranks};
use crate::route::host::exchange::{Exchange, RankFault};
use crate::route::host::partials::PartialExchange;
use crate::route::host::scratch::{Scratch, floats};
use crate::route::host::wire::Wire;

/// What travels: the lse of every row, and no o.
const STATISTICS: Wire = Wire { dtype: Dtype::F32, dim: 0 };

/// One round a part of the rows.
pub(in crate::route) struct Weighted;

impl PartialExchange for Weighted {
    fn run(&self, exchange: &Exchange<'_>, scratch: &mut Scratch) -> Result<RankFault> {
        let (rows, dim, world) = (exchange.rows(), exchange.dim(), exchange.world());
        let Scratch { partial, spare } = scratch;
        let (lse, o) = partial[..floats(rows, dim)].split_at(rows * Lse::FLOATS);
        let lse = Lse::slice(lse);
        let most = STATISTICS.rows(exchange.rounds().capacity());
        let mut found = None;
        // Also without rows: the others wait.
        for first in (0..rows.max(1)).step_by(most) {
            let n = most.min(rows - first);
            let mut shared = Ok(());
            let mut fill = |slot: &mut [u8]| STATISTICS.encode(slot, &lse[first..][..n], &[]);
            exchange.rounds().round(exchange.header, STATISTICS.bytes(n), &mut fill, &mut |round| {
                found = found.or_else(|| exchange.first_fault(round));
                shared = exchange.share(n, n * (dim + world), spare, &|part, spare| {
                    let out = &mut spare[..dim];
                    for row in part {
                        let of = |rank| STATISTICS.lse(round.payload(rank), n)[row];
                        let merged = merge_ranks(world, of, |_, _| Some(&[]), &mut [], &mut []);
                        let row = first + row;
                        weigh(&o[row * dim..][..dim], lse[row], merged, out);
                        exchange.write(row, out, merged);
                    }
                });
            })?;
            shared?;
            exchange.count(1, world - 1, STATISTICS.bytes(n) * (world - 1));
        }
        Ok(found)
    }

    fn bytes(&self) -> usize {
        0
    }

    fn algorithm(&self) -> Algorithm {
        Algorithm::OneShot
    }
}

/// A rank's part of a merged row: the parts of all ranks add up to it.
fn weigh(o: &[f32], own: Lse, merged: Lse, out: &mut [f32]) {
    if merged.is_bad() {
        out.fill(f32::NAN);
    } else if own.is_empty() {
        out.fill(0.0);
    } else {
        let weight = (own.value() - merged.value()).exp();
        for (out, &x) in out.iter_mut().zip(o) {
            *out = (weight * f64::from(x)) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_add_up_and_what_is_empty_or_bad_is_no_part() {
        let (mut a, mut b) = ([9.0; 2], [9.0; 2]);
        let merged = Lse::of(4f64.ln());
        weigh(&[8.0, f32::INFINITY], Lse::of(1f64.ln()), merged, &mut a);
        weigh(&[4.0, 1.0], Lse::of(3f64.ln()), merged, &mut b);
        assert!((a[0] - 2.0).abs() < 1e-6 && (b[0] - 3.0).abs() < 1e-6 && a[1] == f32::INFINITY, "{a:?} {b:?}");
        // A lone partial is whole, bit by bit.
        weigh(&[0.1, -0.3], Lse::of(0.7), Lse::of(0.7), &mut a);
        assert_eq!(a, [0.1, -0.3]);
        weigh(&[f32::NAN; 2], Lse::EMPTY, merged, &mut a);
        assert_eq!(a, [0.0; 2]);
        weigh(&[1.0; 2], Lse::EMPTY, Lse::NAN, &mut a);
        assert!(a[0].is_nan() && a[1].is_nan());
    }
}
