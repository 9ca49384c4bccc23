//! What is timed on a GPU: the rows of the standard run, those of a run by axes, and the targets.

use serde::Serialize;
use treeattn::attention::{Dtype, KvFormat};

use crate::bench::case::{Heads, LATENT_DIMS, dtype_name};
use crate::bench::terms::Terms;

/// One decode shape.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Case {
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Whether values are the beginning of each row of k, as in latent attention.
    pub is_latent: bool,
    /// Element type of q and out, and of k and v unless they have their own.
    #[serde(serialize_with = "dtype_name")]
    pub dtype: Dtype,
    /// That of k and v.
    #[serde(serialize_with = "dtype_name")]
    pub kv_dtype: Dtype,
    /// What happens to scores.
    pub terms: Terms,
    pub batch: usize,
    /// Keys of each sequence.
    pub keys: usize,
    /// Query tokens of each sequence; causal where there are several.
    pub query_tokens: usize,
    /// Tokens a page of a shuffled block table; 0: a strided cache.
    pub page_size: usize,
}

impl Case {
    /// Bytes of k and v that a step reads.
    pub fn kv_bytes(&self) -> usize {
        let seen = self.terms.window().map_or(self.keys, |window| self.keys.min(window));
        self.batch.saturating_mul(seen).saturating_mul(self.tensors() * self.token_bytes())
    }

    /// The dimension of v and out.
    pub fn head_dim_v(&self) -> usize {
        if self.is_latent { LATENT_DIMS.1 } else { self.head_dim }
    }

    /// Tensors that the cache is made of, alike in bytes.
    pub fn tensors(&self) -> usize {
        if self.is_latent { 1 } else { 2 }
    }

    /// Bytes of one token's keys.
    pub fn token_bytes(&self) -> usize {
        self.kv_heads * KvFormat::of(self.kv_dtype).row_bytes(self.head_dim)
    }

    /// Pages of one sequence; 0 for a strided cache.
    pub fn pages(&self) -> usize {
        if self.page_size == 0 { 0 } else { self.keys.div_ceil(self.page_size) }
    }

    /// Bytes that one copy of the cache takes, half of it keys where values are not a part of them.
    pub fn room(&self) -> usize {
        match self.page_size {
            0 => self.batch.saturating_mul(self.keys).saturating_mul(self.tensors() * self.token_bytes()),
            size => self.batch.saturating_mul(self.pages() * size).saturating_mul(self.tensors() * self.token_bytes()),
        }
    }

    /// Heads and how the cache lies, in words.
    pub fn kind(&self) -> String {
        let mut text = match self.is_latent {
            true => format!("mla:{}", self.q_heads),
            false => format!("{}/{}x{}", self.q_heads, self.kv_heads, self.head_dim),
        };
        if self.dtype != Dtype::Bf16 {
            text.push_str(&format!(" {}", self.dtype.name()));
        }
        if self.kv_dtype != self.dtype {
            text.push_str(&format!(", k and v {}", self.kv_dtype.name()));
        }
        if let Some(words) = self.terms.words() {
            text.push_str(&format!(", {words}"));
        }
        if self.page_size > 0 {
            text.push_str(&format!(", pages of {}", self.page_size));
        }
        if self.query_tokens > 1 {
            text.push_str(&format!(", {} query tokens", self.query_tokens));
        }
        text
    }

    /// The case in words.
    pub fn shape(&self) -> String {
        format!("{} {}x{}", self.kind(), self.batch, self.keys)
    }
}

/// The shape that most rows are about: one Llama-3.1-8B layer, one sequence.
const BASE: Case = Case {
    q_heads: 32,
    kv_heads: 8,
    head_dim: 128,
    is_latent: false,
    dtype: Dtype::Bf16,
    kv_dtype: Dtype::Bf16,
    terms: Terms::PLAIN,
    batch: 1,
    keys: 32_768,
    query_tokens: 1,
    page_size: 0,
};

fn heads(q_heads: usize, kv_heads: usize, keys: usize) -> Case {
    Case { q_heads, kv_heads, keys, ..BASE }
}

fn keys(keys: usize) -> Case {
    Case { keys, ..BASE }
}

/// The lengths at which kinds of shapes are compared: 67, 134 and 537 MB.
const COMPARED: [usize; 3] = [16_384, 32_768, 131_072];

/// The rows of the standard run; `quick` keeps the short ones.
pub fn standard(quick: bool) -> Vec<Case> {
    let mut cases: Vec<Case> = [1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072, 524_288].map(keys).into();
    for compared in COMPARED {
        cases.push(Case { page_size: 16, ..keys(compared) });
        cases.push(Case { page_size: 1, ..keys(compared) });
        cases.push(heads(64, 8, compared));
        cases.push(heads(40, 8, compared));
        cases.push(heads(8, 1, 8 * compared));
        cases.push(Case { query_tokens: 4, ..keys(compared) });
    }
    cases.extend([Case { page_size: 16, ..keys(4096) }, Case { page_size: 1, ..keys(4096) }]);
    cases.push(heads(8, 1, 8192));
    cases.extend([2048, 20_480, 40_960, 327_680].map(|keys| heads(16, 16, keys)));
    let batches = [(4, 4096), (16, 2048), (64, 1024), (128, 4096), (32, 16_384), (8, 65_536)];
    cases.extend(batches.map(|(batch, keys)| Case { batch, keys, ..BASE }));
    cases.push(Case { dtype: Dtype::F16, kv_dtype: Dtype::F16, ..BASE });
    if quick {
        cases.retain(|case| case.kv_bytes() <= 70 << 20);
    }
    cases
}

/// The rows of the standard run over several GPUs; `quick` keeps the short ones.
pub fn sharded(quick: bool) -> Vec<Case> {
    let mut cases: Vec<Case> = sharded_targets().into_iter().map(|target| target.0).collect();
    if quick {
        cases.retain(|case| case.kv_bytes() <= 140 << 20);
    }
    cases
}

/// Shapes, keys of all ranks together; the microseconds that the library aims for on two H200; and what was measured
/// there with public parts: a fast kernel, an allgather and a merge.
pub fn sharded_targets() -> Vec<(Case, f64, &'static str)> {
    vec![
        (keys(8 << 10), 12.0, "46.7"),
        (keys(16 << 10), 15.0, "53.1"),
        (keys(32 << 10), 23.0, "62.4"),
        (keys(64 << 10), 38.0, "75.2"),
        (keys(256 << 10), 126.0, "159"),
        (keys(1 << 20), 482.0, "510"),
        (Case { batch: 32, ..keys(32 << 10) }, 481.0, ""),
    ]
}

/// The axes of a run of one's own; an empty one keeps the base's value.
#[derive(Clone, Debug, Default)]
pub struct Axes {
    pub heads: Vec<Heads>,
    pub dtypes: Vec<Dtype>,
    pub batches: Vec<usize>,
    pub lengths: Vec<usize>,
    pub pages: Vec<usize>,
    pub query_tokens: Vec<usize>,
    pub kv_dtypes: Vec<Dtype>,
    pub terms: Vec<Terms>,
}

impl Axes {
    /// Every combination; none where there is no axis.
    pub fn cases(&self) -> Vec<Case> {
        let mut cases = vec![BASE];
        let mut vary = |count: usize, set: &dyn Fn(&mut Case, usize)| {
            if count > 0 {
                let all = cases.iter().flat_map(|case| {
                    (0..count).map(|n| {
                        let mut case = *case;
                        set(&mut case, n);
                        case
                    })
                });
                cases = all.collect();
            }
            count
        };
        let axes = vary(self.heads.len(), &|case, n| {
            let Heads { q_heads, kv_heads, head_dim, is_latent } = self.heads[n];
            (case.q_heads, case.kv_heads) = (q_heads, kv_heads);
            (case.head_dim, case.is_latent) = (head_dim, is_latent);
        }) + vary(self.dtypes.len(), &|case, n| {
            (case.dtype, case.kv_dtype) = (self.dtypes[n], self.dtypes[n])
        }) + vary(self.kv_dtypes.len(), &|case, n| case.kv_dtype = self.kv_dtypes[n])
            + vary(self.terms.len(), &|case, n| case.terms = self.terms[n])
            + vary(self.query_tokens.len(), &|case, n| case.query_tokens = self.query_tokens[n])
            + vary(self.pages.len(), &|case, n| case.page_size = self.pages[n])
            + vary(self.batches.len(), &|case, n| case.batch = self.batches[n])
            + vary(self.lengths.len(), &|case, n| case.keys = self.lengths[n]);
        if axes == 0 { Vec::new() } else { cases }
    }
}

/// A number that the library aims for on one H200, and the rows that show it.
pub enum Target {
    /// A replayed step's microseconds, and what public kernels took there.
    Micros { case: Case, most: f64, public: &'static str },
    /// A replayed step's time over another's of as many bytes, less `spare` microseconds.
    Over { case: Case, than: Case, most: f64, spare: f64 },
    /// Microseconds of the host's time for an eager call.
    Host { case: Case, most: f64 },
}

/// The targets of the standard run.
pub fn targets() -> Vec<Target> {
    let micros = |case, most, public| Target::Micros { case, most, public };
    let mut targets = vec![
        micros(keys(1024), 6.0, "FA3 9.6"),
        micros(keys(4096), 8.7, "FA3 12.8, FlashInfer 14.7"),
        micros(keys(8192), 12.0, "FA3 15.5, FlashInfer 18.9"),
        micros(keys(16_384), 20.0, "FA3 24.0, FlashInfer 27.1"),
        micros(keys(32_768), 35.0, "FA3 39.0, FlashInfer 41.9"),
        micros(keys(131_072), 123.0, "FA3 129.6, FlashInfer 129.8"),
        micros(keys(524_288), 479.0, "FA3 517.6, FlashInfer 480.6"),
        micros(heads(16, 16, 20_480), 42.0, ""),
        micros(heads(16, 16, 40_960), 79.0, "83.5"),
        micros(heads(16, 16, 327_680), 597.0, "593"),
        micros(Case { batch: 32, ..keys(16_384) }, 477.0, "474"),
        micros(Case { batch: 8, ..keys(65_536) }, 478.0, "479"),
        micros(heads(8, 1, 8192), 7.0, ""),
    ];
    let over = |case, than, most, spare| Target::Over { case, than, most, spare };
    for (page_size, most) in [(16, 1.03), (1, 1.15)] {
        let paged = |keys| Case { page_size, ..keys };
        targets.extend([4096, 16_384].map(|n| over(paged(keys(n)), keys(n), 1.0, 1.0)));
        targets.extend([32_768, 131_072].map(|n| over(paged(keys(n)), keys(n), most, 0.0)));
    }
    for n in COMPARED {
        targets.push(over(heads(64, 8, n), keys(n), 1.05, 0.0));
        targets.push(over(heads(40, 8, n), keys(n), 1.05, 0.0));
        targets.push(over(heads(8, 1, 8 * n), keys(n), 1.05, 0.0));
        targets.push(over(Case { query_tokens: 4, ..keys(n) }, keys(n), 1.10, 0.0));
    }
    targets.push(Target::Host { case: keys(1024), most: 4.0 });
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_its_rows() {
        let rows = standard(false);
        for target in targets() {
            match target {
                Target::Micros { case, .. } | Target::Host { case, .. } => assert!(rows.contains(&case), "{case:?}"),
                Target::Over { case, than, .. } => {
                    assert!(rows.contains(&case) && rows.contains(&than), "{case:?}");
                    assert_eq!(case.kv_bytes(), than.kv_bytes());
                }
            }
        }
        for (n, row) in rows.iter().enumerate() {
            assert!(!rows[..n].contains(row), "{row:?} twice");
        }
    }

    #[test]
    fn axes_multiply() {
        let axes = Axes { lengths: vec![10, 20], pages: vec![0, 16], ..Axes::default() };
        let cases = axes.cases();
        assert_eq!(cases.len(), 4);
        assert_eq!((cases[3].keys, cases[3].page_size, cases[3].room()), (20, 16, 2 * 32 * 8 * 128 * 2));
        assert!(Axes::default().cases().is_empty());
    }
}
