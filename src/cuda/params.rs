//! What the kernels take: `kernels/params.cuh`, field by field.

use std::mem::offset_of;

use crate::partial::ExchangeView;

/// `DecodeParams::flags`: a key is hidden from queries at earlier global positions.
pub const CAUSAL: u32 = 1;
/// Keys and values older than the step's own tokens may be read before the dependency wait.
pub const KV_STABLE: u32 = 2;
/// Rows of k or v are not 16-byte aligned or not dense.
pub const NO_BULK: u32 = 4;
/// Rows are pushed to the ranks of `exchange` and not written.
pub const PUSH: u32 = 8;

/// How a kernel is launched; lies beside it in the image.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct KernelShape {
    pub threads: i32,
    pub dynamic_smem: i32,
    pub blocks_per_sm: i32,
    pub rows: i32,
    pub head_dim_qk: i32,
    pub head_dim_v: i32,
    pub partial_bytes: i32,
    pub counters: i32,
}

impl KernelShape {
    /// The shape in the bytes that the image holds.
    pub fn from_bytes(bytes: [u8; size_of::<KernelShape>()]) -> KernelShape {
        let word = |i: usize| i32::from_ne_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]);
        KernelShape {
            threads: word(0),
            dynamic_smem: word(1),
            blocks_per_sm: word(2),
            rows: word(3),
            head_dim_qk: word(4),
            head_dim_v: word(5),
            partial_bytes: word(6),
            counters: word(7),
        }
    }
}

/// Device memory of a plan that outlives a step.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Workspace {
    pub partials: u64,
    pub counters: u64,
    pub status: u64,
    pub host_status: u64,
}

/// One decode step. Addresses are of the device, strides bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct DecodeParams {
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub out: u64,
    pub lse: u64,
    pub q_stride: [i64; 3],
    pub k_stride: [i64; 4],
    pub v_stride: [i64; 4],
    pub out_stride: [i64; 3],
    pub lse_stride: [i64; 2],
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
    pub batch: i32,
    pub query_tokens: i32,
    pub q_heads: i32,
    pub kv_heads: i32,
    pub group: i32,
    pub head_dim_qk: i32,
    pub head_dim_v: i32,
    pub q_dtype: i32,
    pub k_dtype: i32,
    pub v_dtype: i32,
    pub out_dtype: i32,
    pub kv_layout: i32,
    pub page_size: i32,
    pub num_pages: i32,
    pub placement: i32,
    pub interleave: i32,
    pub rank: i32,
    pub world: i32,
    pub scale: f32,
    pub flags: u32,
    pub waiting: i32,
    pub min_tiles: i32,
    pub workspace: Workspace,
    pub exchange: ExchangeView,
}

/// A merge of given partials.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct MergeParams {
    pub o: u64,
    pub lse: u64,
    pub out: u64,
    pub out_lse: u64,
    pub o_stride: [i64; 4],
    pub lse_stride: [i64; 3],
    pub out_stride: [i64; 3],
    pub out_lse_stride: [i64; 2],
    pub partials: i32,
    pub tokens: i32,
    pub heads: i32,
    pub head_dim: i32,
    pub o_dtype: i32,
    pub out_dtype: i32,
    pub to_natural: f32,
    pub plus_inf_is_empty: i32,
}

/// One exchange of partials.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ExchangeParams {
    pub o: u64,
    pub lse: u64,
    pub out: u64,
    pub out_lse: u64,
    pub o_stride: [i64; 3],
    pub lse_stride: [i64; 2],
    pub out_stride: [i64; 3],
    pub out_lse_stride: [i64; 2],
    pub first_row: i64,
    pub rows: i64,
    pub head_dim: i32,
    pub o_dtype: i32,
    pub out_dtype: i32,
    pub to_natural: f32,
    pub plus_inf_is_empty: i32,
    pub is_pushed: i32,
    pub is_last: i32,
    pub reserved: i32,
    pub view: ExchangeView,
}

// The same offsets and sizes that params.cuh asserts.
const _: () = {
    assert!(size_of::<KernelShape>() == 32);
    assert!(size_of::<Workspace>() == 32);
    assert!(size_of::<ExchangeView>() == 128);
    assert!(offset_of!(ExchangeView, slot_words) == 32);
    assert!(offset_of!(ExchangeView, world) == 72);
    assert!(offset_of!(ExchangeView, own_heads) == 96);
    assert!(offset_of!(DecodeParams, q_stride) == 40);
    assert!(offset_of!(DecodeParams, query_start) == 168);
    assert!(offset_of!(DecodeParams, kv_position_stride) == 248);
    assert!(offset_of!(DecodeParams, batch) == 280);
    assert!(offset_of!(DecodeParams, scale) == 352);
    assert!(offset_of!(DecodeParams, workspace) == 368);
    assert!(offset_of!(DecodeParams, exchange) == 400);
    assert!(size_of::<DecodeParams>() == 528);
    assert!(offset_of!(MergeParams, o_stride) == 32);
    assert!(offset_of!(MergeParams, partials) == 128);
    assert!(size_of::<MergeParams>() == 160);
    assert!(offset_of!(ExchangeParams, o_stride) == 32);
    assert!(offset_of!(ExchangeParams, first_row) == 112);
    assert!(offset_of!(ExchangeParams, view) == 160);
    assert!(size_of::<ExchangeParams>() == 288);
};
