//! What is timed: the rows of the standard run, those of a run by axes, and the targets.

use serde::{Serialize, Serializer};
use treeattn::attention::{Dtype, KvFormat};
use treeattn::cpu::Isa;

use super::terms::Terms;

/// One decode shape, how it is spread, and what runs it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Case {
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Element type of q and out.
    #[serde(serialize_with = "dtype_name")]
    pub dtype: Dtype,
    /// Element type of k and v; none: that of q.
    #[serde(serialize_with = "optional_name")]
    pub kv_dtype: Option<Dtype>,
    pub batch: usize,
    /// Keys of each sequence, all ranks together.
    pub keys: usize,
    /// Query tokens of each sequence; causal where there are several.
    pub query_tokens: usize,
    pub ranks: usize,
    pub threads_per_rank: usize,
    #[serde(serialize_with = "isa_name")]
    pub isa: Isa,
    /// Tokens a page of a shuffled block table; 0: a strided cache.
    pub page_size: usize,
    /// Whether a sequence's keys of one kv head lie side by side, as [head][token][dim]; else [token][head][dim].
    pub head_major: bool,
    /// Whether the same cache is read again and again; else it comes from memory.
    pub cached: bool,
    /// Whether ranks compare what they were passed.
    pub checked: bool,
    /// What happens to scores.
    pub terms: Terms,
}

/// A type, for JSON.
pub fn dtype_name<S: Serializer>(dtype: &Dtype, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(dtype.name())
}

fn optional_name<S: Serializer>(dtype: &Option<Dtype>, to: S) -> Result<S::Ok, S::Error> {
    match dtype {
        Some(dtype) => to.serialize_some(dtype.name()),
        None => to.serialize_none(),
    }
}

fn isa_name<S: Serializer>(isa: &Isa, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(isa.name())
}

impl Case {
    /// Bytes of k and v that a step reads on all ranks.
    pub fn kv_bytes(&self) -> usize {
        self.batch.saturating_mul(self.keys).saturating_mul(2 * self.token_bytes())
    }

    /// Bytes of one token's keys.
    pub fn token_bytes(&self) -> usize {
        self.kv_heads * self.kv_format().row_bytes(self.head_dim)
    }

    /// How k and v lie in memory.
    pub fn kv_format(&self) -> KvFormat {
        KvFormat::of(self.kv_dtype.unwrap_or(self.dtype))
    }

    /// The element types in words.
    pub fn types(&self) -> String {
        match self.kv_dtype {
            Some(kv) => format!("{}/{}", self.dtype.name(), kv.name()),
            None => self.dtype.name().into(),
        }
    }

    /// Multiplications and additions of a step, q.k and w.v over the keys that each query token sees.
    pub fn flops(&self) -> f64 {
        let (tokens, keys) = (self.query_tokens as f64, self.keys as f64);
        let visible = tokens * keys - tokens * (tokens - 1.0) / 2.0;
        4.0 * (self.batch * self.q_heads * self.head_dim) as f64 * visible
    }

    /// The case in words but for its length and element type.
    pub fn kind(&self) -> String {
        let mut words = vec![format!("{}/{} heads x {}", self.q_heads, self.kv_heads, self.head_dim)];
        words.push(if self.batch == 1 { "1 sequence".to_string() } else { format!("{} sequences", self.batch) });
        words.extend(self.details());
        if self.isa != treeattn::cpu::isa() {
            words.push(self.isa.name().to_string());
        }
        words.join(", ")
    }

    /// The case in words, without its element type and instruction set.
    pub fn shape(&self) -> String {
        let mut words = vec![format!("{}/{}x{}", self.q_heads, self.kv_heads, self.head_dim)];
        words.push(format!("{}x{}", self.batch, self.keys));
        words.extend(self.details());
        words.join(" ")
    }

    /// What is out of the ordinary.
    fn details(&self) -> Vec<String> {
        let pages = (self.page_size > 0).then(|| format!("pages of {}", self.page_size));
        let tokens = (self.query_tokens > 1).then(|| format!("{} query tokens", self.query_tokens));
        let head_major = self.head_major.then(|| "head-major".to_string());
        let cached = self.cached.then(|| "cached".to_string());
        let checked = self.checked.then(|| "checked".to_string());
        [pages, tokens, head_major, cached, checked, self.terms.words()].into_iter().flatten().collect()
    }
}

/// Keys of a cache that stays in a core's own.
const CACHED_KEYS: usize = 2048;

/// The shape that most rows are about: one Llama-3.1-8B layer, one sequence of 32,768 keys, all cores in one rank.
fn base(cores: usize) -> Case {
    Case {
        q_heads: 32,
        kv_heads: 8,
        head_dim: 128,
        dtype: Dtype::F16,
        kv_dtype: None,
        batch: 1,
        keys: 32_768,
        query_tokens: 1,
        ranks: 1,
        threads_per_rank: cores,
        isa: treeattn::cpu::isa(),
        page_size: 0,
        head_major: false,
        cached: false,
        checked: false,
        terms: Terms::PLAIN,
    }
}

fn over(ranks: usize, cores: usize, case: Case) -> Case {
    Case { ranks, threads_per_rank: (cores / ranks).max(1), ..case }
}

/// The rows of the standard run; `quick` keeps their kinds and cuts their lengths.
pub fn standard(cores: usize, quick: bool) -> Vec<Case> {
    let shorter = if quick { 8 } else { 1 };
    let base = Case { keys: base(cores).keys / shorter, ..base(cores) };
    let cached = Case { keys: CACHED_KEYS, cached: true, ..base };
    let mut cases = Vec::new();
    for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
        cases.push(Case { dtype, ..base });
        cases.push(Case { dtype, ..cached });
    }
    // What widening costs shows where the cache need not come from memory: the rows beside are bound by the slower of the two.
    for kv_dtype in [Dtype::F8E4M3, Dtype::Q8_0, Dtype::Q4_0].map(Some) {
        cases.push(Case { kv_dtype, ..base });
        cases.push(Case { kv_dtype, ..cached });
    }
    cases.extend([
        Case { kv_heads: 16, q_heads: 16, ..base },
        Case { batch: 8, keys: base.keys / 8, ..base },
        Case { page_size: 16, ..base },
        Case { keys: base.keys / 32, ..base },
        Case { keys: base.keys / 8, ..base },
        Case { keys: base.keys * 4, ..base },
        Case { threads_per_rank: 1, ..base },
        over(2, cores, base),
        over(4, cores, base),
    ]);
    if base.isa != Isa::Avx2 && Isa::Avx2.is_available() {
        cases.extend([Case { isa: Isa::Avx2, ..base }, Case { isa: Isa::Avx2, ..cached }]);
    }
    let mut seen: Vec<Case> = Vec::new();
    for case in cases {
        if !seen.contains(&case) {
            seen.push(case);
        }
    }
    seen
}

/// The axes of a run of one's own; an empty one keeps the base's value.
#[derive(Clone, Debug, Default)]
pub struct Axes {
    pub heads: Vec<Heads>,
    pub dtypes: Vec<Dtype>,
    pub kv_dtypes: Vec<Dtype>,
    pub lengths: Vec<usize>,
    pub batches: Vec<usize>,
    pub ranks: Vec<usize>,
    pub isas: Vec<Isa>,
    pub pages: Vec<usize>,
    pub query_tokens: Vec<usize>,
    /// Whether every case is timed head-major, too.
    pub head_major: bool,
    /// Whether every case over more than one rank, which are 2 where `ranks` is empty, is timed checked, too.
    pub checked: bool,
    pub terms: Vec<Terms>,
    pub threads: Option<usize>,
}

impl Axes {
    pub fn is_empty(&self) -> bool {
        self.heads.is_empty()
            && self.dtypes.is_empty()
            && self.kv_dtypes.is_empty()
            && self.lengths.is_empty()
            && self.batches.is_empty()
            && self.ranks.is_empty()
            && self.isas.is_empty()
            && self.pages.is_empty()
            && self.query_tokens.is_empty()
            && !self.head_major
            && !self.checked
            && self.terms.is_empty()
            && self.threads.is_none()
    }

    /// Every combination.
    pub fn cases(&self, cores: usize) -> Vec<Case> {
        let vary = |cases: Vec<Case>, count: usize, set: &dyn Fn(&mut Case, usize)| -> Vec<Case> {
            let all = cases.iter().flat_map(|case| {
                (0..count.max(1)).map(move |n| {
                    let mut case = *case;
                    if count > 0 {
                        set(&mut case, n);
                    }
                    case
                })
            });
            all.collect()
        };
        let mut cases = vec![base(cores)];
        cases = vary(cases, self.heads.len(), &|case, n| {
            let Heads { q_heads, kv_heads, head_dim, .. } = self.heads[n];
            (case.q_heads, case.kv_heads, case.head_dim) = (q_heads, kv_heads, head_dim);
        });
        cases = vary(cases, self.dtypes.len(), &|case, n| case.dtype = self.dtypes[n]);
        cases = vary(cases, 2 * self.kv_dtypes.len(), &|case, n| {
            let cached = n % 2 == 1;
            (case.kv_dtype, case.cached) = (Some(self.kv_dtypes[n / 2]), cached);
            if cached {
                case.keys = CACHED_KEYS;
            }
        });
        cases = vary(cases, self.isas.len(), &|case, n| case.isa = self.isas[n]);
        cases = vary(cases, self.batches.len(), &|case, n| case.batch = self.batches[n]);
        cases = vary(cases, self.lengths.len(), &|case, n| {
            if !case.cached {
                case.keys = self.lengths[n];
            }
        });
        cases = vary(cases, self.pages.len(), &|case, n| case.page_size = self.pages[n]);
        cases = vary(cases, self.query_tokens.len(), &|case, n| case.query_tokens = self.query_tokens[n]);
        cases = vary(cases, 2 * usize::from(self.head_major), &|case, n| case.head_major = n == 1);
        cases.retain(|case| case.page_size == 0 || !case.head_major);
        let ranks = if self.checked && self.ranks.is_empty() { &[2][..] } else { &self.ranks };
        cases = vary(cases, ranks.len(), &|case, n| *case = over(ranks[n], cores, *case));
        cases = vary(cases, self.terms.len(), &|case, n| case.terms = self.terms[n]);
        // Last, so that a noise that comes and goes meets a case and its checked twin alike.
        cases = vary(cases, 2 * usize::from(self.checked), &|case, n| case.checked = n == 1);
        cases.retain(|case| case.ranks > 1 || !case.checked);
        for case in &mut cases {
            case.threads_per_rank = self.threads.unwrap_or(case.threads_per_rank);
        }
        cases
    }
}

/// Most heads, and the largest dimension, that are looked at; the library has limits of its own.
const MAX_HEADS: usize = 65_536;

/// Heads and their dimension, as in "32/8x128"; or query heads of latent attention, as in "mla:16".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub is_latent: bool,
}

/// Dimensions of latent attention: of q and k, and of v, which is the beginning of each row of k.
pub const LATENT_DIMS: (usize, usize) = (576, 512);

impl std::str::FromStr for Heads {
    type Err = String;

    fn from_str(text: &str) -> Result<Heads, String> {
        let parse = || {
            let count = |text: &str| text.parse().ok().filter(|n| (1..=MAX_HEADS).contains(n));
            if let Some(heads) = text.strip_prefix("mla:") {
                return Some(Heads { q_heads: count(heads)?, kv_heads: 1, head_dim: LATENT_DIMS.0, is_latent: true });
            }
            let (heads, dim) = text.split_once('x')?;
            let (q, kv) = heads.split_once('/')?;
            Some(Heads { q_heads: count(q)?, kv_heads: count(kv)?, head_dim: count(dim)?, is_latent: false })
        };
        parse().ok_or_else(|| format!("{text}: wanted QUERY_HEADS/KV_HEADSxDIM or mla:QUERY_HEADS, such as 32/8x128"))
    }
}

/// Refuses latent attention where it is not timed.
pub fn refuse_latent(heads: &[Heads]) -> Result<(), String> {
    match heads.iter().find(|heads| heads.is_latent) {
        Some(heads) => Err(format!("--heads: found mla:{}, wanted others, but for steps on GPUs", heads.q_heads)),
        None => Ok(()),
    }
}

/// A number that the library aims for, and the rows that show it.
pub enum Target {
    /// A row's time over bytes / read bandwidth.
    Ceiling { case: Case, most: f64 },
    /// A row's share of the FMA limit.
    Fma { case: Case, least: f64 },
    /// A row's time per byte over another's.
    PerByte { name: &'static str, case: Case, than: Case, most: f64 },
    /// An exchange's time in microseconds.
    Exchange { ranks: usize, most: f64 },
}

/// The targets of the standard run on a machine like the one they were set for (AVX-512, 2 cores).
pub fn targets(cores: usize) -> Vec<Target> {
    let base = base(cores);
    let cached = Case { keys: CACHED_KEYS, cached: true, ..base };
    let mut targets = vec![
        Target::Ceiling { case: base, most: 1.15 },
        Target::Ceiling { case: Case { dtype: Dtype::Bf16, ..base }, most: 1.15 },
        Target::Ceiling { case: Case { kv_heads: 16, q_heads: 16, ..base }, most: 1.10 },
        Target::Fma { case: cached, least: 0.5 },
        Target::Fma { case: Case { dtype: Dtype::Bf16, ..cached }, least: 0.5 },
        Target::PerByte {
            name: "batch 8 x 4,096 keys over 1 x 32,768, per byte",
            case: Case { batch: 8, keys: base.keys / 8, ..base },
            than: base,
            // No slower, but for the noise of two measurements.
            most: 1.02,
        },
        Target::PerByte {
            name: "4 ranks of 1 thread over 1 rank of all cores",
            case: over(4, cores, base),
            than: base,
            most: 1.15,
        },
        Target::Exchange { ranks: 2, most: 10.0 },
        Target::Exchange { ranks: 4, most: 40.0 },
    ];
    if base.isa == Isa::Avx512 {
        let case = Case { isa: Isa::Avx2, ..base };
        targets.push(Target::PerByte { name: "AVX2 over AVX-512", case, than: base, most: 1.5 });
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_its_rows() {
        for cores in [1, 2, 8] {
            let rows = standard(cores, false);
            for target in targets(cores) {
                match target {
                    Target::Ceiling { case, .. } | Target::Fma { case, .. } => assert!(rows.contains(&case)),
                    Target::PerByte { case, than, .. } => assert!(rows.contains(&case) && rows.contains(&than)),
                    Target::Exchange { .. } => {}
                }
            }
        }
    }

    #[test]
    fn axes_multiply() {
        let axes = Axes {
            heads: vec!["16/16x64".parse().unwrap()],
            lengths: vec![10, 20],
            ranks: vec![1, 4],
            ..Axes::default()
        };
        let cases = axes.cases(2);
        assert_eq!(cases.len(), 4);
        assert_eq!((cases[3].keys, cases[3].ranks, cases[3].threads_per_rank, cases[3].head_dim), (20, 4, 1, 64));
        assert!("32x128".parse::<Heads>().is_err());
        let latent: Heads = "mla:16".parse().unwrap();
        assert_eq!((latent.q_heads, latent.kv_heads, latent.head_dim), (16, 1, 576));
        assert!("mla:".parse::<Heads>().is_err() && refuse_latent(&[latent]).is_err());
    }

    #[test]
    fn what_is_checked_stands_behind_what_is_not() {
        let cases = |ranks: &[usize]| {
            let axes = Axes { ranks: ranks.to_vec(), lengths: vec![10], checked: true, ..Axes::default() };
            axes.cases(2).iter().map(|case| (case.ranks, case.checked)).collect::<Vec<_>>()
        };
        assert_eq!(cases(&[]), [(2, false), (2, true)]);
        assert_eq!(cases(&[1, 3]), [(1, false), (3, false), (3, true)]);
    }
}
