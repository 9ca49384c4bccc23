/*
 * A panic inside every call comes back as TREEATTN_ERROR_INTERNAL, with nothing written, and the call works afterwards.
 * Links a library with the feature fault-injection.
 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <treeattn.h>

treeattn_status_t treeattn_fault_arm(const char *text);

static int failures = 0;

static void expect(int holds, const char *what, int line) {
  if (!holds) {
    failures++;
    printf("exports.c:%d: %s does not hold; last message: %s\n", line, what, treeattn_last_error_message());
  }
}
#define EXPECT(condition) expect((condition) != 0, #condition, __LINE__)

/* Arms one panic at the point that `call` names, which is the function. */
static void arm(const char *call) {
  char text[128];
  snprintf(text, sizeof(text), "%.*s=panic", (int)strcspn(call, "("), call);
  EXPECT(treeattn_fault_arm(text) == TREEATTN_OK);
}

static int said(const char *call) {
  size_t n = strcspn(call, "(");
  const char *message = treeattn_last_error_message();
  return strncmp(message, call, n) == 0 && message[n] == ':' && strstr(message, "injected panic") != NULL;
}

/* The call panics once, and then does what it should. */
#define PANICS(call)                         \
  do {                                       \
    arm(#call);                              \
    EXPECT((call) == TREEATTN_ERROR_INTERNAL); \
    EXPECT(said(#call));                     \
  } while (0)
#define PANICS_THEN_WORKS(call)    \
  do {                             \
    PANICS(call);                  \
    EXPECT((call) == TREEATTN_OK); \
  } while (0)

/* A panic at `point`, below the call. */
#define PANICS_BELOW(point, call)                                    \
  do {                                                               \
    EXPECT(treeattn_fault_arm(point "=panic") == TREEATTN_OK);       \
    EXPECT((call) == TREEATTN_ERROR_INTERNAL);                       \
    EXPECT(strstr(treeattn_last_error_message(), point) != NULL);    \
    EXPECT(treeattn_fault_arm(NULL) == TREEATTN_OK);                 \
  } while (0)

enum { HEADS = 2, DIM = 4, KEYS = 3 };

static float q[HEADS * DIM], k[KEYS * HEADS * DIM], v[KEYS * HEADS * DIM], out[HEADS * DIM], lse[HEADS];
static int32_t length = KEYS;

static treeattn_tensor_t tensor(void *data, size_t bytes) {
  treeattn_tensor_t t = {data, bytes, {0, 0, 0, 0}};
  return t;
}

static treeattn_attention_desc_t shape(void) {
  treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
  desc.q_heads = desc.kv_heads = HEADS;
  desc.head_dim_qk = desc.head_dim_v = DIM;
  desc.q_dtype = desc.k_dtype = desc.v_dtype = desc.out_dtype = TREEATTN_DTYPE_F32;
  desc.max_batch = desc.max_query_tokens = 1;
  desc.max_kv_length = KEYS;
  return desc;
}

static treeattn_decode_args_t step(void) {
  treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
  args.batch = args.query_tokens = 1;
  args.q = tensor(q, sizeof(q));
  args.k = tensor(k, sizeof(k));
  args.v = tensor(v, sizeof(v));
  args.out = tensor(out, sizeof(out));
  args.lse = tensor(lse, sizeof(lse));
  args.kv_length = &length;
  return args;
}

static treeattn_merge_args_t merge(float *o, float *l, int32_t partials) {
  treeattn_merge_args_t args = TREEATTN_MERGE_ARGS_INIT;
  args.query_tokens = 1;
  args.heads = HEADS;
  args.head_dim = DIM;
  args.o_dtype = TREEATTN_DTYPE_F32;
  args.o = tensor(o, sizeof(float) * (size_t)(partials * HEADS * DIM));
  args.lse = tensor(l, sizeof(float) * (size_t)(partials * HEADS));
  args.out = tensor(out, sizeof(out));
  args.out_lse = tensor(lse, sizeof(lse));
  return args;
}

static int is_seven(const float *x, int n) {
  for (int i = 0; i < n; i++) {
    if (x[i] != 7.0f) {
      return 0;
    }
  }
  return 1;
}

static void outputs_to_seven(void) {
  for (int i = 0; i < HEADS * DIM; i++) {
    out[i] = 7.0f;
  }
  for (int i = 0; i < HEADS; i++) {
    lse[i] = 7.0f;
  }
}

static void getters(void) {
  arm("treeattn_version");
  EXPECT(treeattn_version()[0] != '\0' && said("treeattn_version"));
  arm("treeattn_abi_version");
  EXPECT(treeattn_abi_version() == TREEATTN_ABI_VERSION && said("treeattn_abi_version"));
  arm("treeattn_status_string");
  EXPECT(strcmp(treeattn_status_string(TREEATTN_OK), "UNKNOWN") == 0 && said("treeattn_status_string"));
  EXPECT(strcmp(treeattn_status_string(TREEATTN_OK), "OK") == 0);
  arm("treeattn_last_error_message");
  EXPECT(treeattn_last_error_message()[0] == '\0');
  EXPECT(said("treeattn_last_error_message"));
}

static void helpers(void) {
  treeattn_placement_t placement = {TREEATTN_PLACEMENT_INTERLEAVED, 2};
  int32_t a = 7, b = 7;
  PANICS(treeattn_head_range(5, 2, 1, &a, &b));
  EXPECT(a == 7 && b == 7);
  EXPECT(treeattn_head_range(5, 2, 1, &a, &b) == TREEATTN_OK && a == 2 && b == 3);
  a = 7;
  PANICS(treeattn_placement_owner(&placement, 2, 9, 6, &a));
  PANICS(treeattn_placement_local_length(&placement, 2, 0, 9, &a));
  PANICS(treeattn_placement_local_slot(&placement, 2, 9, 6, &a));
  PANICS(treeattn_placement_global_position(&placement, 2, 0, 9, 3, &a));
  EXPECT(a == 7);
  EXPECT(treeattn_placement_owner(&placement, 2, 9, 6, &a) == TREEATTN_OK && a == 1);
}

static void buffers(treeattn_runtime_t *runtime) {
  treeattn_buffer_t *buffer = NULL;
  void *data = NULL;
  char bytes[8] = "1234567", back[8] = "-------";
  PANICS(treeattn_buffer_alloc(runtime, TREEATTN_CPU(0), 8, &buffer));
  PANICS_BELOW("host_buffer.new", treeattn_buffer_alloc(runtime, TREEATTN_CPU(0), 8, &buffer));
  EXPECT(buffer == NULL);
  EXPECT(treeattn_buffer_alloc(runtime, TREEATTN_CPU(0), 8, &buffer) == TREEATTN_OK);
  PANICS(treeattn_buffer_data(buffer, &data));
  EXPECT(data == NULL);
  EXPECT(treeattn_buffer_data(buffer, &data) == TREEATTN_OK && data != NULL);
  PANICS_THEN_WORKS(treeattn_buffer_upload(buffer, 0, bytes, 8));
  PANICS(treeattn_buffer_download(buffer, 0, back, 8));
  EXPECT(strcmp(back, "-------") == 0);
  EXPECT(treeattn_buffer_download(buffer, 0, back, 8) == TREEATTN_OK && strcmp(back, bytes) == 0);
  PANICS_THEN_WORKS(treeattn_buffer_destroy(buffer));
}

static void log_line(treeattn_log_level_t level, const char *message, void *user_data) {
  (void)level;
  (void)message;
  ++*(int *)user_data;
}

/* The allgather of a group of one. */
static int32_t alone(void *ctx, const void *send, void *recv, size_t bytes, int64_t timeout_ns, const int32_t *abort) {
  (void)ctx;
  (void)timeout_ns;
  (void)abort;
  memcpy(recv, send, bytes);
  return 0;
}

static void transports(treeattn_runtime_t *runtime) {
  treeattn_comm_t *comm = NULL;
  treeattn_transport_t callbacks = TREEATTN_TRANSPORT_INIT;
  callbacks.allgather = alone;
  PANICS(treeattn_comm_create_from_transport(runtime, &callbacks, 1, 0, TREEATTN_CPU(0), NULL, &comm));
  EXPECT(comm == NULL);
  EXPECT(treeattn_comm_create_from_transport(runtime, &callbacks, 1, 0, TREEATTN_CPU(0), NULL, &comm) == TREEATTN_OK);
  EXPECT(treeattn_comm_destroy(comm) == TREEATTN_OK);
}

static void over_nccl(treeattn_runtime_t *runtime) {
  treeattn_comm_t *comm = NULL;
  uint8_t id[128] = {0};
  int stand_in = 0;
  PANICS(treeattn_nccl_unique_id(runtime, id));
  PANICS(treeattn_comm_create_nccl(runtime, id, 1, 0, TREEATTN_CUDA(0), NULL, &comm));
  PANICS(treeattn_comm_wrap_nccl(runtime, &stand_in, TREEATTN_CUDA(0), NULL, &comm));
  EXPECT(comm == NULL && id[0] == 0);
}

static void plans(treeattn_runtime_t *runtime, treeattn_comm_t *comm) {
  const treeattn_attention_desc_t desc = shape();
  const treeattn_decode_args_t args = step();
  treeattn_plan_t *plan = NULL;
  treeattn_stream_t *stream = NULL;
  treeattn_plan_memory_t memory = TREEATTN_PLAN_MEMORY_INIT;
  treeattn_plan_stats_t stats = TREEATTN_PLAN_STATS_INIT;
  float o[2 * HEADS * DIM] = {0}, l[2 * HEADS] = {0};
  const treeattn_merge_args_t one = merge(o, l, 1), two = merge(o, l, 2);

  PANICS_THEN_WORKS(treeattn_attention_supported(runtime, TREEATTN_CPU(0), &desc));
  PANICS(treeattn_plan_create(comm, &desc, &plan));
  PANICS_BELOW("plan.scratch", treeattn_plan_create(comm, &desc, &plan));
  PANICS(treeattn_plan_create_all(1, &comm, &desc, &plan));
  PANICS_BELOW("plan.scratch", treeattn_plan_create_all(1, &comm, &desc, &plan));
  EXPECT(plan == NULL);
  EXPECT(treeattn_plan_create_all(1, &comm, &desc, &plan) == TREEATTN_OK);
  EXPECT(treeattn_plan_destroy(plan) == TREEATTN_OK);
  EXPECT(treeattn_plan_create(comm, &desc, &plan) == TREEATTN_OK);

  PANICS(treeattn_stream_wrap_cuda(runtime, TREEATTN_CUDA(0), NULL, &stream));
  PANICS(treeattn_stream_create(runtime, TREEATTN_CPU(0), &stream));
  EXPECT(stream == NULL);
  EXPECT(treeattn_stream_create(runtime, TREEATTN_CPU(0), &stream) == TREEATTN_OK);

  outputs_to_seven();
  PANICS(treeattn_plan_decode(plan, &args, NULL));
  PANICS(treeattn_plan_decode(plan, &args, stream));
  treeattn_team_t team = TREEATTN_TEAM_INIT;
  team.size = 1;
  PANICS(treeattn_plan_decode_team(plan, &args, &team));
  PANICS(treeattn_plan_partial(plan, &args, NULL));
  PANICS(treeattn_plan_merge(plan, &one, NULL));
  PANICS(treeattn_merge_partials(runtime, TREEATTN_CPU(0), &two, 2, NULL));
  PANICS(treeattn_energy(runtime, TREEATTN_CPU(0), &desc, &args, NULL, NULL));
  EXPECT(is_seven(out, HEADS * DIM) && is_seven(lse, HEADS));
  /* In a worker, and on the stream's thread. */
  PANICS_BELOW("workers.job", treeattn_plan_partial(plan, &args, NULL));
  EXPECT(treeattn_fault_arm("queue.run=panic") == TREEATTN_OK);
  EXPECT(treeattn_plan_decode(plan, &args, stream) == TREEATTN_OK);
  EXPECT(treeattn_stream_synchronize(stream) == TREEATTN_ERROR_INTERNAL);
  EXPECT(treeattn_fault_arm(NULL) == TREEATTN_OK);

  outputs_to_seven();
  EXPECT(treeattn_plan_decode(plan, &args, stream) == TREEATTN_OK);
  PANICS_THEN_WORKS(treeattn_stream_synchronize(stream));
  EXPECT(!is_seven(out, 1) && !is_seven(lse, 1));
  EXPECT(treeattn_plan_partial(plan, &args, NULL) == TREEATTN_OK);
  EXPECT(treeattn_plan_merge(plan, &one, NULL) == TREEATTN_OK);
  EXPECT(treeattn_merge_partials(runtime, TREEATTN_CPU(0), &two, 2, NULL) == TREEATTN_OK);
  EXPECT(treeattn_energy(runtime, TREEATTN_CPU(0), &desc, &args, NULL, NULL) == TREEATTN_OK);

  PANICS(treeattn_plan_memory(plan, &memory));
  PANICS(treeattn_plan_stats(plan, &stats));
  EXPECT(memory.workspace == 0 && stats.steps == 0);
  EXPECT(treeattn_plan_memory(plan, &memory) == TREEATTN_OK && memory.workspace > 0);
  EXPECT(treeattn_plan_stats(plan, &stats) == TREEATTN_OK && stats.steps > 0);
  PANICS_THEN_WORKS(treeattn_plan_destroy(plan));
  PANICS_THEN_WORKS(treeattn_stream_destroy(stream));
}

int main(void) {
  treeattn_runtime_t *runtime = NULL;
  treeattn_comm_t *comms[2] = {NULL, NULL};
  treeattn_device_t devices[2] = {TREEATTN_CPU(0), TREEATTN_CPU(0)};
  treeattn_device_info_t info = TREEATTN_DEVICE_INFO_INIT;
  treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
  treeattn_selfcheck_report_t report = TREEATTN_SELFCHECK_REPORT_INIT;
  treeattn_attention_desc_t desc = shape();
  int32_t number = 7;
  size_t needed = 7;
  int lines = 0;

  getters();
  helpers();
  PANICS(treeattn_runtime_create(NULL, &runtime));
  EXPECT(runtime == NULL);
  EXPECT(treeattn_runtime_create(NULL, &runtime) == TREEATTN_OK);
  PANICS(treeattn_runtime_device_count(runtime, TREEATTN_DEVICE_CPU, &number));
  PANICS(treeattn_runtime_device_info(runtime, TREEATTN_CPU(0), &info));
  EXPECT(number == 7 && info.units == 0);
  EXPECT(treeattn_runtime_device_count(runtime, TREEATTN_DEVICE_CPU, &number) == TREEATTN_OK && number == 1);
  EXPECT(treeattn_runtime_device_info(runtime, TREEATTN_CPU(0), &info) == TREEATTN_OK && info.units > 0);
  PANICS_THEN_WORKS(treeattn_runtime_set_log_callback(runtime, log_line, &lines));
  buffers(runtime);
  transports(runtime);
  over_nccl(runtime);

  PANICS(treeattn_comm_create_local(runtime, 2, devices, NULL, comms));
  EXPECT(comms[0] == NULL && comms[1] == NULL);
  EXPECT(treeattn_comm_create_local(runtime, 1, devices, NULL, comms) == TREEATTN_OK);
  EXPECT(lines > 0);
  number = 7;
  PANICS(treeattn_comm_rank(comms[0], &number));
  PANICS(treeattn_comm_world(comms[0], &number));
  PANICS(treeattn_comm_describe(comms[0], NULL, 0, &needed));
  PANICS(treeattn_comm_status(comms[0], &status));
  EXPECT(number == 7 && needed == 7 && status.rank == 0);
  EXPECT(treeattn_comm_rank(comms[0], &number) == TREEATTN_OK && number == 0);
  EXPECT(treeattn_comm_world(comms[0], &number) == TREEATTN_OK && number == 1);
  EXPECT(treeattn_comm_describe(comms[0], NULL, 0, &needed) == TREEATTN_OK && needed > 7);
  plans(runtime, comms[0]);
  PANICS(treeattn_selfcheck(runtime, TREEATTN_CPU(0), &desc, NULL, &report));
  EXPECT(report.rows == 0);
  EXPECT(treeattn_selfcheck(runtime, TREEATTN_CPU(0), &desc, NULL, &report) == TREEATTN_OK && report.passed == 1);

  EXPECT(treeattn_comm_status(comms[0], &status) == TREEATTN_OK && status.broken == 0);
  PANICS(treeattn_comm_abort(comms[0]));
  EXPECT(treeattn_comm_status(comms[0], &status) == TREEATTN_OK && status.broken == 0);
  EXPECT(treeattn_comm_abort(comms[0]) == TREEATTN_OK);
  EXPECT(treeattn_comm_status(comms[0], &status) == TREEATTN_OK && status.broken == 1);
  PANICS_THEN_WORKS(treeattn_comm_destroy(comms[0]));
  PANICS_THEN_WORKS(treeattn_runtime_destroy(runtime));
  if (failures == 0) {
    printf("exports: ok\n");
  }
  return failures != 0;
}
