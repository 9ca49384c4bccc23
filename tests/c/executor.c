/*
 * Steps on the engine's threads by its own parallel-for (treeattn_executor_t): treeattn_comm_create_local and
 * _create_from_transport with an executor, treeattn_plan_decode and _partial; every bad executor, and executors that do
 * not do what they promise.
 */
#include <dirent.h>

#include "ranks.h"

enum { MOST_THREADS = 8 };

static treeattn_runtime_t *runtime;
static problem_t problem;

/* What an executor of these tests does with a call. */
typedef enum {
  GOOD,          /* a thread a task */
  HERE,          /* all tasks on the calling thread, the last first */
  FAILS,         /* all tasks, and then a failure */
  NONE,          /* no task */
  ONE_SHORT,     /* all but the last task */
  ONE_MORE,      /* and one that was not asked for */
  NEGATIVE,      /* and task -1 */
  TWICE,         /* task 0 twice */
  RETURNS_EARLY  /* leaves its threads behind, and comes late with the last task */
} behaviour_t;

typedef struct {
  behaviour_t behaviour;
  int calls, last_n;
  pthread_mutex_t mutex;
  /* The call that RETURNS_EARLY made last, and its threads. */
  void (*task)(void *data, int32_t i);
  void *data;
  pthread_t left[MOST_THREADS];
  int left_count;
} engine_t;

typedef struct {
  void (*task)(void *data, int32_t i);
  void *data;
  int32_t i;
} work_t;

static void *work_run(void *at) {
  work_t work = *(work_t *)at;
  free(at);
  work.task(work.data, work.i);
  return NULL;
}

static pthread_t begin(void (*task)(void *data, int32_t i), void *data, int32_t i) {
  work_t *work = malloc(sizeof(*work));
  pthread_t thread;
  work->task = task;
  work->data = data;
  work->i = i;
  if (pthread_create(&thread, NULL, work_run, work) != 0) {
    abort();
  }
  return thread;
}

static void on_threads(int32_t n, void (*task)(void *data, int32_t i), void *data) {
  pthread_t threads[MOST_THREADS + 1];
  for (int32_t i = 0; i < n; i++) {
    threads[i] = begin(task, data, i);
  }
  for (int32_t i = 0; i < n; i++) {
    pthread_join(threads[i], NULL);
  }
}

static int32_t parallel(void *ctx, int32_t n, void (*task)(void *data, int32_t i), void *data) {
  engine_t *engine = ctx;
  pthread_mutex_lock(&engine->mutex);
  engine->calls++;
  engine->last_n = n;
  behaviour_t behaviour = engine->behaviour;
  pthread_mutex_unlock(&engine->mutex);
  switch (behaviour) {
    case HERE:
      for (int32_t i = n; i-- > 0;) {
        task(data, i);
      }
      return 0;
    case FAILS:
      on_threads(n, task, data);
      return 7;
    case NONE:
      return 0;
    case ONE_SHORT:
      on_threads(n - 1, task, data);
      return 0;
    case ONE_MORE:
      on_threads(n + 1, task, data);
      return 0;
    case NEGATIVE:
      task(data, -1);
      break;
    case TWICE:
      task(data, 0);
      break;
    case RETURNS_EARLY:
      engine->task = task;
      engine->data = data;
      for (engine->left_count = 0; engine->left_count < n - 1; engine->left_count++) {
        engine->left[engine->left_count] = begin(task, data, engine->left_count);
      }
      return 0;
    default:
      break;
  }
  on_threads(n, task, data);
  return 0;
}

static void engine_make(engine_t *engine, behaviour_t behaviour) {
  memset(engine, 0, sizeof(*engine));
  engine->behaviour = behaviour;
  pthread_mutex_init(&engine->mutex, NULL);
}

static treeattn_executor_t executor_of(engine_t *engine, int threads) {
  treeattn_executor_t executor = TREEATTN_EXECUTOR_INIT;
  executor.ctx = engine;
  executor.threads = threads;
  executor.parallel = parallel;
  return executor;
}

static void comms_make(const treeattn_executor_t *executor, int threads, int world, treeattn_comm_t **comms) {
  treeattn_device_t devices[RANKS] = {TREEATTN_CPU(0), TREEATTN_CPU(0), TREEATTN_CPU(0), TREEATTN_CPU(0)};
  treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
  config.executor = executor;
  config.threads_per_rank = threads;
  config.step_timeout_ns = (int64_t)HANG * 1000000;
  CHECK_OK(treeattn_comm_create_local(runtime, world, devices, &config, comms));
}

static int same_bits(const shard_t *a, const shard_t *b) {
  return memcmp(a->outputs.out, b->outputs.out, sizeof(a->outputs.out)) == 0 &&
         memcmp(a->outputs.lse, b->outputs.lse, sizeof(a->outputs.lse)) == 0;
}

/* Threads of this process. */
static int thread_count(void) {
  int n = 0;
  DIR *tasks = opendir("/proc/self/task");
  for (struct dirent *entry; tasks != NULL && (entry = readdir(tasks)) != NULL;) {
    n += entry->d_name[0] != '.';
  }
  if (tasks != NULL) {
    closedir(tasks);
  }
  return n;
}

/* The bits are those of as many threads of the library's own, of which there are then none. */
static void same_as_own_threads(void) {
  static shard_t own, engines;
  treeattn_attention_desc_t desc = problem_desc();
  shard_make(&own, &problem, 1, 0);
  shard_make(&engines, &problem, 1, 0);
  for (int threads = 1; threads <= MOST_THREADS; threads++) {
    treeattn_comm_t *comm = NULL;
    treeattn_plan_t *plan = NULL;
    engine_t engine;
    comms_make(NULL, threads, 1, &comm);
    CHECK_OK(treeattn_plan_create(comm, &desc, &plan));
    shard_reset(&own);
    CHECK_OK(treeattn_plan_decode(plan, &own.args, NULL));
    CHECK(shard_matches(&own, &problem));
    CHECK_OK(treeattn_plan_destroy(plan));
    CHECK_OK(treeattn_comm_destroy(comm));

    engine_make(&engine, GOOD);
    int before = thread_count();
    treeattn_executor_t executor = executor_of(&engine, threads);
    executor.flags = threads % 2 == 0 ? TREEATTN_EXECUTOR_CONCURRENT : 0;
    comms_make(&executor, threads % 3 == 0 ? threads : 0, 1, &comm);
    memset(&executor, 0xff, sizeof(executor)); /* it was copied */
    CHECK_OK(treeattn_plan_create(comm, &desc, &plan));
    CHECK(thread_count() <= before);
    for (int turn = 0; turn < 4; turn++) {
      engine.behaviour = turn % 2 == 0 ? GOOD : HERE;
      engine.calls = 0;
      shard_reset(&engines);
      CHECK_OK(turn < 2 ? treeattn_plan_decode(plan, &engines.args, NULL)
                        : treeattn_plan_partial(plan, &engines.args, NULL));
      CHECK(same_bits(&own, &engines) && outputs_guarded(&engines.outputs));
      CHECK(engine.calls == 1 && engine.last_n == threads);
    }
    CHECK_OK(treeattn_plan_destroy(plan));
    CHECK_OK(treeattn_comm_destroy(comm));
  }
}

/* Ranks that share one executor, on threads of their own and on streams, by every algorithm. */
static void ranks_share_one(void) {
  static group_t group;
  for (int algorithm = 0; algorithm < ALGORITHM_COUNT; algorithm++) {
    engine_t engine;
    engine_make(&engine, GOOD);
    treeattn_executor_t executor = executor_of(&engine, 3);
    treeattn_attention_desc_t desc = problem_desc();
    desc.algorithm = ALGORITHMS[algorithm];
    memset(&group, 0, sizeof(group));
    group.world = RANKS;
    comms_make(&executor, 0, RANKS, group.comms);
    CHECK_OK(treeattn_plan_create_all(RANKS, group.comms, &desc, group.plans));
    for (int rank = 0; rank < RANKS; rank++) {
      CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &group.streams[rank]));
      shard_make(&group.shards[rank], &problem, RANKS, rank);
    }
    for (int streamed = 0; streamed < 2; streamed++) {
      step_t steps[RANKS];
      engine.calls = 0;
      group_reset(&group);
      for (int rank = 0; rank < RANKS; rank++) {
        step_begin(&steps[rank], &group, rank, streamed);
      }
      for (int rank = 0; rank < RANKS; rank++) {
        CHECK(step_end(&steps[rank]) == TREEATTN_OK);
        CHECK(shard_matches(&group.shards[rank], &problem));
        CHECK(same_bits(&group.shards[rank], &group.shards[0]));
      }
      CHECK(engine.calls >= RANKS && engine.last_n == 3);
    }
    for (int rank = 0; rank < RANKS; rank++) {
      CHECK_OK(treeattn_stream_destroy(group.streams[rank]));
      CHECK_OK(treeattn_plan_destroy(group.plans[rank]));
      CHECK_OK(treeattn_comm_destroy(group.comms[rank]));
    }
  }
}

/* A promise that is not kept is an error of the step, whose output is NaN; the next step is good. */
static void broken_promises(void) {
  static const struct {
    behaviour_t behaviour;
    const char *text;
  } cases[] = {
      {FAILS, "executor.parallel: found a return value of 7, wanted 0"},
      {NONE, "executor.parallel: found no call of task 0 of 3 before it returned, wanted one of each task"},
      {ONE_SHORT, "executor.parallel: found no call of task 2 of 3 before it returned"},
      {ONE_MORE, "executor.parallel: found a call of task 3, wanted calls of tasks 0 to 2"},
      {NEGATIVE, "executor.parallel: found a call of task -1, wanted"},
      {TWICE, "executor.parallel: found two calls of task 0, wanted one of each task"},
      {RETURNS_EARLY, "executor.parallel: found no call of task "},
  };
  static shard_t shard;
  treeattn_attention_desc_t desc = problem_desc();
  shard_make(&shard, &problem, 1, 0);
  for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
    treeattn_comm_t *comm = NULL;
    treeattn_plan_t *plan = NULL;
    engine_t engine;
    engine_make(&engine, cases[i].behaviour);
    treeattn_executor_t executor = executor_of(&engine, 3);
    comms_make(&executor, 0, 1, &comm);
    CHECK_OK(treeattn_plan_create(comm, &desc, &plan));
    for (int turn = 0; turn < 3; turn++) {
      engine.behaviour = cases[i].behaviour;
      shard_reset(&shard);
      CHECK_STATUS(treeattn_plan_decode(plan, &shard.args, NULL), TREEATTN_ERROR_EXECUTOR, cases[i].text);
      CHECK(shard_is_nan(&shard));
      if (cases[i].behaviour == RETURNS_EARLY) {
        for (int left = 0; left < engine.left_count; left++) {
          pthread_join(engine.left[left], NULL);
        }
        engine.task(engine.data, 2);
        CHECK(shard_is_nan(&shard));
      }
      engine.behaviour = GOOD;
      shard_reset(&shard);
      CHECK_OK(treeattn_plan_decode(plan, &shard.args, NULL));
      CHECK(shard_matches(&shard, &problem));
    }
    CHECK_OK(treeattn_plan_destroy(plan));
    CHECK_OK(treeattn_comm_destroy(comm));
    if (cases[i].behaviour == RETURNS_EARLY) {
      /* Everything is gone; the task does nothing. */
      engine.task(engine.data, 0);
      engine.task(engine.data, 2);
    }
  }
}

/* A rank whose executor fails fails for its peers, too. */
static void a_peer_fails(void) {
  static group_t group;
  engine_t bad;
  engine_make(&bad, ONE_SHORT);
  treeattn_attention_desc_t desc = problem_desc();
  memset(&group, 0, sizeof(group));
  group.world = 2;
  treeattn_executor_t executor = executor_of(&bad, 2);
  comms_make(&executor, 0, 2, group.comms);
  CHECK_OK(treeattn_plan_create_all(2, group.comms, &desc, group.plans));
  step_t steps[2];
  for (int rank = 0; rank < 2; rank++) {
    shard_make(&group.shards[rank], &problem, 2, rank);
    shard_reset(&group.shards[rank]);
    step_begin(&steps[rank], &group, rank, 0);
  }
  for (int rank = 0; rank < 2; rank++) {
    CHECK(step_end(&steps[rank]) == TREEATTN_ERROR_EXECUTOR);
    CHECK(strstr(steps[rank].message, "executor.parallel: found no call of task 1 of 2") != NULL);
    CHECK(shard_is_nan(&group.shards[rank]));
    treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
    CHECK_OK(treeattn_comm_status(group.comms[rank], &status));
    CHECK(status.code == TREEATTN_ERROR_EXECUTOR && status.broken == 1);
    CHECK_OK(treeattn_plan_destroy(group.plans[rank]));
    CHECK_OK(treeattn_comm_destroy(group.comms[rank]));
  }
}

static int32_t allgather(void *ctx, const void *send, void *recv, size_t bytes, int64_t timeout_ns,
                         const int32_t *abort) {
  (void)ctx;
  (void)timeout_ns;
  (void)abort;
  memcpy(recv, send, bytes);
  return 0;
}

/* Every bad executor, by both ways to make a communicator on CPUs. */
static void bad_executors(void) {
  engine_t engine;
  engine_make(&engine, GOOD);
  treeattn_device_t device = TREEATTN_CPU(0);
  treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
  treeattn_transport_t transport = TREEATTN_TRANSPORT_INIT;
  treeattn_comm_t *comm = CHECK_NO_HANDLE(treeattn_comm_t);
  treeattn_executor_t executor = executor_of(&engine, 2);
  transport.allgather = allgather;
  config.executor = &executor;
#define REFUSED(text)                                                                                          \
  do {                                                                                                         \
    CHECK_INVALID(treeattn_comm_create_local(runtime, 1, &device, &config, &comm), text);                      \
    CHECK_INVALID(treeattn_comm_create_from_transport(runtime, &transport, 1, 0, device, &config, &comm), text); \
  } while (0)
  const int32_t threads[] = {0, -1, INT32_MIN, 1025, INT32_MAX};
  const char *texts[] = {"executor.threads: found 0, wanted 1 to 1024", "executor.threads: found -1",
                         "executor.threads: found -2147483648", "executor.threads: found 1025",
                         "executor.threads: found 2147483647"};
  for (int i = 0; i < 5; i++) {
    executor.threads = threads[i];
    REFUSED(texts[i]);
  }
  executor.threads = 2;
  executor.flags = 2;
  REFUSED("executor.flags: found 0x2, wanted TREEATTN_EXECUTOR_ flags");
  executor.flags = 0;
  executor.parallel = NULL;
  REFUSED("executor.parallel: found NULL, wanted a function");
  executor.parallel = parallel;
  const size_t sizes[] = {0, 8, 24, SIZE_MAX};
  for (int i = 0; i < 4; i++) {
    executor.struct_size = sizes[i];
    REFUSED("executor.struct_size: found");
  }
  executor.struct_size = sizeof(executor);
  config.executor = (const treeattn_executor_t *)(const void *)((const char *)&executor + 1);
  REFUSED("executor: found 0x");
  config.executor = &executor;
  config.threads_per_rank = 3;
  REFUSED("threads_per_rank: found 3, wanted 0, or executor.threads = 2");
  config.threads_per_rank = 0;
  CHECK(comm == CHECK_NO_HANDLE(treeattn_comm_t) && engine.calls == 0);
  CHECK_OK(treeattn_comm_create_from_transport(runtime, &transport, 1, 0, device, &config, &comm));
  CHECK_OK(treeattn_comm_destroy(comm));
}

int main(void) {
  problem_make(&problem, GROUP_SEED);
  runtime = runtime_make();
  same_as_own_threads();
  ranks_share_one();
  broken_promises();
  a_peer_fails();
  bad_executors();
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("executor");
}
