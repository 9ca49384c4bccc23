//! Decode over a cache that is sharded over three CPU ranks, from Rust: `cargo run --release --example decode`.
//!
//! One thread drives all ranks through streams. Tokens are appended where the placement says, a draft of four tokens is
//! queried in one step, half of it is taken back, and decoding goes on. Every output and log-sum-exp is compared with
//! float64; an error above the bound that the library promises ends the program with 1.

use std::error::Error;

use half::f16;
use treeattn::attention::placement::{local_length, local_slot, owner};
use treeattn::attention::{AttentionDesc, DecodeArgs, Dtype, Placement, Shard, Tensor};
use treeattn::runtime::{CommConfig, Communicator, Device, Plan, Runtime, RuntimeConfig, Stream};

const RANKS: i32 = 3;
/// Runs of 16 tokens go to the ranks in turn.
const PLACEMENT: Placement = Placement::Interleaved { run: 16 };
const Q_HEADS: usize = 8;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
/// Elements of one token's keys; of its values, too.
const TOKEN: usize = KV_HEADS * DIM;
const QUERY: usize = Q_HEADS * DIM;
/// Most tokens of the sequence on one rank, and most query tokens of a step.
const CAPACITY: usize = 512;
const MOST_QUERIES: usize = 4;

/// One rank: its plan, its shard, and what it gets.
struct Rank {
    plan: Plan,
    stream: Stream,
    /// [token, kv head, dim], the rank's own tokens, with room for more.
    k: Vec<f16>,
    v: Vec<f16>,
    /// [query token, query head, dim] and [query token, query head].
    out: Vec<f32>,
    lse: Vec<f32>,
    /// Tokens that the rank holds.
    length: i32,
}

/// A sequence over all ranks.
struct Engine {
    ranks: Vec<Rank>,
    /// Every token's key and value, for the comparison.
    tokens: Vec<(Vec<f16>, Vec<f16>)>,
    random: Random,
}

/// The largest errors of a step, as parts of their bounds, and the largest error of an output.
#[derive(Clone, Copy, Default)]
struct Found {
    error: f64,
    of_bound: f64,
    lse_of_bound: f64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let runtime = Runtime::new(RuntimeConfig::default())?;
    let mut engine = Engine::new(&runtime)?;
    println!("{RANKS} ranks, runs of 16 tokens, {Q_HEADS} query heads on {KV_HEADS} kv heads of {DIM}, f16\n");
    println!("what                            queries  keys in all    keys by rank  max |error| (of bound)");
    println!("------------------------------  -------  -----------  --------------  ----------------------");
    let mut worst = Found::default();
    let mut tell = |what: &str, queries: usize, engine: &mut Engine| -> Result<(), Box<dyn Error>> {
        let found = engine.step(queries)?;
        let by_rank: Vec<String> = engine.ranks.iter().map(|rank| format!("{:>4}", rank.length)).collect();
        println!(
            "{what:<30}  {queries:>7}  {:>11}  {:>14}     {:>8.1e}  ({:>3.0} %)",
            engine.tokens.len(),
            by_rank.join(" "),
            found.error,
            100.0 * found.of_bound
        );
        worst.of_bound = worst.of_bound.max(found.of_bound);
        worst.lse_of_bound = worst.lse_of_bound.max(found.lse_of_bound);
        Ok(())
    };

    engine.append(1000)?;
    tell("the prompt's last token", 1, &mut engine)?;
    engine.append(1)?;
    tell("one token more", 1, &mut engine)?;
    engine.append(MOST_QUERIES)?;
    tell("a draft of four", MOST_QUERIES, &mut engine)?;
    engine.roll_back(2)?;
    engine.append(1)?;
    tell("two taken back, one token more", 1, &mut engine)?;
    for _ in 0..200 {
        engine.append(1)?;
        engine.step(1)?;
    }
    engine.append(1)?;
    tell("200 tokens later", 1, &mut engine)?;

    let stats = engine.ranks[0].plan.stats()?;
    println!("\n{} steps by {}: {}", stats.steps, stats.algorithm.name(), stats.reason);
    if worst.of_bound > 1.0 || worst.lse_of_bound > 1.0 {
        return Err(format!("out {:.2}, lse {:.2} of the bound", worst.of_bound, worst.lse_of_bound).into());
    }
    println!(
        "ok: every output is within its bound (largest share of it used: out {:.2}, lse {:.2}), the same bits on every rank",
        worst.of_bound, worst.lse_of_bound
    );
    Ok(())
}

impl Engine {
    fn new(runtime: &Runtime) -> treeattn::Result<Engine> {
        let comms = Communicator::create_local(runtime, &[Device::CPU; RANKS as usize], &CommConfig::default())?;
        let mut desc = AttentionDesc::new(Q_HEADS as i32, KV_HEADS as i32, DIM as i32, CAPACITY as i32);
        (desc.q_dtype, desc.k_dtype, desc.v_dtype) = (Dtype::F16, Dtype::F16, Dtype::F16);
        desc.max_query_tokens = MOST_QUERIES as i32;
        desc.placement = PLACEMENT;
        desc.causal = true;
        // A plan serves every layer of this shape; it holds its communicator.
        let plans = Plan::create_all(&comms.iter().collect::<Vec<_>>(), &desc)?;
        let rank = |plan| {
            Ok(Rank {
                plan,
                stream: Stream::new(runtime, Device::CPU)?,
                k: vec![f16::NAN; CAPACITY * TOKEN], // what lies past the length is never read
                v: vec![f16::NAN; CAPACITY * TOKEN],
                out: vec![0.0; MOST_QUERIES * QUERY],
                lse: vec![0.0; MOST_QUERIES * Q_HEADS],
                length: 0,
            })
        };
        let ranks = plans.into_iter().map(rank).collect::<treeattn::Result<_>>()?;
        Ok(Engine { ranks, tokens: Vec::new(), random: Random(1) })
    }

    /// Makes `count` tokens and gives each to the rank that owns its position.
    fn append(&mut self, count: usize) -> treeattn::Result<()> {
        for _ in 0..count {
            let (k, v) = (self.random.values(TOKEN, 2.0), self.random.values(TOKEN, 1.0));
            let position = self.tokens.len() as i32;
            let rank = &mut self.ranks[owner(PLACEMENT, RANKS, position + 1, position)? as usize];
            let at = local_slot(PLACEMENT, RANKS, position + 1, position)? as usize * TOKEN;
            rank.k[at..at + TOKEN].copy_from_slice(&k);
            rank.v[at..at + TOKEN].copy_from_slice(&v);
            self.tokens.push((k, v));
        }
        self.set_lengths()
    }

    /// Forgets the last `count` tokens: shorter lengths are all that it takes.
    fn roll_back(&mut self, count: usize) -> treeattn::Result<()> {
        self.tokens.truncate(self.tokens.len() - count);
        self.set_lengths()
    }

    fn set_lengths(&mut self) -> treeattn::Result<()> {
        for (n, rank) in self.ranks.iter_mut().enumerate() {
            let shard = Shard { rank: n as i32, world: RANKS };
            rank.length = local_length(PLACEMENT, shard, self.tokens.len() as i32)?;
        }
        Ok(())
    }

    /// Queries the last `queries` tokens, each of which sees the keys up to its own.
    fn step(&mut self, queries: usize) -> Result<Found, Box<dyn Error>> {
        let q = self.random.values(queries * QUERY, 2.0);
        let global_length = [self.tokens.len() as i32];
        let mut results = Vec::new();
        for rank in &mut self.ranks {
            let args = DecodeArgs {
                batch: 1,
                query_tokens: queries as i32,
                q: Tensor::from_slice(&q),
                k: Tensor::from_slice(&rank.k),
                v: Tensor::from_slice(&rank.v),
                out: Tensor::from_slice_mut(&mut rank.out),
                lse: Tensor::from_slice_mut(&mut rank.lse),
                kv_length: &rank.length,
                global_length: global_length.as_ptr(),
                ..DecodeArgs::default()
            };
            // SAFETY: queries, lengths and the rank's buffers live, unchanged, until all streams are synchronised below,
            // whatever a step returns.
            results.push(unsafe { rank.plan.decode(&args, Some(&rank.stream)) });
        }
        results.extend(self.ranks.iter().map(|rank| rank.stream.synchronize()));
        results.into_iter().collect::<treeattn::Result<()>>()?;
        let (first, others) = self.ranks.split_first().ok_or("no ranks")?;
        let bits = |of: &[f32]| of.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        if others.iter().any(|rank| bits(&rank.out) != bits(&first.out) || bits(&rank.lse) != bits(&first.lse)) {
            return Err("the ranks hold different bits".into());
        }
        Ok(self.compare(&q, &first.out, &first.lse))
    }

    /// Holds outputs and log-sum-exps against float64 and the bounds of README.md.
    fn compare(&self, q: &[f16], out: &[f32], lse: &[f32]) -> Found {
        let mut found = Found::default();
        let queries = q.len() / QUERY;
        let scale = 1.0 / (DIM as f64).sqrt();
        for row in 0..queries * Q_HEADS {
            let (token, kv) = (row / Q_HEADS, row % Q_HEADS / (Q_HEADS / KV_HEADS) * DIM..);
            let visible = &self.tokens[..self.tokens.len() - queries + token + 1];
            let products = |k: &[f16], absolute: bool| -> f64 {
                let terms = q[row * DIM..][..DIM].iter().zip(&k[kv.clone()]).map(|(a, b)| a.to_f64() * b.to_f64());
                scale * terms.map(|x| if absolute { x.abs() } else { x }).sum::<f64>()
            };
            let scores: Vec<f64> = visible.iter().map(|(k, _)| products(k, false)).collect();
            let score = visible.iter().map(|(k, _)| products(k, true)).fold(0.0, f64::max);
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for d in 0..DIM {
                let values = || weights.iter().zip(visible).map(|(w, (_, v))| w / sum * v[kv.start + d].to_f64());
                let (o, weighted) = (values().sum::<f64>(), values().map(f64::abs).sum::<f64>());
                let error = (f64::from(out[row * DIM + d]) - o).abs();
                let bound = 2f64.powi(-24) * (4.0 + 2.0 * score) * weighted;
                // A NaN is above every bound.
                let of_bound = if error.is_nan() { f64::INFINITY } else { error / bound };
                (found.error, found.of_bound) = (found.error.max(error), found.of_bound.max(of_bound));
            }
            let wanted = largest + sum.ln();
            let error = (f64::from(lse[row]) - wanted).abs();
            // Four units in the last place.
            let bound = 2f64.powi(-21) * 2f64.powf(score.max(wanted.abs()).max(1.0).log2().floor());
            found.lse_of_bound = found.lse_of_bound.max(if error.is_nan() { f64::INFINITY } else { error / bound });
        }
        found
    }
}

/// A small generator (xorshift64*).
struct Random(u64);

impl Random {
    /// Numbers between -spread and spread.
    fn values(&mut self, count: usize, spread: f32) -> Vec<f16> {
        let mut next = || {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            let unit = (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
            f16::from_f32(spread * unit)
        };
        (0..count).map(|_| next()).collect()
    }
}
