// The shape of a decode kernel: its warps, its stages, and where things lie in its shared memory.
//
// In flight per SM (128 dims, 16-bit): 8 warps * 3 stages * 16 keys * 512 B = 192 KiB, against some 30 KiB that
// latency * bandwidth asks for; the rest covers the stalls at item ends.
#pragma once

#include "format.cuh"
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
enum : int { kSlotEnd = 1, kSlotFirst = 4, kSlotPoison = 8, kSlotFinal = 16, kSlotLast = 1024 };

// The part of a warp's position in a flat slice that is needed only where one item ends and the next begins. It lies in shared
// memory to save registers. All lanes read it and one writes it, with the warp synchronised in between.
template <bool Terms>
struct Cursor {
    BlockSlice slice;
    SequenceOf<Terms> seq;
    int64_t item_begin;
    int head, row_tile;
    Item item;  // the current one, as the slot of its first tile will say
};

// Where a tile's rows of K or V lie in shared memory: one after the other, without a gap, and the 16-byte units of a row in
// an order that depends on the row, so that the same unit of eight neighbouring rows lies in different banks. Units change
// places within 128 bytes, or within 64 where rows are no multiple of 128, and a unit's number is that of its place XOR a
// mask. Rows must not be pushed apart by less than 32 bytes instead: copies whose sectors of 32 bytes are cut in two by the
// place they go to take 5 % longer.
template <int Dim>
struct Rows16 {
    static constexpr int kPitch = Dim * kHalfBytes;
    static constexpr int kUnits = kPitch % 128 == 0 ? 8 : 4;  // that change places
    static_assert(kPitch % 64 == 0, "rows of whole groups");

    static __device__ __forceinline__ constexpr int mask(int row) { return kUnits == 8 ? row % 8 : row / 2 % 4; }
    static __device__ __forceinline__ constexpr uint32_t at(int row, int unit) {
        return row * kPitch + (unit ^ mask(row)) * 16;
    }
    // The offset of unit + 2 step, from that of unit 0 or 1 of the same row.
    static __device__ __forceinline__ constexpr uint32_t step(uint32_t offset, int step) {
        return (offset ^ step % (kUnits / 2) * 32) + step / (kUnits / 2) * (kUnits * 16);
    }
    // The offset of the same unit of row + more, where the rows' numbers have no bit in common.
    static __device__ __forceinline__ constexpr uint32_t down(uint32_t offset, int more) {
        return (offset ^ mask(more) * 16) + more * kPitch;
    }
};

// A pipeline slot of a tile of 16-bit elements.
template <int HeadDimQk, int HeadDimV>
struct Slot16 {
    static constexpr bool kRaw = false, kPacked = false, kInBlocks = false;
    static constexpr int kMostWarps = 8;
    using RowsK = Rows16<HeadDimQk>;
    using RowsV = Rows16<HeadDimV>;
    static constexpr int kVAt = kTile * RowsK::kPitch;
    static constexpr int kTileBytes = kVAt + kTile * RowsV::kPitch;
    static constexpr int kStageBytes = 0;  // beside the slot, of each stage
};

// The same, with the mask elements of a tile beside it: up to 4 bytes each.
constexpr int kMaskBytes = kTile * 4;  // of a row
template <int HeadDimQk, int HeadDimV, int Rows>
struct SlotTerms : Slot16<HeadDimQk, HeadDimV> {
    static constexpr int kStageBytes = Rows * kMaskBytes;
};

// A pipeline slot of rows as they are in memory, each in the 16-byte units that hold it; or of one tile that was widened to
// 16-bit elements.
template <int HeadDim>
struct RowsRaw {
    static constexpr int kPitch = (row_bytes(kQ8_0, HeadDim) + 15 + 31) / 32 * 32;
};
// Where the rows of a slot lie: those of k, then those of v; with their scales.
struct RawRows {
    uint64_t at[2 * kTile];
    float scale[2 * kTile];
};
template <int HeadDimQk, int HeadDimV>
struct SlotRaw {
    static constexpr bool kRaw = true, kPacked = false, kInBlocks = false;
    static constexpr int kMostWarps = 8;
    using RowsK = RowsRaw<HeadDimQk>;
    using RowsV = RowsRaw<HeadDimV>;
    static constexpr int kVAt = kTile * RowsK::kPitch;
    static constexpr int kTileBytes = kVAt + kTile * RowsV::kPitch;
    static constexpr int kStageBytes = 8 * kMaskBytes + static_cast<int>(sizeof(RawRows));
};

// A pipeline slot of rows of bytes, whole units of them at addresses of whole units, as they are in memory but for the order of
// a row's units: lanes read those of several rows at once, and should find them in different banks.
template <int Dim>
struct RowsOfBytes {
    static constexpr int kPitch = Dim, kUnits = Dim / 16;
    static_assert(Dim == 64 || Dim == 128, "units of a row");
    // Of k four lanes read a unit each of every row; of v two lanes one, of every second row.
    template <bool OfV>
    static __device__ __forceinline__ constexpr uint32_t at(int row, int unit) {
        const int mask = OfV ? row / 2 % (kUnits / 2) * 2 : kUnits == 8 ? row % 2 * 4 : 0;
        return row * kPitch + (unit ^ mask) * 16;
    }
};
template <int Dim>
struct SlotPacked {
    static constexpr bool kRaw = true, kPacked = true, kInBlocks = false;
    static constexpr int kMostWarps = 12;
    using RowsK = RowsOfBytes<Dim>;
    using RowsV = RowsOfBytes<Dim>;
    static constexpr int kVAt = kTile * Dim;
    static constexpr int kTileBytes = 2 * kVAt;
    // Masks, and scales: of k, then of v.
    static constexpr int kStageBytes = 8 * kMaskBytes + 2 * kTile * static_cast<int>(sizeof(float));
};

// A pipeline slot of rows of ggml's blocks, each in as many 16-byte units as hold it wherever it begins. An odd number of units
// brings the same unit of eight neighbouring rows to different banks.
template <int Dim, int32_t Type>
struct RowsOfBlocks {
    static constexpr int kBytes = row_bytes(Type, Dim);
    // What rows begin at multiples of: they do not reach into a further unit then.
    static constexpr int kAlign = Dim == 128 ? 8 : 4;
    static constexpr int kUnits = (kBytes + 16 - kAlign + 15) / 16, kPitch = kUnits * 16;
    static_assert(kUnits % 2 == 1 && kBytes > kPitch - 16, "every unit holds some of any row");
};
template <int Dim, int32_t Type>
struct SlotBlocks {
    static constexpr bool kRaw = true, kPacked = false, kInBlocks = true;
    // Of q8_0 twelve warps' registers would not do before sm_90.
    static constexpr int kMostWarps = kSharedLimit < 200 * 1024 && Type == kQ8_0 && Dim == 128 ? 8 : 12;
    using RowsK = RowsOfBlocks<Dim, Type>;
    using RowsV = RowsOfBlocks<Dim, Type>;
    static constexpr int kVAt = kTile * RowsK::kPitch;
    static constexpr int kTileBytes = 2 * kVAt;
    static constexpr int kStageBytes = 8 * kMaskBytes;
};

// Terms: the kernel takes TermsParams, and QueryBytes hold what rows need of them (TermsBlock) last.
template <int HeadDimQk, int HeadDimV, int Rows, int QueryBytes, bool Terms = false,
          class Slot = Slot16<HeadDimQk, HeadDimV>>
struct Shape {
    static constexpr int kRows = Rows;
    static constexpr bool kTerms = Terms;
    static constexpr bool kRaw = Slot::kRaw, kPacked = Slot::kPacked, kInBlocks = Slot::kInBlocks;
    static constexpr int kDimQk = HeadDimQk, kDimV = HeadDimV;
    static constexpr int kBlocks = 1;
    // O in fp32 goes over a consumed slot at an item's end. The pitch keeps a warp's stores in different banks.
    static constexpr int kPitchO = HeadDimV + 4;
    using RowsK = typename Slot::RowsK;
    using RowsV = typename Slot::RowsV;
    static constexpr int kVAt = Slot::kVAt;
    static constexpr int kTileBytes = Slot::kTileBytes, kCloseBytes = Rows * kPitchO * 4;
    static constexpr int kSlotBytes = kTileBytes > kCloseBytes ? kTileBytes : kCloseBytes;
    static_assert(kVAt % 128 == 0 && kSlotBytes % 128 == 0, "units change places within 128 bytes");
    static constexpr int kSmall = 1024 + static_cast<int>(sizeof(PushState)) + static_cast<int>(sizeof(SliceScratch)) +
                                  Rows * 8 + Slot::kMostWarps * (Rows * 8 + 4 + static_cast<int>(sizeof(Cursor<Terms>)));
    static constexpr int kEntryBytes = kTile * 4;
    static constexpr int per_warp(int stages) {
        return stages * (kSlotBytes + static_cast<int>(sizeof(SlotInfo)) + kEntryBytes + Slot::kStageBytes);
    }
    static constexpr bool fits(int warps, int stages) {
        return warps * per_warp(stages) + QueryBytes + kSmall <= kSharedLimit / kBlocks - (kBlocks - 1) * 512;
    }
    static constexpr int kWarps = fits(Slot::kMostWarps, 2) ? Slot::kMostWarps : fits(8, 2) ? 8 : fits(4, 2) ? 4 : 2;
    static constexpr int kStages = fits(kWarps, 4) ? 4 : fits(kWarps, 3) ? 3 : 2;
    static_assert(fits(kWarps, kStages), "shared memory");
    static constexpr int kThreads = kWarps * 32;
    static constexpr bool kWide = false;
    static constexpr int kWalkers = kWarps, kWarpsAWalker = 1;

    static constexpr int kQueryAt = kWarps * kStages * kSlotBytes;
    static constexpr int kTermsAt = kQueryAt + QueryBytes - static_cast<int>(sizeof(TermsBlock<Rows>));
    static constexpr int kInfoAt = kQueryAt + QueryBytes;
    static constexpr int kEntriesAt = kInfoAt + kWarps * kStages * static_cast<int>(sizeof(SlotInfo));
    static constexpr int kStageAt = kEntriesAt + kWarps * kStages * kEntryBytes;
    static constexpr int kStageBytes = Slot::kStageBytes;
    static constexpr int kRowsAt = Rows * kMaskBytes;  // in a stage after the elements of the mask: RawRows, or scales
    static constexpr int kStateAt = kStageAt + kWarps * kStages * Slot::kStageBytes;
    static constexpr int kRowAt = kStateAt + kWarps * Rows * 8;
    static constexpr int kItemAt = kRowAt + Rows * 8;
    static constexpr int kCursorAt = kItemAt + static_cast<int>(sizeof(Item));
    static constexpr int kScratchAt = kCursorAt + kWarps * static_cast<int>(sizeof(Cursor<Terms>));
    static constexpr int kFlagAt = kScratchAt + static_cast<int>(sizeof(SliceScratch));
    static constexpr int kPushStateAt = (kFlagAt + 16 + 4 * kWarps + 15) / 16 * 16;
    static constexpr int kSharedBytes = kPushStateAt + static_cast<int>(sizeof(PushState));
    static_assert(kQueryAt % 16 == 0 && kInfoAt % 16 == 0 && kStateAt % 16 == 0 && kRowAt % 8 == 0, "alignment");
    static_assert(kSharedBytes <= kSharedLimit, "shared memory");
};

}  // namespace treeattn
