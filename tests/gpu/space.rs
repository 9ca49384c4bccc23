//! Random cases over what the CUDA backend accepts.

use treeattn::attention::{Algorithm, AttentionDesc, Dtype, KvFormat, KvLayout, OutputMode, Placement};

use crate::support::case::{Case, Sequence, spread};
use crate::support::random::{self, Chances};
use crate::support::rng::Rng;
use crate::support::terms::Terms;
use crate::support::values::Values;

/// Multiply-adds of an ordinary case, at most.
const WORK: usize = 1 << 21;
/// Floats that the ranks of an ordinary case exchange, at most: rows that fill more than a slot have a test of their own.
const EXCHANGED: usize = 1 << 20;
const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];
const HALVES: [Dtype; 2] = [Dtype::F16, Dtype::Bf16];
/// Other types of keys and values: those that are widened in registers come more often.
const OTHERS: [Dtype; 15] = [
    Dtype::F8E4M3,
    Dtype::F8E4M3,
    Dtype::F8E5M2,
    Dtype::Int8,
    Dtype::Int8,
    Dtype::Q8_0,
    Dtype::Q8_0,
    Dtype::Q4_0,
    Dtype::Q4_0,
    Dtype::Q4_1,
    Dtype::Q5_0,
    Dtype::Q5_1,
    Dtype::Iq4Nl,
    Dtype::F32,
    Dtype::F16,
];

/// Which shapes are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shapes {
    /// All that the backend accepts.
    All,
    /// Those with a head dimension beyond 256.
    Wide,
}

/// The case of a seed, in one layout: of one rank, or of several that attend alone.
pub fn case(seed: u64, layout: KvLayout, shapes: Shapes) -> Case {
    draw(seed, layout, false, shapes)
}

/// The same of several ranks that exchange.
pub fn sharded(seed: u64, layout: KvLayout, shapes: Shapes) -> Case {
    draw(seed, layout, true, shapes)
}

fn draw(seed: u64, layout: KvLayout, sharded: bool, shapes: Shapes) -> Case {
    let mut rng = Rng::new(seed);
    let r = &mut rng;
    let is_wide = shapes == Shapes::Wide || Rng::new(!seed).chance(4);
    let (mut desc, values) = shape(r, layout, is_wide);
    let world = if sharded { r.pick(&[2, 2, 3, 4, 5, 8]) } else { r.pick(&[1, 1, 1, 1, 2, 3, 4, 7]) };
    desc.output = if sharded {
        r.pick(&[OutputMode::Replicated, OutputMode::Replicated, OutputMode::Scattered])
    } else if world > 1 {
        OutputMode::Local
    } else {
        r.pick(&[OutputMode::Replicated, OutputMode::Scattered, OutputMode::Local])
    };
    if sharded {
        desc.algorithm = r.pick(&[Algorithm::Auto, Algorithm::OneShot, Algorithm::TwoShot]);
        desc.wire_dtype = r.pick(&[Dtype::F32, Dtype::F32, Dtype::F16, Dtype::Bf16]);
    }
    if world == 1 && r.chance(50) {
        desc.placement = Placement::Contiguous;
    }
    let mut batch = if r.chance(2) { 0 } else { r.pick(&[1, 1, 1, 2, 2, 3, 4, 6, 9]) };
    let query_start = r.chance(60);
    let each = if r.chance(60) { 1 } else { r.pick(&[0, 2, 3, 4, 5, 8, 17]) };
    let row_work = desc.q_heads as usize * (desc.head_dim_qk + desc.head_dim_v) as usize;
    let budget = if r.chance(3) { 8 * WORK } else { WORK };
    while batch > 1 && budget / (row_work * batch) < 64 {
        batch -= 1;
    }
    let exchanged = if sharded { (desc.q_heads * desc.head_dim_v) as usize * world } else { 1 };
    let most_tokens = (EXCHANGED / (exchanged * batch.max(1))).max(1);
    let spare = |r: &mut Rng| if query_start && batch > 0 && r.chance(15) { r.range(1, 3) } else { 0 };
    let mut tokens = spare(r);
    let mut sequences: Vec<Sequence> = Vec::new();
    for _ in 0..batch {
        let mut own = match (query_start, r.chance(20)) {
            (false, _) => each,
            (true, true) => 0,
            (true, false) => r.pick(&[1, 1, 1, 2, 3, 4, 5, 9, 33]),
        }
        .min(most_tokens);
        let most = (budget / (row_work * batch * own.max(1))).clamp(1, 20_000);
        let keys = length(r, most).max(if desc.needs_positions() { own } else { 0 });
        let held = spread(r, desc.placement, world, keys, true);
        if query_start && desc.needs_positions() {
            own = own.min(keys);
        }
        sequences.push(Sequence { keys, first_token: tokens, tokens: own, held, ..Sequence::default() });
        tokens += own;
    }
    tokens += spare(r);
    let longest = sequences.iter().flat_map(|s| s.held.iter().map(Vec::len)).max().unwrap_or(0);
    let slack = |r: &mut Rng, n: usize| (n.max(1) + if r.chance(50) { r.range(0, 9) } else { 0 }) as i32;
    desc.max_batch = slack(r, batch);
    desc.max_query_tokens = slack(r, tokens);
    desc.max_kv_length = slack(r, longest);
    let query_position = (desc.needs_positions() && r.chance(30)).then(|| positions(r, &sequences, tokens));
    // Latent attention has its values in its keys.
    let often = if is_wide { 50 } else { 10 };
    let v_in_k = desc.k_dtype == desc.v_dtype
        && desc.head_dim_v <= desc.head_dim_qk
        && values != Values::Huge
        && r.chance(often);
    let mut case = Case {
        seed,
        nodes: Vec::new(),
        desc,
        world,
        threads: 1,
        isa: "-".into(),
        streams: true,
        values,
        sequences,
        tokens,
        q: Vec::new(),
        query_start,
        query_position,
        want_lse: r.chance(75),
        terms: Terms::default(),
        q_broadcast: [r.chance(5), r.chance(5), r.chance(3), false],
        k_broadcast: [false; 4],
        v_broadcast: [false; 4],
        k_scale: if is_wide { None } else { scale(r, desc.k_dtype, values) },
        v_scale: if is_wide { None } else { scale(r, desc.v_dtype, values) },
        v_in_k,
        wild: true,
    };
    case.fill(r);
    case.terms = Terms::draw(r, &case.desc, &case.sequences);
    case
}

/// Head dimensions of q and k, and of v, one beyond 256.
fn wide_dims(r: &mut Rng) -> (usize, usize) {
    match r.range(0, 5) {
        0..=2 => r.pick(&[(576, 512), (576, 512), (512, 512), (320, 320), (576, 256), (64, 512)]),
        3..=4 => (8 * r.range(33, 72), 8 * r.range(1, 64)),
        _ => (8 * r.range(1, 72), 8 * r.range(33, 64)),
    }
}

fn shape(r: &mut Rng, layout: KvLayout, is_wide: bool) -> (AttentionDesc, Values) {
    let kv_heads = if is_wide { r.pick(&[1, 1, 1, 2, 3]) } else { r.pick(&[1, 1, 2, 2, 3, 4, 8]) };
    let group = match r.range(0, 19) {
        0..=15 => r.pick(&[1, 1, 2, 3, 4, 4, 5, 7, 8, 8, 12, 16]),
        16..=17 => r.pick(&[17, 24, 32, 33, 64, 71, 128]),
        _ => r.range(1, 128) as i32,
    };
    let (dim_qk, dim_v) = match r.range(0, 9) {
        _ if is_wide => wide_dims(r),
        0..=6 => r.pick(&[(64, 64), (80, 80), (96, 96), (112, 112), (128, 128), (128, 128), (192, 128), (256, 256)]),
        7..=8 => {
            let dim = 8 * r.range(1, 32);
            (dim, dim)
        }
        _ => (8 * r.range(1, 32), 8 * r.range(1, 32)),
    };
    let mut desc = AttentionDesc::new(kv_heads * group, kv_heads, dim_qk as i32, 1);
    desc.head_dim_v = dim_v as i32;
    desc.q_dtype = r.pick(&FLOATS);
    desc.k_dtype = r.pick(&HALVES);
    desc.v_dtype = if is_wide || r.chance(85) { desc.k_dtype } else { r.pick(&HALVES) };
    if !is_wide && r.chance(35) {
        desc.k_dtype = r.pick(&OTHERS);
        desc.v_dtype = if r.chance(60) { desc.k_dtype } else { r.pick(&OTHERS) };
        // Rows are whole blocks, of up to 256 elements.
        let whole =
            |dim: i32, dtype: Dtype| (dim as u32).next_multiple_of(KvFormat::of(dtype).block_elements() as u32) as i32;
        let same = dim_qk == dim_v;
        desc.head_dim_qk = whole(desc.head_dim_qk, desc.k_dtype);
        desc.head_dim_v = whole(if same { desc.head_dim_qk } else { desc.head_dim_v }, desc.v_dtype);
    }
    desc.out_dtype = r.pick(&FLOATS);
    desc.kv_layout = layout;
    if layout != KvLayout::Strided {
        desc.page_size = r.pick(&[1, 1, 2, 3, 5, 7, 16, 16, 17, 32, 64, 100, 128, 256]);
    }
    desc.placement = match r.range(0, 2) {
        0 => Placement::Contiguous,
        1 => Placement::Interleaved { run: r.pick(&[1, 1, 2, 3, 7, 16, 64, 256]) },
        _ => Placement::Explicit,
    };
    desc.causal = r.chance(50);
    if r.chance(50) {
        desc.pages_by_head = desc.kv_layout == KvLayout::CsrPages && r.chance(25);
        random::terms(r, &mut desc, &Chances { window: 40, sinks: 40, softcap: 30, alibi: 30, mask: 40 });
    }
    let values = if r.chance(50) { Values::Normal } else { r.pick(&Values::ALL) };
    if values != Values::Huge && r.chance(20) {
        desc.scale = r.pick(&[1.0, 0.125, -0.1, 0.01, 3.0]);
    }
    (desc, values)
}

/// Whether keys or values have scales: of 16-bit types seldom, for such steps take another kernel.
fn scale(r: &mut Rng, dtype: Dtype, values: Values) -> Option<[bool; 2]> {
    let often = if matches!(dtype, Dtype::F16 | Dtype::Bf16) { 5 } else { 25 };
    random::scale(r, dtype, values, often)
}

/// A length of at most `most`: often one at the edges of tiles, sometimes none.
fn length(r: &mut Rng, most: usize) -> usize {
    let edges = [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1024];
    let length = match r.range(0, 9) {
        0 => 0,
        1..=3 => r.pick(&edges),
        4..=7 => r.range(1, 400),
        _ => r.range(1, most.max(1)),
    };
    length.min(most)
}

/// Query positions drawn one by one, hiding some keys and reaching past the end.
fn positions(r: &mut Rng, sequences: &[Sequence], tokens: usize) -> Vec<i32> {
    let mut positions = vec![-7; tokens];
    for sequence in sequences {
        for position in &mut positions[sequence.first_token..sequence.first_token + sequence.tokens] {
            *position = r.range(0, sequence.keys + 3) as i32;
        }
    }
    positions
}
