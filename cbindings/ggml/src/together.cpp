#include "together.h"

#include <sched.h>

#include <atomic>
#include <exception>
#include <memory>

#include "log.h"
#include "runtime.h"
#include "step.h"

namespace treeattn_ggml {
namespace {

// A node under way. Contexts that compute at the same time have one each.
struct alignas(64) SharedStep {
  std::atomic<bool> used{false};
  // Stored by thread 0 once all below is written, which lets the others in; NULL until then.
  std::atomic<const void*> key{nullptr};
  std::unique_ptr<Engine> engine;
  const Plans* plans = nullptr;  // NULL: not ready
  std::atomic<bool> failed{false};
  std::atomic<int> left{0};
};

SharedStep steps[64];

void pause(int& turns) {
  if (++turns % 256 == 0) {
    sched_yield();
  } else {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

SharedStep& begin() {
  for (int turns = 0;; pause(turns)) {
    for (SharedStep& step : steps) {
      if (!step.used.load(std::memory_order_relaxed) && !step.used.exchange(true, std::memory_order_acquire)) {
        return step;
      }
    }
  }
}

// Thread 0 opens it, or ggml itself would hang: its threads meet after every node. So there is no deadline here.
SharedStep& join(const void* key) {
  for (int turns = 0;; pause(turns)) {
    for (SharedStep& step : steps) {
      if (step.key.load(std::memory_order_acquire) == key) {
        return step;
      }
    }
  }
}

void prepare(SharedStep& step, const Tensor* node, const FlashParams& params, int nth) noexcept {
  step.plans = nullptr;
  step.failed.store(false, std::memory_order_relaxed);
  step.left.store(0, std::memory_order_relaxed);
  try {
    step.engine = engine_pool().take(workers_for(node, nth, true));
    if (step.engine != nullptr) {
      step.plans = prepare_step(*step.engine, node, params);
    }
  } catch (const std::exception& e) {
    log(LogLevel::kError, "a step failed: %s", e.what());
  }
}

bool compute(SharedStep& step, int ith, int nth) noexcept {
  try {
    if (step.engine->workers().team) {
      return step.engine->enter(*step.plans, ith, nth);
    }
    return ith != 0 || step.engine->run(*step.plans);
  } catch (const std::exception& e) {
    log(LogLevel::kError, "a step failed: %s", e.what());
    return false;
  }
}

// What the last thread does.
void close(SharedStep& step, const Tensor* node, Path path, bool declined) noexcept {
  if (!declined) {
    const bool good = step.plans != nullptr && !step.failed.load(std::memory_order_relaxed);
    count_step(path, good, good && step.engine->workers().team);
    if (!good) {
      poison(node);
    }
  }
  try {
    engine_pool().give(std::move(step.engine));
  } catch (const std::exception&) {
    // No memory to keep the engine: it is destroyed.
  }
  step.key.store(nullptr, std::memory_order_relaxed);
  step.used.store(false, std::memory_order_release);
}

}  // namespace

Together compute_together(const Tensor* node, const FlashParams& params, const void* key, int ith, int nth, Path path,
                          bool may_decline) noexcept {
  SharedStep& step = ith == 0 ? begin() : join(key);
  if (ith == 0) {
    prepare(step, node, params, nth);
    step.key.store(key, std::memory_order_release);
  }
  const bool ready = step.plans != nullptr;
  if (ready && !compute(step, ith, nth)) {
    step.failed.store(true, std::memory_order_relaxed);
  }
  const bool declined = !ready && may_decline;
  if (step.left.fetch_add(1, std::memory_order_acq_rel) + 1 == nth) {
    close(step, node, path, declined);
  }
  return declined ? Together::kDeclined : Together::kComputed;
}

}  // namespace treeattn_ggml
