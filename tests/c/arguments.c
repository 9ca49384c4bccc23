/*
 * Arguments that are each in range but cannot mean what the caller wants: they are refused on this rank, before the step
 * begins and with its outputs untouched.
 */
#include <math.h>

#include "check.h"

enum { TOKENS = 2, CAPACITY = 4, MAX_KEYS = 16, DIM = 2 };

static treeattn_runtime_t *runtime;
static treeattn_comm_t *comms[2];
static float q[TOKENS][DIM], pool[2][1024], out[TOKENS][DIM], lse[TOKENS];

static treeattn_attention_desc_t shape(void) {
  treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
  desc.q_heads = 1;
  desc.kv_heads = 1;
  desc.head_dim_qk = DIM;
  desc.head_dim_v = DIM;
  desc.q_dtype = desc.k_dtype = desc.v_dtype = desc.out_dtype = TREEATTN_DTYPE_F32;
  desc.max_batch = TOKENS;
  desc.max_query_tokens = TOKENS;
  desc.max_kv_length = MAX_KEYS;
  return desc;
}

static treeattn_tensor_t tensor(void *data, size_t bytes) {
  treeattn_tensor_t t = {data, bytes, {0, 0, 0, 0}};
  return t;
}

/* Two sequences of one query token each; k and v have `bytes` bytes. */
static treeattn_decode_args_t step(const int32_t *length, size_t bytes) {
  treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
  args.batch = args.query_tokens = TOKENS;
  args.q = tensor(q, sizeof(q));
  args.k = tensor(pool[0], bytes);
  args.v = tensor(pool[1], bytes);
  args.out = tensor(out, sizeof(out));
  args.lse = tensor(lse, sizeof(lse));
  args.kv_length = length;
  check_fill(out, sizeof(out));
  check_fill(lse, sizeof(lse));
  return args;
}

static treeattn_plan_t *plan_of(treeattn_comm_t *comm, treeattn_attention_desc_t desc) {
  treeattn_plan_t *plan = NULL;
  CHECK_OK(treeattn_plan_create(comm, &desc, &plan));
  return plan;
}

static void refused(treeattn_plan_t *plan, treeattn_decode_args_t args, const char *text) {
  CHECK_INVALID(treeattn_plan_decode(plan, &args, NULL), text);
  CHECK(check_untouched(out, sizeof(out)) && check_untouched(lse, sizeof(lse)));
}

/* The values of sequence 0 are 1, of sequence 1 7; `apart` is how many tokens lie between the beginnings of the two. */
static void fill(int apart) {
  memset(pool, 0, sizeof(pool));
  for (int i = 0; i < 512; i++) {
    pool[1][2 * i] = pool[1][2 * i + 1] = i < apart ? 1.0f : 7.0f;
  }
}

static int is_right(void) { return out[0][0] == 1 && out[0][1] == 1 && out[1][0] == 7 && out[1][1] == 7; }

static void packed(treeattn_plan_t *plan) {
  int32_t length[TOKENS] = {CAPACITY, CAPACITY};
  const size_t exact = TOKENS * CAPACITY * DIM * sizeof(float);
  fill(CAPACITY);
  /* A pool does not tell where sequence 1 begins. */
  refused(plan, step(length, sizeof(pool[0])), "k.bytes: found 4096, wanted 256, a packed k of [2 sequences, max_kv_length = 16 tokens], or in kv_capacity");
  treeattn_decode_args_t args = step(length, sizeof(pool[0]));
  args.kv_capacity = CAPACITY;
  CHECK_OK(treeattn_plan_decode(plan, &args, NULL));
  CHECK(is_right());
  /* The bytes of [2, 4, 1, 2] do, in a full batch. */
  args = step(length, exact);
  CHECK_OK(treeattn_plan_decode(plan, &args, NULL));
  CHECK(is_right());
  /* More tokens than a sequence has room for would be those of the next one. */
  length[0] = CAPACITY + 1;
  args = step(length, sizeof(pool[0]));
  args.kv_capacity = CAPACITY;
  refused(plan, args, "kv_capacity: found 4, wanted at least kv_length[0] = 5");
  args.kv_capacity = -1;
  refused(plan, args, "kv_capacity: found -1");
  /* One sequence has no next one. */
  length[0] = CAPACITY;
  args = step(length, sizeof(pool[0]));
  args.batch = args.query_tokens = 1;
  CHECK_OK(treeattn_plan_decode(plan, &args, NULL));
  CHECK(out[0][0] == 1 && check_untouched(out[1], sizeof(out[1])));
}

/* The last row of a cache may end where its tokens do. */
static void early_ends(treeattn_plan_t *plan) {
  static const int32_t lengths[][TOKENS] = {{MAX_KEYS, 2}, {5, 2}, {MAX_KEYS, 0}, {0, 3}};
  for (int i = 0; i < 4; i++) {
    const size_t row = DIM * sizeof(float);
    const size_t bytes = lengths[i][1] == 0 ? MAX_KEYS * row : (size_t)(MAX_KEYS + lengths[i][1]) * row;
    fill(MAX_KEYS);
    treeattn_decode_args_t args = step(lengths[i], bytes);
    const int64_t stride[4] = {MAX_KEYS * DIM * 4, DIM * 4, DIM * 4, 4};
    memcpy(args.k.stride, stride, sizeof(stride));
    memcpy(args.v.stride, stride, sizeof(stride));
    CHECK_OK(treeattn_plan_decode(plan, &args, NULL));
    CHECK(out[0][0] == (lengths[i][0] > 0 ? 1 : 0) && out[1][1] == (lengths[i][1] > 0 ? 7 : 0));
    /* The same, packed. */
    treeattn_decode_args_t again = step(lengths[i], bytes);
    again.kv_capacity = MAX_KEYS;
    CHECK_OK(treeattn_plan_decode(plan, &again, NULL));
    CHECK(out[0][0] == (lengths[i][0] > 0 ? 1 : 0) && out[1][1] == (lengths[i][1] > 0 ? 7 : 0));
    /* Without the capacity, where the bytes can mean nothing else: {5, 2} in 18 tokens may be two of 9. */
    if (lengths[i][0] == MAX_KEYS && lengths[i][1] > 0) {
      again = step(lengths[i], bytes);
      CHECK_OK(treeattn_plan_decode(plan, &again, NULL));
      CHECK(is_right());
    } else if (lengths[i][0] == 5) {
      refused(plan, step(lengths[i], bytes), "k.bytes: found 144, wanted 256");
    }
    if (lengths[i][1] > 0) {
      args = step(lengths[i], bytes);
      memcpy(args.k.stride, stride, sizeof(stride));
      memcpy(args.v.stride, stride, sizeof(stride));
      args.k.bytes -= 1;
      refused(plan, args, "k.bytes: found ");
      args.k.bytes += 1;
      args.v.bytes -= 1;
      refused(plan, args, "v.bytes: found ");
      CHECK(strstr(treeattn_last_error_message(), "for kv_length[1] = ") != NULL);
    }
  }
}

static void strides(treeattn_plan_t *plan) {
  static const int32_t length[TOKENS] = {2, 2};
  treeattn_decode_args_t args = step(length, sizeof(pool[0]));
  const int64_t stride[4] = {32, 8, 8, 4};
  memcpy(args.k.stride, stride, sizeof(stride));
  memcpy(args.v.stride, stride, sizeof(stride));
  /* The last one was forgotten: every element of a row would be the first. */
  args.k.stride[3] = 0;
  refused(plan, args, "k.stride[3]: found 0, wanted a byte stride between the 2 elements");
  args.k.stride[3] = 4;
  args.v.stride[3] = 0;
  refused(plan, args, "v.stride[3]: found 0");
  args.v.stride[3] = 4;
  args.kv_capacity = 4;
  refused(plan, args, "kv_capacity: found 4, wanted 0 with strides of k and v");
  args.kv_capacity = 0;
  for (int i = 0; i < 4; i++) {
    args.k.stride[i] -= 2;
    refused(plan, args, "a multiple of 4");
    args.k.stride[i] = -8;
    refused(plan, args, "a byte stride of at least 0");
    args.k.stride[i] = stride[i];
  }
  /* Rows of the output that overlap. */
  const int64_t overlap[] = {4, 8, 4, 0};
  memcpy(args.out.stride, overlap, sizeof(overlap));
  refused(plan, args, "out.stride[0]: found 4, wanted at least 8");
  memset(args.out.stride, 0, sizeof(overlap));
  args.lse.stride[1] = 4;
  refused(plan, args, "lse.stride[0]: found 0, wanted at least 4");
  args.lse.stride[1] = 0;
  CHECK_OK(treeattn_plan_decode(plan, &args, NULL));
}

/* What the layout or the placement has no use for. */
static void unused(treeattn_plan_t *plan) {
  static const int32_t length[TOKENS] = {2, 2}, entries[8] = {0};
  const treeattn_decode_args_t good = step(length, TOKENS * CAPACITY * DIM * sizeof(float));
  treeattn_decode_args_t args = good;
#define UNUSED(field, value)                      \
  do {                                            \
    args = good;                                  \
    args.field = (value);                         \
    refused(plan, args, #field ": found ");       \
  } while (0)
  UNUSED(block_table, entries);
  UNUSED(max_pages, 1);
  UNUSED(num_pages, 1);
  UNUSED(page_indptr, entries);
  UNUSED(page_indices, entries);
  UNUSED(num_page_indices, 1);
  UNUSED(last_page_len, entries);
  UNUSED(kv_position, entries);
  UNUSED(kv_position_stride, 1);
  UNUSED(reserved, 1);
  CHECK_OK(treeattn_plan_decode(plan, &good, NULL));
}

static void pages(void) {
  treeattn_attention_desc_t desc = shape();
  desc.kv_layout = TREEATTN_KV_LAYOUT_BLOCK_TABLE;
  desc.page_size = 4;
  treeattn_plan_t *plan = plan_of(comms[0], desc);
  static const int32_t length[TOKENS] = {5, 0}, table[4] = {0, 1, 0, 0};
  treeattn_decode_args_t args = step(length, sizeof(pool[0]));
  refused(plan, args, "max_pages: found 0, wanted at least 1 for kv_length[0] = 5");
  args.max_pages = 2;
  args.block_table = table;
  args.num_pages = 0;
  refused(plan, args, "num_pages: found 0, wanted at least 1 for kv_length[0] = 5");
  args.num_pages = 2;
  CHECK_OK(treeattn_plan_decode(plan, &args, NULL));
  CHECK_OK(treeattn_plan_destroy(plan));
}

/* Lengths of this rank against those of all ranks, without masks and with. */
static void lengths(void) {
  static const int32_t length[TOKENS] = {5, 2}, global[TOKENS] = {10, 4}, lower[TOKENS] = {9, 4};
  static const int32_t start[TOKENS] = {0, 2}, later[TOKENS] = {6, 2}, query_start[TOKENS + 1] = {1, 1, 2};
  const size_t bytes = TOKENS * MAX_KEYS * DIM * sizeof(float);
  for (int32_t causal = 0; causal < 2; causal++) {
    treeattn_attention_desc_t desc = shape();
    desc.causal = causal;
    desc.output = TREEATTN_OUTPUT_LOCAL;
    treeattn_plan_t *plans[4];
    CHECK_OK(treeattn_plan_create_all(2, comms, &desc, &plans[0]));
    desc.placement.kind = TREEATTN_PLACEMENT_INTERLEAVED;
    desc.placement.interleave = 1;
    CHECK_OK(treeattn_plan_create_all(2, comms, &desc, &plans[2]));
    treeattn_plan_t *contiguous = plans[0], *interleaved = plans[3];
    treeattn_decode_args_t args = step(length, bytes);
    args.global_length = global;
    args.kv_start = later;
    refused(contiguous, args, "kv_start[0] + kv_length[0]: found 6 + 5, wanted at most global_length[0] = 10");
    args.kv_start = start;
    args.query_start = query_start;
    refused(contiguous, args, "query_start[0]: found 1, wanted 0");
    args.query_start = NULL;
    if (causal) {
      static const int32_t below[TOKENS] = {10, INT32_MIN}, at[TOKENS] = {9, 3};
      treeattn_decode_args_t given = args;
      given.global_length = below;
      given.query_position = at;
      refused(contiguous, given, "global_length[1]: found -2147483648, wanted at least 0");
    }
    CHECK_OK(treeattn_plan_decode(contiguous, &args, NULL));
    args = step(length, bytes);
    args.global_length = global;
    args.kv_start = start;
    refused(interleaved, args, "kv_start: found 0x");
    args.kv_start = NULL;
    args.global_length = lower; /* of which rank 1 of 2 holds 4 and 2 */
    refused(interleaved, args, "kv_length[0]: found 5, wanted 4, which rank 1 of 2 holds of global_length[0] = 9");
    args.global_length = global;
    args.kv_length = start; /* too few */
    refused(interleaved, args, "kv_length[0]: found 0, wanted 5");
    /* A partial may be over some of the keys. */
    CHECK_OK(treeattn_plan_partial(interleaved, &args, NULL));
    args.kv_length = length;
    CHECK_OK(treeattn_plan_decode(interleaved, &args, NULL));
    for (int i = 0; i < 4; i++) {
      CHECK_OK(treeattn_plan_destroy(plans[i]));
    }
  }
}

/* What is not there, and what is below 0, under the name of what was given. */
static void nothing_there(treeattn_plan_t *plan) {
  static const int32_t length[TOKENS] = {5, 2}, global[TOKENS] = {5, -1};
  treeattn_decode_args_t args = step(length, 0);
  args.kv_capacity = MAX_KEYS;
  refused(plan, args, "k.bytes: found 0, wanted room for kv_length[0] = 5");
  args = step(length, sizeof(pool[0]));
  args.kv_capacity = MAX_KEYS;
  args.global_length = global;
  refused(plan, args, "global_length[1]: found -1, wanted at least 0");

  static const int32_t indptr[TOKENS + 1] = {0, 2, 3}, indices[3] = {0, 1, 0}, last[TOKENS] = {1, 2};
  treeattn_attention_desc_t desc = shape();
  desc.kv_layout = TREEATTN_KV_LAYOUT_CSR_PAGES;
  desc.page_size = CAPACITY;
  treeattn_plan_t *paged = plan_of(comms[0], desc);
  args = step(NULL, sizeof(pool[0]));
  args.page_indptr = indptr;
  args.page_indices = indices;
  args.num_page_indices = 3;
  args.last_page_len = last;
  refused(paged, args, "num_pages: found 0, wanted at least 1 for tokens up to last_page_len[0] = 5");
  args.num_pages = 2;
  CHECK_OK(treeattn_plan_decode(paged, &args, NULL));
  CHECK_OK(treeattn_plan_destroy(paged));
}

/* Where the last sequence ends is not known: its rows are no padding. */
static void bad_end_of_queries(treeattn_plan_t *plan) {
  static const int32_t length[TOKENS] = {5, 2}, ends[3] = {-5, 0, TOKENS + 1};
  fill(MAX_KEYS);
  for (int i = 0; i < 3; i++) {
    const int32_t query_start[TOKENS + 1] = {0, 1, ends[i]};
    treeattn_decode_args_t args = step(length, sizeof(pool[0]));
    args.kv_capacity = MAX_KEYS;
    args.query_start = query_start;
    CHECK(treeattn_plan_decode(plan, &args, NULL) == TREEATTN_ERROR_INVALID_DATA);
    CHECK(strstr(treeattn_last_error_message(), "query_start[2]: found ") != NULL);
    CHECK(out[0][0] == 1.0f && isnan(out[1][0]) && isnan(out[1][1]) && isnan(lse[1]));
  }
}

/* Keys that were rolled back, and stayed in the lengths. */
static void surplus(void) {
  static const int32_t length[TOKENS] = {5, 2}, global[TOKENS] = {3, 2}, start[TOKENS] = {0, 0};
  treeattn_attention_desc_t desc = shape();
  desc.output = TREEATTN_OUTPUT_LOCAL;
  desc.flags = TREEATTN_ATTENTION_SURPLUS_KEYS;
  CHECK_INVALID(treeattn_attention_supported(runtime, TREEATTN_CPU(0), &desc), "flags: found SURPLUS_KEYS");
  desc.causal = 1;
  fill(MAX_KEYS);
  for (int i = 0; i < 5; i++) {
    pool[1][2 * i] = pool[1][2 * i + 1] = i < 3 ? 1.0f : 100.0f;
  }
  for (int which = 0; which < 2; which++) {
    desc.placement.kind = which ? TREEATTN_PLACEMENT_INTERLEAVED : TREEATTN_PLACEMENT_CONTIGUOUS;
    desc.placement.interleave = which ? MAX_KEYS : 0;
    for (int flag = 0; flag < 2; flag++) {
      desc.flags = flag ? TREEATTN_ATTENTION_SURPLUS_KEYS : 0;
      treeattn_plan_t *plan = plan_of(comms[0], desc);
      treeattn_decode_args_t args = step(length, TOKENS * MAX_KEYS * DIM * sizeof(float));
      args.global_length = global;
      args.kv_start = which ? NULL : start;
      if (flag) {
        CHECK_OK(treeattn_plan_decode(plan, &args, NULL));
        CHECK(is_right());
      } else {
        refused(plan, args, "TREEATTN_ATTENTION_SURPLUS_KEYS");
      }
      CHECK_OK(treeattn_plan_destroy(plan));
    }
  }
}

int main(void) {
  const treeattn_device_t devices[2] = {TREEATTN_CPU(0), TREEATTN_CPU(0)};
  treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
  config.threads_per_rank = 1;
  CHECK_OK(treeattn_runtime_create(NULL, &runtime));
  treeattn_comm_t *alone = NULL;
  CHECK_OK(treeattn_comm_create_local(runtime, 1, devices, &config, &alone));
  treeattn_plan_t *plan = plan_of(alone, shape());
  packed(plan);
  early_ends(plan);
  strides(plan);
  unused(plan);

  CHECK_OK(treeattn_comm_create_local(runtime, 1, devices, &config, comms));
  pages();
  surplus();
  nothing_there(plan);
  bad_end_of_queries(plan);
  CHECK_OK(treeattn_plan_destroy(plan));
  CHECK_OK(treeattn_comm_destroy(comms[0]));
  CHECK_OK(treeattn_comm_create_local(runtime, 2, devices, &config, comms));
  lengths();
  CHECK_OK(treeattn_comm_destroy(comms[0]));
  CHECK_OK(treeattn_comm_destroy(comms[1]));
  CHECK_OK(treeattn_comm_destroy(alone));
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("arguments");
}
