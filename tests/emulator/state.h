// What the files of the driver share.
#pragma once

#include <atomic>

#include "driver.h"

#define API extern "C" __attribute__((visibility("default"))) Status

namespace emulator {

struct State {
    struct Shown {
        Context* context;
        int number;  // as all processes number devices, whichever they see
    };
    std::vector<Shown> devices;
    size_t memory = 0;  // of a device, bytes
    std::map<uintptr_t, Allocation> memory_map;
    std::map<std::string, Function> functions;
    std::set<Stream*> streams;
    std::set<std::shared_ptr<Capture>> captures;
    uint64_t next_id = 0;
};
State& state();

// --- driver.cpp ---

extern thread_local int capture_mode;
uint64_t thread_id();
Context* current_context();
// For calls that a capture may forbid: breaks those that do.
Status check_change();

// --- memory.cpp ---

constexpr size_t kPage = 4096;
inline size_t round_up(size_t x, size_t to) { return (x + to - 1) / to * to; }
// Maps a file between guards; null where there is no room.
char* map_guarded(int file, size_t bytes, char** region, size_t* region_bytes);
void release(Allocation& a);
// The allocation that has an address, and the one that begins there; null where there is none.
Allocation* find(uintptr_t address);
Allocation* exactly(uintptr_t address);

// --- streams.cpp ---

// The stream behind a handle, in the current context; null where there is none.
Stream* stream_of(void* handle);
Status enqueue(Stream* stream, const std::shared_ptr<Operation>& operation, bool programmatic);
Status run_async(void* stream_handle, std::shared_ptr<Operation> operation);
void wait_for(const std::shared_ptr<Operation>& operation);
void wait_for_all(Context* context);
// Calls that a driver may let wait for kernels, those of other contexts included, do so where EMULATOR_STRICT is set.
void strict_wait();

// --- graphs.cpp ---

Status join_capture(Stream* stream, Event* event);

}  // namespace emulator
