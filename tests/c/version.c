/* treeattn_version, treeattn_abi_version, treeattn_status_string, treeattn_last_error_message. */
#include <pthread.h>

#include "check.h"

static void versions(void) {
  char wanted[64];
  snprintf(wanted, sizeof(wanted), "%d.%d.%d", TREEATTN_VERSION_MAJOR, TREEATTN_VERSION_MINOR, TREEATTN_VERSION_PATCH);
  CHECK(strcmp(treeattn_version(), wanted) == 0);
  CHECK(treeattn_abi_version() == TREEATTN_ABI_VERSION);
}

static void status_strings(void) {
  const struct {
    treeattn_status_t code;
    const char *name;
  } all[] = {
      {TREEATTN_OK, "OK"},
      {TREEATTN_ERROR_INVALID_ARGUMENT, "INVALID_ARGUMENT"},
      {TREEATTN_ERROR_BAD_HANDLE, "BAD_HANDLE"},
      {TREEATTN_ERROR_PARENT_DESTROYED, "PARENT_DESTROYED"},
      {TREEATTN_ERROR_UNSUPPORTED, "UNSUPPORTED"},
      {TREEATTN_ERROR_UNAVAILABLE, "UNAVAILABLE"},
      {TREEATTN_ERROR_MISMATCH, "MISMATCH"},
      {TREEATTN_ERROR_DESYNC, "DESYNC"},
      {TREEATTN_ERROR_TIMEOUT, "TIMEOUT"},
      {TREEATTN_ERROR_PEER_LOST, "PEER_LOST"},
      {TREEATTN_ERROR_ABORTED, "ABORTED"},
      {TREEATTN_ERROR_INVALID_DATA, "INVALID_DATA"},
      {TREEATTN_ERROR_NO_MEMORY, "NO_MEMORY"},
      {TREEATTN_ERROR_NO_DEVICE_MEMORY, "NO_DEVICE_MEMORY"},
      {TREEATTN_ERROR_CAPTURING, "CAPTURING"},
      {TREEATTN_ERROR_CUDA, "CUDA"},
      {TREEATTN_ERROR_CUDA_FATAL, "CUDA_FATAL"},
      {TREEATTN_ERROR_CUDA_PRIOR, "CUDA_PRIOR"},
      {TREEATTN_ERROR_NCCL, "NCCL"},
      {TREEATTN_ERROR_TRANSPORT, "TRANSPORT"},
      {TREEATTN_ERROR_SYSTEM, "SYSTEM"},
      {TREEATTN_ERROR_INTERNAL, "INTERNAL"},
      {TREEATTN_ERROR_BUSY, "BUSY"},
      {TREEATTN_ERROR_EXECUTOR, "EXECUTOR"},
      {-1, "UNKNOWN"},
      {TREEATTN_ERROR_EXECUTOR + 1, "UNKNOWN"},
      {INT32_MAX, "UNKNOWN"},
      {INT32_MIN, "UNKNOWN"},
  };
  for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
    CHECK(strcmp(treeattn_status_string(all[i].code), all[i].name) == 0);
  }
}

static void *fresh_thread(void *first_is_empty) {
  *(int *)first_is_empty = treeattn_last_error_message()[0] == '\0';
  treeattn_runtime_create(NULL, NULL);
  return NULL;
}

static void messages_are_per_thread(void) {
  CHECK(treeattn_last_error_message() != NULL && treeattn_last_error_message()[0] == '\0');
  CHECK(treeattn_runtime_destroy(NULL) == TREEATTN_OK);
  CHECK(treeattn_last_error_message()[0] == '\0');
  CHECK_STATUS(treeattn_runtime_destroy((treeattn_runtime_t *)(uintptr_t)7), TREEATTN_ERROR_BAD_HANDLE, "runtime: found 0x7");
  char before[512];
  snprintf(before, sizeof(before), "%s", treeattn_last_error_message());
  pthread_t thread;
  int first_is_empty = 0;
  CHECK(pthread_create(&thread, NULL, fresh_thread, &first_is_empty) == 0);
  CHECK(pthread_join(thread, NULL) == 0);
  CHECK(first_is_empty);
  /* Neither another thread's failure nor a call that works takes the message away. */
  CHECK(treeattn_runtime_destroy(NULL) == TREEATTN_OK);
  CHECK(strcmp(before, treeattn_last_error_message()) == 0);
}

int main(void) {
  messages_are_per_thread();
  versions();
  status_strings();
  return check_report("version");
}
