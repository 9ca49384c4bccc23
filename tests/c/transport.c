/*
 * treeattn_comm_create_from_transport: every bad argument, ranks on threads over an allgather written here, the threads
 * that callbacks run on, and transports that fail, hang or bring other ranks. After each failure a fresh communicator
 * works.
 */
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "problem.h"

enum { WORLD = 4, MS = 1000000, HUB_BYTES = 1 << 16 };

static treeattn_runtime_t *runtime;
static treeattn_runtime_t *dead_runtime;
static treeattn_comm_t *dead;
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
  int lie;              /* says that all is well: 1, and brings nothing; 2, and brings ranks 0 and 1 in each other's places */
  int calls;
  int swaps;            /* calls of sendrecv among them */
  pthread_t thread;     /* the thread of the last call */
  int64_t timeout_ns;   /* what the last call was given */
} line_t;

static int64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void nap(void) {
  struct timespec pause = {0, MS};
  nanosleep(&pause, NULL);
}

static int aborted(const int32_t *abort) { return __atomic_load_n(abort, __ATOMIC_ACQUIRE) != 0; }

/* What every callback begins with: what is to go wrong, or 0. */
static int32_t begin(line_t *line, int64_t timeout_ns, const int32_t *abort) {
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
static void wait_for(hub_t *hub) {
  struct timespec soon;
  clock_gettime(CLOCK_REALTIME, &soon);
  soon.tv_nsec += 5 * MS;
  if (soon.tv_nsec >= 1000000000) {
    soon.tv_nsec -= 1000000000;
    soon.tv_sec++;
  }
  pthread_cond_timedwait(&hub->moved, &hub->mutex, &soon);
}

static int32_t sendrecv(void *ctx, const void *send, size_t send_bytes, int32_t to, void *recv, size_t recv_bytes,
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

static int32_t allgather(void *ctx, const void *send, void *recv, size_t bytes, int64_t timeout_ns,
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
    const int place = line->lie == 2 && i < 2 ? 1 - i : i;
    memcpy((unsigned char *)recv + (size_t)place * bytes, hub->bytes[turn % 2][i], bytes);
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

static void keep(rank_t *rank, treeattn_status_t status) {
  rank->status = status;
  snprintf(rank->message, sizeof(rank->message), "%s", status == TREEATTN_OK ? "" : treeattn_last_error_message());
}

static void *create(void *at) {
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

static void *plan(void *at) {
  rank_t *rank = at;
  treeattn_attention_desc_t desc = problem_desc();
  desc.algorithm = rank->algorithm;
  const int64_t began = now_ns();
  keep(rank, treeattn_plan_create(rank->comm, &desc, &rank->plan));
  rank->took_ns = now_ns() - began;
  return NULL;
}

static void *decode(void *at) {
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

static void on_threads(void *(*body)(void *), rank_t *ranks, int n) {
  pthread_t threads[WORLD];
  for (int i = 0; i < n; i++) {
    CHECK(pthread_create(&threads[i], NULL, body, &ranks[i]) == 0);
  }
  for (int i = 0; i < n; i++) {
    CHECK(pthread_join(threads[i], NULL) == 0);
  }
}

static hub_t *hub_make(int world) {
  hub_t *hub = calloc(1, sizeof(*hub));
  if (hub == NULL || pthread_mutex_init(&hub->mutex, NULL) != 0 || pthread_cond_init(&hub->moved, NULL) != 0) {
    printf("no hub\n");
    exit(1);
  }
  hub->world = world;
  return hub;
}

/* Ranks that have not created anything yet. */
static void meet(rank_t *ranks, int world, int64_t step_ms, int64_t setup_ms) {
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

static void all_give(rank_t *ranks, int world, treeattn_status_t status) {
  for (int i = 0; i < world; i++) {
    CHECK(ranks[i].status == status);
    if (ranks[i].status != status) {
      printf("rank %d of %d: %s\n", i, world, ranks[i].message);
    }
  }
}

/* Communicators and plans of all ranks. */
static void setup(rank_t *ranks, int world, int64_t step_ms) {
  meet(ranks, world, step_ms, 0);
  on_threads(create, ranks, world);
  all_give(ranks, world, TREEATTN_OK);
  on_threads(plan, ranks, world);
  all_give(ranks, world, TREEATTN_OK);
}

static void teardown(rank_t *ranks, int world) {
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

/* The exact answer, the bits of a group in one process, and the same on every rank. */
static void steps(void) {
  rank_t ranks[WORLD];
  for (int world = 1; world <= WORLD; world++) {
    setup(ranks, world, 0);
    for (int step = 0; step < 5; step++) {
      for (int i = 0; i < world; i++) {
        shard_reset(&shards[i]);
      }
      on_threads(decode, ranks, world);
      all_give(ranks, world, TREEATTN_OK);
      for (int i = 0; i < world; i++) {
        CHECK(shard_matches(&shards[i], &problem));
        CHECK(memcmp(&shards[i].outputs, &shards[0].outputs, sizeof(outputs_t)) == 0);
      }
    }
    int32_t number = -7;
    char text[2048];
    CHECK_OK(treeattn_comm_rank(ranks[world - 1].comm, &number));
    CHECK(number == world - 1);
    CHECK_OK(treeattn_comm_world(ranks[0].comm, &number));
    CHECK(number == world);
    CHECK_OK(treeattn_comm_describe(ranks[0].comm, text, sizeof(text), NULL));
    CHECK(strstr(text, "\"kind\":\"transport\"") != NULL && strstr(text, "\"stream_threads\":false") != NULL);
    treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
    CHECK_OK(treeattn_comm_status(ranks[0].comm, &status));
    CHECK(status.code == TREEATTN_OK && status.broken == 0 && status.step == (world > 1 ? 5u : 0u));

    outputs_t over_transport = shards[0].outputs;
    treeattn_comm_t *comms[WORLD];
    treeattn_plan_t *plans[WORLD];
    rank_t local[WORLD];
    const treeattn_attention_desc_t desc = problem_desc();
    group_make(runtime, world, 0, 0, comms);
    CHECK_OK(treeattn_plan_create_all(world, comms, &desc, plans));
    memset(local, 0, sizeof(local));
    for (int i = 0; i < world; i++) {
      shard_reset(&shards[i]);
      local[i].plan = plans[i];
      local[i].args = &shards[i].args;
    }
    on_threads(decode, local, world);
    all_give(local, world, TREEATTN_OK);
    CHECK(memcmp(&shards[world - 1].outputs, &over_transport, sizeof(over_transport)) == 0);
    for (int i = 0; i < world; i++) {
      CHECK_OK(treeattn_plan_destroy(plans[i]));
      CHECK_OK(treeattn_comm_destroy(comms[i]));
    }
    /* Ranks of a transport are not a local group. */
    treeattn_plan_t *none = CHECK_NO_HANDLE(treeattn_plan_t);
    CHECK_INVALID(treeattn_plan_create_all(1, &ranks[0].comm, &desc, &none), "comms: found rank 0 of another group");
    CHECK(none == CHECK_NO_HANDLE(treeattn_plan_t));
    teardown(ranks, world);
  }
}

/* Steps go on a stream only where the engine allows its threads, and each rank on one of its own. */
static void streams(void) {
  rank_t ranks[WORLD];
  treeattn_stream_t *made[2];
  for (int i = 0; i < 2; i++) {
    CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &made[i]));
  }
  for (int allowed = 0; allowed < 2; allowed++) {
    meet(ranks, 2, 0, 0);
    ranks[0].flags = ranks[1].flags = allowed ? TREEATTN_TRANSPORT_STREAM_THREADS : 0;
    on_threads(create, ranks, 2);
    all_give(ranks, 2, TREEATTN_OK);
    on_threads(plan, ranks, 2);
    all_give(ranks, 2, TREEATTN_OK);
    for (int i = 0; i < 2; i++) {
      ranks[i].line.calls = 0;
    }
    if (!allowed) {
      CHECK_INVALID(treeattn_plan_decode(ranks[0].plan, ranks[0].args, made[0]), "stream: found a stream");
      CHECK(shard_untouched(&shards[0]) && ranks[0].line.calls == 0);
    } else {
      CHECK_OK(treeattn_plan_decode(ranks[0].plan, ranks[0].args, made[0]));
      /* Each would wait there for the other. */
      CHECK_INVALID(treeattn_plan_decode(ranks[1].plan, ranks[1].args, made[0]),
                    "stream: found one on which rank 0 of this communicator waits for rank 1, wanted a stream");
      CHECK(shard_untouched(&shards[1]));
      CHECK_OK(treeattn_plan_decode(ranks[1].plan, ranks[1].args, made[1]));
      for (int i = 0; i < 2; i++) {
        CHECK_OK(treeattn_stream_synchronize(made[i]));
        CHECK(shard_matches(&shards[i], &problem));
        CHECK(ranks[i].line.calls > 0 && !pthread_equal(ranks[i].line.thread, pthread_self()));
      }
      /* Destroying a plan waits for its steps. */
      for (int i = 0; i < 2; i++) {
        shard_reset(&shards[i]);
        CHECK_OK(treeattn_plan_decode(ranks[i].plan, ranks[i].args, made[i]));
      }
    }
    teardown(ranks, 2);
    CHECK(!allowed || (shard_matches(&shards[0], &problem) && shard_matches(&shards[1], &problem)));
  }
  for (int i = 0; i < 2; i++) {
    CHECK_OK(treeattn_stream_destroy(made[i]));
  }
}

/* Broken with this code; the plan's steps end at once, with NaN, and call nobody. */
static void check_broken(rank_t *rank, treeattn_status_t code) {
  treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
  CHECK_OK(treeattn_comm_status(rank->comm, &status));
  CHECK(status.code == code && status.broken == 1 && status.message[0] != '\0');
  const int calls = rank->line.calls;
  shard_reset(&shards[rank->rank]);
  CHECK(treeattn_plan_decode(rank->plan, rank->args, NULL) == code);
  const outputs_t *outputs = &shards[rank->rank].outputs;
  CHECK(sequence_is_nan(outputs, 0) && sequence_is_nan(outputs, 1) && outputs_guarded(outputs));
  CHECK(rank->line.calls == calls);
}

static void fresh_works(void) {
  rank_t ranks[WORLD];
  setup(ranks, 2, 0);
  on_threads(decode, ranks, 2);
  all_give(ranks, 2, TREEATTN_OK);
  CHECK(shard_matches(&shards[0], &problem) && shard_matches(&shards[1], &problem));
  teardown(ranks, 2);
}

static void failed_step_is_nan(const rank_t *rank) {
  const shard_t *shard = &shards[rank->rank];
  CHECK(sequence_is_nan(&shard->outputs, 0) && sequence_is_nan(&shard->outputs, 1) && outputs_guarded(&shard->outputs));
}

/* A callback that returns something but 0: at creation, with a plan, in a step. */
static void failing(void) {
  rank_t ranks[WORLD];
  const int codes[] = {1, -1, INT32_MIN, 42};
  for (int i = 0; i < 4; i++) {
    for (int after = 0; after < 3; after++) {
      meet(ranks, 2, 0, 0);
      for (int r = 0; r < 2; r++) {
        ranks[r].line.code = codes[i];
        ranks[r].line.after = after;
      }
      on_threads(create, ranks, 2);
      all_give(ranks, 2, TREEATTN_ERROR_TRANSPORT);
      char wanted[64];
      snprintf(wanted, sizeof(wanted), "allgather returned %d", codes[i]);
      CHECK(strstr(ranks[0].message, "treeattn_comm_create_from_transport: ") == ranks[0].message);
      CHECK(strstr(ranks[0].message, wanted) != NULL && ranks[0].comm == CHECK_NO_HANDLE(treeattn_comm_t));
      teardown(ranks, 2);
    }
  }
  meet(ranks, 2, 0, 0);
  on_threads(create, ranks, 2);
  all_give(ranks, 2, TREEATTN_OK);
  ranks[0].line.code = ranks[1].line.code = 7;
  on_threads(plan, ranks, 2);
  all_give(ranks, 2, TREEATTN_ERROR_TRANSPORT);
  CHECK(ranks[0].plan == CHECK_NO_HANDLE(treeattn_plan_t));
  teardown(ranks, 2);

  setup(ranks, 2, 0);
  ranks[0].line.code = ranks[1].line.code = 7;
  on_threads(decode, ranks, 2);
  all_give(ranks, 2, TREEATTN_ERROR_TRANSPORT);
  for (int r = 0; r < 2; r++) {
    failed_step_is_nan(&ranks[r]);
    check_broken(&ranks[r], TREEATTN_ERROR_TRANSPORT);
  }
  teardown(ranks, 2);
  fresh_works();
}

/* An allgather that says it did what it did not: what lies there from the step before is no answer, nor a rank another. */
static void lying(void) {
  for (int lie = 1; lie <= 2; lie++) {
    rank_t ranks[WORLD];
    setup(ranks, 2, 0);
    on_threads(decode, ranks, 2);
    all_give(ranks, 2, TREEATTN_OK);
    ranks[0].line.lie = ranks[1].line.lie = lie;
    on_threads(decode, ranks, 2);
    all_give(ranks, 2, TREEATTN_ERROR_TRANSPORT);
    for (int r = 0; r < 2; r++) {
      CHECK(strstr(ranks[r].message, "the transport's allgather returned 0, but place ") != NULL);
      failed_step_is_nan(&ranks[r]);
      check_broken(&ranks[r], TREEATTN_ERROR_TRANSPORT);
    }
    teardown(ranks, 2);
  }
  fresh_works();
}

/* A rank that does not come, seen by callbacks that watch the clock and by ones that watch the abort word alone. */
static void hanging(void) {
  rank_t ranks[WORLD];
  for (int alone = 0; alone < 2; alone++) {
    meet(ranks, 2, 0, 80);
    ranks[0].line.alone = alone;
    create(&ranks[0]);
    CHECK(ranks[0].status == TREEATTN_ERROR_TIMEOUT && strstr(ranks[0].message, "within 80ms (setup_timeout_ns)") != NULL);
    CHECK(ranks[0].took_ns >= 75 * MS && ranks[0].took_ns < (int64_t)5000 * MS);
    CHECK(ranks[0].comm == CHECK_NO_HANDLE(treeattn_comm_t));
    teardown(ranks, 2);

    setup(ranks, 2, 80);
    ranks[0].line.alone = alone;
    decode(&ranks[0]);
    CHECK(ranks[0].status == TREEATTN_ERROR_TIMEOUT && strstr(ranks[0].message, "within 80ms (step_timeout_ns)") != NULL);
    CHECK(ranks[0].took_ns < (int64_t)5000 * MS);
    CHECK(ranks[0].line.timeout_ns > 0 && ranks[0].line.timeout_ns <= 80 * MS);
    failed_step_is_nan(&ranks[0]);
    check_broken(&ranks[0], TREEATTN_ERROR_TIMEOUT);
    CHECK(shard_untouched(&shards[1]));
    teardown(ranks, 2);
    fresh_works();
  }
}

typedef struct {
  treeattn_comm_t *comm;
  treeattn_status_t (*end)(treeattn_comm_t *);
  treeattn_status_t status;
} ender_t;

static void *end_later(void *at) {
  ender_t *ender = at;
  struct timespec pause = {0, 30 * MS};
  nanosleep(&pause, NULL);
  ender->status = ender->end(ender->comm);
  return NULL;
}

/* An abort, or the end of the communicator, ends the callback that runs: the deadline is 10 s here. */
static void ended(treeattn_status_t (*end)(treeattn_comm_t *), treeattn_status_t code) {
  rank_t ranks[WORLD];
  setup(ranks, 2, 0);
  ranks[0].line.alone = 1;
  ender_t ender = {ranks[0].comm, end, -1};
  pthread_t thread;
  CHECK(pthread_create(&thread, NULL, end_later, &ender) == 0);
  decode(&ranks[0]);
  CHECK(pthread_join(thread, NULL) == 0 && ender.status == TREEATTN_OK);
  CHECK(ranks[0].status == code && ranks[0].took_ns < (int64_t)5000 * MS);
  failed_step_is_nan(&ranks[0]);
  if (end == treeattn_comm_destroy) {
    CHECK_PARENT_DESTROYED(treeattn_plan_decode(ranks[0].plan, ranks[0].args, NULL), "communicator: found destroyed");
    ranks[0].comm = CHECK_NO_HANDLE(treeattn_comm_t);
  } else {
    check_broken(&ranks[0], code);
  }
  teardown(ranks, 2);
  fresh_works();
}

/* Every way in which partials can meet; those between two ranks need sendrecv, and fail as it fails. */
static void algorithms(void) {
  rank_t ranks[WORLD];
  const treeattn_algorithm_t all[] = {TREEATTN_ALGORITHM_ONE_SHOT, TREEATTN_ALGORITHM_TWO_SHOT,
                                      TREEATTN_ALGORITHM_ALLREDUCE3, TREEATTN_ALGORITHM_TREE,
                                      TREEATTN_ALGORITHM_RING};
  for (int which = 0; which < 10; which++) {
    const treeattn_algorithm_t algorithm = all[which % 5];
    const int without = which >= 5, swaps = which % 5 >= 3, refused = without && swaps;
    meet(ranks, WORLD, 0, 0);
    for (int r = 0; r < WORLD; r++) {
      ranks[r].algorithm = algorithm;
      ranks[r].no_sendrecv = without;
    }
    on_threads(create, ranks, WORLD);
    all_give(ranks, WORLD, TREEATTN_OK);
    on_threads(plan, ranks, WORLD);
    all_give(ranks, WORLD, refused ? TREEATTN_ERROR_UNSUPPORTED : TREEATTN_OK);
    if (refused) {
      CHECK(strstr(ranks[1].message, "treeattn_plan_create: algorithm: found ") == ranks[1].message);
      CHECK(strstr(ranks[1].message, "sendrecv") != NULL);
      ranks[0].algorithm = ranks[1].algorithm = ranks[2].algorithm = ranks[3].algorithm = TREEATTN_ALGORITHM_AUTO;
      on_threads(plan, ranks, WORLD);
    }
    for (int step = 0; step < 3; step++) {
      for (int r = 0; r < WORLD; r++) {
        shard_reset(&shards[r]);
      }
      on_threads(decode, ranks, WORLD);
      all_give(ranks, WORLD, TREEATTN_OK);
      for (int r = 0; r < WORLD; r++) {
        CHECK(shard_matches(&shards[r], &problem));
        CHECK(memcmp(&shards[r].outputs, &shards[0].outputs, sizeof(outputs_t)) == 0);
        CHECK((ranks[r].line.swaps > 0) == (swaps && !without));
      }
    }
    teardown(ranks, WORLD);
  }
  for (int alone = 0; alone < 2; alone++) {
    meet(ranks, 2, 80, 0);
    ranks[0].algorithm = ranks[1].algorithm = TREEATTN_ALGORITHM_TREE;
    on_threads(create, ranks, 2);
    on_threads(plan, ranks, 2);
    all_give(ranks, 2, TREEATTN_OK);
    ranks[0].line.alone = alone;
    decode(&ranks[0]);
    CHECK(ranks[0].status == TREEATTN_ERROR_TIMEOUT && strstr(ranks[0].message, "rank 1 did not come") != NULL);
    failed_step_is_nan(&ranks[0]);
    check_broken(&ranks[0], TREEATTN_ERROR_TIMEOUT);
    ranks[1].line.code = 5;
    decode(&ranks[1]);
    CHECK(ranks[1].status == TREEATTN_ERROR_TRANSPORT && strstr(ranks[1].message, "sendrecv returned 5") != NULL);
    failed_step_is_nan(&ranks[1]);
    check_broken(&ranks[1], TREEATTN_ERROR_TRANSPORT);
    teardown(ranks, 2);
  }
  fresh_works();
}

/* Callbacks that connect other ranks than the arguments say. */
static void mixed_up(void) {
  rank_t ranks[WORLD];
  meet(ranks, 3, 0, 0);
  ranks[0].rank = 1;
  ranks[1].rank = 0;
  on_threads(create, ranks, 3);
  all_give(ranks, 3, TREEATTN_ERROR_MISMATCH);
  CHECK(strstr(ranks[2].message, "place 0 of the allgather holds another rank") != NULL);
  teardown(ranks, 3);
  /* A rank that takes part with other arguments than its peers. */
  setup(ranks, 3, 0);
  shards[1].args.batch = shards[1].args.query_tokens = 1;
  on_threads(decode, ranks, 3);
  all_give(ranks, 3, TREEATTN_ERROR_DESYNC);
  CHECK(strstr(ranks[0].message, "rank 1 issued another call than ranks 0 and 2: found a decode of plan 1 with batch 1, "
                                 "query_tokens 1 (rank 1), wanted a decode of plan 1 with batch 2, ") != NULL);
  CHECK(outputs_guarded(&shards[1].outputs));
  teardown(ranks, 3);
  fresh_works();
}

static void arguments(void) {
  hub_t *hub = hub_make(1);
  line_t line;
  memset(&line, 0, sizeof(line));
  line.hub = hub;
  struct {
    treeattn_transport_t known;
    unsigned char tail[8];
  } callbacks;
  memset(&callbacks, 0, sizeof(callbacks));
  callbacks.known.struct_size = sizeof(callbacks);
  callbacks.known.ctx = &line;
  callbacks.known.allgather = allgather;
  const treeattn_transport_t *good = &callbacks.known;
  const treeattn_device_t cpu = TREEATTN_CPU(0);
  treeattn_comm_t *made = CHECK_NO_HANDLE(treeattn_comm_t);
  treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;

  CHECK_BAD_HANDLES(treeattn_runtime_t, 0, dead_runtime, dead, "runtime: found",
                    treeattn_comm_create_from_transport(handle, good, 1, 0, cpu, NULL, &made));
  CHECK_INVALID(treeattn_comm_create_from_transport(runtime, NULL, 1, 0, cpu, NULL, &made), "callbacks: found NULL");
  CHECK_INVALID(treeattn_comm_create_from_transport(
                    runtime, (const treeattn_transport_t *)(const void *)((const char *)good + 4), 1, 0, cpu, NULL,
                    &made),
                "callbacks: found 0x");
  CHECK_INVALID(treeattn_comm_create_from_transport(runtime, good, 1, 0, cpu, NULL, NULL), "comm: found NULL");
  CHECK_INVALID(treeattn_comm_create_from_transport(runtime, good, 1, 0, cpu, NULL,
                                                    (treeattn_comm_t **)(void *)((char *)&made + 4)),
                "comm: found 0x");
  const int32_t worlds[] = {0, -1, INT32_MIN, INT32_MAX, 4097};
  for (int i = 0; i < 5; i++) {
    CHECK_INVALID(treeattn_comm_create_from_transport(runtime, good, worlds[i], 0, cpu, NULL, &made), "world: found");
  }
  const int32_t wrong_ranks[] = {-1, 3, 4, INT32_MIN, INT32_MAX};
  for (int i = 0; i < 5; i++) {
    CHECK_INVALID(treeattn_comm_create_from_transport(runtime, good, 3, wrong_ranks[i], cpu, NULL, &made),
                  "rank: found");
  }
  const treeattn_device_t wrong[] = {-1, INT32_MIN, INT32_MAX, TREEATTN_DEVICE(2, 0), TREEATTN_CPU(1)};
  for (int i = 0; i < 5; i++) {
    CHECK_INVALID(treeattn_comm_create_from_transport(runtime, good, 1, 0, wrong[i], NULL, &made), "device: found");
  }
  CHECK_STATUS(treeattn_comm_create_from_transport(runtime, good, 1, 0, TREEATTN_CUDA(65535), NULL, &made),
               TREEATTN_ERROR_UNAVAILABLE, "cuda:65535");
  config.step_timeout_ns = -1;
  CHECK_INVALID(treeattn_comm_create_from_transport(runtime, good, 1, 0, cpu, &config, &made),
                "step_timeout_ns: found -1");
  config.step_timeout_ns = 0;
  config.threads_per_rank = -1;
  CHECK_INVALID(treeattn_comm_create_from_transport(runtime, good, 1, 0, cpu, &config, &made),
                "threads_per_rank: found -1");
  config.struct_size = 3;
  CHECK_INVALID(treeattn_comm_create_from_transport(runtime, good, 1, 0, cpu, &config, &made),
                "config.struct_size: found 3");

#define REFUSED(text) \
  CHECK_INVALID(treeattn_comm_create_from_transport(runtime, good, 1, 0, cpu, NULL, &made), "callbacks." text)
  const size_t sizes[] = {0, 7, 12, (size_t)1 << 17, SIZE_MAX};
  for (int i = 0; i < 5; i++) {
    callbacks.known.struct_size = sizes[i];
    REFUSED("struct_size: found");
  }
  callbacks.known.struct_size = sizeof(callbacks);
  callbacks.tail[7] = 1;
  REFUSED("struct_size: found 48 with byte 47 set");
  callbacks.tail[7] = 0;
  callbacks.known.flags = 2;
  REFUSED("flags: found 0x2");
  callbacks.known.flags = UINT32_MAX;
  REFUSED("flags: found 0xffffffff");
  callbacks.known.flags = 0;
  callbacks.known.reserved = 5;
  REFUSED("reserved: found 5");
  callbacks.known.reserved = 0;
  callbacks.known.allgather = NULL;
  REFUSED("allgather: found NULL");
  /* A struct that ends before it. */
  callbacks.known.allgather = allgather;
  callbacks.known.struct_size = offsetof(treeattn_transport_t, allgather);
  REFUSED("struct_size: found 16, wanted sizeof(treeattn_transport_t)");
  callbacks.known.struct_size = offsetof(treeattn_transport_t, sendrecv);
  REFUSED("struct_size: found 24, wanted sizeof(treeattn_transport_t)");
  CHECK(made == CHECK_NO_HANDLE(treeattn_comm_t) && line.calls == 0);

  /* What is longer and zero is fine. */
  const size_t fine[] = {sizeof(treeattn_transport_t), sizeof(callbacks)};
  for (int i = 0; i < 2; i++) {
    callbacks.known.struct_size = fine[i];
    CHECK_OK(treeattn_comm_create_from_transport(runtime, good, 1, 0, cpu, NULL, &made));
    CHECK(line.calls > 0);
    CHECK_OK(treeattn_comm_destroy(made));
  }

  /* The runtime may go first. */
  treeattn_runtime_t *own = runtime_make();
  CHECK_OK(treeattn_comm_create_from_transport(own, good, 1, 0, cpu, NULL, &made));
  CHECK_OK(treeattn_runtime_destroy(own));
  int32_t number = -7;
  CHECK_PARENT_DESTROYED(treeattn_comm_rank(made, &number), "runtime: found destroyed");
  CHECK_OK(treeattn_comm_destroy(made));
  CHECK(number == -7);
  free(hub);
}

int main(void) {
  problem_make(&problem, 11);
  runtime = runtime_make();
  dead_runtime = runtime_make();
  CHECK_OK(treeattn_runtime_destroy(dead_runtime));
  group_make(runtime, 1, 0, 0, &dead);
  arguments();
  steps();
  streams();
  failing();
  lying();
  hanging();
  ended(treeattn_comm_abort, TREEATTN_ERROR_ABORTED);
  ended(treeattn_comm_destroy, TREEATTN_ERROR_PARENT_DESTROYED);
  algorithms();
  mixed_up();
  CHECK_OK(treeattn_comm_destroy(dead));
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("transport");
}
