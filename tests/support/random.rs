//! Random cases over everything that is accepted.

use treeattn::attention::{AttentionDesc, Dtype, KvFormat, KvLayout, MaskKind, OutputMode, Placement};
use treeattn::cpu::Isa;

use super::case::{Case, Sequence, spread};
use super::rng::Rng;
use super::terms::Terms;
use super::values::Values;

/// Multiply-adds of an ordinary case, at most.
const WORK: usize = 1 << 21;
const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];
/// Types of keys and values beside the plain floats.
const NARROW: [Dtype; 9] = [
    Dtype::Int8,
    Dtype::F8E4M3,
    Dtype::F8E5M2,
    Dtype::Q8_0,
    Dtype::Q4_0,
    Dtype::Q4_1,
    Dtype::Q5_0,
    Dtype::Q5_1,
    Dtype::Iq4Nl,
];

/// The case of a seed, in one layout.
pub fn case(seed: u64, layout: KvLayout) -> Case {
    let mut rng = Rng::new(seed);
    let r = &mut rng;
    let (mut desc, values) = shape(r, layout);
    let world = r.pick(&[1, 1, 2, 2, 3, 4, 4, 5, 6, 7, 8]);
    if world == 1 && r.chance(50) {
        desc.placement = Placement::Contiguous;
    }

    let mut batch = if r.chance(3) { 0 } else { r.pick(&[1, 1, 1, 2, 2, 3, 4, 6]) };
    let query_start = r.chance(60);
    let each = if r.chance(60) { 1 } else { r.range(0, 5) };
    let row_work = desc.q_heads as usize * (desc.head_dim_qk + desc.head_dim_v) as usize;
    let budget = if r.chance(2) { 8 * WORK } else { WORK };
    while batch > 1 && budget / (row_work * batch) < 64 {
        batch -= 1;
    }
    let k_broadcast = broadcast(r, layout);
    let v_broadcast = broadcast(r, layout);
    let alike = k_broadcast[0] || v_broadcast[0];
    let mut sequences: Vec<Sequence> = Vec::new();
    let mut tokens = 0;
    for _ in 0..batch {
        let mut own = match (query_start, r.chance(20)) {
            (false, _) => each,
            (true, true) => 0,
            (true, false) => r.pick(&[1, 1, 1, 2, 3, 5]),
        };
        let most = (budget / (row_work * batch * own.max(1))).clamp(1, 20_000);
        let (keys, held) = match sequences.first().filter(|_| alike) {
            Some(first) => (first.keys, first.held.clone()),
            None => {
                let keys = length(r, most).max(if desc.needs_positions() { own } else { 0 });
                (keys, spread(r, desc.placement, world, keys, true))
            }
        };
        if query_start && desc.needs_positions() {
            own = own.min(keys);
        }
        sequences.push(Sequence { keys, first_token: tokens, tokens: own, held, ..Sequence::default() });
        tokens += own;
    }
    // Tokens after the last sequence are nobody's.
    if query_start && batch > 0 && r.chance(25) {
        tokens += r.range(1, 3);
    }

    let longest = sequences.iter().flat_map(|s| s.held.iter().map(Vec::len)).max().unwrap_or(0);
    let slack = |r: &mut Rng, n: usize| (n.max(1) + if r.chance(50) { r.range(0, 9) } else { 0 }) as i32;
    desc.max_batch = slack(r, batch);
    desc.max_query_tokens = slack(r, tokens);
    desc.max_kv_length = slack(r, longest);
    let query_position = (desc.needs_positions() && r.chance(30)).then(|| positions(r, &sequences, tokens));
    let isas: Vec<Isa> = Isa::available().collect();
    let v_in_k = desc.k_dtype == desc.v_dtype
        && desc.head_dim_v <= desc.head_dim_qk
        && k_broadcast == [false; 4]
        && v_broadcast == [false; 4]
        && values != Values::Huge
        && r.chance(15);
    let mut case = Case {
        seed,
        nodes: Vec::new(),
        desc,
        world,
        threads: r.pick(&[1, 1, 2, 3]),
        isa: r.pick(&isas).name().into(),
        streams: r.chance(40),
        values,
        sequences,
        tokens,
        q: Vec::new(),
        query_start,
        query_position,
        want_lse: r.chance(75),
        terms: Terms::default(),
        q_broadcast: [r.chance(5), r.chance(5), r.chance(5), false],
        k_broadcast,
        v_broadcast,
        k_scale: scale(r, desc.k_dtype, values, 20),
        v_scale: scale(r, desc.v_dtype, values, 20),
        v_in_k,
        wild: true,
    };
    case.fill(r);
    case.terms = Terms::draw(r, &case.desc, &case.sequences);
    case
}

fn shape(r: &mut Rng, layout: KvLayout) -> (AttentionDesc, Values) {
    let dim = |r: &mut Rng| {
        let usual = [1, 2, 3, 5, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40, 48, 64, 64, 72, 80, 96, 100, 112, 128, 128, 192];
        match r.range(0, 99) {
            0..=84 => r.pick(&usual),
            85..=92 => r.pick(&[256, 320, 512, 576, 1000, 1023, 1024]),
            _ => r.range(1, 1024),
        }
    };
    let kv_heads = r.pick(&[1, 1, 2, 2, 3, 4, 5, 8]);
    let group = if r.chance(3) { r.range(17, 130) } else { r.pick(&[1, 1, 1, 2, 3, 4, 4, 5, 7, 8, 8, 12, 16]) };
    let dim_qk = dim(r);
    let mut desc = AttentionDesc::new((kv_heads * group) as i32, kv_heads as i32, dim_qk as i32, 1);
    if r.chance(40) {
        desc.head_dim_v = dim(r) as i32;
    }
    desc.q_dtype = r.pick(&DTYPES);
    let stored = |r: &mut Rng| if r.chance(55) { r.pick(&DTYPES) } else { r.pick(&NARROW) };
    desc.k_dtype = stored(r);
    desc.v_dtype = if r.chance(60) { desc.k_dtype } else { stored(r) };
    // Rows are whole blocks.
    let whole =
        |dim: i32, dtype: Dtype| (dim as u32).next_multiple_of(KvFormat::of(dtype).block_elements() as u32) as i32;
    let same = desc.head_dim_v == desc.head_dim_qk;
    desc.head_dim_qk = whole(desc.head_dim_qk, desc.k_dtype);
    desc.head_dim_v = whole(if same { desc.head_dim_qk } else { desc.head_dim_v }, desc.v_dtype);
    desc.out_dtype = r.pick(&DTYPES);
    desc.wire_dtype = if r.chance(15) { r.pick(&DTYPES) } else { Dtype::F32 };
    desc.kv_layout = layout;
    if layout != KvLayout::Strided {
        desc.page_size = r.pick(&[1, 2, 3, 5, 7, 16, 16, 17, 32, 64, 100, 128, 256]);
    }
    desc.pages_by_head = layout == KvLayout::CsrPages && r.chance(25);
    desc.placement = match r.range(0, 2) {
        0 => Placement::Contiguous,
        1 => Placement::Interleaved { run: r.pick(&[1, 1, 2, 3, 7, 16, 64, 256]) },
        _ => Placement::Explicit,
    };
    desc.causal = r.chance(50);
    terms(r, &mut desc, &Chances { window: 25, sinks: 20, softcap: 20, alibi: 20, mask: 25 });
    desc.output = match r.range(0, 9) {
        0..=5 => OutputMode::Replicated,
        6..=8 => OutputMode::Scattered,
        _ => OutputMode::Local,
    };
    let values = if r.chance(40) { Values::Normal } else { r.pick(&Values::ALL) };
    if values != Values::Huge && r.chance(20) {
        desc.scale = r.pick(&[1.0, 0.125, -0.1, 0.01, 3.0]);
    }
    (desc, values)
}

/// How often each term is there, in percent.
pub struct Chances {
    pub window: u64,
    pub sinks: u64,
    pub softcap: u64,
    pub alibi: u64,
    pub mask: u64,
}

/// What happens to scores, and what joins the softmax: any of it together.
pub fn terms(r: &mut Rng, desc: &mut AttentionDesc, chances: &Chances) {
    if r.chance(chances.window) {
        desc.window = r.pick(&[1, 2, 5, 17, 63, 64, 65, 100, 300, 1000, i32::MAX]);
    }
    desc.sinks = r.chance(chances.sinks);
    if r.chance(chances.softcap) {
        desc.softcap = r.pick(&[50.0, 30.0, 1.0, 0.01, 1e6]);
    }
    desc.alibi = r.chance(chances.alibi);
    if r.chance(chances.mask) {
        desc.mask = r.pick(&[MaskKind::Additive, MaskKind::Additive, MaskKind::Boolean]);
        desc.mask_dtype = (desc.mask == MaskKind::Additive).then(|| r.pick(&[Dtype::F16, Dtype::F32]));
    }
}

/// Whether keys or values have scales, `often` in percent, and of what their own: int8 has always, values that fill float32
/// never.
pub fn scale(r: &mut Rng, dtype: Dtype, values: Values, often: u64) -> Option<[bool; 2]> {
    let scaled = dtype == Dtype::Int8 || values != Values::Huge && r.chance(often);
    scaled.then(|| [r.chance(60), r.chance(60)])
}

/// Which dimensions of k or v are broadcast: seldom any.
fn broadcast(r: &mut Rng, layout: KvLayout) -> [bool; 4] {
    if !r.chance(10) {
        return [false; 4];
    }
    // Whole pages that are the same page would have to hold the same tokens.
    [layout == KvLayout::Strided && r.chance(40), r.chance(20), r.chance(40), false]
}

/// A length of at most `most`: often one at the edges of tiles, sometimes none.
fn length(r: &mut Rng, most: usize) -> usize {
    let edges = [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1024];
    let length = match r.range(0, 9) {
        0 => 0,
        1..=3 => r.pick(&edges),
        4..=8 => r.range(1, 400),
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
