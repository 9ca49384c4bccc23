/*
 * Bad input on a GPU: each gets its status and a message that names the argument, the value found and the value wanted;
 * nothing is written, and the next good step is right.
 */
#include "gpu.h"

static treeattn_runtime_t *dead_runtime;
static treeattn_plan_t *dead_plan;

static void refused_with(const treeattn_decode_args_t *args, treeattn_status_t status, const char *text) {
  outputs_reset();
  CHECK_STATUS(treeattn_plan_decode(plan, args, stream), status, text);
  CHECK_STATUS(treeattn_plan_partial(plan, args, stream), status, text);
  CHECK(outputs_untouched());
}

static void refused(treeattn_decode_args_t args, const char *text) {
  refused_with(&args, TREEATTN_ERROR_INVALID_ARGUMENT, text);
}

static const struct {
  const char *name;
  size_t offset;
} TENSORS[] = {
    {"q", offsetof(treeattn_decode_args_t, q)},     {"k", offsetof(treeattn_decode_args_t, k)},
    {"v", offsetof(treeattn_decode_args_t, v)},     {"out", offsetof(treeattn_decode_args_t, out)},
    {"lse", offsetof(treeattn_decode_args_t, lse)},
};

static const struct {
  const char *name;
  size_t offset;
} ARRAYS[] = {
    {"kv_length", offsetof(treeattn_decode_args_t, kv_length)},
    {"query_start", offsetof(treeattn_decode_args_t, query_start)},
    {"global_length", offsetof(treeattn_decode_args_t, global_length)},
    {"kv_start", offsetof(treeattn_decode_args_t, kv_start)},
    {"kv_position", offsetof(treeattn_decode_args_t, kv_position)},
    {"query_position", offsetof(treeattn_decode_args_t, query_position)},
    {"last_page_len", offsetof(treeattn_decode_args_t, last_page_len)},
};

static void counts(void) {
  const int32_t bad_batch[] = {-1, INT32_MIN, BATCH + 1, INT32_MAX};
  for (int i = 0; i < 4; i++) {
    treeattn_decode_args_t a = step;
    a.batch = bad_batch[i];
    refused(a, "batch: found");
    a = step;
    a.query_tokens = bad_batch[i];
    refused(a, "query_tokens: found");
  }
  treeattn_decode_args_t a = step;
  a.batch = 0;
  refused(a, "query_tokens: found 2, wanted 0 where batch is 0");
  /* An empty step is none. */
  a.query_tokens = 0;
  outputs_reset();
  CHECK_OK(treeattn_plan_decode(plan, &a, stream));
  CHECK(outputs_untouched());
}

static void tensors(void) {
  static unsigned char host[K_BYTES];
  void *pinned = NULL;
  driver_enter();
  DRIVER_OK(DRIVER(driver_host_t, "cuMemHostAlloc")(&pinned, K_BYTES, 1));
  for (size_t i = 0; i < sizeof(TENSORS) / sizeof(TENSORS[0]); i++) {
    treeattn_decode_args_t a = step;
    treeattn_tensor_t *t = (treeattn_tensor_t *)(void *)((unsigned char *)&a + TENSORS[i].offset);
    const treeattn_tensor_t whole = *t;
    int is_lse = strcmp(TENSORS[i].name, "lse") == 0;
    int is_cache = strcmp(TENSORS[i].name, "k") == 0 || strcmp(TENSORS[i].name, "v") == 0;
    char text[64];

    snprintf(text, sizeof(text), "%s.data: found", TENSORS[i].name);
    t->data = (unsigned char *)whole.data + 1;
    refused(a, text);
    if (!is_lse) {
      t->data = NULL;
      refused(a, text);
    }
    /* Host memory, where it is not the device's. */
    t->data = host;
    refused(a, text);
    t->data = pinned;
    refused(a, text);
    *t = whole;

    snprintf(text, sizeof(text), "%s.bytes: found", TENSORS[i].name);
    t->bytes = is_cache ? 1 : whole.bytes - 1;
    refused(a, text);
    t->bytes = UINT64_MAX;
    refused(a, text);
    *t = whole;

    int dims = is_cache ? 4 : is_lse ? 2 : 3;
    for (int dim = 0; dim < dims; dim++) {
      const int64_t bad[] = {-4, INT64_MIN, 1, INT64_MAX, INT64_MAX - 3};
      int64_t packed = is_lse || strcmp(TENSORS[i].name, "out") == 0 ? 4 : 2;
      for (int d = dims - 1; d >= 0; d--) {
        t->stride[d] = packed;
        packed *= is_lse ? Q_HEADS : d == dims - 1 ? DIM : d == dims - 2 && is_cache ? KV_HEADS : is_cache ? MAX_LENGTH : Q_HEADS;
      }
      for (size_t j = 0; j < sizeof(bad) / sizeof(bad[0]); j++) {
        /* One token of a cache must fit; where the others lie shows only with their lengths. */
        if (is_cache && dim == 1 && j > 2) {
          continue;
        }
        t->stride[dim] = bad[j];
        snprintf(text, sizeof(text), j > 2 ? "%s." : "%s.stride[%d]: found", TENSORS[i].name, dim);
        refused(a, text);
      }
      *t = whole;
    }
  }
  DRIVER_OK(DRIVER(driver_one_t, "cuMemFreeHost")(pinned));
  CHECK(step_is_right());
}

static void aliases(void) {
  treeattn_decode_args_t a = step;
  a.out.data = a.q.data;
  refused(a, "out: found bytes");
  a = step;
  a.lse.data = (unsigned char *)a.k.data + 256;
  refused(a, "wanted a buffer that shares no byte with k");
  a = step;
  a.lse.data = a.out.data;
  refused(a, "shares no byte with lse");
  a = step;
  a.kv_length = (const int32_t *)a.out.data;
  refused(a, "shares no byte with kv_length");
}

static void arrays(void) {
  static int32_t host[INTS];
  treeattn_decode_args_t a = step;
  a.kv_length = NULL;
  refused(a, "kv_length: found NULL");
  for (size_t i = 0; i < sizeof(ARRAYS) / sizeof(ARRAYS[0]); i++) {
    char text[64];
    const void *crooked = device_at(LENGTH_AT + 2), *foreign = host;
    snprintf(text, sizeof(text), "%s: found 0x", ARRAYS[i].name);
    a = step;
    memcpy((unsigned char *)&a + ARRAYS[i].offset, &crooked, sizeof(crooked));
    refused(a, text);
    a = step;
    memcpy((unsigned char *)&a + ARRAYS[i].offset, &foreign, sizeof(foreign));
    refused(a, text);
  }
  a = step;
  a.kv_position_stride = -1;
  refused(a, "kv_position_stride: found -1");
}

static void structs(void) {
  struct {
    treeattn_decode_args_t known;
    unsigned char tail[32];
  } longer;
  memset(&longer, 0, sizeof(longer));
  longer.known = step;
  longer.known.struct_size = sizeof(longer);
  longer.tail[31] = 1;
  refused_with(&longer.known, TREEATTN_ERROR_INVALID_ARGUMENT, "args.struct_size: found");
  longer.tail[31] = 0;
  outputs_reset();
  CHECK_OK(treeattn_plan_decode(plan, &longer.known, stream));
  CHECK_OK(treeattn_stream_synchronize(stream));
  const size_t bad[] = {0, 7, (size_t)1 << 17, SIZE_MAX};
  for (int i = 0; i < 4; i++) {
    treeattn_decode_args_t a = step;
    a.struct_size = bad[i];
    refused(a, "args.struct_size: found");
  }
  refused_with(NULL, TREEATTN_ERROR_INVALID_ARGUMENT, "args: found NULL");
}

static void handles(void) {
  CHECK_BAD_HANDLES(treeattn_plan_t, 0, dead_plan, comm, "plan: found", treeattn_plan_decode(handle, &step, stream));
  /* A stream of none, of the CPU, and one that is gone. */
  treeattn_stream_t *other = NULL;
  outputs_reset();
  CHECK_INVALID(treeattn_plan_decode(plan, &step, NULL), "stream: found NULL");
  CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &other));
  CHECK_INVALID(treeattn_plan_decode(plan, &step, other), "stream: found");
  CHECK_OK(treeattn_stream_destroy(other));
  CHECK_STATUS(treeattn_plan_decode(plan, &step, other), TREEATTN_ERROR_BAD_HANDLE, "stream: found");
  CHECK_STATUS(treeattn_plan_decode(plan, &step, (treeattn_stream_t *)(void *)plan), TREEATTN_ERROR_BAD_HANDLE,
               "stream: found");
  CHECK(outputs_untouched());
  void *data = device_at(0);
  CHECK_INVALID(treeattn_stream_wrap_cuda(runtime, TREEATTN_CPU(0), NULL, &other), "device: found");
  CHECK_STATUS(treeattn_stream_wrap_cuda(runtime, TREEATTN_CUDA(1000), NULL, &other), TREEATTN_ERROR_UNAVAILABLE,
               "device: found");
  CHECK_BAD_HANDLES(treeattn_runtime_t, 0, dead_runtime, comm, "runtime: found",
                    treeattn_stream_create(handle, TREEATTN_CUDA(0), &other));
  CHECK(data != NULL);
}

static void buffers(void) {
  treeattn_buffer_t *made = CHECK_NO_HANDLE(treeattn_buffer_t);
  char byte = 0;
  CHECK_INVALID(treeattn_buffer_alloc(runtime, TREEATTN_CUDA(0), 0, &made), "bytes: found 0");
  CHECK_STATUS(treeattn_buffer_alloc(runtime, TREEATTN_CUDA(0), (size_t)1 << 50, &made), TREEATTN_ERROR_NO_DEVICE_MEMORY,
               "cuMemAlloc");
  CHECK_STATUS(treeattn_buffer_alloc(runtime, TREEATTN_CUDA(1000), 1, &made), TREEATTN_ERROR_UNAVAILABLE, "device");
  CHECK(made == CHECK_NO_HANDLE(treeattn_buffer_t));
  CHECK_INVALID(treeattn_buffer_upload(buffer, TOTAL, &byte, 1), "offset, bytes: found");
  CHECK_INVALID(treeattn_buffer_upload(buffer, SIZE_MAX, &byte, 1), "offset, bytes: found");
  CHECK_INVALID(treeattn_buffer_download(buffer, 0, NULL, 1), "target: found NULL");
}

static void descriptors(void) {
  treeattn_plan_t *made = CHECK_NO_HANDLE(treeattn_plan_t);
  treeattn_attention_desc_t d = gpu_desc();
  const int32_t codes[] = {0, -1, 1 << 20, INT32_MAX, INT32_MIN};
  for (int i = 0; i < 5; i++) {
    d = gpu_desc();
    d.k_dtype = codes[i];
    CHECK_INVALID(treeattn_plan_create(comm, &d, &made), "k_dtype: found");
    d = gpu_desc();
    d.out_dtype = codes[i];
    CHECK_INVALID(treeattn_plan_create(comm, &d, &made), "out_dtype: found");
  }
  d = gpu_desc();
  d.head_dim_qk = 60;
  CHECK_UNSUPPORTED(treeattn_plan_create(comm, &d, &made), "head_dim_qk");
  d = gpu_desc();
  d.head_dim_v = 264;
  CHECK_UNSUPPORTED(treeattn_plan_create(comm, &d, &made), "head_dim_v");
  d = gpu_desc();
  d.flags = TREEATTN_ATTENTION_CHECKED;
  d.algorithm = TREEATTN_ALGORITHM_ALLREDUCE3;
  CHECK_UNSUPPORTED(treeattn_plan_create(comm, &d, &made), "flags");
  d = gpu_desc();
  d.kv_heads = 3;
  CHECK_INVALID(treeattn_plan_create(comm, &d, &made), "kv_heads: found 3");
  d = gpu_desc();
  d.max_kv_length = 0;
  CHECK_INVALID(treeattn_plan_create(comm, &d, &made), "max_kv_length: found 0");
  d = gpu_desc();
  d.struct_size = 3;
  CHECK_INVALID(treeattn_plan_create(comm, &d, &made), "desc.struct_size: found 3");
  CHECK(made == CHECK_NO_HANDLE(treeattn_plan_t));
}

/* Bad data of sequence `b`: enqueued, then NaN for that sequence alone, and a report that reading takes. */
static void bad_data(treeattn_plan_t *by, const treeattn_decode_args_t *args, int b, const char *text) {
  treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
  outputs_reset();
  CHECK_OK(treeattn_plan_decode(by, args, stream));
  outputs_fetch();
  CHECK(sequence_is_nan(b));
  CHECK(sequence_is_right(1 - b, LENGTHS[1 - b]));
  CHECK(outputs_guarded());
  CHECK_OK(treeattn_comm_status(comm, &status));
  CHECK(status.code == TREEATTN_ERROR_INVALID_DATA && status.sequence == b && status.broken == 0);
  if (strstr(status.message, text) == NULL) {
    check_failures++;
    printf("comm_status says \"%s\", wanted %s\n", status.message, text);
  }
  CHECK_OK(treeattn_comm_status(comm, &status));
  CHECK(status.code == TREEATTN_OK);
}

static void data(void) {
  const int32_t lengths[] = {-1, INT32_MIN, MAX_LENGTH + 1, INT32_MAX};
  for (int b = 0; b < BATCH; b++) {
    for (int i = 0; i < 4; i++) {
      put_ints(LENGTH_AT + 4 * (size_t)b, &lengths[i], 1);
      bad_data(plan, &step, b, "kv_length");
      put_ints(LENGTH_AT, LENGTHS, BATCH);
    }
  }
  CHECK(step_is_right());

  treeattn_attention_desc_t d = gpu_desc();
  treeattn_plan_t *paged = NULL;
  d.kv_layout = TREEATTN_KV_LAYOUT_BLOCK_TABLE;
  d.page_size = PAGE;
  CHECK_OK(treeattn_plan_create(comm, &d, &paged));
  treeattn_decode_args_t a = step;
  a.block_table = (const int32_t *)device_at(TABLE_AT);
  a.max_pages = PAGES / BATCH;
  a.num_pages = PAGES;
  const int32_t pages[] = {-1, INT32_MIN, PAGES, INT32_MAX};
  for (int i = 0; i < 4; i++) {
    const int32_t good = 2;
    put_ints(TABLE_AT + 8, &pages[i], 1);
    bad_data(paged, &a, 0, "block_table");
    put_ints(TABLE_AT + 8, &good, 1);
    /* An entry past the length is never looked at. */
    const int32_t unused = PAGES / BATCH + 1;
    put_ints(TABLE_AT + 4 * (size_t)unused, &pages[i], 1);
    outputs_reset();
    CHECK_OK(treeattn_plan_decode(paged, &a, stream));
    outputs_fetch();
    CHECK(sequence_is_right(0, LENGTHS[0]) && sequence_is_right(1, LENGTHS[1]) && outputs_guarded());
    put_ints(TABLE_AT + 4 * (size_t)unused, &unused, 1);
  }
  CHECK_OK(treeattn_plan_destroy(paged));
}

/* A capture forbids creating, destroying, copying and waiting, says so, and stays intact. */
static void captures(void) {
  void *raw = driver_stream(), *graph = NULL, *exec = NULL;
  treeattn_stream_t *wrapped = NULL;
  treeattn_plan_t *made = NULL;
  treeattn_buffer_t *more = NULL;
  treeattn_attention_desc_t d = gpu_desc();
  char byte = 0;
  CHECK_OK(treeattn_stream_wrap_cuda(runtime, TREEATTN_CUDA(0), raw, &wrapped));
  outputs_reset();
  DRIVER_OK(DRIVER(driver_begin_t, "cuStreamBeginCapture_v2")(raw, 0));
  CHECK_STATUS(treeattn_plan_create(comm, &d, &made), TREEATTN_ERROR_CAPTURING, "capture");
  CHECK_STATUS(treeattn_plan_destroy(plan), TREEATTN_ERROR_CAPTURING, "capture");
  CHECK_STATUS(treeattn_buffer_alloc(runtime, TREEATTN_CUDA(0), 8, &more), TREEATTN_ERROR_CAPTURING, "capture");
  CHECK_STATUS(treeattn_buffer_upload(buffer, Q_AT, &byte, 1), TREEATTN_ERROR_CAPTURING, "capture");
  CHECK_STATUS(treeattn_stream_synchronize(wrapped), TREEATTN_ERROR_CAPTURING, "capture");
  CHECK_OK(treeattn_plan_decode(plan, &step, wrapped));
  DRIVER_OK(DRIVER(driver_end_t, "cuStreamEndCapture")(raw, &graph));
  CHECK(outputs_untouched());
  DRIVER_OK(DRIVER(driver_instantiate_t, "cuGraphInstantiateWithFlags")(&exec, graph, 0));
  DRIVER_OK(DRIVER(driver_replay_t, "cuGraphLaunch")(exec, raw));
  CHECK_OK(treeattn_stream_synchronize(wrapped));
  outputs_fetch();
  CHECK(sequence_is_right(0, LENGTHS[0]) && sequence_is_right(1, LENGTHS[1]) && outputs_guarded());
  DRIVER_OK(DRIVER(driver_one_t, "cuGraphExecDestroy")(exec));
  DRIVER_OK(DRIVER(driver_one_t, "cuGraphDestroy")(graph));
  CHECK_OK(treeattn_stream_destroy(wrapped));
}

/* Parents that go first. */
static void parents(void) {
  CHECK_OK(treeattn_comm_destroy(comm));
  outputs_reset();
  CHECK_PARENT_DESTROYED(treeattn_plan_decode(plan, &step, stream), "comm");
  CHECK(outputs_untouched());
  CHECK_OK(treeattn_plan_destroy(plan));
  CHECK_STATUS(treeattn_plan_decode(plan, &step, stream), TREEATTN_ERROR_BAD_HANDLE, "plan: found");
  CHECK_OK(treeattn_runtime_destroy(runtime));
  /* Waiting goes on working. */
  CHECK_OK(treeattn_stream_synchronize(stream));
  CHECK_OK(treeattn_stream_destroy(stream));
  CHECK_OK(treeattn_buffer_destroy(buffer));
}

int main(void) {
  gpu_find("bad_input");
  gpu_make();
  treeattn_attention_desc_t d = gpu_desc();
  CHECK_OK(treeattn_plan_create(comm, &d, &dead_plan));
  CHECK_OK(treeattn_plan_destroy(dead_plan));
  CHECK_OK(treeattn_runtime_create(NULL, &dead_runtime));
  CHECK_OK(treeattn_runtime_destroy(dead_runtime));
  CHECK(step_is_right());
  counts();
  tensors();
  aliases();
  arrays();
  structs();
  handles();
  buffers();
  descriptors();
  CHECK(step_is_right());
  data();
  captures();
  CHECK(step_is_right());
  parents();
  return check_report("bad_input");
}
