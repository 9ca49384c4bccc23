//! What a run found: the JSON file and the tables.

use serde::Serialize;

use super::algorithms::{self, Comparison};
use super::case::{Case, Target};
use super::exchange::Exchange;
use super::limit::Limit;
use super::samples::Summary;
use crate::machine::Machine;
use crate::table::Table;

/// A run may be this much faster than the fastest pass of the read kernels before it counts as contaminated.
const TOLERANCE: f64 = 0.02;
/// The share of the cores that others may use before the tables say so.
const QUIET: f64 = 0.05;

#[derive(Serialize)]
pub struct Report {
    pub version: &'static str,
    pub command: Vec<String>,
    pub machine: Machine,
    pub pool_bytes: usize,
    pub ceiling: CeilingReport,
    pub limits: Vec<LimitReport>,
    pub rows: Vec<Row>,
    pub exchanges: Vec<Exchange>,
    /// Exchange algorithms side by side.
    pub algorithms: Vec<Comparison>,
    /// RING's time over ONE_SHOT's at 32 MiB of keys and values a rank and 4 ranks.
    pub ring_over_one_shot: Option<f64>,
    pub targets: Vec<TargetReport>,
    /// The share of the cores that others used meanwhile; none where the system does not say.
    pub others_share: Option<f64>,
    /// Whether a row was faster than the machine can be: something was read from a cache, or the ceiling is wrong.
    pub contaminated: bool,
}

/// Read bandwidth, bytes a second, all cores.
#[derive(Serialize)]
pub struct CeilingReport {
    pub kernel: &'static str,
    pub median: f64,
    pub peak: f64,
    /// The median, or what the fastest row read, where that is more.
    pub limit: f64,
    pub kernels: Vec<(&'static str, f64)>,
}

/// Arithmetic, operations a second, all cores.
#[derive(Serialize)]
pub struct LimitReport {
    pub name: &'static str,
    pub median: f64,
    pub peak: f64,
    /// The median, or what the fastest row on this instruction set computed, where that is more.
    pub limit: f64,
}

#[derive(Serialize)]
pub struct Row {
    #[serde(flatten)]
    pub case: Case,
    pub kv_bytes: usize,
    pub seconds: Summary,
    pub bytes_per_second: f64,
    /// Read bandwidth beside this row's blocks, bytes a second: the median of what was read fastest then. None for caches
    /// read again and again.
    pub ceiling: Option<f64>,
    /// Time over bytes / that bandwidth, block by block; the median.
    pub over_ceiling: Option<f64>,
    pub flops_per_second: f64,
    /// Share of the fp32 FMA limit of the instruction set, which all rows of a run set.
    pub share_of_fma: Option<f64>,
    /// Of a checked row, its seconds less those of the row that is not, block by block.
    pub added_by_checks: Option<Summary>,
    pub contaminated: bool,
}

#[derive(Serialize)]
pub struct TargetReport {
    pub name: String,
    pub wanted: String,
    pub found: String,
    pub met: bool,
}

impl Row {
    /// `beside`: the medians of the read bandwidth beside this row's blocks and of the blocks' times over bytes / that
    /// bandwidth, where it reads from memory. `peak`: the fastest pass of the whole run.
    pub fn new(case: Case, seconds: Summary, beside: Option<(f64, f64)>, peak: f64) -> Row {
        let bytes_per_second = case.kv_bytes() as f64 / seconds.median;
        let flops_per_second = case.flops() / seconds.median;
        Row {
            case,
            kv_bytes: case.kv_bytes(),
            seconds,
            bytes_per_second,
            ceiling: beside.map(|beside| beside.0.max(bytes_per_second)),
            over_ceiling: beside.map(|beside| beside.1),
            flops_per_second,
            share_of_fma: None,
            added_by_checks: None,
            contaminated: !case.cached && bytes_per_second > peak * (1.0 + TOLERANCE),
        }
    }
}

/// The arithmetic limits of a run, and every row's share of its own: no limit is below what a row reached.
pub fn limits(measured: &[Limit], rows: &mut [Row]) -> Vec<LimitReport> {
    let mut reports = Vec::new();
    if rows.is_empty() {
        return reports;
    }
    for limit in measured {
        let mine = |row: &&mut Row| limit.is_fma_of(row.case.isa);
        let reached = rows.iter_mut().filter(mine).map(|row| row.flops_per_second);
        let most = reached.fold(limit.median(), f64::max);
        rows.iter_mut().filter(mine).for_each(|row| row.share_of_fma = Some(row.flops_per_second / most));
        reports.push(LimitReport { name: limit.name(), median: limit.median(), peak: limit.peak(), limit: most });
    }
    reports
}

impl Report {
    pub fn judge(&self, targets: &[Target]) -> Vec<TargetReport> {
        let row = |case: &Case| self.rows.iter().find(|row| row.case == *case);
        let judge = |target: &Target| match target {
            Target::Ceiling { case, most } => {
                let found = row(case)?.over_ceiling?;
                let name = format!("{} {} over bytes / bandwidth", case.shape(), case.types());
                Some(told(name, format!("<= {most:.2} x"), format!("{found:.2} x"), found <= *most))
            }
            Target::Fma { case, least } => {
                let found = row(case)?.share_of_fma?;
                let name = format!("{} {}, share of the FMA limit", case.shape(), case.types());
                let (wanted, shown) = (format!(">= {:.0} %", 100.0 * least), format!("{:.1} %", 100.0 * found));
                Some(told(name, wanted, shown, found >= *least))
            }
            Target::PerByte { name, case, than, most } => {
                let found = row(than)?.bytes_per_second / row(case)?.bytes_per_second;
                Some(told(name.to_string(), format!("<= {most:.2} x"), format!("{found:.2} x"), found <= *most))
            }
            Target::Exchange { ranks, most } => {
                let found = self.exchanges.iter().find(|e| e.ranks == *ranks)?.seconds.median * 1e6;
                let name = format!("exchange of 32 x 128 f32, {ranks} ranks");
                Some(told(name, format!("<= {most:.0} us"), format!("{found:.1} us"), found <= *most))
            }
        };
        targets.iter().filter_map(judge).collect()
    }

    /// The tables.
    pub fn text(&self) -> String {
        let machine = &self.machine;
        let mut text = format!(
            "{}, {} cores; read bandwidth {:.1} GB/s (best of {} kernels over {} MiB: {}), at most {:.1}{}\n",
            machine.processor,
            machine.cores,
            self.ceiling.median / 1e9,
            self.ceiling.kernels.len(),
            self.pool_bytes >> 20,
            self.ceiling.kernel,
            self.ceiling.peak / 1e9,
            if self.ceiling.limit > self.ceiling.median {
                format!("; a step read {:.1}", self.ceiling.limit / 1e9)
            } else {
                String::new()
            },
        );
        text.push_str(&machine.where_ranks_run());
        if !self.rows.is_empty() {
            let limits: Vec<String> =
                self.limits.iter().map(|limit| format!("{} {:.0}", limit.name, limit.limit / 1e9)).collect();
            text.push_str(&format!("arithmetic limits, GFLOP/s: {}\n\n", limits.join(", ")));
            text.push_str(&self.decode_table());
            text.push_str(&self.checks_table());
        }
        if !self.exchanges.is_empty() {
            let mut table = Table::new(&["exchange", "ranks", "turns", "median us", "min", "p90"]);
            for e in &self.exchanges {
                let us = |seconds: f64| format!("{:.1}", seconds * 1e6);
                table.row(vec![
                    format!("{} x {} f32 partials", e.heads, e.head_dim),
                    e.ranks.to_string(),
                    e.seconds.count.to_string(),
                    us(e.seconds.median),
                    us(e.seconds.minimum),
                    us(e.seconds.p90),
                ]);
            }
            text.push_str(&format!("\n{}", table.render()));
        }
        if !self.algorithms.is_empty() {
            text.push_str(&format!("\n{}", algorithms::text(&self.algorithms)));
        }
        if !self.targets.is_empty() {
            let mut table = Table::new(&["target", "wanted", "found", ""]);
            for t in &self.targets {
                let met = if t.met { "met" } else { "MISSED" };
                table.row(vec![t.name.clone(), t.wanted.clone(), t.found.clone(), met.to_string()]);
            }
            text.push_str(&format!("\n{}", table.render()));
        }
        text.push_str(&self.footnotes());
        text
    }

    fn decode_table(&self) -> String {
        let mut table = Table::new(&[
            "decode",
            "dtype",
            "isa",
            "ranks x threads",
            "MB",
            "median ms",
            "min",
            "p90",
            "GB/s",
            "ceiling",
            "x ceiling",
            "GFLOP/s",
            "% FMA",
        ]);
        for row in &self.rows {
            let ms = |seconds: f64| format!("{:.3}", seconds * 1e3);
            let mark = if row.contaminated { " !" } else { "" };
            table.row(vec![
                row.case.shape(),
                row.case.types(),
                row.case.isa.name().to_string(),
                format!("{} x {}", row.case.ranks, row.case.threads_per_rank),
                format!("{:.1}", row.kv_bytes as f64 / 1e6),
                ms(row.seconds.median),
                ms(row.seconds.minimum),
                ms(row.seconds.p90),
                format!("{:.1}", row.bytes_per_second / 1e9),
                row.ceiling.map_or("-".to_string(), |read| format!("{:.1}", read / 1e9)),
                row.over_ceiling.map_or("-".to_string(), |ratio| format!("{ratio:.2}{mark}")),
                format!("{:.0}", row.flops_per_second / 1e9),
                row.share_of_fma.map_or("-".to_string(), |share| format!("{:.0}", 100.0 * share)),
            ]);
        }
        table.render()
    }

    /// What checking costs. Empty where nothing is checked.
    fn checks_table(&self) -> String {
        let mut table = Table::new(&["checked steps", "dtype", "ranks x threads", "median us", "adds us", "%"]);
        let mut any = false;
        for row in &self.rows {
            let Some(added) = row.added_by_checks else { continue };
            any = true;
            table.row(vec![
                row.case.shape(),
                row.case.types(),
                format!("{} x {}", row.case.ranks, row.case.threads_per_rank),
                format!("{:.1}", row.seconds.median * 1e6),
                format!("{:.1}", added.median * 1e6),
                format!("{:.1}", 100.0 * added.median / (row.seconds.median - added.median)),
            ]);
        }
        if any { format!("\n{}", table.render()) } else { String::new() }
    }

    fn footnotes(&self) -> String {
        let mut text =
            String::from("\nheads q/kv x dim, sequences x keys; caches come from memory unless they are cached\n");
        if !self.rows.is_empty() {
            text.push_str(
                "ceiling: read bandwidth of all cores beside the row's blocks, GB/s, by the read kernel or by the row, \
                 whichever was faster; x ceiling: time over bytes / ceiling; % FMA: of the loop that measures it, or of the fastest row\n",
            );
        }
        if self.rows.iter().any(|row| row.added_by_checks.is_some()) {
            text.push_str(
                "adds: the median of what a block of checked steps takes longer than the block of others beside it\n",
            );
        }
        if self.contaminated {
            text.push_str("! faster than memory can be read: this run is CONTAMINATED, do not quote it\n");
        }
        if let Some(share) = self.others_share.filter(|&share| share > QUIET) {
            text.push_str(&format!(
                "others used {:.0} % of the cores meanwhile: the times are too long, run again on a quiet machine\n",
                100.0 * share
            ));
        }
        text
    }
}

fn told(name: String, wanted: String, found: String, met: bool) -> TargetReport {
    TargetReport { name, wanted, found, met }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::case::standard;

    #[test]
    fn no_row_is_above_a_limit() {
        let case = standard(2, true)[0];
        let row = |median: f64, beside: Option<(f64, f64)>| {
            Row::new(case, Summary { median, ..Summary::default() }, beside, 1e9)
        };
        let mut rows = [row(2.0, None), row(1.0, None)];
        // No limit was sampled: each is 0, and the rows set it.
        let limits = limits(&Limit::all(), &mut rows);
        assert_eq!(rows.map(|row| row.share_of_fma), [Some(0.5), Some(1.0)]);
        let mine = limits.iter().find(|limit| limit.limit > 0.0).unwrap();
        assert_eq!((mine.median, mine.limit), (0.0, case.flops()));
        let bytes = case.kv_bytes() as f64;
        let faster = row(1.0, Some((0.9 * bytes, 1.0)));
        assert_eq!(faster.ceiling, Some(bytes));
    }
}
