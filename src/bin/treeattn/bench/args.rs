//! What `treeattn bench` is asked for.

use std::path::PathBuf;

use serde::Serialize;
use treeattn::attention::{Algorithm, Dtype};
use treeattn::cpu::Isa;
use treeattn::runtime::{Device, DeviceKind};

use super::algorithms;
use super::case::Heads;
use super::terms::Terms;
use crate::outcome::Outcome;
use crate::plot::Plot;

#[derive(clap::Args)]
pub struct Args {
    /// What to time: cpu:0, or a GPU such as cuda:0.
    #[arg(long, default_value = "cpu:0", value_parser = device)]
    pub device: Device,
    /// A few seconds, with short caches: shows that everything runs, not how fast.
    #[arg(long)]
    pub quick: bool,
    /// Heads and dimensions to time, such as 32/8x128,16/16x128; on GPUs also mla:16 for that many query heads of latent
    /// attention, 576 dims and 512 of v, which is a view of k. Any of these axes replaces the standard rows.
    #[arg(long, value_delimiter = ',')]
    pub heads: Vec<Heads>,
    /// Element types: f16, bf16, f32.
    #[arg(long, value_delimiter = ',', value_parser = dtype)]
    pub dtype: Vec<Dtype>,
    /// Element types of k and v, such as f8_e4m3, q8_0, q4_0; q and out are of --dtype. On CPUs each is also timed from a cache that
    /// stays in the processor's, where its arithmetic alone counts.
    #[arg(long, value_delimiter = ',', value_parser = any_dtype)]
    pub kv_dtype: Vec<Dtype>,
    /// Keys of each sequence, all ranks together.
    #[arg(long, value_delimiter = ',', value_parser = size)]
    pub lengths: Vec<usize>,
    /// Sequences.
    #[arg(long, value_delimiter = ',', value_parser = size)]
    pub batch: Vec<usize>,
    /// Ranks that the keys are sharded over; exchanges are timed for those above 1. Or the GPU of each rank, such as
    /// cuda:0,cuda:1: then times steps and exchanges between them.
    #[arg(long, value_delimiter = ',', value_parser = ranks)]
    pub ranks: Vec<Ranks>,
    /// Kernels: scalar, avx2, avx512, neon.
    #[arg(long, value_delimiter = ',', value_parser = isa)]
    pub isa: Vec<Isa>,
    /// Tokens a page of a block table; 0: a strided cache.
    #[arg(long, value_delimiter = ',', value_parser = page)]
    pub page_size: Vec<usize>,
    /// On CPUs: times every strided case once more from a cache whose kv heads lie apart, as [head][token][dim].
    #[arg(long)]
    pub head_major: bool,
    /// Query tokens of each sequence; causal where there are several.
    #[arg(long, value_delimiter = ',', value_parser = size)]
    pub query_tokens: Vec<usize>,
    /// Times every step over several ranks once more with the ranks comparing what they were passed, and tells what that adds.
    /// Without --ranks: over 2, which share the GPU of --device.
    #[arg(long)]
    pub checked: bool,
    /// What happens to scores: plain, softcap, alibi, sinks, mask (an additive f16 one), window (of 4,096), or all but the window.
    #[arg(long, value_delimiter = ',', value_parser = Terms::parse)]
    pub terms: Vec<Terms>,
    /// Threads of each rank. Default: the cores over the ranks.
    #[arg(long, value_parser = size)]
    pub threads: Option<usize>,
    /// Memory to read from, MiB; grows to twice the largest cache.
    #[arg(long, value_parser = size)]
    pub pool_mib: Option<usize>,
    /// Leaves the exchanges out, and the comparison of algorithms.
    #[arg(long)]
    pub no_exchange: bool,
    /// Compares exchange algorithms over the lengths and ranks given, and times nothing else: one_shot, two_shot, tree,
    /// allreduce3, ring, or all. The standard run compares all.
    #[arg(long, value_delimiter = ',', value_parser = algorithm)]
    pub algorithms: Vec<Algorithms>,
    /// Writes everything found to this file.
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Draws the comparison of algorithms, or what was found on a GPU, to this SVG file.
    #[arg(long)]
    pub plot: Option<PathBuf>,
}

impl Args {
    /// Writes what a run found where it was asked for: the numbers, and the plot.
    pub fn write(&self, report: &impl Serialize, plot: impl FnOnce() -> Plot) -> Outcome<()> {
        if let Some(path) = &self.json {
            let text = serde_json::to_string_pretty(report)? + "\n";
            std::fs::write(path, text).map_err(|error| format!("--json {}: {error}", path.display()))?;
        }
        if let Some(path) = &self.plot {
            std::fs::write(path, plot().svg()).map_err(|error| format!("--plot {}: {error}", path.display()))?;
        }
        Ok(())
    }
}

pub fn device(text: &str) -> Result<Device, String> {
    let parse = || {
        let (kind, ordinal) = text.split_once(':')?;
        let kind = match kind {
            "cpu" => DeviceKind::Cpu,
            "cuda" => DeviceKind::Cuda,
            _ => return None,
        };
        Some(Device { kind, ordinal: ordinal.parse().ok().filter(|&ordinal| ordinal >= 0)? })
    };
    parse()
        .filter(|device| *device == Device::CPU || device.kind == DeviceKind::Cuda)
        .ok_or("wanted cpu:0 or cuda:N".into())
}

/// The element types that are timed.
pub const DTYPES: [Dtype; 3] = [Dtype::F16, Dtype::Bf16, Dtype::F32];

fn dtype(name: &str) -> Result<Dtype, String> {
    let found = DTYPES.into_iter().find(|dtype| dtype.name() == name);
    found.ok_or_else(|| "wanted f16, bf16 or f32".to_string())
}

fn any_dtype(name: &str) -> Result<Dtype, String> {
    Dtype::ALL.into_iter().find(|dtype| dtype.name() == name).ok_or_else(|| {
        let names: Vec<&str> = Dtype::ALL.iter().map(|dtype| dtype.name()).collect();
        format!("wanted {}", names.join(", "))
    })
}

/// Some of the exchange algorithms.
#[derive(Clone, Debug)]
pub struct Algorithms(pub Vec<Algorithm>);

fn algorithm(name: &str) -> Result<Algorithms, String> {
    let chosen = |algorithm: &&Algorithm| name == "all" || algorithm.name().eq_ignore_ascii_case(name);
    let found: Vec<Algorithm> = algorithms::ALL.iter().filter(chosen).copied().collect();
    if found.is_empty() {
        Err("wanted one_shot, two_shot, tree, allreduce3, ring or all".into())
    } else {
        Ok(Algorithms(found))
    }
}

fn isa(name: &str) -> Result<Isa, String> {
    Isa::by_name("--isa", name).map_err(|error| error.message().to_string())
}

fn size(text: &str) -> Result<usize, String> {
    let fits = |&n: &usize| n >= 1 && n <= i32::MAX as usize;
    text.parse().ok().filter(fits).ok_or_else(|| format!("wanted a whole number from 1 to {}", i32::MAX))
}

/// A number of CPU ranks, or the GPU of one rank.
#[derive(Clone, Copy, Debug)]
pub enum Ranks {
    Count(usize),
    On(Device),
}

fn ranks(text: &str) -> Result<Ranks, String> {
    if text.contains(':') {
        let on = device(text).ok().filter(|device| device.kind == DeviceKind::Cuda);
        return on.map(Ranks::On).ok_or_else(|| "wanted cuda:N".into());
    }
    size(text).map(Ranks::Count)
}

fn page(text: &str) -> Result<usize, String> {
    if text == "0" { Ok(0) } else { size(text) }
}
