#include "runtime.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "log.h"

namespace treeattn_ggml {
namespace {

void library_line(treeattn_log_level_t level, const char* message, void*) {
  if (level == TREEATTN_LOG_ERROR || level == TREEATTN_LOG_WARNING) {
    log(level == TREEATTN_LOG_ERROR ? LogLevel::kError : LogLevel::kWarning, "%s", message);
  }
}

// How long threads of ggml's wait for each other in a step. They all wait for the last at the end of every node anyway, without
// an end; a process that was stopped for a while goes on.
constexpr int64_t kTeamTimeout = int64_t{600} * 1000 * 1000 * 1000;
constexpr int kMostMembers = 1024;

treeattn_runtime_t* make_runtime() {
  treeattn_runtime_t* made = nullptr;
  if (treeattn_runtime_create(nullptr, &made) != TREEATTN_OK) {
    log(LogLevel::kError, "no runtime: %s", treeattn_last_error_message());
    return nullptr;
  }
  treeattn_runtime_set_log_callback(made, library_line, nullptr);
  return made;
}

}  // namespace

treeattn_runtime_t* runtime() {
  // Never destroyed: the plugin stays loaded to the end of the process.
  static treeattn_runtime_t* const made = make_runtime();
  return made;
}

int nodes() {
  static const int found = [] {
    int32_t devices = 1;
    if (runtime() == nullptr || treeattn_runtime_device_count(runtime(), TREEATTN_DEVICE_CPU, &devices) != TREEATTN_OK) {
      return 1;
    }
    return std::max(1, devices - 1);  // the first is the whole machine
  }();
  return found;
}

int ranks_wanted() { return settings().ranks > 0 ? settings().ranks : nodes(); }

Workers workers_for(const Tensor* node, int threads, bool can_enter) {
  const int ranks = ranks_for(node);
  return {ranks, threads, can_enter && threads >= ranks && threads <= kMostMembers && !settings().own_threads};
}

std::unique_ptr<Engine> Engine::create(const Workers& workers) {
  if (runtime() == nullptr) {
    return nullptr;
  }
  std::unique_ptr<Engine> engine(new Engine(workers));
  treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
  if (workers.team) {
    config.threads_per_rank = 1;
    config.max_team = (workers.threads + workers.ranks - 1) / workers.ranks;
    config.step_timeout_ns = kTeamTimeout;
  } else {
    config.threads_per_rank = std::max(1, workers.threads / workers.ranks);
  }
  const size_t n = static_cast<size_t>(workers.ranks);
  std::vector<treeattn_device_t> devices;
  for (int r = 0; r < workers.ranks; r++) {
    // Ranks go round the nodes in turn, where there are several and the library's own threads compute: ggml's are where they are.
    devices.push_back(nodes() > 1 && !workers.team ? TREEATTN_CPU_NODE(r % nodes()) : TREEATTN_CPU(0));
  }
  engine->comms_.resize(n);
  engine->args.resize(n);
  if (treeattn_comm_create_local(runtime(), workers.ranks, devices.data(), &config, engine->comms_.data()) != TREEATTN_OK) {
    log(LogLevel::kError, "no communicator of %d ranks: %s", workers.ranks, treeattn_last_error_message());
    engine->comms_.clear();
    return nullptr;
  }
  // The calling thread is on no node, so that each rank that is has a stream.
  for (size_t r = nodes() > 1 ? 0 : 1; r < n && !workers.team; r++) {
    treeattn_stream_t* stream = nullptr;
    if (treeattn_stream_create(runtime(), devices[r], &stream) != TREEATTN_OK) {
      log(LogLevel::kError, "no stream for rank %zu: %s", r, treeattn_last_error_message());
      return nullptr;
    }
    engine->streams_.push_back(stream);
  }
  return engine;
}

Engine::~Engine() {
  for (const auto& made : made_) {
    for (treeattn_plan_t* plan : made->plans) {
      treeattn_plan_destroy(plan);
    }
  }
  for (treeattn_comm_t* comm : comms_) {
    treeattn_comm_destroy(comm);
  }
  for (treeattn_stream_t* stream : streams_) {
    treeattn_stream_destroy(stream);
  }
}

const Plans* Engine::plans(const PlanKey& key) {
  for (const auto& made : made_) {
    if (std::memcmp(&made->key, &key, sizeof key) == 0) {
      return &made->plans;
    }
  }
  auto made = std::make_unique<Made>();
  made->key = key;
  made->plans.resize(comms_.size());
  made_.reserve(made_.size() + 1);
  const treeattn_attention_desc_t desc = describe(key, workers_.ranks);
  if (treeattn_plan_create_all(workers_.ranks, comms_.data(), &desc, made->plans.data()) != TREEATTN_OK) {
    log(LogLevel::kError, "no plan: %s", treeattn_last_error_message());
    return nullptr;
  }
  made_.push_back(std::move(made));
  return &made_.back()->plans;
}

bool Engine::prepare(PlanKey key, bool may_be_masked) {
  for (int variant = 0; variant < (may_be_masked ? 4 : 1); variant++) {
    key.lists = variant & 1;
    key.masked = variant >> 1;
    if (plans(key) == nullptr) {
      return false;
    }
  }
  return true;
}

void Engine::fail(const char* what) {
  treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
  if (treeattn_comm_status(comms_[0], &status) != TREEATTN_OK || status.broken != 0) {
    broken_ = true;
  }
  log(LogLevel::kError, "a step failed: %s", what);
}

bool Engine::run(const Plans& plans) {
  size_t enqueued = 0;
  bool good = true;
  const size_t here = plans.size() - streams_.size();  // 1, or 0
  for (size_t r = here; r < plans.size() && good; r++) {
    good = treeattn_plan_decode(plans[r], &args[r], streams_[r - here]) == TREEATTN_OK;
    enqueued += good ? 1 : 0;
  }
  good = good && (here == 0 || treeattn_plan_decode(plans[0], &args[0], nullptr) == TREEATTN_OK);
  if (!good) {
    fail(treeattn_last_error_message());
    if (enqueued > 0) {
      // Ranks that wait for the one that was refused.
      treeattn_comm_abort(comms_[0]);
      broken_ = true;
    }
  }
  for (size_t s = 0; s < enqueued; s++) {
    if (treeattn_stream_synchronize(streams_[s]) != TREEATTN_OK && good) {
      fail(treeattn_last_error_message());
      good = false;
    }
  }
  return good;
}

bool Engine::enter(const Plans& plans, int ith, int nth) {
  // In turn, as ggml's `--numa distribute` deals its threads to nodes.
  const int ranks = workers_.ranks;
  const size_t rank = static_cast<size_t>(ith % ranks);
  treeattn_team_t team = TREEATTN_TEAM_INIT;
  team.index = ith / ranks;
  team.size = (nth - ith % ranks + ranks - 1) / ranks;
  if (treeattn_plan_decode_team(plans[rank], team.index == 0 ? &args[rank] : nullptr, &team) == TREEATTN_OK) {
    return true;
  }
  // What the others of the rank failed with is the same.
  if (team.index == 0) {
    fail(treeattn_last_error_message());
    broken_ = true;
    if (ranks > 1) {
      treeattn_comm_abort(comms_[rank]);  // other ranks may wait for this one
    }
  }
  return false;
}

namespace {

struct Pool {
  std::mutex mutex;
  std::vector<std::unique_ptr<Engine>> free;
};

Pool& pool() {
  // Never destroyed: threads of the host may compute while the process ends.
  static Pool* const made = new Pool;
  return *made;
}

}  // namespace

std::unique_ptr<Engine> EnginePool::take(const Workers& workers) {
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    auto& free = pool().free;
    for (size_t i = free.size(); i-- > 0;) {
      if (workers.fit(free[i]->workers())) {
        std::unique_ptr<Engine> taken = std::move(free[i]);
        free.erase(free.begin() + static_cast<std::ptrdiff_t>(i));
        return taken;
      }
    }
  }
  return Engine::create(workers);
}

void EnginePool::give(std::unique_ptr<Engine> engine) {
  if (engine == nullptr || engine->broken()) {
    return;  // destroyed here
  }
  const std::lock_guard<std::mutex> lock(pool().mutex);
  pool().free.push_back(std::move(engine));
}

EnginePool& engine_pool() {
  static EnginePool made;
  return made;
}

}  // namespace treeattn_ggml
