// Packets between ranks, and how a kernel waits for them. The only code that knows how they look.
//
// A word of a slot is 64 bits: 32 of data below a 32-bit flag, the epoch. It is written and read whole, so that a word
// that carries the epoch carries its data, and nothing needs a fence. Ranks write ("push") into each other's windows and
// read their own only.
//
// Every exchange has an epoch. A rank pushes epoch e + 1 only when it has read epoch e to its end, because the launch that
// pushes waits for the end of the one before; and every rank pushes a header to every rank in every epoch, rows or not, and
// waits for all of them. Two slots, one a parity of the epoch, are then enough: src/partial/epoch.rs says why. Where the
// words of a window and of host memory lie is said in src/partial/view.rs.
//
// Numbers of epochs come again after 2^32 - 2 exchanges. A word that nobody has written for so long would pass for new, so the
// whole window is cleaned in between, a piece at a time: see clean_next.
#pragma once

#include "faults.cuh"
#include "odd_rank.cuh"
#include "params.cuh"
#include "ptx.cuh"

namespace treeattn {

constexpr uint32_t kSleep = 200;  // ns between looks of warps that wait for long
constexpr int kSpins = 64;        // looks at a word between two looks at the clock and at what ends a wait
// Time between a warp's looks at host memory, ns: each goes over PCIe, and many of them hold up all reads of the GPU.
constexpr uint64_t kHostEvery = 2'000'000;

// A failure (partial::word::Failure): code | rank << 8 | epoch << 32.
__device__ __forceinline__ uint64_t failure(uint32_t code, uint32_t rank) { return code | rank << kRankShift; }

// How long a rank that has left is still waited for: what it enqueued before may be on its way.
constexpr uint64_t kGrace = 250'000'000;  // ns

// The number of the exchange that follows `ended` ones (epoch::Epoch::after says the same): never 0, which is no epoch, and
// of the other parity than the one before, also where the number wraps. `ended` is a word kConsumed.
__device__ __forceinline__ uint32_t epoch_after(uint64_t ended) {
    const uint64_t n = (ended >> kLaunchShift) + 1;
    const uint64_t x = (n & 0xffffffffu) + kAfterWrap * (n >> 32);
    return static_cast<uint32_t>(x >> 32 == 0 ? x : x - (0x100000000u - kAfterWrap));
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
    const uint32_t sequence = min(0xffffffffu - static_cast<uint32_t>(status >> kHighShift), (1u << 21) - 2);
    return (sequence + 1) << 11 | rank << 5 | (static_cast<uint32_t>(status) & 31);
}
__device__ __forceinline__ uint64_t unpack_fault(uint32_t fault) {
    return pack_status((fault >> 11) - 1, fault & 31, fault >> 5 & 63);
}

// A row begins with its log-sum-exp, as a float and what that lacks; where that is no number, with bad data in place of the
// latter: whatever is bad makes its rows NaN.
__device__ __forceinline__ uint32_t second_word(float2 lse, uint32_t fault) {
    return lse.x != lse.x ? fault : __float_as_uint(lse.y);
}
__device__ __forceinline__ float2 lse_of(uint32_t first, uint32_t second) {
    const float high = __uint_as_float(first);
    return make_float2(high, high != high ? 0.f : __uint_as_float(second));
}
__device__ __forceinline__ uint32_t fault_of(float2 lse, uint32_t second) { return lse.x != lse.x ? second : 0; }

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
    bool broken;       // nothing is sent or waited for any more
    bool has_headers;  // every rank has said that it has come, and for the same
    uint64_t until;    // lane 0: when to give up; 0: no wait has been long yet
    int lost;          // lane 0: the rank that has left, because of which that is soon; -1: none
    uint64_t ask;      // lane 0: when to look at host memory

    // `failed`: the word kFailed, the same for all lanes.
    __device__ __forceinline__ Epoch(uint64_t ended, uint64_t failed)
        : number(epoch_after(ended)), broken(failed != 0), has_headers(false), until(0), lost(-1), ask(0) {}

    __device__ __forceinline__ int parity() const { return number % kSlots; }
};

// Reads where this rank stands, after the dependency wait. One lane says for the warp what has failed: another block may
// fail meanwhile, and lanes that know of it and lanes that do not would wait for each other.
__device__ __forceinline__ Epoch begin_epoch(const ExchangeView& v) {
    const ulonglong2 words = load_words(v.window + kConsumed);
    return Epoch(words.x, __shfl_sync(kAllLanes, words.y, 0));
}

// Tells the host of bad data that some rank has met in an exchange, as pack_status; once, whoever brings it how often.
static __device__ __noinline__ void report_status(const ExchangeView& v, int parity, uint64_t status) {
    auto* told = reinterpret_cast<unsigned long long*>(v.window + kTold + parity);
    if (atomicMax(told, static_cast<unsigned long long>(status)) >= status) return;
    tell_bad_data(v.window + kPending, v.host + kBadData, status);
}

// Notes bad data that this rank's running launch has met, as pack_status, until its epoch is over; and tells the host.
__device__ __forceinline__ void note_bad_data(const ExchangeView& v, uint64_t status) {
    const int parity = epoch_after(load_word(v.window + kConsumed)) % kSlots;
    atomicMax(reinterpret_cast<unsigned long long*>(v.window + kFault + parity), static_cast<unsigned long long>(status));
    report_status(v, parity, status);
}

// Where the slot of `from` begins in every window, in words.
__device__ __forceinline__ int64_t slot_begin(const ExchangeView& v, const Epoch& e, int from) {
    return kControlWords + from * v.slot_words + e.parity() * v.parity_words;
}
// The slot of `from` in this rank's window.
__device__ __forceinline__ const uint64_t* slot_of(const ExchangeView& v, const Epoch& e, int from) {
    return v.window + slot_begin(v, e, from);
}
// The slot of merged rows, in words from the begin of every window.
__device__ __forceinline__ int64_t merged_begin(const ExchangeView& v, const Epoch& e) {
    return v.merged_at + e.parity() * v.slot_words;
}

// Sets a bit of a word, before this thread's next add_word.
static __device__ __noinline__ void leave_over(uint64_t* word, uint64_t bit) {
    atomicOr(reinterpret_cast<unsigned long long*>(word), static_cast<unsigned long long>(bit));
    __threadfence();
}

// A block's word that it needs nothing of this exchange any more but what has come: by one thread of each block, after the
// block has read kConsumed. All blocks of a launch together add 2^kLaunchShift, so that the epoch is the same for all of
// them, and the next launch, which waits for the end of this one, begins the next epoch.
__device__ __forceinline__ void end_block(const ExchangeView& v) {
    const bool is_last = blockIdx.x == gridDim.x - 1;
    add_word(v.window + kConsumed, is_last ? (1u << kLaunchShift) - (gridDim.x - 1) : 1u);
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
    e.broken = __shfl_sync(kAllLanes, over, 0);
    return e.broken;
}

// The lowest rank that some lane has not seen.
__device__ __forceinline__ int lowest(bool seen, int rank) {
    int missing = seen ? 0x7fffffff : rank;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) missing = min(missing, __shfl_xor_sync(kAllLanes, missing, d));
    return missing;
}

// Where this rank pushes to, a copy of ExchangeView::slots in shared memory: the own window last, since the others' words
// have the longer way.
struct SlotTable {
    uint64_t addresses[kMaxRanks][kSlots];

    __device__ __forceinline__ uint64_t* at(uint32_t epoch, int n) const {
        return reinterpret_cast<uint64_t*>(addresses[n][epoch % kSlots]);
    }
    // Which of them is that of `to`.
    static __device__ __forceinline__ int place_of(int to, int rank, int world) {
        const int n = to - rank - 1;
        return n < 0 ? n + world : n;
    }
};
static_assert(kSlots == 2, "16 bytes a rank");

// Words that are cleaned at a time, and the exchanges, of one parity, between two times: often enough that a window of the
// largest size is clean long before numbers come again, seldom enough that it takes no time that could be measured.
constexpr int kCleanWords = 1024;
constexpr uint32_t kCleanEvery = 128;
static_assert(kCleanWords % 64 == 0, "two words a lane at a time");

__device__ __forceinline__ bool is_clean_due(uint32_t epoch) { return epoch / kSlots % kCleanEvery == 0; }

// One warp, before this rank says that it has come, where is_clean_due says so: empties a piece of the slots of the next epoch.
// Nobody reads or writes those now: this rank has read the epoch before to its end, and a peer begins the next one only when it
// has seen that this rank has come for the running one. The fence keeps what peers write then behind what is written here.
static __device__ __noinline__ void clean_next(const ExchangeView& v, uint32_t epoch) {
    const int64_t all = v.parity_words + v.slot_words;  // of a parity: a slot a rank, and that of merged rows
    const int64_t pieces = (all + kCleanWords - 1) / kCleanWords;
    const int64_t begin = epoch / kSlots / kCleanEvery % pieces * kCleanWords;
    const int parity = (epoch + 1) % kSlots;
    uint64_t* const slots = v.window + kControlWords + parity * v.parity_words;
    uint64_t* const merged = v.window + v.merged_at + parity * v.slot_words - v.parity_words;
#pragma unroll 1
    for (int64_t word = begin + threadIdx.x % 32 * 2; word < min(begin + kCleanWords, all); word += 64) {
        store_words((word < v.parity_words ? slots : merged) + word, 0, 0);
    }
    __syncwarp();
    __threadfence_system();
}

// One warp of the last block clears what the next epoch counts and notes.
__device__ __forceinline__ void clear_next(const ExchangeView& v, const Epoch& e) {
    const int lane = threadIdx.x % 32, parity = e.parity() ^ 1;
    if (lane < 4) store_word(v.window + (lane == 0 ? kFault : lane == 1 ? kTickets : lane == 2 ? kDecided : kTold) + parity, 0);
    if (lane < kLeftOverWords) store_word(v.window + kLeftOver + parity * kLeftOverWords + lane, 0);
}

// Whether this rank has said that it has come: its own window has its header then, too.
__device__ __forceinline__ bool has_announced(const Epoch& e, const SlotTable& to, int world) {
    return is_of(__shfl_sync(kAllLanes, load_word(to.at(e.number, world - 1)), 0), e.number);
}

// One warp of the last block, as soon as that runs, and perhaps again: tells every rank that this one has come, and what for. Blocks come up
// in the order of their numbers, so all of this launch run then, or have run: what they push comes without any other
// launch's room or end.
static __device__ __noinline__ void push_header(const ExchangeView& v, const Epoch& e, const SlotTable& to) {
    const int lane = threadIdx.x % 32;
    clear_next(v, e);
    if (e.broken) return;
    if (is_clean_due(e.number) && !has_announced(e, to, v.world)) clean_next(v, e.number);
    const uint64_t low = packet(static_cast<uint32_t>(v.fingerprint), e.number);
    const uint64_t high = packet(static_cast<uint32_t>(v.fingerprint >> 32), e.number);
    for (int n = lane; n < v.world; n += 32) store_words(to.at(e.number, n), low, high);
}

__device__ __forceinline__ uint64_t fingerprint_of(ulonglong2 words) {
    return static_cast<uint64_t>(data_of(words.y)) << 32 | data_of(words.x);
}

// The rank to blame where fingerprints differ. One thread.
static __device__ __noinline__ int rank_out_of_step(const ExchangeView& v, const Epoch& e) {
    return odd_rank(v.world, v.rank, [&](int rank) { return fingerprint_of(load_words(slot_of(v, e, rank))); });
}

// Ranks that have come differ in what for: one warp waits for the headers that may still be on their way, for whom to blame
// is told by all of them, and fails the communicator.
static __device__ __noinline__ void fail_out_of_step(const ExchangeView& v, Epoch& e) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = 0; first < v.world; first += 32) {
        const int rank = min(first + lane, v.world - 1);
        for (int spins = 1;; spins++) {
            const bool seen = are_of(load_words(slot_of(v, e, rank)), e.number);
            if (__all_sync(kAllLanes, seen)) break;
            if (spins % kSpins == 0 && give_up(v, e, lowest(seen, rank))) return;
        }
    }
    if (lane == 0) fail(v, e.number, failure(kDesync, rank_out_of_step(v, e)));
    e.broken = true;
}

// One warp waits until every rank has come, for the same as this one; at most `most` nanoseconds, or, where that is 0, until
// it fails: the communicator is broken then. Whether all have come.
static __device__ __noinline__ bool wait_headers(const ExchangeView& v, Epoch& e, uint64_t most) {
    const uint64_t until = most == 0 ? 0 : nanoseconds() + most;
    for (int spins = 1; !e.broken && !e.has_headers; spins++) {
        bool seen = true, same = true;
        int late = v.world;
#pragma unroll 1
        for (int rank = threadIdx.x % 32; rank < v.world; rank += 32) {
            const ulonglong2 words = load_words(slot_of(v, e, rank));
            const bool come = are_of(words, e.number);
            if (!come) late = min(late, rank);
            seen &= come;
            same &= !come || fingerprint_of(words) == v.fingerprint;
        }
        if (!__all_sync(kAllLanes, same)) {
            fail_out_of_step(v, e);
        } else if (__all_sync(kAllLanes, seen)) {
            e.has_headers = true;
        } else if (most != 0) {
            if (__any_sync(kAllLanes, nanoseconds() >= until)) break;
        } else if (spins % kSpins == 0) {
            give_up(v, e, lowest(seen, late));
        } else if (spins > kSpins) {
            __nanosleep(kSleep);
        }
    }
    return e.has_headers;
}

}  // namespace treeattn
