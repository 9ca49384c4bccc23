//! Ranks in processes of their own, a GPU each, brought together by NCCL: answers, and what happens when one goes away.
//!
//! This process is rank 0; it starts itself again for the others, and tells them by their environment what to do.

use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cudarc::driver::sys;
use treeattn::attention::{AttentionDesc, Dtype, OutputMode, QueryInput};
use treeattn::runtime::{CommConfig, Communicator, Plan, Runtime, RuntimeConfig};
use treeattn::{Error, ErrorKind};

use crate::driver::{Current, Pinned, RawStream, ok, used};
use crate::mirror::{Gpu, Mirror};
use crate::numerics::shape;
use crate::support::case::Case;
use crate::support::full;
use crate::support::rank::Rank;
use crate::support::rng::Rng;
use crate::support::run::judge;
use crate::support::values::Values;

/// What a process was started for: id, world, rank, role, a number.
pub const ROLE: &str = "TREEATTN_TEST_ROLE";
/// A time limit far above what any step here takes.
const HANG: Duration = Duration::from_secs(120);
const STEP: Duration = Duration::from_millis(500);

fn config() -> CommConfig {
    CommConfig { step_timeout: STEP, ..CommConfig::default() }
}

/// Cases that every process makes for itself.
fn cases(world: usize) -> Vec<Case> {
    let half = shape(8, 2, 64, Dtype::F16);
    type Question<'a> = (AttentionDesc, &'a [(usize, usize)]);
    let shapes: [Question; 5] = [
        (half, &[(300, 1)]),
        (AttentionDesc { out_dtype: Dtype::F32, ..shape(6, 6, 128, Dtype::Bf16) }, &[(130, 3), (0, 1), (1, 1)]),
        (AttentionDesc { wire_dtype: Dtype::Bf16, ..shape(8, 2, 128, Dtype::Bf16) }, &[(200, 2)]),
        (AttentionDesc { causal: true, ..half }, &[(0, 1), (90, 4)]),
        (AttentionDesc { query_input: QueryInput::Scattered, ..half }, &[(200, 1), (0, 1), (30, 3)]),
    ];
    let plain =
        |(i, (desc, sequences)): (usize, Question)| Case::plain(desc, world, sequences, Values::Normal, 70 + i as u64);
    shapes.into_iter().enumerate().map(plain).collect()
}

/// One rank at work: its communicator, and a step to run again and again.
struct Worker {
    comm: Communicator,
    plan: Plan,
    gpu: Gpu,
    rank: usize,
    case: Case,
    memory: Rank,
    mirror: Mirror,
}

impl Worker {
    fn connect(id: &[u8; 128], world: usize, rank: usize) -> (Gpu, Communicator) {
        let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
        let gpu = Gpu::numbered(&runtime, rank as i32);
        let comm = Communicator::create_nccl(&runtime, id, world as i32, rank as i32, gpu.device, &config()).unwrap();
        (gpu, comm)
    }

    fn new(id: &[u8; 128], world: usize, rank: usize) -> Worker {
        Worker::of(id, world, rank, 1)
    }

    /// One that runs the case of this number.
    fn of(id: &[u8; 128], world: usize, rank: usize, case: usize) -> Worker {
        let (gpu, comm) = Worker::connect(id, world, rank);
        let case = cases(world).swap_remove(case);
        let plan = Plan::create(&comm, &case.desc).unwrap();
        let memory = Rank::new(&case, rank);
        let mirror = Mirror::new(&gpu, &memory);
        Worker { comm, plan, gpu, rank, case, memory, mirror }
    }

    fn step(&mut self) -> Result<(), Error> {
        self.mirror.decode(&self.gpu, &self.plan, &mut self.memory)
    }

    /// Steps until one fails, which then is the error of every call.
    fn until_it_fails(&mut self) -> Error {
        let started = Instant::now();
        let error = loop {
            if let Err(error) = self.step() {
                break error;
            }
            assert!(started.elapsed() < HANG, "rank {} never failed", self.rank);
        };
        let status = self.comm.status().unwrap();
        assert_eq!(status.error.as_ref().map(Error::kind), Some(error.kind()), "{status:?} {error}");
        assert_eq!(self.step().unwrap_err().kind(), error.kind(), "broken for good");
        error
    }

    /// The same where the first of them has begun already: it writes NaN.
    fn until_one_fails(&mut self) -> Error {
        let error = self.until_it_fails();
        self.mirror.fetch(&mut self.memory);
        assert!(self.memory.row(&self.case, 0, 0).0.iter().all(|x| x.is_nan()), "{error}");
        error
    }
}

fn new_id() -> [u8; 128] {
    Communicator::nccl_unique_id(&Runtime::new(RuntimeConfig::default()).unwrap()).unwrap()
}

fn start(id: &[u8; 128], world: usize, rank: usize, role: &str, number: u64) -> Child {
    let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let role = format!("{id}:{world}:{rank}:{role}:{number}");
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(ROLE, role).stdout(Stdio::piped()).spawn().unwrap()
}

/// What a process said, which must have ended well.
fn end(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{:?}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// Another rank's process.
pub fn run(role: &str) {
    let parts: Vec<&str> = role.split(':').collect();
    let [id, world, rank, role, number] = parts[..] else { panic!("{role}") };
    let (world, rank, number) = (world.parse().unwrap(), rank.parse().unwrap(), number.parse::<u64>().unwrap());
    let byte = |i: usize| u8::from_str_radix(&id[2 * i..][..2], 16).unwrap();
    let id: [u8; 128] = std::array::from_fn(byte);
    match role {
        "numbers" => print!("{}", all_cases(&id, world, rank)),
        "killed" => {
            let mut worker = Worker::of(&id, world, rank, case_of(number));
            (0..number % 7).for_each(|_| worker.step().unwrap());
            // In the middle of a step, or between two.
            if number % 2 == 1 {
                // SAFETY: the device memory outlives this process.
                unsafe { worker.plan.decode(&worker.mirror.args, Some(&worker.gpu.stream)) }.unwrap();
            }
            // SAFETY: ends this process, and nothing else.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
        "leaves" => {
            let mut worker = Worker::new(&id, world, rank);
            (0..number).for_each(|_| worker.step().unwrap());
        }
        "sleeps" => {
            let worker = Worker::new(&id, world, rank);
            std::thread::sleep(6 * STEP);
            let status = worker.comm.status().unwrap();
            assert!(status.error.is_none(), "no kernel of this rank has looked yet");
            let mut worker = worker;
            println!("{:?}", worker.until_it_fails().kind());
        }
        "refused" => {
            // SAFETY: nothing else runs in this process yet.
            unsafe { std::env::set_var("EMULATOR_PEERS", "0") };
            without_windows(&id, world, rank);
        }
        "waits" => {
            let mut worker = Worker::new(&id, world, rank);
            let error = worker.until_it_fails();
            println!("{:?} {:?}", error.kind(), error.rank());
        }
        other => panic!("{other}"),
    }
}

/// The case of a process that is to be killed: every other time one whose queries are gathered first.
fn case_of(number: u64) -> usize {
    [1, 4][number as usize / 2 % 2]
}

/// Runs every case with the others; says what bits came out.
fn all_cases(id: &[u8; 128], world: usize, rank: usize) -> String {
    let (gpu, comm) = Worker::connect(id, world, rank);
    let text = comm.describe().unwrap();
    let has_peers = std::env::var_os("EMULATOR_PEERS").is_none_or(|peers| peers != "0");
    let link = if has_peers { "peer access to another process" } else { "no_windows" };
    assert!(text.contains(link) && text.contains(r#""kind":"nccl""#), "{text}");
    let mut said = String::new();
    let has_windows = has_peers && std::env::var_os("TREEATTN_GPU_EXCHANGE").is_none();
    for case in cases(world).into_iter().filter(|case| has_windows || case.desc.query_input == QueryInput::Replicated) {
        let plan = Plan::create(&comm, &case.desc).unwrap();
        let mut ranks: Vec<Rank> = (0..world).map(|rank| Rank::new(&case, rank)).collect();
        let mirror = Mirror::new(&gpu, &ranks[rank]);
        let mut bits = Vec::new();
        for step in 0..5 {
            mirror.decode(&gpu, &plan, &mut ranks[rank]).unwrap();
            let found = ranks[rank].bits(&case);
            assert!(step == 0 || bits == found, "other bits in step {step}");
            bits = found;
        }
        // The judge looks at rank 0's output, and all have the same.
        let (out, lse) = (ranks[rank].out.bytes().to_vec(), ranks[rank].lse.bytes().to_vec());
        ranks[0].out.bytes_mut().copy_from_slice(&out);
        ranks[0].lse.bytes_mut().copy_from_slice(&lse);
        assert_eq!(case.desc.output, OutputMode::Replicated);
        let found = judge(&case, &ranks).unwrap();
        assert_eq!(found.failure, None, "{}", case.describe());
        let hash = bits
            .iter()
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, &word| (hash ^ u64::from(word)).wrapping_mul(0x0000_0100_0000_01b3));
        said.push_str(&format!("{hash:x}\n"));
    }
    assert!(comm.status().unwrap().error.is_none());
    said
}

/// The same bits in every process, within their bound.
pub fn numbers() {
    for world in 2..=crate::over_nccl::count() as usize {
        let id = new_id();
        let others: Vec<Child> = (1..world).map(|rank| start(&id, world, rank, "numbers", 0)).collect();
        let mine = all_cases(&id, world, 0);
        for other in others {
            assert_eq!(end(other), mine);
        }
    }
}

/// The error names a process that was killed; the surviving one can work with another process.
pub fn killed() {
    let rounds = if full() { 100 } else { 6 };
    let mut rng = Rng::new(crate::support::seed());
    for round in 0..rounds {
        let (id, number) = (new_id(), rng.range(0, 1000) as u64);
        let mut victim = start(&id, 2, 1, "killed", number);
        let error = Worker::of(&id, 2, 0, case_of(number)).until_one_fails();
        victim.wait().unwrap();
        assert!(matches!(error.kind(), ErrorKind::PeerLost | ErrorKind::Timeout), "round {round}: {error}");
        assert_eq!(error.rank(), Some(1), "round {round}: {error}");
    }
    numbers();
}

/// A rank that leaves is told apart from one that is slow.
pub fn leaves() {
    for steps in [0, 3] {
        let id = new_id();
        let other = start(&id, 2, 1, "leaves", steps);
        let error = Worker::new(&id, 2, 0).until_one_fails();
        assert_eq!((error.kind(), error.rank()), (ErrorKind::PeerLost, Some(1)), "{error}");
        end(other);
    }
}

/// A rank that does not come is named within the deadline, and finds the communicator broken when it does.
pub fn sleeps() {
    let id = new_id();
    let other = start(&id, 2, 1, "sleeps", 0);
    let mut worker = Worker::new(&id, 2, 0);
    let error = worker.until_one_fails();
    assert_eq!((error.kind(), error.rank()), (ErrorKind::Timeout, Some(1)), "{error}");
    assert!(end(other).starts_with("Timeout"));
}

/// A process that is stopped delays the other. If it is continued before the deadline, steps succeed; after it, the error names
/// it, and it finds the communicator broken.
pub fn stopped() {
    let rounds = if full() { 100 } else { 5 };
    let mut rng = Rng::new(crate::support::seed());
    let id = new_id();
    let other = start(&id, 2, 1, "waits", 0);
    let process = other.id() as libc::pid_t;
    // SAFETY: signals the process just started, which has not been waited for.
    let signal = move |signal: i32| unsafe { libc::kill(process, signal) };
    let mut worker = Worker::new(&id, 2, 0);
    for round in 0..rounds {
        worker.step().unwrap();
        let time = STEP * rng.range(0, 40) as u32 / 100;
        signal(libc::SIGSTOP);
        let continuing = std::thread::spawn(move || {
            std::thread::sleep(time);
            signal(libc::SIGCONT)
        });
        let step = worker.step();
        continuing.join().unwrap();
        assert!(step.is_ok(), "round {round}, stopped for {time:?}: {step:?}");
    }
    signal(libc::SIGSTOP);
    let error = worker.until_one_fails();
    signal(libc::SIGCONT);
    assert_eq!((error.kind(), error.rank()), (ErrorKind::Timeout, Some(1)), "{error}");
    let said = end(other);
    assert!(said.starts_with("Timeout"), "{said}");
}

/// An abort ends the waits of all processes at once.
pub fn aborts() {
    let id = new_id();
    let other = start(&id, 2, 1, "waits", 0);
    let mut worker = Worker::new(&id, 2, 0);
    let comm = worker.comm.clone();
    let aborting = std::thread::spawn(move || {
        std::thread::sleep(STEP / 5);
        comm.abort().unwrap();
    });
    let error = worker.until_it_fails();
    assert_eq!((error.kind(), error.rank()), (ErrorKind::Aborted, Some(0)));
    aborting.join().unwrap();
    assert_eq!(end(other), "Aborted Some(0)\n");
}

/// A rank leaves while another thread of its process captures a stream that the library does not know: the capture is
/// intact, and the other process hears of it. For the emulator: what NCCL does to captures is its own.
pub fn captures() {
    let _current = Current::new(0);
    let raw = RawStream::new();
    let id = new_id();
    let other = start(&id, 2, 1, "waits", 0);
    let ((say, said), (tell, told)) = (mpsc::channel(), mpsc::channel());
    let leaving = std::thread::spawn(move || {
        let worker = Worker::new(&id, 2, 0);
        say.send(()).unwrap();
        told.recv().unwrap();
        drop(worker);
        say.send(()).unwrap();
    });
    said.recv_timeout(HANG).unwrap();
    let memory = Pinned::new(8);
    let graph = raw.capture(|| {
        tell.send(()).unwrap();
        said.recv_timeout(HANG).unwrap();
        // SAFETY: memory of a word, which outlives the replay.
        ok(unsafe { sys::cuMemsetD32Async(memory.0 as u64, 7, 1, raw.0) });
    });
    graph.replay(&raw);
    raw.synchronize();
    // SAFETY: a word that nothing writes any more.
    assert_eq!(unsafe { memory.0.cast::<u32>().read() }, 7);
    leaving.join().unwrap();
    assert_eq!(end(other), "PeerLost Some(0)\n");
}

/// Windows that one rank cannot open: no rank has one then, and none is left allocated. For the emulator.
pub fn refused() {
    let id = new_id();
    let other = start(&id, 2, 1, "refused", 0);
    without_windows(&id, 2, 0);
    end(other);
}

fn without_windows(id: &[u8; 128], world: usize, rank: usize) {
    let _current = Current::new(rank as i32);
    let (_gpu, comm) = Worker::connect(id, world, rank);
    let text = comm.describe().unwrap();
    assert!(text.contains("no_windows") && text.contains("window of rank 0"), "{text}");
    let started = Instant::now();
    // A window has a slot of 1 MiB, twice its size, for each rank and parity.
    while used() > 4 << 20 {
        assert!(started.elapsed() < 20 * STEP, "rank {rank}: {} bytes", used());
        std::thread::sleep(Duration::from_millis(5));
    }
}
