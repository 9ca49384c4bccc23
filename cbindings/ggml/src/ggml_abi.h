// What the plugin knows of ggml's binary interface: own declarations of the structs and functions that it shares with the
// host, so that one plugin serves several versions. Nothing here is taken from a header of ggml at build time.
//
// Checked against the sources of the tags of ggml (https://github.com/ggml-org/ggml) and of the crate llama-cpp-sys-2:
//
//   what                                              | 0.9.1 - 0.9.5 | 0.9.6 - 0.9.11 | 0.10.0 - 0.21.0 | 0.26.0 (crate 0.1.161)
//   --------------------------------------------------+---------------+----------------+-----------------+-----------------------
//   registration: api_version                         | 2             | 2              | 2               | 3
//   backend: 2D copies between get_ and cpy_ (16 bytes)| no            | no             | yes             | yes
//   tensor: GGML_TENSOR_FLAG_COMPUTE                  | no            | yes            | yes             | yes
//   graph_optimize: parameters                        | 2             | 2              | 2               | 3
//   device interface, ggml_tensor, dev_props          | the same in all (one flag more at the end of dev_caps from 0.20.0 on)
//   FLASH_ATTN_EXT, CUSTOM                            | 69, 84 to 0.9.4; 73, 89 | 73, 89 or 90 | 73 or 74, 90 to 95 | by name
//
// Every tag of ggml from 0.9.1 to 0.21.0 was compared. Of 0.22 to 0.25 no source was at hand; they lie between two versions
// that differ in nothing that the plugin uses but the api_version, which is read from the host (host.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace treeattn_ggml {

constexpr int kMaxDims = 4;
constexpr int kMaxSources = 10;
constexpr int kOpParams = 16;

// enum ggml_status
constexpr int kStatusSuccess = 0;
constexpr int kStatusFailed = -1;
// enum ggml_backend_dev_type
constexpr int kDeviceCpu = 0;
constexpr int kDeviceGpu = 1;
constexpr int kDeviceIgpu = 2;
constexpr int kDeviceAccel = 3;
// enum ggml_tensor_flag
constexpr int32_t kFlagCompute = 16;
// GGML_N_TASKS_MAX: a custom operator on all threads of the graph.
constexpr int kAllTasks = -1;

// enum ggml_type, of the types that can be keys, values, masks; checked against ggml_type_name when the plugin is loaded.
enum Type : int32_t {
  kTypeF32 = 0,
  kTypeF16 = 1,
  kTypeQ4_0 = 2,
  kTypeQ4_1 = 3,
  kTypeQ5_0 = 6,
  kTypeQ5_1 = 7,
  kTypeQ8_0 = 8,
  kTypeIq4Nl = 20,
  kTypeBf16 = 30,
};

struct Buffer;  // struct ggml_backend_buffer
struct Graph;   // struct ggml_cgraph
struct Context; // struct ggml_context
struct BufferType;
struct Event;
struct Device;
struct Registration;
struct Backend;

// struct ggml_tensor
struct Tensor {
  int32_t type;
  Buffer* buffer;
  int64_t ne[kMaxDims];
  size_t nb[kMaxDims];
  int32_t op;
  int32_t op_params[kOpParams];
  int32_t flags;
  Tensor* src[kMaxSources];
  Tensor* view_src;
  size_t view_offs;
  void* data;
  char name[64];
  void* extra;
  char padding[8];
};
static_assert(sizeof(void*) == 8, "64-bit hosts only");
static_assert(offsetof(Tensor, op) == 80 && offsetof(Tensor, src) == 152 && sizeof(Tensor) == 336, "struct ggml_tensor");

using CustomOp = void (*)(Tensor* dst, int ith, int nth, void* user_data);
// struct ggml_custom_op_params: the first 24 bytes of op_params of GGML_OP_CUSTOM.
struct CustomOpParams {
  CustomOp function;
  int32_t tasks;
  void* user_data;
};
static_assert(sizeof(CustomOpParams) == 24, "struct ggml_custom_op_params");

// struct ggml_backend_dev_props
struct DeviceProperties {
  const char* name;
  const char* description;
  size_t memory_free;
  size_t memory_total;
  int32_t type;
  const char* device_id;
  // caps; the fifth lies in what was padding before 0.20.0
  bool async;
  bool host_buffer;
  bool buffer_from_host_ptr;
  bool events;
  bool mmap_support;
};
static_assert(sizeof(DeviceProperties) == 56, "struct ggml_backend_dev_props");

// struct ggml_backend_device_i
struct DeviceInterface {
  const char* (*get_name)(Device*);
  const char* (*get_description)(Device*);
  void (*get_memory)(Device*, size_t* free, size_t* total);
  int32_t (*get_type)(Device*);
  void (*get_props)(Device*, DeviceProperties*);
  Backend* (*init_backend)(Device*, const char* params);
  BufferType* (*get_buffer_type)(Device*);
  BufferType* (*get_host_buffer_type)(Device*);
  Buffer* (*buffer_from_host_ptr)(Device*, void*, size_t, size_t);
  bool (*supports_op)(Device*, const Tensor*);
  bool (*supports_buft)(Device*, BufferType*);
  bool (*offload_op)(Device*, const Tensor*);
  Event* (*event_new)(Device*);
  void (*event_free)(Device*, Event*);
  void (*event_synchronize)(Device*, Event*);
};

struct Device {
  DeviceInterface iface;
  Registration* reg;
  void* context;
};

struct Event {
  Device* device;
  void* context;
};

// struct ggml_backend_reg
struct Registration {
  int32_t api_version;
  const char* (*get_name)(Registration*);
  size_t (*get_device_count)(Registration*);
  Device* (*get_device)(Registration*, size_t);
  void* (*get_proc_address)(Registration*, const char*);
  void* context;
};

// struct ggml_backend_i up to 0.9.11 (TwoDimensional = false) and from 0.10.0 on.
using AnyFunction = void (*)();
template <bool TwoDimensional>
struct BackendInterface;

struct BackendInterfaceTail {
  AnyFunction cpy_tensor_async;
  void (*synchronize)(Backend*);
  AnyFunction graph_plan_create;
  AnyFunction graph_plan_free;
  AnyFunction graph_plan_update;
  AnyFunction graph_plan_compute;
  int32_t (*graph_compute)(Backend*, Graph*);
  void (*event_record)(Backend*, Event*);
  void (*event_wait)(Backend*, Event*);
  // A third parameter from 0.22 or later on, which is not read.
  void (*graph_optimize)(Backend*, Graph*);
};

template <>
struct BackendInterface<false> {
  const char* (*get_name)(Backend*);
  void (*free)(Backend*);
  AnyFunction set_tensor_async;
  AnyFunction get_tensor_async;
  BackendInterfaceTail tail;
};

template <>
struct BackendInterface<true> {
  const char* (*get_name)(Backend*);
  void (*free)(Backend*);
  AnyFunction set_tensor_async;
  AnyFunction get_tensor_async;
  AnyFunction set_tensor_2d_async;
  AnyFunction get_tensor_2d_async;
  BackendInterfaceTail tail;
};
static_assert(offsetof(BackendInterface<false>, tail.graph_compute) == 80, "ggml up to 0.9.11");
static_assert(offsetof(BackendInterface<true>, tail.graph_compute) == 96, "ggml from 0.10.0 on");

// struct ggml_backend
template <bool TwoDimensional>
struct BackendObject {
  const uint8_t* guid;
  BackendInterface<TwoDimensional> iface;
  Device* device;
  void* context;
};

}  // namespace treeattn_ggml
