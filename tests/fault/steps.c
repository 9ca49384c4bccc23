/*
 * Faults in the middle of a step, on one rank of three: every rank gets the error at once, naming that rank, whatever the
 * deadline; outputs are NaN; the caller's floating-point control is as it was; a fresh group works. Links a library with
 * the feature fault-injection.
 */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#else
#include <fenv.h>
#endif

#include <treeattn.h>

treeattn_status_t treeattn_fault_arm(const char *text);

enum { WORLD = 3, HEADS = 2, DIM = 4, KEYS = 3, SOON_MS = 5000, HANG_MS = 20000 };

static int failures = 0;

static void expect(int holds, const char *what, const char *fault, int line) {
  if (!holds) {
    failures++;
    printf("steps.c:%d: %s does not hold with %s; last message: %s\n", line, what, fault,
           treeattn_last_error_message());
  }
}
#define EXPECT(condition) expect((condition) != 0, #condition, fault, __LINE__)

#if defined(__SSE__)
static unsigned float_get(void) { return _mm_getcsr(); }
static void float_set(unsigned setting) { _mm_setcsr(setting); }
/* Rounding up, flush to zero, denormals as zero. */
static const unsigned ODD = 0xdfc0;
#else
static unsigned float_get(void) { return (unsigned)fegetround(); }
static void float_set(unsigned setting) { fesetround((int)setting); }
static const unsigned ODD = FE_UPWARD;
#endif

static float q[HEADS * DIM], k[KEYS * HEADS * DIM], v[KEYS * HEADS * DIM];
static const int32_t length = KEYS;

static double now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
}

/* One rank on a thread of its own, and what its step gave. */
typedef struct {
  treeattn_comm_t *comm;
  treeattn_plan_t *plan;
  float out[HEADS * DIM];
  treeattn_status_t status;
  double took_ms;
  int float_kept;
  char message[512];
  pthread_t thread;
} rank_t;

static treeattn_tensor_t tensor(void *data, size_t bytes) {
  treeattn_tensor_t t = {data, bytes, {0, 0, 0, 0}};
  return t;
}

static void *step(void *at) {
  rank_t *rank = at;
  treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
  args.batch = args.query_tokens = 1;
  args.q = tensor(q, sizeof(q));
  args.k = tensor(k, sizeof(k));
  args.v = tensor(v, sizeof(v));
  args.out = tensor(rank->out, sizeof(rank->out));
  args.kv_length = &length;
  for (int i = 0; i < HEADS * DIM; i++) {
    rank->out[i] = 7.0f;
  }
  const double began = now_ms();
  const unsigned usual = float_get();
  float_set(ODD);
  rank->status = treeattn_plan_decode(rank->plan, &args, NULL);
  rank->float_kept = float_get() == ODD;
  float_set(usual);
  rank->took_ms = now_ms() - began;
  snprintf(rank->message, sizeof(rank->message), "%s",
           rank->status == TREEATTN_OK ? "" : treeattn_last_error_message());
  return NULL;
}

/* A group of ranks whose deadline no step may reach. */
static void setup(treeattn_runtime_t *runtime, treeattn_algorithm_t algorithm, rank_t *ranks, const char *fault) {
  treeattn_device_t devices[WORLD] = {TREEATTN_CPU(0), TREEATTN_CPU(0), TREEATTN_CPU(0)};
  treeattn_comm_t *comms[WORLD];
  treeattn_plan_t *plans[WORLD];
  treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
  treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
  config.threads_per_rank = 2;
  config.step_timeout_ns = (int64_t)HANG_MS * 1000000;
  desc.q_heads = desc.kv_heads = HEADS;
  desc.head_dim_qk = desc.head_dim_v = DIM;
  desc.q_dtype = desc.k_dtype = desc.v_dtype = desc.out_dtype = TREEATTN_DTYPE_F32;
  desc.max_batch = desc.max_query_tokens = 1;
  desc.max_kv_length = KEYS;
  desc.algorithm = algorithm;
  EXPECT(treeattn_comm_create_local(runtime, WORLD, devices, &config, comms) == TREEATTN_OK);
  EXPECT(treeattn_plan_create_all(WORLD, comms, &desc, plans) == TREEATTN_OK);
  for (int i = 0; i < WORLD; i++) {
    memset(&ranks[i], 0, sizeof(ranks[i]));
    ranks[i].comm = comms[i];
    ranks[i].plan = plans[i];
  }
}

static void teardown(rank_t *ranks, const char *fault) {
  for (int i = 0; i < WORLD; i++) {
    EXPECT(treeattn_plan_destroy(ranks[i].plan) == TREEATTN_OK);
    EXPECT(treeattn_comm_destroy(ranks[i].comm) == TREEATTN_OK);
  }
}

/* One step of all ranks. */
static void steps(rank_t *ranks, const char *fault) {
  for (int i = 0; i < WORLD; i++) {
    EXPECT(pthread_create(&ranks[i].thread, NULL, step, &ranks[i]) == 0);
  }
  for (int i = 0; i < WORLD; i++) {
    EXPECT(pthread_join(ranks[i].thread, NULL) == 0);
  }
}

/* A step that meets `fault`, on `culprit` (-1: on any one rank). */
static void faulty(treeattn_runtime_t *runtime, treeattn_algorithm_t algorithm, const char *fault, int culprit,
                   treeattn_status_t wanted) {
  rank_t ranks[WORLD];
  setup(runtime, algorithm, ranks, fault);
  steps(ranks, "nothing");
  EXPECT(ranks[0].status == TREEATTN_OK && ranks[1].status == TREEATTN_OK && ranks[2].status == TREEATTN_OK);
  EXPECT(treeattn_fault_arm(fault) == TREEATTN_OK);
  steps(ranks, fault);
  EXPECT(treeattn_fault_arm(NULL) == TREEATTN_OK);
  for (int i = 0; i < WORLD; i++) {
    treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
    EXPECT(ranks[i].status == wanted);
    EXPECT(ranks[i].took_ms < SOON_MS);
    EXPECT(ranks[i].float_kept);
    for (int d = 0; d < HEADS * DIM; d++) {
      EXPECT(isnan(ranks[i].out[d]));
    }
    EXPECT(treeattn_comm_status(ranks[i].comm, &status) == TREEATTN_OK);
    EXPECT(status.code == wanted && status.broken == 1);
    /* All name the same rank, and know what happened there. */
    culprit = culprit < 0 ? status.rank : culprit;
    EXPECT(status.rank == culprit && strstr(status.message, "injected") != NULL);
  }
  teardown(ranks, fault);
}

int main(void) {
  const treeattn_algorithm_t algorithms[] = {TREEATTN_ALGORITHM_ONE_SHOT, TREEATTN_ALGORITHM_TWO_SHOT,
                                             TREEATTN_ALGORITHM_TREE, TREEATTN_ALGORITHM_ALLREDUCE3,
                                             TREEATTN_ALGORITHM_RING};
  const char *fault = "nothing";
  treeattn_runtime_t *runtime = NULL;
  EXPECT(treeattn_runtime_create(NULL, &runtime) == TREEATTN_OK);
  for (int i = 0; i < 5; i++) {
    /* In a worker, and before its job begins. */
    faulty(runtime, algorithms[i], "workers.job#0=panic", -1, TREEATTN_ERROR_INTERNAL);
    faulty(runtime, algorithms[i], "workers.job#1=panic", -1, TREEATTN_ERROR_INTERNAL);
    faulty(runtime, algorithms[i], "workers.run=fail", -1, TREEATTN_ERROR_NO_MEMORY);
  }
  rank_t ranks[WORLD];
  setup(runtime, TREEATTN_ALGORITHM_AUTO, ranks, fault);
  steps(ranks, fault);
  EXPECT(ranks[0].status == TREEATTN_OK && ranks[1].status == TREEATTN_OK && ranks[2].status == TREEATTN_OK);
  teardown(ranks, fault);
  EXPECT(treeattn_runtime_destroy(runtime) == TREEATTN_OK);
  printf(failures == 0 ? "steps: ok\n" : "steps: %d checks failed\n", failures);
  return failures != 0;
}
