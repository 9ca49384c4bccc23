/* treeattn_selfcheck. */
#include "problem.h"

static treeattn_runtime_t *runtime;
static struct {
  size_t struct_size;
  unsigned char rest[400];
} raw;

static void refused(treeattn_device_t device, const treeattn_attention_desc_t *desc,
                    const treeattn_selfcheck_config_t *config, treeattn_status_t status, const char *text) {
  check_fill(raw.rest, sizeof(raw.rest));
  raw.struct_size = sizeof(raw);
  CHECK_STATUS(treeattn_selfcheck(runtime, device, desc, config, (treeattn_selfcheck_report_t *)(void *)&raw), status,
               text);
  CHECK(check_untouched(raw.rest, sizeof(raw.rest)));
}

static void good(void) {
  treeattn_attention_desc_t desc = problem_desc();
  treeattn_selfcheck_report_t report = TREEATTN_SELFCHECK_REPORT_INIT;
  CHECK_OK(treeattn_selfcheck(runtime, TREEATTN_CPU(0), &desc, NULL, &report));
  CHECK(report.struct_size == sizeof(report) && report.passed != 0 && report.same_bits != 0 && report.rows > 0);
  CHECK(report.max_error_ratio <= 1.0 && report.max_lse_error_ratio <= 1.0 && report.correctly_rounded <= 1.0);
  CHECK(memchr(report.message, 0, sizeof(report.message)) != NULL && report.message[0] != '\0');

  treeattn_selfcheck_config_t config = TREEATTN_SELFCHECK_CONFIG_INIT;
  config.ranks = 3;
  config.kv_length = 2 * MAX_LENGTH;
  config.seed = 5;
  desc.k_dtype = TREEATTN_DTYPE_F16;
  desc.v_dtype = TREEATTN_DTYPE_BF16;
  desc.kv_layout = TREEATTN_KV_LAYOUT_BLOCK_TABLE;
  desc.page_size = 4;
  desc.causal = 1;
  desc.placement.kind = TREEATTN_PLACEMENT_INTERLEAVED;
  desc.placement.interleave = 3;
  desc.output = TREEATTN_OUTPUT_SCATTERED;
  desc.query_input = TREEATTN_QUERY_INPUT_SCATTERED;
  treeattn_selfcheck_report_t other = TREEATTN_SELFCHECK_REPORT_INIT;
  CHECK_OK(treeattn_selfcheck(runtime, TREEATTN_CPU(0), &desc, &config, &other));
  CHECK(other.passed != 0 && other.same_bits != 0);
  if (other.passed == 0) {
    printf("%s\n", other.message);
  }
  /* The same with a device a rank: the same numbers. */
  const treeattn_device_t devices[] = {TREEATTN_CPU(0), TREEATTN_CPU(0), TREEATTN_CPU(0)};
  treeattn_selfcheck_report_t third = TREEATTN_SELFCHECK_REPORT_INIT;
  config.devices = devices;
  CHECK_OK(treeattn_selfcheck(runtime, TREEATTN_CPU(0), &desc, &config, &third));
  CHECK(memcmp(&third, &other, sizeof(third)) == 0);
}

static void bad(void) {
  treeattn_attention_desc_t desc = problem_desc();
  treeattn_selfcheck_config_t config = TREEATTN_SELFCHECK_CONFIG_INIT;
  const treeattn_status_t invalid = TREEATTN_ERROR_INVALID_ARGUMENT;
  refused(TREEATTN_CPU(1), &desc, NULL, invalid, "device: found cpu:1");
  refused(-1, &desc, NULL, invalid, "device: found -1");
  refused(TREEATTN_CUDA(65535), &desc, NULL, TREEATTN_ERROR_UNAVAILABLE, "device: found cuda:65535");
  refused(0, NULL, NULL, invalid, "desc: found NULL");
  refused(0, (treeattn_attention_desc_t *)(void *)((char *)&desc + 4), NULL, invalid, "desc: found 0x");
  refused(0, &desc, (treeattn_selfcheck_config_t *)(void *)((char *)&config + 4), invalid, "config: found 0x");
#define DESC(field, value, status, text)              \
  do {                                                \
    treeattn_attention_desc_t d = problem_desc();     \
    d.field = (value);                                \
    refused(0, &d, NULL, status, text);               \
  } while (0)
  DESC(struct_size, 0, invalid, "desc.struct_size: found 0");
  DESC(q_heads, 0, invalid, "q_heads: found 0");
  DESC(kv_heads, 0, invalid, "kv_heads: found 0");
  DESC(kv_heads, 3, invalid, "kv_heads: found 3");
  DESC(q_dtype, 13, invalid, "q_dtype: found 13");
  DESC(reserved, 1, invalid, "reserved: found 1");
  DESC(reproducibility, TREEATTN_REPRODUCIBILITY_CANONICAL, TREEATTN_ERROR_UNSUPPORTED, "reproducibility: found CANONICAL");
  DESC(k_dtype, TREEATTN_DTYPE_Q8_0, invalid, "head_dim_qk: found");
#define CONFIG(field, value, text)                                     \
  do {                                                                 \
    treeattn_selfcheck_config_t c = TREEATTN_SELFCHECK_CONFIG_INIT;    \
    c.field = (value);                                                 \
    refused(0, &desc, &c, invalid, text);                              \
  } while (0)
  CONFIG(struct_size, 3, "config.struct_size: found 3");
  const int32_t wrong[] = {-1, INT32_MIN, INT32_MAX};
  for (int i = 0; i < 3; i++) {
    CONFIG(ranks, wrong[i], "ranks: found");
    CONFIG(batch, wrong[i], "batch: found");
    CONFIG(query_tokens, wrong[i], "query_tokens: found");
    CONFIG(kv_length, wrong[i], "kv_length: found");
  }
  const treeattn_device_t devices[] = {TREEATTN_CPU(0), TREEATTN_CUDA(0)};
  config.devices = devices;
  refused(0, &desc, &config, invalid, "ranks: found 0, wanted 1 to 1024, the number of devices");
  config.ranks = 1025;
  refused(0, &desc, &config, invalid, "ranks: found 1025");
  config.ranks = 2;
  refused(0, &desc, &config, invalid, "devices: found cuda:0, wanted CPUs only, or GPUs only");
  refused(TREEATTN_CUDA(0), &desc, &config, invalid, "device: found cuda:0, wanted devices[0] = cpu:0");
  config.devices = (const treeattn_device_t *)(const void *)((const char *)devices + 1);
  refused(0, &desc, &config, invalid, "devices: found 0x");
  struct {
    treeattn_selfcheck_config_t known;
    unsigned char tail[8];
  } longer;
  memset(&longer, 0, sizeof(longer));
  longer.known.struct_size = sizeof(longer);
  longer.tail[0] = 1;
  refused(0, &desc, &longer.known, invalid, "config.struct_size: found 48 with byte 40 set");

  treeattn_selfcheck_report_t *into = (treeattn_selfcheck_report_t *)(void *)&raw;
  CHECK_INVALID(treeattn_selfcheck(runtime, 0, &desc, NULL, NULL), "report: found NULL");
  CHECK_INVALID(treeattn_selfcheck(runtime, 0, &desc, NULL, (treeattn_selfcheck_report_t *)(void *)(raw.rest + 3)),
                "report: found 0x");
  raw.struct_size = 4;
  CHECK_INVALID(treeattn_selfcheck(runtime, 0, &desc, NULL, into), "report.struct_size: found 4");
  treeattn_runtime_t *dead = runtime_make();
  treeattn_stream_t *stream = NULL;
  CHECK_OK(treeattn_stream_create(runtime, 0, &stream));
  CHECK_OK(treeattn_runtime_destroy(dead));
  CHECK_BAD_HANDLES(treeattn_runtime_t, 0, dead, stream, "runtime: found",
                    treeattn_selfcheck(handle, 0, &desc, NULL, into));
  CHECK_OK(treeattn_stream_destroy(stream));
  raw.struct_size = offsetof(treeattn_selfcheck_report_t, rows);
  CHECK_INVALID(treeattn_selfcheck(runtime, 0, &desc, NULL, into), "report.struct_size: found 16");
  CHECK(check_untouched(raw.rest, sizeof(raw.rest)));
}

int main(void) {
  runtime = runtime_make();
  good();
  bad();
  CHECK_OK(treeattn_runtime_destroy(runtime));
  return check_report("selfcheck");
}
