//! Decoding allocates nothing once a plan exists: counted by a global allocator, hence a test executable of its own.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use treeattn::attention::{Algorithm, AttentionDesc, DecodeArgs, Dtype, Tensor};
use treeattn::runtime::{CommConfig, Communicator, Device, DeviceKind, Plan, Runtime, RuntimeConfig, Stream};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything to the system allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller vouches.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller vouches.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn decoding_allocates_nothing() {
    for algorithm in [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Tree, Algorithm::Allreduce3, Algorithm::Ring] {
        decoding_with(algorithm);
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
