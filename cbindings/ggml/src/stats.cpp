#include "stats.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "log.h"

namespace treeattn_ggml {
namespace {

std::atomic<int64_t> steps[static_cast<int>(Path::kCount)];
std::atomic<int64_t> on_threads;
std::atomic<int64_t> failed;
std::atomic<int64_t> keys_held;
std::atomic<int64_t> keys_visible;
std::atomic<int64_t> judged[static_cast<int>(Judgement::kCount)];

void print_counts() {
  const long long device = steps[0].load(), in_place = steps[1].load(), hook = steps[2].load(), threads = on_threads.load();
  char left[256] = "";
  int used = 0;
  for (int j = 1; j < static_cast<int>(Judgement::kCount) && used >= 0 && used < 200; j++) {
    if (const long long n = judged[j].load()) {
      used += std::snprintf(left + used, sizeof left - static_cast<size_t>(used), "; %lld looks: %s", n,
                            judgement_name(static_cast<Judgement>(j)));
    }
  }
  const double held = static_cast<double>(keys_held.load()), visible = static_cast<double>(keys_visible.load());
  log(LogLevel::kInfo,
      "%lld attention steps computed (%lld on the device, %lld in place, %lld by the hook; %lld on ggml's threads), %lld failed, "
      "%.0f %% of the cache's keys visible; %lld nodes taken when graphs were split%s",
      device + in_place + hook, device, in_place, hook, threads, static_cast<long long>(failed.load()),
      held > 0 ? 100.0 * visible / held : 100.0, static_cast<long long>(judged[0].load()), used > 0 ? left : "");
}

}  // namespace

void count_step(Path path, bool good, bool on_host_threads) {
  (good ? steps[static_cast<int>(path)] : failed).fetch_add(1, std::memory_order_relaxed);
  on_threads.fetch_add(on_host_threads ? 1 : 0, std::memory_order_relaxed);
}

void get_counts(uint64_t out[6]) {
  uint64_t left = 0;
  for (int j = 1; j < static_cast<int>(Judgement::kCount); j++) {
    left += static_cast<uint64_t>(judged[j].load());
  }
  out[0] = static_cast<uint64_t>(steps[0].load());
  out[1] = static_cast<uint64_t>(steps[1].load());
  out[2] = left;
  out[3] = static_cast<uint64_t>(failed.load());
  out[4] = static_cast<uint64_t>(steps[2].load());
  out[5] = static_cast<uint64_t>(on_threads.load());
}

void count_keys(int64_t held, int64_t visible) {
  keys_held.fetch_add(held, std::memory_order_relaxed);
  keys_visible.fetch_add(visible, std::memory_order_relaxed);
}

void count_judgement(Judgement judgement) { judged[static_cast<int>(judgement)].fetch_add(1, std::memory_order_relaxed); }

void print_counts_at_exit() {
  static const int registered = std::atexit(print_counts);
  static_cast<void>(registered);
}

}  // namespace treeattn_ggml
