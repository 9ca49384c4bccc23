//! A plot as an SVG file: panels of lines one below the other, with axes and a legend in common. Text only, no scripts
//! and no fonts of its own. `axis` is one axis.

mod axis;

use std::fmt::Write;

use self::axis::Axis;
pub use self::axis::Scale;
use self::axis::number;

const WIDTH: f64 = 1000.0;
/// Room to the left of the panels, and to their right for the legend.
const LEFT: f64 = 78.0;
const RIGHT: f64 = 236.0;
/// A panel's height, where there are one or two, or more.
const PANEL: [f64; 2] = [400.0, 300.0];
/// The height of a line of small text, of an entry of the legend, of the room between panels, and below the last.
const LINE: f64 = 18.0;
const ENTRY: f64 = 21.0;
const GAP: f64 = 62.0;
const BELOW: f64 = 74.0;
/// Characters of a line of the command.
const COLUMNS: usize = 140;

/// Colours that are told apart in print and by the colour-blind.
const COLOURS: [&str; 10] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#117733", "#666666", "#000000"];
const DASHES: [&str; 5] = ["", "7 4", "2 3", "10 3 2 3", "14 5"];
/// Outlines of marks around 0, 0, one a colour.
const MARKS: [&str; 5] = [
    "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "m-3.5-3.5h7v7h-7z",
    "m0-5l5 5l-5 5l-5-5z",
    "m0-4.6l4.6 8h-9.2z",
    "m0 4.6l4.6-8h-9.2z",
];
const LIMIT: &str = "#b8b8b8";

/// What is drawn.
pub struct Plot {
    pub title: String,
    /// Lines below the title: where it was measured, what all lines have in common.
    pub about: Vec<String>,
    /// The command that measured it.
    pub command: Vec<String>,
    pub x: (String, Scale),
    pub y: (String, Scale),
    /// What colours and dashes stand for, as headings of the legend.
    pub colours: &'static str,
    pub dashes: &'static str,
    pub panels: Vec<Panel>,
}

/// Lines that are about one thing.
pub struct Panel {
    /// Empty where there is one panel, whose subject the plot's title names.
    pub title: String,
    pub lines: Vec<Line>,
}

/// Points that are joined.
pub struct Line {
    pub style: Style,
    pub points: Vec<(f64, f64)>,
}

/// How a line is drawn, by what it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Style {
    /// With a mark at each point. An empty dash is a full line without an entry in the legend.
    Measured { colour: String, dash: String },
    /// What cannot be passed, named in the legend.
    Limit(String),
}

impl Panel {
    /// Adds a point to the line of this style, which is made where there is none.
    pub fn add(&mut self, style: Style, point: (f64, f64)) {
        match self.lines.iter_mut().find(|line| line.style == style) {
            Some(line) if line.points.contains(&point) => {}
            Some(line) => line.points.push(point),
            None => self.lines.push(Line { style, points: vec![point] }),
        }
    }
}

/// The entries of the legend, each once and in the order in which they come.
struct Legend<'a> {
    colours: Vec<&'a str>,
    dashes: Vec<&'a str>,
    limits: Vec<&'a str>,
}

impl Plot {
    /// The file's text. Points that an axis cannot show are left out.
    pub fn svg(&self) -> String {
        let points = || self.panels.iter().flat_map(|panel| &panel.lines).flat_map(|line| &line.points);
        let x = Axis::over(self.x.1, points().map(|point| point.0));
        let y = Axis::over(self.y.1, points().map(|point| point.1));
        let legend = self.legend();
        let command = wrap(&self.command(), COLUMNS);
        let titles = self.panels.iter().any(|panel| !panel.title.is_empty());
        let above = 66.0 + LINE * (self.about.len() + usize::from(titles)) as f64;
        let panel = PANEL[usize::from(self.panels.len() > 2)];
        let count = self.panels.len().max(1) as f64;
        let height = above + count * panel + (count - 1.0) * GAP + BELOW + 15.0 * command.len() as f64;

        let mut svg = Svg(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
             height=\"{height}\" font-family=\"Helvetica, Arial, DejaVu Sans, sans-serif\" font-size=\"13\" \
             fill=\"#222\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
        ));
        svg.text(LEFT, 32.0, "font-size=\"18\" font-weight=\"bold\"", &self.title);
        for (n, line) in self.about.iter().enumerate() {
            svg.text(LEFT, 54.0 + LINE * n as f64, "fill=\"#555\"", line);
        }
        for n in 0..self.panels.len().max(1) {
            let top = above + n as f64 * (panel + GAP);
            self.grid(&mut svg, (&x, &y), top, panel);
            if let Some(drawn) = self.panels.get(n) {
                svg.text(LEFT, top - 9.0, "font-weight=\"bold\"", &drawn.title);
                draw(&mut svg, drawn, (&x, &y), &legend, top, panel);
            }
        }
        let bottom = height - BELOW - 15.0 * command.len() as f64;
        svg.text(LEFT + plot_width() / 2.0, bottom + 46.0, "text-anchor=\"middle\"", &self.x.0);
        for (n, line) in command.iter().enumerate() {
            let how = "font-family=\"DejaVu Sans Mono, monospace\" font-size=\"10.5\" fill=\"#777\"";
            svg.text(LEFT, bottom + BELOW + 15.0 * n as f64, how, line);
        }
        self.draw_legend(&mut svg, &legend, above);
        svg.0.push_str("</svg>\n");
        svg.0
    }

    /// The command in one line, the program without its folder.
    fn command(&self) -> String {
        let program = self.command.first().map_or("", |program| program.rsplit('/').next().unwrap_or(program));
        let words = std::iter::once(program).chain(self.command.iter().skip(1).map(String::as_str));
        words.collect::<Vec<_>>().join(" ")
    }

    fn legend(&self) -> Legend<'_> {
        let mut legend = Legend { colours: Vec::new(), dashes: Vec::new(), limits: Vec::new() };
        let add = |to: &mut Vec<_>, name: &'_ _| {
            if !to.contains(name) {
                to.push(*name);
            }
        };
        for line in self.panels.iter().flat_map(|panel| &panel.lines) {
            match &line.style {
                Style::Measured { colour, dash } => {
                    add(&mut legend.colours, &&**colour);
                    add(&mut legend.dashes, &&**dash);
                }
                Style::Limit(name) => add(&mut legend.limits, &&**name),
            }
        }
        legend
    }

    /// Ticks, grid and frame of a panel.
    fn grid(&self, svg: &mut Svg, (x, y): (&Axis, &Axis), top: f64, height: f64) {
        let width = plot_width();
        for tick in x.ticks() {
            let at = LEFT + width * x.at(tick).unwrap_or(0.0);
            svg.path(&format!("M{at:.1} {top:.1}v{height:.1}"), "stroke=\"#e6e6e6\"");
            svg.text(at, top + height + 20.0, "text-anchor=\"middle\"", &number(tick));
        }
        for tick in y.ticks() {
            let at = top + height * (1.0 - y.at(tick).unwrap_or(0.0));
            svg.path(&format!("M{LEFT} {at:.1}h{width:.1}"), "stroke=\"#e6e6e6\"");
            svg.text(LEFT - 9.0, at + 4.5, "text-anchor=\"end\"", &number(tick));
        }
        svg.path(&format!("M{LEFT} {top:.1}h{width:.1}v{height:.1}h-{width:.1}z"), "fill=\"none\" stroke=\"#999\"");
        let middle = top + height / 2.0;
        svg.text(20.0, middle, &format!("text-anchor=\"middle\" transform=\"rotate(-90 20 {middle:.1})\""), &self.y.0);
    }

    fn draw_legend(&self, svg: &mut Svg, legend: &Legend, top: f64) {
        let (left, mut y) = (WIDTH - RIGHT + 22.0, top + 10.0);
        let heading = |svg: &mut Svg, y: &mut f64, what: &str| {
            if !what.is_empty() {
                svg.text(left, *y, "font-weight=\"bold\"", what);
                *y += ENTRY;
            }
        };
        let sample = |y: f64| format!("M{left} {:.1}h34", y - 4.5);
        heading(svg, &mut y, self.colours);
        for (n, name) in legend.colours.iter().enumerate() {
            svg.path(&sample(y), &format!("stroke=\"{}\" stroke-width=\"2\"", colour(n)));
            svg.mark((left + 17.0, y - 4.5), n, "sample");
            svg.text(left + 42.0, y, "", name);
            y += ENTRY;
        }
        if legend.dashes.iter().any(|name| !name.is_empty()) {
            y += 10.0;
            heading(svg, &mut y, self.dashes);
            for (n, name) in legend.dashes.iter().enumerate() {
                svg.path(&sample(y), &format!("stroke=\"#444\" stroke-width=\"2\"{}", dash(n)));
                svg.text(left + 42.0, y, "", name);
                y += ENTRY;
            }
        }
        if !legend.limits.is_empty() {
            y += 10.0;
            heading(svg, &mut y, "limit");
        }
        for name in &legend.limits {
            svg.path(&sample(y), &format!("stroke=\"{LIMIT}\" stroke-width=\"5\""));
            for (n, line) in wrap(name, 24).iter().enumerate() {
                svg.text(left + 42.0, y, "", line);
                y += if n == 0 { ENTRY } else { LINE };
            }
        }
    }
}

/// The lines of a panel: what cannot be passed below the rest.
fn draw(svg: &mut Svg, panel: &Panel, (x, y): (&Axis, &Axis), legend: &Legend, top: f64, height: f64) {
    let at = |&(px, py): &(f64, f64)| Some((LEFT + plot_width() * x.at(px)?, top + height * (1.0 - y.at(py)?)));
    let points_of = |line: &Line| {
        let mut points = line.points.clone();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points.iter().filter_map(at).collect::<Vec<_>>()
    };
    let joined = |points: &[(f64, f64)]| {
        let steps = points.iter().enumerate();
        steps.map(|(n, (x, y))| format!("{}{x:.1} {y:.1}", if n == 0 { "M" } else { "L" })).collect::<String>()
    };
    for line in &panel.lines {
        if let Style::Limit(_) = &line.style {
            let how = format!("fill=\"none\" stroke=\"{LIMIT}\" stroke-width=\"5\" stroke-linejoin=\"round\"");
            svg.path(&joined(&points_of(line)), &how);
        }
    }
    for line in panel.lines.iter().rev() {
        if let Style::Measured { colour: name, dash: dashed } = &line.style {
            let index = |of: &[&str], name: &str| of.iter().position(|other| *other == name).unwrap_or(0);
            let (n, points) = (index(&legend.colours, name), points_of(line));
            let (colour, dash) = (colour(n), dash(index(&legend.dashes, dashed)));
            svg.path(&joined(&points), &format!("fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dash}"));
            points.iter().for_each(|&point| svg.mark(point, n, "mark"));
        }
    }
}

fn plot_width() -> f64 {
    WIDTH - LEFT - RIGHT
}

fn colour(n: usize) -> &'static str {
    COLOURS[n % COLOURS.len()]
}

fn dash(n: usize) -> String {
    match DASHES[n % DASHES.len()] {
        "" => String::new(),
        dashes => format!(" stroke-dasharray=\"{dashes}\""),
    }
}

/// A text in lines of at most `columns` characters, broken at spaces where there are some.
fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ').filter(|word| !word.is_empty()) {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= columns => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_string()),
        }
    }
    lines
}

/// The text of a file as it grows.
struct Svg(String);

impl Svg {
    fn text(&mut self, x: f64, y: f64, how: &str, what: &str) {
        if !what.is_empty() {
            let what = what.replace('&', "&amp;").replace('<', "&lt;");
            let _ = writeln!(self.0, "<text x=\"{x:.1}\" y=\"{y:.1}\" {how}>{what}</text>");
        }
    }

    fn path(&mut self, outline: &str, how: &str) {
        if !outline.is_empty() {
            let _ = writeln!(self.0, "<path d=\"{outline}\" {how}/>");
        }
    }

    /// The mark of colour `n`.
    fn mark(&mut self, (x, y): (f64, f64), n: usize, class: &str) {
        let outline = format!("M{x:.1} {y:.1}{}", MARKS[n % MARKS.len()]);
        self.path(&outline, &format!("class=\"{class}\" fill=\"{}\" stroke=\"white\" stroke-width=\"0.8\"", colour(n)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(colour: &str, dash: &str) -> Style {
        Style::Measured { colour: colour.into(), dash: dash.into() }
    }

    fn plot(panels: Vec<Panel>) -> Plot {
        Plot {
            title: "a < b".into(),
            about: vec!["somewhere".into()],
            command: vec!["/usr/bin/treeattn".into(), "bench".into()],
            x: ("MB".into(), Scale::Decades),
            y: ("%".into(), Scale::Linear),
            colours: "heads",
            dashes: "ranks",
            panels,
        }
    }

    #[test]
    fn every_point_is_drawn_and_every_style_is_in_the_legend_once() {
        let mut panel = Panel { title: "16/16 < 32/8".into(), lines: Vec::new() };
        for (style, point) in [
            (measured("one", "2 ranks"), (537.0, 97.5)),
            (measured("one", "2 ranks"), (4.2, 15.0)),
            (measured("one", "4 ranks"), (4.2, 25.0)),
            (measured("two", "4 ranks"), (10.0, f64::NAN)),
            (Style::Limit("read bandwidth".into()), (4.2, 100.0)),
        ] {
            panel.add(style, point);
        }
        let other = Panel {
            title: "again".into(),
            lines: vec![Line { style: measured("one", "2 ranks"), points: vec![(5.0, 5.0)] }],
        };
        let svg = plot(vec![panel, other]).svg();
        assert_eq!(svg.matches("class=\"mark\"").count(), 4);
        for once in [">one<", ">two<", ">2 ranks<", ">4 ranks<", ">read bandwidth<", ">heads<", ">ranks<", ">limit<"] {
            assert_eq!(svg.matches(once).count(), 1, "{once}\n{svg}");
        }
        for part in ["a &lt; b", "16/16 &lt; 32/8", ">100</text>", ">treeattn bench</text>", ">somewhere</text>"] {
            assert!(svg.contains(part), "{part}\n{svg}");
        }
        // One colour for `one` in both panels, in the legend, and for their three marks and two dashes.
        assert_eq!(svg.matches(&format!("stroke=\"{}\"", COLOURS[0])).count(), 4);
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn nothing_is_drawn_of_nothing() {
        for panels in [Vec::new(), vec![Panel { title: String::new(), lines: Vec::new() }]] {
            let svg = plot(panels).svg();
            assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn long_commands_are_broken_at_spaces() {
        assert_eq!(wrap("a bb ccc dddddd", 5), ["a bb", "ccc", "dddddd"]);
        assert!(wrap("", 5).is_empty());
    }
}
