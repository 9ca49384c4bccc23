/*
 * What the examples of several GPUs share: a cache of one sequence, 32 query heads over 8 kv heads of 128 in f16, of which
 * each rank holds its share of the tokens on its GPU; and the float64 answer.
 */
#ifndef EXAMPLES_GPU_H
#define EXAMPLES_GPU_H

#include <cuda_runtime_api.h>

#include "numeric.h"

#define CUDA(call)                                                                                              \
    do {                                                                                                        \
        cudaError_t cuda_status_ = (call);                                                                      \
        if (cuda_status_ != cudaSuccess) {                                                                      \
            fprintf(stderr, "%s:%d: %s\n    returned %s\n", __FILE__, __LINE__, #call,                          \
                    cudaGetErrorString(cuda_status_));                                                          \
            exit(1);                                                                                            \
        }                                                                                                       \
    } while (0)

enum { HEADS = 32, KV_HEADS = 8, DIM = 128, Q_ROW = HEADS * DIM, KV_ROW = KV_HEADS * DIM };

/* The whole sequence in host memory, the same in every process. */
typedef struct {
    int tokens;
    uint16_t *q; /* [Q_ROW] */
    uint16_t *k; /* [tokens, KV_ROW] */
    uint16_t *v;
} sequence_t;

static inline uint16_t *random_halves(size_t count, uint64_t seed)
{
    uint16_t *values = must_alloc(count * sizeof *values);
    size_t i;
    for (i = 0; i < count; i++)
        values[i] = double_to_half(2.0 * random_unit(&seed));
    return values;
}

static inline sequence_t sequence_make(int tokens)
{
    sequence_t sequence;
    sequence.tokens = tokens;
    sequence.q = random_halves(Q_ROW, 1);
    sequence.k = random_halves((size_t)tokens * KV_ROW, 2);
    sequence.v = random_halves((size_t)tokens * KV_ROW, 3);
    return sequence;
}

/* Compares rows of a step's output with float64. */
static inline void sequence_check(const sequence_t *sequence, const float *out, const float *lse, worst_t *worst)
{
    int head, token, d;
    for (head = 0; head < HEADS; head += 5) {
        double q[DIM], k[DIM], v[DIM];
        size_t kv = (size_t)(head / (HEADS / KV_HEADS)) * DIM;
        row_t row;
        row_begin(&row);
        for (d = 0; d < DIM; d++)
            q[d] = half_to_double(sequence->q[head * DIM + d]);
        for (token = 0; token < sequence->tokens; token++) {
            for (d = 0; d < DIM; d++) {
                k[d] = half_to_double(sequence->k[(size_t)token * KV_ROW + kv + (size_t)d]);
                v[d] = half_to_double(sequence->v[(size_t)token * KV_ROW + kv + (size_t)d]);
            }
            row_add(&row, q, k, v, DIM, 1.0 / sqrt(DIM));
        }
        row_end(&row, DIM);
        worst_row(worst, &row, out + head * DIM, lse[head], DIM);
    }
}

/* One rank's GPU: its share of the cache, its output, its stream. The device must be current. */
typedef struct {
    void *q, *k, *v, *length, *out, *lse;
    size_t keys; /* of this rank's share */
    cudaStream_t stream;
} gpu_t;

static inline void *gpu_copy(const void *host, size_t bytes)
{
    void *device = NULL;
    CUDA(cudaMalloc(&device, bytes ? bytes : 1));
    CUDA(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice));
    return device;
}

/* Tokens rank * tokens / world up to (rank + 1) * tokens / world. */
static inline gpu_t gpu_make(const sequence_t *sequence, int rank, int world)
{
    gpu_t gpu;
    size_t first = (size_t)sequence->tokens * (size_t)rank / (size_t)world;
    size_t end = (size_t)sequence->tokens * ((size_t)rank + 1) / (size_t)world;
    int32_t length = (int32_t)(end - first);
    gpu.keys = end - first;
    gpu.q = gpu_copy(sequence->q, Q_ROW * sizeof(uint16_t));
    gpu.k = gpu_copy(sequence->k + first * KV_ROW, gpu.keys * KV_ROW * sizeof(uint16_t));
    gpu.v = gpu_copy(sequence->v + first * KV_ROW, gpu.keys * KV_ROW * sizeof(uint16_t));
    gpu.length = gpu_copy(&length, sizeof length);
    CUDA(cudaMalloc(&gpu.out, Q_ROW * sizeof(float)));
    CUDA(cudaMalloc(&gpu.lse, HEADS * sizeof(float)));
    CUDA(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking));
    return gpu;
}

static inline void gpu_free(gpu_t *gpu)
{
    CUDA(cudaFree(gpu->q));
    CUDA(cudaFree(gpu->k));
    CUDA(cudaFree(gpu->v));
    CUDA(cudaFree(gpu->length));
    CUDA(cudaFree(gpu->out));
    CUDA(cudaFree(gpu->lse));
    CUDA(cudaStreamDestroy(gpu->stream));
}

static inline treeattn_attention_desc_t gpu_desc(const sequence_t *sequence)
{
    treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
    desc.q_heads = HEADS;
    desc.kv_heads = KV_HEADS;
    desc.head_dim_qk = desc.head_dim_v = DIM;
    desc.q_dtype = desc.k_dtype = desc.v_dtype = TREEATTN_DTYPE_F16;
    desc.out_dtype = TREEATTN_DTYPE_F32;
    desc.max_batch = desc.max_query_tokens = 1;
    desc.max_kv_length = sequence->tokens;
    return desc;
}

static inline treeattn_tensor_t gpu_tensor(void *data, size_t bytes)
{
    treeattn_tensor_t tensor;
    memset(&tensor, 0, sizeof tensor); /* all strides zero: packed */
    tensor.data = data;
    tensor.bytes = bytes;
    return tensor;
}

static inline treeattn_decode_args_t gpu_args(const gpu_t *gpu)
{
    treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
    args.batch = args.query_tokens = 1;
    args.kv_length = gpu->length;
    args.q = gpu_tensor(gpu->q, Q_ROW * sizeof(uint16_t));
    args.k = gpu_tensor(gpu->k, gpu->keys * KV_ROW * sizeof(uint16_t));
    args.v = gpu_tensor(gpu->v, gpu->keys * KV_ROW * sizeof(uint16_t));
    args.out = gpu_tensor(gpu->out, Q_ROW * sizeof(float));
    args.lse = gpu_tensor(gpu->lse, HEADS * sizeof(float));
    return args;
}

#endif
