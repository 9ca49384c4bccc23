// Peers and other processes: access to the memory of another device, and of another process.
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "state.h"

namespace emulator {
namespace {

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
