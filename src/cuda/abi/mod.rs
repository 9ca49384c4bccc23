//! What the library and its kernels agree on: every constant that both know, the offset of every field of what kernels take.
//!
//! `constants` and `layouts` are the one list. `kernels/abi.cuh` is generated from it (`header`), so that kernels have no
//! constants of their own to drift, and holds an assertion for each field, so that a struct of `kernels/params.cuh` that
//! differs does not compile. Values are compared twice: when this file is compiled, each one with what the header says; when
//! kernels are loaded, the hash of all of them with the image's, which may have been compiled from other sources
//! (`TREEATTN_PREBUILT_KERNELS`).
//!
//! There are several parts, so that kernels need not be compiled anew where what they do not know changes: what all kernels
//! know, and what those that take [`TermsParams`](super::params::TermsParams), [`CheckParams`](super::params::CheckParams),
//! [`QueryParams`](super::params::QueryParams) or [`GatherParams`](super::params::GatherParams) know beside that.

mod constants;
mod hash;
mod header;
mod layouts;

use std::mem::size_of;

use crate::device::cuda::{Image, Kernel};
use crate::error::{Error, ErrorKind, Result};
use hash::{ABI, CHECK_ABI, GATHER_ABI, QUERY_ABI, TERMS_ABI};

/// The sources of kernels with terms.
const TERMS_SOURCES: [&str; 5] = ["decode_terms", "decode_narrow", "decode_packed", "decode_blocks", "decode_wide"];

// The first name of which `kernels/abi.cuh` says another value stops the build here: `TREEATTN_BLESS=1 cargo test --lib abi`
// writes the header anew. Tests are compiled in any case, as one of them is what writes it.
#[cfg(not(test))]
const _: () = {
    if let Some(name) = header::first_difference(include_bytes!("../../../kernels/abi.cuh")) {
        panic!("{}", name);
    }
};

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
        "queries" => QUERY_ABI,
        "gather" | "gather_queries" | "nodes" => GATHER_ABI,
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
