// The CUDA driver API over the engine: the driver itself, devices and contexts. memory.cpp, peers.cpp, streams.cpp,
// launches.cpp and graphs.cpp have the rest.
#include "driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "state.h"

namespace emulator {

State& state() {
    static auto* only = new State;
    return *only;
}

thread_local std::vector<Context*> context_stack;
thread_local int capture_mode = 0;

Context* current_context() { return context_stack.empty() ? nullptr : context_stack.back(); }

bool initialise() {
    State& s = state();
    if (!s.devices.empty()) return true;
    const long devices = setting("EMULATOR_DEVICES", 2), sms = setting("EMULATOR_SMS", 4);
    std::vector<int> visible;
    const char* list = getenv("CUDA_VISIBLE_DEVICES");
    for (long i = 0; i < devices && list == nullptr; i++) visible.push_back(static_cast<int>(i));
    while (list != nullptr && *list != 0) {
        char* end;
        const long ordinal = strtol(list, &end, 10);
        if (end == list || ordinal < 0 || ordinal >= devices) break;
        visible.push_back(static_cast<int>(ordinal));
        list = *end == ',' ? end + 1 : end;
    }
    for (size_t i = 0; i < visible.size(); i++) {
        auto* context = new Context{};
        context->gpu.ordinal = static_cast<int>(i);
        context->gpu.sms.resize(static_cast<size_t>(sms));
        context->legacy = Stream{context, false, nullptr, nullptr, {}};
        context->per_thread = Stream{context, false, nullptr, nullptr, {}};
        s.devices.push_back({context, visible[i]});
    }
    s.memory = static_cast<size_t>(setting("EMULATOR_MEMORY_GIB", 64)) << 30;
    for (Kernel* kernel : kernels()) s.functions[kernel->name] = Function{kernel, 48 << 10};
    rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    return !s.devices.empty();
}

Status check_change() {
    Context* context = current_context();
    if (context == nullptr) return kInvalidContext;
    if (context->gpu.error != 0) return static_cast<Status>(context->gpu.error);
    Status status = kOk;
    for (const auto& capture : state().captures) {
        const bool mine = capture->thread == thread_id();
        const bool forbids = capture->mode == 0 ? capture_mode == 0 || (capture_mode == 1 && mine)
                                                : capture->mode == 1 && mine && capture_mode != 2;
        if (forbids) {
            capture->invalid = true;
            status = kCaptureUnsupported;
        }
    }
    return status;
}

uint64_t thread_id() {
    static std::atomic<uint64_t> next = 1;
    thread_local const uint64_t mine = next++;
    return mine;
}

}  // namespace emulator

using namespace emulator;

// --- the driver and its devices ---

API cuInit(unsigned flags) {
    Lock lock;
    return flags != 0 ? kInvalidValue : initialise() ? kOk : kNoDevice;
}
API cuDriverGetVersion(int* version) { return *version = 13000, kOk; }
API cuGetErrorName(Status status, const char** text) {
    static const std::map<Status, const char*> names = {
        {0, "CUDA_SUCCESS"}, {1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"},
        {100, "CUDA_ERROR_NO_DEVICE"}, {101, "CUDA_ERROR_INVALID_DEVICE"}, {201, "CUDA_ERROR_INVALID_CONTEXT"},
        {217, "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"}, {400, "CUDA_ERROR_INVALID_HANDLE"},
        {500, "CUDA_ERROR_NOT_FOUND"}, {600, "CUDA_ERROR_NOT_READY"}, {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
        {704, "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED"}, {705, "CUDA_ERROR_PEER_ACCESS_NOT_ENABLED"},
        {720, "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"}, {801, "CUDA_ERROR_NOT_SUPPORTED"},
        {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}, {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
        {904, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED"}, {905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION"},
        {906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"}, {908, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD"}};
    const auto at = names.find(status);
    return at == names.end() ? (*text = nullptr, kInvalidValue) : (*text = at->second, kOk);
}
API cuGetErrorString(Status status, const char** text) {
    if (const Status result = cuGetErrorName(status, text)) return result;
    return *text = status == 0 ? "no error" : "an error of the emulator", kOk;
}
API cuDeviceGetCount(int* count) {
    Lock lock;
    return *count = static_cast<int>(state().devices.size()), kOk;
}
API cuDeviceGet(int* device, int ordinal) {
    Lock lock;
    if (ordinal < 0 || static_cast<size_t>(ordinal) >= state().devices.size()) return kInvalidDevice;
    return *device = ordinal, kOk;
}
API cuDeviceGetName(char* name, int room, int device) {
    return snprintf(name, static_cast<size_t>(room), "Emulated GPU %d", state().devices[static_cast<size_t>(device)].number), kOk;
}
API cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = state().memory, kOk; }
API cuDeviceGetUuid_v2(char* uuid, int device) {
    memcpy(uuid, "emulated device ", 16);
    return uuid[15] = static_cast<char>('0' + state().devices[static_cast<size_t>(device)].number), kOk;
}
API cuDeviceGetUuid(char* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
API cuDeviceGetPCIBusId(char* text, int room, int device) {
    return snprintf(text, static_cast<size_t>(room), "0000:%02X:00.0", state().devices[static_cast<size_t>(device)].number + 1), kOk;
}
API cuDeviceGetAttribute(int* value, int which, int device) {
    const auto& gpu = state().devices[static_cast<size_t>(device)].context->gpu;
    switch (which) {
    case 1: *value = 1024; break;                                       // threads of a block
    case 8: *value = 48 << 10; break;                                   // shared memory of a block
    case 10: *value = 32; break;                                        // lanes of a warp
    case 13: *value = 64000000; break;                                  // clock, kHz: that of clock64
    case 16: *value = static_cast<int>(gpu.sms.size()); break;          // SMs
    case 33: *value = state().devices[static_cast<size_t>(device)].number + 1; break;  // PCI bus
    case 36: *value = 2619000; break;                                   // memory clock, kHz
    case 37: *value = 5120; break;                                      // memory bus, bits
    case 38: *value = 50 << 20; break;                                  // L2
    case 39: *value = static_cast<int>(kThreadsOfSm); break;
    case 41: *value = 1; break;                                         // unified addressing
    case 75: *value = static_cast<int>(setting("EMULATOR_CAPABILITY", 90) / 10); break;
    case 76: *value = static_cast<int>(setting("EMULATOR_CAPABILITY", 90) % 10); break;
    case 81: *value = static_cast<int>(kSharedOfSm); break;
    case 95: *value = 1; break;                                         // cooperative launches
    case 97: *value = static_cast<int>(kSharedOfBlock); break;          // with opt-in
    case 106: *value = static_cast<int>(kBlocksOfSm); break;
    case 111: *value = static_cast<int>(kSharedReserved); break;
    default: *value = 0;
    }
    return kOk;
}

// --- contexts ---

API cuDevicePrimaryCtxRetain(Context** context, int device) {
    Lock lock;
    *context = state().devices[static_cast<size_t>(device)].context;
    return (*context)->retained++, kOk;
}
API cuDevicePrimaryCtxRelease_v2(int device) {
    Lock lock;
    Context* context = state().devices[static_cast<size_t>(device)].context;
    if (context->retained == 0) return kInvalidContext;
    if (--context->retained > 0) return kOk;
    // The last one: what was left behind goes with it.
    wait_for_all(context);
    std::vector<uintptr_t> left;
    for (const auto& [base, a] : state().memory_map) {
        if (a.ordinal == context->gpu.ordinal && a.type == Allocation::device) left.push_back(base);
    }
    for (uintptr_t base : left) release(state().memory_map[base]);
    context->gpu.error = 0;
    context->peers.clear();
    return kOk;
}
API cuDevicePrimaryCtxRelease(int device) { return cuDevicePrimaryCtxRelease_v2(device); }
API cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
    Lock lock;
    return *flags = 0, *active = state().devices[static_cast<size_t>(device)].context->retained > 0, kOk;
}
API cuCtxGetCurrent(Context** context) { return *context = current_context(), kOk; }
API cuCtxPushCurrent_v2(Context* context) {
    if (context == nullptr) return kInvalidContext;
    return context_stack.push_back(context), kOk;
}
API cuCtxPopCurrent_v2(Context** context) {
    if (context_stack.empty()) return kInvalidContext;
    if (context != nullptr) *context = context_stack.back();
    return context_stack.pop_back(), kOk;
}
API cuCtxSetCurrent(Context* context) {
    if (!context_stack.empty()) context_stack.pop_back();
    if (context != nullptr) context_stack.push_back(context);
    return kOk;
}
API cuCtxGetDevice(int* device) {
    Context* context = current_context();
    return context == nullptr ? kInvalidContext : (*device = context->gpu.ordinal, kOk);
}
API cuCtxSynchronize() {
    Lock lock;
    Context* context = current_context();
    if (context == nullptr) return kInvalidContext;
    // As seen on an H200: it breaks captures of all threads, whatever their mode and this thread's.
    Status status = kOk;
    for (const auto& capture : state().captures) {
        if (capture->origin->context == context) capture->invalid = true, status = kCaptureUnsupported;
    }
    if (status != kOk) return status;
    wait_for_all(context);
    return static_cast<Status>(context->gpu.error);
}
