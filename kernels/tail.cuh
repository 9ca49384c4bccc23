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

namespace treeattn {

// What pushes need to know, in shared memory: it comes while the first keys do.
struct alignas(16) PushState {
    uint64_t slots[kMaxRanks];  // of parity 0: this rank's in each rank's window
    uint64_t consumed, arrived;
    uint64_t failed, fault;
    // Of the step's view.
    const uint64_t* window;
    int64_t parity_words;
    int32_t world, rank, mode, heads, wire_dtype;
    int32_t row_words;
};
static_assert(kConsumed % 2 == 0 && kFailed == kConsumed + 2, "two words of a window a copy");

// Asks for the push state. After the dependency wait; await_push_state, or a wait for the first copies that the first warp commits
// after it, comes before they are used, and then a barrier.
static __device__ __noinline__ void ask_push_state(const DecodeParams& p, PushState* push) {
    const ExchangeView& v = p.exchange;
    const uint32_t to = shared_address(push);
    const int i = threadIdx.x;
    if (i >= 32) return;
    // Behind the addresses lie others, so that an odd number of them can be copied in twos.
    if (i * 2 < v.world) copy_async16(to + i * 16, v.peers + i * 2, 16);
    if (i < 2) copy_async16(to + offsetof(PushState, consumed) + i * 16, v.window + kConsumed + i * 2, 16);
    if (i == 31) {
        push->window = v.window, push->parity_words = v.parity_words;
        push->world = v.world, push->rank = v.rank, push->mode = v.mode, push->heads = v.heads;
        push->wire_dtype = v.wire_dtype;
        push->row_words = static_cast<int32_t>(row_words(p.head_dim_v(), v.wire_dtype));
    }
}

// What is not committed is not waited for.
__device__ __forceinline__ void await_push_state() {
    copy_async_commit();
    copy_async_wait<0>();
}

__device__ __forceinline__ Epoch epoch_of(const PushState& push) {
    return Epoch{next_epoch(static_cast<uint32_t>(push.consumed)), push.failed != 0, 0, -1, 0};
}

// Calls `send(slot's word)` for every rank that gets words of a head.
template <class Send>
__device__ __forceinline__ void for_push_targets(const PushState& push, const Epoch& e, int head, int64_t at, Send send) {
    at += e.parity() * push.parity_words;
    const auto slot = [&](int rank) { return reinterpret_cast<uint64_t*>(push.slots[rank]) + at; };
    const int world = push.world;
    if (push.mode != kOneShot) {
        send(slot(owner_of(head, push.heads, world)));
        return;
    }
    // The own window last: the others' words have the longer way.
    int rank = push.rank;
#pragma unroll 1
    for (int n = 0; n < world; n++) {
        if (++rank == world) rank = 0;
        send(slot(rank));
    }
}

// Pushes two finished columns of a row, the first an even one, and with column 0 its natural lse. A call, and not in
// line: kernels that write their rows instead would have to step over it.
static __device__ __noinline__ void push_columns(const PushState& push, int64_t token, int head, int column, float lse,
                                                 float2 o) {
    const Epoch e = epoch_of(push);
    if (e.broken) return;
    delay(DelayPoint::kPush, e.number);
    const Wire wire(push.wire_dtype);
    const int64_t at = kHeaderWords + (token * push.heads + head) * push.row_words;
    if (column == 0) {
        // Bad data of the row's own sequence has been reported: it made the row NaN.
        const uint32_t fault = lse == lse ? 0 : pack_fault(load_word(push.window + kFault), push.rank);
        const uint64_t x = packet(__float_as_uint(lse), e.number), y = packet(fault, e.number);
        for_push_targets(push, e, head, at, [&](uint64_t* to) { store_words(to, x, y); });
    }
    if (wire.is_f32) {
        const uint64_t x = packet(__float_as_uint(o.x), e.number), y = packet(__float_as_uint(o.y), e.number);
        for_push_targets(push, e, head, at + kRowHead + column, [&](uint64_t* to) { store_words(to, x, y); });
    } else {
        const uint64_t x = packet(wire.pack(o), e.number);
        for_push_targets(push, e, head, at + kRowHead + column / 2, [&](uint64_t* to) { store_word(to, x); });
    }
}

// After a block's last item, by all of its threads; the push state has come. `step` is shared memory that nobody needs any
// more.
static __device__ __noinline__ void end_exchange(const DecodeParams& p, const PushState& push, ExchangeParams& step) {
    const ExchangeView& v = p.exchange;
    Epoch e = epoch_of(push);
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    if (blockIdx.x == 0 && warp == 0 && !e.broken) push_header(v, e);
    if (p.waiting == 0) return;
    const int waiting = min(p.waiting, static_cast<int>(gridDim.x));
    const int nth = static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x);
    if (nth < waiting) {
        if (threadIdx.x < sizeof(ExchangeView) / 8) {
            reinterpret_cast<uint64_t*>(&step.view)[threadIdx.x] = reinterpret_cast<const uint64_t*>(&v)[threadIdx.x];
        }
        if (threadIdx.x == 32 % blockDim.x) {
            step.target = p.target;
            step.first_row = 0, step.rows = static_cast<int64_t>(p.query_tokens) * v.heads;
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
    await_push_state();
    __syncthreads();
    end_exchange(p, *reinterpret_cast<const PushState*>(shared + S::kPushStateAt), *reinterpret_cast<ExchangeParams*>(shared));
}

}  // namespace treeattn
