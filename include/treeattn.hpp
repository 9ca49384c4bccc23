/// libtreeattn for C++17: move-only owners of the C handles, header only.
///
/// Every operation has two forms: a plain one that throws treeattn::Error, and a `try_` one that throws nothing and
/// returns a Status or a Result. Compile with exceptions enabled, whichever form is used. The structs of arguments are
/// those of treeattn.h; their INIT macros work here too.
/// What a call does, blocks on and owns is said in treeattn.h.
///
/// SPDX-License-Identifier: MIT OR Apache-2.0
#ifndef TREEATTN_HPP
#define TREEATTN_HPP

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "treeattn.h"

namespace treeattn {

/// A failed call, thrown: its status, and a message that names the argument, the value found and the value wanted.
class Error : public std::runtime_error {
 public:
  Error(treeattn_status_t code, const std::string& message)
      : std::runtime_error(std::string(treeattn_status_string(code)) + ": " + message), code_(code) {}

  treeattn_status_t code() const noexcept { return code_; }

 private:
  treeattn_status_t code_;
};

/// The outcome of a call that throws nothing. Must be looked at.
class [[nodiscard]] Status {
 public:
  /// Takes the outcome of a C call on this thread, with its message.
  explicit Status(treeattn_status_t code = TREEATTN_OK) noexcept : code_(code) {
    if (code_ != TREEATTN_OK) {
      try {
        message_ = treeattn_last_error_message();
      } catch (...) {
        message_.clear();
      }
    }
  }

  bool ok() const noexcept { return code_ == TREEATTN_OK; }
  explicit operator bool() const noexcept { return ok(); }
  treeattn_status_t code() const noexcept { return code_; }
  const std::string& message() const noexcept { return message_; }

  /// Throws Error unless the call went well.
  void check() const {
    if (!ok()) {
      throw Error(code_, message_);
    }
  }

 private:
  treeattn_status_t code_;
  std::string message_;
};

/// A value, or why there is none. Must be looked at.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) noexcept : value_(std::move(value)) {}
  Result(Status status) noexcept : status_(std::move(status)) {}

  bool ok() const noexcept { return value_.has_value(); }
  explicit operator bool() const noexcept { return ok(); }
  const Status& status() const noexcept { return status_; }

  /// The value; throws Error where there is none.
  T& value() & {
    status_.check();
    return *value_;
  }
  T&& value() && {
    status_.check();
    return std::move(*value_);
  }

 private:
  std::optional<T> value_;
  Status status_;
};

namespace detail {

/// Owns one C handle.
template <typename C, treeattn_status_t (*Destroy)(C*)>
class Handle {
 public:
  Handle() noexcept = default;
  explicit Handle(C* handle) noexcept : handle_(handle) {}
  Handle(Handle&& other) noexcept : handle_(other.release()) {}
  Handle& operator=(Handle&& other) noexcept {
    if (this != &other) {
      reset(other.release());
    }
    return *this;
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() { reset(); }

  /// The C handle, still owned here; nullptr after a move.
  C* get() const noexcept { return handle_; }
  explicit operator bool() const noexcept { return handle_ != nullptr; }
  /// Gives the C handle away.
  C* release() noexcept { return std::exchange(handle_, nullptr); }
  /// Destroys what is owned and owns `handle` instead.
  void reset(C* handle = nullptr) noexcept {
    if (C* old = std::exchange(handle_, handle)) {
      static_cast<void>(Destroy(old));
    }
  }

 private:
  C* handle_ = nullptr;
};

}  // namespace detail

/// A tensor over [data, data + bytes) with byte strides; none: packed. const data is for inputs.
inline treeattn_tensor_t tensor(const void* data, std::size_t bytes, std::initializer_list<std::int64_t> stride = {}) {
  treeattn_tensor_t t{};
  t.data = const_cast<void*>(data);
  t.bytes = bytes;
  std::size_t i = 0;
  for (std::int64_t s : stride) {
    if (i < 4) {
      t.stride[i++] = s;
    }
  }
  return t;
}

/// A packed tensor over a vector. const vectors are for inputs.
template <typename T>
treeattn_tensor_t tensor(const std::vector<T>& values, std::initializer_list<std::int64_t> stride = {}) {
  return tensor(values.data(), values.size() * sizeof(T), stride);
}

/// A process's use of the library.
class Runtime : public detail::Handle<treeattn_runtime_t, treeattn_runtime_destroy> {
 public:
  using Handle::Handle;

  static Result<Runtime> try_create(const treeattn_runtime_config_t* config = nullptr) noexcept {
    treeattn_runtime_t* runtime = nullptr;
    Status status(treeattn_runtime_create(config, &runtime));
    return status ? Result<Runtime>(Runtime(runtime)) : Result<Runtime>(std::move(status));
  }
  static Runtime create(const treeattn_runtime_config_t* config = nullptr) { return try_create(config).value(); }

  Result<std::int32_t> try_device_count(treeattn_device_kind_t kind) const noexcept {
    std::int32_t count = 0;
    Status status(treeattn_runtime_device_count(get(), kind, &count));
    return status ? Result<std::int32_t>(count) : Result<std::int32_t>(std::move(status));
  }
  std::int32_t device_count(treeattn_device_kind_t kind) const { return try_device_count(kind).value(); }

  Result<treeattn_device_info_t> try_device_info(treeattn_device_t device) const noexcept {
    treeattn_device_info_t info = TREEATTN_DEVICE_INFO_INIT;
    Status status(treeattn_runtime_device_info(get(), device, &info));
    return status ? Result<treeattn_device_info_t>(info) : Result<treeattn_device_info_t>(std::move(status));
  }
  treeattn_device_info_t device_info(treeattn_device_t device) const { return try_device_info(device).value(); }

  Status try_set_log_callback(treeattn_log_callback_t callback, void* user_data = nullptr) const noexcept {
    return Status(treeattn_runtime_set_log_callback(get(), callback, user_data));
  }
  void set_log_callback(treeattn_log_callback_t callback, void* user_data = nullptr) const {
    try_set_log_callback(callback, user_data).check();
  }

  Status try_supported(treeattn_device_t device, const treeattn_attention_desc_t& desc) const noexcept {
    return Status(treeattn_attention_supported(get(), device, &desc));
  }
  void supported(treeattn_device_t device, const treeattn_attention_desc_t& desc) const {
    try_supported(device, desc).check();
  }

  /// F(zeta) and its gradient over the keys in `args`; see treeattn_energy.
  Status try_energy(treeattn_device_t device, const treeattn_attention_desc_t& desc,
                    const treeattn_decode_args_t& args, const treeattn_tensor_t& zeta = {}) const noexcept {
    return Status(treeattn_energy(get(), device, &desc, &args, &zeta, nullptr));
  }
  void energy(treeattn_device_t device, const treeattn_attention_desc_t& desc, const treeattn_decode_args_t& args,
              const treeattn_tensor_t& zeta = {}) const {
    try_energy(device, desc, args, zeta).check();
  }

  Result<treeattn_selfcheck_report_t> try_selfcheck(treeattn_device_t device, const treeattn_attention_desc_t& desc,
                                                    const treeattn_selfcheck_config_t* config = nullptr) const noexcept {
    treeattn_selfcheck_report_t report = TREEATTN_SELFCHECK_REPORT_INIT;
    Status status(treeattn_selfcheck(get(), device, &desc, config, &report));
    return status ? Result<treeattn_selfcheck_report_t>(report)
                  : Result<treeattn_selfcheck_report_t>(std::move(status));
  }
  treeattn_selfcheck_report_t selfcheck(treeattn_device_t device, const treeattn_attention_desc_t& desc,
                                        const treeattn_selfcheck_config_t* config = nullptr) const {
    return try_selfcheck(device, desc, config).value();
  }
};

/// An in-order queue of steps on one device.
class Stream : public detail::Handle<treeattn_stream_t, treeattn_stream_destroy> {
 public:
  using Handle::Handle;

  static Result<Stream> try_create(const Runtime& runtime, treeattn_device_t device) noexcept {
    treeattn_stream_t* stream = nullptr;
    Status status(treeattn_stream_create(runtime.get(), device, &stream));
    return status ? Result<Stream>(Stream(stream)) : Result<Stream>(std::move(status));
  }
  static Stream create(const Runtime& runtime, treeattn_device_t device) {
    return try_create(runtime, device).value();
  }

  /// The caller's own CUDA stream, which must outlive this object.
  static Result<Stream> try_wrap_cuda(const Runtime& runtime, treeattn_device_t device, void* cuda_stream) noexcept {
    treeattn_stream_t* stream = nullptr;
    Status status(treeattn_stream_wrap_cuda(runtime.get(), device, cuda_stream, &stream));
    return status ? Result<Stream>(Stream(stream)) : Result<Stream>(std::move(status));
  }
  static Stream wrap_cuda(const Runtime& runtime, treeattn_device_t device, void* cuda_stream) {
    return try_wrap_cuda(runtime, device, cuda_stream).value();
  }

  Status try_synchronize() const noexcept { return Status(treeattn_stream_synchronize(get())); }
  void synchronize() const { try_synchronize().check(); }
};

/// Memory of a device.
class Buffer : public detail::Handle<treeattn_buffer_t, treeattn_buffer_destroy> {
 public:
  using Handle::Handle;

  static Result<Buffer> try_alloc(const Runtime& runtime, treeattn_device_t device, std::size_t bytes) noexcept {
    treeattn_buffer_t* buffer = nullptr;
    Status status(treeattn_buffer_alloc(runtime.get(), device, bytes, &buffer));
    return status ? Result<Buffer>(Buffer(buffer)) : Result<Buffer>(std::move(status));
  }
  static Buffer alloc(const Runtime& runtime, treeattn_device_t device, std::size_t bytes) {
    return try_alloc(runtime, device, bytes).value();
  }

  Result<void*> try_data() const noexcept {
    void* data = nullptr;
    Status status(treeattn_buffer_data(get(), &data));
    return status ? Result<void*>(data) : Result<void*>(std::move(status));
  }
  void* data() const { return try_data().value(); }

  Status try_upload(std::size_t offset, const void* source, std::size_t bytes) const noexcept {
    return Status(treeattn_buffer_upload(get(), offset, source, bytes));
  }
  void upload(std::size_t offset, const void* source, std::size_t bytes) const {
    try_upload(offset, source, bytes).check();
  }
  Status try_download(std::size_t offset, void* target, std::size_t bytes) const noexcept {
    return Status(treeattn_buffer_download(get(), offset, target, bytes));
  }
  void download(std::size_t offset, void* target, std::size_t bytes) const {
    try_download(offset, target, bytes).check();
  }
};

/// One rank's end of a group.
class Communicator : public detail::Handle<treeattn_comm_t, treeattn_comm_destroy> {
 public:
  using Handle::Handle;

  /// One communicator a device, rank by rank, all in this process.
  static Result<std::vector<Communicator>> try_create_local(const Runtime& runtime,
                                                            const std::vector<treeattn_device_t>& devices,
                                                            const treeattn_comm_config_t* config = nullptr) {
    std::vector<treeattn_comm_t*> handles(devices.size());
    std::vector<Communicator> comms;
    comms.reserve(devices.size());
    Status status(treeattn_comm_create_local(runtime.get(), static_cast<std::int32_t>(devices.size()), devices.data(),
                                             config, handles.data()));
    if (!status) {
      return status;
    }
    for (treeattn_comm_t* handle : handles) {
      comms.emplace_back(handle);
    }
    return comms;
  }
  static std::vector<Communicator> create_local(const Runtime& runtime, const std::vector<treeattn_device_t>& devices,
                                                const treeattn_comm_config_t* config = nullptr) {
    return try_create_local(runtime, devices, config).value();
  }

  /// This rank's end of a group that the engine connects. Collective; what `callbacks.ctx` points to outlives this
  /// object and its plans.
  static Result<Communicator> try_create_from_transport(const Runtime& runtime, const treeattn_transport_t& callbacks,
                                                        std::int32_t world, std::int32_t rank, treeattn_device_t device,
                                                        const treeattn_comm_config_t* config = nullptr) noexcept {
    treeattn_comm_t* comm = nullptr;
    Status status(
        treeattn_comm_create_from_transport(runtime.get(), &callbacks, world, rank, device, config, &comm));
    return status ? Result<Communicator>(Communicator(comm)) : Result<Communicator>(std::move(status));
  }
  static Communicator create_from_transport(const Runtime& runtime, const treeattn_transport_t& callbacks,
                                            std::int32_t world, std::int32_t rank, treeattn_device_t device,
                                            const treeattn_comm_config_t* config = nullptr) {
    return try_create_from_transport(runtime, callbacks, world, rank, device, config).value();
  }

  /// A fresh name for a communicator over NCCL: for one rank to ask for, and to bring to all.
  static Result<std::array<std::uint8_t, 128>> try_nccl_unique_id(const Runtime& runtime) noexcept {
    std::array<std::uint8_t, 128> id = {};
    Status status(treeattn_nccl_unique_id(runtime.get(), id.data()));
    using Id = Result<std::array<std::uint8_t, 128>>;
    return status ? Id(id) : Id(std::move(status));
  }
  static std::array<std::uint8_t, 128> nccl_unique_id(const Runtime& runtime) {
    return try_nccl_unique_id(runtime).value();
  }

  /// This rank's end of a group that NCCL connects, on a GPU. Collective.
  static Result<Communicator> try_create_nccl(const Runtime& runtime, const std::array<std::uint8_t, 128>& id,
                                              std::int32_t world, std::int32_t rank, treeattn_device_t device,
                                              const treeattn_comm_config_t* config = nullptr) noexcept {
    treeattn_comm_t* comm = nullptr;
    Status status(treeattn_comm_create_nccl(runtime.get(), id.data(), world, rank, device, config, &comm));
    return status ? Result<Communicator>(Communicator(comm)) : Result<Communicator>(std::move(status));
  }
  static Communicator create_nccl(const Runtime& runtime, const std::array<std::uint8_t, 128>& id, std::int32_t world,
                                  std::int32_t rank, treeattn_device_t device,
                                  const treeattn_comm_config_t* config = nullptr) {
    return try_create_nccl(runtime, id, world, rank, device, config).value();
  }

  /// This rank's end of a group with the ranks of the engine's `ncclComm_t`, split off it. Collective.
  static Result<Communicator> try_wrap_nccl(const Runtime& runtime, void* nccl_comm, treeattn_device_t device,
                                            const treeattn_comm_config_t* config = nullptr) noexcept {
    treeattn_comm_t* comm = nullptr;
    Status status(treeattn_comm_wrap_nccl(runtime.get(), nccl_comm, device, config, &comm));
    return status ? Result<Communicator>(Communicator(comm)) : Result<Communicator>(std::move(status));
  }
  static Communicator wrap_nccl(const Runtime& runtime, void* nccl_comm, treeattn_device_t device,
                                const treeattn_comm_config_t* config = nullptr) {
    return try_wrap_nccl(runtime, nccl_comm, device, config).value();
  }

  std::int32_t rank() const {
    std::int32_t rank = 0;
    Status(treeattn_comm_rank(get(), &rank)).check();
    return rank;
  }
  std::int32_t world() const {
    std::int32_t world = 0;
    Status(treeattn_comm_world(get(), &world)).check();
    return world;
  }
  /// Links, capacities and algorithms, as JSON.
  std::string describe() const {
    std::size_t needed = 0;
    Status(treeattn_comm_describe(get(), nullptr, 0, &needed)).check();
    std::string text(needed, '\0');
    Status(treeattn_comm_describe(get(), &text[0], text.size(), &needed)).check();
    text.resize(text.empty() ? 0 : text.size() - 1);
    return text;
  }

  Result<treeattn_comm_status_t> try_status() const noexcept {
    treeattn_comm_status_t found = TREEATTN_COMM_STATUS_INIT;
    Status status(treeattn_comm_status(get(), &found));
    return status ? Result<treeattn_comm_status_t>(found) : Result<treeattn_comm_status_t>(std::move(status));
  }
  treeattn_comm_status_t status() const { return try_status().value(); }

  Status try_abort() const noexcept { return Status(treeattn_comm_abort(get())); }
  void abort() const { try_abort().check(); }
};

/// A shape made ready on one rank.
class Plan : public detail::Handle<treeattn_plan_t, treeattn_plan_destroy> {
 public:
  using Handle::Handle;

  /// Collective: every rank calls it, local ranks from a thread each.
  static Result<Plan> try_create(const Communicator& comm, const treeattn_attention_desc_t& desc) noexcept {
    treeattn_plan_t* plan = nullptr;
    Status status(treeattn_plan_create(comm.get(), &desc, &plan));
    return status ? Result<Plan>(Plan(plan)) : Result<Plan>(std::move(status));
  }
  static Plan create(const Communicator& comm, const treeattn_attention_desc_t& desc) {
    return try_create(comm, desc).value();
  }

  /// The same for all ranks of a local group, from one thread; plans[i] belongs to comms[i].
  static Result<std::vector<Plan>> try_create_all(const std::vector<Communicator>& comms,
                                                  const treeattn_attention_desc_t& desc) {
    std::vector<treeattn_comm_t*> handles;
    for (const Communicator& comm : comms) {
      handles.push_back(comm.get());
    }
    std::vector<treeattn_plan_t*> made(comms.size());
    std::vector<Plan> plans;
    plans.reserve(comms.size());
    Status status(
        treeattn_plan_create_all(static_cast<std::int32_t>(handles.size()), handles.data(), &desc, made.data()));
    if (!status) {
      return status;
    }
    for (treeattn_plan_t* handle : made) {
      plans.emplace_back(handle);
    }
    return plans;
  }
  static std::vector<Plan> create_all(const std::vector<Communicator>& comms, const treeattn_attention_desc_t& desc) {
    return try_create_all(comms, desc).value();
  }

  /// On a stream it enqueues; without one (CPU) it runs here.
  Status try_decode(const treeattn_decode_args_t& args) const noexcept {
    return Status(treeattn_plan_decode(get(), &args, nullptr));
  }
  Status try_decode(const treeattn_decode_args_t& args, const Stream& stream) const noexcept {
    return Status(treeattn_plan_decode(get(), &args, stream.get()));
  }
  /// On a team of the engine's threads, each of which calls it; `args` counts with member 0.
  Status try_decode_team(const treeattn_decode_args_t& args, const treeattn_team_t& team) const noexcept {
    return Status(treeattn_plan_decode_team(get(), &args, &team));
  }
  void decode_team(const treeattn_decode_args_t& args, const treeattn_team_t& team) const {
    try_decode_team(args, team).check();
  }
  void decode(const treeattn_decode_args_t& args) const { try_decode(args).check(); }
  void decode(const treeattn_decode_args_t& args, const Stream& stream) const { try_decode(args, stream).check(); }

  Status try_partial(const treeattn_decode_args_t& args) const noexcept {
    return Status(treeattn_plan_partial(get(), &args, nullptr));
  }
  Status try_partial(const treeattn_decode_args_t& args, const Stream& stream) const noexcept {
    return Status(treeattn_plan_partial(get(), &args, stream.get()));
  }
  void partial(const treeattn_decode_args_t& args) const { try_partial(args).check(); }
  void partial(const treeattn_decode_args_t& args, const Stream& stream) const { try_partial(args, stream).check(); }

  Status try_merge(const treeattn_merge_args_t& args) const noexcept {
    return Status(treeattn_plan_merge(get(), &args, nullptr));
  }
  Status try_merge(const treeattn_merge_args_t& args, const Stream& stream) const noexcept {
    return Status(treeattn_plan_merge(get(), &args, stream.get()));
  }
  void merge(const treeattn_merge_args_t& args) const { try_merge(args).check(); }
  void merge(const treeattn_merge_args_t& args, const Stream& stream) const { try_merge(args, stream).check(); }

  treeattn_plan_memory_t memory() const {
    treeattn_plan_memory_t memory = TREEATTN_PLAN_MEMORY_INIT;
    Status(treeattn_plan_memory(get(), &memory)).check();
    return memory;
  }
  treeattn_plan_stats_t stats() const {
    treeattn_plan_stats_t stats = TREEATTN_PLAN_STATS_INIT;
    Status(treeattn_plan_stats(get(), &stats)).check();
    return stats;
  }
};

/// Merges n partials of one place into one, on a stream or (CPU) here.
inline Status try_merge_partials(const Runtime& runtime, treeattn_device_t device, const treeattn_merge_args_t& args,
                                 std::int32_t n, treeattn_stream_t* stream = nullptr) noexcept {
  return Status(treeattn_merge_partials(runtime.get(), device, &args, n, stream));
}
inline void merge_partials(const Runtime& runtime, treeattn_device_t device, const treeattn_merge_args_t& args,
                           std::int32_t n, treeattn_stream_t* stream = nullptr) {
  try_merge_partials(runtime, device, args, n, stream).check();
}

/// The heads [first, second) that a rank owns in a scattered output.
inline std::pair<std::int32_t, std::int32_t> head_range(std::int32_t heads, std::int32_t world, std::int32_t rank) {
  std::int32_t first = 0, count = 0;
  Status(treeattn_head_range(heads, world, rank, &first, &count)).check();
  return {first, first + count};
}

/// Placement helpers; see treeattn.h.
inline std::int32_t owner(const treeattn_placement_t& placement, std::int32_t world, std::int32_t global_length,
                          std::int32_t position) {
  std::int32_t rank = 0;
  Status(treeattn_placement_owner(&placement, world, global_length, position, &rank)).check();
  return rank;
}
inline std::int32_t local_length(const treeattn_placement_t& placement, std::int32_t world, std::int32_t rank,
                                 std::int32_t global_length) {
  std::int32_t length = 0;
  Status(treeattn_placement_local_length(&placement, world, rank, global_length, &length)).check();
  return length;
}
inline std::int32_t local_slot(const treeattn_placement_t& placement, std::int32_t world, std::int32_t global_length,
                               std::int32_t position) {
  std::int32_t slot = 0;
  Status(treeattn_placement_local_slot(&placement, world, global_length, position, &slot)).check();
  return slot;
}
inline std::int32_t global_position(const treeattn_placement_t& placement, std::int32_t world, std::int32_t rank,
                                    std::int32_t global_length, std::int32_t slot) {
  std::int32_t position = 0;
  Status(treeattn_placement_global_position(&placement, world, rank, global_length, slot, &position)).check();
  return position;
}

}  // namespace treeattn

#endif  // TREEATTN_HPP
