//! Structs: every one starts with `struct_size`, but for those that others hold by value, which are frozen. No struct
//! has implicit padding; `layout` holds sizes and offsets.
//!
//! The files below are those of the header, in its order. This one holds what engines of earlier versions pass.

use super::memory::Versioned;

pub mod objects;
pub mod report;
pub mod shape;
pub mod step;

pub use objects::*;
pub use report::*;
pub use shape::*;
pub use step::*;

macro_rules! versioned {
    ($($name:ident $first:literal)+) => {
        // SAFETY: each is repr(C) and begins with `struct_size` (`layout` holds the offsets); its other fields are numbers,
        // arrays of numbers, raw pointers and optional functions, of all of which zeros are a value.
        $(unsafe impl Versioned for $name {
            const NAME: &'static str = stringify!($name);
            const FIRST_SIZE: usize = $first;
        })+
    };
}

// Every struct with its size in the first version that had it, which never changes; that of today is in `layout`.
versioned! {
    treeattn_runtime_config_t 16
    treeattn_device_info_t 408
    treeattn_executor_t 32
    treeattn_comm_config_t 48
    treeattn_team_t 32
    treeattn_comm_status_t 552
    treeattn_attention_desc_t 128
    treeattn_decode_args_t 600
    treeattn_merge_args_t 232
    treeattn_plan_memory_t 24
    treeattn_plan_stats_t 336
    treeattn_transport_t 40
    treeattn_selfcheck_config_t 32
    treeattn_selfcheck_report_t 312
}
