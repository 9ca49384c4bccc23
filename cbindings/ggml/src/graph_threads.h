// ggml's own threads, for a device that is given nodes on one thread: where the CPU backend computes with OpenMP, a CPU backend
// of the plugin's own gets the same threads, whose waiting costs nothing then.
#pragma once

#include <memory>

#include "host.h"

namespace treeattn_ggml {

// Whether the host's CPU backend computes with OpenMP.
bool host_has_openmp();

class GraphThreads {
 public:
  // NULL where the host has no OpenMP or refuses something. May throw std::bad_alloc.
  static std::unique_ptr<GraphThreads> create();
  ~GraphThreads();
  GraphThreads(const GraphThreads&) = delete;
  GraphThreads& operator=(const GraphThreads&) = delete;

  using Task = void (*)(void* data, int ith, int nth);
  // Calls task(data, ith, nth) on `threads` threads at the same time, or as many as OpenMP gives, and returns when all have
  // returned. False where nothing was called.
  bool run(int threads, Task task, void* data);

 private:
  GraphThreads() = default;

  Backend* backend_ = nullptr;
  Context* context_ = nullptr;
  Graph* graph_ = nullptr;
  void (*set_threads_)(Backend*, int) = nullptr;
  int threads_ = 0;
  Task task_ = nullptr;
  void* data_ = nullptr;
};

}  // namespace treeattn_ggml
