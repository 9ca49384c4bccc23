//! The hash of what kernels know: the library's, which an image's has to be.

use super::constants::{CHECK_CONSTANTS, CONSTANTS, Constants, GATHER_CONSTANTS, QUERY_CONSTANTS, TERMS_CONSTANTS};
use super::layouts::{CHECK_LAYOUTS, GATHER_LAYOUTS, LAYOUTS, Layout, QUERY_LAYOUTS, TERMS_LAYOUTS};

/// FNV-1a.
const fn hash_bytes(mut hash: u64, bytes: &[u8]) -> u64 {
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        i += 1;
    }
    hash
}

const fn hash_values(mut hash: u64, values: &[(&str, u64)]) -> u64 {
    let mut i = 0;
    while i < values.len() {
        hash = hash_bytes(hash_bytes(hash, values[i].0.as_bytes()), &values[i].1.to_le_bytes());
        i += 1;
    }
    hash
}

/// The hash of two lists, and of what `hash` is of.
const fn hash_lists(mut hash: u64, constants: &[Constants], layouts: &[Layout]) -> u64 {
    let mut i = 0;
    while i < constants.len() {
        hash = hash_bytes(hash_bytes(hash, constants[i].about.as_bytes()), constants[i].kind.as_bytes());
        hash = hash_values(hash, constants[i].values);
        i += 1;
    }
    i = 0;
    while i < layouts.len() {
        hash = hash_bytes(hash, layouts[i].name.as_bytes());
        hash = hash_values(hash_bytes(hash, &layouts[i].size.to_le_bytes()), layouts[i].fields);
        i += 1;
    }
    hash
}

/// The hash of what all kernels know.
pub const ABI: u64 = hash_lists(0xcbf2_9ce4_8422_2325, CONSTANTS, LAYOUTS);
/// That of what kernels with terms know.
pub const TERMS_ABI: u64 = hash_lists(ABI, TERMS_CONSTANTS, TERMS_LAYOUTS);
/// That of what kernels that check steps know.
pub const CHECK_ABI: u64 = hash_lists(ABI, CHECK_CONSTANTS, CHECK_LAYOUTS);
/// That of what kernels that gather queries know.
pub const QUERY_ABI: u64 = hash_lists(ABI, QUERY_CONSTANTS, QUERY_LAYOUTS);
/// That of what kernels of messages over NCCL know.
pub const GATHER_ABI: u64 = hash_lists(ABI, GATHER_CONSTANTS, GATHER_LAYOUTS);
