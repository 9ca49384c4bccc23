/*
 * The caller's floating-point control and flags: every export leaves them as it found them, whatever it returns, and
 * steps give the same bits under all of them.
 */
#if defined(__SSE__)
#include <xmmintrin.h>
#else
#include <fenv.h>
#endif

#include "problem.h"

static treeattn_runtime_t *runtime;
static problem_t problem;
static shard_t shard;

#if defined(__SSE__)
/*
 * MXCSR: rounding up, flush to zero and denormals as zero; towards zero with every flag raised; down, some flags raised;
 * every exception a trap.
 */
static const unsigned SETTINGS[] = {0xdfc0, 0x7fbf, 0x3f95, 0x0000};
static unsigned float_get(void) { return _mm_getcsr(); }
static void float_set(unsigned setting) { _mm_setcsr(setting); }
static const unsigned USUAL = 0x1f80;
#else
static const unsigned SETTINGS[] = {FE_UPWARD, FE_TOWARDZERO, FE_DOWNWARD, FE_TONEAREST};
static unsigned float_get(void) { return (unsigned)fegetround(); }
static void float_set(unsigned setting) { fesetround((int)setting); }
static const unsigned USUAL = FE_TONEAREST;
#endif
enum { SETTING_COUNT = 4 };

static unsigned setting;

static void enter(void) { float_set(setting); }

static void leave(const char *call, int line) {
  unsigned found = float_get();
  float_set(USUAL);
  if (found != setting) {
    check_failures++;
    printf("floats.c:%d: %s left the control register at %#x, wanted %#x\n", line, call, found, setting);
  }
}

/* The call leaves the register alone and gives `wanted`. */
#define KEEPS(call, wanted)                                                                                    \
  do {                                                                                                         \
    enter();                                                                                                   \
    treeattn_status_t status_ = (call);                                                                        \
    leave(#call, __LINE__);                                                                                    \
    if (status_ != (wanted)) {                                                                                 \
      check_failures++;                                                                                        \
      printf("floats.c:%d: %s gave %s (%s), wanted %s\n", __LINE__, #call, treeattn_status_string(status_),    \
             treeattn_last_error_message(), treeattn_status_string(wanted));                                   \
    }                                                                                                          \
  } while (0)
/* The same, whatever it gives. */
#define KEEPS_ANYHOW(call)  \
  do {                      \
    enter();                \
    (void)(call);           \
    leave(#call, __LINE__); \
  } while (0)

static void on_log(treeattn_log_level_t level, const char *message, void *user_data) {
  (void)level;
  (void)message;
  (void)user_data;
}

static int32_t allgather(void *ctx, const void *send, void *recv, size_t bytes, int64_t timeout_ns,
                         const int32_t *abort) {
  (void)timeout_ns;
  (void)abort;
  memcpy(recv, send, bytes);
  return *(const int32_t *)ctx;
}

static void versions(void) {
  KEEPS_ANYHOW(treeattn_version());
  KEEPS_ANYHOW(treeattn_abi_version());
  KEEPS_ANYHOW(treeattn_status_string(TREEATTN_ERROR_TIMEOUT));
  KEEPS_ANYHOW(treeattn_last_error_message());
}

static void runtimes(void) {
  treeattn_runtime_t *made = NULL;
  treeattn_buffer_t *buffer = NULL;
  treeattn_stream_t *stream = NULL;
  treeattn_device_info_t info = TREEATTN_DEVICE_INFO_INIT;
  int32_t count = 0;
  void *data = NULL;
  float values[16] = {1.0f};
  KEEPS(treeattn_runtime_create(NULL, &made), TREEATTN_OK);
  KEEPS(treeattn_runtime_create(NULL, NULL), TREEATTN_ERROR_INVALID_ARGUMENT);
  KEEPS(treeattn_runtime_set_log_callback(made, on_log, NULL), TREEATTN_OK);
  KEEPS(treeattn_runtime_device_count(made, TREEATTN_DEVICE_CPU, &count), TREEATTN_OK);
  KEEPS(treeattn_runtime_device_info(made, TREEATTN_CPU(0), &info), TREEATTN_OK);
  KEEPS(treeattn_runtime_device_info(made, TREEATTN_CPU(7), &info), TREEATTN_ERROR_INVALID_ARGUMENT);
  KEEPS(treeattn_buffer_alloc(made, TREEATTN_CPU(0), sizeof(values), &buffer), TREEATTN_OK);
  KEEPS(treeattn_buffer_data(buffer, &data), TREEATTN_OK);
  KEEPS(treeattn_buffer_upload(buffer, 0, values, sizeof(values)), TREEATTN_OK);
  KEEPS(treeattn_buffer_download(buffer, 0, values, sizeof(values)), TREEATTN_OK);
  KEEPS(treeattn_buffer_download(buffer, 1, values, sizeof(values)), TREEATTN_ERROR_INVALID_ARGUMENT);
  KEEPS(treeattn_buffer_destroy(buffer), TREEATTN_OK);
  KEEPS(treeattn_buffer_destroy(buffer), TREEATTN_ERROR_BAD_HANDLE);
  KEEPS(treeattn_stream_create(made, TREEATTN_CPU(0), &stream), TREEATTN_OK);
  KEEPS(treeattn_stream_wrap_cuda(made, TREEATTN_CPU(0), NULL, &stream), TREEATTN_ERROR_INVALID_ARGUMENT);
  KEEPS(treeattn_stream_synchronize(stream), TREEATTN_OK);
  KEEPS(treeattn_stream_destroy(stream), TREEATTN_OK);
  KEEPS(treeattn_runtime_destroy(made), TREEATTN_OK);
  KEEPS(treeattn_runtime_destroy(made), TREEATTN_ERROR_BAD_HANDLE);
}

static void placements(void) {
  int32_t found[2];
  treeattn_placement_t even = {TREEATTN_PLACEMENT_CONTIGUOUS, 0};
  const treeattn_placement_t *placement = &even;
  KEEPS(treeattn_head_range(8, 3, 1, &found[0], &found[1]), TREEATTN_OK);
  KEEPS(treeattn_placement_owner(placement, 3, 100, 50, found), TREEATTN_OK);
  KEEPS(treeattn_placement_local_length(placement, 3, 1, 100, found), TREEATTN_OK);
  KEEPS(treeattn_placement_local_slot(placement, 3, 100, 50, found), TREEATTN_OK);
  KEEPS(treeattn_placement_global_position(placement, 3, 1, 100, 5, found), TREEATTN_OK);
  KEEPS(treeattn_placement_owner(placement, 0, 100, 50, found), TREEATTN_ERROR_INVALID_ARGUMENT);
}

/* One rank: what steps give must not depend on the setting either. */
static void steps(void) {
  treeattn_comm_t *comm = NULL;
  treeattn_plan_t *plan = NULL;
  treeattn_attention_desc_t desc = problem_desc();
  treeattn_device_t device = TREEATTN_CPU(0);
  treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
  treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
  treeattn_plan_memory_t memory = TREEATTN_PLAN_MEMORY_INIT;
  treeattn_plan_stats_t stats = TREEATTN_PLAN_STATS_INIT;
  treeattn_stream_t *stream = NULL;
  char text[256];
  int32_t number = 0;
  config.threads_per_rank = 2;
  shard_make(&shard, &problem, 1, 0);
  KEEPS(treeattn_attention_supported(runtime, device, &desc), TREEATTN_OK);
  KEEPS(treeattn_comm_create_local(runtime, 1, &device, &config, &comm), TREEATTN_OK);
  KEEPS(treeattn_comm_rank(comm, &number), TREEATTN_OK);
  KEEPS(treeattn_comm_world(comm, &number), TREEATTN_OK);
  KEEPS(treeattn_comm_describe(comm, text, sizeof(text), NULL), TREEATTN_OK);
  KEEPS(treeattn_plan_create(comm, &desc, &plan), TREEATTN_OK);
  KEEPS(treeattn_plan_memory(plan, &memory), TREEATTN_OK);

  KEEPS(treeattn_plan_decode(plan, &shard.args, NULL), TREEATTN_OK);
  CHECK(shard_matches(&shard, &problem));
  outputs_t usual = shard.outputs;
  shard_reset(&shard);
  CHECK_OK(treeattn_plan_decode(plan, &shard.args, NULL));
  CHECK(memcmp(&usual, &shard.outputs, sizeof(usual)) == 0);
  treeattn_team_t team = TREEATTN_TEAM_INIT;
  team.size = 1;
  KEEPS(treeattn_plan_decode_team(plan, &shard.args, &team), TREEATTN_OK);
  KEEPS(treeattn_plan_decode_team(plan, NULL, &team), TREEATTN_ERROR_INVALID_ARGUMENT);
  KEEPS(treeattn_plan_partial(plan, &shard.args, NULL), TREEATTN_OK);
  CHECK(shard_matches(&shard, &problem));
  CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &stream));
  shard_reset(&shard);
  KEEPS(treeattn_plan_decode(plan, &shard.args, stream), TREEATTN_OK);
  KEEPS(treeattn_stream_synchronize(stream), TREEATTN_OK);
  CHECK(memcmp(&usual, &shard.outputs, sizeof(usual)) == 0);
  KEEPS(treeattn_plan_decode(plan, NULL, NULL), TREEATTN_ERROR_INVALID_ARGUMENT);

  shard.kv_length[1] = MAX_LENGTH + 1;
  KEEPS(treeattn_plan_decode(plan, &shard.args, NULL), TREEATTN_ERROR_INVALID_DATA);
  KEEPS(treeattn_plan_partial(plan, &shard.args, NULL), TREEATTN_ERROR_INVALID_DATA);
  KEEPS(treeattn_plan_decode(plan, &shard.args, stream), TREEATTN_OK);
  KEEPS(treeattn_stream_synchronize(stream), TREEATTN_ERROR_INVALID_DATA);
  KEEPS(treeattn_comm_status(comm, &status), TREEATTN_OK);
  KEEPS(treeattn_plan_stats(plan, &stats), TREEATTN_OK);
  shard.kv_length[1] = 5;

  treeattn_merge_args_t merge = TREEATTN_MERGE_ARGS_INIT;
  outputs_t merged;
  merge.query_tokens = BATCH;
  merge.o_dtype = TREEATTN_DTYPE_F32;
  merge.o = tensor(usual.out, sizeof(usual.out));
  merge.lse = tensor(usual.lse, sizeof(usual.lse));
  merge.out = tensor(merged.out, sizeof(merged.out));
  merge.out_lse = tensor(merged.lse, sizeof(merged.lse));
  KEEPS(treeattn_plan_merge(plan, &merge, NULL), TREEATTN_OK);
  CHECK(memcmp(merged.out, usual.out, sizeof(merged.out)) == 0);
  merge.heads = Q_HEADS;
  merge.head_dim = DIM;
  KEEPS(treeattn_merge_partials(runtime, TREEATTN_CPU(0), &merge, 1, NULL), TREEATTN_OK);
  CHECK(memcmp(merged.out, usual.out, sizeof(merged.out)) == 0);
  KEEPS(treeattn_merge_partials(runtime, TREEATTN_CPU(0), &merge, 2, NULL), TREEATTN_ERROR_INVALID_ARGUMENT);

  KEEPS(treeattn_energy(runtime, TREEATTN_CPU(0), &desc, &shard.args, NULL, NULL), TREEATTN_OK);
  CHECK(shard_matches(&shard, &problem));
  KEEPS(treeattn_energy(runtime, TREEATTN_CPU(0), NULL, &shard.args, NULL, NULL), TREEATTN_ERROR_INVALID_ARGUMENT);

  KEEPS(treeattn_stream_destroy(stream), TREEATTN_OK);
  KEEPS(treeattn_plan_destroy(plan), TREEATTN_OK);
  KEEPS(treeattn_plan_destroy(plan), TREEATTN_ERROR_BAD_HANDLE);
  KEEPS(treeattn_plan_decode(plan, &shard.args, NULL), TREEATTN_ERROR_BAD_HANDLE);
  KEEPS(treeattn_comm_destroy(comm), TREEATTN_OK);
}

/* Steps that begin and fail. */
static void failures(void) {
  treeattn_comm_t *comms[2];
  treeattn_plan_t *plans[2];
  treeattn_attention_desc_t desc = problem_desc();
  const treeattn_algorithm_t algorithms[] = {TREEATTN_ALGORITHM_ONE_SHOT, TREEATTN_ALGORITHM_TWO_SHOT,
                                             TREEATTN_ALGORITHM_TREE, TREEATTN_ALGORITHM_ALLREDUCE3,
                                             TREEATTN_ALGORITHM_RING};
  for (int i = 0; i < 5; i++) {
    desc.algorithm = algorithms[i];
    group_make(runtime, 2, 30, 30, comms);
    KEEPS(treeattn_plan_create_all(2, comms, &desc, plans), TREEATTN_OK);
    shard_make(&shard, &problem, 2, 0);
    KEEPS(treeattn_plan_decode(plans[0], &shard.args, NULL), TREEATTN_ERROR_TIMEOUT);
    KEEPS(treeattn_plan_decode(plans[0], &shard.args, NULL), TREEATTN_ERROR_TIMEOUT);
    KEEPS(treeattn_plan_create(comms[0], &desc, &plans[0]), TREEATTN_ERROR_TIMEOUT);
    KEEPS(treeattn_comm_abort(comms[1]), TREEATTN_OK);
    KEEPS(treeattn_comm_destroy(comms[0]), TREEATTN_OK);
    KEEPS(treeattn_plan_decode(plans[0], &shard.args, NULL), TREEATTN_ERROR_PARENT_DESTROYED);
    KEEPS(treeattn_plan_destroy(plans[0]), TREEATTN_OK);
    KEEPS(treeattn_plan_destroy(plans[1]), TREEATTN_OK);
    KEEPS(treeattn_comm_destroy(comms[1]), TREEATTN_OK);
  }
  /* A plan that waits for its peers. */
  group_make(runtime, 2, 30, 30, comms);
  KEEPS(treeattn_plan_create(comms[0], &desc, &plans[0]), TREEATTN_ERROR_TIMEOUT);
  KEEPS(treeattn_comm_destroy(comms[0]), TREEATTN_OK);
  KEEPS(treeattn_comm_destroy(comms[1]), TREEATTN_OK);
}

/* Calls that make callbacks. */
static void transports(void) {
  treeattn_transport_t callbacks = TREEATTN_TRANSPORT_INIT;
  treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
  treeattn_comm_t *comm = NULL;
  treeattn_plan_t *plan = NULL;
  treeattn_attention_desc_t desc = problem_desc();
  int32_t code = 0;
  config.threads_per_rank = 1;
  callbacks.ctx = &code;
  callbacks.allgather = allgather;
  KEEPS(treeattn_comm_create_from_transport(runtime, &callbacks, 1, 0, TREEATTN_CPU(0), &config, &comm), TREEATTN_OK);
  KEEPS(treeattn_plan_create(comm, &desc, &plan), TREEATTN_OK);
  shard_make(&shard, &problem, 1, 0);
  KEEPS(treeattn_plan_decode(plan, &shard.args, NULL), TREEATTN_OK);
  CHECK(shard_matches(&shard, &problem));
  KEEPS(treeattn_plan_destroy(plan), TREEATTN_OK);
  KEEPS(treeattn_comm_destroy(comm), TREEATTN_OK);
  code = 5;
  KEEPS(treeattn_comm_create_from_transport(runtime, &callbacks, 1, 0, TREEATTN_CPU(0), &config, &comm),
        TREEATTN_ERROR_TRANSPORT);
}

static void rest(void) {
  uint8_t id[128];
  treeattn_comm_t *comm = NULL;
  treeattn_attention_desc_t desc = problem_desc();
  treeattn_selfcheck_report_t report = TREEATTN_SELFCHECK_REPORT_INIT;
  /* There is no NCCL, or no GPU. */
  KEEPS_ANYHOW(treeattn_nccl_unique_id(runtime, id));
  KEEPS_ANYHOW(treeattn_comm_create_nccl(runtime, id, 1, 0, TREEATTN_CPU(0), NULL, &comm));
  KEEPS_ANYHOW(treeattn_comm_wrap_nccl(runtime, NULL, TREEATTN_CPU(0), NULL, &comm));
  KEEPS(treeattn_selfcheck(runtime, TREEATTN_CPU(0), &desc, NULL, &report), TREEATTN_OK);
  CHECK(report.passed == 1);
}

int main(void) {
  problem_make(&problem, 21);
  runtime = runtime_make();
  for (int i = 0; i < SETTING_COUNT; i++) {
    setting = SETTINGS[i];
    versions();
    runtimes();
    placements();
    steps();
    failures();
    transports();
    rest();
  }
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("floats");
}
