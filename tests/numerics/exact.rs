//! Cases whose answer is known to the bit.

use treeattn::attention::reference::{round_to, ulp};
use treeattn::attention::{AttentionDesc, Dtype, KvLayout, Placement};
use treeattn::cpu::Isa;

use crate::support::case::Case;
use crate::support::run::Pool;
use crate::support::values::Values;

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

#[test]
fn equal_scores_give_the_exact_mean_at_any_number_of_ranks() {
    let mut pool = Pool::default();
    for (i, (world, isa)) in
        [1, 2, 4, 8].into_iter().flat_map(|w| Isa::available().map(move |isa| (w, isa))).enumerate()
    {
        for (keys, placement) in [
            (8, Placement::Interleaved { run: 1 }),
            (64, Placement::Contiguous),
            (512, Placement::Interleaved { run: 4 }),
            (4096, Placement::Contiguous),
        ] {
            let mut desc = AttentionDesc::new(6, 2, 24, 1);
            desc.head_dim_v = 20;
            (desc.k_dtype, desc.v_dtype, desc.out_dtype) = (DTYPES[i % 3], DTYPES[i / 3 % 3], DTYPES[(i + 1) % 3]);
            desc.placement = placement;
            let mut case = Case::plain(desc, world, &[(keys, 2), (keys, 1)], Values::Equal, 7 + i as u64);
            (case.isa, case.threads) = (isa.name().into(), 1 + i % 2);
            // Scores of 0 weigh exactly 1.
            case.q.fill(0.0);
            let ranks = pool.answers(&case);
            for (rank, memory) in ranks.iter().enumerate() {
                for token in 0..case.tokens {
                    let sequence = &case.sequences[usize::from(token == 2)];
                    for head in 0..6 {
                        let (row, _) = memory.row(&case, token, head);
                        for (d, &found) in row.iter().enumerate() {
                            let all = (0..keys).map(|key| f64::from(sequence.v[(key * 2 + head / 3) * 20 + d]));
                            let wanted = round_to(all.sum::<f64>() / keys as f64, desc.out_dtype);
                            assert_eq!(
                                f64::from(found),
                                wanted,
                                "rank {rank}, token {token}, {head}, {d}\n{}",
                                case.describe()
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn one_key_is_its_value_whatever_the_score() {
    // Weighted and divided by the weight again: two roundings, none where the weight is 1.
    let mut pool = Pool::default();
    for (i, values) in [Values::Normal, Values::Peaky, Values::Huge, Values::Subnormal].into_iter().enumerate() {
        for isa in Isa::available() {
            let mut desc = AttentionDesc::new(4, 2, 33, 1);
            (desc.k_dtype, desc.v_dtype) = (DTYPES[i % 3], DTYPES[(i + 1) % 3]);
            let mut case = Case::plain(desc, 3, &[(1, 1), (1, 2)], values, 40 + i as u64);
            case.isa = isa.name().into();
            for memory in pool.answers(&case) {
                for token in 0..3 {
                    for head in 0..4 {
                        let wanted = &case.sequences[usize::from(token > 0)].v[head / 2 * 33..][..33];
                        for (found, wanted) in memory.row(&case, token, head).0.into_iter().zip(wanted) {
                            let error = (f64::from(found) - f64::from(*wanted)).abs();
                            assert!(error <= ulp(f64::from(*wanted), Dtype::F32), "{found:e} {}", case.describe());
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn ranks_without_keys_change_no_bit() {
    let mut pool = Pool::default();
    for (i, layout) in [KvLayout::Strided, KvLayout::BlockTable, KvLayout::CsrPages].into_iter().enumerate() {
        let mut desc = AttentionDesc::new(8, 2, 64, 1);
        (desc.kv_layout, desc.page_size) = (layout, if i == 0 { 0 } else { 16 });
        let alone = Case::plain(desc, 1, &[(300, 1), (77, 2), (0, 1)], Values::Normal, 90 + i as u64);
        let wanted = pool.answers(&alone)[0].bits(&alone);
        for (world, holder) in [(2, 1), (4, 2), (8, 0)] {
            let mut many = alone.clone();
            many.world = world;
            for sequence in &mut many.sequences {
                let all = sequence.held[0].clone();
                sequence.held = vec![Vec::new(); world];
                sequence.held[holder] = all;
            }
            for memory in pool.answers(&many) {
                assert_eq!(memory.bits(&many), wanted, "{} ranks, all on {holder}", world);
            }
        }
    }
}

#[test]
fn no_keys_anywhere_is_zero_and_minus_infinity() {
    let mut pool = Pool::default();
    for world in [1, 2, 5] {
        for dtype in DTYPES {
            let mut desc = AttentionDesc::new(4, 4, 16, 9);
            desc.out_dtype = dtype;
            let case = Case::plain(desc, world, &[(0, 1), (0, 3)], Values::Normal, 5);
            for memory in pool.answers(&case) {
                for token in 0..4 {
                    for head in 0..4 {
                        assert!(memory.row(&case, token, head).1.iter().all(|&bits| bits == 0));
                        assert_eq!(memory.lse_of(&case, token, head), Some(f32::NEG_INFINITY));
                    }
                }
            }
        }
    }
}
