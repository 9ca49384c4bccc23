// Who does what, and in which order partials merge. Split borders and merge order are decided here and nowhere else.
//
// All work lies on one flat line: sequence after sequence, in it kv head after kv head, query tile after query tile,
// and along a query tile (an *item*) its key tiles of kTile keys. An item without keys still counts one unit, so that
// somebody owns its rows. Block g of the grid takes units [g * slice, (g + 1) * slice). Each block finds its slice by
// itself from the lengths. An item that one block holds whole is finished there. Of any other item every block
// leaves one partial, and the last block to come merges them in index order; above kFanIn partials this happens in
// two levels, groups of kFanIn first. Slices are large enough for that to do.
#pragma once

#include "ll.cuh"
#include "params.cuh"
#include "ptx.cuh"
#include "sequence.cuh"

namespace treeattn {

static_assert(kTile == 16, "keys of a tile are one k-step of the tensor core's second product");
static_assert(kMostPartials == kFanIn * kFanIn, "partials of an item are merged in two levels");

// Units a block. `items` of equal length that the grid can share out evenly get borders at item ends, if that costs at
// most 1/16: fewer blocks then hold two items, and an item has fewer partials.
__device__ __forceinline__ int64_t slice_units(int64_t total, int64_t items, int64_t longest) {
    const int64_t grid = gridDim.x;
    int64_t slice = (total + grid - 1) / grid;
    if (items > 0 && items <= grid && total == items * longest) {
        const int64_t blocks = grid / items;
        const int64_t even = (longest + blocks - 1) / blocks;
        if (even * 16 <= slice * 17) slice = even;
    }
    // An item may begin inside a slice, and so have a part more than it has slices.
    slice = max(slice, (longest + kMostPartials - 2) / (kMostPartials - 1));
    return max(slice, static_cast<int64_t>(kMinTiles));
}

// Which part of an item a block holds.
struct Split {
    int first_block;
    int count;  // partials of the item; 1: the block holds it whole
    int index;  // of this block's
};

// The short way for a single sequence whose items the grid can share out with little left over: block g holds part
// g % blocks of item g / blocks. Which item that is does not depend on the length.
struct EvenSplit {
    int blocks;  // of an item; 0: take the flat line
    int index, first_block;
    int head, row_tile;

    // Part i takes every blocks-th group of `tiles` key tiles, beginning at group i.
    __device__ __forceinline__ Split split(int key_tiles, int tiles) const {
        return Split{first_block, min(blocks, (key_tiles + tiles - 1) / tiles), index};
    }
};

__device__ __forceinline__ EvenSplit even_split_of(const DecodeParams& p, int rows) {
    EvenSplit s;
    s.blocks = 0;
    if (p.batch != 1 || p.query_start != nullptr || p.query_tokens == 0) return s;
    const unsigned row_tiles = (static_cast<unsigned>(p.query_tokens) * p.group + rows - 1) / rows;
    const unsigned items = row_tiles * p.kv_heads, grid = gridDim.x;
    if (items > grid) return s;
    const unsigned blocks = min(grid / items, static_cast<unsigned>(kMostPartials));
    if (items * blocks * 16 < grid * 15 && items * blocks > 16) return s;
    if (blockIdx.x >= items * blocks) {
        // Left over: a part past the end of the last item.
        s.index = blocks, s.first_block = (items - 1) * blocks;
    } else {
        s.first_block = blockIdx.x / blocks * blocks;
        s.index = blockIdx.x - s.first_block;
    }
    const unsigned item = s.first_block / blocks;
    s.head = row_tiles == 1 ? item : item / row_tiles;
    s.row_tile = item - s.head * row_tiles;
    s.blocks = blocks;
    return s;
}

// A block's slice of the flat line.
struct BlockSlice {
    int64_t units;            // of every block but the last ones
    int64_t begin, end;       // the block's; begin >= end: none
    int64_t sequence_begin;   // first unit of sequence b
    int b;
    int taken;
};

struct SliceScratch {
    int64_t warp_units[32];
    int64_t units, items;
    int longest, sorted;
    int64_t found_begin;
    int found;
    int warp_flags[32];
};

__device__ __forceinline__ int64_t warp_prefix(int64_t x, int lane) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const int64_t y = __shfl_up_sync(kAllLanes, x, d);
        if (lane >= d) x += y;
    }
    return x;
}
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
    return x;
}
__device__ __forceinline__ int warp_max(int x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x = max(x, __shfl_xor_sync(kAllLanes, x, d));
    return x;
}

// Whether the query tokens of sequence b follow on those of its predecessor as they should, seen from b alone.
__device__ __forceinline__ bool starts_in_order(const DecodeParams& p, int b) {
    if (p.query_start == nullptr) return true;
    const int begin = p.query_start[b], end = p.query_start[b + 1];
    return begin >= 0 && end >= begin && end <= p.query_tokens;
}

// The honest but slow way, for a query_start that is out of order: one sequence after the other.
template <int Rows, bool Terms>
__device__ __noinline__ BlockSlice find_slice_serially(const DecodeParams& p) {
    BlockSlice slice;
    slice.b = 0, slice.taken = 0, slice.sequence_begin = 0;
    int64_t total = 0, items = 0, longest = 0;
    int taken = 0;
#pragma unroll 1
    for (int b = 0; b < p.batch; b++) {
        const SequenceOf<Terms> s = read_sequence<Rows, Terms>(p, b, taken);
        if (s.fault != kFaultNone && blockIdx.x == 0 && threadIdx.x == 0) report_with_value<Terms>(p, b, s.fault);
        total += s.units(p.kv_heads);
        items += static_cast<int64_t>(s.row_tiles) * p.kv_heads;
        if (s.row_tiles > 0) longest = max(longest, static_cast<int64_t>(s.key_tiles));
    }
    slice.units = slice_units(total, items, longest);
    slice.begin = min(blockIdx.x * slice.units, total);
    slice.end = min(slice.begin + slice.units, total);
    taken = 0;
    int64_t begin = 0;
#pragma unroll 1
    for (int b = 0; b < p.batch && slice.begin < slice.end; b++) {
        const int before = taken;
        const int64_t next = begin + read_sequence<Rows, Terms>(p, b, taken).units(p.kv_heads);
        if (slice.begin < next) {
            slice.b = b, slice.taken = before, slice.sequence_begin = begin;
            break;
        }
        begin = next;
    }
    return slice;
}

// Finds the block's slice. Batches of up to 32 need no barrier: every warp finds it for itself.
template <int Rows, bool Terms>
__device__ __noinline__ BlockSlice find_slice(const DecodeParams& p, SliceScratch* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    BlockSlice slice;
    slice.begin = slice.end = 0;
    slice.b = 0, slice.taken = 0, slice.sequence_begin = 0;
    if (p.batch <= 32) {
        SequenceOf<Terms> s;
        int64_t units = 0;
        int items = 0, longest = 0;
        bool sorted = true;
        if (lane < p.batch) {
            sorted = starts_in_order(p, lane);
            int taken = p.query_start == nullptr ? 0 : p.query_start[lane];
            s = read_sequence<Rows, Terms>(p, lane, taken);
            units = s.units(p.kv_heads);
            items = s.row_tiles * p.kv_heads;
            longest = s.row_tiles > 0 ? s.key_tiles : 0;
        }
        if (__all_sync(kAllLanes, sorted)) {
            if (lane < p.batch && s.fault != kFaultNone && blockIdx.x == 0 && warp == 0) report_with_value<Terms>(p, lane, s.fault);
            int64_t end = units, total = units, all = items;
            if (p.batch > 1) {
                end = warp_prefix(units, lane);
                total = __shfl_sync(kAllLanes, end, 31);
                all = warp_sum<int64_t>(items);
            } else {
                total = __shfl_sync(kAllLanes, units, 0);
                all = __shfl_sync(kAllLanes, items, 0);
            }
            slice.units = slice_units(total, all, warp_max(longest));
            slice.begin = min(blockIdx.x * slice.units, total);
            slice.end = min(slice.begin + slice.units, total);
            const uint32_t after = __ballot_sync(kAllLanes, lane < p.batch && slice.begin < end);
            const int b = after == 0 ? 0 : __ffs(after) - 1;
            slice.b = b;
            slice.sequence_begin = __shfl_sync(kAllLanes, end - units, b);
            slice.taken = p.query_start == nullptr || after == 0 ? 0 : p.query_start[b];
            return slice;
        }
        return find_slice_serially<Rows, Terms>(p);
    }

    // Two passes over the batch, blockDim.x sequences at a time: the total, then the slice.
    const int warps = blockDim.x / 32;
    int64_t total = 0, items = 0;
    int longest = 0;
    bool sorted = true;
#pragma unroll 1
    for (int b = threadIdx.x; b < p.batch; b += blockDim.x) {
        sorted = sorted && starts_in_order(p, b);
        int taken = p.query_start == nullptr ? 0 : p.query_start[b];
        const SequenceOf<Terms> s = read_sequence<Rows, Terms>(p, b, taken);
        total += s.units(p.kv_heads);
        items += static_cast<int64_t>(s.row_tiles) * p.kv_heads;
        if (s.row_tiles > 0) longest = max(longest, s.key_tiles);
    }
    total = warp_sum(total), items = warp_sum(items), longest = warp_max(longest);
    if (threadIdx.x == 0) scratch->units = 0, scratch->items = 0, scratch->longest = 0, scratch->sorted = 1;
    __syncthreads();
    if (lane == 0) {
        atomicAdd(reinterpret_cast<unsigned long long*>(&scratch->units), static_cast<unsigned long long>(total));
        atomicAdd(reinterpret_cast<unsigned long long*>(&scratch->items), static_cast<unsigned long long>(items));
        atomicMax(&scratch->longest, longest);
    }
    if (!sorted) scratch->sorted = 0;
    __syncthreads();
    if (scratch->sorted == 0) {
        return find_slice_serially<Rows, Terms>(p);
    }
    total = scratch->units;
    slice.units = slice_units(total, scratch->items, scratch->longest);
    slice.begin = min(blockIdx.x * slice.units, total);
    slice.end = min(slice.begin + slice.units, total);
    if (slice.begin >= slice.end && blockIdx.x != 0) return slice;
    int64_t begin = 0;
#pragma unroll 1
    for (int first = 0; first < p.batch; first += blockDim.x) {
        const int b = first + threadIdx.x;
        int64_t units = 0;
        if (b < p.batch) {
            int taken = p.query_start == nullptr ? 0 : p.query_start[b];
            const SequenceOf<Terms> s = read_sequence<Rows, Terms>(p, b, taken);
            units = s.units(p.kv_heads);
            if (s.fault != kFaultNone && blockIdx.x == 0) report_with_value<Terms>(p, b, s.fault);
        }
        const int64_t inclusive = warp_prefix(units, lane);
        if (lane == 31) scratch->warp_units[warp] = inclusive;
        if (threadIdx.x == 0) scratch->found = -1;
        __syncthreads();
        int64_t before = begin;
#pragma unroll 1
        for (int w = 0; w < warps; w++) {
            if (w < warp) before += scratch->warp_units[w];
            begin += scratch->warp_units[w];
        }
        const int64_t end = before + inclusive;
        if (units > 0 && slice.begin < end && slice.begin >= end - units) {
            scratch->found = b;
            scratch->found_begin = end - units;
        }
        __syncthreads();
        const int found = scratch->found;
        const int64_t found_begin = scratch->found_begin;
        __syncthreads();
        if (found >= 0 && slice.begin < slice.end) {
            slice.b = found;
            slice.sequence_begin = found_begin;
            slice.taken = p.query_start == nullptr ? 0 : p.query_start[found];
            if (blockIdx.x != 0) break;  // block 0 goes on: it reports the faults of all
        }
    }
    return slice;
}

__device__ __forceinline__ Split split_of(int64_t item_begin, int key_tiles, int64_t slice) {
    Split s;
    s.first_block = static_cast<int>(item_begin / slice);
    s.count = static_cast<int>((item_begin + key_tiles - 1) / slice) - s.first_block + 1;
    s.index = static_cast<int>(blockIdx.x) - s.first_block;
    return s;
}

// A block leaves at most two partials, so that it has two slots: an odd one for an item that begins in it and goes on
// after it, an even one for an item that began before it. Groups of kFanIn partials, where an item has more than one,
// leave theirs in a second set of slots in the same way.
struct Slots {
    int64_t first;  // slot of the first partial
    int64_t base;   // partial i > 0 lies in slot base + i * step
    int step;

    __device__ __forceinline__ int64_t at(int i) const {
        return i == 0 ? first : base + static_cast<int64_t>(i) * step;
    }
};

static_assert(kPartialsABlock == 2 + 2, "two partials of a block, and two of the merges' first level");

__device__ __forceinline__ Slots partial_slots(const Split& s, int begin) {
    const int64_t base = 2 * static_cast<int64_t>(s.first_block + begin);
    return Slots{base + (begin == 0 ? 1 : 0), base, 2};
}
__device__ __forceinline__ Slots group_slots(const Split& s) {
    const int64_t base = 2 * (static_cast<int64_t>(gridDim.x) + s.first_block);
    return Slots{base + 1, base, 2 * kFanIn};
}

// Two columns a lane are what a warp merges: a *strip* of a row. Warps merge each for itself, strip by strip.
constexpr int kStripColumns = 64;

__host__ __device__ constexpr int strips_of_row(int head_dim_v) { return (head_dim_v + kStripColumns - 1) / kStripColumns; }

// Counters of arrivals, one a strip of a partial, reset by the last to come: first groups by their item's first block, later
// groups by the block they begin in, and items.
constexpr int kCountersOfStrip = 3;

__device__ __forceinline__ uint32_t* group_counters(const Workspace& w, const Split& s, int group, int strips) {
    return w.counters + static_cast<int64_t>((group == 0 ? 0 : gridDim.x) + s.first_block + group * kFanIn) * strips;
}
__device__ __forceinline__ uint32_t* item_counters(const Workspace& w, const Split& s, int strips) {
    return w.counters + static_cast<int64_t>(2 * gridDim.x + s.first_block) * strips;
}

// The merge, everywhere: weights against the common maximum, sums in index order. A state with l = 0 is empty and its
// o is never read. m in units of log2, a whole number: weights round nothing.
struct RowState {
    float m, l;
};

// Weighs the states of a row, one a lane of the calling warp, empty (l = 0) from kFanIn on or sooner: gives the whole, the
// weight of the lane's state against the common maximum, and one bit a state that is not empty.
__device__ __forceinline__ RowState weigh(float2 state, float& weight, uint32_t& lives) {
    const bool live = state.y != 0.f;
    float m = live ? state.x : -infinity();
#pragma unroll
    for (int d = kFanIn / 2; d > 0; d /= 2) m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, d));
    weight = live ? power_of_two(state.x - m) : 0.f;
    float l = weight * state.y;
#pragma unroll
    for (int d = kFanIn / 2; d > 0; d /= 2) l += __shfl_xor_sync(kAllLanes, l, d);
    lives = __ballot_sync(kAllLanes, live);
    // The upper half of the warp has made a sum of its own, of nothing.
    return RowState{__shfl_sync(kAllLanes, m, 0), __shfl_sync(kAllLanes, l, 0)};
}

// Sums o of the states in index order.
template <int Most>
__device__ __forceinline__ float2 weighted_sum(float weight, uint32_t lives, const float2 (&x)[Most]) {
    float2 o = make_float2(0.f, 0.f);
#pragma unroll
    for (int k = 0; k < Most; k++) {
        const float w = __shfl_sync(kAllLanes, weight, k);
        if (lives >> k & 1) o.x = fmaf(x[k].x, w, o.x), o.y = fmaf(x[k].y, w, o.y);
    }
    return o;
}

}  // namespace treeattn
