// Keys and values of types other than f16 and bf16, made bf16 as the multiply's operands want them.
//
// fp8 numbers, whole numbers up to 8 bits and 4-bit numbers less 8 are bf16 numbers: they are widened in registers, and the
// scales of blocks count in fp32 where products are summed (keys) or weights are taken (values). What has more than 8 bits is
// widened to fp32 first and taken as up to three bf16 terms, one after the other (load_values): right, but slow.
#pragma once

#include "shape.cuh"

namespace treeattn {

// How the bytes of a row are widened.
enum class Bytes {
    kFloat8,   // f8_e4m3, f8_e5m2
    kInt8,     // int8, q8_0
    kNibbles,  // q4_0
    kBf16,     // a tile that was widened to bf16
};

__device__ __forceinline__ Bytes bytes_of(int32_t dtype) {
    if (dtype == kQ4_0) return Bytes::kNibbles;
    return dtype == kInt8 || dtype == kQ8_0 ? Bytes::kInt8 : Bytes::kFloat8;
}

// Where the blocks of a row lie: 32 elements each.
struct Blocks {
    int step;    // bytes from one to the next
    int at;      // its elements, after its scale
    bool scaled;

    __device__ __forceinline__ explicit Blocks(int32_t dtype)
        : step(block_bytes(dtype)), at(is_in_blocks(dtype) ? kBlockScaleBytes : 0), scaled(at != 0) {}
};

// How an fp8 number becomes bf16: bits shifted into place, then multiplied by a power of two. Adding `past` to a byte without its
// sign sets the highest bit where the byte is no finite number.
struct Float8 {
    uint32_t shift, mask, power, past;
    bool has_infinity;

    __device__ __forceinline__ explicit Float8(int32_t dtype) {
        const bool e5m2 = dtype == kF8E5M2;
        shift = e5m2 ? 3 : 4;
        mask = e5m2 ? 0x0fe00fe0u : 0x07f007f0u;
        power = e5m2 ? 0x77807780u : 0x7b807b80u;  // 2^112, 2^120
        past = e5m2 ? 0x04040404u : 0x01010101u;
        has_infinity = e5m2;
    }
    // The highest bit of each byte that is no finite number.
    __device__ __forceinline__ uint32_t not_finite(uint32_t word) const {
        return (word & 0x7f7f7f7fu) + past & 0x80808080u;
    }
    // Widens two finite numbers, which lie in the upper bytes of the halves of x.
    __device__ __forceinline__ uint32_t pair(uint32_t x) const {
        return fma_bf16(x >> shift & mask | x & 0x80008000u, power, 0x80008000u);
    }
    // The same for any numbers. Infinities and NaN are rare, and are put in afterwards.
    __device__ __forceinline__ uint32_t any_pair(uint32_t x) const {
        uint32_t r = pair(x);
        const uint32_t odd = not_finite(x & 0xff00ff00u);
        if (odd == 0) return r;
#pragma unroll
        for (int half = 0; half < 32; half += 16) {
            if (!(odd >> half & 0x8000u)) continue;
            const uint32_t code = x >> (half + 8) & 0xff;
            const uint32_t bits = has_infinity && (code & 0x7f) == 0x7c ? (code & 0x80) << 8 | 0x7f80u : 0x7fffu;
            r = r & ~(0xffffu << half) | bits << half;
        }
        return r;
    }
};

// Byte `byte` of four int8 with their sign bits flipped, as a float. It has at most 8 bits, so that its upper half is the bf16.
__device__ __forceinline__ float int8_value(uint32_t flipped, int byte) {
    // 2^23 + 128 + x.
    return __uint_as_float(pick_bytes(flipped, 0x4b000000u, 0x7540u + byte)) - 8388736.f;
}

// 4 bytes at any address of shared memory. Where the address is aligned the next word is not read.
__device__ __forceinline__ uint32_t load_bytes4(uint32_t address) {
    const uint32_t from = address & ~3u, bits = (address & 3) * 8;
    return shift_right(load_shared(from), load_shared_if(from + 4, bits != 0), bits);
}
__device__ __forceinline__ uint2 load_bytes8(uint32_t address) {
    const uint32_t from = address & ~3u, bits = (address & 3) * 8;
    const uint32_t low = load_shared(from), middle = load_shared(from + 4);
    const uint32_t high = load_shared_if(from + 8, bits != 0);
    return make_uint2(shift_right(low, middle, bits), shift_right(middle, high, bits));
}

// A scale of keys or values. One that is not finite becomes NaN, and so does what it scales.
__device__ __forceinline__ float finite_or_nan(float scale) {
    return fabsf(scale) < infinity() ? scale : not_a_number();
}

// The f16 scale of a block in shared memory.
__device__ __forceinline__ float load_scale(uint32_t address) {
    return unpack_pair<false>(load_shared16(address)).x;
}

// Bytes 2 i, 2 i + 1 of a word as a pair of bf16. Any: fp8 numbers may be infinite or NaN.
template <Bytes Kind, bool Any>
__device__ __forceinline__ uint32_t widen_neighbours(uint32_t word, int i, const Float8& f8) {
    if constexpr (Kind == Bytes::kFloat8) {
        const uint32_t both = pick_bytes(word, 0, i == 0 ? 0x1404u : 0x3424u);
        return Any ? f8.any_pair(both) : f8.pair(both);
    } else if constexpr (Kind == Bytes::kInt8) {
        const uint32_t flipped = word ^ 0x80808080u;
        return pack_pair<true>(int8_value(flipped, 2 * i), int8_value(flipped, 2 * i + 1));
    } else {
        // 128 + n, less 136.
        return fma_bf16(pick_bytes(word, 0x43434343u, i == 0 ? 0x4140u : 0x4342u), 0x3f803f80u, 0xc308c308u);
    }
}

// Byte i of two words as a pair of bf16.
template <Bytes Kind, bool Any>
__device__ __forceinline__ uint32_t widen_across(uint32_t first, uint32_t second, int i, const Float8& f8) {
    const uint32_t both = pick_bytes(first, second, 0x4400u + 0x1111u * i);
    if constexpr (Kind == Bytes::kFloat8) {
        return Any ? f8.any_pair(both) : f8.pair(both);
    } else if constexpr (Kind == Bytes::kInt8) {
        return pack_pair<true>(int8_value(first ^ 0x80808080u, i), int8_value(second ^ 0x80808080u, i));
    } else {
        return fma_bf16(both & 0x00ff00ffu | 0x43004300u, 0x3f803f80u, 0xc308c308u);
    }
}

// Eight neighbours of a row in global memory, of any type, blocks `stride` bytes apart.
static __device__ __noinline__ void load_values(float* x, const char* row, int64_t stride, int32_t dtype, int first) {
    if (dtype <= kBf16) {
        float y[8];
        load_eight(y, row + first * stride, stride, dtype);
        for (int i = 0; i < 8; i++) x[i] = y[i];
        return;
    }
    if (dtype == kF8E4M3 || dtype == kF8E5M2 || dtype == kInt8) {
        const Float8 f8(dtype);
#pragma unroll 1
        for (int i = 0; i < 8; i++) {
            const uint32_t code = *reinterpret_cast<const uint8_t*>(row + (first + i) * stride);
            x[i] = dtype == kInt8 ? static_cast<float>(static_cast<int8_t>(code)) : unpack_pair<true>(f8.any_pair(code << 8)).x;
        }
        return;
    }
    const char* block = row + first / 32 * stride;
    const auto half = [block](int at) { return unpack_pair<false>(*reinterpret_cast<const uint16_t*>(block + at)).x; };
    const auto byte = [block](int at) -> uint32_t { return *reinterpret_cast<const uint8_t*>(block + at); };
    const float scale = half(0), low = dtype == kQ4_1 || dtype == kQ5_1 ? half(2) : 0.f;
    const int bits_at = dtype == kQ5_1 ? 4 : 2;  // the fifth bits
    const int at = dtype == kQ4_1 ? 4 : dtype == kQ5_0 ? 6 : dtype == kQ5_1 ? 8 : 2;
#pragma unroll 1
    for (int n = 0; n < 8; n++) {
        const int i = first % 32 + n;
        float value;
        if (dtype == kQ8_0) {
            value = static_cast<float>(static_cast<int8_t>(byte(at + i)));
        } else {
            uint32_t code = byte(at + i % 16) >> i / 16 * 4 & 15;
            if (dtype == kQ5_0 || dtype == kQ5_1) code |= (byte(bits_at + i / 8) >> i % 8 & 1) << 4;
            int whole = static_cast<int>(code);
            if (dtype == kQ4_0) whole -= 8;
            if (dtype == kQ5_0) whole -= 16;
            if (dtype == kIq4Nl) {
                // -127, -104, -83, -65, -49, -35, -22, -10; 1, 13, 25, 38, 53, 69, 89, 113
                const uint64_t eight = code < 8 ? 0xf6eaddcfbfad9881ull : 0x7159453526190d01ull;
                whole = static_cast<int8_t>(eight >> code % 8 * 8 & 0xff);
            }
            value = static_cast<float>(whole);
        }
        x[n] = fmaf(value, scale, low);
    }
}

// How many bf16 terms hold what load_values gives.
__device__ __forceinline__ int terms_of_type(int32_t dtype) {
    if (dtype == kBf16 || dtype == kF8E4M3 || dtype == kF8E5M2 || dtype == kInt8) return 1;
    return dtype == kF16 ? 2 : 3;
}

// Term `term` of a number: bf16 bits.
__device__ __forceinline__ uint32_t bf16_term(float x, int term) {
    uint32_t bits = 0;
#pragma unroll 1
    for (int i = 0; i <= term; i++) {
        const bool finite = fabsf(x) < infinity();
        // Truncated, so that no finite number becomes infinite; a NaN keeps a mantissa bit.
        bits = x != x ? 0x7fff0000u : __float_as_uint(x) & 0xffff0000u;
        x = finite ? x - __uint_as_float(bits) : 0.f;
    }
    return bits >> 16;
}

}  // namespace treeattn
