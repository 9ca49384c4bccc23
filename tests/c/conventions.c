/*
 * The conventions of other kernels' partials, by treeattn_plan_merge and treeattn_merge_partials: what else than an lse of -inf
 * says that a row is empty, bases, (max, sum), lse tensors by heads first, sequences without keys, and padding.
 */
#include <math.h>

#include "check.h"

enum { WORLD = 3, TOKENS = 5, HEADS = 3, DIM = 6, ROWS = TOKENS * HEADS };

enum rows_told { BY_LSE, BY_LENGTH, BY_LENGTH_AND_START };

typedef struct {
  int base, out_base;
  uint32_t flags;
  float empty; /* the lse of a row without keys */
  int sums;    /* (max, sum) */
  int by_heads;
  enum rows_told told;
} convention_t;

static treeattn_runtime_t *runtime;

/* Sequence s holds token s but for the last two, which are of sequence 3; or tokens 3 and 4 are of no sequence. */
static const int32_t LENGTHS[WORLD][TOKENS] = {{4, 0, 0, 2, 9}, {1, 7, 0, 2, 9}, {4, 3, -1, 2, 9}};
static const int32_t STARTS[TOKENS] = {0, 1, 2, 3, 3};

/* Rank r's partial in double: normalised o, natural lse. */
static double true_o(int r, int row, int d) { return sin(1.0 + r * 31 + row * 7 + d); }
static double true_lse(int r, int row) { return 4.0 * cos(2.0 + r * 13 + row * 5); }

static int is_empty(const convention_t *c, int r, int row) {
  int token = row / HEADS;
  if (c->told == BY_LENGTH_AND_START && token >= STARTS[3]) {
    return 1;
  }
  return LENGTHS[r][token] <= 0;
}

/* What a caller of this convention passes. Side by side for treeattn_merge_partials. */
static struct {
  float o[WORLD][TOKENS][HEADS][DIM];
  float pairs[WORLD][ROWS][2]; /* lse and sum */
  float out[WORLD][TOKENS][HEADS][DIM], out_lse[WORLD][TOKENS][HEADS];
  int32_t lengths[TOKENS], starts[TOKENS];
} memory;

static void fill(const convention_t *c) {
  for (int r = 0; r < WORLD; r++) {
    for (int row = 0; row < ROWS; row++) {
      int token = row / HEADS, head = row % HEADS, at = c->by_heads ? head * TOKENS + token : row;
      double lse = true_lse(r, row), top = c->sums ? lse - 0.25 * (row + 1) : lse, sum = exp(lse - top);
      int nothing = is_empty(c, r, row);
      memory.pairs[r][at][0] = (float)(c->base == 2 ? top / log(2.0) : top);
      memory.pairs[r][at][1] = (float)sum;
      for (int d = 0; d < DIM; d++) {
        memory.o[r][token][head][d] = (float)(true_o(r, row, d) * (c->sums ? sum : 1.0));
      }
      if (nothing) {
        /* What is not read: where lengths tell, the lse as well. */
        memory.pairs[r][at][0] = c->told == BY_LSE ? c->empty : NAN;
        memory.pairs[r][at][1] = c->told == BY_LSE ? 0.0f : NAN;
        for (int d = 0; d < DIM; d++) {
          memory.o[r][token][head][d] = NAN;
        }
      }
    }
  }
  check_fill(memory.out, sizeof(memory.out));
  check_fill(memory.out_lse, sizeof(memory.out_lse));
}

static treeattn_merge_args_t arguments(const convention_t *c, int r) {
  treeattn_merge_args_t args = TREEATTN_MERGE_ARGS_INIT;
  int64_t token = c->by_heads ? 8 : 8 * HEADS, head = c->by_heads ? 8 * TOKENS : 8;
  args.query_tokens = TOKENS;
  args.heads = HEADS;
  args.head_dim = DIM;
  args.o_dtype = args.out_dtype = TREEATTN_DTYPE_F32;
  args.lse_base = c->base;
  args.out_lse_base = c->out_base;
  args.flags = c->flags;
  args.o.data = memory.o[r];
  args.o.bytes = sizeof(memory.o[r]);
  args.lse.data = &memory.pairs[r][0][0];
  args.lse.bytes = sizeof(memory.pairs[r]) - 4;
  args.lse.stride[0] = token;
  args.lse.stride[1] = head;
  if (c->sums) {
    args.sum = args.lse;
    args.sum.data = &memory.pairs[r][0][1];
  }
  if (c->told != BY_LSE) {
    args.kv_length = LENGTHS[r];
    args.batch = TOKENS;
  }
  if (c->told == BY_LENGTH_AND_START) {
    args.query_start = STARTS;
    args.batch = 3;
  }
  args.out.data = memory.out[r];
  args.out.bytes = sizeof(memory.out[r]);
  args.out_lse.data = memory.out_lse[r];
  args.out_lse.bytes = sizeof(memory.out_lse[r]);
  return args;
}

/* The output of rank r against the partials' merge in double. */
static int matches(const convention_t *c, int r) {
  for (int row = 0; row < ROWS; row++) {
    double top = -INFINITY, total = 0.0;
    for (int p = 0; p < WORLD; p++) {
      top = is_empty(c, p, row) ? top : fmax(top, true_lse(p, row));
    }
    for (int p = 0; p < WORLD; p++) {
      total += is_empty(c, p, row) ? 0.0 : exp(true_lse(p, row) - top);
    }
    double lse = (top + log(total)) / (c->out_base == 2 ? log(2.0) : 1.0);
    float found = memory.out_lse[r][row / HEADS][row % HEADS];
    if (total == 0.0 ? found != -INFINITY : !(fabs(found - lse) <= 2e-6 * (1 + fabs(lse)))) {
      printf("row %d of rank %d: lse %g, wanted %g\n", row, r, (double)found, lse);
      return 0;
    }
    for (int d = 0; d < DIM; d++) {
      double wanted = 0.0;
      for (int p = 0; p < WORLD; p++) {
        wanted += is_empty(c, p, row) ? 0.0 : exp(true_lse(p, row) - top) / total * true_o(p, row, d);
      }
      if (!(fabs((double)memory.out[r][row / HEADS][row % HEADS][d] - wanted) <= 2e-6)) {
        printf("row %d of rank %d: %g, wanted %g\n", row, r, (double)memory.out[r][row / HEADS][row % HEADS][d], wanted);
        return 0;
      }
    }
  }
  return 1;
}

static void check(treeattn_plan_t **plans, treeattn_stream_t **streams, const convention_t *c) {
  fill(c);
  for (int r = 0; r < WORLD; r++) {
    treeattn_merge_args_t args = arguments(c, r);
    CHECK_OK(treeattn_plan_merge(plans[r], &args, streams[r]));
  }
  for (int r = 0; r < WORLD; r++) {
    CHECK_OK(treeattn_stream_synchronize(streams[r]));
    CHECK(matches(c, r));
  }
  /* In one place lengths hold for all partials, so that they are said by the lse alone. */
  if (c->told == BY_LSE) {
    fill(c);
    treeattn_merge_args_t args = arguments(c, 0);
    args.o.bytes = sizeof(memory.o);
    args.lse.bytes = sizeof(memory.pairs) - 4;
    args.sum.bytes = c->sums ? args.lse.bytes : 0;
    treeattn_tensor_t *tensors[3] = {&args.o, &args.lse, &args.sum};
    for (int i = 0; i < 3; i++) {
      tensors[i]->stride[2] = i == 0 ? 4 * DIM : tensors[i]->stride[1];
      tensors[i]->stride[1] = i == 0 ? 4 * DIM * HEADS : tensors[i]->stride[0];
      tensors[i]->stride[0] = i == 0 ? 4 * DIM * ROWS : 8 * ROWS;
    }
    args.o.stride[3] = 4;
    CHECK_OK(treeattn_merge_partials(runtime, TREEATTN_CPU(0), &args, WORLD, NULL));
    CHECK(matches(c, 0));
  }
}

static void table(treeattn_plan_t **plans, treeattn_stream_t **streams) {
  const uint32_t both = TREEATTN_MERGE_PLUS_INF_IS_EMPTY | TREEATTN_MERGE_NAN_IS_EMPTY;
  const struct {
    float empty;
    uint32_t flags;
    enum rows_told told;
  } empties[] = {
      {-INFINITY, 0, BY_LSE}, {INFINITY, TREEATTN_MERGE_PLUS_INF_IS_EMPTY, BY_LSE}, {NAN, TREEATTN_MERGE_NAN_IS_EMPTY, BY_LSE},
      {NAN, both, BY_LSE},    {INFINITY, both, BY_LSE},                             {0, 0, BY_LENGTH},
      {0, 0, BY_LENGTH_AND_START},
  };
  int checked = 0;
  for (size_t i = 0; i < sizeof(empties) / sizeof(empties[0]); i++) {
    for (int bits = 0; bits < 16; bits++) {
      convention_t c = {bits & 1 ? 2 : 0, bits & 2 ? 2 : 0, empties[i].flags, empties[i].empty, bits >> 2 & 1, bits >> 3,
                        empties[i].told};
      check(plans, streams, &c);
      checked++;
    }
  }
  CHECK(checked == 7 * 16);
}

/* Without its flag an lse that is no finite number makes its own row NaN, and so does a sum. */
static void not_empty(treeattn_plan_t **plans, treeattn_stream_t **streams) {
  const struct {
    float lse, sum, empty;
    uint32_t flags;
  } bad[] = {{NAN, 1, INFINITY, TREEATTN_MERGE_PLUS_INF_IS_EMPTY},
             {INFINITY, 1, NAN, TREEATTN_MERGE_NAN_IS_EMPTY},
             {0, NAN, NAN, TREEATTN_MERGE_NAN_IS_EMPTY},
             {0, -1, -INFINITY, 0},
             {0, INFINITY, INFINITY, TREEATTN_MERGE_PLUS_INF_IS_EMPTY}};
  for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
    convention_t c = {0, 0, bad[i].flags, bad[i].empty, i > 1, 0, BY_LSE};
    fill(&c);
    memory.pairs[1][4][0] = bad[i].lse;
    memory.pairs[1][4][1] = bad[i].sum;
    for (int r = 0; r < WORLD; r++) {
      treeattn_merge_args_t args = arguments(&c, r);
      CHECK_OK(treeattn_plan_merge(plans[r], &args, streams[r]));
    }
    for (int r = 0; r < WORLD; r++) {
      CHECK_OK(treeattn_stream_synchronize(streams[r]));
      for (int row = 0; row < ROWS; row++) {
        CHECK(isnan(memory.out_lse[r][row / HEADS][row % HEADS]) == (row == 4));
        CHECK(isnan(memory.out[r][row / HEADS][row % HEADS][2]) == (row == 4));
      }
    }
  }
}

static void bad_arguments(treeattn_plan_t *plan, treeattn_stream_t *stream) {
  convention_t c = {0, 0, 0, -INFINITY, 1, 0, BY_LENGTH};
  treeattn_merge_args_t args;
#define INVALID(change, text)                                    \
  do {                                                           \
    args = arguments(&c, 0);                                     \
    change;                                                      \
    CHECK_INVALID(treeattn_plan_merge(plan, &args, stream), text); \
  } while (0)
  INVALID(args.out_lse_base = 10, "out_lse_base: found 10");
  INVALID(args.flags = 4, "flags: found 0x4");
  INVALID(args.sum.bytes = 8, "sum.bytes");
  INVALID(args.sum.stride[0] = 2, "sum.stride[0]");
  INVALID(args.sum.data = memory.out[0], "overlap sum");
  INVALID(args.batch = 3, "query_tokens: found 5");
  INVALID(args.batch = 0, "batch: found 0");
  INVALID(args.batch = -1; args.query_start = STARTS, "batch: found -1");
  INVALID(args.kv_length = NULL, "batch: found 5");
  INVALID(args.kv_length = (const int32_t *)((uintptr_t)LENGTHS | 1), "kv_length");
  INVALID(args.query_start = (const int32_t *)((uintptr_t)STARTS | 2), "query_start");
  INVALID(args.reserved = 1, "reserved");
  static const int32_t starts[][4] = {{1, 1, 2, 3}, {0, 6, 6, 6}, {0, 2, 1, 3}, {0, 1, 2, 6}, {-1, 0, 1, 2}};
  static const char *const texts[] = {"query_start[0]: found 1, wanted 0 to 0", "query_start[1]: found 6, wanted 0 to 5",
                                      "query_start[2]: found 1, wanted 2 to 5", "query_start[3]: found 6, wanted 2 to 5",
                                      "query_start[0]: found -1, wanted 0 to 0"};
  for (size_t i = 0; i < sizeof(starts) / sizeof(starts[0]); i++) {
    INVALID(args.query_start = starts[i]; args.batch = 3, texts[i]);
  }
#undef INVALID
}

int main(void) {
  treeattn_comm_t *comms[WORLD];
  treeattn_stream_t *streams[WORLD];
  treeattn_plan_t *plans[WORLD];
  treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
  CHECK_OK(treeattn_runtime_create(NULL, &runtime));
  const treeattn_device_t devices[WORLD] = {TREEATTN_CPU(0), TREEATTN_CPU(0), TREEATTN_CPU(0)};
  CHECK_OK(treeattn_comm_create_local(runtime, WORLD, devices, NULL, comms));
  desc.q_heads = HEADS;
  desc.head_dim_v = DIM;
  desc.max_query_tokens = TOKENS;
  desc.out_dtype = TREEATTN_DTYPE_F32;
  CHECK_OK(treeattn_plan_create_all(WORLD, comms, &desc, plans));
  for (int r = 0; r < WORLD; r++) {
    CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &streams[r]));
  }
  table(plans, streams);
  not_empty(plans, streams);
  bad_arguments(plans[0], streams[0]);
  for (int r = 0; r < WORLD; r++) {
    CHECK_OK(treeattn_comm_destroy(comms[r]));
    CHECK_OK(treeattn_plan_destroy(plans[r]));
    CHECK_OK(treeattn_stream_destroy(streams[r]));
  }
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("conventions");
}
