#include "in_place.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "host.h"
#include "runtime.h"
#include "together.h"

namespace treeattn_ggml {
namespace {

// What op_params of a node holds once it was taken: ggml's own parameters of a custom operator, then those of the attention.
struct Taken {
  CustomOpParams custom;
  FlashParams flash;
};
static_assert(sizeof(Taken) <= sizeof(int32_t) * kOpParams, "op_params");

void compute(Tensor* node, int ith, int nth, void*) {
  Taken taken;
  std::memcpy(&taken, node->op_params, sizeof taken);
  compute_together(node, taken.flash, node, ith, nth, Path::kInPlace, false);
}

// Whether all that the node reads is in the CPU backend's own memory, and no device is there that the scheduler might prefer.
bool runs_on_cpu(const Tensor* node) {
  const Host& h = host();
  for (size_t i = 0; i < h.f.dev_count(); i++) {
    const int32_t type = h.f.dev_type(h.f.dev_get(i));
    if (type == kDeviceGpu || type == kDeviceIgpu) {
      return false;
    }
  }
  const BufferType* cpu = h.f.dev_buffer_type(h.f.dev_by_type(kDeviceCpu));
  for (int i = 0; i < kSources; i++) {
    const Tensor* source = node->src[i];
    if (source == nullptr) {
      continue;
    }
    Buffer* buffer = source->view_src != nullptr ? source->view_src->buffer : source->buffer;
    if (buffer != nullptr ? !h.f.buffer_is_host(buffer) : false) {
      return false;
    }
  }
  return cpu != nullptr;
}

}  // namespace

void take_in_place(Tensor* node, const FlashParams& params) {
  if (!runs_on_cpu(node)) {
    return;
  }
  // How many threads will compute is not known yet: seldom more than there are cores, and an engine of a team serves fewer.
  const int threads = std::max(ranks_for(node), static_cast<int>(std::thread::hardware_concurrency()));
  std::unique_ptr<Engine> engine = engine_pool().take(workers_for(node, threads, true));
  if (engine == nullptr) {
    return;
  }
  const bool ready = engine->prepare(plan_key(node, params), node->src[kMask] != nullptr);
  engine_pool().give(std::move(engine));
  if (!ready) {
    return;
  }
  Taken taken = {};
  taken.custom.function = compute;
  taken.custom.tasks = kAllTasks;
  taken.flash = params;
  std::memset(node->op_params, 0, sizeof node->op_params);
  std::memcpy(node->op_params, &taken, sizeof taken);
  node->op = host().op_custom;
}

}  // namespace treeattn_ggml
