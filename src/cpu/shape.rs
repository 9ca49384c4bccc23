//! What every worker knows about a plan: its sizes and formats, and where things lie in a worker's scratch.

use super::kernel::args::TILE;
use super::kernel::table::codec_of;
use super::sums::{ClosedSums, SumSizes};
use crate::attention::{AttentionDesc, Dtype, KvFormat, ScoreMod};

/// Most rows of a row block.
const ROW_BLOCK: usize = 32;
const _: () = assert!(ROW_BLOCK <= TILE);
/// Bytes of accumulators that one worker keeps going at a time.
const SUM_BYTES: usize = 64 << 10;

/// A tensor of rows to be read.
#[derive(Clone, Copy, Debug)]
pub struct RowFormat {
    /// Elements of a row.
    pub dim: usize,
    /// How they lie in memory.
    pub format: KvFormat,
    /// Index of the format's kernels.
    pub codec: usize,
}

impl RowFormat {
    fn new(dim: i32, dtype: Dtype) -> RowFormat {
        let format = KvFormat::of(dtype);
        RowFormat { dim: dim as usize, format, codec: codec_of(format) }
    }

    /// Elements of a widened row.
    pub fn padded(&self) -> usize {
        self.dim.next_multiple_of(16)
    }
}

/// Sizes, formats and terms of a plan.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Query heads.
    pub q_heads: usize,
    /// Query heads of a kv head.
    pub group: usize,
    /// Most rows of a row block, at most [`TILE`].
    pub row_block: usize,
    /// Most kv heads of a head block.
    pub head_block: usize,
    /// Rows of q.
    pub q: RowFormat,
    /// Rows of k (0) and v (1).
    pub kv: [RowFormat; 2],
    /// Rows of zeta, which is f32.
    pub zeta: RowFormat,
    /// What happens to scores; biased where steps come with a zeta.
    pub mods: ScoreMod,
    /// What the scores of a cap are multiplied by, as a sum of two floats: see `ModifyArgs`.
    pub cap_factor: [f32; 2],
    /// What the scores that weights are made of are multiplied by to be powers of two, above 0, as a sum of two floats.
    pub factor: [f32; 2],
    /// What q is multiplied by before the product: a power of two that keeps scores in range, negative where the scale is,
    /// so that `factor` is above 0.
    pub q_factor: f32,
    /// What is added to scores is multiplied by this first, since scores stand for multiples of products.
    pub bias_factor: f64,
}

impl Shape {
    /// The shape of a checked descriptor. `with_zeta`: steps come with a zeta.
    pub fn new(desc: &AttentionDesc, with_zeta: bool) -> Shape {
        let group = desc.group() as usize;
        let row_block = (group.saturating_mul(desc.max_query_tokens as usize)).min(ROW_BLOCK);
        let heads = desc.kv_heads as usize;
        let row_bytes = size_of::<f32>() * (desc.head_dim_v as usize).next_multiple_of(16);
        let together = (SUM_BYTES / (row_bytes * row_block)).clamp(1, heads);
        let head_block = heads.div_ceil(heads.div_ceil(together));
        let mods = ScoreMod::of(desc, with_zeta);
        let scale = f64::from(mods.scale());
        let q_factor = 2f64.powi(mods.q_power());
        // What a product stands for, and what a score does once it is capped.
        let product = scale.abs() / q_factor;
        let cap = f64::from(mods.softcap());
        let (unit, cap_factor) = if cap > 0.0 { (1.0, 2.0 * product / cap) } else { (product, 0.0) };
        Shape {
            q_heads: desc.q_heads as usize,
            group,
            row_block,
            head_block,
            q: RowFormat::new(desc.head_dim_qk, desc.q_dtype),
            kv: [RowFormat::new(desc.head_dim_qk, desc.k_dtype), RowFormat::new(desc.head_dim_v, desc.v_dtype)],
            zeta: RowFormat::new(desc.head_dim_v, Dtype::F32),
            mods,
            factor: two_floats(unit * std::f64::consts::LOG2_E),
            cap_factor: two_floats(cap_factor * std::f64::consts::LOG2_E),
            q_factor: q_factor.copysign(scale) as f32,
            bias_factor: 1.0 / unit,
        }
    }

    /// Elements of a widened row of q and k.
    pub fn padded_qk(&self) -> usize {
        self.q.padded()
    }

    /// Elements of a widened row of v.
    pub fn padded_v(&self) -> usize {
        self.kv[1].padded()
    }

    /// The sums of an item.
    pub fn sums(&self) -> SumSizes {
        SumSizes { rows: self.head_block * self.row_block, dim: self.padded_v() }
    }
}

/// `x` as a sum of two floats.
fn two_floats(x: f64) -> [f32; 2] {
    let x = x.min(f64::from(f32::MAX));
    let high = x as f32;
    [high, (x - f64::from(high)) as f32]
}

/// Where things lie in a worker's scratch, in floats. No two overlap.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Queries, widened: [head block, row block, padded].
    pub q: usize,
    /// Scores, then weights, of a tile: [head block, row block, TILE].
    pub scores: usize,
    /// Weights of the keys that one query token sees: [row block, TILE].
    pub packed: usize,
    /// Where steps come with a zeta: its rows, as `q`; and zeta.v of a tile, as `scores`.
    pub zeta: usize,
    pub biases: usize,
    /// Where there are slopes: those of each row, and distances of a tile: [row block, TILE].
    pub slopes: usize,
    pub distances: usize,
    /// Where a mask adds to scores: the factor of each row, and its values in a tile: [row block, TILE].
    pub factors: usize,
    pub masks: usize,
    /// Keys and values of a tile, widened: [TILE, padded].
    pub wide: [usize; 2],
    /// Open sums.
    pub open: usize,
    /// What the scores of each row are measured from, and its maximum with those of a tile.
    pub origin: usize,
    pub tile_max: usize,
    /// Three closed sums: of the split at work, and of the two that belong to items which other workers have a part of.
    closed: [usize; 3],
    /// Floats of one worker.
    pub floats: usize,
}

/// Which closed sums of a worker a split has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SumsOf {
    /// An item that is the worker's alone.
    Whole = 0,
    /// The end of an item that a worker before began.
    End = 1,
    /// The beginning of an item that goes on with the next worker.
    Beginning = 2,
}

impl Layout {
    /// The layout of a shape; None where the sizes overflow.
    pub fn of(shape: &Shape) -> Option<Layout> {
        let mut next = 0usize;
        let mut take = |n: Option<usize>| {
            let at = next;
            next = next.checked_add(n?.checked_next_multiple_of(16)?)?;
            Some(at)
        };
        let rows = shape.head_block.checked_mul(shape.row_block)?;
        let q = take(rows.checked_mul(shape.padded_qk()))?;
        let scores = take(rows.checked_mul(TILE))?;
        let packed = take(shape.row_block.checked_mul(TILE))?;
        let biased = if shape.mods.is_biased() { rows } else { 0 };
        let zeta = take(biased.checked_mul(shape.padded_v()))?;
        let biases = take(biased.checked_mul(TILE))?;
        let when = |has: bool, n: usize| if has { n } else { 0 };
        let sloped = when(shape.mods.has_slopes(), shape.row_block);
        let slopes = take(Some(when(shape.mods.has_slopes(), rows)))?;
        let distances = take(sloped.checked_mul(TILE))?;
        let masked = when(shape.mods.has_mask(), shape.row_block);
        let factors = take(Some(when(shape.mods.has_mask(), rows)))?;
        let masks = take(masked.checked_mul(TILE))?;
        let wide = [take(TILE.checked_mul(shape.padded_qk()))?, take(TILE.checked_mul(shape.padded_v()))?];
        let open = take(shape.sums().open_floats())?;
        let (origin, tile_max) = (take(Some(rows))?, take(Some(rows))?);
        let mut sums = || take(shape.sums().closed_floats());
        let closed = [sums()?, sums()?, sums()?];
        // Workers must neither share a cache line nor compete for the same cache sets.
        let floats = next.checked_add(1024 + 16)?;
        Some(Layout {
            q,
            scores,
            packed,
            zeta,
            biases,
            slopes,
            distances,
            factors,
            masks,
            wide,
            open,
            origin,
            tile_max,
            closed,
            floats,
        })
    }

    /// Closed sums in the scratch of a worker.
    ///
    /// # Safety
    /// `scratch` points at `floats` floats that nobody else uses as long as the sums are used.
    pub unsafe fn sums(&self, scratch: *mut f32, shape: &Shape, which: SumsOf) -> ClosedSums {
        // SAFETY: the sums lie within the scratch, apart from all else.
        unsafe { ClosedSums::at(scratch.add(self.closed[which as usize]), shape.sums()) }
    }
}
