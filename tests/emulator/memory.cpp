// Memory: allocations, what the driver knows of an address, copies and fills.
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "state.h"

namespace emulator {
namespace {

constexpr size_t kGuard = 16 * kPage;
// As much of a new allocation as is made not a number.
constexpr size_t kFilled = 64 << 20;

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

}  // namespace

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

namespace {

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

// On the legacy stream, waited for.
Status run_now(std::shared_ptr<Operation> operation) {
    Lock lock;
    if (const Status status = check_change()) return status;
    Context* context = current_context();
    if (const Status status = enqueue(&context->legacy, operation, false)) return status;
    wait_for(operation);
    return static_cast<Status>(context->gpu.error);
}

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
}  // namespace emulator

using namespace emulator;

// --- allocations ---

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

// --- addresses ---

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

// --- copies and fills ---

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
