/*
 * What C tests of transports share: a hub at which ranks on threads meet, callbacks over it that can be told to go wrong, and
 * ranks whose calls run on threads of their own.
 */
#ifndef TREEATTN_TESTS_TRANSPORT_H
#define TREEATTN_TESTS_TRANSPORT_H

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "problem.h"

enum { WORLD = 4, MS = 1000000, HUB_BYTES = 1 << 16 };

/* Made by `main`. */
static treeattn_runtime_t *runtime;
static problem_t problem;
static shard_t shards[WORLD];

/* Where the ranks of a group meet. */
typedef struct {
  pthread_mutex_t mutex;
  pthread_cond_t moved;
  int world;
  int arrived;
  unsigned turn;
  unsigned char bytes[2][WORLD][HUB_BYTES];
  /* From rank to rank, and how many bytes lie there; 0: none. */
  unsigned char mail[WORLD][WORLD][HUB_BYTES];
  size_t mailed[WORLD][WORLD];
} hub_t;

/* One rank's way to the hub, and what is to go wrong on it. */
typedef struct {
  hub_t *hub;
  int rank;
  int code;             /* returned at once, if not 0 */
  int after;            /* calls that still go well before `code` counts */
  int alone;            /* waits for nobody but the abort word */
  int lie;              /* says that all is well: 1, and brings nothing; 2, and brings ranks 0 and 1 in each other's slots */
  int calls;
  int swaps;            /* calls of sendrecv among them */
  pthread_t thread;     /* the thread of the last call */
  int64_t timeout_ns;   /* what the last call was given */
} line_t;

static inline int64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline void nap(void) {
  struct timespec pause = {0, MS};
  nanosleep(&pause, NULL);
}

static inline int aborted(const int32_t *abort) { return __atomic_load_n(abort, __ATOMIC_ACQUIRE) != 0; }

/* What every callback begins with: what is to go wrong, or 0. */
static inline int32_t begin(line_t *line, int64_t timeout_ns, const int32_t *abort) {
  line->calls++;
  line->thread = pthread_self();
  line->timeout_ns = timeout_ns;
  if (timeout_ns < 0) {
    return 99;
  }
  if (line->code != 0 && line->after-- <= 0) {
    return line->code;
  }
  if (line->alone) {
    while (!aborted(abort)) {
      nap();
    }
    return 1;
  }
  return 0;
}

/* Waits a little for the hub, which is locked, to change. */
static inline void wait_for(hub_t *hub) {
  struct timespec soon;
  clock_gettime(CLOCK_REALTIME, &soon);
  soon.tv_nsec += 5 * MS;
  if (soon.tv_nsec >= 1000000000) {
    soon.tv_nsec -= 1000000000;
    soon.tv_sec++;
  }
  pthread_cond_timedwait(&hub->moved, &hub->mutex, &soon);
}

static inline int32_t sendrecv(void *ctx, const void *send, size_t send_bytes, int32_t to, void *recv, size_t recv_bytes,
                        int32_t from, int64_t timeout_ns, const int32_t *abort) {
  line_t *line = ctx;
  hub_t *hub = line->hub;
  const int64_t until = now_ns() + timeout_ns;
  const int32_t code = begin(line, timeout_ns, abort);
  line->swaps++;
  if (code != 0) {
    return code;
  }
  if (send_bytes > HUB_BYTES || to < 0 || to >= hub->world || from < 0 || from >= hub->world || to == line->rank) {
    return 98;
  }
  int sent = send_bytes == 0, got = recv_bytes == 0;
  pthread_mutex_lock(&hub->mutex);
  while ((!sent || !got) && !aborted(abort) && now_ns() < until) {
    if (!sent && hub->mailed[line->rank][to] == 0) {
      memcpy(hub->mail[line->rank][to], send, send_bytes);
      hub->mailed[line->rank][to] = send_bytes;
      sent = 1;
      pthread_cond_broadcast(&hub->moved);
    }
    if (!got && hub->mailed[from][line->rank] != 0) {
      if (hub->mailed[from][line->rank] != recv_bytes) {
        break;
      }
      memcpy(recv, hub->mail[from][line->rank], recv_bytes);
      hub->mailed[from][line->rank] = 0;
      got = 1;
      pthread_cond_broadcast(&hub->moved);
    }
    if (!sent || !got) {
      wait_for(hub);
    }
  }
  pthread_mutex_unlock(&hub->mutex);
  return sent && got ? 0 : 1;
}

static inline int32_t allgather(void *ctx, const void *send, void *recv, size_t bytes, int64_t timeout_ns,
                         const int32_t *abort) {
  line_t *line = ctx;
  hub_t *hub = line->hub;
  const int64_t until = now_ns() + timeout_ns;
  const int32_t code = begin(line, timeout_ns, abort);
  if (code != 0) {
    return code;
  }
  if (line->lie == 1) {
    return 0;
  }
  if (bytes == 0 || bytes > HUB_BYTES) {
    return 99;
  }
  pthread_mutex_lock(&hub->mutex);
  const unsigned turn = hub->turn;
  int done = 0;
  memcpy(hub->bytes[turn % 2][line->rank], send, bytes);
  if (++hub->arrived == hub->world) {
    hub->arrived = 0;
    hub->turn++;
    pthread_cond_broadcast(&hub->moved);
  }
  while (!(done = hub->turn != turn) && !aborted(abort) && now_ns() < until) {
    wait_for(hub);
  }
  for (int i = 0; done && i < hub->world; i++) {
    const int slot = line->lie == 2 && i < 2 ? 1 - i : i;
    memcpy((unsigned char *)recv + (size_t)slot * bytes, hub->bytes[turn % 2][i], bytes);
  }
  pthread_mutex_unlock(&hub->mutex);
  return done ? 0 : 1;
}

/* One rank on a thread of its own, and what its calls gave. */
typedef struct {
  line_t line;
  int world;
  int rank;
  uint32_t flags;
  int no_sendrecv;
  treeattn_algorithm_t algorithm;
  int64_t step_ms;
  int64_t setup_ms;
  const treeattn_decode_args_t *args;
  treeattn_comm_t *comm;
  treeattn_plan_t *plan;
  treeattn_status_t status;
  int64_t took_ns;
  char message[1024];
} rank_t;

static inline void keep(rank_t *rank, treeattn_status_t status) {
  rank->status = status;
  snprintf(rank->message, sizeof(rank->message), "%s", status == TREEATTN_OK ? "" : treeattn_last_error_message());
}

static inline void *create(void *at) {
  rank_t *rank = at;
  treeattn_transport_t callbacks = TREEATTN_TRANSPORT_INIT;
  treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
  callbacks.ctx = &rank->line;
  callbacks.allgather = allgather;
  callbacks.sendrecv = rank->no_sendrecv ? NULL : sendrecv;
  callbacks.flags = rank->flags;
  config.threads_per_rank = 1;
  config.step_timeout_ns = rank->step_ms * MS;
  config.setup_timeout_ns = rank->setup_ms * MS;
  const int64_t began = now_ns();
  keep(rank, treeattn_comm_create_from_transport(runtime, &callbacks, rank->world, rank->rank, TREEATTN_CPU(0),
                                                 &config, &rank->comm));
  rank->took_ns = now_ns() - began;
  return NULL;
}

static inline void *plan(void *at) {
  rank_t *rank = at;
  treeattn_attention_desc_t desc = problem_desc();
  desc.algorithm = rank->algorithm;
  const int64_t began = now_ns();
  keep(rank, treeattn_plan_create(rank->comm, &desc, &rank->plan));
  rank->took_ns = now_ns() - began;
  return NULL;
}

static inline void *decode(void *at) {
  rank_t *rank = at;
  const int64_t began = now_ns();
  keep(rank, treeattn_plan_decode(rank->plan, rank->args, NULL));
  rank->took_ns = now_ns() - began;
  /* Inside the call, on the thread that made it. */
  if (rank->line.calls > 0 && !pthread_equal(rank->line.thread, pthread_self())) {
    rank->status = -1;
  }
  return NULL;
}

static inline void on_threads(void *(*body)(void *), rank_t *ranks, int n) {
  pthread_t threads[WORLD];
  for (int i = 0; i < n; i++) {
    CHECK(pthread_create(&threads[i], NULL, body, &ranks[i]) == 0);
  }
  for (int i = 0; i < n; i++) {
    CHECK(pthread_join(threads[i], NULL) == 0);
  }
}

static inline hub_t *hub_make(int world) {
  hub_t *hub = calloc(1, sizeof(*hub));
  if (hub == NULL || pthread_mutex_init(&hub->mutex, NULL) != 0 || pthread_cond_init(&hub->moved, NULL) != 0) {
    printf("no hub\n");
    exit(1);
  }
  hub->world = world;
  return hub;
}

/* Ranks that have not created anything yet. */
static inline void meet(rank_t *ranks, int world, int64_t step_ms, int64_t setup_ms) {
  hub_t *hub = hub_make(world);
  memset(ranks, 0, sizeof(rank_t) * (size_t)world);
  for (int i = 0; i < world; i++) {
    shard_make(&shards[i], &problem, world, i);
    ranks[i].line.hub = hub;
    ranks[i].line.rank = ranks[i].rank = i;
    ranks[i].world = world;
    ranks[i].step_ms = step_ms;
    ranks[i].setup_ms = setup_ms;
    ranks[i].args = &shards[i].args;
    ranks[i].comm = CHECK_NO_HANDLE(treeattn_comm_t);
    ranks[i].plan = CHECK_NO_HANDLE(treeattn_plan_t);
  }
}

static inline void all_give(rank_t *ranks, int world, treeattn_status_t status) {
  for (int i = 0; i < world; i++) {
    CHECK(ranks[i].status == status);
    if (ranks[i].status != status) {
      printf("rank %d of %d: %s\n", i, world, ranks[i].message);
    }
  }
}

/* Communicators and plans of all ranks. */
static inline void setup(rank_t *ranks, int world, int64_t step_ms) {
  meet(ranks, world, step_ms, 0);
  on_threads(create, ranks, world);
  all_give(ranks, world, TREEATTN_OK);
  on_threads(plan, ranks, world);
  all_give(ranks, world, TREEATTN_OK);
}

static inline void teardown(rank_t *ranks, int world) {
  for (int i = 0; i < world; i++) {
    if (ranks[i].plan != CHECK_NO_HANDLE(treeattn_plan_t)) {
      CHECK_OK(treeattn_plan_destroy(ranks[i].plan));
    }
    if (ranks[i].comm != CHECK_NO_HANDLE(treeattn_comm_t)) {
      CHECK_OK(treeattn_comm_destroy(ranks[i].comm));
    }
  }
  pthread_cond_destroy(&ranks[0].line.hub->moved);
  pthread_mutex_destroy(&ranks[0].line.hub->mutex);
  free(ranks[0].line.hub);
}

static inline void fresh_works(void) {
  rank_t ranks[WORLD];
  setup(ranks, 2, 0);
  on_threads(decode, ranks, 2);
  all_give(ranks, 2, TREEATTN_OK);
  CHECK(shard_matches(&shards[0], &problem) && shard_matches(&shards[1], &problem));
  teardown(ranks, 2);
}

#endif
