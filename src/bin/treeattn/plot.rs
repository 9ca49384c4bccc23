//! A plot as an SVG file: lines through points over a logarithmic axis, up a linear or a logarithmic one. Text only, no fonts or scripts of its own.

use std::fmt::Write;

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 520.0;
/// Room beside the axes: left, right (the legend), top, bottom.
const MARGIN: [f64; 4] = [70.0, 230.0, 50.0, 60.0];
/// Colours that are told apart in print and by the colour-blind.
const COLOURS: [&str; 8] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#000000"];

/// What is drawn.
pub struct Plot {
    pub title: String,
    pub x_label: String,
    pub y_label: String,
    /// Whether y is logarithmic, too.
    pub logarithmic: bool,
    pub lines: Vec<Line>,
}

/// One line of a plot, with a mark at each point.
pub struct Line {
    pub name: String,
    /// (x, y), x above 0.
    pub points: Vec<(f64, f64)>,
}

impl Plot {
    /// The file's text. Points that are no finite numbers are left out.
    pub fn svg(&self) -> String {
        let drawn =
            |&&(x, y): &&(f64, f64)| x > 0.0 && x.is_finite() && y.is_finite() && (y > 0.0 || !self.logarithmic);
        let all: Vec<(f64, f64)> =
            self.lines.iter().flat_map(|line| line.points.iter().filter(drawn).copied()).collect();
        let fold = |values: &dyn Fn(&(f64, f64)) -> f64, from: f64, pick: fn(f64, f64) -> f64| {
            all.iter().map(values).fold(from, pick)
        };
        let least = fold(&|p| p.0, f64::INFINITY, f64::min).min(1e300).log10().floor();
        let most = fold(&|p| p.0, 0.0, f64::max).max(1e-300).log10().ceil().max(least + 1.0);
        let highest = fold(&|p| p.1, 0.0, f64::max);
        // Where y has its lines.
        let marks: Vec<f64> = if self.logarithmic {
            let low = fold(&|p| p.1, f64::INFINITY, f64::min).clamp(1e-300, 1e300).log10().floor();
            let high = highest.max(1e-300).log10().ceil().max(low + 1.0);
            (low as i32..=high as i32).map(|power| 10f64.powi(power)).collect()
        } else {
            let step = nice(highest / 6.0);
            (0..=(highest.max(step) / step).ceil() as i32).map(|row| f64::from(row) * step).collect()
        };
        let (bottom, top) = (marks[0], marks[marks.len() - 1]);
        let [left, right, above, below] = MARGIN;
        let (width, height) = (WIDTH - left - right, HEIGHT - above - below);
        let x_of = |x: f64| left + width * (x.log10() - least) / (most - least);
        let y_of = |y: f64| {
            let share = if self.logarithmic { (y / bottom).log10() / (top / bottom).log10() } else { y / top };
            above + height * (1.0 - share)
        };

        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
             font-size=\"13\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
        );
        let mut text = |x: f64, y: f64, how: &str, what: &str| {
            let what = what.replace('&', "&amp;").replace('<', "&lt;");
            let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" {how}>{what}</text>");
        };
        text(left, above - 20.0, "font-size=\"16\"", &self.title);
        text(left + width / 2.0, HEIGHT - 15.0, "text-anchor=\"middle\"", &self.x_label);
        let turned = format!("text-anchor=\"middle\" transform=\"rotate(-90 18 {:.1})\"", above + height / 2.0);
        text(18.0, above + height / 2.0, &turned, &self.y_label);
        for power in least as i32..=most as i32 {
            let label = label(10f64.powi(power));
            text(x_of(10f64.powi(power)), above + height + 20.0, "text-anchor=\"middle\"", &label);
        }
        for &y in &marks {
            text(left - 8.0, y_of(y) + 4.0, "text-anchor=\"end\"", &label(y));
        }
        for (i, line) in self.lines.iter().enumerate() {
            let how = format!("fill=\"{}\"", COLOURS[i % COLOURS.len()]);
            text(WIDTH - right + 15.0, above + 12.0 + 20.0 * i as f64, &how, &line.name);
        }
        for power in least as i32..=most as i32 {
            let x = x_of(10f64.powi(power));
            let _ = writeln!(svg, "<path d=\"M{x:.1} {above}v{height}\" stroke=\"#ddd\"/>");
        }
        for &y in &marks {
            let y = y_of(y);
            let _ = writeln!(svg, "<path d=\"M{left} {y:.1}h{width}\" stroke=\"#ddd\"/>");
        }
        for (i, line) in self.lines.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            let mut path = String::new();
            for (n, (x, y)) in line.points.iter().filter(drawn).enumerate() {
                let _ = write!(path, "{}{:.1} {:.1}", if n == 0 { "M" } else { "L" }, x_of(*x), y_of(*y));
                let _ =
                    writeln!(svg, "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>", x_of(*x), y_of(*y));
            }
            // Where colours come again, lines are dashed.
            let dashes = if i < COLOURS.len() { "" } else { " stroke-dasharray=\"6 4\"" };
            let _ =
                writeln!(svg, "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"{dashes}/>");
        }
        svg.push_str("</svg>\n");
        svg
    }
}

/// The next of 1, 2, 5, 10, 20, ... from `step` up.
fn nice(step: f64) -> f64 {
    if !(step > 0.0 && step.is_finite()) {
        return 1.0;
    }
    let power = 10f64.powf(step.log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|n| n * power).find(|&n| n >= step * 0.999).unwrap_or(10.0 * power)
}

/// A number as an axis shows it.
fn label(x: f64) -> String {
    if x == 0.0 || (0.01..10_000.0).contains(&x) {
        let text = format!("{x:.2}");
        return text.trim_end_matches('0').trim_end_matches('.').to_string();
    }
    format!("{x:.0e}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_is_drawn() {
        let line = |name: &str, points: &[(f64, f64)]| Line { name: name.into(), points: points.to_vec() };
        let plot = Plot {
            title: "a < b".into(),
            x_label: "MB".into(),
            y_label: "%".into(),
            logarithmic: false,
            lines: vec![line("one", &[(4.2, 15.0), (537.0, 97.5)]), line("two", &[(10.0, f64::NAN)])],
        };
        let svg = plot.svg();
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains("a &lt; b") && svg.contains(">1000</text>") && svg.contains(">100</text>"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        let steep =
            Plot { logarithmic: true, lines: vec![line("one", &[(4.2, 0.05), (537.0, 900.0), (9.0, 0.0)])], ..plot };
        let svg = steep.svg();
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!([">0.01</text>", ">1</text>", ">1000</text>"].iter().all(|mark| svg.contains(mark)), "{svg}");
        for logarithmic in [false, true] {
            let empty = Plot {
                lines: Vec::new(),
                logarithmic,
                title: String::new(),
                x_label: String::new(),
                y_label: String::new(),
            };
            assert!(!empty.svg().contains("NaN") && !empty.svg().contains("inf"));
        }
    }

    #[test]
    fn steps_are_round() {
        assert_eq!([0.3, 1.0, 1.1, 30.0, 0.0].map(nice), [0.5, 1.0, 2.0, 50.0, 1.0]);
        assert_eq!([0.0, 0.5, 20.0, 1e6].map(label), ["0", "0.5", "20", "1e6"]);
    }
}
