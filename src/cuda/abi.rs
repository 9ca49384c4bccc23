//! What the library and its kernels agree on: every constant that both know, the offset of every field of what kernels take.
//!
//! [`CONSTANTS`] and [`LAYOUTS`] are the one list. `kernels/abi.cuh` is generated from it, so that kernels have no
//! constants of their own to drift, and holds an assertion for each field, so that a struct of `kernels/params.cuh` that
//! differs does not compile. The hash of the list is checked twice: when this file is compiled, against the header; when
//! kernels are loaded, against the image, which may have been compiled from other sources (`TREEATTN_PREBUILT_KERNELS`).
//!
//! [`TERMS_CONSTANTS`] and [`TERMS_LAYOUTS`] are what kernels that take [`TermsParams`] know beside that, [`CHECK_CONSTANTS`] and
//! [`CHECK_LAYOUTS`] what those that take [`CheckParams`] do, [`GATHER_CONSTANTS`] and [`GATHER_LAYOUTS`] what those that take
//! [`GatherParams`] do; other kernels need not be compiled anew where they change.

mod hash;

use std::mem::{offset_of, size_of};

use hash::{Constants, Layout, hash_lists, said};

use super::params::{
    self, AllreduceParams, CheckParams, DecodeParams, ExchangeParams, GatherParams, KernelShape, MergeParams,
    NodeParams, PlacementKind, Terms, TermsParams, Workspace,
};
use crate::attention::{Dtype, KvLayout, SequenceRecord};
use crate::device::cuda::{Image, Kernel};
use crate::error::{Error, ErrorKind, Result};
use crate::partial::epoch::{AFTER_WRAP, FLAG_SHIFT, LAUNCH_SHIFT, SLOTS};
use crate::partial::rows::{NAN_IS_EMPTY, PLUS_INF_IS_EMPTY};
use crate::partial::view::{ExchangeMode, ExchangeView, host, value, window};
use crate::partial::{DataFaultCause, RowSource, RowTarget, word};

macro_rules! constants {
    ($about:literal, $kind:literal, { $($name:ident = $value:expr),* $(,)? }) => {
        Constants { about: $about, kind: $kind, values: &[$((stringify!($name), $value as u64)),*] }
    };
}

macro_rules! layout {
    ($type:ident { $($field:ident),* $(,)? }) => {{
        // Does not compile where a field is missing.
        const _: fn($type) = |$type { $($field: _),* }| {};
        Layout {
            name: stringify!($type),
            size: size_of::<$type>() as u64,
            fields: &[$((stringify!($field), offset_of!($type, $field) as u64)),*],
        }
    }};
}

const CONSTANTS: &[Constants] = &[
    constants!("Element types.", "int32_t", { kF32 = Dtype::F32, kF16 = Dtype::F16, kBf16 = Dtype::Bf16 }),
    constants!("Layouts of k and v.", "int32_t", {
        kStrided = KvLayout::Strided,
        kBlockTable = KvLayout::BlockTable,
        kCsrPages = KvLayout::CsrPages,
    }),
    constants!("Placements of tokens.", "int32_t", {
        kContiguous = PlacementKind::Contiguous,
        kInterleaved = PlacementKind::Interleaved,
        kExplicit = PlacementKind::Explicit,
    }),
    constants!("Blocks of merges and exchanges, the grid's partials, and what exchange_rows serves, as src/cuda/params.rs says.", "int", {
        kRowsABlock = params::ROWS_A_BLOCK,
        kRowThreads = params::ROW_THREADS,
        kExchangeBlocksAUnit = params::EXCHANGE_BLOCKS_A_UNIT,
        kRowsMostRanks = params::ROWS_MOST_RANKS,
        kRowsMostWords = params::ROWS_MOST_WORDS,
        kTile = params::TILE,
        kPartialsABlock = params::PARTIALS_A_BLOCK,
    }),
    constants!("Words that AllreduceParams::host and ::words have: steps begun, steps ended, bad data.", "int", {
        kStepsBegun = params::STEPS_BEGUN,
        kStepsEnded = params::STEPS_ENDED,
        kStepBadData = params::STEP_BAD_DATA,
    }),
    constants!("DecodeParams::flags, as src/cuda/params.rs says.", "uint32_t", {
        kFlagCausal = params::CAUSAL,
        kFlagNoBulk = params::NO_BULK,
        kFlagPush = params::PUSH,
        kFlagLseInTwo = params::LSE_IN_TWO,
    }),
    constants!("RowSource::empties, as src/partial/rows.rs says.", "uint32_t", {
        kPlusInfIsEmpty = PLUS_INF_IS_EMPTY,
        kNanIsEmpty = NAN_IS_EMPTY,
    }),
    constants!("Which input of a step was out of range (partial::DataFaultCause).", "uint32_t", {
        kFaultNone = 0,
        kFaultQueryStart = DataFaultCause::QueryStart,
        kFaultKvLength = DataFaultCause::KvLength,
        kFaultPage = DataFaultCause::Page,
        kFaultPageRow = DataFaultCause::PageRow,
        kFaultPosition = DataFaultCause::Position,
        kFaultPageIndptr = DataFaultCause::PageIndptr,
        kFaultLastPageLen = DataFaultCause::LastPageLen,
        kFaultGlobalLength = DataFaultCause::GlobalLength,
        kFaultKvStart = DataFaultCause::KvStart,
        kFaultKvPosition = DataFaultCause::KvPosition,
        kFaultQueryPosition = DataFaultCause::QueryPosition,
        kFaultBlockTable = DataFaultCause::BlockTable,
        kFaultPageIndices = DataFaultCause::PageIndices,
        kFaultMask = DataFaultCause::Mask,
    }),
    constants!("ExchangeView::mode: who gets which rows (partial::view::ExchangeMode).", "int32_t", {
        kOneShot = ExchangeMode::OneShot,
        kScattered = ExchangeMode::Scattered,
        kTwoShot = ExchangeMode::TwoShot,
    }),
    constants!("Words of a window before its slots (partial::view::window).", "int", {
        kBroken = window::BROKEN,
        kConsumed = window::CONSUMED,
        kFailed = window::FAILED,
        kFault = window::FAULT,
        kTickets = window::TICKETS,
        kDecided = window::DECIDED,
        kLeftOver = window::LEFT_OVER,
        kLeftOverWords = window::LEFT_OVER_WORDS,
        kStepFault = window::STEP_FAULT,
        kTold = window::TOLD,
        kPending = window::PENDING,
        kArrived = window::ARRIVED,
        kLeft = window::LEFT,
        kControlWords = window::CONTROL_WORDS,
    }),
    constants!("Words of a slot before its rows, and of a row before its o.", "int", {
        kHeaderWords = window::HEADER_WORDS,
        kRowHead = window::ROW_HEAD,
    }),
    constants!("Words in mapped host memory (partial::view::host).", "int", {
        kCommand = host::COMMAND,
        kFailure = host::FAILURE,
        kBadData = host::BAD_DATA,
        kTakenAfter = host::TAKEN_AFTER,
        kLost = host::LOST,
    }),
    constants!("Words in mapped host memory of a value that was out of range (partial::view::value).", "int", {
        kValueKey = value::KEY,
        kValueIndex = value::INDEX,
        kValueFound = value::FOUND,
        kValueLeast = value::LEAST,
        kValueMost = value::MOST,
    }),
    constants!("Most ranks; slots of a rank, one a parity of the epoch.", "int", {
        kMaxRanks = window::MAX_RANKS,
        kSlots = SLOTS,
    }),
    constants!("Where the flag of a packet lies; the epoch after the largest one; kConsumed's unit.", "uint32_t", {
        kFlagShift = FLAG_SHIFT,
        kAfterWrap = AFTER_WRAP,
        kLaunchShift = LAUNCH_SHIFT,
    }),
    constants!("Where failures and bad data have their rank, and their epoch or sequence.", "int", {
        kRankShift = word::RANK_SHIFT,
        kHighShift = word::HIGH_SHIFT,
    }),
    constants!("Toggled in words of bad data that the host is told.", "uint32_t", { kTurn = word::TURN }),
    constants!("Codes of a failure: those of the C ABI.", "uint32_t", {
        kDesync = ErrorKind::Desync,
        kTimeout = ErrorKind::Timeout,
        kPeerLost = ErrorKind::PeerLost,
    }),
];

const LAYOUTS: &[Layout] = &[
    layout!(KernelShape {
        threads,
        dynamic_smem,
        blocks_per_sm,
        partial_bytes,
        counters,
        rows,
        open_tiles,
        long_bytes
    }),
    layout!(Workspace { partials, counters, status, found }),
    layout!(RowTarget { o, lse, o_stride, lse_stride, dtype, dim, from_natural, reserved }),
    layout!(RowSource {
        o,
        lse,
        o_stride,
        lse_stride,
        dtype,
        dim,
        to_natural,
        empties,
        sum,
        sum_stride,
        query_start,
        kv_length,
        batch,
        tokens_each
    }),
    layout!(ExchangeView {
        slots,
        bases,
        window,
        host,
        slot_words,
        parity_words,
        merged_at,
        fingerprint,
        timeout_ns,
        world,
        rank,
        wire_dtype,
        mode,
        heads,
        first_head,
        own_heads,
    }),
    layout!(DecodeParams {
        q,
        k,
        v,
        q_stride,
        k_stride,
        v_stride,
        target,
        query_start,
        kv_length,
        global_length,
        kv_start,
        kv_position,
        query_position,
        block_table,
        page_indptr,
        page_indices,
        last_page_len,
        kv_position_stride,
        block_table_stride,
        num_page_indices,
        kv_capacity,
        k_end,
        v_end,
        batch,
        query_tokens,
        q_heads,
        kv_heads,
        group,
        head_dim_qk,
        q_dtype,
        kv_layout,
        page_size,
        num_pages,
        placement,
        interleave,
        rank,
        world,
        scale,
        flags,
        waiting,
        workspace,
        exchange,
    }),
    layout!(MergeParams { source, target, step, partials, tokens, heads }),
    layout!(ExchangeParams { source, target, first_row, rows, is_pushed, is_last, waiting, lse_in_two, view }),
    layout!(AllreduceParams {
        o,
        lse,
        most,
        weights,
        target,
        status,
        words,
        failed,
        host,
        arrived,
        tokens,
        heads,
        head_dim,
        first_head,
        own_heads,
        rank,
        world,
    }),
];

const TERMS_CONSTANTS: &[Constants] = &[
    constants!("Further element types, of keys and values.", "int32_t", {
        kF8E4M3 = Dtype::F8E4M3,
        kF8E5M2 = Dtype::F8E5M2,
        kQ8_0 = Dtype::Q8_0,
        kQ4_0 = Dtype::Q4_0,
        kInt8 = Dtype::Int8,
        kQ4_1 = Dtype::Q4_1,
        kQ5_0 = Dtype::Q5_0,
        kQ5_1 = Dtype::Q5_1,
        kIq4Nl = Dtype::Iq4Nl,
    }),
    constants!("Terms::mask_element.", "int32_t", {
        kMaskNone = params::MASK_NONE,
        kMaskF16 = params::MASK_F16,
        kMaskF32 = params::MASK_F32,
        kMaskByte = params::MASK_BYTE,
    }),
];

const TERMS_LAYOUTS: &[Layout] = &[
    layout!(Terms {
        sinks,
        slopes,
        mask,
        mask_factor,
        k_scale,
        v_scale,
        sink_stride,
        slope_stride,
        factor_stride,
        mask_stride,
        mask_bytes,
        k_scale_stride,
        v_scale_stride,
        k_scale_end,
        v_scale_end,
        page_index_head_stride,
        kv_position_head_stride,
        mask_element,
        window,
        softcap,
        cap_inverse,
        k_dtype,
        v_dtype,
    }),
    layout!(TermsParams { step, terms }),
];

const CHECK_CONSTANTS: &[Constants] = &[
    constants!("What ranks of a checked plan disagree in (partial::DataFaultCause).", "uint32_t", {
        kFaultQueryStartDiffers = DataFaultCause::QueryStartDiffers,
        kFaultGlobalLengthDiffers = DataFaultCause::GlobalLengthDiffers,
        kFaultQueryPositionDiffers = DataFaultCause::QueryPositionDiffers,
        kFaultQueryDiffers = DataFaultCause::QueryDiffers,
        kFaultKeysTwice = DataFaultCause::KeysTwice,
        kFaultKeysMissing = DataFaultCause::KeysMissing,
        kFaultKeysOutside = DataFaultCause::KeysOutside,
    }),
    constants!("Words of data of what a rank tells of a sequence (attention::SequenceRecord).", "int", {
        kRecordWords = SequenceRecord::BYTES / 4,
    }),
];

const CHECK_LAYOUTS: &[Layout] = &[layout!(CheckParams { step, wrong, first, count, needs_positions, surplus_keys })];

const GATHER_CONSTANTS: &[Constants] = &[
    constants!("Bytes of a message before its rows, and of a row before its o.", "int", {
        kGatherHeaderBytes = params::GATHER_HEADER_BYTES,
        kGatherRowHead = params::GATHER_ROW_HEAD,
    }),
    constants!("Words of a message's header: bad data (pack_status; the next stays 0), what tells steps apart, a failure.", "int", {
        kGatherBadData = 0,
        kGatherStep = 2,
        kGatherFailure = 3,
    }),
];

const GATHER_LAYOUTS: &[Layout] = &[
    layout!(GatherParams {
        source,
        target,
        send,
        received,
        message_bytes,
        row_bytes,
        fingerprint,
        words,
        failed,
        host,
        failure,
        arrived,
        merged,
        senders,
        wire_dtype,
        lse_in_two,
        tokens,
        heads,
        first_head,
        own_heads,
        rank,
        world,
        partials,
    }),
    layout!(NodeParams { gather, view, status, found, members, arrived, first_row, rows, is_last }),
];

/// The hash of what all kernels know.
const ABI: u64 = hash_lists(0xcbf2_9ce4_8422_2325, CONSTANTS, LAYOUTS);
/// That of what kernels with terms know.
const TERMS_ABI: u64 = hash_lists(ABI, TERMS_CONSTANTS, TERMS_LAYOUTS);
/// That of what kernels that check steps know.
const CHECK_ABI: u64 = hash_lists(ABI, CHECK_CONSTANTS, CHECK_LAYOUTS);
/// That of what kernels of messages over NCCL know.
const GATHER_ABI: u64 = hash_lists(ABI, GATHER_CONSTANTS, GATHER_LAYOUTS);
/// The sources of kernels with terms.
const TERMS_SOURCES: [&str; 4] = ["decode_terms", "decode_narrow", "decode_packed", "decode_blocks"];

// Tests are compiled in any case: one of them writes the header.
#[cfg(not(test))]
const _: () = assert!(
    said(include_bytes!("../../kernels/abi.cuh"), b"kAbi = 0x") == ABI
        && said(include_bytes!("../../kernels/abi.cuh"), b"kTermsAbi = 0x") == TERMS_ABI
        && said(include_bytes!("../../kernels/abi.cuh"), b"kCheckAbi = 0x") == CHECK_ABI
        && said(include_bytes!("../../kernels/abi.cuh"), b"kGatherAbi = 0x") == GATHER_ABI,
    "kernels/abi.cuh does not say what src/cuda/abi.rs does: TREEATTN_BLESS=1 cargo test --lib abi writes it anew"
);

/// The kernel `name` of `kernels/SOURCE.cu`, made resident; `Unavailable` where the image was compiled from other sources
/// than this library. Blocks; `Capturing` during a capture.
pub(super) fn kernel(image: &Image, source: &str, name: &str, threads: u32, shared: u32) -> Result<Kernel> {
    check(image, source)?;
    image.kernel(name, threads, shared)
}

/// Refuses an image whose kernels of `kernels/SOURCE.cu` take other parameters. As [`kernel`].
pub(super) fn check(image: &Image, source: &str) -> Result<()> {
    let mut bytes = [0; size_of::<u64>()];
    image.constant(&format!("treeattn_{source}_abi"), &mut bytes)?;
    let found = u64::from_ne_bytes(bytes);
    let wanted = match source {
        "check" => CHECK_ABI,
        "gather" | "nodes" => GATHER_ABI,
        _ if TERMS_SOURCES.contains(&source) => TERMS_ABI,
        _ => ABI,
    };
    if found == wanted {
        return Ok(());
    }
    let message = format!(
        "kernels: found {source} compiled from other sources than this library (interface {found:016x}), wanted \
         {wanted:016x}: compile the image anew"
    );
    Err(Error::new(ErrorKind::Unavailable, message))
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    fn header() -> String {
        let mut text = String::from(
            "// Generated from src/cuda/abi.rs: TREEATTN_BLESS=1 cargo test --lib abi writes it anew.\n//\n\
             // What the library and its kernels agree on. TREEATTN_CHECK_LAYOUT asserts that the structs of params.cuh and\n\
             // rows.cuh are those of the library, field by field.\n\
             #pragma once\n\n#include <stddef.h>\n#include <stdint.h>\n\nnamespace treeattn {\n\n",
        );
        for constants in CONSTANTS.iter().chain(TERMS_CONSTANTS).chain(CHECK_CONSTANTS).chain(GATHER_CONSTANTS) {
            writeln!(text, "// {}\nenum : {} {{", constants.about, constants.kind).unwrap();
            for (name, value) in constants.values {
                writeln!(text, "    {name} = {value},").unwrap();
            }
            text.push_str("};\n");
        }
        write!(
            text,
            "\n// The hashes of what all kernels know, and of what those that take TermsParams, CheckParams or GatherParams do; each \
             image carries its own.\n\
             constexpr uint64_t kAbi = 0x{ABI:016x};\nconstexpr uint64_t kTermsAbi = 0x{TERMS_ABI:016x};\n\
             constexpr uint64_t kCheckAbi = 0x{CHECK_ABI:016x};\nconstexpr uint64_t kGatherAbi = 0x{GATHER_ABI:016x};\n\n\
             }}  // namespace treeattn\n\n\
             // Once in each kernels/NAME.cu: the image's word that it was compiled from this.\n\
             #define TREEATTN_ABI(NAME) extern \"C\" __device__ const uint64_t treeattn_##NAME##_abi = treeattn::kAbi;\n\
             #define TREEATTN_TERMS_ABI(NAME) \\\n    \
             extern \"C\" __device__ const uint64_t treeattn_##NAME##_abi = treeattn::kTermsAbi;\n\
             #define TREEATTN_CHECK_ABI(NAME) \\\n    \
             extern \"C\" __device__ const uint64_t treeattn_##NAME##_abi = treeattn::kCheckAbi;\n\
             #define TREEATTN_GATHER_ABI(NAME) \\\n    \
             extern \"C\" __device__ const uint64_t treeattn_##NAME##_abi = treeattn::kGatherAbi;\n\n\
             #define TREEATTN_CHECK_LAYOUT"
        )
        .unwrap();
        for layout in LAYOUTS.iter().chain(TERMS_LAYOUTS).chain(CHECK_LAYOUTS).chain(GATHER_LAYOUTS) {
            let name = layout.name;
            write!(text, " \\\n    static_assert(sizeof({name}) == {}, \"{name}\");", layout.size).unwrap();
            for (field, offset) in layout.fields {
                write!(text, " \\\n    static_assert(offsetof({name}, {field}) == {offset}, \"{name}::{field}\");")
                    .unwrap();
            }
        }
        text.push('\n');
        text
    }

    #[test]
    fn the_kernels_have_the_same_constants_and_layouts() {
        let (path, wanted) = (format!("{}/kernels/abi.cuh", env!("CARGO_MANIFEST_DIR")), header());
        if std::env::var_os("TREEATTN_BLESS").is_some() {
            std::fs::write(&path, &wanted).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(found == wanted, "{path} is not what src/cuda/abi.rs says: run this test with TREEATTN_BLESS=1");
        assert_eq!(said(found.as_bytes(), b"kAbi = 0x"), ABI);
        assert_eq!(said(found.as_bytes(), b"kTermsAbi = 0x"), TERMS_ABI);
    }
}
