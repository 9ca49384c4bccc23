/*
 * treeattn_attention_supported, treeattn_plan_create, treeattn_plan_create_all, treeattn_plan_memory,
 * treeattn_plan_stats, treeattn_plan_destroy: what a descriptor may say, who may pass which handle, what plans report.
 */
#include "problem.h"

static treeattn_runtime_t *runtime;
static treeattn_comm_t *one;
static treeattn_comm_t *two[2];
static problem_t problem;

/* Every call that takes a descriptor refuses this one alike, and makes nothing. */
static void refused_with(const treeattn_attention_desc_t *desc, treeattn_status_t status, const char *text) {
  treeattn_plan_t *plan = CHECK_NO_HANDLE(treeattn_plan_t);
  treeattn_plan_t *plans[3];
  CHECK_STATUS(treeattn_attention_supported(runtime, TREEATTN_CPU(0), desc), status, text);
  CHECK_STATUS(treeattn_plan_create(one, desc, &plan), status, text);
  CHECK(plan == CHECK_NO_HANDLE(treeattn_plan_t));
  check_fill(plans, sizeof(plans));
  CHECK_STATUS(treeattn_plan_create_all(2, two, desc, plans), status, text);
  CHECK(check_untouched(plans, sizeof(plans)));
}

#define INVALID(field, value, text)                                  \
  do {                                                               \
    treeattn_attention_desc_t desc = base;                           \
    desc.field = (value);                                            \
    refused_with(&desc, TREEATTN_ERROR_INVALID_ARGUMENT, text);      \
  } while (0)
#define UNSUPPORTED(field, value, text)                              \
  do {                                                               \
    treeattn_attention_desc_t desc = base;                           \
    desc.field = (value);                                            \
    refused_with(&desc, TREEATTN_ERROR_UNSUPPORTED, text);           \
  } while (0)

static void sizes(void) {
  const treeattn_attention_desc_t base = problem_desc();
  const int32_t not_positive[] = {0, -1, INT32_MIN};
  for (int i = 0; i < 3; i++) {
    INVALID(q_heads, not_positive[i], "q_heads: found");
    INVALID(head_dim_qk, not_positive[i], "head_dim_qk: found");
    INVALID(head_dim_v, not_positive[i], "head_dim_v: found");
    INVALID(max_batch, not_positive[i], "max_batch: found");
    INVALID(max_query_tokens, not_positive[i], "max_query_tokens: found");
    INVALID(max_kv_length, not_positive[i], "max_kv_length: found");
  }
  INVALID(max_query_tokens, INT32_MAX, "max_query_tokens x q_heads: found 2147483647 x 4, wanted at most 2147483647");
  INVALID(q_heads, 1 << 30, "max_query_tokens x q_heads: found ");
  INVALID(kv_heads, -1, "kv_heads: found -1");
  INVALID(kv_heads, 3, "kv_heads: found 3, wanted a divisor of q_heads = 4");
  INVALID(kv_heads, INT32_MAX, "kv_heads: found 2147483647");
  INVALID(head_dim_qk, 1025, "head_dim_qk: found 1025, wanted 1 to 1024");
  INVALID(head_dim_v, INT32_MAX, "head_dim_v: found 2147483647");
  INVALID(page_size, 16, "page_size: found 16, wanted 0 with kv_layout STRIDED");
  INVALID(window, -1, "window: found -1");
  INVALID(scale, INFINITY, "scale: found inf");
  INVALID(scale, NAN, "scale: found NaN");
  INVALID(softcap, -1.0f, "softcap: found -1");
  INVALID(softcap, NAN, "softcap: found NaN");
  INVALID(flags, 0x40000000, "flags: found 0x40000000");
  INVALID(flags, UINT32_MAX, "flags: found 0xffffffff");
  INVALID(reserved, 1, "reserved: found 1");
  const int32_t no_answer[] = {-1, 2, INT32_MAX};
  for (int i = 0; i < 3; i++) {
    INVALID(causal, no_answer[i], "causal: found");
    INVALID(alibi, no_answer[i], "alibi: found");
    INVALID(sinks, no_answer[i], "sinks: found");
  }
  for (int layout = TREEATTN_KV_LAYOUT_BLOCK_TABLE; layout <= TREEATTN_KV_LAYOUT_CSR_PAGES; layout++) {
    for (int i = 0; i < 3; i++) {
      treeattn_attention_desc_t desc = base;
      desc.kv_layout = layout;
      desc.page_size = not_positive[i];
      refused_with(&desc, TREEATTN_ERROR_INVALID_ARGUMENT, "page_size: found");
    }
  }
  for (int i = 0; i < 3; i++) {
    treeattn_attention_desc_t desc = base;
    desc.placement.kind = TREEATTN_PLACEMENT_INTERLEAVED;
    desc.placement.interleave = not_positive[i];
    refused_with(&desc, TREEATTN_ERROR_INVALID_ARGUMENT, "placement.interleave: found");
  }
  INVALID(placement.interleave, 4, "placement.interleave: found 4, wanted 0 unless placement.kind is INTERLEAVED");
}

static void codes(void) {
  const treeattn_attention_desc_t base = problem_desc();
  const int32_t no_dtype[] = {-1, 13, INT32_MAX, INT32_MIN};
  for (int i = 0; i < 4; i++) {
    INVALID(q_dtype, no_dtype[i], "q_dtype: found");
    INVALID(k_dtype, no_dtype[i], "k_dtype: found");
    INVALID(v_dtype, no_dtype[i], "v_dtype: found");
    INVALID(out_dtype, no_dtype[i], "out_dtype: found");
    INVALID(wire_dtype, no_dtype[i], "wire_dtype: found");
    INVALID(mask_dtype, no_dtype[i], "mask_dtype: found");
    INVALID(kv_layout, no_dtype[i], "kv_layout: found");
    INVALID(placement.kind, no_dtype[i], "placement.kind: found");
    INVALID(mask, no_dtype[i], "mask: found");
    INVALID(query_input, no_dtype[i], "query_input: found");
    INVALID(output, no_dtype[i], "output: found");
    INVALID(algorithm, no_dtype[i], "algorithm: found");
    INVALID(reproducibility, no_dtype[i], "reproducibility: found");
  }
  INVALID(q_dtype, 0, "q_dtype: found 0");
  INVALID(k_dtype, 0, "k_dtype: found 0");
  INVALID(v_dtype, 0, "v_dtype: found 0");
  INVALID(out_dtype, 0, "out_dtype: found 0");
  for (int quantised = TREEATTN_DTYPE_F8_E4M3; quantised <= TREEATTN_DTYPE_IQ4_NL; quantised++) {
    INVALID(q_dtype, quantised, "q_dtype: found");
    INVALID(out_dtype, quantised, "out_dtype: found");
    INVALID(wire_dtype, quantised, "wire_dtype: found");
    if (quantised == TREEATTN_DTYPE_F8_E4M3 || quantised == TREEATTN_DTYPE_F8_E5M2 || quantised == TREEATTN_DTYPE_INT8) continue;
    INVALID(k_dtype, quantised, "head_dim_qk: found 8, wanted a multiple of 32");
    INVALID(v_dtype, quantised, "head_dim_v: found 8, wanted a multiple of 32");
  }
}

static void later_capabilities(void) {
  const treeattn_attention_desc_t base = problem_desc();
  INVALID(mask, TREEATTN_MASK_ADDITIVE, "mask_dtype: found 0, wanted f16 or f32 with an additive mask");
  INVALID(mask_dtype, TREEATTN_DTYPE_F16, "mask_dtype: found f16, wanted 0 with mask NONE");
  treeattn_attention_desc_t bf16 = base;
  bf16.mask = TREEATTN_MASK_ADDITIVE;
  bf16.mask_dtype = TREEATTN_DTYPE_BF16;
  refused_with(&bf16, TREEATTN_ERROR_UNSUPPORTED, "mask_dtype: found bf16");
  UNSUPPORTED(reproducibility, TREEATTN_REPRODUCIBILITY_BATCH_INVARIANT, "reproducibility: found BATCH_INVARIANT");
  UNSUPPORTED(reproducibility, TREEATTN_REPRODUCIBILITY_CANONICAL, "reproducibility: found CANONICAL");
  treeattn_attention_desc_t local = base;
  local.query_input = TREEATTN_QUERY_INPUT_SCATTERED;
  local.output = TREEATTN_OUTPUT_LOCAL;
  refused_with(&local, TREEATTN_ERROR_UNSUPPORTED, "query_input: found SCATTERED");
  treeattn_attention_desc_t ring = base;
  ring.algorithm = TREEATTN_ALGORITHM_RING;
  ring.kv_heads = 0;
  refused_with(&ring, TREEATTN_ERROR_UNSUPPORTED, "algorithm: found RING");
}

static void structs(void) {
  struct {
    treeattn_attention_desc_t known;
    unsigned char tail[24];
  } longer;
  memset(&longer, 0, sizeof(longer));
  longer.known = problem_desc();
  longer.known.struct_size = sizeof(longer);
  treeattn_plan_t *plan = NULL;
  CHECK_OK(treeattn_attention_supported(runtime, TREEATTN_CPU(0), &longer.known));
  CHECK_OK(treeattn_plan_create(one, &longer.known, &plan));
  CHECK_OK(treeattn_plan_destroy(plan));
  longer.tail[23] = 1;
  refused_with(&longer.known, TREEATTN_ERROR_INVALID_ARGUMENT, "desc.struct_size: found 152 with byte 151 set");
  treeattn_attention_desc_t shorter = problem_desc();
  /* Sizes that no version had: one that would leave `causal` out among them. */
  const size_t bad[] = {0, 1, 8, offsetof(treeattn_attention_desc_t, causal), 120, 124, (size_t)1 << 20, SIZE_MAX};
  for (int i = 0; i < 8; i++) {
    shorter.struct_size = bad[i];
    refused_with(&shorter, TREEATTN_ERROR_INVALID_ARGUMENT, "desc.struct_size: found");
  }
  refused_with(NULL, TREEATTN_ERROR_INVALID_ARGUMENT, "desc: found NULL");
  refused_with((const treeattn_attention_desc_t *)(const void *)((const char *)&shorter + 4),
               TREEATTN_ERROR_INVALID_ARGUMENT, "desc: found 0x");
}

static void supported(void) {
  treeattn_attention_desc_t desc = problem_desc();
  const treeattn_dtype_t dtypes[] = {TREEATTN_DTYPE_F32, TREEATTN_DTYPE_F16, TREEATTN_DTYPE_BF16};
  for (int i = 0; i < 81; i++) {
    desc.q_dtype = dtypes[i % 3];
    desc.k_dtype = dtypes[i / 3 % 3];
    desc.v_dtype = dtypes[i / 9 % 3];
    desc.out_dtype = dtypes[i / 27];
    CHECK_OK(treeattn_attention_supported(runtime, TREEATTN_CPU(0), &desc));
  }
  desc.q_heads = 24;
  desc.kv_heads = 8;
  desc.head_dim_qk = 1024;
  desc.head_dim_v = 1;
  desc.causal = 1;
  desc.output = TREEATTN_OUTPUT_SCATTERED;
  desc.flags = TREEATTN_ATTENTION_KV_STABLE | TREEATTN_ATTENTION_CHECKED;
  desc.max_kv_length = INT32_MAX;
  CHECK_OK(treeattn_attention_supported(runtime, TREEATTN_CPU(0), &desc));
  CHECK_INVALID(treeattn_attention_supported(runtime, TREEATTN_CPU(1), &desc), "device: found cpu:1");
  CHECK_INVALID(treeattn_attention_supported(runtime, -1, &desc), "device: found -1");
  CHECK_INVALID(treeattn_attention_supported(runtime, INT32_MAX, &desc), "device: found 2147483647");
  CHECK_STATUS(treeattn_attention_supported(runtime, TREEATTN_CUDA(65535), &desc), TREEATTN_ERROR_UNAVAILABLE,
               "device: found cuda:65535");
  treeattn_runtime_t *dead = runtime_make();
  CHECK_OK(treeattn_runtime_destroy(dead));
  CHECK_BAD_HANDLES(treeattn_runtime_t, 0, dead, one, "runtime: found",
                    treeattn_attention_supported(handle, TREEATTN_CPU(0), &desc));
}

static void overflowing_sizes(void) {
  treeattn_attention_desc_t desc = problem_desc();
  desc.q_heads = INT32_MAX;
  desc.kv_heads = 1;
  desc.max_query_tokens = INT32_MAX;
  treeattn_plan_t *plan = CHECK_NO_HANDLE(treeattn_plan_t);
  treeattn_status_t found = treeattn_plan_create(one, &desc, &plan);
  CHECK(found == TREEATTN_ERROR_INVALID_ARGUMENT || found == TREEATTN_ERROR_NO_MEMORY);
  CHECK(strstr(treeattn_last_error_message(), "q_heads") != NULL);
  /* Sizes that are in range, but more than any machine has. */
  desc.q_heads = 1 << 20;
  desc.max_query_tokens = 2047;
  desc.head_dim_v = 1024;
  CHECK_STATUS(treeattn_plan_create(one, &desc, &plan), TREEATTN_ERROR_NO_MEMORY, "");
  CHECK(plan == CHECK_NO_HANDLE(treeattn_plan_t));
}

static void creation(void) {
  treeattn_attention_desc_t desc = problem_desc();
  treeattn_plan_t *plan = CHECK_NO_HANDLE(treeattn_plan_t);
  treeattn_plan_t *plans[3];
  treeattn_comm_t *dead[1];
  group_make(runtime, 1, 0, 0, dead);
  CHECK_OK(treeattn_comm_destroy(dead[0]));
  CHECK_BAD_HANDLES(treeattn_comm_t, 0, dead[0], runtime, "comm: found", treeattn_plan_create(handle, &desc, &plan));
  CHECK_INVALID(treeattn_plan_create(one, &desc, NULL), "plan: found NULL");
  CHECK_INVALID(treeattn_plan_create(one, &desc, (treeattn_plan_t **)(void *)((char *)plans + 4)), "plan: found 0x");
  CHECK(plan == CHECK_NO_HANDLE(treeattn_plan_t));

  check_fill(plans, sizeof(plans));
  treeattn_comm_t *mixed[3] = {two[0], NULL, two[1]};
  CHECK_BAD_HANDLES(treeattn_comm_t, 0, dead[0], runtime, "comms[1]: found",
                    (mixed[1] = handle, treeattn_plan_create_all(2, mixed, &desc, plans)));
  CHECK_INVALID(treeattn_plan_create_all(0, two, &desc, plans), "n: found 0");
  CHECK_INVALID(treeattn_plan_create_all(-1, two, &desc, plans), "n: found -1");
  CHECK_INVALID(treeattn_plan_create_all(INT32_MIN, two, &desc, plans), "n: found -2147483648");
  CHECK_INVALID(treeattn_plan_create_all(1, two, &desc, plans), "n: found 1, wanted 2");
  CHECK_INVALID(treeattn_plan_create_all(2, NULL, &desc, plans), "comms: found NULL");
  CHECK_INVALID(treeattn_plan_create_all(2, (treeattn_comm_t *const *)(const void *)((const char *)two + 4), &desc,
                                         plans), "comms: found 0x");
  CHECK_INVALID(treeattn_plan_create_all(2, two, &desc, NULL), "plans: found NULL");
  CHECK_INVALID(treeattn_plan_create_all(2, two, &desc, (treeattn_plan_t **)(void *)((char *)plans + 4)),
                "plans: found 0x");
  mixed[1] = two[0];
  CHECK_INVALID(treeattn_plan_create_all(2, mixed, &desc, plans), "comms: found");
  mixed[1] = one;
  CHECK_INVALID(treeattn_plan_create_all(2, mixed, &desc, plans), "comms: found");
  CHECK(check_untouched(plans, sizeof(plans)));

  /* In any order; plans[i] belongs to comms[i]. */
  mixed[0] = two[1];
  mixed[1] = two[0];
  CHECK_OK(treeattn_plan_create_all(2, mixed, &desc, plans));
  CHECK(check_untouched(&plans[2], sizeof(plans[2])));
  desc.output = TREEATTN_OUTPUT_SCATTERED;
  treeattn_plan_t *scattered[2];
  CHECK_OK(treeattn_plan_create_all(2, mixed, &desc, scattered));
  treeattn_plan_stats_t stats = TREEATTN_PLAN_STATS_INIT;
  CHECK_OK(treeattn_plan_stats(scattered[0], &stats));
  CHECK(stats.plan == 2 && stats.head_begin == 2 && stats.head_end == 4);
  for (int i = 0; i < 2; i++) {
    CHECK_OK(treeattn_plan_destroy(plans[i]));
    CHECK_OK(treeattn_plan_destroy(scattered[i]));
  }
}

static void reports(void) {
  static shard_t shard;
  shard_make(&shard, &problem, 1, 0);
  treeattn_attention_desc_t desc = problem_desc();
  treeattn_plan_t *plan = NULL, *dead = NULL;
  CHECK_OK(treeattn_plan_create(one, &desc, &plan));
  CHECK_OK(treeattn_plan_create(one, &desc, &dead));
  CHECK_OK(treeattn_plan_destroy(dead));
  for (int i = 0; i < 3; i++) {
    CHECK_OK(treeattn_plan_decode(plan, &shard.args, NULL));
  }
  treeattn_plan_stats_t stats = TREEATTN_PLAN_STATS_INIT;
  CHECK_OK(treeattn_plan_stats(plan, &stats));
  CHECK(stats.struct_size == sizeof(stats) && stats.steps == 3 && stats.bytes_sent == 0 && stats.messages == 0);
  CHECK(stats.head_begin == 0 && stats.head_end == Q_HEADS && stats.wire_dtype == TREEATTN_DTYPE_F32);
  CHECK(stats.algorithm == TREEATTN_ALGORITHM_ONE_SHOT && strstr(stats.reason, "one rank") != NULL);
  treeattn_plan_memory_t memory = TREEATTN_PLAN_MEMORY_INIT;
  CHECK_OK(treeattn_plan_memory(plan, &memory));
  CHECK(memory.struct_size == sizeof(memory) && memory.workspace > 0);
  CHECK(stats.peak_memory == memory.workspace + memory.window);

  /* None of it depends on the length of the cache. */
  desc.max_kv_length = INT32_MAX;
  treeattn_plan_t *longest = NULL;
  CHECK_OK(treeattn_plan_create(one, &desc, &longest));
  treeattn_plan_memory_t same = TREEATTN_PLAN_MEMORY_INIT;
  CHECK_OK(treeattn_plan_memory(longest, &same));
  CHECK(same.workspace == memory.workspace && same.window == memory.window);
  CHECK_OK(treeattn_plan_destroy(longest));

  CHECK_BAD_HANDLES(treeattn_plan_t, 0, dead, runtime, "plan: found", treeattn_plan_memory(handle, &memory));
  CHECK_BAD_HANDLES(treeattn_plan_t, 0, dead, runtime, "plan: found", treeattn_plan_stats(handle, &stats));
  CHECK_BAD_HANDLES(treeattn_plan_t, 1, dead, runtime, "plan: found", treeattn_plan_destroy(handle));
  CHECK_INVALID(treeattn_plan_memory(plan, NULL), "memory: found NULL");
  CHECK_INVALID(treeattn_plan_stats(plan, NULL), "stats: found NULL");
  struct {
    size_t struct_size;
    unsigned char rest[512];
  } raw;
  const size_t bad[] = {0, 7, 16, (size_t)1 << 30, SIZE_MAX};
  for (int i = 0; i < 5; i++) {
    check_fill(&raw, sizeof(raw));
    raw.struct_size = bad[i];
    CHECK_INVALID(treeattn_plan_memory(plan, (treeattn_plan_memory_t *)(void *)&raw), "memory.struct_size: found");
    CHECK_INVALID(treeattn_plan_stats(plan, (treeattn_plan_stats_t *)(void *)&raw), "stats.struct_size: found");
    CHECK(check_untouched(raw.rest, sizeof(raw.rest)));
  }
  /* A struct gets what it has room for, a longer one what there is. */
  raw.struct_size = sizeof(memory);
  CHECK_OK(treeattn_plan_memory(plan, (treeattn_plan_memory_t *)(void *)&raw));
  CHECK(memcmp(raw.rest, &memory.workspace, 16) == 0 && check_untouched(raw.rest + 16, sizeof(raw.rest) - 16));
  raw.struct_size = sizeof(raw);
  CHECK_OK(treeattn_plan_stats(plan, (treeattn_plan_stats_t *)(void *)&raw));
  CHECK(memcmp(raw.rest, &stats.plan, sizeof(stats) - 8) == 0);
  CHECK(check_untouched(raw.rest + sizeof(stats) - 8, sizeof(raw.rest) - (sizeof(stats) - 8)));
  CHECK(raw.struct_size == sizeof(raw));

  CHECK_OK(treeattn_plan_destroy(NULL));
  CHECK_OK(treeattn_plan_destroy(plan));
}

/* Every algorithm on four local ranks of two nodes, from one thread with streams: the answer, and what it took. */
static void algorithms(void) {
  enum { WORLD = 4, PARTIAL = BATCH * Q_HEADS * (DIM + 2) * 4 };
  static const struct {
    treeattn_algorithm_t algorithm;
    uint64_t rounds, messages, bytes, memory; /* of rank 3; 0: not asked */
  } all[] = {
      {TREEATTN_ALGORITHM_ONE_SHOT, 1, WORLD - 1, (WORLD - 1) * PARTIAL, PARTIAL},
      {TREEATTN_ALGORITHM_TWO_SHOT, 2, 2 * (WORLD - 1), 2 * PARTIAL * (WORLD - 1) / WORLD, PARTIAL + PARTIAL / WORLD},
      /* In, across, and back; rank 3 sends in, for ranks 0 and 2 lead. */
      {TREEATTN_ALGORITHM_TREE, 3, 1, PARTIAL, 2 * PARTIAL},
      {TREEATTN_ALGORITHM_ALLREDUCE3, 6, 6 * (WORLD - 1),
       2 * (WORLD - 1) * BATCH * Q_HEADS * (DIM + 2) * 4 / WORLD, 0},
      {TREEATTN_ALGORITHM_RING, WORLD, WORLD - 1, 0, 0},
  };
  static const int32_t nodes[WORLD] = {1, 1, 2, 2};
  static shard_t shards[WORLD];
  treeattn_device_t devices[WORLD] = {TREEATTN_CPU(0), TREEATTN_CPU(0), TREEATTN_CPU(0), TREEATTN_CPU(0)};
  treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
  config.threads_per_rank = 1;
  config.node_groups = nodes;
  treeattn_comm_t *comms[WORLD];
  treeattn_stream_t *streams[WORLD];
  CHECK_OK(treeattn_comm_create_local(runtime, WORLD, devices, &config, comms));
  for (int rank = 0; rank < WORLD; rank++) {
    CHECK_OK(treeattn_stream_create(runtime, TREEATTN_CPU(0), &streams[rank]));
    shard_make(&shards[rank], &problem, WORLD, rank);
  }
  for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
    treeattn_attention_desc_t desc = problem_desc();
    desc.algorithm = all[i].algorithm;
    treeattn_plan_t *plans[WORLD];
    CHECK_OK(treeattn_plan_create_all(WORLD, comms, &desc, plans));
    for (int rank = 0; rank < WORLD; rank++) {
      shard_reset(&shards[rank]);
      CHECK_OK(treeattn_plan_decode(plans[rank], &shards[rank].args, streams[rank]));
    }
    for (int rank = 0; rank < WORLD; rank++) {
      CHECK_OK(treeattn_stream_synchronize(streams[rank]));
      CHECK(shard_matches(&shards[rank], &problem));
      CHECK(memcmp(&shards[rank].outputs, &shards[0].outputs, sizeof(outputs_t)) == 0);
    }
    treeattn_plan_stats_t stats = TREEATTN_PLAN_STATS_INIT;
    CHECK_OK(treeattn_plan_stats(plans[WORLD - 1], &stats));
    CHECK(stats.algorithm == all[i].algorithm && strcmp(stats.reason, "asked for") == 0);
    CHECK(stats.rounds == all[i].rounds && stats.messages == all[i].messages);
    CHECK(all[i].bytes == 0 ? stats.bytes_sent > 0 : stats.bytes_sent == all[i].bytes);
    CHECK(all[i].memory == 0 ? stats.exchange_memory > 0 : stats.exchange_memory == all[i].memory);
    CHECK(stats.exchange_memory < stats.peak_memory);
    for (int rank = 0; rank < WORLD; rank++) {
      CHECK_OK(treeattn_plan_destroy(plans[rank]));
    }
  }
  for (int rank = 0; rank < WORLD; rank++) {
    CHECK_OK(treeattn_stream_destroy(streams[rank]));
    CHECK_OK(treeattn_comm_destroy(comms[rank]));
  }
}

/* Parents may go first: their plans answer PARENT_DESTROYED, write nothing, and can still be destroyed. */
static void orphans(void) {
  static shard_t shard;
  for (int which = 0; which < 2; which++) {
    treeattn_runtime_t *own = runtime_make();
    treeattn_comm_t *comm = NULL;
    treeattn_plan_t *plan = NULL, *late = CHECK_NO_HANDLE(treeattn_plan_t);
    treeattn_attention_desc_t desc = problem_desc();
    group_make(own, 1, 0, 0, &comm);
    CHECK_OK(treeattn_plan_create(comm, &desc, &plan));
    shard_make(&shard, &problem, 1, 0);
    const char *who = which == 0 ? "communicator: found destroyed" : "runtime: found destroyed";
    CHECK_OK(which == 0 ? treeattn_comm_destroy(comm) : treeattn_runtime_destroy(own));
    CHECK_PARENT_DESTROYED(treeattn_plan_decode(plan, &shard.args, NULL), who);
    CHECK_PARENT_DESTROYED(treeattn_plan_partial(plan, &shard.args, NULL), who);
    treeattn_merge_args_t merge = TREEATTN_MERGE_ARGS_INIT;
    merge.o_dtype = TREEATTN_DTYPE_F32;
    CHECK_PARENT_DESTROYED(treeattn_plan_merge(plan, &merge, NULL), who);
    unsigned char report[sizeof(treeattn_plan_stats_t)];
    check_fill(report, sizeof(report));
    treeattn_plan_memory_t memory = TREEATTN_PLAN_MEMORY_INIT;
    treeattn_plan_stats_t stats = TREEATTN_PLAN_STATS_INIT;
    CHECK_PARENT_DESTROYED(treeattn_plan_memory(plan, &memory), who);
    CHECK_PARENT_DESTROYED(treeattn_plan_stats(plan, &stats), who);
    CHECK(memory.workspace == 0 && stats.plan == 0);
    CHECK(shard_untouched(&shard));
    if (which == 1) {
      CHECK_PARENT_DESTROYED(treeattn_plan_create(comm, &desc, &late), who);
      CHECK_PARENT_DESTROYED(treeattn_plan_create_all(1, &comm, &desc, &late), who);
      CHECK_OK(treeattn_comm_destroy(comm));
    } else {
      CHECK_OK(treeattn_runtime_destroy(own));
    }
    CHECK(late == CHECK_NO_HANDLE(treeattn_plan_t));
    CHECK_OK(treeattn_plan_destroy(plan));
  }
}

int main(void) {
  problem_make(&problem, 2);
  runtime = runtime_make();
  group_make(runtime, 1, 0, 0, &one);
  group_make(runtime, 2, 0, 0, two);
  sizes();
  codes();
  later_capabilities();
  structs();
  supported();
  overflowing_sizes();
  creation();
  reports();
  algorithms();
  orphans();
  CHECK_OK(treeattn_comm_destroy(one));
  CHECK_OK(treeattn_comm_destroy(two[0]));
  CHECK_OK(treeattn_comm_destroy(two[1]));
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("plan");
}
