//! Every field of the descriptor is compared between ranks.

use treeattn::ErrorKind;
use treeattn::attention::{
    Algorithm, AttentionDesc, Dtype, KvLayout, MaskKind, OutputMode, Placement, QueryInput, Reproducibility,
};
use treeattn::runtime::Plan;

use crate::support::run::Group;

type Change = fn(&mut AttentionDesc);

/// A change of every field, by the name under which ranks compare it.
const CHANGES: [(&str, Change); 32] = [
    ("q_heads", |d| d.q_heads = 8),
    ("kv_heads", |d| d.kv_heads = 4),
    ("head_dim_qk", |d| d.head_dim_qk = 24),
    ("head_dim_v", |d| d.head_dim_v = 24),
    ("q_dtype", |d| d.q_dtype = Dtype::F16),
    ("k_dtype", |d| d.k_dtype = Dtype::F16),
    ("v_dtype", |d| d.v_dtype = Dtype::F16),
    ("out_dtype", |d| d.out_dtype = Dtype::F16),
    ("kv_layout", |d| d.kv_layout = KvLayout::CsrPages),
    ("page_size", |d| d.page_size = 8),
    ("placement.kind", |d| d.placement = Placement::Contiguous),
    ("placement.interleave", |d| d.placement = Placement::Interleaved { run: 2 }),
    ("max_batch", |d| d.max_batch = 3),
    ("max_query_tokens", |d| d.max_query_tokens = 3),
    ("max_kv_length", |d| d.max_kv_length = 63),
    ("scale", |d| d.scale = 0.5),
    ("causal", |d| d.causal = true),
    ("window", |d| d.window = 3),
    ("softcap", |d| d.softcap = 30.0),
    ("alibi", |d| d.alibi = true),
    ("sinks", |d| d.sinks = true),
    ("mask", |d| d.mask = MaskKind::Boolean),
    ("mask_dtype", |d| d.mask_dtype = Some(Dtype::F16)),
    ("query_input", |d| d.query_input = QueryInput::Scattered),
    ("output", |d| d.output = OutputMode::Scattered),
    ("algorithm", |d| d.algorithm = Algorithm::OneShot),
    ("reproducibility", |d| d.reproducibility = Reproducibility::Canonical),
    ("wire_dtype", |d| d.wire_dtype = Dtype::F16),
    ("kv_stable", |d| d.kv_stable = true),
    ("checked", |d| d.checked = true),
    ("surplus_keys", |d| d.surplus_keys = true),
    ("pages_by_head", |d| d.pages_by_head = true),
];

fn base() -> AttentionDesc {
    let mut desc = AttentionDesc::new(4, 2, 16, 64);
    (desc.kv_layout, desc.page_size) = (KvLayout::BlockTable, 16);
    desc.placement = Placement::Interleaved { run: 1 };
    (desc.max_batch, desc.max_query_tokens) = (2, 2);
    desc
}

/// A new field of the descriptor is a new name (the compiler asks for it), and a new name needs a change here.
#[test]
fn every_field_has_a_name_and_a_change() {
    let base = base().fields();
    let names: Vec<&str> = base.iter().map(|&(name, _)| name).collect();
    assert_eq!(names, CHANGES.map(|(name, _)| name));
    for (name, change) in CHANGES {
        let mut desc = self::base();
        change(&mut desc);
        let changed = desc.fields();
        let first = base.iter().zip(&changed).find(|(old, new)| old != new).map(|(old, _)| old.0);
        assert_eq!(first, Some(name));
    }
}

#[test]
fn every_field_is_compared_between_ranks() {
    let group = Group::new("scalar", 2, 1);
    for (name, change) in CHANGES {
        let mut other = base();
        change(&mut other);
        let create = |rank: usize, desc: &AttentionDesc| Plan::create(&group.ranks[rank], desc).err();
        let (mine, theirs) = std::thread::scope(|scope| {
            let second = scope.spawn(|| create(1, &other));
            (create(0, &base()), second.join().expect("no panic"))
        });
        let (mine, theirs) = (mine.expect(name), theirs.expect(name));
        assert_eq!(mine.kind(), ErrorKind::Mismatch, "{name}: {mine}");
        // What no rank serves is the other rank's own error; the first hears of it.
        let name = if matches!(name, "surplus_keys" | "pages_by_head") { "flags" } else { name };
        let refused = matches!(theirs.kind(), ErrorKind::Unsupported | ErrorKind::InvalidArgument);
        assert!(refused || theirs.kind() == ErrorKind::Mismatch, "{name}: {theirs}");
        let start =
            if refused { format!("rank 1 could not make the plan: {name}: ") } else { format!("{name}: found ") };
        assert!(mine.message().starts_with(&start), "{name}: {mine}");
    }
}
