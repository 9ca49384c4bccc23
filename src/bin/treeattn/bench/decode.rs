//! Times decode steps of one case over the pool.

use half::{bf16, f16};
use treeattn::attention::placement::{global_position, local_length};
use treeattn::attention::{Algorithm, AttentionDesc, DecodeArgs, Dtype, KvLayout, Placement, Shard, Tensor};
use treeattn::device::HostBuffer;
use treeattn::runtime::{CommConfig, Communicator, Device, Plan, PlanStats, Runtime, RuntimeConfig};

use super::case::Case;
use super::pool::{Pool, Random};
use super::ranks;
use super::samples::Samples;
use super::terms::TermInputs;
use crate::outcome::Outcome;

/// Most turns of a block.
const MOST_TURNS: usize = 2000;
/// Fewest.
const FEWEST_TURNS: usize = 3;

/// A case made ready, and the times of its steps so far, in seconds.
pub struct Decode<'a> {
    pub case: Case,
    pub times: Samples,
    pool: &'a Pool,
    ranks: Vec<Rank>,
    /// Caches that fit the pool, and the distance between them.
    slots: (usize, usize),
    /// Steps so far: the next slot.
    turn: usize,
    /// Keeps the ranks together.
    _comms: Vec<Communicator>,
}

/// What one rank's steps use.
struct Rank {
    plan: Plan,
    q: HostBuffer,
    out: HostBuffer,
    lengths: Vec<i32>,
    /// Global position of the first key, and keys of all ranks together, of each sequence.
    starts: Vec<i32>,
    global_lengths: Vec<i32>,
    table: Vec<i32>,
    terms: TermInputs,
    /// Keys of each sequence that the shard has room for.
    room: usize,
    /// Where the shard begins in a slot, bytes.
    begin: usize,
}

impl<'a> Decode<'a> {
    pub fn new(case: Case, algorithm: Algorithm, pool: &'a Pool) -> Outcome<Decode<'a>> {
        let runtime = Runtime::new(RuntimeConfig { cpu_isa: Some(case.isa.name().to_string()) })?;
        let config = CommConfig { threads_per_rank: case.threads_per_rank, ..CommConfig::default() };
        let comms = Communicator::create_local(&runtime, &vec![Device::CPU; case.ranks], &config)?;
        let plans = Plan::create_all(&comms.iter().collect::<Vec<_>>(), &describe(&case, algorithm)?)?;
        let mut ranks = Vec::with_capacity(case.ranks);
        let mut begin = 0;
        for (rank, plan) in plans.into_iter().enumerate() {
            let rank = Rank::new(&case, rank, plan, begin)?;
            begin += 2 * case.batch * rank.room * case.token_bytes();
            ranks.push(rank);
        }
        let slots = pool.slots(begin);
        if slots.0 == 0 {
            return Err(format!("{}: a cache of {begin} bytes needs a larger --pool-mib", case.shape()).into());
        }
        Ok(Decode { case, times: Samples::default(), pool, ranks, slots, turn: 0, _comms: comms })
    }

    /// Times steps for about `seconds`, after one that is not counted. Gives their median.
    pub fn block(&mut self, seconds: f64) -> Outcome<f64> {
        let known = self.times.median();
        let typical = if known > 0.0 { known } else { self.steps(2)?[1] };
        let turns = ((seconds / typical) as usize).clamp(FEWEST_TURNS, MOST_TURNS);
        let times = Samples::from(self.steps(turns + 1)?.split_off(1));
        let median = times.median();
        self.times.append(times);
        Ok(median)
    }

    /// What each rank's plan has counted.
    pub fn stats(&self) -> Outcome<Vec<PlanStats>> {
        Ok(self.ranks.iter().map(|rank| rank.plan.stats()).collect::<treeattn::Result<_>>()?)
    }

    fn steps(&mut self, turns: usize) -> Outcome<Vec<f64>> {
        let (count, stride) = self.slots;
        let first = self.turn;
        self.turn += turns;
        let slot = |turn: usize| if self.case.cached { 0 } else { (first + turn) % count * stride };
        let step = |rank: usize, turn: usize| {
            let rank = &self.ranks[rank];
            let args = rank.args(&self.case, self.pool, slot(turn));
            // SAFETY: the pool, the rank's buffers and its vectors outlive the step, which blocks.
            unsafe { rank.plan.decode(&args, None) }
        };
        ranks::time(self.case.ranks, turns, &step)
    }
}

/// The scale of int8 caches.
static INT8_SCALE: [f32; 1] = [1.0 / 64.0];

fn describe(case: &Case, algorithm: Algorithm) -> Outcome<AttentionDesc> {
    let mut desc = AttentionDesc::new(
        i32::try_from(case.q_heads)?,
        i32::try_from(case.kv_heads)?,
        i32::try_from(case.head_dim)?,
        i32::try_from(case.keys.div_ceil(case.ranks))?,
    );
    desc.algorithm = algorithm;
    let kv = case.kv_format().dtype();
    (desc.q_dtype, desc.k_dtype, desc.v_dtype, desc.out_dtype) = (case.dtype, kv, kv, case.dtype);
    desc.max_batch = i32::try_from(case.batch)?;
    desc.max_query_tokens = i32::try_from(case.batch * case.query_tokens)?;
    desc.causal = case.query_tokens > 1;
    desc.checked = case.checked;
    case.terms.describe(&mut desc);
    if case.page_size > 0 {
        (desc.kv_layout, desc.page_size) = (KvLayout::BlockTable, i32::try_from(case.page_size)?);
    }
    Ok(desc)
}

impl Rank {
    fn new(case: &Case, rank: usize, plan: Plan, begin: usize) -> Outcome<Rank> {
        let shard = Shard { rank: i32::try_from(rank)?, world: i32::try_from(case.ranks)? };
        let all = i32::try_from(case.keys)?;
        let keys = local_length(Placement::Contiguous, shard, all)?;
        let start = if keys > 0 { global_position(Placement::Contiguous, shard, all, 0)? } else { 0 };
        let room = (keys as usize).next_multiple_of(case.page_size.max(1));
        let elements = case.batch * case.query_tokens * case.q_heads * case.head_dim;
        let q = HostBuffer::new(elements * case.dtype.size())?;
        // Every rank has the same queries.
        let mut random = Random(1);
        for i in 0..elements {
            // Scores with a spread of about 1, as real ones have.
            let x = 3.0 * random.float();
            // SAFETY: element i of a buffer made for them, which nobody else has.
            unsafe {
                match case.dtype {
                    Dtype::F16 => q.as_mut_ptr().cast::<f16>().add(i).write(f16::from_f32(x)),
                    Dtype::Bf16 => q.as_mut_ptr().cast::<bf16>().add(i).write(bf16::from_f32(x)),
                    _ => q.as_mut_ptr().cast::<f32>().add(i).write(x),
                }
            }
        }
        let out = HostBuffer::new(elements * case.dtype.size())?;
        let pages = (case.batch * room).checked_div(case.page_size).unwrap_or(0);
        let mut table: Vec<i32> = (0..i32::try_from(pages)?).collect();
        for last in (1..pages).rev() {
            let other = ((random.float() + 1.0) / 2.0 * (last + 1) as f32) as usize;
            table.swap(last, other.min(last));
        }
        let [lengths, starts, global_lengths] = [keys, start, all].map(|value| vec![value; case.batch]);
        let terms = TermInputs::new(case.terms, case.q_heads, keys as usize);
        Ok(Rank { plan, q, out, lengths, starts, global_lengths, table, terms, room, begin })
    }

    /// The step over the cache `slot` bytes into the pool.
    fn args(&self, case: &Case, pool: &Pool, slot: usize) -> DecodeArgs {
        let token = case.token_bytes();
        let bytes = case.batch * self.room * token;
        let format = case.kv_format();
        let row = format.row_bytes(case.head_dim);
        // Strided: sequence, token, head, element. Paged: page, slot, head, element.
        let outer = if case.page_size > 0 { case.page_size } else { self.room } * token;
        let (slots, heads) = if case.head_major { (row, self.room * row) } else { (token, row) };
        let stride = [outer, slots, heads, format.block_bytes()].map(|stride| stride as i64);
        let tensor = |data: *const u8, bytes: usize| Tensor {
            data: data.cast_mut().cast(),
            bytes: bytes as u64,
            stride: [0; 4],
        };
        let cache = |at: usize| tensor(pool.data().wrapping_add(slot + at), bytes).with_strides(stride);
        let paged = case.page_size > 0;
        let scales = match format.dtype() {
            Dtype::Int8 => Tensor::from_slice(&INT8_SCALE),
            _ => Tensor::NULL,
        };
        let mut args = DecodeArgs {
            batch: case.batch as i32,
            query_tokens: (case.batch * case.query_tokens) as i32,
            q: tensor(self.q.as_ptr(), self.q.len()),
            k: cache(self.begin),
            v: cache(self.begin + bytes),
            k_scale: scales,
            v_scale: scales,
            out: tensor(self.out.as_mut_ptr(), self.out.len()),
            kv_length: self.lengths.as_ptr(),
            global_length: self.global_lengths.as_ptr(),
            kv_start: self.starts.as_ptr(),
            block_table: if paged { self.table.as_ptr() } else { std::ptr::null() },
            max_pages: if paged { (self.table.len() / case.batch) as i32 } else { 0 },
            num_pages: if paged { self.table.len() as i32 } else { 0 },
            ..DecodeArgs::default()
        };
        self.terms.pass(&mut args);
        args
    }
}

/// The bytes of the pool that a case takes at least.
pub fn least_pool(case: &Case) -> usize {
    let spare = case.batch.saturating_mul(case.ranks).saturating_mul(case.page_size);
    case.kv_bytes().saturating_add(spare.saturating_mul(2 * case.token_bytes()))
}
