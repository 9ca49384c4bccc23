//! How communicators come to be: ranks that meet or do not, libraries that do not fit, borrowed communicators.

use std::ffi::c_void;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use treeattn::ErrorKind;
use treeattn::runtime::{CommConfig, Communicator, Plan};

use crate::stand_in::{Mode, counted_calls, driver_symbol, engines, folder, mode, symbol};
use crate::{HANG, SOON, config, error, gpu, group, on_ranks, runtime, shape};

pub fn names_differ() {
    let [a, b] = [(), ()].map(|()| Communicator::nccl_unique_id(&runtime()).unwrap());
    assert_ne!(a, b);
    assert_ne!(a, [0; 128]);
}

pub fn libraries_that_do_not_fit_are_explained() {
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

pub fn ranks_meet_on_threads() {
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

pub fn nodes_that_only_some_name_are_a_mismatch() {
    let (runtime, id) = (runtime(), Communicator::nccl_unique_id(&runtime()).unwrap());
    let create = |rank: i32| {
        let config = CommConfig { node_group: 7 * rank, ..config(HANG) };
        error(Communicator::create_nccl(&runtime, &id, 2, rank, gpu(rank), &config))
    };
    for error in on_ranks(2, create) {
        assert_eq!(error.kind(), ErrorKind::Mismatch);
        assert!(error.message().starts_with("node_group: found 7 on rank 1 and none on rank 0"), "{error}");
    }
}

/// Ranks on threads of one process, where the driver waits for all kernels before it allocates, frees, loads or maps, and
/// where one rank is always late: a kernel that waits for that rank must not run while it does such things.
pub fn setup_beside_kernels() {
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
pub fn rank_process(arguments: &[String]) -> ExitCode {
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

pub fn ranks_meet_in_processes() {
    assert_eq!(processes(2, &|_, _| ()), ["rank 0 of 2\n", "rank 1 of 2\n"]);
}

pub fn versions_that_differ_are_a_mismatch() {
    let newer = |rank: i32, command: &mut Command| {
        if rank == 1 {
            command.env("TREEATTN_MOCK_NCCL_VERSION", "23203");
        }
    };
    for text in processes(2, &newer) {
        assert!(text.starts_with("Mismatch") && text.contains("NCCL 2.32.3 on rank 1"), "{text}");
    }
}

pub fn a_rank_that_does_not_come_is_a_timeout() {
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

pub fn errors_of_nccl_are_told_in_its_words() {
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

pub fn a_wrapped_communicator_is_left_alone() {
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

pub fn a_split_that_does_not_end_is_a_timeout() {
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
