/* Windows, sinks, caps, slopes and masks from C: as gpt-oss has them, and as llama.cpp passes masks; and what is refused. */
#include "ranks.h"

enum {
  /* Slots of a row of the mask, which is padded. */
  PADDED = 32,
  WINDOW = 6
};

static const float SINKS[Q_HEADS] = {0.5f, -1.0f, 2.0f, -INFINITY};
static const float SLOPES[Q_HEADS] = {0.25f, 0.0625f, 0.015625f, 0.00390625f};

static problem_t problem;
static shard_t shards[RANKS];
static treeattn_runtime_t *runtime;

/* f16 of 0, -0.5, -inf and NaN. */
enum { ZERO = 0x0000, HALF = 0xb800, HIDDEN = 0xfc00, POISON = 0x7e00 };

/* What the mask holds for the key at a position of a sequence: some hidden, others with a bias. */
static int mask_of(int b, int position) {
  return (position + b) % 5 == 1 ? HIDDEN : position % 3 == 0 ? HALF : ZERO;
}

/* The answer with the terms that `desc` asks for: of one query a sequence, its last token. */
static void answer(const treeattn_attention_desc_t *desc, double out[BATCH][Q_HEADS][DIM], double lse[BATCH][Q_HEADS]) {
  for (int b = 0; b < BATCH; b++) {
    for (int h = 0; h < Q_HEADS; h++) {
      double sum = desc->sinks ? exp((double)SINKS[h]) : 0.0, values[DIM] = {0};
      for (int j = 0; j < LENGTHS[b]; j++) {
        int distance = LENGTHS[b] - 1 - j, bits = mask_of(b, j), boolean = desc->mask == TREEATTN_MASK_BOOLEAN;
        if ((desc->window > 0 && distance >= desc->window) || (desc->mask != TREEATTN_MASK_NONE && bits == HIDDEN)) {
          continue;
        }
        double score = 0.0;
        for (int d = 0; d < DIM; d++) {
          score += (double)problem.q[b][h][d] * (double)problem.k[b][j][h / (Q_HEADS / KV_HEADS)][d];
        }
        score /= sqrt((double)DIM);
        if (desc->softcap > 0.0f) {
          score = (double)desc->softcap * tanh(score / (double)desc->softcap);
        }
        if (desc->alibi) {
          score -= (double)SLOPES[h] * distance;
        }
        if (desc->mask != TREEATTN_MASK_NONE && !boolean && bits == HALF) {
          score += (double)SLOPES[h] * -0.5;
        }
        sum += exp(score);
        for (int d = 0; d < DIM; d++) {
          values[d] += exp(score) * (double)problem.v[b][j][h / (Q_HEADS / KV_HEADS)][d];
        }
      }
      for (int d = 0; d < DIM; d++) {
        out[b][h][d] = sum > 0.0 ? values[d] / sum : 0.0;
      }
      lse[b][h] = log(sum);
    }
  }
}

static treeattn_tensor_t numbers(const float *data) { return tensor((void *)(uintptr_t)data, Q_HEADS * sizeof(float)); }

/* One rank's mask by its own slots, NaN (or a byte that is not 0) past its length. */
typedef struct {
  uint16_t f16[BATCH][PADDED];
  uint8_t bytes[BATCH][PADDED];
} mask_t;

static void mask_make(mask_t *mask, const shard_t *shard) {
  for (int b = 0; b < BATCH; b++) {
    for (int slot = 0; slot < PADDED; slot++) {
      int dead = slot >= shard->kv_length[b], bits = dead ? POISON : mask_of(b, shard->kv_start[b] + slot);
      mask->f16[b][slot] = (uint16_t)bits;
      mask->bytes[b][slot] = dead || bits != HIDDEN;
    }
  }
}

static void pass(const treeattn_attention_desc_t *desc, treeattn_decode_args_t *args, mask_t *mask) {
  if (desc->sinks) {
    args->sinks = numbers(SINKS);
  }
  if (desc->alibi) {
    args->alibi_slopes = numbers(SLOPES);
  }
  if (desc->mask == TREEATTN_MASK_ADDITIVE) {
    /* ggml's [n_kv, n_query, 1, n_sequence]: all heads share it. */
    args->mask = tensor(mask->f16, sizeof(mask->f16));
    args->mask.stride[0] = sizeof(mask->f16[0]);
    args->mask.stride[3] = sizeof(uint16_t);
    args->mask_factor = numbers(SLOPES);
  } else if (desc->mask == TREEATTN_MASK_BOOLEAN) {
    args->mask = tensor(mask->bytes, sizeof(mask->bytes));
    args->mask.stride[0] = sizeof(mask->bytes[0]);
    args->mask.stride[3] = 1;
  }
}

/* Every rank of every world has the answer. */
static void decodes(treeattn_attention_desc_t desc) {
  static double out[BATCH][Q_HEADS][DIM], lse[BATCH][Q_HEADS];
  answer(&desc, out, lse);
  for (int world = 1; world <= RANKS; world++) {
    treeattn_comm_t *comms[RANKS];
    treeattn_plan_t *plans[RANKS];
    treeattn_stream_t *streams[RANKS];
    static mask_t masks[RANKS];
    group_make(runtime, world, HANG, HANG, comms);
    desc.algorithm = ALGORITHMS[world % ALGORITHM_COUNT];
    CHECK_OK(treeattn_plan_create_all(world, comms, &desc, plans));
    for (int rank = 0; rank < world; rank++) {
      shard_t *s = &shards[rank];
      shard_make(s, &problem, world, rank);
      s->args.kv_start = s->kv_start;
      s->args.global_length = s->global_length;
      mask_make(&masks[rank], s);
      pass(&desc, &s->args, &masks[rank]);
      CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &streams[rank]));
      CHECK_OK(treeattn_plan_decode(plans[rank], &s->args, streams[rank]));
    }
    for (int rank = 0; rank < world; rank++) {
      CHECK_OK(treeattn_stream_synchronize(streams[rank]));
      for (int b = 0; b < BATCH; b++) {
        CHECK(sequence_matches(&shards[rank].outputs, b, out[b], lse[b]));
      }
      CHECK(outputs_guarded(&shards[rank].outputs));
    }
    for (int rank = 0; rank < world; rank++) {
      CHECK_OK(treeattn_stream_destroy(streams[rank]));
      CHECK_OK(treeattn_plan_destroy(plans[rank]));
      CHECK_OK(treeattn_comm_destroy(comms[rank]));
    }
  }
}

static void refusals(void) {
  static mask_t mask;
  treeattn_comm_t *comm = NULL;
  treeattn_plan_t *plan = NULL, *plain = NULL;
  group_make(runtime, 1, HANG, HANG, &comm);
  treeattn_attention_desc_t desc = problem_desc();
  CHECK_OK(treeattn_plan_create(comm, &desc, &plain));
  desc.alibi = 1;
  desc.sinks = 1;
  desc.mask = TREEATTN_MASK_ADDITIVE;
  desc.mask_dtype = TREEATTN_DTYPE_F16;
  CHECK_OK(treeattn_plan_create(comm, &desc, &plan));
  shard_t *s = &shards[0];
  shard_make(s, &problem, 1, 0);
  mask_make(&mask, s);
  treeattn_decode_args_t good = s->args, a;
  good.global_length = s->global_length;
  pass(&desc, &good, &mask);
  CHECK_OK(treeattn_plan_decode(plan, &good, NULL));
#define REFUSED(by, text)                                    \
  do {                                                       \
    shard_reset(s);                                          \
    CHECK_INVALID(treeattn_plan_decode(by, &a, NULL), text); \
    CHECK(shard_untouched(s));                               \
    a = good;                                                \
  } while (0)
  a = good;
  a.sinks.data = NULL;
  REFUSED(plan, "sinks.data: found NULL");
  a.sinks.bytes = 12;
  REFUSED(plan, "sinks.bytes: found 12, wanted at least 16");
  a.sinks.data = (char *)a.sinks.data + 2;
  REFUSED(plan, "sinks.data: found 0x");
  a.alibi_slopes.data = NULL;
  REFUSED(plan, "alibi_slopes.data: found NULL");
  a.alibi_slopes.stride[0] = -4;
  REFUSED(plan, "alibi_slopes.stride[0]: found -4");
  a.mask_factor.bytes = 15;
  REFUSED(plan, "mask_factor.bytes: found 15");
  a.global_length = NULL;
  REFUSED(plan, "global_length: found NULL, wanted a pointer to int32, because alibi = 1");
  a.mask.data = NULL;
  a.mask.bytes = 0;
  REFUSED(plan, "mask.data: found NULL, wanted a pointer, for kv_length[0] = 24");
  a.mask.bytes = 64 + 2 * 4;
  REFUSED(plan, "mask.bytes: found 72, wanted at least 74 for kv_length[1] = 5");
  a.mask.bytes = 64 + 2 * 5;
  CHECK_OK(treeattn_plan_decode(plan, &a, NULL));
  a.mask.stride[0] = a.mask.stride[3] = 0;
  REFUSED(plan, "mask.stride: found [0, 0, 0, 0], wanted byte strides");
  a.mask.stride[3] = 1;
  REFUSED(plan, "mask.stride[3]: found 1");
  a.mask.stride[1] = -2;
  REFUSED(plan, "mask.stride[1]: found -2");
  a.mask.data = (char *)a.mask.data + 1;
  REFUSED(plan, "mask.data: found 0x");
  a.mask.data = s->outputs.out;
  REFUSED(plan, "out: found bytes");
  /* What a plan has no use for. */
  static const struct {
    const char *text;
    size_t offset;
  } unused[] = {
      {"sinks: found 0x", offsetof(treeattn_decode_args_t, sinks)},
      {"alibi_slopes: found 0x", offsetof(treeattn_decode_args_t, alibi_slopes)},
      {"mask: found 0x", offsetof(treeattn_decode_args_t, mask)},
      {"mask_factor: found 0x", offsetof(treeattn_decode_args_t, mask_factor)},
  };
  for (size_t i = 0; i < sizeof(unused) / sizeof(unused[0]); i++) {
    a = s->args;
    memcpy((char *)&a + unused[i].offset, &good.sinks, sizeof(good.sinks));
    REFUSED(plain, unused[i].text);
  }
  CHECK_OK(treeattn_plan_destroy(plan));
  CHECK_OK(treeattn_plan_destroy(plain));
  CHECK_OK(treeattn_comm_destroy(comm));
}

int main(void) {
  runtime = runtime_make();
  problem_make(&problem, 5);
  treeattn_attention_desc_t desc = problem_desc();
  desc.causal = 1;
  /* gpt-oss: a window and sinks. */
  desc.window = WINDOW;
  desc.sinks = 1;
  decodes(desc);
  /* Gemma 2: a cap and a window. */
  desc.sinks = 0;
  desc.softcap = 0.75f;
  decodes(desc);
  /* llama.cpp: a mask always, whose bias is multiplied by the slope of the head. */
  desc = problem_desc();
  desc.mask = TREEATTN_MASK_ADDITIVE;
  desc.mask_dtype = TREEATTN_DTYPE_F16;
  decodes(desc);
  desc.mask = TREEATTN_MASK_BOOLEAN;
  desc.mask_dtype = 0;
  decodes(desc);
  /* MPT: ALiBi; and everything together. */
  desc = problem_desc();
  desc.causal = 1;
  desc.alibi = 1;
  decodes(desc);
  desc.window = WINDOW;
  desc.sinks = 1;
  desc.softcap = 0.75f;
  desc.mask = TREEATTN_MASK_ADDITIVE;
  desc.mask_dtype = TREEATTN_DTYPE_F16;
  decodes(desc);
  refusals();
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("terms");
}
