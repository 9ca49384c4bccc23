//! Bad data that a step met on a rank or between ranks, and the one word that carries it: in headers between ranks, in windows,
//! in host memory.

use super::word::{HIGH_SHIFT, RANK_MASK, RANK_SHIFT, TURN};

/// A bad length, position or table entry met while a step ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataFault {
    /// The first sequence that it was found in.
    pub sequence: i32,
    /// What was found.
    pub cause: DataFaultCause,
    /// The value, where it is known: a word does not carry it.
    pub value: Option<BadValue>,
}

/// The entry of an input that was out of range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadValue {
    /// Its index.
    pub index: i64,
    /// What it holds.
    pub found: i64,
    /// The least that it may hold.
    pub least: i64,
    /// The most.
    pub most: i64,
}

/// Which input of a step was out of range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DataFaultCause {
    /// `query_start` decreases, starts below 0 or ends above `query_tokens`.
    QueryStart = 1,
    /// `kv_length` below 0, above the plan's maximum, or above what k and v have room for.
    KvLength = 2,
    /// A block table or CSR entry in use is not a page.
    Page = 3,
    /// `page_indptr` decreases or leaves `page_indices`, or `last_page_len` is not 1 to page_size.
    PageRow = 4,
    /// A global length or position is negative or too large.
    Position = 5,
    /// Ranks of a checked plan differ in how query tokens are split into sequences.
    QueryStartDiffers = 6,
    /// They differ in `global_length`.
    GlobalLengthDiffers = 7,
    /// They differ in `query_position`.
    QueryPositionDiffers = 8,
    /// They differ in the queries.
    QueryDiffers = 9,
    /// A position that another rank, or slot, holds, too.
    KeysTwice = 10,
    /// A position that no rank holds, below `global_length` or, of surplus keys, below what queries see.
    KeysMissing = 11,
    /// Of [`PageRow`](Self::PageRow), `page_indptr`. This and what follows names one argument.
    PageIndptr = 12,
    /// Of [`PageRow`](Self::PageRow), `last_page_len`.
    LastPageLen = 13,
    /// Of [`Position`](Self::Position), `global_length`: fewer tokens than queries.
    GlobalLength = 14,
    /// Of [`Position`](Self::Position), `kv_start`.
    KvStart = 15,
    /// Of [`Position`](Self::Position), `kv_position`.
    KvPosition = 16,
    /// Of [`Position`](Self::Position), `query_position`.
    QueryPosition = 17,
    /// Of [`Page`](Self::Page), `block_table`.
    BlockTable = 18,
    /// Of [`Page`](Self::Page), `page_indices`.
    PageIndices = 19,
    /// Ranks of a checked plan: a key below position 0, or at `global_length` or beyond, where the plan allows none.
    KeysOutside = 20,
    /// The mask has no element for some key and query token; a value is in keys of the sequence.
    Mask = 21,
}

impl DataFaultCause {
    /// The cause with this code.
    pub fn from_code(code: u8) -> Option<DataFaultCause> {
        use DataFaultCause::*;
        let checked = [
            QueryStartDiffers,
            GlobalLengthDiffers,
            QueryPositionDiffers,
            QueryDiffers,
            KeysTwice,
            KeysMissing,
            KeysOutside,
        ];
        let singles =
            [PageIndptr, LastPageLen, GlobalLength, KvStart, KvPosition, QueryPosition, BlockTable, PageIndices];
        let all = [QueryStart, KvLength, Page, PageRow, Position, Mask].into_iter().chain(checked).chain(singles);
        all.into_iter().find(|&cause| cause as u8 == code)
    }

    /// The argument to name in a message.
    pub fn argument(self) -> &'static str {
        match self {
            DataFaultCause::QueryStart | DataFaultCause::QueryStartDiffers => "query_start",
            DataFaultCause::GlobalLengthDiffers => "global_length",
            DataFaultCause::QueryPositionDiffers => "query_position",
            DataFaultCause::QueryDiffers => "q",
            DataFaultCause::KeysTwice | DataFaultCause::KeysMissing | DataFaultCause::KeysOutside => {
                "kv_length, kv_start or kv_position"
            }
            DataFaultCause::KvLength => "kv_length",
            DataFaultCause::Page => "block_table or page_indices",
            DataFaultCause::PageRow => "page_indptr or last_page_len",
            DataFaultCause::Position => "global_length, kv_start, kv_position or query_position",
            DataFaultCause::PageIndptr => "page_indptr",
            DataFaultCause::LastPageLen => "last_page_len",
            DataFaultCause::GlobalLength => "global_length",
            DataFaultCause::KvStart => "kv_start",
            DataFaultCause::KvPosition => "kv_position",
            DataFaultCause::QueryPosition => "query_position",
            DataFaultCause::BlockTable => "block_table",
            DataFaultCause::PageIndices => "page_indices",
            DataFaultCause::Mask => "mask.bytes",
        }
    }

    /// What ranks of a checked plan disagree in; none where a rank's data is bad by itself.
    pub fn disagreement(self) -> Option<&'static str> {
        match self {
            DataFaultCause::QueryStartDiffers => Some("other query tokens than on the other ranks"),
            DataFaultCause::GlobalLengthDiffers => Some("another length than on the other ranks"),
            DataFaultCause::QueryPositionDiffers => Some("other positions than on the other ranks"),
            DataFaultCause::QueryDiffers => Some("other bits than on the other ranks"),
            DataFaultCause::KeysTwice => Some("a position that is held twice"),
            DataFaultCause::KeysMissing => Some("a position that no rank holds"),
            DataFaultCause::KeysOutside => Some("a key at or beyond global_length, or below 0,"),
            _ => None,
        }
    }

    /// The entry of it that is bad, which holds `found` instead of `least` to `most`.
    pub fn at(self, index: i64, found: i64, least: i64, most: i64) -> (DataFaultCause, BadValue) {
        (self, BadValue { index, found, least, most })
    }
}

impl DataFault {
    /// What `cause` says of `sequence`, and nothing more.
    pub fn new(sequence: i32, cause: DataFaultCause) -> DataFault {
        DataFault { sequence, cause, value: None }
    }

    /// What to tell of it, where `on` names who met it: " on rank 1" or nothing.
    pub fn message(&self, on: &str) -> String {
        let (name, sequence) = (self.cause.argument(), self.sequence);
        match self.value {
            Some(BadValue { found, most, .. }) if self.cause == DataFaultCause::Mask => format!(
                "{name}: found room for {most} keys of sequence {sequence}{on}, wanted for its {found}, by the mask's byte \
                 strides; the outputs of that sequence are NaN"
            ),
            None if self.cause == DataFaultCause::Mask => format!(
                "{name}: found too few for sequence {sequence}{on}, wanted an element for each of its query tokens and keys, \
                 by the mask's byte strides; the outputs of that sequence are NaN"
            ),
            Some(BadValue { index, found, least, most }) => format!(
                "{name}[{index}]: found {found}, wanted {least} to {most}, in sequence {sequence}{on}; the outputs of that \
                 sequence are NaN"
            ),
            None => format!(
                "{name}: found a value out of range in sequence {sequence}{on}, wanted values within the plan's limits; the \
                 outputs of that sequence are NaN"
            ),
        }
    }

    /// The word of a fault that rank `rank`, -1 for none, met: the complement of the sequence, 24 bits of the rank, 8 bits of the
    /// cause. The largest word of a rank is that of its first faulty sequence; 0 is no fault. `pack_status` in
    /// `kernels/params.cuh` makes the same.
    pub fn word(self, rank: i32) -> u64 {
        let sequence = u64::from(u32::MAX - self.sequence as u32);
        sequence << HIGH_SHIFT | u64::from(rank as u32 & RANK_MASK) << RANK_SHIFT | u64::from(self.cause as u8)
    }

    /// The same fault with a value that a kernel has left, if it is its own: `key` is its word of no rank. Of an index below 0 there
    /// is none: the kernel has not found it.
    pub fn valued(self, key: u64, value: BadValue) -> Option<DataFault> {
        let (_, of) = DataFault::from_word(key)?;
        let is_own = of.sequence == self.sequence && of.cause == self.cause;
        (is_own && value.index >= 0).then_some(DataFault { value: Some(value), ..self })
    }

    /// Rank and fault of a word that a kernel told the host, none of 0: as [`DataFault::from_word`], whatever its turn.
    pub fn from_told(word: u64) -> Option<(i32, DataFault)> {
        DataFault::from_word(word & !TURN)
    }

    /// Rank and fault of a word, none of 0. The rank is -1 where all of its bits are set.
    pub fn from_word(word: u64) -> Option<(i32, DataFault)> {
        let cause = DataFaultCause::from_code(word as u8)?;
        let sequence = (u32::MAX - (word >> HIGH_SHIFT) as u32).cast_signed();
        Some(((word as u32).cast_signed() >> RANK_SHIFT, DataFault::new(sequence, cause)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_carries_rank_sequence_and_cause_and_orders_by_sequence() {
        let fault = DataFault::new(70_000, DataFaultCause::KvLength);
        assert_eq!(fault.word(63), u64::from(u32::MAX - 70_000) << 32 | 63 << 8 | 2);
        for (sequence, rank) in [(0, 0), (i32::MAX, 4095), (5, (1 << 23) - 1), (6, -1)] {
            let fault = DataFault::new(sequence, DataFaultCause::Position);
            assert_eq!(DataFault::from_word(fault.word(rank)), Some((rank, fault)));
        }
        assert_eq!((DataFault::from_word(0), DataFault::from_word(22)), (None, None));
        assert_eq!(DataFault::from_told(fault.word(63) | TURN), DataFault::from_told(fault.word(63)));
        assert_eq!((DataFault::from_told(fault.word(3)), DataFault::from_told(0)), (Some((3, fault)), None));
        let later = DataFault::new(70_001, DataFaultCause::Position);
        assert!(fault.word(0) > later.word(63));
    }

    #[test]
    fn a_value_goes_with_its_own_fault() {
        let fault = DataFault::new(3, DataFaultCause::LastPageLen);
        let (key, value) = (fault.word(0), BadValue { index: 3, found: 0, least: 1, most: 16 });
        let whole = fault.valued(key, value).unwrap();
        assert_eq!(whole, DataFault { value: Some(value), ..fault });
        assert!(whole.message("").starts_with("last_page_len[3]: found 0, wanted 1 to 16, in sequence 3"));
        for other in [DataFault::new(4, fault.cause), DataFault::new(3, DataFaultCause::KvLength)] {
            assert_eq!(other.valued(key, value), None);
        }
        assert_eq!((fault.valued(0, value), fault.valued(key, BadValue { index: -1, ..value })), (None, None));
    }

    #[test]
    fn causes_have_their_codes_and_messages_the_value() {
        for code in 1..22 {
            let cause = DataFaultCause::from_code(code).unwrap();
            assert_eq!(cause as u8, code);
        }
        let (cause, value) = DataFaultCause::KvLength.at(3, 129, 0, 128);
        let fault = DataFault { sequence: 3, cause, value: Some(value) };
        let wanted =
            "kv_length[3]: found 129, wanted 0 to 128, in sequence 3 on rank 1; the outputs of that sequence are NaN";
        assert_eq!(fault.message(" on rank 1"), wanted);
        assert!(
            DataFault::new(3, cause)
                .message("")
                .contains("kv_length: found a value out of range in sequence 3, wanted")
        );
        let (cause, value) = DataFaultCause::Mask.at(3, 129, 0, 60);
        let fault = DataFault { sequence: 3, cause, value: Some(value) };
        assert!(
            fault
                .message(" on rank 1")
                .starts_with("mask.bytes: found room for 60 keys of sequence 3 on rank 1, wanted for its 129")
        );
        assert!(
            DataFault::new(3, cause)
                .message("")
                .starts_with("mask.bytes: found too few for sequence 3, wanted an element")
        );
    }
}
