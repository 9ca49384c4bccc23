//! Heads with a dimension beyond 256, latent attention among them, whose values are a part of its keys.

use treeattn::attention::{AttentionDesc, Dtype, KvLayout, OutputMode, Placement};
use treeattn::error::ErrorKind;
use treeattn::runtime::Plan;

use crate::mirror::{Gpu, Ready};
use crate::numerics::shape;
use crate::support::case::Case;
use crate::support::run::judge;
use crate::support::values::Values;

/// Latent attention of so many heads.
pub fn latent(heads: i32, dtype: Dtype) -> AttentionDesc {
    AttentionDesc { head_dim_v: 512, ..shape(heads, 1, 576, dtype) }
}

/// A case whose values lie in its keys, and the same with values in memory of their own.
fn both(desc: AttentionDesc, sequences: &[(usize, usize)], wild: bool, seed: u64) -> [Case; 2] {
    let mut own = Case::plain(desc, 1, sequences, Values::Normal, seed);
    for sequence in &mut own.sequences {
        for (v, k) in sequence.v.chunks_exact_mut(512).zip(sequence.k.chunks_exact(576)) {
            v.copy_from_slice(&k[..512]);
        }
    }
    own.wild = wild;
    [Case { v_in_k: true, ..own.clone() }, own]
}

/// Values in keys and values of their own give the same bits, right ones, and again the same.
pub fn views() {
    for (n, dtype) in [Dtype::Bf16, Dtype::F16, Dtype::Bf16].into_iter().enumerate() {
        for (layout, heads, tokens) in
            [(KvLayout::Strided, 16, 1), (KvLayout::BlockTable, 5, 3), (KvLayout::CsrPages, 24, 1)]
        {
            let page_size = if layout == KvLayout::Strided { 0 } else { [16, 64, 3][n] };
            let desc = AttentionDesc {
                kv_layout: layout,
                page_size,
                causal: tokens > 1,
                out_dtype: Dtype::F32,
                ..latent(heads, dtype)
            };
            let batches: [&[(usize, usize)]; 2] = [&[(333, tokens)], &[(1, 1), (70, tokens), (0, 1), (200, 1)]];
            for (seed, sequences) in batches.into_iter().enumerate() {
                let bits = both(desc, sequences, n == 2, seed as u64).map(|case| {
                    let mut ready = Ready::new(case);
                    let first = ready.bits();
                    let found = judge(&ready.case, std::slice::from_ref(&ready.rank)).unwrap();
                    assert_eq!(found.failure, None, "{layout:?}");
                    assert!(ready.bits() == first, "other bits");
                    first
                });
                assert!(bits[0] == bits[1], "{layout:?}, {}: a view of k has other bits", dtype.name());
            }
        }
    }
}

/// Long enough for every block to have a part, and for parts to merge in two levels where there are many.
pub fn many_parts(keys: &[usize]) {
    for &keys in keys {
        for heads in [16, 40] {
            let [view, _] = both(latent(heads, Dtype::Bf16), &[(keys, 1)], false, 7);
            let mut ready = Ready::new(view);
            let first = ready.bits();
            let found = judge(&ready.case, std::slice::from_ref(&ready.rank)).unwrap();
            assert_eq!(found.failure, None, "{keys} keys");
            (0..3).for_each(|_| assert!(ready.bits() == first, "other bits"));
        }
    }
}

/// What is refused, and by which name.
pub fn refusals() {
    let gpu = Gpu::new();
    let comm = gpu.ranks(1).remove(0);
    let base = AttentionDesc { max_kv_length: 10, ..latent(16, Dtype::Bf16) };
    let cases = [
        ("head_dim_qk", AttentionDesc { head_dim_qk: 584, ..base }),
        ("head_dim_v", AttentionDesc { head_dim_v: 520, ..base }),
        ("k_dtype", AttentionDesc { k_dtype: Dtype::F32, v_dtype: Dtype::F32, ..base }),
        ("k_dtype", AttentionDesc { k_dtype: Dtype::F8E4M3, v_dtype: Dtype::F8E4M3, ..base }),
        ("v_dtype", AttentionDesc { v_dtype: Dtype::F16, ..base }),
    ];
    for (field, desc) in cases {
        let error = Plan::create(&comm, &desc).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.message().starts_with(field), "{error}");
    }
    let mut case = Case::plain(base, 1, &[(10, 1)], Values::Normal, 3);
    case.k_scale = Some([false, false]);
    case.fill(&mut crate::support::rng::Rng::new(1));
    let mut ready = Ready::new(case);
    let error = ready.mirror.decode(&ready.gpu, &ready.plan, &mut ready.rank).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.message().starts_with("k_scale"), "{error}");
}

/// Ranks whose rows are 512 wide, all placements and outputs.
pub fn over_ranks() -> Vec<Case> {
    let mut cases = Vec::new();
    for (n, placement) in
        [Placement::Contiguous, Placement::Interleaved { run: 5 }, Placement::Explicit].into_iter().enumerate()
    {
        for output in [OutputMode::Replicated, OutputMode::Scattered] {
            let desc =
                AttentionDesc { placement, output, causal: true, ..latent(16, [Dtype::Bf16, Dtype::F16][n % 2]) };
            let mut case = Case::plain(desc, 2, &[(150, 2), (3, 1), (64, 1)], Values::Normal, 11 + n as u64);
            case.v_in_k = true;
            case.fill(&mut crate::support::rng::Rng::new(5));
            cases.push(case);
        }
    }
    cases
}
