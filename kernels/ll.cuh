// Packets between ranks, and how a kernel waits for them. The only code that knows how they look.
//
// A word of a slot is 64 bits: 32 of data below a 32-bit flag, the epoch. It is written and read whole, so that a word
// that carries the epoch carries its data, and nothing needs a fence. Ranks write ("push") into each other's windows and
// read their own only.
//
// Every exchange has an epoch. A rank pushes epoch e + 1 only when its own `consumed` says e, and every rank pushes a
// header to every rank in every epoch, rows or not. Two slots, one a parity of the epoch, are then enough: src/partial/
// epoch.rs says why. Where the words of a window and of host memory lie is said in src/partial/view.rs.
#pragma once

#include "params.cuh"
#include "ptx.cuh"

namespace treeattn {

constexpr uint32_t kWholeWarp = 0xffffffffu;
constexpr int kSpins = 64;        // looks at a word between two looks at the clock and at what ends a wait
// Time between a warp's looks at host memory, ns: each goes over PCIe, and many of them hold up all reads of the GPU.
constexpr uint64_t kHostEvery = 2'000'000;

// A failure (partial::word::Failure): code | rank << 8 | epoch << 32.
__device__ __forceinline__ uint64_t failure(uint32_t code, uint32_t rank) { return code | rank << kRankShift; }

// How long a rank that has left is still waited for: what it enqueued before may be on its way.
constexpr uint64_t kGrace = 250'000'000;  // ns

// Never 0, which is no epoch, and parities alternate for ever.
__device__ __forceinline__ uint32_t next_epoch(uint32_t epoch) {
    return epoch == 0xffffffffu ? kAfterWrap : epoch + 1;
}

__device__ __forceinline__ uint64_t packet(uint32_t data, uint32_t epoch) {
    return static_cast<uint64_t>(epoch) << kFlagShift | data;
}
__device__ __forceinline__ uint32_t data_of(uint64_t word) { return static_cast<uint32_t>(word); }
__device__ __forceinline__ bool is_of(uint64_t word, uint32_t epoch) { return word >> kFlagShift == epoch; }
__device__ __forceinline__ bool are_of(ulonglong2 words, uint32_t epoch) {
    return is_of(words.x, epoch) && is_of(words.y, epoch);
}

// Words of a row: an even number, so that two can be moved at a time.
__device__ __forceinline__ int64_t row_words(int head_dim, int32_t wire_dtype) {
    const int o = wire_dtype == kF32 ? head_dim : (head_dim + 1) / 2;
    return kRowHead + (o + 1) / 2 * 2;
}

// Bad data on the wire: 0, or sequence + 1 (saturating), rank, cause.
__device__ __forceinline__ uint32_t pack_fault(uint64_t status, uint32_t rank) {
    if (status == 0) return 0;
    const uint32_t sequence = min(0xffffffffu - static_cast<uint32_t>(status >> kHighShift), (1u << 23) - 2);
    return (sequence + 1) << 9 | rank << 3 | (static_cast<uint32_t>(status) & 7);
}
__device__ __forceinline__ uint64_t unpack_fault(uint32_t fault) {
    return pack_status((fault >> 9) - 1, fault & 7, fault >> 3 & 63);
}

// The rank whose heads hold `head`: rank r owns heads floor(r * heads / world) up to those of r + 1.
__device__ __forceinline__ int owner_of(int head, int heads, int world) {
    return static_cast<int>((static_cast<int64_t>(head + 1) * world + heads - 1) / heads) - 1;
}
__device__ __forceinline__ int first_head_of(int rank, int heads, int world) {
    return static_cast<int>(static_cast<int64_t>(rank) * heads / world);
}

// An exchange that is under way, as one warp sees it.
struct Epoch {
    uint32_t number;
    bool broken;     // nothing is sent or waited for any more
    uint64_t until;  // lane 0: when to give up; 0: no wait has been long yet
    int lost;        // lane 0: the rank that has left, because of which that is soon; -1: none
    uint64_t ask;    // lane 0: when to look at host memory

    __device__ __forceinline__ int parity() const { return number % kSlots; }
};

// Reads where this rank stands, after the dependency wait. One lane asks for the warp: another block may fail meanwhile,
// and lanes that know of it and lanes that do not would wait for each other.
__device__ __forceinline__ Epoch begin_epoch(const ExchangeView& v) {
    const uint32_t consumed = static_cast<uint32_t>(load_word(v.window + kConsumed));
    const int failed = threadIdx.x % 32 == 0 && load_word(v.window + kFailed) != 0;
    return Epoch{next_epoch(consumed), __shfl_sync(kWholeWarp, failed, 0) != 0, 0, -1, 0};
}

// This rank's slot in the window of `to`, and the slot of `from` in its own.
__device__ __forceinline__ uint64_t* slot_at(const ExchangeView& v, const Epoch& e, int to) {
    return reinterpret_cast<uint64_t*>(v.peers[to]) + e.parity() * v.parity_words;
}
__device__ __forceinline__ const uint64_t* slot_of(const ExchangeView& v, const Epoch& e, int from) {
    return v.window + kControlWords + from * v.slot_words + e.parity() * v.parity_words;
}
// The slot of merged rows in the window of `to`.
__device__ __forceinline__ uint64_t* merged_slot(const ExchangeView& v, const Epoch& e, int to) {
    return reinterpret_cast<uint64_t*>(v.bases[to]) + v.merged_at + e.parity() * v.slot_words;
}

// Fails the communicator, unless it has: for the host, for this rank's later launches and for its peers.
static __device__ __noinline__ void fail(const ExchangeView& v, uint32_t epoch, uint64_t why) {
    const uint64_t word = (why & 0xffffffffu) | static_cast<uint64_t>(epoch) << kHighShift;
    auto* failed = reinterpret_cast<unsigned long long*>(v.window + kFailed);
    if (atomicCAS(failed, 0ull, static_cast<unsigned long long>(word)) != 0) return;
    store_word(v.host + kFailure, word);
    for (int rank = 0; rank < v.world; rank++) {
        if (rank != v.rank) store_word(reinterpret_cast<uint64_t*>(v.bases[rank]) + kBroken, word);
    }
    __threadfence_system();
}

// Every so often in a wait: whether it is to end without what it waits for. `missing`: a rank that has not come, the same
// on all lanes.
static __device__ __noinline__ bool give_up(const ExchangeView& v, Epoch& e, int missing) {
    bool over = false;
    if (threadIdx.x % 32 == 0) {
        over = load_word(v.window + kFailed) != 0;
        if (!over) {
            uint64_t why = load_word(v.window + kBroken);
            const uint64_t now = nanoseconds();
            if (e.until == 0) e.until = now + v.timeout_ns, e.ask = min(now + kHostEvery, e.until);
            if (why == 0 && now >= e.ask) {
                e.ask = now + kHostEvery;
                why = load_word(v.host + kCommand);
                const bool is_lost = (load_word(v.host + kLost) >> missing & 1) || load_word(v.window + kLeft + missing);
                if (is_lost && e.lost != missing) {
                    e.lost = missing;
                    e.until = min(e.until, now + min(v.timeout_ns / 2, kGrace));
                }
            }
            if (why == 0 && now >= e.until) why = failure(e.lost == missing ? kPeerLost : kTimeout, missing);
            over = why != 0;
            if (over) fail(v, e.number, why);
        }
    }
    e.broken = __shfl_sync(kWholeWarp, over, 0);
    return e.broken;
}

// The lowest rank that some lane has not seen.
__device__ __forceinline__ int lowest(bool seen, int rank) {
    int missing = seen ? 0x7fffffff : rank;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) missing = min(missing, __shfl_xor_sync(kWholeWarp, missing, d));
    return missing;
}

// One warp tells every rank that this one has come, and what for.
__device__ __forceinline__ void push_header(const ExchangeView& v, const Epoch& e) {
    const uint64_t low = packet(static_cast<uint32_t>(v.fingerprint), e.number);
    const uint64_t high = packet(static_cast<uint32_t>(v.fingerprint >> 32), e.number);
    for (int rank = threadIdx.x % 32; rank < v.world; rank += 32) store_words(slot_at(v, e, rank), low, high);
}

__device__ __forceinline__ uint64_t fingerprint_of(ulonglong2 words) {
    return static_cast<uint64_t>(data_of(words.y)) << 32 | data_of(words.x);
}

// The rank to blame where fingerprints differ: the first outside the largest party; where no party is the largest, the
// first that differs from this rank (comm::verdict). One thread.
static __device__ __noinline__ int rank_out_of_step(const ExchangeView& v, const Epoch& e) {
    const auto at = [&](int rank) { return fingerprint_of(load_words(slot_of(v, e, rank))); };
    const auto party = [&](int rank) {
        int size = 0;
        for (int other = 0; other < v.world; other++) size += at(other) == at(rank);
        return size;
    };
    int most = 0;
    for (int rank = 0; rank < v.world; rank++) most = max(most, party(rank));
    uint64_t right = 0;
    bool found = false, single = true;
    for (int rank = 0; rank < v.world; rank++) {
        if (party(rank) < most) continue;
        single &= !found || at(rank) == right;
        if (!found) right = at(rank);
        found = true;
    }
    if (!single) right = v.fingerprint;
    for (int rank = 0; rank < v.world; rank++) {
        if (at(rank) != right) return rank;
    }
    return v.rank;
}

// One warp waits until every rank has come, for the same as this one. False: the communicator is broken.
__device__ __forceinline__ bool wait_headers(const ExchangeView& v, Epoch& e) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = 0; first < v.world; first += 32) {
        const int rank = first + lane;
        bool seen = rank >= v.world, same = true;
        for (int spins = 1;; spins++) {
            if (!seen) {
                const ulonglong2 words = load_words(slot_of(v, e, rank));
                seen = are_of(words, e.number);
                same = !seen || fingerprint_of(words) == v.fingerprint;
            }
            if (__all_sync(kWholeWarp, seen)) break;
            if (spins % kSpins == 0 && give_up(v, e, lowest(seen, rank))) return false;
        }
        if (!__all_sync(kWholeWarp, same)) {
            // Whom to blame is told by all headers; those of higher ranks may be on their way.
            for (int other = first + 32; other < v.world; other += 32) {
                const int there = min(other + lane, v.world - 1);
                for (int spins = 1;; spins++) {
                    const bool come = are_of(load_words(slot_of(v, e, there)), e.number);
                    if (__all_sync(kWholeWarp, come)) break;
                    if (spins % kSpins == 0 && give_up(v, e, lowest(come, there))) return false;
                }
            }
            if (lane == 0) fail(v, e.number, failure(kDesync, rank_out_of_step(v, e)));
            e.broken = true;
            return false;
        }
    }
    return true;
}

}  // namespace treeattn
