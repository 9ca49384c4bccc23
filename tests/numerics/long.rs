//! Long sequences: the error does not grow with the length.

use treeattn::attention::{AttentionDesc, Dtype, Placement};

use crate::support::case::Case;
use crate::support::full;
use crate::support::run::Pool;
use crate::support::values::Values;

fn run(keys: usize, values: Values, dtype: Dtype, worlds: &[usize]) {
    let mut pool = Pool::default();
    for &world in worlds {
        let mut desc = AttentionDesc::new(4, 1, 32, 1);
        (desc.k_dtype, desc.v_dtype) = (dtype, dtype);
        desc.placement = if world > 1 { Placement::Interleaved { run: 64 } } else { Placement::Contiguous };
        let mut case = Case::plain(desc, world, &[(keys, 1)], values, 2024 + world as u64);
        case.threads = 2;
        pool.check(&case);
    }
    pool.tally.finish("long");
}

/// 131,072 keys; in a full run 1,048,576.
fn length() -> usize {
    if full() { 1 << 20 } else { 1 << 17 }
}

#[test]
fn peaky_and_long() {
    run(length(), Values::Peaky, Dtype::Bf16, &[1, 3]);
    if full() {
        run(length(), Values::Peaky, Dtype::F32, &[1, 4]);
        run(length(), Values::Rising, Dtype::F16, &[1, 4]);
    }
}

#[test]
fn flat_and_long() {
    run(length(), Values::Normal, Dtype::F32, &[2]);
    if full() {
        run(length(), Values::Equal, Dtype::F16, &[1, 4]);
        run(length(), Values::Cancelling, Dtype::Bf16, &[1, 4]);
    }
}
