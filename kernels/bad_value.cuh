// The entry of an input that is out of range, found again for the message that names it.
//
// Kernels that check a sequence keep what failed and not the value, so that checking costs them nothing. What is here runs only
// where a step has failed, and says what src/cpu/sequences.rs does; of several causes in one sequence perhaps another. What is
// called among tiles takes few registers.
#pragma once

#include "faults.cuh"
#include "format.cuh"
#include "params.cuh"
#include "terms.cuh"

namespace treeattn {

// Entry `index` of an input holds `found` instead of `least` to `most` (partial::BadValue). Which input: `cause`; kFaultNone:
// none was found. `reported`: the cause that kernels report it under.
struct BadValue {
    uint32_t reported, cause;
    int64_t index, found, least, most;
};

constexpr int64_t kMostPosition = INT32_MAX;
constexpr int64_t kMostLooks = 1 << 16;  // at entries of tables and positions: one thread looks, and peers may wait

// A sequence as far as its inputs are good.
struct CheckedSequence {
    int64_t first_token, tokens, keys, first_page;
};

// The most keys up to `limit` that fit; fewer fit, too.
template <class Fits>
__device__ __forceinline__ int64_t most_that_fit(int64_t limit, const Fits& fits) {
    int64_t most = 0;
#pragma unroll 1
    while (most < limit) {
        const int64_t middle = most + (limit - most + 1) / 2;
        if (fits(static_cast<int>(middle))) {
            most = middle;
        } else {
            limit = middle - 1;
        }
    }
    return most;
}

// The query tokens of sequence b.
static __device__ __noinline__ BadValue bad_query_start(const DecodeParams& p, int b, CheckedSequence& s) {
    const int64_t all = p.query_tokens;
    if (p.query_start == nullptr) {
        s.tokens = all / p.batch, s.first_token = b * s.tokens;
        return {kFaultNone};
    }
    int64_t taken = 0;  // where the tokens of the sequences before it end
#pragma unroll 1
    for (int i = 1; i <= b; i++) taken = max(taken, min(static_cast<int64_t>(p.query_start[i]), all));
    const int64_t begin = p.query_start[b], end = p.query_start[b + 1];
    s.first_token = begin, s.tokens = end - begin;
    if (begin < taken || begin > all) return {kFaultQueryStart, kFaultQueryStart, b, begin, taken, all};
    if (end < begin || end > all) return {kFaultQueryStart, kFaultQueryStart, b + 1, end, begin, all};
    return {kFaultNone};
}

// Its local slots, and where its pages begin.
static __device__ __noinline__ BadValue bad_length(const DecodeParams& p, const Terms* t, int b, CheckedSequence& s) {
    int64_t room = p.kv_capacity;
    s.keys = 0, s.first_page = b * p.block_table_stride;
    if (p.kv_layout == kCsrPages) {
        const int64_t begin = p.page_indptr[b], end = p.page_indptr[b + 1], entries = p.num_page_indices;
        const int64_t page = p.page_size, full = (end - begin - 1) * page;
        s.first_page = begin;
        if (begin < 0 || begin > entries) return {kFaultPageRow, kFaultPageIndptr, b, begin, 0, entries};
        if (end < begin || end > entries) return {kFaultPageRow, kFaultPageIndptr, b + 1, end, begin, entries};
        if (p.last_page_len != nullptr && end > begin) {
            const int64_t last = p.last_page_len[b];
            if (last < 1 || last > page) return {kFaultPageRow, kFaultLastPageLen, b, last, 1, page};
            const int64_t most = begin + (room + page - 1) / page;
            if (full >= room) return {kFaultKvLength, kFaultPageIndptr, b + 1, end, begin, most};
            if (last > room - full) return {kFaultKvLength, kFaultLastPageLen, b, last, 1, room - full};
            s.keys = full + last;
            return {kFaultNone};
        }
        room = min(room, full + page);
    }
    if (p.kv_length == nullptr) return {kFaultNone};
    if (p.kv_layout == kStrided && p.batch > 1) {
        room = most_that_fit(room, [&](int keys) {
            bool fit = strided_fits(p.k_stride, b, keys, p.k_end) && strided_fits(p.v_stride, b, keys, p.v_end);
            if (t != nullptr && t->k_scale != nullptr) fit &= strided_fits(t->k_scale_stride, b, keys, t->k_scale_end);
            if (t != nullptr && t->v_scale != nullptr) fit &= strided_fits(t->v_scale_stride, b, keys, t->v_scale_end);
            return fit;
        });
    }
    s.keys = p.kv_length[b];
    if (s.keys < 0 || s.keys > room) return {kFaultKvLength, kFaultKvLength, b, s.keys, 0, room};
    return {kFaultNone};
}

// Entries of its page lists that are no pages.
static __device__ __noinline__ BadValue bad_page(const DecodeParams& p, const Terms* t, const CheckedSequence& s) {
    const bool is_csr = p.kv_layout == kCsrPages;
    const int32_t* const table = is_csr ? p.page_indices : p.block_table;
    const int64_t used = (s.keys + p.page_size - 1) / p.page_size, stride = t == nullptr ? 0 : t->page_index_head_stride;
    int64_t looks = 0;
#pragma unroll 1
    for (int64_t head = 0; head < (stride == 0 ? 1 : p.kv_heads); head++) {
#pragma unroll 1
        for (int64_t i = 0; i < used && looks < kMostLooks; i++, looks++) {
            const int64_t entry = s.first_page + head * stride + i;
            const int page = table[entry];
            if (page >= 0 && page < p.num_pages) continue;
            const int64_t most = static_cast<int64_t>(p.num_pages) - 1;
            return {kFaultPage, is_csr ? kFaultPageIndices : kFaultBlockTable, entry, page, 0, most};
        }
    }
    return {kFaultNone};
}

// Positions of its query tokens and keys.
static __device__ __noinline__ BadValue bad_position(const DecodeParams& p, const Terms* t, int b, const CheckedSequence& s) {
    if (p.query_position == nullptr) {
        const int64_t global = p.global_length[b];
        if (global < s.tokens) return {kFaultPosition, kFaultGlobalLength, b, global, s.tokens, kMostPosition};
    } else {
#pragma unroll 1
        for (int64_t i = s.first_token; i < s.first_token + min(s.tokens, kMostLooks); i++) {
            const int position = p.query_position[i];
            if (position < 0) return {kFaultPosition, kFaultQueryPosition, i, position, 0, kMostPosition};
        }
    }
    if (p.placement == kContiguous) {
        const int64_t start = start_of(p, b), most = kMostPosition - s.keys + 1;
        if (start < 0 || start > most) return {kFaultPosition, kFaultKvStart, b, start, 0, most};
    } else if (p.placement == kInterleaved) {
        if (!positions_fit(p, b, static_cast<int>(s.tokens), static_cast<int>(s.keys))) {
            return {kFaultPosition, kFaultKvLength, b, s.keys, 0, s.keys - 1};
        }
    } else {
        const int64_t stride = t == nullptr ? 0 : t->kv_position_head_stride;
        int64_t looks = 0;
#pragma unroll 1
        for (int64_t head = 0; head < (stride == 0 ? 1 : p.kv_heads); head++) {
#pragma unroll 1
            for (int64_t i = 0; i < s.keys && looks < kMostLooks; i++, looks++) {
                const int64_t at = b * p.kv_position_stride + head * stride + i;
                const int position = p.kv_position[at];
                if (position < 0) return {kFaultPosition, kFaultKvPosition, at, position, 0, kMostPosition};
            }
        }
    }
    return {kFaultNone};
}

// What is wrong with sequence b. `t`: null in kernels without Terms.
static __device__ __noinline__ BadValue find_bad_value(const DecodeParams& p, const Terms* t, int b) {
    CheckedSequence s;
    const BadValue tokens = bad_query_start(p, b, s);
    if (tokens.cause != kFaultNone) return tokens;
    const BadValue length = bad_length(p, t, b, s);
    if (length.cause != kFaultNone || s.keys == 0) return length;
    if (t != nullptr && t->mask_element != kMaskNone && s.tokens > 0) {
        const auto reaches = [&](int keys) { return mask_reaches(p, b, static_cast<int>(s.tokens), keys); };
        const int64_t room = most_that_fit(s.keys, reaches);
        if (room < s.keys) return {kFaultMask, kFaultMask, b, s.keys, 0, room};
    }
    if (t == nullptr ? needs_positions<false>(p) : needs_positions<true>(p)) {
        const BadValue position = bad_position(p, t, b, s);
        if (position.cause != kFaultNone) return position;
    }
    return p.kv_layout == kStrided ? BadValue{kFaultNone} : bad_page(p, t, s);
}

// Whether the value of an earlier sequence's bad data, or of the same, lies before the host: a key (pack_status) in the first of
// the words that follow. It reads host memory.
__device__ __forceinline__ bool has_value(const DecodeParams& p, int b, uint32_t cause) {
    const auto* host = reinterpret_cast<const uint64_t*>(load_word(p.workspace.found + 1));
    return load_word(host + kValueKey) >= pack_status(b, cause);
}

// Leaves a value for the host, unless has_value; an index below 0: it was not found, and is not looked for again. The host takes
// what lies there by setting the key to 0. Any number of threads may call it at once.
static __device__ __noinline__ void leave_value(const DecodeParams& p, int b, uint32_t cause, int64_t index, int64_t found,
                                                int64_t least, int64_t most) {
    auto* const lock = reinterpret_cast<unsigned long long*>(p.workspace.found);
    auto* const host = reinterpret_cast<uint64_t*>(load_word(p.workspace.found + 1));
    // The thread that has the lock gives it back before the loop's end, so that others of its warp may spin.
    bool is_done = false;
    while (!is_done) {
        if (atomicCAS(lock, 0ull, 1ull) != 0) continue;
        __threadfence();
        if (!has_value(p, b, cause)) {
            store_word(host + kValueKey, 0);
            __threadfence_system();
            store_word(host + kValueIndex, index), store_word(host + kValueFound, found);
            store_word(host + kValueLeast, least), store_word(host + kValueMost, most);
            __threadfence_system();
            store_word(host + kValueKey, pack_status(b, cause));
        }
        __threadfence_system();
        atomicExch(lock, 0ull);
        is_done = true;
    }
}

// Leaves the value that is bad in sequence b, which a check found for `cause`, and gives the cause that names one argument;
// `cause` where there is none, or one lies there. It takes many registers, and may take long.
template <bool HasTerms>
static __device__ __noinline__ uint32_t leave_found_value(const DecodeParams& p, int b, uint32_t cause) {
    if (has_value(p, b, cause)) return cause;
    const Terms* terms = nullptr;
    if constexpr (HasTerms) terms = &terms_of(p);
    const BadValue v = find_bad_value(p, terms, b);
    if (v.reported != cause) {
        leave_value(p, b, cause, -1, 0, 0, 0);
        return cause;
    }
    leave_value(p, b, v.cause, v.index, v.found, v.least, v.most);
    return v.cause;
}

}  // namespace treeattn
