//! What a run over GPUs found: the JSON file, the tables and the plot.

use serde::Serialize;
use treeattn::Error;
use treeattn::attention::Algorithm;
use treeattn::runtime::PlanStats;

use crate::bench::cuda::case::{self, Case};
use crate::bench::cuda::decode::Timed;
use crate::bench::cuda::peers::Peers;
use crate::bench::cuda::report::TargetReport;
use crate::bench::samples::Summary;
use crate::outcome::Outcome;
use crate::plot::{Panel, Plot, Scale, Style};
use crate::table::Table;

/// What stands for an algorithm where the first one was timed with ranks that compare what they were passed.
pub const CHECKED: &str = "CHECKED";

#[derive(Serialize)]
pub struct Report {
    pub version: &'static str,
    pub command: Vec<String>,
    /// The device of each rank.
    pub ranks: Vec<String>,
    /// What the communicator says of itself.
    pub links: serde_json::Value,
    /// Bytes of each rank's pool.
    pub pool_bytes: usize,
    /// Bytes a second at which the first rank's GPU can read its memory.
    pub read_bandwidth: f64,
    /// What two of the GPUs can do for each other, if there are two.
    pub peers: Option<Peers>,
    pub rows: Vec<Row>,
    pub exchanges: Vec<ExchangeRow>,
    pub targets: Vec<TargetReport>,
}

/// One shape; `keys` are those of all ranks together.
#[derive(Serialize)]
pub struct Row {
    #[serde(flatten)]
    pub case: Case,
    pub kv_bytes_a_rank: usize,
    /// The attention kernel alone, on all ranks at once.
    pub local: Times,
    /// Seconds that a rank's bytes take at the read bandwidth, and a flag one way.
    pub floor: f64,
    pub found: Vec<Found>,
}

/// The exchange of given partials.
#[derive(Serialize)]
pub struct ExchangeRow {
    /// Of a rank's partial.
    pub bytes: usize,
    pub found: Vec<Found>,
}

/// What an algorithm took, or why there is nothing.
#[derive(Serialize)]
pub struct Found {
    /// The name of an algorithm, or [`CHECKED`].
    pub asked: &'static str,
    /// What the plan chose, and why.
    pub algorithm: &'static str,
    pub reason: String,
    pub times: Option<Times>,
}

/// Seconds a step on the slowest rank.
#[derive(Clone, Copy, Serialize)]
pub struct Times {
    /// From a graph of `steps` steps that reads `copies` copies of the cache in turn.
    pub replay: Summary,
    pub steps: usize,
    pub copies: usize,
    /// Enqueued one by one, and the host's time for a call.
    pub eager: Summary,
    pub host: Summary,
}

impl From<Timed> for Times {
    fn from(timed: Timed) -> Times {
        Times { replay: timed.replay, steps: timed.steps, copies: timed.copies, eager: timed.eager, host: timed.host }
    }
}

impl Found {
    pub fn of(asked: &'static str, stats: &PlanStats, timed: Timed) -> Found {
        Found { asked, algorithm: stats.algorithm.name(), reason: stats.reason.clone(), times: Some(timed.into()) }
    }

    pub fn refused(asked: &'static str, algorithm: Algorithm, error: &Error) -> Found {
        Found { asked, algorithm: algorithm.name(), reason: error.to_string(), times: None }
    }

    fn micros(&self) -> Option<f64> {
        self.times.map(|times| 1e6 * times.replay.median)
    }
}

impl Row {
    /// `limits`: the read bandwidth, and the time of a flag one way.
    pub fn new(case: Case, ranks: usize, local: Found, found: Vec<Found>, limits: (f64, f64)) -> Outcome<Row> {
        let Some(local) = local.times else { return Err(local.reason.into()) };
        let kv_bytes_a_rank = case.kv_bytes() / ranks;
        Ok(Row { case, kv_bytes_a_rank, local, floor: kv_bytes_a_rank as f64 / limits.0 + limits.1, found })
    }

    /// What the first algorithm took, microseconds.
    fn ours(&self) -> Option<f64> {
        self.found.first().and_then(Found::micros)
    }

    fn added(&self) -> Option<f64> {
        Some(self.ours()? - 1e6 * self.local.replay.median)
    }
}

impl Report {
    /// What two H200 are to reach, beside what was measured there with public parts.
    pub fn judge(&self) -> Vec<TargetReport> {
        let row = |case: Case| self.rows.iter().find(|row| row.case == case);
        let target = |name: String, most: f64, found: Option<f64>, public: &'static str| {
            Some(TargetReport {
                name,
                wanted: format!("<= {most} us"),
                found: format!("{:.2} us", found?),
                public,
                met: found? <= most,
            })
        };
        let steps = case::sharded_targets()
            .into_iter()
            .filter_map(|(case, most, public)| target(case.shape(), most, row(case)?.ours(), public));
        let exchanges = self.exchanges.iter().filter_map(|exchange| {
            let over = exchange.found.first()?.micros()? / self.plain(exchange.bytes)?;
            Some(TargetReport {
                name: format!("exchange alone, {} bytes", exchange.bytes),
                wanted: "<= 1.2 x plain".into(),
                found: format!("{over:.2} x"),
                public: "",
                met: over <= 1.2,
            })
        });
        let first = self.rows.iter().find(|row| row.case.batch == 1);
        let added =
            first.and_then(|row| target(format!("the exchange's part of {}", row.case.shape()), 3.0, row.added(), ""));
        let host = first.and_then(|row| {
            let host = row.found.first()?.times.map(|times| 1e6 * times.host.median);
            target(format!("host time of an eager call, {}", row.case.shape()), 6.0, host, "")
        });
        steps.chain(exchanges).chain(added).chain(host).collect()
    }

    /// What an exchange of that many bytes that does nothing else takes, microseconds.
    fn plain(&self, bytes: usize) -> Option<f64> {
        let plain = self.peers.as_ref()?.exchanges.iter().find(|plain| plain.bytes == bytes)?;
        Some(1e6 * plain.seconds)
    }

    /// The limits and the tables.
    pub fn text(&self) -> String {
        let mut text = format!("{} ranks: {}\n", self.ranks.len(), self.ranks.join(", "));
        text.push_str(&format!("read bandwidth: {:.3} TB/s\n", 1e-12 * self.read_bandwidth));
        if let Some(Peers { between: [a, b], flag, copy, .. }) = &self.peers {
            let (flag, copy) = (1e6 * flag, 1e-9 * copy);
            text.push_str(&format!("{a} and {b}: a flag one way in {flag:.2} us, copies at {copy:.0} GB/s\n"));
        }
        text.push('\n');
        let us = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.2}"));
        let columns = |found: &[Found]| -> Vec<String> {
            let mut all = Vec::new();
            for (n, one) in found.iter().enumerate() {
                all.push(format!("{} us", one.asked));
                if n > 0 {
                    all.push(if one.asked == CHECKED { "adds us" } else { "x first" }.into());
                }
            }
            all
        };
        let cells = |found: &[Found]| -> Vec<String> {
            let mut all = Vec::new();
            for (n, one) in found.iter().enumerate() {
                all.push(us(one.micros()));
                if n > 0 {
                    let both = one.micros().zip(found[0].micros());
                    let beside =
                        both.map(|(mine, first)| if one.asked == CHECKED { mine - first } else { mine / first });
                    all.push(us(beside));
                }
            }
            all
        };
        if let Some(first) = self.rows.first() {
            let mut header: Vec<String> =
                ["decode", "MB a rank", "floor us", "local us", "chosen"].map(String::from).into_iter().collect();
            header.extend(columns(&first.found));
            header.extend(["first - local", "eager us", "host us"].map(String::from));
            let mut table = Table::new(&header.iter().map(String::as_str).collect::<Vec<_>>());
            for row in &self.rows {
                let times = row.found.first().and_then(|found| found.times);
                let mut line = vec![
                    row.case.shape(),
                    format!("{:.1}", row.kv_bytes_a_rank as f64 / 1e6),
                    format!("{:.2}", 1e6 * row.floor),
                    format!("{:.2}", 1e6 * row.local.replay.median),
                    row.found.first().map_or("-".into(), |found| found.algorithm.into()),
                ];
                line.extend(cells(&row.found));
                line.push(us(row.added()));
                line.push(us(times.map(|times| 1e6 * times.eager.median)));
                line.push(us(times.map(|times| 1e6 * times.host.median)));
                table.row(line);
            }
            text.push_str(&table.render());
        }
        if let Some(first) = self.exchanges.first() {
            let mut header = vec!["exchange alone".to_string(), "chosen".into()];
            header.extend(columns(&first.found));
            header.extend(["plain us", "first / plain"].map(String::from));
            let mut table = Table::new(&header.iter().map(String::as_str).collect::<Vec<_>>());
            for row in &self.exchanges {
                let chosen = row.found.first().map_or("-", |found| found.algorithm);
                let mut line = vec![format!("{} bytes a rank", row.bytes), chosen.into()];
                line.extend(cells(&row.found));
                let plain = self.plain(row.bytes);
                line.push(us(plain));
                let over = row.found.first().and_then(Found::micros).zip(plain).map(|(ours, plain)| ours / plain);
                line.push(over.map_or("-".into(), |over| format!("{over:.2}")));
                table.row(line);
            }
            text.push_str(&format!("\n{}", table.render()));
        }
        let all = self.rows.iter().flat_map(|row| &row.found).chain(self.exchanges.iter().flat_map(|row| &row.found));
        let mut refusals: Vec<String> = Vec::new();
        for found in all.filter(|found| found.times.is_none()) {
            let refusal = format!("{}: {}", found.asked, found.reason);
            if !refusals.contains(&refusal) {
                refusals.push(refusal);
            }
        }
        for refusal in refusals {
            text.push_str(&format!("not timed: {refusal}\n"));
        }
        text.push_str(&TargetReport::table(&self.targets, "two H200", "public parts there, us"));
        text.push_str(
            "\nkeys: of all ranks together; bf16 unless named; output on every rank; a replayed graph of many steps on each \
             rank, each of which reads another copy of the cache; the slowest rank counts; floor: a rank's bytes at the read bandwidth, and a flag one way; plain: words with flags to the \
             peer, its own added, and a kernel that counts\n",
        );
        text
    }

    /// A step's time over the keys of all ranks: a panel for each kind of shape, a colour for each algorithm, what attention
    /// alone takes, and the floor.
    pub fn plot(&self) -> Plot {
        let mut panels: Vec<Panel> = Vec::new();
        for row in self.rows.iter().filter(|row| row.case.batch == 1) {
            let title = row.case.kind();
            let index = panels.iter().position(|panel| panel.title == title).unwrap_or_else(|| {
                panels.push(Panel { title, lines: Vec::new() });
                panels.len() - 1
            });
            let keys = row.case.keys as f64;
            for found in &row.found {
                if let Some(micros) = found.micros() {
                    let measured = Style::Measured { colour: found.asked.into(), dash: String::new() };
                    panels[index].add(measured, (keys, micros));
                }
            }
            panels[index].add(Style::Limit("attention alone".into()), (keys, 1e6 * row.local.replay.median));
            panels[index].add(Style::Limit("bytes at the read bandwidth, one flag".into()), (keys, 1e6 * row.floor));
        }
        let mut title = format!("Decode over {} GPUs", self.ranks.len());
        if let [only] = &mut panels[..] {
            title.push_str(&format!(": {}, 1 sequence", std::mem::take(&mut only.title)));
        }
        Plot {
            title,
            about: vec![self.ranks.join(", "), "bf16 unless named; replayed graphs; the slowest rank counts".into()],
            command: self.command.clone(),
            x: ("keys of all ranks together".into(), Scale::Doublings),
            y: ("microseconds a step".into(), Scale::Decades),
            colours: "algorithm",
            dashes: "",
            panels,
        }
    }
}
