//! What the kernels take: plain data, mirrored in `kernels/params.cuh`. `abi` compares the two, field by field.
//!
//! Addresses are of the device, strides bytes.

use crate::attention::{Dtype, KvLayout};
use crate::partial::view::window;
use crate::partial::{ExchangeView, RowSource, RowTarget};

/// Rows that a block of a merge, an exchange or an allreduce takes at a time, a warp each.
pub const ROWS_A_BLOCK: u64 = 8;
/// Threads of such a block.
pub const ROW_THREADS: u32 = 32 * ROWS_A_BLOCK as u32;
/// Blocks of an exchange that a multiprocessor holds at least, by its launch bounds.
pub const EXCHANGE_BLOCKS_A_UNIT: i32 = 2;
/// What `kernels/exchange_rows.cu` serves: ranks, words of a row's o, and elements that a lane takes at a time.
pub const ROWS_MOST_RANKS: i32 = 8;
pub const ROWS_MOST_WORDS: usize = 128;
pub const ROWS_ELEMENTS: i64 = 4;
/// Keys of a tile.
pub const TILE: u64 = 16;
/// Split partials that a block of the grid leaves room for: of its first and its last item, and of the merges' first level.
pub const PARTIALS_A_BLOCK: usize = 4;
/// Partials of an item that are merged in one go, and those that an item has at most: they are merged in two levels.
pub const FAN_IN: u64 = 16;
pub const MOST_PARTIALS: u64 = FAN_IN * FAN_IN;
/// Key tiles that a block takes before the next one gets any.
pub const MIN_TILES: u64 = 4;
/// Blocks of an exchange that have rows of their own, at most: a bit each in the words of a window.
pub const MAX_SHARES: u64 = 64 * window::LEFT_OVER_WORDS;
/// `AllreduceParams::host`: steps begun, steps ended, bad data.
pub const STEPS_BEGUN: usize = 0;
pub const STEPS_ENDED: usize = 1;
pub const STEP_BAD_DATA: usize = 2;

/// `DecodeParams::flags`: a key is hidden from queries at earlier global positions.
pub const CAUSAL: u32 = 1;
/// Rows of k or v are not 16-byte aligned or not dense.
pub const NO_BULK: u32 = 2;
/// Rows are pushed to the ranks of `exchange` and not written.
pub const PUSH: u32 = 4;
/// Each lse is written as two floats, the second what the first lacks.
pub const LSE_IN_TWO: u32 = 8;

/// `Terms::mask_element`: there is no mask.
pub const MASK_NONE: i32 = 0;
/// f16, added.
pub const MASK_F16: i32 = 1;
/// f32, added.
pub const MASK_F32: i32 = 2;
/// Bytes; 0 hides.
pub const MASK_BYTE: i32 = 3;

/// Which token of a sequence lies in which local slot; `attention::Placement` as the kernels have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum PlacementKind {
    /// Slot i holds position kv_start + i.
    Contiguous = 0,
    /// Runs of `interleave` positions go to the ranks in turn.
    Interleaved = 1,
    /// Slot i holds position `kv_position[i]`.
    Explicit = 2,
}

/// How a kernel is launched; lies beside it in the image.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct KernelLaunch {
    /// Threads of a block.
    pub threads: i32,
    /// Dynamic shared memory of a block, bytes.
    pub dynamic_smem: i32,
    /// Blocks a multiprocessor.
    pub blocks_per_sm: i32,
    /// Bytes of one split partial.
    pub partial_bytes: i32,
    /// Counters of a block of the grid.
    pub counters: i32,
    /// Rows of a query tile.
    pub rows: i32,
    /// Key tiles of an item that a block may take without closing sums.
    pub open_tiles: i32,
    /// Bytes of a block's closed sums.
    pub long_bytes: i32,
}

impl KernelLaunch {
    /// What lies in the bytes that the image holds.
    pub fn from_bytes(bytes: [u8; size_of::<KernelLaunch>()]) -> KernelLaunch {
        let word = |i: usize| i32::from_ne_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]);
        KernelLaunch {
            threads: word(0),
            dynamic_smem: word(1),
            blocks_per_sm: word(2),
            partial_bytes: word(3),
            counters: word(4),
            rows: word(5),
            open_tiles: word(6),
            long_bytes: word(7),
        }
    }
}

/// Memory of a plan that outlives a step.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Workspace {
    /// Split partials.
    pub partials: u64,
    /// Counters, zero between launches.
    pub counters: u64,
    /// Two words of device memory: bad data ([`crate::partial::DataFault::word`]), and where in mapped host memory to tell it, 0
    /// for nowhere.
    pub status: u64,
    /// Two words of device memory: a lock, and where in mapped host memory to leave the value that was bad
    /// ([`crate::partial::view::value`]).
    pub found: u64,
}

/// One decode step.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct DecodeParams {
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub q_stride: [i64; 3],
    pub k_stride: [i64; 4],
    pub v_stride: [i64; 4],
    pub target: RowTarget,
    pub query_start: u64,
    pub kv_length: u64,
    pub global_length: u64,
    pub kv_start: u64,
    pub kv_position: u64,
    pub query_position: u64,
    pub block_table: u64,
    pub page_indptr: u64,
    pub page_indices: u64,
    pub last_page_len: u64,
    pub kv_position_stride: i64,
    pub block_table_stride: i64,
    pub num_page_indices: i64,
    pub kv_capacity: i64,
    pub k_end: i64,
    pub v_end: i64,
    pub batch: i32,
    pub query_tokens: i32,
    pub q_heads: i32,
    pub kv_heads: i32,
    pub group: i32,
    pub head_dim_qk: i32,
    pub q_dtype: Dtype,
    pub kv_layout: KvLayout,
    pub page_size: i32,
    pub num_pages: i32,
    pub placement: PlacementKind,
    pub interleave: i32,
    pub rank: i32,
    pub world: i32,
    pub scale: f32,
    pub flags: u32,
    pub waiting: i32,
    pub workspace: Workspace,
    pub exchange: ExchangeView,
}

/// What a step has beside [`DecodeParams`]: addresses are 0 where there is nothing.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Terms {
    pub sinks: u64,
    pub slopes: u64,
    pub mask: u64,
    pub mask_factor: u64,
    pub k_scale: u64,
    pub v_scale: u64,
    pub sink_stride: i64,
    pub slope_stride: i64,
    pub factor_stride: i64,
    pub mask_stride: [i64; 4],
    pub mask_bytes: u64,
    pub k_scale_stride: [i64; 3],
    pub v_scale_stride: [i64; 3],
    pub k_scale_end: i64,
    pub v_scale_end: i64,
    pub page_index_head_stride: i64,
    pub kv_position_head_stride: i64,
    pub mask_element: i32,
    pub window: i32,
    pub softcap: f32,
    /// 1 / (softcap * log2 e).
    pub cap_inverse: f32,
    pub k_dtype: Dtype,
    pub v_dtype: Dtype,
}

/// One decode step of a kernel that knows terms.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TermsParams {
    pub step: DecodeParams,
    pub terms: Terms,
}

/// A merge of given partials.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct MergeParams {
    /// The first partial.
    pub source: RowSource,
    pub target: RowTarget,
    /// Bytes from a partial's o, from its lse and from its sum to the next one's.
    pub step: [i64; 3],
    pub partials: i32,
    pub tokens: i32,
    pub heads: i32,
}

/// One exchange of partials.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ExchangeParams {
    pub source: RowSource,
    pub target: RowTarget,
    pub first_row: i64,
    pub rows: i64,
    pub is_pushed: i32,
    pub is_last: i32,
    pub waiting: i32,
    pub lse_in_two: i32,
    pub view: ExchangeView,
}

/// The check of a step by the ranks of a plan with the flag CHECKED.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct CheckParams {
    pub step: DecodeParams,
    /// First token and tokens, two i32, of each sequence in which ranks do not fit together.
    pub wrong: u64,
    /// The first sequence of the launch, and how many.
    pub first: i32,
    pub count: i32,
    pub needs_positions: i32,
    pub surplus_keys: i32,
}

/// The gather of queries that ranks have by heads, or a part of it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct QueryParams {
    /// This rank's queries, [token, own head, dim].
    pub q: u64,
    /// Those of all ranks, [token, head, dim] without gaps.
    pub gathered: u64,
    pub q_stride: [i64; 3],
    /// The first row of each rank, token * its heads + its head, and how many at most.
    pub first_row: i64,
    pub rows: i32,
    pub tokens: i32,
    /// Words of 32 bits of a row.
    pub words: i32,
    pub element_bytes: i32,
    pub view: ExchangeView,
}

/// What lies between the allreduces of the baseline.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct AllreduceParams {
    /// This rank's partial, then its numerators.
    pub o: u64,
    pub lse: u64,
    /// The largest lse of all ranks.
    pub most: u64,
    pub weights: u64,
    pub target: RowTarget,
    pub status: u64,
    pub words: u64,
    pub failed: u64,
    pub host: u64,
    pub arrived: u64,
    pub tokens: i32,
    pub heads: i32,
    pub head_dim: i32,
    pub first_head: i32,
    pub own_heads: i32,
    pub rank: i32,
    pub world: i32,
}

/// Bytes of a message over NCCL before its rows.
pub const GATHER_HEADER_BYTES: usize = 64;
/// Bytes of a row of such a message before its o: the log-sum-exp in two floats, and padding to where vectors begin.
pub const GATHER_ROW_HEAD: usize = 16;

/// What lies around the allgather of a step over NCCL.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct GatherParams {
    /// The partial to send; `o` 0: it is written to the message itself.
    pub source: RowSource,
    pub target: RowTarget,
    /// This rank's message.
    pub send: u64,
    /// Those of all ranks.
    pub received: u64,
    /// From one to the next.
    pub message_bytes: i64,
    pub row_bytes: i64,
    pub fingerprint: u64,
    pub words: u64,
    pub failed: u64,
    pub host: u64,
    pub failure: u64,
    pub arrived: u64,
    /// Messages to merge, i32; 0: all of them, in order.
    pub merged: u64,
    /// The rank that each message comes from, i32; 0: in order.
    pub senders: u64,
    pub wire_dtype: i32,
    pub lse_in_two: i32,
    pub tokens: i32,
    pub heads: i32,
    pub first_head: i32,
    pub own_heads: i32,
    pub rank: i32,
    pub world: i32,
    pub partials: i32,
}

/// The exchange within a node that comes before the allgather.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct NodeParams {
    pub gather: GatherParams,
    pub view: ExchangeView,
    pub status: u64,
    pub found: u64,
    pub members: u64,
    pub arrived: u64,
    pub first_row: i64,
    pub rows: i64,
    pub is_last: i32,
}
