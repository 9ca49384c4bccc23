// Fibers: how threads, warps and blocks begin, take turns and end.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>

#include "scheduler.h"

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

namespace emulator {

Thread* current = nullptr;

namespace {

constexpr size_t kStackBytes = 64 << 10;
// Stacks at equal offsets would all lie in the same cache sets.
constexpr size_t kStackStride = kStackBytes + 5 * 64;
constexpr size_t kStacksOfSlab = 64;
constexpr uint64_t kCanary = 0x5ca1ab1e0ddba11ull;
constexpr size_t kPage = 4096;
constexpr size_t kSharedRegion = kStaticBytes + ((kSharedOfBlock + kPage - 1) & ~(kPage - 1));

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

}  // namespace

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

namespace {

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

}  // namespace

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

namespace {

void forget_warp(std::vector<Warp*>& list, Warp* warp) {
    list.erase(std::remove(list.begin(), list.end(), warp), list.end());
}

}  // namespace

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

void yield_warp() { emulator_switch(&current->stack_pointer, engine().stack_pointer); }

}  // namespace emulator
