// One sequence of a step as kernels read and check it, and how bad data in it is reported.
#pragma once

#include "bad_value.cuh"
#include "format.cuh"
#include "ll.cuh"
#include "numbers.cuh"
#include "params.cuh"
#include "ptx.cuh"
#include "terms.cuh"

namespace treeattn {

// One sequence as read and checked.
struct Sequence {
    int first_token;
    int tokens;       // query tokens
    int keys;         // local slots; 0 where faulty
    uint32_t fault;
    int64_t page_row; // its first entry in the page table
    int row_tiles;
    int key_tiles;    // at least 1

    __device__ __forceinline__ int64_t units(int kv_heads) const {
        return static_cast<int64_t>(key_tiles) * row_tiles * kv_heads;
    }
};
// One of which only the key tiles from first_tile on, key_tiles of them, hold what its query tokens can see.
struct SeenSequence : Sequence {
    int first_tile;
};
template <bool Terms>
struct SequenceKind {
    using Type = Sequence;
};
template <>
struct SequenceKind<true> {
    using Type = SeenSequence;
};
// What a kernel with or without Terms reads.
template <bool Terms>
using SequenceOf = typename SequenceKind<Terms>::Type;

__device__ __forceinline__ void read_keys(const DecodeParams& p, int b, Sequence& s) {
    int64_t room = p.kv_capacity;
    s.page_row = 0;
    if (p.kv_layout == kBlockTable) s.page_row = b * p.block_table_stride;
    if (p.kv_layout == kCsrPages) {
        const int64_t begin = p.page_indptr[b], end = p.page_indptr[b + 1];
        if (begin < 0 || end < begin || end > p.num_page_indices) {
            s.fault = kFaultPageRow;
            return;
        }
        s.page_row = begin;
        const int64_t pages = end - begin;
        if (p.last_page_len != nullptr && pages > 0) {
            const int last = p.last_page_len[b];
            const int64_t keys = (pages - 1) * p.page_size + last;
            if (last < 1 || last > p.page_size) {
                s.fault = kFaultPageRow;
            } else if (keys > room) {
                s.fault = kFaultKvLength;
            } else {
                s.keys = static_cast<int>(keys);
            }
            return;
        }
        room = min(room, pages * p.page_size);
    }
    if (p.kv_length == nullptr) return;
    const int keys = p.kv_length[b];
    bool fits = keys <= room;
    if (p.kv_layout == kStrided && p.batch > 1 && keys > 0 && fits) {
        fits = strided_fits(p.k_stride, b, keys, p.k_end) && strided_fits(p.v_stride, b, keys, p.v_end);
    }
    if (keys < 0 || !fits) {
        s.fault = kFaultKvLength;
    } else {
        s.keys = keys;
    }
}

// Reads sequence b; `taken` is where the query tokens of the sequences before it end, so that no token has two owners.
template <int Rows, bool Terms>
__device__ __forceinline__ SequenceOf<Terms> read_sequence(const DecodeParams& p, int b, int& taken) {
    SequenceOf<Terms> s;
    s.keys = 0;
    s.fault = kFaultNone;
    if (p.query_start == nullptr) {
        s.tokens = p.batch == 1 ? p.query_tokens : p.query_tokens / p.batch;
        s.first_token = b * s.tokens;
    } else {
        const int begin = p.query_start[b], end = p.query_start[b + 1], all = p.query_tokens;
        if (begin < taken || end < begin || end > all) s.fault = kFaultQueryStart;
        const int from = min(max(begin, taken), all), to = min(max(end, taken), all);
        s.first_token = from;
        s.tokens = max(to - from, 0);
        taken = max(taken, to);
    }
    if (s.fault == kFaultNone) read_keys(p, b, s);
    s.row_tiles = (s.tokens * p.group + Rows - 1) / Rows;
    if constexpr (Terms) {
        const auto& t = terms_of(p);
        if (p.kv_layout == kStrided && p.batch > 1 && s.keys > 0) {
            const bool k_fits = t.k_scale == nullptr || strided_fits(t.k_scale_stride, b, s.keys, t.k_scale_end);
            const bool v_fits = t.v_scale == nullptr || strided_fits(t.v_scale_stride, b, s.keys, t.v_scale_end);
            if (!k_fits || !v_fits) s.fault = kFaultKvLength, s.keys = 0;
        }
        if (t.mask_element != kMaskNone && s.keys > 0 && s.tokens > 0 && !mask_reaches(p, b, s.tokens, s.keys)) {
            s.fault = kFaultMask, s.keys = 0;
        }
        const SlotRange seen = visible_slots(p, b, s.first_token, s.tokens, s.keys);
        s.first_tile = seen.begin / kTile;
        s.key_tiles = max(static_cast<int>((static_cast<unsigned>(seen.end) + kTile - 1) / kTile) - s.first_tile, 1);
    } else {
        s.key_tiles = max(static_cast<int>((static_cast<unsigned>(s.keys) + kTile - 1) / kTile), 1);
    }
    return s;
}

// Notes bad data: for the host, and where rows are pushed for the ranks that get them. Block 0 notes that of all sequences,
// for some have no rows; every block that of a sequence it takes, before it pushes rows of it. The first sequence's stays.
static __device__ __noinline__ void report_fault(const DecodeParams& p, int b, uint32_t cause) {
    const auto sequence = static_cast<uint32_t>(b);
    if (p.flags & kFlagPush) {
        note_bad_data(p.exchange, pack_status(sequence, cause, p.exchange.rank));
    } else {
        note_status(p.workspace.status, pack_status(sequence, cause));
    }
}

// The same, and its value: not among tiles.
template <bool Terms>
static __device__ __noinline__ void report_with_value(const DecodeParams& p, int b, uint32_t cause) {
    report_fault(p, b, leave_found_value<Terms>(p, b, cause));
}

// Reports that one of `count` entries of a page table, from `first` on, is no page.
static __device__ __noinline__ void report_page(const DecodeParams& p, int b, int64_t first, int count) {
    const bool is_csr = p.kv_layout == kCsrPages;
    const uint32_t cause = is_csr ? kFaultPageIndices : kFaultBlockTable;
    const int32_t* const table = is_csr ? p.page_indices : p.block_table;
    if (!has_value(p, b, cause)) {
        int64_t entry = first;
        while (entry + 1 < first + count && table[entry] >= 0 && table[entry] < p.num_pages) entry++;
        leave_value(p, b, cause, entry, table[entry], 0, static_cast<int64_t>(p.num_pages) - 1);
    }
    report_fault(p, b, cause);
}

// Reports that one of `count` positions of keys, from `first` on, is negative.
static __device__ __noinline__ void report_position(const DecodeParams& p, int b, int64_t first, int count) {
    if (!has_value(p, b, kFaultKvPosition)) {
        int64_t at = first;
        while (at + 1 < first + count && p.kv_position[at] >= 0) at++;
        leave_value(p, b, kFaultKvPosition, at, p.kv_position[at], 0, kMostPosition);
    }
    report_fault(p, b, kFaultKvPosition);
}

}  // namespace treeattn
