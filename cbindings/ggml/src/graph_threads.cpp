#include "graph_threads.h"

#include <cstring>

namespace treeattn_ggml {
namespace {

// struct ggml_backend_feature; a list ends with a NULL name.
struct Feature {
  const char* name;
  const char* value;
};

Registration* cpu_registration() { return host().f.dev_backend_reg(host().f.dev_by_type(kDeviceCpu)); }

}  // namespace

bool host_has_openmp() {
  using Features = Feature* (*)(Registration*);
  Registration* cpu = cpu_registration();
  const auto features = reinterpret_cast<Features>(host().f.reg_get_proc_address(cpu, "ggml_backend_get_features"));
  for (const Feature* f = features == nullptr ? nullptr : features(cpu); f != nullptr && f->name != nullptr; f++) {
    if (std::strcmp(f->name, "OPENMP") == 0) {
      return true;
    }
  }
  return false;
}

std::unique_ptr<GraphThreads> GraphThreads::create() {
  if (!host_has_openmp()) {
    return nullptr;
  }
  const HostFunctions& f = host().f;
  std::unique_ptr<GraphThreads> made(new GraphThreads);
  made->set_threads_ =
      reinterpret_cast<void (*)(Backend*, int)>(f.reg_get_proc_address(cpu_registration(), "ggml_backend_set_n_threads"));
  made->backend_ = f.dev_init(f.dev_by_type(kDeviceCpu), nullptr);
  const ContextParams params = {f.graph_overhead() + 2 * f.tensor_overhead(), nullptr, true};
  made->context_ = f.context_init(params);
  if (made->set_threads_ == nullptr || made->backend_ == nullptr || made->context_ == nullptr) {
    return nullptr;
  }
  made->graph_ = f.new_graph(made->context_);
  Tensor* node = f.new_tensor_1d(made->context_, kTypeF32, 1);
  if (made->graph_ == nullptr || node == nullptr) {
    return nullptr;
  }
  CustomOpParams custom = {};
  custom.function = [](Tensor*, int ith, int nth, void* self) {
    const GraphThreads* threads = static_cast<GraphThreads*>(self);
    threads->task_(threads->data_, ith, nth);
  };
  custom.tasks = kAllTasks;
  custom.user_data = made.get();
  std::memcpy(node->op_params, &custom, sizeof custom);
  node->op = host().op_custom;
  node->flags |= host().compute_flag ? kFlagCompute : 0;
  f.build_forward_expand(made->graph_, node);
  return f.graph_n_nodes(made->graph_) == 1 ? std::move(made) : nullptr;
}

GraphThreads::~GraphThreads() {
  if (context_ != nullptr) {
    host().f.context_free(context_);
  }
  if (backend_ != nullptr) {
    host().f.backend_free(backend_);
  }
}

bool GraphThreads::run(int threads, Task task, void* data) {
  if (threads != threads_) {
    set_threads_(backend_, threads);
    threads_ = threads;
  }
  task_ = task;
  data_ = data;
  return host().f.backend_graph_compute(backend_, graph_) == kStatusSuccess;
}

}  // namespace treeattn_ggml
