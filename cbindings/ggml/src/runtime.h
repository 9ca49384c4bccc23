// The library's runtime, one a process, and the engines: communicators and plans, each for one step at a time.
#pragma once

#include <treeattn.h>

#include <atomic>
#include <memory>
#include <vector>

#include "shape.h"
#include "visible.h"

namespace treeattn_ggml {

// NULL where it could not be made; then a line was logged.
treeattn_runtime_t* runtime();

// NUMA nodes that the process may use, at least 1.
int nodes();

// Ranks that were asked for; otherwise one a node.
int ranks_wanted();

// Ranks and threads of an engine.
struct Workers {
  int ranks;
  int threads;  // of all ranks together
  bool team;    // ggml's threads enter the steps, at least one a rank; otherwise threads of the library compute them

  // Whether an engine that was made for `made` serves these: a team may be smaller than it was made for.
  bool fit(const Workers& made) const {
    return ranks == made.ranks && team == made.team && (team ? threads <= made.threads : threads == made.threads);
  }
};

// Those for a node that ggml computes on `threads` threads, which can enter the steps if `can_enter`.
Workers workers_for(const Tensor* node, int threads, bool can_enter);

// Plans of one shape, one a rank.
using Plans = std::vector<treeattn_plan_t*>;

// A communicator with its plans and what a step needs beside them. Serves one step at a time: not thread safe.
class Engine {
 public:
  // NULL after a logged line. May throw std::bad_alloc.
  static std::unique_ptr<Engine> create(const Workers& workers);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const Workers& workers() const { return workers_; }
  // A step failed so that none will succeed any more.
  bool broken() const { return broken_; }

  // The plans of a shape, made where there are none yet. NULL after a logged line. May throw std::bad_alloc.
  const Plans* plans(const PlanKey& key);
  // Makes the plans that steps of this shape may need: with strides and with lists, with and without a mask.
  bool prepare(PlanKey key, bool may_be_masked);

  // One step of `args` on the library's own threads; returns when it is done. False after a logged line. Not of a team.
  bool run(const Plans& plans);
  // One step of `args` on ggml's threads: each of them calls this with its number `ith` of `nth`. Returns when the step is
  // done; false where it failed, after a logged line of one of them.
  bool enter(const Plans& plans, int ith, int nth);

  VisibleCache visible;
  std::vector<treeattn_decode_args_t> args;  // one a rank
  std::vector<float> factors;                // ALiBi's, one a query head
  float factors_bias = 0;
  std::vector<float> queries;  // packed, where ggml's have no stride from token to token

 private:
  explicit Engine(const Workers& workers) : workers_(workers) {}
  void fail(const char* what);

  Workers workers_;
  std::atomic<bool> broken_{false};
  std::vector<treeattn_comm_t*> comms_;
  std::vector<treeattn_stream_t*> streams_;  // of the last ranks: those before them run on the calling thread
  struct Made {
    PlanKey key;
    Plans plans;
  };
  std::vector<std::unique_ptr<Made>> made_;
};

// Engines that are not in use, so that contexts that compute at the same time have one each.
class EnginePool {
 public:
  // NULL after a logged line.
  std::unique_ptr<Engine> take(const Workers& workers);
  void give(std::unique_ptr<Engine> engine);
};
EnginePool& engine_pool();

}  // namespace treeattn_ggml
