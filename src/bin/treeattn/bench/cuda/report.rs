//! What a run on a GPU found: the JSON file, the tables and the plot.

use serde::Serialize;

use super::case::{Case, Target};
use super::decode::Timed;
use super::driver::Card;
use crate::bench::samples::Summary;
use crate::plot::{Panel, Plot, Scale, Style};
use crate::table::Table;

#[derive(Serialize)]
pub struct Report {
    pub version: &'static str,
    pub command: Vec<String>,
    pub gpu: Card,
    pub pool_bytes: usize,
    pub ceiling: CeilingReport,
    pub rows: Vec<Row>,
    pub targets: Vec<TargetReport>,
    /// Whether a row was faster than the memory can be: something came from a cache.
    pub contaminated: bool,
}

/// Read bandwidth, bytes a second.
#[derive(Serialize)]
pub struct CeilingReport {
    pub kernel: String,
    pub bytes: usize,
    pub median: f64,
    pub peak: f64,
    /// The median, or what the fastest row read, where that is more: what shares are taken of.
    pub limit: f64,
    pub kernels: Vec<(String, f64)>,
}

#[derive(Serialize)]
pub struct Row {
    #[serde(flatten)]
    pub case: Case,
    pub kv_bytes: usize,
    /// Seconds a step, from a graph of `steps` steps that reads `copies` copies of the cache in turn.
    pub replay: Summary,
    pub steps: usize,
    pub copies: usize,
    /// Seconds a step, enqueued one by one.
    pub eager: Summary,
    /// Seconds of the host's time for one of those calls.
    pub host: Summary,
    pub bytes_per_second: f64,
    /// Bytes / read bandwidth over the replayed step.
    pub share_of_ceiling: f64,
}

#[derive(Serialize)]
pub struct TargetReport {
    pub name: String,
    pub wanted: String,
    pub found: String,
    pub public: &'static str,
    pub met: bool,
}

impl TargetReport {
    /// The table of what was aimed for on the `machine` it was set for, after an empty line; nothing where there is none.
    /// `public`: what the last column holds.
    pub fn table(targets: &[TargetReport], machine: &str, public: &str) -> String {
        if targets.is_empty() {
            return String::new();
        }
        let mut table = Table::new(&[&format!("target ({machine})"), "wanted", "found", "", public]);
        for t in targets {
            let met = if t.met { "met" } else { "MISSED" };
            let cells = [&t.name, &t.wanted, &t.found, met, t.public];
            table.row(cells.into_iter().map(ToString::to_string).collect());
        }
        format!("\n{}", table.render())
    }
}

impl Row {
    /// Its share of the ceiling is set when all rows are there.
    pub fn new(case: Case, timed: Timed) -> Row {
        let bytes_per_second = case.kv_bytes() as f64 / timed.replay.median;
        Row {
            case,
            kv_bytes: case.kv_bytes(),
            replay: timed.replay,
            steps: timed.steps,
            copies: timed.copies,
            eager: timed.eager,
            host: timed.host,
            bytes_per_second,
            share_of_ceiling: 0.0,
        }
    }
}

impl Report {
    pub fn judge(&self, targets: &[Target]) -> Vec<TargetReport> {
        let row = |case: &Case| self.rows.iter().find(|row| row.case == *case);
        let micros = |case: &Case| row(case).map(|row| 1e6 * row.replay.median);
        let judge = |target: &Target| {
            let (name, most, found, unit, public) = match target {
                Target::Micros { case, most, public } => (case.shape(), *most, micros(case)?, "us", *public),
                Target::Over { case, than, most, spare } if *spare > 0.0 => {
                    let name = format!("{} beyond {}", case.shape(), than.kind());
                    (name, *spare, micros(case)? - most * micros(than)?, "us", "")
                }
                Target::Over { case, than, most, .. } => {
                    let name = format!("{} over {}", case.shape(), than.kind());
                    (name, *most, micros(case)? / micros(than)?, "x", "")
                }
                Target::Host { case, most } => {
                    let name = format!("host time of an eager call, {}", case.shape());
                    (name, *most, 1e6 * row(case)?.host.median, "us", "")
                }
            };
            let digits = if unit == "x" { 3 } else { 2 };
            Some(TargetReport {
                name,
                wanted: format!("<= {most} {unit}"),
                found: format!("{found:.digits$} {unit}"),
                public,
                met: found <= most,
            })
        };
        targets.iter().filter_map(judge).collect()
    }

    /// The tables.
    pub fn text(&self) -> String {
        let (gpu, ceiling) = (&self.gpu, &self.ceiling);
        let mut text = format!(
            "{}, {} multiprocessors, {} MB of L2, driver for CUDA {}.{}\nread bandwidth {:.3} TB/s (best of {} kernels over \
             {:.1} GB: {}), at most {:.3}; nominal {:.3}\n\n",
            gpu.name,
            gpu.multiprocessors,
            gpu.l2_bytes >> 20,
            gpu.driver.0,
            gpu.driver.1,
            ceiling.median / 1e12,
            ceiling.kernels.len(),
            ceiling.bytes as f64 / 1e9,
            ceiling.kernel,
            ceiling.peak / 1e12,
            gpu.nominal / 1e12,
        );
        let mut table = Table::new(&["decode", "MB", "replay us", "min", "TB/s", "% ceiling", "eager us", "host us"]);
        for row in &self.rows {
            let us = |seconds: f64| format!("{:.2}", 1e6 * seconds);
            table.row(vec![
                row.case.shape(),
                format!("{:.1}", row.kv_bytes as f64 / 1e6),
                us(row.replay.median),
                us(row.replay.minimum),
                format!("{:.3}", row.bytes_per_second / 1e12),
                if self.too_fast(row) { "!".into() } else { format!("{:.1}", 100.0 * row.share_of_ceiling) },
                us(row.eager.median),
                us(row.host.median),
            ]);
        }
        text.push_str(&table.render());
        text.push_str(&TargetReport::table(&self.targets, "one H200", "public there, us"));
        text.push_str(
            "\nbf16 unless named; heads q/kv x dim, sequences x keys; a replayed graph of many steps, each of which reads \
             another copy of the cache: none comes from L2; lse on\n",
        );
        if self.contaminated {
            text.push_str("! faster than memory can be read: this run is CONTAMINATED, do not quote it\n");
        }
        text
    }

    /// Sets every row's share of the read bandwidth: no limit is below what a step reached, unless that is more than the
    /// memory's clock allows.
    pub fn set_shares(&mut self) {
        let rates = self.rows.iter().filter(|row| !self.too_fast(row)).map(|row| row.bytes_per_second);
        self.ceiling.limit = rates.fold(self.ceiling.median, f64::max);
        for row in &mut self.rows {
            row.share_of_ceiling = row.bytes_per_second / self.ceiling.limit;
        }
    }

    /// Whether a row was faster than the memory's clock allows.
    pub fn too_fast(&self, row: &Row) -> bool {
        self.gpu.nominal > 0.0 && row.bytes_per_second > self.gpu.nominal
    }

    /// The share of the ceiling over the bytes of a step, a colour for each kind of shape.
    pub fn plot(&self) -> Plot {
        let mut panel = Panel { title: String::new(), lines: Vec::new() };
        let limit = format!("{:.2} TB/s of read bandwidth", self.ceiling.limit / 1e12);
        for row in self.rows.iter().filter(|row| !self.too_fast(row)) {
            let dash = if row.case.batch == 1 { "1 sequence" } else { "batches" };
            let measured = Style::Measured { colour: row.case.kind(), dash: dash.into() };
            let megabytes = row.kv_bytes as f64 / 1e6;
            panel.add(measured, (megabytes, 100.0 * row.share_of_ceiling));
            panel.add(Style::Limit(limit.clone()), (megabytes, 100.0));
        }
        Plot {
            title: format!("Decode on {}: share of its read bandwidth", self.gpu.name),
            about: vec!["bf16 unless named; replayed graphs; no step finds its cache in L2".into()],
            command: self.command.clone(),
            x: ("MB of keys and values a step".into(), Scale::Decades),
            y: ("% of the read bandwidth".into(), Scale::Linear),
            colours: "query/kv heads x dim",
            dashes: "batch",
            panels: vec![panel],
        }
    }
}
