//! Decoding allocates nothing once a plan exists, and communicators and plans hold what they say: counted by a global
//! allocator, hence a test executable of its own, with one test.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use treeattn::attention::{Algorithm, AttentionDesc, DecodeArgs, Dtype, Tensor};
use treeattn::runtime::{CommConfig, Communicator, Device, DeviceKind, Plan, Runtime, RuntimeConfig, Stream};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
/// Bytes that are allocated now.
static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything to the system allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the system allocator asks for what this function was promised: a layout of some bytes.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the pointer came from `alloc`, which passes on the system allocator's, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const ALGORITHMS: [Algorithm; 5] =
    [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Tree, Algorithm::Allreduce3, Algorithm::Ring];
const CPU: Device = Device { kind: DeviceKind::Cpu, ordinal: 0 };

#[test]
fn decoding_allocates_nothing_and_plans_hold_what_they_say() {
    for algorithm in ALGORITHMS {
        decoding_with(algorithm);
    }
    for threads in [1, 3] {
        windows_of(threads);
        for algorithm in ALGORITHMS {
            memory_of(algorithm, threads);
        }
    }
}

/// What `make` makes, with the bytes that it holds.
fn held<T>(make: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.load(Ordering::Relaxed);
    let made = make();
    (made, LIVE.load(Ordering::Relaxed) - before)
}

/// A communicator holds its window, and little beside it. One rank: a larger window would be mapped by itself.
fn windows_of(threads: usize) {
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let config = CommConfig { threads_per_rank: threads, ..CommConfig::default() };
    let (comms, bytes) = held(|| Communicator::create_local(&runtime, &[CPU], &config).unwrap());
    let plan = Plan::create(&comms[0], &AttentionDesc::new(8, 2, 64, 500)).unwrap();
    let window = plan.memory().unwrap().window as usize;
    assert!((window..window + 16_384).contains(&bytes), "{threads} threads: {bytes} bytes, says {window}");
}

/// A plan holds its workspace, and little beside it.
fn memory_of(algorithm: Algorithm, threads: usize) {
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let config = CommConfig { threads_per_rank: threads, ..CommConfig::default() };
    let comms = Communicator::create_local(&runtime, &[CPU; 3], &config).unwrap();
    for wire_dtype in [Dtype::F32, Dtype::Bf16] {
        let shape = AttentionDesc::new(32, 8, 64, 100);
        let desc = AttentionDesc { max_batch: 64, max_query_tokens: 64, wire_dtype, algorithm, ..shape };
        let (plans, bytes) = held(|| Plan::create_all(&comms.iter().collect::<Vec<_>>(), &desc).unwrap());
        let says: usize = plans.iter().map(|plan| plan.memory().unwrap().workspace as usize).sum();
        // Blocks of a ring, mapped by themselves: 64 x 100 tokens, two a rank, each of 8 heads of 64 keys and values, and with
        // room for a scale of each.
        let mapped = if algorithm == Algorithm::Ring { 3 * 2 * 64 * 100 * 8 * (64 + 64 + 2) * 4 } else { 0 };
        let told = format!("{algorithm:?}, {threads} threads, wire {wire_dtype:?}: {bytes} bytes, says {says}");
        assert!((says..says + 3 * 8192).contains(&(bytes + mapped)), "{told}");
    }
}

fn decoding_with(algorithm: Algorithm) {
    const RANKS: usize = 3;
    let cpu = Device { kind: DeviceKind::Cpu, ordinal: 0 };
    let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    let config = CommConfig { threads_per_rank: 2, ..CommConfig::default() };
    let comms = Communicator::create_local(&runtime, &[cpu; RANKS], &config).unwrap();
    let desc = AttentionDesc {
        max_batch: 3,
        max_query_tokens: 3,
        k_dtype: Dtype::F16,
        v_dtype: Dtype::Bf16,
        wire_dtype: Dtype::Bf16,
        algorithm,
        ..AttentionDesc::new(8, 2, 64, 500)
    };
    let plans = Plan::create_all(&comms.iter().collect::<Vec<_>>(), &desc).unwrap();
    let barrier = Barrier::new(RANKS + 1);
    thread::scope(|scope| {
        for plan in &plans {
            let (barrier, stream) = (&barrier, Stream::new(&runtime, cpu).unwrap());
            scope.spawn(move || {
                let q = vec![0.5f32; 3 * 8 * 64];
                let cache = vec![0x3c00u16; 3 * 500 * 2 * 64];
                let mut out = vec![0.0f32; 3 * 8 * 64];
                let length = [500, 0, 17];
                let args = DecodeArgs {
                    batch: 3,
                    query_tokens: 3,
                    q: Tensor::from_slice(&q),
                    k: Tensor::from_slice(&cache),
                    v: Tensor::from_slice(&cache),
                    out: Tensor::from_slice_mut(&mut out),
                    kv_length: length.as_ptr(),
                    ..DecodeArgs::default()
                };
                let step = |stream: Option<&Stream>| {
                    // SAFETY: every buffer outlives the step, which is waited for.
                    unsafe { plan.decode(&args, stream).unwrap() };
                    if let Some(stream) = stream {
                        stream.synchronize().unwrap();
                    }
                };
                step(None);
                step(Some(&stream));
                barrier.wait();
                barrier.wait();
                for _ in 0..100 {
                    step(None);
                    step(Some(&stream));
                }
                barrier.wait();
            });
        }
        barrier.wait();
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        barrier.wait();
        barrier.wait();
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0, "{algorithm:?}");
    });
}
