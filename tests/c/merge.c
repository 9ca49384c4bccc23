/*
 * treeattn_plan_merge: partials that the engine made itself, merged between ranks; by plans of any kind, by streams;
 * and every bad argument. The outputs that hold some heads only (scattered, local) are here, too, for decode.
 */
#include "problem.h"

enum { WORLD = 3 };

static treeattn_runtime_t *runtime;
static treeattn_comm_t *comms[WORLD];
static treeattn_stream_t *streams[WORLD];
static problem_t problem;
static shard_t shards[WORLD];

/* A rank's partial, made by the naive kernel. */
static struct {
  float o[BATCH][Q_HEADS][DIM];
  float lse[BATCH][Q_HEADS];
  treeattn_merge_args_t args;
} partials[WORLD];

static void partials_make(void) {
  for (int r = 0; r < WORLD; r++) {
    shard_make(&shards[r], &problem, WORLD, r);
    for (int b = 0; b < BATCH; b++) {
      for (int h = 0; h < Q_HEADS; h++) {
        double out[DIM], lse;
        problem_attend(&problem, b, h, shards[r].kv_start[b], shards[r].kv_length[b], out, &lse);
        partials[r].lse[b][h] = (float)lse;
        for (int d = 0; d < DIM; d++) {
          partials[r].o[b][h][d] = (float)out[d];
        }
      }
    }
    treeattn_merge_args_t args = TREEATTN_MERGE_ARGS_INIT;
    args.query_tokens = BATCH;
    args.o_dtype = TREEATTN_DTYPE_F32;
    args.o = tensor(partials[r].o, sizeof(partials[r].o));
    args.lse = tensor(partials[r].lse, sizeof(partials[r].lse));
    args.out = tensor(shards[r].outputs.out, sizeof(shards[r].outputs.out));
    args.out_lse = tensor(shards[r].outputs.lse, sizeof(shards[r].outputs.lse));
    partials[r].args = args;
  }
}

static void plans_make(treeattn_attention_desc_t desc, treeattn_plan_t **plans) {
  CHECK_OK(treeattn_plan_create_all(WORLD, comms, &desc, plans));
}

static void plans_destroy(treeattn_plan_t **plans) {
  for (int r = 0; r < WORLD; r++) {
    CHECK_OK(treeattn_plan_destroy(plans[r]));
  }
}

static void step(treeattn_plan_t **plans) {
  for (int r = 0; r < WORLD; r++) {
    shard_reset(&shards[r]);
    CHECK_OK(treeattn_plan_merge(plans[r], &partials[r].args, streams[r]));
  }
  for (int r = 0; r < WORLD; r++) {
    CHECK_OK(treeattn_stream_synchronize(streams[r]));
  }
}

static void good(void) {
  treeattn_plan_t *plans[WORLD];
  for (int merge_only = 0; merge_only < 2; merge_only++) {
    treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
    desc.q_heads = Q_HEADS;
    desc.head_dim_v = DIM;
    desc.max_query_tokens = BATCH;
    desc.out_dtype = TREEATTN_DTYPE_F32;
    plans_make(merge_only ? desc : problem_desc(), plans);
    step(plans);
    for (int r = 0; r < WORLD; r++) {
      CHECK(shard_matches(&shards[r], &problem));
      CHECK(memcmp(&shards[r].outputs, &shards[0].outputs, sizeof(outputs_t)) == 0);
    }
    /* Base 2, and +inf from a rank that holds nothing. */
    for (int r = 0; r < WORLD; r++) {
      for (int i = 0; i < BATCH * Q_HEADS; i++) {
        (&partials[r].lse[0][0])[i] = (float)((double)(&partials[r].lse[0][0])[i] / log(2.0));
      }
      partials[r].args.lse_base = 2;
      partials[r].args.flags = TREEATTN_MERGE_PLUS_INF_IS_EMPTY;
      partials[r].args.heads = Q_HEADS;
      partials[r].args.head_dim = DIM;
      partials[r].args.out_dtype = TREEATTN_DTYPE_F32;
    }
    step(plans);
    for (int r = 0; r < WORLD; r++) {
      CHECK(shard_matches(&shards[r], &problem));
    }
    for (int i = 0; i < BATCH * Q_HEADS; i++) {
      (&partials[2].lse[0][0])[i] = INFINITY;
      (&partials[1].lse[0][0])[i] = -INFINITY;
    }
    step(plans);
    CHECK(close_to(shards[1].outputs.out[0][1][2], (double)partials[0].o[0][1][2]));
    CHECK(close_to(shards[2].outputs.lse[1][3], (double)partials[0].lse[1][3] * log(2.0)));
    plans_destroy(plans);
    partials_make();
  }
}

/* Weighted outputs of all ranks add up to the merged one, by merge and by decode, and 8 bytes a row and head travel. */
static void weighted(void) {
  treeattn_plan_t *plans[WORLD];
  treeattn_attention_desc_t desc = problem_desc();
  treeattn_plan_stats_t stats = TREEATTN_PLAN_STATS_INIT;
  desc.output = TREEATTN_OUTPUT_WEIGHTED;
  plans_make(desc, plans);
  for (int by_decode = 0; by_decode < 2; by_decode++) {
    for (int r = 0; r < WORLD; r++) {
      shard_reset(&shards[r]);
      if (by_decode) {
        CHECK_OK(treeattn_plan_decode(plans[r], &shards[r].args, streams[r]));
      } else {
        CHECK_OK(treeattn_plan_merge(plans[r], &partials[r].args, streams[r]));
      }
    }
    for (int r = 0; r < WORLD; r++) {
      CHECK_OK(treeattn_stream_synchronize(streams[r]));
      CHECK(memcmp(shards[r].outputs.lse, shards[0].outputs.lse, sizeof(shards[0].outputs.lse)) == 0);
    }
    for (int b = 0; b < BATCH; b++) {
      for (int h = 0; h < Q_HEADS; h++) {
        CHECK(close_to(shards[0].outputs.lse[b][h], problem.lse[b][h]));
        for (int d = 0; d < DIM; d++) {
          float sum = 0.0f;
          for (int r = 0; r < WORLD; r++) {
            /* Its own part: what it holds alone, times its share of the weight. */
            double share = exp((double)partials[r].lse[b][h] - problem.lse[b][h]);
            double part = partials[r].lse[b][h] == -INFINITY ? 0.0 : share * (double)partials[r].o[b][h][d];
            CHECK(close_to(shards[r].outputs.out[b][h][d], part));
            sum += shards[r].outputs.out[b][h][d];
          }
          CHECK(close_to(sum, problem.out[b][h][d]));
        }
      }
    }
  }
  CHECK_OK(treeattn_plan_stats(plans[0], &stats));
  CHECK(stats.steps == 2 && stats.bytes_sent == 2 * 8 * BATCH * Q_HEADS * (WORLD - 1));
  plans_destroy(plans);
  desc.algorithm = TREEATTN_ALGORITHM_TREE;
  CHECK_UNSUPPORTED(treeattn_plan_create_all(WORLD, comms, &desc, plans), "algorithm: found TREE");
}

/* A scattered output holds the rank's own heads, by merge and by decode, with the queries of all heads or of the own ones. */
static void own_heads(treeattn_query_input_t query_input) {
  treeattn_plan_t *plans[WORLD];
  treeattn_attention_desc_t desc = problem_desc();
  desc.output = TREEATTN_OUTPUT_SCATTERED;
  desc.query_input = query_input;
  plans_make(desc, plans);
  for (int by_decode = 0; by_decode < 2; by_decode++) {
    int32_t first[WORLD], count[WORLD];
    for (int r = 0; r < WORLD; r++) {
      CHECK_OK(treeattn_head_range(Q_HEADS, WORLD, r, &first[r], &count[r]));
      uint64_t out = sizeof(float) * BATCH * DIM * (uint64_t)count[r], lse = sizeof(float) * BATCH * (uint64_t)count[r];
      shard_reset(&shards[r]);
      treeattn_decode_args_t decode = shards[r].args;
      treeattn_merge_args_t merge = partials[r].args;
      decode.out.bytes = merge.out.bytes = out;
      decode.lse.bytes = merge.out_lse.bytes = lse;
      if (query_input == TREEATTN_QUERY_INPUT_SCATTERED && count[r] > 0) {
        /* Where they lie among those of all heads: of the others nothing may be read. */
        decode.q.data = shards[r].q[0][first[r]];
        decode.q.bytes = sizeof(float) * DIM * (uint64_t)((BATCH - 1) * Q_HEADS + count[r]);
        decode.q.stride[0] = (int64_t)sizeof(shards[r].q[0]);
        decode.q.stride[1] = (int64_t)sizeof(shards[r].q[0][0]);
        decode.q.stride[2] = sizeof(float);
        for (int b = 0; b < BATCH; b++) {
          for (int h = 0; h < Q_HEADS; h++) {
            for (int d = 0; d < DIM && (h < first[r] || h >= first[r] + count[r]); d++) {
              shards[r].q[b][h][d] = NAN;
            }
          }
        }
      }
      CHECK_OK(by_decode ? treeattn_plan_decode(plans[r], &decode, streams[r])
                         : treeattn_plan_merge(plans[r], &merge, streams[r]));
    }
    for (int r = 0; r < WORLD; r++) {
      const float *out = &shards[r].outputs.out[0][0][0], *lse = &shards[r].outputs.lse[0][0];
      CHECK_OK(treeattn_stream_synchronize(streams[r]));
      for (int b = 0; b < BATCH; b++) {
        for (int h = first[r]; h < first[r] + count[r]; h++) {
          for (int d = 0; d < DIM; d++) {
            CHECK(close_to(*out++, problem.out[b][h][d]));
          }
          CHECK(close_to(*lse++, problem.lse[b][h]));
        }
      }
      /* Nothing past the own heads. */
      CHECK(check_untouched(out, (size_t)((const char *)shards[r].outputs.between - (const char *)out)));
      CHECK(check_untouched(lse, (size_t)((const char *)shards[r].outputs.after - (const char *)lse)));
      CHECK(outputs_guarded(&shards[r].outputs));
    }
  }
  plans_destroy(plans);
  for (int r = 0; r < WORLD; r++) {
    memcpy(shards[r].q, problem.q, sizeof(problem.q));
  }
}

/* A local output is that of the rank's own shard. */
static void own_shard(void) {
  treeattn_plan_t *plans[WORLD];
  treeattn_attention_desc_t desc = problem_desc();
  desc.output = TREEATTN_OUTPUT_LOCAL;
  plans_make(desc, plans);
  for (int r = 0; r < WORLD; r++) {
    shard_reset(&shards[r]);
    CHECK_OK(treeattn_plan_decode(plans[r], &shards[r].args, NULL));
    for (int b = 0; b < BATCH; b++) {
      double out[Q_HEADS][DIM], lse[Q_HEADS];
      for (int h = 0; h < Q_HEADS; h++) {
        problem_attend(&problem, b, h, shards[r].kv_start[b], shards[r].kv_length[b], out[h], &lse[h]);
      }
      CHECK(sequence_matches(&shards[r].outputs, b, out, lse));
    }
    CHECK(outputs_guarded(&shards[r].outputs));
  }
  plans_destroy(plans);
}

static treeattn_plan_t *plan;

static void refused(treeattn_merge_args_t args, const char *text) {
  treeattn_stream_t *ways[] = {NULL, streams[0]};
  for (int i = 0; i < 2; i++) {
    shard_reset(&shards[0]);
    CHECK_INVALID(treeattn_plan_merge(plan, &args, ways[i]), text);
    CHECK(shard_untouched(&shards[0]));
  }
}

#define FIELD(field, value, text)                 \
  do {                                            \
    treeattn_merge_args_t a = partials[0].args;   \
    a.field = (value);                            \
    refused(a, text);                             \
  } while (0)

static void bad(void) {
  treeattn_plan_t *plans[WORLD];
  plans_make(problem_desc(), plans);
  plan = plans[0];
  FIELD(query_tokens, -1, "query_tokens: found -1");
  FIELD(query_tokens, BATCH + 1, "query_tokens: found 3, wanted 0 to the plan's max_query_tokens = 2");
  FIELD(query_tokens, INT32_MAX, "query_tokens: found 2147483647");
  FIELD(query_tokens, INT32_MIN, "query_tokens: found -2147483648");
  FIELD(heads, 3, "heads: found 3, wanted 0, or the plan's 4");
  FIELD(heads, -4, "heads: found -4");
  FIELD(head_dim, DIM + 1, "head_dim: found 9, wanted 0, or the plan's 8");
  FIELD(head_dim, INT32_MIN, "head_dim: found");
  FIELD(o_dtype, 0, "o_dtype: found 0");
  FIELD(o_dtype, -1, "o_dtype: found -1");
  FIELD(o_dtype, 13, "o_dtype: found 13");
  FIELD(o_dtype, TREEATTN_DTYPE_Q8_0, "o_dtype: found");
  FIELD(out_dtype, TREEATTN_DTYPE_F16, "out_dtype: found f16, wanted the plan's f32");
  FIELD(out_dtype, 99, "out_dtype: found 99");
  FIELD(lse_base, 3, "lse_base: found 3");
  FIELD(lse_base, -1, "lse_base: found -1");
  FIELD(flags, 0x80000000u, "flags: found 0x80000000");
  FIELD(reserved, 1, "reserved: found 1");
  FIELD(o.data, NULL, "o.data: found NULL");
  FIELD(lse.data, NULL, "lse.data: found NULL");
  FIELD(out.data, NULL, "out.data: found NULL");
  FIELD(o.data, (char *)partials[0].o + 1, "o.data: found 0x");
  FIELD(lse.data, (char *)partials[0].lse + 2, "lse.data: found 0x");
  FIELD(out.data, (char *)shards[0].outputs.out + 3, "out.data: found 0x");
  FIELD(out_lse.data, (char *)shards[0].outputs.lse + 3, "out_lse.data: found 0x");
  FIELD(o.bytes, sizeof(partials[0].o) - 1, "o.bytes: found");
  FIELD(lse.bytes, 0, "lse.bytes: found 0");
  FIELD(out.bytes, sizeof(shards[0].outputs.out) - 1, "out.bytes: found");
  FIELD(out_lse.bytes, 1, "out_lse.bytes: found 1");
  FIELD(lse.bytes, UINT64_MAX, "lse.bytes: found");
  FIELD(o.stride[0], -32, "o.stride[0]: found -32");
  FIELD(o.stride[1], INT64_MAX - 3, "o.");
  FIELD(lse.stride[0], INT64_MIN, "lse.stride[0]: found");
  FIELD(lse.stride[1], 3, "lse.stride[1]: found 3");
  FIELD(out.stride[2], 4, "out.stride[1]: found 0, wanted at least ");
  FIELD(out_lse.stride[0], 4, "out_lse.stride[1]: found 0, wanted at least ");
  FIELD(out.data, partials[0].o, "shares no byte with o");
  FIELD(out_lse.data, partials[0].lse, "shares no byte with lse");
  FIELD(out_lse.data, shards[0].outputs.out, "shares no byte with out_lse");
  shard_reset(&shards[0]);
  CHECK_INVALID(treeattn_plan_merge(plan, NULL, NULL), "args: found NULL");
  CHECK_INVALID(treeattn_plan_merge(plan, (treeattn_merge_args_t *)(void *)((char *)&partials[0].args + 2), NULL),
                "args: found 0x");
  const size_t sizes[] = {0, 4, 236, SIZE_MAX};
  for (int i = 0; i < 4; i++) {
    FIELD(struct_size, sizes[i], "args.struct_size: found");
  }
  struct {
    treeattn_merge_args_t known;
    unsigned char tail[8];
  } longer;
  memset(&longer, 0, sizeof(longer));
  longer.known = partials[0].args;
  longer.known.struct_size = sizeof(longer);
  longer.tail[7] = 1;
  CHECK_INVALID(treeattn_plan_merge(plan, &longer.known, NULL), "args.struct_size: found 312 with byte 311 set");
  treeattn_plan_t *dead = plans[2];
  CHECK_OK(treeattn_plan_destroy(plans[2]));
  CHECK_BAD_HANDLES(treeattn_plan_t, 0, dead, comms[0], "plan: found",
                    treeattn_plan_merge(handle, &partials[0].args, NULL));
  CHECK_BAD_HANDLES(treeattn_stream_t, 1, dead, comms[0], "stream: found",
                    treeattn_plan_merge(plan, &partials[0].args, handle));
  CHECK(shard_untouched(&shards[0]));
  CHECK_OK(treeattn_plan_destroy(plans[0]));
  CHECK_OK(treeattn_plan_destroy(plans[1]));
}

int main(void) {
  problem_make(&problem, 7);
  partials_make();
  runtime = runtime_make();
  group_make(runtime, WORLD, 0, 0, comms);
  for (int r = 0; r < WORLD; r++) {
    CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &streams[r]));
  }
  good();
  weighted();
  own_heads(TREEATTN_QUERY_INPUT_REPLICATED);
  own_heads(TREEATTN_QUERY_INPUT_SCATTERED);
  own_shard();
  bad();
  good();
  for (int r = 0; r < WORLD; r++) {
    CHECK_OK(treeattn_stream_destroy(streams[r]));
    CHECK_OK(treeattn_comm_destroy(comms[r]));
  }
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("merge");
}
