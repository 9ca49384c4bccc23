#include "step.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "log.h"
#include "stats.h"

namespace treeattn_ggml {
namespace {

int64_t signed_bytes(size_t bytes) { return static_cast<int64_t>(bytes); }

// ggml's slopes of ALiBi.
void set_factors(Engine& engine, int32_t heads, float max_bias) {
  if (engine.factors.size() == static_cast<size_t>(heads) && engine.factors_bias == max_bias) {
    return;
  }
  engine.factors.resize(static_cast<size_t>(heads));
  engine.factors_bias = max_bias;
  int32_t below = 1;
  while (2 * below <= heads) {
    below *= 2;
  }
  for (int32_t h = 0; h < heads; h++) {
    const double steps = h < below ? h + 1 : 0.5 * (2 * (h - below) + 1);
    engine.factors[static_cast<size_t>(h)] = static_cast<float>(std::exp2(-static_cast<double>(max_bias) / below * steps));
  }
}

// Queries [token, head, dim]. ggml has them by sequence and token; where these are not one stride, they are packed.
treeattn_tensor_t queries(Engine& engine, const Tensor* q) {
  const int64_t dim = q->ne[0], tokens = q->ne[1], heads = q->ne[2], sequences = q->ne[3];
  treeattn_tensor_t t = {};
  int64_t stride = signed_bytes(q->nb[1]);
  if (sequences > 1) {
    if (tokens == 1) {
      stride = signed_bytes(q->nb[3]);
    } else if (q->nb[3] != static_cast<size_t>(tokens) * q->nb[1]) {
      engine.queries.resize(static_cast<size_t>(dim * tokens * heads * sequences));
      float* to = engine.queries.data();
      for (int64_t s = 0; s < sequences; s++) {
        for (int64_t i = 0; i < tokens; i++) {
          for (int64_t h = 0; h < heads; h++, to += dim) {
            const char* from = static_cast<const char*>(q->data) + s * signed_bytes(q->nb[3]) + i * signed_bytes(q->nb[1]) +
                               h * signed_bytes(q->nb[2]);
            std::memcpy(to, from, static_cast<size_t>(dim) * 4);
          }
        }
      }
      t.data = engine.queries.data();
      t.bytes = engine.queries.size() * 4;
      return t;
    }
  }
  t.data = q->data;
  t.stride[0] = stride;
  t.stride[1] = signed_bytes(q->nb[2]);
  t.stride[2] = 4;
  t.bytes = static_cast<uint64_t>((tokens * sequences - 1) * stride + (heads - 1) * t.stride[1] + dim * 4);
  return t;
}

// Keys or values. Strided: [sequence, token, head, dim] from key `first` on. Lists: [key of the whole cache, 1, head, dim].
treeattn_tensor_t cache(const Tensor* c, bool lists, int64_t first) {
  const int64_t row = signed_bytes(row_bytes(dtype_of(c->type), c->ne[0]));
  const int64_t token = signed_bytes(c->nb[1]), head = signed_bytes(c->nb[2]), sequence = c->ne[3] == 1 ? 0 : signed_bytes(c->nb[3]);
  treeattn_tensor_t t = {};
  t.data = static_cast<char*>(c->data) + first * token;
  t.stride[0] = lists ? token : sequence;
  t.stride[1] = token;
  t.stride[2] = head;
  t.stride[3] = signed_bytes(c->nb[0]);
  t.bytes = static_cast<uint64_t>((c->ne[3] - 1) * sequence + (c->ne[1] - 1 - first) * token + (c->ne[2] - 1) * head + row);
  return t;
}

// The mask as ggml has it, from key `first` on.
treeattn_tensor_t strided_mask(const Tensor* mask, int64_t keys, int64_t first, int64_t tokens) {
  treeattn_tensor_t t = {};
  t.data = static_cast<char*>(mask->data) + 2 * first;
  t.stride[0] = mask->ne[3] == 1 ? 0 : signed_bytes(mask->nb[3]);
  t.stride[1] = mask->ne[2] == 1 ? 0 : signed_bytes(mask->nb[2]);
  t.stride[2] = signed_bytes(mask->nb[1]);
  t.stride[3] = 2;
  t.bytes = static_cast<uint64_t>((mask->ne[3] - 1) * t.stride[0] + (mask->ne[2] - 1) * t.stride[1] + (tokens - 1) * t.stride[2] +
                                  2 * (keys - first));
  return t;
}

// Rows of the cache from one sequence to the next, as lists name them.
int64_t cache_stride(const Tensor* k, const Tensor* v) {
  if (k->ne[3] == 1) {
    return 0;
  }
  if (k->nb[3] % k->nb[1] != 0 || v->nb[3] % v->nb[1] != 0 || k->nb[3] / k->nb[1] != v->nb[3] / v->nb[1]) {
    return -1;
  }
  return signed_bytes(k->nb[3] / k->nb[1]);
}

// The output [token, head, dim]; of several ranks the heads of one.
treeattn_tensor_t output(const Tensor* node, int32_t rank, int32_t ranks) {
  const int64_t heads = node->ne[1];
  int32_t first = 0, count = static_cast<int32_t>(heads);
  if (ranks > 1) {
    treeattn_head_range(static_cast<int32_t>(heads), ranks, rank, &first, &count);
  }
  treeattn_tensor_t t = {};
  t.stride[0] = signed_bytes(node->nb[2]);
  t.stride[1] = signed_bytes(node->nb[1]);
  t.stride[2] = 4;
  t.data = static_cast<char*>(node->data) + first * t.stride[1];
  const int64_t tokens = node->ne[2] * node->ne[3];
  t.bytes = count == 0 ? 0 : static_cast<uint64_t>((tokens - 1) * t.stride[0] + (count - 1) * t.stride[1] + node->ne[0] * 4);
  return t;
}

}  // namespace

const Plans* prepare_step(Engine& engine, const Tensor* node, const FlashParams& params) {
  const Tensor* q = node->src[kQ];
  const Tensor* k = node->src[kK];
  const Tensor* v = node->src[kV];
  const Tensor* mask = node->src[kMask];
  const Tensor* sinks = node->src[kSinks];
  const int32_t ranks = engine.workers().ranks;
  VisibleQuestion question = {};
  question.mask = mask;
  question.query_tokens = static_cast<int32_t>(q->ne[1]);
  question.sequences = static_cast<int32_t>(q->ne[3]);
  question.keys = static_cast<int32_t>(k->ne[1]);
  question.cache_stride = cache_stride(k, v);
  const VisibleKeys& keys = engine.visible.find(question, ranks);
  count_keys(keys.keys_held, keys.keys_visible);

  PlanKey key = plan_key(node, params);
  key.lists = keys.lists;
  key.masked = keys.masked;
  const Plans* plans = engine.plans(key);
  if (plans == nullptr) {
    return nullptr;
  }
  const treeattn_tensor_t queries_of_step = queries(engine, q);
  if (params.max_bias > 0 && keys.masked) {
    set_factors(engine, key.q_heads, params.max_bias);
  }
  for (int32_t r = 0; r < ranks; r++) {
    const VisibleKeys::Rank& rank = keys.ranks[static_cast<size_t>(r)];
    treeattn_decode_args_t& args = engine.args[static_cast<size_t>(r)];
    args = TREEATTN_DECODE_ARGS_INIT;
    args.batch = static_cast<int32_t>(keys.groups.size());
    args.query_tokens = keys.query_start.back();
    args.query_start = keys.query_start.data();
    args.kv_length = rank.lengths.data();
    args.q = queries_of_step;
    const int64_t first = keys.lists ? 0 : int64_t{keys.start} + rank.offset;
    args.k = cache(k, keys.lists, first);
    args.v = cache(v, keys.lists, first);
    args.out = output(node, r, ranks);
    if (keys.lists) {
      args.num_pages = static_cast<int32_t>((k->ne[3] - 1) * question.cache_stride + k->ne[1]);
      args.page_indptr = rank.indptr.data();
      args.page_indices = keys.indices.data();
      args.num_page_indices = static_cast<int64_t>(keys.indices.size());
    }
    if (keys.masked) {
      if (keys.lists) {
        args.mask.data = const_cast<uint16_t*>(rank.mask.data());
        args.mask.bytes = 2 * rank.mask.size();
        for (int i = 0; i < 3; i++) {
          args.mask.stride[i] = rank.mask_stride[i];
        }
        args.mask.stride[3] = 2;
      } else {
        args.mask = strided_mask(mask, k->ne[1], first, q->ne[1]);
      }
      if (params.max_bias > 0) {
        args.mask_factor.data = engine.factors.data();
        args.mask_factor.bytes = 4 * engine.factors.size();
      }
    }
    if (sinks != nullptr) {
      args.sinks.data = sinks->data;
      args.sinks.bytes = static_cast<uint64_t>(4 * sinks->ne[0]);
    }
  }
  return plans;
}

void poison(const Tensor* node) {
  for (int64_t s = 0; s < node->ne[3]; s++) {
    for (int64_t i = 0; i < node->ne[2]; i++) {
      for (int64_t h = 0; h < node->ne[1]; h++) {
        char* row = static_cast<char*>(node->data) + s * signed_bytes(node->nb[3]) + i * signed_bytes(node->nb[2]) +
                    h * signed_bytes(node->nb[1]);
        for (int64_t d = 0; d < node->ne[0]; d++) {
          const float nan = std::numeric_limits<float>::quiet_NaN();
          std::memcpy(row + 4 * d, &nan, 4);
        }
      }
    }
  }
}

}  // namespace treeattn_ggml
