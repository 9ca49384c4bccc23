/* What C tests of several ranks share: groups with a stream and a shard a rank, steps on threads, and the time they take. */
#ifndef TREEATTN_TESTS_RANKS_H
#define TREEATTN_TESTS_RANKS_H

#include <pthread.h>
#include <time.h>

#include "problem.h"

enum {
  RANKS = 4,
  /* When a wait that something ends is over even on a busy machine, in ms; far below HANG, its deadline. */
  SOON = 10000,
  HANG = 60000
};

static const treeattn_algorithm_t ALGORITHMS[] = {TREEATTN_ALGORITHM_ONE_SHOT, TREEATTN_ALGORITHM_TWO_SHOT,
                                                  TREEATTN_ALGORITHM_TREE, TREEATTN_ALGORITHM_ALLREDUCE3,
                                                  TREEATTN_ALGORITHM_RING};
enum { ALGORITHM_COUNT = 5 };

static inline double now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
}

static inline void sleep_ms(int ms) {
  struct timespec pause = {ms / 1000, ms % 1000 * 1000000};
  nanosleep(&pause, NULL);
}

/* The call takes from..to ms. */
#define CHECK_TAKES(from, to, call)                                                                        \
  do {                                                                                                     \
    const double began_ = now_ms();                                                                        \
    call;                                                                                                  \
    const double took_ = now_ms() - began_;                                                                \
    if (took_ < (from) || took_ >= (to)) {                                                                 \
      check_failures++;                                                                                    \
      printf("%s:%d: %s took %.0f ms, wanted %d to %d\n", __FILE__, __LINE__, #call, took_, (from), (to)); \
    }                                                                                                      \
  } while (0)

/* The seed of the problem whose shards the ranks of a group hold. */
enum { GROUP_SEED = 77 };

/* A local group: for each rank its end, a plan, a stream and a shard of the problem. NULL: gone, or never made. */
typedef struct {
  int world;
  treeattn_runtime_t *runtime;
  treeattn_comm_t *comms[RANKS];
  treeattn_plan_t *plans[RANKS];
  treeattn_stream_t *streams[RANKS];
  shard_t shards[RANKS];
} group_t;

static inline void group_open(group_t *group, int world, const treeattn_attention_desc_t *desc, int step_ms,
                              int setup_ms) {
  problem_t problem;
  problem_make(&problem, GROUP_SEED);
  memset(group, 0, sizeof(*group));
  group->world = world;
  group->runtime = runtime_make();
  group_make(group->runtime, world, step_ms, setup_ms, group->comms);
  CHECK_OK(treeattn_plan_create_all(world, group->comms, desc, group->plans));
  for (int rank = 0; rank < world; rank++) {
    CHECK_OK(treeattn_stream_create(group->runtime, TREEATTN_CPU(0), &group->streams[rank]));
    shard_make(&group->shards[rank], &problem, world, rank);
  }
}

/* Streams first: destroying one waits for its steps as long as they may take. */
static inline void group_close(group_t *group) {
  for (int rank = 0; rank < group->world; rank++) {
    CHECK_OK(treeattn_stream_destroy(group->streams[rank]));
    CHECK_OK(treeattn_plan_destroy(group->plans[rank]));
    CHECK_OK(treeattn_comm_destroy(group->comms[rank]));
  }
  CHECK_OK(treeattn_runtime_destroy(group->runtime));
}

static inline treeattn_status_t group_enqueue(group_t *group, int rank) {
  return treeattn_plan_decode(group->plans[rank], &group->shards[rank].args, group->streams[rank]);
}

static inline treeattn_status_t group_decode(group_t *group, int rank) {
  return treeattn_plan_decode(group->plans[rank], &group->shards[rank].args, NULL);
}

static inline void group_reset(group_t *group) {
  for (int rank = 0; rank < group->world; rank++) {
    shard_reset(&group->shards[rank]);
  }
}

static inline int shard_is_nan(const shard_t *s) {
  return sequence_is_nan(&s->outputs, 0) && sequence_is_nan(&s->outputs, 1) && outputs_guarded(&s->outputs);
}

/* One step of one rank on a thread of its own: on a NULL stream, or enqueued and waited for. */
typedef struct {
  group_t *group;
  int rank, streamed;
  treeattn_status_t status;
  char message[1024];
  double ended_ms;
  pthread_t thread;
} step_t;

static inline void *step_run(void *at) {
  step_t *step = at;
  step->status = step->streamed ? group_enqueue(step->group, step->rank) : group_decode(step->group, step->rank);
  if (step->streamed && step->status == TREEATTN_OK) {
    step->status = treeattn_stream_synchronize(step->group->streams[step->rank]);
  }
  snprintf(step->message, sizeof(step->message), "%s",
           step->status == TREEATTN_OK ? "" : treeattn_last_error_message());
  step->ended_ms = now_ms();
  return NULL;
}

static inline void step_begin(step_t *step, group_t *group, int rank, int streamed) {
  memset(step, 0, sizeof(*step));
  step->group = group;
  step->rank = rank;
  step->streamed = streamed;
  CHECK(pthread_create(&step->thread, NULL, step_run, step) == 0);
}

static inline treeattn_status_t step_end(step_t *step) {
  CHECK(pthread_join(step->thread, NULL) == 0);
  return step->status;
}

#endif
