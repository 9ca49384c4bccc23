//! One axis of a plot: its range, its ticks and how they are written.

/// How values are spread along an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// From 0 up.
    Linear,
    /// Logarithmic, with ticks at 1, 2 and 5 times powers of ten.
    Decades,
    /// Logarithmic, with ticks at powers of two.
    Doublings,
}

/// A scale fitted to values.
pub struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
}

/// Most ticks of an axis.
const MOST_TICKS: usize = 9;
/// The part of a logarithmic range that is left free at each end.
const PADDING: f64 = 0.03;
/// The widest range of powers of ten and of two that is looked at.
const DECADES: std::ops::RangeInclusive<i32> = -12..=18;
const DOUBLINGS: std::ops::RangeInclusive<i32> = 0..=50;

impl Axis {
    /// An axis that shows every value that `scale` can show; some range where there is none.
    pub fn over(scale: Scale, values: impl Iterator<Item = f64>) -> Axis {
        let (low, high) = values
            .filter(|&value| shows(scale, value))
            .fold((f64::INFINITY, 0.0f64), |(low, high), value| (low.min(value), high.max(value)));
        let (low, high) = if low <= high { (low, high) } else { (1.0, 10.0) };
        match scale {
            Scale::Linear => {
                let step = step(high);
                Axis { scale, low: 0.0, high: (high / step).ceil().max(1.0) * step }
            }
            Scale::Decades | Scale::Doublings => {
                // Room around a single value, too.
                let (low, high) = if high < 1.5 * low { (low / 1.5, high * 1.5) } else { (low, high) };
                let spare = (high / low).powf(PADDING);
                Axis { scale, low: low / spare, high: high * spare }
            }
        }
    }

    /// Where a value lies: 0 at the low end, 1 at the high one. None where the axis cannot show it.
    pub fn at(&self, value: f64) -> Option<f64> {
        let share = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Decades | Scale::Doublings => (value / self.low).ln() / (self.high / self.low).ln(),
        };
        shows(self.scale, value).then_some(share)
    }

    /// The values that get a line and a number.
    pub fn ticks(&self) -> Vec<f64> {
        let inside = |tick: &f64| (self.low..=self.high).contains(tick);
        match self.scale {
            Scale::Linear => {
                let step = step(self.high);
                (0..=(self.high / step).round() as i32).map(|n| f64::from(n) * step).collect()
            }
            Scale::Decades => {
                let at = |factors: &'static [f64]| {
                    DECADES.flat_map(|power| factors.iter().map(move |factor| factor * 10f64.powi(power)))
                };
                let all: Vec<f64> = at(&[1.0, 2.0, 5.0]).filter(inside).collect();
                if all.len() <= MOST_TICKS { all } else { at(&[1.0]).filter(inside).collect() }
            }
            Scale::Doublings => {
                let all: Vec<f64> = DOUBLINGS.map(|power| 2f64.powi(power)).filter(inside).collect();
                all.iter().copied().step_by(all.len().div_ceil(MOST_TICKS).max(1)).collect()
            }
        }
    }
}

fn shows(scale: Scale, value: f64) -> bool {
    value.is_finite() && (value > 0.0 || (scale == Scale::Linear && value == 0.0))
}

/// The distance of ticks on a linear axis up to `high`: 1, 2 or 5 times a power of ten.
fn step(high: f64) -> f64 {
    let rough = high / 6.0;
    if !(rough > 0.0 && rough.is_finite()) {
        return 1.0;
    }
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|n| n * power).find(|&n| n >= rough * 0.999).unwrap_or(10.0 * power)
}

/// A number as all axes show it: no exponents, thousands set apart.
pub fn number(value: f64) -> String {
    let text = format!("{value:.9}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    let (whole, rest) = text.split_once('.').map_or((text, String::new()), |(whole, rest)| (whole, format!(".{rest}")));
    let digits: Vec<char> = whole.chars().collect();
    let mut grouped = String::new();
    for (n, digit) in digits.iter().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(*digit);
    }
    grouped + &rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks(scale: Scale, values: &[f64]) -> Vec<String> {
        Axis::over(scale, values.iter().copied()).ticks().into_iter().map(number).collect()
    }

    #[test]
    fn ticks_are_round_and_lie_in_the_range() {
        assert_eq!(ticks(Scale::Linear, &[15.0, 97.5]), ["0", "20", "40", "60", "80", "100"]);
        assert_eq!(ticks(Scale::Decades, &[0.05, 0.9]), ["0.05", "0.1", "0.2", "0.5"]);
        assert_eq!(ticks(Scale::Decades, &[0.05, 5000.0]), ["0.1", "1", "10", "100", "1,000"]);
        assert_eq!(ticks(Scale::Doublings, &[2048.0, 32_768.0]), ["2,048", "4,096", "8,192", "16,384", "32,768"]);
        let wide = ticks(Scale::Doublings, &[1024.0, 1048576.0]);
        assert_eq!((wide.len(), &*wide[0], &*wide[1]), (6, "1,024", "4,096"));
    }

    #[test]
    fn values_lie_between_the_ends() {
        for scale in [Scale::Linear, Scale::Decades, Scale::Doublings] {
            let axis = Axis::over(scale, [3.0, 700.0, f64::NAN, f64::INFINITY].into_iter());
            let [low, high] = [3.0, 700.0].map(|value| axis.at(value).unwrap());
            assert!(0.0 <= low && low < high && high <= 1.0, "{scale:?} {low} {high}");
            assert_eq!((axis.at(f64::NAN), axis.at(-1.0)), (None, None));
            // No values, one value.
            for few in [vec![], vec![5.0]] {
                let axis = Axis::over(scale, few.into_iter());
                assert!(axis.ticks().iter().all(|&tick| axis.at(tick).is_some_and(|at| (0.0..=1.0).contains(&at))));
            }
        }
        assert_eq!(Axis::over(Scale::Decades, [1.0, 2.0].into_iter()).at(0.0), None);
    }

    #[test]
    fn numbers_have_one_notation() {
        assert_eq!(
            [0.0, 0.05, 1.5, 20.0, 1000.0, 1048576.0].map(number),
            ["0", "0.05", "1.5", "20", "1,000", "1,048,576"]
        );
    }
}
