// The check of a plan with the flag CHECKED. Before the step: an exchange in which ranks tell each other what they were
// passed of each sequence, and judge whether it fits together. After it: NaN for the sequences in which it does not.
//
// The exchange is one like any other, with an epoch of its own in the slots of the windows; what a rank pushes of a sequence
// is its record. src/attention/record.rs has the same records and judges them the same way, for CPUs.
#include "merge_step.cuh"
#include "numbers.cuh"
#include "query_rows.cuh"
#include "schedule.cuh"

namespace treeattn {

constexpr int kAhead = 4;                        // loads that a thread has under way
constexpr int kRecordPairs = kRecordWords / 2;   // pairs of words
constexpr uint32_t kNoRank = 0xffffff;           // no rank is to blame

// What one rank tells of one sequence (attention::SequenceRecord).
struct SequenceRecord {
    uint64_t query;           // sum of `mixed` over the words of its query rows
    uint64_t query_position;  // the same over the positions of its query tokens
    int64_t start;            // contiguous: the position of its first key here; explicit: its keys here at other positions than
                              // those below global_length
    uint64_t powers[3];       // explicit: sums of the first three powers of the positions here below global_length; else, with
                              // surplus keys: in the first how many positions its queries see
    int32_t first_token;
    int32_t tokens;
    int32_t global_length;
    int32_t keys;             // here; explicit: at positions below global_length; -1: bad data, which the step reports
};
static_assert(sizeof(SequenceRecord) == kRecordWords * sizeof(uint32_t), "words of a record");

// Sums that the threads of a block make together.
struct RecordSums {
    uint64_t query, query_position, powers[3], inside;
    bool is_bad;
};
constexpr int kSums = 6;

struct CheckState {
    SlotTable slots;
    SequenceRecord own;             // of the current sequence
    SequenceRecord all[kMaxRanks];  // of all ranks
    unsigned long long sums[kSums];
    int taken;
    int seen;  // positions that queries see, from 0 on
    int is_bad;
};

// Mixes the word with number `index` of an input, so that sums of mixed words differ where inputs do: the finaliser of
// MurmurHash3, by Austin Appleby, in the public domain.
__device__ __forceinline__ uint64_t mixed(uint64_t index, uint64_t word) {
    uint64_t x = word + (index + 1) * 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 33) * 0xff51afd7ed558ccdull;
    x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ull;
    return x ^ x >> 33;
}

// The token after the last query token of the sequences before b. Called by the whole block.
__device__ __forceinline__ int taken_before(const DecodeParams& p, int b, CheckState& s) {
    if (p.query_start == nullptr) return 0;
    int taken = 0;
    for (int i = 1 + threadIdx.x; i <= b; i += blockDim.x) taken = max(taken, min(p.query_start[i], p.query_tokens));
    taken = warp_max(taken);
    if (threadIdx.x % 32 == 0) atomicMax(&s.taken, taken);
    __syncthreads();
    return s.taken;
}

// The calling thread's part of the sum over the query rows of a sequence.
__device__ __forceinline__ uint64_t sum_queries(const DecodeParams& p, const Sequence& seq) {
    const QueryRows rows(p.q, p.q_stride, element_bytes(p.q_dtype));
    const int words = p.head_dim_qk * rows.size / 8;
    const int64_t total = static_cast<int64_t>(seq.tokens) * p.q_heads * words;
    uint64_t sum = 0;
#pragma unroll 1
    for (int64_t first = threadIdx.x; first < total; first += kAhead * blockDim.x) {
        uint64_t x[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; k++) {
            const int64_t i = first + k * blockDim.x;
            if (i >= total) continue;
            const int64_t row = token_of(i, words), token = token_of(row, p.q_heads);
            x[k] = rows.load(seq.first_token + token, row - token * p.q_heads, static_cast<int>(i - row * words));
        }
#pragma unroll
        for (int k = 0; k < kAhead; k++) {
            const int64_t i = first + k * blockDim.x;
            if (i < total) sum += mixed(i, x[k]);
        }
    }
    return sum;
}

// The calling thread's part of the sums over the positions of a sequence's keys, with explicit placement.
__device__ __forceinline__ void sum_positions(const CheckParams& c, int b, int keys, RecordSums& sums) {
    const DecodeParams& p = c.step;
    const int32_t* positions = p.kv_position + b * p.kv_position_stride;
    const int length = p.global_length[b];
#pragma unroll 1
    for (int64_t first = threadIdx.x; first < keys; first += kAhead * blockDim.x) {
        int x[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; k++) {
            const int64_t slot = first + static_cast<int64_t>(k) * blockDim.x;
            x[k] = slot < keys ? positions[slot] : INT32_MAX;
        }
#pragma unroll
        for (int k = 0; k < kAhead; k++) {
            if (x[k] < 0) sums.is_bad |= c.needs_positions != 0;
            // INT32_MAX is below no length.
            if (x[k] < 0 || x[k] >= length) continue;
            const uint64_t position = x[k], square = position * position;
            sums.powers[0] += position, sums.powers[1] += square, sums.powers[2] += square * position;
            sums.inside++;
        }
    }
}

// The calling thread's part of a check of what `read_sequence` does not look at: pages and positions. The step itself reports
// such values as bad data, so that they are no disagreement of ranks.
__device__ __forceinline__ bool is_bad_data(const CheckParams& c, int b, const Sequence& seq) {
    const DecodeParams& p = c.step;
    bool is_bad = false;
    if (p.kv_layout != kStrided) {
        const int32_t* table = p.kv_layout == kBlockTable ? p.block_table : p.page_indices;
        const int pages = static_cast<int>((static_cast<int64_t>(seq.keys) + p.page_size - 1) / p.page_size);
        for (int64_t i = threadIdx.x; i < pages; i += blockDim.x) {
            const int page = table[seq.page_row + i];
            is_bad |= page < 0 || page >= p.num_pages;
        }
    }
    return is_bad || (c.needs_positions != 0 && !positions_fit(p, b, seq.tokens, seq.keys));
}

// Makes the record of sequence b in `s.own`. Called by the whole block, which may read the record after the next barrier.
__device__ __forceinline__ void make_record(const CheckParams& c, int b, CheckState& s) {
    const DecodeParams& p = c.step;
    if (threadIdx.x < kSums) s.sums[threadIdx.x] = 0;
    if (threadIdx.x == 0) s.taken = 0, s.seen = 0, s.is_bad = 0;
    __syncthreads();
    int taken = taken_before(p, b, s);
    const Sequence seq = read_sequence<1, false>(p, b, taken);
    const bool has_keys = seq.tokens > 0 && seq.keys > 0;
    RecordSums sums = {};
    if (seq.fault == kFaultNone) {
        sums.query = sum_queries(p, seq);
        const int length = p.global_length == nullptr ? 0 : p.global_length[b];
#pragma unroll 1
        for (int i = threadIdx.x; i < seq.tokens; i += blockDim.x) {
            // Wraps only where the length has no room for the queries, which is alike on all ranks.
            const uint32_t implied = static_cast<uint32_t>(length) - seq.tokens + i;
            const int position =
                p.query_position == nullptr ? static_cast<int>(implied) : p.query_position[seq.first_token + i];
            sums.query_position += mixed(i, static_cast<uint32_t>(position));
            if (p.query_position != nullptr && has_keys && position < 0) sums.is_bad |= c.needs_positions != 0;
            if (c.surplus_keys != 0 && position >= 0) atomicMax(&s.seen, min(position, INT32_MAX - 1) + 1);
        }
        if (has_keys) {
            sums.is_bad |= is_bad_data(c, b, seq);
            if (p.placement == kExplicit) sum_positions(c, b, seq.keys, sums);
        }
    }
    const uint64_t parts[kSums] = {sums.query,     sums.query_position, sums.powers[0],
                                   sums.powers[1], sums.powers[2],      sums.inside};
#pragma unroll
    for (int i = 0; i < kSums; i++) {
        const uint64_t sum = warp_sum(parts[i]);
        if (threadIdx.x % 32 == 0 && sum != 0) atomicAdd(&s.sums[i], static_cast<unsigned long long>(sum));
    }
    if (sums.is_bad) atomicOr(&s.is_bad, 1);
    __syncthreads();
    if (threadIdx.x != 0) return;
    SequenceRecord r = {};
    r.first_token = seq.first_token, r.tokens = seq.tokens, r.keys = -1;
    if (seq.fault == kFaultNone && s.is_bad == 0) {
        r.query = s.sums[0], r.query_position = s.sums[1];
        r.global_length = p.global_length == nullptr ? 0 : p.global_length[b];
        r.keys = has_keys ? seq.keys : 0;
        if (p.placement == kContiguous) {
            r.start = start_of(p, b);
        } else if (p.placement == kExplicit) {
            const int inside = static_cast<int>(s.sums[5]);
            r.start = r.keys - inside, r.keys = inside;
            for (int i = 0; i < 3; i++) r.powers[i] = s.sums[2 + i];
        }
        if (c.surplus_keys != 0 && p.placement != kExplicit) r.powers[0] = s.seen;
    }
    s.own = r;
}

// Pushes `s.own` to every rank, as the n-th record of the exchange. Called by the whole block.
__device__ __forceinline__ void push_record(const CheckState& s, const Epoch& e, int world, int n) {
    if (e.broken) return;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(&s.own);
    for (int i = threadIdx.x; i < world * kRecordPairs; i += blockDim.x) {
        const int pair = i % kRecordPairs;
        uint64_t* to = s.slots.at(e.number, i / kRecordPairs) + kHeaderWords + static_cast<int64_t>(n) * kRecordWords;
        store_words(to + 2 * pair, packet(words[2 * pair], e.number), packet(words[2 * pair + 1], e.number));
    }
}

// One warp waits for the n-th record of every rank. False: the communicator is broken.
__device__ __forceinline__ bool wait_records(const ExchangeView& v, Epoch& e, int n, SequenceRecord* all) {
    const int lane = threadIdx.x % 32, pairs = v.world * kRecordPairs;
#pragma unroll 1
    for (int first = 0; first < pairs; first += 32) {
        const int i = min(first + lane, pairs - 1), rank = i / kRecordPairs, pair = i % kRecordPairs;
        const uint64_t* from = slot_of(v, e, rank) + kHeaderWords + static_cast<int64_t>(n) * kRecordWords + 2 * pair;
        ulonglong2 words;
        for (int spins = 1;; spins++) {
            words = load_words(from);
            const bool come = are_of(words, e.number);
            if (__all_sync(kAllLanes, come)) break;
            if (spins % kSpins == 0) {
                if (give_up(v, e, lowest(come, rank))) return false;
            } else if (spins > kSpins) {
                __nanosleep(kSleep);
            }
        }
        if (first + lane >= pairs) continue;
        uint32_t* to = reinterpret_cast<uint32_t*>(all + rank) + 2 * pair;
        to[0] = data_of(words.x), to[1] = data_of(words.y);
    }
    __syncwarp();
    return true;
}

// What is wrong with a sequence, and the rank to blame; kFaultNone: nothing.
struct Verdict {
    uint32_t cause, rank;
};

// The query tokens that ranks count to a sequence, as one range: its first token and its length. It holds no token of a
// sequence on which all ranks agree, because that one lies wholly before or wholly after this one on every rank.
__device__ __forceinline__ int2 tokens_of(const DecodeParams& p, const SequenceRecord* all) {
    int begin = p.query_tokens, end = 0;
    for (int rank = 0; rank < p.exchange.world; rank++) {
        begin = min(begin, max(all[rank].first_token, 0));
        end = max(end, min(all[rank].first_token, p.query_tokens) + min(all[rank].tokens, p.query_tokens));
    }
    return make_int2(begin, max(min(end, p.query_tokens) - begin, 0));
}

// The first rank whose value is not that of most ranks or, where two values are equally frequent, not that of rank 0. -1: all
// ranks have the same value.
template <class Value>
__device__ __forceinline__ int odd_rank(int world, const Value& value) {
    bool same = true;
    for (int rank = 1; rank < world; rank++) same &= value(rank) == value(0);
    if (same) return -1;
    const auto party = [&](int rank) {
        int size = 0;
        for (int other = 0; other < world; other++) size += value(other) == value(rank);
        return size;
    };
    int most = 0, leader = -1;
    for (int rank = 0; rank < world; rank++) most = max(most, party(rank));
    bool is_single = true;
    for (int rank = 0; rank < world; rank++) {
        if (party(rank) < most) continue;
        if (leader < 0) leader = rank;
        is_single &= value(rank) == value(leader);
    }
    if (!is_single) leader = 0;
    for (int rank = 0; rank < world; rank++) {
        if (value(rank) != value(leader)) return rank;
    }
    return -1;
}

// Whether ranks hold the positions 0 to `length` - 1, each once, with contiguous placement.
static __device__ __noinline__ Verdict judge_contiguous(const SequenceRecord* all, int world, int64_t length) {
    const auto begin = [&](int rank) { return all[rank].start; };
    const auto end = [&](int rank) { return min(all[rank].start + all[rank].keys, length); };
    const auto has = [&](int rank) { return begin(rank) < end(rank); };
    // Most often the ranges follow each other in rank order.
    int64_t covered = 0;
    bool in_order = true;
    for (int rank = 0; rank < world; rank++) {
        if (has(rank)) in_order &= begin(rank) == covered, covered = end(rank);
    }
    if (in_order && covered == length) return {kFaultNone, kNoRank};
    for (int rank = 0; rank < world; rank++) {
        for (int other = 0; other < rank; other++) {
            if (has(rank) && has(other) && begin(other) < end(rank) && begin(rank) < end(other)) {
                return {kFaultKeysTwice, static_cast<uint32_t>(rank)};
            }
        }
    }
    // No two ranges overlap here. Each pass over the ranks looks for the range that begins where the last one ended.
    uint32_t last = kNoRank;
    covered = 0;
    for (bool found = true; found;) {
        found = false;
        for (int rank = 0; rank < world && !found; rank++) {
            if (has(rank) && begin(rank) == covered) covered = end(rank), last = rank, found = true;
        }
    }
    if (covered >= length) return {kFaultNone, kNoRank};
    // To blame is the rank whose range ends before the gap or, where none begins at 0, the rank whose range begins first.
    if (last != kNoRank) return {kFaultKeysMissing, last};
    int64_t next = INT64_MAX;
    for (int rank = 0; rank < world; rank++) {
        if (has(rank) && begin(rank) > covered && begin(rank) < next) next = begin(rank), last = rank;
    }
    return {kFaultKeysMissing, last};
}

// The sums of the powers of the positions 0 to `length` - 1.
__device__ __forceinline__ void all_powers(int length, uint64_t (&powers)[3]) {
    const uint64_t n = max(length, 0);
    const uint64_t first = n == 0 ? 0 : n * (n - 1) / 2, odd = n == 0 ? 0 : 2 * n - 1;
    powers[0] = first;
    // One of the factors is a multiple of 3.
    powers[1] = first % 3 == 0 ? first / 3 * odd : first * (odd / 3);
    powers[2] = first * first;
}

// Judges the records of a sequence (attention::record::judge). One thread.
static __device__ __noinline__ Verdict judge(const CheckParams& c, const SequenceRecord* all) {
    const DecodeParams& p = c.step;
    const int world = p.exchange.world;
    const auto blame = [](uint32_t cause, int rank) { return Verdict{cause, static_cast<uint32_t>(rank)}; };
    const Verdict fine = {kFaultNone, kNoRank};
    for (int rank = 0; rank < world; rank++) {
        if (all[rank].keys < 0) return fine;
    }
    int odd = odd_rank(world, [&](int rank) {
        return static_cast<uint64_t>(static_cast<uint32_t>(all[rank].first_token)) << 32 |
               static_cast<uint32_t>(all[rank].tokens);
    });
    if (odd >= 0) return blame(kFaultQueryStartDiffers, odd);
    odd = odd_rank(world, [&](int rank) { return all[rank].global_length; });
    if (odd >= 0) return blame(kFaultGlobalLengthDiffers, odd);
    odd = odd_rank(world, [&](int rank) { return all[rank].query_position; });
    if (odd >= 0) return blame(kFaultQueryPositionDiffers, odd);
    odd = odd_rank(world, [&](int rank) { return all[rank].query; });
    if (odd >= 0) return blame(kFaultQueryDiffers, odd);
    // Where there are no queries nothing is attended.
    if (all[0].tokens == 0) return fine;
    const int64_t length = all[0].global_length;
    for (int rank = 0; rank < world && c.surplus_keys == 0; rank++) {
        const SequenceRecord& r = all[rank];
        const bool is_outside = p.placement == kContiguous  ? r.keys > 0 && (r.start < 0 || r.start + r.keys > length)
                                : p.placement == kInterleaved ? r.keys > interleaved_length(p, rank, length)
                                                              : r.start > 0;
        if (is_outside) return blame(kFaultKeysOutside, rank);
    }
    // Surplus keys count as far as queries see.
    const int64_t wanted_length = p.placement == kExplicit ? length : max(length, static_cast<int64_t>(all[0].powers[0]));
    if (p.placement == kContiguous) return judge_contiguous(all, world, wanted_length);
    if (p.placement == kInterleaved) {
        for (int rank = 0; rank < world; rank++) {
            if (all[rank].keys < interleaved_length(p, rank, wanted_length)) return blame(kFaultKeysMissing, rank);
        }
        return fine;
    }
    int64_t keys = 0;
    uint64_t powers[3] = {}, wanted[3];
    for (int rank = 0; rank < world; rank++) {
        keys += all[rank].keys;
        for (int i = 0; i < 3; i++) powers[i] += all[rank].powers[i];
    }
    all_powers(all[0].global_length, wanted);
    const bool same = powers[0] == wanted[0] && powers[1] == wanted[1] && powers[2] == wanted[2];
    if (keys > length || (keys == length && !same)) return {kFaultKeysTwice, kNoRank};
    return keys < length ? Verdict{kFaultKeysMissing, kNoRank} : fine;
}

}  // namespace treeattn

extern "C" __global__ void __launch_bounds__(treeattn::kRowThreads, treeattn::kExchangeBlocksAUnit)
    treeattn_check(const __grid_constant__ treeattn::CheckParams c) {
    using namespace treeattn;
    __shared__ CheckState s;
    const ExchangeView& v = c.step.exchange;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    if (threadIdx.x < v.world) {
        const ulonglong2 slots = *reinterpret_cast<const ulonglong2*>(v.slots + threadIdx.x * kSlots);
        s.slots.addresses[threadIdx.x][0] = slots.x, s.slots.addresses[threadIdx.x][1] = slots.y;
    }
    dependency_wait();
    Epoch e = begin_epoch(v);
    __syncthreads();
    if (blockIdx.x == gridDim.x - 1 && warp == warps - 1) push_header(v, e, s.slots);
    delay(DelayPoint::kPush, e.number);
    // A block pushes all its records before it waits for any, so that no two blocks wait for each other. Warps may differ on
    // whether the communicator is broken, so every warp takes every barrier.
#pragma unroll 1
    for (int n = blockIdx.x; n < c.count; n += gridDim.x) {
        make_record(c, c.first + n, s);
        __syncthreads();
        push_record(s, e, v.world, n);
    }
    // Every warp of the block has read the epoch.
    __syncthreads();
    if (threadIdx.x == 0) end_block(v);
    if (warp != 0) return;
    delay(DelayPoint::kWait, e.number);
    // Every rank's check kernel runs by then, or has run. What this one still waits for needs no free multiprocessor, so that
    // dependent launches may start.
    if (!e.broken && wait_headers(v, e, 0)) dependency_launch();
#pragma unroll 1
    for (int n = blockIdx.x; n < c.count; n += gridDim.x) {
        const bool has_come = !e.broken && wait_records(v, e, n, s.all);
        if (threadIdx.x == 0) {
            const uint32_t b = c.first + n;
            int2 wrong = make_int2(0, 0);
            const Verdict found = has_come ? judge(c, s.all) : Verdict{kFaultNone, kNoRank};
            if (found.cause != kFaultNone) {
                wrong = tokens_of(c.step, s.all);
                report_status(v, e.parity(), pack_status(b, found.cause, found.rank));
            }
            c.wrong[b] = wrong;
        }
        __syncwarp();
    }
    delay(DelayPoint::kConsume, e.number);
}

// After the step: NaN in the rows of the sequences that do not fit together.
extern "C" __global__ void __launch_bounds__(treeattn::kRowThreads)
    treeattn_check_outputs(const __grid_constant__ treeattn::CheckParams c) {
    using namespace treeattn;
    dependency_wait();
    const RowTarget& target = c.step.target;
    const int heads = c.step.exchange.own_heads;
#pragma unroll 1
    for (int b = blockIdx.x; b < c.step.batch; b += gridDim.x) {
        const int2 wrong = c.wrong[b];
        const int64_t elements = static_cast<int64_t>(wrong.y) * heads * target.dim;
#pragma unroll 1
        for (int64_t i = threadIdx.x; i < elements; i += blockDim.x) {
            const int64_t row = i / target.dim, token = row / heads, d = i - row * target.dim;
            const int64_t at = wrong.x + token, head = row - token * heads;
            store_element(target.row(at, head) + d * target.o_stride[2], target.dtype, not_a_number());
            if (d == 0 && target.lse != nullptr) *target.lse_of(at, head) = not_a_number();
        }
    }
}

TREEATTN_CHECK_ABI(check)
