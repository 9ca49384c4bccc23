// A decode kernel's part in an exchange: what it pushes where a rank on its own would write its output, and what comes
// after its last item.
//
// A row goes to the ranks that merge it as soon as the block that completes it has it. In the first form another launch
// (exchange.cu) merges what came. In the second the last blocks of the grid do, once they owe nothing themselves: no
// block waits that has a tile, a merge or a push left, and the launches that depend on this one come up only when the
// waiting is over. So all blocks get their turn as long as those that wait, of all kernels on the GPU, leave room for one
// more.
#pragma once

#include "exchange.cuh"
#include "item.cuh"

namespace treeattn {

constexpr int kMostTileRows = 16;

// What pushes need to know, in shared memory: it comes while the first keys do.
struct alignas(16) Doors {
    uint64_t slots[64];  // of parity 0: this rank's in each rank's window
    uint64_t consumed, arrived;
    uint64_t failed, fault;
    // Of the step's view.
    const uint64_t* window;
    int64_t parity_words;
    int32_t world, rank, mode, heads, wire_dtype;
    int32_t row_words, group;
    float lse[kMostTileRows];  // of the rows of the item at hand
};
static_assert(kConsumed % 2 == 0 && kFailed == kConsumed + 2, "two words of a window a copy");

// Asks for the doors. After the dependency wait; await_doors, or a wait for the first copies that the first warp commits
// after it, comes before they are used, and then a barrier.
static __device__ __noinline__ void ask_for_doors(const DecodeParams& p, Doors* doors) {
    const ExchangeView& v = p.exchange;
    const uint32_t to = shared_address(doors);
    const int i = threadIdx.x;
    if (i >= 32) return;
    // Behind the addresses lie others, so that an odd number of them can be copied in twos.
    if (i * 2 < v.world) copy_async16(to + i * 16, v.peers + i * 2, 16);
    if (i < 2) copy_async16(to + offsetof(Doors, consumed) + i * 16, v.window + kConsumed + i * 2, 16);
    if (i == 31) {
        doors->window = v.window, doors->parity_words = v.parity_words;
        doors->world = v.world, doors->rank = v.rank, doors->mode = v.mode, doors->heads = v.heads;
        doors->wire_dtype = v.wire_dtype;
        doors->group = p.group;
        doors->row_words = static_cast<int32_t>(row_words(p.head_dim_v, v.wire_dtype));
    }
}

// What is not committed is not waited for.
__device__ __forceinline__ void await_doors() {
    copy_async_commit();
    copy_async_wait<0>();
}

__device__ __forceinline__ Epoch epoch_of(const Doors& doors) {
    return Epoch{next_epoch(static_cast<uint32_t>(doors.consumed)), doors.failed != 0, 0, -1, 0};
}

// Calls `send(slot's word)` for every rank that gets words of a head.
template <class Send>
__device__ __forceinline__ void for_doors(const Doors& doors, const Epoch& e, int head, int64_t at, Send send) {
    at += e.parity() * doors.parity_words;
    const auto slot = [&](int rank) { return reinterpret_cast<uint64_t*>(doors.slots[rank]) + at; };
    const int world = doors.world;
    if (doors.mode != kOneShot) {
        send(slot(owner_of(head, doors.heads, world)));
        return;
    }
    // The own window last: the others' words have the longer way.
    int rank = doors.rank;
#pragma unroll 1
    for (int n = 0; n < world; n++) {
        if (++rank == world) rank = 0;
        send(slot(rank));
    }
}

// Pushes the rows of a finished item, by all threads of a block: o normalised, `pitch` floats a row, the natural lses in
// the doors. One call an item, so that kernels which write their rows instead have next to nothing to step over.
static __device__ __noinline__ void push_item(const Doors& doors, const Item& item, int tile_rows, int rows,
                                              const float* o, int pitch) {
    const Epoch e = epoch_of(doors);
    if (e.broken) return;
    delay(Point::kPush, e.number);
    const Wire wire(doors.wire_dtype);
    const int pairs = (doors.row_words - kRowHead) / 2, group = doors.group;
    int head;
    const auto row_at = [&](int row) {
        const int packed = item.row_tile * tile_rows + row, token = item.tokens == 1 ? 0 : packed / group;
        head = item.head * group + packed - token * group;
        return kHeaderWords + (static_cast<int64_t>(item.first_token + token) * doors.heads + head) * doors.row_words;
    };
    for (int i = threadIdx.x; i < rows * pairs; i += blockDim.x) {
        const int row = i / pairs, n = (i - row * pairs) * 2;
        const int64_t at = row_at(row) + kRowHead + n;
        const float* from = o + row * pitch;
        uint32_t x, y;
        if (wire.is_f32) {
            x = __float_as_uint(from[n]), y = __float_as_uint(from[n + 1]);
        } else {
            x = wire.pack(make_float2(from[2 * n], from[2 * n + 1]));
            y = wire.pack(make_float2(from[2 * n + 2], from[2 * n + 3]));
        }
        for_doors(doors, e, head, at,
                  [&](uint64_t* to) { store_words(to, packet(x, e.number), packet(y, e.number)); });
    }
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
        const float lse = doors.lse[row];
        // Bad data of the row's own sequence has been reported: it made the row NaN.
        const uint32_t fault = lse == lse ? 0 : pack_fault(load_word(doors.window + kFault), doors.rank);
        const int64_t at = row_at(row);
        for_doors(doors, e, head, at, [&](uint64_t* to) {
            store_words(to, packet(__float_as_uint(lse), e.number), packet(fault, e.number));
        });
    }
}

// Pushes an empty row, by one warp.
static __device__ __noinline__ void push_empty(const Doors& doors, int64_t token, int head) {
    const Epoch e = epoch_of(doors);
    if (e.broken) return;
    const int64_t at = kHeaderWords + (token * doors.heads + head) * doors.row_words;
    for (int n = threadIdx.x % 32 * 2; n < doors.row_words; n += 64) {
        const uint64_t first = packet(n == 0 ? __float_as_uint(-infinity()) : 0, e.number), second = packet(0, e.number);
        for_doors(doors, e, head, at + n, [&](uint64_t* to) { store_words(to, first, second); });
    }
}

// After a block's last item, by all of its threads; the doors have come. `step` is shared memory that nobody needs any
// more.
static __device__ __noinline__ void end_exchange(const DecodeParams& p, const Doors& doors, ExchangeParams& step) {
    const ExchangeView& v = p.exchange;
    Epoch e = epoch_of(doors);
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    if (blockIdx.x == 0 && warp == 0 && !e.broken) push_header(v, e);
    if (p.waiting == 0) return;
    const int waiting = min(p.waiting, static_cast<int>(gridDim.x));
    const int nth = static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x);
    if (nth < waiting) {
        if (threadIdx.x < sizeof(ExchangeView) / 16) {
            reinterpret_cast<int4*>(&step.view)[threadIdx.x] = reinterpret_cast<const int4*>(&v)[threadIdx.x];
        }
        if (threadIdx.x == 32 % blockDim.x) {
            step.out = p.out, step.out_lse = p.lse;
            for (int i = 0; i < 3; i++) step.out_stride[i] = p.out_stride[i];
            for (int i = 0; i < 2; i++) step.out_lse_stride[i] = p.lse_stride[i];
            step.first_row = 0, step.rows = static_cast<int64_t>(p.query_tokens) * v.heads;
            step.head_dim = p.head_dim_v;
            step.out_dtype = p.out_dtype;
        }
        __syncthreads();
        receive(step, e, static_cast<int64_t>(nth) * warps + warp, static_cast<int64_t>(waiting) * warps);
        __syncthreads();
    }
    dependency_launch();
    if (threadIdx.x == 0) consume(v, e, gridDim.x, true);
}

// The same, of a kernel of this shape; nothing where there is no exchange.
template <class S>
__device__ __forceinline__ void end_step(const DecodeParams& p) {
    extern __shared__ __align__(128) char shared[];
    if (!(p.flags & kFlagPush)) return;
    await_doors();
    __syncthreads();
    end_exchange(p, *reinterpret_cast<const Doors*>(shared + S::kDoorsAt), *reinterpret_cast<ExchangeParams*>(shared));
}

}  // namespace treeattn
