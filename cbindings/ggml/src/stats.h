// Counts of what the plugin did, printed as one line when the process ends.
#pragma once

#include <cstdint>

#include "shape.h"

namespace treeattn_ggml {

enum class Path { kDevice, kInPlace, kHook, kCount };

// `on_host_threads`: computed on ggml's threads.
void count_step(Path path, bool good, bool on_host_threads);
// Of a step: query tokens times keys of the cache, and times keys that were attended.
void count_keys(int64_t held, int64_t visible);
// A node that was looked at when a graph was split, and what became of it.
void count_judgement(Judgement judgement);
// "ggml_backend_treeattn_counts" of the registration: steps on the device, steps in place, nodes left to ggml,
// steps that failed, steps by the hook, steps of all three on ggml's threads.
void get_counts(uint64_t out[6]);
// Prints the line of counts when the process ends. Again it does nothing.
void print_counts_at_exit();

}  // namespace treeattn_ggml
