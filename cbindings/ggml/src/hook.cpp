#include "hook.h"

#include <cstdint>
#include <cstring>

#include "host.h"
#include "log.h"
#include "runtime.h"
#include "together.h"

namespace treeattn_ggml {
namespace {

bool hooked = false;  // before there is a second thread

// Each thread judges for itself, and to the same end.
bool attend(const Tensor* node, const FlashParams& params, const void* key, int ith, int nth) noexcept {
  Judgement judgement = Judgement::kForm;
  try {
    judgement = judge(node, params);
  } catch (...) {
    return false;
  }
  if (judgement != Judgement::kTaken) {
    if (ith == 0) {
      count_judgement(judgement);
    }
    return false;
  }
  return compute_together(node, params, key, ith, nth, Path::kHook, true) == Together::kComputed;
}

// The hook of a patched ggml: whether the node was computed.
bool hook(Tensor* node, int ith, int nth) { return attend(node, flash_params(node), node, ith, nth); }

}  // namespace

void set_hook() {
  if (settings().off || settings().in_place || settings().device) {
    return;
  }
  const HostFunctions& f = host().f;
  using Set = void (*)(bool (*)(Tensor*, int, int));
  const auto set = reinterpret_cast<Set>(
      f.reg_get_proc_address(f.dev_backend_reg(f.dev_by_type(kDeviceCpu)), "ggml_backend_cpu_set_flash_attn_hook"));
  if (set != nullptr) {
    hooked = true;
    set(hook);
  }
}

bool is_hooked() { return hooked; }

}  // namespace treeattn_ggml

// A tensor as treeattn_ggml_attend takes it: type, sizes and strides in bytes as ggml has them; without data: none.
struct treeattn_ggml_tensor {
  int32_t type;
  int32_t reserved;
  int64_t ne[4];
  size_t nb[4];
  void* data;
};

// For hosts that load no plugins, whatever their structs are: computes a flash attention of ggml's over tensors in host memory.
//
// `tensors`: queries, keys, values, mask, sinks, output. `params`: scale, max_bias, softcap. Every thread of a graph calls it, as
// number `ith` of `nth`, and they meet before they come with another one. Gives 1, the same on all threads, where it was
// computed; 0 where it is left to the host, with nothing written.
extern "C" __attribute__((visibility("default"))) int treeattn_ggml_attend(const treeattn_ggml_tensor tensors[6],
                                                                           const float params[3], int ith, int nth) {
  using namespace treeattn_ggml;
  if (settings().off || runtime() == nullptr) {
    return 0;
  }
  print_counts_at_exit();
  Tensor of[6] = {};
  for (int i = 0; i < 6; i++) {
    of[i].type = tensors[i].type;
    of[i].data = tensors[i].data;
    std::memcpy(of[i].ne, tensors[i].ne, sizeof of[i].ne);
    std::memcpy(of[i].nb, tensors[i].nb, sizeof of[i].nb);
  }
  Tensor& node = of[5];
  for (int i = 0; i < kSources; i++) {
    node.src[i] = of[i].data == nullptr ? nullptr : &of[i];
  }
  return attend(&node, {params[0], params[1], params[2]}, node.data, ith, nth) ? 1 : 0;
}
