// The CUDA driver API over the engine: devices, contexts, memory, streams, launches. graphs.cpp has captures and graphs.
#include "driver.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>

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

Stream* stream_of(void* handle) {
    Context* context = current_context();
    if (context == nullptr) return nullptr;
    if (handle == nullptr || handle == reinterpret_cast<void*>(1)) return &context->legacy;
    if (handle == reinterpret_cast<void*>(2)) return &context->per_thread;
    auto* stream = static_cast<Stream*>(handle);
    return state().streams.count(stream) ? stream : nullptr;
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

Status enqueue(Stream* stream, const std::shared_ptr<Operation>& operation, bool programmatic) {
    Context* context = stream->context;
    if (context->gpu.error != 0) return static_cast<Status>(context->gpu.error);
    operation->device = &context->gpu;
    if (stream->capture != nullptr) {
        if (stream->capture->invalid) return kCaptureInvalidated;
        Node node{operation, {}};
        for (size_t tip : stream->tips) node.after.push_back({tip, programmatic && stream->tips.size() == 1});
        stream->capture->graph->nodes.push_back(std::move(node));
        stream->tips = {stream->capture->graph->nodes.size() - 1};
        return kOk;
    }
    const auto wait = [&](const std::shared_ptr<Operation>& on, bool early) {
        if (on != nullptr && !on->done) operation->waits.push_back({on, early});
    };
    wait(stream->last, programmatic && stream->last != nullptr && stream->last->kind == Operation::launch);
    if (stream == &context->legacy) {
        for (Stream* other : context->streams) {
            if (other->non_blocking) continue;
            if (other->capture != nullptr) {
                other->capture->invalid = true;
                return kCaptureImplicit;
            }
            wait(other->last, false);
        }
        wait(context->per_thread.last, false);
    } else if (!stream->non_blocking) {
        wait(context->legacy.last, false);
    }
    stream->last = operation;
    submit(operation);
    return kOk;
}

void wait_for(const std::shared_ptr<Operation>& operation) {
    if (operation != nullptr) wait_until([&] { return operation->done; });
}

std::vector<std::shared_ptr<Operation>> all_last(Context* context) {
    std::vector<std::shared_ptr<Operation>> all{context->legacy.last, context->per_thread.last};
    for (Stream* stream : context->streams) all.push_back(stream->last);
    for (const auto& last : context->orphans) all.push_back(last);
    return all;
}

void wait_for_all(Context* context) {
    for (const auto& last : all_last(context)) wait_for(last);
    context->orphans.clear();
}

namespace {

// Calls that a driver may let wait for kernels, those of other contexts included, do so where EMULATOR_STRICT is set.
void strict_wait() {
    static const bool is_strict = setting("EMULATOR_STRICT", 0) != 0;
    if (!is_strict) return;
    for (const auto& device : state().devices) wait_for_all(device.context);
}

}  // namespace

// --- memory ---

namespace {

constexpr size_t kPage = 4096, kGuard = 16 * kPage;
// As much of a new allocation as is made not a number.
constexpr size_t kFilled = 64 << 20;

size_t round_up(size_t x, size_t to) { return (x + to - 1) / to * to; }

// Maps a file between guards; null where there is no room.
char* map_guarded(int file, size_t bytes, char** region, size_t* region_bytes) {
    *region_bytes = bytes + 2 * kGuard;
    void* at = mmap(nullptr, *region_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    *region = static_cast<char*>(at);
    char* inner = *region + kGuard;
    const int flags = MAP_FIXED | (file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED);
    if (mmap(inner, bytes, PROT_READ | PROT_WRITE, flags, file, 0) == MAP_FAILED) {
        munmap(at, *region_bytes);
        return nullptr;
    }
    return inner;
}

Status allocate(Context* context, size_t bytes, bool on_device, char** to) {
    if (bytes == 0) return kInvalidValue;
    State& s = state();
    if (on_device && context->used + bytes > s.memory) return kOutOfMemory;
    Allocation a{};
    a.bytes = bytes;
    a.type = on_device ? Allocation::device : Allocation::host;
    a.ordinal = context->gpu.ordinal;
    a.id = ++s.next_id;
    a.file = -1;
    // It ends where the guard begins, up to the alignment.
    const size_t room = round_up(bytes, kPage);
    if (on_device) {
        a.file = memfd_create("emulator", MFD_CLOEXEC);
        if (a.file < 0 || ftruncate(a.file, static_cast<off_t>(room)) != 0) {
            if (a.file >= 0) close(a.file);
            return kOutOfMemory;
        }
    }
    char* inner = map_guarded(a.file, room, &a.region, &a.region_bytes);
    if (inner == nullptr) {
        if (a.file >= 0) close(a.file);
        return kOutOfMemory;
    }
    a.base = inner + room - round_up(bytes, 256);
    if (on_device) {
        memset(inner, 0xff, std::min(room, kFilled));
        context->used += bytes;
    }
    s.memory_map[reinterpret_cast<uintptr_t>(a.base)] = a;
    *to = a.base;
    return kOk;
}

void release(Allocation& a) {
    State& s = state();
    if (a.type == Allocation::device) s.devices[static_cast<size_t>(a.ordinal)].context->used -= a.bytes;
    if (a.region != nullptr) munmap(a.region, a.region_bytes);
    if (a.file >= 0) close(a.file);
    s.memory_map.erase(reinterpret_cast<uintptr_t>(a.base));
}

Allocation* find(uintptr_t address) {
    auto& map = state().memory_map;
    auto at = map.upper_bound(address);
    if (at == map.begin()) return nullptr;
    --at;
    return address < at->first + at->second.bytes ? &at->second : nullptr;
}

Allocation* exactly(uintptr_t address) {
    auto& map = state().memory_map;
    const auto at = map.find(address);
    return at == map.end() ? nullptr : &at->second;
}

std::shared_ptr<Operation> copy_operation(void* to, const void* from, size_t bytes) {
    auto operation = std::make_shared<Operation>();
    operation->kind = Operation::copy;
    operation->to = to, operation->from = from, operation->bytes = bytes;
    return operation;
}

std::shared_ptr<Operation> fill_operation(uintptr_t to, unsigned value, unsigned width, size_t count) {
    auto operation = std::make_shared<Operation>();
    operation->kind = Operation::fill;
    operation->to = reinterpret_cast<void*>(to), operation->value = value, operation->width = width;
    operation->bytes = count * width;
    return operation;
}

Status run_async(void* stream_handle, std::shared_ptr<Operation> operation) {
    Lock lock;
    Stream* stream = stream_of(stream_handle);
    if (stream == nullptr) return current_context() == nullptr ? kInvalidContext : kInvalidHandle;
    return enqueue(stream, operation, false);
}

// On the legacy stream, waited for.
Status run_now(std::shared_ptr<Operation> operation) {
    Lock lock;
    if (const Status status = check_change()) return status;
    Context* context = current_context();
    if (const Status status = enqueue(&context->legacy, operation, false)) return status;
    wait_for(operation);
    return static_cast<Status>(context->gpu.error);
}

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

// What other processes need to map an allocation: 64 bytes.
struct Handle {
    int pid, file;
    uint64_t bytes, room, id;
    int device;  // as all processes number them
    char unused[64 - 36];
};
static_assert(sizeof(Handle) == 64);

}  // namespace
}  // namespace emulator

using namespace emulator;

#define API extern "C" __attribute__((visibility("default"))) Status

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

// --- peers and other processes ---

API cuDeviceCanAccessPeer(int* can, int device, int peer) {
    return *can = device != peer && setting("EMULATOR_PEERS", 1) != 0, kOk;
}
API cuDeviceGetP2PAttribute(int* value, int which, int device, int peer) {
    if (device == peer) return kInvalidDevice;
    const bool on = setting("EMULATOR_PEERS", 1) != 0;
    return *value = which == 1 ? on : which == 2 || which == 3 ? on : 0, kOk;
}
API cuCtxEnablePeerAccess(Context* peer, unsigned flags) {
    Lock lock;
    Context* context = current_context();
    if (context == nullptr || peer == nullptr) return kInvalidContext;
    if (flags != 0) return kInvalidValue;
    if (peer == context) return kInvalidDevice;
    if (setting("EMULATOR_PEERS", 1) == 0) return kPeerUnsupported;
    strict_wait();
    return context->peers.insert(peer->gpu.ordinal).second ? kOk : kPeerAlreadyEnabled;
}
API cuCtxDisablePeerAccess(Context* peer) {
    Lock lock;
    Context* context = current_context();
    if (context == nullptr || peer == nullptr) return kInvalidContext;
    return context->peers.erase(peer->gpu.ordinal) ? kOk : kPeerNotEnabled;
}
API cuIpcGetMemHandle(Handle* handle, uintptr_t address) {
    Lock lock;
    if (current_context() == nullptr) return kInvalidContext;
    Allocation* a = find(address);
    if (a == nullptr || a->type != Allocation::device) return kInvalidValue;
    memset(handle, 0, sizeof *handle);
    handle->pid = getpid(), handle->file = a->file, handle->bytes = a->bytes;
    handle->room = round_up(a->bytes, kPage), handle->id = a->id;
    handle->device = state().devices[static_cast<size_t>(a->ordinal)].number;
    return kOk;
}
API cuIpcOpenMemHandle_v2(uintptr_t* address, Handle handle, unsigned flags) {
    Lock lock;
    if (const Status status = check_change()) return status;
    Context* context = current_context();
    // A process cannot open what is its own.
    if (handle.pid == getpid()) return kInvalidContext;
    if (flags > 1) return kInvalidValue;
    if (handle.device != state().devices[static_cast<size_t>(context->gpu.ordinal)].number &&
        setting("EMULATOR_PEERS", 1) == 0) {
        return kPeerUnsupported;
    }
    const std::string name(reinterpret_cast<const char*>(&handle), sizeof handle);
    for (auto& [base, a] : state().memory_map) {
        if (a.type == Allocation::imported && a.handle == name && a.ordinal == context->gpu.ordinal) {
            return a.opened++, *address = base, kOk;
        }
    }
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.pid, handle.file);
    Allocation a{};
    a.type = Allocation::imported;
    a.file = open(path, O_RDWR | O_CLOEXEC);
    if (a.file < 0) return kInvalidValue;
    char* inner = map_guarded(a.file, handle.room, &a.region, &a.region_bytes);
    // The mapping is what keeps the memory, whatever becomes of who exported it.
    close(a.file);
    a.file = -1;
    if (inner == nullptr) return kOutOfMemory;
    a.base = inner + handle.room - round_up(handle.bytes, 256);
    a.bytes = handle.bytes;
    a.ordinal = context->gpu.ordinal;
    a.id = ++state().next_id;
    a.handle = name, a.opened = 1;
    state().memory_map[reinterpret_cast<uintptr_t>(a.base)] = a;
    return *address = reinterpret_cast<uintptr_t>(a.base), kOk;
}
API cuIpcOpenMemHandle(uintptr_t* address, Handle handle, unsigned flags) {
    return cuIpcOpenMemHandle_v2(address, handle, flags);
}
API cuIpcCloseMemHandle(uintptr_t address) {
    Lock lock;
    if (const Status status = check_change()) return status;
    Allocation* a = exactly(address);
    if (a == nullptr || a->type != Allocation::imported) return kInvalidValue;
    if (--a->opened > 0) return kOk;
    wait_for_all(current_context());
    return release(*a), kOk;
}

// --- memory ---

API cuMemAlloc_v2(uintptr_t* address, size_t bytes) {
    Lock lock;
    if (const Status status = check_change()) return status;
    strict_wait();
    char* base = nullptr;
    const Status status = allocate(current_context(), bytes, true, &base);
    return *address = reinterpret_cast<uintptr_t>(base), status;
}
API cuMemFree_v2(uintptr_t address) {
    Lock lock;
    if (address == 0) return kOk;
    if (const Status status = check_change()) return status;
    Allocation* a = exactly(address);
    if (a == nullptr || a->type != Allocation::device) return kInvalidValue;
    strict_wait();
    wait_for_all(state().devices[static_cast<size_t>(a->ordinal)].context);
    a = exactly(address);
    return a == nullptr ? kInvalidValue : (release(*a), kOk);
}
API cuMemGetInfo_v2(size_t* unused, size_t* total) {
    Lock lock;
    Context* context = current_context();
    if (context == nullptr) return kInvalidContext;
    return *total = state().memory, *unused = state().memory - context->used, kOk;
}
API cuMemHostAlloc(void** to, size_t bytes, unsigned) {
    Lock lock;
    if (const Status status = check_change()) return status;
    strict_wait();
    char* base = nullptr;
    const Status status = allocate(current_context(), bytes, false, &base);
    return *to = base, status;
}
API cuMemAllocHost_v2(void** to, size_t bytes) { return cuMemHostAlloc(to, bytes, 0); }
API cuMemFreeHost(void* address) {
    Lock lock;
    if (const Status status = check_change()) return status;
    Allocation* a = exactly(reinterpret_cast<uintptr_t>(address));
    if (a == nullptr || a->type != Allocation::host) return kInvalidValue;
    strict_wait();
    wait_for_all(state().devices[static_cast<size_t>(a->ordinal)].context);
    a = exactly(reinterpret_cast<uintptr_t>(address));
    return a == nullptr ? kInvalidValue : (release(*a), kOk);
}
API cuMemHostRegister_v2(void* address, size_t bytes, unsigned) {
    Lock lock;
    if (const Status status = check_change()) return status;
    if (address == nullptr || bytes == 0) return kInvalidValue;
    if (find(reinterpret_cast<uintptr_t>(address)) != nullptr) return 712;
    Allocation a{};
    a.type = Allocation::registered;
    a.base = static_cast<char*>(address), a.bytes = bytes;
    a.file = -1, a.ordinal = current_context()->gpu.ordinal, a.id = ++state().next_id;
    return state().memory_map[reinterpret_cast<uintptr_t>(address)] = a, kOk;
}
API cuMemHostUnregister(void* address) {
    Lock lock;
    if (const Status status = check_change()) return status;
    Allocation* a = exactly(reinterpret_cast<uintptr_t>(address));
    if (a == nullptr || a->type != Allocation::registered) return 713;
    return release(*a), kOk;
}
API cuMemHostGetDevicePointer_v2(uintptr_t* to, void* address, unsigned flags) {
    Lock lock;
    const Allocation* a = find(reinterpret_cast<uintptr_t>(address));
    if (flags != 0 || a == nullptr || (a->type != Allocation::host && a->type != Allocation::registered)) return kInvalidValue;
    return *to = reinterpret_cast<uintptr_t>(address), kOk;
}
API cuMemGetAddressRange_v2(uintptr_t* base, size_t* bytes, uintptr_t address) {
    Lock lock;
    const Allocation* a = find(address);
    if (a == nullptr) return kNotFound;
    if (base != nullptr) *base = reinterpret_cast<uintptr_t>(a->base);
    if (bytes != nullptr) *bytes = a->bytes;
    return kOk;
}

namespace {

// Status 1 for what the driver does not know, with zeros.
Status attribute(void* to, int which, uintptr_t address) {
    const Allocation* a = find(address);
    const bool on_host = a != nullptr && (a->type == Allocation::host || a->type == Allocation::registered);
    const auto word = [&](auto x) { memcpy(to, &x, sizeof x); };
    switch (which) {
    case 1: word(a ? static_cast<void*>(state().devices[static_cast<size_t>(a->ordinal)].context) : nullptr); break;
    case 2: word(a ? on_host ? 1u : 2u : 0u); break;
    case 3: word(a ? address : uintptr_t{0}); break;
    case 4: word(on_host ? address : uintptr_t{0}); break;
    case 6: word(0u); break;
    case 7: word(a ? a->id : uint64_t{0}); break;
    case 8: word(0u); break;  // managed
    case 9: word(a ? a->ordinal : -2); break;
    case 10: word(a && a->type == Allocation::device ? 1u : 0u); break;  // legacy IPC
    case 11: word(a ? reinterpret_cast<uintptr_t>(a->base) : uintptr_t{0}); break;
    case 12: word(a ? a->bytes : size_t{0}); break;
    case 13: word(a ? 1u : 0u); break;
    default: return kInvalidValue;
    }
    return a == nullptr ? kInvalidValue : kOk;
}

}  // namespace

API cuPointerGetAttributes(unsigned count, const int* which, void** to, uintptr_t address) {
    Lock lock;
    if (current_context() == nullptr) return kInvalidContext;
    for (unsigned i = 0; i < count; i++) attribute(to[i], which[i], address);
    return kOk;
}
API cuPointerGetAttribute(void* to, int which, uintptr_t address) {
    Lock lock;
    return attribute(to, which, address);
}

API cuMemcpyHtoDAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
    return run_async(stream, copy_operation(to, from, bytes));
}
API cuMemcpyDtoHAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
    return run_async(stream, copy_operation(to, from, bytes));
}
API cuMemcpyDtoDAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
    return run_async(stream, copy_operation(to, from, bytes));
}
API cuMemcpyAsync(void* to, const void* from, size_t bytes, void* stream) {
    return run_async(stream, copy_operation(to, from, bytes));
}
API cuMemcpyPeerAsync(void* to, Context*, const void* from, Context*, size_t bytes, void* stream) {
    return run_async(stream, copy_operation(to, from, bytes));
}
API cuMemcpyHtoD_v2(void* to, const void* from, size_t bytes) { return run_now(copy_operation(to, from, bytes)); }
API cuMemcpyDtoH_v2(void* to, const void* from, size_t bytes) { return run_now(copy_operation(to, from, bytes)); }
API cuMemcpyDtoD_v2(void* to, const void* from, size_t bytes) { return run_now(copy_operation(to, from, bytes)); }
API cuMemcpy(void* to, const void* from, size_t bytes) { return run_now(copy_operation(to, from, bytes)); }
API cuMemcpyPeer(void* to, Context*, const void* from, Context*, size_t bytes) {
    return run_now(copy_operation(to, from, bytes));
}
API cuMemsetD8Async(uintptr_t to, unsigned char value, size_t n, void* stream) {
    return run_async(stream, fill_operation(to, value, 1, n));
}
API cuMemsetD16Async(uintptr_t to, unsigned short value, size_t n, void* stream) {
    return run_async(stream, fill_operation(to, value, 2, n));
}
API cuMemsetD32Async(uintptr_t to, unsigned value, size_t n, void* stream) {
    return run_async(stream, fill_operation(to, value, 4, n));
}
API cuMemsetD8_v2(uintptr_t to, unsigned char value, size_t n) { return run_now(fill_operation(to, value, 1, n)); }
API cuMemsetD32_v2(uintptr_t to, unsigned value, size_t n) { return run_now(fill_operation(to, value, 4, n)); }

// --- streams and events ---

API cuStreamCreate(Stream** to, unsigned flags) {
    Lock lock;
    if (const Status status = check_change()) return status;
    if (flags > 1) return kInvalidValue;
    Context* context = current_context();
    *to = new Stream{context, flags == 1, nullptr, nullptr, {}};
    context->streams.insert(*to);
    return state().streams.insert(*to), kOk;
}
API cuStreamCreateWithPriority(Stream** to, unsigned flags, int) { return cuStreamCreate(to, flags); }
API cuStreamDestroy_v2(Stream* stream) {
    Lock lock;
    if (state().streams.erase(stream) == 0) return kInvalidHandle;
    if (stream->last != nullptr && !stream->last->done) stream->context->orphans.push_back(stream->last);
    if (stream->capture != nullptr) stream->capture->invalid = true;
    stream->context->streams.erase(stream);
    return delete stream, kOk;
}
API cuStreamSynchronize(void* handle) {
    Lock lock;
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return current_context() == nullptr ? kInvalidContext : kInvalidHandle;
    if (stream->capture != nullptr) return stream->capture->invalid = true, kCaptureUnsupported;
    Context* context = stream->context;
    // The legacy stream comes after all that blocks it.
    if (stream == &context->legacy) {
        if (const Status status = enqueue(stream, std::make_shared<Operation>(), false)) return status;
    }
    const auto last = stream->last;
    wait_for(last);
    return static_cast<Status>(context->gpu.error);
}
API cuStreamQuery(void* handle) {
    Lock lock;
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return kInvalidHandle;
    if (stream->capture != nullptr) return stream->capture->invalid = true, kCaptureUnsupported;
    if (stream->context->gpu.error != 0) return static_cast<Status>(stream->context->gpu.error);
    return stream->last == nullptr || stream->last->done ? kOk : kNotReady;
}
API cuStreamGetCtx(void* handle, Context** context) {
    Lock lock;
    Stream* stream = stream_of(handle);
    return stream == nullptr ? kInvalidHandle : (*context = stream->context, kOk);
}
API cuStreamGetFlags(void* handle, unsigned* flags) {
    Lock lock;
    Stream* stream = stream_of(handle);
    return stream == nullptr ? kInvalidHandle : (*flags = stream->non_blocking, kOk);
}
API cuStreamWaitEvent(void* handle, Event* event, unsigned) {
    Lock lock;
    Stream* stream = stream_of(handle);
    if (stream == nullptr || event == nullptr) return kInvalidHandle;
    if (event->capture != nullptr) return join_capture(stream, event);
    if (stream->capture != nullptr) return kCaptureIsolation;
    auto operation = std::make_shared<Operation>();
    if (event->operation != nullptr && !event->operation->done) operation->waits.push_back({event->operation, false});
    return enqueue(stream, operation, false);
}
API cuLaunchHostFunc(void* handle, void (*call)(void*), void* data) {
    auto operation = std::make_shared<Operation>();
    operation->kind = Operation::host;
    operation->call = [call, data] { call(data); };
    return run_async(handle, operation);
}
API cuEventCreate(Event** event, unsigned) {
    Lock lock;
    Context* context = current_context();
    if (context == nullptr) return kInvalidContext;
    return *event = new Event{context, nullptr, nullptr, {}}, kOk;
}
API cuEventDestroy_v2(Event* event) {
    Lock lock;
    return delete event, kOk;
}
API cuEventRecord(Event* event, void* handle) {
    Lock lock;
    Stream* stream = stream_of(handle);
    if (stream == nullptr || event == nullptr) return kInvalidHandle;
    event->capture = stream->capture;
    event->tips = stream->tips;
    if (stream->capture != nullptr) return stream->capture->invalid ? kCaptureInvalidated : kOk;
    event->operation = std::make_shared<Operation>();
    return enqueue(stream, event->operation, false);
}
API cuEventQuery(Event* event) {
    Lock lock;
    if (event->context->gpu.error != 0) return static_cast<Status>(event->context->gpu.error);
    return event->operation == nullptr || event->operation->done ? kOk : kNotReady;
}
API cuEventSynchronize(Event* event) {
    Lock lock;
    Context* context = event->context;
    wait_for(std::shared_ptr(event->operation));
    return static_cast<Status>(context->gpu.error);
}
API cuEventElapsedTime(float* ms, Event* begin, Event* end) {
    Lock lock;
    if (begin->operation == nullptr || end->operation == nullptr) return kInvalidHandle;
    if (!begin->operation->done || !end->operation->done) return kNotReady;
    return *ms = static_cast<float>((end->operation->end_time - begin->operation->end_time) * 1e3), kOk;
}
API cuEventElapsedTime_v2(float* ms, Event* begin, Event* end) { return cuEventElapsedTime(ms, begin, end); }

// --- modules and launches ---

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
