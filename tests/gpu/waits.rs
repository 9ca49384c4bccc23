//! What calls of the driver wait for: says how long each takes while a kernel runs, on its own GPU and on another. The library
//! must not call one that waits for a kernel while that kernel waits for the caller; what may wait differs from driver to
//! driver.

use std::ptr::null_mut;
use std::time::{Duration, Instant};

use cudarc::driver::sys;
use treeattn::runtime::{DeviceKind, Runtime, RuntimeConfig};

use crate::driver::{Current, Pause, RawKernel, RawStream, ok};

/// How long the kernel runs.
const TIME: Duration = Duration::from_millis(300);

/// Says what each call waits for. Asserts only what every exchange relies on: a launch waits for no kernel.
pub fn calls() {
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let count = runtime.device_count(DeviceKind::Cuda).unwrap().min(2);
    let gpus: Vec<Gpu> = (0..count).map(Gpu::new).collect();
    for running in 0..gpus.len() {
        for calling in 0..gpus.len() {
            println!("while a kernel runs {TIME:?} on GPU {running}, on GPU {calling}:");
            for (name, call) in CALLS {
                gpus[running].pause.enqueue(&gpus[running].stream, TIME);
                let _current = Current::new(gpus[calling].ordinal);
                let began = Instant::now();
                call(&gpus[calling], &gpus[running]);
                let took = began.elapsed();
                let waited = took > TIME * 2 / 3;
                println!("  {name:32} {:8.2} ms{}", took.as_secs_f64() * 1e3, if waited { ", waited" } else { "" });
                assert!(!name.starts_with("cuLaunchKernel") || !waited, "{name}: {took:?}");
                gpus[running].stream.synchronize();
                gpus[calling].other.synchronize();
            }
        }
    }
}

/// A GPU with what the calls need.
struct Gpu {
    ordinal: i32,
    pause: Pause,
    copy: RawKernel,
    stream: RawStream,
    other: RawStream,
    context: sys::CUcontext,
    // Last: the others need a context.
    _current: Current,
}

impl Gpu {
    fn new(ordinal: i32) -> Gpu {
        let current = Current::new(ordinal);
        let pause = Pause::new(ordinal);
        let (stream, other) = (RawStream::new(), RawStream::new());
        let copy = RawKernel::new("late_copy");
        let context = crate::driver::current() as sys::CUcontext;
        // Loads what is loaded late.
        pause.enqueue(&stream, Duration::from_micros(10));
        copy.launch(&other, 1, &[0, 0, 0, 0]);
        stream.synchronize();
        other.synchronize();
        Gpu { ordinal, pause, copy, stream, other, context, _current: current }
    }
}

type Call = fn(&Gpu, &Gpu);

const CALLS: [(&str, Call); 9] = [
    ("cuLaunchKernel", |gpu, _| gpu.copy.launch(&gpu.other, 1, &[0, 0, 0, 0])),
    ("cuMemAlloc of 16 MiB", |_, _| {
        let mut data = 0;
        // SAFETY: writes an address to a local; the memory is left to the end of the process.
        ok(unsafe { sys::cuMemAlloc_v2(&mut data, 16 << 20) });
    }),
    ("cuMemAlloc and cuMemFree", |_, _| {
        let mut data = 0;
        // SAFETY: writes an address to a local, and frees what was just allocated.
        unsafe {
            ok(sys::cuMemAlloc_v2(&mut data, 1 << 20));
            ok(sys::cuMemFree_v2(data));
        }
    }),
    ("cuMemHostAlloc, portable", |_, _| {
        let mut data = null_mut();
        // SAFETY: writes a pointer to a local; the memory is left to the end of the process.
        ok(unsafe { sys::cuMemHostAlloc(&mut data, 4096, 3) });
    }),
    ("cuMemsetD8Async, waited for", |gpu, _| {
        let mut data = 0;
        // SAFETY: writes an address to a local, then fills the allocation.
        unsafe {
            ok(sys::cuMemAlloc_v2(&mut data, 4096));
            ok(sys::cuMemsetD8Async(data, 0, 4096, gpu.other.0));
        }
        gpu.other.synchronize();
    }),
    ("cuStreamCreate", |_, _| drop(RawStream::new())),
    ("cuModuleLoadData", |_, _| {
        let _kernel = RawKernel::new("late_copy");
    }),
    ("cuEventCreate", |_, _| {
        let mut event = null_mut();
        // SAFETY: writes a handle to a local, and destroys what was just made.
        unsafe {
            ok(sys::cuEventCreate(&mut event, 0));
            ok(sys::cuEventDestroy_v2(event));
        }
    }),
    ("cuCtxEnable- and DisablePeerAccess", |gpu, running| {
        if gpu.ordinal != running.ordinal {
            // SAFETY: both contexts are alive; the status does not matter: there may be no peer access, or already.
            unsafe {
                let _ = sys::cuCtxEnablePeerAccess(running.context, 0);
                let _ = sys::cuCtxDisablePeerAccess(running.context);
            }
        }
    }),
];
