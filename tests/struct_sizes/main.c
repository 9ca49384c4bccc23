/*
 * A program compiled with the header of another version: OLDER, in which every struct is as the first version had it, or
 * NEWER, in which every struct has `future` behind its fields. tests/struct_sizes.rs makes those headers.
 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <treeattn.h>

static int failures = 0;

static void expect(int holds, const char *what, int line) {
  if (!holds) {
    failures++;
    printf("main.c:%d: %s does not hold; last message: %s\n", line, what, treeattn_last_error_message());
  }
}
#define EXPECT(condition) expect((condition) != 0, #condition, __LINE__)

enum { GUARD = 128, HEADS = 2, DIM = 4, KEYS = 2 };

static int untouched(const void *bytes, size_t n) {
  for (size_t i = 0; i < n; i++) {
    if (((const unsigned char *)bytes)[i] != 0xA5) {
      return 0;
    }
  }
  return 1;
}

/* A struct with bytes behind it that are not its own and not zero. */
#define GUARDED(type, name, init)     \
  struct {                            \
    type value;                       \
    unsigned char guard[GUARD];       \
  } name;                             \
  do {                                \
    const type initial_ = init;       \
    memset(&name, 0xA5, sizeof(name)); \
    name.value = initial_;            \
  } while (0)

#define GUARD_HOLDS(name) EXPECT(untouched(name.guard, GUARD))

/* A struct that is shorter than that of the first version, as one of a pointer is, or no multiple of 8, is refused by
   name. */
#define TOO_SHORT(argument, type, first, name, call)                                               \
  do {                                                                                             \
    const size_t size_ = name.value.struct_size;                                                   \
    for (size_t short_ = 0; short_ < (first); short_ += short_ < 16 ? 1 : 8) {                      \
      name.value.struct_size = short_;                                                             \
      EXPECT((call) == TREEATTN_ERROR_INVALID_ARGUMENT);                                           \
      EXPECT(strstr(treeattn_last_error_message(), argument ".struct_size: found ") != NULL);      \
      EXPECT(strstr(treeattn_last_error_message(), "wanted sizeof(" #type ")") != NULL);           \
      EXPECT(short_ != sizeof(void *) ||                                                           \
             strstr(treeattn_last_error_message(), "found 8, which is that of a pointer to it") != NULL); \
    }                                                                                              \
    name.value.struct_size = size_;                                                                \
  } while (0)

#ifdef NEWER
/* An input whose unknown field is set is refused by name; once it is zero again the call is as it was. */
#define ASKS_TOO_MUCH(argument, name, call)                                                      \
  do {                                                                                           \
    name.value.future[1] = 1;                                                                    \
    EXPECT((call) == TREEATTN_ERROR_INVALID_ARGUMENT);                                           \
    EXPECT(strstr(treeattn_last_error_message(), argument ".struct_size: found ") != NULL);      \
    name.value.future[1] = 0;                                                                    \
  } while (0)
/* Unknown fields of an output stay as they are. */
#define MARK_UNKNOWN(name) memset(name.value.future, 0xA5, sizeof(name.value.future))
#define UNKNOWN_HOLDS(name) EXPECT(untouched(name.value.future, sizeof(name.value.future)))
#else
#define ASKS_TOO_MUCH(argument, name, call) (void)0
#define MARK_UNKNOWN(name) (void)0
#define UNKNOWN_HOLDS(name) (void)0
#endif

/* A call that fills a struct. */
#define FILLS(type, first, name, call)             \
  do {                                             \
    size_t size_ = name.value.struct_size;         \
    TOO_SHORT(#name, type, first, name, call);     \
    MARK_UNKNOWN(name);                            \
    EXPECT((call) == TREEATTN_OK);                 \
    EXPECT(name.value.struct_size == size_);       \
    UNKNOWN_HOLDS(name);                           \
    GUARD_HOLDS(name);                             \
  } while (0)

static treeattn_tensor_t tensor(void *data, size_t bytes) {
  treeattn_tensor_t t = {data, bytes, {0, 0, 0, 0}};
  return t;
}

/* The allgather of a group of one. */
static int32_t alone(void *ctx, const void *send, void *recv, size_t bytes, int64_t timeout_ns, const int32_t *abort) {
  (void)ctx;
  (void)timeout_ns;
  (void)abort;
  memcpy(recv, send, bytes);
  return 0;
}

int main(void) {
  float q[HEADS * DIM] = {0}, k[KEYS * HEADS * DIM] = {0}, v[KEYS * HEADS * DIM], out[HEADS * DIM];
  int32_t length = KEYS;
  treeattn_runtime_t *runtime = NULL;
  treeattn_comm_t *comm = NULL;
  treeattn_plan_t *plan = NULL;
  const treeattn_device_t cpu = TREEATTN_CPU(0);
  for (int i = 0; i < KEYS * HEADS * DIM; i++) {
    v[i] = (float)i;
  }

  GUARDED(treeattn_runtime_config_t, config, TREEATTN_RUNTIME_CONFIG_INIT);
  ASKS_TOO_MUCH("config", config, treeattn_runtime_create(&config.value, &runtime));
  TOO_SHORT("config", treeattn_runtime_config_t, 16, config, treeattn_runtime_create(&config.value, &runtime));
  EXPECT(runtime == NULL);
  EXPECT(treeattn_runtime_create(&config.value, &runtime) == TREEATTN_OK);
  GUARDED(treeattn_device_info_t, info, TREEATTN_DEVICE_INFO_INIT);
  FILLS(treeattn_device_info_t, 408, info, treeattn_runtime_device_info(runtime, cpu, &info.value));
  EXPECT(info.value.units > 0 && info.value.name[0] != '\0');

  GUARDED(treeattn_comm_config_t, group, TREEATTN_COMM_CONFIG_INIT);
  group.value.threads_per_rank = 1;
  ASKS_TOO_MUCH("config", group, treeattn_comm_create_local(runtime, 1, &cpu, &group.value, &comm));
  TOO_SHORT("config", treeattn_comm_config_t, 48, group, treeattn_comm_create_local(runtime, 1, &cpu, &group.value, &comm));
  EXPECT(comm == NULL);
  EXPECT(treeattn_comm_create_local(runtime, 1, &cpu, &group.value, &comm) == TREEATTN_OK);

  treeattn_comm_t *own = NULL;
  GUARDED(treeattn_transport_t, callbacks, TREEATTN_TRANSPORT_INIT);
  callbacks.value.allgather = alone;
  ASKS_TOO_MUCH("callbacks", callbacks, treeattn_comm_create_from_transport(runtime, &callbacks.value, 1, 0, cpu, &group.value, &own));
  TOO_SHORT("callbacks", treeattn_transport_t, 40, callbacks, treeattn_comm_create_from_transport(runtime, &callbacks.value, 1, 0, cpu, &group.value, &own));
  EXPECT(own == NULL);
  EXPECT(treeattn_comm_create_from_transport(runtime, &callbacks.value, 1, 0, cpu, &group.value, &own) == TREEATTN_OK);
  EXPECT(treeattn_comm_destroy(own) == TREEATTN_OK);

  GUARDED(treeattn_attention_desc_t, desc, TREEATTN_ATTENTION_DESC_INIT);
  desc.value.q_heads = desc.value.kv_heads = HEADS;
  desc.value.head_dim_qk = desc.value.head_dim_v = DIM;
  desc.value.q_dtype = desc.value.k_dtype = desc.value.v_dtype = desc.value.out_dtype = TREEATTN_DTYPE_F32;
  desc.value.max_batch = desc.value.max_query_tokens = 1;
  desc.value.max_kv_length = KEYS;
  ASKS_TOO_MUCH("desc", desc, treeattn_attention_supported(runtime, cpu, &desc.value));
  TOO_SHORT("desc", treeattn_attention_desc_t, 128, desc, treeattn_attention_supported(runtime, cpu, &desc.value));
  ASKS_TOO_MUCH("desc", desc, treeattn_plan_create(comm, &desc.value, &plan));
  TOO_SHORT("desc", treeattn_attention_desc_t, 128, desc, treeattn_plan_create(comm, &desc.value, &plan));
  ASKS_TOO_MUCH("desc", desc, treeattn_plan_create_all(1, &comm, &desc.value, &plan));
  TOO_SHORT("desc", treeattn_attention_desc_t, 128, desc, treeattn_plan_create_all(1, &comm, &desc.value, &plan));
  EXPECT(plan == NULL);
  EXPECT(treeattn_attention_supported(runtime, cpu, &desc.value) == TREEATTN_OK);
  EXPECT(treeattn_plan_create(comm, &desc.value, &plan) == TREEATTN_OK);

  GUARDED(treeattn_decode_args_t, args, TREEATTN_DECODE_ARGS_INIT);
  args.value.batch = args.value.query_tokens = 1;
  args.value.kv_length = &length;
  args.value.q = tensor(q, sizeof(q));
  args.value.k = tensor(k, sizeof(k));
  args.value.v = tensor(v, sizeof(v));
  args.value.out = tensor(out, sizeof(out));
  memset(out, 0xA5, sizeof(out));
  ASKS_TOO_MUCH("args", args, treeattn_plan_decode(plan, &args.value, NULL));
  TOO_SHORT("args", treeattn_decode_args_t, 600, args, treeattn_plan_decode(plan, &args.value, NULL));
  ASKS_TOO_MUCH("args", args, treeattn_plan_partial(plan, &args.value, NULL));
  TOO_SHORT("args", treeattn_decode_args_t, 600, args, treeattn_plan_partial(plan, &args.value, NULL));
  EXPECT(untouched(out, sizeof(out)));
  EXPECT(treeattn_plan_decode(plan, &args.value, NULL) == TREEATTN_OK);
  for (int i = 0; i < HEADS * DIM; i++) {
    /* Equal scores: the mean of the two values. */
    EXPECT(out[i] == (v[i] + v[i + HEADS * DIM]) / 2);
  }
  EXPECT(treeattn_plan_partial(plan, &args.value, NULL) == TREEATTN_OK);

  ASKS_TOO_MUCH("desc", desc, treeattn_energy(runtime, cpu, &desc.value, &args.value, NULL, NULL));
  TOO_SHORT("desc", treeattn_attention_desc_t, 128, desc, treeattn_energy(runtime, cpu, &desc.value, &args.value, NULL, NULL));
  ASKS_TOO_MUCH("args", args, treeattn_energy(runtime, cpu, &desc.value, &args.value, NULL, NULL));
  TOO_SHORT("args", treeattn_decode_args_t, 600, args, treeattn_energy(runtime, cpu, &desc.value, &args.value, NULL, NULL));
  EXPECT(treeattn_energy(runtime, cpu, &desc.value, &args.value, NULL, NULL) == TREEATTN_OK);

  float lse[KEYS * HEADS] = {0};
  GUARDED(treeattn_merge_args_t, merge, TREEATTN_MERGE_ARGS_INIT);
  merge.value.query_tokens = 1;
  merge.value.heads = HEADS;
  merge.value.head_dim = DIM;
  merge.value.o_dtype = TREEATTN_DTYPE_F32;
  merge.value.o = tensor(v, sizeof(v));
  merge.value.lse = tensor(lse, sizeof(lse));
  merge.value.out = tensor(out, sizeof(out));
  memset(out, 0xA5, sizeof(out));
  ASKS_TOO_MUCH("args", merge, treeattn_plan_merge(plan, &merge.value, NULL));
  TOO_SHORT("args", treeattn_merge_args_t, 232, merge, treeattn_plan_merge(plan, &merge.value, NULL));
  ASKS_TOO_MUCH("args", merge, treeattn_merge_partials(runtime, cpu, &merge.value, KEYS, NULL));
  TOO_SHORT("args", treeattn_merge_args_t, 232, merge, treeattn_merge_partials(runtime, cpu, &merge.value, KEYS, NULL));
  EXPECT(untouched(out, sizeof(out)));
  EXPECT(treeattn_plan_merge(plan, &merge.value, NULL) == TREEATTN_OK && out[1] == v[1]);
  EXPECT(treeattn_merge_partials(runtime, cpu, &merge.value, KEYS, NULL) == TREEATTN_OK);
  EXPECT(out[1] == (v[1] + v[1 + HEADS * DIM]) / 2);

  GUARDED(treeattn_plan_memory_t, memory, TREEATTN_PLAN_MEMORY_INIT);
  FILLS(treeattn_plan_memory_t, 24, memory, treeattn_plan_memory(plan, &memory.value));
  EXPECT(memory.value.workspace > 0);
  GUARDED(treeattn_plan_stats_t, stats, TREEATTN_PLAN_STATS_INIT);
  FILLS(treeattn_plan_stats_t, 336, stats, treeattn_plan_stats(plan, &stats.value));
  EXPECT(stats.value.plan == 1 && stats.value.head_end == HEADS);
  GUARDED(treeattn_comm_status_t, status, TREEATTN_COMM_STATUS_INIT);
  FILLS(treeattn_comm_status_t, 552, status, treeattn_comm_status(comm, &status.value));
  EXPECT(status.value.code == TREEATTN_OK && status.value.plan == 1 && status.value.sequence == -1);

  GUARDED(treeattn_selfcheck_config_t, sizes, TREEATTN_SELFCHECK_CONFIG_INIT);
  GUARDED(treeattn_selfcheck_report_t, report, TREEATTN_SELFCHECK_REPORT_INIT);
  ASKS_TOO_MUCH("config", sizes, treeattn_selfcheck(runtime, cpu, &desc.value, &sizes.value, &report.value));
  TOO_SHORT("config", treeattn_selfcheck_config_t, 32, sizes, treeattn_selfcheck(runtime, cpu, &desc.value, &sizes.value, &report.value));
  FILLS(treeattn_selfcheck_report_t, 312, report, treeattn_selfcheck(runtime, cpu, &desc.value, &sizes.value, &report.value));
  EXPECT(report.value.passed == 1 && report.value.rows > 0);

  GUARD_HOLDS(config);
  GUARD_HOLDS(group);
  GUARD_HOLDS(callbacks);
  GUARD_HOLDS(desc);
  GUARD_HOLDS(args);
  GUARD_HOLDS(merge);
  GUARD_HOLDS(sizes);
  EXPECT(treeattn_plan_destroy(plan) == TREEATTN_OK);
  EXPECT(treeattn_comm_destroy(comm) == TREEATTN_OK);
  EXPECT(treeattn_runtime_destroy(runtime) == TREEATTN_OK);
  if (failures == 0) {
    printf("struct sizes: ok\n");
  }
  return failures != 0;
}
