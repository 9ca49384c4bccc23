/*
 * treeattn_merge_partials, treeattn_head_range, treeattn_placement_owner, treeattn_placement_local_length,
 * treeattn_placement_local_slot, treeattn_placement_global_position.
 */
#include "problem.h"

enum { PARTIALS = 3 };

static treeattn_runtime_t *runtime;
static treeattn_runtime_t *dead;
static problem_t problem;

static struct {
  float o[PARTIALS][BATCH][Q_HEADS][DIM];
  float lse[PARTIALS][BATCH][Q_HEADS];
  outputs_t outputs;
  treeattn_merge_args_t args;
} merge;

/* Partials over thirds of each sequence, the middle one of the second sequence empty. */
static void merge_make(void) {
  for (int r = 0; r < PARTIALS; r++) {
    for (int b = 0; b < BATCH; b++) {
      int first = b == 1 && r == 2 ? LENGTHS[b] / 3 : r * LENGTHS[b] / 3;
      int end = b == 1 && r == 1 ? first : (r + 1) * LENGTHS[b] / 3;
      for (int h = 0; h < Q_HEADS; h++) {
        double out[DIM], lse;
        problem_attend(&problem, b, h, first, end - first, out, &lse);
        merge.lse[r][b][h] = (float)lse;
        for (int d = 0; d < DIM; d++) {
          /* A row that is empty is never read. */
          merge.o[r][b][h][d] = end > first ? (float)out[d] : NAN;
        }
      }
    }
  }
  treeattn_merge_args_t args = TREEATTN_MERGE_ARGS_INIT;
  args.query_tokens = BATCH;
  args.heads = Q_HEADS;
  args.head_dim = DIM;
  args.o_dtype = TREEATTN_DTYPE_F32;
  args.o = tensor(merge.o, sizeof(merge.o));
  args.lse = tensor(merge.lse, sizeof(merge.lse));
  args.out = tensor(merge.outputs.out, sizeof(merge.outputs.out));
  args.out_lse = tensor(merge.outputs.lse, sizeof(merge.outputs.lse));
  merge.args = args;
}

static int merged(void) {
  for (int b = 0; b < BATCH; b++) {
    if (!sequence_matches(&merge.outputs, b, problem.out[b], problem.lse[b])) {
      return 0;
    }
  }
  return outputs_guarded(&merge.outputs);
}

static void merges(void) {
  treeattn_stream_t *stream = NULL;
  CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &stream));
  for (int i = 0; i < 2; i++) {
    check_fill(&merge.outputs, sizeof(merge.outputs));
    CHECK_OK(treeattn_merge_partials(runtime, TREEATTN_CPU(0), &merge.args, PARTIALS, i == 0 ? NULL : stream));
    CHECK_OK(treeattn_stream_synchronize(stream));
    CHECK(merged());
  }
  /* Base 2, +inf for empty, no lse wanted. */
  treeattn_merge_args_t args = merge.args;
  for (int i = 0; i < PARTIALS * BATCH * Q_HEADS; i++) {
    float *lse = &merge.lse[0][0][0] + i;
    *lse = isinf(*lse) ? INFINITY : (float)((double)*lse / log(2.0));
  }
  args.lse_base = 2;
  args.flags = TREEATTN_MERGE_PLUS_INF_IS_EMPTY;
  check_fill(&merge.outputs, sizeof(merge.outputs));
  CHECK_OK(treeattn_merge_partials(runtime, TREEATTN_CPU(0), &args, PARTIALS, NULL));
  CHECK(merged());
  merge_make();
  check_fill(&merge.outputs, sizeof(merge.outputs));
  args = merge.args;
  args.out_lse.data = NULL;
  CHECK_OK(treeattn_merge_partials(runtime, TREEATTN_CPU(0), &args, PARTIALS, NULL));
  CHECK(check_untouched(merge.outputs.lse, sizeof(merge.outputs.lse)) && outputs_guarded(&merge.outputs));
  CHECK(close_to(merge.outputs.out[1][3][5], problem.out[1][3][5]));
  /* Nothing to do. */
  check_fill(&merge.outputs, sizeof(merge.outputs));
  args.query_tokens = 0;
  CHECK_OK(treeattn_merge_partials(runtime, TREEATTN_CPU(0), &args, PARTIALS, NULL));
  CHECK(check_untouched(&merge.outputs, sizeof(merge.outputs)));
  treeattn_stream_t *gone = NULL;
  CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &gone));
  CHECK_OK(treeattn_stream_destroy(gone));
  CHECK_BAD_HANDLES(treeattn_stream_t, 1, gone, runtime, "stream: found",
                    treeattn_merge_partials(runtime, TREEATTN_CPU(0), &merge.args, PARTIALS, handle));
  CHECK_BAD_HANDLES(treeattn_runtime_t, 0, dead, stream, "runtime: found",
                    treeattn_merge_partials(handle, TREEATTN_CPU(0), &merge.args, PARTIALS, NULL));
  CHECK(check_untouched(&merge.outputs, sizeof(merge.outputs)));
  CHECK_OK(treeattn_stream_destroy(stream));
}

static void refused(const treeattn_merge_args_t *args, int32_t n, treeattn_status_t status, const char *text) {
  check_fill(&merge.outputs, sizeof(merge.outputs));
  CHECK_STATUS(treeattn_merge_partials(runtime, TREEATTN_CPU(0), args, n, NULL), status, text);
  CHECK(check_untouched(&merge.outputs, sizeof(merge.outputs)));
}

static void invalid(treeattn_merge_args_t args, const char *text) {
  refused(&args, PARTIALS, TREEATTN_ERROR_INVALID_ARGUMENT, text);
}

#define FIELD(field, value, text)           \
  do {                                      \
    treeattn_merge_args_t a = merge.args;   \
    a.field = (value);                      \
    invalid(a, text);                       \
  } while (0)

static void bad_merges(void) {
  const int32_t counts[] = {0, -1, INT32_MIN};
  for (int i = 0; i < 3; i++) {
    refused(&merge.args, counts[i], TREEATTN_ERROR_INVALID_ARGUMENT, "n: found");
    FIELD(heads, counts[i], "heads: found");
    FIELD(head_dim, counts[i], "head_dim: found");
  }
  refused(&merge.args, PARTIALS + 1, TREEATTN_ERROR_INVALID_ARGUMENT, "o.bytes: found");
  refused(&merge.args, INT32_MAX, TREEATTN_ERROR_INVALID_ARGUMENT, "o");
  FIELD(head_dim, 1025, "head_dim: found 1025, wanted 1 to 1024");
  FIELD(heads, INT32_MAX, "o.bytes: found");
  FIELD(query_tokens, -1, "query_tokens: found -1");
  FIELD(query_tokens, INT32_MIN, "query_tokens: found");
  FIELD(query_tokens, BATCH + 1, "o.bytes: found");
  FIELD(lse_base, 1, "lse_base: found 1, wanted 0 for e, or 2");
  FIELD(lse_base, 10, "lse_base: found 10");
  FIELD(lse_base, -2, "lse_base: found -2");
  FIELD(flags, 4, "flags: found 0x4");
  FIELD(out_lse_base, 1, "out_lse_base: found 1, wanted 0 for e, or 2");
  FIELD(reserved, 9, "reserved: found 9");
  const int32_t dtypes[] = {-1, 13, INT32_MAX, TREEATTN_DTYPE_F8_E4M3, TREEATTN_DTYPE_Q4_0};
  for (int i = 0; i < 5; i++) {
    FIELD(o_dtype, dtypes[i], "o_dtype: found");
    FIELD(out_dtype, dtypes[i], "out_dtype: found");
  }
  FIELD(o_dtype, 0, "o_dtype: found 0");
  FIELD(o.data, NULL, "o.data: found NULL");
  FIELD(lse.data, NULL, "lse.data: found NULL");
  FIELD(out.data, NULL, "out.data: found NULL");
  FIELD(o.data, (char *)merge.o + 2, "o.data: found 0x");
  FIELD(lse.data, (char *)merge.lse + 1, "lse.data: found 0x");
  FIELD(out.data, (char *)merge.outputs.out + 3, "out.data: found 0x");
  FIELD(out_lse.data, (char *)merge.outputs.lse + 1, "out_lse.data: found 0x");
  FIELD(o.bytes, sizeof(merge.o) - 1, "o.bytes: found");
  FIELD(lse.bytes, sizeof(merge.lse) - 1, "lse.bytes: found");
  FIELD(out.bytes, sizeof(merge.outputs.out) - 1, "out.bytes: found");
  FIELD(out_lse.bytes, sizeof(merge.outputs.lse) - 1, "out_lse.bytes: found");
  FIELD(out.bytes, UINT64_MAX, "out.bytes: found");
  FIELD(o.stride[0], -4, "o.stride[0]: found -4");
  FIELD(o.stride[1], INT64_MIN, "o.stride[1]: found");
  FIELD(o.stride[2], 2, "o.stride[2]: found 2");
  FIELD(o.stride[0], INT64_MAX - 3, "o.");
  FIELD(lse.stride[2], INT64_MAX - 3, "lse.");
  FIELD(out.stride[0], 4, "out.stride[2]: found 0, wanted at least ");
  FIELD(out_lse.stride[1], 4, "out_lse.stride[0]: found 0, wanted at least ");
  FIELD(out.data, merge.o, "shares no byte with o");
  FIELD(out.data, merge.lse, "found");
  FIELD(out_lse.data, &merge.lse[1][0][0], "shares no byte with lse");
  FIELD(out_lse.data, &merge.o[2][1][3][0], "shares no byte with o");
  FIELD(out_lse.data, &merge.outputs.out[0][1][0], "shares no byte with out_lse");

  CHECK_INVALID(treeattn_merge_partials(runtime, TREEATTN_CPU(1), &merge.args, PARTIALS, NULL), "device: found cpu:1");
  CHECK_INVALID(treeattn_merge_partials(runtime, INT32_MIN, &merge.args, PARTIALS, NULL), "device: found");
  CHECK_STATUS(treeattn_merge_partials(runtime, TREEATTN_CUDA(65535), &merge.args, PARTIALS, NULL),
               TREEATTN_ERROR_UNAVAILABLE, "device: found cuda:65535");
  refused(NULL, PARTIALS, TREEATTN_ERROR_INVALID_ARGUMENT, "args: found NULL");
  refused((treeattn_merge_args_t *)(void *)((char *)&merge.args + 4), PARTIALS, TREEATTN_ERROR_INVALID_ARGUMENT,
          "args: found 0x");
  struct {
    treeattn_merge_args_t known;
    unsigned char tail[8];
  } longer;
  memset(&longer, 0, sizeof(longer));
  longer.known = merge.args;
  longer.known.struct_size = sizeof(longer);
  CHECK_OK(treeattn_merge_partials(runtime, TREEATTN_CPU(0), &longer.known, PARTIALS, NULL));
  CHECK(merged());
  longer.tail[1] = 1;
  refused(&longer.known, PARTIALS, TREEATTN_ERROR_INVALID_ARGUMENT, "args.struct_size: found 312 with byte 305 set");
  longer.known.struct_size = 6;
  refused(&longer.known, PARTIALS, TREEATTN_ERROR_INVALID_ARGUMENT, "args.struct_size: found 6");
  longer.known.struct_size = offsetof(treeattn_merge_args_t, out_lse);
  refused(&longer.known, PARTIALS, TREEATTN_ERROR_INVALID_ARGUMENT, "args.struct_size: found 184");
}

static void head_ranges(void) {
  for (int32_t world = 1; world < 9; world++) {
    int32_t next = 0;
    for (int32_t rank = 0; rank < world; rank++) {
      int32_t first = -7, count = -7;
      CHECK_OK(treeattn_head_range(5, world, rank, &first, &count));
      CHECK(first == next && first == rank * 5 / world && count >= 0);
      next = first + count;
    }
    CHECK(next == 5);
  }
  int32_t first = -7, count = -7;
  int32_t *crooked = (int32_t *)(void *)((char *)&first + 1);
  CHECK_INVALID(treeattn_head_range(-1, 2, 0, &first, &count), "heads: found -1");
  CHECK_INVALID(treeattn_head_range(4, 0, 0, &first, &count), "world: found 0");
  CHECK_INVALID(treeattn_head_range(4, INT32_MIN, 0, &first, &count), "world: found");
  CHECK_INVALID(treeattn_head_range(4, 2, 2, &first, &count), "rank: found 2, wanted 0 to 1");
  CHECK_INVALID(treeattn_head_range(4, 2, -1, &first, &count), "rank: found -1");
  CHECK_INVALID(treeattn_head_range(4, 2, 0, NULL, &count), "first: found NULL");
  CHECK_INVALID(treeattn_head_range(4, 2, 0, &first, NULL), "count: found NULL");
  CHECK_INVALID(treeattn_head_range(4, 2, 0, crooked, &count), "first: found 0x");
  CHECK_INVALID(treeattn_head_range(4, 2, 0, &first, crooked), "count: found 0x");
  CHECK(first == -7 && count == -7);
  CHECK_OK(treeattn_head_range(INT32_MAX, INT32_MAX, INT32_MAX - 1, &first, &count));
  CHECK(first == INT32_MAX - 1 && count == 1);
}

static void placements(void) {
  const treeattn_placement_t all[] = {{TREEATTN_PLACEMENT_CONTIGUOUS, 0},
                                      {TREEATTN_PLACEMENT_INTERLEAVED, 1},
                                      {TREEATTN_PLACEMENT_INTERLEAVED, 4}};
  const int32_t lengths[] = {0, 1, 7, 33};
  for (int p = 0; p < 3; p++) {
    for (int32_t world = 1; world < 6; world++) {
      for (int l = 0; l < 4; l++) {
        int32_t held[6] = {0}, length = -7;
        for (int32_t position = 0; position < lengths[l]; position++) {
          int32_t owner = -7, slot = -7, back = -7;
          CHECK_OK(treeattn_placement_owner(&all[p], world, lengths[l], position, &owner));
          CHECK_OK(treeattn_placement_local_slot(&all[p], world, lengths[l], position, &slot));
          CHECK(owner >= 0 && owner < world && slot == held[owner]);
          CHECK_OK(treeattn_placement_global_position(&all[p], world, owner, lengths[l], slot, &back));
          CHECK(back == position);
          held[owner]++;
        }
        for (int32_t rank = 0; rank < world; rank++) {
          CHECK_OK(treeattn_placement_local_length(&all[p], world, rank, lengths[l], &length));
          CHECK(length == held[rank]);
        }
      }
    }
  }
}

static void bad_placements(void) {
  const treeattn_placement_t good = {TREEATTN_PLACEMENT_CONTIGUOUS, 0};
  int32_t value = -7;
  int32_t *crooked = (int32_t *)(void *)((char *)&value + 2);
#define ALL(placement, text)                                                                    \
  do {                                                                                          \
    const treeattn_placement_t *at = (placement);                                               \
    CHECK_INVALID(treeattn_placement_owner(at, 2, 10, 3, &value), text);                        \
    CHECK_INVALID(treeattn_placement_local_length(at, 2, 0, 10, &value), text);                 \
    CHECK_INVALID(treeattn_placement_local_slot(at, 2, 10, 3, &value), text);                   \
    CHECK_INVALID(treeattn_placement_global_position(at, 2, 0, 10, 3, &value), text);           \
  } while (0)
  ALL(NULL, "placement: found NULL");
  ALL((const treeattn_placement_t *)(const void *)((const char *)&good + 2), "placement: found 0x");
  const treeattn_placement_t bad[] = {
      {3, 0}, {-1, 0}, {INT32_MAX, 0},                                        /* no kind */
      {TREEATTN_PLACEMENT_CONTIGUOUS, 2}, {TREEATTN_PLACEMENT_INTERLEAVED, 0}, /* interleave */
      {TREEATTN_PLACEMENT_INTERLEAVED, -4}, {TREEATTN_PLACEMENT_EXPLICIT, 1},
      {TREEATTN_PLACEMENT_EXPLICIT, 0}, /* the engine's own */
  };
  for (int i = 0; i < 8; i++) {
    ALL(&bad[i], i < 3 || i == 7 ? "placement.kind: found" : "placement.interleave: found");
  }
  for (int32_t world = 0; world > -2; world--) {
    CHECK_INVALID(treeattn_placement_owner(&good, world, 10, 3, &value), "world: found");
    CHECK_INVALID(treeattn_placement_local_length(&good, world, 0, 10, &value), "world: found");
    CHECK_INVALID(treeattn_placement_local_slot(&good, world, 10, 3, &value), "world: found");
    CHECK_INVALID(treeattn_placement_global_position(&good, world, 0, 10, 3, &value), "world: found");
  }
  const int32_t outside[] = {-1, 2, INT32_MAX, INT32_MIN};
  for (int i = 0; i < 4; i++) {
    CHECK_INVALID(treeattn_placement_local_length(&good, 2, outside[i], 10, &value), "rank: found");
    CHECK_INVALID(treeattn_placement_global_position(&good, 2, outside[i], 10, 3, &value), "rank: found");
  }
  const int32_t past[] = {-1, 10, INT32_MAX, INT32_MIN};
  for (int i = 0; i < 4; i++) {
    CHECK_INVALID(treeattn_placement_owner(&good, 2, 10, past[i], &value), "position: found");
    CHECK_INVALID(treeattn_placement_local_slot(&good, 2, 10, past[i], &value), "position: found");
    CHECK_INVALID(treeattn_placement_global_position(&good, 2, 0, 10, past[i], &value), "slot: found");
  }
  for (int i = 0; i < 4; i += 3) {
    CHECK_INVALID(treeattn_placement_owner(&good, 2, past[i], 0, &value), "global_length: found");
    CHECK_INVALID(treeattn_placement_local_length(&good, 2, 0, past[i], &value), "global_length: found");
    CHECK_INVALID(treeattn_placement_local_slot(&good, 2, past[i], 0, &value), "global_length: found");
    CHECK_INVALID(treeattn_placement_global_position(&good, 2, 0, past[i], 0, &value), "global_length: found");
  }
  int32_t *wrong[] = {NULL, crooked};
  for (int i = 0; i < 2; i++) {
    CHECK_INVALID(treeattn_placement_owner(&good, 2, 10, 3, wrong[i]), "owner: found");
    CHECK_INVALID(treeattn_placement_local_length(&good, 2, 0, 10, wrong[i]), "length: found");
    CHECK_INVALID(treeattn_placement_local_slot(&good, 2, 10, 3, wrong[i]), "slot: found");
    CHECK_INVALID(treeattn_placement_global_position(&good, 2, 0, 10, 3, wrong[i]), "position: found");
  }
  CHECK(value == -7);
  /* The largest that there are. */
  const treeattn_placement_t wide = {TREEATTN_PLACEMENT_INTERLEAVED, INT32_MAX};
  CHECK_OK(treeattn_placement_owner(&wide, INT32_MAX, INT32_MAX, INT32_MAX - 1, &value));
  CHECK(value == 0);
  CHECK_OK(treeattn_placement_global_position(&wide, INT32_MAX, 0, INT32_MAX, INT32_MAX - 1, &value));
  CHECK(value == INT32_MAX - 1);
}

int main(void) {
  problem_make(&problem, 3);
  merge_make();
  runtime = runtime_make();
  dead = runtime_make();
  CHECK_OK(treeattn_runtime_destroy(dead));
  merges();
  bad_merges();
  head_ranges();
  placements();
  bad_placements();
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("local");
}
