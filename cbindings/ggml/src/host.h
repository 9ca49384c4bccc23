// The ggml that loaded the plugin: its version, its functions, its numbers of operators.
#pragma once

#include "ggml_abi.h"

namespace treeattn_ggml {

// Functions of the host, found by name. None is linked.
struct HostFunctions {
  const char* (*version)();
  const char* (*op_name)(int32_t op);
  const char* (*type_name)(int32_t type);
  int (*graph_n_nodes)(Graph*);
  Tensor* (*graph_node)(Graph*, int);
  bool (*buffer_is_host)(Buffer*);
  BufferType* (*buffer_get_type)(Buffer*);
  bool (*buft_is_host)(BufferType*);
  size_t (*reg_count)();
  Registration* (*reg_get)(size_t);
  void* (*reg_get_proc_address)(Registration*, const char*);
  size_t (*dev_count)();
  Device* (*dev_get)(size_t);
  int32_t (*dev_type)(Device*);
  Device* (*dev_by_type)(int32_t);
  BufferType* (*dev_buffer_type)(Device*);
  Registration* (*dev_backend_reg)(Device*);
  Backend* (*dev_init)(Device*, const char*);
  void (*backend_free)(Backend*);
  int32_t (*backend_graph_compute)(Backend*, Graph*);
  size_t (*tensor_overhead)();
  size_t (*graph_overhead)();
  Context* (*context_init)(struct ContextParams);
  void (*context_free)(Context*);
  Graph* (*new_graph)(Context*);
  void (*build_forward_expand)(Graph*, Tensor*);
  Tensor* (*new_tensor_1d)(Context*, int32_t type, int64_t ne0);
};

// struct ggml_init_params
struct ContextParams {
  size_t mem_size;
  void* mem_buffer;
  bool no_alloc;
};

struct Host {
  HostFunctions f;
  int version[3];
  int32_t api_version;
  bool two_dimensional;  // layout of the backend interface
  bool compute_flag;     // nodes without GGML_TENSOR_FLAG_COMPUTE are not computed
  int32_t op_none, op_reshape, op_view, op_permute, op_transpose;
  int32_t op_flash_attn, op_custom;
};

// Finds the host from an address inside of it, the caller of ggml_backend_init. Gives false after one line that says why
// the plugin is not used. Called once, before anything else here.
bool find_host(const void* caller);

// The host; only after find_host gave true.
const Host& host();

}  // namespace treeattn_ggml
