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
struct alignas(64) Place {
  std::atomic<bool> used{false};
  // Stored by thread 0 once all below is written, which opens the place to the others; NULL until then.
  std::atomic<const void*> key{nullptr};
  std::unique_ptr<Engine> engine;
  const Plans* plans = nullptr;  // NULL: not ready
  std::atomic<bool> failed{false};
  std::atomic<int> left{0};
};

Place places[64];

void pause(int& turns) {
  if (++turns % 256 == 0) {
    sched_yield();
  } else {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

Place& take_place() {
  for (int turns = 0;; pause(turns)) {
    for (Place& place : places) {
      if (!place.used.load(std::memory_order_relaxed) && !place.used.exchange(true, std::memory_order_acquire)) {
        return place;
      }
    }
  }
}

// Thread 0 opens it, or ggml itself would hang: its threads meet after every node. So there is no deadline here.
Place& find_place(const void* key) {
  for (int turns = 0;; pause(turns)) {
    for (Place& place : places) {
      if (place.key.load(std::memory_order_acquire) == key) {
        return place;
      }
    }
  }
}

void prepare(Place& place, const Tensor* node, const FlashParams& params, int nth) noexcept {
  place.plans = nullptr;
  place.failed.store(false, std::memory_order_relaxed);
  place.left.store(0, std::memory_order_relaxed);
  try {
    place.engine = engine_pool().take(workers_for(node, nth, true));
    if (place.engine != nullptr) {
      place.plans = prepare_step(*place.engine, node, params);
    }
  } catch (const std::exception& e) {
    log(LogLevel::kError, "a step failed: %s", e.what());
  }
}

bool compute(Place& place, int ith, int nth) noexcept {
  try {
    if (place.engine->workers().team) {
      return place.engine->enter(*place.plans, ith, nth);
    }
    return ith != 0 || place.engine->run(*place.plans);
  } catch (const std::exception& e) {
    log(LogLevel::kError, "a step failed: %s", e.what());
    return false;
  }
}

// What the last thread does.
void close(Place& place, const Tensor* node, Path path, bool declined) noexcept {
  if (!declined) {
    const bool good = place.plans != nullptr && !place.failed.load(std::memory_order_relaxed);
    count_step(path, good, good && place.engine->workers().team);
    if (!good) {
      poison(node);
    }
  }
  try {
    engine_pool().give(std::move(place.engine));
  } catch (const std::exception&) {
    // No memory to keep the engine: it is destroyed.
  }
  place.key.store(nullptr, std::memory_order_relaxed);
  place.used.store(false, std::memory_order_release);
}

}  // namespace

Together compute_together(const Tensor* node, const FlashParams& params, const void* key, int ith, int nth, Path path,
                          bool may_decline) noexcept {
  Place& place = ith == 0 ? take_place() : find_place(key);
  if (ith == 0) {
    prepare(place, node, params, nth);
    place.key.store(key, std::memory_order_release);
  }
  const bool ready = place.plans != nullptr;
  if (ready && !compute(place, ith, nth)) {
    place.failed.store(true, std::memory_order_relaxed);
  }
  const bool declined = !ready && may_decline;
  if (place.left.fetch_add(1, std::memory_order_acq_rel) + 1 == nth) {
    close(place, node, path, declined);
  }
  return declined ? Together::kDeclined : Together::kComputed;
}

}  // namespace treeattn_ggml
