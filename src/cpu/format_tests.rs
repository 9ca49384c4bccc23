//! Every format on every instruction set of this machine, bit by bit against the definition in `attention::block`.

use super::kernel::args::{SUM_LANES, ScoreArgs, TILE, ValueArgs, WidenArgs};
use super::kernel::prefetch::Prefetch;
use super::kernel::table::{DIRECT, Kernels, codec_of};
use super::{CpuBackend, Isa};
use crate::attention::{AttentionDesc, DecodeArgs, Dtype, KvFormat, Shard, Step, Tensor};
use crate::device::Workers;
use crate::partial::{Lse, PartialRows};

/// Bytes with every code: all bytes in turn, or blocks with scales of all kinds, among them 0, infinities and NaN; if `finite`,
/// only finite ones.
fn rows(format: KvFormat, dim: usize, count: usize, finite: bool) -> Vec<u8> {
    let scales = [0x3c00u16, 0xb555, 0x0001, 0x83ff, 0, 0x8000, 0x7c00, 0xfc00, 0x7e01, 0x7bff];
    let scales = if finite { &scales[..6] } else { &scales[..] };
    let mut bytes: Vec<u8> = (0..count * format.row_bytes(dim)).map(|i| (i * 181 + i / 256) as u8).collect();
    if finite && format.block_elements() == 1 && format.dtype() != Dtype::Int8 {
        // Exponents of less than all ones.
        bytes.iter_mut().skip(format.block_bytes() - 1).step_by(format.block_bytes()).for_each(|byte| *byte &= 0xbf);
    }
    if format.block_elements() > 1 {
        for (i, block) in bytes.chunks_exact_mut(format.block_bytes()).enumerate() {
            block[..2].copy_from_slice(&scales[i % scales.len()].to_le_bytes());
            if matches!(format.dtype(), Dtype::Q4_1 | Dtype::Q5_1) {
                block[2..4].copy_from_slice(&scales[i / 3 % scales.len()].to_le_bytes());
            }
        }
    }
    bytes
}

fn wide(format: KvFormat, row: &[u8], stride: usize, dim: usize) -> Vec<f32> {
    let mut wide = vec![0.0; dim];
    // SAFETY: the row has every block.
    unsafe { format.widen_row(row.as_ptr(), stride as i64, &mut wide) };
    wide.into_iter().map(|x| x as f32).collect()
}

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

/// Rows that lie an element apart, in two runs, as in the pages of a transposed cache.
#[test]
fn columns_widen_to_the_bit() {
    for isa in Isa::available() {
        let kernels = Kernels::of(isa).unwrap();
        for format in Dtype::ALL.map(KvFormat::of).into_iter().filter(|format| format.block_elements() == 1) {
            for (dim, count, first_run) in [(128, 64, 64), (576, 64, 40), (8, 37, 16), (31, 20, 3), (1, 1, 1)] {
                let (size, pitch) = (format.block_bytes(), 70);
                let packed = rows(format, dim, count, false);
                // The second run lies 3 elements on. What is between, and behind the last, is never read as a row's.
                let place = |t: usize| if t < first_run { t } else { t + 3 };
                let mut memory = vec![0xff; dim * pitch * size];
                for (i, element) in packed.chunks_exact(size).enumerate() {
                    memory[(i % dim * pitch + place(i / dim)) * size..][..size].copy_from_slice(element);
                }
                let pointers: Vec<_> = (0..count).map(|t| memory[place(t) * size..].as_ptr()).collect();
                let padded = dim.next_multiple_of(16);
                let mut out = vec![7.0; (count + 1) * padded];
                let (rows, stride, out_at) = (pointers.as_ptr(), (pitch * size) as i64, out.as_mut_ptr());
                let args = WidenArgs { rows, offset: 0, count, dim, stride, out: out_at };
                // SAFETY: the rows lie in `memory`, `out` has room for them padded, and the machine has the instruction set.
                unsafe { (kernels.widen[codec_of(format)])(&args) };
                let (out, behind) = out.split_at(count * padded);
                assert!(behind.iter().all(|&x| x == 7.0), "{} {:?}: wrote too far", isa.name(), format.dtype());
                for (t, out) in out.chunks_exact(padded).enumerate() {
                    let wanted = wide(format, &packed[t * dim * size..], size, dim);
                    let are_same = out.iter().zip(&wanted).all(|(&found, &wanted)| same(found, wanted));
                    assert!(are_same, "{} {:?} row {t}: {out:?} {wanted:?}", isa.name(), format.dtype());
                    assert!(out[dim..].iter().all(|&x| x == 0.0));
                }
            }
        }
    }
}

#[test]
fn rows_widen_to_the_bit() {
    for isa in Isa::available() {
        let kernels = Kernels::of(isa).unwrap();
        for dtype in Dtype::ALL {
            let format = KvFormat::of(dtype);
            for dim in [32, 96, 128, 576, 1, 7, 31].into_iter().filter(|dim| dim % format.block_elements() == 0) {
                let size = format.block_bytes();
                let packed = rows(format, dim, 40, false);
                for gap in [0, 2, 34] {
                    // Rows behind an odd number of blocks, with gaps between blocks.
                    let stride = size + gap;
                    let mut memory = vec![0xff; size + packed.len() / size * stride];
                    for (i, block) in packed.chunks_exact(size).enumerate() {
                        memory[size + i * stride..][..size].copy_from_slice(block);
                    }
                    let blocks = format.blocks(dim);
                    let pointers: Vec<_> = (0..40).map(|i| memory[size + i * blocks * stride..].as_ptr()).collect();
                    let padded = dim.next_multiple_of(16);
                    let mut out = vec![7.0; 40 * padded];
                    let args = WidenArgs {
                        rows: pointers.as_ptr(),
                        offset: 0,
                        count: 40,
                        dim,
                        stride: stride as i64,
                        out: out.as_mut_ptr(),
                    };
                    // SAFETY: the rows lie in `memory`, `out` has room for them padded, and the machine has the instruction set.
                    unsafe { (kernels.widen[codec_of(format)])(&args) };
                    for (i, out) in out.chunks_exact(padded).enumerate() {
                        let wanted = wide(format, &packed[i * blocks * size..], size, dim);
                        for (d, (&found, &wanted)) in out.iter().zip(&wanted).enumerate() {
                            assert!(same(found, wanted), "{} {dtype:?} row {i}, {d}: {found} {wanted}", isa.name());
                        }
                        assert!(out[dim..].iter().all(|&x| x == 0.0));
                    }
                }
            }
        }
    }
}

/// Rows read as they lie: the products of a key with unit vectors are its elements, and the sum of one value weighted by 1 is it.
#[test]
fn rows_come_through_as_they_lie() {
    const KEYS: usize = 16;
    for isa in Isa::available() {
        let kernels = Kernels::of(isa).unwrap();
        for format in Dtype::ALL.map(KvFormat::of).into_iter().filter(|&format| codec_of(format) < DIRECT) {
            let direct = &kernels.direct[codec_of(format)];
            for dim in [32, 64, 96, 128, 256, 48, 16].into_iter().filter(|dim| dim % format.block_elements() == 0) {
                let bytes = format.row_bytes(dim);
                let (k, v) = (rows(format, dim, KEYS, true), rows(format, dim, KEYS, false));
                let pointers = |rows: &[u8]| -> Vec<_> { (0..KEYS).map(|t| rows[t * bytes..].as_ptr()).collect() };
                let wanted = |rows: &[u8]| -> Vec<_> {
                    (0..KEYS).map(|t| wide(format, &rows[t * bytes..], format.block_bytes(), dim)).collect()
                };
                let (k_rows, v_rows, k_wanted, v_wanted) = (pointers(&k), pointers(&v), wanted(&k), wanted(&v));
                let equal = |a: f32, b: f32| a == b || a.is_nan() && b.is_nan();
                for count in [1, 2, 3, 4] {
                    for first in (0..=dim - count).step_by(count) {
                        let mut q = vec![0f32; count * dim];
                        (0..count).for_each(|r| q[r * dim + first + r] = 1.0);
                        let (origin, mut scores) = ([0f32; 4], vec![7f32; count * TILE]);
                        let args = ScoreArgs {
                            q: q.as_ptr(),
                            heads: 1,
                            rows: count,
                            dim,
                            k: k_rows.as_ptr(),
                            offset: 0,
                            head: bytes,
                            keys: KEYS,
                            origin: origin.as_ptr(),
                            scores: scores.as_mut_ptr(),
                            prefetch: Prefetch::NONE,
                        };
                        // SAFETY: the arguments are of these arrays, and the machine has the instruction set.
                        unsafe { (direct.scores)(&args) };
                        for (r, t) in (0..count).flat_map(|r| (0..KEYS).map(move |t| (r, t))) {
                            let (found, wanted) = (scores[r * TILE + t], k_wanted[t][first + r]);
                            let place = (dim, t, first + r);
                            assert!(equal(found, wanted), "{} {format:?} k {place:?}: {found} {wanted}", isa.name());
                        }
                    }
                    for t in 0..KEYS {
                        let weights = vec![1f32; count * TILE];
                        let mut open = vec![0f32; count * (dim + SUM_LANES)];
                        let args = ValueArgs {
                            weights: weights.as_ptr(),
                            heads: 1,
                            rows: count,
                            dim,
                            v: v_rows[t..].as_ptr(),
                            offset: 0,
                            head: bytes,
                            keys: 1,
                            open: open.as_mut_ptr(),
                            prefetch: Prefetch::NONE,
                        };
                        // SAFETY: as above.
                        unsafe { (direct.values)(&args) };
                        for (r, d) in (0..count).flat_map(|r| (0..dim).map(move |d| (r, d))) {
                            let (found, wanted) = (open[r * (dim + SUM_LANES) + d], v_wanted[t][d]);
                            let place = (dim, t, d);
                            assert!(equal(found, wanted), "{} {format:?} v {place:?}: {found} {wanted}", isa.name());
                        }
                    }
                }
            }
        }
    }
}

/// One key: the log-sum-exps of queries of one element each are its elements, and the outputs of a query of zeros its value.
#[test]
fn one_key_comes_through() {
    for isa in Isa::available() {
        for dtype in Dtype::ALL {
            for (dim, scale, finite) in [(128usize, 1f32, true), (32, 0.5, true), (96, -2.0, true), (64, 1.0, false)] {
                let format = KvFormat::of(dtype);
                let mut desc = AttentionDesc::new(1, 1, dim as i32, 1);
                (desc.k_dtype, desc.v_dtype, desc.scale, desc.max_query_tokens) = (dtype, dtype, 1.0, dim as i32 + 1);
                let (k, v) = (rows(format, dim, 1, true), rows(format, dim, 1, finite));
                let wanted = |row| wide(format, row, format.block_bytes(), dim).into_iter().map(move |x| x * scale);
                let mut q = vec![0f32; (dim + 1) * dim];
                (0..dim).for_each(|d| q[d * dim + d] = 1.0);
                let mut out = vec![0f32; (dim + 1) * dim];
                let (lengths, scales) = ([1], [scale]);
                let args = DecodeArgs {
                    batch: 1,
                    query_tokens: dim as i32 + 1,
                    q: Tensor::from_slice(&q),
                    k: Tensor::from_slice(&k),
                    v: Tensor::from_slice(&v),
                    k_scale: Tensor::from_slice(&scales),
                    v_scale: Tensor::from_slice(&scales),
                    out: Tensor::from_slice_mut(&mut out),
                    kv_length: lengths.as_ptr(),
                    ..DecodeArgs::default()
                };
                let step = Step::new(&desc, Shard::ALONE, &args, 1).unwrap();
                let workers = Workers::new(1, "test", false).unwrap();
                let backend = CpuBackend::new(&desc, Shard::ALONE, 1, isa).unwrap();
                let (mut o, mut lse) = (vec![7.0; (dim + 1) * dim], vec![Lse::of(7.0); dim + 1]);
                let rows = PartialRows { o: &mut o, lse: &mut lse, dim };
                // SAFETY: what the step points at are locals, which nobody writes meanwhile.
                unsafe { backend.attend(&step, &workers, rows) }.unwrap();
                for (d, (lse, wanted)) in
                    lse.iter().zip(wanted(&k)).enumerate().filter(|_| dtype != Dtype::F32 && dtype != Dtype::Bf16)
                {
                    let error = (lse.high - wanted).abs();
                    assert!(
                        error <= 1e-6 * wanted.abs().max(1.0),
                        "{} {dtype:?} k {d}: {} {wanted}",
                        isa.name(),
                        lse.high
                    );
                }
                for (d, (&found, wanted)) in o[dim * dim..].iter().zip(wanted(&v)).enumerate() {
                    let same = found == wanted || !found.is_finite() && !wanted.is_finite();
                    assert!(same, "{} {dtype:?} v {d}: {found} {wanted}", isa.name());
                }
            }
        }
    }
}
