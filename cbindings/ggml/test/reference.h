// ggml's flash attention in float64, as ggml_flash_attn_ext defines it, on tensors in host memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "ggml.h"

// The sources and parameters of a FLASH_ATTN_EXT; mask and sinks may be null.
struct Attention {
    const ggml_tensor * q, * k, * v, * mask, * sinks;
    float scale, max_bias, softcap;
};

// A row of the result: out[dim_v]; the same with |v| for v, of which bounds are made; and the largest of
// scale * sum |q_i k_i| + |what softcap and mask add| over the visible keys.
struct ExactRow {
    std::vector<double> out, magnitude;
    double largest;
};

namespace detail {

inline const char * at(const ggml_tensor * t, int64_t i1, int64_t i2, int64_t i3) {
    return static_cast<const char *>(t->data) + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3];
}

// All rows of a head as float.
inline void dequantise(const ggml_tensor * t, int64_t head, int64_t sequence, std::vector<float> & out) {
    const int64_t dim = t->ne[0];
    out.resize(dim * t->ne[1]);
    for (int64_t j = 0; j < t->ne[1]; j++) {
        if (t->type == GGML_TYPE_F32) {
            std::memcpy(&out[j * dim], at(t, j, head, sequence), dim * sizeof(float));
        } else {
            ggml_get_type_traits(t->type)->to_float(at(t, j, head, sequence), &out[j * dim], dim);
        }
    }
}

} // namespace detail

// Calls row(sequence, head, query, ExactRow) for every row of the result. Keys that the mask hides are not read.
template <typename Row> void exact_attention(const Attention & a, Row row) {
    const int64_t dim_k = a.k->ne[0], dim_v = a.v->ne[0], keys = a.k->ne[1];
    const int64_t queries = a.q->ne[1], heads = a.q->ne[2], sequences = a.q->ne[3];
    const int64_t below = int64_t(1) << int(std::floor(std::log2(double(heads))));
    std::vector<float> k, v;
    std::vector<double> scores(keys);
    ExactRow r;
    for (int64_t s = 0; s < sequences; s++) {
        int64_t kept = -1;
        for (int64_t h = 0; h < heads; h++) {
            const int64_t kv_head = h / (heads / a.k->ne[2]);
            if (kv_head != kept) {
                detail::dequantise(a.k, kv_head, s / (sequences / a.k->ne[3]), k);
                detail::dequantise(a.v, h / (heads / a.v->ne[2]), s / (sequences / a.v->ne[3]), v);
                kept = kv_head;
            }
            double slope = 1;
            if (a.max_bias > 0) {
                slope = h < below ? std::exp2(-double(a.max_bias) / below * (h + 1))
                                  : std::exp2(-double(a.max_bias) / 2 / below * (2 * (h - below) + 1));
            }
            const double sink = a.sinks ? double(static_cast<const float *>(a.sinks->data)[h]) : -INFINITY;
            for (int64_t i = 0; i < queries; i++) {
                const float * q = reinterpret_cast<const float *>(detail::at(a.q, i, h, s));
                const ggml_fp16_t * mask = nullptr;
                if (a.mask) {
                    mask = reinterpret_cast<const ggml_fp16_t *>(
                        detail::at(a.mask, i, h % a.mask->ne[2], s % a.mask->ne[3]));
                }
                double most = sink;
                r.largest = 0;
                for (int64_t j = 0; j < keys; j++) {
                    const double added = mask ? slope * double(ggml_fp16_to_fp32(mask[j])) : 0;
                    scores[j] = -INFINITY;
                    if (added == -INFINITY) {
                        continue;
                    }
                    const float * key = &k[j * dim_k];
                    double score = 0, size = 0;
#pragma omp simd reduction(+ : score, size)
                    for (int64_t d = 0; d < dim_k; d++) {
                        const double product = double(q[d]) * double(key[d]);
                        score += product;
                        size += std::fabs(product);
                    }
                    score *= a.scale;
                    size *= a.scale;
                    if (a.softcap > 0) {
                        score = a.softcap * std::tanh(score / a.softcap);
                        size += a.softcap;
                    }
                    scores[j] = score + added;
                    most = std::max(most, scores[j]);
                    r.largest = std::max(r.largest, size + std::fabs(added));
                }
                r.out.assign(dim_v, 0);
                r.magnitude.assign(dim_v, 0);
                double sum = a.sinks ? std::exp(sink - most) : 0;
                for (int64_t j = 0; j < keys; j++) {
                    if (scores[j] == -INFINITY) {
                        continue;
                    }
                    const double weight = std::exp(scores[j] - most);
                    sum += weight;
                    const float * value = &v[j * dim_v];
#pragma omp simd
                    for (int64_t d = 0; d < dim_v; d++) {
                        r.out[d] += weight * double(value[d]);
                        r.magnitude[d] += weight * std::fabs(double(value[d]));
                    }
                }
                for (int64_t d = 0; d < dim_v && sum > 0; d++) {
                    r.out[d] /= sum;
                    r.magnitude[d] /= sum;
                }
                row(s, h, i, r);
            }
        }
    }
}
