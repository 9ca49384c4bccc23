//! Sinks: logits that join the softmax once for a sequence, whatever the number of ranks. A sink is a partial (0, sink), and
//! it belongs to rank 0: the partial of rank 0 holds it, so that merging those of all ranks counts it once.

use super::lse::Lse;

/// Whether the partial of `rank` holds the sinks of the sequences.
pub(crate) fn belong_to(rank: i32) -> bool {
    rank == 0
}

/// Merges the partial (0, `sink`) into (`o`, `lse`). A sink of -inf changes nothing; one of NaN or +inf makes the row NaN.
pub(crate) fn merge_sink(o: &mut [f32], lse: &mut Lse, sink: f32) {
    if sink == f32::NEG_INFINITY {
        return;
    }
    if lse.is_bad() || sink.is_nan() || sink == f32::INFINITY {
        o.fill(f32::NAN);
        *lse = Lse::NAN;
        return;
    }
    if lse.is_empty() {
        // An identity's o is never read.
        o.fill(0.0);
        *lse = Lse::of(f64::from(sink));
        return;
    }
    let (own, sink) = (lse.value(), f64::from(sink));
    let max = own.max(sink);
    let (weight, other) = ((own - max).exp(), (sink - max).exp());
    let share = weight / (weight + other);
    for x in o.iter_mut() {
        *x = (f64::from(*x) * share) as f32;
    }
    *lse = Lse::of(max + (weight + other).ln());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sink_is_a_partial_of_nothing() {
        let row = |o: f32, lse: f32, sink: f32| {
            let (mut o, mut lse) = ([o], Lse::of(f64::from(lse)));
            merge_sink(&mut o, &mut lse, sink);
            (o[0], lse.high)
        };
        assert_eq!(row(3.0, 0.5, f32::NEG_INFINITY), (3.0, 0.5));
        assert_eq!(row(3.0, 0.0, 0.0), (1.5, 2f32.ln()));
        assert_eq!(row(3.0, -3e38, 0.0), (0.0, 0.0));
        assert_eq!(row(3.0, 0.0, -3e38), (3.0, 0.0));
        assert_eq!(row(f32::NAN, f32::NEG_INFINITY, 7.0), (0.0, 7.0));
        assert_eq!(row(f32::NAN, f32::NEG_INFINITY, f32::NEG_INFINITY).1, f32::NEG_INFINITY);
        for (lse, sink) in [(0.0, f32::NAN), (f32::NAN, 0.0), (0.0, f32::INFINITY), (f32::NEG_INFINITY, f32::NAN)] {
            let (o, lse) = row(3.0, lse, sink);
            assert!(o.is_nan() && lse.is_nan());
        }
    }
}
