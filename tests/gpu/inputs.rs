//! Inputs at the edge of what is accepted, and past it: unaligned bases, caches that end early, bad data.

use treeattn::ErrorKind;
use treeattn::attention::{AttentionDesc, DecodeArgs, Dtype, KvLayout, Placement, Tensor};
use treeattn::runtime::{Buffer, Plan};

use crate::mirror::{GPU, Mirror, Ready};
use crate::numerics::shape;
use crate::support::case::Case;
use crate::support::rank::Ints;
use crate::support::rng::Rng;
use crate::support::run::judge;
use crate::support::values::Values;

/// Keys and values that begin off a multiple of 16 bytes, with strides that are multiples of it: what copies 16 bytes at a
/// time must not take them for aligned.
pub fn unaligned_bases() {
    for (layout, page_size) in [(KvLayout::Strided, 0), (KvLayout::BlockTable, 16), (KvLayout::CsrPages, 16)] {
        for (heads, kv_heads, dim) in [(2, 2, 64), (8, 2, 128)] {
            let base = shape(heads, kv_heads, dim, Dtype::Bf16);
            let desc = AttentionDesc { kv_layout: layout, page_size, out_dtype: Dtype::F32, ..base };
            let mut ready = Ready::new(Case::plain(desc, 1, &[(300, 1), (70, 1)], Values::Normal, 9));
            let wanted = ready.bits();
            assert_eq!(judge(&ready.case, std::slice::from_ref(&ready.rank)).unwrap().failure, None);
            let args = ready.mirror.args;
            let mut buffers = Vec::new();
            let mut moved = |tensor: Tensor, memory: &[u8], offset: usize| {
                let buffer = Buffer::alloc(&ready.gpu.runtime, GPU, memory.len() + offset).unwrap();
                buffer.upload(offset, memory).unwrap();
                let data = buffer.data().wrapping_byte_add(offset);
                buffers.push(buffer);
                Tensor { data, ..tensor }
            };
            let (k, v) = (ready.rank.k.bytes(), ready.rank.v.as_ref().unwrap().bytes());
            let cases: Vec<_> = [(8, 0), (0, 8), (8, 8), (2, 4), (16, 16)]
                .map(|(of_k, of_v)| {
                    let args = DecodeArgs { k: moved(args.k, k, of_k), v: moved(args.v, v, of_v), ..args };
                    (of_k, of_v, args)
                })
                .into();
            for (of_k, of_v, args) in cases {
                ready.rank.prefill(0xff);
                ready.mirror.update_all(&ready.rank);
                // SAFETY: the buffers outlive the step, which is waited for.
                unsafe { ready.plan.decode(&args, Some(&ready.gpu.stream)) }.unwrap();
                ready.gpu.stream.synchronize().unwrap();
                ready.mirror.fetch(&mut ready.rank);
                assert!(ready.rank.bits(&ready.case) == wanted, "{layout:?}: k at +{of_k}, v at +{of_v} bytes");
                assert!(ready.comm.status().unwrap().error.is_none());
            }
        }
    }
}

/// k, v and scales whose last sequence ends early hold the others whole; a token less, and that sequence has bad data.
pub fn a_last_sequence_that_ends_early() {
    for (heads, kv_heads, dtype) in [(2, 2, Dtype::F16), (8, 2, Dtype::F16), (8, 2, Dtype::Int8)] {
        let desc = AttentionDesc { q_dtype: Dtype::F16, out_dtype: Dtype::F32, ..shape(heads, kv_heads, 64, dtype) };
        let is_scaled = dtype == Dtype::Int8;
        let mut case = Case::plain(desc, 1, &[(300, 1), (70, 1)], Values::Normal, 9);
        if is_scaled {
            (case.k_scale, case.v_scale) = (Some([true; 2]), Some([true; 2]));
            case.fill(&mut Rng::new(9));
        }
        let mut ready = Ready::new(case);
        let wanted = ready.bits();
        let kv_heads = i64::from(kv_heads);
        // [sequence, token, kv head, dim], of which the second sequence ends after `tokens`.
        let early = |tensor: Tensor, dim: i64, size: i64, tokens: i64| {
            let token = kv_heads * dim * size;
            assert_eq!(tensor.bytes as i64, 2 * 300 * token, "packed");
            Tensor { stride: [300 * token, token, dim * size, size], bytes: ((300 + tokens) * token) as u64, ..tensor }
        };
        let size = dtype.size() as i64;
        for (of_k, of_v, of_scales) in [(70, 70, 70), (69, 70, 70), (70, 69, 70), (70, 70, 69)] {
            if of_scales < 70 && !is_scaled {
                continue;
            }
            let mut args = DecodeArgs { kv_capacity: 0, ..ready.mirror.args };
            (args.k, args.v) = (early(args.k, 64, size, of_k), early(args.v, 64, size, of_v));
            if is_scaled {
                args.k_scale = Tensor {
                    bytes: args.k_scale.bytes - (300 - of_scales as u64) * kv_heads as u64 * 4,
                    ..args.k_scale
                };
            }
            ready.rank.prefill(0xff);
            ready.mirror.update_all(&ready.rank);
            // SAFETY: the buffers outlive the step, which is waited for.
            unsafe { ready.plan.decode(&args, Some(&ready.gpu.stream)) }.unwrap();
            ready.gpu.stream.synchronize().unwrap();
            ready.mirror.fetch(&mut ready.rank);
            let error = ready.comm.status().unwrap().error;
            if [of_k, of_v, of_scales] == [70; 3] {
                assert!(error.is_none() && ready.rank.bits(&ready.case) == wanted, "{error:?}");
                continue;
            }
            let error = error.unwrap();
            assert_eq!(error.kind(), ErrorKind::InvalidData);
            assert!(error.message().contains("kv_length") && error.message().contains("sequence 1"), "{error}");
            for head in 0..heads as usize {
                assert!(ready.rank.row(&ready.case, 0, head).0.iter().all(|x| x.is_finite()));
                assert!(ready.rank.row(&ready.case, 1, head).0.iter().all(|x| x.is_nan()));
            }
        }
    }
}

/// Bad data that a step of a destroyed plan met is not reported for a later plan that was given the same status words.
pub fn bad_data_of_a_plan_that_is_gone() {
    /// So many that their status words fill an allocation and the freed ones are given out again.
    const PLANS: usize = 128;
    let mut ready = Ready::new(Case::plain(shape(8, 2, 64, Dtype::Bf16), 1, &[(90, 1)], Values::Normal, 9));
    ready.rank.set(Ints::KvLength, 0, -1);
    let mirror = Mirror::new(&ready.gpu, &ready.rank);
    let create = || Plan::create(&ready.comm, &ready.case.desc).unwrap();
    let plan = create();
    // SAFETY: the device memory outlives the step, which is waited for.
    unsafe { plan.decode(&mirror.args, Some(&ready.gpu.stream)) }.unwrap();
    ready.gpu.stream.synchronize().unwrap();
    drop(plan);
    let plans: Vec<_> = (0..PLANS).map(|_| create()).collect();
    let error = ready.comm.status().unwrap().error;
    assert!(error.is_none(), "{error:?}");
    drop(plans);
}

/// What a step finds in its int32 inputs: NaN for that sequence only, and a report that names the input.
pub fn bad_data() {
    use KvLayout::{BlockTable, CsrPages, Strided};
    use Placement::{Contiguous, Explicit};
    // An entry in use of sequence 1.
    const IN_USE: usize = usize::MAX;
    let cases = [
        ("kv_length", Strided, Contiguous, Ints::KvLength, 1, -1),
        ("kv_length", Strided, Contiguous, Ints::KvLength, 1, i32::MAX),
        ("kv_length", Strided, Contiguous, Ints::KvLength, 1, i32::MIN),
        ("kv_length", BlockTable, Contiguous, Ints::KvLength, 1, 100_000),
        ("kv_length", CsrPages, Contiguous, Ints::KvLength, 1, 201),
        ("query_start", Strided, Contiguous, Ints::QueryStart, 2, 100),
        ("block_table", BlockTable, Contiguous, Ints::BlockTable, IN_USE, -1),
        ("block_table", BlockTable, Contiguous, Ints::BlockTable, IN_USE, i32::MAX),
        ("page_indices", CsrPages, Contiguous, Ints::PageIndices, IN_USE, i32::MIN),
        ("page_indices", CsrPages, Contiguous, Ints::PageIndices, IN_USE, 1 << 20),
        ("page_indptr", CsrPages, Contiguous, Ints::PageIndptr, 2, 1 << 28),
        ("last_page_len", CsrPages, Contiguous, Ints::LastPageLen, 1, 0),
        ("last_page_len", CsrPages, Contiguous, Ints::LastPageLen, 1, 8),
        ("global_length", Strided, Contiguous, Ints::GlobalLength, 1, -5),
        ("kv_start", Strided, Contiguous, Ints::KvStart, 1, -1),
        ("kv_position", BlockTable, Explicit, Ints::KvPosition, IN_USE, -1),
    ];
    for (argument, layout, placement, ints, index, value) in cases {
        let what = format!("{argument} = {value}");
        let page_size = if layout == Strided { 0 } else { 7 };
        let base = shape(8, 2, 64, Dtype::Bf16);
        let desc = AttentionDesc { kv_layout: layout, page_size, placement, causal: true, ..base };
        let mut ready = Ready::new(Case::plain(desc, 1, &[(90, 2), (200, 1), (55, 1)], Values::Normal, 9));
        if ints == Ints::LastPageLen {
            ready.rank.args.last_page_len = ready.rank.last_page_len.ints();
            ready.rank.args.kv_length = std::ptr::null();
        }
        if ints == Ints::KvStart {
            ready.rank.args.kv_start = ready.rank.kv_start.ints();
        }
        ready.mirror = Mirror::new(&ready.gpu, &ready.rank);
        let clean = ready.bits();
        let index = match (index, ints) {
            (IN_USE, Ints::BlockTable) => ready.rank.args.max_pages as usize + 3,
            (IN_USE, Ints::KvPosition) => ready.case.desc.max_kv_length as usize + 3,
            (IN_USE, _) => 90usize.div_ceil(7) + 3,
            (index, _) => index,
        };
        let memory = ready.rank.ints(ints);
        let good = i32::from_ne_bytes(memory.bytes()[index * 4..][..4].try_into().unwrap());
        ready.rank.set(ints, index, value);
        ready.mirror.update_all(&ready.rank);
        // The same fault in every step is reported once a step.
        for _ in 0..3 {
            ready.bits();
            let status = ready.comm.status().unwrap();
            let error = status.error.unwrap_or_else(|| panic!("{what}: not reported"));
            assert_eq!(error.kind(), ErrorKind::InvalidData, "{what}: {error}");
            let entry = format!("{argument}[{index}]: found {value}, wanted ");
            assert!(error.message().starts_with(&entry), "{what}: {error}, wanted {entry}");
            assert_eq!(status.sequence, 1, "{what}: {error}");
            assert!(ready.comm.status().unwrap().error.is_none(), "{what}: reading takes it");
        }
        for token in 0..ready.case.tokens {
            let owner = ready.case.owner(token);
            // The entry is also the beginning of the next sequence, which may be bad as well.
            if owner == Some(2) && matches!(ints, Ints::QueryStart | Ints::PageIndptr) {
                continue;
            }
            // Which sequence its tokens belong to is then undefined.
            if owner == Some(1) && ints == Ints::QueryStart {
                continue;
            }
            for head in 0..8 {
                let row = ready.rank.row(&ready.case, token, head).0;
                let lse = ready.rank.lse_of(&ready.case, token, head).unwrap();
                let bad = owner == Some(1);
                assert_eq!(lse.is_nan(), bad, "{what}: token {token} head {head}");
                assert!(row.iter().all(|x| x.is_nan() == bad), "{what}: token {token} head {head}");
            }
        }
        // The communicator and the plan stay usable.
        ready.rank.set(ints, index, good);
        ready.mirror.update_all(&ready.rank);
        assert!(ready.bits() == clean, "{what}: other bits afterwards");
        assert!(ready.comm.status().unwrap().error.is_none(), "{what}");
    }
}

/// Entries of page tables past the length of a sequence are never read.
pub fn stale_entries() {
    for stale in [-1, i32::MAX] {
        for layout in [KvLayout::BlockTable, KvLayout::CsrPages] {
            let desc = AttentionDesc { kv_layout: layout, page_size: 4, ..shape(4, 4, 64, Dtype::F16) };
            let mut ready = Ready::new(Case::plain(desc, 1, &[(40, 1), (41, 1)], Values::Normal, 2));
            let wanted = {
                let mut short = Ready::new(Case::plain(desc, 1, &[(40, 1), (41, 1)], Values::Normal, 2));
                short.rank.set(Ints::KvLength, 0, 9);
                short.mirror.update_all(&short.rank);
                short.bits()
            };
            ready.rank.set(Ints::KvLength, 0, 9);
            let table = if layout == KvLayout::BlockTable { Ints::BlockTable } else { Ints::PageIndices };
            (3..10).for_each(|entry| ready.rank.set(table, entry, stale));
            ready.mirror.update_all(&ready.rank);
            assert!(ready.bits() == wanted);
            assert!(ready.comm.status().unwrap().error.is_none());
        }
    }
}
