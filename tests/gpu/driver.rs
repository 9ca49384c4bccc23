//! What tests do with CUDA that the library has no call for: graphs, events, kernels of their own.

use std::ffi::{CString, c_void};
use std::ptr::null_mut;
use std::time::Duration;

use cudarc::driver::sys::{self, CUresult};

/// Panics where a call of the driver fails.
pub fn ok(status: CUresult) {
    assert_eq!(status, CUresult::CUDA_SUCCESS);
}

/// The context of a GPU, current on this thread until dropped, as an engine has it.
pub struct Current(sys::CUdevice);

impl Current {
    pub fn new(ordinal: i32) -> Current {
        let (mut device, mut context) = (0, null_mut());
        // SAFETY: plain calls with places to write to.
        unsafe {
            ok(sys::cuInit(0));
            ok(sys::cuDeviceGet(&mut device, ordinal));
            ok(sys::cuDevicePrimaryCtxRetain(&mut context, device));
            ok(sys::cuCtxPushCurrent_v2(context));
        }
        Current(device)
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        let mut context = null_mut();
        // SAFETY: undoes what `new` did, on the same thread (raw handles are not Send in practice here).
        unsafe {
            let _ = sys::cuCtxPopCurrent_v2(&mut context);
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.0);
        }
    }
}

/// The context that is current on this thread.
pub fn current() -> usize {
    let mut context = null_mut();
    // SAFETY: writes one handle.
    ok(unsafe { sys::cuCtxGetCurrent(&mut context) });
    context as usize
}

/// Bytes that are allocated on the device of the current context.
pub fn used() -> usize {
    let (mut free, mut total) = (0, 0);
    // SAFETY: writes two sizes.
    ok(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) });
    total - free
}

/// Host memory that the device can reach. A context must be current.
pub struct Pinned(pub *mut c_void);

impl Pinned {
    pub fn new(bytes: usize) -> Pinned {
        let mut data = null_mut();
        // SAFETY: writes one pointer.
        ok(unsafe { sys::cuMemHostAlloc(&mut data, bytes, 0) });
        Pinned(data)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`.
        let _ = unsafe { sys::cuMemFreeHost(self.0) };
    }
}

/// A stream of the test's own. A context must be current.
pub struct RawStream(pub sys::CUstream);

impl RawStream {
    pub fn new() -> RawStream {
        let mut stream = null_mut();
        // SAFETY: writes one handle.
        ok(unsafe { sys::cuStreamCreate(&mut stream, 1) });
        RawStream(stream)
    }

    pub fn pointer(&self) -> *mut c_void {
        self.0.cast()
    }

    pub fn synchronize(&self) {
        // SAFETY: the stream is alive.
        ok(unsafe { sys::cuStreamSynchronize(self.0) });
    }

    /// Captures what `body` enqueues.
    pub fn capture(&self, body: impl FnOnce()) -> Graph {
        let (mut graph, mut exec) = (null_mut(), null_mut());
        // SAFETY: the stream is alive; the handles are written.
        unsafe {
            ok(sys::cuStreamBeginCapture_v2(self.0, sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL));
            body();
            ok(sys::cuStreamEndCapture(self.0, &mut graph));
            ok(sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0));
        }
        Graph { graph, exec }
    }
}

impl Drop for RawStream {
    fn drop(&mut self) {
        // SAFETY: created by `new`.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.0) };
    }
}

/// A graph ready to be replayed.
pub struct Graph {
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}

impl Graph {
    pub fn replay(&self, stream: &RawStream) {
        // SAFETY: both are alive.
        ok(unsafe { sys::cuGraphLaunch(self.exec, stream.0) });
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `capture`.
        unsafe {
            let _ = sys::cuGraphExecDestroy(self.exec);
            let _ = sys::cuGraphDestroy(self.graph);
        }
    }
}

/// A kernel of `kernels.ptx`.
pub struct RawKernel(sys::CUfunction);

impl RawKernel {
    pub fn new(name: &str) -> RawKernel {
        let text = CString::new(include_str!("kernels.ptx")).unwrap();
        let name = CString::new(name).unwrap();
        let (mut module, mut function) = (null_mut(), null_mut());
        // SAFETY: the image ends with a zero; the module stays loaded.
        unsafe {
            ok(sys::cuModuleLoadData(&mut module, text.as_ptr().cast()));
            ok(sys::cuModuleGetFunction(&mut function, module, name.as_ptr()));
        }
        RawKernel(function)
    }

    /// Enqueues blocks of 256 threads.
    pub fn launch(&self, stream: &RawStream, blocks: u32, arguments: &[u64]) {
        let mut pointers: Vec<*mut c_void> =
            arguments.iter().map(|a| std::ptr::from_ref(a).cast_mut().cast()).collect();
        // SAFETY: as many 64-bit arguments as the kernel takes.
        ok(unsafe {
            sys::cuLaunchKernel(self.0, blocks, 1, 1, 256, 1, 1, 0, stream.0, pointers.as_mut_ptr(), null_mut())
        });
    }
}

/// Holds a stream of one GPU up for a while.
pub struct Pause {
    kernel: RawKernel,
    ordinal: i32,
    kilohertz: u64,
}

impl Pause {
    pub fn new(ordinal: i32) -> Pause {
        let (_current, mut kilohertz) = (Current::new(ordinal), 0);
        let clock = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE;
        // SAFETY: writes one number.
        ok(unsafe { sys::cuDeviceGetAttribute(&mut kilohertz, clock, ordinal) });
        Pause { kernel: RawKernel::new("late_copy"), ordinal, kilohertz: kilohertz as u64 }
    }

    /// What is enqueued on `stream` after this waits for about `time` more.
    pub fn enqueue(&self, stream: &RawStream, time: Duration) {
        let _current = Current::new(self.ordinal);
        self.kernel.launch(stream, 1, &[0, 0, 0, time.as_micros() as u64 * self.kilohertz / 1000]);
    }
}

/// Memory of one GPU that nobody else may write to.
pub struct Canary {
    data: sys::CUdeviceptr,
    bytes: usize,
    ordinal: i32,
}

impl Canary {
    const FILL: u8 = 0xa5;

    pub fn new(ordinal: i32, bytes: usize) -> Canary {
        let (_current, mut data) = (Current::new(ordinal), 0);
        // SAFETY: writes an address; fills what was allocated.
        unsafe {
            ok(sys::cuMemAlloc_v2(&mut data, bytes));
            let stream = RawStream::new();
            ok(sys::cuMemsetD8Async(data, Canary::FILL, bytes, stream.0));
            stream.synchronize();
        }
        Canary { data, bytes, ordinal }
    }

    /// Whether it is unchanged.
    pub fn lives(&self) -> bool {
        let (_current, mut bytes) = (Current::new(self.ordinal), vec![0; self.bytes]);
        // SAFETY: as long as the memory.
        ok(unsafe { sys::cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), self.data, self.bytes) });
        bytes.iter().all(|&byte| byte == Canary::FILL)
    }
}

impl Drop for Canary {
    fn drop(&mut self) {
        let _current = Current::new(self.ordinal);
        // SAFETY: allocated by `new`.
        let _ = unsafe { sys::cuMemFree_v2(self.data) };
    }
}
