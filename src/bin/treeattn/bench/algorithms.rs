//! All exchange algorithms over the same keys and ranks, in one run: times, and what each moves and holds beside the
//! formulas of arXiv 2408.04093 (section 6).

use serde::{Serialize, Serializer};
use treeattn::attention::Algorithm;

use super::case::{Axes, Case};
use super::decode::Decode;
use super::pool::Pool;
use super::samples::{Samples, Summary};
use crate::machine::Machine;
use crate::outcome::Outcome;
use crate::plot::{Panel, Plot, Scale, Style};
use crate::table::Table;

/// Every algorithm, the one that others are compared with first.
pub const ALL: [Algorithm; 5] =
    [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Tree, Algorithm::Allreduce3, Algorithm::Ring];
/// Bytes of an element of a partial, which travels as f32.
const F32: u64 = 4;
/// Keys and values of a rank for the ratio that is told by itself, bytes.
const TOLD_BYTES: usize = 32 << 20;
/// And its ranks.
const TOLD_RANKS: usize = 4;

/// One algorithm over one case.
#[derive(Serialize)]
pub struct Comparison {
    #[serde(serialize_with = "name")]
    pub algorithm: Algorithm,
    #[serde(flatten)]
    pub case: Case,
    pub seconds: Summary,
    /// Its time over that of `ONE_SHOT`, where that ran, too: the median over blocks side by side.
    pub over_one_shot: Option<f64>,
    /// What a step takes, as the plans counted it; of bytes and messages the largest of all ranks.
    pub steps: u64,
    pub messages: u64,
    pub bytes_sent: u64,
    pub memory: u64,
    pub formulas: Formulas,
}

/// What the paper says that a rank sends and holds, in bytes; none where it has no such algorithm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Formulas {
    pub bytes_sent: Option<u64>,
    /// Beside the cache, which the paper counts as 2btd of its tree's 2btd + 2bd + 2b n_h.
    pub memory: Option<u64>,
}

fn name<S: Serializer>(algorithm: &Algorithm, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(algorithm.name())
}

impl Comparison {
    /// Keys and values that its median step read in a second, bytes.
    pub fn bytes_per_second(&self) -> f64 {
        self.case.kv_bytes() as f64 / self.seconds.median
    }
}

impl Formulas {
    pub fn of(algorithm: Algorithm, case: &Case) -> Formulas {
        let (batch, ranks) = (case.batch as u64, case.ranks as u64);
        // Several query tokens of a sequence make as many rows as sequences would.
        let rows = batch * case.query_tokens as u64;
        let (heads, d) = (case.q_heads as u64, (case.q_heads * case.head_dim) as u64);
        // b t d of keys and as much of values; with grouped heads d shrinks by the group.
        let cache = 2 * batch * (case.keys as u64).div_ceil(ranks) * case.token_bytes() as u64;
        match algorithm {
            Algorithm::Tree | Algorithm::Allreduce3 => Formulas {
                bytes_sent: Some(2 * (ranks - 1) * (rows * d + 2 * rows * heads) * F32 / ranks),
                memory: Some((2 * rows * d + 2 * rows * heads) * F32),
            },
            Algorithm::Ring => {
                Formulas { bytes_sent: Some(cache * ranks), memory: Some(2 * cache + 2 * rows * d * F32) }
            }
            Algorithm::Auto | Algorithm::OneShot | Algorithm::TwoShot => Formulas::default(),
        }
    }
}

/// The cases to compare: every combination of the axes over more than one rank, of which `quick` takes short ones.
pub fn cases(axes: &Axes, cores: usize, quick: bool) -> Vec<Case> {
    let mut axes = axes.clone();
    if axes.ranks.is_empty() {
        axes.ranks = if quick { vec![2, 4] } else { vec![2, 4, 8] };
    }
    if axes.lengths.is_empty() {
        axes.lengths = if quick { vec![512, 2048] } else { vec![2048, 8192, 32_768] };
    }
    let mut cases = axes.cases(cores);
    cases.retain(|case| case.ranks > 1);
    cases
}

/// Times `algorithms` over `cases`, whose element type the pool holds; they take turns in blocks of `seconds`.
pub fn compare(
    algorithms: &[Algorithm],
    cases: &[Case],
    pool: &Pool,
    (rounds, seconds): (usize, f64),
    progress: &dyn Fn(String),
) -> Outcome<Vec<Comparison>> {
    let mut found: Vec<Comparison> = Vec::new();
    for case in cases {
        let mut decodes =
            algorithms.iter().map(|&algorithm| Decode::new(*case, algorithm, pool)).collect::<Outcome<Vec<_>>>()?;
        let one_shot = algorithms.iter().position(|&algorithm| algorithm == Algorithm::OneShot);
        let mut over = vec![Samples::default(); algorithms.len()];
        for _ in 0..rounds {
            let mut blocks = Vec::with_capacity(algorithms.len());
            for (decode, algorithm) in decodes.iter_mut().zip(algorithms) {
                progress(format!("{}, {} ranks, {}", algorithm.name(), case.ranks, case.shape()));
                blocks.push(decode.block(seconds)?);
            }
            // Compared with the block beside it, so that a noise that comes and goes meets both.
            for (over, block) in over.iter_mut().zip(&blocks) {
                over.push(one_shot.map_or(f64::NAN, |index| block / blocks[index]));
            }
        }
        for ((decode, &algorithm), over) in decodes.iter().zip(algorithms).zip(&over) {
            let stats = decode.stats()?;
            let most = |of: &dyn Fn(&treeattn::runtime::PlanStats) -> u64| stats.iter().map(of).max().unwrap_or(0);
            found.push(Comparison {
                algorithm,
                case: *case,
                seconds: decode.times.summary(),
                over_one_shot: one_shot.map(|_| over.median()),
                steps: most(&|s| s.rounds / s.steps.max(1)),
                messages: most(&|s| s.messages / s.steps.max(1)),
                bytes_sent: most(&|s| s.bytes_sent / s.steps.max(1)),
                memory: most(&|s| s.exchange_memory),
                formulas: Formulas::of(algorithm, case),
            });
        }
    }
    Ok(found)
}

/// The table, and the ratio that is told by itself.
pub fn text(found: &[Comparison]) -> String {
    let mut table = Table::new(&[
        "algorithm",
        "shape",
        "dtype",
        "ranks",
        "KV MB a rank",
        "median ms",
        "min",
        "x ONE_SHOT",
        "steps",
        "messages",
        "sent KB",
        "paper",
        "held KB",
        "paper",
    ]);
    for c in found {
        let ms = |seconds: f64| format!("{:.3}", seconds * 1e3);
        let kb = |bytes: u64| format!("{:.1}", bytes as f64 / 1e3);
        let formula = |bytes: Option<u64>| bytes.map_or("-".to_string(), kb);
        table.row(vec![
            c.algorithm.name().to_string(),
            c.case.shape(),
            c.case.types(),
            c.case.ranks.to_string(),
            format!("{:.1}", (c.case.kv_bytes() / c.case.ranks) as f64 / 1e6),
            ms(c.seconds.median),
            ms(c.seconds.minimum),
            c.over_one_shot.map_or("-".to_string(), |ratio| format!("{ratio:.2}")),
            c.steps.to_string(),
            c.messages.to_string(),
            kb(c.bytes_sent),
            formula(c.formulas.bytes_sent),
            kb(c.memory),
            formula(c.formulas.memory),
        ]);
    }
    let mut text = table.render();
    if let Some(ratio) = ring_over_one_shot(found) {
        text.push_str(&format!(
            "RING over ONE_SHOT at {} MiB of keys and values a rank and {TOLD_RANKS} ranks: {ratio:.2} x\n",
            TOLD_BYTES >> 20
        ));
    }
    text.push_str(
        "sent and held: by a rank in a step, headers not; held: partials and blocks beside the cache. paper: \
         2 (p-1)/p (bd + 2b n_h) and 2bd + 2b n_h for the tree, which reduces three times; 2btd p and 4btd + 2bd for the \
         ring, whose last hop (back home) is not made here, and which keeps partials until they can merge in one order \
         on all ranks\n",
    );
    text
}

/// RING's time over ONE_SHOT's where the cache is as large as that is asked for.
pub fn ring_over_one_shot(found: &[Comparison]) -> Option<f64> {
    let told = |c: &&Comparison| {
        c.algorithm == Algorithm::Ring && c.case.ranks == TOLD_RANKS && c.case.kv_bytes() == TOLD_RANKS * TOLD_BYTES
    };
    found.iter().find(told)?.over_one_shot
}

/// Times over lengths: a panel for each shape, colours for algorithms, dashes for ranks, and the time that reading the
/// cache alone takes at `bandwidth` bytes a second.
pub fn plot(found: &[Comparison], bandwidth: f64, machine: &Machine, command: &[String]) -> Plot {
    let limit = format!("bytes / {:.1} GB/s of read bandwidth", bandwidth / 1e9);
    let mut panels: Vec<Panel> = Vec::new();
    for c in found {
        let title = format!("{}, {}", c.case.kind(), c.case.types());
        let index = panels.iter().position(|panel| panel.title == title).unwrap_or_else(|| {
            panels.push(Panel { title, lines: Vec::new() });
            panels.len() - 1
        });
        let (keys, dash) = (c.case.keys as f64, format!("{} ranks", c.case.ranks));
        let measured = Style::Measured { colour: c.algorithm.name().to_string(), dash };
        panels[index].add(measured, (keys, c.seconds.median * 1e3));
        panels[index].add(Style::Limit(limit.clone()), (keys, c.case.kv_bytes() as f64 / bandwidth * 1e3));
    }
    let mut title = "A decode step by exchange algorithm".to_string();
    if let [only] = &mut panels[..] {
        title.push_str(&format!(": {}", std::mem::take(&mut only.title)));
    }
    Plot {
        title,
        about: vec![
            format!("{}, {} cores", machine.processor, machine.cores),
            "medians; every step reads its cache from memory".into(),
        ],
        command: command.to_vec(),
        x: ("keys of a sequence, all ranks together".into(), Scale::Doublings),
        y: ("ms a step".into(), Scale::Decades),
        colours: "algorithm",
        dashes: "ranks",
        panels,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formulas_are_the_papers() {
        // Its example: d = 4096, 32 heads, 8 devices, 262,144 keys, one key head a query head.
        let axes = Axes {
            heads: vec!["32/32x128".parse().unwrap()],
            lengths: vec![262_144],
            ranks: vec![1, 8],
            ..Axes::default()
        };
        let cases = cases(&axes, 8, false);
        assert_eq!((cases.len(), cases[0].ranks), (1, 8));
        let case = Case { dtype: treeattn::attention::Dtype::F32, ..cases[0] };
        let (tree, ring) = (Formulas::of(Algorithm::Tree, &case), Formulas::of(Algorithm::Ring, &case));
        assert_eq!(tree.bytes_sent, Some(7280 * F32));
        assert_eq!(ring.bytes_sent, Some(2 * 32_768 * 4096 * 8 * F32));
        assert_eq!(ring.memory.unwrap() - tree.memory.unwrap(), (4 * 32_768 * 4096 - 2 * 32) * F32);
        assert_eq!(Formulas::of(Algorithm::OneShot, &case), Formulas::default());
    }
}
