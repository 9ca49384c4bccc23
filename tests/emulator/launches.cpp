// Modules, functions and launches.
#include <string.h>

#include "state.h"

namespace emulator {
namespace {

Status launch(Function* function, dim3 blocks, dim3 threads, uint32_t shared, void* stream_handle, void** arguments,
              bool programmatic, bool cooperative) {
    Lock lock;
    Stream* stream = stream_of(stream_handle);
    if (stream == nullptr) return current_context() == nullptr ? kInvalidContext : kInvalidHandle;
    if (function == nullptr) return kInvalidHandle;
    const uint64_t count = static_cast<uint64_t>(threads.x) * threads.y * threads.z;
    if (count == 0 || count > 1024 || blocks.x == 0 || blocks.y == 0 || blocks.z == 0 || blocks.y > 65535 ||
        blocks.z > 65535 || shared > static_cast<uint32_t>(function->dynamic_limit)) {
        return kInvalidValue;
    }
    if (cooperative) {
        const uint64_t room = blocks_per_sm(static_cast<uint32_t>(count), shared) * stream->context->gpu.sms.size();
        if (static_cast<uint64_t>(blocks.x) * blocks.y * blocks.z > room) return kCooperativeTooLarge;
    }
    auto operation = std::make_shared<Operation>();
    operation->kind = Operation::launch;
    operation->kernel = function->kernel;
    operation->blocks = blocks, operation->threads = threads, operation->shared_bytes = shared;
    size_t at = 0;
    for (size_t i = 0; i < function->kernel->sizes.size(); i++) {
        const size_t bytes = function->kernel->sizes[i];
        operation->arguments.resize(at + round_up(bytes, 16));
        memcpy(operation->arguments.data() + at, arguments[i], bytes);
        at += round_up(bytes, 16);
    }
    return enqueue(stream, operation, programmatic);
}

struct LaunchAttribute {
    int id;
    char unused[4];
    union {
        int number;
        char room[64];
    } value;
};
static_assert(sizeof(LaunchAttribute) == 72);
struct LaunchConfig {
    dim3 blocks, threads;
    unsigned shared;
    void* stream;
    const LaunchAttribute* attributes;
    unsigned count;
};

}  // namespace
}  // namespace emulator

using namespace emulator;

API cuModuleLoadData(void** module, const void* image) {
    Lock lock;
    if (const Status status = check_change()) return status;
    if (image == nullptr) return kInvalidValue;
    strict_wait();
    return *module = new char, kOk;
}
API cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(module, image);
}
API cuModuleUnload(void* module) {
    Lock lock;
    if (const Status status = check_change()) return status;
    strict_wait();
    wait_for_all(current_context());
    return delete static_cast<char*>(module), kOk;
}
API cuModuleGetFunction(Function** function, void* module, const char* name) {
    Lock lock;
    if (module == nullptr) return kInvalidHandle;
    const auto at = state().functions.find(name);
    return at == state().functions.end() ? kNotFound : (*function = &at->second, kOk);
}
API cuModuleGetGlobal_v2(void** address, size_t* bytes, void* module, const char* name) {
    if (module == nullptr) return kInvalidHandle;
    for (const Constant& constant : constants()) {
        if (strcmp(constant.name, name) != 0) continue;
        if (address != nullptr) *address = constant.data;
        if (bytes != nullptr) *bytes = constant.bytes;
        return kOk;
    }
    return kNotFound;
}
API cuFuncSetAttribute(Function* function, int which, int value) {
    Lock lock;
    if (which == 8) {
        if (value < 0 || value > static_cast<int>(kSharedOfBlock)) return kInvalidValue;
        function->dynamic_limit = value;
    }
    return kOk;
}
API cuFuncGetAttribute(int* value, int which, Function* function) {
    return *value = which == 0 ? 1024 : which == 5 ? 90 : which == 8 ? function->dynamic_limit : 0, kOk;
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function*, int threads, size_t shared) {
    return *blocks = static_cast<int>(blocks_per_sm(static_cast<uint32_t>(threads), static_cast<uint32_t>(shared))), kOk;
}

API cuLaunchKernelEx(const LaunchConfig* config, Function* function, void** arguments, void** extra) {
    if (extra != nullptr) return kNotSupported;
    bool programmatic = false, cooperative = false;
    for (unsigned i = 0; i < config->count; i++) {
        const LaunchAttribute& attribute = config->attributes[i];
        if (attribute.id == 2) cooperative = attribute.value.number != 0;
        if (attribute.id == 4) return kNotSupported;  // clusters
        if (attribute.id == 6) programmatic = attribute.value.number != 0;
    }
    return launch(function, config->blocks, config->threads, config->shared, config->stream, arguments, programmatic,
                  cooperative);
}
API cuLaunchKernel(Function* function, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz,
                   unsigned shared, void* stream, void** arguments, void** extra) {
    if (extra != nullptr) return kNotSupported;
    return launch(function, {x, y, z}, {tx, ty, tz}, shared, stream, arguments, false, false);
}
API cuLaunchCooperativeKernel(Function* function, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty,
                              unsigned tz, unsigned shared, void* stream, void** arguments) {
    return launch(function, {x, y, z}, {tx, ty, tz}, shared, stream, arguments, false, true);
}
