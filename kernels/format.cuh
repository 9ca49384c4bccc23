// Bytes of elements, blocks and rows in memory, by type: the only place that knows them; and how far strides reach.
#pragma once

#include "params.cuh"

namespace treeattn {

constexpr int kHalfBytes = 2;  // of an element of f16 or bf16

// Bytes of an element of f32, f16 or bf16.
__host__ __device__ constexpr int element_bytes(int32_t dtype) { return dtype == kF32 ? 4 : kHalfBytes; }

// Bytes of an element of a mask (Terms::mask_element).
__host__ __device__ constexpr int mask_element_bytes(int32_t element) {
    return element == kMaskF32 ? 4 : element == kMaskF16 ? 2 : 1;
}

constexpr int kBlockScaleBytes = 2;  // the scale of a block of ggml's types, an f16, which comes first

// Whether a type's elements lie in blocks.
__host__ __device__ constexpr bool is_in_blocks(int32_t dtype) { return dtype == kQ8_0 || dtype == kQ4_0; }

// Bytes of kBlock elements of a type that kernels widen in registers.
__host__ __device__ constexpr int block_bytes(int32_t dtype) {
    if (!is_in_blocks(dtype)) return kBlock;
    return kBlockScaleBytes + (dtype == kQ8_0 ? kBlock : kBlock / 2);
}

static_assert(block_bytes(kQ8_0) == kQ8_0Bytes && block_bytes(kQ4_0) == kQ4_0Bytes, "blocks are those of the library");

// Bytes of a packed row of `dim` elements of such a type.
__host__ __device__ constexpr int row_bytes(int32_t dtype, int dim) {
    return is_in_blocks(dtype) ? dim / kBlock * block_bytes(dtype) : dim;
}

// Whether the last of `keys` tokens of sequence b begins by `end`. The host has seen to it that the first one does, and the
// last one of sequence 0, so that neither product leaves 63 bits.
__device__ __forceinline__ bool strided_fits(const int64_t* stride, int b, int keys, int64_t end) {
    return static_cast<uint64_t>(b * stride[0]) + static_cast<uint64_t>((keys - 1) * stride[1]) <=
           static_cast<uint64_t>(end);
}

}  // namespace treeattn
