// The engine: operations of streams, and who runs next.
#include <dlfcn.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "scheduler.h"

namespace emulator {

std::vector<Kernel*>& kernels() {
    static auto* all = new std::vector<Kernel*>;
    return *all;
}
std::vector<Constant>& constants() {
    static auto* all = new std::vector<Constant>;
    return *all;
}

long setting(const char* name, long usual) {
    const char* text = getenv(name);
    return text != nullptr && *text != 0 ? strtol(text, nullptr, 0) : usual;
}

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

unsigned blocks_per_sm(uint32_t threads, uint32_t shared) {
    if (threads == 0 || threads > 1024 || shared > kSharedOfBlock) return 0;
    return std::min({kThreadsOfSm / threads, kSharedOfSm / (shared + kSharedReserved), kBlocksOfSm});
}

Engine& engine() {
    static auto* only = new Engine;
    return *only;
}

void arrive_late(size_t i) {
    auto& late = engine().late;
    for (size_t first = 0; first < i; first++) {
        if (late[first].to == late[i].to) i = first;
    }
    __atomic_store_n(late[i].to, late[i].value, __ATOMIC_RELEASE);
    late.erase(late.begin() + static_cast<long>(i));
}

void make_runnable(Warp* warp) {
    if (warp->queued || warp->ready == 0) return;
    warp->queued = true;
    engine().runnable.push_back(warp);
}

void report(const char* why) {
    Engine& e = engine();
    fprintf(stderr, "emulator: %s\n", why);
    std::vector<Grid*> grids;
    for (const auto& operation : e.running) {
        if (operation->grid != nullptr) grids.push_back(operation->grid);
    }
    for (Grid* grid : grids) {
        fprintf(stderr, "  device %d, %s: %llu blocks of %u threads, %llu begun, %llu ended, %llu let dependents start\n",
                grid->device->ordinal, grid->operation->kernel->name, (unsigned long long)grid->total, grid->threads.x,
                (unsigned long long)grid->next, (unsigned long long)grid->exited,
                (unsigned long long)grid->let_dependents);
        for (Block* block : grid->resident) {
            fprintf(stderr, "    block %u on SM %u, %u threads live, %u at the barrier\n", block->index.x, block->sm,
                    block->live, block->arrived);
            for (Warp* warp : block->warps) {
                if (warp->live == 0) continue;
                fprintf(stderr, "      warp %u: live %08x ready %08x polling %08x meeting %08x barrier %08x wait %08x;",
                        warp->index, warp->live, warp->ready, warp->polling, warp->meeting, warp->at_barrier,
                        warp->at_dependency);
                const char* last = nullptr;
                for (unsigned lane = 0; lane < 32; lane++) {
                    const char* where = warp->live >> lane & 1 ? warp->lanes[lane].where : nullptr;
                    if (where != nullptr && where != last) fprintf(stderr, " %u: %s", lane, last = where);
                }
                fputc('\n', stderr);
            }
        }
    }
    for (const auto& operation : e.waiting) {
        fprintf(stderr, "  device %d, waiting: %s\n", operation->device ? operation->device->ordinal : -1,
                operation->kind == Operation::launch ? operation->kernel->name : "a copy, a fill, a mark or a call");
    }
}

void open_barrier(Block* block, Warp* running) {
    block->arrived = 0;
    block->result_and = block->votes_and, block->result_or = block->votes_or, block->result_count = block->votes_count;
    block->votes_and = 1, block->votes_or = 0, block->votes_count = 0;
    for (Warp* warp : block->warps) {
        warp->ready |= warp->at_barrier;
        warp->at_barrier = 0;
        if (warp != running) make_runnable(warp);
    }
}

bool waits_over(const Operation& operation) {
    for (const auto& wait : operation.waits) {
        if (!wait.on->done) return false;
    }
    return true;
}

namespace {

// Polls of each warp, with nothing else to run, before the processor is left to others.
constexpr size_t kPollsBeforeYield = 256;

sigjmp_buf* copying = nullptr;

bool all_let_dependents(const Operation& operation) {
    return operation.done ||
           (operation.grid != nullptr && operation.grid->let_dependents == operation.grid->total);
}

bool may_start(const Operation& operation) {
    for (const auto& wait : operation.waits) {
        if (!(wait.programmatic ? all_let_dependents(*wait.on) : wait.on->done)) return false;
    }
    return true;
}

void end_operation(const std::shared_ptr<Operation>& operation) {
    operation->done = true;
    operation->end_time = now();
    operation->waits.clear();
    operation->call = nullptr;
    engine().last_progress = operation->end_time;
}

// Ends everything on a device, as a context that is lost does.
void lose(Device* device, int error) {
    if (device->error == 0) device->error = error;
    for (Grid* grid : device->grids) {
        while (!grid->resident.empty()) end_block(grid->resident.back());
        grid->next = grid->exited = grid->let_dependents = grid->total;
    }
}

// Copies and fills, on the scheduler's thread.
bool move_memory(const Operation& operation) {
    sigjmp_buf back;
    copying = &back;
    const bool good = sigsetjmp(back, 1) == 0;
    if (good) {
        if (operation.kind == Operation::copy) {
            memmove(operation.to, operation.from, operation.bytes);
        } else if (operation.width == 1) {
            memset(operation.to, static_cast<int>(operation.value), operation.bytes);
        } else {
            for (size_t i = 0; i < operation.bytes; i += operation.width) {
                memcpy(static_cast<char*>(operation.to) + i, &operation.value, operation.width);
            }
        }
    }
    copying = nullptr;
    return good;
}

void start(const std::shared_ptr<Operation>& operation) {
    Engine& e = engine();
    operation->started = true;
    Device* device = operation->device;
    const bool lost = device != nullptr && device->error != 0;
    if (lost || operation->kind == Operation::mark) return end_operation(operation);
    switch (operation->kind) {
    case Operation::launch: {
        Grid* grid = new Grid{};
        grid->operation = operation.get();
        grid->device = device;
        grid->blocks = operation->blocks, grid->threads = operation->threads;
        grid->shared_bytes = operation->shared_bytes;
        grid->total = static_cast<uint64_t>(grid->blocks.x) * grid->blocks.y * grid->blocks.z;
        operation->grid = grid;
        device->grids.push_back(grid);
        e.running.push_back(operation);
        e.last_progress = now();
        break;
    }
    case Operation::copy:
    case Operation::fill:
        if (!move_memory(*operation)) {
            fprintf(stderr, "emulator: illegal address %#lx in a copy or fill\n", (unsigned long)e.fault_address);
            lose(device, 700);
        }
        end_operation(operation);
        break;
    case Operation::host:
        e.host_calls++;
        std::thread([operation] {
            operation->call();
            Lock lock;
            engine().host_calls--;
            end_operation(operation);
            nudge();
        }).detach();
        break;
    case Operation::mark: break;
    }
}

// Everything that operations ask for, with the lock held. False: nothing is left to run.
void settle() {
    Engine& e = engine();
    bool again = true;
    while (again) {
        again = false;
        for (size_t i = 0; i < e.running.size();) {
            auto operation = e.running[i];
            Grid* grid = operation->grid;
            if (grid->exited == grid->total && waits_over(*operation)) {
                auto& grids = grid->device->grids;
                grids.erase(std::find(grids.begin(), grids.end(), grid));
                delete grid;
                operation->grid = nullptr;
                e.running.erase(e.running.begin() + static_cast<long>(i));
                end_operation(operation);
                again = true;
            } else {
                i++;
            }
        }
        for (auto at = e.waiting.begin(); at != e.waiting.end();) {
            if (may_start(**at)) {
                auto operation = *at;
                at = e.waiting.erase(at);
                start(operation);
                again = true;
            } else {
                ++at;
            }
        }
    }
    for (const auto& operation : e.running) {
        Grid* grid = operation->grid;
        // Those that wait for predecessors.
        if (waits_over(*operation)) {
            for (Block* block : grid->resident) {
                for (Warp* warp : block->warps) {
                    if (warp->at_dependency == 0) continue;
                    warp->ready |= warp->at_dependency;
                    warp->at_dependency = 0;
                    make_runnable(warp);
                }
            }
        }
    }
    // Blocks come in the order of their grids, each on the emptiest SM that has room.
    for (const auto& operation : e.running) {
        Grid* grid = operation->grid;
        Device* device = grid->device;
        if (device->grids.front() != grid) {
            // One that came before still has blocks to bring.
            bool blocked = false;
            for (Grid* before : device->grids) {
                if (before == grid) break;
                blocked |= before->next < before->total;
            }
            if (blocked) continue;
        }
        const uint32_t threads = grid->threads.x * grid->threads.y * grid->threads.z;
        while (grid->next < grid->total) {
            int best = -1;
            for (size_t i = 0; i < device->sms.size(); i++) {
                const auto& sm = device->sms[i];
                if (sm.threads + threads <= kThreadsOfSm && sm.blocks < kBlocksOfSm &&
                    sm.shared + grid->shared_bytes + kSharedReserved <= kSharedOfSm &&
                    (best < 0 || sm.blocks < device->sms[static_cast<size_t>(best)].blocks)) {
                    best = static_cast<int>(i);
                }
            }
            if (best < 0) break;
            begin_block(grid, static_cast<unsigned>(best));
        }
    }
    e.dirty = false;
    e.progress.notify_all();
}

void on_fault(int signal, siginfo_t* info, void* context) {
    Engine& e = engine();
    if (!pthread_equal(pthread_self(), e.thread)) {
        ::signal(signal, SIG_DFL);
        return;
    }
    e.fault_address = reinterpret_cast<uintptr_t>(info->si_addr);
    if (copying != nullptr) siglongjmp(*copying, 1);
    if (current == nullptr || e.faulted != nullptr) {
        ::signal(signal, SIG_DFL);
        return;
    }
    e.faulted = current;
    auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    Dl_info file = {};
    dladdr(reinterpret_cast<void*>(registers[REG_RIP]), &file);
    fprintf(stderr, "emulator: illegal address %#lx in %s, device %d, block %u, thread %u; addr2line -Cfie %s %#lx\n",
            (unsigned long)e.fault_address, current->block->grid->operation->kernel->name,
            current->block->grid->device->ordinal, current->block->index.x, current->index.x,
            file.dli_fname ? file.dli_fname : "?",
            (unsigned long)registers[REG_RIP] - reinterpret_cast<unsigned long>(file.dli_fbase));
    // The fiber goes on in the scheduler, and never comes back.
    registers[REG_RIP] = reinterpret_cast<greg_t>(+[] {
        void* unused;
        emulator_switch(&unused, engine().stack_pointer);
    });
    registers[REG_RSP] = (registers[REG_RSP] & ~greg_t{63}) - 1024 - 8;
}

void scheduler() {
    Engine& e = engine();
    e.thread = pthread_self();
    stack_t alternate = {};
    alternate.ss_size = 256 << 10;
    alternate.ss_sp = malloc(alternate.ss_size);
    sigaltstack(&alternate, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
    unsigned idle = 0;
    while (true) {
        {
            std::unique_lock lock(e.mutex);
            if (e.faulted != nullptr) {
                lose(e.faulted->block->grid->device, 700);
                e.faulted = nullptr;
            }
            settle();
            while (e.runnable.empty() && e.pollers.empty() && !e.dirty) {
                if (!e.running.empty() && e.host_calls == 0) {
                    report("deadlock: nobody can go on");
                    abort();
                }
                e.work.wait(lock);
            }
            if (e.dirty) continue;
        }
        for (int slice = 0; slice < 1024 && !e.dirty && e.faulted == nullptr; slice++) {
            e.turns.fetch_add(1, std::memory_order_relaxed);
            if (!e.late.empty() && random_bits() % 4 == 0) arrive_late(random_bits() % e.late.size());
            const bool poll_now = e.runnable.empty() || (!e.pollers.empty() && random_bits() % 8 == 0);
            auto& list = poll_now ? e.pollers : e.runnable;
            if (list.empty()) break;
            const size_t i = random_bits() % list.size();
            Warp* warp = list[i];
            list[i] = list.back();
            list.pop_back();
            warp->queued = false;
            run(warp);
            if (e.faulted != nullptr) break;
            if (warp->live == 0) {
                Block* block = warp->block;
                if (block->live == 0) {
                    std::unique_lock lock(e.mutex);
                    end_block(block);
                    e.dirty = true;
                }
            } else if (warp->ready != 0) {
                make_runnable(warp);
            } else if (warp->polling != 0 && !warp->queued) {
                warp->queued = true;
                e.pollers.push_back(warp);
            }
            if (!e.runnable.empty()) {
                idle = 0;
            } else if (++idle > kPollsBeforeYield * e.pollers.size()) {
                // Only those that wait for memory are left: other processes may have to run. On a busy machine each yield
                // costs milliseconds.
                idle = 0;
                sched_yield();
                if (e.patience > 0 && now() - e.last_progress > e.patience) {
                    report("nothing but polls for EMULATOR_PATIENCE seconds");
                    abort();
                }
            }
        }
    }
}

}  // namespace

Lock::Lock() { engine().mutex.lock(); }
Lock::~Lock() { engine().mutex.unlock(); }

void nudge() {
    Engine& e = engine();
    e.dirty = true;
    e.work.notify_all();
    e.progress.notify_all();
}

void submit(const std::shared_ptr<Operation>& operation) {
    Engine& e = engine();
    if (!e.started) {
        e.started = true;
        e.random = static_cast<uint64_t>(setting("EMULATOR_SEED", 1)) * 0x9e3779b97f4a7c15ull | 1;
        e.patience = static_cast<double>(setting("EMULATOR_PATIENCE", 120));
        e.last_progress = now();
        std::thread(scheduler).detach();
    }
    e.waiting.push_back(operation);
    nudge();
}

void wait_until(const std::function<bool()>& done) {
    Engine& e = engine();
    std::unique_lock lock(e.mutex, std::adopt_lock);
    const std::chrono::duration<double> step(e.patience > 0 ? e.patience : 1e6);
    uint64_t turns = e.turns;
    while (!e.progress.wait_for(lock, step, done)) {
        if (e.turns == turns && e.patience > 0 && current != nullptr) {
            const Thread* thread = current;
            fprintf(stderr, "emulator: thread %u of block %u lets nobody else run\n", thread->index.x,
                    thread->block->index.x);
            report("a loop without emulator::poll()");
            abort();
        }
        turns = e.turns;
    }
    lock.release();
}

void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (current != nullptr) {
        fprintf(stderr, "emulator: %s, device %d, block %u, thread %u:\n", current->block->grid->operation->kernel->name,
                current->block->grid->device->ordinal, current->block->index.x, current->index.x);
    }
    report(text);
    abort();
}

uint32_t random_bits() {
    uint64_t& x = engine().random;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return static_cast<uint32_t>(x >> 20);
}

}  // namespace emulator
