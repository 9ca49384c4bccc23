//! What the bench does with CUDA that the library has no call for: graphs, events, kernels of its own.

use std::ffi::{CString, c_void};
use std::marker::PhantomData;
use std::ptr::null_mut;

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};
use serde::Serialize;

use crate::outcome::Outcome;

/// The kernels of `kernels/bench`, as build.rs compiled them.
#[allow(dead_code)] // it also says what they were compiled for
mod image {
    include!(concat!(env!("OUT_DIR"), "/bench.rs"));
}

/// Calls the driver; an error names the call.
macro_rules! cuda {
    ($call:ident($($arg:expr),* $(,)?)) => {
        $crate::bench::cuda::driver::check(sys::$call($($arg),*), stringify!($call))
    };
}

pub fn check(status: CUresult, call: &str) -> Outcome<()> {
    if status == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(format!("{call}: found {status:?}").into()) }
}

/// What the driver says of a GPU.
#[derive(Clone, Debug, Serialize)]
pub struct Card {
    pub name: String,
    pub compute_capability: (i32, i32),
    pub multiprocessors: i32,
    pub l2_bytes: i32,
    pub memory_bytes: u64,
    /// The memory's clock x width, bytes a second; 0 where the driver does not say.
    pub nominal: f64,
    /// The version of CUDA that the driver is for.
    pub driver: (i32, i32),
}

/// A GPU whose primary context is current on this thread, and the kernels of the bench.
pub struct Gpu {
    pub card: Card,
    device: sys::CUdevice,
    modules: Vec<sys::CUmodule>,
    /// Most shared memory of a block, bytes.
    shared: i32,
}

impl Gpu {
    /// The library has seen that the GPU is there.
    pub fn new(ordinal: i32, name: String, memory_bytes: u64) -> Outcome<Gpu> {
        if image::MODULES.is_empty() {
            return Err(format!("this build has no kernels to measure a GPU with: {}", image::WHY_EMPTY).into());
        }
        let (mut device, mut context, mut modules, mut version) = (0, null_mut(), Vec::new(), 0);
        // SAFETY: each call writes to a local of the type that cuda.h gives it. The images are whole fatbins, as build.rs
        // compiled them, and static. The context stays current until `drop`.
        unsafe {
            cuda!(cuInit(0))?;
            cuda!(cuDriverGetVersion(&mut version))?;
            cuda!(cuDeviceGet(&mut device, ordinal))?;
            cuda!(cuDevicePrimaryCtxRetain(&mut context, device))?;
            cuda!(cuCtxPushCurrent_v2(context))?;
            for (_, bytes) in image::MODULES {
                let mut module = null_mut();
                cuda!(cuModuleLoadData(&mut module, bytes.as_ptr().cast()))?;
                modules.push(module);
            }
        }
        let attribute = |which| -> Outcome<i32> {
            let mut value = 0;
            // SAFETY: the call writes one int to a local; cuDeviceGet gave the device.
            unsafe { cuda!(cuDeviceGetAttribute(&mut value, which, device)) }?;
            Ok(value)
        };
        let clock = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
        let width = attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?;
        let card = Card {
            name,
            compute_capability: (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
            memory_bytes,
            // kHz, bits, two transfers a clock.
            nominal: 2.0 * f64::from(clock) * 1e3 * f64::from(width) / 8.0,
            driver: (version / 1000, version % 1000 / 10),
        };
        let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        Ok(Gpu { card, device, modules, shared })
    }

    /// A kernel of `kernels/bench` that may use `shared` bytes of dynamic shared memory.
    pub fn kernel(&self, name: &str, shared: u32) -> Outcome<Kernel> {
        let (symbol, mut function) = (CString::new(name)?, null_mut());
        // SAFETY: the modules are loaded until `self` is dropped, and the name ends with a zero. The call writes one handle to a
        // local, and only for the module that has the kernel; the attribute is then set of that handle.
        unsafe {
            let found = |&&module: &&sys::CUmodule| {
                sys::cuModuleGetFunction(&mut function, module, symbol.as_ptr()) == CUresult::CUDA_SUCCESS
            };
            if self.modules.iter().find(found).is_none() {
                return Err(format!("this build has no kernel {name}").into());
            }
            if shared > 48 << 10 {
                let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // The same for all, since they may share the function; a little is the kernel's own.
                cuda!(cuFuncSetAttribute(function, most, self.shared - 1024))?;
            }
        }
        Ok(Kernel { function, shared })
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        let mut context = null_mut();
        // SAFETY: undoes what `new` did, once, on the same thread: `modules` are raw pointers, so that a `Gpu` is not Send.
        // Statuses change nothing here.
        unsafe {
            for &module in &self.modules {
                let _ = sys::cuModuleUnload(module);
            }
            let _ = sys::cuCtxPopCurrent_v2(&mut context);
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

/// A GPU's primary context, current on this thread until dropped. The pointer that it does not have keeps it from being Send.
pub struct Current(sys::CUdevice, PhantomData<*const ()>);

impl Current {
    /// The library has seen that the GPU is there.
    pub fn new(ordinal: i32) -> Outcome<Current> {
        let (mut device, mut context) = (0, null_mut());
        // SAFETY: the first two calls write to locals of the types that cuda.h gives them; the context was retained just now.
        unsafe {
            cuda!(cuDeviceGet(&mut device, ordinal))?;
            cuda!(cuDevicePrimaryCtxRetain(&mut context, device))?;
            cuda!(cuCtxPushCurrent_v2(context))?;
        }
        Ok(Current(device, PhantomData))
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        let mut context = null_mut();
        // SAFETY: undoes what `new` did, once, on the same thread, since this is not Send. Statuses change nothing here.
        unsafe {
            let _ = sys::cuCtxPopCurrent_v2(&mut context);
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.0);
        }
    }
}

/// Lets kernels of one GPU access plain allocations of another.
pub fn let_access(ordinal: i32, peer: i32) -> Outcome<()> {
    let _peer = Current::new(peer)?;
    let mut context = null_mut();
    // SAFETY: the call writes one handle to a local.
    unsafe { cuda!(cuCtxGetCurrent(&mut context)) }?;
    let _current = Current::new(ordinal)?;
    // SAFETY: the context is that of `_peer`, which retains it until this function returns; a context is current.
    match unsafe { sys::cuCtxEnablePeerAccess(context, 0) } {
        CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
        status => check(status, "cuCtxEnablePeerAccess"),
    }
}

/// A kernel of the bench.
pub struct Kernel {
    function: sys::CUfunction,
    shared: u32,
}

impl Kernel {
    /// Enqueues `grid` blocks of `threads` threads.
    ///
    /// # Safety
    /// The [`Gpu`] that gave the kernel lives. The kernel takes as many 64-bit arguments, and what they point to outlives it.
    pub unsafe fn launch(&self, stream: &Stream, grid: u32, threads: u32, arguments: &[u64]) -> Outcome<()> {
        let mut pointers: Vec<*mut c_void> =
            arguments.iter().map(|a| std::ptr::from_ref(a).cast_mut().cast()).collect();
        let pointers = pointers.as_mut_ptr();
        // SAFETY: the function is loaded as long as its GPU lives; `pointers` has an argument for each that the kernel takes,
        // and the driver copies them before it returns. What they point to outlives the kernel, as this function was promised.
        unsafe {
            cuda!(cuLaunchKernel(
                self.function,
                grid,
                1,
                1,
                threads,
                1,
                1,
                self.shared,
                stream.stream,
                pointers,
                null_mut()
            ))
        }
    }
}

/// A stream with a pair of events to time it by.
pub struct Stream {
    stream: sys::CUstream,
    begin: sys::CUevent,
    end: sys::CUevent,
}

impl Stream {
    /// A GPU must be current.
    pub fn new() -> Outcome<Stream> {
        let (mut stream, mut begin, mut end) = (null_mut(), null_mut(), null_mut());
        // SAFETY: each call writes one handle to a local; without a current context it gives an error.
        unsafe {
            cuda!(cuStreamCreate(&mut stream, sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32))?;
            cuda!(cuEventCreate(&mut begin, 0))?;
            cuda!(cuEventCreate(&mut end, 0))?;
        }
        Ok(Stream { stream, begin, end })
    }

    /// The handle, as the library takes it.
    pub fn pointer(&self) -> *mut c_void {
        self.stream.cast()
    }

    /// Seconds from begin to end of what `enqueue` puts on the stream. Blocks.
    pub fn time(&self, enqueue: impl FnOnce() -> Outcome<()>) -> Outcome<f64> {
        let mut ms = 0f32;
        // SAFETY: `new` made the stream and both events, which live until `drop`; the last call writes one float to a local.
        unsafe {
            cuda!(cuEventRecord(self.begin, self.stream))?;
            enqueue()?;
            cuda!(cuEventRecord(self.end, self.stream))?;
            cuda!(cuEventSynchronize(self.end))?;
            cuda!(cuEventElapsedTime(&mut ms, self.begin, self.end))?;
        }
        Ok(f64::from(ms) * 1e-3)
    }

    /// Enqueues a copy between GPUs that may access each other's memory.
    ///
    /// # Safety
    /// Both addresses begin `bytes` bytes of device memory, which outlive the copy.
    pub unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Outcome<()> {
        // SAFETY: the stream lives until `drop`; the memory is as this function was promised.
        unsafe { cuda!(cuMemcpyAsync(to, from, bytes, self.stream)) }
    }

    /// Captures what `enqueue` puts on the stream.
    pub fn capture(&self, enqueue: impl FnOnce() -> Outcome<()>) -> Outcome<Graph> {
        let (mut graph, mut exec) = (null_mut(), null_mut());
        // SAFETY: the stream lives until `drop`; the calls write handles to locals. A capture that has begun is ended, whatever
        // `enqueue` gave.
        unsafe {
            cuda!(cuStreamBeginCapture_v2(self.stream, sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))?;
            let enqueued = enqueue();
            cuda!(cuStreamEndCapture(self.stream, &mut graph))?;
            enqueued?;
            cuda!(cuGraphInstantiateWithFlags(&mut exec, graph, 0))?;
        }
        Ok(Graph { graph, exec })
    }

    /// Enqueues a graph.
    ///
    /// # Safety
    /// The memory that the captured work uses outlives this replay.
    pub unsafe fn replay(&self, graph: &Graph) -> Outcome<()> {
        // SAFETY: the stream and the graph are borrowed, and hold their handles until `drop`; the memory that the graph's
        // kernels use is as this function was promised.
        unsafe { cuda!(cuGraphLaunch(graph.exec, self.stream)) }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: `new` made all three, and `drop` runs once. The driver lets work that is enqueued end first. Statuses change
        // nothing here.
        unsafe {
            let _ = sys::cuEventDestroy_v2(self.begin);
            let _ = sys::cuEventDestroy_v2(self.end);
            let _ = sys::cuStreamDestroy_v2(self.stream);
        }
    }
}

/// A captured piece of work.
pub struct Graph {
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: `capture` made both, and `drop` runs once. The driver lets replays that are enqueued end first. Statuses change
        // nothing here.
        unsafe {
            let _ = sys::cuGraphExecDestroy(self.exec);
            let _ = sys::cuGraphDestroy(self.graph);
        }
    }
}
