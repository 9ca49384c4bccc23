//! From the ABI's data to the runtime's types, and back.

use std::ffi::{CStr, c_char};
use std::mem::{MaybeUninit, size_of};
use std::time::Duration;

use super::codes::*;
use super::selfcheck::treeattn_selfcheck_config_t;
use super::types::*;
use crate::attention::{
    Algorithm, AttentionDesc, DecodeArgs, Dtype, KvLayout, MaskKind, OutputMode, Placement, QueryInput,
    Reproducibility, Tensor,
};
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::{CommConfig, DeviceKind, LogLevel, MergeArgs, SelfcheckConfig, Transport};

/// Reads a struct that starts with `struct_size`. A shorter one is filled up with zeros; a longer one is refused where
/// its unknown tail is not zero.
///
/// # Safety
/// `from` is null or points at `struct_size` readable bytes; `T` is a struct of plain data for which zeros are valid.
pub unsafe fn read<T: Copy>(name: &str, from: *const T) -> Result<T> {
    // SAFETY: as the caller vouches.
    unsafe {
        let size = struct_size(name, from)?;
        let mut value = MaybeUninit::<T>::zeroed();
        let known = size.min(size_of::<T>());
        std::ptr::copy_nonoverlapping(from.cast::<u8>(), value.as_mut_ptr().cast::<u8>(), known);
        for offset in known..size {
            let byte = *from.cast::<u8>().add(offset);
            if byte != 0 {
                let found = format!("{size} with byte {offset} set");
                let wanted = format!("zeros past the {} bytes that this version knows", size_of::<T>());
                return Err(Error::invalid(format_args!("{name}.struct_size"), found, wanted));
            }
        }
        Ok(value.assume_init())
    }
}

/// As [`read`]; null is all defaults.
///
/// # Safety
/// As [`read`].
pub unsafe fn read_or_default<T: Copy>(name: &str, from: *const T) -> Result<T> {
    if from.is_null() {
        // SAFETY: zeros are valid, as the caller vouches.
        return Ok(unsafe { MaybeUninit::<T>::zeroed().assume_init() });
    }
    // SAFETY: as the caller vouches.
    unsafe { read(name, from) }
}

/// Checks an output struct before the work, so that nothing fails after it. What lies past the bytes that this version
/// knows is neither read nor written.
///
/// # Safety
/// As [`read`].
pub unsafe fn check_output<T>(name: &str, to: *const T) -> Result<()> {
    // SAFETY: as the caller vouches.
    unsafe { struct_size(name, to) }.map(|_| ())
}

/// Writes as much of `value` as the caller's struct has room for, but not its `struct_size`.
///
/// # Safety
/// `to` passed [`check_output`] and is writable.
pub unsafe fn write<T: Copy>(to: *mut T, value: &T) {
    let head = size_of::<usize>();
    // SAFETY: the caller's struct has `struct_size` bytes, as it says.
    unsafe {
        let size = to.cast::<usize>().read().min(size_of::<T>());
        std::ptr::copy_nonoverlapping(
            (value as *const T).cast::<u8>().add(head),
            to.cast::<u8>().add(head),
            size - head,
        );
    }
}

/// The size that a struct says it has.
///
/// # Safety
/// `from` is null or points at a readable `struct_size`.
unsafe fn struct_size<T>(name: &str, from: *const T) -> Result<usize> {
    /// No struct of this library comes near it; garbage does.
    const LARGEST: usize = 1 << 16;
    if from.is_null() {
        return Err(Error::invalid(name, "NULL", "a pointer"));
    }
    if !from.is_aligned() {
        let wanted = format!("a pointer aligned to {} bytes", align_of::<T>());
        return Err(Error::invalid(name, format_args!("{from:p}"), wanted));
    }
    // SAFETY: as the caller vouches.
    let size = unsafe { from.cast::<usize>().read() };
    // Every version's size is a multiple of 8; another one would cut a field in two.
    if !(size_of::<usize>()..=LARGEST).contains(&size) || !size.is_multiple_of(8) {
        let wanted = format!("sizeof of the struct, {} in this version", size_of::<T>());
        return Err(Error::invalid(format_args!("{name}.struct_size"), size, wanted));
    }
    Ok(size)
}

/// Checks a pointer for one plain output value.
pub fn output<T>(name: &str, to: *mut T) -> Result<()> {
    if to.is_null() {
        return Err(Error::invalid(name, "NULL", "a pointer to the result"));
    }
    if !to.is_aligned() {
        let wanted = format!("a pointer aligned to {} bytes", align_of::<T>());
        return Err(Error::invalid(name, format_args!("{to:p}"), wanted));
    }
    Ok(())
}

/// A caller's array with one value a rank. `n` is bounded before anything is read.
///
/// # Safety
/// `data` is null or points at `n` readable values.
pub unsafe fn ranks<'a, T>(name: &str, data: *const T, n: i32) -> Result<&'a [T]> {
    /// Most ranks that one process holds.
    const MOST: i32 = 1024;
    if !(1..=MOST).contains(&n) {
        return Err(Error::invalid("n", n, format_args!("1 to {MOST} ranks")));
    }
    if data.is_null() {
        return Err(Error::invalid(name, "NULL", format_args!("a pointer to {n} values")));
    }
    if !data.is_aligned() {
        let wanted = format_args!("a pointer aligned to {} bytes", align_of::<T>());
        return Err(Error::invalid(name, format_args!("{data:p}"), wanted));
    }
    // SAFETY: as the caller vouches.
    Ok(unsafe { std::slice::from_raw_parts(data, n as usize) })
}

/// A caller's string; null is none.
///
/// # Safety
/// `text` is null or terminated.
pub unsafe fn string(name: &str, text: *const c_char) -> Result<Option<String>> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: as the caller vouches.
    let text = unsafe { CStr::from_ptr(text) };
    match text.to_str() {
        Ok(text) => Ok(Some(text.to_owned())),
        Err(_) => Err(Error::invalid(name, format_args!("{text:?}"), "UTF-8")),
    }
}

/// Text for a caller's fixed array: cut at a character, terminated.
pub fn fixed<const N: usize>(text: &str) -> [c_char; N] {
    let mut end = text.len().min(N - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut out = [0; N];
    for (to, &byte) in out.iter_mut().zip(&text.as_bytes()[..end]) {
        *to = byte as c_char;
    }
    out
}

/// Text for a caller's (buf, cap, needed): needed counts the terminator; what does not fit is cut.
///
/// # Safety
/// `buf` is null or has `cap` writable bytes; `needed` is null or writable.
pub unsafe fn text(value: &str, buf: *mut c_char, cap: usize, needed: *mut usize) -> Result<()> {
    if buf.is_null() && cap > 0 {
        return Err(Error::invalid("buf", "NULL", "a pointer, or cap = 0"));
    }
    if buf.is_null() && needed.is_null() {
        return Err(Error::invalid("needed", "NULL", "a pointer where buf is NULL"));
    }
    if !needed.is_null() {
        output("needed", needed)?;
    }
    // SAFETY: as the caller vouches.
    unsafe {
        if cap > 0 {
            let mut end = value.len().min(cap - 1);
            while !value.is_char_boundary(end) {
                end -= 1;
            }
            std::ptr::copy_nonoverlapping(value.as_ptr().cast(), buf, end);
            *buf.add(end) = 0;
        }
        if !needed.is_null() {
            *needed = value.len() + 1;
        }
    }
    Ok(())
}

/// A device code.
pub fn device(code: treeattn_device_t) -> Result<Device> {
    Device::from_code("device", code)
}

/// A communicator's configuration, for `n` ranks of this process or, with none, for one rank of several processes.
///
/// # Safety
/// Its strings are null or terminated, and its groups null or `n`.
pub unsafe fn comm_config(c: &treeattn_comm_config_t, n: Option<i32>) -> Result<CommConfig> {
    let timeout = |name: &str, ns: i64, default: Duration| match ns {
        0 => Ok(default),
        ns => u64::try_from(ns)
            .map(Duration::from_nanos)
            .map_err(|_| Error::invalid(name, ns, "at least 0 nanoseconds, 0 for the default")),
    };
    let default = CommConfig::default();
    let node_groups = match n {
        _ if c.node_groups.is_null() => Vec::new(),
        // SAFETY: as the caller vouches.
        Some(n) => unsafe { ranks("node_groups", c.node_groups, n) }?.to_vec(),
        None => {
            let wanted = "NULL where each rank has a node_group of its own";
            return Err(Error::invalid("node_groups", format_args!("{:p}", c.node_groups), wanted));
        }
    };
    Ok(CommConfig {
        setup_timeout: timeout("setup_timeout", c.setup_timeout, default.setup_timeout)?,
        step_timeout: timeout("step_timeout", c.step_timeout, default.step_timeout)?,
        threads_per_rank: usize::try_from(c.threads_per_rank)
            .map_err(|_| Error::invalid("threads_per_rank", c.threads_per_rank, "at least 0"))?,
        node_group: c.node_group,
        node_groups,
        // SAFETY: as the caller vouches.
        nccl_path: unsafe { string("nccl_path", c.nccl_path) }?,
    })
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

/// A descriptor. Its meaning is checked by the runtime; here only the codes.
pub fn attention_desc(d: &treeattn_attention_desc_t) -> Result<AttentionDesc> {
    let merge_only = d.kv_heads == 0;
    let dtype = |name: &str, code: treeattn_dtype_t, needed: bool| match code.0 {
        0 if !needed => Ok(Dtype::F32),
        code => Dtype::from_code(name, code),
    };
    if d.flags & !TREEATTN_ATTENTION_KV_STABLE != 0 {
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

/// Decode arguments; fields of later capabilities must be empty.
pub fn decode_args(a: &treeattn_decode_args_t) -> Result<DecodeArgs> {
    let later = [
        ("k_scale", a.k_scale.data.cast_const()),
        ("v_scale", a.v_scale.data.cast_const()),
        ("alibi_slopes", a.alibi_slopes.data.cast_const()),
        ("sinks", a.sinks.data.cast_const()),
        ("mask", a.mask.data.cast_const()),
    ];
    for (name, pointer) in later {
        if !pointer.is_null() {
            return Err(Error::unsupported(name, format_args!("{pointer:p}"), "NULL"));
        }
    }
    Ok(DecodeArgs {
        batch: a.batch,
        query_tokens: a.query_tokens,
        q: tensor(&a.q),
        k: tensor(&a.k),
        v: tensor(&a.v),
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
    })
}

/// Merge arguments.
pub fn merge_args(a: &treeattn_merge_args_t) -> Result<MergeArgs> {
    if a.flags & !TREEATTN_MERGE_PLUS_INF_IS_EMPTY != 0 {
        return Err(Error::invalid("flags", format_args!("{:#x}", a.flags), "TREEATTN_MERGE_ flags of this version"));
    }
    reserved(a.reserved)?;
    Ok(MergeArgs {
        query_tokens: a.query_tokens,
        heads: a.heads,
        head_dim: a.head_dim,
        o: tensor(&a.o),
        o_dtype: Dtype::from_code("o_dtype", a.o_dtype.0)?,
        lse: tensor(&a.lse),
        lse_base: a.lse_base,
        plus_inf_is_empty: a.flags & TREEATTN_MERGE_PLUS_INF_IS_EMPTY != 0,
        out: tensor(&a.out),
        out_dtype: if a.out_dtype.0 == 0 { None } else { Some(Dtype::from_code("out_dtype", a.out_dtype.0)?) },
        out_lse: tensor(&a.out_lse),
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

// The codes of the ABI are the discriminants of the library.
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
    TREEATTN_DTYPE_F32 == Dtype::F32;
    TREEATTN_DTYPE_F16 == Dtype::F16;
    TREEATTN_DTYPE_BF16 == Dtype::Bf16;
    TREEATTN_DTYPE_F8_E4M3 == Dtype::F8E4M3;
    TREEATTN_DTYPE_F8_E5M2 == Dtype::F8E5M2;
    TREEATTN_DTYPE_Q8_0 == Dtype::Q8_0;
    TREEATTN_DTYPE_Q4_0 == Dtype::Q4_0;
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
