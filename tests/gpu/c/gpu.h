/*
 * What the C tests on a GPU share: a small step in device memory with its answer, and the calls of the CUDA driver that
 * the library has no words for, looked up at run time, so that no CUDA header is needed to compile them.
 *
 * A program that finds no GPU, or a build without kernels, says so and exits with SKIPPED.
 */
#ifndef TREEATTN_TESTS_GPU_H
#define TREEATTN_TESTS_GPU_H

#include <dlfcn.h>
#include <math.h>
#include <stdlib.h>

#include "../../c/check.h"

enum {
  SKIPPED = 77,
  BATCH = 2,
  Q_HEADS = 4,
  KV_HEADS = 2,
  DIM = 64,
  MAX_LENGTH = 48,
  PAGE = 8,
  PAGES = BATCH * MAX_LENGTH / PAGE,
  INTS = 64
};

static const int32_t LENGTHS[BATCH] = {MAX_LENGTH, 5};

/* Calls of the driver. Handles are pointers, statuses 0 where all is well. */
typedef int (*driver_begin_t)(void *stream, int mode);
typedef int (*driver_end_t)(void *stream, void **graph);
typedef int (*driver_make_t)(void **made, unsigned flags);
typedef int (*driver_one_t)(void *object);
typedef int (*driver_module_t)(void **module, const void *image);
typedef int (*driver_function_t)(void **function, void *module, const char *name);
typedef int (*driver_launch_t)(void *function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                               void *stream, void **arguments, void **extra);
typedef int (*driver_retain_t)(void **context, int device);
typedef int (*driver_instantiate_t)(void **exec, void *graph, unsigned long long flags);
typedef int (*driver_replay_t)(void *exec, void *stream);
typedef int (*driver_host_t)(void **data, size_t bytes, unsigned flags);

/* A function of the driver; POSIX lets an object pointer hold it. */
#define DRIVER(type, name) (*(type *)(void *)&(void *){driver_symbol(name)})

static inline void *driver_symbol(const char *name) {
  static void *library;
  if (library == NULL) {
    library = dlopen("libcuda.so.1", RTLD_NOW);
  }
  void *found = library == NULL ? NULL : dlsym(library, name);
  if (found == NULL) {
    printf("libcuda.so.1: no %s\n", name);
    exit(1);
  }
  return found;
}

static inline void driver_ok(int status, const char *call, int line) {
  if (status != 0) {
    printf("line %d: %s gave %d\n", line, call, status);
    exit(1);
  }
}
#define DRIVER_OK(call) driver_ok((call), #call, __LINE__)

/* Makes the primary context of GPU 0 current on this thread, as an engine has it. */
static inline void driver_enter(void) {
  void *context = NULL;
  DRIVER_OK(DRIVER(driver_retain_t, "cuDevicePrimaryCtxRetain")(&context, 0));
  DRIVER_OK(DRIVER(driver_one_t, "cuCtxPushCurrent_v2")(context));
}

static inline void *driver_stream(void) {
  void *stream = NULL;
  DRIVER_OK(DRIVER(driver_make_t, "cuStreamCreate")(&stream, 1));
  return stream;
}

/* The objects of a test, and a step over them: f16, keys all zero, so that every output is the mean of the values. */
static treeattn_runtime_t *runtime;
static treeattn_comm_t *comm;
static treeattn_plan_t *plan;
static treeattn_stream_t *stream;
static treeattn_buffer_t *buffer;
static treeattn_decode_args_t step;

enum {
  Q_BYTES = BATCH * Q_HEADS * DIM * 2,
  K_BYTES = BATCH * MAX_LENGTH * KV_HEADS * DIM * 2,
  OUT_BYTES = BATCH * Q_HEADS * DIM * 4,
  LSE_BYTES = BATCH * Q_HEADS * 4,
  /* The outputs lie between guard bytes; everything is at multiples of 256. */
  Q_AT = 0,
  K_AT = Q_AT + 2048,
  V_AT = K_AT + K_BYTES,
  OUTPUTS_AT = V_AT + K_BYTES,
  OUT_AT = OUTPUTS_AT + 256,
  LSE_AT = OUT_AT + OUT_BYTES + 256,
  OUTPUTS_END = LSE_AT + 512,
  LENGTH_AT = OUTPUTS_END,
  TABLE_AT = LENGTH_AT + 256,
  START_AT = TABLE_AT + 256,
  TOTAL = START_AT + 256
};

static inline void *device_at(size_t at) {
  void *data = NULL;
  CHECK_OK(treeattn_buffer_data(buffer, &data));
  return (unsigned char *)data + at;
}

static inline treeattn_tensor_t tensor_at(size_t at, size_t bytes) {
  treeattn_tensor_t t = {NULL, 0, {0, 0, 0, 0}};
  t.data = device_at(at);
  t.bytes = bytes;
  return t;
}

static inline void put_ints(size_t at, const int32_t *values, size_t count) {
  CHECK_OK(treeattn_buffer_upload(buffer, at, values, count * sizeof(*values)));
}

/* Whole numbers from 0 to 15 in f16. */
static inline uint16_t half_of(int number) {
  int exponent = 0;
  if (number == 0) {
    return 0;
  }
  while (number >> (exponent + 1) != 0) {
    exponent++;
  }
  return (uint16_t)((exponent + 15) << 10 | (number << (10 - exponent) & 0x3ff));
}

static inline int value_of(int b, int token, int head, int d) { return (b + 3 * token + 5 * head + 7 * d) % 16; }

static inline treeattn_attention_desc_t gpu_desc(void) {
  treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
  desc.q_heads = Q_HEADS;
  desc.kv_heads = KV_HEADS;
  desc.head_dim_qk = DIM;
  desc.head_dim_v = DIM;
  desc.q_dtype = TREEATTN_DTYPE_F16;
  desc.k_dtype = TREEATTN_DTYPE_F16;
  desc.v_dtype = TREEATTN_DTYPE_F16;
  desc.out_dtype = TREEATTN_DTYPE_F32;
  desc.max_batch = BATCH;
  desc.max_query_tokens = BATCH;
  desc.max_kv_length = MAX_LENGTH;
  return desc;
}

/* Ends the program where there is nothing to test on. */
static inline void gpu_find(const char *name) {
  int32_t count = 0;
  treeattn_attention_desc_t desc = gpu_desc();
  treeattn_device_t device = TREEATTN_CUDA(0);
  CHECK_OK(treeattn_runtime_create(NULL, &runtime));
  CHECK_OK(treeattn_runtime_device_count(runtime, TREEATTN_DEVICE_CUDA, &count));
  if (count == 0) {
    printf("%s: skipped, no GPU\n", name);
    exit(SKIPPED);
  }
  CHECK_OK(treeattn_comm_create_local(runtime, 1, &device, NULL, &comm));
  if (treeattn_plan_create(comm, &desc, &plan) == TREEATTN_ERROR_UNAVAILABLE) {
    printf("%s: skipped, %s\n", name, treeattn_last_error_message());
    exit(SKIPPED);
  }
  if (plan == NULL) {
    printf("%s: %s\n", name, treeattn_last_error_message());
    exit(1);
  }
}

/* The step's memory and arguments. */
static inline void gpu_make(void) {
  static uint16_t q[BATCH][Q_HEADS][DIM], k[BATCH][MAX_LENGTH][KV_HEADS][DIM], v[BATCH][MAX_LENGTH][KV_HEADS][DIM];
  int32_t table[PAGES];
  CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CUDA(0), &stream));
  CHECK_OK(treeattn_buffer_alloc(runtime, TREEATTN_CUDA(0), TOTAL, &buffer));
  for (int b = 0; b < BATCH; b++) {
    for (int h = 0; h < Q_HEADS; h++) {
      for (int d = 0; d < DIM; d++) {
        q[b][h][d] = half_of(1);
      }
    }
    for (int j = 0; j < MAX_LENGTH; j++) {
      for (int g = 0; g < KV_HEADS; g++) {
        for (int d = 0; d < DIM; d++) {
          /* What lies past the length is NaN. */
          k[b][j][g][d] = j < LENGTHS[b] ? 0 : 0x7e00;
          v[b][j][g][d] = j < LENGTHS[b] ? half_of(value_of(b, j, g, d)) : 0x7e00;
        }
      }
    }
  }
  for (int i = 0; i < PAGES; i++) {
    table[i] = i;
  }
  CHECK_OK(treeattn_buffer_upload(buffer, Q_AT, q, sizeof(q)));
  CHECK_OK(treeattn_buffer_upload(buffer, K_AT, k, sizeof(k)));
  CHECK_OK(treeattn_buffer_upload(buffer, V_AT, v, sizeof(v)));
  put_ints(LENGTH_AT, LENGTHS, BATCH);
  put_ints(TABLE_AT, table, PAGES);
  treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
  args.batch = BATCH;
  args.query_tokens = BATCH;
  args.q = tensor_at(Q_AT, Q_BYTES);
  args.k = tensor_at(K_AT, K_BYTES);
  args.v = tensor_at(V_AT, K_BYTES);
  args.out = tensor_at(OUT_AT, OUT_BYTES);
  args.lse = tensor_at(LSE_AT, LSE_BYTES);
  args.kv_length = (const int32_t *)device_at(LENGTH_AT);
  step = args;
}

/* The outputs and the guard bytes around them. */
static unsigned char outputs[OUTPUTS_END - OUTPUTS_AT];

static inline void outputs_reset(void) {
  check_fill(outputs, sizeof(outputs));
  CHECK_OK(treeattn_buffer_upload(buffer, OUTPUTS_AT, outputs, sizeof(outputs)));
}

static inline void outputs_fetch(void) {
  CHECK_OK(treeattn_stream_synchronize(stream));
  CHECK_OK(treeattn_buffer_download(buffer, OUTPUTS_AT, outputs, sizeof(outputs)));
}

static inline int outputs_untouched(void) {
  outputs_fetch();
  return check_untouched(outputs, sizeof(outputs));
}

static inline float output(size_t at, int b, int h, int d) {
  float x;
  size_t row = (size_t)(b * Q_HEADS + h);
  size_t index = at == OUT_AT ? row * DIM + (size_t)d : row;
  memcpy(&x, outputs + (at - OUTPUTS_AT) + 4 * index, sizeof(x));
  return x;
}

static inline int outputs_guarded(void) {
  return check_untouched(outputs, OUT_AT - OUTPUTS_AT) &&
         check_untouched(outputs + (OUT_AT + OUT_BYTES - OUTPUTS_AT), LSE_AT - OUT_AT - OUT_BYTES) &&
         check_untouched(outputs + (LSE_AT + LSE_BYTES - OUTPUTS_AT), OUTPUTS_END - LSE_AT - LSE_BYTES);
}

/* Whether sequence b of the outputs that were fetched is right; `keys` of it count. */
static inline int sequence_is_right(int b, int keys) {
  for (int h = 0; h < Q_HEADS; h++) {
    for (int d = 0; d < DIM; d++) {
      int sum = 0;
      for (int j = 0; j < keys; j++) {
        sum += value_of(b, j, h / (Q_HEADS / KV_HEADS), d);
      }
      if (fabs((double)output(OUT_AT, b, h, d) - (double)sum / keys) > 1e-5) {
        return 0;
      }
    }
    if (fabs((double)output(LSE_AT, b, h, 0) - log(keys)) > 1e-5) {
      return 0;
    }
  }
  return 1;
}

static inline int sequence_is_nan(int b) {
  for (int h = 0; h < Q_HEADS; h++) {
    for (int d = 0; d < DIM; d++) {
      if (!isnan(output(OUT_AT, b, h, d))) {
        return 0;
      }
    }
    if (!isnan(output(LSE_AT, b, h, 0))) {
      return 0;
    }
  }
  return 1;
}

/* The step is right, and nothing around its outputs is written. */
static inline int step_is_right(void) {
  outputs_reset();
  CHECK_OK(treeattn_plan_decode(plan, &step, stream));
  outputs_fetch();
  return sequence_is_right(0, LENGTHS[0]) && sequence_is_right(1, LENGTHS[1]) && outputs_guarded();
}

#endif
