use super::*;
use crate::attention::{AttentionDesc, DecodeArgs, Dtype, KvLayout, Placement, Shard, Step, Tensor};
use crate::partial::{DataFault, DataFaultCause};

/// A step over one head of dimension 1 with V of dimension 2, whose inputs live as long as it does.
struct Tiny {
    desc: AttentionDesc,
    shard: Shard,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    kv_length: Vec<i32>,
    args: DecodeArgs,
}

impl Tiny {
    fn new(q: &[f32], k: &[f32], v: &[f32]) -> Tiny {
        let mut desc = AttentionDesc::new(1, 1, 1, k.len() as i32);
        (desc.head_dim_v, desc.max_query_tokens, desc.scale) = (2, q.len() as i32, 1.0);
        let args = DecodeArgs { batch: 1, query_tokens: q.len() as i32, ..DecodeArgs::default() };
        Tiny {
            desc,
            shard: Shard::ALONE,
            q: q.to_vec(),
            k: k.to_vec(),
            v: v.to_vec(),
            kv_length: vec![k.len() as i32],
            args,
        }
    }

    fn attend(&self) -> Reference {
        let mut out = vec![0f32; self.q.len() * 2];
        let mut args = self.args;
        args.q = Tensor::from_slice(&self.q);
        (args.k, args.v) = (Tensor::from_slice(&self.k), Tensor::from_slice(&self.v));
        args.out = Tensor::from_slice_mut(&mut out);
        if args.last_page_len.is_null() {
            args.kv_length = self.kv_length.as_ptr();
        }
        let step = Step::new(&self.desc, self.shard, &args, self.desc.q_heads).unwrap();
        // SAFETY: the vectors outlive the call.
        unsafe { attend(&self.desc, self.shard, &step) }.unwrap()
    }
}

fn close(found: f64, wanted: f64) -> bool {
    (found - wanted).abs() <= 1e-14 * wanted.abs().max(1.0)
}

#[test]
fn a_row_worked_out_by_hand() {
    // Scores 0, ln 3: weights 1/4, 3/4.
    let x = Tiny::new(&[1.0], &[0.0, 3f32.ln()], &[4.0, -4.0, 8.0, 4.0]).attend();
    let w = f64::from(3f32.ln()).exp();
    assert!(close(x.o[0], (4.0 + 8.0 * w) / (1.0 + w)) && close(x.o[1], (-4.0 + 4.0 * w) / (1.0 + w)));
    assert!(close(x.weighted[1], (4.0 + 4.0 * w) / (1.0 + w)));
    assert!(close(x.lse[0], (1.0 + w).ln()));
    assert_eq!((x.largest[0], x.largest[1], x.keys[0], x.fault), (8.0, 4.0, 2, None));
    assert!(close(x.score[0], w.ln()));
}

#[test]
fn no_keys_is_the_identity_and_merging_it_changes_nothing() {
    let mut empty = Tiny::new(&[1.0], &[0.5], &[f32::NAN; 2]);
    empty.kv_length = vec![0];
    let empty = empty.attend();
    assert_eq!((&empty.o[..], empty.lse[0]), (&[0.0, 0.0][..], f64::NEG_INFINITY));
    let full = Tiny::new(&[1.0], &[0.5, 0.7], &[1.0, 2.0, 3.0, 4.0]).attend();
    let of = |partials: u32, one: &Reference| Reference { partials, ..one.clone() };
    assert_eq!(merge(&[empty.clone(), full.clone(), empty.clone()]).unwrap(), of(3, &full));
    assert_eq!(merge(&[empty.clone(), empty.clone()]).unwrap(), of(2, &empty));
    assert!(merge(&[]).is_err());
}

#[test]
fn shards_merge_to_the_whole() {
    let (k, v) = ([0.3, -2.0, 5.0, 1.0], [1.0, -1.0, 2.0, 7.0, -3.0, 0.5, 0.25, 9.0]);
    let whole = Tiny::new(&[1.5], &k, &v).attend();
    let parts: Vec<_> = (0..4).map(|i| Tiny::new(&[1.5], &k[i..=i], &v[2 * i..2 * i + 2]).attend()).collect();
    let merged = merge(&parts).unwrap();
    for (found, wanted) in [(&merged.o, &whole.o), (&merged.lse, &whole.lse), (&merged.weighted, &whole.weighted)] {
        assert!(found.iter().zip(wanted).all(|(&x, &y)| close(x, y)), "{found:?} {wanted:?}");
    }
    assert_eq!((&merged.largest, &merged.score, &merged.keys), (&whole.largest, &whole.score, &whole.keys));
}

#[test]
fn causal_rows_see_by_global_position() {
    // Global length 5 with two query tokens at 3 and 4; this rank of two holds 1 and 3 of round robin.
    let mut x = Tiny::new(&[0.0, 0.0], &[1.0, 1.0], &[1.0, 10.0, 3.0, f32::NAN]);
    (x.desc.causal, x.desc.placement) = (true, Placement::Interleaved { run: 1 });
    x.shard = Shard { rank: 1, world: 2 };
    let lengths = [5];
    x.args.global_length = lengths.as_ptr();
    let found = x.attend();
    assert_eq!(found.keys, [2, 2]);
    let positions = [1, 2];
    x.args.query_position = positions.as_ptr();
    let found = x.attend();
    assert_eq!((found.keys[0], found.keys[1], found.row(0)), (1, 1, &[1.0, 10.0][..]));
    let positions = [0, 3];
    x.args.query_position = positions.as_ptr();
    let found = x.attend();
    assert_eq!((found.keys[0], found.lse[0], found.o[2]), (0, f64::NEG_INFINITY, 2.0));
    assert!(found.o[3].is_nan());
}

#[test]
fn bad_data_is_named_and_its_rows_are_nan() {
    let mut x = Tiny::new(&[1.0], &[0.0, 1.0], &[1.0; 4]);
    x.kv_length = vec![3];
    let found = x.attend();
    assert_eq!(found.fault, Some(DataFault::new(0, DataFaultCause::KvLength)));
    assert!(found.o.iter().chain(&found.lse).all(|x| x.is_nan()));
    x.kv_length = vec![2];
    (x.desc.kv_layout, x.desc.page_size) = (KvLayout::BlockTable, 1);
    let mut table = [1, 0];
    (x.args.block_table, x.args.max_pages, x.args.num_pages) = (table.as_ptr(), 2, 2);
    assert_eq!(x.attend().fault, None);
    table[1] = 2;
    x.args.block_table = table.as_ptr();
    assert_eq!(x.attend().fault.map(|f| f.cause), Some(DataFaultCause::Page));
    x.kv_length = vec![1];
    assert_eq!(x.attend().fault, None);
}

#[test]
fn rounding_and_spacing() {
    assert_eq!(ulp(1.0, Dtype::F32), 2f64.powi(-23));
    assert_eq!(ulp(0.0, Dtype::F16), 2f64.powi(-24));
    assert_eq!(ulp(1.99, Dtype::Bf16), 2f64.powi(-7));
    assert_eq!(round_to(65519.9, Dtype::F16), 65504.0);
    assert_eq!(round_to(-65520.0, Dtype::F16), f64::NEG_INFINITY);
    assert_eq!(round_to(1.0 + 2f64.powi(-8), Dtype::Bf16), 1.0);
    for bits in (0..=u16::MAX).filter(|bits| bits & 0x7c00 != 0x7c00) {
        let x = half::f16::from_bits(bits).to_f64();
        assert_eq!(round_to(x, Dtype::F16), x);
    }
    for i in 0..1000 {
        let x = f64::from(i) * 1.000_000_123e-5 * 10f64.powi(i % 60 - 40);
        assert_eq!(round_to(x, Dtype::F32), f64::from(x as f32), "{x:e}");
    }
}

#[test]
fn bounds_tell_right_from_wrong() {
    let x = Tiny::new(&[1.0], &[0.0, 1.0], &[1.0, 5.0, 2.0, 6.0]).attend();
    let precision = Precision { out: Dtype::F32, wire: Dtype::F32 };
    let right: Vec<f32> = x.o.iter().map(|&x| x as f32).collect();
    let mut found = Comparison::default();
    x.compare_row(0, &right, Some(x.lse[0] as f32), precision, &mut found);
    assert_eq!((found.elements, found.correctly_rounded, found.failure.clone()), (2, 2, None));
    x.compare_row(0, &[right[0] * (1.0 + 1e-6), right[1]], None, precision, &mut found);
    assert!(found.failure.as_ref().is_some_and(|m| m.starts_with("o[row 0, 0]")), "{found:?}");
    assert_eq!(found.correctly_rounded, 3);
    for wrong in [f32::NAN, f32::INFINITY] {
        let mut found = Comparison::default();
        x.compare_row(0, &[wrong, right[1]], Some(wrong), precision, &mut found);
        assert!(found.failure.is_some() && found.worst > 1.0 && found.worst_lse > 1.0);
    }
    let mut found = Comparison::default();
    x.compare_row(0, &right, Some(x.lse[0] as f32 + 1e-6), precision, &mut found);
    assert!(found.failure.is_some_and(|m| m.starts_with("lse[row 0]")));
}
