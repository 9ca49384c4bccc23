//! The stand-ins for NCCL and for the driver: how they are built, and what tests tell them and ask them.

use std::ffi::{CString, c_void};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::driver;

/// Set once the stand-ins are where the loader looks first.
const READY: &str = "TREEATTN_TEST_MOCK_NCCL";

/// What the stand-in does wrong, in its own numbers.
#[derive(Clone, Copy)]
pub enum Mode {
    None,
    InitFails,
    AbortHangs,
    FinalizeHangs,
    InitFailsLater,
}

/// Whether this process has them.
pub fn is_ready() -> bool {
    std::env::var_os(READY).is_some()
}

/// The folder of the stand-ins.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("mock_nccl")
}

/// Compiles the stand-ins and starts this program again with them in the loader's path. False where there is no compiler.
pub fn build() -> bool {
    let folder = folder();
    std::fs::create_dir_all(&folder).unwrap();
    let compile = |output: &str, source: &str, flags: &[&str]| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(source);
        let mut compiler = Command::new("cc");
        compiler
            .args(["-shared", "-fPIC", "-O1", "-pthread"])
            .args(flags)
            .arg("-o")
            .arg(folder.join(output))
            .arg(source);
        compiler.status().is_ok_and(|status| {
            assert!(status.success(), "{output} does not compile");
            true
        })
    };
    let built = driver::compile(&folder)
        && compile("libnccl.so.2", "mock_nccl/nccl.c", &["-Wl,-soname,libnccl.so.2"])
        && compile("old.so", "mock_nccl/nccl.c", &["-DVERSION=21705"])
        && compile("partial.so", "mock_nccl/nccl.c", &["-DWITHOUT_SPLIT"]);
    if !built {
        return false;
    }
    let program = std::env::current_exe().unwrap();
    let error =
        Command::new(program).args(std::env::args_os().skip(1)).env("LD_LIBRARY_PATH", folder).env(READY, "1").exec();
    panic!("{error}");
}

/// A function of the stand-in for the driver.
pub fn driver_symbol(name: &str) -> *mut c_void {
    let name = CString::new(name).unwrap();
    // SAFETY: looks up a symbol of a library that stays loaded.
    let found = unsafe { libc::dlsym(libc::dlopen(c"libcuda.so".as_ptr(), libc::RTLD_NOW), name.as_ptr()) };
    assert!(!found.is_null(), "{name:?}");
    found
}

/// A function of the stand-in for NCCL.
pub fn symbol(name: &str) -> *mut c_void {
    let name = CString::new(name).unwrap();
    // SAFETY: looks up a symbol of a library that stays loaded.
    let found = unsafe { libc::dlsym(libc::dlopen(c"libnccl.so.2".as_ptr(), libc::RTLD_NOW), name.as_ptr()) };
    assert!(!found.is_null(), "{name:?}");
    found
}

pub fn mode(mode: Mode) {
    // SAFETY: the signature in the stand-in's source.
    unsafe { std::mem::transmute::<*mut c_void, extern "C" fn(i32)>(symbol("mock_nccl_mode"))(mode as i32) }
}

/// A communicator as an engine makes it, whose calls block. The context of its GPU stays current on this thread.
pub fn engines(id: &[u8; 128], world: i32, rank: i32) -> *mut c_void {
    #[derive(Clone, Copy)]
    #[repr(C)]
    struct Id([u8; 128]);
    type Init = extern "C" fn(*mut *mut c_void, i32, Id, i32, *mut c_void) -> i32;
    let (mut context, mut comm) = (std::ptr::null_mut::<c_void>(), std::ptr::null_mut());
    // SAFETY: the signatures of cuda.h and nccl.h.
    unsafe {
        let retain = driver_symbol("cuDevicePrimaryCtxRetain");
        let push = driver_symbol("cuCtxPushCurrent_v2");
        std::mem::transmute::<*mut c_void, extern "C" fn(*mut *mut c_void, i32) -> u32>(retain)(&mut context, rank);
        std::mem::transmute::<*mut c_void, extern "C" fn(*mut c_void) -> u32>(push)(context);
        let init = std::mem::transmute::<*mut c_void, Init>(symbol("ncclCommInitRankConfig"));
        assert_eq!(init(&mut comm, world, Id(*id), rank, std::ptr::null_mut()), 0);
    }
    comm
}

/// Calls that the stand-in has counted.
pub fn counted_calls() -> i64 {
    // SAFETY: the signature in the stand-in's source.
    unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> i64>(symbol("mock_nccl_calls"))() }
}
