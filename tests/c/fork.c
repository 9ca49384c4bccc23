/*
 * A forked child: what it inherited is BAD_HANDLE at once, whatever the call; what it makes itself works; the parent goes
 * on. The same in a child's child.
 */
#include <sys/wait.h>
#include <unistd.h>

#include "ranks.h"

static treeattn_attention_desc_t desc;
static problem_t problem;

#define INHERITED(call) CHECK_STATUS(call, TREEATTN_ERROR_BAD_HANDLE, "one of the process that this one was forked from")

/* Two ranks on streams: a step that is right, and whose objects go. */
static void works(void) {
  group_t group;
  group_open(&group, 2, &desc, HANG, HANG);
  CHECK_OK(group_enqueue(&group, 0));
  CHECK_OK(group_enqueue(&group, 1));
  for (int rank = 0; rank < 2; rank++) {
    CHECK_OK(treeattn_stream_synchronize(group.streams[rank]));
    CHECK(shard_matches(&group.shards[rank], &problem));
  }
  group_close(&group);
}

/* Every call that takes a handle. */
static void is_refused(group_t *inherited, treeattn_buffer_t *buffer) {
  group_t none;
  treeattn_device_t devices[2] = {TREEATTN_CPU(0), TREEATTN_CPU(0)};
  treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
  treeattn_plan_stats_t stats = TREEATTN_PLAN_STATS_INIT;
  double began = now_ms();
  shard_reset(&inherited->shards[0]);
  INHERITED(treeattn_comm_create_local(inherited->runtime, 2, devices, NULL, none.comms));
  INHERITED(treeattn_plan_create_all(2, inherited->comms, &desc, none.plans));
  INHERITED(treeattn_plan_decode(inherited->plans[0], &inherited->shards[0].args, NULL));
  INHERITED(treeattn_plan_decode(inherited->plans[0], &inherited->shards[0].args, inherited->streams[0]));
  INHERITED(treeattn_plan_stats(inherited->plans[0], &stats));
  INHERITED(treeattn_stream_synchronize(inherited->streams[0]));
  INHERITED(treeattn_comm_status(inherited->comms[0], &status));
  INHERITED(treeattn_comm_abort(inherited->comms[0]));
  INHERITED(treeattn_buffer_destroy(buffer));
  INHERITED(treeattn_plan_destroy(inherited->plans[0]));
  INHERITED(treeattn_stream_destroy(inherited->streams[0]));
  INHERITED(treeattn_comm_destroy(inherited->comms[0]));
  INHERITED(treeattn_runtime_destroy(inherited->runtime));
  CHECK(shard_untouched(&inherited->shards[0]));
  CHECK(now_ms() - began < 1000);
}

/* Runs `body` in a child. Its failures are the parent's. */
static void in_child(void (*body)(group_t *, treeattn_buffer_t *), group_t *group, treeattn_buffer_t *buffer) {
  fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    check_failures = 0;
    alarm(60);
    body(group, buffer);
    fflush(stdout);
    _exit(check_failures != 0);
  }
  int status = -1;
  CHECK(child > 0 && waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void grandchild(group_t *group, treeattn_buffer_t *buffer) {
  is_refused(group, buffer);
  works();
}

static void child(group_t *group, treeattn_buffer_t *buffer) {
  is_refused(group, buffer);
  works();
  is_refused(group, buffer);
  /* One made here is as foreign to a child of this one. */
  group_t own;
  treeattn_buffer_t *memory = NULL;
  group_open(&own, 2, &desc, HANG, HANG);
  CHECK_OK(treeattn_buffer_alloc(own.runtime, TREEATTN_CPU(0), 64, &memory));
  in_child(grandchild, group, buffer);
  in_child(grandchild, &own, memory);
  CHECK_OK(treeattn_buffer_destroy(memory));
  group_close(&own);
}

int main(void) {
  group_t group;
  treeattn_buffer_t *buffer = NULL;
  desc = problem_desc();
  problem_make(&problem, GROUP_SEED);
  group_open(&group, 2, &desc, HANG, HANG);
  CHECK_OK(treeattn_buffer_alloc(group.runtime, TREEATTN_CPU(0), 64, &buffer));
  for (int again = 0; again < 2; again++) {
    /* The second time with a step of rank 0 under way, which waits for rank 1. */
    if (again) {
      CHECK_OK(group_enqueue(&group, 0));
    }
    in_child(child, &group, buffer);
    if (!again) {
      CHECK_OK(group_enqueue(&group, 0));
    }
    CHECK_OK(group_enqueue(&group, 1));
    for (int rank = 0; rank < 2; rank++) {
      CHECK_OK(treeattn_stream_synchronize(group.streams[rank]));
      CHECK(shard_matches(&group.shards[rank], &problem));
    }
  }
  CHECK_OK(treeattn_buffer_destroy(buffer));
  group_close(&group);
  return check_report("fork");
}
