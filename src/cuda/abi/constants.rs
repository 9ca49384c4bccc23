//! Every constant that both the library and its kernels know: names of the kernels, values of the library.

use crate::attention::{Dtype, KvFormat, KvLayout, SequenceRecord};
use crate::cuda::params::{self, PlacementKind};
use crate::error::ErrorKind;
use crate::partial::epoch::{AFTER_WRAP, FLAG_SHIFT, LAUNCH_SHIFT, SLOTS};
use crate::partial::rows::{NAN_IS_EMPTY, PLUS_INF_IS_EMPTY};
use crate::partial::view::{ExchangeMode, host, value, window};
use crate::partial::{DataFaultCause, word};

/// Constants of one kind.
pub struct Constants {
    /// What they are.
    pub about: &'static str,
    /// Their type in C++.
    pub kind: &'static str,
    pub values: &'static [(&'static str, u64)],
}

macro_rules! constants {
    ($about:literal, $kind:literal, { $($name:ident = $value:expr),* $(,)? }) => {
        Constants { about: $about, kind: $kind, values: &[$((stringify!($name), $value as u64)),*] }
    };
}

/// What all kernels know.
pub const CONSTANTS: &[Constants] = &[
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
    constants!("Blocks of merges and exchanges, how a grid shares out its work, and what exchange_rows serves, as src/cuda/params.rs says.", "int", {
        kRowsABlock = params::ROWS_A_BLOCK,
        kRowThreads = params::ROW_THREADS,
        kExchangeBlocksAUnit = params::EXCHANGE_BLOCKS_A_UNIT,
        kRowsMostRanks = params::ROWS_MOST_RANKS,
        kRowsMostWords = params::ROWS_MOST_WORDS,
        kTile = params::TILE,
        kPartialsABlock = params::PARTIALS_A_BLOCK,
        kFanIn = params::FAN_IN,
        kMostPartials = params::MOST_PARTIALS,
        kMinTiles = params::MIN_TILES,
        kMaxShares = params::MAX_SHARES,
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

/// What those with terms know beside that.
pub const TERMS_CONSTANTS: &[Constants] = &[
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
    constants!("Elements of a block, and bytes of one (attention::KvFormat).", "int", {
        kBlock = KvFormat::of(Dtype::Q8_0).block_elements(),
        kQ8_0Bytes = KvFormat::of(Dtype::Q8_0).block_bytes(),
        kQ4_0Bytes = KvFormat::of(Dtype::Q4_0).block_bytes(),
    }),
    constants!("Terms::mask_element.", "int32_t", {
        kMaskNone = params::MASK_NONE,
        kMaskF16 = params::MASK_F16,
        kMaskF32 = params::MASK_F32,
        kMaskByte = params::MASK_BYTE,
    }),
];

/// What those that check steps know beside that.
pub const CHECK_CONSTANTS: &[Constants] = &[
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

/// What those that gather queries know beside that.
pub const QUERY_CONSTANTS: &[Constants] = &[];

/// What those of messages over NCCL know beside that.
pub const GATHER_CONSTANTS: &[Constants] = &[
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
