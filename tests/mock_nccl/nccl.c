/*
 * An NCCL without GPUs: the calls that the library makes, for ranks on threads and in processes of one machine. Ranks meet
 * in a file of /dev/shm that is named by the id. Where the driver has cuLaunchHostFunc, collectives run in the order of
 * their stream; else on a thread of their own, and the communicator is in progress until then. Device memory is memory of
 * the process. A rank that never comes is waited for until ncclCommAbort, as by NCCL.
 *
 * VERSION and WITHOUT_SPLIT are set by who compiles a copy that does not fit; the words below by a test, or at the start by
 * the environment (TREEATTN_MOCK_NCCL_VERSION, TREEATTN_MOCK_NCCL_MODE).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef VERSION
#define VERSION 22803
#endif

enum { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, IN_PROGRESS = 7 };
enum { UINT8 = 1, FLOAT32 = 7, SUM = 0, MAX = 2 };
enum { MODE_NONE, MODE_INIT_FAILS, MODE_ABORT_HANGS, MODE_FINALIZE_HANGS, MODE_INIT_FAILS_LATER };
enum { RANKS = 16, SLOT = 1 << 20 };

typedef struct { char name[128]; } id_t_;
typedef struct { size_t size; unsigned magic, version; int blocking, cga, min, max; const char *net; int share; } config_t;

/* What the ranks share. Turn t of a rank lies in slot t % 2: it begins t + 2 once all are done with t. */
typedef struct {
  int32_t joined[RANKS];
  int32_t device[RANKS];
  uint64_t turn[RANKS];
  unsigned char slot[2][RANKS][SLOT];
} meeting_t;

typedef struct comm {
  char name[128];
  int world, rank, device, blocking, splits;
  meeting_t *meeting;
  uint64_t turn;
  volatile int state, aborted, working;
} comm_t;

typedef struct {
  comm_t *comm;
  const void *send;
  void *recv;
  size_t bytes;
  int op; /* -1: gather */
} job_t;

static volatile int mode = -1;
static __thread char last_error[256];
static volatile int64_t calls_on_borrowed;

/* Makes the calls of the communicators that come after it go wrong. */
void mock_nccl_mode(int value) { mode = value; }
/* Calls on `comm` are counted from now on. */
static comm_t *volatile borrowed;
void mock_nccl_count_calls(void *comm) { borrowed = comm, calls_on_borrowed = 0; }
int64_t mock_nccl_calls(void) { return calls_on_borrowed; }

static void used(comm_t *comm) {
  if (comm == borrowed) __atomic_add_fetch(&calls_on_borrowed, 1, __ATOMIC_SEQ_CST);
}

static int wrong(void) {
  if (mode < 0) {
    const char *text = getenv("TREEATTN_MOCK_NCCL_MODE");
    mode = text ? atoi(text) : MODE_NONE;
  }
  return mode;
}

static int failed(int code, const char *what) {
  snprintf(last_error, sizeof(last_error), "mock: %s\n", what);
  return code;
}

static void nap(void) {
  struct timespec pause = {0, 50000};
  nanosleep(&pause, NULL);
}

/* A call of the driver that the process uses, under either name. */
static void *driver(const char *name) {
  void *library = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD);
  if (!library) library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  return library ? dlsym(library, name) : NULL;
}

/* The device whose primary context is current. */
static int current_device(void) {
  unsigned (*current)(void **) = (unsigned (*)(void **))driver("cuCtxGetCurrent");
  unsigned (*retain)(void **, int) = (unsigned (*)(void **, int))driver("cuDevicePrimaryCtxRetain");
  unsigned (*release)(int) = (unsigned (*)(int))driver("cuDevicePrimaryCtxRelease_v2");
  unsigned (*count)(int *) = (unsigned (*)(int *))driver("cuDeviceGetCount");
  void *context = NULL, *primary = NULL;
  int devices = 0, found = -1;
  if (!current || !retain || !release || !count || current(&context) || !context || count(&devices)) return -1;
  for (int device = 0; device < devices && found < 0; device++) {
    if (retain(&primary, device) == 0) {
      if (primary == context) found = device;
      release(device);
    }
  }
  return found;
}

int ncclGetVersion(int *version) {
  const char *text = getenv("TREEATTN_MOCK_NCCL_VERSION");
  *version = text ? atoi(text) : VERSION;
  return SUCCESS;
}

int ncclGetUniqueId(id_t_ *id) {
  static int64_t count;
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  memset(id, 0, sizeof(*id));
  snprintf(id->name, sizeof(id->name), "treeattn-mock-nccl-%d-%lld-%lld", (int)getpid(),
           (long long)now.tv_sec * 1000000000 + now.tv_nsec, (long long)__atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST));
  return SUCCESS;
}

/* Waits for every rank, unless the communicator is aborted. */
static void join_all(comm_t *comm) {
  for (int peer = 0; peer < comm->world; peer++) {
    while (!__atomic_load_n(&comm->meeting->joined[peer], __ATOMIC_ACQUIRE)) {
      if (comm->aborted) {
        comm->state = INVALID_USAGE;
        return;
      }
      nap();
    }
    if (peer != comm->rank && comm->meeting->device[peer] == comm->device) {
      failed(0, "duplicate GPU");
      comm->state = INVALID_USAGE;
      return;
    }
  }
  /* Everybody has it open. */
  if (comm->rank == 0) shm_unlink(comm->name);
  comm->state = wrong() == MODE_INIT_FAILS_LATER ? SYSTEM_ERROR : SUCCESS;
}

static void *join_on_thread(void *comm) {
  join_all(comm);
  ((comm_t *)comm)->working = 0;
  return NULL;
}

static int begin(comm_t **out, const char *name, int world, int rank, int blocking, int waits) {
  if (world < 1 || world > RANKS || rank < 0 || rank >= world) return failed(INVALID_ARGUMENT, "rank or world");
  if (wrong() == MODE_INIT_FAILS) return failed(SYSTEM_ERROR, "no socket interface found");
  int file = shm_open(name, O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, sizeof(meeting_t)) != 0) return failed(SYSTEM_ERROR, strerror(errno));
  meeting_t *meeting = mmap(NULL, sizeof(meeting_t), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (meeting == MAP_FAILED) return failed(SYSTEM_ERROR, strerror(errno));
  comm_t *comm = calloc(1, sizeof(comm_t));
  strncpy(comm->name, name, sizeof(comm->name) - 1);
  comm->world = world, comm->rank = rank, comm->device = current_device();
  comm->meeting = meeting, comm->blocking = blocking, comm->state = IN_PROGRESS;
  meeting->device[rank] = comm->device;
  __atomic_store_n(&meeting->joined[rank], 1, __ATOMIC_RELEASE);
  *out = comm;
  if (waits) {
    join_all(comm);
    return comm->state;
  }
  comm->working = 1;
  pthread_t thread;
  pthread_create(&thread, NULL, join_on_thread, comm);
  pthread_detach(thread);
  return IN_PROGRESS;
}

int ncclCommInitRankConfig(comm_t **comm, int world, id_t_ id, int rank, config_t *config) {
  if (config && (config->magic != 0xcafebeef || config->size < sizeof(config_t))) {
    return failed(INVALID_ARGUMENT, "config");
  }
  int blocking = !config || config->blocking != 0;
  return begin(comm, id.name, world, rank, blocking, blocking);
}

#ifndef WITHOUT_SPLIT
int ncclCommSplit(comm_t *comm, int color, int key, comm_t **out, config_t *config) {
  used(comm);
  if (color != 0 || key != comm->rank) return failed(INVALID_ARGUMENT, "color or key");
  char name[128];
  snprintf(name, sizeof(name), "%.100s-%d", comm->name, ++comm->splits);
  return begin(out, name, comm->world, comm->rank, !config || config->blocking != 0, comm->blocking);
}
#endif

int ncclCommCount(comm_t *comm, int *count) { return used(comm), *count = comm->world, SUCCESS; }
int ncclCommUserRank(comm_t *comm, int *rank) { return used(comm), *rank = comm->rank, SUCCESS; }
int ncclCommCuDevice(comm_t *comm, int *device) { return used(comm), *device = comm->device, SUCCESS; }
int ncclCommGetAsyncError(comm_t *comm, int *state) {
  used(comm);
  return *state = comm->working ? IN_PROGRESS : comm->state, SUCCESS;
}
const char *ncclGetErrorString(int code) {
  return code == SYSTEM_ERROR ? "unhandled system error" : code == INVALID_USAGE ? "invalid usage" : "an error of the mock";
}
const char *ncclGetLastError(comm_t *comm) { return (void)comm, last_error; }
int ncclGroupStart(void) { return SUCCESS; }
int ncclGroupEnd(void) { return SUCCESS; }

/* One collective, in pieces that fit a slot. */
static void run(void *argument) {
  job_t *job = argument;
  comm_t *comm = job->comm;
  meeting_t *meeting = comm->meeting;
  for (size_t done = 0; done < job->bytes || done == 0; done += SLOT) {
    size_t bytes = job->bytes - done < SLOT ? job->bytes - done : SLOT;
    uint64_t turn = comm->turn++;
    memcpy(meeting->slot[turn % 2][comm->rank], (const char *)job->send + done, bytes);
    __atomic_store_n(&meeting->turn[comm->rank], turn + 1, __ATOMIC_RELEASE);
    for (int peer = 0; peer < comm->world; peer++) {
      while (__atomic_load_n(&meeting->turn[peer], __ATOMIC_ACQUIRE) <= turn) {
        if (comm->aborted) return;
        nap();
      }
    }
    if (job->op < 0) {
      for (int peer = 0; peer < comm->world; peer++) {
        memcpy((char *)job->recv + peer * job->bytes + done, meeting->slot[turn % 2][peer], bytes);
      }
      continue;
    }
    float *to = (float *)((char *)job->recv + done);
    for (size_t i = 0; i < bytes / sizeof(float); i++) {
      float value = ((float *)meeting->slot[turn % 2][0])[i];
      for (int peer = 1; peer < comm->world; peer++) {
        float theirs = ((float *)meeting->slot[turn % 2][peer])[i];
        /* As fmaxf: a NaN loses. */
        value = job->op == SUM ? value + theirs : value > theirs || theirs != theirs ? value : theirs;
      }
      to[i] = value;
    }
  }
}

/* Tells the stand-in for the driver of a kernel that begins (1) or ends (-1). */
static void busy(int64_t kernels) {
  void (*tell)(int64_t) = (void (*)(int64_t))driver("mock_busy");
  if (tell) tell(kernels);
}

static void *run_on_thread(void *argument) {
  run(argument);
  busy(-1);
  ((job_t *)argument)->comm->working = 0;
  free(argument);
  return NULL;
}

static int enqueue(comm_t *comm, const void *send, void *recv, size_t bytes, int op, void *stream) {
  used(comm);
  if (comm->state != SUCCESS || comm->working) return failed(INVALID_USAGE, "the communicator is not ready");
  job_t *job = malloc(sizeof(job_t));
  *job = (job_t){comm, send, recv, bytes, op};
  unsigned (*launch)(void *, void (*)(void *), void *) =
      (unsigned (*)(void *, void (*)(void *), void *))driver("cuLaunchHostFunc");
  if (launch) {
    /* A graph may run it again, so that it is never freed. */
    return launch(stream, run, job) == 0 ? SUCCESS : failed(1, "cuLaunchHostFunc");
  }
  comm->working = 1;
  busy(1);
  pthread_t thread;
  pthread_create(&thread, NULL, run_on_thread, job);
  pthread_detach(thread);
  return IN_PROGRESS;
}

int ncclAllGather(const void *send, void *recv, size_t count, int type, comm_t *comm, void *stream) {
  if (type != UINT8) return failed(INVALID_ARGUMENT, "type");
  return enqueue(comm, send, recv, count, -1, stream);
}

int ncclAllReduce(const void *send, void *recv, size_t count, int type, int op, comm_t *comm, void *stream) {
  if (type != FLOAT32 || (op != SUM && op != MAX)) return failed(INVALID_ARGUMENT, "type or op");
  return enqueue(comm, send, recv, count * sizeof(float), op, stream);
}

int ncclCommFinalize(comm_t *comm) {
  used(comm);
  if (wrong() == MODE_FINALIZE_HANGS) comm->working = 1;
  return comm->working ? IN_PROGRESS : SUCCESS;
}

static void release(comm_t *comm) {
  /* Its memory stays: jobs of streams and graphs name it. */
  munmap(comm->meeting, sizeof(meeting_t));
}

int ncclCommDestroy(comm_t *comm) {
  used(comm);
  release(comm);
  return SUCCESS;
}

int ncclCommAbort(comm_t *comm) {
  used(comm);
  while (wrong() == MODE_ABORT_HANGS) nap();
  comm->aborted = 1;
  shm_unlink(comm->name);
  return SUCCESS;
}
