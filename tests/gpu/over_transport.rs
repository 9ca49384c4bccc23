//! Ranks on GPUs that the engine's own transport connects, on threads of their own while they meet.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use treeattn::attention::{AttentionDesc, Dtype, OutputMode, QueryInput};
use treeattn::runtime::{CommConfig, Communicator, Device, DeviceKind, Plan, Runtime, RuntimeConfig};
use treeattn::{ErrorKind, Result};

use crate::group::{Group, ranks};
use crate::mesh::{FAIL, Mesh, WHOLE, unix_pairs};
use crate::mirror::{GPU, Gpu};
use crate::numerics::shape;
use crate::support::case::Case;
use crate::support::run::judge;
use crate::support::values::Values;

/// A step's deadline where it must not expire.
const LONG: Duration = Duration::from_secs(60);

/// A group over a transport, which outlives it.
struct Connected {
    group: Group,
    meshes: Vec<Mesh>,
}

/// The GPUs that ranks take turns over: at most two.
fn count() -> usize {
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    runtime.device_count(DeviceKind::Cuda).unwrap().min(2) as usize
}

/// What each rank gets, on a thread of its own, that is on the device of its number.
fn try_connect(meshes: &[Mesh], devices: &[Device], step_timeout: Duration) -> Vec<Result<Communicator>> {
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let config = CommConfig { step_timeout, threads_per_rank: 1, ..CommConfig::default() };
    let connect = |(rank, mesh): (usize, &Mesh)| {
        // SAFETY: the callbacks do as they should; the meshes outlive the communicators.
        unsafe {
            let (world, transport) = (devices.len() as i32, mesh.transport(false));
            Communicator::create_from_transport(&runtime, transport, world, rank as i32, devices[rank], &config)
        }
    };
    thread::scope(|scope| {
        let threads: Vec<_> = meshes.iter().enumerate().map(|rank| scope.spawn(move || connect(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

impl Connected {
    fn new(world: usize, step_timeout: Duration) -> Connected {
        let meshes = Mesh::threads(world, unix_pairs);
        let count = count();
        let devices: Vec<Device> = (0..world).map(|rank| Device { ordinal: (rank % count) as i32, ..GPU }).collect();
        let comms: Vec<Communicator> =
            try_connect(&meshes, &devices, step_timeout).into_iter().map(Result::unwrap).collect();
        let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
        let gpus = devices.iter().map(|device| Gpu::numbered(&runtime, device.ordinal)).collect();
        Connected { group: Group { gpus, comms }, meshes }
    }

    /// A plan of each rank; plans are collective.
    fn plans(&self, desc: &AttentionDesc) -> Vec<Plan> {
        thread::scope(|scope| {
            let create = |comm| move || Plan::create(comm, desc).unwrap();
            let threads: Vec<_> = self.group.comms.iter().map(|comm| scope.spawn(create(comm))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }
}

/// Answers of two ranks and of three through windows.
pub fn numbers() {
    answers(
        &[2, 3],
        &[(OutputMode::Replicated, QueryInput::Replicated), (OutputMode::Scattered, QueryInput::Scattered)],
    );
}

/// The same over NCCL, which the transport brings the name of its communicator.
pub fn over_nccl() {
    answers(&[2], &[(OutputMode::Replicated, QueryInput::Replicated), (OutputMode::Scattered, QueryInput::Replicated)]);
}

/// Answers of so many ranks, with outputs and queries as they say. No callback comes once a plan is made.
fn answers(worlds: &[usize], shapes: &[(OutputMode, QueryInput)]) {
    for &world in worlds {
        let connected = Connected::new(world, LONG);
        let group = &connected.group;
        let text = group.comms[0].describe().unwrap();
        assert!(text.contains(r#""kind":"gpu""#) && text.contains(r#""kind":"transport""#), "{text}");
        for &(output, query_input) in shapes {
            let desc = AttentionDesc { output, query_input, out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
            let case = Case::plain(desc, world, &[(130, 3), (0, 1), (40, 1)], Values::Normal, 7);
            let (mut all, plans) = (ranks(&case), connected.plans(&case.desc));
            let mirrors = group.mirrors(&all);
            connected.meshes.iter().for_each(|mesh| mesh.fault.store(FAIL, Ordering::Relaxed));
            for _ in 0..3 {
                group.step(&plans, &mirrors, &mut all);
                assert_eq!(judge(&case, &all).unwrap().failure, None);
            }
            connected.meshes.iter().for_each(|mesh| mesh.fault.store(WHOLE, Ordering::Relaxed));
        }
        assert!(group.errors().into_iter().flatten().next().is_none());
    }
}

/// A rank that does not come, one that leaves, and an abort: the others hear of it in their steps, without the transport.
pub fn faults() {
    for (fault, wanted) in [(0, ErrorKind::Timeout), (1, ErrorKind::PeerLost), (2, ErrorKind::Aborted)] {
        let connected = Connected::new(2, if fault == 0 { Duration::from_millis(500) } else { LONG });
        let group = &connected.group;
        let desc = AttentionDesc { out_dtype: Dtype::F32, ..shape(8, 2, 64, Dtype::F16) };
        let case = Case::plain(desc, 2, &[(100, 1)], Values::Normal, 5);
        let (mut all, plans) = (ranks(&case), connected.plans(&case.desc));
        let mirrors = group.mirrors(&all);
        group.step(&plans, &mirrors, &mut all);
        // SAFETY: the device memory outlives the step, which is waited for.
        unsafe { plans[0].decode(&mirrors[0].args, Some(&group.gpus[0].stream)) }.unwrap();
        match fault {
            0 => {}
            1 => group.comms[1].close(),
            _ => group.comms[1].abort().unwrap(),
        }
        let error = group.gpus[0].stream.synchronize().unwrap_err();
        assert_eq!((error.kind(), error.rank()), (wanted, Some(1)), "{error}");
        mirrors[0].fetch(&mut all[0]);
        assert!(all[0].row(&case, 0, 3).0.iter().all(|x| x.is_nan()));
        assert_eq!(group.comms[0].status().unwrap().error.unwrap().kind(), wanted);
    }
}

/// Ranks on a CPU and on a GPU are refused on both.
pub fn kinds() {
    let meshes = Mesh::threads(2, unix_pairs);
    let devices = [Device { kind: DeviceKind::Cpu, ordinal: 0 }, GPU];
    for made in try_connect(&meshes, &devices, LONG) {
        let error = made.err().unwrap();
        assert_eq!((error.kind(), error.rank()), (ErrorKind::Mismatch, Some(1)), "{error}");
    }
}
