// A warp's walk whose tiles go straight to registers, and the loads that bring them there: for kernels that spend so
// little on a tile that the way through shared memory would be the larger part.
//
// A row takes 8, 16 or 32 lanes of 16 bytes. These lanes, a *team*, load as many neighbouring rows: of the 16 of a tile
// the first team takes the first 4, 8 or all 16, the next team the next. One tile is in registers, one is planned: its rows
// are asked for as soon as those of the tile before are consumed.
#pragma once

#include "long_sums.cuh"
#include "walk.cuh"

namespace treeattn {

// As Shape, without a ring.
template <int HeadDimQk, int HeadDimV, int Rows, int Warps, int Blocks, int QueryBytes>
struct LoadShape {
    static constexpr int kRows = Rows;
    static constexpr bool kTerms = false, kRaw = false, kInBlocks = false, kWide = false;
    static constexpr int kDimQk = HeadDimQk, kDimV = HeadDimV;
    static constexpr int kBlocks = Blocks, kWarps = Warps;
    static constexpr int kWalkers = kWarps, kWarpsAWalker = 1;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kStages = 2;  // of page entries only
    static constexpr int kPitchO = HeadDimV + 4;
    // Of a warp: O at an item's end, and K or V of a tile that no 16-byte load can take.
    static constexpr int kTeam = HeadDimQk > HeadDimV ? HeadDimQk : HeadDimV;
    static constexpr int kCloseBytes = 256 * (kTeam <= 64 ? 8 : kTeam <= 128 ? 16 : 32);
    static_assert(Rows * kPitchO * 4 <= kCloseBytes, "O of a warp");

    static constexpr int kQueryAt = kWarps * kCloseBytes;
    static constexpr int kEntriesAt = kQueryAt + QueryBytes;
    static constexpr int kStateAt = kEntriesAt + kWarps * kStages * kTile * 4;
    static constexpr int kRowAt = kStateAt + kWarps * Rows * 8;
    static constexpr int kItemAt = kRowAt + (Rows * 4 + 15) / 16 * 16;
    static constexpr int kCursorAt = kItemAt + static_cast<int>(sizeof(Item));
    static constexpr int kScratchAt = kCursorAt + kWarps * static_cast<int>(sizeof(Cursor<false>));
    static constexpr int kFlagAt = kScratchAt + static_cast<int>(sizeof(SliceScratch));
    static constexpr int kPushStateAt = (kFlagAt + 16 + 4 * kWarps + 15) / 16 * 16;
    static constexpr int kSharedBytes = kPushStateAt + static_cast<int>(sizeof(PushState));
    static_assert(kQueryAt % 16 == 0 && kEntriesAt % 16 == 0 && kItemAt % 16 == 0, "alignment");
    static_assert(kBlocks * (kSharedBytes + 1024) <= kSharedLimit, "shared memory");
};

// Where a tile lies, and what is to be done with it.
struct PlannedTile {
    const char* k;  // the rows row_of<kDimQk>, row_of<kDimV> of this lane, or the last one
    const char* v;
    int flags;  // kSlot*, and kCountTile times the number of the item's tiles up to this one
    int base;   // first local slot
    int keys;   // live keys, 0 to kTile
};
// In a tile's flags, above all others. As the counts of long_sums.cuh.
constexpr int kCountTile = 2 * kSlotLast, kCountOpen = kOpenTiles * kCountTile, kCountClosed = kClosed * kCountTile;

// Returns x, which is the same on all lanes, in a form that the compiler knows to be uniform.
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
    int stage = 0;                // of the next tile's page entries
    uint32_t fault = kFaultNone;  // of the item: reported at its end, as a call among the tiles would cost registers

    __device__ __forceinline__ LoadWalk(const DecodeParams& params, char* memory) : Walk<S>(params, memory) {}

    // Rows of a team.
    template <int Dim>
    static constexpr int kTeamRows = Walk<S>::lanes_of(Dim) / 2;

    // The row that this lane finds for its team: two lanes each, so that lane i of a team has its row i.
    template <int Dim>
    __device__ __forceinline__ int row_of() const {
        return lane / Walk<S>::lanes_of(Dim) * kTeamRows<Dim> + lane % kTeamRows<Dim>;
    }

    // Begins an item. Makes the position of the walk uniform for the compiler, so that the code after it needs neither
    // registers nor branches for each lane.
    __device__ __forceinline__ void settle() {
        tile = uniform(tile), step = uniform(step);
        this->tile_end = uniform(this->tile_end), this->keys = uniform(this->keys), this->b = uniform(this->b);
        this->flags = uniform(this->flags) % kCountTile + kCountTile;
        this->page_row = uniform(this->page_row), stage = uniform(stage);
        if (p.kv_layout == kStrided) {
            this->k_row += row_of<S::kDimQk>() * p.k_stride[1];
            this->v_row += row_of<S::kDimV>() * p.v_stride[1];
        }
    }

    // The warp's next tile of the item, possibly an empty one: every warp has a tile of every item.
    __device__ __forceinline__ PlannedTile plan() {
        PlannedTile s;
        const bool last = tile + step >= this->tile_end;
        s.base = tile * kTile;
        s.keys = tile < this->tile_end ? min(max(this->keys - s.base, 0), kTile) : 0;
        s.flags = this->flags | (last ? kSlotLast : 0);
        this->flags += kCountTile;
        s.k = this->k_row, s.v = this->v_row;
        if (p.kv_layout == kStrided) {
            if (s.keys < kTile) {
                s.k -= max(row_of<S::kDimQk>() - s.keys + 1, 0) * p.k_stride[1];
                s.v -= max(row_of<S::kDimV>() - s.keys + 1, 0) * p.v_stride[1];
            }
            this->k_row += static_cast<int64_t>(step) * kTile * p.k_stride[1];
            this->v_row += static_cast<int64_t>(step) * kTile * p.v_stride[1];
        } else {
            copy_async_wait<S::kStages - 1>();
            __syncwarp();
            const bool bad_k = find_row(s.k, row_of<S::kDimQk>(), p.k_stride, s);
            const bool bad_v = find_row(s.v, row_of<S::kDimV>(), p.v_stride, s);
            if (__any_sync(kAllLanes, bad_k || bad_v)) {
                s.keys = 0;
                s.flags |= kSlotPoison;
                fault = kFaultPage;
            }
            this->ask_entry(stage);
            copy_async_commit();
            if (++stage == S::kStages) stage = 0;
        }
        tile += step;
        return s;
    }

    // Counts anew after sums were closed; `flags` of the tile that is planned, too, which are given back.
    __device__ __forceinline__ int recount(int flags) {
        this->flags = (this->flags - kCountOpen) | kCountClosed;
        return (flags - kCountOpen) | kCountClosed;
    }

    // Moves `at` from slot 0 of page 0 to a row of the tile; says whether its page does not exist.
    __device__ __forceinline__ bool find_row(const char*& at, int row, const int64_t (&stride)[4], const PlannedTile& s) const {
        if (s.keys == 0) return false;
        row = min(row, s.keys - 1);
        const int slot = s.base + row, page = this->page_of(slot);
        const int entry = this->entries(stage)[this->regular() ? 0 : row];
        at += entry * stride[0] + static_cast<int64_t>(slot - page * p.page_size) * stride[1];
        return entry < 0 || entry >= p.num_pages;
    }

    __device__ __forceinline__ void report() {
        if (fault != kFaultNone && lane == 0) report_with_value<S::kTerms>(p, this->b, fault);
        fault = kFaultNone;
    }

    // Loads a tile's rows of K or V: row i of this lane's team into x[i]. Rows past the length and columns past the head
    // dim repeat the last valid ones, so that no instruction here depends on the length. The code that weighs the keys
    // leaves them out.
    template <int Dim>
    __device__ __forceinline__ void load(uint4 (&x)[kTeamRows<Dim>], const char* from, const int64_t (&stride)[4],
                                         int dim) const {
        constexpr int kLanes = Walk<S>::lanes_of(Dim), kRows = kTeamRows<Dim>;
        const int unit = min(lane % kLanes, dim / 8 - 1);
        const uint64_t mine = reinterpret_cast<uint64_t>(from);
        if (p.flags & kFlagNoBulk) {
            // One row after the other, by way of shared memory: slow, but short, and easy on registers.
            uint4* mine_there = reinterpret_cast<uint4*>(this->shared + this->warp * S::kCloseBytes) + lane;
#pragma unroll 1
            for (int i = 0; i < kRows; i++) {
                const uint64_t row = __shfl_sync(kAllLanes, mine, i, kLanes);
                mine_there[i * 32] = gather(reinterpret_cast<const char*>(row) + unit * 8 * stride[3], stride[3]);
            }
#pragma unroll
            for (int i = 0; i < kRows; i++) x[i] = mine_there[i * 32];
        } else {
#pragma unroll
            for (int i = 0; i < kRows; i++) {
                const uint64_t row = __shfl_sync(kAllLanes, mine, i, kLanes);
                x[i] = load_past16(reinterpret_cast<const char*>(row) + unit * 16, this->l2_policy);
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
