/*
 * treeattn_runtime_create, _destroy, _device_count, _device_info, _set_log_callback; treeattn_stream_create,
 * _wrap_cuda, _synchronize, _destroy; treeattn_buffer_alloc, _data, _upload, _download, _destroy.
 */
#include <pthread.h>
#include <time.h>

#include "problem.h"

static treeattn_runtime_t *runtime;
static treeattn_runtime_t *dead;
static treeattn_comm_t *comm;

static void runtimes(void) {
  treeattn_runtime_t *made = CHECK_NO_HANDLE(treeattn_runtime_t);
  struct {
    treeattn_runtime_config_t known;
    unsigned char tail[16];
  } longer;
  memset(&longer, 0, sizeof(longer));
  longer.known.struct_size = sizeof(longer);
  CHECK_INVALID(treeattn_runtime_create(NULL, NULL), "runtime: found NULL");
  CHECK_INVALID(treeattn_runtime_create(NULL, (treeattn_runtime_t **)(void *)((char *)&longer + 1)),
                "runtime: found 0x");
  CHECK_INVALID(treeattn_runtime_create((treeattn_runtime_config_t *)(void *)((char *)&longer + 4), &made),
                "config: found 0x");
  longer.tail[0] = 1;
  CHECK_INVALID(treeattn_runtime_create(&longer.known, &made), "config.struct_size: found 32 with byte 16 set");
  longer.tail[0] = 0;
  const size_t bad[] = {0, 3, (size_t)1 << 40, SIZE_MAX};
  for (int i = 0; i < 4; i++) {
    longer.known.struct_size = bad[i];
    CHECK_INVALID(treeattn_runtime_create(&longer.known, &made), "config.struct_size: found");
  }
  longer.known.struct_size = sizeof(longer);
  longer.known.cpu_isa = "sse9";
  CHECK_INVALID(treeattn_runtime_create(&longer.known, &made), "cpu_isa: found");
  longer.known.cpu_isa = "\xff\xfe";
  CHECK_INVALID(treeattn_runtime_create(&longer.known, &made), "cpu_isa: found");
#if defined(__x86_64__)
  longer.known.cpu_isa = "neon";
#else
  longer.known.cpu_isa = "avx2";
#endif
  CHECK_STATUS(treeattn_runtime_create(&longer.known, &made), TREEATTN_ERROR_UNAVAILABLE, "cpu_isa");
  CHECK(made == CHECK_NO_HANDLE(treeattn_runtime_t));

  longer.known.cpu_isa = "scalar";
  CHECK_OK(treeattn_runtime_create(&longer.known, &made));
  treeattn_device_info_t info = TREEATTN_DEVICE_INFO_INIT;
  CHECK_OK(treeattn_runtime_device_info(made, TREEATTN_CPU(0), &info));
  CHECK(strstr(info.isa, "scalar") != NULL);
  CHECK_OK(treeattn_runtime_destroy(made));
  longer.known.struct_size = sizeof(&longer.known);
  CHECK_INVALID(treeattn_runtime_create(&longer.known, &made), "config.struct_size: found 8, which is that of a pointer");
  CHECK_OK(treeattn_runtime_destroy(NULL));
  CHECK_BAD_HANDLES(treeattn_runtime_t, 1, dead, comm, "runtime: found", treeattn_runtime_destroy(handle));
}

static void devices(void) {
  int32_t count = -7;
  CHECK_OK(treeattn_runtime_device_count(runtime, TREEATTN_DEVICE_CPU, &count));
  CHECK(count == 1);
  CHECK_OK(treeattn_runtime_device_count(runtime, TREEATTN_DEVICE_CUDA, &count));
  CHECK(count >= 0);
  count = -7;
  const int32_t kinds[] = {-1, 2, INT32_MAX, INT32_MIN};
  for (int i = 0; i < 4; i++) {
    CHECK_INVALID(treeattn_runtime_device_count(runtime, kinds[i], &count), "kind: found");
  }
  CHECK_INVALID(treeattn_runtime_device_count(runtime, 0, NULL), "count: found NULL");
  CHECK_INVALID(treeattn_runtime_device_count(runtime, 0, (int32_t *)(void *)((char *)&count + 1)), "count: found 0x");
  CHECK_BAD_HANDLES(treeattn_runtime_t, 0, dead, comm, "runtime: found",
                    treeattn_runtime_device_count(handle, 0, &count));
  CHECK(count == -7);

  treeattn_device_info_t info = TREEATTN_DEVICE_INFO_INIT;
  CHECK_OK(treeattn_runtime_device_info(runtime, TREEATTN_CPU(0), &info));
  CHECK(info.struct_size == sizeof(info) && info.device == TREEATTN_CPU(0) && info.units >= 1);
  CHECK(info.memory > 1 << 20 && info.name[0] != '\0' && info.isa[0] != '\0');
  CHECK(memchr(info.name, 0, sizeof(info.name)) != NULL && memchr(info.isa, 0, sizeof(info.isa)) != NULL);

  struct {
    size_t struct_size;
    unsigned char rest[600];
  } raw;
  check_fill(&raw, sizeof(raw));
  raw.struct_size = sizeof(raw);
  treeattn_device_info_t *into = (treeattn_device_info_t *)(void *)&raw;
  CHECK_INVALID(treeattn_runtime_device_info(runtime, TREEATTN_CPU(1), into), "device: found cpu:1");
  CHECK_INVALID(treeattn_runtime_device_info(runtime, -1, into), "device: found -1");
  CHECK_INVALID(treeattn_runtime_device_info(runtime, INT32_MIN, into), "device: found");
  CHECK_INVALID(treeattn_runtime_device_info(runtime, TREEATTN_DEVICE(2, 0), into), "device: found 131072");
  CHECK_STATUS(treeattn_runtime_device_info(runtime, TREEATTN_CUDA(65535), into), TREEATTN_ERROR_UNAVAILABLE,
               "libcuda");
  CHECK_INVALID(treeattn_runtime_device_info(runtime, TREEATTN_CPU(0), NULL), "info: found NULL");
  CHECK_INVALID(treeattn_runtime_device_info(runtime, 0, (treeattn_device_info_t *)(void *)(raw.rest + 1)),
                "info: found 0x");
  const size_t bad[] = {0, 7, (size_t)1 << 32, SIZE_MAX};
  for (int i = 0; i < 4; i++) {
    raw.struct_size = bad[i];
    CHECK_INVALID(treeattn_runtime_device_info(runtime, 0, into), "info.struct_size: found");
  }
  CHECK_BAD_HANDLES(treeattn_runtime_t, 0, dead, comm, "runtime: found",
                    treeattn_runtime_device_info(handle, 0, into));
  raw.struct_size = 16;
  CHECK_INVALID(treeattn_runtime_device_info(runtime, TREEATTN_CPU(0), into), "info.struct_size: found 16");
  CHECK(raw.struct_size == 16 && check_untouched(raw.rest, sizeof(raw.rest)));
}

/* A flag between threads. */
typedef struct {
  pthread_mutex_t mutex;
  pthread_cond_t raised;
  int is_raised;
} flag_t;

static void flag_init(flag_t *flag) {
  CHECK(pthread_mutex_init(&flag->mutex, NULL) == 0 && pthread_cond_init(&flag->raised, NULL) == 0);
  flag->is_raised = 0;
}

static void flag_raise(flag_t *flag) {
  pthread_mutex_lock(&flag->mutex);
  flag->is_raised = 1;
  pthread_cond_broadcast(&flag->raised);
  pthread_mutex_unlock(&flag->mutex);
}

static int flag_is_raised(flag_t *flag) {
  pthread_mutex_lock(&flag->mutex);
  const int is_raised = flag->is_raised;
  pthread_mutex_unlock(&flag->mutex);
  return is_raised;
}

static void flag_wait(flag_t *flag) {
  pthread_mutex_lock(&flag->mutex);
  while (!flag->is_raised) {
    pthread_cond_wait(&flag->raised, &flag->mutex);
  }
  pthread_mutex_unlock(&flag->mutex);
}

static void flag_free(flag_t *flag) {
  pthread_cond_destroy(&flag->raised);
  pthread_mutex_destroy(&flag->mutex);
}

typedef struct {
  int lines;
  treeattn_log_level_t level;
  char last[512];
} log_t;

static void on_log(treeattn_log_level_t level, const char *message, void *user_data) {
  log_t *log = user_data;
  log->lines++;
  log->level = level;
  snprintf(log->last, sizeof(log->last), "%s", message);
}

static void logging(void) {
  log_t log = {0, 0, ""}, second = {0, 0, ""};
  treeattn_comm_t *made[2];
  treeattn_runtime_t *own = runtime_make();
  CHECK_OK(treeattn_runtime_set_log_callback(own, on_log, &log));
  group_make(own, 2, 0, 0, made);
  CHECK(log.lines >= 1 && log.level == TREEATTN_LOG_INFO && strstr(log.last, "2 ranks") != NULL);
  CHECK_OK(treeattn_runtime_set_log_callback(own, on_log, &second));
  int before = log.lines;
  treeattn_comm_t *third = NULL;
  group_make(own, 1, 0, 0, &third);
  CHECK(log.lines == before && second.lines >= 1);
  CHECK_OK(treeattn_runtime_set_log_callback(own, NULL, NULL));
  before = second.lines;
  CHECK_OK(treeattn_comm_destroy(third));
  group_make(own, 1, 0, 0, &third);
  CHECK(second.lines == before);
  CHECK_BAD_HANDLES(treeattn_runtime_t, 0, dead, comm, "runtime: found",
                    treeattn_runtime_set_log_callback(handle, on_log, &log));
  CHECK_OK(treeattn_comm_destroy(made[0]));
  CHECK_OK(treeattn_comm_destroy(made[1]));
  CHECK_OK(treeattn_comm_destroy(third));
  CHECK_OK(treeattn_runtime_destroy(own));
}

/* What was chosen is logged when a plan is made, what went wrong where it did, and once. */
static void logging_of_plans_and_failures(void) {
  log_t log = {0, 0, ""};
  float values[4] = {1, 2, 3, 4}, out[2] = {0, 0};
  int32_t length = 1;
  treeattn_runtime_t *own = NULL;
  treeattn_comm_t *comms[2] = {NULL, NULL};
  treeattn_plan_t *plans[2] = {NULL, NULL};
  treeattn_device_t devices[2] = {TREEATTN_CPU(0), TREEATTN_CPU(0)};
  treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
  treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
  treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
  config.step_timeout_ns = 20 * 1000 * 1000;
  desc.q_heads = desc.kv_heads = 1;
  desc.head_dim_qk = desc.head_dim_v = 2;
  desc.q_dtype = desc.k_dtype = desc.v_dtype = desc.out_dtype = TREEATTN_DTYPE_F32;
  desc.max_batch = desc.max_query_tokens = desc.max_kv_length = 1;
  CHECK_OK(treeattn_runtime_create(NULL, &own));
  CHECK_OK(treeattn_runtime_set_log_callback(own, on_log, &log));
  CHECK_OK(treeattn_comm_create_local(own, 2, devices, &config, comms));
  CHECK_OK(treeattn_plan_create_all(2, comms, &desc, plans));
  CHECK(log.level == TREEATTN_LOG_INFO && strstr(log.last, "plan 1 on rank 1: ONE_SHOT, ") != NULL);
  args.batch = args.query_tokens = 1;
  args.q.data = args.k.data = args.v.data = values;
  args.q.bytes = args.k.bytes = args.v.bytes = 2 * sizeof(float);
  args.out.data = out;
  args.out.bytes = sizeof(out);
  args.kv_length = &length;
  CHECK_STATUS(treeattn_plan_decode(plans[0], &args, NULL), TREEATTN_ERROR_TIMEOUT, "rank 1 did not come");
  CHECK(log.level == TREEATTN_LOG_ERROR && strstr(log.last, "rank 1 did not come within 20ms") != NULL);
  int before = log.lines;
  CHECK_STATUS(treeattn_plan_decode(plans[0], &args, NULL), TREEATTN_ERROR_TIMEOUT, "rank 1 did not come");
  CHECK(log.lines == before);
  for (int r = 0; r < 2; r++) {
    CHECK_OK(treeattn_plan_destroy(plans[r]));
    CHECK_OK(treeattn_comm_destroy(comms[r]));
  }
  CHECK_OK(treeattn_runtime_destroy(own));
}

/* A step whose bad data is logged from a stream's thread, behind a step that waits for a rank that never comes. */
typedef struct {
  treeattn_runtime_t *runtime;
  treeattn_comm_t *comms[2];
  treeattn_plan_t *plans[2];
  treeattn_stream_t *stream;
  shard_t good;
  shard_t bad;
} logger_t;

static void logger_make(logger_t *made, treeattn_log_callback_t callback, void *user_data) {
  problem_t problem;
  treeattn_attention_desc_t desc = problem_desc();
  problem_make(&problem, 12);
  made->runtime = runtime_make();
  group_make(made->runtime, 2, 60000, 0, made->comms);
  CHECK_OK(treeattn_plan_create_all(2, made->comms, &desc, made->plans));
  CHECK_OK(treeattn_stream_create(made->runtime, TREEATTN_CPU(0), &made->stream));
  shard_make(&made->good, &problem, 2, 0);
  shard_make(&made->bad, &problem, 2, 0);
  made->bad.kv_length[0] = MAX_LENGTH + 1;
  CHECK_OK(treeattn_runtime_set_log_callback(made->runtime, callback, user_data));
  CHECK_OK(treeattn_plan_decode(made->plans[0], &made->good.args, made->stream));
  CHECK_OK(treeattn_plan_partial(made->plans[0], &made->bad.args, made->stream));
}

static void logger_free(logger_t *made) {
  /* Rank 1 leaves, which ends the first step; then the second runs and finds its bad data. */
  CHECK_OK(treeattn_plan_destroy(made->plans[1]));
  CHECK_OK(treeattn_comm_destroy(made->comms[1]));
  CHECK_OK(treeattn_stream_destroy(made->stream));
  CHECK(sequence_is_nan(&made->bad.outputs, 0));
  CHECK_OK(treeattn_plan_destroy(made->plans[0]));
  CHECK_OK(treeattn_comm_destroy(made->comms[0]));
}

static void logging_ends_with_the_runtime(void) {
  static logger_t with_log, without_log;
  log_t log = {0, 0, ""};
  /* It is logged while the runtime lives. */
  logger_make(&with_log, on_log, &log);
  logger_free(&with_log);
  CHECK(log.lines >= 1 && strstr(log.last, "kv_length") != NULL);
  CHECK_OK(treeattn_runtime_destroy(with_log.runtime));
  /* And not after it. */
  logger_make(&without_log, on_log, &log);
  CHECK_OK(treeattn_runtime_destroy(without_log.runtime));
  const int before = log.lines;
  logger_free(&without_log);
  CHECK(log.lines == before);
}

typedef struct {
  flag_t entered;
  flag_t left;
} slow_log_t;

static void on_slow_log(treeattn_log_level_t level, const char *message, void *user_data) {
  slow_log_t *log = user_data;
  const struct timespec pause = {0, 200000000};
  (void)level;
  (void)message;
  flag_raise(&log->entered);
  nanosleep(&pause, NULL);
  flag_raise(&log->left);
}

typedef struct {
  slow_log_t log;
  treeattn_runtime_t *runtime;
  int destroy;
  treeattn_status_t status;
  int had_left;
} ender_t;

static void *end_logging(void *at) {
  ender_t *ender = at;
  flag_wait(&ender->log.entered);
  ender->status = ender->destroy ? treeattn_runtime_destroy(ender->runtime)
                                 : treeattn_runtime_set_log_callback(ender->runtime, NULL, NULL);
  ender->had_left = flag_is_raised(&ender->log.left);
  return NULL;
}

/* Destroying the runtime, or setting another callback, waits for a call that is under way. */
static void logging_is_waited_for(int destroy) {
  static logger_t made;
  ender_t ender;
  pthread_t thread;
  flag_init(&ender.log.entered);
  flag_init(&ender.log.left);
  logger_make(&made, on_slow_log, &ender.log);
  ender.runtime = made.runtime;
  ender.destroy = destroy;
  CHECK(pthread_create(&thread, NULL, end_logging, &ender) == 0);
  logger_free(&made);
  CHECK(pthread_join(thread, NULL) == 0);
  CHECK(ender.status == TREEATTN_OK && ender.had_left);
  if (!destroy) {
    CHECK_OK(treeattn_runtime_destroy(made.runtime));
  }
  flag_free(&ender.log.entered);
  flag_free(&ender.log.left);
}

static void streams(void) {
  treeattn_stream_t *made = CHECK_NO_HANDLE(treeattn_stream_t);
  CHECK_INVALID(treeattn_stream_create(runtime, TREEATTN_CPU(0), NULL), "stream: found NULL");
  CHECK_INVALID(treeattn_stream_create(runtime, 0, (treeattn_stream_t **)(void *)((char *)&made + 2)),
                "stream: found 0x");
  CHECK_INVALID(treeattn_stream_create(runtime, TREEATTN_CPU(1), &made), "device: found cpu:1");
  CHECK_INVALID(treeattn_stream_create(runtime, INT32_MAX, &made), "device: found 2147483647");
  CHECK_INVALID(treeattn_stream_create(runtime, -5, &made), "device: found -5");
  CHECK_STATUS(treeattn_stream_create(runtime, TREEATTN_CUDA(65535), &made), TREEATTN_ERROR_UNAVAILABLE, "device");
  CHECK_BAD_HANDLES(treeattn_runtime_t, 0, dead, comm, "runtime: found", treeattn_stream_create(handle, 0, &made));
  CHECK_INVALID(treeattn_stream_wrap_cuda(runtime, TREEATTN_CUDA(0), NULL, NULL), "stream: found NULL");
  CHECK_INVALID(treeattn_stream_wrap_cuda(runtime, TREEATTN_CPU(0), NULL, &made), "device: found cpu:0");
  CHECK_INVALID(treeattn_stream_wrap_cuda(runtime, -5, NULL, &made), "device: found -5");
  CHECK_STATUS(treeattn_stream_wrap_cuda(runtime, TREEATTN_CUDA(65535), NULL, &made), TREEATTN_ERROR_UNAVAILABLE,
               "libcuda.so.1");
  CHECK_BAD_HANDLES(treeattn_runtime_t, 0, dead, comm, "runtime: found",
                    treeattn_stream_wrap_cuda(handle, TREEATTN_CUDA(0), NULL, &made));
  CHECK(made == CHECK_NO_HANDLE(treeattn_stream_t));
  CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &made));
  CHECK_OK(treeattn_stream_synchronize(made));
  CHECK_OK(treeattn_stream_synchronize(made));
  treeattn_stream_t *gone = NULL;
  CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &gone));
  CHECK_OK(treeattn_stream_destroy(gone));
  CHECK_OK(treeattn_stream_destroy(NULL));
  CHECK_BAD_HANDLES(treeattn_stream_t, 0, gone, runtime, "stream: found", treeattn_stream_synchronize(handle));
  CHECK_BAD_HANDLES(treeattn_stream_t, 1, gone, runtime, "stream: found", treeattn_stream_destroy(handle));
  CHECK_OK(treeattn_stream_destroy(made));
}

static void buffers(void) {
  treeattn_buffer_t *made = CHECK_NO_HANDLE(treeattn_buffer_t);
  CHECK_INVALID(treeattn_buffer_alloc(runtime, 0, 64, NULL), "buffer: found NULL");
  CHECK_INVALID(treeattn_buffer_alloc(runtime, 0, 64, (treeattn_buffer_t **)(void *)((char *)&made + 1)),
                "buffer: found 0x");
  CHECK_INVALID(treeattn_buffer_alloc(runtime, 0, 0, &made), "bytes: found 0");
  CHECK_INVALID(treeattn_buffer_alloc(runtime, TREEATTN_CPU(3), 64, &made), "device: found cpu:3");
  CHECK_INVALID(treeattn_buffer_alloc(runtime, -1, 64, &made), "device: found -1");
  CHECK_STATUS(treeattn_buffer_alloc(runtime, TREEATTN_CUDA(65535), 64, &made), TREEATTN_ERROR_UNAVAILABLE, "device");
  const size_t too_many[] = {SIZE_MAX, SIZE_MAX - 63, SIZE_MAX / 2, (size_t)1 << 60};
  for (int i = 0; i < 4; i++) {
    CHECK_STATUS(treeattn_buffer_alloc(runtime, 0, too_many[i], &made), TREEATTN_ERROR_NO_MEMORY, "bytes wanted");
  }
  CHECK_BAD_HANDLES(treeattn_runtime_t, 0, dead, comm, "runtime: found", treeattn_buffer_alloc(handle, 0, 64, &made));
  CHECK(made == CHECK_NO_HANDLE(treeattn_buffer_t));

  unsigned char text[100], back[100 + 2 * GUARD_BYTES];
  for (size_t i = 0; i < sizeof(text); i++) {
    text[i] = (unsigned char)(i + 1);
  }
  CHECK_OK(treeattn_buffer_alloc(runtime, TREEATTN_CPU(0), 100, &made));
  void *data = NULL;
  CHECK_OK(treeattn_buffer_data(made, &data));
  CHECK(data != NULL && (uintptr_t)data % 64 == 0);
  for (size_t i = 0; i < 100; i++) {
    CHECK(((unsigned char *)data)[i] == 0);
  }
  CHECK_OK(treeattn_buffer_upload(made, 0, text, 100));
  CHECK(memcmp(data, text, 100) == 0);
  CHECK_OK(treeattn_buffer_upload(made, 90, text, 10));
  check_fill(back, sizeof(back));
  CHECK_OK(treeattn_buffer_download(made, 80, back + GUARD_BYTES, 20));
  CHECK(memcmp(back + GUARD_BYTES, text + 80, 10) == 0 && memcmp(back + GUARD_BYTES + 10, text, 10) == 0);
  CHECK(check_untouched(back, GUARD_BYTES) && check_untouched(back + GUARD_BYTES + 20, 80 + GUARD_BYTES));
  CHECK_OK(treeattn_buffer_upload(made, 100, NULL, 0));
  CHECK_OK(treeattn_buffer_download(made, 0, NULL, 0));

  /* Ranges that leave the buffer: nothing moves. */
  memcpy(text, data, 100);
  check_fill(back, sizeof(back));
  const struct {
    size_t offset, bytes;
  } ranges[] = {{0, 101},        {1, 100},        {100, 1},           {101, 0},
                {SIZE_MAX, 1},   {1, SIZE_MAX},   {SIZE_MAX, SIZE_MAX}, {SIZE_MAX - 5, 10}};
  for (int i = 0; i < 8; i++) {
    CHECK_INVALID(treeattn_buffer_upload(made, ranges[i].offset, back, ranges[i].bytes), "offset, bytes: found");
    CHECK_INVALID(treeattn_buffer_download(made, ranges[i].offset, back, ranges[i].bytes), "offset, bytes: found");
  }
  CHECK_INVALID(treeattn_buffer_upload(made, 0, NULL, 10), "source: found NULL");
  CHECK_INVALID(treeattn_buffer_download(made, 0, NULL, 10), "target: found NULL");
  treeattn_buffer_t *gone = NULL;
  CHECK_OK(treeattn_buffer_alloc(runtime, 0, 1, &gone));
  CHECK_OK(treeattn_buffer_destroy(gone));
  CHECK_OK(treeattn_buffer_destroy(NULL));
  CHECK_BAD_HANDLES(treeattn_buffer_t, 0, gone, comm, "buffer: found", treeattn_buffer_upload(handle, 0, back, 1));
  CHECK_BAD_HANDLES(treeattn_buffer_t, 0, gone, comm, "buffer: found", treeattn_buffer_download(handle, 0, back, 1));
  void *address = back;
  CHECK_BAD_HANDLES(treeattn_buffer_t, 0, gone, comm, "buffer: found", treeattn_buffer_data(handle, &address));
  CHECK_INVALID(treeattn_buffer_data(made, NULL), "data: found NULL");
  CHECK_INVALID(treeattn_buffer_data(made, (void **)(void *)((char *)&data + 3)), "data: found 0x");
  CHECK_BAD_HANDLES(treeattn_buffer_t, 1, gone, comm, "buffer: found", treeattn_buffer_destroy(handle));
  CHECK(address == (void *)back && check_untouched(back, sizeof(back)) && memcmp(data, text, 100) == 0);
  CHECK_OK(treeattn_buffer_destroy(made));
}

/* Parents may go first. */
static void orphans(void) {
  treeattn_runtime_t *own = runtime_make();
  treeattn_stream_t *stream = NULL;
  treeattn_buffer_t *buffer = NULL;
  CHECK_OK(treeattn_stream_create(own, TREEATTN_CPU(0), &stream));
  CHECK_OK(treeattn_buffer_alloc(own, TREEATTN_CPU(0), 8, &buffer));
  CHECK_OK(treeattn_runtime_destroy(own));
  char bytes[8] = "";
  void *data = bytes;
  CHECK_PARENT_DESTROYED(treeattn_buffer_data(buffer, &data), "runtime: found destroyed");
  CHECK(data == (void *)bytes);
  CHECK_OK(treeattn_stream_synchronize(stream));
  CHECK_PARENT_DESTROYED(treeattn_buffer_upload(buffer, 0, bytes, 8), "runtime: found destroyed");
  CHECK_PARENT_DESTROYED(treeattn_buffer_download(buffer, 0, bytes, 8), "runtime: found destroyed");
  CHECK_STATUS(treeattn_runtime_set_log_callback(own, NULL, NULL), TREEATTN_ERROR_BAD_HANDLE, "runtime: found");
  CHECK_OK(treeattn_stream_destroy(stream));
  CHECK_OK(treeattn_buffer_destroy(buffer));
}

int main(void) {
  runtime = runtime_make();
  dead = runtime_make();
  CHECK_OK(treeattn_runtime_destroy(dead));
  group_make(runtime, 1, 0, 0, &comm);
  runtimes();
  devices();
  logging();
  logging_of_plans_and_failures();
  logging_ends_with_the_runtime();
  logging_is_waited_for(1);
  logging_is_waited_for(0);
  streams();
  buffers();
  orphans();
  CHECK_OK(treeattn_comm_destroy(comm));
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("runtime");
}
