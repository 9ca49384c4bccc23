// How kernels tell the host of bad data.
//
// A report takes two words in mapped host memory. Kernels write the first: the last report. The host writes the second: the last
// report that it has read. Each word has one writer, because an atomic operation of a GPU on host memory is not atomic for the
// host. Which report is pending is decided in a word of device memory and then copied to the host.
#pragma once

#include "params.cuh"
#include "ptx.cuh"

namespace treeattn {

// Reports bad data (pack_status) to the host, unless a report of an earlier sequence is pending. A report is pending until the
// host has read it. `pending`: the word of device memory; `host`: the two words. Any number of threads may call it at once.
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
            // A report of an earlier sequence is pending. If the host has not read it meanwhile, it stands for this one as well.
            if (load_word(host + kTakenAfter) == taken) return;
        } else if (atomicCAS(reinterpret_cast<unsigned long long*>(pending), static_cast<unsigned long long>(old),
                             static_cast<unsigned long long>(now)) == old) {
            // Stores of several threads may arrive in any order. Each thread stores what is pending until nothing newer is.
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
