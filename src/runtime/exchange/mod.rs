//! The exchange algorithms on CPU ranks: from one partial a rank to the merged output.
//!
//! | algorithm | moves | what happens |
//! |---|---|---|
//! | `ONE_SHOT` | 1 round | every rank publishes its partial and merges those of all, in rank order |
//! | `TWO_SHOT` | 2 rounds | every rank merges its own heads of all partials, then the merged heads go round |
//! | `TREE` | hops | two partials at a time along [`Tree`](crate::comm::Tree): within nodes, between them, back |
//! | `ALLREDUCE3` | 3 allreduces | the paper's: the largest lse, then the sums of numerators and of denominators |
//! | `RING` | 1 round, p - 1 hops | keys and values go round instead of partials; every rank attends all blocks |
//!
//! [`begin`] opens the step; [`run`] picks the algorithm. The partial lies in [`Scratch`], `lse` before `o`, which is also
//! how it travels as f32 (`wire`), so that `TREE` sends it from where it lies. What an algorithm needs beyond that is
//! allocated with the plan ([`Method`]). Rows that the window of a round has no room for go in several rounds; hops are of
//! any size. A rank's own state goes through the wire type like its peers', so that all ranks hold the same bits.
//!
//! Bytes and messages are counted as the algorithm's own: partials, keys and values, not headers and, with `RING`, not the
//! lengths that its round tells. Where ranks share memory, a rank that reads a part of what lies there moved that part;
//! over a transport's allgather all of it moved.

mod allreduce;
mod one_shot;
mod ring;
mod tree;
mod wire;

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::communicator::CommCore;
use super::plan::{PlanCore, zeroed};
use crate::attention::{Algorithm, AttentionDesc, Dtype, OutputMode};
use crate::comm::{RoundHeader, Rounds, Tree};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::{DataFault, RowTarget, merge_two};
pub(super) use ring::{Ring, decode as decode_ring};
pub(super) use wire::Wire;

/// Elements of partials above which all workers of a rank share a merge.
const PARALLEL_MERGE: usize = 1 << 17;

/// The rank that met bad data, and what it met.
pub(super) type Found = Option<(i32, DataFault)>;

/// An algorithm with what it needs of a plan.
pub(super) enum Method {
    /// Nothing is exchanged.
    None,
    OneShot,
    TwoShot,
    Tree(Tree),
    Allreduce3,
    Ring(Box<Ring>),
    /// GPUs write into each other's memory ([`GpuExchange`](super::peer::GpuExchange)).
    Windows,
}

/// This rank's partial and what algorithms need beside it.
#[derive(Default)]
pub(super) struct Scratch {
    /// The lse of the step's rows, then their o; with `RING` as often as it keeps partials.
    pub partial: Vec<f32>,
    /// Two rows a worker: a received row made f32, and the merged one.
    pub rows: Vec<f32>,
    /// A partial in the wire type, to send; empty where that is f32.
    outgoing: Vec<f32>,
    /// A peer's partial; for `TWO_SHOT` the merged rows of this rank's heads, for `ALLREDUCE3` the largest lse and the
    /// denominators.
    incoming: Vec<f32>,
}

/// One exchanging step of one rank.
pub(super) struct Meeting<'a> {
    pub plan: &'a PlanCore,
    pub tokens: usize,
    pub output: &'a RowTarget,
    rounds: &'a dyn Rounds,
    header: RoundHeader,
}

impl Scratch {
    /// Room for `rows` partials of the plan's algorithm.
    pub fn new(
        desc: &AttentionDesc,
        method: &Method,
        rows: usize,
        own_heads: usize,
        workers: usize,
    ) -> Result<Scratch> {
        let dim = desc.head_dim_v as usize;
        let partial = rows.checked_mul(dim + 1).and_then(|floats| floats.checked_mul(method.partials()));
        let words = (Wire::of(desc).row_bytes() + 4).checked_mul(rows).map(|bytes| bytes.div_ceil(4));
        let narrow = desc.wire_dtype != Dtype::F32;
        let (outgoing, incoming) = match method {
            Method::Tree(_) if narrow => (words, words),
            Method::Tree(_) => (Some(0), words),
            Method::Allreduce3 => (Some(0), rows.checked_mul(2)),
            Method::TwoShot => (Some(0), (rows / desc.q_heads as usize * own_heads).checked_mul(dim + 1)),
            Method::None | Method::OneShot | Method::Ring(_) | Method::Windows => (Some(0), Some(0)),
        };
        Ok(Scratch {
            partial: zeroed("max_query_tokens x q_heads x head_dim_v", partial)?,
            rows: zeroed("workers x head_dim_v", workers.checked_mul(2 * dim))?,
            outgoing: zeroed("max_query_tokens x q_heads x head_dim_v", outgoing)?,
            incoming: zeroed("max_query_tokens x q_heads x head_dim_v", incoming)?,
        })
    }

    /// Bytes of everything.
    pub fn bytes(&self) -> usize {
        4 * self.rows.len() + self.exchange_bytes()
    }

    /// Bytes of the partials, own and received.
    pub fn exchange_bytes(&self) -> usize {
        4 * (self.partial.len() + self.outgoing.len() + self.incoming.len())
    }

    /// The lse and o of this step's rows.
    pub fn partial(&mut self, rows: usize, dim: usize) -> (&mut [f32], &mut [f32]) {
        self.partial[..rows * (dim + 1)].split_at_mut(rows)
    }
}

impl Wire {
    /// The wire of a shape.
    pub fn of(desc: &AttentionDesc) -> Wire {
        Wire { dtype: desc.wire_dtype, dim: desc.head_dim_v as usize }
    }
}

impl Method {
    /// What `desc` asks for on a communicator, with the reason; `Unsupported` where it has not got what that needs.
    pub fn choose(desc: &AttentionDesc, comm: &CommCore) -> Result<(Method, &'static str)> {
        let shard = comm.shard();
        if desc.output == OutputMode::Local {
            return Ok((Method::None, "local output: nothing to exchange"));
        }
        if shard.world == 1 {
            return Ok((Method::None, "one rank: nothing to exchange"));
        }
        if comm.end.gpus().is_some() && desc.algorithm != Algorithm::Allreduce3 {
            // Its kernels do it.
            return Ok((Method::Windows, ""));
        }
        let Some(exchange) = comm.end.rounds() else {
            return Ok((Method::Allreduce3, "asked for"));
        };
        if matches!(desc.algorithm, Algorithm::Tree | Algorithm::Ring) && !exchange.has_hops() {
            let wanted = "AUTO, ONE_SHOT, TWO_SHOT or ALLREDUCE3: the engine's transport has no sendrecv";
            return Err(Error::unsupported("algorithm", desc.algorithm.name(), wanted));
        }
        let method = match desc.algorithm {
            Algorithm::Auto | Algorithm::OneShot => Method::OneShot,
            Algorithm::TwoShot => Method::TwoShot,
            Algorithm::Tree => Method::Tree(Tree::new(&comm.nodes, shard.rank as usize)),
            Algorithm::Allreduce3 => Method::Allreduce3,
            Algorithm::Ring => {
                let (threads, isa) = (comm.workers.threads(), comm.runtime.cpu_isa());
                Method::Ring(Box::new(Ring::new(desc, shard, exchange.capacity(), threads, isa)?))
            }
        };
        let reason = match (desc.algorithm, desc.output) {
            (Algorithm::Auto, OutputMode::Scattered) if exchange.reads_in_place() => {
                "ranks share memory: each reads its own heads of every partial in place"
            }
            (Algorithm::Auto, _) if exchange.reads_in_place() => {
                "ranks share memory: every partial is read in place, so one round has the fewest steps"
            }
            (Algorithm::Auto, _) => "one allgather of the engine's transport has the fewest steps",
            _ => "asked for",
        };
        Ok((method, reason))
    }

    /// Partials that a rank keeps of a step.
    fn partials(&self) -> usize {
        match self {
            Method::Ring(ring) => ring.partials(),
            _ => 1,
        }
    }

    /// Bytes beside the partials: those that the exchange works on, and others.
    pub fn bytes(&self) -> (usize, usize) {
        match self {
            Method::Ring(ring) => (ring.block_bytes(), ring.other_bytes()),
            _ => (0, 0),
        }
    }

    /// The algorithm in use; where nothing is exchanged, the one asked for.
    pub fn algorithm(&self, asked: Algorithm) -> Algorithm {
        match self {
            Method::None if asked == Algorithm::Auto => Algorithm::OneShot,
            Method::None => asked,
            Method::OneShot | Method::Windows => Algorithm::OneShot,
            Method::TwoShot => Algorithm::TwoShot,
            Method::Tree(_) => Algorithm::Tree,
            Method::Allreduce3 => Algorithm::Allreduce3,
            Method::Ring(_) => Algorithm::Ring,
        }
    }
}

/// Opens a step of `plan`: `kind` tells steps of different calls and sizes apart.
pub(super) fn begin<'a>(
    plan: &'a PlanCore,
    tokens: usize,
    output: &'a RowTarget,
    fault: Option<DataFault>,
    kind: [u64; 3],
) -> Result<Meeting<'a>> {
    let call = plan.comm.calls.fetch_add(1, Ordering::Relaxed);
    let fingerprint = fingerprint(&[plan.id, call, kind[0], kind[1], kind[2]]);
    let Some(rounds) = plan.comm.end.rounds() else {
        return Err(Error::new(ErrorKind::Internal, "plan: a CPU step of a rank on a GPU"));
    };
    rounds.open(fingerprint)?;
    let fault = fault.map_or(0, |fault| fault.word(plan.shard.rank));
    Ok(Meeting { plan, tokens, output, rounds, header: RoundHeader { fingerprint, fault } })
}

/// Exchanges the partial of `scratch` and writes the merged output. Gives the first rank's bad data, if any.
pub(super) fn run(meeting: &Meeting<'_>, scratch: &mut Scratch) -> Result<Found> {
    match &meeting.plan.method {
        Method::OneShot => one_shot::one_shot(meeting, scratch),
        Method::TwoShot if meeting.plan.desc.output == OutputMode::Scattered => one_shot::one_shot(meeting, scratch),
        Method::TwoShot => one_shot::two_shot(meeting, scratch),
        Method::Tree(tree) => tree::run(meeting, tree, scratch),
        Method::Allreduce3 => allreduce::run(meeting, scratch),
        Method::None | Method::Ring(_) | Method::Windows => {
            let wanted = "an algorithm that exchanges partials";
            Err(Error::unsupported("algorithm", meeting.plan.desc.algorithm.name(), wanted))
        }
    }
}

impl Meeting<'_> {
    fn exchange(&self) -> &dyn Rounds {
        self.rounds
    }

    fn world(&self) -> usize {
        self.plan.shard.world as usize
    }

    fn rank(&self) -> usize {
        self.plan.shard.rank as usize
    }

    fn heads(&self) -> usize {
        self.plan.desc.q_heads as usize
    }

    fn rows(&self) -> usize {
        self.tokens * self.heads()
    }

    fn dim(&self) -> usize {
        self.plan.wire.dim
    }

    fn count(&self, rounds: usize, messages: usize, bytes: usize) {
        let counters = &self.plan.counters;
        counters.rounds.fetch_add(rounds as u64, Ordering::Relaxed);
        counters.messages.fetch_add(messages as u64, Ordering::Relaxed);
        counters.bytes_sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Writes row `row` of the step, if it is one of this rank's.
    fn write(&self, row: usize, o: &[f32], lse: f32) {
        let (token, head, own) = (row / self.heads(), row % self.heads(), &self.plan.heads);
        if own.contains(&head) {
            // SAFETY: the output was resolved for this rank's heads; rows are written by one worker each.
            unsafe { self.output.write(token, head - own.start, o, lse) };
        }
    }

    /// Merges the partial `theirs`, as it came over `wire`, into `partial`.
    fn merge(&self, wire: Wire, partial: &mut [f32], theirs: &[u8], spare: &mut [f32]) -> Result<()> {
        let (rows, dim) = (self.rows(), self.dim());
        let base = partial.as_mut_ptr() as usize;
        assert!(partial.len() >= rows * (dim + 1));
        self.share(rows, 2 * rows * dim, spare, &|part, spare| {
            for row in part {
                // SAFETY: every row is one worker's: its lse, and its o behind those of all rows.
                let (lse, o) = unsafe {
                    let base = base as *mut f32;
                    (&mut *base.add(row), std::slice::from_raw_parts_mut(base.add(rows + row * dim), dim))
                };
                let their_lse = wire.lse(theirs, rows)[row];
                match wire.o(theirs, rows, row, &mut spare[..dim]) {
                    Some(their_o) => merge_two(o, lse, their_o, their_lse),
                    None => merge_two(o, lse, &spare[..dim], their_lse),
                }
            }
        })
    }

    /// Calls `work` for parts of `0..rows`, on all workers where there is much to do, each with two rows of its own.
    fn share(&self, rows: usize, cost: usize, spare: &mut [f32], work: &Work<'_>) -> Result<()> {
        let (workers, dim) = (&self.plan.comm.workers, self.dim());
        let parts = workers.threads();
        if parts == 1 || cost < PARALLEL_MERGE {
            work(0..rows, &mut spare[..2 * dim]);
            return Ok(());
        }
        let base = spare.as_mut_ptr() as usize;
        workers.run(&|part| {
            // SAFETY: `spare` holds two rows a worker, and each worker takes its own.
            let own = unsafe { std::slice::from_raw_parts_mut((base as *mut f32).add(part * 2 * dim), 2 * dim) };
            work(part * rows / parts..(part + 1) * rows / parts, own);
        })
    }
}

/// What a worker does with some rows.
type Work<'a> = dyn Fn(Range<usize>, &mut [f32]) + Sync + 'a;

/// Of two fault words that of the lower rank.
fn first_fault(a: u64, b: u64) -> u64 {
    match (DataFault::from_word(a), DataFault::from_word(b)) {
        (Some((rank, _)), Some((other, _))) if other < rank => b,
        (None, _) => b,
        _ => a,
    }
}

/// FNV-1a over the words that all ranks must agree on.
pub(super) fn fingerprint(words: &[u64]) -> u64 {
    words
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partial::DataFaultCause;

    #[test]
    fn the_bad_data_of_the_lowest_rank_wins() {
        let fault = DataFault { sequence: i32::MAX, cause: DataFaultCause::Position };
        let word = |rank| fault.word(rank);
        for (a, b, lowest) in [(0, 0, 0), (word(2), 0, word(2)), (0, word(2), word(2)), (word(7), word(2), word(2))] {
            assert_eq!((first_fault(a, b), first_fault(b, a)), (lowest, lowest));
        }
    }
}
