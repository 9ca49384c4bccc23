//! Repeated measurements and what is told of them.

use serde::Serialize;

/// Measurements of one thing, in any unit.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

/// What a report says about samples, in their unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    pub count: usize,
    pub minimum: f64,
    pub median: f64,
    /// A tenth of the samples are above it.
    pub p90: f64,
}

impl From<Vec<f64>> for Samples {
    fn from(samples: Vec<f64>) -> Samples {
        Samples(samples)
    }
}

impl Samples {
    pub fn push(&mut self, sample: f64) {
        self.0.push(sample);
    }

    pub fn append(&mut self, other: Samples) {
        self.0.extend(other.0);
    }

    pub fn median(&self) -> f64 {
        self.summary().median
    }

    pub fn maximum(&self) -> f64 {
        self.0.iter().copied().fold(0.0, f64::max)
    }

    /// All zero where there are no samples.
    pub fn summary(&self) -> Summary {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else {
            return Summary::default();
        };
        let at = |share: f64| sorted[(share * last as f64).round() as usize];
        Summary { count: sorted.len(), minimum: sorted[0], median: at(0.5), p90: at(0.9) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries() {
        let mut samples = Samples::default();
        assert_eq!(samples.summary(), Summary::default());
        samples.append(vec![3.0, 1.0, 2.0].into());
        samples.push(10.0);
        samples.push(4.0);
        assert_eq!(samples.summary(), Summary { count: 5, minimum: 1.0, median: 3.0, p90: 10.0 });
        assert_eq!(samples.maximum(), 10.0);
    }
}
