//! Partials by the conventions of other kernels, on GPUs against CPUs (whose merges tests/c/conventions.c holds against doubles).

use std::ffi::c_void;

use treeattn::attention::{Algorithm, AttentionDesc, Dtype, OutputMode, Tensor};
use treeattn::runtime::{
    Buffer, CommConfig, Communicator, Device, DeviceKind, MergeArgs, Plan, Runtime, RuntimeConfig, Stream,
    merge_partials,
};

use super::LONG;
use crate::group::Group;
use crate::numerics::shape;
use crate::support::rng::Rng;

const CPU: Device = Device { kind: DeviceKind::Cpu, ordinal: 0 };
const HEADS: usize = 4;

/// How a caller passes partials. Sequences have a token each, but with `starts`.
#[derive(Clone, Copy, Debug)]
struct Convention {
    tokens: usize,
    dim: usize,
    base: i32,
    out_base: i32,
    sums: bool,
    by_heads: bool,
    starts: bool,
    lengths: bool,
    empty: f32,
}

/// Where the parts of a rank's memory begin: o, pairs of lse and sum, starts, lengths, out, out_lse, the end.
fn places(c: &Convention) -> [usize; 7] {
    let rows = c.tokens * HEADS;
    let sizes = [rows * c.dim, 2 * rows, c.tokens + 4, c.tokens + 4, rows * c.dim, rows];
    let mut places = [0; 7];
    for (i, size) in sizes.into_iter().enumerate() {
        places[i + 1] = places[i] + (4 * size).next_multiple_of(16);
    }
    places
}

/// What lies there.
fn memory(c: &Convention, rank: u64) -> Vec<u8> {
    let (places, rows) = (places(c), c.tokens * HEADS);
    let mut memory = vec![0xff; places[6]];
    let mut r = Rng::new(77 + rank);
    let mut put = |place: usize, n: usize, word: [u8; 4]| memory[places[place] + 4 * n..][..4].copy_from_slice(&word);
    for row in 0..rows {
        let at = if c.by_heads { row % HEADS * c.tokens + row / HEADS } else { row };
        let is_empty = r.range(0, 4) == 0;
        let sum = (r.normal() * 2.0).exp() as f32;
        put(1, 2 * at, if is_empty { c.empty } else { (3.0 * r.normal()) as f32 }.to_ne_bytes());
        put(1, 2 * at + 1, sum.to_ne_bytes());
        for d in 0..c.dim {
            let x = if is_empty { f32::NAN } else { r.normal() as f32 };
            put(0, row * c.dim + d, x.to_ne_bytes());
        }
    }
    // Two tokens of the second sequence, the last three of none.
    let sequences = c.tokens as i32 - 4;
    for i in 0..=sequences {
        put(2, i as usize, (i + i32::from(i > 1)).to_ne_bytes());
    }
    for i in 0..c.tokens {
        put(3, i, (r.range(0, 3) as i32 - 1).to_ne_bytes());
    }
    memory
}

/// The arguments of memory that begins at `base`. `own`: heads of the output.
fn arguments(c: &Convention, base: *mut c_void, own: usize) -> MergeArgs {
    let places = places(c);
    let part = |place: usize, skipped: usize, bytes: usize, stride: [i64; 4]| Tensor {
        data: base.wrapping_byte_add(places[place] + skipped),
        bytes: bytes as u64,
        stride,
    };
    let (rows, tokens, heads) = (c.tokens * HEADS, c.tokens as i64, HEADS as i64);
    let stride = if c.by_heads { [8, 8 * tokens, 0, 0] } else { [8 * heads, 8, 0, 0] };
    let index = |place: usize, given: bool| match given {
        true => base.wrapping_byte_add(places[place]).cast::<i32>().cast_const(),
        false => std::ptr::null(),
    };
    MergeArgs {
        query_tokens: c.tokens as i32,
        heads: HEADS as i32,
        head_dim: c.dim as i32,
        o: part(0, 0, 4 * rows * c.dim, [0; 4]),
        lse: part(1, 0, 8 * rows - 4, stride),
        sum: if c.sums { part(1, 4, 8 * rows - 4, stride) } else { Tensor::NULL },
        lse_base: c.base,
        plus_inf_is_empty: c.empty == f32::INFINITY,
        nan_is_empty: c.empty.is_nan(),
        query_start: index(2, c.starts),
        kv_length: index(3, c.lengths),
        batch: if c.starts {
            c.tokens as i32 - 4
        } else if c.lengths {
            c.tokens as i32
        } else {
            0
        },
        out: part(4, 0, 4 * c.tokens * own * c.dim, [0; 4]),
        out_lse: part(5, 0, 4 * c.tokens * own, [0; 4]),
        out_lse_base: c.out_base,
        ..MergeArgs::default()
    }
}

/// The outputs in that memory.
fn outputs<'a>(c: &Convention, memory: &'a [u8]) -> impl Iterator<Item = f32> + 'a {
    memory[places(c)[4]..].chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
}

fn compare(c: &Convention, slack: f32, found: &[u8], wanted: &[u8]) {
    for (n, (a, b)) in outputs(c, found).zip(outputs(c, wanted)).enumerate() {
        let same = a == b || a.is_nan() && b.is_nan() || (a - b).abs() <= slack * b.abs().max(1.0);
        assert!(same, "{c:?}: output {n} is {a}, wanted {b}");
    }
}

fn table(tokens: usize, dim: usize) -> impl Iterator<Item = Convention> {
    let bits = |n: u32, bit: u32| n >> bit & 1 == 1;
    (0..24u32).map(move |n| Convention {
        tokens,
        dim,
        base: if bits(n, 0) { 2 } else { 0 },
        out_base: if bits(n, 1) { 2 } else { 0 },
        sums: bits(n, 2),
        by_heads: bits(n, 0) != bits(n, 3),
        starts: n >= 16,
        lengths: n >= 8 && bits(n, 1) != bits(n, 2) || n >= 20,
        empty: [f32::NEG_INFINITY, f32::INFINITY, f32::NAN][n as usize % 3],
    })
}

/// Merges between ranks by every convention, in each kernel of exchanges over windows, and in one place.
pub fn conventions() {
    over(|_| 1, &[Algorithm::OneShot, Algorithm::TwoShot]);
}

/// The same between ranks with a GPU each, in one shot: over NCCL where that is asked for.
pub fn conventions_of_gpus() {
    over(|world| world, &[Algorithm::OneShot]);
}

fn over(gpus: fn(usize) -> usize, algorithms: &[Algorithm]) {
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let count = runtime.device_count(DeviceKind::Cuda).unwrap() as usize;
    for (world, tokens, dim, algorithm, output, wire_dtype) in [
        (2, 7, 128, Algorithm::OneShot, OutputMode::Replicated, Dtype::F32),
        (3, 70, 64, Algorithm::OneShot, OutputMode::Scattered, Dtype::F32),
        (2, 6, 30, Algorithm::OneShot, OutputMode::Replicated, Dtype::Bf16),
        (3, 9, 512, Algorithm::OneShot, OutputMode::Replicated, Dtype::F32),
        (3, 8, 64, Algorithm::TwoShot, OutputMode::Replicated, Dtype::F32),
    ] {
        if !algorithms.contains(&algorithm) || gpus(world) > count {
            continue;
        }
        let desc = AttentionDesc {
            kv_heads: 0,
            max_query_tokens: tokens as i32,
            out_dtype: Dtype::F32,
            algorithm,
            output,
            wire_dtype,
            ..shape(HEADS as i32, HEADS as i32, dim as i32, Dtype::F32)
        };
        let group = Group::over(world, gpus(world), LONG);
        let plans = group.plans(&desc);
        let ends = Communicator::create_local(&runtime, &vec![CPU; world], &CommConfig::default()).unwrap();
        let host_plans = Plan::create_all(&ends.iter().collect::<Vec<_>>(), &desc).unwrap();
        let streams: Vec<Stream> = (0..world).map(|_| Stream::new(&runtime, CPU).unwrap()).collect();
        // Two shots take what was merged over the wire as well.
        let slack = if wire_dtype == Dtype::F32 { 1e-5 } else { 3e-2 };
        for c in table(tokens, dim) {
            let mut host: Vec<Vec<u8>> = (0..world).map(|rank| memory(&c, rank as u64)).collect();
            let buffers: Vec<Buffer> = host
                .iter()
                .zip(&group.gpus)
                .map(|(memory, gpu)| {
                    let buffer = Buffer::alloc(&gpu.runtime, gpu.device, memory.len()).unwrap();
                    buffer.upload(0, memory).unwrap();
                    buffer
                })
                .collect();
            for (rank, memory) in host.iter_mut().enumerate() {
                let own = plans[rank].heads().len();
                let args = arguments(&c, memory.as_mut_ptr().cast(), own);
                // SAFETY: the vectors outlive the step, which is waited for below.
                unsafe { host_plans[rank].merge(&args, Some(&streams[rank])) }.unwrap();
                let args = arguments(&c, buffers[rank].data(), own);
                // SAFETY: the buffers outlive the step, which is waited for below.
                unsafe { plans[rank].merge(&args, Some(&group.gpus[rank].stream)) }.unwrap();
            }
            for rank in 0..world {
                streams[rank].synchronize().unwrap();
                group.gpus[rank].stream.synchronize().unwrap();
                let mut found = vec![0; host[rank].len()];
                buffers[rank].download(0, &mut found).unwrap();
                compare(&c, slack, &found, &host[rank]);
            }
            in_one_place(&group, &runtime, &c);
        }
        assert!(group.errors().into_iter().flatten().next().is_none());
    }
}

/// The merge of a partial with itself, which lies there once: a stride of 0.
fn in_one_place(group: &Group, runtime: &Runtime, c: &Convention) {
    let gpu = &group.gpus[0];
    let mut host = memory(c, 0);
    let buffer = Buffer::alloc(&gpu.runtime, gpu.device, host.len()).unwrap();
    buffer.upload(0, &host).unwrap();
    let twice = |base| {
        let mut args = arguments(c, base, HEADS);
        let [token, head, ..] = args.lse.stride;
        args.lse.stride = [0, token, head, 0];
        args.sum.stride = if c.sums { args.lse.stride } else { [0; 4] };
        let row = 4 * c.dim as i64;
        args.o.stride = [0, row * HEADS as i64, row, 4];
        args
    };
    // SAFETY: the vector outlives the blocking call.
    unsafe { merge_partials(runtime, CPU, &twice(host.as_mut_ptr().cast()), 2, None) }.unwrap();
    // SAFETY: the buffer outlives the merge, which is waited for.
    unsafe { merge_partials(&gpu.runtime, gpu.device, &twice(buffer.data()), 2, Some(&gpu.stream)) }.unwrap();
    gpu.stream.synchronize().unwrap();
    let mut found = vec![0; host.len()];
    buffer.download(0, &mut found).unwrap();
    compare(c, 1e-5, &found, &host);
}
