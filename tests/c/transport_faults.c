/*
 * Transports that fail, hang, do not tell the truth or bring other ranks, at creation, with a plan and in a step. After each
 * failure a fresh communicator works.
 */
#include "transport.h"

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

/* A rank that does not come to a hop, and a sendrecv that returns something but 0. */
static void failing_hops(void) {
  rank_t ranks[WORLD];
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

int main(void) {
  problem_make(&problem, 11);
  runtime = runtime_make();
  failing();
  lying();
  hanging();
  ended(treeattn_comm_abort, TREEATTN_ERROR_ABORTED);
  ended(treeattn_comm_destroy, TREEATTN_ERROR_PARENT_DESTROYED);
  failing_hops();
  mixed_up();
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("transport_faults");
}
