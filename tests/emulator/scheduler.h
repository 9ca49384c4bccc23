// What the files of the engine share: its state, and what fibers, the scheduler and instructions ask of each other.
#pragma once

#include <setjmp.h>

#include <atomic>
#include <condition_variable>
#include <list>
#include <mutex>

#include <pthread.h>

#include "engine.h"

// Keeps the callee-saved registers on the stack that is left.
extern "C" void emulator_switch(void** save, void* to);

namespace emulator {

constexpr size_t kStaticBytes = 16 << 10;

// All that the scheduler has. Never destroyed: its thread runs until the process ends.
struct Engine {
    std::mutex mutex;
    std::condition_variable work, progress;
    std::list<std::shared_ptr<Operation>> waiting;
    std::vector<std::shared_ptr<Operation>> running;
    bool started = false;
    std::atomic<bool> dirty = false;
    int host_calls = 0;
    pthread_t thread = {};

    // The scheduler's own.
    void* stack_pointer = nullptr;
    std::vector<Warp*> runnable, pollers;
    std::vector<char*> stacks, shareds;
    std::vector<Warp*> spare_warps;
    uint64_t random = 1;
    Thread* faulted = nullptr;
    uintptr_t fault_address = 0;
    struct Late {
        uint64_t* to;
        uint64_t value;
        Block* block;
    };
    std::vector<Late> late;  // stores on their way
    double last_progress = 0;
    std::atomic<uint64_t> turns = 0;
    double patience = 0;
};
Engine& engine();

// A store arrives: the first of those to the same address.
void arrive_late(size_t i);

template <class Which>
void arrive_all(Which which) {
    auto& late = engine().late;
    for (size_t i = 0; i < late.size();) {
        if (which(late[i])) {
            // It may be another one, earlier, that arrives.
            arrive_late(i);
            i = 0;
        } else {
            i++;
        }
    }
}

void make_runnable(Warp* warp);
// Where everybody stands, to stderr.
void report(const char* why);
// Lets those go on that wait at a block's barrier; `running` runs already.
void open_barrier(Block* block, Warp* running);
bool waits_over(const Operation& operation);

// Lets a warp's fibers run until none is ready.
void run(Warp* warp);
void begin_block(Grid* grid, unsigned sm);
void end_block(Block* block);
// Back to the scheduler, whoever is ready in this warp.
void yield_warp();

}  // namespace emulator
