//! What callers of a self-check give and get.

/// The sizes of a self-check. 0 is the default of every field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SelfcheckConfig {
    /// Local ranks that the sequences are sharded over. Default: 2 on a CPU, 1 on a GPU.
    pub ranks: i32,
    /// Sequences, at most the descriptor's `max_batch`. The first has `kv_length` keys, the others random lengths up to
    /// that. Default: 2 where the descriptor has room.
    pub batch: i32,
    /// Query tokens of each sequence; `batch` x `query_tokens` is at most the descriptor's `max_query_tokens`.
    /// Default: 1.
    pub query_tokens: i32,
    /// Keys of the first sequence on all ranks together; each rank's part is at most the descriptor's `max_kv_length`.
    /// Default: 300 or the descriptor's `max_kv_length`, the smaller.
    pub kv_length: i32,
    /// Seed of the random inputs.
    pub seed: u64,
}

/// What a self-check found.
#[derive(Clone, Debug, PartialEq)]
pub struct SelfcheckReport {
    /// Whether every output is within its bounds and all bits repeat.
    pub passed: bool,
    /// Output rows (query token x head, of every rank) compared.
    pub rows: u64,
    /// The largest error of an output element over the usual one ("Accuracy" in README.md); at most 3 in a check that passes.
    pub max_error_ratio: f64,
    /// The same for the log-sum-exps.
    pub max_lse_error_ratio: f64,
    /// Share of the outputs that are the reference correctly rounded; 1 for f32 outputs, where it is not asked.
    pub correctly_rounded: f64,
    /// Root of the summed squared errors over that of the summed squared outputs.
    pub relative_l2: f64,
    /// Whether a second run gave the same bits, and all ranks hold the same where all hold the whole output.
    pub same_bits: bool,
    /// The first thing found wrong, or a line that says what passed.
    pub message: String,
}

/// Bytes of out and lse of one rank.
pub(super) type Results = (Vec<u8>, Vec<u8>);
