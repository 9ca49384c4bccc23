//! What kernels are told: sizes that all of them share, and the arguments of each.

use super::prefetch::Prefetch;

/// Keys a tile.
pub const TILE: usize = 64;
/// Floats that hold a row's sum of weights, one a lane of the widest vector.
pub const SUM_LANES: usize = 16;
/// [`register_keys`] for one row.
pub const FEW_KEYS: usize = 4;
/// [`register_keys`] for more.
pub const MANY_KEYS: usize = 8;

/// Keys whose weighted values are summed in registers before the sum is added to the row's: bounds the rounding of
/// equal-sign sums. Where there is one row to each kv head, memory sets the pace and is read better in shorter runs.
pub fn register_keys(rows: usize) -> usize {
    if rows == 1 { FEW_KEYS } else { MANY_KEYS }
}

/// Most of [`keys_together`].
pub const MOST_TOGETHER: usize = 16;

/// Keys that are walked together for so many rows: the fewer, the more memory is read in its order.
pub fn keys_together(rows: usize) -> usize {
    if rows.is_multiple_of(4) { 4 } else { MOST_TOGETHER }
}

/// Arguments of [`scores`](super::scores::scores).
#[derive(Clone, Copy, Debug)]
pub struct ScoreArgs {
    /// Queries, f32 [heads, rows, dim].
    pub q: *const f32,
    /// kv heads.
    pub heads: usize,
    /// Query rows of a kv head.
    pub rows: usize,
    /// Elements of a row, padded to a multiple of 16.
    pub dim: usize,
    /// One pointer a key, valid up to the next multiple of 16 above `keys`.
    pub k: *const *const u8,
    /// Bytes added to each pointer for the first kv head.
    pub offset: usize,
    /// Bytes between kv heads.
    pub head: usize,
    /// Keys.
    pub keys: usize,
    /// What each lane of a row's dot products begins with, f32 [heads, rows]: the scores come out that much (times the
    /// lanes) larger.
    pub origin: *const f32,
    /// Scores, f32 [heads, rows, TILE]; written up to the next multiple of 16 above `keys`.
    pub scores: *mut f32,
    /// What to ask memory for meanwhile.
    pub prefetch: Prefetch,
}

/// Arguments of [`modify`](super::modify::modify).
#[derive(Clone, Copy, Debug)]
pub struct ModifyArgs {
    /// Scores, f32 [rows, TILE]: in and out, up to the next multiple of 16 above `keys`.
    pub scores: *mut f32,
    /// Query rows.
    pub rows: usize,
    /// Keys.
    pub keys: usize,
    /// The cap; 0: none.
    pub cap: f32,
    /// What scores are multiplied by to be twice the argument of tanh, as a power of two: a sum of two floats.
    pub cap_factor: [f32; 2],
    /// What distances are multiplied by, `f32 [rows]`; null: none.
    pub slopes: *const f32,
    /// Distances: `[rows]` pointers to `f32 [TILE]`.
    pub distances: *const *const f32,
    /// What masks are multiplied by, `f32 [rows]`.
    pub factors: *const f32,
    /// Masks: `[rows]` pointers to `f32 [TILE]`; null: none.
    pub masks: *const *const f32,
    /// What else is added, times `bias_factor`: f32 [rows, TILE]; null: nothing.
    pub biases: *const f32,
    /// See `biases`.
    pub bias_factor: f32,
}

impl ModifyArgs {
    /// No cap, and nothing to add.
    pub fn of(scores: *mut f32, rows: usize, keys: usize) -> ModifyArgs {
        let (none, no_rows) = (std::ptr::null(), std::ptr::null());
        ModifyArgs {
            scores,
            rows,
            keys,
            cap: 0.0,
            cap_factor: [0.0; 2],
            slopes: none,
            distances: no_rows,
            factors: none,
            masks: no_rows,
            biases: none,
            bias_factor: 0.0,
        }
    }
}

/// Arguments of [`weights`](super::weights::weights).
#[derive(Clone, Copy, Debug)]
pub struct WeightArgs {
    /// In: scores, -inf where hidden and past the last key. Out: weights. f32 [rows, TILE].
    pub scores: *mut f32,
    /// Query rows.
    pub rows: usize,
    /// Keys.
    pub keys: usize,
    /// scale * log2 e as a sum of two floats, above 0.
    pub factor: [f32; 2],
    /// What the scores were measured from, as in [`ScoreArgs`]: in and out.
    pub origin: *mut f32,
    /// How far (in powers of two) the maximum of a row may be from its origin.
    pub origin_range: f32,
    /// `f32 [rows]`, for the kernel's own use.
    pub tile_max: *mut f32,
    /// Running maximum of each row, an integer or -inf.
    pub max: *mut f32,
    /// Open sums, f32 [rows, dim + SUM_LANES]: weighted values, then weights lane by lane.
    pub open: *mut f32,
    /// Elements of a value, padded to a multiple of 16.
    pub dim: usize,
}

/// Arguments of [`values`](super::values::values).
#[derive(Clone, Copy, Debug)]
pub struct ValueArgs {
    /// Weights, f32 [heads, rows, TILE].
    pub weights: *const f32,
    /// kv heads.
    pub heads: usize,
    /// Query rows of a kv head.
    pub rows: usize,
    /// Elements of a row, padded to a multiple of 16.
    pub dim: usize,
    /// One pointer a key.
    pub v: *const *const u8,
    /// Bytes added to each pointer for the first kv head.
    pub offset: usize,
    /// Bytes between kv heads.
    pub head: usize,
    /// Keys.
    pub keys: usize,
    /// Open sums, f32 [heads, rows, dim + SUM_LANES].
    pub open: *mut f32,
    /// What to ask memory for meanwhile.
    pub prefetch: Prefetch,
}

/// Arguments of [`scale`](super::scale::scale).
#[derive(Clone, Copy, Debug)]
pub struct ScaleArgs {
    /// Scores or weights of one kv head, f32 [rows, TILE]; written up to the next multiple of 16 above `keys`.
    pub values: *mut f32,
    /// Query rows.
    pub rows: usize,
    /// Keys.
    pub keys: usize,
    /// One pointer a key, to an f32.
    pub scales: *const *const u8,
    /// Bytes added to each.
    pub offset: usize,
}

/// Arguments of [`widen`](super::widen::widen).
#[derive(Clone, Copy, Debug)]
pub struct WidenArgs {
    /// One pointer a row.
    pub rows: *const *const u8,
    /// Bytes added to each pointer.
    pub offset: usize,
    /// Rows.
    pub count: usize,
    /// Elements of a row.
    pub dim: usize,
    /// Bytes between the blocks of a row's format.
    pub stride: i64,
    /// f32 [count, dim padded to a multiple of 16], zero past `dim`.
    pub out: *mut f32,
}

/// Arguments of [`close`](super::merge::close).
#[derive(Clone, Copy, Debug)]
pub struct CloseArgs {
    /// The closed sums, f64 [rows, width].
    pub closed: *mut f64,
    /// Running maximum of each row.
    pub closed_max: *mut f32,
    /// The open sums that they take in, f32 [rows, width]; left empty.
    pub open: *mut f32,
    /// Their running maxima.
    pub open_max: *const f32,
    /// Rows.
    pub rows: usize,
    /// Elements of a row, a multiple of 16.
    pub width: usize,
}
