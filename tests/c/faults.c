/*
 * What ranks do to each other through treeattn_plan_create, treeattn_plan_decode, treeattn_plan_merge and the stream:
 * steps that work on threads and on streams; mismatch, desync, timeout, a lost peer, abort. After each, the process
 * goes on.
 */
#include <pthread.h>
#include <time.h>

#include "problem.h"

enum { WORLD = 4 };

static treeattn_runtime_t *runtime;
static problem_t problem;
static shard_t shards[WORLD];

/* One call of one rank on a thread of its own, and what it gave. */
typedef struct {
  treeattn_comm_t *comm;
  treeattn_plan_t *plan;
  const treeattn_attention_desc_t *desc;
  const treeattn_decode_args_t *args;
  treeattn_status_t status;
  char message[1024];
} rank_t;

static void keep(rank_t *rank, treeattn_status_t status) {
  rank->status = status;
  snprintf(rank->message, sizeof(rank->message), "%s", status == TREEATTN_OK ? "" : treeattn_last_error_message());
}

static void *create(void *at) {
  rank_t *rank = at;
  keep(rank, treeattn_plan_create(rank->comm, rank->desc, &rank->plan));
  return NULL;
}

static void *decode(void *at) {
  rank_t *rank = at;
  keep(rank, treeattn_plan_decode(rank->plan, rank->args, NULL));
  return NULL;
}

/* Runs `body` for n ranks at a time and waits for all. */
static void on_threads(void *(*body)(void *), rank_t *ranks, int n) {
  pthread_t threads[WORLD];
  for (int i = 0; i < n; i++) {
    CHECK(pthread_create(&threads[i], NULL, body, &ranks[i]) == 0);
  }
  for (int i = 0; i < n; i++) {
    CHECK(pthread_join(threads[i], NULL) == 0);
  }
}

/* A group with a plan a rank and the problem's shards. */
static void setup(rank_t *ranks, int world, int64_t step_ms) {
  treeattn_comm_t *comms[WORLD];
  treeattn_plan_t *plans[WORLD];
  treeattn_attention_desc_t desc = problem_desc();
  group_make(runtime, world, step_ms, 0, comms);
  CHECK_OK(treeattn_plan_create_all(world, comms, &desc, plans));
  memset(ranks, 0, sizeof(rank_t) * (size_t)world);
  for (int i = 0; i < world; i++) {
    shard_make(&shards[i], &problem, world, i);
    ranks[i].comm = comms[i];
    ranks[i].plan = plans[i];
    ranks[i].args = &shards[i].args;
  }
}

static void teardown(rank_t *ranks, int world) {
  for (int i = 0; i < world; i++) {
    CHECK_OK(treeattn_plan_destroy(ranks[i].plan));
    CHECK_OK(treeattn_comm_destroy(ranks[i].comm));
  }
}

/* Broken with this code, blamed on this rank; steps end at once, with NaN, and no plan is made. */
static void check_broken(rank_t *rank, shard_t *shard, treeattn_status_t code, int blamed) {
  treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
  for (int i = 0; i < 2; i++) {
    CHECK_OK(treeattn_comm_status(rank->comm, &status));
    CHECK(status.code == code && status.broken == 1 && status.message[0] != '\0');
    CHECK(blamed < 0 || status.rank == blamed);
  }
  shard_reset(shard);
  CHECK(treeattn_plan_decode(rank->plan, rank->args, NULL) == code);
  for (int b = 0; b < rank->args->batch; b++) {
    CHECK(sequence_is_nan(&shard->outputs, b));
  }
  CHECK(outputs_guarded(&shard->outputs));
  treeattn_attention_desc_t desc = problem_desc();
  treeattn_plan_t *plan = CHECK_NO_HANDLE(treeattn_plan_t);
  CHECK(treeattn_plan_create(rank->comm, &desc, &plan) == code && plan == CHECK_NO_HANDLE(treeattn_plan_t));
}

/* A thread a rank: collective creation and steps with the exact answer and the same bits everywhere. */
static void threads(void) {
  rank_t ranks[WORLD];
  treeattn_comm_t *comms[WORLD];
  treeattn_attention_desc_t desc = problem_desc();
  for (int world = 1; world <= WORLD; world++) {
    group_make(runtime, world, 0, 0, comms);
    memset(ranks, 0, sizeof(ranks));
    for (int i = 0; i < world; i++) {
      shard_make(&shards[i], &problem, world, i);
      ranks[i].comm = comms[i];
      ranks[i].desc = &desc;
      ranks[i].args = &shards[i].args;
    }
    on_threads(create, ranks, world);
    for (int i = 0; i < world; i++) {
      CHECK(ranks[i].status == TREEATTN_OK);
    }
    for (int step = 0; step < 3; step++) {
      for (int i = 0; i < world; i++) {
        shard_reset(&shards[i]);
      }
      on_threads(decode, ranks, world);
      for (int i = 0; i < world; i++) {
        CHECK(ranks[i].status == TREEATTN_OK && shard_matches(&shards[i], &problem));
        CHECK(memcmp(&shards[i].outputs, &shards[0].outputs, sizeof(outputs_t)) == 0);
      }
    }
    treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
    CHECK_OK(treeattn_comm_status(comms[0], &status));
    CHECK(status.code == TREEATTN_OK && status.plan == 1 && status.step == (world > 1 ? 3u : 0u));
    treeattn_plan_stats_t stats = TREEATTN_PLAN_STATS_INIT;
    CHECK_OK(treeattn_plan_stats(ranks[0].plan, &stats));
    CHECK(stats.steps == 3 && stats.messages == 3u * (unsigned)(world - 1) && (world == 1 || stats.bytes_sent > 0));
    teardown(ranks, world);
  }
}

/* One thread drives all ranks, each on a stream of its own. */
static void streams(void) {
  rank_t ranks[WORLD];
  treeattn_stream_t *made[WORLD];
  setup(ranks, WORLD, 0);
  for (int i = 0; i < WORLD; i++) {
    CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &made[i]));
  }
  for (int step = 0; step < 20; step++) {
    for (int i = 0; i < WORLD; i++) {
      shard_reset(&shards[i]);
    }
    for (int i = 0; i < WORLD; i++) {
      CHECK_OK(treeattn_plan_decode(ranks[i].plan, ranks[i].args, made[i]));
    }
    for (int i = 0; i < WORLD; i++) {
      CHECK_OK(treeattn_stream_synchronize(made[i]));
      CHECK(shard_matches(&shards[i], &problem));
    }
  }
  /* Bad data on one rank: NaN for its sequence on every rank, and the communicator stays usable. */
  shards[2].kv_length[1] = MAX_LENGTH + 1;
  for (int i = 0; i < WORLD; i++) {
    CHECK_OK(treeattn_plan_decode(ranks[i].plan, ranks[i].args, made[i]));
  }
  for (int i = 0; i < WORLD; i++) {
    CHECK(treeattn_stream_synchronize(made[i]) == TREEATTN_ERROR_INVALID_DATA);
    CHECK(strstr(treeattn_last_error_message(), "kv_length") != NULL);
    CHECK_OK(treeattn_stream_synchronize(made[i]));
    CHECK(sequence_is_nan(&shards[i].outputs, 1) && outputs_guarded(&shards[i].outputs));
    CHECK(sequence_matches(&shards[i].outputs, 0, problem.out[0], problem.lse[0]));
    treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
    CHECK_OK(treeattn_comm_status(ranks[i].comm, &status));
    CHECK(status.code == TREEATTN_OK && status.broken == 0 && status.plan == 1);
  }
  shards[2].kv_length[1] = 1;
  shard_make(&shards[2], &problem, WORLD, 2);
  for (int i = 0; i < WORLD; i++) {
    CHECK_OK(treeattn_plan_decode(ranks[i].plan, ranks[i].args, made[i]));
  }
  for (int i = 0; i < WORLD; i++) {
    CHECK_OK(treeattn_stream_synchronize(made[i]));
    CHECK(shard_matches(&shards[i], &problem));
    CHECK_OK(treeattn_stream_destroy(made[i]));
  }
  teardown(ranks, WORLD);
}

/* Different descriptors: every rank hears which field and which ranks; the communicators stay whole. */
static void mismatch(void) {
  rank_t ranks[WORLD];
  treeattn_comm_t *comms[WORLD];
  treeattn_attention_desc_t desc = problem_desc(), other = problem_desc();
  other.max_batch = BATCH + 5;
  group_make(runtime, WORLD, 0, 0, comms);
  memset(ranks, 0, sizeof(ranks));
  for (int i = 0; i < WORLD; i++) {
    ranks[i].comm = comms[i];
    ranks[i].desc = i == 2 ? &other : &desc;
    ranks[i].plan = CHECK_NO_HANDLE(treeattn_plan_t);
  }
  on_threads(create, ranks, WORLD);
  for (int i = 0; i < WORLD; i++) {
    CHECK(ranks[i].status == TREEATTN_ERROR_MISMATCH && ranks[i].plan == CHECK_NO_HANDLE(treeattn_plan_t));
    CHECK(strstr(ranks[i].message, "treeattn_plan_create: max_batch: found 2 on ranks [0, 1, 3] and 7 on ranks [2]"));
  }
  /* A rank whose descriptor makes no sense says so itself; its peers name it. */
  other = problem_desc();
  other.kv_heads = 3;
  on_threads(create, ranks, WORLD);
  for (int i = 0; i < WORLD; i++) {
    CHECK(ranks[i].plan == CHECK_NO_HANDLE(treeattn_plan_t));
    CHECK(ranks[i].status == (i == 2 ? TREEATTN_ERROR_INVALID_ARGUMENT : TREEATTN_ERROR_MISMATCH));
    CHECK(strstr(ranks[i].message, "kv_heads") != NULL);
    CHECK(i == 2 || strstr(ranks[i].message, "rank 2") != NULL);
  }
  other = desc;
  on_threads(create, ranks, WORLD);
  for (int i = 0; i < WORLD; i++) {
    CHECK(ranks[i].status == TREEATTN_OK);
  }
  teardown(ranks, WORLD);
}

/* Different steps on different ranks. */
static void desync(void) {
  rank_t ranks[WORLD];
  setup(ranks, WORLD, 0);
  shards[1].args.batch = 1;
  shards[1].args.query_tokens = 1;
  on_threads(decode, ranks, WORLD);
  for (int i = 0; i < WORLD; i++) {
    CHECK(ranks[i].status == TREEATTN_ERROR_DESYNC);
    CHECK(strstr(ranks[i].message, "rank 1 issued another call than ranks 0, 2 and 3") != NULL);
    CHECK(strstr(ranks[i].message, "found a decode of plan 1 with batch 1, query_tokens 1 (rank 1), wanted a decode of plan 1 "
                                   "with batch 2, query_tokens ") != NULL);
    CHECK(outputs_guarded(&shards[i].outputs) && sequence_is_nan(&shards[i].outputs, 0));
    CHECK(i == 1 || sequence_is_nan(&shards[i].outputs, 1));
  }
  for (int i = 0; i < WORLD; i++) {
    check_broken(&ranks[i], &shards[i], TREEATTN_ERROR_DESYNC, 1);
  }
  teardown(ranks, WORLD);
}

/* One thread without streams cannot drive two ranks: the first call waits for a rank that cannot come. */
static void timeouts(void) {
  rank_t ranks[WORLD];
  setup(ranks, 2, 60);
  CHECK_STATUS(treeattn_plan_decode(ranks[0].plan, ranks[0].args, NULL), TREEATTN_ERROR_TIMEOUT, "rank 1 did not come");
  CHECK(strstr(treeattn_last_error_message(), "within 60ms (step_timeout_ns)") != NULL);
  CHECK(strstr(treeattn_last_error_message(), "need a thread or a CPU stream each") != NULL);
  CHECK(sequence_is_nan(&shards[0].outputs, 0) && sequence_is_nan(&shards[0].outputs, 1));
  CHECK(outputs_guarded(&shards[0].outputs) && shard_untouched(&shards[1]));
  CHECK_STATUS(treeattn_plan_decode(ranks[1].plan, ranks[1].args, NULL), TREEATTN_ERROR_TIMEOUT,
               "this rank, 1, came too late: ");
  CHECK(sequence_is_nan(&shards[1].outputs, 0) && sequence_is_nan(&shards[1].outputs, 1));
  check_broken(&ranks[0], &shards[0], TREEATTN_ERROR_TIMEOUT, 1);
  check_broken(&ranks[1], &shards[1], TREEATTN_ERROR_TIMEOUT, 1);
  teardown(ranks, 2);

  /* The same by a stream: it comes from synchronize, once. */
  treeattn_stream_t *stream = NULL;
  setup(ranks, 2, 60);
  CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &stream));
  CHECK_OK(treeattn_plan_decode(ranks[1].plan, ranks[1].args, stream));
  CHECK_STATUS(treeattn_stream_synchronize(stream), TREEATTN_ERROR_TIMEOUT, "rank 0 did not come");
  CHECK_OK(treeattn_stream_synchronize(stream));
  CHECK(sequence_is_nan(&shards[1].outputs, 1) && outputs_guarded(&shards[1].outputs));
  check_broken(&ranks[1], &shards[1], TREEATTN_ERROR_TIMEOUT, 0);
  /* On a broken communicator nothing is enqueued. */
  CHECK_STATUS(treeattn_plan_decode(ranks[0].plan, ranks[0].args, stream), TREEATTN_ERROR_TIMEOUT, "rank 0");
  CHECK_OK(treeattn_stream_synchronize(stream));
  CHECK_OK(treeattn_stream_destroy(stream));
  teardown(ranks, 2);

  /* Two ranks on one stream would wait for each other: the second is refused, and the first goes on by a stream of its own. */
  treeattn_stream_t *second = NULL;
  setup(ranks, 2, 5000);
  CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &stream));
  CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &second));
  for (int i = 0; i < 3; i++) {
    CHECK_OK(treeattn_plan_decode(ranks[0].plan, ranks[0].args, stream));
    CHECK_STATUS(treeattn_plan_decode(ranks[1].plan, ranks[1].args, stream), TREEATTN_ERROR_INVALID_ARGUMENT,
                 "stream: found one on which rank 0 of this communicator waits for rank 1");
    CHECK_OK(treeattn_plan_decode(ranks[1].plan, ranks[1].args, second));
    CHECK_OK(treeattn_stream_synchronize(stream));
    CHECK_OK(treeattn_stream_synchronize(second));
    CHECK(shard_matches(&shards[0], &problem) && shard_matches(&shards[1], &problem));
    /* Whoever is done may change over. */
    treeattn_stream_t *other = stream;
    stream = second;
    second = other;
  }
  CHECK_OK(treeattn_stream_destroy(stream));
  CHECK_OK(treeattn_stream_destroy(second));
  teardown(ranks, 2);

  /* A rank that never comes to create its plan. */
  treeattn_comm_t *comms[2];
  treeattn_attention_desc_t desc = problem_desc();
  treeattn_plan_t *plan = CHECK_NO_HANDLE(treeattn_plan_t);
  group_make(runtime, 2, 0, 60, comms);
  CHECK_STATUS(treeattn_plan_create(comms[0], &desc, &plan), TREEATTN_ERROR_TIMEOUT, "rank 1 did not come");
  CHECK(strstr(treeattn_last_error_message(), "within 60ms (setup_timeout_ns)") != NULL);
  CHECK(plan == CHECK_NO_HANDLE(treeattn_plan_t));
  CHECK_OK(treeattn_comm_destroy(comms[0]));
  CHECK_OK(treeattn_comm_destroy(comms[1]));
}

typedef struct {
  treeattn_comm_t *comm;
  treeattn_status_t (*end)(treeattn_comm_t *);
  treeattn_status_t status;
} ender_t;

static void *end_later(void *at) {
  ender_t *ender = at;
  struct timespec pause = {0, 30000000};
  nanosleep(&pause, NULL);
  ender->status = ender->end(ender->comm);
  return NULL;
}

/* A wait of 10 s ends at once when a peer leaves, or when anyone aborts. */
static void ended(treeattn_status_t (*end)(treeattn_comm_t *), int by, treeattn_status_t code, const char *text) {
  rank_t ranks[WORLD];
  setup(ranks, 2, 0);
  ender_t ender = {ranks[by].comm, end, -1};
  pthread_t thread;
  CHECK(pthread_create(&thread, NULL, end_later, &ender) == 0);
  CHECK_STATUS(treeattn_plan_decode(ranks[0].plan, ranks[0].args, NULL), code, text);
  CHECK(pthread_join(thread, NULL) == 0 && ender.status == TREEATTN_OK);
  CHECK(sequence_is_nan(&shards[0].outputs, 0) && outputs_guarded(&shards[0].outputs));
  check_broken(&ranks[0], &shards[0], code, by);
  CHECK_OK(treeattn_plan_destroy(ranks[0].plan));
  CHECK_OK(treeattn_comm_destroy(ranks[0].comm));
  CHECK_OK(treeattn_plan_destroy(ranks[1].plan));
  CHECK(treeattn_comm_destroy(ranks[1].comm) == (end == treeattn_comm_destroy ? TREEATTN_ERROR_BAD_HANDLE : TREEATTN_OK));
}

/* A communicator that is destroyed while its plan has steps enqueued: they end, the plan is an orphan. */
static void destroyed_under_steps(void) {
  rank_t ranks[WORLD];
  treeattn_stream_t *stream = NULL;
  setup(ranks, 2, 0);
  CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &stream));
  CHECK_OK(treeattn_plan_decode(ranks[0].plan, ranks[0].args, stream));
  CHECK_OK(treeattn_comm_destroy(ranks[1].comm));
  CHECK_STATUS(treeattn_stream_synchronize(stream), TREEATTN_ERROR_PEER_LOST, "rank 1");
  CHECK_PARENT_DESTROYED(treeattn_plan_decode(ranks[1].plan, ranks[1].args, stream), "communicator: found destroyed");
  CHECK_OK(treeattn_plan_destroy(ranks[1].plan));
  CHECK_OK(treeattn_comm_destroy(ranks[0].comm));
  CHECK_OK(treeattn_plan_destroy(ranks[0].plan));
  CHECK_OK(treeattn_stream_destroy(stream));
}

/* A plan's handle may go while its step still waits: destroying waits for it. */
static void destroyed_while_enqueued(void) {
  rank_t ranks[WORLD];
  treeattn_stream_t *made[2];
  setup(ranks, 2, 0);
  for (int i = 0; i < 2; i++) {
    CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &made[i]));
  }
  for (int i = 0; i < 2; i++) {
    CHECK_OK(treeattn_plan_decode(ranks[i].plan, ranks[i].args, made[i]));
  }
  teardown(ranks, 2);
  for (int i = 0; i < 2; i++) {
    CHECK(shard_matches(&shards[i], &problem));
    CHECK_OK(treeattn_stream_synchronize(made[i]));
    CHECK_OK(treeattn_stream_destroy(made[i]));
  }
}

int main(void) {
  problem_make(&problem, 4);
  runtime = runtime_make();
  threads();
  streams();
  mismatch();
  desync();
  timeouts();
  ended(treeattn_comm_abort, 1, TREEATTN_ERROR_ABORTED, "aborted by rank 1");
  ended(treeattn_comm_destroy, 1, TREEATTN_ERROR_PEER_LOST, "rank 1 has left");
  destroyed_under_steps();
  destroyed_while_enqueued();
  threads();
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("faults");
}
