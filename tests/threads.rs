//! Threads of CPU communicators, their streams and their transports: named, and joined by the end of their owner. In a
//! process without other threads.

#[path = "support/threads.rs"]
mod threads;

use std::ffi::c_void;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};
use treeattn::attention::AttentionDesc;
use treeattn::runtime::{CommConfig, Communicator, Device, Plan, Runtime, RuntimeConfig, Stream, Transport};

use threads::come_and_go;

fn main() -> ExitCode {
    threads::on_one_core();
    let mut arguments = Arguments::from_args();
    // Every thread of the process is looked at.
    arguments.test_threads = Some(1);
    let test = |name: &str, body: fn()| {
        Trial::test(name, move || {
            std::panic::catch_unwind(body).map_err(|panic| {
                let text = panic.downcast_ref::<String>().cloned();
                Failed::from(text.or(panic.downcast_ref::<&str>().map(|s| s.to_string())).unwrap_or_default())
            })
        })
    };
    libtest_mimic::run(
        &arguments,
        vec![
            test("a_local_group", a_local_group),
            test("a_stream", a_stream),
            test("a_transport", a_transport),
            test("a_plan", a_plan),
        ],
    )
    .exit_code()
}

fn runtime() -> Runtime {
    Runtime::new(RuntimeConfig::default()).unwrap()
}

fn config() -> CommConfig {
    CommConfig { threads_per_rank: 3, ..CommConfig::default() }
}

fn a_local_group() {
    let runtime = runtime();
    // Two ranks with two helpers each.
    come_and_go("local group", 4, || Communicator::create_local(&runtime, &[Device::CPU; 2], &config()).unwrap());
}

fn a_stream() {
    let runtime = runtime();
    come_and_go("stream", 1, || Stream::new(&runtime, Device::CPU).unwrap());
}

/// A rank alone: what it sends is what it gets.
///
/// # Safety
/// `send` is good for reading `bytes` bytes, and `recv`, elsewhere, for writing as many.
unsafe extern "C" fn gather(
    _ctx: *mut c_void,
    send: *const c_void,
    recv: *mut c_void,
    bytes: usize,
    _timeout_ns: i64,
    _abort: *const i32,
) -> i32 {
    // SAFETY: the library gives `bytes` bytes on both sides, which do not overlap.
    unsafe { std::ptr::copy_nonoverlapping(send.cast::<u8>(), recv.cast::<u8>(), bytes) };
    0
}

fn a_transport() {
    let runtime = runtime();
    let transport = Transport { ctx: std::ptr::null_mut(), allgather: gather, sendrecv: None, stream_threads: false };
    // The thread that watches deadlines and two helpers; or it alone, which no other thread's end gives time to end.
    for threads in [3, 1] {
        let config = CommConfig { threads_per_rank: threads, ..config() };
        come_and_go("transport", threads, || {
            // SAFETY: the callback does what an allgather of one rank does, and uses no context.
            unsafe { Communicator::create_from_transport(&runtime, transport, 1, 0, Device::CPU, &config) }.unwrap()
        });
    }
}

fn a_plan() {
    let runtime = runtime();
    let comms = Communicator::create_local(&runtime, &[Device::CPU], &config()).unwrap();
    come_and_go("plan", 0, || Plan::create(&comms[0], &AttentionDesc::new(4, 2, 16, 64)).unwrap());
}
