/*
 * What lies in outputs after an error, and who is told of it. A call that is refused before it begins leaves them as they
 * were, BUSY among these; a step that began and failed, and every later step on that communicator, writes NaN to all of
 * them. treeattn_stream_synchronize tells the error of every step since the last one. One fault in the data is told once.
 */
#include "ranks.h"

static treeattn_attention_desc_t desc;
static problem_t problem;

static int all_nan_until(const group_t *group, int world) {
  for (int rank = 0; rank < world; rank++) {
    if (!shard_is_nan(&group->shards[rank])) {
      return 0;
    }
  }
  return 1;
}

/* Every later step of rank `rank`: NaN, whoever asks and however, and the error that broke the communicator. */
static void check_later_steps(group_t *group, int rank, treeattn_status_t code) {
  shard_t *shard = &group->shards[rank];
  for (int again = 0; again < 2; again++) {
    shard_reset(shard);
    CHECK(group_decode(group, rank) == code);
    CHECK(shard_is_nan(shard));
    shard_reset(shard);
    CHECK(group_enqueue(group, rank) == code);
    CHECK_OK(treeattn_stream_synchronize(group->streams[rank]));
    CHECK(shard_is_nan(shard));
  }
  treeattn_merge_args_t merge = TREEATTN_MERGE_ARGS_INIT;
  static float o[BATCH * Q_HEADS * DIM], lse[BATCH * Q_HEADS];
  merge.query_tokens = BATCH;
  merge.o_dtype = TREEATTN_DTYPE_F32;
  merge.o = tensor(o, sizeof(o));
  merge.lse = tensor(lse, sizeof(lse));
  merge.out = shard->args.out;
  merge.out_lse = shard->args.lse;
  if (desc.algorithm != TREEATTN_ALGORITHM_RING) {
    shard_reset(shard);
    CHECK(treeattn_plan_merge(group->plans[rank], &merge, NULL) == code);
    CHECK(shard_is_nan(shard));
  }
  /* This rank's own partial needs nobody. */
  shard_reset(shard);
  CHECK_OK(treeattn_plan_partial(group->plans[rank], &shard->args, NULL));
  CHECK(!shard_is_nan(shard) && outputs_guarded(&shard->outputs));
  /* What makes no sense is refused, and touches nothing. */
  shard_reset(shard);
  shard->args.batch = BATCH + 1;
  CHECK_INVALID(group_decode(group, rank), "batch: found");
  CHECK_INVALID(group_enqueue(group, rank), "batch: found");
  CHECK(shard_untouched(shard));
  shard->args.batch = BATCH;
}

static void timed_out(int streamed) {
  group_t group;
  step_t step;
  group_open(&group, 2, &desc, 60, HANG);
  step_begin(&step, &group, 0, streamed);
  CHECK(step_end(&step) == TREEATTN_ERROR_TIMEOUT && all_nan_until(&group, 1));
  CHECK(shard_untouched(&group.shards[1]));
  check_later_steps(&group, 0, TREEATTN_ERROR_TIMEOUT);
  /* The rank that comes late is told in its first step. */
  check_later_steps(&group, 1, TREEATTN_ERROR_TIMEOUT);
  group_close(&group);
}

static void aborted(int streamed) {
  group_t group;
  step_t steps[2];
  group_open(&group, 3, &desc, HANG, HANG);
  for (int rank = 0; rank < 2; rank++) {
    step_begin(&steps[rank], &group, rank, streamed);
  }
  sleep_ms(50);
  CHECK_OK(treeattn_comm_abort(group.comms[2]));
  for (int rank = 0; rank < 2; rank++) {
    CHECK(step_end(&steps[rank]) == TREEATTN_ERROR_ABORTED);
  }
  CHECK(all_nan_until(&group, 2));
  for (int rank = 0; rank < 3; rank++) {
    check_later_steps(&group, rank, TREEATTN_ERROR_ABORTED);
  }
  group_close(&group);
}

static void left(int streamed) {
  group_t group;
  step_t steps[2];
  group_open(&group, 3, &desc, HANG, HANG);
  for (int rank = 0; rank < 2; rank++) {
    step_begin(&steps[rank], &group, rank, streamed);
  }
  sleep_ms(50);
  CHECK_OK(treeattn_comm_destroy(group.comms[2]));
  group.comms[2] = NULL;
  for (int rank = 0; rank < 2; rank++) {
    CHECK(step_end(&steps[rank]) == TREEATTN_ERROR_PEER_LOST);
  }
  CHECK(all_nan_until(&group, 2));
  check_later_steps(&group, 0, TREEATTN_ERROR_PEER_LOST);
  check_later_steps(&group, 1, TREEATTN_ERROR_PEER_LOST);
  /* Its own communicator is gone: refused before it begins. */
  CHECK_PARENT_DESTROYED(group_decode(&group, 2), "communicator: found destroyed");
  CHECK_PARENT_DESTROYED(group_enqueue(&group, 2), "communicator: found destroyed");
  CHECK(shard_untouched(&group.shards[2]));
  group_close(&group);
}

/* Broken before the first step. */
static void broken_before(void) {
  group_t group;
  group_open(&group, 2, &desc, HANG, HANG);
  CHECK_OK(treeattn_comm_abort(group.comms[0]));
  check_later_steps(&group, 0, TREEATTN_ERROR_ABORTED);
  check_later_steps(&group, 1, TREEATTN_ERROR_ABORTED);
  group_close(&group);
  group_open(&group, 2, &desc, HANG, HANG);
  CHECK_OK(treeattn_comm_destroy(group.comms[0]));
  group.comms[0] = NULL;
  check_later_steps(&group, 1, TREEATTN_ERROR_PEER_LOST);
  group_close(&group);
}

/* Steps that stand on a stream when their communicator breaks, and one that comes after it. */
static void enqueued(void) {
  group_t group;
  group_open(&group, 2, &desc, 60, HANG);
  static shard_t more[3];
  for (int i = 0; i < 3; i++) {
    shard_make(&more[i], &problem, 2, 0);
    CHECK_OK(treeattn_plan_decode(group.plans[0], &more[i].args, group.streams[0]));
  }
  CHECK_STATUS(treeattn_stream_synchronize(group.streams[0]), TREEATTN_ERROR_TIMEOUT, "rank 1");
  CHECK(strstr(treeattn_last_error_message(), "3 steps") != NULL);
  for (int i = 0; i < 3; i++) {
    CHECK(shard_is_nan(&more[i]));
  }
  CHECK_OK(treeattn_stream_synchronize(group.streams[0]));
  group_close(&group);
}

/* One stream, steps of two communicators with an error each: both are told. */
static void two_errors_on_one_stream(void) {
  group_t first, second;
  group_open(&first, 2, &desc, 60, HANG);
  group_open(&second, 1, &desc, 60, HANG);
  second.shards[0].kv_length[1] = MAX_LENGTH + 1;
  CHECK_OK(group_enqueue(&first, 0));
  CHECK_OK(treeattn_plan_decode(second.plans[0], &second.shards[0].args, first.streams[0]));
  CHECK_STATUS(treeattn_stream_synchronize(first.streams[0]), TREEATTN_ERROR_TIMEOUT, "rank 1 did not come");
  CHECK(strstr(treeattn_last_error_message(), "INVALID_DATA") != NULL);
  CHECK(strstr(treeattn_last_error_message(), "kv_length") != NULL);
  CHECK_OK(treeattn_stream_synchronize(first.streams[0]));
  group_close(&first);
  group_close(&second);
}

/* Waits until a plan has begun so many steps. */
static void await_steps(treeattn_plan_t *plan, uint64_t steps) {
  treeattn_plan_stats_t stats = TREEATTN_PLAN_STATS_INIT;
  for (int ms = 0; stats.steps < steps && ms < HANG; ms++) {
    sleep_ms(1);
    CHECK_OK(treeattn_plan_stats(plan, &stats));
  }
}

/* A second call on a rank while its step waits changes nothing, for anybody. */
static void busy(int streamed, int same_plan) {
  group_t group;
  step_t step, other;
  treeattn_plan_t *plans[2];
  group_open(&group, 2, &desc, HANG, HANG);
  CHECK_OK(treeattn_plan_create_all(2, group.comms, &desc, plans));
  static shard_t second;
  shard_make(&second, &problem, 2, 0);
  for (int round = 0; round < 3; round++) {
    group_reset(&group);
    shard_reset(&second);
    step_begin(&step, &group, 0, streamed);
    await_steps(group.plans[0], (uint64_t)round + 1);
    CHECK_STATUS(treeattn_plan_decode(same_plan ? group.plans[0] : plans[0], &second.args, NULL), TREEATTN_ERROR_BUSY,
                 "rank 0");
    CHECK(shard_untouched(&second));
    treeattn_plan_t *late = CHECK_NO_HANDLE(treeattn_plan_t);
    CHECK_STATUS(treeattn_plan_create(group.comms[0], &desc, &late), TREEATTN_ERROR_BUSY, "rank 0");
    CHECK(late == CHECK_NO_HANDLE(treeattn_plan_t));
    treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
    CHECK_OK(treeattn_comm_status(group.comms[1], &status));
    CHECK(status.code == TREEATTN_OK && status.broken == 0);
    step_begin(&other, &group, 1, streamed);
    CHECK(step_end(&step) == TREEATTN_OK && step_end(&other) == TREEATTN_OK);
    CHECK(shard_matches(&group.shards[0], &problem) && shard_matches(&group.shards[1], &problem));
    treeattn_plan_stats_t stats = TREEATTN_PLAN_STATS_INIT;
    CHECK_OK(treeattn_plan_stats(group.plans[0], &stats));
    CHECK(stats.steps == (uint64_t)round + 1);
  }
  for (int rank = 0; rank < 2; rank++) {
    CHECK_OK(treeattn_plan_destroy(plans[rank]));
  }
  group_close(&group);
}

/* Whether the status of a communicator tells of this fault in the second sequence, which breaks nothing. */
static int has_fault(treeattn_comm_t *comm, treeattn_status_t code) {
  treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
  CHECK_OK(treeattn_comm_status(comm, &status));
  CHECK(status.broken == 0 && (status.code == TREEATTN_OK || (status.code == code && status.sequence == 1)));
  return status.code == code;
}

/*
 * Bad data in rank 1's second sequence, or queries there that are not rank 0's, which ranks of a checked plan tell each other: on
 * every rank one of its calls is told, once.
 */
static void told_once(treeattn_status_t code) {
  group_t group;
  step_t steps[2];
  treeattn_attention_desc_t checked = desc;
  checked.flags = code == TREEATTN_ERROR_MISMATCH ? TREEATTN_ATTENTION_CHECKED : 0;
  group_open(&group, 2, &checked, HANG, HANG);
  if (code == TREEATTN_ERROR_MISMATCH) {
    for (int rank = 0; rank < 2; rank++) {
      group.shards[rank].args.global_length = group.shards[rank].global_length;
      group.shards[rank].args.kv_start = group.shards[rank].kv_start;
    }
    group.shards[1].q[1][0][0] += 1.0f;
  } else {
    group.shards[1].kv_length[1] = MAX_LENGTH + 1;
  }
  for (int streamed = 0; streamed < 2; streamed++) {
    group_reset(&group);
    for (int rank = 0; rank < 2; rank++) {
      step_begin(&steps[rank], &group, rank, streamed);
    }
    for (int rank = 0; rank < 2; rank++) {
      CHECK(step_end(&steps[rank]) == code);
      CHECK(strstr(steps[rank].message, code == TREEATTN_ERROR_MISMATCH ? "q: " : "kv_length") != NULL);
      CHECK(!has_fault(group.comms[rank], code));
      CHECK(sequence_is_nan(&group.shards[rank].outputs, 1));
      CHECK(sequence_matches(&group.shards[rank].outputs, 0, problem.out[0], problem.lse[0]));
    }
  }
  /* Whoever asks first. */
  for (int rank = 0; rank < 2; rank++) {
    CHECK_OK(group_enqueue(&group, rank));
  }
  for (int rank = 0; rank < 2; rank++) {
    const double began = now_ms();
    while (!has_fault(group.comms[rank], code) && now_ms() - began < SOON) {
      sleep_ms(1);
    }
    CHECK(now_ms() - began < SOON);
    CHECK(!has_fault(group.comms[rank], code));
    CHECK_OK(treeattn_stream_synchronize(group.streams[rank]));
  }
  group_close(&group);
}

/* treeattn_comm_status_t.step is the steps that a rank completed, whatever its algorithm and its sizes. */
static void steps_are_counted(void) {
  group_t group;
  group_open(&group, 3, &desc, HANG, HANG);
  for (int step = 1; step <= 5; step++) {
    for (int rank = 0; rank < 3; rank++) {
      CHECK_OK(group_enqueue(&group, rank));
    }
    for (int rank = 0; rank < 3; rank++) {
      treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
      CHECK_OK(treeattn_stream_synchronize(group.streams[rank]));
      CHECK_OK(treeattn_comm_status(group.comms[rank], &status));
      CHECK(status.step == (uint64_t)step && status.plan == 1 && status.code == TREEATTN_OK);
    }
  }
  group_close(&group);
}

int main(void) {
  problem_make(&problem, GROUP_SEED);
  desc = problem_desc();
  for (int i = 0; i < ALGORITHM_COUNT; i++) {
    desc.algorithm = ALGORITHMS[i];
    for (int streamed = 0; streamed < 2; streamed++) {
      timed_out(streamed);
      aborted(streamed);
      left(streamed);
      busy(streamed, 0);
      busy(streamed, 1);
    }
    broken_before();
    told_once(TREEATTN_ERROR_INVALID_DATA);
    told_once(TREEATTN_ERROR_MISMATCH);
    steps_are_counted();
  }
  desc = problem_desc();
  enqueued();
  two_errors_on_one_stream();
  return check_report("outputs");
}
