//! The caller's floating-point control register is its own, also from Rust: `tests/c/floats.c` asks it of every export.

use std::arch::asm;
use std::time::Duration;

use treeattn::ErrorKind;
use treeattn::attention::AttentionDesc;

use super::group::*;

/// Rounding up, flush to zero, denormals as zero, one flag raised.
const ODD: u32 = 0xdfc1;
const USUAL: u32 = 0x1f80;

fn get() -> u32 {
    let mut value = 0u32;
    // SAFETY: stores the register to a local.
    unsafe { asm!("stmxcsr [{}]", in(reg) &mut value, options(nostack)) };
    value
}

fn set(value: u32) {
    // SAFETY: one of the constants above, of which no reserved bit is set.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &value, options(nostack)) };
}

#[test]
fn steps_leave_the_control_register_alone_also_where_they_fail() {
    for algorithm in ALGORITHMS {
        let (_runtime, comms) = group(2, &quick(Duration::from_millis(50)));
        let desc = AttentionDesc { algorithm, ..shape() };
        let plans = plan_all(&comms, &desc);
        let mut shards: Vec<_> = (0..2).map(|r| Shard::new(&desc, 1, 5, r)).collect();
        let args = [0, 1].map(|r: usize| shards[r].args(1));
        set(ODD);
        // SAFETY: the shards outlive the blocking calls.
        let (partial, failed) = unsafe { (plans[0].partial(&args[0], None), plans[0].decode(&args[0], None)) };
        let found = get();
        set(USUAL);
        partial.unwrap();
        assert_eq!((failed.unwrap_err().kind(), found), (ErrorKind::Timeout, ODD), "{algorithm:?}");
    }
}
