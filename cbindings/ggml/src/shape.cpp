#include "shape.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "host.h"
#include "log.h"
#include "runtime.h"

namespace treeattn_ggml {
namespace {

struct Format {
  int32_t type;
  treeattn_dtype_t dtype;
  int32_t values;  // of a block
  int32_t bytes;
};
constexpr Format kFormats[] = {
    {kTypeF32, TREEATTN_DTYPE_F32, 1, 4},     {kTypeF16, TREEATTN_DTYPE_F16, 1, 2},     {kTypeBf16, TREEATTN_DTYPE_BF16, 1, 2},
    {kTypeQ8_0, TREEATTN_DTYPE_Q8_0, 32, 34}, {kTypeQ4_0, TREEATTN_DTYPE_Q4_0, 32, 18}, {kTypeQ4_1, TREEATTN_DTYPE_Q4_1, 32, 20},
    {kTypeQ5_0, TREEATTN_DTYPE_Q5_0, 32, 22}, {kTypeQ5_1, TREEATTN_DTYPE_Q5_1, 32, 24}, {kTypeIq4Nl, TREEATTN_DTYPE_IQ4_NL, 32, 18},
};

const Format* format_of(int32_t type) {
  for (const Format& f : kFormats) {
    if (f.type == type) {
      return &f;
    }
  }
  return nullptr;
}

bool in_host_memory(const Tensor* t) {
  Buffer* buffer = t->view_src != nullptr ? t->view_src->buffer : t->buffer;
  return buffer == nullptr || host().f.buffer_is_host(buffer);
}

// Keys or values: rows of a type that the library reads, side by side.
bool is_cache(const Tensor* t) {
  const Format* f = format_of(t->type);
  return f != nullptr && t->nb[0] == static_cast<size_t>(f->bytes) && t->ne[0] % f->values == 0 && t->ne[1] > 0 &&
         t->ne[1] <= INT32_MAX && t->nb[1] > 0;
}

bool has_form(const Tensor* node) {
  const Tensor* q = node->src[kQ];
  const Tensor* k = node->src[kK];
  const Tensor* v = node->src[kV];
  const Tensor* mask = node->src[kMask];
  const Tensor* sinks = node->src[kSinks];
  for (int i = kSources; i < kMaxSources; i++) {
    if (node->src[i] != nullptr) {
      return false;  // something that this version of ggml added
    }
  }
  const int64_t heads = q->ne[2], tokens = q->ne[1], sequences = q->ne[3];
  if (q->type != kTypeF32 || q->nb[0] != 4 || q->nb[1] % 4 != 0 || q->nb[2] % 4 != 0 || heads < 1 || heads > 65536 || tokens < 1) {
    return false;
  }
  if (!is_cache(k) || !is_cache(v) || k->ne[0] != q->ne[0] || k->ne[1] != v->ne[1] || k->ne[2] != v->ne[2] || k->ne[2] < 1 ||
      heads % k->ne[2] != 0 || k->ne[3] != v->ne[3] || (k->ne[3] != sequences && k->ne[3] != 1)) {
    return false;
  }
  if (node->type != kTypeF32 || node->nb[0] != 4 || node->ne[0] != v->ne[0] || node->ne[1] != heads || node->ne[2] != tokens ||
      node->ne[3] != sequences || (sequences > 1 && node->nb[3] != static_cast<size_t>(tokens) * node->nb[2])) {
    return false;
  }
  if (mask != nullptr) {
    const bool heads_fit = mask->ne[2] == 1 || mask->ne[2] == heads;
    if (mask->type != kTypeF16 || mask->nb[0] != 2 || mask->ne[0] < k->ne[1] || mask->ne[1] < tokens || !heads_fit ||
        (mask->ne[3] != 1 && mask->ne[3] != sequences)) {
      return false;
    }
  }
  return sinks == nullptr || (sinks->type == kTypeF32 && sinks->nb[0] == 4 && sinks->ne[0] == heads);
}

// Whether the library serves a shape, with keys in strides and in lists. The last answer is kept: with the hook every thread
// asks in every layer.
bool is_supported(PlanKey key, bool masked, int ranks) {
  thread_local PlanKey last_key{};
  thread_local int last_ranks = 0;
  thread_local bool answer = false;
  key.masked = masked;
  if (ranks == last_ranks && std::memcmp(&key, &last_key, sizeof key) == 0) {
    return answer;
  }
  last_key = key;
  last_ranks = ranks;
  answer = runtime() != nullptr;
  for (int lists = 0; lists < 2 && answer; lists++) {
    key.lists = lists;
    const treeattn_attention_desc_t desc = describe(key, ranks);
    answer = treeattn_attention_supported(runtime(), TREEATTN_CPU(0), &desc) == TREEATTN_OK;
  }
  return answer;
}

}  // namespace

FlashParams flash_params(const Tensor* node) {
  FlashParams params;
  static_assert(sizeof params == 12, "as ggml_flash_attn_ext stores them");
  std::memcpy(&params, node->op_params, sizeof params);
  return params;
}

const char* judgement_name(Judgement judgement) {
  switch (judgement) {
    case Judgement::kQueryTokens: return "more query tokens than a decode step has";
    case Judgement::kMemory: return "not in host memory";
    case Judgement::kForm: return "type, dimension or stride not served";
    default: return "taken";
  }
}

treeattn_dtype_t dtype_of(int32_t type) {
  const Format* f = format_of(type);
  return f == nullptr ? 0 : f->dtype;
}

size_t row_bytes(treeattn_dtype_t dtype, int64_t dim) {
  for (const Format& f : kFormats) {
    if (f.dtype == dtype) {
      return static_cast<size_t>(dim / f.values) * static_cast<size_t>(f.bytes);
    }
  }
  return 0;
}

Judgement judge(const Tensor* node, const FlashParams& params) {
  const Tensor* q = node->src[kQ];
  if (q == nullptr || node->src[kK] == nullptr || node->src[kV] == nullptr) {
    return Judgement::kForm;
  }
  if (q->ne[1] > settings().max_query_tokens || q->ne[1] * q->ne[3] > kMaxTokens) {
    return Judgement::kQueryTokens;
  }
  for (int i = 0; i < kSources; i++) {
    if (node->src[i] != nullptr && !in_host_memory(node->src[i])) {
      return Judgement::kMemory;
    }
  }
  const bool finite = std::isfinite(params.scale) && std::isfinite(params.softcap) && std::isfinite(params.max_bias);
  if (!finite || params.scale == 0 || params.softcap < 0 || !has_form(node)) {
    return Judgement::kForm;
  }
  return is_supported(plan_key(node, params), node->src[kMask] != nullptr, ranks_for(node)) ? Judgement::kTaken : Judgement::kForm;
}

PlanKey plan_key(const Tensor* node, const FlashParams& params) {
  const Tensor* q = node->src[kQ];
  const Tensor* k = node->src[kK];
  const Tensor* v = node->src[kV];
  PlanKey key;
  std::memset(&key, 0, sizeof key);
  key.q_heads = static_cast<int32_t>(q->ne[2]);
  key.kv_heads = static_cast<int32_t>(k->ne[2]);
  key.dim_qk = static_cast<int32_t>(k->ne[0]);
  key.dim_v = static_cast<int32_t>(v->ne[0]);
  key.k_dtype = dtype_of(k->type);
  key.v_dtype = dtype_of(v->type);
  key.scale = params.scale;
  key.softcap = params.softcap;
  key.sinks = node->src[kSinks] != nullptr;
  key.tokens = 1;
  while (key.tokens < q->ne[1] * q->ne[3]) {
    key.tokens *= 2;
  }
  return key;
}

int32_t ranks_for(const Tensor* node) { return static_cast<int32_t>(std::min<int64_t>(ranks_wanted(), node->src[kQ]->ne[2])); }

treeattn_attention_desc_t describe(const PlanKey& key, int ranks) {
  treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
  desc.q_heads = key.q_heads;
  desc.kv_heads = key.kv_heads;
  desc.head_dim_qk = key.dim_qk;
  desc.head_dim_v = key.dim_v;
  desc.q_dtype = TREEATTN_DTYPE_F32;
  desc.k_dtype = key.k_dtype;
  desc.v_dtype = key.v_dtype;
  desc.out_dtype = TREEATTN_DTYPE_F32;
  desc.scale = key.scale;
  desc.softcap = key.softcap;
  desc.sinks = key.sinks;
  desc.max_batch = desc.max_query_tokens = key.tokens;
  desc.max_kv_length = INT32_MAX;
  if (key.lists != 0) {
    desc.kv_layout = TREEATTN_KV_LAYOUT_CSR_PAGES;
    desc.page_size = 1;
  }
  if (key.masked != 0) {
    desc.mask = TREEATTN_MASK_ADDITIVE;
    desc.mask_dtype = TREEATTN_DTYPE_F16;
  }
  if (ranks > 1) {
    // Each rank writes its heads of the output where ggml wants them.
    desc.output = TREEATTN_OUTPUT_SCATTERED;
  }
  return desc;
}

}  // namespace treeattn_ggml
