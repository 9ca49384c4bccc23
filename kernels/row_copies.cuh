// Copies of a tile's rows from the cache into a pipeline slot, for rows at one stride, anywhere, of 16-byte units, or of
// single elements. Which rows a tile has is said by walk.cuh.
#pragma once

#include "params.cuh"
#include "ptx.cuh"
#include "schedule.cuh"
#include "shape.cuh"

namespace treeattn {

template <class S>
struct RowCopies {
    const DecodeParams& p;
    uint64_t l2_policy;  // how long L2 is to keep keys and values
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    __device__ __forceinline__ explicit RowCopies(const DecodeParams& params) : p(params) {}

    // Lanes a row: the next power of two, so that a lane keeps its column.
    static __host__ __device__ constexpr int lanes_of(int dim) { return dim <= 64 ? 8 : dim <= 128 ? 16 : 32; }

    // A whole tile's rows of `bytes` bytes, `stride` apart, a multiple of 16.
    template <int Dim, int Pitch>
    __device__ __forceinline__ void copy_even_rows(uint32_t to, uint64_t first, int64_t stride, int bytes) {
        constexpr int kLanes = lanes_of(Dim);
        const int begin = static_cast<int>(first & 15), units = (begin + bytes + 15) / 16;
        const char* from = reinterpret_cast<const char*>(first - begin);
        if (units <= kLanes / 2) {
            copy_rows_of<kLanes / 2, Pitch>(to, from, stride, units);
        } else {
            copy_rows_of<kLanes, Pitch>(to, from, stride, units);
        }
    }
    template <int Lanes, int Pitch>
    __device__ __forceinline__ void copy_rows_of(uint32_t to, const char* from, int64_t stride, int units) {
        constexpr int kRows = 32 / Lanes;
        const int row = lane / Lanes, unit = lane % Lanes;
        if (unit >= units) return;
        to += row * Pitch + unit * 16;
        from += row * stride + unit * 16;
#pragma unroll
        for (int i = 0; i < kTile; i += kRows) {
            copy_async16(to + i * Pitch, from, 16, l2_policy);
            from += kRows * stride;
        }
    }

    // Rows of `bytes` bytes: lane first_lane + r holds the address of row r.
    template <int Dim, int Pitch>
    __device__ __forceinline__ void copy_units(uint32_t to, const char* from, int first_lane, int live, int bytes) {
        constexpr int kLanes = lanes_of(Dim), kRows = 32 / kLanes;
        static_assert(Pitch / 16 <= kLanes, "a unit a lane");
        const uint64_t mine = reinterpret_cast<uint64_t>(from);
        const int row = lane / kLanes, unit = lane % kLanes;
        to += row * Pitch + unit * 16;
#pragma unroll
        for (int i = 0; i < kTile; i += kRows) {
            const uint64_t row_from = __shfl_sync(kAllLanes, mine, first_lane + i + row);
            const int begin = static_cast<int>(row_from & 15);
            if (row + i < live && unit * 16 < begin + bytes) {
                copy_async16(to + i * Pitch, reinterpret_cast<const char*>(row_from - begin) + unit * 16, 16, l2_policy);
            }
        }
    }

    // An aligned address for copies of nothing.
    __device__ __forceinline__ const char* nowhere() const {
        return reinterpret_cast<const char*>(p.workspace.partials);
    }

    // A tile at one stride, to To bytes into a slot. Rows past the length get zeros: a zero weight does not silence a NaN.
    template <int Dim, int To>
    __device__ __forceinline__ void copy_regular(uint32_t to, const char* from, int64_t stride, int live, int dim) {
        constexpr int kLanes = lanes_of(Dim), kRows = 32 / kLanes;
        const int row = lane / kLanes, unit = lane % kLanes;
        if (unit * 8 >= dim) return;
        from += row * stride + unit * 16;
        to += Rows16<Dim>::at(row, unit);
        if (live == kTile) {
#pragma unroll
            for (int i = 0; i < kTile; i += kRows) {
                copy_async16(Rows16<Dim>::down(to, i) + To, from, 16, l2_policy);
                from += kRows * stride;
            }
        } else {
#pragma unroll 1
            for (int i = 0; i < kTile; i += kRows) {
                const bool real = row + i < live;
                copy_async16(Rows16<Dim>::down(to, i) + To, real ? from : nowhere(), real ? 16 : 0, l2_policy);
                from += kRows * stride;
            }
        }
    }

    // A tile whose rows lie anywhere: lane first_lane + r holds the address of row r.
    template <int Dim, int To>
    __device__ __forceinline__ void copy_rows(uint32_t to, const char* from, int first_lane, int live, int dim) {
        constexpr int kLanes = lanes_of(Dim), kRows = 32 / kLanes;
        const uint64_t mine = reinterpret_cast<uint64_t>(from);
        const int row = lane / kLanes, unit = lane % kLanes;
        const bool inside = unit * 8 < dim;
        to += Rows16<Dim>::at(row, unit);
#pragma unroll
        for (int i = 0; i < kTile; i += kRows) {
            const uint64_t row_from = __shfl_sync(kAllLanes, mine, first_lane + i + row);
            const bool real = row + i < live;
            if (inside) {
                copy_async16(Rows16<Dim>::down(to, i) + To,
                             real ? reinterpret_cast<const char*>(row_from) + unit * 16 : nowhere(), real ? 16 : 0,
                             l2_policy);
            }
        }
    }

    // Rows that no 16-byte copy can take.
    static __device__ __noinline__ void copy_elements(const DecodeParams& p, uint32_t to, const char* from, int live) {
        const int lane = threadIdx.x % 32;
        const uint64_t mine = reinterpret_cast<uint64_t>(from);
#pragma unroll 1
        for (int row = 0; row < kTile; row++) {
#pragma unroll 1
            for (int part = 0; part < 2; part++) {
                const uint64_t row_from = __shfl_sync(kAllLanes, mine, part * kTile + row);
                const int64_t stride = part ? p.v_stride[3] : p.k_stride[3];
#pragma unroll 1
                for (int d = lane; d < (part ? p.head_dim_v() : p.head_dim_qk); d += 32) {
                    uint16_t x = 0;
                    if (row < live) x = *reinterpret_cast<const uint16_t*>(row_from + d * stride);
                    const uint32_t at = part ? S::kVAt + S::RowsV::at(row, d / 8) : S::RowsK::at(row, d / 8);
                    store_shared16(to + at + d % 8 * kHalfBytes, x);
                }
            }
        }
    }
};

// Columns between a head dim and its class hold zeros, in K against zeros of q, in V for columns nobody reads.
template <class S>
__device__ __forceinline__ void clear_padding(const DecodeParams& p, uint32_t slot, int lane) {
    if (p.head_dim_qk < S::kDimQk) {
        const int units = (S::kDimQk - p.head_dim_qk) / 8;
#pragma unroll 1
        for (int i = lane; i < kTile * units; i += 32) {
            clear_shared(slot + S::RowsK::at(i / units, p.head_dim_qk / 8 + i % units));
        }
    }
    if (p.head_dim_v() < S::kDimV) {
        const int units = (S::kDimV - p.head_dim_v()) / 8;
#pragma unroll 1
        for (int i = lane; i < kTile * units; i += 32) {
            clear_shared(slot + S::kVAt + S::RowsV::at(i / units, p.head_dim_v() / 8 + i % units));
        }
    }
}

}  // namespace treeattn
