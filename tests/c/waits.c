/*
 * How long calls may wait: treeattn_plan_destroy, treeattn_plan_create, treeattn_stream_synchronize,
 * treeattn_stream_destroy, treeattn_runtime_destroy and treeattn_comm_destroy end when what they wait for ends, or by the
 * deadline that they name, whatever the others are.
 */
#include "ranks.h"

enum {
  /* The deadline of waits that are to reach it, in ms. */
  DEADLINE = 1500,
  /* When such a wait is over even on a busy machine; below twice the deadline. */
  LATE = 2900
};

static treeattn_attention_desc_t desc;
static problem_t problem;

/* Rank 1 on a thread of its own, a little later. */
typedef struct {
  group_t *group;
  treeattn_status_t status;
  pthread_t thread;
} second_t;

static void *come(void *at) {
  second_t *second = at;
  sleep_ms(200);
  second->status = group_enqueue(second->group, 1);
  return NULL;
}

static void second_comes(second_t *second, group_t *group) {
  second->group = group;
  CHECK(pthread_create(&second->thread, NULL, come, second) == 0);
}

static void second_came(second_t *second) {
  CHECK(pthread_join(second->thread, NULL) == 0 && second->status == TREEATTN_OK);
}

/* What is under way ends while a call waits for it. */
static void woken(void) {
  second_t second;
  group_t made;
  group_open(&made, 2, &desc, HANG, HANG);
  CHECK_OK(group_enqueue(&made, 0));
  second_comes(&second, &made);
  CHECK_TAKES(0, SOON, CHECK_OK(treeattn_plan_destroy(made.plans[0])));
  CHECK(shard_matches(&made.shards[0], &problem));
  second_came(&second);
  made.plans[0] = NULL;
  group_close(&made);

  group_open(&made, 2, &desc, HANG, HANG);
  CHECK_OK(group_enqueue(&made, 0));
  second_comes(&second, &made);
  CHECK_TAKES(0, SOON, CHECK_OK(treeattn_stream_synchronize(made.streams[0])));
  second_came(&second);

  CHECK_OK(group_enqueue(&made, 0));
  second_comes(&second, &made);
  CHECK_TAKES(0, SOON, CHECK_OK(treeattn_stream_destroy(made.streams[0])));
  CHECK(shard_matches(&made.shards[0], &problem));
  second_came(&second);
  made.streams[0] = NULL;
  group_close(&made);
}

/* A plan whose step stands behind that of another communicator: it says that the step is still to come. */
static void behind_another(void) {
  group_t other, own;
  group_open(&other, 2, &desc, HANG, HANG);
  group_open(&own, 1, &desc, DEADLINE, HANG);
  CHECK_OK(group_enqueue(&other, 0));
  CHECK_OK(treeattn_plan_decode(own.plans[0], &own.shards[0].args, other.streams[0]));
  CHECK_TAKES(DEADLINE, LATE,
              CHECK_STATUS(treeattn_plan_destroy(own.plans[0]), TREEATTN_ERROR_TIMEOUT, "still enqueued after 1.5s"));
  CHECK_STATUS(treeattn_plan_destroy(own.plans[0]), TREEATTN_ERROR_BAD_HANDLE, "destroyed");
  own.plans[0] = NULL;
  CHECK(shard_untouched(&own.shards[0]));
  CHECK_OK(treeattn_comm_abort(other.comms[1]));
  CHECK_TAKES(0, SOON,
              CHECK_STATUS(treeattn_stream_synchronize(other.streams[0]), TREEATTN_ERROR_ABORTED, "rank 1"));
  /* The step was run all the same. */
  CHECK(shard_matches(&own.shards[0], &problem));
  group_close(&own);
  group_close(&other);
}

/* The step deadline ends steps, the setup deadline what is created; a deadline of the other kind would be too late. */
static void by_deadline(void) {
  group_t made;
  group_open(&made, 2, &desc, DEADLINE, HANG);
  CHECK_TAKES(DEADLINE, LATE, CHECK_STATUS(group_decode(&made, 0), TREEATTN_ERROR_TIMEOUT, ""));
  group_close(&made);
  group_open(&made, 2, &desc, DEADLINE, HANG);
  CHECK_OK(group_enqueue(&made, 0));
  CHECK_TAKES(DEADLINE / 2, LATE,
              CHECK_STATUS(treeattn_stream_synchronize(made.streams[0]), TREEATTN_ERROR_TIMEOUT, ""));
  group_close(&made);
  /* The step ends when the wait for it does, so either may be first. */
  group_open(&made, 2, &desc, DEADLINE, HANG);
  CHECK_OK(group_enqueue(&made, 0));
  CHECK_TAKES(0, LATE, (void)treeattn_plan_destroy(made.plans[0]));
  made.plans[0] = NULL;
  group_close(&made);
  treeattn_plan_t *plan = NULL;
  group_open(&made, 2, &desc, HANG, DEADLINE);
  CHECK_TAKES(DEADLINE, LATE,
              CHECK_STATUS(treeattn_plan_create(made.comms[0], &desc, &plan), TREEATTN_ERROR_TIMEOUT, "treeattn_plan_create_all"));
  group_close(&made);
}

/* What does not wait, while steps wait for a rank that does not come. */
static void at_once(void) {
  group_t made;
  treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
  treeattn_plan_stats_t stats = TREEATTN_PLAN_STATS_INIT;
  treeattn_plan_memory_t memory = TREEATTN_PLAN_MEMORY_INIT;
  char text[4096];
  group_open(&made, 2, &desc, HANG, HANG);
  CHECK_OK(group_enqueue(&made, 0));
  sleep_ms(50);
  CHECK_TAKES(0, SOON, CHECK_OK(treeattn_comm_status(made.comms[0], &status)));
  CHECK(status.code == TREEATTN_OK);
  CHECK_TAKES(0, SOON, CHECK_OK(treeattn_comm_describe(made.comms[0], text, sizeof(text), NULL)));
  CHECK_TAKES(0, SOON, CHECK_OK(treeattn_plan_stats(made.plans[0], &stats)));
  CHECK_TAKES(0, SOON, CHECK_OK(treeattn_plan_memory(made.plans[0], &memory)));
  CHECK_TAKES(0, SOON, CHECK_OK(group_enqueue(&made, 0)));
  CHECK_TAKES(0, SOON, CHECK_OK(treeattn_comm_abort(made.comms[0])));
  CHECK_TAKES(0, SOON, CHECK_STATUS(treeattn_stream_synchronize(made.streams[0]), TREEATTN_ERROR_ABORTED, "rank 0"));
  CHECK_TAKES(0, SOON, group_close(&made));

  group_open(&made, 2, &desc, DEADLINE, HANG);
  CHECK_OK(group_enqueue(&made, 0));
  CHECK_TAKES(0, DEADLINE, CHECK_OK(treeattn_runtime_destroy(made.runtime)));
  made.runtime = NULL;
  CHECK_TAKES(0, 2 * LATE, group_close(&made));
}

/* Ranks of one communicator on one stream: the second is refused while the first waits for it, and the first goes on. */
static void one_stream_for_two_ranks(void) {
  group_t made;
  group_open(&made, 3, &desc, HANG, HANG);
  treeattn_stream_t *own = made.streams[1];
  group_reset(&made);
  CHECK_OK(group_enqueue(&made, 0));
  made.streams[1] = made.streams[0];
  CHECK_TAKES(0, SOON,
              CHECK_INVALID(treeattn_plan_decode(made.plans[1], &made.shards[1].args, made.streams[1]),
                            "stream: found one on which rank 0 of this communicator waits for rank 1, wanted a stream"));
  CHECK(shard_untouched(&made.shards[1]));
  /* The same rank again is in order. */
  CHECK_OK(group_enqueue(&made, 0));
  made.streams[1] = own;
  for (int step = 0; step < 2; step++) {
    CHECK_OK(group_enqueue(&made, 1));
    CHECK_OK(group_enqueue(&made, 2));
  }
  for (int rank = 0; rank < 3; rank++) {
    CHECK_OK(treeattn_stream_synchronize(made.streams[rank]));
    CHECK(shard_matches(&made.shards[rank], &problem));
  }
  /* Nobody waits there any more: another rank may have the stream. */
  made.streams[1] = made.streams[0];
  made.streams[0] = own;
  for (int rank = 0; rank < 3; rank++) {
    CHECK_OK(group_enqueue(&made, rank));
  }
  for (int rank = 0; rank < 3; rank++) {
    CHECK_OK(treeattn_stream_synchronize(made.streams[rank]));
  }
  group_close(&made);
}

static void *wait_there(void *at) {
  step_t *step = at;
  step->status = treeattn_stream_synchronize(step->group->streams[step->rank]);
  return NULL;
}

/* Nothing says which of two streams comes first: a rank's second one is refused while its first holds a step, and so is a
 * step of the caller's thread. Nobody else is harmed. */
static void one_rank_on_two_streams(void) {
  group_t made;
  group_open(&made, 2, &desc, HANG, HANG);
  treeattn_stream_t *own = made.streams[0], *other = NULL;
  static shard_t second;
  CHECK_OK(treeattn_stream_create(made.runtime, TREEATTN_CPU(0), &other));
  shard_make(&second, &problem, 2, 0);
  CHECK_OK(group_enqueue(&made, 0));
  CHECK_STATUS(treeattn_plan_decode(made.plans[0], &second.args, other), TREEATTN_ERROR_BUSY,
               "stream: found a step on another stream on rank 0");
  CHECK_STATUS(treeattn_plan_decode(made.plans[0], &second.args, NULL), TREEATTN_ERROR_BUSY, "on rank 0");
  CHECK(shard_untouched(&second));
  CHECK_OK(group_enqueue(&made, 1));
  for (int rank = 0; rank < 2; rank++) {
    CHECK_OK(treeattn_stream_synchronize(made.streams[rank]));
    CHECK(shard_matches(&made.shards[rank], &problem));
  }
  /* Nor is a step enqueued while one waits on the caller's thread. */
  step_t step;
  group_reset(&made);
  step_begin(&step, &made, 0, 0);
  treeattn_plan_stats_t stats = TREEATTN_PLAN_STATS_INIT;
  for (int ms = 0; stats.steps < 2 && ms < HANG; ms++) {
    sleep_ms(1);
    CHECK_OK(treeattn_plan_stats(made.plans[0], &stats));
  }
  CHECK_STATUS(treeattn_plan_decode(made.plans[0], &second.args, other), TREEATTN_ERROR_BUSY, "on rank 0");
  CHECK_OK(group_enqueue(&made, 1));
  CHECK_OK(treeattn_stream_synchronize(made.streams[1]));
  CHECK(step_end(&step) == TREEATTN_OK && shard_matches(&made.shards[0], &problem));
  /* Once the first is done. */
  group_reset(&made);
  made.streams[0] = other;
  CHECK_OK(group_enqueue(&made, 0));
  CHECK_OK(group_enqueue(&made, 1));
  for (int rank = 0; rank < 2; rank++) {
    CHECK_OK(treeattn_stream_synchronize(made.streams[rank]));
    CHECK(shard_matches(&made.shards[rank], &problem));
  }
  made.streams[0] = own;
  CHECK_OK(treeattn_stream_destroy(other));
  group_close(&made);
}

/* Destroying a stream waits for its steps also where another thread is inside a call on it. */
static void destroyed_under_another(void) {
  group_t made;
  step_t step;
  group_open(&made, 2, &desc, DEADLINE, HANG);
  CHECK_OK(group_enqueue(&made, 0));
  memset(&step, 0, sizeof(step));
  step.group = &made;
  step.streamed = 1;
  CHECK(pthread_create(&step.thread, NULL, wait_there, &step) == 0);
  sleep_ms(200);
  CHECK_OK(treeattn_stream_destroy(made.streams[0]));
  CHECK(shard_is_nan(&made.shards[0]));
  made.streams[0] = NULL;
  CHECK(step_end(&step) == TREEATTN_ERROR_TIMEOUT);
  group_close(&made);
}

int main(void) {
  problem_make(&problem, GROUP_SEED);
  desc = problem_desc();
  woken();
  behind_another();
  by_deadline();
  at_once();
  one_stream_for_two_ranks();
  one_rank_on_two_streams();
  destroyed_under_another();
  return check_report("waits");
}
