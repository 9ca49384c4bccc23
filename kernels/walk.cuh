// A warp's walk along its block's slice of the work: which tile it copies next, and where the rows of it are.
//
// A walker, usually one warp, takes every kWalkers-th key tile of an item and copies it into a ring of kStages shared-memory
// slots of its own. Copies run ahead over item ends. Where a walker is several warps (decode_wide.cuh), each of them walks the
// same way and copies a part of every tile; walkers then have as many slots of an item each, so that they keep in step.
#pragma once

#include "numbers.cuh"
#include "params.cuh"
#include "ptx.cuh"
#include "row_copies.cuh"
#include "schedule.cuh"
#include "shape.cuh"

namespace treeattn {

// The kv head of the running item, where scales are looked up by it.
template <bool Raw>
struct HeadOf {};
template <>
struct HeadOf<true> {
    int head;
};

// Where mask elements come from with a tile: 16 bytes a lane, those of slot 0. Null: none come.
template <bool Terms>
struct MaskOf {};
template <>
struct MaskOf<true> {
    const char* mask;
};

// The walk of one warp along its block's slice; it fills pipeline slots.
template <class S>
struct Walk : RowCopies<S>, HeadOf<S::kRaw>, MaskOf<S::kTerms> {
    using RowCopies<S>::p, RowCopies<S>::lane, RowCopies<S>::warp, RowCopies<S>::l2_policy;
    char* shared;
    int b;                // sequence
    int keys;             // its local slots
    int64_t page_row;     // its first entry in the page table
    int tile, tile_end;   // this warp's next tile of the item, and where the block's part of it ends
    int step;             // tiles from one of this warp's to its next
    int flags;            // of the item's next slot: kSlotFirst, kSlotPoison, kSlotFinal
    bool done;
    // Where copies begin: 16 bytes a lane, kLanes* lanes a row, 32 / kLanes* rows an instruction. Strided layout: of
    // the next tile; paged: of slot 0 of page 0. Of blocks those of the lane.
    const char* k_row;
    const char* v_row;
    int page_shift;       // log2 of the page size, -1 where it is no power of two
    using Cursor = treeattn::Cursor<S::kTerms>;
    using Sequence = SequenceOf<S::kTerms>;

    __device__ __forceinline__ Walk(const DecodeParams& params, char* memory) : RowCopies<S>(params), shared(memory) {
        const unsigned size = p.page_size;
        page_shift = p.kv_layout != kStrided && (size & (size - 1)) == 0 ? __ffs(size) - 1 : -1;
        // Only query tiles after the first read them again.
        const bool once = static_cast<int64_t>(p.query_tokens) * p.group <= static_cast<int64_t>(p.batch) * S::kRows;
        l2_policy = once ? evict_first() : evict_normal();
    }

    // Which of the block's walkers this warp belongs to.
    __device__ __forceinline__ int walker() const { return warp / S::kWarpsAWalker; }
    // What the walker notes of a slot.
    __device__ __forceinline__ int4* info(int stage) const {
        return reinterpret_cast<int4*>(shared + S::kInfoAt) + (walker() * S::kStages + stage) * 3;
    }
    // One lane notes it.
    __device__ __forceinline__ bool notes() const { return lane == 0 && warp % S::kWarpsAWalker == 0; }

    // Whether a tile's rows lie at one stride: always, unless pages end inside tiles.
    __device__ __forceinline__ bool regular() const { return p.kv_layout == kStrided || page_shift >= 4; }

    // What can be known without touching memory; before the dependency wait.
    __device__ __forceinline__ EvenSplit prepare() {
        const EvenSplit even = even_split_of(p, S::kRows);
        step = S::kWalkers;
        done = false;
        if (even.blocks > 0) {
            b = 0;
            step = S::kWalkers * even.blocks;
            tile = even.index * S::kWalkers + walker();
            done = even.index >= even.blocks;
            find_rows(even.head);
        }
        return even;
    }

    // Asks for everything small that an evenly split item needs, at once: what waits for one thing after the other, or for
    // keys that were asked for before, waits long.
    __device__ __forceinline__ uint32_t touch_small(const EvenSplit& even) const {
        uint32_t x = p.kv_length == nullptr ? 0 : load_cached(p.kv_length);
        x ^= touch_positions(p);
        const int unit = 32 / element_bytes(p.q_dtype);  // one sector a lane
#pragma unroll 1
        for (int row = warp; row < S::kRows; row += S::kWarps) {
            const int packed = even.row_tile * S::kRows + row;
            if (packed >= p.query_tokens * p.group || lane * unit >= p.head_dim_qk) continue;
            const int token = p.query_tokens == 1 ? 0 : packed / p.group;
            const int64_t q_head = static_cast<int64_t>(even.head) * p.group + packed - token * p.group;
            x ^= load_cached(static_cast<const char*>(p.q) + token * p.q_stride[0] +
                             q_head * p.q_stride[1] + lane * unit * p.q_stride[2]);
        }
        return x;
    }

    __device__ __forceinline__ void take_sequence(const Sequence& seq) {
        keys = seq.keys;
        page_row = seq.page_row;
        // By every block, before it pushes a row of the sequence: ranks that get the row are told why it is NaN.
        if (seq.fault != kFaultNone && threadIdx.x == 0) report_with_value<S::kTerms>(p, b, seq.fault);
        flags = seq.fault != kFaultNone || positions_bad(seq) ? kSlotPoison : 0;
    }

    // Begins an evenly split item, and says which it is.
    __device__ __forceinline__ Item start_even(const EvenSplit& even) {
        int taken = 0;
        const Sequence seq = read_sequence<S::kRows, S::kTerms>(p, 0, taken);
        tile_end = seq.key_tiles;
        done = even.index * S::kWalkers >= seq.key_tiles;
        const Split split = even.split(seq.key_tiles, S::kWalkers);
        if (!done) {
            take_sequence(seq);
            if constexpr (S::kTerms) {
                tile += seq.first_tile, tile_end += seq.first_tile;
                take_list(seq, even.head);
                find_rows(even.head);
                find_mask(even.head, even.row_tile, seq.tokens);
            }
            read_entries(0);
        }
        return Item{even.head, even.row_tile, 0, seq.tokens, split.count, split.index, split.first_block, 0};
    }

    __device__ __forceinline__ Cursor& cursor() const {
        return reinterpret_cast<Cursor*>(shared + S::kCursorAt)[warp];
    }

    // Begins a flat slice.
    __device__ __forceinline__ Item start() {
        Cursor at;
        at.slice = find_slice<S::kRows, S::kTerms>(p, reinterpret_cast<SliceScratch*>(shared + S::kScratchAt));
        done = at.slice.begin >= at.slice.end;
        if (done) return Item{};
        b = at.slice.b;
        at.seq = read_sequence<S::kRows, S::kTerms>(p, b, at.slice.taken);
        const int64_t into = at.slice.begin - at.slice.sequence_begin;
        const int64_t item = into / at.seq.key_tiles;
        at.head = static_cast<int>(item / at.seq.row_tiles);
        at.row_tile = static_cast<int>(item) - at.head * at.seq.row_tiles;
        at.item_begin = at.slice.sequence_begin + item * at.seq.key_tiles;
        take_sequence(at.seq);
        enter_item(at, 0);
        return at.item;
    }

    // The page list of a kv head.
    __device__ __forceinline__ void take_list(const Sequence& seq, int head) {
        page_row = seq.page_row + head * terms_of(p).page_index_head_stride;
    }

    // Positions are judged where they are used; a bad one poisons the sequence's rows.
    __device__ __forceinline__ bool positions_bad(const Sequence& seq) const {
        if (!needs_positions<S::kTerms>(p) || seq.keys == 0) return false;
        return positions_bad(p, b, seq.first_token, seq.tokens, seq.keys);
    }
    static __device__ __noinline__ bool positions_bad(const DecodeParams& p, int b, int first_token, int tokens,
                                                      int keys) {
        const int lane = threadIdx.x % 32;
        bool bad = !positions_fit(p, b, tokens, keys);
        if (p.query_position != nullptr) {
#pragma unroll 1
            for (int i = lane; i < tokens; i += 32) bad |= p.query_position[first_token + i] < 0;
        }
        bad = __any_sync(kAllLanes, bad);
        if (bad && threadIdx.x == 0) report_with_value<S::kTerms>(p, b, kFaultPosition);
        return bad;
    }

    // `stage`: the slot that the item's first tile will have.
    __device__ __forceinline__ void enter_item(Cursor& at, int stage) {
        const int64_t from = max(at.slice.begin - at.item_begin, static_cast<int64_t>(0));
        const int64_t to = min(at.slice.end - at.item_begin, static_cast<int64_t>(at.seq.key_tiles));
        tile = static_cast<int>(from) + walker();
        tile_end = static_cast<int>(to);
        if constexpr (S::kTerms) {
            tile += at.seq.first_tile, tile_end += at.seq.first_tile;
            take_list(at.seq, at.head);
        }
        flags |= kSlotFirst;
        if (at.item_begin + at.seq.key_tiles >= at.slice.end) flags |= kSlotFinal;
        const Split split = split_of(at.item_begin, at.seq.key_tiles, at.slice.units);
        at.item = Item{at.head,     at.row_tile, at.seq.first_token, at.seq.tokens,
                       split.count, split.index, split.first_block,  b};
        __syncwarp();
        if (lane == 0) cursor() = at;
        __syncwarp();
        find_rows(at.head);
        if constexpr (S::kTerms) find_mask(at.head, at.row_tile, at.seq.tokens);
        read_entries(stage);
    }

    // Page entries come into shared memory kStages tiles ahead (small pages: one a key; else one a tile): those of an
    // item's first tiles when the item begins, the others together with the tile that has the slot before.
    __device__ __forceinline__ int* entries(int stage) const {
        return reinterpret_cast<int*>(shared + S::kEntriesAt) + (warp * S::kStages + stage) * kTile;
    }
    __device__ __forceinline__ bool has_entry(int of_tile, int slot) const {
        return lane < (regular() ? 1 : kTile) && of_tile < tile_end && slot < keys;
    }
    __device__ __forceinline__ void read_entries(int stage) {
        if (p.kv_layout == kStrided) return;
        __syncwarp();
        int entry[S::kStages];
#pragma unroll
        for (int i = 0; i < S::kStages; i++) {
            const int slot = (tile + i * step) * kTile + lane;
            entry[i] = has_entry(tile + i * step, slot) ? table()[page_of(slot)] : -1;
        }
#pragma unroll
        for (int i = 0; i < S::kStages; i++) {
            if (lane < kTile) entries(stage)[lane] = entry[i];
            if (++stage == S::kStages) stage = 0;
        }
        __syncwarp();
    }
    // Asks for the entry of the tile that gets the slot next; it has come when this tile has.
    __device__ __forceinline__ void ask_entry(int stage) {
        const int slot = (tile + S::kStages * step) * kTile + lane;
        __syncwarp();
        if (has_entry(tile + S::kStages * step, slot)) {
            copy_async4(shared_address(entries(stage) + lane), table() + page_of(slot));
        }
    }

    __device__ __forceinline__ void find_rows(int head) {
        if constexpr (S::kRaw) this->head = head;
        k_row = static_cast<const char*>(p.k) + head * p.k_stride[2];
        v_row = static_cast<const char*>(p.v) + head * p.v_stride[2];
        if (p.kv_layout == kStrided) {
            const int64_t first = static_cast<int64_t>(tile) * kTile;
            k_row += b * p.k_stride[0] + first * p.k_stride[1];
            v_row += b * p.v_stride[0] + first * p.v_stride[1];
        }
        if constexpr (S::kInBlocks) find_lane_rows(*this);
    }

    __device__ __forceinline__ void next_item(int stage) {
        if (flags & kSlotFinal) {
            done = true;
            return;
        }
        __syncwarp();
        Cursor at = cursor();
        at.item_begin += at.seq.key_tiles;
        if (++at.row_tile == at.seq.row_tiles) {
            at.row_tile = 0;
            if (++at.head == p.kv_heads) {
                at.head = 0;
                do {
                    b++;
                    at.seq = read_sequence<S::kRows, S::kTerms>(p, b, at.slice.taken);
                } while (at.seq.row_tiles == 0);
                take_sequence(at.seq);
            }
        }
        enter_item(at, stage);
        prefetch_query(at);
    }

    // The next item's queries come up while keys do.
    __device__ __forceinline__ void prefetch_query(const Cursor& at) const {
        const int packed = at.row_tile * S::kRows + warp;
        const int token = at.seq.tokens == 1 ? 0 : packed / p.group;
        const int unit = 128 / element_bytes(p.q_dtype);  // one line a lane
        if (warp < S::kRows && packed < at.seq.tokens * p.group && lane * unit < p.head_dim_qk) {
            const int64_t q_head = static_cast<int64_t>(at.head) * p.group + packed - token * p.group;
            prefetch(static_cast<const char*>(p.q) + (at.seq.first_token + token) * p.q_stride[0] +
                     q_head * p.q_stride[1] + lane * unit * p.q_stride[2]);
        }
    }

    __device__ __forceinline__ const int32_t* table() const {
        return (p.kv_layout == kBlockTable ? p.block_table : p.page_indices) + page_row;
    }

    // What comes with a tile beside its rows.
    __device__ __forceinline__ char* stage_memory(int stage) const {
        return shared + S::kStageAt + (warp * S::kStages + stage) * S::kStageBytes;
    }

    // The mask's rows for an item: as many 16-byte units a row as an element has bytes. Rows past the last are that once more.
    __device__ __forceinline__ void find_mask(int head, int row_tile, int tokens) {
        const Terms& t = terms_of(p);
        this->mask = nullptr;
        if (S::kWide || !mask_is_staged(t)) return;
        const int size = mask_element_bytes(t.mask_element), row = lane / size;
        if (row >= S::kRows) return;
        const int packed = min(row_tile * S::kRows + row, tokens * p.group - 1);
        const int token = tokens == 1 ? 0 : packed / p.group;
        const int64_t q_head = static_cast<int64_t>(head) * p.group + packed - token * p.group;
        this->mask = static_cast<const char*>(t.mask) + b * t.mask_stride[0] + q_head * t.mask_stride[1] +
                     token * t.mask_stride[2] + lane % size * 16;
    }

    // Brings a tile's mask elements, row after row, with zeros for keys that there are not.
    __device__ __forceinline__ void copy_mask(int stage, int base, int live) const {
        if (this->mask == nullptr || live == 0) return;
        const int size = mask_element_bytes(terms_of(p).mask_element);
        const int bytes = min(max(live * size - lane % size * 16, 0), 16);
        copy_async16(shared_address(stage_memory(stage)) + lane * 16,
                     bytes > 0 ? this->mask + static_cast<int64_t>(base) * size : this->nowhere(), bytes);
    }

    // Copies the warp's next tile into a slot; says whether a page of it does not exist.
    __device__ __forceinline__ bool copy_next(int stage, int base, int live) {
        if constexpr (S::kTerms && !S::kWide) copy_mask(stage, base, live);
        if constexpr (S::kWide) {
            return copy_wide(*this, stage, base, live);
        } else if constexpr (S::kPacked) {
            return copy_packed(*this, stage, base, live);
        } else if constexpr (S::kInBlocks) {
            return copy_blocks(*this, stage, base, live);
        } else if constexpr (S::kRaw) {
            return copy_raw(stage, base, live);
        } else {
            return copy_tile(stage, base, live);
        }
    }

    __device__ __forceinline__ bool copy_tile(int stage, int base, int live) {
        const uint32_t slot_address = shared_address(shared) + (warp * S::kStages + stage) * S::kSlotBytes;
        bool bad = false;
        if (regular()) {
            const char* k = k_row;
            const char* v = v_row;
            if (p.kv_layout == kStrided) {
                k_row += static_cast<int64_t>(step) * kTile * p.k_stride[1];
                v_row += static_cast<int64_t>(step) * kTile * p.v_stride[1];
            } else if (live > 0) {
                const int page = base >> page_shift;
                const int entry = entries(stage)[regular() ? 0 : lane % kTile];
                bad = entry < 0 || entry >= p.num_pages;
                if (bad) live = 0;
                const int64_t inner = base - (page << page_shift);
                k += entry * p.k_stride[0] + inner * p.k_stride[1];
                v += entry * p.v_stride[0] + inner * p.v_stride[1];
            }
            if (live > 0 && !(p.flags & kFlagNoBulk)) {
                this->template copy_regular<S::kDimQk, 0>(slot_address, k, p.k_stride[1], live, p.head_dim_qk);
                this->template copy_regular<S::kDimV, S::kVAt>(slot_address, v, p.v_stride[1], live, p.head_dim_v());
            } else if (live > 0) {
                const bool of_v = lane >= kTile;
                const int64_t r = lane % kTile;
                this->copy_elements(p, slot_address, of_v ? v + r * p.v_stride[1] : k + r * p.k_stride[1], live);
            }
        } else {
            // Lane r addresses row r of K, lane 16 + r row r of V.
            const bool of_v = lane >= kTile;
            const char* from = of_v ? v_row : k_row;
            const int slot = base + lane % kTile;
            const int entry = entries(stage)[regular() ? 0 : lane % kTile];
            if (lane % kTile < live) {
                const int page = page_of(slot);
                bad = entry < 0 || entry >= p.num_pages;
                from += entry * (of_v ? p.v_stride[0] : p.k_stride[0]) +
                        (slot - page * p.page_size) * (of_v ? p.v_stride[1] : p.k_stride[1]);
            }
            bad = __any_sync(kAllLanes, bad);
            if (bad) live = 0;
            if (live > 0 && !(p.flags & kFlagNoBulk)) {
                this->template copy_rows<S::kDimQk, 0>(slot_address, from, 0, live, p.head_dim_qk);
                this->template copy_rows<S::kDimV, S::kVAt>(slot_address, from, kTile, live, p.head_dim_v());
            } else if (live > 0) {
                this->copy_elements(p, slot_address, from, live);
            }
        }
        return bad;
    }

    // Fills a slot with the warp's next tile of an evenly split item.
    __device__ __forceinline__ void fill_even(int stage) {
        if (tile < tile_end) {
            const int base = tile * kTile;
            end_even(stage, copy_next(stage, base, min(max(keys - base, 0), kTile)));
        }
        copy_async_commit();
    }
    // Reports the pages of the tile at `base`, one of which does not exist.
    __device__ __forceinline__ void report_pages(int base) const {
        const int first = page_of(base), last = page_of(base + min(keys - base, kTile) - 1);
        report_page(p, b, page_row + first, last - first + 1);
    }
    __device__ __forceinline__ void end_even(int stage, bool bad) {
        if (p.kv_layout != kStrided) {
            if (notes()) info(stage)->x = bad ? kSlotPoison : 0;
            ask_entry(stage);
        }
        tile += step;
    }

    // Fills a slot with the warp's next tile (possibly an empty one: every warp has a slot of every item).
    __device__ __forceinline__ void fill(int stage) {
        if (done) {
            end_slots(stage);
            return;
        }
        const int base = tile * kTile;
        const int live = tile < tile_end ? min(max(keys - base, 0), kTile) : 0;
        const bool bad = copy_next(stage, base, live);
        end_fill(stage, base, live, bad);
    }
    __device__ __forceinline__ void end_slots(int stage) const {
        if (notes()) info(stage)->x = kSlotEnd;
        copy_async_commit();
        __syncwarp();
    }
    __device__ __forceinline__ void end_fill(int stage, int base, int live, bool bad) {
        const bool last = (S::kWide ? tile - walker() : tile) + S::kWalkers >= tile_end;
        if (p.kv_layout != kStrided && !last) ask_entry(stage);
        copy_async_commit();

        if (notes()) {
            int4* const info = this->info(stage);
            info[0] = make_int4(flags | (last ? kSlotLast : 0) | (bad ? kSlotPoison : 0), base, bad ? 0 : live, b);
            if (flags & kSlotFirst) {
                const int4* item = reinterpret_cast<const int4*>(&cursor().item);
                info[1] = item[0], info[2] = item[1];
            }
            if (bad) report_pages(base);
        }
        __syncwarp();

        flags &= ~kSlotFirst;
        tile += S::kWalkers;
        if (last) next_item(stage + 1 == S::kStages ? 0 : stage + 1);
    }

    // The same of rows that stay as they are in memory: the 16-byte units that hold them, so that a row begins up to 15 bytes
    // into its place. Says where each row lies: its copy, or where there are none (kFlagNoBulk) itself; and brings its scale.
    __device__ __forceinline__ bool copy_raw(int stage, int base, int live) {
        const Terms& t = terms_of(p);
        const uint32_t slot_address = shared_address(shared) + (warp * S::kStages + stage) * S::kSlotBytes;
        RawRows& table = *reinterpret_cast<RawRows*>(stage_memory(stage) + S::kRowsAt);
        const bool of_v = lane >= kTile;
        const int row = lane % kTile, slot = base + row;
        const char* from = of_v ? v_row : k_row;
        int64_t outer = b, inner = slot;
        bool bad = false;
        if (p.kv_layout == kStrided) {
            from += row * (of_v ? p.v_stride[1] : p.k_stride[1]);
            k_row += static_cast<int64_t>(step) * kTile * p.k_stride[1];
            v_row += static_cast<int64_t>(step) * kTile * p.v_stride[1];
        } else if (row < live) {
            const int entry = entries(stage)[regular() ? 0 : row], page = page_of(slot);
            bad = entry < 0 || entry >= p.num_pages;
            outer = entry, inner = slot - page * p.page_size;
            from += outer * (of_v ? p.v_stride[0] : p.k_stride[0]) + inner * (of_v ? p.v_stride[1] : p.k_stride[1]);
        }
        bad = __any_sync(kAllLanes, bad);
        if (bad) live = 0;
        const bool raw = !(p.flags & kFlagNoBulk);
        const uint32_t place = slot_address + (of_v ? S::kVAt + row * S::RowsV::kPitch : row * S::RowsK::kPitch);
        table.at[lane] = raw ? place + (reinterpret_cast<uint64_t>(from) & 15) : reinterpret_cast<uint64_t>(from);
        const char* scale = static_cast<const char*>(of_v ? t.v_scale : t.k_scale);
        if (row < live && scale != nullptr) {
            const int64_t* stride = of_v ? t.v_scale_stride : t.k_scale_stride;
            copy_async4(shared_address(&table.scale[lane]),
                        scale + outer * stride[0] + inner * stride[1] + this->head * stride[2]);
        }
        if (raw && live > 0) {
            const int k_bytes = row_bytes(t.k_dtype, p.head_dim_qk), v_bytes = row_bytes(t.v_dtype, p.head_dim_v());
            if (regular() && live == kTile && ((p.k_stride[1] | p.v_stride[1]) & 15) == 0) {
                // Rows lie at one stride, and all of them as far into a unit as the first.
                const uint64_t first = reinterpret_cast<uint64_t>(from);
                this->template copy_even_rows<S::kDimQk, S::RowsK::kPitch>(
                    slot_address, __shfl_sync(kAllLanes, first, 0), p.k_stride[1], k_bytes);
                this->template copy_even_rows<S::kDimV, S::RowsV::kPitch>(
                    slot_address + S::kVAt, __shfl_sync(kAllLanes, first, kTile), p.v_stride[1], v_bytes);
            } else {
                this->template copy_units<S::kDimQk, S::RowsK::kPitch>(slot_address, from, 0, live, k_bytes);
                this->template copy_units<S::kDimV, S::RowsV::kPitch>(slot_address + S::kVAt, from, kTile, live, v_bytes);
            }
        }
        return bad;
    }

    __device__ __forceinline__ int page_of(int slot) const {
        return page_shift >= 0 ? slot >> page_shift
                               : static_cast<int>(static_cast<unsigned>(slot) / static_cast<unsigned>(p.page_size));
    }
};

}  // namespace treeattn
