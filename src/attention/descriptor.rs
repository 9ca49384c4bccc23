//! The descriptor: everything about an attention shape that stays the same from step to step.

use super::dtype::Dtype;
use super::format::KvFormat;
use super::placement::{Placement, Shard, head_range};
use crate::error::{Error, Result};

/// The largest head dimension served.
pub const MAX_HEAD_DIM: i32 = 1024;

macro_rules! codes {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $code:literal => $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
        #[repr(i32)]
        pub enum $name { $($(#[$vdoc])* $variant = $code),* }

        impl $name {
            /// Every value, in the order of the codes.
            pub const ALL: [$name; [$($code),*].len()] = [$($name::$variant),*];

            /// The value with this code of the C ABI.
            pub fn from_code(field: &str, code: i32) -> Result<$name> {
                match code {
                    $($code => Ok($name::$variant),)*
                    _ => Err(Error::invalid(field, code, concat!("one of the codes" $(, " ", $text)*))),
                }
            }

            /// The name used in messages and reports.
            pub fn name(self) -> &'static str {
                match self { $($name::$variant => $text),* }
            }
        }
    };
}

codes! {
    /// How keys and values are laid out in memory.
    KvLayout {
        /// Tensors [sequence, token, kv head, dim] with byte strides.
        #[default] Strided = 0 => "STRIDED",
        /// Pages [page, slot, kv head, dim] named by a table int32 [batch, max_pages].
        BlockTable = 1 => "BLOCK_TABLE",
        /// Pages [page, slot, kv head, dim] named by compressed rows (indptr, indices, last_page_len).
        CsrPages = 2 => "CSR_PAGES",
    }
}
codes! {
    /// Who gets the merged output.
    OutputMode {
        /// Every rank, all heads.
        #[default] Replicated = 0 => "REPLICATED",
        /// Each rank, its own heads ([`head_range`]).
        Scattered = 1 => "SCATTERED",
        /// No exchange: each rank gets the output over its own shard.
        Local = 2 => "LOCAL",
        /// Each rank, its own part of every row, all heads: the parts of all ranks add up to the output. The lse is the merged one.
        Weighted = 3 => "WEIGHTED",
    }
}
codes! {
    /// What each rank passes as q.
    QueryInput {
        /// All heads on every rank.
        #[default] Replicated = 0 => "REPLICATED",
        /// Each rank its own heads.
        Scattered = 1 => "SCATTERED",
    }
}
codes! {
    /// How partials are exchanged and merged.
    Algorithm {
        /// The library chooses; `stats` says which and why.
        #[default] Auto = 0 => "AUTO",
        /// Every rank sends its partial to every rank, each merges all, in one step.
        OneShot = 1 => "ONE_SHOT",
        /// Each rank merges its own heads of all partials, then sends the merged heads to all.
        TwoShot = 2 => "TWO_SHOT",
        /// A tree over nodes: within each first, then between them by recursive doubling, then back.
        Tree = 3 => "TREE",
        /// As in the paper: an allreduce of maxima and two of sums.
        Allreduce3 = 4 => "ALLREDUCE3",
        /// Keys and values are passed from rank to rank: a baseline.
        Ring = 5 => "RING",
    }
}
codes! {
    /// Which bits are promised to be the same.
    Reproducibility {
        /// Same plan, same inputs: same bits, every run, on every rank.
        #[default] Repeatable = 0 => "REPEATABLE",
        /// A row's bits do not depend on its neighbours.
        BatchInvariant = 1 => "BATCH_INVARIANT",
        /// The same bits for any number of ranks.
        Canonical = 2 => "CANONICAL",
    }
}
codes! {
    /// What an additional mask holds.
    MaskKind {
        /// No mask.
        #[default] None = 0 => "NONE",
        /// Added to the scores; -inf hides.
        Additive = 1 => "ADDITIVE",
        /// Non-zero is visible.
        Boolean = 2 => "BOOLEAN",
    }
}

/// An attention shape, the same on every rank of a communicator.
///
/// `kv_heads` = 0 describes a merge-only plan: the engine makes the partials, and only `q_heads`, `head_dim_v`,
/// `max_query_tokens`, `out_dtype`, `wire_dtype`, `output` and `algorithm` count.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionDesc {
    /// Query heads.
    pub q_heads: i32,
    /// Key and value heads; divides `q_heads`. 0: a merge-only plan.
    pub kv_heads: i32,
    /// Dimension of q and k, 1 to 1024.
    pub head_dim_qk: i32,
    /// Dimension of v and of the output, 1 to 1024.
    pub head_dim_v: i32,
    /// Element type of q.
    pub q_dtype: Dtype,
    /// Element type of k.
    pub k_dtype: Dtype,
    /// Element type of v.
    pub v_dtype: Dtype,
    /// Element type of the output.
    pub out_dtype: Dtype,
    /// Layout of k and v.
    pub kv_layout: KvLayout,
    /// Tokens a page; 0 for the strided layout.
    pub page_size: i32,
    /// Which rank holds which token.
    pub placement: Placement,
    /// Most sequences in a step.
    pub max_batch: i32,
    /// Most query tokens in a step, all sequences together.
    pub max_query_tokens: i32,
    /// Most tokens of one sequence on one rank.
    pub max_kv_length: i32,
    /// Multiplies q.k; 0 means 1/sqrt(head_dim_qk).
    pub scale: f32,
    /// Whether a key is hidden from queries at earlier global positions.
    pub causal: bool,
    /// Keys that a query sees up to its own global position, its own among them; 0: all.
    pub window: i32,
    /// Scores become softcap * tanh(score / softcap); 0: off.
    pub softcap: f32,
    /// Whether per-head slopes times the global distance are subtracted from scores.
    pub alibi: bool,
    /// Whether per-head sinks join the denominator, once.
    pub sinks: bool,
    /// An additional mask.
    pub mask: MaskKind,
    /// Element type of an additive mask.
    pub mask_dtype: Option<Dtype>,
    /// What each rank passes as q.
    pub query_input: QueryInput,
    /// Who gets the merged output.
    pub output: OutputMode,
    /// How partials are exchanged and merged.
    pub algorithm: Algorithm,
    /// Which bits are promised to be the same.
    pub reproducibility: Reproducibility,
    /// Element type of o on the wire; finite values beyond its range become its largest. The lse always
    /// travels as f32, two of them but with ALLREDUCE3 on GPUs.
    pub wire_dtype: Dtype,
    /// K and V older than the step's own tokens do not change while earlier work of the stream runs.
    pub kv_stable: bool,
    /// Steps that exchange compare what the ranks passed: queries, lengths, positions, and that every position below
    /// `global_length` is held once. Ranks that do not fit together get `Mismatch`, and NaN for the sequence.
    pub checked: bool,
    /// Sequences may hold keys past `global_length`, which `causal` hides: rolled back, and not taken out of the lengths.
    pub surplus_keys: bool,
    /// Each kv head has lists of pages of its own, as where it selects keys: see `page_index_head_stride` of the step.
    pub pages_by_head: bool,
}

impl AttentionDesc {
    /// A plain shape: f32 everywhere, strided, contiguous, one query token, not causal. Set what differs.
    pub fn new(q_heads: i32, kv_heads: i32, head_dim: i32, max_kv_length: i32) -> AttentionDesc {
        AttentionDesc {
            q_heads,
            kv_heads,
            head_dim_qk: head_dim,
            head_dim_v: head_dim,
            q_dtype: Dtype::F32,
            k_dtype: Dtype::F32,
            v_dtype: Dtype::F32,
            out_dtype: Dtype::F32,
            kv_layout: KvLayout::Strided,
            page_size: 0,
            placement: Placement::Contiguous,
            max_batch: 1,
            max_query_tokens: 1,
            max_kv_length,
            scale: 0.0,
            causal: false,
            window: 0,
            softcap: 0.0,
            alibi: false,
            sinks: false,
            mask: MaskKind::None,
            mask_dtype: None,
            query_input: QueryInput::Replicated,
            output: OutputMode::Replicated,
            algorithm: Algorithm::Auto,
            reproducibility: Reproducibility::Repeatable,
            wire_dtype: Dtype::F32,
            kv_stable: false,
            checked: false,
            surplus_keys: false,
            pages_by_head: false,
        }
    }

    /// Whether this describes a merge-only plan.
    pub fn is_merge_only(&self) -> bool {
        self.kv_heads == 0
    }

    /// The heads whose queries a rank passes to a step.
    pub fn query_heads(&self, shard: Shard) -> Result<std::ops::Range<i32>> {
        match self.query_input {
            QueryInput::Replicated => Ok(0..self.q_heads),
            QueryInput::Scattered => head_range(self.q_heads, shard),
        }
    }

    /// The same shape, with the queries of all heads on every rank.
    pub fn with_all_queries(&self) -> AttentionDesc {
        AttentionDesc { query_input: QueryInput::Replicated, ..*self }
    }

    /// Query heads a kv head.
    pub fn group(&self) -> i32 {
        if self.kv_heads > 0 { self.q_heads / self.kv_heads } else { 0 }
    }

    /// Rows of the largest step: query tokens x query heads.
    pub fn most_rows(&self) -> Result<usize> {
        let (tokens, heads) = (self.max_query_tokens, self.q_heads);
        tokens.checked_mul(heads).and_then(|rows| usize::try_from(rows).ok()).ok_or_else(|| {
            Error::invalid("max_query_tokens x q_heads", format!("{tokens} x {heads}"), format!("at most {}", i32::MAX))
        })
    }

    /// The factor on q.k.
    pub fn effective_scale(&self) -> f32 {
        if self.scale == 0.0 { (1.0 / f64::from(self.head_dim_qk).sqrt()) as f32 } else { self.scale }
    }

    /// How k lies in memory.
    pub fn k_format(&self) -> KvFormat {
        KvFormat::of(self.k_dtype)
    }

    /// How v lies in memory.
    pub fn v_format(&self) -> KvFormat {
        KvFormat::of(self.v_dtype)
    }

    /// Checks that the fields make sense, on any backend.
    pub fn check(&self) -> Result<()> {
        let at_least_one = |name: &str, value: i32| {
            if value < 1 { Err(Error::invalid(name, value, "at least 1")) } else { Ok(()) }
        };
        at_least_one("q_heads", self.q_heads)?;
        dim("head_dim_v", self.head_dim_v)?;
        at_least_one("max_query_tokens", self.max_query_tokens)?;
        self.most_rows()?;
        float("out_dtype", self.out_dtype)?;
        float("wire_dtype", self.wire_dtype)?;
        if self.is_merge_only() {
            return Ok(());
        }
        if self.kv_heads < 0 || self.q_heads % self.kv_heads != 0 {
            let wanted = format!("a divisor of q_heads = {}, or 0 for a merge-only plan", self.q_heads);
            return Err(Error::invalid("kv_heads", self.kv_heads, wanted));
        }
        dim("head_dim_qk", self.head_dim_qk)?;
        float("q_dtype", self.q_dtype)?;
        whole_blocks("head_dim_qk", self.head_dim_qk, "k_dtype", self.k_dtype)?;
        whole_blocks("head_dim_v", self.head_dim_v, "v_dtype", self.v_dtype)?;
        at_least_one("max_batch", self.max_batch)?;
        at_least_one("max_kv_length", self.max_kv_length)?;
        match self.kv_layout {
            KvLayout::Strided if self.page_size != 0 => {
                return Err(Error::invalid("page_size", self.page_size, "0 with kv_layout STRIDED"));
            }
            KvLayout::BlockTable | KvLayout::CsrPages => at_least_one("page_size", self.page_size)?,
            KvLayout::Strided => {}
        }
        if let Placement::Interleaved { run } = self.placement {
            at_least_one("placement.interleave", run)?;
        }
        if !self.scale.is_finite() {
            return Err(Error::invalid("scale", self.scale, "a finite number, 0 for 1/sqrt(head_dim_qk)"));
        }
        if self.surplus_keys && !self.causal {
            let wanted =
                "no TREEATTN_ATTENTION_SURPLUS_KEYS where causal = 0: nothing would hide the keys past global_length";
            return Err(Error::invalid("flags", "SURPLUS_KEYS", wanted));
        }
        if self.pages_by_head && (self.kv_layout != KvLayout::CsrPages || self.checked) {
            let wanted = "no TREEATTN_ATTENTION_PAGES_BY_HEAD but with kv_layout CSR_PAGES, and not with CHECKED: heads that \
                          select keys need not hold every position";
            return Err(Error::invalid("flags", "PAGES_BY_HEAD", wanted));
        }
        if self.window < 0 {
            return Err(Error::invalid("window", self.window, "at least 0"));
        }
        if !(self.softcap >= 0.0 && self.softcap.is_finite()) {
            return Err(Error::invalid("softcap", self.softcap, "a finite number of at least 0"));
        }
        match (self.mask, self.mask_dtype) {
            (MaskKind::Additive, Some(Dtype::F16 | Dtype::F32)) | (MaskKind::None | MaskKind::Boolean, None) => {}
            (MaskKind::Additive, None) => {
                return Err(Error::invalid("mask_dtype", 0, "f16 or f32 with an additive mask"));
            }
            (MaskKind::Additive, Some(dtype)) => {
                return Err(Error::unsupported("mask_dtype", dtype.name(), "f16 and f32"));
            }
            (kind, Some(dtype)) => {
                return Err(Error::invalid("mask_dtype", dtype.name(), format!("0 with mask {}", kind.name())));
            }
        }
        Ok(())
    }

    /// The fields by name with their values, in the order in which ranks compare them.
    pub fn fields(&self) -> Vec<(&'static str, String)> {
        // Without `..`, so that the compiler asks for every new field here.
        let AttentionDesc {
            q_heads,
            kv_heads,
            head_dim_qk,
            head_dim_v,
            q_dtype,
            k_dtype,
            v_dtype,
            out_dtype,
            kv_layout,
            page_size,
            placement,
            max_batch,
            max_query_tokens,
            max_kv_length,
            scale,
            causal,
            window,
            softcap,
            alibi,
            sinks,
            mask,
            mask_dtype,
            query_input,
            output,
            algorithm,
            reproducibility,
            wire_dtype,
            kv_stable,
            checked,
            surplus_keys,
            pages_by_head,
        } = *self;
        let run = if let Placement::Interleaved { run } = placement { run } else { 0 };
        vec![
            ("q_heads", q_heads.to_string()),
            ("kv_heads", kv_heads.to_string()),
            ("head_dim_qk", head_dim_qk.to_string()),
            ("head_dim_v", head_dim_v.to_string()),
            ("q_dtype", q_dtype.name().into()),
            ("k_dtype", k_dtype.name().into()),
            ("v_dtype", v_dtype.name().into()),
            ("out_dtype", out_dtype.name().into()),
            ("kv_layout", kv_layout.name().into()),
            ("page_size", page_size.to_string()),
            ("placement.kind", placement.name().into()),
            ("placement.interleave", run.to_string()),
            ("max_batch", max_batch.to_string()),
            ("max_query_tokens", max_query_tokens.to_string()),
            ("max_kv_length", max_kv_length.to_string()),
            ("scale", format!("{scale:?}")),
            ("causal", i32::from(causal).to_string()),
            ("window", window.to_string()),
            ("softcap", format!("{softcap:?}")),
            ("alibi", i32::from(alibi).to_string()),
            ("sinks", i32::from(sinks).to_string()),
            ("mask", mask.name().into()),
            ("mask_dtype", mask_dtype.map_or("none", Dtype::name).into()),
            ("query_input", query_input.name().into()),
            ("output", output.name().into()),
            ("algorithm", algorithm.name().into()),
            ("reproducibility", reproducibility.name().into()),
            ("wire_dtype", wire_dtype.name().into()),
            ("kv_stable", i32::from(kv_stable).to_string()),
            ("checked", i32::from(checked).to_string()),
            ("surplus_keys", i32::from(surplus_keys).to_string()),
            ("pages_by_head", i32::from(pages_by_head).to_string()),
        ]
    }
}

fn dim(name: &str, value: i32) -> Result<()> {
    if (1..=MAX_HEAD_DIM).contains(&value) {
        Ok(())
    } else {
        Err(Error::invalid(name, value, format!("1 to {MAX_HEAD_DIM}")))
    }
}

/// A row ends where a block does.
fn whole_blocks(name: &str, dim: i32, of: &str, dtype: Dtype) -> Result<()> {
    let elements = KvFormat::of(dtype).block_elements() as i32;
    if dim % elements == 0 {
        return Ok(());
    }
    Err(Error::invalid(
        name,
        dim,
        format_args!("a multiple of {elements}, the elements of a block, with {of} {}", dtype.name()),
    ))
}

fn float(name: &str, dtype: Dtype) -> Result<()> {
    if dtype.is_float() { Ok(()) } else { Err(Error::invalid(name, dtype.name(), "f32, f16 or bf16")) }
}
