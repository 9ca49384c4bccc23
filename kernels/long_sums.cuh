// Sums of a warp that takes many tiles of an item: closed before rounding piles up, and kept in memory as sums of two floats.
//
// No float in a register takes in more than kOpenTiles tiles; what is in memory loses next to nothing, at any length. Maxima
// are whole numbers in log2 units, so that rescaling never rounds. What closes is an event like an item's end, and found out by
// the same test: the count of a warp's tiles and the flags of a tile lie in different bits.
#pragma once

#include "numbers.cuh"
#include "schedule.cuh"
#include "shape.cuh"

namespace treeattn {

constexpr int kOpenTiles = kSlotLast;  // a count that has reached it has this bit
constexpr int kClosed = 2 * kOpenTiles;  // in a count: sums of the item have been closed before
static_assert(kSlotEnd + kSlotPoison + kSlotFirst + kSlotFinal < kOpenTiles, "flags below the count's bit");

// Of a block with `warps`: how many key tiles of an item it may take without any sum being closed.
__host__ __device__ constexpr int open_tiles(int warps) { return (kOpenTiles - 8) * warps; }

// The closed sums of a warp: of each lane kMaxima groups of kSums, each over a maximum. They lie behind the workspace's
// partials.
template <class S, int kSums, int kMaxima>
struct LongSums {
    static constexpr int kGroupFloats = (kSums + 1) * 32;
    static constexpr int kWarpBytes = kMaxima * kGroupFloats * static_cast<int>(sizeof(float2));
    static constexpr int kBlockBytes = S::kWarps * kWarpBytes;
    static __device__ __forceinline__ float2* of_lane(const DecodeParams& p, int partial_floats) {
        char* behind =
            reinterpret_cast<char*>(p.workspace.partials + kPartialsABlock * static_cast<int64_t>(gridDim.x) * partial_floats);
        const int64_t warp = static_cast<int64_t>(blockIdx.x) * S::kWarps + threadIdx.x / 32;
        return reinterpret_cast<float2*>(behind + warp * kWarpBytes) + threadIdx.x % 32;
    }
};

// Adds sums of this lane to closed ones, at `to`: kSums of them, then their maximum, every 32nd float of shared memory; or
// gives the whole back there, at an item's end. `exist`: some have been closed before. By way of shared memory and by a call,
// so that little of it lies among what runs for every tile; all that is closed is asked for at once.
template <int kSums>
static __device__ __noinline__ void close_group(float* from, float2* to, bool exist, bool is_last) {
    float2 sum[kSums];
#pragma unroll
    for (int i = 0; i < kSums; i++) sum[i] = exist ? __ldcg(to + i * 32) : make_float2(0.f, 0.f);
    const float now = from[kSums * 32], before = exist ? __ldcg(to + kSums * 32).x : now;
    const float factor = power_of_two(before - now);
    if (!is_last) __stcg(to + kSums * 32, make_float2(now, 0.f));
#pragma unroll
    for (int i = 0; i < kSums; i++) {
        sum[i].x *= factor, sum[i].y *= factor;
        add_to(sum[i], from[i * 32]);
        // What the first float lacks is no number where that is none, or infinite.
        if (is_last) {
            from[i * 32] = fabsf(sum[i].x) < infinity() ? sum[i].x + sum[i].y : sum[i].x;
        } else {
            __stcg(to + i * 32, sum[i]);
        }
    }
}

}  // namespace treeattn
