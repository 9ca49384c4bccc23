//! Communicators over NCCL, without GPUs: the loader, the ranks' meeting, deadlines and errors, against a stand-in
//! (`mock_nccl/nccl.c`) over the driver without a GPU (`mock_driver/cuda.c`).

#[path = "mock_driver/build.rs"]
mod stand_in;

use std::ffi::{CString, c_void};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use treeattn::attention::{Algorithm, AttentionDesc, Dtype, OutputMode, Tensor};
use treeattn::runtime::{
    Buffer, CommConfig, Communicator, Device, DeviceKind, MergeArgs, Plan, Runtime, RuntimeConfig, Stream,
};
use treeattn::{Error, ErrorKind};

/// Set once the stand-ins are where the loader looks first.
const READY: &str = "TREEATTN_TEST_MOCK_NCCL";
/// The longest that anything here may take; far more than it does.
const HANG: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_millis(300);

/// What the stand-in does wrong, in its own numbers.
#[derive(Clone, Copy)]
enum Mode {
    None,
    InitFails,
    AbortHangs,
    FinalizeHangs,
    InitFailsLater,
}

fn main() -> ExitCode {
    if let [_, role, rest @ ..] = &std::env::args().collect::<Vec<_>>()[..]
        && role == "--rank"
    {
        return rank_process(rest);
    }
    let mut arguments = Arguments::from_args();
    let with_mock = std::env::var_os(READY).is_some() || build_mocks();
    // The stand-in's mode is the same for all.
    arguments.test_threads = Some(1);
    let has_kernels = with_mock && {
        let comm = &Communicator::create_local(&runtime(), &[gpu(0)], &CommConfig::default()).unwrap()[0];
        Plan::create(comm, &AttentionDesc { kv_heads: 0, ..shape() }).is_ok()
    };
    let test = |name: &str, plans: bool, body: fn()| {
        Trial::test(name, move || {
            let result = std::panic::catch_unwind(body);
            mode(Mode::None);
            result.map_err(|panic| {
                let text = panic.downcast_ref::<String>().cloned();
                Failed::from(text.or(panic.downcast_ref::<&str>().map(|s| s.to_string())).unwrap_or_default())
            })
        })
        .with_ignored_flag(!with_mock || (plans && !has_kernels))
    };
    libtest_mimic::run(
        &arguments,
        vec![
            test("names_differ", false, names_differ),
            test("libraries_that_do_not_fit_are_explained", false, libraries_that_do_not_fit_are_explained),
            test("ranks_meet_on_threads", false, ranks_meet_on_threads),
            test("ranks_meet_in_processes", false, ranks_meet_in_processes),
            test("setup_does_not_wait_in_the_driver_for_ranks_of_the_process", true, setup_beside_kernels),
            test("versions_that_differ_are_a_mismatch", false, versions_that_differ_are_a_mismatch),
            test("a_rank_that_does_not_come_is_a_timeout", false, a_rank_that_does_not_come_is_a_timeout),
            test("errors_of_nccl_are_told_in_its_words", false, errors_of_nccl_are_told_in_its_words),
            test("a_wrapped_communicator_is_left_alone", false, a_wrapped_communicator_is_left_alone),
            test("a_split_that_does_not_end_is_a_timeout", false, a_split_that_does_not_end_is_a_timeout),
            test("plans_of_different_shapes_are_a_mismatch", true, plans_of_different_shapes_are_a_mismatch),
            test("a_peer_that_does_not_plan_is_a_timeout", false, a_peer_that_does_not_plan_is_a_timeout),
            test("an_abort_ends_a_wait", false, an_abort_ends_a_wait),
            test("leaving_does_not_wait_for_peers", false, leaving_does_not_wait_for_peers),
            test("local_ranks_connect_for_allreduces", true, local_ranks_connect_for_allreduces),
            test("allreduces_that_cannot_be_are_explained", true, allreduces_that_cannot_be_are_explained),
        ],
    )
    .exit_code()
}

/// The folder of the stand-ins.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("mock_nccl")
}

/// Compiles the stand-ins and starts this program again with them in the loader's path. False where there is no compiler.
fn build_mocks() -> bool {
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
    let built = stand_in::compile(&folder)
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
fn driver_symbol(name: &str) -> *mut c_void {
    let name = CString::new(name).unwrap();
    // SAFETY: looks up a symbol of a library that stays loaded.
    let found = unsafe { libc::dlsym(libc::dlopen(c"libcuda.so".as_ptr(), libc::RTLD_NOW), name.as_ptr()) };
    assert!(!found.is_null(), "{name:?}");
    found
}

/// A function of the stand-in for NCCL.
fn symbol(name: &str) -> *mut c_void {
    let name = CString::new(name).unwrap();
    // SAFETY: looks up a symbol of a library that stays loaded.
    let found = unsafe { libc::dlsym(libc::dlopen(c"libnccl.so.2".as_ptr(), libc::RTLD_NOW), name.as_ptr()) };
    assert!(!found.is_null(), "{name:?}");
    found
}

fn mode(mode: Mode) {
    // SAFETY: the signature in the stand-in's source.
    unsafe { std::mem::transmute::<*mut c_void, extern "C" fn(i32)>(symbol("mock_nccl_mode"))(mode as i32) }
}

fn gpu(ordinal: i32) -> Device {
    Device { kind: DeviceKind::Cuda, ordinal }
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
        output: OutputMode::Local,
        ..AttentionDesc::new(8, 2, 64, 1024)
    }
}

fn config(setup_timeout: Duration) -> CommConfig {
    CommConfig { setup_timeout, step_timeout: Duration::from_secs(2), ..Default::default() }
}

/// What `body` gives on the thread of each rank, within the time that nothing takes.
fn on_ranks<T: Send>(world: i32, body: impl Fn(i32) -> T + Sync) -> Vec<T> {
    let started = Instant::now();
    let results = std::thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> = (0..world).map(|rank| scope.spawn(move || body(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(started.elapsed() < HANG);
    results
}

fn group(world: i32, config: &CommConfig) -> Vec<Communicator> {
    let (runtime, id) = (runtime(), Communicator::nccl_unique_id(&runtime()).unwrap());
    on_ranks(world, |rank| Communicator::create_nccl(&runtime, &id, world, rank, gpu(rank), config).unwrap())
}

fn error<T>(result: Result<T, Error>) -> Error {
    result.err().expect("an error")
}

fn names_differ() {
    let [a, b] = [(), ()].map(|()| Communicator::nccl_unique_id(&runtime()).unwrap());
    assert_ne!(a, b);
    assert_ne!(a, [0; 128]);
}

fn libraries_that_do_not_fit_are_explained() {
    let create = |path: &str| {
        let config = CommConfig { nccl_path: Some(path.to_string()), ..config(SOON) };
        error(Communicator::create_nccl(&runtime(), &[0; 128], 1, 0, gpu(0), &config))
    };
    let file = |name: &str| folder().join(name).to_string_lossy().into_owned();
    let (old, partial) = (create(&file("old.so")), create(&file("partial.so")));
    assert_eq!((old.kind(), partial.kind()), (ErrorKind::Unavailable, ErrorKind::Unavailable));
    for text in ["old.so", "version 2.17.5", "wanted NCCL 2.18.1 or later"] {
        assert!(old.message().contains(text), "{old}");
    }
    for text in ["partial.so", "without ncclCommSplit"] {
        assert!(partial.message().contains(text), "{partial}");
    }
    let none = create("/nowhere/libnccl.so.2");
    assert_eq!(none.kind(), ErrorKind::Unavailable);
    assert!(none.message().contains("nccl_path = /nowhere/libnccl.so.2"), "{none}");
}

fn ranks_meet_on_threads() {
    // The driver has 2 GPUs, and NCCL takes each once.
    for world in [1, 2] {
        let comms = group(world, &config(HANG));
        for (rank, comm) in comms.iter().enumerate() {
            assert_eq!((comm.rank(), comm.world(), comm.device()), (rank as i32, world, gpu(rank as i32)));
            let text = comm.describe().unwrap();
            assert!(text.contains(r#""kind":"nccl""#) && text.contains(r#""nccl_version":"2.28.3""#), "{text}");
            assert!(comm.status().unwrap().error.is_none());
        }
        // In one thread, one after the other.
        comms.iter().for_each(Communicator::close);
        let started = Instant::now();
        drop(comms);
        assert!(started.elapsed() < HANG);
    }
    let (runtime, id) = (runtime(), Communicator::nccl_unique_id(&runtime()).unwrap());
    for error in on_ranks(2, |rank| error(Communicator::create_nccl(&runtime, &id, 2, rank, gpu(0), &config(HANG)))) {
        assert_eq!(error.kind(), ErrorKind::Nccl);
        assert!(error.message().contains("invalid usage"), "{error}");
    }
}

/// Ranks on threads of one process, where the driver waits for all kernels before it allocates, frees, loads or maps, and
/// where one rank is always late: a kernel that waits for that rank must not run while it does such things.
fn setup_beside_kernels() {
    let strict = |ms: i64| {
        // SAFETY: the signature in the source of the stand-in for the driver.
        unsafe { std::mem::transmute::<*mut c_void, extern "C" fn(i64)>(driver_symbol("mock_strict"))(ms) }
    };
    strict(5);
    let result = std::panic::catch_unwind(|| {
        let config = config(Duration::from_secs(10));
        let created = || group(2, &config);
        let wrapped = || {
            let (runtime, id) = (runtime(), Communicator::nccl_unique_id(&runtime()).unwrap());
            on_ranks(2, |rank| {
                // SAFETY: a live communicator, of this thread alone.
                unsafe { Communicator::wrap_nccl(&runtime, engines(&id, 2, rank), gpu(rank), &config) }.unwrap()
            })
        };
        for comms in [created(), wrapped()] {
            on_ranks(2, |rank| Plan::create(&comms[rank as usize], &shape()).map(drop).unwrap());
        }
    });
    strict(0);
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// Creates the rank and says how it went. Arguments: id in hex, world, rank, milliseconds.
fn rank_process(arguments: &[String]) -> ExitCode {
    let number = |i: usize| arguments[i].parse::<i32>().unwrap();
    let mut id = [0; 128];
    for (i, byte) in id.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&arguments[0][2 * i..2 * i + 2], 16).unwrap();
    }
    let config = config(Duration::from_millis(number(3) as u64));
    match Communicator::create_nccl(&runtime(), &id, number(1), number(2), gpu(number(2)), &config) {
        Ok(comm) => println!("rank {} of {}", comm.rank(), comm.world()),
        Err(error) => println!("{error}"),
    }
    ExitCode::SUCCESS
}

/// What each rank of a group of processes says.
fn processes(world: i32, setup: &dyn Fn(i32, &mut Command)) -> Vec<String> {
    let id = Communicator::nccl_unique_id(&runtime()).unwrap();
    let hex: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let milliseconds = HANG.as_millis().to_string();
    let children: Vec<_> = (0..world)
        .map(|rank| {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--rank", &hex, &world.to_string(), &rank.to_string(), &milliseconds]);
            setup(rank, command.stdout(Stdio::piped()));
            command.spawn().unwrap()
        })
        .collect();
    let text = |child: std::process::Child| String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    children.into_iter().map(text).collect()
}

fn ranks_meet_in_processes() {
    assert_eq!(processes(2, &|_, _| ()), ["rank 0 of 2\n", "rank 1 of 2\n"]);
}

fn versions_that_differ_are_a_mismatch() {
    let newer = |rank: i32, command: &mut Command| {
        if rank == 1 {
            command.env("TREEATTN_MOCK_NCCL_VERSION", "23203");
        }
    };
    for text in processes(2, &newer) {
        assert!(text.starts_with("Mismatch") && text.contains("NCCL 2.32.3 on rank 1"), "{text}");
    }
}

fn a_rank_that_does_not_come_is_a_timeout() {
    for mode_of_abort in [Mode::None, Mode::AbortHangs] {
        mode(mode_of_abort);
        let id = Communicator::nccl_unique_id(&runtime()).unwrap();
        let started = Instant::now();
        let error = error(Communicator::create_nccl(&runtime(), &id, 2, 0, gpu(0), &config(SOON)));
        assert_eq!(error.kind(), ErrorKind::Timeout);
        assert!(error.message().contains("did not come within 300ms (setup_timeout_ns)"), "{error}");
        assert!(started.elapsed() < HANG);
    }
    mode(Mode::None);
    assert_eq!(group(2, &config(HANG)).len(), 2, "the process goes on");
}

fn errors_of_nccl_are_told_in_its_words() {
    for wrong in [Mode::InitFails, Mode::InitFailsLater] {
        mode(wrong);
        let id = Communicator::nccl_unique_id(&runtime()).unwrap();
        let error = error(Communicator::create_nccl(&runtime(), &id, 1, 0, gpu(0), &config(HANG)));
        assert_eq!(error.kind(), ErrorKind::Nccl);
        assert!(error.message().contains("unhandled system error (2"), "{error}");
        if let Mode::InitFails = wrong {
            assert!(error.message().contains("mock: no socket interface found), wanted success"), "{error}");
        }
    }
}

/// A communicator as an engine makes it, whose calls block. The context of its GPU stays current on this thread.
fn engines(id: &[u8; 128], world: i32, rank: i32) -> *mut c_void {
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
fn counted_calls() -> i64 {
    // SAFETY: the signature in the stand-in's source.
    unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> i64>(symbol("mock_nccl_calls"))() }
}

fn a_wrapped_communicator_is_left_alone() {
    let (runtime, id) = (runtime(), Communicator::nccl_unique_id(&runtime()).unwrap());
    let comms = on_ranks(2, |rank| {
        let comm = engines(&id, 2, rank);
        if rank == 0 {
            // SAFETY: the signature in the stand-in's source.
            unsafe {
                std::mem::transmute::<*mut c_void, extern "C" fn(*mut c_void)>(symbol("mock_nccl_count_calls"))(comm)
            };
            // SAFETY: a live communicator of this thread.
            let error = error(unsafe { Communicator::wrap_nccl(&runtime, comm, gpu(1), &config(HANG)) });
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.message().contains("cuda:0, the device of nccl_comm"), "{error}");
        }
        // SAFETY: as above.
        unsafe { Communicator::wrap_nccl(&runtime, comm, gpu(rank), &config(HANG)) }.unwrap()
    });
    let before = counted_calls();
    assert!(before > 0);
    assert_eq!((comms[0].rank(), comms[1].rank(), comms[1].world()), (0, 1, 2));
    let plans = on_ranks(2, |rank| Plan::create(&comms[rank as usize], &shape()).map(drop));
    assert!(
        plans.iter().all(|plan| plan.as_ref().err().is_none_or(|e| e.kind() == ErrorKind::Unavailable)),
        "{plans:?}"
    );
    drop(comms);
    assert_eq!(counted_calls(), before);
    // A copy of NCCL that is not in the process knows no communicator of it.
    let config = CommConfig { nccl_path: Some("/nowhere/libnccl.so.2".into()), ..config(HANG) };
    // SAFETY: never looked at.
    let error = error(unsafe { Communicator::wrap_nccl(&runtime, std::ptr::dangling_mut(), gpu(0), &config) });
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.message().contains("not loaded in this process"), "{error}");
}

fn a_split_that_does_not_end_is_a_timeout() {
    let (runtime, id) = (runtime(), Communicator::nccl_unique_id(&runtime()).unwrap());
    let errors = on_ranks(2, |rank| {
        let comm = engines(&id, 2, rank);
        // SAFETY: a live communicator of this thread.
        (rank == 0).then(|| error(unsafe { Communicator::wrap_nccl(&runtime, comm, gpu(rank), &config(SOON)) }))
    });
    let error = errors[0].as_ref().unwrap();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.message().contains("splitting nccl_comm"), "{error}");
}

fn plans_of_different_shapes_are_a_mismatch() {
    let comms = group(2, &config(HANG));
    let plan = |rank: i32| {
        let dim = if rank == 0 { 64 } else { 128 };
        // The fields take more than one message.
        Plan::create(&comms[rank as usize], &AttentionDesc { head_dim_qk: dim, head_dim_v: dim, ..shape() })
    };
    for error in on_ranks(2, plan).into_iter().map(error) {
        assert_eq!(error.kind(), ErrorKind::Mismatch);
        assert!(error.message().starts_with("head_dim_qk: found 64 on ranks [0] and 128 on ranks [1]"), "{error}");
    }
    let plans = on_ranks(2, |rank| Plan::create(&comms[rank as usize], &shape()).unwrap());
    assert_eq!(plans[1].stats().unwrap().rank, 1);
}

fn a_peer_that_does_not_plan_is_a_timeout() {
    let comms = group(2, &config(Duration::from_secs(2)));
    let started = Instant::now();
    let found = error(Plan::create(&comms[0], &shape()));
    assert!(started.elapsed() < HANG);
    assert_eq!(found.kind(), ErrorKind::Timeout);
    assert!(found.message().contains("did not come within "), "{found}");
    let status = comms[0].status().unwrap();
    assert_eq!(status.error.map(|error| error.kind()), Some(ErrorKind::Timeout));
    assert_eq!(error(Plan::create(&comms[0], &shape())).kind(), ErrorKind::Timeout, "broken for good");
}

fn an_abort_ends_a_wait() {
    let comms = group(2, &config(HANG));
    let found = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| error(Plan::create(&comms[0], &shape())));
        std::thread::sleep(SOON);
        comms[0].abort().unwrap();
        waiting.join().unwrap()
    });
    assert_eq!((found.kind(), found.rank()), (ErrorKind::Aborted, Some(0)));
}

fn leaving_does_not_wait_for_peers() {
    let comms = group(2, &config(HANG));
    mode(Mode::FinalizeHangs);
    let started = Instant::now();
    drop(comms);
    assert!(started.elapsed() < HANG);
}

fn by_allreduces() -> AttentionDesc {
    AttentionDesc { kv_heads: 0, output: OutputMode::Replicated, algorithm: Algorithm::Allreduce3, ..shape() }
}

/// Enqueues a merge of this rank's partial; the kernels do nothing here, but the allreduces do.
fn merge(plan: &Plan, rank: i32) -> Result<(), Error> {
    let runtime = runtime();
    let (stream, bytes) =
        (Stream::new(&runtime, gpu(rank)).unwrap(), Buffer::alloc(&runtime, gpu(rank), 16384).unwrap());
    let part = |at: usize| Tensor { data: bytes.data().wrapping_byte_add(at), bytes: 4096, stride: [0; 4] };
    let args = MergeArgs {
        query_tokens: 1,
        heads: 8,
        head_dim: 64,
        o: part(0),
        o_dtype: Dtype::F32,
        lse: part(4096),
        lse_base: 0,
        plus_inf_is_empty: false,
        out: part(8192),
        out_dtype: None,
        out_lse: part(12288),
    };
    // SAFETY: the buffer outlives the step, which is waited for.
    unsafe { plan.merge(&args, Some(&stream)) }?;
    stream.synchronize()
}

fn local_ranks_connect_for_allreduces() {
    let devices = [gpu(1), gpu(0)];
    let comms = Communicator::create_local(&runtime(), &devices, &config(HANG)).unwrap();
    // From one thread, then from one a rank, over the same connection.
    let mut plans = Plan::create_all(&[&comms[0], &comms[1]], &by_allreduces()).unwrap();
    plans.extend(on_ranks(2, |rank| Plan::create(&comms[rank as usize], &by_allreduces()).unwrap()));
    for pair in plans.chunks(2) {
        for step in 1..=3 {
            on_ranks(2, |rank| merge(&pair[rank as usize], 1 - rank).unwrap());
            let stats = pair[0].stats().unwrap();
            assert_eq!((stats.algorithm, stats.steps, stats.rounds), (Algorithm::Allreduce3, step, 3 * step));
            // 8 rows of 64, their lse, their weights, and two words a rank.
            assert_eq!(stats.bytes_sent, step * 4 * (8 * 64 + 8 + 8 + 4));
        }
    }
    // Each rank on a thread of its own from the start.
    let comms = Communicator::create_local(&runtime(), &devices, &config(HANG)).unwrap();
    let plans = on_ranks(2, |rank| Plan::create(&comms[rank as usize], &by_allreduces()).unwrap());
    on_ranks(2, |rank| merge(&plans[rank as usize], 1 - rank).unwrap());
    // Ranks that NCCL connected in the first place.
    let comms = group(2, &config(HANG));
    let plans = on_ranks(2, |rank| Plan::create(&comms[rank as usize], &by_allreduces()).unwrap());
    on_ranks(2, |rank| merge(&plans[rank as usize], rank).unwrap());
    // One that waits alone.
    let started = Instant::now();
    let found = error(merge(&plans[0], 0));
    assert_eq!(found.kind(), ErrorKind::Timeout);
    assert!(started.elapsed() < HANG);
    assert_eq!(comms[0].status().unwrap().error.map(|error| error.kind()), Some(ErrorKind::Timeout));
    assert_eq!(error(merge(&plans[0], 0)).kind(), ErrorKind::Timeout, "broken for good");
}

fn allreduces_that_cannot_be_are_explained() {
    let none = CommConfig { nccl_path: Some("/nowhere/libnccl.so.2".into()), ..config(HANG) };
    let cases = [
        ([gpu(0), gpu(1)], none, ErrorKind::Unavailable, "/nowhere/libnccl.so.2"),
        ([gpu(1), gpu(1)], config(HANG), ErrorKind::Unsupported, "cuda:1 on ranks 0 and 1"),
    ];
    for (devices, config, kind, text) in cases {
        let comms = Communicator::create_local(&runtime(), &devices, &config).unwrap();
        let mut errors = on_ranks(2, |rank| error(Plan::create(&comms[rank as usize], &by_allreduces())));
        errors.push(error(Plan::create_all(&[&comms[0], &comms[1]], &by_allreduces())));
        for error in errors {
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.message().contains(text), "{error}");
        }
    }
    let comms = Communicator::create_local(&runtime(), &[gpu(0), gpu(1)], &config(HANG)).unwrap();
    let narrow = AttentionDesc { wire_dtype: Dtype::Bf16, ..by_allreduces() };
    let error = error(Plan::create_all(&[&comms[0], &comms[1]], &narrow));
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.message().starts_with("wire_dtype: found bf16"), "{error}");
}
