#include "host.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "log.h"

namespace treeattn_ggml {
namespace {

Host the_host;

constexpr int kOldest[3] = {0, 9, 1};
constexpr int kNewestMinor = 26;  // of major version 0

// Where symbols are looked for, in this order: the object that called the plugin and what it needs, the process, then every
// loaded object, since a host may have loaded ggml with RTLD_LOCAL.
class Symbols {
 public:
  explicit Symbols(const void* caller) {
    Dl_info info;
    if (caller != nullptr && dladdr(caller, &info) != 0 && info.dli_fname != nullptr) {
      add(info.dli_fname);
    }
    places_.push_back(dlopen(nullptr, RTLD_LAZY | RTLD_NOLOAD));
    std::vector<std::string> names;
    dl_iterate_phdr(
        [](dl_phdr_info* object, size_t, void* data) {
          if (object->dlpi_name != nullptr && *object->dlpi_name != '\0') {
            static_cast<std::vector<std::string>*>(data)->push_back(object->dlpi_name);
          }
          return 0;
        },
        &names);
    for (const std::string& name : names) {
      if (name.find("ggml") != std::string::npos || name.find("llama") != std::string::npos) {
        add(name.c_str());
      }
    }
  }

  Symbols(const Symbols&) = delete;
  Symbols& operator=(const Symbols&) = delete;

  ~Symbols() {
    for (void* place : places_) {
      if (place != nullptr) {
        dlclose(place);
      }
    }
  }

  template <typename Function>
  bool find(Function& out, const char* name) {
    for (void* place : places_) {
      if (place == nullptr) {
        continue;
      }
      if (void* symbol = dlsym(place, name)) {
        out = reinterpret_cast<Function>(symbol);
        return true;
      }
    }
    missing_ = name;
    return false;
  }

  const char* missing() const { return missing_; }

 private:
  void add(const char* path) { places_.push_back(dlopen(path, RTLD_LAZY | RTLD_NOLOAD)); }

  std::vector<void*> places_;
  const char* missing_ = "";
};

bool find_functions(Symbols& symbols, HostFunctions& f) {
  return symbols.find(f.op_name, "ggml_op_name") && symbols.find(f.type_name, "ggml_type_name") &&
         symbols.find(f.graph_n_nodes, "ggml_graph_n_nodes") && symbols.find(f.graph_node, "ggml_graph_node") &&
         symbols.find(f.buffer_is_host, "ggml_backend_buffer_is_host") &&
         symbols.find(f.buffer_get_type, "ggml_backend_buffer_get_type") &&
         symbols.find(f.buft_is_host, "ggml_backend_buft_is_host") &&
         symbols.find(f.reg_count, "ggml_backend_reg_count") && symbols.find(f.reg_get, "ggml_backend_reg_get") &&
         symbols.find(f.reg_get_proc_address, "ggml_backend_reg_get_proc_address") &&
         symbols.find(f.dev_count, "ggml_backend_dev_count") && symbols.find(f.dev_get, "ggml_backend_dev_get") &&
         symbols.find(f.dev_type, "ggml_backend_dev_type") &&
         symbols.find(f.dev_by_type, "ggml_backend_dev_by_type") &&
         symbols.find(f.dev_buffer_type, "ggml_backend_dev_buffer_type") &&
         symbols.find(f.dev_backend_reg, "ggml_backend_dev_backend_reg") &&
         symbols.find(f.dev_init, "ggml_backend_dev_init") && symbols.find(f.backend_free, "ggml_backend_free") &&
         symbols.find(f.backend_graph_compute, "ggml_backend_graph_compute") &&
         symbols.find(f.tensor_overhead, "ggml_tensor_overhead") &&
         symbols.find(f.graph_overhead, "ggml_graph_overhead") && symbols.find(f.context_init, "ggml_init") &&
         symbols.find(f.context_free, "ggml_free") && symbols.find(f.new_graph, "ggml_new_graph") &&
         symbols.find(f.build_forward_expand, "ggml_build_forward_expand") &&
         symbols.find(f.new_tensor_1d, "ggml_new_tensor_1d");
}

bool version_is_known(const int (&v)[3]) {
  if (v[0] != 0 || v[1] > kNewestMinor) {
    return false;
  }
  return v[1] != kOldest[1] ? v[1] > kOldest[1] : v[2] >= kOldest[2];
}

// The numbers of the operators by their names. CUSTOM comes after all others that are wanted, so that nothing is asked that
// the host does not have.
bool find_operators(Host& h) {
  struct Wanted {
    const char* name;
    int32_t* number;
  };
  const Wanted wanted[] = {
      {"NONE", &h.op_none},           {"RESHAPE", &h.op_reshape},     {"VIEW", &h.op_view},
      {"PERMUTE", &h.op_permute},     {"TRANSPOSE", &h.op_transpose}, {"FLASH_ATTN_EXT", &h.op_flash_attn},
      {"CUSTOM", &h.op_custom},
  };
  for (const Wanted& w : wanted) {
    *w.number = -1;
  }
  for (int32_t op = 0; op < 128 && h.op_custom < 0; op++) {
    const char* name = h.f.op_name(op);
    if (name == nullptr) {
      break;
    }
    for (const Wanted& w : wanted) {
      if (std::strcmp(name, w.name) == 0) {
        *w.number = op;
      }
    }
  }
  for (const Wanted& w : wanted) {
    if (*w.number < 0) {
      log(LogLevel::kError, "not used: this ggml has no operator %s", w.name);
      return false;
    }
  }
  return true;
}

bool types_are_known(const Host& h) {
  struct Known {
    Type type;
    const char* name;
  };
  const Known known[] = {{kTypeF32, "f32"},   {kTypeF16, "f16"},   {kTypeQ4_0, "q4_0"},     {kTypeQ4_1, "q4_1"}, {kTypeQ5_0, "q5_0"},
                         {kTypeQ5_1, "q5_1"}, {kTypeQ8_0, "q8_0"}, {kTypeIq4Nl, "iq4_nl"}, {kTypeBf16, "bf16"}};
  for (const Known& k : known) {
    const char* name = h.f.type_name(k.type);
    if (name == nullptr || std::strcmp(name, k.name) != 0) {
      log(LogLevel::kError, "not used: type %d of this ggml is %s, wanted %s", k.type, name == nullptr ? "none" : name, k.name);
      return false;
    }
  }
  return true;
}

}  // namespace

bool find_host(const void* caller) {
  Symbols symbols(caller);
  Host& h = the_host;
  if (!symbols.find(h.f.version, "ggml_version")) {
    log(LogLevel::kError,
        "not used: the host has no ggml_version that can be seen: it is older than ggml 0.9.1, or a program that exports "
        "no symbols");
    return false;
  }
  const char* text = h.f.version();
  h.version[0] = h.version[1] = h.version[2] = 0;
  if (text == nullptr || std::sscanf(text, "%d.%d.%d", &h.version[0], &h.version[1], &h.version[2]) < 2) {
    log(LogLevel::kError, "not used: the host's ggml_version says \"%s\", wanted a number", text == nullptr ? "" : text);
    return false;
  }
  if (!version_is_known(h.version) && !settings().any_version) {
    log(LogLevel::kError,
        "not used: this is ggml %s, and the plugin knows 0.9.1 to 0.%d (TREEATTN_GGML_ANY_VERSION=1 takes it for the latter)", text,
        kNewestMinor);
    return false;
  }
  if (!find_functions(symbols, h.f)) {
    log(LogLevel::kError, "not used: ggml %s has no function %s that can be seen", text, symbols.missing());
    return false;
  }
  const int number = h.version[0] * 1000000 + h.version[1] * 1000 + h.version[2];
  h.two_dimensional = number >= 10000;
  h.compute_flag = number >= 9006;
  // The host compares its own api_version with the plugin's: the CPU backend, which is loaded before, says which it is.
  Device* cpu = h.f.dev_by_type(kDeviceCpu);
  if (cpu == nullptr) {
    log(LogLevel::kError, "not used: no CPU backend is loaded yet");
    return false;
  }
  h.api_version = h.f.dev_backend_reg(cpu)->api_version;
  if (h.api_version < 2 || (h.api_version > 3 && !settings().any_version)) {
    log(LogLevel::kError, "not used: backends of this ggml %s have api_version %d, and the plugin knows 2 and 3", text,
        h.api_version);
    return false;
  }
  return find_operators(h) && types_are_known(h);
}

const Host& host() { return the_host; }

}  // namespace treeattn_ggml
