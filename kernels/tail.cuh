// A decode kernel's part in an exchange: what it pushes where a rank on its own would write its output, and what comes
// after its last item.
//
// A row goes to the ranks that merge it as soon as the block that completes it has it. In the first form another launch
// (exchange.cu) merges what came. In the second this one does, with blocks that owe nothing any more: no block waits that has
// a tile, a merge or a push left. `receive` in exchange.cuh says which blocks wait, and for what.
#pragma once

#include "exchange.cuh"

namespace treeattn {

// What pushes and merges need to know, in shared memory.
struct alignas(16) PushState {
    SlotTable slots;
    uint64_t ended, failed;  // words kConsumed and kFailed of the own window
    MergeStep step;
    int32_t row_words;
};
static_assert(kConsumed % 2 == 0 && kFailed == kConsumed + 1, "one copy of 16 bytes");

__device__ __forceinline__ Epoch epoch_of(const PushState& push) { return Epoch(push.ended, push.failed); }

// Keeps what the parameters say, before the dependency wait. In line: only the kernel itself reads its parameters from where
// they are at hand. A barrier comes before it is used.
__device__ __forceinline__ void keep_step(const DecodeParams& p, PushState* push) {
    const int lane = threadIdx.x;
    constexpr int kView = sizeof(ExchangeView) / 8, kTarget = sizeof(RowTarget) / 8;
    static_assert(sizeof(ExchangeView) % 8 == 0 && sizeof(RowTarget) % 8 == 0 && kView + kTarget < 32, "a word a lane");
    if (lane < kView) {
        reinterpret_cast<uint64_t*>(&push->step.view)[lane] = reinterpret_cast<const uint64_t*>(&p.exchange)[lane];
    } else if (lane < kView + kTarget) {
        const int i = lane - kView;
        reinterpret_cast<uint64_t*>(&push->step.target)[i] = reinterpret_cast<const uint64_t*>(&p.target)[i];
    } else if (lane == 31) {
        push->row_words = static_cast<int32_t>(row_words(p.head_dim_v(), p.exchange.wire_dtype));
        push->step.first_row = 0;
        push->step.rows = static_cast<int64_t>(p.query_tokens) * p.exchange.heads;
        push->step.count = static_cast<int64_t>(p.query_tokens) * p.exchange.own_heads;
        push->step.waiting = p.waiting;
    }
}

// Asks for what lies in memory, after the dependency wait and before the first keys: whatever is asked for behind them comes
// after them. await_push_state, or a wait for the first copies that each thread of the first warp commits after it, comes
// before it is used, and then a barrier.
__device__ __forceinline__ void ask_push_state(const DecodeParams& p, PushState* push) {
    if (threadIdx.x >= 32) return;
    const int lane = threadIdx.x;
    if (lane == 31) copy_async16(shared_address(&push->ended), p.exchange.window + kConsumed, 16);
#pragma unroll 1
    for (int n = lane; n < p.exchange.world; n += 32) {
        copy_async16(shared_address(push->slots.addresses[n]), p.exchange.slots + n * kSlots, 16);
    }
}

// What is not committed is not waited for.
__device__ __forceinline__ void await_push_state() {
    copy_async_commit();
    copy_async_wait<0>();
}

// At least once a launch, by the first warp of each block as soon as it has the push state; the last block tells the ranks.
__device__ __forceinline__ void announce(const PushState& push) {
    if (blockIdx.x == gridDim.x - 1) push_header(push.step.view, epoch_of(push), push.slots);
}

// Pushes two finished columns of a row, the first an even one, and with column 0 its natural lse, in two floats. A call, and not in
// line: kernels that write their rows instead would have to step over it.
static __device__ __noinline__ void push_columns(const PushState& state, int token, int head, int column, float2 lse,
                                                 float2 o) {
    const PushState& push = *in_shared(&state);
    const ExchangeView& v = push.step.view;
    if (push.failed != 0) return;
    const uint32_t epoch = epoch_after(push.ended);
    delay(DelayPoint::kPush, epoch);
    const Wire wire(v.wire_dtype);
    const int64_t at = kHeaderWords + (static_cast<int64_t>(token) * v.heads + head) * push.row_words;
    int n = 0, end = v.world;
    if (v.mode != kOneShot) {
        n = SlotTable::place_of(owner_of(head, v.heads, v.world), v.rank, v.world);
        end = n + 1;
    }
    uint32_t fault = 0;
    // Bad data of the row's own sequence has been reported: it made the row NaN.
    if (lse.x != lse.x && column == 0) {
        fault = pack_fault(load_word(v.window + kFault + epoch % kSlots), v.rank);
    }
#pragma unroll 1
    for (; n < end; n++) {
        uint64_t* row = push.slots.at(epoch, n) + at;
        uint64_t* to = row + kRowHead;
        if (wire.is_f32) {
            store_words(to + column, packet(__float_as_uint(o.x), epoch), packet(__float_as_uint(o.y), epoch));
        } else {
            store_word(to + column / 2, packet(wire.pack(o), epoch));
        }
        if (column == 0) store_words(row, packet(__float_as_uint(lse.x), epoch), packet(second_word(lse, fault), epoch));
    }
}

// After a block's last item, by all of its threads; the push state has come. A row's o has at most kMostWords words: ptxas
// compiles what a kernel calls anew for every kernel, so each calls no more than its rows can need.
template <int kMostWords>
static __device__ __noinline__ void end_exchange(PushState* state, bool has_announced) {
    PushState* push = in_shared(state);
    Epoch e = epoch_of(*push);
    if (!has_announced && threadIdx.x < 32) announce(*push);
    // Where no block may wait another launch ends the exchange.
    if (push->step.waiting == 0) return;
    if (threadIdx.x == 0) end_block(push->step.view);
    receive<kMostWords>(&push->step, e);
}

// The same, of a kernel of this shape; nothing where there is no exchange. `has_announced`: `announce` has been called.
template <class S>
__device__ __forceinline__ void end_step(const DecodeParams& p, bool has_announced) {
    extern __shared__ __align__(128) char shared[];
    if (!(p.flags & kFlagPush)) return;
    if (!has_announced) await_push_state();
    __syncthreads();
    end_exchange<S::kDimV>(reinterpret_cast<PushState*>(shared + S::kPushStateAt), has_announced);
}

}  // namespace treeattn
