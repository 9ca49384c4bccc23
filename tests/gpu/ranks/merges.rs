//! Merges of partials that an engine made.

use treeattn::attention::{Algorithm, AttentionDesc, Dtype, OutputMode, Tensor};
use treeattn::runtime::{Buffer, MergeArgs};

use super::{LONG, counts};
use crate::group::Group;
use crate::numerics::shape;

fn close(a: f32, b: f32) -> bool {
    (a - b).abs() <= 1e-4 * (1.0 + a.abs())
}

/// Partials of an engine's own, an empty one and a NaN among them, few and more than a slot holds.
pub fn merges() {
    for on in counts() {
        for (world, tokens) in [(2usize, 3usize), (3, 1), (5, 2), (2, 300)] {
            let group = Group::over(world, on, LONG);
            for algorithm in [Algorithm::OneShot, Algorithm::TwoShot] {
                for output in [OutputMode::Replicated, OutputMode::Scattered] {
                    for wire_dtype in [Dtype::F32, Dtype::Bf16] {
                        let desc = AttentionDesc {
                            kv_heads: 0,
                            max_query_tokens: tokens as i32,
                            out_dtype: Dtype::F32,
                            algorithm,
                            output,
                            wire_dtype,
                            ..shape(8, 8, 128, Dtype::F16)
                        };
                        merge(&group, &desc, tokens, 8.0);
                        // Beyond the range of both 16-bit types: as an infinity it would make NaN of no weight.
                        if wire_dtype == Dtype::Bf16 && tokens <= 3 {
                            merge(&group, &desc, tokens, f32::MAX);
                            merge(&group, &AttentionDesc { wire_dtype: Dtype::F16, ..desc }, tokens, f32::MAX);
                        }
                    }
                }
            }
        }
    }
}

/// The same with weighted output: each rank gets its own part. Of more rows than a slot has log-sum-exps, too.
pub fn weighted() {
    for (world, tokens, dim) in [(2usize, 3usize, 128), (3, 1, 64), (5, 2, 128), (2, 16_500, 8)] {
        let group = Group::over(world, counts().pop().unwrap(), LONG);
        let desc = AttentionDesc {
            kv_heads: 0,
            max_query_tokens: tokens as i32,
            out_dtype: Dtype::F32,
            output: OutputMode::Weighted,
            ..shape(8, 8, dim, Dtype::F16)
        };
        merge(&group, &desc, tokens, 8.0);
    }
}

/// Merges `tokens` rows of all heads. Values of rank 1 that weigh next to nothing are `far`.
fn merge(group: &Group, desc: &AttentionDesc, tokens: usize, far: f32) {
    let (world, heads, dim) = (group.comms.len(), desc.q_heads as usize, desc.head_dim_v as usize);
    let (plans, rows) = (group.plans(desc), tokens * heads);
    let is_far = |rank: usize, row: usize| rank == 1 && row % 16 == 5;
    // Row r of rank p: an lse that differs, o that is constant in a row.
    let lse = |rank: usize, row: usize| match row {
        1 => f32::NEG_INFINITY,
        2 if rank == 0 => f32::NEG_INFINITY,
        3 if rank == 1 => f32::NAN,
        _ if is_far(rank, row) => -200.0,
        _ => (rank as f32 - 0.5) * ((row % 7) as f32 + 1.0),
    };
    let o = |rank: usize, row: usize| match lse(rank, row) {
        f32::NEG_INFINITY => f32::NAN,
        _ if is_far(rank, row) => far,
        _ => (rank * 8 + row % 16) as f32,
    };
    let bytes = |values: Vec<f32>| values.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>();
    let o_bytes = 4 * rows * dim;
    let second = o_bytes + 4 * rows;
    let buffers: Vec<Buffer> = (0..world)
        .map(|rank| {
            let o = (0..rows).flat_map(|row| std::iter::repeat_n(o(rank, row), dim));
            let all = o.chain((0..rows).map(|row| lse(rank, row)));
            let gpu = &group.gpus[rank];
            let buffer = Buffer::alloc(&gpu.runtime, gpu.device, 2 * second).unwrap();
            buffer.upload(0, &bytes(all.collect())).unwrap();
            buffer
        })
        .collect();
    for (rank, buffer) in buffers.iter().enumerate() {
        let part = |at: usize, bytes: usize| Tensor {
            data: buffer.data().wrapping_byte_add(at),
            bytes: bytes as u64,
            stride: [0; 4],
        };
        let own = plans[rank].heads().len();
        let args = MergeArgs {
            query_tokens: tokens as i32,
            heads: 0,
            head_dim: 0,
            o: part(0, o_bytes),
            o_dtype: Dtype::F32,
            lse: part(o_bytes, 4 * rows),
            lse_base: 0,
            out: part(second, 4 * tokens * own * dim),
            out_dtype: None,
            out_lse: part(second + o_bytes, 4 * tokens * own),
            ..MergeArgs::default()
        };
        // SAFETY: the buffers outlive the step, which is waited for.
        unsafe { plans[rank].merge(&args, Some(&group.gpus[rank].stream)) }.unwrap();
    }
    for (rank, (gpu, buffer)) in group.gpus.iter().zip(&buffers).enumerate() {
        gpu.stream.synchronize().unwrap();
        let mut found = vec![0; second];
        buffer.download(second, &mut found).unwrap();
        let found: Vec<f32> = found.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let own = plans[rank].heads();
        for (n, row) in (0..rows).filter(|row| own.contains(&(row % heads))).enumerate() {
            let most = (0..world).map(|rank| f64::from(lse(rank, row))).fold(f64::NEG_INFINITY, f64::max);
            let weight = |rank: usize| (f64::from(lse(rank, row)) - most).exp();
            let live = (0..world).filter(|&rank| lse(rank, row) != f32::NEG_INFINITY);
            let sum: f64 = live.clone().map(weight).sum();
            let is_weighted = desc.output == OutputMode::Weighted;
            let parts = live.filter(|&part| !is_weighted || part == rank);
            let wanted: f64 = parts.map(|rank| weight(rank) * f64::from(o(rank, row))).sum::<f64>() / sum;
            let got_lse = found[rows * dim + n];
            for d in [0, 7, dim - 1] {
                let got = found[n * dim + d];
                match row {
                    1 => assert_eq!((got, got_lse), (0.0, f32::NEG_INFINITY)),
                    3 => assert!(got.is_nan() && got_lse.is_nan(), "{got} {got_lse}"),
                    _ => {
                        // Two shots take what was merged over the wire as well.
                        let slack = if desc.wire_dtype == Dtype::F32 { 1e-4 } else { 1e-2 } * (1.0 + wanted.abs());
                        assert!((f64::from(got) - wanted).abs() < slack, "row {row}: {got}, wanted {wanted}");
                        assert!(close(got_lse, (most + sum.ln()) as f32), "row {row}: {got_lse}");
                    }
                }
            }
        }
    }
    assert!(group.errors().into_iter().flatten().next().is_none());
}
