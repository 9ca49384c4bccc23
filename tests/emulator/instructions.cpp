// What device code calls: loads and stores that others watch, barriers, copies, warp-wide instructions.
#include <string.h>

#include <algorithm>

#include "scheduler.h"

namespace emulator {

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
