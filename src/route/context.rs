//! What is the same in every step of a plan, as plain data.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::attention::{AttentionDesc, OutputMode, Shard, head_range};
use crate::comm::{CallWord, CommConfig, PlanFault, StatusBoard};
use crate::error::{Error, Result};
use crate::partial::DataFault;

/// A plan as its route sees it.
#[derive(Debug)]
pub(crate) struct StepContext {
    /// The number of the plan on its communicator, from 1, the same on all ranks.
    pub plan: u64,
    /// The shape.
    pub desc: AttentionDesc,
    /// Which rank of how many.
    pub shard: Shard,
    /// Heads of this rank's merged output.
    pub heads: Range<usize>,
    /// The communicator's deadlines and choices.
    pub config: CommConfig,
    /// Where the communicator's status finds what steps met.
    pub board: Arc<StatusBoard>,
    /// What the plan has done so far.
    pub counters: Counters,
}

/// What a plan has done so far.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Steps run, or enqueued.
    pub steps: AtomicU64,
    /// Steps of the exchanges: rounds, one a chunk, and levels of the tree or hops of the ring.
    pub rounds: AtomicU64,
    /// Messages sent to peers.
    pub messages: AtomicU64,
    /// Bytes sent to peers.
    pub bytes_sent: AtomicU64,
}

impl Counters {
    /// Counts a part of an exchange.
    pub fn add(&self, rounds: u64, messages: u64, bytes: u64) {
        self.rounds.fetch_add(rounds, Ordering::Relaxed);
        self.messages.fetch_add(messages, Ordering::Relaxed);
        self.bytes_sent.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl StepContext {
    /// Plan number `plan` of `desc`, a checked descriptor, on rank `shard`.
    pub fn new(
        plan: u64,
        desc: &AttentionDesc,
        shard: Shard,
        config: &CommConfig,
        board: &Arc<StatusBoard>,
    ) -> Result<StepContext> {
        let heads = match desc.output {
            OutputMode::Scattered => head_range(desc.q_heads, shard)?,
            OutputMode::Replicated | OutputMode::Local | OutputMode::Weighted => 0..desc.q_heads,
        };
        Ok(StepContext {
            plan,
            desc: *desc,
            shard,
            heads: heads.start as usize..heads.end as usize,
            config: config.clone(),
            board: Arc::clone(board),
            counters: Counters::default(),
        })
    }

    /// Ranks.
    pub fn world(&self) -> usize {
        self.shard.world as usize
    }

    /// Whether steps need other ranks.
    pub fn exchanges(&self) -> bool {
        self.desc.output != OutputMode::Local && self.shard.world > 1
    }

    /// Counts a step.
    pub fn count_step(&self) {
        self.counters.steps.fetch_add(1, Ordering::Relaxed);
        self.board.set_last_plan(self.plan);
    }

    /// Counts a step that exchanges, and is enqueued.
    pub fn count_enqueued(&self) {
        self.count_step();
        self.board.count_step();
    }

    /// Leaves bad data for the communicator's status and gives the error to return.
    pub fn report(&self, rank: i32, fault: DataFault) -> Error {
        self.board.report(PlanFault { rank, plan: self.plan, fault })
    }

    /// The same for what this rank met in its own shard, if anything.
    pub fn report_own(&self, fault: Option<DataFault>) -> Result<()> {
        fault.map_or(Ok(()), |fault| Err(self.report(self.shard.rank, fault)))
    }
}

/// Which call a step belongs to, for its fingerprint.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Call {
    /// A decode step of so many sequences.
    Decode(i32),
    /// Partials that the engine made.
    Merge,
    /// A decode step of so many sequences that all ranks must run on so many threads, since the bits of a rank depend on that.
    DecodeOn(i32, usize),
    /// The check of a decode step of so many sequences, on GPUs.
    Check(i32),
    /// The gather of the queries of a decode step of so many sequences, on GPUs.
    Queries(i32),
}

impl Call {
    /// What tells calls of different kinds apart.
    pub fn words(self) -> [u64; 2] {
        match self {
            Call::Decode(batch) => [1, batch as u64],
            Call::Merge => [2, 0],
            Call::DecodeOn(batch, threads) => [3, batch as u64 | (threads as u64) << 32],
            Call::Check(batch) => [4, batch as u64],
            Call::Queries(batch) => [5, batch as u64],
        }
    }

    /// What messages tell of a step of so many query tokens. Sizes are not negative.
    pub fn told(self, plan: u64, query_tokens: usize) -> CallWord {
        let query_tokens = query_tokens as u64;
        match self {
            Call::Decode(batch) | Call::Check(batch) | Call::Queries(batch) => {
                CallWord::decode(plan, batch as u64, query_tokens)
            }
            Call::Merge => CallWord::merge(plan, query_tokens),
            Call::DecodeOn(batch, threads) => {
                CallWord::decode(plan, batch as u64, query_tokens).on_threads(threads as u64)
            }
        }
    }
}

/// FNV-1a over the words that all ranks must agree on.
pub(crate) fn fingerprint(words: &[u64]) -> u64 {
    words
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}
