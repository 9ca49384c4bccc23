// The GPU of the emulator: kernels run as fibers, one a CUDA thread, all on one host thread.
//
// Device code sees this file through device/builtins.h; the driver API (driver.cpp and its neighbours, over state.h) submits operations to it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
};

namespace emulator {

struct Block;
struct Device;
struct Grid;
struct Operation;
struct Warp;

// What all the lanes named by a mask do together.
enum class Meeting : uint8_t { sync, shuffle, ballot, load_matrices, transpose, multiply };

// An asynchronous copy to shared memory: done as late as the wait for it allows.
struct PendingCopy {
    char* to;
    const char* from;
    uint32_t bytes, zeros;  // copied, then cleared
};

// A CUDA thread.
struct Thread {
    void* stack_pointer;
    Warp* warp;
    Block* block;
    uint3 index;
    unsigned lane;
    const char* where;  // what it waits in
    std::vector<PendingCopy> copies;
    std::vector<size_t> groups;  // where committed groups of `copies` end
    char* stack;
};

struct Warp {
    struct Gathering {
        Meeting kind;
        uint32_t mask, arrived;
    };
    Block* block;
    unsigned index;
    Thread lanes[32];
    // One bit a lane. A live lane is in one of the last five.
    uint32_t live, ready, polling, meeting, at_barrier, at_dependency;
    bool queued;  // in the scheduler's list
    std::vector<Gathering> gatherings;
    // What lanes bring to a meeting and take from it.
    uint64_t in[32], out[32];
    uint8_t source[32];
    uint32_t words[32][12];
};

struct Block {
    Grid* grid;
    uint3 index;
    unsigned sm;
    std::vector<Warp*> warps;
    unsigned live, arrived;   // threads; at the barrier
    int votes_and, votes_or, votes_count, result_and, result_or, result_count;
    bool let_dependents;
    char* memory;        // shared: static variables first
    char* dynamic;
    uint32_t dynamic_bytes;
    std::vector<std::pair<const void*, uint32_t>> statics;
    uint32_t static_bytes;
};

struct Grid {
    Operation* operation;
    Device* device;
    dim3 blocks, threads;
    uint32_t shared_bytes;
    uint64_t total, next, exited, let_dependents;
    std::vector<Block*> resident;
};

// A kernel, as the host compiler made it.
struct Kernel {
    const char* name;
    void (*call)(const char* arguments);
    std::vector<uint32_t> sizes;  // of its arguments
    int dynamic_limit = 48 << 10;
};
struct Constant {
    const char* name;
    void* data;
    size_t bytes;
};
std::vector<Kernel*>& kernels();
std::vector<Constant>& constants();

// A piece of work of a stream: what it waits for, and what it does. Guarded by the engine's lock.
struct Operation {
    struct Wait {
        std::shared_ptr<Operation> on;
        bool programmatic;  // started before its end is early enough
    };
    enum Kind { launch, copy, fill, host, mark } kind = mark;
    Device* device = nullptr;
    std::vector<Wait> waits;
    bool started = false, done = false;
    double end_time = 0;
    // launch
    const Kernel* kernel = nullptr;
    dim3 blocks{1, 1, 1}, threads{1, 1, 1};
    uint32_t shared_bytes = 0;
    std::vector<char> arguments;
    Grid* grid = nullptr;
    // copy, fill
    void* to = nullptr;
    const void* from = nullptr;
    size_t bytes = 0;
    unsigned value = 0, width = 1;
    // host
    std::function<void()> call;
};

struct Device {
    int ordinal = 0;
    int error = 0;  // what lost its context
    std::vector<Grid*> grids;
    struct Sm {
        uint32_t shared, threads, blocks;  // in use
    };
    std::vector<Sm> sms;
};

constexpr uint32_t kSharedOfSm = 228 << 10, kSharedOfBlock = 227 << 10, kSharedReserved = 1 << 10;
constexpr uint32_t kThreadsOfSm = 2048, kBlocksOfSm = 32;

// How many blocks of this kind an SM holds.
unsigned blocks_per_sm(uint32_t threads, uint32_t shared);
// Where an environment variable is a number, that; else what is usual.
long setting(const char* name, long usual);

// The engine's lock, for as long as it lives.
struct Lock {
    Lock();
    ~Lock();
    Lock(const Lock&) = delete;
};
// With the lock held:
void submit(const std::shared_ptr<Operation>& operation);
void wait_until(const std::function<bool()>& done);  // releases the lock while it waits
void nudge();                                        // something that waiters look at has changed

double now();

// --- called by device code ---

extern Thread* current;

void suspend();
void fail(const char* format, ...) __attribute__((format(printf, 1, 2), noreturn));
uint32_t random_bits();

// Lets any other thread of the GPU run. Loops that wait for memory must call it (through a load of device/ptx.cuh), or
// nothing else ever runs.
void poll(const char* where = "poll");
// Lets others run, now and then.
void maybe_yield();

// A relaxed store to memory that others watch: it arrives later, in any order with those to other addresses. Fences, what
// releases, and a block's end come after all that the block has stored so before.
void store_later(uint64_t* to, uint64_t x);
// What others have stored; lets them.
uint64_t load_watched(const uint64_t* from);
void fence();

void barrier();
void dependency_wait();
void dependency_launch();
uint64_t global_timer();
uint64_t clock_cycles();
uint64_t delays();

void copy_async(uint32_t to, const void* from, uint32_t bytes, uint32_t size);
void copy_commit();
void copy_wait(unsigned pending);

// The static shared variable of this tag in the running block.
void* static_shared(const void* tag, size_t bytes, size_t alignment);
inline char* dynamic_shared() { return current->block->dynamic; }

// Shared memory as instructions address it. Nothing lies at 0.
constexpr uint32_t kFirstShared = 0x400;
inline uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(static_cast<const char*>(p) - current->block->memory) + kFirstShared;
}
inline char* shared_pointer(uint32_t address) { return current->block->memory + (address - kFirstShared); }

// Waits for the lanes of a mask; the last to come does `all` for all of them. True for that one.
bool arrive(Meeting kind, uint32_t mask);
void leave(Meeting kind, uint32_t mask);

template <class All>
inline void meet(Meeting kind, uint32_t mask, All all) {
    if (arrive(kind, mask)) {
        all(*current->warp);
        leave(kind, mask);
    }
}

void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed);
uint32_t transpose(uint32_t x);
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16);

}  // namespace emulator
