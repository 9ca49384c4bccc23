//! `RING`: blocks of keys and values go round, and every rank attends them all. The baseline that trees are compared with.
//!
//! 1. A round tells every rank how many keys each rank holds of each sequence, and what bad data it met.
//! 2. Every rank packs its keys and values into a block: the positions of keys where they travel, then keys and values of
//!    all sequences without gaps, those with the wider elements first. Every layout can be packed.
//! 3. p - 1 hops: a rank sends the block that it has to its lower neighbour and receives that of its upper one into its
//!    second block, while it attends the one that it has; then the two change places.
//!
//! A rank attends its own block packed, too, sequence after sequence, as all other ranks do; and partials merge along the
//! one bracketing of [`Order`], whatever the order in which blocks come, as soon as two neighbours are there. So all ranks
//! end with the same bits, provided that they have equally many threads and the same instruction set, which creating the
//! plan checks.

use std::time::Instant;

use parking_lot::Mutex;

use super::super::plan::PlanCore;
use super::{Found, Meeting, Scratch, Wire, begin, wire};
use crate::attention::{AttentionDesc, DecodeArgs, Dtype, KvLayout, Placement, Shard, Step, Tensor};
use crate::comm::{Hop, Round};
use crate::cpu::{CpuBackend, Held, Isa};
use crate::device::HostBuffer;
use crate::error::{Error, ErrorKind, Result};
use crate::partial::{DataFault, PartialRows, RowTarget};

/// Bytes that a rank tells of a sequence: its keys (-1 for bad data) and the position of the first.
const TOLD: usize = 8;

/// What a ring needs of a plan.
pub(in crate::runtime) struct Ring {
    /// Attends one sequence of a block.
    backend: CpuBackend,
    order: Order,
    block: Block,
    state: Mutex<State>,
}

struct State {
    own: Vec<Held>,
    /// What all ranks told, rank by rank.
    told: Vec<[i32; 2]>,
    blocks: [HostBuffer; 2],
}

/// How a token lies in a block.
#[derive(Clone, Copy)]
struct Block {
    /// Whether positions travel: 4 bytes a token.
    positions: bool,
    /// Bytes of a token's keys and of its values.
    token: [usize; 2],
    /// Whether values come first.
    values_first: bool,
}

/// Where the partial of each block goes, and when partials merge: the bracketing that halves the ranks, the lower half
/// being the larger.
struct Order {
    /// By visit: the slot for the partial of the block that has come.
    slots: Vec<usize>,
    /// Visit, slot to merge into, slot to free.
    merges: Vec<(usize, usize, usize)>,
    count: usize,
}

impl Order {
    fn new(world: usize, rank: usize) -> Order {
        let mut order = Order { slots: Vec::new(), merges: Vec::new(), count: 0 };
        let mut held: Vec<(usize, usize, usize)> = Vec::new();
        for visit in 0..world {
            let origin = (rank + visit) % world;
            let slot = (0..).find(|slot| held.iter().all(|node| node.2 != *slot)).unwrap_or(0);
            order.slots.push(slot);
            order.count = order.count.max(slot + 1);
            let mut node = (origin, origin + 1, slot);
            while let Some((low, high)) = sibling(world, (node.0, node.1)) {
                let Some(place) = held.iter().position(|other| (other.0, other.1) == (low, high)) else { break };
                let other = held.swap_remove(place);
                order.merges.push((visit, node.2, other.2));
                node = (node.0.min(low), node.1.max(high), node.2);
            }
            held.push(node);
        }
        order
    }

    /// The slot of the merged partial of all ranks.
    fn last(&self) -> usize {
        self.slots.last().copied().unwrap_or(0)
    }
}

/// The other half of what the ranks `node` are a half of.
fn sibling(world: usize, node: (usize, usize)) -> Option<(usize, usize)> {
    let (mut low, mut high) = (0, world);
    while (low, high) != node {
        let middle = low + (high - low).div_ceil(2);
        if node == (low, middle) {
            return Some((middle, high));
        }
        if node == (middle, high) {
            return Some((low, middle));
        }
        (low, high) = if node.0 < middle { (low, middle) } else { (middle, high) };
    }
    None
}

impl Block {
    fn new(desc: &AttentionDesc) -> Block {
        let heads = desc.kv_heads as usize;
        let (k, v) = (desc.k_dtype.size(), desc.v_dtype.size());
        Block {
            positions: desc.causal && desc.placement == Placement::Explicit,
            token: [heads * desc.head_dim_qk as usize * k, heads * desc.head_dim_v as usize * v],
            values_first: v > k,
        }
    }

    /// Bytes of a block of that many tokens; none where that overflows.
    fn bytes(&self, tokens: usize) -> Option<usize> {
        tokens.checked_mul(self.token[0].checked_add(self.token[1])? + if self.positions { 4 } else { 0 })
    }

    /// Where keys and values begin.
    fn begin(&self, tokens: usize) -> [usize; 2] {
        let head = if self.positions { 4 * tokens } else { 0 };
        if self.values_first { [head + tokens * self.token[1], head] } else { [head, head + tokens * self.token[0]] }
    }
}

impl Ring {
    /// What `desc` needs on `shard`; a round carries `capacity` bytes.
    pub fn new(desc: &AttentionDesc, shard: Shard, capacity: usize, threads: usize, isa: Isa) -> Result<Ring> {
        if desc.is_merge_only() {
            let wanted = "an algorithm that exchanges partials: a merge-only plan has no keys to pass round";
            return Err(Error::unsupported("algorithm", desc.algorithm.name(), wanted));
        }
        let batch = desc.max_batch as usize;
        if batch > capacity / TOLD {
            return Err(Error::unsupported("max_batch", batch, format!("at most {} with RING", capacity / TOLD)));
        }
        let one = AttentionDesc { kv_layout: KvLayout::Strided, page_size: 0, max_batch: 1, ..*desc };
        let block = Block::new(desc);
        let bytes = batch.checked_mul(desc.max_kv_length as usize).and_then(|tokens| block.bytes(tokens));
        let bytes = bytes.ok_or_else(|| {
            Error::new(
                ErrorKind::NoMemory,
                "max_batch x max_kv_length: a block of keys and values does not fit 64 bits",
            )
        })?;
        let world = shard.world as usize;
        let state = State {
            own: filled(batch, Held::default())?,
            told: filled(batch * world, [0; 2])?,
            blocks: [HostBuffer::new(bytes)?, HostBuffer::new(bytes)?],
        };
        Ok(Ring {
            backend: CpuBackend::new(&one, shard, threads, isa)?,
            order: Order::new(world, shard.rank as usize),
            block,
            state: Mutex::new(state),
        })
    }

    /// Partials that are kept at most.
    pub fn partials(&self) -> usize {
        self.order.count
    }

    /// Bytes of both blocks.
    pub fn block_bytes(&self) -> usize {
        self.state.lock().blocks.iter().map(HostBuffer::len).sum()
    }

    /// Bytes beside blocks and partials.
    pub fn other_bytes(&self) -> usize {
        let state = self.state.lock();
        self.backend.memory() + size_of_val(&*state.own) + size_of_val(&*state.told)
    }
}

/// So many of `value`, or `NoMemory`.
fn filled<T: Clone>(count: usize, value: T) -> Result<Vec<T>> {
    let mut all = Vec::new();
    all.try_reserve_exact(count).map_err(|_| {
        Error::new(ErrorKind::NoMemory, format!("max_batch x ranks: found {count}, wanted what memory has room for"))
    })?;
    all.resize(count, value);
    Ok(all)
}

/// A decode step by ring.
pub(in crate::runtime) fn decode(
    plan: &PlanCore,
    (ring, backend): (&Ring, &CpuBackend),
    step: &Step,
    scratch: &mut Scratch,
    output: &RowTarget,
) -> Result<Found> {
    let (batch, tokens) = (step.args.batch as usize, step.args.query_tokens as usize);
    let mut state = ring.state.lock();
    let State { own, told, blocks } = &mut *state;
    let own = &mut own[..batch];
    let fault = backend.survey(step, own)?;
    let meeting = begin(plan, tokens, output, fault, [3, batch as u64, tokens as u64])?;
    let found = tell(&meeting, own, &mut told[..batch * meeting.world()])?;
    let told = &told[..batch * meeting.world()];
    let visit = Visit { meeting: &meeting, ring, step, own, told };
    let (world, rank) = (meeting.world(), meeting.rank());
    visit.check()?;
    let [mut here, mut next] = blocks.each_mut();
    visit.pack(backend, bytes_of(here))?;
    let Scratch { partial, rows: spare, .. } = scratch;
    for turn in 0..world {
        let origin = (rank + turn) % world;
        let size = visit.bytes(origin);
        let block = &bytes_of(here)[..size];
        let mut attend = || visit.attend(origin, block, partial);
        if turn + 1 < world {
            let hop = Hop {
                index: turn as u32,
                to: (rank + world - 1) % world,
                from: (rank + 1) % world,
                header: meeting.header,
                until: Instant::now() + meeting.exchange().step_timeout(),
            };
            let recv = &mut bytes_of(next)[..visit.bytes((origin + 1) % world)];
            meeting.exchange().hop(&hop, block, recv, &mut attend)?;
            meeting.count(1, usize::from(size > 0), size);
        } else {
            attend()?;
        }
        visit.merge(turn, partial, spare)?;
        std::mem::swap(&mut here, &mut next);
    }
    visit.write(partial);
    Ok(found)
}

/// The round that tells lengths. Gives the first rank's bad data.
fn tell(meeting: &Meeting<'_>, own: &[Held], told: &mut [[i32; 2]]) -> Result<Found> {
    let mut found = None;
    let mut fill = |slot: &mut [u8]| {
        for (to, held) in slot.chunks_exact_mut(TOLD).zip(own) {
            // Without queries nothing need travel.
            let keys = held.keys.map_or(-1, |keys| if held.tokens > 0 { keys as i32 } else { 0 });
            to[..4].copy_from_slice(&keys.to_ne_bytes());
            to[4..].copy_from_slice(&(held.start as i32).to_ne_bytes());
        }
    };
    let mut take = |round: &dyn Round| {
        for rank in 0..meeting.world() {
            found = found.or_else(|| DataFault::from_word(round.fault(rank)));
            let theirs = &mut told[rank * own.len()..][..own.len()];
            for (to, from) in theirs.iter_mut().zip(round.payload(rank).chunks_exact(TOLD)) {
                let word = |i: usize| i32::from_ne_bytes([from[i], from[i + 1], from[i + 2], from[i + 3]]);
                *to = [word(0), word(4)];
            }
        }
    };
    meeting.exchange().round(meeting.header, own.len() * TOLD, &mut fill, &mut take)?;
    meeting.count(1, 0, 0);
    Ok(found)
}

/// One step's view of the ring.
struct Visit<'a> {
    meeting: &'a Meeting<'a>,
    ring: &'a Ring,
    step: &'a Step,
    own: &'a [Held],
    told: &'a [[i32; 2]],
}

impl Visit<'_> {
    fn told(&self, origin: usize) -> &[[i32; 2]] {
        &self.told[origin * self.own.len()..][..self.own.len()]
    }

    /// Tokens of a rank's block.
    fn tokens(&self, origin: usize) -> usize {
        self.told(origin).iter().map(|told| told[0].max(0) as usize).sum()
    }

    fn bytes(&self, origin: usize) -> usize {
        self.ring.block.bytes(self.tokens(origin)).unwrap_or(usize::MAX)
    }

    /// Peers hold what the plan has room for.
    fn check(&self) -> Result<()> {
        let desc = &self.meeting.plan.desc;
        for origin in 0..self.meeting.world() {
            if let Some(told) = self.told(origin).iter().find(|told| told[0] > desc.max_kv_length) {
                let message =
                    format!("kv_length: rank {origin} told {}, above the plan's {}", told[0], desc.max_kv_length);
                return Err(Error::new(ErrorKind::Desync, message).with_rank(origin as i32));
            }
        }
        Ok(())
    }

    /// This rank's keys and values, into a block.
    fn pack(&self, backend: &CpuBackend, block: &mut [u8]) -> Result<()> {
        let (rank, layout) = (self.meeting.rank(), self.ring.block);
        let tokens = self.tokens(rank);
        let size = self.bytes(rank);
        let (positions, rest) = block[..size].split_at_mut(if layout.positions { 4 * tokens } else { 0 });
        let (mut k, mut v) = if layout.values_first {
            let (v, k) = rest.split_at_mut(tokens * layout.token[1]);
            (k, v)
        } else {
            rest.split_at_mut(tokens * layout.token[0])
        };
        let mut first = 0;
        for (b, told) in self.told(rank).iter().enumerate() {
            let keys = told[0].max(0) as usize;
            let (own_k, rest_k) = k.split_at_mut(keys * layout.token[0]);
            let (own_v, rest_v) = v.split_at_mut(keys * layout.token[1]);
            (k, v) = (rest_k, rest_v);
            if keys > 0 {
                backend.pack(self.step, &self.meeting.plan.comm.workers, b, own_k, own_v)?;
                if layout.positions {
                    let to = wire::ints_mut(&mut positions[4 * first..][..4 * keys]);
                    backend.pack_positions(self.step, b, to);
                }
            }
            first += keys;
        }
        Ok(())
    }

    /// Attends the block of `origin`, sequence after sequence, into its slot of `partial`.
    fn attend(&self, origin: usize, block: &[u8], partial: &mut [f32]) -> Result<()> {
        let (meeting, ring, step) = (self.meeting, self.ring, self.step);
        let desc = &meeting.plan.desc;
        let (rows, dim, heads) = (meeting.rows(), meeting.dim(), meeting.heads());
        let turn = (origin + meeting.world() - meeting.rank()) % meeting.world();
        let slot = ring.order.slots[turn];
        let (lse, o) = partial[slot * rows * (dim + 1)..][..rows * (dim + 1)].split_at_mut(rows);
        lse.fill(f32::NEG_INFINITY);
        o.fill(0.0);
        let all = self.tokens(origin);
        let [k_begin, v_begin] = ring.block.begin(all);
        let mut first = 0;
        for (b, (&[keys, start], held)) in self.told(origin).iter().zip(self.own).enumerate() {
            let own = held.first_token * heads..(held.first_token + held.tokens) * heads;
            if keys < 0 {
                lse[own.clone()].fill(f32::NAN);
                o[own.start * dim..own.end * dim].fill(f32::NAN);
            }
            if keys <= 0 || own.is_empty() {
                first += keys.max(0) as usize;
                continue;
            }
            let tokens = keys as usize;
            let part = |begin: usize, token: usize| Tensor {
                data: block[begin + first * token..].as_ptr().cast_mut().cast(),
                bytes: (tokens * token) as u64,
                stride: [0; 4],
            };
            let offset =
                |pointer: *const i32, by: usize| if pointer.is_null() { pointer } else { pointer.wrapping_add(by) };
            let args = DecodeArgs {
                batch: 1,
                query_tokens: held.tokens as i32,
                q: Tensor {
                    data: step.args.q.data.wrapping_byte_offset((held.first_token as i64 * step.q_stride[0]) as isize),
                    ..step.args.q
                },
                k: part(k_begin, ring.block.token[0]),
                v: part(v_begin, ring.block.token[1]),
                kv_length: &keys,
                global_length: offset(step.args.global_length, b),
                kv_start: &start,
                kv_position: if ring.block.positions { block[4 * first..].as_ptr().cast() } else { std::ptr::null() },
                query_position: offset(step.args.query_position, held.first_token),
                ..DecodeArgs::default()
            };
            let packed = |dim: i32, dtype: Dtype| {
                let (size, dim, heads) = (dtype.size() as i64, i64::from(dim), i64::from(desc.kv_heads));
                [i64::from(keys) * heads * dim * size, heads * dim * size, dim * size, size]
            };
            let block_step = Step {
                args,
                k_stride: packed(desc.head_dim_qk, desc.k_dtype),
                v_stride: packed(desc.head_dim_v, desc.v_dtype),
                kv_capacity: i64::from(keys),
                ..*step
            };
            let rows = PartialRows { o: &mut o[own.start * dim..own.end * dim], lse: &mut lse[own], dim };
            let shard = Shard { rank: origin as i32, ..meeting.plan.shard };
            let fault = ring.backend.attend_shard(shard, &block_step, &meeting.plan.comm.workers, rows)?;
            if fault.is_some() {
                let message =
                    format!("block of rank {origin}: found bad data in sequence {b}, which its rank had checked");
                return Err(Error::new(ErrorKind::Internal, message));
            }
            first += tokens;
        }
        Ok(())
    }

    /// Merges what can be merged once block number `turn` has come.
    fn merge(&self, turn: usize, partial: &mut [f32], spare: &mut [f32]) -> Result<()> {
        let (rows, dim) = (self.meeting.rows(), self.meeting.dim());
        let size = rows * (dim + 1);
        let f32s = Wire { dtype: Dtype::F32, dim };
        for &(visit, into, from) in &self.ring.order.merges {
            if visit != turn {
                continue;
            }
            let (low, high) = partial.split_at_mut(into.max(from) * size);
            let (into, from) = if into < from {
                (&mut low[into * size..][..size], &high[..size])
            } else {
                (&mut high[..size], &low[from * size..][..size])
            };
            self.meeting.merge(f32s, into, wire::bytes(from), spare)?;
        }
        Ok(())
    }

    /// Writes the merged rows.
    fn write(&self, partial: &[f32]) {
        let (rows, dim) = (self.meeting.rows(), self.meeting.dim());
        let (lse, o) = partial[self.ring.order.last() * rows * (dim + 1)..][..rows * (dim + 1)].split_at(rows);
        for (row, &lse) in lse.iter().enumerate() {
            self.meeting.write(row, &o[row * dim..][..dim], lse);
        }
    }
}

/// A buffer's bytes.
fn bytes_of(buffer: &mut HostBuffer) -> &mut [u8] {
    // SAFETY: the buffer is this long and initialised; the exclusive borrow makes this the only use of it.
    unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr(), buffer.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_in_any_order_merge_in_one_bracketing() {
        for world in 1..=40 {
            let mut brackets = Vec::new();
            for rank in 0..world {
                let order = Order::new(world, rank);
                let mut slots = vec![String::new(); order.count];
                for visit in 0..world {
                    slots[order.slots[visit]] = ((rank + visit) % world).to_string();
                    for &(_, into, from) in order.merges.iter().filter(|merge| merge.0 == visit) {
                        // Merging is commutative: the one with the lower ranks is written first.
                        let mut both = [slots[into].clone(), slots[from].clone()];
                        both.sort_by_key(|text| {
                            text.trim_matches(['(', ')'])
                                .split(' ')
                                .next()
                                .unwrap()
                                .replace('(', "")
                                .parse::<usize>()
                                .unwrap()
                        });
                        slots[into] = format!("({} {})", both[0], both[1]);
                    }
                }
                brackets.push(slots[order.last()].clone());
                assert!(
                    order.count <= 2 * crate::comm::log2(world) as usize + 1,
                    "{world} ranks: {} slots",
                    order.count
                );
            }
            assert!(brackets.iter().all(|b| *b == brackets[0]), "{brackets:?}");
            assert_eq!(brackets[0].matches(' ').count(), world - 1);
        }
        assert_eq!(Order::new(2, 1).count, 2);
    }
}
