//! A case: global sequences, their queries, and which rank holds which key; and the answer worked out from that alone.

use treeattn::attention::{AttentionDesc, Dtype, KvFormat, Placement, Shard, placement};

use super::rng::Rng;
use super::terms::Terms;
use super::values::{Maker, Values, store};

/// One sequence of a case.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    /// Keys on all ranks together; their global positions are 0 up to here.
    pub keys: usize,
    /// Its first query token.
    pub first_token: usize,
    /// Its query tokens.
    pub tokens: usize,
    /// f32 [keys, kv head, dim], exact in the type of k.
    pub k: Vec<f32>,
    /// f32 [keys, kv head, dim], exact in the type of v.
    pub v: Vec<f32>,
    /// The same, of types that are not plain floats: packed rows [keys, kv head] as they lie in memory.
    pub k_rows: Vec<u8>,
    pub v_rows: Vec<u8>,
    /// f32 [keys, kv head]: what keys and values are multiplied by, where the case has scales; `k` and `v` are without.
    pub k_scales: Vec<f32>,
    pub v_scales: Vec<f32>,
    /// The positions that each rank holds, slot by slot.
    pub held: Vec<Vec<usize>>,
}

/// Which dimensions of a tensor hold the same values throughout, and so may have a stride of 0.
pub type Broadcast = [bool; 4];

/// A step over all ranks.
#[derive(Clone, Debug)]
pub struct Case {
    pub seed: u64,
    pub desc: AttentionDesc,
    pub world: usize,
    pub threads: usize,
    /// The node group of each rank; empty: one node.
    pub nodes: Vec<i32>,
    pub isa: String,
    /// Each rank on a stream of its own, else on a thread of the caller's.
    pub streams: bool,
    pub values: Values,
    pub sequences: Vec<Sequence>,
    /// Query tokens of the step, those that no sequence owns among them.
    pub tokens: usize,
    /// f32 [tokens, q head, dim], exact in the type of q.
    pub q: Vec<f32>,
    /// Whether `query_start` is passed.
    pub query_start: bool,
    /// Global position of each query token, where they are passed one by one.
    pub query_position: Option<Vec<i32>>,
    pub want_lse: bool,
    pub terms: Terms,
    /// [token, head, dim]
    pub q_broadcast: Broadcast,
    /// [sequence, token, head, dim]
    pub k_broadcast: Broadcast,
    pub v_broadcast: Broadcast,
    /// Scales of keys and of values: whether each token, and each kv head, has its own.
    pub k_scale: Option<[bool; 2]>,
    pub v_scale: Option<[bool; 2]>,
    /// V is the beginning of each key's row of K.
    pub v_in_k: bool,
    /// Strides, padding, order of pages and spare room are drawn at random; else all is packed.
    pub wild: bool,
}

impl Case {
    /// A packed case: `sequences` as (keys, query tokens), even placement, sequences in order, values as asked.
    /// Limits of `desc` that are too small for it are raised.
    pub fn plain(
        mut desc: AttentionDesc,
        world: usize,
        sequences: &[(usize, usize)],
        values: Values,
        seed: u64,
    ) -> Case {
        let mut rng = Rng::new(seed);
        let mut first_token = 0;
        let sequences: Vec<Sequence> = sequences
            .iter()
            .map(|&(keys, tokens)| {
                let held = spread(&mut rng, desc.placement, world, keys, false);
                first_token += tokens;
                Sequence { keys, tokens, first_token: first_token - tokens, held, ..Sequence::default() }
            })
            .collect();
        let tokens = first_token;
        desc.max_batch = desc.max_batch.max(sequences.len() as i32);
        desc.max_query_tokens = desc.max_query_tokens.max(tokens as i32);
        let longest = sequences.iter().flat_map(|s| s.held.iter().map(Vec::len)).max().unwrap_or(0);
        desc.max_kv_length = desc.max_kv_length.max(longest as i32).max(1);
        let mut case = Case {
            seed,
            desc,
            world,
            threads: 1,
            nodes: Vec::new(),
            isa: treeattn::cpu::Isa::best().name().into(),
            streams: false,
            values,
            sequences,
            tokens,
            q: Vec::new(),
            query_start: true,
            query_position: None,
            want_lse: true,
            terms: Terms::default(),
            q_broadcast: [false; 4],
            k_broadcast: [false; 4],
            v_broadcast: [false; 4],
            k_scale: None,
            v_scale: None,
            v_in_k: false,
            wild: false,
        };
        case.fill(&mut rng);
        case.terms = Terms::draw(&mut rng, &case.desc, &case.sequences);
        case
    }

    /// Draws q, k and v.
    pub fn fill(&mut self, rng: &mut Rng) {
        let desc = self.desc;
        let (dim_qk, dim_v) = (desc.head_dim_qk as usize, desc.head_dim_v as usize);
        let kv_heads = desc.kv_heads as usize;
        let narrow = desc.wire_dtype == Dtype::F16;
        let mut maker = Maker {
            values: self.values,
            rng,
            dim_qk,
            scale: f64::from(desc.effective_scale()),
            v_most: if narrow { 3e4 } else { 1e30 },
        };
        self.q = (0..self.tokens * desc.q_heads as usize * dim_qk).map(|_| store(maker.q(), desc.q_dtype)).collect();
        collapse(&mut self.q, &[self.tokens, desc.q_heads as usize, dim_qk], &self.q_broadcast[..3]);
        for sequence in &mut self.sequences {
            let keys = sequence.keys;
            sequence.k = (0..keys * kv_heads * dim_qk)
                .map(|i| store(maker.k(i / (kv_heads * dim_qk), keys), desc.k_dtype))
                .collect();
            collapse(&mut sequence.k, &[keys, kv_heads, dim_qk], &self.k_broadcast[1..]);
            sequence.v =
                (0..keys * kv_heads * dim_v).map(|i| store(maker.v(i / (kv_heads * dim_v)), desc.v_dtype)).collect();
            collapse(&mut sequence.v, &[keys, kv_heads, dim_v], &self.v_broadcast[1..]);
            sequence.k_scales = draw_scales(maker.rng, keys, kv_heads, self.k_scale, desc.k_dtype);
            sequence.v_scales = draw_scales(maker.rng, keys, kv_heads, self.v_scale, desc.v_dtype);
            if desc.k_dtype == Dtype::Int8 {
                unscale(&mut sequence.k);
            }
            if desc.v_dtype == Dtype::Int8 && !self.v_in_k {
                unscale(&mut sequence.v);
            }
            sequence.k_rows = narrow_rows(&mut sequence.k, dim_qk, desc.k_dtype);
            if self.v_in_k {
                for (v, k) in sequence.v.chunks_exact_mut(dim_v).zip(sequence.k.chunks_exact(dim_qk)) {
                    v.copy_from_slice(&k[..dim_v]);
                }
            }
            sequence.v_rows = narrow_rows(&mut sequence.v, dim_v, desc.v_dtype);
            if self.v_in_k && !sequence.v_rows.is_empty() {
                // Blocks do not tell how they were made: the same values may have others.
                let format = KvFormat::of(desc.k_dtype);
                let (k_bytes, v_bytes) = (format.row_bytes(dim_qk), format.row_bytes(dim_v));
                for (v, k) in sequence.v_rows.chunks_exact_mut(v_bytes).zip(sequence.k_rows.chunks_exact(k_bytes)) {
                    v.copy_from_slice(&k[..v_bytes]);
                }
                for (v, k) in sequence.v.chunks_exact_mut(dim_v).zip(sequence.k.chunks_exact(dim_qk)) {
                    v.copy_from_slice(&k[..dim_v]);
                }
            }
        }
        // One scale for all tokens is one for all sequences.
        let [k_scale, v_scale] = [self.k_scale, self.v_scale].map(|of| of.is_some_and(|[token, _]| !token));
        if let Some(scaled) = self.sequences.iter().find(|s| s.keys > 0).cloned() {
            for s in &mut self.sequences {
                let all = |one: &[f32]| one[..kv_heads].iter().copied().cycle().take(s.keys * kv_heads).collect();
                if k_scale {
                    s.k_scales = all(&scaled.k_scales);
                }
                if v_scale {
                    s.v_scales = all(&scaled.v_scales);
                }
            }
        }
        // The generator makes such sequences equally long and places them alike.
        if self.k_broadcast[0]
            && let Some((first, rest)) = self.sequences.split_first_mut()
        {
            rest.iter_mut().for_each(|s| (s.k, s.k_rows) = (first.k.clone(), first.k_rows.clone()));
        }
        if self.v_broadcast[0]
            && let Some((first, rest)) = self.sequences.split_first_mut()
        {
            rest.iter_mut().for_each(|s| (s.v, s.v_rows) = (first.v.clone(), first.v_rows.clone()));
        }
    }

    pub fn shard(&self, rank: usize) -> Shard {
        Shard { rank: rank as i32, world: self.world as i32 }
    }

    /// The sequence that owns a query token.
    pub fn owner(&self, token: usize) -> Option<usize> {
        self.sequences.iter().position(|s| (s.first_token..s.first_token + s.tokens).contains(&token))
    }

    /// Global position of a query token of sequence `b`.
    pub fn position(&self, b: usize, token: usize) -> i64 {
        match &self.query_position {
            Some(positions) => i64::from(positions[token]),
            None => {
                let s = &self.sequences[b];
                s.keys as i64 - s.tokens as i64 + (token - s.first_token) as i64
            }
        }
    }

    /// The global positions that a row sees, among those of `rank`, or of all ranks.
    pub fn visible(&self, token: usize, rank: Option<usize>) -> Vec<usize> {
        let Some(b) = self.owner(token) else { return Vec::new() };
        let sequence = &self.sequences[b];
        let mut seen: Vec<usize> = match rank {
            Some(rank) => sequence.held[rank].clone(),
            None => (0..sequence.keys).collect(),
        };
        let (last, window) = (self.position(b, token), i64::from(self.desc.window));
        seen.retain(|&position| {
            let after = position as i64 - last;
            (!self.desc.causal || after <= 0) && (window == 0 || after > -window)
        });
        seen
    }

    /// What the mask gives the key at `position` for a query token and head; 0 without a mask.
    pub fn mask(&self, token: usize, head: usize, position: usize) -> f32 {
        let (Some(b), Some(mask)) = (self.owner(token), &self.terms.mask) else { return 0.0 };
        let sequence = &self.sequences[b];
        mask.at(b, head, token - sequence.first_token, position, sequence)
    }

    /// One row from the textbook formula over the global arrays: o and lse in float64.
    pub fn answer(&self, token: usize, head: usize, rank: Option<usize>) -> (Vec<f64>, f64) {
        let (desc, mut seen) = (&self.desc, self.visible(token, rank));
        seen.retain(|&position| self.mask(token, head, position) != f32::NEG_INFINITY);
        let (dim_qk, dim_v) = (desc.head_dim_qk as usize, desc.head_dim_v as usize);
        let (heads, kv_heads) = (desc.q_heads as usize, desc.kv_heads as usize);
        let kv_head = head * kv_heads / heads;
        let mut o = vec![0.0; dim_v];
        let Some(b) = self.owner(token) else { return (o, f64::NEG_INFINITY) };
        let sink = self.terms.sink(head, rank);
        if seen.is_empty() {
            return (o, sink);
        }
        let sequence = &self.sequences[b];
        let q = &self.q[(token * heads + head) * dim_qk..][..dim_qk];
        let scale =
            |scales: &[f32], position: usize| scales.get(position * kv_heads + kv_head).map_or(1.0, |&s| f64::from(s));
        let score = |&position: &usize| -> f64 {
            let k = &sequence.k[(position * kv_heads + kv_head) * dim_qk..][..dim_qk];
            let dot: f64 = q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
            let dot = dot * scale(&sequence.k_scales, position);
            let distance = self.position(b, token) - position as i64;
            let scaled = f64::from(desc.effective_scale()) * dot;
            self.terms.score(desc, scaled, head, distance, self.mask(token, head, position))
        };
        let scores: Vec<f64> = seen.iter().map(score).collect();
        let max = scores.iter().copied().fold(sink, f64::max);
        let lse = max + scores.iter().chain([&sink]).map(|s| (s - max).exp()).sum::<f64>().ln();
        for (&position, s) in seen.iter().zip(&scores) {
            let v = &sequence.v[(position * kv_heads + kv_head) * dim_v..][..dim_v];
            // The weight is normalised before it is used, unlike in the library's reference.
            let weight = (s - lse).exp() * scale(&sequence.v_scales, position);
            o.iter_mut().zip(v).for_each(|(o, &v)| *o += weight * f64::from(v));
        }
        (o, lse)
    }

    /// What it takes to read a failure.
    pub fn describe(&self) -> String {
        let d = &self.desc;
        let lengths: Vec<_> = self.sequences.iter().map(|s| (s.keys, s.tokens)).collect();
        let held: Vec<Vec<usize>> = self.sequences.iter().map(|s| s.held.iter().map(Vec::len).collect()).collect();
        format!(
            "case {}: {} over nodes {:?}, {} ranks x {} threads, {}, streams {}, values {:?}, heads {}/{}, dims {}/{}, q {} k {} v {} out {} \
             wire {}, {} page {}, {:?}, {}, causal {}, window {}, pages by head {}, sinks {}, softcap {}, alibi {}, mask {:?} {:?} {:?} factors {}, scale {}, tokens {}, (keys, query tokens) {lengths:?}, held \
             {held:?}, query_start {}, query_position {}, broadcast q {:?} k {:?} v {:?}, scales {:?} {:?}, v in k {}, wild {}",
            self.seed,
            d.algorithm.name(),
            self.nodes,
            self.world,
            self.threads,
            self.isa,
            self.streams,
            self.values,
            d.q_heads,
            d.kv_heads,
            d.head_dim_qk,
            d.head_dim_v,
            d.q_dtype.name(),
            d.k_dtype.name(),
            d.v_dtype.name(),
            d.out_dtype.name(),
            d.wire_dtype.name(),
            d.kv_layout.name(),
            d.page_size,
            d.placement,
            d.output.name(),
            d.causal,
            d.window,
            d.pages_by_head,
            d.sinks,
            d.softcap,
            d.alibi,
            d.mask,
            d.mask_dtype,
            self.terms.mask.as_ref().map(|mask| mask.broadcast),
            !self.terms.factors.is_empty(),
            d.scale,
            self.tokens,
            self.query_start,
            self.query_position.is_some(),
            self.q_broadcast,
            self.k_broadcast,
            self.v_broadcast,
            self.k_scale,
            self.v_scale,
            self.v_in_k,
            self.wild,
        )
    }
}

/// Scales [key, kv head], of tokens and heads their own as `own` says; none where that is none.
fn draw_scales(rng: &mut Rng, keys: usize, heads: usize, own: Option<[bool; 2]>, dtype: Dtype) -> Vec<f32> {
    let Some([token, head]) = own else { return Vec::new() };
    let mut scales = vec![0f32; keys * heads];
    for i in 0..scales.len() {
        let first = (if token { i / heads } else { 0 }) * heads + if head { i % heads } else { 0 };
        // int8 needs its scale to hold fractions.
        let one = if dtype == Dtype::Int8 { 0.02 + 0.03 * rng.unit() } else { 0.5 + 1.5 * rng.unit() };
        scales[i] = if first < i { scales[first] } else { one as f32 };
    }
    scales
}

/// Divides values by a usual scale of int8: all by one, since those that are broadcast have scales of their own.
fn unscale(values: &mut [f32]) {
    values.iter_mut().for_each(|x| *x /= 0.035);
}

/// Rows of `dim` values in a type that is no plain float: gives their bytes, and leaves in `values` what these stand for.
fn narrow_rows(values: &mut [f32], dim: usize, dtype: Dtype) -> Vec<u8> {
    if dtype.is_float() {
        return Vec::new();
    }
    let format = KvFormat::of(dtype);
    let (mut rows, mut wide) = (vec![0; values.len() / dim * format.row_bytes(dim)], vec![0.0; dim]);
    for (row, values) in rows.chunks_exact_mut(format.row_bytes(dim)).zip(values.chunks_exact_mut(dim)) {
        format.narrow_row(values, row);
        // SAFETY: a packed row of `dim` elements.
        unsafe { format.widen_row(row.as_ptr(), format.block_bytes() as i64, &mut wide) };
        values.iter_mut().zip(&wide).for_each(|(value, &wide)| *value = wide as f32);
    }
    rows
}

/// Makes a tensor constant along the dimensions that are to be broadcast.
fn collapse(data: &mut [f32], shape: &[usize; 3], broadcast: &[bool]) {
    if !broadcast.contains(&true) {
        return;
    }
    let keep = |index: usize, dim: usize| if broadcast[dim] { 0 } else { index };
    for i in 0..data.len() {
        let (a, b, c) = (i / (shape[1] * shape[2]), i / shape[2] % shape[1], i % shape[2]);
        data[i] = data[(keep(a, 0) * shape[1] + keep(b, 1)) * shape[2] + keep(c, 2)];
    }
}

/// The positions that each rank holds of a sequence of `keys`, slot by slot. `wild` allows what the helpers do not
/// make: uneven runs, and ranks out of order.
pub fn spread(rng: &mut Rng, kind: Placement, world: usize, keys: usize, wild: bool) -> Vec<Vec<usize>> {
    let mut held = vec![Vec::new(); world];
    match kind {
        Placement::Explicit => {
            for position in 0..keys {
                held[rng.range(0, world - 1)].push(position);
            }
            held.iter_mut().for_each(|slots| rng.shuffle(slots));
        }
        Placement::Contiguous if wild => {
            let mut cuts: Vec<usize> = (1..world).map(|_| rng.range(0, keys)).collect();
            cuts.sort_unstable();
            let (begins, ends) = ([&[0], &cuts[..]].concat(), [&cuts[..], &[keys]].concat());
            held = begins.iter().zip(&ends).map(|(&begin, &end)| (begin..end).collect()).collect();
            if rng.chance(30) {
                rng.shuffle(&mut held);
            }
        }
        _ => {
            for position in 0..keys {
                let (world, keys, position) = (world as i32, keys as i32, position as i32);
                let rank = placement::owner(kind, world, keys, position).expect("a position of the sequence");
                let slot = placement::local_slot(kind, world, keys, position).expect("a position of the sequence");
                let slots = &mut held[rank as usize];
                assert_eq!(slots.len(), slot as usize, "slots rise with positions");
                slots.push(position as usize);
            }
        }
    }
    held
}
