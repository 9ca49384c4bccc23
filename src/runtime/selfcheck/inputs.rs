//! Random inputs of a self-check: what the sequences hold, and which rank holds what of them.

use half::{bf16, f16};

use super::types::SelfcheckConfig;
use crate::attention::placement::{global_position, local_length};
use crate::attention::{AttentionDesc, Dtype, KvFormat, MaskKind, Placement, Shard};
use crate::comm::MAX_RANKS;
use crate::device::{Device, device_info};
use crate::error::{Error, ErrorKind, Result};

/// Keys of the longest sequence where the caller leaves the choice.
const DEFAULT_KEYS: i32 = 300;
/// Ranks where the caller leaves the choice.
const DEFAULT_RANKS: i32 = 2;

/// The sizes of a self-check, every default filled in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub ranks: usize,
    pub batch: usize,
    /// Query tokens of each sequence.
    pub tokens: usize,
    /// Keys of the first sequence; the others have at most as many.
    pub keys: usize,
    pub seed: u64,
}

impl Sizes {
    pub fn resolve(desc: &AttentionDesc, config: &SelfcheckConfig) -> Result<Sizes> {
        let pick = |name: &str, value: i32, default: i32, most: i32, limit: &str| match value {
            0 => Ok(default.clamp(1, most.max(1)) as usize),
            value if value < 0 || value > most => {
                Err(Error::invalid(name, value, format!("0 for the default, or 1 to {limit} = {most}")))
            }
            value => Ok(value as usize),
        };
        let ranks = pick("ranks", config.ranks, DEFAULT_RANKS, MAX_RANKS as i32, "the most of a local group")?;
        let most = desc.max_batch.min(desc.max_query_tokens);
        let batch = pick("batch", config.batch, 2, most, "the smaller of max_batch and max_query_tokens")?;
        let most = desc.max_query_tokens / batch as i32;
        let tokens = pick("query_tokens", config.query_tokens, 1, most, "max_query_tokens / batch")?;
        let default = DEFAULT_KEYS.min(desc.max_kv_length).max(tokens as i32);
        let most = desc.max_kv_length.saturating_mul(ranks as i32);
        let keys = pick("kv_length", config.kv_length, default, most, "ranks x max_kv_length")?;
        if desc.needs_positions() && keys < tokens {
            let wanted = format!("at least query_tokens = {tokens} where positions matter (causal, window, alibi)");
            return Err(Error::invalid("kv_length", keys, wanted));
        }
        let sizes = Sizes { ranks, batch, tokens, keys, seed: config.seed };
        let (found, most) = (sizes.footprint(desc), u128::from(device_info(Device::CPU)?.memory / 2));
        if found > most {
            let message =
                format!("selfcheck: found sizes that take {found} bytes, wanted at most {most}, half the memory");
            return Err(Error::new(ErrorKind::NoMemory, message));
        }
        Ok(sizes)
    }

    /// Bytes that a self-check of these sizes takes, at most: it is refused before anything is allocated, for a failed
    /// allocation would end the process.
    fn footprint(&self, desc: &AttentionDesc) -> u128 {
        let wide = |n: i32| n.max(0) as u128;
        let (ranks, batch, keys) = (self.ranks as u128, self.batch as u128, self.keys as u128);
        let (dim_qk, dim_v) = (wide(desc.head_dim_qk), wide(desc.head_dim_v));
        let rows = batch * self.tokens as u128 * wide(desc.q_heads);
        // A page in part for every sequence and one for none; a strided cache has room for its longest everywhere.
        let slots = batch * keys.max(wide(desc.page_size)) + wide(desc.page_size);
        let cache = slots * wide(desc.kv_heads) * (dim_qk + dim_v) + batch * keys;
        16 * ranks * (rows * (dim_qk + 2 * dim_v + 2) + cache)
    }
}

/// One sequence in whole: its keys and values by global position, as the element types hold them.
#[derive(Debug)]
pub(super) struct Sequence {
    pub keys: usize,
    /// [position, kv head, dim].
    pub k: Vec<f32>,
    /// [position, kv head, dim].
    pub v: Vec<f32>,
    /// The same as they lie in memory: packed rows [position, kv head].
    pub k_rows: Vec<u8>,
    pub v_rows: Vec<u8>,
    /// For each rank the global positions of its local slots.
    pub slots: Vec<Vec<usize>>,
}

/// Everything that a self-check's step is about.
#[derive(Debug)]
pub(super) struct Inputs {
    pub sizes: Sizes,
    /// [query token of all sequences, q head, dim].
    pub q: Vec<f32>,
    pub sequences: Vec<Sequence>,
    pub terms: Terms,
}

/// What shapes have of terms beside keys; empty where they have none.
#[derive(Debug)]
pub(super) struct Terms {
    /// [q head].
    pub sinks: Vec<f32>,
    /// [q head].
    pub slopes: Vec<f32>,
    /// What all heads and query tokens of a sequence are given for a key, by global position; -inf hides it.
    pub masks: Vec<Vec<f32>>,
}

impl Inputs {
    pub fn random(desc: &AttentionDesc, sizes: Sizes) -> Result<Inputs> {
        let mut random = Random(sizes.seed);
        let (dim_qk, dim_v) = (desc.head_dim_qk as usize, desc.head_dim_v as usize);
        let (q_heads, kv_heads) = (desc.q_heads as usize, desc.kv_heads as usize);
        let q = random.normals(sizes.batch * sizes.tokens * q_heads * dim_qk, desc.q_dtype)?;
        let fewest = if desc.needs_positions() { sizes.tokens } else { 0 };
        let mut sequences = room(sizes.batch)?;
        for b in 0..sizes.batch {
            let keys = if b == 0 { sizes.keys } else { fewest + random.below(sizes.keys - fewest + 1) };
            let slots = positions_of_ranks(desc.placement, sizes.ranks, keys, &mut random)?;
            let longest = slots.iter().map(Vec::len).max().unwrap_or(0);
            if longest > desc.max_kv_length as usize {
                let wanted =
                    format!("a length of which every rank gets at most max_kv_length = {}", desc.max_kv_length);
                return Err(Error::invalid("kv_length", keys, wanted));
            }
            let mut k = random.normals(keys * kv_heads * dim_qk, Dtype::F32)?;
            let mut v = random.normals(keys * kv_heads * dim_v, Dtype::F32)?;
            let (k_rows, v_rows) = (narrow(&mut k, dim_qk, desc.k_dtype)?, narrow(&mut v, dim_v, desc.v_dtype)?);
            sequences.push(Sequence { keys, k, v, k_rows, v_rows, slots });
        }
        let heads = |has: bool| if has { q_heads } else { 0 };
        let sinks = random.normals(heads(desc.sinks), Dtype::F32)?;
        // As models have them: falling from head to head.
        let slope = |head: usize| 2f32.powf(-8.0 * (head + 1) as f32 / q_heads as f32);
        let mut slopes = room(heads(desc.alibi))?;
        slopes.extend((0..heads(desc.alibi)).map(slope));
        let mut masks = room(sizes.batch)?;
        for sequence in &sequences {
            let mut mask = random.normals(if desc.mask == MaskKind::None { 0 } else { sequence.keys }, Dtype::F16)?;
            for x in &mut mask {
                let hides = random.below(4) == 0;
                *x = if hides {
                    f32::NEG_INFINITY
                } else if desc.mask == MaskKind::Boolean {
                    0.0
                } else {
                    *x
                };
            }
            masks.push(mask);
        }
        let terms = Terms { sinks, slopes, masks };
        Ok(Inputs { sizes, q, sequences, terms })
    }
}

/// What the elements of a type are multiplied by: a power of two, so that f32 holds the products.
pub(super) fn scale_of(dtype: Dtype) -> Option<f32> {
    (dtype == Dtype::Int8).then_some(1.0 / 32.0)
}

/// Rows of `dim` values as `dtype` holds them: gives the bytes, and leaves in `values` what they stand for.
fn narrow(values: &mut [f32], dim: usize, dtype: Dtype) -> Result<Vec<u8>> {
    let format = KvFormat::of(dtype);
    let size = format.row_bytes(dim);
    let bytes = values.len() / dim * size;
    let mut rows = room(bytes)?;
    rows.resize(bytes, 0);
    let mut wide = vec![0.0; dim];
    for (row, values) in rows.chunks_exact_mut(size).zip(values.chunks_exact_mut(dim)) {
        let scale = scale_of(dtype).unwrap_or(1.0);
        values.iter_mut().for_each(|value| *value /= scale);
        format.narrow_row(values, row);
        // SAFETY: a packed row of `dim` elements.
        unsafe { format.widen_row(row.as_ptr(), format.block_bytes() as i64, &mut wide) };
        values.iter_mut().zip(&wide).for_each(|(value, &wide)| *value = wide as f32 * scale);
    }
    Ok(rows)
}

/// The global positions that each rank holds, in the order of its local slots.
fn positions_of_ranks(placement: Placement, ranks: usize, keys: usize, random: &mut Random) -> Result<Vec<Vec<usize>>> {
    let mut slots = vec![Vec::new(); ranks];
    if placement == Placement::Explicit {
        // Any owner, in any order.
        for position in 0..keys {
            slots[random.below(ranks)].push(position);
        }
        for positions in &mut slots {
            for last in (1..positions.len()).rev() {
                positions.swap(last, random.below(last + 1));
            }
        }
        return Ok(slots);
    }
    for (rank, positions) in slots.iter_mut().enumerate() {
        let shard = Shard { rank: rank as i32, world: ranks as i32 };
        for slot in 0..local_length(placement, shard, keys as i32)? {
            positions.push(global_position(placement, shard, keys as i32, slot)? as usize);
        }
    }
    Ok(slots)
}

/// `x` as an element of `dtype` holds it.
fn round(x: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F16 => f16::from_f32(x).to_f32(),
        Dtype::Bf16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// Writes `x` as an element of `dtype` at byte `at`.
pub(super) fn put(bytes: &mut [u8], at: usize, x: f32, dtype: Dtype) {
    let to = &mut bytes[at..at + dtype.size()];
    match dtype {
        Dtype::F16 => to.copy_from_slice(&f16::from_f32(x).to_ne_bytes()),
        Dtype::Bf16 => to.copy_from_slice(&bf16::from_f32(x).to_ne_bytes()),
        _ => to.copy_from_slice(&x.to_ne_bytes()),
    }
}

/// SplitMix64.
#[derive(Debug)]
pub(super) struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, or 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// Nearly normal numbers of variance 1 (four uniform ones summed), as `dtype` holds them.
    fn normals(&mut self, n: usize, dtype: Dtype) -> Result<Vec<f32>> {
        let one = |word: u64| {
            let sum: u64 = (0..4).map(|i| (word >> (16 * i)) & 0xffff).sum();
            (sum as f32 / 65536.0 - 2.0) * 3f32.sqrt()
        };
        let mut numbers = room(n)?;
        numbers.extend((0..n).map(|_| round(one(self.next()), dtype)));
        Ok(numbers)
    }
}

/// An empty vector with room for `n` values.
pub(super) fn room<T>(n: usize) -> Result<Vec<T>> {
    let mut values = Vec::new();
    values.try_reserve_exact(n).map_err(|_| {
        Error::new(ErrorKind::NoMemory, format!("selfcheck: {n} values wanted, the system has no memory to give"))
    })?;
    Ok(values)
}
