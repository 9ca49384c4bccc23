// The shape of a decode kernel: its warps, its stages, and where things lie in its shared memory.
//
// In flight per SM (128 dims, 16-bit): 8 warps * 3 stages * 16 keys * 512 B = 192 KiB, against some 30 KiB that
// latency * bandwidth asks for; the rest covers the stalls at item ends.
#pragma once

#include "params.cuh"
#include "schedule.cuh"
#include "tail.cuh"

namespace treeattn {

// Shared memory a block may use, by architecture (the host pass only needs some value).
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
constexpr int kSharedLimit = 227 * 1024;
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870
constexpr int kSharedLimit = 163 * 1024;
#else
constexpr int kSharedLimit = 99 * 1024;
#endif

// What a pipeline slot holds, written by the warp that fills it; the item only in its first slot.
struct alignas(16) Tile {
    int flags;  // kSlot*
    int base;   // first local slot of the tile
    int keys;   // live keys, 0 to kTile
    int b;      // sequence
};
struct alignas(16) Item {
    int head;  // kv head
    int row_tile;
    int first_token;
    int tokens;
    int splits, split, first_block;
    int b;
};
struct SlotInfo {
    Tile tile;
    Item item;
};
static_assert(sizeof(SlotInfo) == 48, "copied as three vectors");
enum : int { kSlotEnd = 1, kSlotLast = 2, kSlotFirst = 4, kSlotPoison = 8, kSlotFinal = 16 };

// Where a warp's walk along a flat slice is, as far as only the steps from item to item need it: in shared memory, for
// want of registers. All lanes read it, one writes it, with the warp synchronised in between.
struct Stand {
    Place place;
    Sequence seq;
    int64_t item_begin;
    int head, row_tile;
    Item item;  // the one at hand, as the slot of its first tile will say
};

template <int HeadDimQk, int HeadDimV, int Rows, int QueryBytes>
struct Shape {
    static constexpr int kRows = Rows;
    static constexpr int kDimQk = HeadDimQk, kDimV = HeadDimV;
    static constexpr int kBlocks = 1;
    // One 16-byte unit of padding makes a row an odd number of units: eight neighbouring rows then lie in different
    // banks, for any copy engine and any stride in the cache.
    static constexpr int kPitchK = HeadDimQk * 2 + 16, kPitchV = HeadDimV * 2 + 16;
    static constexpr int kSlotBytes = kTile * (kPitchK + kPitchV);
    // O of up to 16 rows in fp32 goes over a consumed slot at an item's end. The pitch keeps a warp's stores in
    // different banks.
    static constexpr int kCloseRows = Rows < 16 ? Rows : 16;
    static constexpr int kPitchO = HeadDimV + 4;
    static_assert(kCloseRows * kPitchO * 4 <= kSlotBytes, "a slot holds the rows of O");
    static constexpr int kSmall = 1024 + static_cast<int>(sizeof(Doors)) + static_cast<int>(sizeof(PlaceScratch)) +
                                  Rows * (8 + static_cast<int>(sizeof(RowWeights))) +
                                  8 * (Rows * 8 + 4 + static_cast<int>(sizeof(Stand)));
    static constexpr int kEntryBytes = kTile * 4;
    static constexpr int per_warp(int stages) {
        return stages * (kSlotBytes + static_cast<int>(sizeof(SlotInfo)) + kEntryBytes);
    }
    static constexpr bool fits(int warps, int stages) {
        return warps * per_warp(stages) + QueryBytes + kSmall <= kSharedLimit / kBlocks - (kBlocks - 1) * 512;
    }
    static constexpr int kWarps = fits(8, 2) ? 8 : fits(4, 2) ? 4 : 2;
    static constexpr int kStages = fits(kWarps, 4) ? 4 : fits(kWarps, 3) ? 3 : 2;
    static_assert(fits(kWarps, kStages), "shared memory");
    static constexpr int kThreads = kWarps * 32;

    static constexpr int kQueryAt = kWarps * kStages * kSlotBytes;
    static constexpr int kInfoAt = kQueryAt + QueryBytes;
    static constexpr int kEntriesAt = kInfoAt + kWarps * kStages * static_cast<int>(sizeof(SlotInfo));
    static constexpr int kStateAt = kEntriesAt + kWarps * kStages * kEntryBytes;
    static constexpr int kRowAt = kStateAt + kWarps * Rows * 8;
    static constexpr int kWeightsAt = kRowAt + Rows * 8;
    static constexpr int kItemAt = kWeightsAt + Rows * static_cast<int>(sizeof(RowWeights));
    static constexpr int kStandAt = kItemAt + static_cast<int>(sizeof(Item));
    static constexpr int kScratchAt = kStandAt + kWarps * static_cast<int>(sizeof(Stand));
    static constexpr int kFlagAt = kScratchAt + static_cast<int>(sizeof(PlaceScratch));
    static constexpr int kDoorsAt = (kFlagAt + 16 + 4 * kWarps + 15) / 16 * 16;
    static constexpr int kSharedBytes = kDoorsAt + static_cast<int>(sizeof(Doors));
    static_assert(kQueryAt % 16 == 0 && kInfoAt % 16 == 0 && kStateAt % 16 == 0 && kRowAt % 8 == 0, "alignment");
    static_assert(kSharedBytes <= kSharedLimit, "shared memory");
};

}  // namespace treeattn
