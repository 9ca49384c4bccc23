/*
 * treeattn_nccl_unique_id, treeattn_comm_create_nccl, treeattn_comm_wrap_nccl, with every bad argument, and what a machine
 * without NCCL or without GPUs says. What ranks do is in tests/nccl.rs.
 */
#include <stdlib.h>

#include "problem.h"

static treeattn_runtime_t *runtime;
static treeattn_runtime_t *dead_runtime;
static treeattn_comm_t *other;

static void unique_ids(void) {
  uint8_t id[128 + GUARD_BYTES];
  check_fill(id, sizeof(id));
  CHECK_BAD_HANDLES(treeattn_runtime_t, 0, dead_runtime, other, "runtime: found", treeattn_nccl_unique_id(handle, id));
  CHECK_INVALID(treeattn_nccl_unique_id(runtime, NULL), "out: found NULL");
  CHECK(check_untouched(id, sizeof(id)));
  treeattn_status_t status = treeattn_nccl_unique_id(runtime, id);
  CHECK(check_untouched(id + 128, GUARD_BYTES));
  if (status != TREEATTN_OK) {
    CHECK(check_untouched(id, 128));
    CHECK(status == TREEATTN_ERROR_UNAVAILABLE || status == TREEATTN_ERROR_NCCL);
    CHECK(strstr(treeattn_last_error_message(), "NCCL") != NULL);
  }
  /* Else there is one that does not fit. */
  if (status == TREEATTN_ERROR_UNAVAILABLE && strstr(treeattn_last_error_message(), "found none") != NULL) {
    CHECK(strstr(treeattn_last_error_message(), "not loaded in this process; libnccl.so.2") != NULL);
  }
}

static void arguments(void) {
  uint8_t id[128] = {0};
  treeattn_comm_t *comm = CHECK_NO_HANDLE(treeattn_comm_t);
  int stand_in = 0;
  void *borrowed = &stand_in;
  const treeattn_device_t gpu = TREEATTN_CUDA(65535);
  CHECK_BAD_HANDLES(treeattn_runtime_t, 0, dead_runtime, other, "runtime: found",
                    treeattn_comm_create_nccl(handle, id, 1, 0, gpu, NULL, &comm));
  CHECK_BAD_HANDLES(treeattn_runtime_t, 0, dead_runtime, other, "runtime: found",
                    treeattn_comm_wrap_nccl(handle, borrowed, gpu, NULL, &comm));
  CHECK_INVALID(treeattn_comm_create_nccl(runtime, NULL, 1, 0, gpu, NULL, &comm), "id: found NULL");
  CHECK_INVALID(treeattn_comm_wrap_nccl(runtime, NULL, gpu, NULL, &comm), "nccl_comm: found NULL");
  const int32_t worlds[] = {0, -1, 4097, INT32_MIN, INT32_MAX};
  for (int i = 0; i < 5; i++) {
    CHECK_INVALID(treeattn_comm_create_nccl(runtime, id, worlds[i], 0, gpu, NULL, &comm), "world: found");
  }
  const int32_t ranks[] = {-1, 2, INT32_MIN, INT32_MAX};
  for (int i = 0; i < 4; i++) {
    CHECK_INVALID(treeattn_comm_create_nccl(runtime, id, 2, ranks[i], gpu, NULL, &comm), "rank: found");
  }
  treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
#define BOTH(status, device, to, text)                                                             \
  do {                                                                                             \
    CHECK_STATUS(treeattn_comm_create_nccl(runtime, id, 2, 0, device, &config, to), status, text); \
    CHECK_STATUS(treeattn_comm_wrap_nccl(runtime, borrowed, device, &config, to), status, text);   \
  } while (0)
#define BAD(device, to, text) BOTH(TREEATTN_ERROR_INVALID_ARGUMENT, device, to, text)
  const treeattn_device_t wrong[] = {-1, INT32_MIN, INT32_MAX, TREEATTN_DEVICE(2, 0)};
  for (int i = 0; i < 4; i++) {
    BAD(wrong[i], &comm, "device: found");
  }
  BAD(gpu, NULL, "comm: found NULL");
  BAD(gpu, (treeattn_comm_t **)(void *)((char *)&comm + 1), "comm: found 0x");
  config.setup_timeout_ns = -1;
  BAD(gpu, &comm, "setup_timeout_ns: found -1");
  config.setup_timeout_ns = 0;
  config.nccl_path = "";
  BAD(gpu, &comm, "nccl_path: found");
  config.nccl_path = NULL;
  const int32_t groups[] = {0, 1};
  config.node_groups = groups;
  BAD(gpu, &comm, "node_groups: found");
  config.node_groups = NULL;
  config.struct_size = 4;
  BAD(gpu, &comm, "config.struct_size: found 4");
  config.struct_size = sizeof(config);
  BOTH(TREEATTN_ERROR_UNSUPPORTED, TREEATTN_CPU(0), &comm, "device: found cpu:0");
  /* No machine has as many. */
  BOTH(TREEATTN_ERROR_UNAVAILABLE, gpu, &comm, "cuda:65535");
  treeattn_device_t none = TREEATTN_CUDA(0);
  int32_t count = -1;
  CHECK_OK(treeattn_runtime_device_count(runtime, TREEATTN_DEVICE_CUDA, &count));
  config.nccl_path = "/nowhere/libnccl.so.2";
  BOTH(TREEATTN_ERROR_UNAVAILABLE, none, &comm, count > 0 ? "/nowhere/libnccl.so.2" : "cuda:0");
  CHECK(comm == CHECK_NO_HANDLE(treeattn_comm_t));
}

static void late(void) {
  treeattn_runtime_t *own = runtime_make();
  CHECK_OK(treeattn_runtime_destroy(own));
  uint8_t id[128] = {0};
  CHECK_STATUS(treeattn_nccl_unique_id(own, id), TREEATTN_ERROR_BAD_HANDLE, "runtime: found");
  /* Communicators within the process need no NCCL. */
  treeattn_comm_t *pair[2];
  group_make(runtime, 2, 0, 0, pair);
  CHECK_OK(treeattn_comm_destroy(pair[0]));
  CHECK_OK(treeattn_comm_destroy(pair[1]));
}

int main(void) {
  runtime = runtime_make();
  dead_runtime = runtime_make();
  CHECK_OK(treeattn_runtime_destroy(dead_runtime));
  group_make(runtime, 1, 0, 0, &other);
  unique_ids();
  arguments();
  late();
  CHECK_OK(treeattn_comm_destroy(other));
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("nccl");
}
