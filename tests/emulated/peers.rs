//! What exchanges between GPUs build on: peers, memory of other processes, waits of one kernel for another.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::ptr::null_mut;
use std::time::{Duration, Instant};

use cudarc::driver::sys::{self, CUdeviceptr, CUresult};
use treeattn::attention::Dtype;
use treeattn::runtime::{Device, Stream};

use crate::driver::{Current, Pause, RawKernel, RawStream, current, ok, used};
use crate::group::{Group, ranks};
use crate::mirror::GPU;
use crate::numerics::shape;
use crate::support::case::Case;
use crate::support::values::Values;

/// Words of 16 bytes that are copied about.
const WORDS: u64 = 64;
const BYTES: usize = 16 * WORDS as usize;
/// Nanoseconds until a kernel gives up on its peer.
const PATIENCE: u64 = 20_000_000_000;

/// Device memory of the current context.
struct Memory(CUdeviceptr);

impl Memory {
    fn new(fill: u8) -> Memory {
        let mut data = 0;
        // SAFETY: writes an address; fills what was allocated.
        unsafe {
            ok(sys::cuMemAlloc_v2(&mut data, BYTES));
            ok(sys::cuMemsetD8_v2(data, fill, BYTES));
        }
        Memory(data)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; BYTES];
        // SAFETY: as long as the memory.
        ok(unsafe { sys::cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), self.0, BYTES) });
        bytes
    }

    fn word(&self, index: usize) -> u64 {
        u64::from_ne_bytes(self.bytes()[8 * index..][..8].try_into().unwrap())
    }

    fn free(self) {
        // SAFETY: allocated by `new`.
        ok(unsafe { sys::cuMemFree_v2(self.0) });
    }
}

/// Kernels reach the memory of a peer, copies go between devices, and kernels of two devices wait for each other.
pub fn peers() {
    let first = Current::new(0);
    let first_context = current() as sys::CUcontext;
    let (here, copy, exchange) = (Memory::new(1), RawKernel::new("late_copy"), RawKernel::new("signal_and_wait"));
    let stream = RawStream::new();
    let second = Current::new(1);
    let second_context = current() as sys::CUcontext;
    let (there, other_stream) = (Memory::new(0), RawStream::new());
    let mut can = 0;
    // SAFETY: plain calls; the contexts are alive.
    unsafe {
        ok(sys::cuDeviceCanAccessPeer(&mut can, 1, 0));
        assert_eq!(can, 1);
        ok(sys::cuCtxEnablePeerAccess(first_context, 0));
        assert_eq!(sys::cuCtxEnablePeerAccess(first_context, 0), CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
    }
    copy.launch(&other_stream, 2, &[here.0, there.0, WORDS, 0]);
    other_stream.synchronize();
    assert_eq!(there.bytes(), [1; BYTES]);
    // SAFETY: both are that long.
    unsafe {
        ok(sys::cuMemsetD8Async(there.0, 2, BYTES, other_stream.0));
        ok(sys::cuMemcpyPeerAsync(here.0, first_context, there.0, second_context, BYTES, other_stream.0));
    }
    other_stream.synchronize();
    assert_eq!(here.bytes(), [2; BYTES]);
    // Each tells the other and waits for it: neither ends alone.
    for value in [1u64 << 60, 1 << 61, 1 << 62] {
        exchange.launch(&other_stream, 1, &[here.0, there.0, value, PATIENCE, there.0 + 8]);
        // SAFETY: sets the context of this thread for a launch.
        ok(unsafe { sys::cuCtxPushCurrent_v2(first_context) });
        exchange.launch(&stream, 1, &[there.0, here.0, value, PATIENCE, here.0 + 8]);
        stream.synchronize();
        // SAFETY: undoes the push.
        ok(unsafe { sys::cuCtxPopCurrent_v2(&mut null_mut()) });
        other_stream.synchronize();
        assert_eq!((here.word(1), there.word(1)), (1, 1));
    }
    // Nobody answers: the deadline ends the wait.
    exchange.launch(&other_stream, 1, &[here.0, there.0, u64::MAX, 50_000_000, there.0 + 8]);
    other_stream.synchronize();
    assert_eq!(there.word(1), 2);
    // SAFETY: the context is alive.
    unsafe {
        ok(sys::cuCtxDisablePeerAccess(first_context));
        assert_eq!(sys::cuCtxDisablePeerAccess(first_context), CUresult::CUDA_ERROR_PEER_ACCESS_NOT_ENABLED);
    }
    there.free();
    drop((other_stream, second));
    here.free();
    drop((stream, first));
}

/// `EMULATOR_PEERS=0`.
pub fn no_peers() {
    let first = Current::new(0);
    let first_context = current() as sys::CUcontext;
    let second = Current::new(1);
    let mut can = 1;
    // SAFETY: plain calls; the contexts are alive.
    unsafe {
        ok(sys::cuDeviceCanAccessPeer(&mut can, 1, 0));
        let refused = sys::cuCtxEnablePeerAccess(first_context, 0);
        assert_eq!((can, refused), (0, CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED));
    }
    drop((second, first));
}

fn export(memory: &Memory) -> sys::CUipcMemHandle {
    let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
    // SAFETY: writes a handle.
    ok(unsafe { sys::cuIpcGetMemHandle(&mut handle, memory.0) });
    handle
}

fn open(handle: sys::CUipcMemHandle) -> Result<Memory, CUresult> {
    let mut data = 0;
    // SAFETY: writes an address.
    match unsafe { sys::cuIpcOpenMemHandle_v2(&mut data, handle, 1) } {
        CUresult::CUDA_SUCCESS => Ok(Memory(data)),
        error => Err(error),
    }
}

fn to_text(handle: &sys::CUipcMemHandle) -> String {
    handle.reserved.iter().map(|&byte| format!("{:02x}", byte as u8)).collect()
}

fn from_text(text: &str) -> sys::CUipcMemHandle {
    let byte = |i: usize| u8::from_str_radix(&text[2 * i..][..2], 16).unwrap() as _;
    sys::CUipcMemHandle { reserved: std::array::from_fn(byte) }
}

/// The peer of `processes`: prints the handle of its memory, waits for the parent in a kernel, then for its end.
pub fn peer_process() {
    let _current = Current::new(1);
    let (mine, stream) = (Memory::new(0), RawStream::new());
    let theirs = open(from_text(&std::env::var("PEER_HANDLE").unwrap())).unwrap();
    println!("{}", to_text(&export(&mine)));
    RawKernel::new("signal_and_wait").launch(&stream, 1, &[theirs.0, mine.0, 7, PATIENCE, mine.0 + 8]);
    stream.synchronize();
    println!("{}", mine.word(1));
    std::thread::sleep(std::time::Duration::from_secs(60));
}

fn line(child: &mut Child) -> String {
    let mut line = String::new();
    let mut read = BufReader::with_capacity(1, child.stdout.as_mut().unwrap());
    read.read_line(&mut line).unwrap();
    line.trim().to_string()
}

/// Kernels of two processes wait for each other; memory of a process that was killed stays what it was.
pub fn processes() {
    let _current = Current::new(0);
    let (mine, stream) = (Memory::new(0), RawStream::new());
    assert_eq!(open(export(&mine)).err(), Some(CUresult::CUDA_ERROR_INVALID_CONTEXT), "one's own");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .env("TREEATTN_TEST_ALONE", "peer_process")
        .env("PEER_HANDLE", to_text(&export(&mine)))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let handle = from_text(&line(&mut child));
    let theirs = open(handle).unwrap();
    assert_eq!(open(handle).unwrap().0, theirs.0, "opened twice");
    RawKernel::new("signal_and_wait").launch(&stream, 1, &[theirs.0, mine.0, 7, PATIENCE, mine.0 + 8]);
    stream.synchronize();
    assert_eq!((mine.word(1), line(&mut child).as_str()), (1, "1"));
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(theirs.word(0), 7, "after its end");
    RawKernel::new("late_copy").launch(&stream, 1, &[mine.0, theirs.0, WORDS, 0]);
    stream.synchronize();
    assert_eq!(theirs.bytes(), mine.bytes());
    // SAFETY: opened twice.
    unsafe {
        ok(sys::cuIpcCloseMemHandle(theirs.0));
        ok(sys::cuIpcCloseMemHandle(theirs.0));
        assert_eq!(sys::cuIpcCloseMemHandle(theirs.0), CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    assert_eq!(open(handle).err(), Some(CUresult::CUDA_ERROR_INVALID_VALUE), "its process is gone");
    mine.free();
}

/// The body of the next: does not come back.
pub fn deadlock() {
    let _current = Current::new(0);
    let stream = RawStream::new();
    RawKernel::new("never_meet").launch(&stream, 1, &[0]);
    stream.synchronize();
}

/// A kernel whose threads wait for each other in vain ends the process with a word on where each stands.
pub fn a_deadlock_is_explained() {
    let program = std::env::current_exe().unwrap();
    let output = Command::new(program).env("TREEATTN_TEST_ALONE", "deadlock").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("deadlock") && said.contains("never_meet"), "{said}");
    assert!(said.contains("0: __syncthreads") && said.contains("1: __syncwarp"), "{said}");
}

/// The last of a local group goes while a kernel of one rank has yet to begin: nobody is kept for long, and the kernel still
/// finds the windows of all. So it is where a capture forbids giving anything back.
pub fn windows_outlive_kernels() {
    const LATE: Duration = Duration::from_secs(3);
    let (_first, _second) = (Current::new(0), Current::new(1));
    let case = Case::plain(shape(8, 2, 64, Dtype::F16), 2, &[(100, 1)], Values::Normal, 5);
    for is_captured in [false, true] {
        let group = Group::new(2, Duration::from_millis(100));
        let (all, plans) = (ranks(&case), group.plans(&case.desc));
        let mirrors = group.mirrors(&all);
        let raw = RawStream::new();
        let device = Device { ordinal: 1, ..GPU };
        // SAFETY: the raw stream outlives the wrapped one.
        let stream = unsafe { Stream::wrap_cuda(&group.gpus[1].runtime, device, raw.pointer()) }.unwrap();
        Pause::new(1).enqueue(&raw, LATE);
        // SAFETY: the device memory outlives the step, which is waited for.
        unsafe { plans[1].decode(&mirrors[1].args, Some(&stream)) }.unwrap();
        let other = RawStream::new();
        // SAFETY: as above.
        let known = unsafe { Stream::wrap_cuda(&group.gpus[1].runtime, device, other.pointer()) }.unwrap();
        let Group { gpus, comms } = group;
        let leave = || {
            let started = Instant::now();
            drop((plans, comms));
            assert!(started.elapsed() < LATE / 2, "{:?}", started.elapsed());
        };
        match is_captured {
            true => drop(other.capture(leave)),
            false => leave(),
        }
        raw.synchronize();
        drop((known, stream, mirrors, gpus));
        let started = Instant::now();
        // All of it is given back at last: windows are larger.
        while used() > 4 << 20 {
            assert!(started.elapsed() < LATE, "{} bytes", used());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
