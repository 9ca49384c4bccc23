// Query rows as they lie in memory, eight bytes at a time.
#pragma once

#include <stdint.h>

namespace treeattn {

// [token, head, dim] of elements of two or four bytes.
struct QueryRows {
    const char* data;
    int64_t token_stride, head_stride, dim_stride;
    int size;
    bool is_packed;  // rows without gaps that begin at multiples of eight bytes

    __device__ __forceinline__ QueryRows(const void* q, const int64_t (&stride)[3], int size)
        : data(static_cast<const char*>(q)), token_stride(stride[0]), head_stride(stride[1]), dim_stride(stride[2]), size(size) {
        const uintptr_t places = reinterpret_cast<uintptr_t>(q) | stride[0] | stride[1];
        is_packed = dim_stride == size && places % 8 == 0;
    }

    // Bytes 8 * word to 8 * word + 7 of a row.
    __device__ __forceinline__ uint64_t load(int64_t token, int64_t head, int word) const {
        const char* from = data + token * token_stride + head * head_stride + word * (8 / size) * dim_stride;
        return is_packed ? *reinterpret_cast<const uint64_t*>(from) : collect(from);
    }

  private:
    __device__ __forceinline__ uint64_t collect(const char* from) const {
        uint64_t bits = 0;
        for (int i = 0; i < 8 / size; i++) {
            const char* element = from + i * dim_stride;
            const uint64_t x =
                size == 2 ? *reinterpret_cast<const uint16_t*>(element) : *reinterpret_cast<const uint32_t*>(element);
            bits |= x << (8 * size * i);
        }
        return bits;
    }
};

}  // namespace treeattn
