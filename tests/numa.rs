//! Ranks on the NUMA nodes of a machine that has two, because a folder in place of `/sys` says so: its processors are those
//! of this machine, so that threads can be bound to them.

#[path = "support/threads.rs"]
#[allow(dead_code)]
mod threads;
#[path = "support/two_nodes.rs"]
mod two_nodes;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};
use treeattn::ErrorKind;
use treeattn::attention::{AttentionDesc, DecodeArgs, Tensor};
use treeattn::runtime::{Buffer, CommConfig, Communicator, Device, DeviceKind, Plan, Runtime, RuntimeConfig, Stream};

const HEADS: usize = 4;
const DIM: usize = 16;
const KEYS: usize = 300;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Every thread of the process is looked at.
    arguments.test_threads = Some(1);
    let cpus = cpus();
    let (first, second) = (cpus[0], *cpus.last().unwrap());
    let folder = std::env::temp_dir().join(format!("treeattn-two-nodes-{}", std::process::id()));
    two_nodes::write(&folder, [&first.to_string(), &second.to_string()]);
    // SAFETY: this is the only thread of the process.
    unsafe { std::env::set_var("TREEATTN_SYSFS", &folder) };

    let test = |name: &str, body: fn([usize; 2])| {
        Trial::test(name, move || {
            std::panic::catch_unwind(|| body([first, second])).map_err(|panic| {
                let text = panic.downcast_ref::<String>().cloned();
                Failed::from(text.or(panic.downcast_ref::<&str>().map(|s| s.to_string())).unwrap_or_default())
            })
        })
    };
    let tests = vec![
        test("nodes_are_devices", nodes_are_devices),
        test("threads_run_on_their_node", threads_run_on_their_node),
        test("bits_are_those_of_ranks_that_are_not_bound", bits_are_those_of_ranks_that_are_not_bound),
    ];
    let code = libtest_mimic::run(&arguments, tests).exit_code();
    std::fs::remove_dir_all(&folder).unwrap();
    code
}

/// The processors that this process may use.
fn cpus() -> Vec<usize> {
    // SAFETY: cpu_set_t is plain data for which zero is a value; the call writes the set given.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        assert_eq!(libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set), 0);
        (0..libc::CPU_SETSIZE as usize).filter(|&cpu| libc::CPU_ISSET(cpu, &set)).collect()
    }
}

fn cpu(ordinal: i32) -> Device {
    Device { kind: DeviceKind::Cpu, ordinal }
}

fn nodes_are_devices(_: [usize; 2]) {
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    assert_eq!(runtime.device_count(DeviceKind::Cpu).unwrap(), 3);
    let machine = runtime.device_info(Device::CPU).unwrap();
    for node in 0..2 {
        let info = runtime.device_info(cpu(node + 1)).unwrap();
        assert_eq!((info.units, info.memory), (1, 1 << 20 << node));
        assert_eq!(info.name, format!("{}, NUMA node {node}", machine.name));
        assert_eq!((info.isa, info.device), (machine.isa.clone(), cpu(node + 1)));
    }
    let error = runtime.device_info(cpu(3)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.message().contains("cpu:1 to cpu:2"), "{error}");
    let error = Communicator::create_local(&runtime, &[cpu(1), cpu(7)], &CommConfig::default()).err().unwrap();
    assert!(error.message().starts_with("devices[1]: "), "{error}");

    // Memory of a node is memory like any other, also of one that the kernel does not have.
    for ordinal in 0..3 {
        let buffer = Buffer::alloc(&runtime, cpu(ordinal), 10_000).unwrap();
        let bytes: Vec<u8> = (0..10_000).map(|i| i as u8).collect();
        let mut back = vec![0; bytes.len()];
        buffer.upload(0, &bytes).unwrap();
        buffer.download(0, &mut back).unwrap();
        assert_eq!(bytes, back);
    }
}

/// By name, the processors that each of the library's threads may run on, once they run.
fn allowed(least: usize) -> Vec<(String, String)> {
    let began = std::time::Instant::now();
    loop {
        let mut found = Vec::new();
        for (id, name) in threads::alive() {
            let status = std::fs::read_to_string(format!("/proc/self/task/{id}/status")).unwrap_or_default();
            let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            if let Some(list) = list.filter(|_| name.starts_with(threads::PREFIX)) {
                found.push((name, list.trim().to_string()));
            }
        }
        found.sort();
        // A thread binds itself when it begins.
        let bound = found.iter().filter(|(_, list)| list.parse::<usize>().is_ok()).count();
        if bound >= least || began.elapsed().as_secs() > 10 {
            return found;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

fn threads_run_on_their_node(nodes: [usize; 2]) {
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let devices = [cpu(1), cpu(2)];
    let config = CommConfig { threads_per_rank: 2, ..CommConfig::default() };
    let comms = Communicator::create_local(&runtime, &devices, &config).unwrap();
    let streams = devices.map(|device| Stream::new(&runtime, device).unwrap());
    let mut expected: Vec<(String, String)> = (0..2)
        .flat_map(|rank| [format!("treeattn-{rank}-1"), "treeattn-stream".to_string()].map(|name| (name, rank)))
        .map(|(name, rank)| (name, nodes[rank].to_string()))
        .collect();
    expected.sort();
    assert_eq!(allowed(expected.len()), expected);
    assert!(cpus().len() >= 2 || nodes[0] == nodes[1], "this thread is bound");
    drop((comms, streams));
}

/// Two ranks on `devices`, one step by streams of these.
fn decode(devices: [Device; 2]) -> Vec<u32> {
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let config = CommConfig { threads_per_rank: 2, ..CommConfig::default() };
    let comms = Communicator::create_local(&runtime, &devices, &config).unwrap();
    let streams = devices.map(|device| Stream::new(&runtime, device).unwrap());
    let desc = AttentionDesc::new(HEADS as i32, HEADS as i32, DIM as i32, KEYS as i32);
    let plans = Plan::create_all(&comms.iter().collect::<Vec<_>>(), &desc).unwrap();
    let mut random = 1u32;
    let mut values = |count: usize| -> Vec<f32> {
        let mut next = || {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            random as i32 as f32 / 2f32.powi(31)
        };
        (0..count).map(|_| next()).collect()
    };
    let tensor =
        |data: *const f32, count: usize| Tensor { data: data as *mut _, bytes: 4 * count as u64, stride: [0; 4] };
    let q = values(HEADS * DIM);
    let caches: Vec<[Vec<f32>; 2]> = (0..2).map(|_| [values(KEYS * HEADS * DIM), values(KEYS * HEADS * DIM)]).collect();
    let outs = [vec![0f32; HEADS * DIM], vec![0f32; HEADS * DIM]];
    let (length, starts) = ([KEYS as i32], [[0i32], [KEYS as i32]]);
    for rank in 0..2 {
        let args = DecodeArgs {
            batch: 1,
            query_tokens: 1,
            q: tensor(q.as_ptr(), q.len()),
            k: tensor(caches[rank][0].as_ptr(), KEYS * HEADS * DIM),
            v: tensor(caches[rank][1].as_ptr(), KEYS * HEADS * DIM),
            out: tensor(outs[rank].as_ptr(), outs[rank].len()),
            kv_length: length.as_ptr(),
            kv_start: starts[rank].as_ptr(),
            ..DecodeArgs::default()
        };
        // SAFETY: all of it outlives the steps, which are waited for below; a rank's output is its own.
        unsafe { plans[rank].decode(&args, Some(&streams[rank])) }.unwrap();
        if devices[rank] != Device::CPU {
            // SAFETY: as above; the step is refused.
            let error =
                unsafe { plans[rank].decode(&args, Some(&Stream::new(&runtime, Device::CPU).unwrap())) }.unwrap_err();
            assert_eq!((error.kind(), error.message().starts_with("stream: ")), (ErrorKind::InvalidArgument, true));
        }
    }
    for stream in &streams {
        stream.synchronize().unwrap();
    }
    assert_eq!(outs[0], outs[1]);
    outs[0].iter().map(|x| x.to_bits()).collect()
}

fn bits_are_those_of_ranks_that_are_not_bound(_: [usize; 2]) {
    let unbound = decode([Device::CPU; 2]);
    assert!(unbound.iter().any(|&bits| bits != 0));
    assert_eq!(decode([cpu(1), cpu(2)]), unbound);
    assert_eq!(decode([cpu(2), cpu(2)]), unbound);
}
