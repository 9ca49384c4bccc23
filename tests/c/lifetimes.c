/*
 * Parents that go first, and ranks that leave in the middle of a step. A runtime's children go on waiting, aborting and
 * telling their status; treeattn_comm_destroy ends this rank's own step at once, and its peers get PEER_LOST.
 */
#include "ranks.h"

static treeattn_attention_desc_t desc;
static problem_t problem;

static treeattn_status_t code_of(treeattn_comm_t *comm) {
  treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
  CHECK_OK(treeattn_comm_status(comm, &status));
  return status.code;
}

/* What nobody writes to any more stays as it is. */
static void check_done(group_t *group, int rank) {
  shard_reset(&group->shards[rank]);
  sleep_ms(200);
  CHECK(shard_untouched(&group->shards[rank]));
}

/* The runtime goes while a step waits: the step is done when synchronize says so, and its peer may still come. */
static void runtime_goes_and_the_peer_comes(void) {
  group_t group;
  step_t second;
  group_open(&group, 2, &desc, HANG, HANG);
  CHECK_OK(group_enqueue(&group, 0));
  CHECK_OK(group_enqueue(&group, 1));
  CHECK_OK(treeattn_runtime_destroy(group.runtime));
  group.runtime = NULL;
  for (int rank = 0; rank < 2; rank++) {
    CHECK_TAKES(0, SOON, CHECK_OK(treeattn_stream_synchronize(group.streams[rank])));
    CHECK(shard_matches(&group.shards[rank], &problem));
    CHECK(code_of(group.comms[rank]) == TREEATTN_OK);
    check_done(&group, rank);
  }
  /* Nothing new begins, and nothing is written. */
  CHECK_PARENT_DESTROYED(group_enqueue(&group, 0), "runtime: found destroyed");
  CHECK_PARENT_DESTROYED(group_decode(&group, 0), "runtime: found destroyed");
  CHECK(shard_untouched(&group.shards[0]));
  group_close(&group);

  /* A step on a calling thread. */
  group_open(&group, 2, &desc, HANG, HANG);
  step_begin(&second, &group, 1, 0);
  sleep_ms(50);
  treeattn_runtime_t *runtime = group.runtime;
  CHECK_OK(group_decode(&group, 0));
  CHECK_OK(treeattn_runtime_destroy(runtime));
  group.runtime = NULL;
  CHECK(step_end(&second) == TREEATTN_OK);
  group_close(&group);
}

/* The runtime goes while a step waits in vain: it can be aborted, and waited for. */
static void runtime_goes_and_a_rank_aborts(void) {
  for (int by = 0; by < 2; by++) {
    group_t group;
    group_open(&group, 2, &desc, HANG, HANG);
    CHECK_OK(group_enqueue(&group, 0));
    CHECK_OK(treeattn_runtime_destroy(group.runtime));
    group.runtime = NULL;
    CHECK(code_of(group.comms[0]) == TREEATTN_OK);
    CHECK_OK(treeattn_comm_abort(group.comms[by]));
    CHECK_TAKES(0, SOON, CHECK_STATUS(treeattn_stream_synchronize(group.streams[0]), TREEATTN_ERROR_ABORTED, "aborted"));
    CHECK(shard_is_nan(&group.shards[0]));
    check_done(&group, 0);
    CHECK(code_of(group.comms[0]) == TREEATTN_ERROR_ABORTED && code_of(group.comms[1]) == TREEATTN_ERROR_ABORTED);
    group_close(&group);
  }
}

/* The runtime goes, and a step ends by its own deadline. */
static void runtime_goes_and_the_deadline_passes(void) {
  group_t group;
  group_open(&group, 2, &desc, 300, HANG);
  CHECK_OK(group_enqueue(&group, 0));
  CHECK_OK(treeattn_runtime_destroy(group.runtime));
  group.runtime = NULL;
  CHECK_TAKES(0, SOON, CHECK_STATUS(treeattn_stream_synchronize(group.streams[0]), TREEATTN_ERROR_TIMEOUT, "rank 1"));
  CHECK(shard_is_nan(&group.shards[0]));
  check_done(&group, 0);
  group_close(&group);
}

/* Where the peers are when rank 0 leaves in the middle of its step. */
enum { PEERS_WAIT, PEERS_COME_LATER, PEERS_LEAVE, PEER_CASES };

static void rank_leaves(int world, int streamed, int peers) {
  group_t group;
  step_t own, others[RANKS];
  group_open(&group, world, &desc, HANG, HANG);
  step_begin(&own, &group, 0, streamed);
  /* All but the last, or the step would be complete. */
  const int waiting = peers == PEERS_WAIT ? world - 1 : 1;
  for (int rank = 1; rank < waiting; rank++) {
    step_begin(&others[rank], &group, rank, streamed);
  }
  sleep_ms(100);
  const double left_ms = now_ms();
  CHECK_TAKES(0, SOON, CHECK_OK(treeattn_comm_destroy(group.comms[0])));
  group.comms[0] = NULL;
  CHECK(step_end(&own) == TREEATTN_ERROR_PARENT_DESTROYED);
  CHECK(own.ended_ms - left_ms < SOON);
  CHECK(strstr(own.message, "rank 0 has left") != NULL);
  CHECK(shard_is_nan(&group.shards[0]));
  for (int rank = waiting; rank < world; rank++) {
    if (peers == PEERS_LEAVE) {
      CHECK_OK(treeattn_comm_destroy(group.comms[rank]));
      group.comms[rank] = NULL;
      CHECK_PARENT_DESTROYED(group_decode(&group, rank), "communicator: found destroyed");
      CHECK(shard_untouched(&group.shards[rank]));
    } else {
      step_begin(&others[rank], &group, rank, streamed);
    }
  }
  for (int rank = 1; rank < (peers == PEERS_LEAVE ? 1 : world); rank++) {
    treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
    CHECK(step_end(&others[rank]) == TREEATTN_ERROR_PEER_LOST);
    CHECK(others[rank].ended_ms - left_ms < SOON && strstr(others[rank].message, "rank 0") != NULL);
    CHECK(shard_is_nan(&group.shards[rank]));
    CHECK_OK(treeattn_comm_status(group.comms[rank], &status));
    CHECK(status.code == TREEATTN_ERROR_PEER_LOST && status.rank == 0 && status.broken == 1);
  }
  /* The orphan refuses, and touches nothing. */
  shard_reset(&group.shards[0]);
  CHECK_PARENT_DESTROYED(group_decode(&group, 0), "communicator: found destroyed");
  CHECK(shard_untouched(&group.shards[0]));
  group_close(&group);
}

/* A rank that leaves after its last step takes nothing from those that are still in it. */
static void rank_leaves_after_its_step(void) {
  for (int i = 0; i < 50; i++) {
    group_t group;
    step_t other;
    group_open(&group, 2, &desc, HANG, HANG);
    step_begin(&other, &group, 1, 0);
    CHECK_OK(group_decode(&group, 0));
    CHECK_OK(treeattn_comm_destroy(group.comms[0]));
    group.comms[0] = NULL;
    CHECK(step_end(&other) == TREEATTN_OK && shard_matches(&group.shards[1], &problem));
    CHECK_STATUS(group_decode(&group, 1), TREEATTN_ERROR_PEER_LOST, "rank 0");
    CHECK(shard_is_nan(&group.shards[1]));
    group_close(&group);
  }
}

/* A rank that leaves while another waits for it in treeattn_plan_create, or while it does itself. */
typedef struct {
  treeattn_comm_t *comm;
  treeattn_status_t status;
} creator_t;

static void *create(void *at) {
  creator_t *creator = at;
  treeattn_plan_t *plan = NULL;
  creator->status = treeattn_plan_create(creator->comm, &desc, &plan);
  return NULL;
}

static void rank_leaves_a_plan(int by) {
  group_t group;
  pthread_t thread;
  group_open(&group, 2, &desc, HANG, HANG);
  creator_t creator = {group.comms[0], TREEATTN_OK};
  CHECK(pthread_create(&thread, NULL, create, &creator) == 0);
  sleep_ms(100);
  CHECK_OK(treeattn_comm_destroy(group.comms[by]));
  group.comms[by] = NULL;
  CHECK_TAKES(0, SOON, CHECK(pthread_join(thread, NULL) == 0));
  CHECK(creator.status == (by == 0 ? TREEATTN_ERROR_PARENT_DESTROYED : TREEATTN_ERROR_PEER_LOST));
  group_close(&group);
}

/* The order of the header: no destruction waits for a rank that does not come. */
static void order_that_never_waits(void) {
  group_t group;
  group_open(&group, 2, &desc, HANG, HANG);
  CHECK_OK(group_enqueue(&group, 0));
  CHECK_OK(group_enqueue(&group, 0));
  CHECK_TAKES(0, SOON, CHECK_OK(treeattn_comm_destroy(group.comms[0])));
  CHECK_TAKES(0, SOON, CHECK_OK(treeattn_plan_destroy(group.plans[0])));
  CHECK_TAKES(0, SOON, CHECK_OK(treeattn_stream_destroy(group.streams[0])));
  CHECK(shard_is_nan(&group.shards[0]));
  group.comms[0] = NULL;
  group.plans[0] = NULL;
  group.streams[0] = NULL;
  group_close(&group);
}

int main(void) {
  problem_make(&problem, GROUP_SEED);
  desc = problem_desc();
  runtime_goes_and_the_peer_comes();
  runtime_goes_and_a_rank_aborts();
  runtime_goes_and_the_deadline_passes();
  for (int i = 0; i < ALGORITHM_COUNT; i++) {
    desc.algorithm = ALGORITHMS[i];
    for (int streamed = 0; streamed < 2; streamed++) {
      for (int peers = 0; peers < PEER_CASES; peers++) {
        rank_leaves(2, streamed, peers);
        rank_leaves(4, streamed, peers);
      }
    }
    rank_leaves_after_its_step();
    order_that_never_waits();
  }
  desc = problem_desc();
  rank_leaves_a_plan(0);
  rank_leaves_a_plan(1);
  return check_report("lifetimes");
}
