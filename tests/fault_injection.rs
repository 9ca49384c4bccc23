//! Forced panics and failed allocations below the runtime. One test, for faults are armed for the process.
#![cfg(feature = "fault-injection")]

use std::ffi::c_void;
use std::time::Duration;

use treeattn::device::{EngineExecutor, Executor, HostBuffer, ParallelFor, Queue, TaskCallback, Workers};
use treeattn::{ErrorKind, fault};

/// Runs the tasks one after the other.
///
/// # Safety
/// `task` may be called with `data` and the numbers below `n`.
unsafe extern "C" fn in_turn(_: *mut c_void, n: i32, task: Option<TaskCallback>, data: *mut c_void) -> i32 {
    // SAFETY: the task and its data, as the library gave them.
    task.map_or(1, |task| (0..n).map(|i| unsafe { task(data, i) }).count() as i32 - n)
}

#[test]
fn threads_queues_and_buffers_survive_their_faults() {
    let workers = Workers::new(3, "test", false).unwrap();
    for (text, kind) in [
        ("workers.run=fail", ErrorKind::NoMemory),
        ("workers.job#0=panic", ErrorKind::Internal),
        ("workers.job#2=panic", ErrorKind::Internal),
    ] {
        fault::arm(text).unwrap();
        assert_eq!(workers.run(&|_| ()).unwrap_err().kind(), kind, "{text}");
        workers.run(&|_| ()).unwrap();
    }

    // SAFETY: `in_turn` does what it should, with any context.
    let engine = unsafe { EngineExecutor::new(std::ptr::null_mut(), 3, in_turn) }.unwrap();
    let parallel = ParallelFor::new(engine).unwrap();
    for (text, kind) in [("executor.run=fail", ErrorKind::NoMemory), ("executor.job#2=panic", ErrorKind::Internal)] {
        fault::arm(text).unwrap();
        assert_eq!(parallel.run(&|_| ()).unwrap_err().kind(), kind, "{text}");
        parallel.run(&|_| ()).unwrap();
    }

    let queue = Queue::new(4, "test").unwrap();
    for (text, kind) in [("queue.run=fail", ErrorKind::NoMemory), ("queue.run=panic", ErrorKind::Internal)] {
        fault::arm(text).unwrap();
        for _ in 0..3 {
            queue.push(|| Ok(()), Duration::from_secs(20)).unwrap();
        }
        assert_eq!(queue.synchronize().unwrap_err().kind(), kind, "{text}");
        queue.synchronize().unwrap();
    }

    fault::arm("host_buffer.new=fail@1").unwrap();
    HostBuffer::new(64).unwrap();
    assert_eq!(HostBuffer::new(64).unwrap_err().kind(), ErrorKind::NoMemory);
    HostBuffer::new(64).unwrap();

    fault::arm("host_buffer.new=fail*all").unwrap();
    assert!(HostBuffer::new(64).is_err() && HostBuffer::new(64).is_err());
    fault::disarm();
    HostBuffer::new(64).unwrap();
}
