//! `treeattn simulate`: what steps over many GPUs would take, by the cost model of the library; no GPU is needed.

use std::path::PathBuf;

use serde::Serialize;
use treeattn::attention::Algorithm;
use treeattn::cost::{Machine, Shape, recommend, step};

use crate::bench::{self, Heads};
use crate::outcome::{Outcome, print};
use crate::plot::{Panel, Plot, Scale, Style};
use crate::table::Table;

/// What a step may take more than the best one, for fewer GPUs.
const SLACK: f64 = 0.05;
const ALGORITHMS: [Algorithm; 5] =
    [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Tree, Algorithm::Allreduce3, Algorithm::Ring];

#[derive(clap::Args)]
pub struct Args {
    /// Query heads / kv heads x dimension.
    #[arg(long, default_value = "32/8x128")]
    heads: Heads,
    /// Sequences.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Bits of an element of keys and values.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=32))]
    bits: u32,
    /// Keys of each sequence, all GPUs together.
    #[arg(long, value_delimiter = ',', default_values_t = [80_000, 320_000, 1_280_000, 5_120_000],
          value_parser = clap::value_parser!(u32).range(1..))]
    lengths: Vec<u32>,
    /// Numbers of GPUs.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    gpus: Vec<u32>,
    /// GPUs of a node, which reach each other's memory.
    #[arg(long, default_value_t = Machine::H200.gpus_a_node as u32, value_parser = clap::value_parser!(u32).range(1..=64))]
    gpus_a_node: u32,
    /// Writes all that was found to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Draws it, as SVG.
    #[arg(long)]
    plot: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    command: Vec<String>,
    constants: Vec<(&'static str, f64)>,
    rows: Vec<Row>,
    recommended: Vec<Recommended>,
}

/// A step, in microseconds.
#[derive(Serialize)]
struct Row {
    keys: usize,
    gpus: usize,
    local_us: f64,
    algorithms: Vec<(&'static str, f64)>,
}

#[derive(Serialize)]
struct Recommended {
    keys: usize,
    gpus: usize,
    algorithm: &'static str,
    us: f64,
    /// Of one GPU.
    alone_us: f64,
    ring_us: Option<f64>,
}

pub fn run(args: &Args) -> Outcome<()> {
    let machine = Machine { gpus_a_node: args.gpus_a_node as usize, ..Machine::H200 };
    bench::refuse_latent(&[args.heads])?;
    let (heads, batch) = (&args.heads, args.batch as usize);
    let shape = Shape {
        batch,
        q_heads: heads.q_heads,
        kv_heads: heads.kv_heads,
        head_dim: heads.head_dim,
        element_bytes: f64::from(args.bits) / 8.0,
    };
    let report = predict(args, &machine, &shape);
    print(&tell(&report, &machine))?;
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    if let Some(path) = &args.plot {
        std::fs::write(path, plot(&report, &machine, args).svg())?;
    }
    Ok(())
}

fn predict(args: &Args, machine: &Machine, shape: &Shape) -> Report {
    let mut rows = Vec::new();
    let mut recommended = Vec::new();
    let counts: Vec<usize> = args.gpus.iter().map(|&gpus| gpus as usize).collect();
    for keys in args.lengths.iter().map(|&keys| keys as usize) {
        for &gpus in &counts {
            let at = |algorithm: Algorithm| Some((algorithm.name(), step(machine, shape, keys, gpus, algorithm)?));
            let found: Vec<_> = ALGORITHMS.into_iter().filter_map(at).collect();
            let local_us = found.first().map_or(0.0, |(_, cost)| cost.local_us);
            let algorithms = found.iter().map(|(name, cost)| (*name, cost.total_us())).collect();
            rows.push(Row { keys, gpus, local_us, algorithms });
        }
        let us = |gpus, algorithm| step(machine, shape, keys, gpus, algorithm).map(|cost| cost.total_us());
        if let Some((gpus, algorithm, cost)) = recommend(machine, shape, keys, &counts, SLACK) {
            recommended.push(Recommended {
                keys,
                gpus,
                algorithm: if gpus == 1 { "none" } else { algorithm.name() },
                us: cost.total_us(),
                alone_us: us(1, Algorithm::OneShot).unwrap_or(0.0),
                ring_us: us(gpus, Algorithm::Ring).filter(|_| gpus > 1),
            });
        }
    }
    Report {
        version: env!("CARGO_PKG_VERSION"),
        command: std::env::args().collect(),
        constants: constants(machine),
        rows,
        recommended,
    }
}

/// What the model counts with.
fn constants(machine: &Machine) -> Vec<(&'static str, f64)> {
    vec![
        ("GPUs of a node", machine.gpus_a_node as f64),
        ("read bandwidth, GB/s", machine.read_bandwidth / 1e9),
        ("a step without keys, us", machine.step_us),
        ("windows: us", machine.windows.latency_us),
        ("windows: GB/s", machine.windows.bandwidth / 1e9),
        ("NCCL allreduce in a node: us", machine.allreduce.latency_us),
        ("NCCL allreduce in a node: GB/s", machine.allreduce.bandwidth / 1e9),
        ("copy to the next GPU: us", machine.copy.latency_us),
        ("copy to the next GPU: GB/s", machine.copy.bandwidth / 1e9),
        ("NCCL allgather between nodes (published): us", machine.between.latency_us),
        ("NCCL allgather between nodes (published): GB/s", machine.between.bandwidth / 1e9),
        ("each further node (published): us", machine.further_node_us),
        ("NCCL allreduce over two nodes (published): us", machine.allreduce_between.latency_us),
        ("each doubling of nodes (published): us", machine.doubling_us),
    ]
}

fn tell(report: &Report, machine: &Machine) -> String {
    let mut text = format!("{}: predicted, not measured. Constants:\n", machine.name);
    for (name, value) in &report.constants {
        text.push_str(&format!("  {name}: {value}\n"));
    }
    let header: Vec<&str> = ["keys", "GPUs", "local"].into_iter().chain(ALGORITHMS.map(Algorithm::name)).collect();
    let mut table = Table::new(&header);
    for row in &report.rows {
        let us = |algorithm: &Algorithm| {
            let found = row.algorithms.iter().find(|(name, _)| *name == algorithm.name());
            found.map_or_else(|| "-".into(), |(_, us)| format!("{us:.1}"))
        };
        let first = [row.keys.to_string(), row.gpus.to_string(), format!("{:.1}", row.local_us)];
        table.row(first.into_iter().chain(ALGORITHMS.iter().map(us)).collect());
    }
    text.push_str(&format!("\nus a step:\n{}\n", table.render()));
    for found in &report.recommended {
        let Recommended { keys, gpus, algorithm, us, alone_us, ring_us } = found;
        text.push_str(&match ring_us {
            None => format!("{keys} keys: one GPU, {us:.1} us; sharding loses\n"),
            Some(ring) => format!(
                "{keys} keys: {gpus} GPUs, {algorithm}, {us:.1} us: {:.1} times as fast as one GPU, {:.0} times as a ring\n",
                alone_us / us,
                ring / us
            ),
        });
    }
    text
}

fn plot(report: &Report, machine: &Machine, args: &Args) -> Plot {
    let Heads { q_heads, kv_heads, head_dim, .. } = &args.heads;
    let heads = format!("{q_heads}/{kv_heads} x {head_dim}");
    let mut panel = Panel { title: String::new(), lines: Vec::new() };
    for row in &report.rows {
        for (name, us) in &row.algorithms {
            let style = Style::Measured { colour: (*name).to_string(), dash: format!("{} keys", row.keys) };
            panel.add(style, (row.gpus as f64, *us));
        }
    }
    Plot {
        title: format!("A decode step by exchange algorithm, predicted: {heads}, batch {}", args.batch),
        about: vec![machine.name.to_string()],
        command: report.command.clone(),
        x: ("GPUs".into(), Scale::Doublings),
        y: ("us a step".into(), Scale::Decades),
        colours: "algorithm",
        dashes: "cache",
        panels: vec![panel],
    }
}
