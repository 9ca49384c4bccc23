//! One step of a ring.

use std::time::Instant;

use super::block::{Block, POSITION, SCALE};
use super::order::Order;
use crate::attention::{DecodeArgs, Dtype, Mask, MaskElement, Shard, Step, Tensor};
use crate::comm::{Hop, Round};
use crate::cpu::{CpuBackend, Held};
use crate::device::HostBuffer;
use crate::error::{Error, ErrorKind, Result};
use crate::partial::{DataFault, DataFaultCause, Lse, PartialRows, sinks};
use crate::route::host::exchange::{Exchange, RankFault};
use crate::route::host::scratch::{Scratch, floats, split_rows};
use crate::route::host::wire::{self, Wire};

/// Bytes that a rank announces of a sequence.
pub(super) const ANNOUNCED_BYTES: usize = 12;

/// What a rank announces of a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Announced {
    /// Its keys; -1 for bad data.
    pub keys: i32,
    /// The position of the first.
    pub start: i32,
    /// Whether its keys and its values have scales, which is the same of all sequences of a step.
    pub scaled: [bool; 2],
    /// What is wrong with its queries' positions on a rank without keys, should there be keys elsewhere.
    pub idle_fault: Option<DataFaultCause>,
}

/// A step whose lengths all ranks know.
pub(super) struct RingStep<'a> {
    pub exchange: &'a Exchange<'a>,
    pub order: &'a Order,
    pub block: Block,
    /// Attends one sequence of a block.
    pub backend: &'a CpuBackend,
    pub step: &'a Step,
    /// What this rank holds of each sequence.
    pub own: &'a [Held],
    /// What all ranks announced, rank by rank.
    pub announced: &'a [Announced],
}

impl RingStep<'_> {
    /// The round in which all ranks announce what they hold. Gives the first rank's bad data. Of a sequence with bad data on
    /// some rank no keys are left, so that none meet positions that its rank could not read.
    pub fn announce(
        exchange: &Exchange<'_>,
        step: &Step,
        own: &[Held],
        announced: &mut [Announced],
    ) -> Result<RankFault> {
        let mut found = None;
        let mut fill = |slot: &mut [u8]| {
            for (to, held) in slot.chunks_exact_mut(ANNOUNCED_BYTES).zip(own) {
                // Without queries nothing need travel.
                let keys = held.keys.map_or(-1, |keys| if held.tokens > 0 { keys as i32 } else { 0 });
                to[..4].copy_from_slice(&keys.to_ne_bytes());
                to[4..8].copy_from_slice(&(held.start as i32).to_ne_bytes());
                let scaled = step.scaled().map(i32::from);
                let idle = held.idle_fault.map_or(0, |fault| fault.cause as i32);
                to[8..].copy_from_slice(&(scaled[0] | scaled[1] << 1 | idle << 8).to_ne_bytes());
            }
        };
        let mut take = |round: &dyn Round| {
            found = exchange.first_fault(round);
            for rank in 0..exchange.world() {
                let theirs = &mut announced[rank * own.len()..][..own.len()];
                for (to, from) in theirs.iter_mut().zip(round.payload(rank).chunks_exact(ANNOUNCED_BYTES)) {
                    let word = |i: usize| i32::from_ne_bytes([from[i], from[i + 1], from[i + 2], from[i + 3]]);
                    let scaled = [word(8) & 1 != 0, word(8) & 2 != 0];
                    let idle_fault = DataFaultCause::from_code((word(8) >> 8) as u8);
                    *to = Announced { keys: word(0), start: word(4), scaled, idle_fault };
                }
            }
        };
        exchange.rounds().round(exchange.header, own.len() * ANNOUNCED_BYTES, &mut fill, &mut take)?;
        exchange.count(1, 0, 0);
        let idle = drop_bad_sequences(announced, own.len());
        let me = exchange.me() as i32;
        let told = |(rank, fault): (i32, DataFault)| {
            let held = own[fault.sequence as usize].idle_fault.filter(|_| rank == me);
            (rank, held.unwrap_or(fault))
        };
        Ok(found.or(idle.map(told)))
    }

    /// Packs this rank's block, passes blocks round and writes the merged rows.
    ///
    /// # Safety
    /// `shard` surveyed the step last, which gave `own`; the step's inputs stay readable, and as they were, until this returns.
    pub unsafe fn run(&self, shard: &CpuBackend, blocks: &mut [HostBuffer; 2], scratch: &mut Scratch) -> Result<()> {
        let (exchange, rounds) = (self.exchange, self.exchange.rounds());
        let (world, me) = (exchange.world(), exchange.me());
        self.check()?;
        let [mut here, mut next] = blocks.each_mut();
        // SAFETY: this function was promised what `pack` asks for.
        unsafe { self.pack(shard, here.bytes_mut()) }?;
        let Scratch { partial, spare } = scratch;
        for turn in 0..world {
            let origin = (me + turn) % world;
            let size = self.bytes(origin);
            let block = &here.bytes_mut()[..size];
            // SAFETY: the step's inputs are readable, as this function was promised; the block is this rank's, packed above, or
            // the one that `origin` sent, whose size follows from what it announced.
            let mut attend = || unsafe { self.attend(origin, block, partial) };
            if turn + 1 < world {
                let hop = Hop {
                    index: turn as u32,
                    to: (me + world - 1) % world,
                    from: (me + 1) % world,
                    header: exchange.header,
                    until: Instant::now() + rounds.step_timeout(),
                };
                let recv = &mut next.bytes_mut()[..self.bytes((origin + 1) % world)];
                rounds.hop(&hop, block, recv, &mut attend)?;
                exchange.count(1, usize::from(size > 0), size);
            } else {
                attend()?;
            }
            self.merge(turn, partial, spare)?;
            std::mem::swap(&mut here, &mut next);
        }
        let rows = exchange.rows();
        let size = floats(rows, exchange.dim());
        let (lse, o) = split_rows(&mut partial[self.order.last() * size..], rows, exchange.dim());
        exchange.write_all(lse, o);
        Ok(())
    }

    /// What `origin` announced.
    fn announced_by(&self, origin: usize) -> &[Announced] {
        &self.announced[origin * self.own.len()..][..self.own.len()]
    }

    /// Tokens of a rank's block.
    fn tokens(&self, origin: usize) -> usize {
        self.announced_by(origin).iter().map(|announced| announced.keys.max(0) as usize).sum()
    }

    /// Pairs of a query token and a key in a rank's block, of the sequences before number `end`.
    fn pairs(&self, origin: usize, end: usize) -> usize {
        let sequences = self.announced_by(origin).iter().zip(self.own).take(end);
        sequences.map(|(announced, held)| announced.keys.max(0) as usize * held.tokens).sum()
    }

    /// Bytes of a rank's block.
    fn bytes(&self, origin: usize) -> usize {
        let pairs = self.pairs(origin, self.own.len());
        self.block.bytes(self.tokens(origin), pairs, self.scaled(origin)).unwrap_or(usize::MAX)
    }

    /// Whether the keys and the values of a rank's block have scales.
    fn scaled(&self, origin: usize) -> [bool; 2] {
        self.announced_by(origin).first().map_or([false; 2], |announced| announced.scaled)
    }

    /// Checks that no rank announced more keys than the plan has room for.
    fn check(&self) -> Result<()> {
        let most = self.exchange.context.desc.max_kv_length;
        for origin in 0..self.exchange.world() {
            if let Some(announced) = self.announced_by(origin).iter().find(|announced| announced.keys > most) {
                let found = announced.keys;
                let message = format!("kv_length: rank {origin} announced {found}, above the plan's {most}");
                return Err(Error::new(ErrorKind::Desync, message).with_rank(origin as i32));
            }
        }
        Ok(())
    }

    /// This rank's keys and values, into a block.
    ///
    /// # Safety
    /// As [`RingStep::run`].
    unsafe fn pack(&self, shard: &CpuBackend, block: &mut [u8]) -> Result<()> {
        let (me, layout, executor) = (self.exchange.me(), self.block, self.exchange.executor);
        let tokens = self.tokens(me);
        let size = self.bytes(me);
        let scaled = self.scaled(me);
        let (block, mut masks) = block[..size].split_at_mut(layout.mask_begin(tokens, scaled).unwrap_or(size));
        let (positions, rest) = block.split_at_mut(layout.positions * tokens);
        let (k_scales, rest) = rest.split_at_mut(if scaled[0] { tokens * layout.scales } else { 0 });
        let (v_scales, rest) = rest.split_at_mut(if scaled[1] { tokens * layout.scales } else { 0 });
        let scales = [k_scales, v_scales];
        let (mut k, mut v) = if layout.values_first {
            let (v, k) = rest.split_at_mut(tokens * layout.token[1]);
            (k, v)
        } else {
            rest.split_at_mut(tokens * layout.token[0])
        };
        let mut first = 0;
        for (b, announced) in self.announced_by(me).iter().enumerate() {
            let keys = announced.keys.max(0) as usize;
            let (own_k, rest_k) = k.split_at_mut(keys * layout.token[0]);
            let (own_v, rest_v) = v.split_at_mut(keys * layout.token[1]);
            (k, v) = (rest_k, rest_v);
            let (own_mask, rest) = masks.split_at_mut(keys * self.own[b].tokens * layout.mask);
            masks = rest;
            if keys > 0 {
                // SAFETY: `shard` surveyed this step last, and found these tokens, and as many keys or none, which is what this
                // rank announced; `own_mask` has a row for each query head and token.
                unsafe {
                    shard.pack_mask(self.step, b, self.own[b].tokens, keys, own_mask);
                    shard.pack(self.step, executor, b, own_k, own_v)?;
                }
                for which in [0, 1].into_iter().filter(|&which| scaled[which]) {
                    let to = &mut scales[which][first * layout.scales..][..keys * layout.scales];
                    // SAFETY: as above.
                    unsafe { shard.pack_scales(self.step, b, which, wire::floats_mut(to)) }?;
                }
                for row in 0..layout.positions / POSITION {
                    let begin = layout.positions * first + row * keys * POSITION;
                    let to = wire::ints_mut(&mut positions[begin..][..keys * POSITION]);
                    // SAFETY: as above; positions travel only in plans that read them, and `to` has one a key.
                    unsafe { shard.pack_positions(self.step, b, row, to) };
                }
            }
            first += keys;
        }
        Ok(())
    }

    /// Attends the block of `origin`, sequence after sequence, into its slot of `partial`.
    ///
    /// # Safety
    /// The inputs of the step are readable until this returns, and `block` is as long as what `origin` announced takes.
    unsafe fn attend(&self, origin: usize, block: &[u8], partial: &mut [f32]) -> Result<()> {
        let exchange = self.exchange;
        let (rows, dim, heads) = (exchange.rows(), exchange.dim(), exchange.heads());
        let desc = &exchange.context.desc;
        let turn = (origin + exchange.world() - exchange.me()) % exchange.world();
        let slot = self.order.slots[turn];
        let (lse, o) = split_rows(&mut partial[slot * floats(rows, dim)..], rows, dim);
        lse.fill(Lse::EMPTY);
        o.fill(0.0);
        let tokens = self.tokens(origin);
        let mut first = 0;
        for (b, (announced, held)) in self.announced_by(origin).iter().zip(self.own).enumerate() {
            let own = held.first_token * heads..(held.first_token + held.tokens) * heads;
            if announced.keys < 0 {
                lse[own.clone()].fill(Lse::NAN);
                o[own.start * dim..own.end * dim].fill(f32::NAN);
            }
            // The block of rank 0 brings the sinks, with keys or without.
            let counts = announced.keys > 0 || announced.keys == 0 && desc.sinks && sinks::belong_to(origin as i32);
            if counts && !own.is_empty() {
                let mut block_step = self.block_step(block, tokens, first, b, announced)?;
                block_step.mask = self.block_mask(block, origin, b);
                let rows = PartialRows { o: &mut o[own.start * dim..own.end * dim], lse: &mut lse[own], dim };
                let shard = Shard { rank: origin as i32, ..exchange.context.shard };
                // SAFETY: `block_step` gives keys, values, scales, positions and masks inside `block`, as many as its length
                // says, and `block_mask` likewise: slices of a borrowed block. Queries, sinks and the other numbers a query head
                // are those of the step, for tokens that it has, and readable as this function was promised.
                let fault = unsafe { self.backend.attend_shard(shard, &block_step, exchange.executor, rows) }?;
                if fault.is_some() {
                    let message =
                        format!("block of rank {origin}: found bad data in sequence {b}, which both ranks had checked");
                    return Err(Error::new(ErrorKind::Internal, message));
                }
            }
            first += announced.keys.max(0) as usize;
        }
        Ok(())
    }

    /// The step over the keys of sequence `b` in a block of `tokens` tokens, of which they are those from `first` on.
    fn block_step(&self, block: &[u8], tokens: usize, first: usize, b: usize, announced: &Announced) -> Result<Step> {
        let (step, held, desc) = (self.step, &self.own[b], &self.exchange.context.desc);
        let scaled = announced.scaled;
        let [k_begin, v_begin] = self.block.begin(tokens, scaled);
        let scale_stride = [0, self.block.scales as i64, SCALE as i64, 0];
        let keys = announced.keys as usize;
        let part = |begin: usize, token: usize| Tensor {
            data: block[begin + first * token..].as_ptr().cast_mut().cast(),
            bytes: (keys * token) as u64,
            stride: [0; 4],
        };
        let scale_begin = self.block.scales_begin(tokens, scaled);
        let scales = |which: usize| match scaled[which] {
            true => part(scale_begin[which], self.block.scales).with_strides(scale_stride),
            false => Tensor::NULL,
        };
        let offset =
            |pointer: *const i32, by: usize| if pointer.is_null() { pointer } else { pointer.wrapping_add(by) };
        let query = (held.first_token as i64 * step.q_stride[0]) as isize;
        let args = DecodeArgs {
            batch: 1,
            query_tokens: held.tokens as i32,
            q: Tensor { data: step.args.q.data.wrapping_byte_offset(query), ..step.args.q },
            k: part(k_begin, self.block.token[0]),
            v: part(v_begin, self.block.token[1]),
            k_scale: scales(0),
            v_scale: scales(1),
            kv_length: &announced.keys,
            global_length: offset(step.args.global_length, b),
            kv_start: &announced.start,
            kv_position: match self.block.positions {
                0 => std::ptr::null(),
                bytes => block[bytes * first..].as_ptr().cast(),
            },
            kv_position_head_stride: if self.block.positions > POSITION { keys as i64 } else { 0 },
            query_position: offset(step.args.query_position, held.first_token),
            ..DecodeArgs::default()
        };
        let dims = |dim: i32| [1, i64::from(announced.keys), i64::from(desc.kv_heads), i64::from(dim)];
        Ok(Step {
            args,
            k_stride: desc.k_format().packed_strides("k", &dims(desc.head_dim_qk))?,
            v_stride: desc.v_format().packed_strides("v", &dims(desc.head_dim_v))?,
            k_scale_stride: scale_stride,
            v_scale_stride: scale_stride,
            kv_capacity: i64::from(announced.keys),
            ..*step
        })
    }

    /// The mask of sequence `b` in the block of `origin`, if the shape has one.
    fn block_mask(&self, block: &[u8], origin: usize, b: usize) -> Option<Mask> {
        let desc = &self.exchange.context.desc;
        let element = MaskElement::of(desc)?;
        let (keys, tokens) = (self.announced_by(origin)[b].keys.max(0) as usize, self.own[b].tokens);
        let begin =
            self.block.mask_begin(self.tokens(origin), self.scaled(origin))? + self.pairs(origin, b) * self.block.mask;
        let mask = &block[begin..][..keys * tokens * self.block.mask];
        let size = element.size();
        let stride = [0, (tokens * keys * size) as i64, (keys * size) as i64, size as i64];
        Some(Mask::at(mask.as_ptr(), mask.len() as u64, stride, element, desc))
    }

    /// Merges what can be merged once block number `turn` has come.
    fn merge(&self, turn: usize, partial: &mut [f32], spare: &mut [f32]) -> Result<()> {
        let size = floats(self.exchange.rows(), self.exchange.dim());
        let f32s = Wire { dtype: Dtype::F32, dim: self.exchange.dim() };
        for merge in self.order.merges.iter().filter(|merge| merge.turn == turn) {
            let (low, high) = partial.split_at_mut(merge.into.max(merge.from) * size);
            let (into, from) = if merge.into < merge.from {
                (&mut low[merge.into * size..][..size], &high[..size])
            } else {
                (&mut high[..size], &low[merge.from * size..][..size])
            };
            self.exchange.merge(f32s, into, wire::bytes(from), spare)?;
        }
        Ok(())
    }
}

/// Takes the keys of sequences with bad data on some rank out of what all ranks announced of `batch` sequences each. Gives the
/// first rank to blame whose own keys were not bad.
fn drop_bad_sequences(announced: &mut [Announced], batch: usize) -> RankFault {
    let mut found = None;
    for b in 0..batch {
        let of_ranks = || (b..announced.len()).step_by(batch);
        let has_keys = of_ranks().any(|at| announced[at].keys > 0);
        let idle: RankFault = of_ranks().filter(|_| has_keys).find_map(|at| {
            let cause = announced[at].idle_fault?;
            Some(((at / batch) as i32, DataFault::new(b as i32, cause)))
        });
        let is_bad = idle.is_some() || of_ranks().any(|at| announced[at].keys < 0);
        if is_bad {
            announced.iter_mut().skip(b).step_by(batch).for_each(|of| of.keys = of.keys.min(0));
        }
        if let Some((rank, _)) = idle {
            announced[rank as usize * batch + b].keys = -1;
        }
        found = found.or(idle);
    }
    found
}
