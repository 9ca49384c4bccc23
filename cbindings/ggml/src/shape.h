// From a FLASH_ATTN_EXT of ggml to the shape of an attention of the library, and whether the library serves it.
#pragma once

#include <treeattn.h>

#include "ggml_abi.h"

namespace treeattn_ggml {

// The parameters of ggml_flash_attn_ext.
struct FlashParams {
  float scale;
  float max_bias;
  float softcap;
};

// Those of a node whose operator is FLASH_ATTN_EXT.
FlashParams flash_params(const Tensor* node);

// The sources of FLASH_ATTN_EXT in their order.
enum Source { kQ, kK, kV, kMask, kSinks, kSources };

// Why a node is left to ggml.
enum class Judgement {
  kTaken,
  kQueryTokens,  // a prompt, not a decode step
  kMemory,       // a source that is not in host memory
  kForm,         // types, dimensions or strides that the library does not serve
  kCount,
};
const char* judgement_name(Judgement judgement);

// Most query tokens of a step, all sequences together.
constexpr int kMaxTokens = 256;

// What tells plans apart. Compared byte by byte: every byte is set.
struct PlanKey {
  int32_t q_heads, kv_heads, dim_qk, dim_v;
  int32_t k_dtype, v_dtype;
  float scale, softcap;
  int32_t sinks;
  int32_t tokens;  // most query tokens, a power of two
  int32_t lists;   // keys named one by one instead of strides
  int32_t masked;
};
static_assert(sizeof(PlanKey) == 48, "no padding");

// The library's type for a type of ggml's cache, 0 for one that it does not serve.
treeattn_dtype_t dtype_of(int32_t type);

// Bytes of a row of `dim` elements.
size_t row_bytes(treeattn_dtype_t dtype, int64_t dim);

// Looks at a node before anything is allocated: the data of its tensors is not touched. Asks treeattn_attention_supported.
Judgement judge(const Tensor* node, const FlashParams& params);

// The key of a judged node's plan; lists and masked are left 0.
PlanKey plan_key(const Tensor* node, const FlashParams& params);

// As many ranks as were asked for, but each has a head of the output at least.
int32_t ranks_for(const Tensor* node);

treeattn_attention_desc_t describe(const PlanKey& key, int ranks);

}  // namespace treeattn_ggml
