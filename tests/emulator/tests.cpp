// Kernels of tests: those of tests/gpu/kernels.ptx, and some that try the emulator.
#include "device/builtins.h"

// Lets dependents start at once, waits, then copies n 16-byte words.
static void late_copy(const uint64_t from, const uint64_t to, const uint64_t n, const uint64_t cycles) {
    emulator::dependency_launch();
    const uint64_t begin = emulator::clock_cycles();
    while (emulator::clock_cycles() - begin < cycles) {
    }
    const uint64_t threads = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += threads) {
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
}
EMULATOR_KERNEL(late_copy)

// Writes one word.
static void write_to(const uint64_t where) { *reinterpret_cast<volatile uint32_t*>(where) = 1; }
EMULATOR_KERNEL(write_to)

// Writes `value` to a peer's word, waits until it stands in its own, and says 1 in `result`; 2 where the deadline of
// `patience` ns came first.
static void signal_and_wait(const uint64_t theirs, const uint64_t mine, const uint64_t value, const uint64_t patience,
                            const uint64_t result) {
    if (threadIdx.x != 0) return;
    emulator::store_later(reinterpret_cast<uint64_t*>(theirs), value);
    const uint64_t begin = emulator::global_timer();
    bool late = false;
    while (emulator::load_watched(reinterpret_cast<uint64_t*>(mine)) < value && !late) {
        late = emulator::global_timer() - begin > patience;
    }
    *reinterpret_cast<uint64_t*>(result) = late ? 2 : 1;
}
EMULATOR_KERNEL(signal_and_wait)

// OwnStream 0 waits at the barrier, for lanes that wait for lane 0.
static void never_meet(const uint64_t) {
    if (threadIdx.x % 32 == 0) {
        __syncthreads();
    } else {
        __syncwarp();
    }
}
EMULATOR_KERNEL(never_meet)
