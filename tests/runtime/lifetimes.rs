//! Objects that outlive others.

use std::sync::Barrier;
use std::time::Duration;

use treeattn::ErrorKind;
use treeattn::runtime::{CommConfig, Plan, Stream};

use super::group::*;

#[test]
fn children_outlive_their_parents_as_errors() {
    let (runtime, comms) = group(1, &CommConfig::default());
    let desc = shape();
    let plan = Plan::create(&comms[0], &desc).unwrap();
    let stream = Stream::new(&runtime, CPU).unwrap();
    let mut shard = Shard::new(&desc, 1, 5, 0);
    comms[0].close();
    // SAFETY: refused before anything is touched.
    let error = unsafe { plan.decode(&shard.args(1), None) }.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ParentDestroyed);
    assert_eq!(shard.out[0], 7.0, "refused calls write nothing");
    assert_eq!(comms[0].status().unwrap_err().kind(), ErrorKind::ParentDestroyed);
    runtime.close();
    stream.synchronize().unwrap();
    assert_eq!(Stream::new(&runtime, CPU).err().unwrap().kind(), ErrorKind::ParentDestroyed);
}

#[test]
fn groups_come_and_go() {
    let barrier = Barrier::new(2);
    for _ in 0..20 {
        let (_runtime, comms) = group(2, &quick(Duration::from_secs(20)));
        on_threads(2, |r| {
            let plan = Plan::create(&comms[r], &shape()).unwrap();
            let mut shard = Shard::new(&shape(), 1, 5, r as u32);
            for _ in 0..10 {
                // SAFETY: the shard outlives the blocking call.
                unsafe { plan.decode(&shard.args(1), None).unwrap() };
            }
            barrier.wait();
            comms[r].close();
        });
    }
}
