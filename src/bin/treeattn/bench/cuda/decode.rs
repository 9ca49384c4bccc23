//! Times decode steps on a GPU: replayed from a graph, and eager.
//!
//! Every step of a graph reads another copy of the cache. The copies take at least [`COLD`] bytes together, so that none
//! is in a cache when its turn comes again.

use std::time::Instant;

use treeattn::attention::{AttentionDesc, DecodeArgs, Dtype, KvFormat, KvLayout, Tensor};
use treeattn::runtime::{self, Buffer, CommConfig, Communicator, Device, Plan, Runtime};

use super::case::Case;
use super::driver::Stream;
use crate::bench::pool::Random;
use crate::bench::samples::{Samples, Summary};
use crate::bench::terms::TermInputs;
use crate::outcome::Outcome;

/// Bytes that the steps of a graph read before one reads the same again.
pub const COLD: usize = 1 << 30;
/// Most steps of a graph; also of an eager round, which thereby fits the queue of a stream.
pub const MOST_STEPS: usize = 256;
/// Seconds that a graph takes, about: long against what starts it.
pub const GRAPH: f64 = 4e-3;

/// How long a case is measured, seconds of replay.
pub struct Pace {
    pub block: f64,
    pub least: usize,
}

pub const FULL: Pace = Pace { block: 0.25, least: 15 };
pub const QUICK: Pace = Pace { block: 0.02, least: 5 };

/// What a case took, seconds a step.
pub struct Timed {
    pub replay: Summary,
    pub eager: Summary,
    /// The host's time for an eager call.
    pub host: Summary,
    /// Steps of the graph, and the copies of the cache that they read.
    pub steps: usize,
    pub copies: usize,
}

/// The bytes of a pool that a case needs at least.
pub fn least_pool(case: &Case) -> usize {
    case.room().saturating_mul(2).max(COLD.saturating_add(case.room()))
}

/// Times one case over a pool of random numbers of its type.
pub fn time(
    case: &Case,
    runtime: &Runtime,
    device: Device,
    stream: &Stream,
    pool: &Buffer,
    pace: &Pace,
) -> Outcome<Timed> {
    let comm = Communicator::create_local(runtime, &[device], &CommConfig::default())?.remove(0);
    let plan = Plan::create(&comm, &describe(case)?)?;
    let memory = Memory::new(case, runtime, device, pool)?;
    // SAFETY: `stream` outlives the wrapped one, which is dropped here.
    let wrapped = unsafe { runtime::Stream::wrap_cuda(runtime, device, stream.pointer()) }?;
    let enqueue = |steps: usize| -> Outcome<()> {
        for args in memory.args.iter().cycle().take(steps) {
            // SAFETY: the pool is borrowed and `memory` lives to the end of this function; freeing device memory waits for the
            // device, so that neither goes before a step, whichever way this ends. All steps are on one stream.
            unsafe { plan.decode(args, Some(&wrapped)) }?;
        }
        Ok(())
    };
    // Every pointer known, every kernel resident; then about how long a step takes.
    stream.time(|| enqueue(memory.args.len()))?;
    let probe = memory.args.len().min(8);
    let about = stream.time(|| enqueue(probe))? / probe as f64;
    let steps = ((GRAPH / about.max(1e-7)) as usize).clamp(memory.args.len(), MOST_STEPS.max(memory.args.len()));

    let graph = stream.capture(|| enqueue(steps))?;
    // SAFETY: the graph's steps use what those above use.
    let replay_once = || stream.time(|| unsafe { stream.replay(&graph) });
    replay_once()?;
    let (mut replay, mut spent) = (Samples::default(), 0.0);
    let mut turns = 0;
    while turns < pace.least || spent < pace.block {
        let seconds = replay_once()?;
        spent += seconds;
        turns += 1;
        replay.push(seconds / steps as f64);
    }

    let calls = ((GRAPH / about.max(1e-7)) as usize).clamp(8, MOST_STEPS);
    let (mut eager, mut host) = (Samples::default(), Samples::default());
    for _ in 0..pace.least {
        let mut enqueued = 0.0;
        let seconds = stream.time(|| {
            let began = Instant::now();
            enqueue(calls)?;
            enqueued = began.elapsed().as_secs_f64();
            Ok(())
        })?;
        eager.push(seconds / calls as f64);
        host.push(enqueued / calls as f64);
    }

    memory.check()?;
    if let Some(error) = comm.status()?.error {
        return Err(format!("{}: {error}", case.shape()).into());
    }
    let (replay, eager, host) = (replay.summary(), eager.summary(), host.summary());
    Ok(Timed { replay, eager, host, steps, copies: memory.args.len() })
}

/// The descriptor of a case on one rank.
pub fn describe(case: &Case) -> Outcome<AttentionDesc> {
    let mut desc = AttentionDesc::new(
        i32::try_from(case.q_heads)?,
        i32::try_from(case.kv_heads)?,
        i32::try_from(case.head_dim)?,
        i32::try_from(case.keys)?,
    );
    (desc.q_dtype, desc.k_dtype, desc.v_dtype, desc.out_dtype) = (case.dtype, case.kv_dtype, case.kv_dtype, case.dtype);
    desc.head_dim_v = i32::try_from(case.head_dim_v())?;
    case.terms.describe(&mut desc);
    desc.max_batch = i32::try_from(case.batch)?;
    desc.max_query_tokens = i32::try_from(case.batch * case.query_tokens)?;
    desc.causal = case.query_tokens > 1;
    if case.page_size > 0 {
        (desc.kv_layout, desc.page_size) = (KvLayout::BlockTable, i32::try_from(case.page_size)?);
    }
    Ok(desc)
}

/// What the steps of a case read and write beside the pool, and their arguments, one for each copy of the cache.
pub struct Memory {
    pub args: Vec<DecodeArgs>,
    lse: Buffer,
    /// Held for the steps.
    _inputs: [Buffer; 3],
    _terms: Vec<Buffer>,
    _scale: Buffer,
    _out: Buffer,
}

impl Memory {
    pub fn new(case: &Case, runtime: &Runtime, device: Device, pool: &Buffer) -> Outcome<Memory> {
        let alloc = |bytes: usize| Buffer::alloc(runtime, device, bytes.max(1));
        let tokens = case.batch * case.query_tokens;
        let row_bytes = case.head_dim * case.dtype.size();
        // The pool's own numbers are as good for queries as others: scores with a spread of about 1.
        let q_bytes = tokens * case.q_heads * row_bytes;
        let q = alloc(q_bytes)?;
        let mut numbers = vec![0; q_bytes];
        if case.kv_dtype == case.dtype {
            pool.download(0, &mut numbers)?;
        } else {
            numbers = super::pool::numbers(case.dtype, q_bytes / case.dtype.size());
        }
        q.upload(0, &numbers)?;
        let out = alloc(tokens * case.q_heads * case.head_dim_v() * case.dtype.size())?;
        let lse = alloc(4 * tokens * case.q_heads)?;
        lse.upload(0, &vec![0xff; lse.bytes()])?;
        let ints = |values: &[i32]| -> Outcome<Buffer> {
            let buffer = alloc(4 * values.len())?;
            buffer.upload(0, &values.iter().flat_map(|value| value.to_ne_bytes()).collect::<Vec<u8>>())?;
            Ok(buffer)
        };
        let terms = TermInputs::new(case.terms, case.q_heads, case.keys);
        let on_device: Vec<Buffer> = terms
            .bytes()
            .iter()
            .map(|bytes| {
                let buffer = alloc(bytes.len())?;
                if !bytes.is_empty() {
                    buffer.upload(0, bytes)?;
                }
                Ok(buffer)
            })
            .collect::<Outcome<_>>()?;
        let scale = alloc(4)?;
        scale.upload(0, &0.02f32.to_ne_bytes())?;
        let lengths = ints(&vec![i32::try_from(case.keys)?; case.batch])?;

        let room = case.room();
        let fit = pool.bytes() / room.max(1);
        let copies = (COLD / room.max(1) + 1).max(2).min(fit);
        if copies < 2 {
            return Err(format!("{}: found room for {copies} copies of its cache, wanted 2", case.shape()).into());
        }
        let pages = case.batch * case.pages();
        let tables = ints(&tables(pages, copies)?)?;

        let tensor = |data: u64, bytes: usize| Tensor { data: data as *mut _, bytes: bytes as u64, stride: [0; 4] };
        let whole = |buffer: &Buffer| tensor(buffer.data() as u64, buffer.bytes());
        let args = (0..copies).map(|copy| {
            // Strided: each copy its keys, then its values. Paged: the pages of all copies' keys, then those of values.
            let (k, bytes) = match case.page_size {
                0 => {
                    let begin = pool.data() as u64 + (copy * room) as u64;
                    (begin, room / case.tensors())
                }
                _ => (pool.data() as u64, copies * room / case.tensors()),
            };
            let v = if case.is_latent { k } else { k + bytes as u64 };
            let outer = if case.page_size > 0 { case.page_size } else { case.keys } * case.token_bytes();
            let format = KvFormat::of(case.kv_dtype);
            let stride = [outer, case.token_bytes(), format.row_bytes(case.head_dim), format.block_bytes()]
                .map(|stride| stride as i64);
            let paged = case.page_size > 0;
            let table = tables.data().wrapping_byte_add(4 * copy * pages).cast_const().cast();
            let mut args = DecodeArgs {
                batch: case.batch as i32,
                query_tokens: tokens as i32,
                q: whole(&q),
                k: tensor(k, bytes).with_strides(stride),
                v: tensor(v, bytes).with_strides(stride),
                out: whole(&out),
                lse: whole(&lse),
                kv_length: lengths.data().cast_const().cast(),
                global_length: lengths.data().cast_const().cast(),
                block_table: if paged { table } else { std::ptr::null() },
                max_pages: if paged { case.pages() as i32 } else { 0 },
                num_pages: if paged { (copies * pages) as i32 } else { 0 },
                ..DecodeArgs::default()
            };
            if case.kv_dtype == Dtype::Int8 {
                // One for all.
                (args.k_scale, args.v_scale) = (whole(&scale), whole(&scale));
            }
            terms.pass_from(std::array::from_fn(|i| on_device[i].data()), &mut args);
            args
        });
        let args = args.collect();
        Ok(Memory { args, lse, _inputs: [q, lengths, tables], _terms: on_device, _scale: scale, _out: out })
    }

    /// An error where a row was not written, or is no number.
    pub fn check(&self) -> Outcome<()> {
        let mut bytes = vec![0; self.lse.bytes()];
        self.lse.download(0, &mut bytes)?;
        let finite = |b: &[u8]| f32::from_ne_bytes([b[0], b[1], b[2], b[3]]).is_finite();
        match bytes.chunks_exact(4).position(|row| !finite(row)) {
            Some(row) => Err(format!("lse: found no finite number in row {row} of {}", bytes.len() / 4).into()),
            None => Ok(()),
        }
    }
}

/// A block table for each copy: its own pages, in a random order.
fn tables(pages: usize, copies: usize) -> Outcome<Vec<i32>> {
    let mut table: Vec<i32> = (0..i32::try_from(copies * pages)?).collect();
    let mut random = Random(5);
    if pages > 0 {
        for table in table.chunks_exact_mut(pages) {
            for last in (1..pages).rev() {
                let other = ((f64::from(random.float()) + 1.0) / 2.0 * (last + 1) as f64) as usize;
                table.swap(last, other.min(last));
            }
        }
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_permutations_of_their_own_pages() {
        let mut all = tables(100, 3).unwrap();
        assert!(!all.is_sorted());
        for (copy, table) in all.chunks_exact_mut(100).enumerate() {
            table.sort_unstable();
            assert!(table.iter().enumerate().all(|(i, &page)| page as usize == copy * 100 + i));
        }
        assert!(tables(0, 3).unwrap().is_empty());
    }
}
