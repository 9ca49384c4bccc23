/*
 * A small attention problem with its answer in double, and what one rank holds of it. Everything is f32 and packed;
 * the placement is contiguous, the even split. Outputs lie between guard bytes.
 */
#ifndef TREEATTN_TESTS_PROBLEM_H
#define TREEATTN_TESTS_PROBLEM_H

#include <math.h>
#include <stdlib.h>

#include "check.h"

enum {
  BATCH = 2,
  Q_HEADS = 4,
  KV_HEADS = 2,
  DIM = 8,
  /* Most tokens of a sequence on a rank; also the length of the longest sequence, so that one rank may hold it. */
  MAX_LENGTH = 24,
  GUARD_BYTES = 64
};

static const int32_t LENGTHS[BATCH] = {MAX_LENGTH, 5};

typedef struct {
  float q[BATCH][Q_HEADS][DIM];
  float k[BATCH][MAX_LENGTH][KV_HEADS][DIM];
  float v[BATCH][MAX_LENGTH][KV_HEADS][DIM];
  double out[BATCH][Q_HEADS][DIM];
  double lse[BATCH][Q_HEADS];
} problem_t;

typedef struct {
  unsigned char before[GUARD_BYTES];
  float out[BATCH][Q_HEADS][DIM];
  unsigned char between[GUARD_BYTES];
  float lse[BATCH][Q_HEADS];
  unsigned char after[GUARD_BYTES];
} outputs_t;

typedef struct {
  float q[BATCH][Q_HEADS][DIM];
  float k[BATCH][MAX_LENGTH][KV_HEADS][DIM];
  float v[BATCH][MAX_LENGTH][KV_HEADS][DIM];
  int32_t kv_length[BATCH];
  int32_t kv_start[BATCH];
  int32_t global_length[BATCH];
  outputs_t outputs;
  treeattn_decode_args_t args;
} shard_t;

static inline float problem_draw(uint64_t *state) {
  *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
  return (float)((double)(*state >> 33) / 1073741824.0 - 1.0);
}

/* The naive answer over keys first .. first + count of sequence b. */
static inline void problem_attend(const problem_t *p, int b, int h, int first, int count, double *out, double *lse) {
  int g = h / (Q_HEADS / KV_HEADS);
  double score[MAX_LENGTH], most = -INFINITY, sum = 0.0;
  for (int j = 0; j < count; j++) {
    score[j] = 0.0;
    for (int d = 0; d < DIM; d++) {
      score[j] += (double)p->q[b][h][d] * (double)p->k[b][first + j][g][d];
    }
    score[j] /= sqrt((double)DIM);
    most = score[j] > most ? score[j] : most;
  }
  for (int d = 0; d < DIM; d++) {
    out[d] = 0.0;
  }
  for (int j = 0; j < count; j++) {
    double weight = exp(score[j] - most);
    sum += weight;
    for (int d = 0; d < DIM; d++) {
      out[d] += weight * (double)p->v[b][first + j][g][d];
    }
  }
  for (int d = 0; d < DIM && count > 0; d++) {
    out[d] /= sum;
  }
  *lse = count > 0 ? most + log(sum) : -INFINITY;
}

static inline void problem_make(problem_t *p, uint64_t seed) {
  float *all[] = {&p->q[0][0][0], &p->k[0][0][0][0], &p->v[0][0][0][0]};
  size_t sizes[] = {sizeof(p->q), sizeof(p->k), sizeof(p->v)};
  for (int tensor = 0; tensor < 3; tensor++) {
    for (size_t i = 0; i < sizes[tensor] / sizeof(float); i++) {
      all[tensor][i] = problem_draw(&seed);
    }
  }
  for (int b = 0; b < BATCH; b++) {
    for (int h = 0; h < Q_HEADS; h++) {
      problem_attend(p, b, h, 0, LENGTHS[b], p->out[b][h], &p->lse[b][h]);
    }
  }
}

static inline treeattn_attention_desc_t problem_desc(void) {
  treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
  desc.q_heads = Q_HEADS;
  desc.kv_heads = KV_HEADS;
  desc.head_dim_qk = DIM;
  desc.head_dim_v = DIM;
  desc.q_dtype = TREEATTN_DTYPE_F32;
  desc.k_dtype = TREEATTN_DTYPE_F32;
  desc.v_dtype = TREEATTN_DTYPE_F32;
  desc.out_dtype = TREEATTN_DTYPE_F32;
  desc.max_batch = BATCH;
  desc.max_query_tokens = BATCH;
  desc.max_kv_length = MAX_LENGTH;
  return desc;
}

static inline treeattn_tensor_t tensor(void *data, size_t bytes) {
  treeattn_tensor_t t = {data, bytes, {0, 0, 0, 0}};
  return t;
}

static inline void shard_reset(shard_t *s) { check_fill(&s->outputs, sizeof(s->outputs)); }

/* What `rank` of `world` holds, and the arguments of its step. Slots past a length are NaN. */
static inline void shard_make(shard_t *s, const problem_t *p, int world, int rank) {
  memset(s, 0, sizeof(*s));
  memcpy(s->q, p->q, sizeof(s->q));
  for (int b = 0; b < BATCH; b++) {
    int first = (int)((int64_t)rank * LENGTHS[b] / world), end = (int)((int64_t)(rank + 1) * LENGTHS[b] / world);
    s->kv_length[b] = end - first;
    s->kv_start[b] = first;
    s->global_length[b] = LENGTHS[b];
    for (int j = 0; j < MAX_LENGTH; j++) {
      for (int g = 0; g < KV_HEADS; g++) {
        for (int d = 0; d < DIM; d++) {
          s->k[b][j][g][d] = first + j < end ? p->k[b][first + j][g][d] : NAN;
          s->v[b][j][g][d] = first + j < end ? p->v[b][first + j][g][d] : NAN;
        }
      }
    }
  }
  treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
  args.batch = BATCH;
  args.query_tokens = BATCH;
  args.q = tensor(s->q, sizeof(s->q));
  args.k = tensor(s->k, sizeof(s->k));
  args.v = tensor(s->v, sizeof(s->v));
  args.out = tensor(s->outputs.out, sizeof(s->outputs.out));
  args.lse = tensor(s->outputs.lse, sizeof(s->outputs.lse));
  args.kv_length = s->kv_length;
  s->args = args;
  shard_reset(s);
}

static inline int outputs_guarded(const outputs_t *o) {
  return check_untouched(o->before, GUARD_BYTES) && check_untouched(o->between, GUARD_BYTES) &&
         check_untouched(o->after, GUARD_BYTES);
}

static inline int shard_untouched(const shard_t *s) { return check_untouched(&s->outputs, sizeof(s->outputs)); }

static inline int close_to(float found, double wanted) {
  return isinf(wanted) ? (double)found == wanted : fabs((double)found - wanted) <= 4e-6;
}

/* Whether sequence b has the wanted row of every head. */
static inline int sequence_matches(const outputs_t *o, int b, double out[Q_HEADS][DIM], const double *lse) {
  for (int h = 0; h < Q_HEADS; h++) {
    for (int d = 0; d < DIM; d++) {
      if (!close_to(o->out[b][h][d], out[h][d])) {
        return 0;
      }
    }
    if (!close_to(o->lse[b][h], lse[h])) {
      return 0;
    }
  }
  return 1;
}

static inline int sequence_is_nan(const outputs_t *o, int b) {
  for (int h = 0; h < Q_HEADS; h++) {
    for (int d = 0; d < DIM; d++) {
      if (!isnan(o->out[b][h][d])) {
        return 0;
      }
    }
    if (!isnan(o->lse[b][h])) {
      return 0;
    }
  }
  return 1;
}

/* Whether the outputs are the problem's answer, and nothing around them was written. */
static inline int shard_matches(const shard_t *s, problem_t *p) {
  for (int b = 0; b < BATCH; b++) {
    if (!sequence_matches(&s->outputs, b, p->out[b], p->lse[b])) {
      return 0;
    }
  }
  return outputs_guarded(&s->outputs);
}

/* A runtime, or the end of the program. */
static inline treeattn_runtime_t *runtime_make(void) {
  treeattn_runtime_t *runtime = NULL;
  if (treeattn_runtime_create(NULL, &runtime) != TREEATTN_OK) {
    printf("no runtime: %s\n", treeattn_last_error_message());
    exit(1);
  }
  return runtime;
}

/* A local group with one thread a rank and these deadlines (0: the defaults), or the end of the program. */
static inline void group_make(treeattn_runtime_t *runtime, int world, int64_t step_ms, int64_t setup_ms,
                              treeattn_comm_t **comms) {
  treeattn_device_t devices[16];
  for (int rank = 0; rank < world; rank++) {
    devices[rank] = TREEATTN_CPU(0);
  }
  treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
  config.threads_per_rank = 1;
  config.step_timeout_ns = step_ms * 1000000;
  config.setup_timeout_ns = setup_ms * 1000000;
  if (treeattn_comm_create_local(runtime, world, devices, &config, comms) != TREEATTN_OK) {
    printf("no communicators: %s\n", treeattn_last_error_message());
    exit(1);
  }
}

#endif
