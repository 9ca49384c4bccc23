//! What engines were compiled with: sizes and offsets of structs, without implicit padding, and the values of codes,
//! which are the discriminants of the library's own types. Nothing here runs.

use super::codes::*;
use super::types::*;
use crate::attention::{Algorithm, Dtype, KvLayout, MaskKind, OutputMode, QueryInput, Reproducibility};
use crate::error::ErrorKind;
use crate::runtime::{DeviceKind, LogLevel};

macro_rules! layout {
    ($($name:ident, $bytes:literal: $($field:ident $size:expr),+;)*) => {
        $(const _: () = {
            let mut next = 0;
            $(
                assert!(std::mem::offset_of!($name, $field) == next);
                next += $size;
            )+
            assert!(next == $bytes && size_of::<$name>() == $bytes);
        };)*
    };
}

const T: usize = size_of::<treeattn_tensor_t>();

layout! {
    treeattn_tensor_t, 48: data 8, bytes 8, stride 32;
    treeattn_placement_t, 8: kind 4, interleave 4;
    treeattn_runtime_config_t, 16: struct_size 8, cpu_isa 8;
    treeattn_device_info_t, 408: struct_size 8, device 4, units 4, memory 8, name 128, isa 256;
    treeattn_executor_t, 32: struct_size 8, ctx 8, threads 4, flags 4, parallel 8;
    treeattn_comm_config_t, 64: struct_size 8, setup_timeout_ns 8, step_timeout_ns 8, threads_per_rank 4, node_group 4,
        nccl_path 8, node_groups 8, executor 8, max_team 4, reserved 4;
    treeattn_comm_status_t, 552: struct_size 8, code 4, rank 4, step 8, plan 8, sequence 4, broken 4, message 512;
    treeattn_attention_desc_t, 128: struct_size 8, q_heads 4, kv_heads 4, head_dim_qk 4, head_dim_v 4, q_dtype 4,
        k_dtype 4, v_dtype 4, out_dtype 4, kv_layout 4, page_size 4, placement 8, max_batch 4, max_query_tokens 4,
        max_kv_length 4, scale 4, causal 4, window 4, softcap 4, alibi 4, sinks 4, mask 4, mask_dtype 4, query_input 4,
        output 4, algorithm 4, reproducibility 4, wire_dtype 4, flags 4, reserved 4;
    treeattn_decode_args_t, 672: struct_size 8, batch 4, query_tokens 4, q T, k T, v T, out T, lse T, query_start 8,
        kv_length 8, global_length 8, kv_start 8, kv_position 8, kv_position_stride 8, query_position 8, block_table 8,
        max_pages 4, num_pages 4, page_indptr 8, page_indices 8, num_page_indices 8, last_page_len 8, k_scale T,
        v_scale T, alibi_slopes T, sinks T, mask T, kv_capacity 4, reserved 4, mask_factor T,
        page_index_head_stride 8, kv_position_head_stride 8;
    treeattn_team_t, 32: struct_size 8, index 4, size 4, barrier 8, ctx 8;
    treeattn_merge_args_t, 304: struct_size 8, query_tokens 4, heads 4, head_dim 4, o_dtype 4, out_dtype 4, lse_base 4,
        flags 4, out_lse_base 4, o T, lse T, out T, out_lse T, sum T, query_start 8, kv_length 8, batch 4, reserved 4;
    treeattn_plan_memory_t, 24: struct_size 8, workspace 8, window 8;
    treeattn_plan_stats_t, 336: struct_size 8, plan 8, steps 8, rounds 8, messages 8, bytes_sent 8, peak_memory 8,
        algorithm 4, wire_dtype 4, head_begin 4, head_end 4, reason 256, exchange_memory 8;
    treeattn_transport_t, 40: struct_size 8, ctx 8, allgather 8, sendrecv 8, flags 4, reserved 4;
    treeattn_selfcheck_config_t, 40: struct_size 8, ranks 4, batch 4, query_tokens 4, kv_length 4, seed 8, devices 8;
    treeattn_selfcheck_report_t, 312: struct_size 8, passed 4, same_bits 4, rows 8, max_error_ratio 8,
        max_lse_error_ratio 8, correctly_rounded 8, relative_l2 8, message 256;
}

macro_rules! mirrors {
    ($($code:ident == $value:expr;)*) => { $(const _: () = assert!($code.0 == $value as i32);)* };
}
mirrors! {
    TREEATTN_ERROR_INVALID_ARGUMENT == ErrorKind::InvalidArgument;
    TREEATTN_ERROR_BAD_HANDLE == ErrorKind::BadHandle;
    TREEATTN_ERROR_PARENT_DESTROYED == ErrorKind::ParentDestroyed;
    TREEATTN_ERROR_UNSUPPORTED == ErrorKind::Unsupported;
    TREEATTN_ERROR_UNAVAILABLE == ErrorKind::Unavailable;
    TREEATTN_ERROR_MISMATCH == ErrorKind::Mismatch;
    TREEATTN_ERROR_DESYNC == ErrorKind::Desync;
    TREEATTN_ERROR_TIMEOUT == ErrorKind::Timeout;
    TREEATTN_ERROR_PEER_LOST == ErrorKind::PeerLost;
    TREEATTN_ERROR_ABORTED == ErrorKind::Aborted;
    TREEATTN_ERROR_INVALID_DATA == ErrorKind::InvalidData;
    TREEATTN_ERROR_NO_MEMORY == ErrorKind::NoMemory;
    TREEATTN_ERROR_NO_DEVICE_MEMORY == ErrorKind::NoDeviceMemory;
    TREEATTN_ERROR_CAPTURING == ErrorKind::Capturing;
    TREEATTN_ERROR_CUDA == ErrorKind::Cuda;
    TREEATTN_ERROR_CUDA_FATAL == ErrorKind::CudaFatal;
    TREEATTN_ERROR_CUDA_PRIOR == ErrorKind::CudaPrior;
    TREEATTN_ERROR_NCCL == ErrorKind::Nccl;
    TREEATTN_ERROR_TRANSPORT == ErrorKind::Transport;
    TREEATTN_ERROR_SYSTEM == ErrorKind::System;
    TREEATTN_ERROR_INTERNAL == ErrorKind::Internal;
    TREEATTN_ERROR_BUSY == ErrorKind::Busy;
    TREEATTN_ERROR_EXECUTOR == ErrorKind::Executor;
    TREEATTN_DTYPE_F32 == Dtype::F32;
    TREEATTN_DTYPE_F16 == Dtype::F16;
    TREEATTN_DTYPE_BF16 == Dtype::Bf16;
    TREEATTN_DTYPE_F8_E4M3 == Dtype::F8E4M3;
    TREEATTN_DTYPE_F8_E5M2 == Dtype::F8E5M2;
    TREEATTN_DTYPE_Q8_0 == Dtype::Q8_0;
    TREEATTN_DTYPE_Q4_0 == Dtype::Q4_0;
    TREEATTN_DTYPE_INT8 == Dtype::Int8;
    TREEATTN_DTYPE_Q4_1 == Dtype::Q4_1;
    TREEATTN_DTYPE_Q5_0 == Dtype::Q5_0;
    TREEATTN_DTYPE_Q5_1 == Dtype::Q5_1;
    TREEATTN_DTYPE_IQ4_NL == Dtype::Iq4Nl;
    TREEATTN_DEVICE_CPU == DeviceKind::Cpu;
    TREEATTN_DEVICE_CUDA == DeviceKind::Cuda;
    TREEATTN_KV_LAYOUT_STRIDED == KvLayout::Strided;
    TREEATTN_KV_LAYOUT_BLOCK_TABLE == KvLayout::BlockTable;
    TREEATTN_KV_LAYOUT_CSR_PAGES == KvLayout::CsrPages;
    TREEATTN_MASK_NONE == MaskKind::None;
    TREEATTN_MASK_ADDITIVE == MaskKind::Additive;
    TREEATTN_MASK_BOOLEAN == MaskKind::Boolean;
    TREEATTN_QUERY_INPUT_REPLICATED == QueryInput::Replicated;
    TREEATTN_QUERY_INPUT_SCATTERED == QueryInput::Scattered;
    TREEATTN_OUTPUT_REPLICATED == OutputMode::Replicated;
    TREEATTN_OUTPUT_SCATTERED == OutputMode::Scattered;
    TREEATTN_OUTPUT_LOCAL == OutputMode::Local;
    TREEATTN_OUTPUT_WEIGHTED == OutputMode::Weighted;
    TREEATTN_ALGORITHM_AUTO == Algorithm::Auto;
    TREEATTN_ALGORITHM_ONE_SHOT == Algorithm::OneShot;
    TREEATTN_ALGORITHM_TWO_SHOT == Algorithm::TwoShot;
    TREEATTN_ALGORITHM_TREE == Algorithm::Tree;
    TREEATTN_ALGORITHM_ALLREDUCE3 == Algorithm::Allreduce3;
    TREEATTN_ALGORITHM_RING == Algorithm::Ring;
    TREEATTN_REPRODUCIBILITY_REPEATABLE == Reproducibility::Repeatable;
    TREEATTN_REPRODUCIBILITY_BATCH_INVARIANT == Reproducibility::BatchInvariant;
    TREEATTN_REPRODUCIBILITY_CANONICAL == Reproducibility::Canonical;
    TREEATTN_LOG_ERROR == LogLevel::Error;
    TREEATTN_LOG_WARNING == LogLevel::Warning;
    TREEATTN_LOG_INFO == LogLevel::Info;
}
