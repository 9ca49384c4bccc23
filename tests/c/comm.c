/*
 * treeattn_comm_create_local, treeattn_comm_rank, treeattn_comm_world, treeattn_comm_describe, treeattn_comm_status,
 * treeattn_comm_abort, treeattn_comm_destroy, with every bad argument. What ranks do to each other is in faults.c.
 */
#include "problem.h"

static treeattn_runtime_t *runtime;
static treeattn_runtime_t *dead_runtime;
static treeattn_comm_t *comms[3];
static treeattn_comm_t *dead;

static void creation(void) {
  treeattn_device_t devices[3] = {TREEATTN_CPU(0), TREEATTN_CPU(0), TREEATTN_CPU(0)};
  treeattn_comm_t *made[3];
  check_fill(made, sizeof(made));
  const int32_t counts[] = {0, -1, INT32_MIN, INT32_MAX, 65537, 1025};
  static treeattn_device_t many[1025];
  for (int i = 0; i < 6; i++) {
    CHECK_INVALID(treeattn_comm_create_local(runtime, counts[i], many, NULL, made), "n: found");
  }
  CHECK_INVALID(treeattn_comm_create_local(runtime, 2, NULL, NULL, made), "devices: found NULL");
  CHECK_INVALID(treeattn_comm_create_local(runtime, 2, (treeattn_device_t *)(void *)((char *)devices + 1), NULL, made),
                "devices: found 0x");
  CHECK_INVALID(treeattn_comm_create_local(runtime, 2, devices, NULL, NULL), "comms: found NULL");
  CHECK_INVALID(treeattn_comm_create_local(runtime, 2, devices, NULL, (treeattn_comm_t **)(void *)((char *)made + 4)),
                "comms: found 0x");
  const treeattn_device_t wrong[] = {-1, INT32_MIN, INT32_MAX, TREEATTN_DEVICE(2, 0), TREEATTN_CPU(1)};
  for (int i = 0; i < 5; i++) {
    devices[2] = wrong[i];
    CHECK_INVALID(treeattn_comm_create_local(runtime, 3, devices, NULL, made),
                  i < 4 ? "devices[2]: found" : "devices[2]: found cpu:1");
  }
  devices[2] = TREEATTN_CUDA(65535);
  CHECK_STATUS(treeattn_comm_create_local(runtime, 3, devices, NULL, made), TREEATTN_ERROR_UNAVAILABLE, "cuda:65535");
  devices[2] = TREEATTN_CPU(0);
  CHECK_BAD_HANDLES(treeattn_runtime_t, 0, dead_runtime, comms[0], "runtime: found",
                    treeattn_comm_create_local(handle, 3, devices, NULL, made));

  struct {
    treeattn_comm_config_t known;
    unsigned char tail[8];
  } config;
  memset(&config, 0, sizeof(config));
#define REFUSED(text) CHECK_INVALID(treeattn_comm_create_local(runtime, 3, devices, &config.known, made), text)
#define FIELD(field, value, text)                   \
  do {                                              \
    config.known.struct_size = sizeof(config);      \
    config.known.field = (value);                   \
    REFUSED(text);                                  \
    config.known.field = 0;                         \
  } while (0)
  FIELD(setup_timeout_ns, -1, "setup_timeout_ns: found -1");
  FIELD(setup_timeout_ns, INT64_MIN, "setup_timeout_ns: found");
  FIELD(setup_timeout_ns, INT64_MAX, "setup_timeout_ns: found");
  FIELD(step_timeout_ns, -1000, "step_timeout_ns: found -1000");
  FIELD(step_timeout_ns, INT64_MAX, "step_timeout_ns: found 9223372036854775807, wanted nanoseconds, above 0 and at most 31536000000000000");
  FIELD(threads_per_rank, -1, "threads_per_rank: found -1");
  FIELD(threads_per_rank, INT32_MAX, "threads_per_rank: found 2147483647");
  FIELD(node_group, -1, "node_group: found -1");
  static const int32_t groups[] = {0, 3, -2};
  FIELD(node_groups, groups, "node_groups[2]: found -2");
  FIELD(node_groups, (const int32_t *)(const void *)((const char *)groups + 1), "node_groups: found");
  FIELD(nccl_path, "", "nccl_path: found");
  FIELD(nccl_path, "\xc3(", "nccl_path: found");
  FIELD(struct_size, 0, "config.struct_size: found 0");
  FIELD(struct_size, 12, "config.struct_size: found 12");
  FIELD(struct_size, SIZE_MAX, "config.struct_size: found");
  config.known.struct_size = sizeof(config);
  config.tail[7] = 0x80;
  REFUSED("config.struct_size: found 72 with byte 71 set");
  config.tail[7] = 0;
  CHECK(check_untouched(made, sizeof(made)));

  /* A shorter one is that of no version; a longer config of zeros is as good as one of this version. */
  FIELD(struct_size, offsetof(treeattn_comm_config_t, step_timeout_ns), "config.struct_size: found 16, wanted sizeof(");
  FIELD(struct_size, sizeof(&config), "config.struct_size: found 8, which is that of a pointer to it");
  config.known.struct_size = sizeof(config);
  CHECK_OK(treeattn_comm_create_local(runtime, 2, devices, &config.known, made));
  CHECK(check_untouched(&made[2], sizeof(made[2])));
  CHECK_OK(treeattn_comm_destroy(made[0]));
  CHECK_OK(treeattn_comm_destroy(made[1]));
}

static void ranks(void) {
  for (int i = 0; i < 3; i++) {
    int32_t rank = -7, world = -7;
    CHECK_OK(treeattn_comm_rank(comms[i], &rank));
    CHECK_OK(treeattn_comm_world(comms[i], &world));
    CHECK(rank == i && world == 3);
  }
  int32_t value = -7;
  int32_t *crooked = (int32_t *)(void *)((char *)&value + 2);
  CHECK_INVALID(treeattn_comm_rank(comms[0], NULL), "rank: found NULL");
  CHECK_INVALID(treeattn_comm_rank(comms[0], crooked), "rank: found 0x");
  CHECK_INVALID(treeattn_comm_world(comms[0], NULL), "world: found NULL");
  CHECK_INVALID(treeattn_comm_world(comms[0], crooked), "world: found 0x");
  CHECK_BAD_HANDLES(treeattn_comm_t, 0, dead, runtime, "comm: found", treeattn_comm_rank(handle, &value));
  CHECK_BAD_HANDLES(treeattn_comm_t, 0, dead, runtime, "comm: found", treeattn_comm_world(handle, &value));
  CHECK(value == -7);
}

static void description(void) {
  size_t needed = 0, again = 0;
  CHECK_OK(treeattn_comm_describe(comms[1], NULL, 0, &needed));
  CHECK(needed > 2 && needed < 1 << 20);
  char *text = malloc(needed + GUARD_BYTES);
  check_fill(text, needed + GUARD_BYTES);
  CHECK_OK(treeattn_comm_describe(comms[1], text, needed, NULL));
  CHECK(strlen(text) + 1 == needed && text[0] == '{' && text[needed - 2] == '}');
  CHECK(strstr(text, "\"world\":3") != NULL && strstr(text, "\"rank\":1") != NULL);
  CHECK(check_untouched(text + needed, GUARD_BYTES));
  /* Cut to any size, and terminated. */
  for (size_t cap = 1; cap < 20; cap++) {
    char cut[40];
    check_fill(cut, sizeof(cut));
    CHECK_OK(treeattn_comm_describe(comms[1], cut, cap, &again));
    CHECK(again == needed && strlen(cut) == cap - 1 && memcmp(cut, text, cap - 1) == 0);
    CHECK(check_untouched(cut + cap, sizeof(cut) - cap));
  }
  check_fill(text, needed + GUARD_BYTES);
  CHECK_OK(treeattn_comm_describe(comms[1], text, 0, &again));
  CHECK(check_untouched(text, needed + GUARD_BYTES));
  again = 77;
  CHECK_INVALID(treeattn_comm_describe(comms[1], NULL, 10, &again), "buf: found NULL");
  CHECK_INVALID(treeattn_comm_describe(comms[1], NULL, 0, NULL), "needed: found NULL");
  CHECK_INVALID(treeattn_comm_describe(comms[1], text, 10, (size_t *)(void *)((char *)&again + 1)), "needed: found 0x");
  CHECK_BAD_HANDLES(treeattn_comm_t, 0, dead, runtime, "comm: found",
                    treeattn_comm_describe(handle, text, needed, &again));
  CHECK(again == 77 && check_untouched(text, needed + GUARD_BYTES));
  free(text);
}

static void health(void) {
  treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
  CHECK_OK(treeattn_comm_status(comms[0], &status));
  CHECK(status.struct_size == sizeof(status) && status.code == TREEATTN_OK && status.broken == 0);
  CHECK(status.rank == -1 && status.sequence == -1 && status.step == 0 && status.plan == 0);
  CHECK(status.message[0] == '\0');
  struct {
    size_t struct_size;
    unsigned char rest[700];
  } raw;
  check_fill(&raw, sizeof(raw));
  treeattn_comm_status_t *into = (treeattn_comm_status_t *)(void *)&raw;
  const size_t bad[] = {0, 7, (size_t)1 << 17, SIZE_MAX};
  for (int i = 0; i < 4; i++) {
    raw.struct_size = bad[i];
    CHECK_INVALID(treeattn_comm_status(comms[0], into), "status.struct_size: found");
  }
  raw.struct_size = sizeof(raw);
  CHECK_INVALID(treeattn_comm_status(comms[0], NULL), "status: found NULL");
  CHECK_INVALID(treeattn_comm_status(comms[0], (treeattn_comm_status_t *)(void *)(raw.rest + 4)), "status: found 0x");
  CHECK_BAD_HANDLES(treeattn_comm_t, 0, dead, runtime, "comm: found", treeattn_comm_status(handle, into));
  raw.struct_size = offsetof(treeattn_comm_status_t, step);
  CHECK_INVALID(treeattn_comm_status(comms[0], into), "status.struct_size: found 16, wanted sizeof(treeattn_comm_status_t)");
  CHECK(check_untouched(raw.rest, sizeof(raw.rest)));
  raw.struct_size = sizeof(status);
  CHECK_OK(treeattn_comm_status(comms[0], into));
  CHECK(memcmp(raw.rest, &status.code, sizeof(status) - 8) == 0);
  CHECK(check_untouched(raw.rest + sizeof(status) - 8, sizeof(raw.rest) - sizeof(status) + 8));
}

static void abortion(void) {
  treeattn_comm_t *pair[2];
  group_make(runtime, 2, 0, 0, pair);
  CHECK_OK(treeattn_comm_abort(pair[1]));
  CHECK_OK(treeattn_comm_abort(pair[0]));
  for (int i = 0; i < 2; i++) {
    treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
    CHECK_OK(treeattn_comm_status(pair[i], &status));
    CHECK(status.code == TREEATTN_ERROR_ABORTED && status.broken == 1 && status.rank == 1);
    CHECK(strstr(status.message, "aborted by rank 1") != NULL);
    treeattn_attention_desc_t desc = problem_desc();
    treeattn_plan_t *plan = CHECK_NO_HANDLE(treeattn_plan_t);
    CHECK_STATUS(treeattn_plan_create(pair[i], &desc, &plan), TREEATTN_ERROR_ABORTED, "aborted by rank 1");
    CHECK_STATUS(treeattn_plan_create_all(2, pair, &desc, &plan), TREEATTN_ERROR_ABORTED, "aborted by rank 1");
    CHECK(plan == CHECK_NO_HANDLE(treeattn_plan_t));
  }
  CHECK_BAD_HANDLES(treeattn_comm_t, 0, dead, runtime, "comm: found", treeattn_comm_abort(handle));
  CHECK_OK(treeattn_comm_destroy(pair[0]));
  CHECK_OK(treeattn_comm_destroy(pair[1]));
}

static void destruction(void) {
  CHECK_OK(treeattn_comm_destroy(NULL));
  CHECK_BAD_HANDLES(treeattn_comm_t, 1, dead, runtime, "comm: found", treeattn_comm_destroy(handle));
  treeattn_runtime_t *own = runtime_make();
  treeattn_comm_t *orphan = NULL, *late = CHECK_NO_HANDLE(treeattn_comm_t);
  group_make(own, 1, 0, 0, &orphan);
  CHECK_OK(treeattn_runtime_destroy(own));
  treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
  size_t needed = 77;
  treeattn_device_t device = TREEATTN_CPU(0);
  CHECK_OK(treeattn_comm_status(orphan, &status));
  CHECK(status.code == TREEATTN_OK);
  CHECK_PARENT_DESTROYED(treeattn_comm_describe(orphan, NULL, 0, &needed), "runtime: found destroyed");
  CHECK_OK(treeattn_comm_abort(orphan));
  CHECK_OK(treeattn_comm_status(orphan, &status));
  CHECK(status.code == TREEATTN_ERROR_ABORTED);
  int32_t number = -7;
  CHECK_PARENT_DESTROYED(treeattn_comm_rank(orphan, &number), "runtime: found destroyed");
  CHECK_PARENT_DESTROYED(treeattn_comm_world(orphan, &number), "runtime: found destroyed");
  CHECK(number == -7);
  CHECK_STATUS(treeattn_comm_create_local(own, 1, &device, NULL, &late), TREEATTN_ERROR_BAD_HANDLE, "runtime: found");
  CHECK(needed == 77 && late == CHECK_NO_HANDLE(treeattn_comm_t));
  CHECK_OK(treeattn_comm_destroy(orphan));
}

int main(void) {
  runtime = runtime_make();
  dead_runtime = runtime_make();
  CHECK_OK(treeattn_runtime_destroy(dead_runtime));
  group_make(runtime, 3, 0, 0, comms);
  group_make(runtime, 1, 0, 0, &dead);
  CHECK_OK(treeattn_comm_destroy(dead));
  creation();
  ranks();
  description();
  health();
  abortion();
  destruction();
  for (int i = 0; i < 3; i++) {
    CHECK_OK(treeattn_comm_destroy(comms[i]));
  }
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("comm");
}
