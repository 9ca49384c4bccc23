/*
 * treeattn_plan_decode and treeattn_plan_partial over paged caches, strided views, 16-bit elements and causal
 * positions: the good case, and what may be wrong with tables and positions.
 */
#include "problem.h"

enum { PAGE = 4, PAGES = 11, ROW_PAGES = MAX_LENGTH / PAGE, WORLD = 2 };

static treeattn_runtime_t *runtime;
static treeattn_comm_t *comm;
static problem_t problem;
static shard_t shard;

static float k_pages[PAGES][PAGE][KV_HEADS][DIM];
static float v_pages[PAGES][PAGE][KV_HEADS][DIM];
static int32_t table[BATCH][ROW_PAGES];
static int32_t indptr[BATCH + 1];
static int32_t indices[ROW_PAGES + 2];
static int32_t last[BATCH];

/* Pages in an order of their own; page 0 and all dead slots hold NaN, table entries past the lengths nonsense. */
static void paginate(void) {
  int next = 0;
  shard_make(&shard, &problem, 1, 0);
  for (int page = 0; page < PAGES; page++) {
    for (int i = 0; i < PAGE * KV_HEADS * DIM; i++) {
      (&k_pages[page][0][0][0])[i] = NAN;
      (&v_pages[page][0][0][0])[i] = NAN;
    }
  }
  for (int b = 0; b < BATCH; b++) {
    indptr[b] = next;
    for (int p = 0; p < ROW_PAGES; p++) {
      table[b][p] = 0x7fff0000 + p;
      for (int slot = 0; p * PAGE < LENGTHS[b] && slot < PAGE; slot++) {
        int page = PAGES - 1 - next, from = p * PAGE + slot;
        table[b][p] = page;
        indices[next] = page;
        if (from < LENGTHS[b]) {
          memcpy(k_pages[page][slot], problem.k[b][from], sizeof(k_pages[page][slot]));
          memcpy(v_pages[page][slot], problem.v[b][from], sizeof(v_pages[page][slot]));
        }
      }
      next += p * PAGE < LENGTHS[b];
    }
    last[b] = (LENGTHS[b] - 1) % PAGE + 1;
  }
  indptr[BATCH] = next;
  shard.args.k = tensor(k_pages, sizeof(k_pages));
  shard.args.v = tensor(v_pages, sizeof(v_pages));
  shard.args.num_pages = PAGES;
}

static treeattn_plan_t *plan_of(treeattn_attention_desc_t desc) {
  treeattn_plan_t *made = NULL;
  CHECK_OK(treeattn_plan_create(comm, &desc, &made));
  return made;
}

static void works(treeattn_plan_t *plan) {
  shard_reset(&shard);
  CHECK_OK(treeattn_plan_decode(plan, &shard.args, NULL));
  CHECK(shard_matches(&shard, &problem));
  shard_reset(&shard);
  CHECK_OK(treeattn_plan_partial(plan, &shard.args, NULL));
  CHECK(shard_matches(&shard, &problem));
}

/* Sequence b is NaN and named, the other one is good, nothing around is written, and the next step works. */
static void bad_data(treeattn_plan_t *plan, int b, const char *text) {
  shard_reset(&shard);
  CHECK(treeattn_plan_decode(plan, &shard.args, NULL) == TREEATTN_ERROR_INVALID_DATA);
  CHECK(strstr(treeattn_last_error_message(), text) != NULL);
  CHECK(sequence_is_nan(&shard.outputs, b) && outputs_guarded(&shard.outputs));
  CHECK(sequence_matches(&shard.outputs, 1 - b, problem.out[1 - b], problem.lse[1 - b]));
  treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
  CHECK_OK(treeattn_comm_status(comm, &status));
  CHECK(status.code == TREEATTN_OK && status.sequence == -1 && status.broken == 0);
}

static void refused(treeattn_plan_t *plan, const treeattn_decode_args_t *args, const char *text) {
  shard_reset(&shard);
  CHECK_INVALID(treeattn_plan_decode(plan, args, NULL), text);
  CHECK_INVALID(treeattn_plan_partial(plan, args, NULL), text);
  CHECK(shard_untouched(&shard));
}

#define FIELD(field, value, text)               \
  do {                                          \
    treeattn_decode_args_t a = shard.args;      \
    a.field = (value);                          \
    refused(plan, &a, text);                    \
  } while (0)

/* What holds for both paged layouts. */
static void bad_pages(treeattn_plan_t *plan) {
  FIELD(num_pages, -1, "num_pages: found -1");
  FIELD(num_pages, INT32_MIN, "num_pages: found");
  FIELD(num_pages, PAGES + 1, "k.bytes: found");
  FIELD(num_pages, INT32_MAX, "k.bytes: found");
  FIELD(k.data, NULL, "k.data: found NULL");
  FIELD(k.bytes, sizeof(k_pages) - 1, "k.bytes: found");
  FIELD(v.bytes, sizeof(v_pages) - 1, "v.bytes: found");
  FIELD(v.stride[3], -4, "v.stride[3]: found -4");
  FIELD(k.stride[0], INT64_MAX - 3, "k.stride[0]: found");
}

static void block_tables(void) {
  treeattn_attention_desc_t desc = problem_desc();
  desc.kv_layout = TREEATTN_KV_LAYOUT_BLOCK_TABLE;
  desc.page_size = PAGE;
  treeattn_plan_t *plan = plan_of(desc);
  paginate();
  shard.args.block_table = &table[0][0];
  shard.args.max_pages = ROW_PAGES;
  works(plan);
  bad_pages(plan);
  FIELD(max_pages, -1, "max_pages: found -1");
  FIELD(block_table, NULL, "block_table: found NULL");
  FIELD(block_table, (int32_t *)(void *)((char *)table + 2), "block_table: found 0x");
  FIELD(kv_length, NULL, "kv_length: found NULL");
  FIELD(block_table, (int32_t *)(void *)shard.outputs.out, "shares no byte with block_table");
  const int32_t pages[] = {-1, PAGES, INT32_MAX, INT32_MIN};
  for (int i = 0; i < 4; i++) {
    for (int b = 0; b < BATCH; b++) {
      for (int p = 0; p < (LENGTHS[b] + PAGE - 1) / PAGE; p++) {
        int32_t kept = table[b][p];
        table[b][p] = pages[i];
        bad_data(plan, b, "block_table");
        table[b][p] = kept;
      }
    }
  }
  /* A length that the table has no row for. */
  shard.args.max_pages = ROW_PAGES - 1;
  int32_t rows[BATCH][ROW_PAGES - 1];
  for (int b = 0; b < BATCH; b++) {
    memcpy(rows[b], table[b], sizeof(rows[b]));
  }
  shard.args.block_table = &rows[0][0];
  bad_data(plan, 0, "kv_length");
  shard.args.block_table = &table[0][0];
  shard.args.max_pages = ROW_PAGES;
  works(plan);
  CHECK_OK(treeattn_plan_destroy(plan));
}

static void csr_pages(void) {
  treeattn_attention_desc_t desc = problem_desc();
  desc.kv_layout = TREEATTN_KV_LAYOUT_CSR_PAGES;
  desc.page_size = PAGE;
  treeattn_plan_t *plan = plan_of(desc);
  paginate();
  shard.args.page_indptr = indptr;
  shard.args.page_indices = indices;
  shard.args.num_page_indices = indptr[BATCH];
  works(plan);
  shard.args.kv_length = NULL;
  shard.args.last_page_len = last;
  works(plan);
  bad_pages(plan);
  FIELD(page_indptr, NULL, "page_indptr: found NULL");
  FIELD(page_indices, NULL, "page_indices: found NULL");
  FIELD(page_indptr, (int32_t *)(void *)((char *)indptr + 1), "page_indptr: found 0x");
  FIELD(page_indices, (int32_t *)(void *)((char *)indices + 2), "page_indices: found 0x");
  FIELD(last_page_len, (int32_t *)(void *)((char *)last + 3), "last_page_len: found 0x");
  FIELD(page_indptr, (int32_t *)(void *)shard.outputs.out, "shares no byte with page_indptr");
  FIELD(page_indices, (int32_t *)(void *)shard.outputs.lse, "shares no byte with page_indices");
  FIELD(last_page_len, (int32_t *)(void *)shard.outputs.lse, "shares no byte with last_page_len");
  FIELD(num_page_indices, -1, "num_page_indices: found -1");
  FIELD(num_page_indices, INT64_MIN, "num_page_indices: found");
  FIELD(num_page_indices, INT64_MAX,
        "num_page_indices: found 9223372036854775807, wanted an array page_indices that ends below 2^64");
  FIELD(last_page_len, NULL, "kv_length, last_page_len: found neither");
  FIELD(kv_length, shard.kv_length, "kv_length, last_page_len: found both");
  const int32_t pages[] = {-1, PAGES, INT32_MAX, INT32_MIN};
  for (int i = 0; i < 4; i++) {
    for (int b = 0; b < BATCH; b++) {
      for (int p = indptr[b]; p < indptr[b + 1]; p++) {
        int32_t kept = indices[p];
        indices[p] = pages[i];
        bad_data(plan, b, "page_indices");
        indices[p] = kept;
      }
      const int32_t lengths[] = {0, -1, PAGE + 1, INT32_MAX};
      int32_t kept = last[b];
      last[b] = lengths[i];
      bad_data(plan, b, "last_page_len");
      last[b] = kept;
    }
    const int32_t ends[] = {-1, indptr[BATCH] + 1, INT32_MAX, INT32_MIN};
    int32_t kept = indptr[BATCH];
    indptr[BATCH] = ends[i];
    bad_data(plan, 1, "page_indptr");
    indptr[BATCH] = kept;
  }
  works(plan);
  CHECK_OK(treeattn_plan_destroy(plan));
}

/* HND, a gap between tokens, V as a view of K, and outputs with gaps: what lies in the gaps stays as it is. */
static void strides(void) {
  static float k[BATCH][KV_HEADS][MAX_LENGTH][2 * DIM];
  static struct {
    float out[Q_HEADS][BATCH][DIM + 3];
    unsigned char after[GUARD_BYTES];
  } gaps;
  treeattn_plan_t *plan = plan_of(problem_desc());
  shard_make(&shard, &problem, 1, 0);
  for (int b = 0; b < BATCH; b++) {
    for (int g = 0; g < KV_HEADS; g++) {
      for (int j = 0; j < MAX_LENGTH; j++) {
        memcpy(&k[b][g][j][0], shard.k[b][j][g], sizeof(float) * DIM);
        memcpy(&k[b][g][j][DIM], shard.v[b][j][g], sizeof(float) * DIM);
      }
    }
  }
  const int64_t stride[4] = {sizeof(k[0]), sizeof(k[0][0][0]), sizeof(k[0][0]), sizeof(float)};
  shard.args.k = tensor(k, sizeof(k));
  shard.args.v = tensor(&k[0][0][0][DIM], sizeof(k) - sizeof(float) * DIM);
  memcpy(shard.args.k.stride, stride, sizeof(stride));
  memcpy(shard.args.v.stride, stride, sizeof(stride));
  works(plan);
  const int64_t out_stride[4] = {sizeof(gaps.out[0][0]), sizeof(gaps.out[0]), sizeof(float), 0};
  shard.args.out = tensor(gaps.out, sizeof(gaps.out));
  memcpy(shard.args.out.stride, out_stride, sizeof(out_stride));
  check_fill(&gaps, sizeof(gaps));
  shard_reset(&shard);
  CHECK_OK(treeattn_plan_decode(plan, &shard.args, NULL));
  for (int b = 0; b < BATCH; b++) {
    for (int h = 0; h < Q_HEADS; h++) {
      for (int d = 0; d < DIM; d++) {
        CHECK(close_to(gaps.out[h][b][d], problem.out[b][h][d]));
      }
      CHECK(check_untouched(&gaps.out[h][b][DIM], 3 * sizeof(float)));
    }
  }
  CHECK(check_untouched(gaps.after, GUARD_BYTES) && check_untouched(shard.outputs.out, sizeof(shard.outputs.out)));
  CHECK_OK(treeattn_plan_destroy(plan));
}

/* bf16 keys whose low halves are zero, and an f16 output of integers: exact in both. */
static void half_elements(void) {
  static uint16_t v[BATCH][MAX_LENGTH][KV_HEADS][DIM], out[BATCH][Q_HEADS][DIM + 1];
  treeattn_attention_desc_t desc = problem_desc();
  desc.v_dtype = TREEATTN_DTYPE_BF16;
  desc.out_dtype = TREEATTN_DTYPE_F16;
  treeattn_plan_t *plan = plan_of(desc);
  shard_make(&shard, &problem, 1, 0);
  for (int i = 0; i < BATCH * MAX_LENGTH * KV_HEADS * DIM; i++) {
    (&v[0][0][0][0])[i] = 0x4040; /* 3 in bf16 */
  }
  shard.args.v = tensor(v, sizeof(v));
  shard.args.out = tensor(out, sizeof(out));
  shard.args.out.stride[0] = sizeof(out[0]);
  shard.args.out.stride[1] = sizeof(out[0][0]);
  shard.args.out.stride[2] = sizeof(uint16_t);
  check_fill(out, sizeof(out));
  CHECK_OK(treeattn_plan_decode(plan, &shard.args, NULL));
  for (int row = 0; row < BATCH * Q_HEADS; row++) {
    for (int d = 0; d < DIM; d++) {
      CHECK(out[row / Q_HEADS][row % Q_HEADS][d] == 0x4200); /* 3 in f16 */
    }
    CHECK(check_untouched(&out[row / Q_HEADS][row % Q_HEADS][DIM], 2));
  }
  treeattn_decode_args_t a = shard.args;
  a.v.data = (char *)v + 1;
  refused(plan, &a, "v.data: found 0x");
  a = shard.args;
  a.out.stride[1] += 1;
  refused(plan, &a, "out.stride[1]: found 19");
  CHECK_OK(treeattn_plan_destroy(plan));
}

/* Causal: queries at the end of a sequence see the keys up to their own position, wherever these are. */
static void positions(void) {
  static float q[3][Q_HEADS][DIM];
  static struct {
    float out[3][Q_HEADS][DIM];
    unsigned char after[GUARD_BYTES];
  } outputs;
  static int32_t position[BATCH][MAX_LENGTH];
  int32_t start[BATCH + 1] = {0, 2, 3};
  treeattn_attention_desc_t desc = problem_desc();
  desc.causal = 1;
  desc.max_query_tokens = 3;
  for (int explicit_positions = 0; explicit_positions < 2; explicit_positions++) {
    desc.placement.kind = explicit_positions ? TREEATTN_PLACEMENT_EXPLICIT : TREEATTN_PLACEMENT_CONTIGUOUS;
    treeattn_plan_t *plan = plan_of(desc);
    shard_make(&shard, &problem, 1, 0);
    memcpy(q[0], problem.q[0], sizeof(q[0]));
    memcpy(q[1], problem.q[0], sizeof(q[1]));
    memcpy(q[2], problem.q[1], sizeof(q[2]));
    for (int b = 0; b < BATCH; b++) {
      for (int j = 0; j < MAX_LENGTH; j++) {
        position[b][j] = j < LENGTHS[b] ? j : INT32_MIN;
      }
    }
    shard.args.query_tokens = 3;
    shard.args.query_start = start;
    shard.args.q = tensor(q, sizeof(q));
    shard.args.out = tensor(outputs.out, sizeof(outputs.out));
    shard.args.lse.data = NULL;
    shard.args.global_length = shard.global_length;
    shard.args.kv_position = explicit_positions ? &position[0][0] : NULL;
    check_fill(&outputs, sizeof(outputs));
    CHECK_OK(treeattn_plan_decode(plan, &shard.args, NULL));
    for (int row = 0; row < 3; row++) {
      int b = row / 2, seen = row == 0 ? LENGTHS[0] - 1 : LENGTHS[b];
      for (int h = 0; h < Q_HEADS; h++) {
        double out[DIM], lse;
        problem_attend(&problem, b, h, 0, seen, out, &lse);
        for (int d = 0; d < DIM; d++) {
          CHECK(close_to(outputs.out[row][h][d], out[d]));
        }
      }
    }
    CHECK(check_untouched(outputs.after, GUARD_BYTES));
    treeattn_decode_args_t a = shard.args;
    a.global_length = NULL;
    check_fill(&outputs, sizeof(outputs));
    refused(plan, &a, "global_length: found NULL");
    if (explicit_positions) {
      a = shard.args;
      a.kv_position = NULL;
      refused(plan, &a, "kv_position: found NULL");
      a.kv_position = (int32_t *)(void *)((char *)position + 1);
      refused(plan, &a, "kv_position: found 0x");
      a = shard.args;
      a.kv_position_stride = INT64_MAX / 2;
      refused(plan, &a, "kv_position_stride: found 4611686018427387903, wanted an array kv_position that ends below 2^64");
    }
    a = shard.args;
    a.global_length = (int32_t *)(void *)outputs.out;
    refused(plan, &a, "shares no byte with global_length");
    a = shard.args;
    a.query_position = (int32_t *)(void *)&outputs.out[2][3][7];
    refused(plan, &a, "shares no byte with query_position");
    a = shard.args;
    if (explicit_positions) {
      a.kv_position = (int32_t *)(void *)outputs.out;
    } else {
      a.kv_start = (int32_t *)(void *)outputs.out;
    }
    refused(plan, &a, explicit_positions ? "shares no byte with kv_position" : "shares no byte with kv_start");
    CHECK(check_untouched(&outputs, sizeof(outputs)));
    const int32_t lengths[] = {-1, 1, INT32_MIN};
    for (int i = 0; i < 3; i++) {
      /* Fewer tokens than queries, or none at all. */
      shard.global_length[0] = lengths[i];
      CHECK(treeattn_plan_decode(plan, &shard.args, NULL) == TREEATTN_ERROR_INVALID_DATA);
      CHECK(strstr(treeattn_last_error_message(), "global_length") != NULL && isnan(outputs.out[1][2][3]));
      CHECK(!isnan(outputs.out[2][0][0]) && check_untouched(outputs.after, GUARD_BYTES));
    }
    shard.global_length[0] = LENGTHS[0];
    if (explicit_positions) {
      position[1][2] = -1;
      CHECK(treeattn_plan_decode(plan, &shard.args, NULL) == TREEATTN_ERROR_INVALID_DATA);
      CHECK(strstr(treeattn_last_error_message(), "kv_position") != NULL && isnan(outputs.out[2][2][3]));
      CHECK(!isnan(outputs.out[0][0][0]));
    }
    CHECK_OK(treeattn_plan_destroy(plan));
  }
  /* Several ranks: where a contiguous shard begins must be said. */
  treeattn_comm_t *pair[WORLD];
  treeattn_plan_t *plans[WORLD];
  desc.placement.kind = TREEATTN_PLACEMENT_CONTIGUOUS;
  group_make(runtime, WORLD, 0, 0, pair);
  CHECK_OK(treeattn_plan_create_all(WORLD, pair, &desc, plans));
  shard_make(&shard, &problem, WORLD, 1);
  shard.args.global_length = shard.global_length;
  refused(plans[1], &shard.args, "kv_start: found NULL");
  for (int i = 0; i < WORLD; i++) {
    CHECK_OK(treeattn_plan_destroy(plans[i]));
    CHECK_OK(treeattn_comm_destroy(pair[i]));
  }
}

int main(void) {
  problem_make(&problem, 6);
  runtime = runtime_make();
  group_make(runtime, 1, 0, 0, &comm);
  block_tables();
  csr_pages();
  strides();
  half_elements();
  positions();
  CHECK_OK(treeattn_comm_destroy(comm));
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("pages");
}
