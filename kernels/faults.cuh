// How kernels tell the host of bad data.
//
// Two words in mapped host memory: one says what a kernel told last, the one behind it what the host has taken last. Each has
// one writer, for atomic operations of a GPU on host memory are none for the host. What is pending is decided in device
// memory, and then copied.
#pragma once

#include "params.cuh"
#include "ptx.cuh"

namespace treeattn {

// Tells the host of bad data (pack_status), unless what is pending is that of an earlier sequence. What the host has taken is
// pending no more. `pending`: a word of device memory; `host`: the two words. Any threads of the GPU, at once.
static __device__ __noinline__ void tell_bad_data(uint64_t* pending, uint64_t* host, uint64_t status) {
    while (true) {
        const uint64_t taken = load_word(host + kTakenAfter);
        const uint64_t old = load_word(pending);
        uint64_t now = old;
        if (old == taken) {
            now = status | ((old & kTurn) ^ kTurn);
        } else if ((old & ~static_cast<uint64_t>(kTurn)) < status) {
            now = status | (old & kTurn);
        }
        if (now == old) {
            __threadfence_system();
            // Unless it was taken meanwhile, the pending word tells of this step, too.
            if (load_word(host + kTakenAfter) == taken) return;
        } else if (atomicCAS(reinterpret_cast<unsigned long long*>(pending), static_cast<unsigned long long>(old),
                             static_cast<unsigned long long>(now)) == old) {
            // Threads that follow each other may store in any order: the last to store has seen the last word.
            while (true) {
                store_word(host, now);
                __threadfence_system();
                const uint64_t newest = load_word(pending);
                if (newest == now) return;
                now = newest;
            }
        }
    }
}

// Notes bad data where DecodeParams::workspace says: for the host, or for a later kernel.
static __device__ __noinline__ void note_status(uint64_t* status, uint64_t word) {
    auto* host = reinterpret_cast<uint64_t*>(load_word(status + 1));
    if (host != nullptr) {
        tell_bad_data(status, host, word);
    } else {
        atomicMax(reinterpret_cast<unsigned long long*>(status), static_cast<unsigned long long>(word));
    }
}

}  // namespace treeattn
