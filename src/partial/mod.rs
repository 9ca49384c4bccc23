//! The monoid of partials: (o, lse), its identity (0, -inf) and its merge.
//!
//! Finished partials (those of ranks, of nodes, and the engine's own) meet by [`merge_into`], [`merge_two`] or
//! [`merge_ranks`]. Inside a rank a backend has folds of its own, by the same algebra on sums that are not normalised yet
//! (`cpu::state`, and the kernels of a GPU). The order is fixed by the caller throughout. `epoch` holds the rules of an
//! exchange of partials, whatever carries it; `view` is what a GPU's kernel is told of one. Depends on nothing but plain
//! data.

pub(crate) mod epoch;
#[cfg(all(test, loom))]
mod epoch_model;
mod merge;
#[cfg(all(test, loom))]
mod push_model;
pub(crate) mod view;

pub(crate) use view::ExchangeView;

pub use merge::{PartialRows, merge_into, merge_ranks, merge_two};

/// A bad length, position or table entry met while a step ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataFault {
    /// The first sequence that it was found in.
    pub sequence: i32,
    /// What was found.
    pub cause: DataFaultCause,
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
}

impl DataFaultCause {
    /// The cause with this wire code.
    pub fn from_code(code: u8) -> Option<DataFaultCause> {
        use DataFaultCause::*;
        [QueryStart, KvLength, Page, PageRow, Position].into_iter().find(|&c| c as u8 == code)
    }

    /// The argument to name in a message.
    pub fn argument(self) -> &'static str {
        match self {
            DataFaultCause::QueryStart => "query_start",
            DataFaultCause::KvLength => "kv_length",
            DataFaultCause::Page => "block_table or page_indices",
            DataFaultCause::PageRow => "page_indptr or last_page_len",
            DataFaultCause::Position => "global_length, kv_start, kv_position or query_position",
        }
    }
}

impl DataFault {
    /// The fault as a word for headers; 0 is no fault.
    pub fn pack(fault: Option<DataFault>) -> u64 {
        fault.map_or(0, |fault| u64::from(fault.cause as u8) << 32 | u64::from(fault.sequence as u32))
    }

    /// The fault in a header word.
    pub fn unpack(word: u64) -> Option<DataFault> {
        let cause = DataFaultCause::from_code((word >> 32) as u8)?;
        Some(DataFault { sequence: word as u32 as i32, cause })
    }
}
