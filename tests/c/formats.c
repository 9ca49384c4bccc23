/*
 * A cache of f8_e4m3 keys with a scale a kv head and of q8_0 values, and one of int8 with a scale a token and kv head, as an
 * engine writes them, against double; what is refused of them.
 */
#include "problem.h"

enum { WIDE = 64, KEYS = 37, BLOCK = 34 };

static float q[Q_HEADS][WIDE];
static unsigned char k8[KEYS][KV_HEADS][WIDE];
static unsigned char v8[KEYS][KV_HEADS][WIDE / 32][BLOCK];
static int8_t k_int8[KEYS][KV_HEADS][WIDE], v_int8[KEYS][KV_HEADS][WIDE];
static float head_scale[KV_HEADS], k_scales[KEYS][KV_HEADS], v_scales[KEYS][KV_HEADS];
static float out[Q_HEADS][WIDE];
static const int32_t length = KEYS;
/* What the bytes stand for. */
static double keys[KEYS][KV_HEADS][WIDE], values[KEYS][KV_HEADS][WIDE];

static double e4m3(unsigned char code) {
  int exponent = code >> 3 & 15, mantissa = code & 7;
  double x = exponent == 0 ? ldexp(mantissa, -9) : ldexp(8 + mantissa, exponent - 10);
  return code & 0x80 ? -x : x;
}

static void make(void) {
  uint64_t seed = 11;
  for (int h = 0; h < Q_HEADS; h++) {
    for (int d = 0; d < WIDE; d++) {
      q[h][d] = problem_draw(&seed);
    }
  }
  for (int g = 0; g < KV_HEADS; g++) {
    head_scale[g] = 0.25f * (float)(g + 1);
  }
  for (int j = 0; j < KEYS; j++) {
    for (int g = 0; g < KV_HEADS; g++) {
      k_scales[j][g] = 0.01f + 0.001f * (float)(j % 5 + g);
      v_scales[j][g] = 0.02f + 0.002f * (float)(j % 3 + g);
      for (int d = 0; d < WIDE; d++) {
        /* Magnitudes of at most 7.5. */
        k8[j][g][d] = (unsigned char)((problem_draw(&seed) > 0.0f ? 0x80 : 0) | (int)(39.5f + 39.0f * problem_draw(&seed)));
        k_int8[j][g][d] = (int8_t)(127.0f * problem_draw(&seed));
        v_int8[j][g][d] = (int8_t)(127.0f * problem_draw(&seed));
      }
      for (int b = 0; b < WIDE / 32; b++) {
        /* The f16 scale 2^-6, little-endian. */
        v8[j][g][b][0] = 0x00;
        v8[j][g][b][1] = 0x24;
        for (int i = 0; i < 32; i++) {
          v8[j][g][b][2 + i] = (unsigned char)(int8_t)(127.0f * problem_draw(&seed));
        }
      }
    }
  }
}

/* The answer over what the bytes stand for. */
static int right(void) {
  for (int h = 0; h < Q_HEADS; h++) {
    int g = h / (Q_HEADS / KV_HEADS);
    double score[KEYS], most = -INFINITY, sum = 0.0;
    for (int j = 0; j < KEYS; j++) {
      score[j] = 0.0;
      for (int d = 0; d < WIDE; d++) {
        score[j] += (double)q[h][d] * keys[j][g][d];
      }
      score[j] /= sqrt((double)WIDE);
      most = score[j] > most ? score[j] : most;
    }
    for (int j = 0; j < KEYS; j++) {
      sum += exp(score[j] - most);
    }
    for (int d = 0; d < WIDE; d++) {
      double x = 0.0;
      for (int j = 0; j < KEYS; j++) {
        x += exp(score[j] - most) / sum * values[j][g][d];
      }
      if (!(fabs(x - (double)out[h][d]) < 2e-5)) {
        printf("head %d, %d: found %.9g, wanted %.9g\n", h, d, (double)out[h][d], x);
        return 0;
      }
    }
  }
  return 1;
}

int main(void) {
  treeattn_runtime_t *runtime = NULL;
  treeattn_comm_t *comm = NULL;
  treeattn_plan_t *plan = NULL;
  const treeattn_device_t cpu = TREEATTN_CPU(0);
  make();
  CHECK_OK(treeattn_runtime_create(NULL, &runtime));
  CHECK_OK(treeattn_comm_create_local(runtime, 1, &cpu, NULL, &comm));
  treeattn_attention_desc_t desc = problem_desc();
  desc.head_dim_qk = desc.head_dim_v = WIDE;
  desc.max_kv_length = KEYS;
  desc.k_dtype = TREEATTN_DTYPE_F8_E4M3;
  desc.v_dtype = TREEATTN_DTYPE_Q8_0;
  CHECK_OK(treeattn_plan_create(comm, &desc, &plan));
  treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
  args.batch = args.query_tokens = 1;
  args.kv_length = &length;
  args.q = tensor(q, sizeof(q));
  args.k = tensor(k8, sizeof(k8));
  args.v = tensor(v8, sizeof(v8));
  args.out = tensor(out, sizeof(out));
  args.k_scale = tensor(head_scale, sizeof(head_scale));
  args.k_scale.stride[2] = sizeof(float);
  for (int j = 0; j < KEYS; j++) {
    for (int g = 0; g < KV_HEADS; g++) {
      for (int d = 0; d < WIDE; d++) {
        keys[j][g][d] = (double)head_scale[g] * e4m3(k8[j][g][d]);
        values[j][g][d] = ldexp((int8_t)v8[j][g][d / 32][2 + d % 32], -6);
      }
    }
  }
  CHECK_OK(treeattn_plan_decode(plan, &args, NULL));
  CHECK(right());
  args.k_scale.stride[2] = 2;
  CHECK_INVALID(treeattn_plan_decode(plan, &args, NULL), "k_scale.stride[2]: found 2");
  args.k_scale.stride[2] = sizeof(float);
  args.k_scale.bytes = sizeof(float);
  CHECK_INVALID(treeattn_plan_decode(plan, &args, NULL), "k_scale.bytes: found 4");
  /* Values at an odd address. */
  args.k_scale.bytes = sizeof(head_scale);
  args.v.data = &v8[0][0][0][1];
  CHECK_INVALID(treeattn_plan_decode(plan, &args, NULL), "v.data: found 0x");
  CHECK_OK(treeattn_plan_destroy(plan));

  desc.k_dtype = desc.v_dtype = TREEATTN_DTYPE_INT8;
  CHECK_OK(treeattn_plan_create(comm, &desc, &plan));
  args.k = tensor(k_int8, sizeof(k_int8));
  args.v = tensor(v_int8, sizeof(v_int8));
  args.k_scale = tensor(k_scales, sizeof(k_scales));
  args.v_scale = tensor(v_scales, sizeof(v_scales));
  args.k_scale.stride[0] = args.v_scale.stride[0] = sizeof(k_scales);
  args.k_scale.stride[1] = args.v_scale.stride[1] = sizeof(k_scales[0]);
  args.k_scale.stride[2] = args.v_scale.stride[2] = sizeof(float);
  for (int j = 0; j < KEYS; j++) {
    for (int g = 0; g < KV_HEADS; g++) {
      for (int d = 0; d < WIDE; d++) {
        keys[j][g][d] = (double)k_scales[j][g] * k_int8[j][g][d];
        values[j][g][d] = (double)v_scales[j][g] * v_int8[j][g][d];
      }
    }
  }
  CHECK_OK(treeattn_plan_decode(plan, &args, NULL));
  CHECK(right());
  args.v_scale.bytes -= sizeof(float);
  CHECK_INVALID(treeattn_plan_decode(plan, &args, NULL), "v_scale.bytes: found");
  args.v_scale = tensor(NULL, 0);
  CHECK_INVALID(treeattn_plan_decode(plan, &args, NULL), "v_scale: found NULL, wanted f32 scales, because v_dtype is int8");
  CHECK_OK(treeattn_plan_destroy(plan));

  desc.k_dtype = TREEATTN_DTYPE_Q8_0;
  desc.head_dim_qk = 48;
  CHECK_INVALID(treeattn_attention_supported(runtime, cpu, &desc), "head_dim_qk: found 48, wanted a multiple of 32");
  CHECK_OK(treeattn_comm_destroy(comm));
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("formats");
}
