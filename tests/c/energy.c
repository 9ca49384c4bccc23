/*
 * treeattn_energy: F and its gradient against double, on the calling thread and on a stream; partials of two shards
 * merged; every bad argument.
 */
#include "problem.h"

static treeattn_runtime_t *runtime;
static treeattn_runtime_t *dead_runtime;
static problem_t problem;
static shard_t shard;
static float zeta[BATCH][Q_HEADS][DIM];

/* F(zeta) and its gradient over keys first .. first + count of a sequence. */
static void exact(int b, int h, int first, int count, double *gradient, double *f) {
  int g = h / (Q_HEADS / KV_HEADS);
  double score[MAX_LENGTH], most = -INFINITY, sum = 0.0;
  for (int j = 0; j < count; j++) {
    double qk = 0.0, tilt = 0.0;
    for (int d = 0; d < DIM; d++) {
      qk += (double)problem.q[b][h][d] * (double)problem.k[b][first + j][g][d];
      tilt += (double)zeta[b][h][d] * (double)problem.v[b][first + j][g][d];
    }
    score[j] = qk / sqrt((double)DIM) + tilt;
    most = score[j] > most ? score[j] : most;
  }
  memset(gradient, 0, sizeof(double) * DIM);
  for (int j = 0; j < count; j++) {
    sum += exp(score[j] - most);
    for (int d = 0; d < DIM; d++) {
      gradient[d] += exp(score[j] - most) * (double)problem.v[b][first + j][g][d];
    }
  }
  for (int d = 0; d < DIM && count > 0; d++) {
    gradient[d] /= sum;
  }
  *f = count > 0 ? most + log(sum) : -INFINITY;
}

static int matches(int world, int rank) {
  for (int b = 0; b < BATCH; b++) {
    int first = rank * LENGTHS[b] / world, end = (rank + 1) * LENGTHS[b] / world;
    double gradient[Q_HEADS][DIM], f[Q_HEADS];
    for (int h = 0; h < Q_HEADS; h++) {
      exact(b, h, first, end - first, gradient[h], &f[h]);
    }
    if (!sequence_matches(&shard.outputs, b, gradient, f)) {
      return 0;
    }
  }
  return outputs_guarded(&shard.outputs);
}

static void values(void) {
  const treeattn_attention_desc_t desc = problem_desc();
  const treeattn_device_t cpu = TREEATTN_CPU(0);
  treeattn_tensor_t at = tensor(zeta, sizeof(zeta)), nowhere = tensor(NULL, 0);
  treeattn_stream_t *stream = NULL;
  CHECK_OK(treeattn_stream_create(runtime, cpu, &stream));
  uint64_t seed = 5;
  shard_make(&shard, &problem, 1, 0);
  /* At 0: attention, however 0 is said. */
  const treeattn_tensor_t *zeros[] = {NULL, &nowhere, &at};
  for (int i = 0; i < 3; i++) {
    shard_reset(&shard);
    CHECK_OK(treeattn_energy(runtime, cpu, &desc, &shard.args, zeros[i], NULL));
    CHECK(shard_matches(&shard, &problem));
  }
  for (int step = 0; step < 10; step++) {
    for (int i = 0; i < BATCH * Q_HEADS * DIM; i++) {
      (&zeta[0][0][0])[i] = problem_draw(&seed) * (float)step;
    }
    shard_reset(&shard);
    CHECK_OK(treeattn_energy(runtime, cpu, &desc, &shard.args, &at, step % 2 == 0 ? NULL : stream));
    if (step % 2 != 0) {
      CHECK_OK(treeattn_stream_synchronize(stream));
    }
    CHECK(matches(1, 0));
  }
  /* One zeta for all tokens and heads. */
  for (int i = 1; i < BATCH * Q_HEADS; i++) {
    memcpy((&zeta[0][0][0]) + i * DIM, zeta, sizeof(float) * DIM);
  }
  treeattn_tensor_t same = {zeta, sizeof(float) * DIM, {0, 0, sizeof(float), 0}};
  shard_reset(&shard);
  CHECK_OK(treeattn_energy(runtime, cpu, &desc, &shard.args, &same, NULL));
  CHECK(matches(1, 0));
  /* Bad data is found when it runs. */
  shard.kv_length[1] = MAX_LENGTH + 1;
  shard_reset(&shard);
  CHECK_STATUS(treeattn_energy(runtime, cpu, &desc, &shard.args, &at, NULL), TREEATTN_ERROR_INVALID_DATA,
               "kv_length[1]: found 25, wanted 0 to 24, in sequence 1");
  CHECK(sequence_is_nan(&shard.outputs, 1) && outputs_guarded(&shard.outputs));
  CHECK_OK(treeattn_energy(runtime, cpu, &desc, &shard.args, &at, stream));
  CHECK(treeattn_stream_synchronize(stream) == TREEATTN_ERROR_INVALID_DATA);
  CHECK_OK(treeattn_stream_destroy(stream));
}

/* (gradient, F) of two shards, one of them without keys of one sequence, make the whole. */
static void shards_merge(void) {
  enum { ROWS = BATCH * Q_HEADS };
  static float o[3][ROWS][DIM], f[3][ROWS];
  const treeattn_attention_desc_t desc = problem_desc();
  const treeattn_tensor_t at = tensor(zeta, sizeof(zeta));
  for (int rank = 0; rank < 3; rank++) {
    shard_make(&shard, &problem, 3, rank);
    CHECK_OK(treeattn_energy(runtime, TREEATTN_CPU(0), &desc, &shard.args, &at, NULL));
    CHECK(matches(3, rank));
    memcpy(o[rank], shard.outputs.out, sizeof(o[rank]));
    memcpy(f[rank], shard.outputs.lse, sizeof(f[rank]));
  }
  treeattn_merge_args_t args = TREEATTN_MERGE_ARGS_INIT;
  shard_reset(&shard);
  args.query_tokens = BATCH;
  args.heads = Q_HEADS;
  args.head_dim = DIM;
  args.o_dtype = TREEATTN_DTYPE_F32;
  args.o = tensor(o, sizeof(o));
  args.lse = tensor(f, sizeof(f));
  args.out = tensor(shard.outputs.out, sizeof(shard.outputs.out));
  args.out_lse = tensor(shard.outputs.lse, sizeof(shard.outputs.lse));
  CHECK_OK(treeattn_merge_partials(runtime, TREEATTN_CPU(0), &args, 3, NULL));
  CHECK(matches(1, 0));
}

static void arguments(void) {
  treeattn_attention_desc_t desc = problem_desc();
  const treeattn_device_t cpu = TREEATTN_CPU(0);
  treeattn_tensor_t at = tensor(zeta, sizeof(zeta));
  shard_make(&shard, &problem, 1, 0);
  const treeattn_decode_args_t *args = &shard.args;
  treeattn_comm_t *comm = NULL;
  treeattn_stream_t *dead = NULL;
  group_make(runtime, 1, 0, 0, &comm);
  CHECK_OK(treeattn_stream_create(runtime, cpu, &dead));
  CHECK_OK(treeattn_stream_destroy(dead));
  CHECK_BAD_HANDLES(treeattn_runtime_t, 0, dead_runtime, comm, "runtime: found",
                    treeattn_energy(handle, cpu, &desc, args, &at, NULL));
  CHECK_BAD_HANDLES(treeattn_stream_t, 1, dead, comm, "stream: found",
                    treeattn_energy(runtime, cpu, &desc, args, &at, handle));
  CHECK_INVALID(treeattn_energy(runtime, TREEATTN_CPU(1), &desc, args, &at, NULL), "device: found cpu:1");
  CHECK_INVALID(treeattn_energy(runtime, -1, &desc, args, &at, NULL), "device: found");
  CHECK_STATUS(treeattn_energy(runtime, TREEATTN_CUDA(65535), &desc, args, &at, NULL), TREEATTN_ERROR_UNAVAILABLE,
               "cuda:65535");
  CHECK_INVALID(treeattn_energy(runtime, cpu, NULL, args, &at, NULL), "desc: found NULL");
  CHECK_INVALID(treeattn_energy(runtime, cpu, &desc, NULL, &at, NULL), "args: found NULL");
  CHECK_INVALID(treeattn_energy(runtime, cpu, &desc, args, (treeattn_tensor_t *)(void *)((char *)&at + 4), NULL),
                "zeta: found 0x");
  at.bytes--;
  CHECK_INVALID(treeattn_energy(runtime, cpu, &desc, args, &at, NULL), "zeta.bytes: found 255");
  at.bytes++;
  at.data = (char *)zeta + 2;
  CHECK_INVALID(treeattn_energy(runtime, cpu, &desc, args, &at, NULL), "zeta.data: found 0x");
  at.data = zeta;
  at.stride[0] = -4;
  CHECK_INVALID(treeattn_energy(runtime, cpu, &desc, args, &at, NULL), "zeta.stride[0]: found -4");
  at.stride[0] = 0;
  at.data = shard.outputs.out;
  CHECK_INVALID(treeattn_energy(runtime, cpu, &desc, args, &at, NULL), "overlap zeta");
  at.data = zeta;
  desc.kv_heads = 0;
  CHECK_INVALID(treeattn_energy(runtime, cpu, &desc, args, &at, NULL), "kv_heads: found 0");
  desc.kv_heads = 3;
  CHECK_INVALID(treeattn_energy(runtime, cpu, &desc, args, &at, NULL), "kv_heads: found 3");
  desc = problem_desc();
  desc.q_dtype = 99;
  CHECK_INVALID(treeattn_energy(runtime, cpu, &desc, args, &at, NULL), "q_dtype: found 99");
  desc = problem_desc();
  desc.mask = TREEATTN_MASK_ADDITIVE;
  desc.mask_dtype = TREEATTN_DTYPE_BF16;
  CHECK_UNSUPPORTED(treeattn_energy(runtime, cpu, &desc, args, &at, NULL), "mask_dtype: found");
  desc = problem_desc();
  shard.args.batch = BATCH + 1;
  CHECK_INVALID(treeattn_energy(runtime, cpu, &desc, args, &at, NULL), "batch: found 3");
  shard.args.batch = BATCH;
  shard.args.q.bytes--;
  CHECK_INVALID(treeattn_energy(runtime, cpu, &desc, args, &at, NULL), "q.bytes: found");
  shard.args.q.bytes++;
  CHECK(shard_untouched(&shard));
  treeattn_runtime_t *own = runtime_make();
  treeattn_stream_t *stream = NULL;
  CHECK_OK(treeattn_stream_create(own, cpu, &stream));
  CHECK_OK(treeattn_runtime_destroy(own));
  CHECK_PARENT_DESTROYED(treeattn_energy(runtime, cpu, &desc, args, &at, stream), "runtime: found destroyed");
  CHECK_OK(treeattn_stream_destroy(stream));
  CHECK(shard_untouched(&shard));
  CHECK_OK(treeattn_comm_destroy(comm));
}

int main(void) {
  problem_make(&problem, 21);
  runtime = runtime_make();
  dead_runtime = runtime_make();
  CHECK_OK(treeattn_runtime_destroy(dead_runtime));
  values();
  shards_merge();
  arguments();
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("energy");
}
