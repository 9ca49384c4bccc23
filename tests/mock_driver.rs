//! How the library drives CUDA, seen by a driver without a GPU (`mock_driver/cuda.c`): whether contexts are pushed and
//! popped, captures left intact, errors told apart, and everything given back. Kernels do nothing there.
//!
//! The tests of plans need a build that carries kernels, whatever they are; without, they are ignored.

#[path = "mock_driver/build.rs"]
mod stand_in;

use std::ffi::{CString, c_void};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Trial};
use treeattn::ErrorKind;
use treeattn::attention::{AttentionDesc, DecodeArgs, Dtype, OutputMode, Tensor};
use treeattn::runtime::{
    Buffer, CommConfig, Communicator, Device, DeviceKind, MergeArgs, Plan, Runtime, RuntimeConfig, Stream,
    merge_partials,
};

const GPU: Device = Device { kind: DeviceKind::Cuda, ordinal: 0 };
/// Set once the mock is where the loader looks first.
const READY: &str = "TREEATTN_TEST_MOCK_DRIVER";

/// The words by which a test and the mock talk, in the mock's order.
#[derive(Clone, Copy)]
#[allow(dead_code, clippy::upper_case_acronyms)] // the mock's names, in its order
enum Key {
    Devices,
    Version,
    Major,
    Minor,
    FailLaunch,
    FailSync,
    FailAlloc,
    FailLoad,
    Capture,
    Depth,
    Pushes,
    Alive,
    Launches,
    Queries,
    Syncs,
    Changes,
    Grid,
    Block,
    Shared,
    Dependent,
    Stream,
    Retained,
    Foreign,
    SlowFree,
}

/// The mock's own functions.
struct Mock {
    set: extern "C" fn(i32, i64),
    get: extern "C" fn(i32) -> i64,
}

impl Mock {
    fn new() -> Mock {
        let symbol = |name: &str| {
            let (library, name) = (c"libcuda.so", CString::new(name).unwrap());
            // SAFETY: looks up a symbol of a library that stays loaded.
            let found = unsafe { libc::dlsym(libc::dlopen(library.as_ptr(), libc::RTLD_NOW), name.as_ptr()) };
            assert!(!found.is_null());
            found
        };
        // SAFETY: these are the signatures in the mock's source.
        unsafe {
            Mock {
                set: std::mem::transmute::<*mut c_void, extern "C" fn(i32, i64)>(symbol("mock_set")),
                get: std::mem::transmute::<*mut c_void, extern "C" fn(i32) -> i64>(symbol("mock_get")),
            }
        }
    }

    fn set(&self, key: Key, value: i64) {
        (self.set)(key as i32, value);
    }

    fn get(&self, key: Key) -> i64 {
        (self.get)(key as i32)
    }
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    let with_mock = std::env::var_os(READY).is_some() || build_mock();
    // The mock's words are the same for all.
    arguments.test_threads = Some(1);
    let has_kernels = with_mock && {
        let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
        let comm = &Communicator::create_local(&runtime, &[GPU], &CommConfig::default()).unwrap()[0];
        Plan::create(comm, &AttentionDesc { kv_heads: 0, ..shape() }).is_ok()
    };
    let test = |name: &str, plans: bool, body: fn(&Mock)| {
        Trial::test(name, move || {
            let mock = Mock::new();
            let (depth, alive) = (mock.get(Key::Depth), mock.get(Key::Alive));
            let result = stand_in::outcome(|| body(&Mock::new()));
            for key in [Key::FailLaunch, Key::FailSync, Key::Capture, Key::SlowFree, Key::Foreign] {
                mock.set(key, 0);
            }
            result?;
            if (mock.get(Key::Depth), mock.get(Key::Alive), mock.get(Key::Retained)) != (depth, alive, 0) {
                let (depth, alive) = (mock.get(Key::Depth) - depth, mock.get(Key::Alive) - alive);
                return Err(format!("left {depth} contexts pushed, {alive} things allocated").into());
            }
            Ok(())
        })
        .with_ignored_flag(!with_mock || (plans && !has_kernels))
    };
    libtest_mimic::run(
        &arguments,
        vec![
            test("devices_are_described", false, devices_are_described),
            test("buffers_hold_bytes", false, buffers_hold_bytes),
            test("captures_stay_intact", false, captures_stay_intact),
            test("streams_of_other_contexts_are_refused", false, streams_of_other_contexts_are_refused),
            test("a_lost_context_is_told_apart", false, a_lost_context_is_told_apart),
            test("a_device_that_does_not_finish_delays_nobody_for_long", false, a_slow_device),
            test("a_build_without_kernels_says_what_to_do", false, a_build_without_kernels),
            test("an_unfit_image_is_explained", true, an_unfit_image_is_explained),
            test("steps_launch_once_and_ask_nothing_twice", true, steps_launch_once),
            test("pointers_of_other_memory_are_refused", true, pointers_of_other_memory_are_refused),
            test("errors_before_a_step_are_not_its_own", true, errors_before_a_step_are_not_its_own),
            test("steps_may_be_captured_and_plans_not_changed", true, steps_may_be_captured),
            test(
                "ranks_whose_writes_do_not_arrive_are_local_only",
                true,
                ranks_whose_writes_do_not_arrive_are_local_only,
            ),
            test("the_bench_finds_outputs_that_nobody_wrote", true, the_bench_finds_outputs_that_nobody_wrote),
        ],
    )
    .exit_code()
}

/// Compiles the mock and starts this program again with it in the loader's path. False where there is no compiler.
fn build_mock() -> bool {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mock_driver");
    std::fs::create_dir_all(&folder).unwrap();
    if !stand_in::compile(&folder) {
        return false;
    }
    let program = std::env::current_exe().unwrap();
    let error =
        Command::new(program).args(std::env::args_os().skip(1)).env("LD_LIBRARY_PATH", folder).env(READY, "1").exec();
    panic!("{error}");
}

fn runtime() -> Runtime {
    Runtime::new(RuntimeConfig::default()).unwrap()
}

fn shape() -> AttentionDesc {
    AttentionDesc {
        max_batch: 4,
        max_query_tokens: 4,
        k_dtype: Dtype::Bf16,
        v_dtype: Dtype::Bf16,
        ..AttentionDesc::new(8, 2, 64, 1024)
    }
}

fn devices_are_described(mock: &Mock) {
    let runtime = runtime();
    assert_eq!(runtime.device_count(DeviceKind::Cuda), Ok(2));
    let info = runtime.device_info(Device { ordinal: 1, ..GPU }).unwrap();
    assert_eq!((info.name.as_str(), info.units, info.isa.as_str()), ("Mock 1", 132, "sm_90"));
    let error = runtime.device_info(Device { ordinal: 2, ..GPU }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.message().contains("cuda:2") && error.message().contains("the 2 CUDA devices"), "{error}");
    assert_eq!(mock.get(Key::Retained), 0, "describing makes no context");
}

fn buffers_hold_bytes(mock: &Mock) {
    let runtime = runtime();
    let buffer = Buffer::alloc(&runtime, GPU, 1000).unwrap();
    let mut bytes = [1u8; 1000];
    buffer.download(0, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 1000]);
    buffer.upload(10, &[7; 20]).unwrap();
    buffer.download(0, &mut bytes).unwrap();
    assert_eq!((bytes[9], bytes[10], bytes[29], bytes[30]), (0, 7, 7, 0));
    assert_eq!(buffer.upload(990, &[0; 11]).unwrap_err().kind(), ErrorKind::InvalidArgument);
    mock.set(Key::FailAlloc, 2);
    assert_eq!(Buffer::alloc(&runtime, GPU, 1000).err().unwrap().kind(), ErrorKind::NoDeviceMemory);
}

fn captures_stay_intact(mock: &Mock) {
    let runtime = runtime();
    let stream = Stream::new(&runtime, GPU).unwrap();
    let buffer = Buffer::alloc(&runtime, GPU, 64).unwrap();
    let other = Buffer::alloc(&runtime, GPU, 64).unwrap();
    mock.set(Key::Capture, 1);
    let refused = [
        Stream::new(&runtime, GPU).err(),
        Buffer::alloc(&runtime, GPU, 64).err(),
        buffer.upload(0, &[1]).err(),
        stream.synchronize().err(),
        stream.check_destroy().err(),
    ];
    for (i, error) in refused.into_iter().enumerate() {
        assert_eq!(error.map(|e| e.kind()), Some(ErrorKind::Capturing), "call {i}");
    }
    let alive = mock.get(Key::Alive);
    drop(other);
    assert_eq!(mock.get(Key::Alive), alive, "the graph may be about to use it");
    assert_eq!(mock.get(Key::Capture), 1, "the capture is intact");
    mock.set(Key::Capture, 0);
    stream.synchronize().unwrap();
    drop(buffer);
    assert_eq!(mock.get(Key::Alive), alive - 2, "what was kept is freed with the next");
}

fn streams_of_other_contexts_are_refused(mock: &Mock) {
    let runtime = runtime();
    let keep = Buffer::alloc(&runtime, GPU, 64).unwrap();
    let mut context = 0x1000 as *mut c_void;
    let foreign = (&raw mut context).cast::<c_void>();
    // SAFETY: the mock reads the context behind a stream's address, and nothing else.
    unsafe {
        Stream::wrap_cuda(&runtime, GPU, foreign).unwrap();
        Stream::wrap_cuda(&runtime, GPU, std::ptr::null_mut()).unwrap();
        mock.set(Key::Foreign, 1);
        let error = Stream::wrap_cuda(&runtime, GPU, foreign).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.message().starts_with("cuda_stream") && error.message().contains("primary context"), "{error}");
        let cpu = Device { kind: DeviceKind::Cpu, ordinal: 0 };
        assert!(Stream::wrap_cuda(&runtime, cpu, foreign).err().unwrap().message().starts_with("device"));
    }
    drop(keep);
}

fn a_lost_context_is_told_apart(mock: &Mock) {
    let alive = mock.get(Key::Alive);
    let runtime = runtime();
    let stream = Stream::new(&runtime, GPU).unwrap();
    mock.set(Key::FailSync, 700);
    let error = stream.synchronize().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::CudaFatal);
    assert!(error.message().contains("CUDA_ERROR_ILLEGAL_ADDRESS") && error.message().contains("cuda:0"), "{error}");
    mock.set(Key::FailSync, 0);
    assert_eq!(stream.synchronize().unwrap_err().kind(), ErrorKind::CudaFatal, "for good");
    assert!(stream.check_destroy().is_ok());
    // What is made anew over the same context meets the loss, which is no news.
    mock.set(Key::FailAlloc, 700);
    assert_eq!(Stream::new(&runtime, GPU).err().unwrap().kind(), ErrorKind::CudaFatal);
    drop(stream);
    // What a lost context took along is not freed: the mock counts it as left.
    mock.set(Key::Alive, alive);
    // A new context may be tried: other objects are not hit by the loss of the first.
    Stream::new(&runtime, GPU).unwrap().synchronize().unwrap();
}

fn a_slow_device(mock: &Mock) {
    let runtime = runtime();
    let config = CommConfig { step_timeout: Duration::from_millis(50), ..CommConfig::default() };
    let comm = Communicator::create_local(&runtime, &[GPU], &config).unwrap();
    let Ok(plan) = Plan::create(&comm[0], &shape()) else { return };
    mock.set(Key::SlowFree, 1);
    let began = Instant::now();
    drop(plan);
    // One deadline for its memory, its words and its modules, whose own patience is far longer.
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    mock.set(Key::SlowFree, 0);
    // The thread that stayed behind ends now.
    for _ in 0..1000 {
        std::thread::sleep(Duration::from_millis(1));
        if mock.get(Key::Retained) == 1 && mock.get(Key::Alive) <= 1 {
            break;
        }
    }
    drop(comm);
    std::thread::sleep(Duration::from_millis(50));
}

fn a_build_without_kernels(_mock: &Mock) {
    let runtime = runtime();
    let comm = Communicator::create_local(&runtime, &[GPU], &CommConfig::default()).unwrap();
    match Plan::create(&comm[0], &shape()) {
        Ok(plan) => assert!(plan.memory().unwrap().workspace > 0),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Unavailable);
            assert!(error.message().contains("TREEATTN_NVCC"), "{error}");
        }
    }
}

fn an_unfit_image_is_explained(mock: &Mock) {
    let runtime = runtime();
    let comm = Communicator::create_local(&runtime, &[GPU], &CommConfig::default()).unwrap();
    mock.set(Key::FailLoad, 209);
    let error = Plan::create(&comm[0], &shape()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.message().contains("sm_90") && error.message().contains("driver for CUDA 13.0"), "{error}");
}

/// Buffers of a step of one sequence, on the mock's device.
struct Shard {
    memory: Buffer,
    lengths: Buffer,
}

impl Shard {
    fn new(runtime: &Runtime, device: Device) -> Shard {
        let lengths = Buffer::alloc(runtime, device, 16).unwrap();
        lengths.upload(0, &5i32.to_ne_bytes()).unwrap();
        Shard { memory: Buffer::alloc(runtime, device, 4 << 20).unwrap(), lengths }
    }

    fn tensor(&self, at: usize, bytes: u64) -> Tensor {
        Tensor { data: self.memory.data().wrapping_byte_add(at), bytes, stride: [0; 4] }
    }

    fn args(&self) -> DecodeArgs {
        DecodeArgs {
            batch: 1,
            query_tokens: 1,
            q: self.tensor(0, 2048),
            k: self.tensor(1 << 20, 1 << 18),
            v: self.tensor(2 << 20, 1 << 18),
            out: self.tensor(3 << 20, 2048),
            lse: self.tensor((3 << 20) + 4096, 32),
            kv_length: self.lengths.data().cast(),
            ..DecodeArgs::default()
        }
    }
}

fn plan(runtime: &Runtime) -> (Communicator, Plan) {
    let comm = Communicator::create_local(runtime, &[GPU], &CommConfig::default()).unwrap().remove(0);
    let plan = Plan::create(&comm, &shape()).unwrap();
    (comm, plan)
}

fn steps_launch_once(mock: &Mock) {
    let runtime = runtime();
    let (_comm, plan) = plan(&runtime);
    let (shard, stream) = (Shard::new(&runtime, GPU), Stream::new(&runtime, GPU).unwrap());
    // SAFETY: refused before anything is enqueued.
    let none = unsafe { plan.decode(&shard.args(), None) }.unwrap_err();
    assert!(none.message().starts_with("stream: found NULL"), "{none}");
    for step in 0..3 {
        let (launches, queries) = (mock.get(Key::Launches), mock.get(Key::Queries));
        let (syncs, changes) = (mock.get(Key::Syncs), mock.get(Key::Changes));
        // SAFETY: the shard outlives the mock's launches, which do nothing.
        unsafe { plan.decode(&shard.args(), Some(&stream)) }.unwrap();
        assert_eq!(mock.get(Key::Launches) - launches, 1);
        assert_eq!(mock.get(Key::Queries) - queries, if step == 0 { 6 } else { 0 });
        assert_eq!((mock.get(Key::Syncs), mock.get(Key::Changes)), (syncs, changes));
    }
    assert_eq!(mock.get(Key::Dependent), 1);
    assert!(mock.get(Key::Grid) % 132 == 0 && mock.get(Key::Block) % 32 == 0);
    assert_eq!(plan.stats().unwrap().steps, 3);
}

fn pointers_of_other_memory_are_refused(_mock: &Mock) {
    let runtime = runtime();
    let (_comm, plan) = plan(&runtime);
    let stream = Stream::new(&runtime, GPU).unwrap();
    let (shard, other) = (Shard::new(&runtime, GPU), Shard::new(&runtime, Device { ordinal: 1, ..GPU }));
    let host = vec![0u8; 4096];
    let cases = [
        ("q.data", DecodeArgs { q: Tensor::from_slice(&host), ..shard.args() }, "does not know"),
        ("k.data", DecodeArgs { k: other.args().k, ..shard.args() }, "cuda:1"),
        ("kv_length", DecodeArgs { kv_length: host.as_ptr().cast(), ..shard.args() }, "does not know"),
    ];
    for (name, args, found) in cases {
        // SAFETY: refused before anything is enqueued.
        let error = unsafe { plan.decode(&args, Some(&stream)) }.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.message().starts_with(name) && error.message().contains(found), "{error}");
    }
    let second = Stream::new(&runtime, Device { ordinal: 1, ..GPU }).unwrap();
    // SAFETY: refused before anything is enqueued.
    let error = unsafe { plan.decode(&shard.args(), Some(&second)) }.unwrap_err();
    assert!(error.message().contains("cuda:1") && error.message().starts_with("stream"), "{error}");
}

fn errors_before_a_step_are_not_its_own(mock: &Mock) {
    let alive = mock.get(Key::Alive);
    let runtime = runtime();
    let (_comm, plan) = plan(&runtime);
    let (shard, stream) = (Shard::new(&runtime, GPU), Stream::new(&runtime, GPU).unwrap());
    let left = mock.get(Key::Alive);
    mock.set(Key::FailLaunch, 719);
    // SAFETY: the launch fails, so that nothing is enqueued.
    let error = unsafe { plan.decode(&shard.args(), Some(&stream)) }.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::CudaPrior);
    assert!(error.message().contains("before this call"), "{error}");
    for _ in 0..2 {
        // SAFETY: refused, since the context is lost.
        let error = unsafe { plan.decode(&shard.args(), Some(&stream)) }.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::CudaFatal, "{error}");
    }
    assert!(plan.check_destroy().is_ok());
    drop((plan, shard, stream, _comm));
    // Nothing of a lost context is freed, and nothing waits.
    assert_eq!(mock.get(Key::Alive), left);
    mock.set(Key::Alive, alive);
}

fn steps_may_be_captured(mock: &Mock) {
    let runtime = runtime();
    let (comm, plan) = plan(&runtime);
    let (shard, stream) = (Shard::new(&runtime, GPU), Stream::new(&runtime, GPU).unwrap());
    mock.set(Key::Capture, 1);
    // SAFETY: the shard outlives the mock's launches, which do nothing.
    unsafe { plan.decode(&shard.args(), Some(&stream)) }.unwrap();
    let merge = MergeArgs {
        query_tokens: 1,
        heads: 8,
        head_dim: 64,
        o: shard.tensor(0, 4096),
        o_dtype: Dtype::F32,
        lse: shard.tensor(8192, 64),
        lse_base: 0,
        out: shard.tensor(16384, 2048),
        out_dtype: None,
        out_lse: Tensor::NULL,
        ..MergeArgs::default()
    };
    // SAFETY: as above.
    unsafe { merge_partials(&runtime, GPU, &merge, 2, Some(&stream)) }.unwrap();
    assert_eq!(Plan::create(&comm, &shape()).err().unwrap().kind(), ErrorKind::Capturing);
    assert_eq!(plan.check_destroy().unwrap_err().kind(), ErrorKind::Capturing);
    assert!(comm.status().unwrap().error.is_none());
    assert_eq!(mock.get(Key::Capture), 1, "the capture is intact");
    mock.set(Key::Capture, 0);
    assert!(plan.check_destroy().is_ok());
}

fn ranks_whose_writes_do_not_arrive_are_local_only(_mock: &Mock) {
    let runtime = runtime();
    let comms = Communicator::create_local(&runtime, &[GPU; 3], &CommConfig::default()).unwrap();
    let comms: Vec<_> = comms.iter().collect();
    let error = Plan::create_all(&comms, &shape()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.message().starts_with("devices: found cuda:0 (rank 0), where a test exchange left"), "{error}");
    Plan::create_all(&comms, &AttentionDesc { output: OutputMode::Local, ..shape() }).unwrap();
    let cpu = Device { kind: DeviceKind::Cpu, ordinal: 0 };
    let error = Communicator::create_local(&runtime, &[GPU, cpu], &CommConfig::default()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

/// The whole way of a bench on a GPU, up to the look at what the steps wrote: here, nothing.
fn the_bench_finds_outputs_that_nobody_wrote(_mock: &Mock) {
    let Some(program) = option_env!("CARGO_BIN_EXE_treeattn") else { return };
    let args = "bench --device cuda:0 --quick --pool-mib 8 --heads 4/2x64 --lengths 64 --page-size 16";
    let output = Command::new(program).args(args.split(' ')).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("lse: found no finite number in row 0 of 4"), "{error}");
}
