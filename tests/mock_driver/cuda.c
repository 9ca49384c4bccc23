/* A CUDA driver without a GPU, for tests of how the library uses one: memory is host memory, kernels do nothing.
 *
 * Two devices. What a test wants to happen next is set by mock_set(); what happened is counted and read by mock_get().
 * Calls that a capture forbids break it here as they do there.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef unsigned int status;
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_BINARY = 209, UNSUPPORTED = 900, INVALIDATED = 901 };

enum key {
    DEVICES, VERSION, MAJOR, MINOR,       /* what the driver shows */
    FAIL_LAUNCH, FAIL_SYNC, FAIL_ALLOC, FAIL_LOAD, /* the status of the next such call, once (launch: for good) */
    CAPTURE,                              /* the capture state of every stream: 0, 1 active, 2 invalidated */
    DEPTH, PUSHES, ALIVE, LAUNCHES, QUERIES, SYNCS, CHANGES, GRID, BLOCK, SHARED, DEPENDENT, STREAM, RETAINED,
    FOREIGN, SLOW_FREE,
    BUSY,   /* kernels that run, as the stand-in for NCCL counts them */
    STRICT, /* not 0: what may wait for kernels does, on whatever device they run; on device 1 so many ms late */
    KEYS
};
static volatile int64_t values[KEYS] = {[DEVICES] = 2, [VERSION] = 13000, [MAJOR] = 9, [MINOR] = 0};
static unsigned char parameters[4096];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int64_t stack[16];
static __thread int depth;
static __thread int mode; /* 0 global, 1 thread-local, 2 relaxed */

void mock_set(int key, int64_t value) { __atomic_store_n(&values[key], value, __ATOMIC_SEQ_CST); }
int64_t mock_get(int key) { return key == DEPTH ? depth : __atomic_load_n(&values[key], __ATOMIC_SEQ_CST); }
void *mock_parameters(void) { return parameters; }
static void add(int key, int64_t n) { __atomic_add_fetch(&values[key], n, __ATOMIC_SEQ_CST); }
/* For the stand-in for NCCL and its tests. */
void mock_busy(int64_t kernels) { add(BUSY, kernels); }
void mock_strict(int64_t ms) { mock_set(STRICT, ms); }

static void sleep_ms(int64_t ms) {
    struct timespec pause = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&pause, NULL);
}

/* A call that allocates, frees, loads or maps may wait for kernels, also for those of other contexts of the process. */
static void wait_for_kernels(void) {
    if (!values[STRICT]) return;
    if (depth && stack[depth - 1] == 0x1001) sleep_ms(values[STRICT]);
    while (values[STRICT] && values[BUSY]) sleep_ms(1);
}

/* Allocations, to answer what a pointer is. */
static struct { char *base; size_t bytes; int type, device; } known[256];

static void remember(void *base, size_t bytes, int type, int device) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < 256; i++)
        if (!known[i].base) {
            known[i].base = base, known[i].bytes = bytes, known[i].type = type, known[i].device = device;
            break;
        }
    pthread_mutex_unlock(&lock);
    add(ALIVE, 1);
}

static status forget(void *base) {
    status result = INVALID_VALUE;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < 256; i++)
        if (known[i].base == base) known[i].base = NULL, result = OK;
    pthread_mutex_unlock(&lock);
    if (result == OK) add(ALIVE, -1), free(base);
    return result;
}

/* A call that a capture forbids unless this thread said that it knows better. */
static status change(void) {
    if (!depth) return 201;
    if (values[CAPTURE] && mode != 2) return mock_set(CAPTURE, 2), UNSUPPORTED;
    add(CHANGES, 1);
    return OK;
}

status cuInit(unsigned flags) { return flags ? INVALID_VALUE : values[DEVICES] ? OK : 100; }
status cuDriverGetVersion(int *version) { return *version = (int)values[VERSION], OK; }
status cuGetErrorName(status code, const char **text) {
    return *text = code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : code == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : "CUDA_ERROR", OK;
}
status cuGetErrorString(status code, const char **text) { return *text = code ? "an error of the mock" : "", OK; }
status cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal < values[DEVICES] ? OK : 101; }
status cuDeviceGetCount(int *count) { return *count = (int)values[DEVICES], OK; }
status cuDeviceGetName(char *name, int cap, int device) { return snprintf(name, cap, "Mock %d", device), OK; }
status cuDeviceTotalMem_v2(size_t *bytes, int device) { return (void)device, *bytes = (size_t)1 << 37, OK; }
status cuDeviceGetAttribute(int *value, int which, int device) {
    (void)device;
    *value = which == 16 ? 132 : which == 75 ? (int)values[MAJOR] : which == 76 ? (int)values[MINOR] : 0;
    return OK;
}
status cuDevicePrimaryCtxRetain(void **context, int device) {
    return add(RETAINED, 1), *context = (void *)(intptr_t)(0x1000 + device), OK;
}
status cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, add(RETAINED, -1), OK; }
status cuCtxGetCurrent(void **context) { return *context = depth ? (void *)stack[depth - 1] : NULL, OK; }
status cuCtxPushCurrent_v2(void *context) { return stack[depth++] = (int64_t)context, add(PUSHES, 1), OK; }
status cuCtxPopCurrent_v2(void **context) {
    if (!depth) return 201;
    return *context = (void *)stack[--depth], OK;
}
status cuDeviceCanAccessPeer(int *can, int device, int peer) { return (void)device, (void)peer, *can = 1, OK; }
status cuCtxEnablePeerAccess(void *context, unsigned flags) {
    return (void)context, wait_for_kernels(), flags ? INVALID_VALUE : OK;
}
status cuThreadExchangeStreamCaptureMode(int *swap) {
    int old = mode;
    return mode = *swap, *swap = old, OK;
}
status cuMemAlloc_v2(uint64_t *data, size_t bytes) {
    status result = change();
    if (result) return result;
    wait_for_kernels();
    if (values[FAIL_ALLOC]) return result = (status)values[FAIL_ALLOC], mock_set(FAIL_ALLOC, 0), result;
    void *base = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!base) return OUT_OF_MEMORY;
    remember(base, bytes, 2, (int)stack[depth - 1] - 0x1000);
    return *data = (uint64_t)base, OK;
}
/* The work that what gives something back waits for. */
static void wait_for_work(void) {
    while (values[SLOW_FREE]) sleep_ms(1);
    wait_for_kernels();
}
status cuMemFree_v2(uint64_t data) {
    status result = change();
    wait_for_work();
    return result ? result : forget((void *)data);
}
status cuMemHostAlloc(void **data, size_t bytes, unsigned flags) {
    status result = change();
    if (result) return result;
    wait_for_kernels();
    *data = aligned_alloc(256, (bytes + 255) / 256 * 256);
    return remember(*data, bytes, 1, (int)stack[depth - 1] - 0x1000), flags ? OK : INVALID_VALUE;
}
status cuMemFreeHost(void *data) {
    status result = change();
    wait_for_work();
    return result ? result : forget(data);
}
status cuMemHostGetDevicePointer_v2(uint64_t *address, void *data, unsigned flags) {
    return *address = (uint64_t)data, flags ? INVALID_VALUE : OK;
}
status cuMemsetD8Async(uint64_t to, unsigned char byte, size_t bytes, void *stream) {
    return (void)stream, memset((void *)to, byte, bytes), OK;
}
status cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
    return (void)stream, memcpy((void *)to, from, bytes), OK;
}
status cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    return (void)stream, memcpy(to, (void *)from, bytes), OK;
}
status cuPointerGetAttributes(unsigned count, int *which, void **to, uint64_t pointer) {
    add(QUERIES, 1);
    int type = 0, device = -2;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < 256; i++)
        if (known[i].base && (char *)pointer >= known[i].base && (char *)pointer < known[i].base + known[i].bytes)
            type = known[i].type, device = known[i].device;
    pthread_mutex_unlock(&lock);
    for (unsigned i = 0; i < count; i++) *(int *)to[i] = which[i] == 2 ? type : which[i] == 9 ? device : 0;
    return OK;
}
status cuStreamCreate(void **stream, unsigned flags) {
    status result = change();
    if (result) return result;
    if (values[FAIL_ALLOC]) return result = (status)values[FAIL_ALLOC], mock_set(FAIL_ALLOC, 0), result;
    return *stream = malloc(16), *(void **)*stream = (void *)stack[depth - 1], add(ALIVE, 1), flags == 1 ? OK : INVALID_VALUE;
}
status cuStreamDestroy_v2(void *stream) { return free(stream), add(ALIVE, -1), OK; }
status cuStreamSynchronize(void *stream) {
    (void)stream;
    add(SYNCS, 1);
    if (values[CAPTURE] && mode != 2) return mock_set(CAPTURE, 2), UNSUPPORTED;
    status result = (status)values[FAIL_SYNC];
    return result;
}
/* There is a handle, but no way to open it. */
struct ipc_handle { char bytes[64]; };
status cuIpcGetMemHandle(struct ipc_handle *handle, uint64_t data) { return memset(handle, (int)(data >> 8), 64), OK; }
status cuIpcOpenMemHandle_v2(uint64_t *data, struct ipc_handle handle, unsigned flags) {
    return (void)data, (void)handle, flags == 1 ? 217 : INVALID_VALUE;
}
status cuIpcCloseMemHandle(uint64_t data) { return data ? OK : INVALID_VALUE; }
status cuStreamQuery(void *stream) { return stream ? (status)values[FAIL_SYNC] : INVALID_VALUE; }
status cuStreamIsCapturing(void *stream, unsigned *state) { return (void)stream, *state = (unsigned)values[CAPTURE], OK; }
status cuStreamGetCtx(void *stream, void **context) {
    return *context = values[FOREIGN] ? (void *)0x9999 : *(void **)stream, OK;
}
status cuModuleLoadData(void **module, const void *image) {
    status result = change();
    if (result) return result;
    wait_for_kernels();
    if (values[FAIL_LOAD]) return result = (status)values[FAIL_LOAD], mock_set(FAIL_LOAD, 0), result;
    return *module = malloc(1), add(ALIVE, 1), image ? OK : INVALID_VALUE;
}
status cuModuleUnload(void *module) { return wait_for_work(), free(module), add(ALIVE, -1), OK; }
status cuModuleGetFunction(void **function, void *module, const char *name) {
    return (void)module, *function = (void *)1, *name ? OK : 500;
}
status cuModuleGetGlobal_v2(uint64_t *address, size_t *bytes, void *module, const char *name) {
    // KernelLaunch of kernels/params.cuh.
    static const struct {
        int threads, dynamic_smem, blocks_per_sm, partial_bytes, counters, rows, open_tiles, long_bytes;
    } launch = {128, 96 << 10, 2, 32 * 66 * 4, 96, 8, 1024, 8 * 66 * 4};
    static const uint64_t abi = ABI, terms_abi = TERMS_ABI, check_abi = CHECK_ABI, gather_abi = GATHER_ABI;
    (void)module;
    if (strstr(name, "decode_terms_abi") || strstr(name, "decode_narrow_abi"))
        return *address = (uint64_t)&terms_abi, *bytes = sizeof terms_abi, OK;
    if (strstr(name, "gather_abi") || strstr(name, "nodes_abi"))
        return *address = (uint64_t)&gather_abi, *bytes = sizeof gather_abi, OK;
    if (strstr(name, "check_abi")) return *address = (uint64_t)&check_abi, *bytes = sizeof check_abi, OK;
    if (strstr(name, "_abi")) return *address = (uint64_t)&abi, *bytes = sizeof abi, OK;
    return *address = (uint64_t)&launch, *bytes = sizeof launch, strstr(name, "_launch") ? OK : 500;
}
status cuFuncGetAttribute(int *value, int which, void *function) {
  return (void)function, *value = which == 5 ? 90 : 0, OK;
}
status cuFuncSetAttribute(void *function, int which, int value) { return (void)function, (void)which, (void)value, OK; }
status cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared) {
    return (void)function, *blocks = threads <= 1024 && shared <= 227 << 10 ? 2 : 0, OK;
}
struct config {
    unsigned grid[3], block[3], shared;
    void *stream;
    int *attributes;
    unsigned count;
};
status cuLaunchKernelEx(const struct config *config, void *function, void **arguments, void **extra) {
    if (!depth || !function || extra) return INVALID_VALUE;
    if (values[FAIL_LAUNCH]) return (status)values[FAIL_LAUNCH];
    if (values[CAPTURE] == 2) return INVALIDATED;
    add(LAUNCHES, 1);
    mock_set(GRID, config->grid[0]), mock_set(BLOCK, config->block[0]), mock_set(SHARED, config->shared);
    mock_set(DEPENDENT, config->count && config->attributes[0] == 6), mock_set(STREAM, (int64_t)config->stream);
    memcpy(parameters, arguments[0], 64);
    return OK;
}

/* What the library does not call but the bench of the command line does. Everything takes a millisecond. */
status cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, void *stream, void **arguments, void **extra) {
    (void)x, (void)y, (void)z, (void)bx, (void)by, (void)bz, (void)shared, (void)stream;
    return depth && function && arguments && !extra ? OK : INVALID_VALUE;
}
status cuEventCreate(void **event, unsigned flags) { return *event = malloc(1), flags ? INVALID_VALUE : OK; }
status cuEventDestroy_v2(void *event) { return free(event), OK; }
status cuEventRecord(void *event, void *stream) { return event && stream ? OK : INVALID_VALUE; }
status cuEventSynchronize(void *event) { return event ? OK : INVALID_VALUE; }
status cuEventElapsedTime(float *ms, void *begin, void *end) { return *ms = 1, begin && end ? OK : INVALID_VALUE; }
status cuStreamBeginCapture_v2(void *stream, int how) { return (void)how, stream ? OK : INVALID_VALUE; }
status cuStreamEndCapture(void *stream, void **graph) { return *graph = malloc(1), stream ? OK : INVALID_VALUE; }
status cuGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long flags) {
    return *exec = malloc(1), graph && !flags ? OK : INVALID_VALUE;
}
status cuGraphLaunch(void *exec, void *stream) { return exec && stream ? OK : INVALID_VALUE; }
status cuGraphExecDestroy(void *exec) { return free(exec), OK; }
status cuGraphDestroy(void *graph) { return free(graph), OK; }
