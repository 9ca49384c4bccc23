// The plugin's entry points and its one device: an accelerator beside the CPU backend, on the CPU backend's own memory, as
// ggml's BLAS backend is.

#include <exception>
#include <new>
#include <cstring>
#include <string>

#include "backend.h"
#include "graph_threads.h"
#include "hook.h"
#include "host.h"
#include "in_place.h"
#include "log.h"
#include "runtime.h"
#include "shape.h"
#include "stats.h"

namespace treeattn_ggml {
namespace {

const char* device_name(Device*) { return "TreeAttn"; }
const char* device_description(Device*) { return "libtreeattn: decode attention on CPUs"; }

void device_memory(Device*, size_t* free, size_t* total) { *free = *total = 0; }

int32_t device_type(Device*) { return kDeviceAccel; }

void device_properties(Device* device, DeviceProperties* p) {
  p->name = device_name(device);
  p->description = device_description(device);
  p->memory_free = p->memory_total = 0;
  p->type = kDeviceAccel;
  p->device_id = nullptr;
  // Pipeline parallelism of llama.cpp wants all devices to have both; steps are done when graph_compute returns, so that there
  // is nothing that an event would wait for.
  p->async = true;
  p->host_buffer = false;
  p->buffer_from_host_ptr = false;
  p->events = true;
  p->mmap_support = true;
}

Backend* device_init(Device* device, const char*) { return make_backend(device); }

BufferType* device_buffer_type(Device*) { return host().f.dev_buffer_type(host().f.dev_by_type(kDeviceCpu)); }

bool device_supports_op(Device*, const Tensor* node) {
  const Host& h = host();
  const int32_t op = node->op;
  if (op == h.op_none || op == h.op_reshape || op == h.op_view || op == h.op_permute || op == h.op_transpose) {
    return true;
  }
  if (op != h.op_flash_attn || settings().off || is_hooked()) {
    return false;
  }
  try {
    const FlashParams params = flash_params(node);
    const Judgement judgement = judge(node, params);
    count_judgement(judgement);
    if (judgement != Judgement::kTaken || !settings().in_place) {
      return judgement == Judgement::kTaken;
    }
    // The host's own node: in-place mode changes it, which is why it has to be asked for.
    take_in_place(const_cast<Tensor*>(node), params);
  } catch (const std::exception& e) {
    log(LogLevel::kError, "a node is left to ggml: %s", e.what());
  }
  return false;
}

bool device_supports_buft(Device*, BufferType* type) { return host().f.buft_is_host(type); }

Event* event_new(Device* device) { return new (std::nothrow) Event{device, nullptr}; }
void event_free(Device*, Event* event) { delete event; }
void event_synchronize(Device*, Event*) {}

const char* registration_name(Registration*) { return "TreeAttn"; }
size_t device_count(Registration*) { return 1; }

Device* get_device(Registration* registration, size_t) {
  static Device device = {{device_name, device_description, device_memory, device_type, device_properties, device_init,
                           device_buffer_type, nullptr, nullptr, device_supports_op, device_supports_buft, nullptr, event_new,
                           event_free, event_synchronize},
                          registration,
                          nullptr};
  return &device;
}

void* proc_address(Registration*, const char* name) {
  if (std::strcmp(name, "ggml_backend_set_n_threads") == 0) {
    return reinterpret_cast<void*>(&set_threads);
  }
  if (std::strcmp(name, "ggml_backend_treeattn_counts") == 0) {
    return reinterpret_cast<void*>(&get_counts);
  }
  return nullptr;
}

Registration* registration() {
  static Registration made = {host().api_version, registration_name, device_count, get_device, proc_address, nullptr};
  return &made;
}

// The line that tells how the plugin computes, and what to do where that is not on ggml's threads.
void say_how() {
  const Settings& s = settings();
  const bool device = !s.off && !s.in_place && !is_hooked();
  const bool on_host_threads = !s.own_threads && (!device || host_has_openmp());
  const std::string ranks = ranks_wanted() > 1 ? ", " + std::to_string(ranks_wanted()) + " ranks" : "";
  log(LogLevel::kInfo, "libtreeattn %s in ggml %s, %s%s%s", treeattn_version(), host().f.version(),
      s.off        ? "off"
      : s.in_place ? "in place"
      : device     ? "as a device"
                   : "by the hook",
      s.off ? "" : on_host_threads ? ", on ggml's threads" : ", on threads of its own", s.off ? "" : ranks.c_str());
  if (device && !on_host_threads && !s.own_threads) {
    log(LogLevel::kWarning,
        "ggml's threads, which are not OpenMP's here, spin while attention is computed on others: --poll 0 lets them sleep, and "
        "with TREEATTN_GGML=inline they compute it");
  }
}

// Whether the plugin is used. Once a process: the answer to a second load is that to the first.
bool load(const void* caller) {
  static const bool good = [caller] {
    try {
      if (!find_host(caller) || runtime() == nullptr) {
        return false;
      }
      print_counts_at_exit();
      set_hook();
      say_how();
      return true;
    } catch (const std::exception& e) {
      log(LogLevel::kError, "not used: %s", e.what());
      return false;
    }
  }();
  return good;
}

}  // namespace
}  // namespace treeattn_ggml

#define TREEATTN_GGML_EXPORT extern "C" __attribute__((visibility("default")))

TREEATTN_GGML_EXPORT int ggml_backend_score(void) {
  return treeattn_ggml::load(__builtin_extract_return_addr(__builtin_return_address(0))) ? 1 : 0;
}

TREEATTN_GGML_EXPORT treeattn_ggml::Registration* ggml_backend_init(void) {
  if (!treeattn_ggml::load(__builtin_extract_return_addr(__builtin_return_address(0)))) {
    return nullptr;
  }
  return treeattn_ggml::registration();
}
