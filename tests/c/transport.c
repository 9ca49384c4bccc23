/*
 * treeattn_comm_create_from_transport: every bad argument, ranks on threads over an allgather written here, and the threads
 * that callbacks run on.
 */
#include "transport.h"

static treeattn_runtime_t *dead_runtime;
static treeattn_comm_t *dead;

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

/* Every way in which partials can meet; those between two ranks need sendrecv. */
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
  algorithms();
  CHECK_OK(treeattn_comm_destroy(dead));
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("transport");
}
