//! Sizes and offsets of the ABI's structs, as engines were compiled with them: no implicit padding.

use super::types::*;

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
    treeattn_comm_config_t, 48: struct_size 8, setup_timeout 8, step_timeout 8, threads_per_rank 4, node_group 4,
        nccl_path 8, node_groups 8;
    treeattn_comm_status_t, 552: struct_size 8, code 4, rank 4, step 8, plan 8, sequence 4, broken 4, message 512;
    treeattn_attention_desc_t, 128: struct_size 8, q_heads 4, kv_heads 4, head_dim_qk 4, head_dim_v 4, q_dtype 4,
        k_dtype 4, v_dtype 4, out_dtype 4, kv_layout 4, page_size 4, placement 8, max_batch 4, max_query_tokens 4,
        max_kv_length 4, scale 4, causal 4, window 4, softcap 4, alibi 4, sinks 4, mask 4, mask_dtype 4, query_input 4,
        output 4, algorithm 4, reproducibility 4, wire_dtype 4, flags 4, reserved 4;
    treeattn_decode_args_t, 600: struct_size 8, batch 4, query_tokens 4, q T, k T, v T, out T, lse T, query_start 8,
        kv_length 8, global_length 8, kv_start 8, kv_position 8, kv_position_stride 8, query_position 8, block_table 8,
        max_pages 4, num_pages 4, page_indptr 8, page_indices 8, num_page_indices 8, last_page_len 8, k_scale T,
        v_scale T, alibi_slopes T, sinks T, mask T;
    treeattn_merge_args_t, 232: struct_size 8, query_tokens 4, heads 4, head_dim 4, o_dtype 4, out_dtype 4, lse_base 4,
        flags 4, reserved 4, o T, lse T, out T, out_lse T;
    treeattn_plan_memory_t, 24: struct_size 8, workspace 8, window 8;
    treeattn_plan_stats_t, 336: struct_size 8, plan 8, steps 8, rounds 8, messages 8, bytes_sent 8, peak_memory 8,
        algorithm 4, wire_dtype 4, head_begin 4, head_end 4, reason 256, exchange_memory 8;
    treeattn_transport_t, 40: struct_size 8, ctx 8, allgather 8, sendrecv 8, flags 4, reserved 4;
}
