// A warp's walk whose tiles go straight to registers, and the loads that bring them there: for kernels that spend so
// little on a tile that the way through shared memory would be the larger part.
//
// A tile's keys lie kRows an instruction, 16 bytes a lane. One tile is in registers, one is planned: its rows are
// asked for as soon as those of the tile before are consumed.
#pragma once

#include "walk.cuh"

namespace treeattn {

// As Shape, without a ring.
template <int HeadDimQk, int HeadDimV, int Rows, int Warps, int Blocks, int QueryBytes>
struct LoadShape {
    static constexpr int kRows = Rows;
    static constexpr int kDimQk = HeadDimQk, kDimV = HeadDimV;
    static constexpr int kBlocks = Blocks, kWarps = Warps;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kStages = 2;  // of page entries only
    static constexpr int kCloseRows = Rows;
    static constexpr int kPitchO = HeadDimV + 4;
    static constexpr int kCloseBytes = Rows * kPitchO * 4;  // O of a warp, at an item's end

    static constexpr int kQueryAt = kWarps * kCloseBytes;
    static constexpr int kEntriesAt = kQueryAt + QueryBytes;
    static constexpr int kStateAt = kEntriesAt + kWarps * kStages * kTile * 4;
    static constexpr int kRowAt = kStateAt + kWarps * Rows * 8;
    static constexpr int kWeightsAt = kRowAt + (Rows * 4 + 15) / 16 * 16;
    static constexpr int kItemAt = kWeightsAt + Rows * static_cast<int>(sizeof(RowWeights));
    static constexpr int kStandAt = kItemAt + static_cast<int>(sizeof(Item));
    static constexpr int kScratchAt = kStandAt + kWarps * static_cast<int>(sizeof(Stand));
    static constexpr int kFlagAt = kScratchAt + static_cast<int>(sizeof(PlaceScratch));
    static constexpr int kSharedBytes = kFlagAt + 16 + 4 * kWarps;
    static_assert(kQueryAt % 16 == 0 && kEntriesAt % 16 == 0 && kWeightsAt % 16 == 0 && kItemAt % 16 == 0, "alignment");
    static_assert(kSharedBytes * kBlocks <= 48 * 1024, "little, so that nothing depends on it");
};

// Where a tile lies, and what is to be done with it.
struct Span {
    const char* k;  // row 0, where rows lie at one stride; else row r in lanes r and kTile + r
    const char* v;
    int flags;  // kSlot*
    int base;   // first local slot
    int keys;   // live keys, 0 to kTile
};

// A value that all lanes have, as one that the compiler knows to be so.
template <class T>
__device__ __forceinline__ T uniform(T x) {
    return __shfl_sync(kAllLanes, x, 0);
}

template <class S>
struct LoadWalk : Walk<S> {
    using Walk<S>::p;
    using Walk<S>::lane;
    using Walk<S>::tile;
    using Walk<S>::step;
    int stage = 0;      // of the next tile's page entries
    uint32_t fault = kFaultNone;  // of the item: reported at its end, as a call among the tiles would cost registers

    __device__ __forceinline__ LoadWalk(const DecodeParams& params, char* memory) : Walk<S>(params, memory) {}

    // Says to the compiler that the lanes agree on where they are: what follows then needs neither registers nor
    // branches for each lane.
    __device__ __forceinline__ void settle() {
        tile = uniform(tile), step = uniform(step);
        this->tile_end = uniform(this->tile_end), this->keys = uniform(this->keys), this->b = uniform(this->b);
        this->flags = uniform(this->flags), this->page_row = uniform(this->page_row), stage = uniform(stage);
        this->k_row = reinterpret_cast<const char*>(uniform(reinterpret_cast<uint64_t>(this->k_row)));
        this->v_row = reinterpret_cast<const char*>(uniform(reinterpret_cast<uint64_t>(this->v_row)));
    }

    // The warp's next tile of the item, possibly an empty one: every warp has a tile of every item.
    __device__ __forceinline__ Span plan() {
        Span s;
        const bool last = tile + step >= this->tile_end;
        s.base = tile * kTile;
        s.keys = tile < this->tile_end ? min(max(this->keys - s.base, 0), kTile) : 0;
        s.flags = this->flags | (last ? kSlotLast : 0);
        s.k = this->k_row, s.v = this->v_row;
        if (p.kv_layout == kStrided) {
            this->k_row += static_cast<int64_t>(step) * kTile * p.k_stride[1];
            this->v_row += static_cast<int64_t>(step) * kTile * p.v_stride[1];
        } else {
            find_page(s);
        }
        tile += step;
        return s;
    }

    __device__ __forceinline__ void find_page(Span& s) {
        copy_async_wait<S::kStages - 1>();
        __syncwarp();
        const int r = this->regular() ? 0 : lane % kTile, slot = s.base + r;
        bool bad = false;
        if (r < s.keys) {
            const int entry = this->entries(stage)[r], page = this->page_of(slot);
            const int64_t inner = slot - page * p.page_size;
            bad = entry < 0 || entry >= p.num_pages;
            s.k += entry * p.k_stride[0] + inner * p.k_stride[1];
            s.v += entry * p.v_stride[0] + inner * p.v_stride[1];
        }
        if (__any_sync(kAllLanes, bad)) {
            s.keys = 0;
            s.flags |= kSlotPoison;
            fault = kFaultPage;
        }
        this->ask_entry(stage);
        copy_async_commit();
        if (++stage == S::kStages) stage = 0;
    }

    __device__ __forceinline__ void report() {
        if (fault != kFaultNone && lane == 0) report_fault(p, this->b, fault);
        fault = kFaultNone;
    }

    // Loads a tile's rows of K or V: row i * kRows + lane / kLanes into x[i]. Rows past the length become zeros; so do
    // columns past the head dim, if they are zeros before.
    template <int Dim, int Loads>
    __device__ __forceinline__ void load(uint4 (&x)[Loads], const char* from, const int64_t (&stride)[4], int dim,
                                         int keys) const {
        constexpr int kLanes = Walk<S>::lanes_of(Dim), kRows = 32 / kLanes;
        static_assert(Loads * kRows == kTile, "a tile");
        if (keys == 0) return;
        const int row = lane / kLanes, unit = lane % kLanes;
        const int rows = unit * 8 < dim ? keys - row : 0;  // of this lane's
        if (keys < kTile) {
#pragma unroll
            for (int i = 0; i < Loads; i++) x[i] = make_uint4(0, 0, 0, 0);
        }
        const uint64_t mine = reinterpret_cast<uint64_t>(from);
        if (p.flags & kFlagNoBulk) {
            // One row after the other: slow, and short.
#pragma unroll 1
            for (int i = 0; i < Loads; i++) {
                const int r = i * kRows + row;
                const char* at = this->regular() ? from + r * stride[1]
                                                 : reinterpret_cast<const char*>(__shfl_sync(kAllLanes, mine, r));
                uint4 bits = make_uint4(0, 0, 0, 0);
                if (i * kRows < rows) bits = gather(at + unit * 8 * stride[3], stride[3]);
#pragma unroll
                for (int j = 0; j < Loads; j++) {
                    if (i == j) x[j] = bits;
                }
            }
        } else if (this->regular()) {
            const char* at = from + row * stride[1] + unit * 16;
#pragma unroll
            for (int i = 0; i < Loads; i++) {
                load_once16(x[i], at, i * kRows < rows);
                at += kRows * stride[1];
            }
        } else {
#pragma unroll
            for (int i = 0; i < Loads; i++) {
                const uint64_t at = __shfl_sync(kAllLanes, mine, i * kRows + row);
                load_once16(x[i], reinterpret_cast<const char*>(at) + unit * 16, i * kRows < rows);
            }
        }
    }

    // Eight elements at any stride.
    static __device__ __forceinline__ uint4 gather(const char* from, int64_t stride) {
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t low = *reinterpret_cast<const uint16_t*>(from);
            const uint32_t high = *reinterpret_cast<const uint16_t*>(from + stride);
            word[i] = low | high << 16;
            from += 2 * stride;
        }
        return make_uint4(word[0], word[1], word[2], word[3]);
    }
};

}  // namespace treeattn
