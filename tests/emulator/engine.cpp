// Fibers, warps, blocks and grids, and who runs next.
#include "engine.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <list>
#include <mutex>
#include <thread>

#ifndef __x86_64__
#error "the emulator's fibers are written for x86-64"
#endif

// void emulator_switch(void** save, void* to): keeps the callee-saved registers on the stack that is left.
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");
extern "C" void emulator_switch(void** save, void* to);

namespace emulator {

Thread* current = nullptr;

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

namespace {

constexpr size_t kStackBytes = 64 << 10;
// Stacks at equal offsets would all lie in the same cache sets.
constexpr size_t kStackStride = kStackBytes + 5 * 64;
constexpr size_t kStacksOfSlab = 64;
// Polls of each warp, with nothing else to run, before the processor is left to others.
constexpr size_t kPollsBeforeYield = 256;
constexpr uint64_t kCanary = 0x5ca1ab1e0ddba11ull;
constexpr size_t kStaticBytes = 16 << 10;
constexpr size_t kPage = 4096;
constexpr size_t kSharedRegion = kStaticBytes + ((kSharedOfBlock + kPage - 1) & ~(kPage - 1));

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
Engine* const only = new Engine;
inline Engine& engine() { return *only; }

sigjmp_buf* copying = nullptr;

// A store arrives: the first of those to the same address.
void arrive_late(size_t i) {
    auto& late = engine().late;
    for (size_t first = 0; first < i; first++) {
        if (late[first].to == late[i].to) i = first;
    }
    __atomic_store_n(late[i].to, late[i].value, __ATOMIC_RELEASE);
    late.erase(late.begin() + static_cast<long>(i));
}

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

void make_runnable(Warp* warp) {
    if (warp->queued || warp->ready == 0) return;
    warp->queued = true;
    engine().runnable.push_back(warp);
}

// Where everybody stands, to stderr.
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

[[noreturn]] void finish_thread() {
    Thread* me = current;
    Warp* warp = me->warp;
    Block* block = me->block;
    copy_commit();
    copy_wait(0);
    if (*reinterpret_cast<uint64_t*>(me->stack) != kCanary) fail("the stack of a thread overflowed");
    const uint32_t bit = 1u << me->lane;
    warp->live &= ~bit, warp->ready &= ~bit;
    block->live--;
    me->where = nullptr;
    // Those at the barrier may have waited for this one only.
    if (block->live > 0 && block->arrived == block->live) open_barrier(block, warp);
    suspend();
    abort();
}

void thread_main() {
    Thread* me = current;
    const Operation& operation = *me->block->grid->operation;
    operation.kernel->call(operation.arguments.data());
    finish_thread();
}

void run(Warp* warp) {
    Engine& e = engine();
    warp->ready |= warp->polling;
    warp->polling = 0;
    if (warp->ready == 0) return;
    const unsigned turn = random_bits() % 32;
    const uint32_t turned = warp->ready >> turn | (turn ? warp->ready << (32 - turn) : 0);
    current = &warp->lanes[(__builtin_ctz(turned) + turn) % 32];
    emulator_switch(&e.stack_pointer, current->stack_pointer);
    current = nullptr;
}

char* take_stack() {
    Engine& e = engine();
    if (e.stacks.empty()) {
        const size_t bytes = kStackStride * kStacksOfSlab + kPage;
        void* slab = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (slab == MAP_FAILED) fail("no memory for stacks");
        madvise(slab, bytes, MADV_NOHUGEPAGE);
        mprotect(slab, kPage, PROT_NONE);
        for (size_t i = 0; i < kStacksOfSlab; i++) {
            char* stack = static_cast<char*>(slab) + kPage + i * kStackStride;
            *reinterpret_cast<uint64_t*>(stack) = kCanary;
            e.stacks.push_back(stack);
        }
    }
    char* stack = e.stacks.back();
    e.stacks.pop_back();
    return stack;
}

// Shared memory ends at a page that nobody may touch.
char* take_shared() {
    Engine& e = engine();
    if (e.shareds.empty()) {
        void* region = mmap(nullptr, kSharedRegion + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (region == MAP_FAILED) fail("no memory for shared memory");
        char* inner = static_cast<char*>(region) + kPage;
        mprotect(inner, kSharedRegion, PROT_READ | PROT_WRITE);
        return inner;
    }
    char* shared = e.shareds.back();
    e.shareds.pop_back();
    return shared;
}

void begin_block(Grid* grid, unsigned sm) {
    Engine& e = engine();
    Block* block = new Block{};
    const uint64_t n = grid->next++;
    block->grid = grid;
    block->index = {static_cast<unsigned>(n % grid->blocks.x),
                    static_cast<unsigned>(n / grid->blocks.x % grid->blocks.y),
                    static_cast<unsigned>(n / grid->blocks.x / grid->blocks.y)};
    block->sm = sm;
    block->votes_and = 1;
    const uint32_t dynamic = (grid->shared_bytes + 127) / 128 * 128;
    char* region = take_shared();
    block->dynamic = region + kSharedRegion - dynamic;
    block->dynamic_bytes = dynamic;
    block->memory = block->dynamic - kStaticBytes;
    memset(block->memory, 0xff, kStaticBytes + dynamic);
    const unsigned threads = grid->threads.x * grid->threads.y * grid->threads.z;
    block->live = threads;
    for (unsigned first = 0; first < threads; first += 32) {
        Warp* warp;
        if (e.spare_warps.empty()) {
            warp = new Warp{};
        } else {
            warp = e.spare_warps.back();
            e.spare_warps.pop_back();
        }
        warp->block = block;
        warp->index = first / 32;
        warp->live = warp->ready = threads - first >= 32 ? ~0u : (1u << (threads - first)) - 1;
        warp->polling = warp->meeting = warp->at_barrier = warp->at_dependency = 0;
        warp->queued = false;
        warp->gatherings.clear();
        for (unsigned lane = 0; lane < 32 && first + lane < threads; lane++) {
            Thread& thread = warp->lanes[lane];
            const unsigned id = first + lane;
            thread.warp = warp, thread.block = block, thread.lane = lane;
            thread.index = {id % grid->threads.x, id / grid->threads.x % grid->threads.y,
                            id / grid->threads.x / grid->threads.y};
            thread.where = "the beginning";
            thread.copies.clear(), thread.groups.clear();
            thread.stack = take_stack();
            // As emulator_switch left it: six registers, then the address to go to, with the stack as after a call.
            auto top = reinterpret_cast<uintptr_t>(thread.stack + kStackBytes) & ~uintptr_t{63};
            uint64_t* frame = reinterpret_cast<uint64_t*>(top) - 8;
            memset(frame, 0, 64);
            frame[6] = reinterpret_cast<uint64_t>(&thread_main);
            thread.stack_pointer = frame;
        }
        block->warps.push_back(warp);
        make_runnable(warp);
    }
    grid->resident.push_back(block);
    auto& room = grid->device->sms[sm];
    room.blocks++, room.threads += threads, room.shared += grid->shared_bytes + kSharedReserved;
}

void forget_warp(std::vector<Warp*>& list, Warp* warp) {
    list.erase(std::remove(list.begin(), list.end(), warp), list.end());
}

void end_block(Block* block) {
    Engine& e = engine();
    arrive_all([block](const Engine::Late& late) { return late.block == block; });
    Grid* grid = block->grid;
    const unsigned threads = grid->threads.x * grid->threads.y * grid->threads.z;
    for (Warp* warp : block->warps) {
        for (unsigned lane = 0; lane < 32 && warp->index * 32 + lane < threads; lane++) {
            *reinterpret_cast<uint64_t*>(warp->lanes[lane].stack) = kCanary;
            e.stacks.push_back(warp->lanes[lane].stack);
        }
        if (warp->queued || warp->live != 0) {
            forget_warp(e.runnable, warp);
            forget_warp(e.pollers, warp);
        }
        e.spare_warps.push_back(warp);
    }
    e.shareds.push_back(block->dynamic + block->dynamic_bytes - kSharedRegion);
    auto& room = grid->device->sms[block->sm];
    room.blocks--, room.threads -= threads, room.shared -= grid->shared_bytes + kSharedReserved;
    if (!block->let_dependents) grid->let_dependents++;
    grid->exited++;
    auto& resident = grid->resident;
    resident.erase(std::find(resident.begin(), resident.end(), block));
    delete block;
}

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

bool waits_over(const Operation& operation) {
    for (const auto& wait : operation.waits) {
        if (!wait.on->done) return false;
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

void suspend() {
    Thread* me = current;
    Warp* warp = me->warp;
    if (warp->ready == 0) {
        emulator_switch(&me->stack_pointer, engine().stack_pointer);
        return;
    }
    // The next lane in turn.
    const unsigned turn = (me->lane + 1) % 32;
    const uint32_t turned = warp->ready >> turn | (turn ? warp->ready << (32 - turn) : 0);
    Thread* next = &warp->lanes[(static_cast<unsigned>(__builtin_ctz(turned)) + turn) % 32];
    if (next == me) return;
    current = next;
    emulator_switch(&me->stack_pointer, next->stack_pointer);
}

namespace {

// Back to the scheduler, whoever is ready in this warp.
void yield_warp() { emulator_switch(&current->stack_pointer, engine().stack_pointer); }

}  // namespace

void poll(const char* where) {
    Thread* me = current;
    const uint32_t bit = 1u << me->lane;
    me->where = where;
    me->warp->ready &= ~bit;
    me->warp->polling |= bit;
    suspend();
}

void maybe_yield() {
    if (random_bits() % 2 == 0) yield_warp();
}

void store_later(uint64_t* to, uint64_t x) {
    auto& late = engine().late;
    late.push_back({to, x, current->block});
    if (late.size() > 256) arrive_late(random_bits() % late.size());
    maybe_yield();
}

uint64_t load_watched(const uint64_t* from) {
    poll("a load of what others store");
    const Block* block = current->block;
    arrive_all([=](const Engine::Late& late) { return late.to == from && late.block == block; });
    return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}

void fence() {
    const Block* block = current->block;
    arrive_all([block](const Engine::Late& late) { return late.block == block; });
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    maybe_yield();
}

bool arrive(Meeting kind, uint32_t mask) {
    static const char* const names[] = {"__syncwarp", "shuffle", "vote", "ldmatrix", "movmatrix", "mma"};
    Thread* me = current;
    Warp* warp = me->warp;
    const uint32_t bit = 1u << me->lane;
    if (!(mask & bit)) fail("%s: a mask of %08x without the calling lane %u", names[int(kind)], mask, me->lane);
    Warp::Gathering* at = nullptr;
    for (auto& gathering : warp->gatherings) {
        if (gathering.kind == kind && gathering.mask == mask && !(gathering.arrived & bit)) at = &gathering;
    }
    if (at == nullptr) {
        warp->gatherings.push_back({kind, mask, 0});
        at = &warp->gatherings.back();
    }
    at->arrived |= bit;
    if (at->arrived == mask) return true;
    me->where = names[int(kind)];
    warp->ready &= ~bit;
    warp->meeting |= bit;
    suspend();
    return false;
}

void leave(Meeting kind, uint32_t mask) {
    Warp* warp = current->warp;
    auto& all = warp->gatherings;
    for (size_t i = 0; i < all.size(); i++) {
        if (all[i].kind == kind && all[i].mask == mask && all[i].arrived == mask) {
            all[i] = all.back();
            all.pop_back();
            break;
        }
    }
    warp->ready |= mask;
    warp->meeting &= ~mask;
    // Other warps come in between, now and then.
    if (random_bits() % 64 == 0) yield_warp();
}

void barrier() {
    Thread* me = current;
    Block* block = me->block;
    Warp* warp = me->warp;
    const uint32_t bit = 1u << me->lane;
    if (++block->arrived < block->live) {
        me->where = "__syncthreads";
        warp->ready &= ~bit;
        warp->at_barrier |= bit;
        suspend();
        return;
    }
    open_barrier(block, warp);
}

void dependency_wait() {
    Thread* me = current;
    const uint32_t bit = 1u << me->lane;
    {
        Lock lock;
        if (waits_over(*me->block->grid->operation)) return;
        me->where = "the wait for predecessors";
        me->warp->ready &= ~bit;
        me->warp->at_dependency |= bit;
    }
    suspend();
}

void dependency_launch() {
    Block* block = current->block;
    if (block->let_dependents) return;
    Lock lock;
    block->let_dependents = true;
    block->grid->let_dependents++;
    engine().dirty = true;
}

uint64_t global_timer() {
    poll("a read of the timer");
    return static_cast<uint64_t>(now() * 1e9);
}

// Many a nanosecond: who waits for cycles wants others to come in between, not to lose time.
uint64_t clock_cycles() { return global_timer() * 64; }

// What bounds a kernel's delays at points of a protocol, in nanoseconds: below 1 there are none.
uint64_t delays() {
    static const uint64_t bound = static_cast<uint64_t>(std::max(1l, setting("EMULATOR_DELAYS", 1)));
    return bound;
}

void copy_async(uint32_t to, const void* from, uint32_t bytes, uint32_t size) {
    if (to % size != 0 || (bytes > 0 && reinterpret_cast<uintptr_t>(from) % size != 0)) {
        fail("cp.async of %u bytes from %p to %#x: not aligned", size, from, to);
    }
    Block* block = current->block;
    char* at = shared_pointer(to);
    if (at < block->memory || at + size > block->dynamic + block->dynamic_bytes) fail("cp.async to %#x: outside", to);
    current->copies.push_back({at, static_cast<const char*>(from), bytes, size - bytes});
}

namespace {

void do_copies(Thread* thread, size_t end) {
    for (size_t i = 0; i < end; i++) {
        const PendingCopy& copy = thread->copies[i];
        memcpy(copy.to, copy.from, copy.bytes);
        memset(copy.to + copy.bytes, 0, copy.zeros);
    }
    thread->copies.erase(thread->copies.begin(), thread->copies.begin() + static_cast<long>(end));
    for (size_t& group : thread->groups) group = group > end ? group - end : 0;
}

}  // namespace

void copy_commit() {
    Thread* me = current;
    me->groups.push_back(me->copies.size());
    // They may come at any time from now on.
    if (random_bits() % 4 == 0) do_copies(me, me->copies.size());
}

void copy_wait(unsigned pending) {
    Thread* me = current;
    // What is not committed is in no group, and is not waited for.
    if (me->groups.size() <= pending) return;
    const size_t closed = me->groups.size() - pending;
    const size_t end = me->groups[closed - 1];
    do_copies(me, end);
    me->groups.erase(me->groups.begin(), me->groups.begin() + static_cast<long>(closed));
}

void* static_shared(const void* tag, size_t bytes, size_t alignment) {
    Block* block = current->block;
    for (const auto& [known, at] : block->statics) {
        if (known == tag) return block->memory + at;
    }
    const auto at = static_cast<uint32_t>((block->static_bytes + alignment - 1) / alignment * alignment);
    if (at + bytes > kStaticBytes) fail("more than %zu bytes of static shared memory", kStaticBytes);
    block->statics.push_back({tag, at});
    block->static_bytes = static_cast<uint32_t>(at + bytes);
    return block->memory + at;
}

// --- warp-wide instructions ---

void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed) {
    const unsigned lane = current->lane;
    current->warp->words[lane][0] = address;
    if (address % 16 != 0) fail("ldmatrix: %#x is not aligned", address);
    meet(Meeting::load_matrices, ~0u, [transposed](Warp& warp) {
        for (unsigned i = 0; i < 32; i++) {
            for (unsigned matrix = 0; matrix < 4; matrix++) {
                const auto element = [&](unsigned row, unsigned column) {
                    uint16_t x;
                    memcpy(&x, shared_pointer(warp.words[matrix * 8 + row][0]) + column * 2, 2);
                    return static_cast<uint32_t>(x);
                };
                const unsigned a = i / 4, b = i % 4 * 2;
                warp.words[i][4 + matrix] = transposed ? element(b, a) | element(b + 1, a) << 16
                                                       : element(a, b) | element(a, b + 1) << 16;
            }
        }
    });
    for (unsigned i = 0; i < 4; i++) r[i] = current->warp->words[lane][4 + i];
}

uint32_t transpose(uint32_t x) {
    const unsigned lane = current->lane;
    current->warp->words[lane][0] = x;
    meet(Meeting::transpose, ~0u, [](Warp& warp) {
        const auto element = [&](unsigned row, unsigned column) {
            return warp.words[row * 4 + column / 2][0] >> (column % 2 * 16) & 0xffffu;
        };
        for (unsigned i = 0; i < 32; i++) {
            warp.words[i][4] = element(i % 4 * 2, i / 4) | element(i % 4 * 2 + 1, i / 4) << 16;
        }
    });
    return current->warp->words[lane][4];
}

namespace {

inline float widen(uint32_t bits, bool bf16) {
    if (bf16) {
        const uint32_t x = bits << 16;
        float f;
        memcpy(&f, &x, 4);
        return f;
    }
    const auto x = static_cast<uint16_t>(bits);
    _Float16 h;
    memcpy(&h, &x, 2);
    return static_cast<float>(h);
}

}  // namespace

void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16) {
    const unsigned lane = current->lane;
    auto& mine = current->warp->words[lane];
    for (unsigned i = 0; i < 4; i++) mine[i] = a[i];
    mine[4] = b0, mine[5] = b1;
    memcpy(&mine[6], d, 16);
    meet(Meeting::multiply, ~0u, [bf16](Warp& warp) {
        float left[16][16], right[16][8], sum[16][8];
        for (unsigned i = 0; i < 32; i++) {
            const unsigned g = i / 4, t = i % 4 * 2;
            const uint32_t* words = warp.words[i];
            for (unsigned half = 0; half < 2; half++) {
                const unsigned shift = half * 16;
                left[g][t + half] = widen(words[0] >> shift & 0xffffu, bf16);
                left[g + 8][t + half] = widen(words[1] >> shift & 0xffffu, bf16);
                left[g][t + 8 + half] = widen(words[2] >> shift & 0xffffu, bf16);
                left[g + 8][t + 8 + half] = widen(words[3] >> shift & 0xffffu, bf16);
                right[t + half][g] = widen(words[4] >> shift & 0xffffu, bf16);
                right[t + 8 + half][g] = widen(words[5] >> shift & 0xffffu, bf16);
            }
            memcpy(&sum[g][t], &words[6], 8);
            memcpy(&sum[g + 8][t], &words[8], 8);
        }
        for (unsigned m = 0; m < 16; m++) {
            for (unsigned k = 0; k < 16; k++) {
                for (unsigned n = 0; n < 8; n++) sum[m][n] += left[m][k] * right[k][n];
            }
        }
        for (unsigned i = 0; i < 32; i++) {
            memcpy(&warp.words[i][6], &sum[i / 4][i % 4 * 2], 8);
            memcpy(&warp.words[i][8], &sum[i / 4 + 8][i % 4 * 2], 8);
        }
    });
    memcpy(d, &current->warp->words[lane][6], 16);
}

}  // namespace emulator
