//! Statistics and memory of plans on GPUs against formulas.

use treeattn::attention::{Algorithm, AttentionDesc, Dtype, OutputMode, Shard, head_range};
use treeattn::runtime::MergeArgs;

use super::{LONG, counts};
use crate::group::{Group, ranks};
use crate::numerics::shape;
use crate::support::case::Case;
use crate::support::values::Values;

/// Bytes of a row on its way: two words for its lse, then o, in an even number of 32-bit words.
fn row_bytes(dim: u64, size: u64) -> u64 {
    4 * (2 + (dim * size).div_ceil(4).next_multiple_of(2))
}

/// What a rank sends in a step of `tokens` tokens: rounds, messages, rows.
fn wanted(mode: Mode, heads: i32, shard: Shard, tokens: u64) -> (u64, u64, u64) {
    let (others, own) = (shard.world as u64 - 1, head_range(heads, shard).unwrap().len() as u64);
    let not_own = heads as u64 - own;
    match mode {
        // Every row to every other rank.
        Mode::OneShot => (1, others, tokens * heads as u64 * others),
        // Every row to the owner of its head.
        Mode::Scattered => (1, others, tokens * not_own),
        // The same, then the merged rows of the own heads to every other rank.
        Mode::TwoShot => (2, 2 * others, tokens * (not_own + own * others)),
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    OneShot,
    Scattered,
    TwoShot,
}

const MODES: [Mode; 3] = [Mode::OneShot, Mode::Scattered, Mode::TwoShot];

fn with_mode(mode: Mode, desc: AttentionDesc) -> AttentionDesc {
    match mode {
        Mode::OneShot => AttentionDesc { algorithm: Algorithm::OneShot, ..desc },
        Mode::Scattered => AttentionDesc { output: OutputMode::Scattered, ..desc },
        Mode::TwoShot => AttentionDesc { algorithm: Algorithm::TwoShot, ..desc },
    }
}

/// Exact statistics of every mode: heads that do not divide by the ranks, a narrow wire, several steps.
pub fn statistics() {
    for on in counts() {
        for world in [2, 3] {
            let group = Group::over(world, on, LONG);
            for mode in MODES {
                for wire_dtype in [Dtype::F32, Dtype::Bf16] {
                    let base = AttentionDesc { out_dtype: Dtype::F32, wire_dtype, ..shape(5, 1, 64, Dtype::F16) };
                    let case = Case::plain(with_mode(mode, base), world, &[(40, 3), (0, 1)], Values::Normal, 5);
                    let (mut all, plans) = (ranks(&case), group.plans(&case.desc));
                    let mirrors = group.mirrors(&all);
                    for step in 1..=3 {
                        group.step(&plans, &mirrors, &mut all);
                        for (rank, plan) in plans.iter().enumerate() {
                            let shard = Shard { rank: rank as i32, world: world as i32 };
                            let (rounds, messages, rows) = wanted(mode, 5, shard, 4);
                            let found = plan.stats().unwrap();
                            let bytes = rows * row_bytes(64, wire_dtype.size() as u64);
                            assert_eq!(
                                (found.steps, found.rounds, found.messages, found.bytes_sent),
                                (step, step * rounds, step * messages, step * bytes),
                                "{mode:?}, rank {rank} of {world}, {wire_dtype:?}"
                            );
                            let algorithm = if mode == Mode::TwoShot { Algorithm::TwoShot } else { Algorithm::OneShot };
                            assert_eq!((found.algorithm, found.rank), (algorithm, rank as i32));
                        }
                    }
                }
            }
        }
    }
}

/// Exact memory of every mode: the window by what it holds, and the workspace of a plan whose partials do not fit a slot
/// by one whose do.
pub fn memory() {
    /// Words of a window before its slots, and of a slot before its rows.
    const CONTROL: u64 = 512;
    const HEADER: u64 = 16;
    for on in counts() {
        for world in [2u64, 3] {
            let group = Group::over(world as usize, on, LONG);
            let text = group.comms[0].describe().unwrap();
            let number = |name: &str| -> u64 {
                let rest = text.split(&format!("\"{name}\":")).nth(1).unwrap();
                rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
            };
            let capacity = number("capacity_bytes");
            assert_eq!(capacity, 1 << 20);
            // A slot for every rank and one for merged rows, each once a parity; half of a word is payload.
            let window = 8 * (CONTROL + 2 * (world + 1) * (HEADER + capacity / 4));
            assert_eq!(number("window_bytes"), window);
            for mode in MODES {
                let plans = |desc: &AttentionDesc| group.plans(&with_mode(mode, *desc));
                let base = AttentionDesc { max_batch: 2, max_kv_length: 64, ..shape(8, 2, 64, Dtype::F16) };
                let (small, large) = (
                    AttentionDesc { max_query_tokens: 1, ..base },
                    // 4,096 rows of 264 bytes are more than a slot.
                    AttentionDesc { max_query_tokens: 512, ..base },
                );
                let [small, large] = [plans(&small), plans(&large)].map(|plans| plans[1].memory().unwrap());
                assert_eq!((small.window, large.window), (window, window), "{mode:?}");
                let rows = 512 * 8;
                // A plan with more rows loads a kernel for more of them, too, whose own workspace is not less.
                let local = AttentionDesc { output: OutputMode::Local, max_query_tokens: 512, ..base };
                let local = group.plans(&local)[1].memory().unwrap();
                assert_eq!(large.workspace - local.workspace, rows * 64 * 4 + rows * 8, "{mode:?}");
                let local = AttentionDesc { output: OutputMode::Local, max_query_tokens: 1, ..base };
                let local = group.plans(&local)[1].memory().unwrap();
                assert_eq!(small.workspace, local.workspace, "{mode:?}");
                assert!(small.workspace > 0);
            }
        }
    }
}

/// Statistics of a merge of the engine's own partials are those of a step of as many rows.
pub fn statistics_of_merges() {
    // With two ranks a rank sends as many rows in two shots as in one; heads that do not divide tell more.
    for (mode, world) in MODES.into_iter().flat_map(|mode| [(mode, 2), (mode, 3)]) {
        let (tokens, heads, dim) = (3, 4, 64);
        let group = Group::over(world, counts().pop().unwrap(), LONG);
        let base = AttentionDesc {
            kv_heads: 0,
            max_query_tokens: tokens,
            out_dtype: Dtype::F32,
            ..shape(heads, heads, dim, Dtype::F16)
        };
        let plans = group.plans(&with_mode(mode, base));
        let rows = (tokens * heads) as usize;
        let (o_bytes, lse_bytes) = (4 * rows * dim as usize, 4 * rows);
        let buffers: Vec<_> = group
            .gpus
            .iter()
            .map(|gpu| {
                let bytes = 2 * (o_bytes + lse_bytes);
                treeattn::runtime::Buffer::alloc(&gpu.runtime, gpu.device, bytes).unwrap()
            })
            .collect();
        for (rank, buffer) in buffers.iter().enumerate() {
            let part = |at: usize, bytes: usize| treeattn::attention::Tensor {
                data: buffer.data().wrapping_byte_add(at),
                bytes: bytes as u64,
                stride: [0; 4],
            };
            let second = o_bytes + lse_bytes;
            let args = MergeArgs {
                query_tokens: tokens,
                heads: 0,
                head_dim: 0,
                o: part(0, o_bytes),
                o_dtype: Dtype::F32,
                lse: part(o_bytes, lse_bytes),
                lse_base: 0,
                out: part(second, o_bytes),
                out_dtype: None,
                out_lse: part(second + o_bytes, lse_bytes),
                ..MergeArgs::default()
            };
            // SAFETY: the buffers outlive the step, which is waited for.
            unsafe { plans[rank].merge(&args, Some(&group.gpus[rank].stream)) }.unwrap();
        }
        for (rank, (gpu, plan)) in group.gpus.iter().zip(&plans).enumerate() {
            gpu.stream.synchronize().unwrap();
            let shard = Shard { rank: rank as i32, world: world as i32 };
            let (rounds, messages, sent) = wanted(mode, heads, shard, tokens as u64);
            let found = plan.stats().unwrap();
            assert_eq!(
                (found.rounds, found.messages, found.bytes_sent),
                (rounds, messages, sent * row_bytes(dim as u64, 4)),
                "{mode:?}, rank {rank} of {world}"
            );
        }
    }
}
