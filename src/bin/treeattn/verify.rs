//! `treeattn verify`: a grid of shapes against float64 sums, a line each; on GPUs first what these need.

use treeattn::attention::{AttentionDesc, Dtype, KvLayout, OutputMode, Placement};
use treeattn::cpu::Isa;
use treeattn::runtime::{Device, DeviceKind, Runtime, RuntimeConfig, SelfcheckConfig, attention_supported, selfcheck};

use crate::bench::device;
use crate::gpus;
use crate::outcome::{Outcome, print};

#[derive(clap::Args)]
pub struct Args {
    /// Where the ranks live: cpu:0, or a GPU such as cuda:0.
    #[arg(long, default_value = "cpu:0", value_parser = device)]
    device: Device,
    /// The GPU of each rank, such as cuda:0,cuda:1, in place of one device for 1 to 8 ranks.
    #[arg(long, value_delimiter = ',', value_parser = gpu, conflicts_with = "device")]
    ranks: Vec<Device>,
    /// Kernels to check: scalar, avx2, avx512, neon, or all that this machine has. Default: those in use here.
    #[arg(long)]
    isa: Option<String>,
    /// Every combination of element types, layouts, placements, outputs and ranks, instead of a spread of them.
    #[arg(long)]
    full: bool,
    /// Seed of the random inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

const DTYPES: [(Dtype, Dtype, Dtype, Dtype); 5] = [
    (Dtype::F32, Dtype::F32, Dtype::F32, Dtype::F32),
    (Dtype::F16, Dtype::F16, Dtype::F16, Dtype::F16),
    (Dtype::Bf16, Dtype::Bf16, Dtype::Bf16, Dtype::Bf16),
    (Dtype::F32, Dtype::F16, Dtype::F16, Dtype::F32),
    (Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::Bf16),
];
const LAYOUTS: [(KvLayout, i32); 4] =
    [(KvLayout::Strided, 0), (KvLayout::BlockTable, 16), (KvLayout::CsrPages, 1), (KvLayout::BlockTable, 7)];
const PLACEMENTS: [Placement; 4] =
    [Placement::Contiguous, Placement::Interleaved { run: 1 }, Placement::Interleaved { run: 16 }, Placement::Explicit];
const OUTPUTS: [OutputMode; 3] = [OutputMode::Replicated, OutputMode::Scattered, OutputMode::Local];
const RANKS: [i32; 5] = [1, 2, 3, 4, 8];
/// q heads, kv heads, dimension of q and k, dimension of v.
const HEADS: [(i32, i32, i32, i32); 8] = [
    (32, 8, 128, 128),
    (8, 8, 64, 64),
    (12, 4, 80, 80),
    (5, 1, 33, 17),
    (16, 1, 576, 512),
    (14, 2, 96, 128),
    (3, 3, 1, 1),
    (2, 1, 1024, 1024),
];
/// Sequences, query tokens each, keys of the longest.
const SIZES: [(i32, i32, i32); 6] = [(1, 1, 1500), (3, 1, 700), (2, 4, 333), (5, 2, 65), (1, 7, 64), (2, 1, 5)];

/// One shape of the grid.
struct Check {
    desc: AttentionDesc,
    config: SelfcheckConfig,
}

/// Shows every value of every axis with several of every other; the axes step at different rates.
fn spread() -> Vec<[usize; 7]> {
    let mut picks: Vec<[usize; 7]> =
        (0..60).map(|n| [n, n + n / 5, n / 3, n / 2 + n / 7, n + n / 5, n + n / 4, n / 3 + n / 11]).collect();
    // Shapes with many heads take few turns above: all of them once in plain surroundings.
    picks.extend((0..HEADS.len()).map(|heads| [heads, 0, 0, 0, 1, heads, 0]));
    picks
}

fn every() -> Vec<[usize; 7]> {
    let mut picks = Vec::new();
    for dtype in 0..DTYPES.len() {
        for layout in 0..LAYOUTS.len() {
            for placement in 0..PLACEMENTS.len() {
                for output in 0..OUTPUTS.len() {
                    for ranks in 0..RANKS.len() {
                        let n = picks.len();
                        picks.push([dtype, layout, placement, output, ranks, n, n / 3]);
                    }
                }
            }
        }
    }
    picks
}

/// The values of the axes that not every device serves.
struct Served {
    dtypes: Vec<(Dtype, Dtype, Dtype, Dtype)>,
    heads: Vec<(i32, i32, i32, i32)>,
}

impl Served {
    fn by(runtime: &Runtime, device: Device) -> Served {
        let serves = |desc: &AttentionDesc| attention_supported(runtime, device, desc).is_ok();
        let dtypes: Vec<_> = DTYPES.into_iter().filter(|&d| serves(&typed(HEADS[0], d, 1))).collect();
        let first = dtypes.first().copied().unwrap_or(DTYPES[0]);
        let heads = HEADS.into_iter().filter(|&h| serves(&typed(h, first, 1))).collect();
        Served { dtypes, heads }
    }
}

/// A shape of these heads, dimensions and types.
fn typed(heads: (i32, i32, i32, i32), dtypes: (Dtype, Dtype, Dtype, Dtype), keys: i32) -> AttentionDesc {
    let (q_heads, kv_heads, dim, head_dim_v) = heads;
    let (q_dtype, k_dtype, v_dtype, out_dtype) = dtypes;
    AttentionDesc {
        head_dim_v,
        q_dtype,
        k_dtype,
        v_dtype,
        out_dtype,
        ..AttentionDesc::new(q_heads, kv_heads, dim, keys)
    }
}

fn check(served: &Served, pick: [usize; 7], number: usize, seed: u64) -> Check {
    fn at<T: Copy>(from: &[T], n: usize) -> T {
        from[n % from.len()]
    }
    let (batch, tokens, keys) = at(&SIZES, pick[6]);
    let mut desc = typed(at(&served.heads, pick[5]), at(&served.dtypes, pick[0]), keys);
    (desc.kv_layout, desc.page_size) = at(&LAYOUTS, pick[1]);
    desc.placement = at(&PLACEMENTS, pick[2]);
    desc.output = at(&OUTPUTS, pick[3]);
    desc.causal = tokens > 1;
    (desc.max_batch, desc.max_query_tokens) = (batch, batch * tokens);
    let ranks = at(&RANKS, pick[4]);
    let seed = seed.wrapping_add(number as u64);
    Check { desc, config: SelfcheckConfig { ranks, batch, query_tokens: tokens, kv_length: keys, seed } }
}

/// Whether every shape passed, and GPUs can do what they need to.
pub fn run(args: &Args) -> Outcome<bool> {
    let devices = if args.ranks.is_empty() { vec![args.device] } else { args.ranks.clone() };
    let on_gpus = devices[0].kind == DeviceKind::Cuda;
    let isas: Vec<Isa> = match args.isa.as_deref() {
        Some(_) if on_gpus => return Err(format!("--isa: it is for the CPU, found {}", devices[0]).into()),
        None => vec![treeattn::cpu::isa()],
        Some("all") => Isa::available().collect(),
        Some(name) => vec![Isa::by_name("--isa", name)?],
    };
    if on_gpus && !gpus::examine(&Runtime::new(RuntimeConfig::default())?, &devices)? {
        return Ok(false);
    }
    let picks = if args.full { every() } else { spread() };
    print(&format!(
        "      {:<7} {:<13} {:<19} {:<13} {:<13} {:<10} {:>5} {:>8} {:>6}  {:>6} {:>6} {:>8}\n",
        if on_gpus { "device" } else { "isa" },
        "heads x dim",
        "q/k/v>out",
        "layout",
        "placement",
        "output",
        "ranks",
        "batch",
        "keys",
        "error",
        "lse",
        "rounded"
    ))?;
    let (mut passed, mut failed) = (0, 0);
    for isa in isas {
        let runtime = Runtime::new(RuntimeConfig { cpu_isa: Some(isa.name().to_string()) })?;
        let name = if on_gpus { devices[0].to_string() } else { isa.name().to_string() };
        let served = Served::by(&runtime, devices[0]);
        if served.dtypes.is_empty() || served.heads.is_empty() {
            return Err(format!("{}: none of the shapes is served", devices[0]).into());
        }
        for (number, &pick) in picks.iter().enumerate() {
            let mut check = check(&served, pick, number, args.seed);
            if !args.ranks.is_empty() {
                check.config.ranks = devices.len() as i32;
            }
            let (word, rest, why) = match selfcheck(&runtime, &devices, &check.desc, &check.config) {
                Ok(report) => {
                    let numbers = format!(
                        "{:>6.3} {:>6.3} {:>7.2}%",
                        report.max_error_ratio,
                        report.max_lse_error_ratio,
                        100.0 * report.correctly_rounded
                    );
                    if report.passed { ("ok", numbers, None) } else { ("FAIL", numbers, Some(report.message)) }
                }
                Err(error) => ("FAIL", String::new(), Some(error.to_string())),
            };
            print(&format!("{word:<5} {name:<7} {}  {rest}\n", describe(&check)))?;
            if let Some(why) = why {
                failed += 1;
                print(&format!("      {why} (seed {})\n", check.config.seed))?;
            } else {
                passed += 1;
            }
        }
    }
    print(&format!(
        "{passed} shapes passed, {failed} failed; error and lse: the largest error over its bound, at most 1{}\n",
        if on_gpus { ", or 2 where that is rare" } else { "" }
    ))?;
    Ok(failed == 0)
}

/// `cuda:N`, for `--ranks`.
fn gpu(text: &str) -> Result<Device, String> {
    device(text)
        .ok()
        .filter(|device| device.kind == DeviceKind::Cuda)
        .ok_or_else(|| format!("found {text:?}, wanted a GPU such as cuda:0"))
}

fn describe(check: &Check) -> String {
    let (d, c) = (&check.desc, &check.config);
    let dim = if d.head_dim_v == d.head_dim_qk {
        d.head_dim_qk.to_string()
    } else {
        format!("{}/{}", d.head_dim_qk, d.head_dim_v)
    };
    let layout = match d.kv_layout {
        KvLayout::Strided => "strided".to_string(),
        KvLayout::BlockTable => format!("table {}", d.page_size),
        KvLayout::CsrPages => format!("csr {}", d.page_size),
    };
    let placement = match d.placement {
        Placement::Contiguous => "contiguous".to_string(),
        Placement::Interleaved { run } => format!("interleave {run}"),
        Placement::Explicit => "explicit".to_string(),
    };
    let (q, k) = (d.q_dtype.name(), d.k_dtype.name());
    let types = format!("{q}/{k}/{}>{}", d.v_dtype.name(), d.out_dtype.name());
    let causal = if d.causal { "c" } else { "" };
    format!(
        "{:<13} {types:<19} {layout:<13} {placement:<13} {:<10} {:>5} {:>8} {:>6}",
        format!("{}/{}x{dim}", d.q_heads, d.kv_heads),
        d.output.name().to_lowercase(),
        c.ranks,
        format!("{}x{}{causal}", c.batch, c.query_tokens),
        c.kv_length,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spread_shows_every_value_of_every_axis() {
        let sizes =
            [DTYPES.len(), LAYOUTS.len(), PLACEMENTS.len(), OUTPUTS.len(), RANKS.len(), HEADS.len(), SIZES.len()];
        for (axis, size) in sizes.into_iter().enumerate() {
            for value in 0..size {
                assert!(spread().iter().any(|pick| pick[axis] % size == value), "axis {axis}, value {value}");
            }
        }
    }
}
