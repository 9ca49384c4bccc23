// What the files of the driver share.
#pragma once

#include <atomic>

#include "driver.h"

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

extern thread_local int capture_mode;
uint64_t thread_id();
Context* current_context();
// The stream behind a handle, in the current context; null where there is none.
Stream* stream_of(void* handle);
// For calls that a capture may forbid: breaks those that do.
Status check_change();
Status enqueue(Stream* stream, const std::shared_ptr<Operation>& operation, bool programmatic);
Status join_capture(Stream* stream, Event* event);
void wait_for(const std::shared_ptr<Operation>& operation);

}  // namespace emulator
