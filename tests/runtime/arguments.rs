//! The arrays that a step needs, one at a time: which they are follows from its shape.

use std::time::Duration;

use treeattn::ErrorKind;
use treeattn::attention::{AttentionDesc, DecodeArgs, KvLayout, Placement};

use super::group::*;

/// An array of a step, by name.
type Array = (&'static str, fn(&mut DecodeArgs) -> &mut *const i32);

const ARRAYS: [Array; 7] = [
    ("kv_length", |args| &mut args.kv_length),
    ("global_length", |args| &mut args.global_length),
    ("kv_start", |args| &mut args.kv_start),
    ("kv_position", |args| &mut args.kv_position),
    ("block_table", |args| &mut args.block_table),
    ("page_indptr", |args| &mut args.page_indptr),
    ("page_indices", |args| &mut args.page_indices),
];

#[test]
fn arrays_that_a_step_needs_are_asked_for_by_name_and_no_others() {
    let base = shape();
    let causal = AttentionDesc { causal: true, ..base };
    let paged = |kv_layout| AttentionDesc { kv_layout, page_size: 16, ..base };
    let cases: [(AttentionDesc, &[&str]); 6] = [
        (base, &["kv_length"]),
        (causal, &["kv_length", "global_length", "kv_start"]),
        (AttentionDesc { placement: Placement::Interleaved { run: 1 }, ..causal }, &["kv_length", "global_length"]),
        (AttentionDesc { placement: Placement::Explicit, ..causal }, &["kv_length", "global_length", "kv_position"]),
        (paged(KvLayout::BlockTable), &["kv_length", "block_table"]),
        (paged(KvLayout::CsrPages), &["kv_length", "page_indptr", "page_indices"]),
    ];
    let (_runtime, comms) = group(2, &quick(Duration::from_secs(20)));
    let (length, global, start, positions) = ([4], [8], [0], [0, 1, 2, 3]);
    let (indptr, pages) = ([0, 1], [0]);
    for (desc, needed) in cases {
        let plans = plan_all(&comms, &desc);
        let mut shard = Shard::new(&desc, 1, 4, 0);
        let mut all = DecodeArgs { kv_length: length.as_ptr(), global_length: global.as_ptr(), ..shard.args(1) };
        match desc.placement {
            Placement::Contiguous => all.kv_start = start.as_ptr(),
            Placement::Interleaved { .. } => {}
            Placement::Explicit => all.kv_position = positions.as_ptr(),
        }
        match desc.kv_layout {
            KvLayout::Strided => {}
            KvLayout::BlockTable => (all.block_table, all.max_pages, all.num_pages) = (pages.as_ptr(), 1, 1),
            KvLayout::CsrPages => {
                (all.page_indptr, all.page_indices) = (indptr.as_ptr(), pages.as_ptr());
                (all.num_page_indices, all.num_pages) = (1, 1);
            }
        }
        // SAFETY: the arrays and the shard outlive the blocking call.
        let partial = |args: &DecodeArgs| unsafe { plans[0].partial(args, None) };
        partial(&all).unwrap();
        for (name, array) in ARRAYS {
            let what = format!("{:?}, {:?}, causal {}: {name}", desc.kv_layout, desc.placement, desc.causal);
            let mut args = all;
            *array(&mut args) = std::ptr::null();
            match partial(&args) {
                Ok(()) => assert!(!needed.contains(&name), "{what}: found nothing said of NULL"),
                Err(error) => {
                    assert!(needed.contains(&name), "{what}: {error}");
                    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{what}");
                    assert!(error.message().starts_with(name), "{what}: {error}");
                }
            }
            if needed.contains(&name) {
                *array(&mut args) = (*array(&mut { all })).wrapping_byte_add(1);
                let error = partial(&args).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{what}");
                assert!(error.message().starts_with(name) && error.message().contains("aligned"), "{what}: {error}");
            }
        }
    }
}
