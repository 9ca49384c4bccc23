/* treeattn_plan_decode and treeattn_plan_partial on one rank: the good case, and every bad argument. */
#include "problem.h"

static problem_t problem;
static shard_t shard;
static treeattn_runtime_t *runtime;
static treeattn_comm_t *comm;
static treeattn_plan_t *plan;
static treeattn_plan_t *merge_only;

typedef treeattn_status_t (*step_t)(treeattn_plan_t *, const treeattn_decode_args_t *, treeattn_stream_t *);

/* Both calls refuse `args` with `status` and a message that holds `text`, and write nothing. */
static void refused_by(treeattn_plan_t *by, const treeattn_decode_args_t *args, treeattn_status_t status,
                       const char *text) {
  shard_reset(&shard);
  CHECK_STATUS(treeattn_plan_decode(by, args, NULL), status, text);
  CHECK(shard_untouched(&shard));
  CHECK_STATUS(treeattn_plan_partial(by, args, NULL), status, text);
  CHECK(shard_untouched(&shard));
}

static void refused(treeattn_decode_args_t args, const char *text) {
  refused_by(plan, &args, TREEATTN_ERROR_INVALID_ARGUMENT, text);
}

static treeattn_plan_t *plan_of(treeattn_attention_desc_t desc) {
  treeattn_plan_t *made = NULL;
  CHECK_OK(treeattn_plan_create(comm, &desc, &made));
  return made;
}

static void good(void) {
  const step_t steps[] = {treeattn_plan_decode, treeattn_plan_partial};
  for (int i = 0; i < 2; i++) {
    shard_reset(&shard);
    CHECK_OK(steps[i](plan, &shard.args, NULL));
    CHECK(shard_matches(&shard, &problem));
    /* Without lse; its memory stays as it is. */
    shard_reset(&shard);
    treeattn_decode_args_t args = shard.args;
    memset(&args.lse, 0, sizeof(args.lse));
    CHECK_OK(steps[i](plan, &args, NULL));
    CHECK(check_untouched(shard.outputs.lse, sizeof(shard.outputs.lse)));
    CHECK(close_to(shard.outputs.out[1][2][3], problem.out[1][2][3]) && outputs_guarded(&shard.outputs));
    /* An empty step. */
    shard_reset(&shard);
    args.batch = 0;
    args.query_tokens = 0;
    CHECK_OK(steps[i](plan, &args, NULL));
    CHECK(shard_untouched(&shard));
  }
}

static void counts(void) {
  treeattn_decode_args_t a = shard.args;
  a.batch = -1;
  refused(a, "batch: found -1");
  a.batch = BATCH + 1;
  refused(a, "batch: found 3, wanted 0 to the plan's max_batch = 2");
  a.batch = INT32_MAX;
  refused(a, "batch: found");
  a = shard.args;
  a.query_tokens = -1;
  refused(a, "query_tokens: found -1");
  a.query_tokens = BATCH + 1;
  refused(a, "query_tokens: found 3, wanted 0 to the plan's max_query_tokens = 2");
  a.query_tokens = INT32_MIN;
  refused(a, "query_tokens: found");
  a.query_tokens = 1;
  refused(a, "query_tokens: found 1, wanted a multiple of batch");
  a.batch = 0;
  refused(a, "query_tokens: found 1, wanted 0 where batch is 0");
}

static void tensors(void) {
  static const struct {
    const char *name;
    size_t offset;
  } all[] = {
      {"q", offsetof(treeattn_decode_args_t, q)},     {"k", offsetof(treeattn_decode_args_t, k)},
      {"v", offsetof(treeattn_decode_args_t, v)},     {"out", offsetof(treeattn_decode_args_t, out)},
      {"lse", offsetof(treeattn_decode_args_t, lse)},
  };
  for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
    treeattn_decode_args_t a = shard.args;
    treeattn_tensor_t *t = (treeattn_tensor_t *)((unsigned char *)&a + all[i].offset);
    const treeattn_tensor_t whole = *t;
    int is_lse = strcmp(all[i].name, "lse") == 0;
    int is_cache = strcmp(all[i].name, "k") == 0 || strcmp(all[i].name, "v") == 0;
    char text[64];

    snprintf(text, sizeof(text), "%s.data: found", all[i].name);
    for (int off = 1; off < 4; off++) {
      t->data = (unsigned char *)whole.data + off;
      refused(a, text);
    }
    if (!is_lse) {
      t->data = NULL;
      refused(a, text);
    }
    *t = whole;

    snprintf(text, sizeof(text), "%s.bytes: found", all[i].name);
    if (!is_cache) {
      t->bytes = whole.bytes - 1;
      refused(a, text);
      t->bytes = 0;
      refused(a, text);
    } else {
      t->bytes = 1;
      refused(a, text);
    }
    t->bytes = UINT64_MAX;
    refused(a, text);
    *t = whole;

    /* Each stride: negative, no multiple of the element, overflowing, leaving `bytes`. */
    int dims = is_cache ? 4 : is_lse ? 2 : 3;
    for (int dim = 0; dim < dims; dim++) {
      const int64_t bad[] = {-4, INT64_MIN, 2, INT64_MAX, INT64_MAX - 3, 1 << 20};
      int64_t packed = 4;
      for (int d = dims - 1; d >= 0; d--) {
        t->stride[d] = packed;
        packed *= d == dims - 1 ? DIM : d == dims - 2 && is_cache ? KV_HEADS : is_cache ? MAX_LENGTH : Q_HEADS;
      }
      if (is_lse) {
        t->stride[1] = 4;
        t->stride[0] = 4 * Q_HEADS;
      }
      for (size_t j = 0; j < sizeof(bad) / sizeof(bad[0]); j++) {
        /* One token of a cache must fit; where the others lie shows only with their lengths. */
        if (is_cache && dim == 1 && j > 2) {
          continue;
        }
        t->stride[dim] = bad[j];
        snprintf(text, sizeof(text), j > 3 ? "%s." : "%s.stride[%d]: found", all[i].name, dim);
        refused(a, text);
      }
      *t = whole;
    }
  }
  /* Two elements of an output at one address. */
  treeattn_decode_args_t a = shard.args;
  a.out.stride[1] = DIM * 4;
  a.out.stride[2] = 4;
  refused(a, "out.stride[0]: found 0, wanted at least ");
  a = shard.args;
  a.lse.stride[0] = 4;
  refused(a, "lse.stride[1]: found 0, wanted at least ");
}

static void aliases(void) {
  treeattn_decode_args_t a = shard.args;
  a.out.data = shard.q;
  refused(a, "out: found bytes");
  a.out.data = &shard.v[BATCH - 1][MAX_LENGTH - 1][0][4];
  a.out.bytes = sizeof(shard.outputs.out);
  refused(a, "wanted a buffer that shares no byte with v");
  a = shard.args;
  a.lse.data = &shard.k[1][2][0][0];
  refused(a, "wanted a buffer that shares no byte with k");
  a = shard.args;
  a.lse.data = shard.outputs.out;
  refused(a, "shares no byte with lse");
  a = shard.args;
  a.q.data = &shard.outputs.out[0][0][0];
  refused(a, "shares no byte with q");
  /* The integers, too, as far as this shape reads them. */
  int32_t *inside = (int32_t *)(void *)&shard.outputs.out[1][0][0];
  a = shard.args;
  a.kv_length = inside;
  refused(a, "shares no byte with kv_length");
  a.kv_length = (int32_t *)(void *)&shard.outputs.lse[1][3];
  refused(a, "lse: found bytes");
  a = shard.args;
  a.query_start = inside;
  refused(a, "shares no byte with query_start");
  a = shard.args;
  a.query_position = inside;
  shard_reset(&shard);
  CHECK_OK(treeattn_plan_decode(plan, &a, NULL));
  CHECK(shard_matches(&shard, &problem));
}

static void arrays(void) {
  treeattn_decode_args_t a = shard.args;
  a.kv_length = NULL;
  refused(a, "kv_length: found NULL");
  const int32_t *crooked = (const int32_t *)(const void *)((const unsigned char *)shard.kv_length + 2);
  static const struct {
    const char *name;
    size_t offset;
  } all[] = {
      {"kv_length", offsetof(treeattn_decode_args_t, kv_length)},
      {"query_start", offsetof(treeattn_decode_args_t, query_start)},
      {"global_length", offsetof(treeattn_decode_args_t, global_length)},
      {"kv_start", offsetof(treeattn_decode_args_t, kv_start)},
      {"kv_position", offsetof(treeattn_decode_args_t, kv_position)},
      {"query_position", offsetof(treeattn_decode_args_t, query_position)},
      {"last_page_len", offsetof(treeattn_decode_args_t, last_page_len)},
  };
  for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
    char text[64];
    a = shard.args;
    memcpy((unsigned char *)&a + all[i].offset, &crooked, sizeof(crooked));
    snprintf(text, sizeof(text), "%s: found 0x", all[i].name);
    refused(a, text);
  }
  a = shard.args;
  a.kv_position_stride = -1;
  refused(a, "kv_position_stride: found -1");
}

static void structs(void) {
  struct {
    treeattn_decode_args_t known;
    unsigned char tail[32];
  } longer;
  memset(&longer, 0, sizeof(longer));
  longer.known = shard.args;
  longer.known.struct_size = sizeof(longer);
  shard_reset(&shard);
  CHECK_OK(treeattn_plan_decode(plan, &longer.known, NULL));
  CHECK(shard_matches(&shard, &problem));
  for (size_t i = 0; i < sizeof(longer.tail); i += 31) {
    longer.tail[i] = 1;
    refused_by(plan, &longer.known, TREEATTN_ERROR_INVALID_ARGUMENT, "args.struct_size: found 704");
    longer.tail[i] = 0;
  }
  /* The sizes of no version, although what the step needs would be within: half of it, and that of the pointer to it. */
  treeattn_decode_args_t shorter = shard.args;
  shorter.struct_size = offsetof(treeattn_decode_args_t, global_length);
  refused(shorter, "args.struct_size: found 272, wanted sizeof(treeattn_decode_args_t)");
  treeattn_decode_args_t *pointer = &shorter;
  shorter.struct_size = sizeof(pointer);
  refused(*pointer, "args.struct_size: found 8, which is that of a pointer to it, wanted sizeof(treeattn_decode_args_t)");
  const size_t bad[] = {0, 7, (size_t)1 << 17, SIZE_MAX};
  for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
    treeattn_decode_args_t a = shard.args;
    a.struct_size = bad[i];
    refused(a, "args.struct_size: found");
  }
  refused_by(plan, NULL, TREEATTN_ERROR_INVALID_ARGUMENT, "args: found NULL");
  refused_by(plan, (const treeattn_decode_args_t *)(const void *)((const char *)&shard.args + 4),
             TREEATTN_ERROR_INVALID_ARGUMENT, "args: found 0x");
}

/* Bad data in memory: NaN for the sequence, INVALID_DATA, the other sequence good, the communicator usable. */
static void bad_data(treeattn_plan_t *by, shard_t *s, int sequence, const char *text) {
  const step_t steps[] = {treeattn_plan_decode, treeattn_plan_partial};
  for (int i = 0; i < 2; i++) {
    shard_reset(s);
    treeattn_status_t found = steps[i](by, &s->args, NULL);
    CHECK(found == TREEATTN_ERROR_INVALID_DATA);
    CHECK(strstr(treeattn_last_error_message(), text) != NULL);
    CHECK(strstr(treeattn_last_error_message(), "found") != NULL);
    CHECK(strstr(treeattn_last_error_message(), "wanted") != NULL);
    CHECK(sequence_is_nan(&s->outputs, sequence));
    CHECK(sequence_matches(&s->outputs, 1 - sequence, problem.out[1 - sequence], problem.lse[1 - sequence]));
    CHECK(outputs_guarded(&s->outputs));
    /* The call has told it. */
    treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
    CHECK_OK(treeattn_comm_status(comm, &status));
    CHECK(status.code == TREEATTN_OK && status.sequence == -1 && status.broken == 0);
  }
}

static void lengths(void) {
  const int32_t bad[] = {-1, INT32_MIN, MAX_LENGTH + 1, INT32_MAX};
  for (int b = 0; b < BATCH; b++) {
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
      int32_t kept = shard.kv_length[b];
      shard.kv_length[b] = bad[i];
      char wanted[100];
      snprintf(wanted, sizeof(wanted), "kv_length[%d]: found %d, wanted 0 to 24, in sequence %d on rank 0", b, (int)bad[i], b);
      bad_data(plan, &shard, b, wanted);
      shard.kv_length[b] = kept;
    }
  }
  /* A cache whose strides leave `bytes` before the length is out. */
  treeattn_decode_args_t kept = shard.args;
  shard.args.k.stride[0] = 4 * MAX_LENGTH * KV_HEADS * DIM;
  shard.args.k.stride[1] = (int64_t)1 << 40;
  shard.args.k.stride[2] = 4 * DIM;
  shard.args.k.stride[3] = 4;
  shard_reset(&shard);
  refused(shard.args, "k.bytes: found 3072, wanted at least ");
  shard.args = kept;
  /* A cache that is short for the plan but long enough for the lengths. */
  shard.args.k.bytes = sizeof(shard.k[0]) + 5 * sizeof(shard.k[0][0]);
  shard.args.v.bytes = shard.args.k.bytes;
  shard.kv_length[0] = 5;
  shard_reset(&shard);
  CHECK_OK(treeattn_plan_decode(plan, &shard.args, NULL));
  CHECK(sequence_matches(&shard.outputs, 1, problem.out[1], problem.lse[1]));
  /* Its end is that of sequence 1 alone. */
  shard.kv_length[0] = MAX_LENGTH;
  shard_reset(&shard);
  CHECK_OK(treeattn_plan_decode(plan, &shard.args, NULL));
  CHECK(shard_matches(&shard, &problem));
  shard.args.k.bytes -= 1;
  refused(shard.args, "k.bytes: found 1855, wanted 3072, a packed k of [2 sequences, max_kv_length = 24 tokens]");
  shard.args = kept;
  treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
  CHECK_OK(treeattn_comm_status(comm, &status));
}

static void query_starts(void) {
  int32_t start[BATCH + 1] = {0, 1, 2};
  treeattn_decode_args_t kept = shard.args;
  shard.args.query_start = start;
  shard_reset(&shard);
  CHECK_OK(treeattn_plan_decode(plan, &shard.args, NULL));
  CHECK(shard_matches(&shard, &problem));
  const int32_t bad[] = {3, INT32_MAX, -1, INT32_MIN};
  for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
    start[2] = bad[i];
    shard_reset(&shard);
    CHECK(treeattn_plan_decode(plan, &shard.args, NULL) == TREEATTN_ERROR_INVALID_DATA);
    CHECK(strstr(treeattn_last_error_message(), "query_start") != NULL);
    CHECK(sequence_matches(&shard.outputs, 0, problem.out[0], problem.lse[0]) && outputs_guarded(&shard.outputs));
    start[2] = 2;
    start[1] = bad[i];
    shard_reset(&shard);
    CHECK(treeattn_plan_decode(plan, &shard.args, NULL) == TREEATTN_ERROR_INVALID_DATA);
    CHECK(outputs_guarded(&shard.outputs));
    start[1] = 1;
  }
  shard.args = kept;
  treeattn_comm_status_t status = TREEATTN_COMM_STATUS_INIT;
  CHECK_OK(treeattn_comm_status(comm, &status));
}

static void merge_only_plans(void) {
  refused_by(merge_only, &shard.args, TREEATTN_ERROR_INVALID_ARGUMENT, "plan: found kv_heads = 0");
}

static void handles(void) {
  treeattn_plan_t *dead = plan_of(problem_desc());
  CHECK_OK(treeattn_plan_destroy(dead));
  shard_reset(&shard);
  CHECK_BAD_HANDLES(treeattn_plan_t, 0, dead, comm, "plan: found", treeattn_plan_decode(handle, &shard.args, NULL));
  CHECK_BAD_HANDLES(treeattn_plan_t, 0, dead, comm, "plan: found", treeattn_plan_partial(handle, &shard.args, NULL));
  treeattn_stream_t *stream = NULL;
  CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &stream));
  CHECK_OK(treeattn_stream_destroy(stream));
  CHECK_BAD_HANDLES(treeattn_stream_t, 1, stream, plan, "stream: found",
                    treeattn_plan_decode(plan, &shard.args, handle));
  CHECK_BAD_HANDLES(treeattn_stream_t, 1, stream, plan, "stream: found",
                    treeattn_plan_partial(plan, &shard.args, handle));
  CHECK(shard_untouched(&shard));
}

int main(void) {
  problem_make(&problem, 1);
  shard_make(&shard, &problem, 1, 0);
  runtime = runtime_make();
  group_make(runtime, 1, 0, 0, &comm);
  plan = plan_of(problem_desc());
  treeattn_attention_desc_t desc = problem_desc();
  desc.kv_heads = 0;
  merge_only = plan_of(desc);

  good();
  counts();
  tensors();
  aliases();
  arrays();
  structs();
  lengths();
  query_starts();
  merge_only_plans();
  handles();
  good();

  CHECK_OK(treeattn_plan_destroy(merge_only));
  CHECK_OK(treeattn_plan_destroy(plan));
  CHECK_OK(treeattn_comm_destroy(comm));
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("decode");
}
