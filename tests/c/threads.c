/*
 * The threads of the library: named, and gone when the call that ends them returns. treeattn_comm_create_local,
 * _create_from_transport and _destroy, treeattn_stream_create and _destroy, treeattn_selfcheck.
 */
#include <dirent.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "problem.h"

enum { WORLD = 3, THREADS = 4, OFTEN = 30, PF_EXITING = 4 };

static treeattn_runtime_t *runtime;
static problem_t problem;

/* Whether a task of this process is alive: not on its way out, which is where it is once it was joined. */
static int alive(const char *task, char *name, size_t size) {
  char path[96], text[512];
  snprintf(path, sizeof(path), "/proc/self/task/%.16s/stat", task);
  FILE *file = fopen(path, "r");
  size_t got = file == NULL ? 0 : fread(text, 1, sizeof(text) - 1, file);
  if (file != NULL) {
    fclose(file);
  }
  text[got] = '\0';
  /* "1 (name) S", five numbers, the flags. */
  char *open = strchr(text, '('), *close = strrchr(text, ')');
  char state = 'X';
  unsigned long flags = 0;
  if (open == NULL || close == NULL ||
      sscanf(close + 1, " %c %*d %*d %*d %*d %*d %lu", &state, &flags) != 2) {
    return 0;
  }
  snprintf(name, size, "%.*s", (int)(close - open - 1), open + 1);
  return state != 'X' && state != 'Z' && (flags & PF_EXITING) == 0;
}

/* Threads of this process; `named` of them have the library's name. */
static int threads(int *named) {
  int n = 0;
  *named = 0;
  DIR *tasks = opendir("/proc/self/task");
  for (struct dirent *entry; tasks != NULL && (entry = readdir(tasks)) != NULL;) {
    char name[64];
    if (entry->d_name[0] != '.' && alive(entry->d_name, name, sizeof(name))) {
      n++;
      *named += strncmp(name, "treeattn-", 9) == 0;
    }
  }
  if (tasks != NULL) {
    closedir(tasks);
  }
  return n;
}

/*
 * This thread, and so many of the library's, from now on. A thread names itself, a moment after it began; and a folder that is
 * read while a thread that was joined goes from it may leave out another one.
 */
#define CHECK_THREADS(wanted) check_threads((wanted), __LINE__)
static void check_threads(int wanted, int line) {
  const struct timespec pause = {0, 1000000};
  int named, found = threads(&named);
  for (int tries = 0; (found <= wanted || (found == wanted + 1 && named != wanted)) && tries < 5000; tries++) {
    nanosleep(&pause, NULL);
    found = threads(&named);
  }
  if (found != wanted + 1 || named != wanted) {
    check_failures++;
    printf("threads.c:%d: found %d threads, %d of them named treeattn-, wanted %d and this one\n", line, found, named,
           wanted);
  }
}

static int32_t allgather(void *ctx, const void *send, void *recv, size_t bytes, int64_t timeout_ns,
                         const int32_t *abort) {
  (void)abort;
  if (timeout_ns < 0) {
    return 99;
  }
  memcpy(recv, send, bytes);
  return *(const int32_t *)ctx;
}

static treeattn_status_t over_transport(int32_t *code, treeattn_comm_t **comm) {
  treeattn_transport_t callbacks = TREEATTN_TRANSPORT_INIT;
  treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
  callbacks.ctx = code;
  callbacks.allgather = allgather;
  config.threads_per_rank = THREADS;
  return treeattn_comm_create_from_transport(runtime, &callbacks, 1, 0, TREEATTN_CPU(0), &config, comm);
}

static void group(int world, treeattn_comm_t **comms) {
  treeattn_device_t devices[WORLD] = {TREEATTN_CPU(0), TREEATTN_CPU(0), TREEATTN_CPU(0)};
  treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
  config.threads_per_rank = THREADS;
  CHECK_OK(treeattn_comm_create_local(runtime, world, devices, &config, comms));
}

/* Workers: each rank has one thread less than it was told to use, for the caller is one of them. */
static void workers(void) {
  for (int i = 0; i < OFTEN; i++) {
    treeattn_comm_t *comms[WORLD];
    group(WORLD, comms);
    for (int rank = 0; rank < WORLD; rank++) {
      CHECK_THREADS((WORLD - rank) * (THREADS - 1));
      CHECK_OK(treeattn_comm_destroy(comms[rank]));
    }
    CHECK_THREADS(0);
  }
}

/* A transport's watchdog beside its workers; none is left of a communicator that could not be made. */
static void watchdogs(void) {
  for (int i = 0; i < OFTEN; i++) {
    treeattn_comm_t *comm = NULL;
    int32_t code = 0;
    CHECK_OK(over_transport(&code, &comm));
    CHECK_THREADS(THREADS - 1 + 1);
    CHECK_OK(treeattn_comm_destroy(comm));
    CHECK_THREADS(0);
    code = 7;
    CHECK_STATUS(over_transport(&code, &comm), TREEATTN_ERROR_TRANSPORT, "returned 7");
    CHECK_THREADS(0);
  }
}

/* A stream has a thread, which ends what is enqueued before it goes. */
static void streams(void) {
  treeattn_comm_t *comm = NULL;
  treeattn_plan_t *plan = NULL;
  treeattn_attention_desc_t desc = problem_desc();
  static shard_t shard;
  shard_make(&shard, &problem, 1, 0);
  group_make(runtime, 1, 0, 0, &comm);
  CHECK_OK(treeattn_plan_create(comm, &desc, &plan));
  for (int i = 0; i < OFTEN; i++) {
    treeattn_stream_t *made[2];
    CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &made[0]));
    CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &made[1]));
    CHECK_THREADS(2);
    shard_reset(&shard);
    for (int step = 0; step < 200; step++) {
      CHECK_OK(treeattn_plan_decode(plan, &shard.args, made[0]));
    }
    CHECK_OK(treeattn_stream_destroy(made[0]));
    CHECK_THREADS(1);
    CHECK(shard_matches(&shard, &problem));
    CHECK_OK(treeattn_stream_destroy(made[1]));
    CHECK_THREADS(0);
  }
  CHECK_OK(treeattn_plan_destroy(plan));
  CHECK_OK(treeattn_comm_destroy(comm));
}

/* A communicator that goes before its plan: its workers serve the plan's last steps and go with it. */
static void orphans(void) {
  for (int i = 0; i < OFTEN; i++) {
    treeattn_comm_t *comm = NULL;
    treeattn_plan_t *plan = NULL;
    treeattn_attention_desc_t desc = problem_desc();
    group(1, &comm);
    CHECK_OK(treeattn_plan_create(comm, &desc, &plan));
    CHECK_OK(treeattn_comm_destroy(comm));
    CHECK_OK(treeattn_plan_destroy(plan));
    CHECK_THREADS(0);
  }
}

static void selfcheck(void) {
  treeattn_attention_desc_t desc = problem_desc();
  treeattn_selfcheck_report_t report = TREEATTN_SELFCHECK_REPORT_INIT;
  CHECK_OK(treeattn_selfcheck(runtime, TREEATTN_CPU(0), &desc, NULL, &report));
  CHECK(report.passed == 1);
  CHECK_THREADS(0);
}

/* What a thread with little stack does: everything from the communicator to its end. */
static void *whole_life(void *failures) {
  treeattn_comm_t *comm = NULL;
  treeattn_plan_t *plan = NULL;
  treeattn_attention_desc_t desc = problem_desc();
  static shard_t shard;
  shard_make(&shard, &problem, 1, 0);
  group(1, &comm);
  int bad = treeattn_plan_create(comm, &desc, &plan) != TREEATTN_OK;
  bad += treeattn_plan_decode(plan, &shard.args, NULL) != TREEATTN_OK || !shard_matches(&shard, &problem);
  shard.args.q.data = NULL; /* a message is made */
  bad += treeattn_plan_decode(plan, &shard.args, NULL) != TREEATTN_ERROR_INVALID_ARGUMENT;
  bad += treeattn_plan_destroy(plan) != TREEATTN_OK || treeattn_comm_destroy(comm) != TREEATTN_OK;
  *(int *)failures = bad;
  return NULL;
}

/* A quarter of the stack that the header asks for, which speaks of an optimised library; another one takes more. */
#ifndef SMALL_STACK
#define SMALL_STACK (64 * 1024)
#endif
static void small_stack(void) {
  pthread_attr_t attributes;
  pthread_t thread;
  int failures = -1;
  CHECK(pthread_attr_init(&attributes) == 0 && pthread_attr_setstacksize(&attributes, SMALL_STACK) == 0);
  CHECK(pthread_create(&thread, &attributes, whole_life, &failures) == 0 && pthread_join(thread, NULL) == 0);
  CHECK(failures == 0);
  CHECK(pthread_attr_destroy(&attributes) == 0);
  CHECK_THREADS(0);
}

int main(void) {
  problem_make(&problem, 9);
  runtime = runtime_make();
  CHECK_THREADS(0);
  workers();
  watchdogs();
  streams();
  orphans();
  selfcheck();
  small_stack();
  CHECK_OK(treeattn_runtime_destroy(runtime));
  CHECK_THREADS(0);
  return check_report("threads");
}
