//! Real activations: layer 0 is peaky, layer 5 flat.

use treeattn::attention::reference::ulp;
use treeattn::attention::{AttentionDesc, Dtype, Placement};

use crate::support::case::{Case, spread};
use crate::support::npy::{self, Array};
use crate::support::rng::Rng;
use crate::support::run::{Pool, judge, shard_reference};
use crate::support::values::Values;
use crate::support::{data, full};

const HEADS: usize = 12;
const DIM: usize = 32;
const TOKENS: usize = 512;

struct Layer {
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
}

impl Layer {
    fn load(layer: usize) -> Layer {
        let file = |name: &str| npy::read(&data(&format!("minilm/layer{layer}_{name}.npy")));
        let layer = Layer { q: file("q"), k: file("k"), v: file("v"), out: file("out"), lse: file("lse") };
        assert_eq!((&layer.q.shape[..], &layer.lse.shape[..]), (&[TOKENS, HEADS, DIM][..], &[TOKENS, HEADS][..]));
        layer
    }

    /// Queries `first` up to `first + queries` against the first `keys` keys.
    fn case(&self, world: usize, keys: usize, first: usize, queries: usize, placement: Placement, out: Dtype) -> Case {
        let mut desc = AttentionDesc::new(HEADS as i32, HEADS as i32, DIM as i32, 1);
        (desc.q_dtype, desc.k_dtype, desc.v_dtype, desc.out_dtype) = (Dtype::F16, Dtype::F16, Dtype::F16, out);
        desc.placement = placement;
        let mut case = Case::plain(desc, world, &[(0, queries)], Values::Normal, 3);
        let row = HEADS * DIM;
        case.q = self.q.data[first * row..(first + queries) * row].to_vec();
        let sequence = &mut case.sequences[0];
        sequence.keys = keys;
        sequence.held = spread(&mut Rng::new(1), placement, world, keys, false);
        (sequence.k, sequence.v) = (self.k.data[..keys * row].to_vec(), self.v.data[..keys * row].to_vec());
        case.desc.max_kv_length = sequence.held.iter().map(Vec::len).max().unwrap_or(0).max(1) as i32;
        case
    }
}

#[test]
fn full_length_matches_the_stored_outputs() {
    let mut pool = Pool::default();
    for layer in [0, 5] {
        let layer = Layer::load(layer);
        for world in [1, 2, 3, 4, 8] {
            let case = layer.case(world, TOKENS, 0, TOKENS, Placement::Contiguous, Dtype::F32);
            let ranks = pool.answers(&case);
            let shards: Vec<_> = (0..world).map(|rank| shard_reference(&case, &ranks, rank)).collect();
            let reference = treeattn::attention::reference::merge(&shards).expect("shards of one shape");
            for memory in &ranks {
                assert_eq!(memory.bits(&case), ranks[0].bits(&case), "the same bits on every rank");
            }
            let precision = treeattn::attention::reference::Precision { out: Dtype::F32, wire: Dtype::F32 };
            for token in 0..TOKENS {
                for head in 0..HEADS {
                    let row = token * HEADS + head;
                    let found = ranks[0].row(&case, token, head).0;
                    for (d, (&found, &stored)) in found.iter().zip(&layer.out.data[row * DIM..]).enumerate() {
                        // The stored value was rounded, too.
                        let bound = reference.bound(row, d, precision) + ulp(f64::from(stored), Dtype::F32);
                        let error = (f64::from(found) - f64::from(stored)).abs();
                        assert!(error <= bound, "{world} ranks, ({token}, {head}, {d}): {error:e} above {bound:e}");
                    }
                    let lse = f64::from(ranks[0].lse_of(&case, token, head).expect("an lse"));
                    let stored = f64::from(layer.lse.data[row]);
                    assert!((lse - stored).abs() <= reference.lse_bound(row) + ulp(stored, Dtype::F32));
                }
            }
            let found = judge(&case, &ranks).expect("references that agree");
            assert_eq!(found.failure, None);
        }
    }
}

#[test]
fn every_prefix_decodes_right() {
    let mut pool = Pool::default();
    let outs = [Dtype::F32, Dtype::F16, Dtype::Bf16];
    for layer in [0, 5] {
        let layer = Layer::load(layer);
        let step = if full() { 1 } else { 9 };
        for keys in (1..=TOKENS).step_by(step) {
            for (i, world) in [1, 2, 3, 4, 8].into_iter().enumerate() {
                let placement = match keys % 3 {
                    0 => Placement::Contiguous,
                    1 => Placement::Interleaved { run: 1 + (keys / 3 % 20) as i32 },
                    _ => Placement::Explicit,
                };
                // The query of the last token of the prefix, as a decoder would ask.
                pool.check(&layer.case(world, keys, keys - 1, 1, placement, outs[(i + keys) % 3]));
            }
        }
    }
    pool.tally.finish("every_prefix_decodes_right");
}
