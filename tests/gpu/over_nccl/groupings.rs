//! Ranks that count as nodes, in groupings of any kind.

use treeattn::ErrorKind;
use treeattn::attention::{Algorithm, AttentionDesc, Dtype, OutputMode};
use treeattn::runtime::{CommConfig, Plan};

use super::{HANG, count};
use crate::group::{Group, ranks};
use crate::numerics::shape;
use crate::support::case::Case;
use crate::support::run::judge;
use crate::support::values::Values;

/// Ranks on nodes of any kind: the answer, the same bits on all ranks, the same again.
fn grouping(groups: &[i32], devices: &[i32]) {
    let config = CommConfig { node_groups: groups.to_vec(), ..CommConfig::default() };
    let group = Group::on(devices, &config, 0);
    let base = AttentionDesc { out_dtype: Dtype::F32, ..shape(6, 2, 64, Dtype::F16) };
    let shapes = [
        base,
        AttentionDesc { output: OutputMode::Scattered, algorithm: Algorithm::Tree, ..base },
        AttentionDesc { wire_dtype: Dtype::Bf16, ..shape(4, 2, 128, Dtype::Bf16) },
    ];
    for (i, desc) in shapes.into_iter().enumerate() {
        let sequences = [(130, 3), (0, 1), (1, 1), (70, 1)];
        let case = Case::plain(desc, groups.len(), &sequences, Values::Normal, 60 + i as u64);
        let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
        let mut first = Vec::new();
        for fill in [0xff, 0x3c] {
            all.iter_mut().for_each(|rank| rank.prefill(fill));
            let mirrors = group.mirrors(&all);
            group.step(&plans, &mirrors, &mut all);
            assert!(all.iter().all(|rank| rank.strays(&case, fill) == 0), "{groups:?}");
            let bits: Vec<_> = all.iter().map(|rank| rank.bits(&case)).collect();
            assert!(first.is_empty() || first == bits, "{groups:?}: other bits");
            let is_replicated = desc.output == OutputMode::Replicated;
            assert!(!is_replicated || bits.iter().all(|rank| *rank == bits[0]), "{groups:?}");
            first = bits;
        }
        assert_eq!(judge(&case, &all).unwrap().failure, None, "{groups:?}");
        assert!(group.errors().into_iter().flatten().next().is_none());
        let stats = plans[0].stats().unwrap();
        assert_eq!((stats.algorithm, stats.rounds), (Algorithm::Tree, 2 * 2), "within the node, and between nodes");
        assert!(stats.reason.contains(" nodes: windows within"), "{}", stats.reason);
    }
    let text = group.comms[0].describe().unwrap();
    assert!(text.contains(r#"{"name":"TREE","by":"windows and nccl","nodes":"#), "{text}");
}

/// Two nodes of two ranks on as many GPUs, or on two; with a GPU for each rank nodes of unequal size, too.
pub fn groupings() {
    for groups in [[0, 0, 1, 1], [0, 1, 0, 1], [7, 2, 2, 7]] {
        let devices: Vec<i32> = match count() {
            4 => (0..4).collect(),
            _ => groups.iter().map(|&group| i32::from(group != groups[0])).collect(),
        };
        grouping(&groups, &devices);
    }
    if count() == 4 {
        for groups in [&[0, 0, 1][..], &[0, 1, 0], &[0, 0, 0, 1], &[0, 1, 1, 2], &[2, 1, 0, 0]] {
            grouping(groups, &(0..groups.len() as i32).collect::<Vec<_>>());
        }
    }
}

/// A node for each rank is an allgather of all, whatever it is called; what needs windows of all ranks is refused.
pub fn nodes_of_one() {
    let config = CommConfig { node_groups: vec![3, 1], ..CommConfig::default() };
    let group = Group::on(&[0, 1], &config, 0);
    let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
    for algorithm in [Algorithm::Auto, Algorithm::Tree, Algorithm::OneShot] {
        let case = Case::plain(AttentionDesc { algorithm, ..desc }, 2, &[(100, 1)], Values::Normal, 5);
        let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
        let mirrors = group.mirrors(&all);
        group.step(&plans, &mirrors, &mut all);
        assert_eq!(judge(&case, &all).unwrap().failure, None);
        let stats = plans[0].stats().unwrap();
        let name = if algorithm == Algorithm::Tree { Algorithm::Tree } else { Algorithm::OneShot };
        assert_eq!((stats.algorithm, stats.rounds), (name, 1));
        assert!(stats.reason.contains("a node for each rank"), "{}", stats.reason);
    }
    let comms: Vec<_> = group.comms.iter().collect();
    let refused = |desc: AttentionDesc| Plan::create_all(&comms, &desc).map(drop).unwrap_err();
    assert_eq!(refused(AttentionDesc { algorithm: Algorithm::TwoShot, ..desc }).kind(), ErrorKind::Unsupported);
    // Of one node there is no tree.
    let group = Group::new(2, HANG);
    let comms: Vec<_> = group.comms.iter().collect();
    let error = Plan::create_all(&comms, &AttentionDesc { algorithm: Algorithm::Tree, ..desc }).map(drop).unwrap_err();
    assert!(error.message().starts_with("algorithm: found TREE on GPUs of one node"), "{error}");
}
