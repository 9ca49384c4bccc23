//! The backend against sums in float64, on every instruction set of this machine.

mod case;

use super::kernel::args::TILE;
use super::{CpuBackend, Isa};
use crate::attention::{
    AttentionDesc, Dtype, KvLayout, Mask, MaskElement, MaskKind, Placement, Reproducibility, Shard, supported,
};
use crate::device::Workers;
use crate::partial::{DataFaultCause, Lse, PartialRows};
use case::{Case, Magnitudes, Random, at, put, round};

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn random_shapes_on_every_isa() {
    let cases = match std::env::var("TREEATTN_TEST").as_deref() {
        Ok("full") => 2000,
        Ok("short") => 50,
        _ => 150,
    };
    for isa in Isa::available() {
        let mut worst = 0f64;
        for seed in 0..cases {
            let case = Case::random(seed * 4 + isa as u64);
            let threads = 1 + seed as usize % 5;
            let what = format!("{} seed {seed} {threads} threads {:?} {:?}", isa.name(), case.desc, case.lengths);
            let (o, lse, fault) = case.run(isa, threads);
            assert_eq!(fault, None, "{what}");
            worst = worst.max(case.check(&o, &lse, &what));
            let (again_o, again_lse, _) = case.run(isa, threads);
            assert_eq!((bits(&o), bits(&lse)), (bits(&again_o), bits(&again_lse)), "{what}: other bits");
        }
        println!("{}: {cases} cases, at most {worst:.3} of what is allowed", isa.name());
    }
}

/// A plain case: one head, dim 16, `n` keys.
fn plain(n: i32, causal: bool) -> Case {
    let mut desc = AttentionDesc::new(2, 1, 16, n);
    desc.causal = causal;
    desc.max_query_tokens = 3;
    let magnitudes = Magnitudes { q: 1.0, v_offset: 0.0 };
    let mut case = Case::fill(&mut Random(n as u64), desc, Shard::ALONE, vec![n], vec![0, 3], magnitudes);
    case.kv_starts[0] = 0;
    case.globals[0] = n;
    case
}

#[test]
fn nan_stays_where_it_is_seen() {
    for isa in Isa::available() {
        for (in_k, value) in [(true, f32::NAN), (false, f32::NAN), (false, f32::INFINITY), (true, f32::INFINITY)] {
            // The last key is seen by the last token only, the one before by the last two.
            for (slot, sees) in [(199usize, 2..3), (198, 1..3), (0, 0..3), (100, 0..3)] {
                let mut case = plain(200, true);
                let clean = case.run(isa, 2);
                let offset = at(if in_k { &case.k_stride } else { &case.v_stride }, [0, slot, 0, 3]);
                put(if in_k { &mut case.k } else { &mut case.v }, offset, value, Dtype::F32);
                let (o, lse, _) = case.run(isa, 2);
                for row in 0..6 {
                    let of = |v: &[f32]| bits(&v[row * 16..(row + 1) * 16]);
                    if !sees.contains(&(row / 2)) {
                        assert_eq!(
                            (of(&o), lse[row].to_bits()),
                            (of(&clean.0), clean.1[row].to_bits()),
                            "{}",
                            isa.name()
                        );
                    } else if !in_k {
                        assert!(!o[row * 16 + 3].is_finite(), "{} slot {slot}", isa.name());
                        assert_eq!(lse[row].to_bits(), clean.1[row].to_bits());
                    } else if value.is_nan() {
                        assert!(o[row * 16..(row + 1) * 16].iter().all(|x| x.is_nan()) && lse[row].is_nan());
                    }
                }
            }
        }
    }
}

#[test]
fn bad_data_is_nan_in_its_own_sequence() {
    let base = || {
        let mut desc = AttentionDesc::new(2, 1, 16, 100);
        (desc.max_batch, desc.max_query_tokens, desc.causal) = (3, 8, true);
        (desc.kv_layout, desc.page_size) = (KvLayout::BlockTable, 16);
        let magnitudes = Magnitudes { q: 1.0, v_offset: 0.0 };
        let mut case = Case::fill(&mut Random(5), desc, Shard::ALONE, vec![40, 70, 100], vec![0, 2, 5, 6], magnitudes);
        case.kv_starts.fill(0);
        case.globals = case.lengths.clone();
        case
    };
    let row = base().table.len() / 3;
    type Break = fn(&mut Case, usize);
    let breaks: [(Break, DataFaultCause); 8] = [
        (|c, _| c.lengths[1] = -1, DataFaultCause::KvLength),
        (|c, _| c.lengths[1] = 101, DataFaultCause::KvLength),
        (|c, row| c.table[row + 2] = -1, DataFaultCause::BlockTable),
        (|c, row| c.table[row + 4] = c.pages, DataFaultCause::BlockTable),
        (|c, _| c.globals[1] = 2, DataFaultCause::GlobalLength),
        (|c, _| c.kv_starts[1] = -1, DataFaultCause::KvStart),
        (|c, _| c.kv_starts[1] = i32::MAX - 3, DataFaultCause::KvStart),
        (|c, _| c.starts[2] = 99, DataFaultCause::QueryStart),
    ];
    for isa in [Isa::Scalar, Isa::best()] {
        // One worker: a sequence that drops out moves the borders of the others' slices.
        let good = base().run(isa, 1);
        for (i, (broken, cause)) in breaks.iter().enumerate() {
            let mut case = base();
            broken(&mut case, row);
            let (o, lse, fault) = case.run(isa, 1);
            let sequence = 1;
            let fault = fault.expect("bad data");
            assert_eq!((fault.sequence, fault.cause), (sequence, *cause), "{i}");
            assert!(
                fault.value.is_some_and(|value| !(value.least..=value.most).contains(&value.found)),
                "{i}: {fault:?}"
            );
            let dead = if *cause == DataFaultCause::QueryStart { 4..12 } else { 4..10 };
            for r in 0..12 {
                if dead.contains(&r) {
                    assert!(lse[r].is_nan() && o[r * 16..r * 16 + 16].iter().all(|x| x.is_nan()), "{i} row {r}");
                } else {
                    assert_eq!(bits(&o[r * 16..r * 16 + 16]), bits(&good.0[r * 16..r * 16 + 16]), "{i} row {r}");
                    assert_eq!(lse[r].to_bits(), good.1[r].to_bits());
                }
            }
        }
    }
}

#[test]
fn equal_scores_give_the_mean_of_integers() {
    for isa in Isa::available() {
        for n in [1, 2, 63, 64, 65, 1024, 5000] {
            let mut case = plain(n, false);
            case.q.fill(0);
            for slot in 0..n as usize {
                for d in 0..16 {
                    let offset = at(&case.v_stride, [0, slot, 0, d]);
                    put(&mut case.v, offset, ((slot * 7 + d) % 32) as f32, Dtype::F32);
                }
            }
            let (o, lse, _) = case.run(isa, 3);
            for (d, &o) in o[..16].iter().enumerate() {
                let sum: usize = (0..n as usize).map(|slot| (slot * 7 + d) % 32).sum();
                assert_eq!(o, (sum as f32) / n as f32, "{} n {n}", isa.name());
            }
            assert!((f64::from(lse[0]) - f64::from(n).ln()).abs() < 1e-6 * f64::from(n).ln().max(1.0));
        }
    }
}

#[test]
fn a_million_keys_keep_the_bound() {
    for (q, v_offset) in [(0.0, 1.0), (1.0, 0.0), (30.0, 1.0)] {
        let mut desc = AttentionDesc::new(1, 1, 16, 1 << 20);
        (desc.k_dtype, desc.v_dtype) = (Dtype::F16, Dtype::Bf16);
        let case =
            Case::fill(&mut Random(9), desc, Shard::ALONE, vec![1 << 20], vec![0, 1], Magnitudes { q, v_offset });
        for isa in [Isa::best(), Isa::Scalar] {
            let (o, lse, _) = case.run(isa, 2);
            let worst = case.check(&o, &lse, isa.name());
            println!("{}: q {q} v {v_offset}: {worst:.3} of what is allowed", isa.name());
        }
    }
}

#[test]
fn an_f32_query_is_not_rounded() {
    let mut case = plain(64, false);
    case.desc.k_dtype = Dtype::Bf16;
    let magnitudes = Magnitudes { q: 8.0, v_offset: 0.0 };
    case = Case::fill(&mut Random(3), case.desc, Shard::ALONE, vec![64], vec![0, 3], magnitudes);
    let first = Case::get(&case.q, at(&case.q_stride, [0, 0, 0, 0]), Dtype::F32) as f32;
    assert_ne!(first, round(first, Dtype::Bf16));
    for isa in Isa::available() {
        let (o, lse, _) = case.run(isa, 1);
        case.check(&o, &lse, isa.name());
    }
}

#[test]
fn what_is_not_served_is_named() {
    let desc = AttentionDesc::new(4, 2, 64, 10);
    assert!(supported(&desc, &crate::cpu::CAPABILITIES).is_ok());
    type Change = fn(&mut AttentionDesc);
    let changes: [(Change, &str); 1] = [(|d| d.reproducibility = Reproducibility::Canonical, "reproducibility")];
    for (change, name) in changes {
        let mut desc = desc;
        change(&mut desc);
        let error = supported(&desc, &crate::cpu::CAPABILITIES).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Unsupported);
        assert!(error.message().starts_with(name), "{error}");
    }
}

/// Work follows the window, not the context: no worker gets tiles outside.
#[test]
fn work_follows_the_window() {
    let tiles = |placement: Placement, window: i32, shard: Shard| {
        let mut desc = AttentionDesc::new(2, 1, 16, 4096);
        (desc.placement, desc.causal, desc.window) = (placement, true, window);
        let magnitudes = Magnitudes { q: 1.0, v_offset: 0.0 };
        let mut case = Case::fill(&mut Random(5), desc, shard, vec![4096], vec![0, 1], magnitudes);
        let global = 4096 * shard.world;
        (case.globals[0], case.kv_starts[0]) = (global, 4096 * shard.rank);
        // Slot s holds position s, whatever the number of ranks.
        case.positions = (0..4096).collect();
        let workers = Workers::new(2, "test", false).unwrap();
        let backend = CpuBackend::new(&case.desc, shard, 2, Isa::Scalar).unwrap();
        let (mut o, mut lse) = (vec![0.0; 32], vec![Lse::EMPTY; 2]);
        let rows = PartialRows { o: &mut o, lse: &mut lse, dim: 16 };
        // SAFETY: everything that the step points at is in `case`, and nobody writes it meanwhile.
        unsafe { backend.attend(&case.step(), &workers, rows) }.unwrap();
        let scratch = backend.scratch.lock();
        scratch.sequences[0].visible.tiles(TILE).len()
    };
    let (second, first) = (Shard { rank: 1, world: 2 }, Shard { rank: 0, world: 2 });
    for (window, wanted) in [(0, 64), (1, 1), (64, 1), (65, 2), (1000, 16), (4096, 64), (9000, 64)] {
        assert_eq!(tiles(Placement::Contiguous, window, Shard::ALONE), wanted, "window {window}");
        assert_eq!(tiles(Placement::Explicit, window, Shard::ALONE), wanted, "window {window}");
        assert_eq!(tiles(Placement::Contiguous, window, second), wanted, "window {window}");
    }
    // The first of two shards is hidden whole by a window of the second's keys; one more key shows its last tile.
    assert_eq!(tiles(Placement::Contiguous, 4096, first), 0);
    assert_eq!(tiles(Placement::Contiguous, 4097, first), 1);
    // Round robin: half of the window's keys are here.
    assert_eq!(tiles(Placement::Interleaved { run: 1 }, 1000, first), 8);
}

/// No worker gets tiles that a mask hides from all at either end.
#[test]
fn work_follows_the_mask() {
    let mut desc = AttentionDesc::new(2, 1, 16, 1000);
    desc.mask = MaskKind::Boolean;
    let magnitudes = Magnitudes { q: 1.0, v_offset: 0.0 };
    let case = Case::fill(&mut Random(5), desc, Shard::ALONE, vec![1000], vec![0, 1], magnitudes);
    let workers = Workers::new(2, "test", false).unwrap();
    let backend = CpuBackend::new(&case.desc, Shard::ALONE, 2, Isa::Scalar).unwrap();
    for (visible, wanted) in [(200..700, 3..11), (0..1000, 0..16), (64..65, 1..2), (5..5, 0..0)] {
        let bytes: Vec<u8> = (0..1000).map(|slot| u8::from(visible.contains(&slot))).collect();
        let mut step = case.step();
        step.mask = Some(Mask::at(bytes.as_ptr(), 1000, [0, 0, 0, 1], MaskElement::Byte, &case.desc));
        let (mut o, mut lse) = (vec![0.0; 32], vec![Lse::EMPTY; 2]);
        let rows = PartialRows { o: &mut o, lse: &mut lse, dim: 16 };
        // SAFETY: the mask's bytes are in `bytes`, all else that the step points at in `case`, and nobody writes them meanwhile.
        unsafe { backend.attend(&step, &workers, rows) }.unwrap();
        let scratch = backend.scratch.lock();
        assert_eq!(scratch.sequences[0].visible.tiles(TILE), wanted);
        assert_eq!(lse[0].is_empty(), visible.is_empty());
    }
}
