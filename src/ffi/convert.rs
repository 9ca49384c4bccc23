//! From the data of the ABI to the runtime's types. What the data means is checked there; here only the codes.

use std::time::Duration;

use super::codes::*;
use super::memory;
use super::types::*;
use crate::attention::{
    Algorithm, AttentionDesc, DecodeArgs, Dtype, KvLayout, MaskKind, OutputMode, Placement, QueryInput,
    Reproducibility, Tensor,
};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::runtime::{CommConfig, EngineExecutor, MergeArgs, SelfcheckConfig, TeamMember, Transport};

/// A device code.
pub fn device(code: treeattn_device_t) -> Result<Device> {
    Device::from_code("device", code)
}

/// The devices of a list.
pub fn devices(codes: &[treeattn_device_t]) -> Result<Vec<Device>> {
    let device = |(rank, &code)| Device::from_code(&format!("devices[{rank}]"), code);
    codes.iter().enumerate().map(device).collect()
}

/// Where the ranks of a self-check live: the one device of the call, or those of its config.
///
/// # Safety
/// `c.devices` is null or holds `c.ranks` devices.
pub unsafe fn selfcheck_devices(code: treeattn_device_t, c: &treeattn_selfcheck_config_t) -> Result<Vec<Device>> {
    let first = device(code)?;
    if c.devices.is_null() {
        return Ok(vec![first]);
    }
    if !(1..=memory::MOST_RANKS).contains(&c.ranks) {
        let wanted = format!("1 to {}, the number of devices", memory::MOST_RANKS);
        return Err(Error::invalid("ranks", c.ranks, wanted));
    }
    // SAFETY: as many values as ranks, by this function's contract.
    let devices = devices(unsafe { memory::ranks("devices", c.devices, c.ranks) }?)?;
    if devices[0] != first {
        return Err(Error::invalid("device", first, format!("devices[0] = {}", devices[0])));
    }
    Ok(devices)
}

/// A communicator's configuration, for `n` ranks of this process or, with none, for one rank of several processes. Null
/// is the default.
///
/// # Safety
/// `config` is null or as long as its `struct_size` says. Its string is null or ends with a zero byte, its groups are
/// null or `n` values, and its executor is null or one that does what `treeattn_executor_t` says.
pub unsafe fn comm_config(config: *const treeattn_comm_config_t, n: Option<i32>) -> Result<CommConfig> {
    // SAFETY: null or as long as it says, by this function's contract.
    let c = unsafe { memory::read_or_default("config", config) }?;
    if c.reserved != 0 {
        return Err(Error::invalid("reserved", c.reserved, "0"));
    }
    let timeout = |name: &str, ns: i64, default: Duration| match ns {
        0 => Ok(default),
        ns => u64::try_from(ns)
            .map(Duration::from_nanos)
            .map_err(|_| Error::invalid(name, ns, "nanoseconds, at least 0; 0 is the default")),
    };
    let default = CommConfig::default();
    let node_groups = match n {
        _ if c.node_groups.is_null() => Vec::new(),
        // SAFETY: `node_groups` points at `n` values by this function's contract; they are copied at once.
        Some(n) => unsafe { memory::ranks("node_groups", c.node_groups, n) }?.to_vec(),
        None => {
            let wanted = "NULL where each rank has a node_group of its own";
            return Err(Error::invalid("node_groups", format_args!("{:p}", c.node_groups), wanted));
        }
    };
    Ok(CommConfig {
        setup_timeout: timeout("setup_timeout_ns", c.setup_timeout_ns, default.setup_timeout)?,
        step_timeout: timeout("step_timeout_ns", c.step_timeout_ns, default.step_timeout)?,
        threads_per_rank: usize::try_from(c.threads_per_rank)
            .map_err(|_| Error::invalid("threads_per_rank", c.threads_per_rank, "at least 0"))?,
        node_group: c.node_group,
        node_groups,
        // SAFETY: the string is null or ended by this function's contract.
        nccl_path: unsafe { memory::string("nccl_path", c.nccl_path) }?,
        // SAFETY: null or as it says by this function's contract.
        executor: unsafe { executor(c.executor) }?,
        max_team: usize::try_from(c.max_team).map_err(|_| Error::invalid("max_team", c.max_team, "at least 0"))?,
    })
}

/// An engine's executor. Null is none.
///
/// # Safety
/// `from` is null or as long as its `struct_size` says, and does what `treeattn_executor_t` says.
unsafe fn executor(from: *const treeattn_executor_t) -> Result<Option<EngineExecutor>> {
    if from.is_null() {
        return Ok(None);
    }
    // SAFETY: as long as it says, by this function's contract.
    let e = unsafe { memory::read("executor", from) }?;
    if e.flags & !TREEATTN_EXECUTOR_CONCURRENT != 0 {
        let wanted = "TREEATTN_EXECUTOR_ flags of this version";
        return Err(Error::invalid("executor.flags", format_args!("{:#x}", e.flags), wanted));
    }
    let Some(parallel) = e.parallel else {
        return Err(Error::invalid("executor.parallel", "NULL", "a function"));
    };
    // SAFETY: the function may be called with `ctx` as `treeattn_executor_t` says, by this function's contract.
    unsafe { EngineExecutor::new(e.ctx, e.threads, parallel) }.map(Some)
}

/// An engine's transport.
pub fn transport(t: &treeattn_transport_t) -> Result<Transport> {
    if t.flags & !TREEATTN_TRANSPORT_STREAM_THREADS != 0 {
        let wanted = "TREEATTN_TRANSPORT_ flags of this version";
        return Err(Error::invalid("callbacks.flags", format_args!("{:#x}", t.flags), wanted));
    }
    if t.reserved != 0 {
        return Err(Error::invalid("callbacks.reserved", t.reserved, "0"));
    }
    let Some(allgather) = t.allgather else {
        return Err(Error::invalid("callbacks.allgather", "NULL", "a function"));
    };
    let stream_threads = t.flags & TREEATTN_TRANSPORT_STREAM_THREADS != 0;
    Ok(Transport { ctx: t.ctx, allgather, sendrecv: t.sendrecv, stream_threads })
}

/// A placement.
pub fn placement(p: &treeattn_placement_t) -> Result<Placement> {
    let placement = match p.kind {
        TREEATTN_PLACEMENT_CONTIGUOUS => Placement::Contiguous,
        TREEATTN_PLACEMENT_INTERLEAVED => return Ok(Placement::Interleaved { run: p.interleave }),
        TREEATTN_PLACEMENT_EXPLICIT => Placement::Explicit,
        other => return Err(Error::invalid("placement.kind", other.0, "a TREEATTN_PLACEMENT_ code (0 to 2)")),
    };
    if p.interleave != 0 {
        return Err(Error::invalid("placement.interleave", p.interleave, "0 unless placement.kind is INTERLEAVED"));
    }
    Ok(placement)
}

/// A descriptor.
pub fn attention_desc(d: &treeattn_attention_desc_t) -> Result<AttentionDesc> {
    let merge_only = d.kv_heads == 0;
    let dtype = |name: &str, code: treeattn_dtype_t, needed: bool| match code.0 {
        0 if !needed => Ok(Dtype::F32),
        code => Dtype::from_code(name, code),
    };
    let known = TREEATTN_ATTENTION_KV_STABLE
        | TREEATTN_ATTENTION_CHECKED
        | TREEATTN_ATTENTION_SURPLUS_KEYS
        | TREEATTN_ATTENTION_PAGES_BY_HEAD;
    if d.flags & !known != 0 {
        return Err(Error::invalid(
            "flags",
            format_args!("{:#x}", d.flags),
            "TREEATTN_ATTENTION_ flags of this version",
        ));
    }
    reserved(d.reserved)?;
    Ok(AttentionDesc {
        q_heads: d.q_heads,
        kv_heads: d.kv_heads,
        head_dim_qk: d.head_dim_qk,
        head_dim_v: d.head_dim_v,
        q_dtype: dtype("q_dtype", d.q_dtype, !merge_only)?,
        k_dtype: dtype("k_dtype", d.k_dtype, !merge_only)?,
        v_dtype: dtype("v_dtype", d.v_dtype, !merge_only)?,
        out_dtype: dtype("out_dtype", d.out_dtype, true)?,
        kv_layout: KvLayout::from_code("kv_layout", d.kv_layout.0)?,
        page_size: d.page_size,
        placement: placement(&d.placement)?,
        max_batch: d.max_batch,
        max_query_tokens: d.max_query_tokens,
        max_kv_length: d.max_kv_length,
        scale: d.scale,
        causal: yes_or_no("causal", d.causal)?,
        window: d.window,
        softcap: d.softcap,
        alibi: yes_or_no("alibi", d.alibi)?,
        sinks: yes_or_no("sinks", d.sinks)?,
        mask: MaskKind::from_code("mask", d.mask.0)?,
        mask_dtype: if d.mask_dtype.0 == 0 { None } else { Some(Dtype::from_code("mask_dtype", d.mask_dtype.0)?) },
        query_input: QueryInput::from_code("query_input", d.query_input.0)?,
        output: OutputMode::from_code("output", d.output.0)?,
        algorithm: Algorithm::from_code("algorithm", d.algorithm.0)?,
        reproducibility: Reproducibility::from_code("reproducibility", d.reproducibility.0)?,
        wire_dtype: dtype("wire_dtype", d.wire_dtype, false)?,
        kv_stable: d.flags & TREEATTN_ATTENTION_KV_STABLE != 0,
        checked: d.flags & TREEATTN_ATTENTION_CHECKED != 0,
        surplus_keys: d.flags & TREEATTN_ATTENTION_SURPLUS_KEYS != 0,
        pages_by_head: d.flags & TREEATTN_ATTENTION_PAGES_BY_HEAD != 0,
    })
}

fn yes_or_no(name: &str, value: i32) -> Result<bool> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Error::invalid(name, value, "0 or 1")),
    }
}

fn reserved(value: u32) -> Result<()> {
    if value == 0 { Ok(()) } else { Err(Error::invalid("reserved", value, "0")) }
}

/// A tensor.
pub fn tensor(t: &treeattn_tensor_t) -> Tensor {
    Tensor { data: t.data, bytes: t.bytes, stride: t.stride }
}

/// Decode arguments.
pub fn decode_args(a: &treeattn_decode_args_t) -> Result<DecodeArgs> {
    if a.reserved != 0 {
        return Err(Error::invalid("reserved", a.reserved, "0"));
    }
    Ok(DecodeArgs {
        batch: a.batch,
        query_tokens: a.query_tokens,
        q: tensor(&a.q),
        k: tensor(&a.k),
        v: tensor(&a.v),
        k_scale: tensor(&a.k_scale),
        v_scale: tensor(&a.v_scale),
        out: tensor(&a.out),
        lse: tensor(&a.lse),
        query_start: a.query_start,
        kv_length: a.kv_length,
        global_length: a.global_length,
        kv_start: a.kv_start,
        kv_position: a.kv_position,
        kv_position_stride: a.kv_position_stride,
        query_position: a.query_position,
        block_table: a.block_table,
        max_pages: a.max_pages,
        num_pages: a.num_pages,
        page_indptr: a.page_indptr,
        page_indices: a.page_indices,
        num_page_indices: a.num_page_indices,
        last_page_len: a.last_page_len,
        kv_capacity: a.kv_capacity,
        sinks: tensor(&a.sinks),
        alibi_slopes: tensor(&a.alibi_slopes),
        mask: tensor(&a.mask),
        mask_factor: tensor(&a.mask_factor),
        page_index_head_stride: a.page_index_head_stride,
        kv_position_head_stride: a.kv_position_head_stride,
    })
}

/// A member of an engine's team.
///
/// # Safety
/// The barrier is null or does what `treeattn_team_t` says.
pub unsafe fn team_member(t: &treeattn_team_t) -> TeamMember {
    // SAFETY: the barrier is null or does with `ctx` what `treeattn_team_t` says, by this function's contract.
    unsafe { TeamMember::new(t.index, t.size, t.barrier, t.ctx) }
}

/// Merge arguments.
pub fn merge_args(a: &treeattn_merge_args_t) -> Result<MergeArgs> {
    if a.flags & !(TREEATTN_MERGE_PLUS_INF_IS_EMPTY | TREEATTN_MERGE_NAN_IS_EMPTY) != 0 {
        return Err(Error::invalid("flags", format_args!("{:#x}", a.flags), "TREEATTN_MERGE_ flags of this version"));
    }
    reserved(a.reserved.cast_unsigned())?;
    Ok(MergeArgs {
        query_tokens: a.query_tokens,
        heads: a.heads,
        head_dim: a.head_dim,
        o: tensor(&a.o),
        o_dtype: Dtype::from_code("o_dtype", a.o_dtype.0)?,
        lse: tensor(&a.lse),
        lse_base: a.lse_base,
        plus_inf_is_empty: a.flags & TREEATTN_MERGE_PLUS_INF_IS_EMPTY != 0,
        nan_is_empty: a.flags & TREEATTN_MERGE_NAN_IS_EMPTY != 0,
        sum: tensor(&a.sum),
        batch: a.batch,
        query_start: a.query_start,
        kv_length: a.kv_length,
        out: tensor(&a.out),
        out_dtype: if a.out_dtype.0 == 0 { None } else { Some(Dtype::from_code("out_dtype", a.out_dtype.0)?) },
        out_lse: tensor(&a.out_lse),
        out_lse_base: a.out_lse_base,
    })
}

/// A self-check's configuration.
pub fn selfcheck_config(c: &treeattn_selfcheck_config_t) -> SelfcheckConfig {
    SelfcheckConfig {
        ranks: c.ranks,
        batch: c.batch,
        query_tokens: c.query_tokens,
        kv_length: c.kv_length,
        seed: c.seed,
    }
}

#[cfg(test)]
mod tests;
