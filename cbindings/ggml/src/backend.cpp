#include "backend.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <new>

#include "graph_threads.h"
#include "host.h"
#include "log.h"
#include "runtime.h"
#include "stats.h"
#include "step.h"

namespace treeattn_ggml {
namespace {

// What a backend holds. ggml computes one graph at a time on a backend.
struct State {
  int threads = 4;  // ggml's default
  std::unique_ptr<GraphThreads> graph_threads = GraphThreads::create();  // NULL: the library's own threads
  std::unique_ptr<Engine> engine;

  // The engine for a node and the present number of threads; NULL after a logged line.
  Engine* ready(const Tensor* node) {
    const Workers wanted = workers_for(node, threads, graph_threads != nullptr);
    if (engine == nullptr || engine->broken() || !wanted.fit(engine->workers())) {
      engine_pool().give(std::move(engine));
      engine = engine_pool().take(wanted);
    }
    return engine.get();
  }
};

constexpr uint8_t kGuid[16] = {0x74, 0x72, 0x65, 0x65, 0x61, 0x74, 0x74, 0x6e, 0x9c, 0x41, 0x4b, 0x1d, 0xa6, 0x0e, 0x57, 0x02};

// The context of a backend, whose place depends on the layout.
State& state_of(Backend* backend) {
  void* context = host().two_dimensional ? reinterpret_cast<BackendObject<true>*>(backend)->context
                                         : reinterpret_cast<BackendObject<false>*>(backend)->context;
  return *static_cast<State*>(context);
}

const char* get_name(Backend*) { return "TreeAttn"; }

void free_backend(Backend* backend) {
  State* state = &state_of(backend);
  engine_pool().give(std::move(state->engine));
  delete state;
  if (host().two_dimensional) {
    delete reinterpret_cast<BackendObject<true>*>(backend);
  } else {
    delete reinterpret_cast<BackendObject<false>*>(backend);
  }
}

bool is_view(int32_t op) {
  const Host& h = host();
  return op == h.op_none || op == h.op_reshape || op == h.op_view || op == h.op_permute || op == h.op_transpose;
}

// A step on ggml's threads.
struct TeamStep {
  Engine* engine;
  const Plans* plans;
  std::atomic<bool> few{false};  // fewer threads than ranks came, and none computed
  std::atomic<bool> failed{false};

  static void run(void* self, int ith, int nth) {
    TeamStep* step = static_cast<TeamStep*>(self);
    if (nth < step->engine->workers().ranks) {
      step->few = true;
    } else if (!step->engine->enter(*step->plans, ith, nth)) {
      step->failed = true;
    }
  }
};

// Sets `on_host_threads` where it is computed on ggml's threads.
bool compute_node(State& state, Tensor* node, bool& on_host_threads) {
  Engine* engine = state.ready(node);
  const Plans* plans = engine == nullptr ? nullptr : prepare_step(*engine, node, flash_params(node));
  if (plans == nullptr || !engine->workers().team) {
    return plans != nullptr && engine->run(*plans);
  }
  TeamStep step{engine, plans};
  const bool called = state.graph_threads->run(state.threads, TeamStep::run, &step);
  if (called && !step.few) {
    on_host_threads = true;
    return !step.failed;
  }
  log(LogLevel::kWarning, "ggml's threads cannot be used here: attention is computed on threads of its own");
  state.graph_threads.reset();
  return compute_node(state, node, on_host_threads);
}

int32_t graph_compute(Backend* backend, Graph* graph) {
  const Host& h = host();
  State& state = state_of(backend);
  const int nodes = h.f.graph_n_nodes(graph);
  for (int i = 0; i < nodes; i++) {
    Tensor* node = h.f.graph_node(graph, i);
    if ((h.compute_flag && (node->flags & kFlagCompute) == 0) || is_view(node->op)) {
      continue;
    }
    if (node->op != h.op_flash_attn) {
      log(LogLevel::kError, "asked to compute %s, which the device does not take", h.f.op_name(node->op));
      return kStatusFailed;
    }
    bool good = false, on_host_threads = false;
    try {
      good = compute_node(state, node, on_host_threads);
    } catch (const std::exception& e) {
      log(LogLevel::kError, "a step failed: %s", e.what());
    }
    count_step(Path::kDevice, good, on_host_threads);
    if (!good) {
      poison(node);
      return kStatusFailed;
    }
  }
  return kStatusSuccess;
}

void synchronize(Backend*) {}
void event_record(Backend*, Event*) {}
void event_wait(Backend*, Event*) {}

// Called when a graph is split: makes the plans, so that no step has to.
void graph_optimize(Backend* backend, Graph* graph) {
  const Host& h = host();
  try {
    const int nodes = h.f.graph_n_nodes(graph);
    for (int i = 0; i < nodes; i++) {
      Tensor* node = h.f.graph_node(graph, i);
      if (node->op != h.op_flash_attn) {
        continue;
      }
      if (Engine* engine = state_of(backend).ready(node)) {
        engine->prepare(plan_key(node, flash_params(node)), node->src[kMask] != nullptr);
      }
    }
  } catch (const std::exception& e) {
    log(LogLevel::kError, "plans are not made yet: %s", e.what());
  }
}

template <bool TwoDimensional>
Backend* make(Device* device) {
  auto state = std::make_unique<State>();
  auto object = std::make_unique<BackendObject<TwoDimensional>>();
  *object = {};
  object->guid = kGuid;
  object->iface.get_name = get_name;
  object->iface.free = free_backend;
  object->iface.tail.synchronize = synchronize;
  object->iface.tail.graph_compute = graph_compute;
  object->iface.tail.event_record = event_record;
  object->iface.tail.event_wait = event_wait;
  object->iface.tail.graph_optimize = graph_optimize;
  object->device = device;
  object->context = state.release();
  return reinterpret_cast<Backend*>(object.release());
}

}  // namespace

Backend* make_backend(Device* device) {
  try {
    return host().two_dimensional ? make<true>(device) : make<false>(device);
  } catch (const std::bad_alloc&) {
    log(LogLevel::kError, "no memory for a backend");
    return nullptr;
  }
}

void set_threads(Backend* backend, int threads) { state_of(backend).threads = std::max(1, threads); }

}  // namespace treeattn_ggml
