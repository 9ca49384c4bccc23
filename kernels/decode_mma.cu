// Decode on tensor cores without terms: decode_mma.cuh says how.
#include "decode_mma.cuh"

#define TREEATTN_MMA(QK, V, ROWS, NAME, BF16_K, BF16_V)                                                               \
    namespace treeattn {                                                                                              \
    using Mma_d##QK##x##V##_r##ROWS##_##NAME = Mma<QK, V, ROWS, BF16_K, BF16_V>;                                      \
    }                                                                                                                 \
    TREEATTN_DECODE_KERNEL(treeattn_decode_mma_d##QK##x##V##_r##ROWS##_##NAME,                                        \
                           treeattn::Mma_d##QK##x##V##_r##ROWS##_##NAME, treeattn::decode)
// Where k and v differ, rows beyond 8 run as more tiles; so they do for more than 128 dims, for which
// 16 rows take more registers than a thread has.
#define TREEATTN_MMA_R8(QK, V)                                                                                        \
    TREEATTN_MMA(QK, V, 8, bf16, true, true)                                                                          \
    TREEATTN_MMA(QK, V, 8, f16, false, false)                                                                         \
    TREEATTN_MMA(QK, V, 8, bf16_f16, true, false)                                                                     \
    TREEATTN_MMA(QK, V, 8, f16_bf16, false, true)
#define TREEATTN_MMA_R16(QK, V)                                                                                       \
    TREEATTN_MMA(QK, V, 16, bf16, true, true)                                                                         \
    TREEATTN_MMA(QK, V, 16, f16, false, false)
TREEATTN_MMA_R8(64, 64)
TREEATTN_MMA_R8(96, 96)
TREEATTN_MMA_R8(128, 128)
TREEATTN_MMA_R8(192, 128)
TREEATTN_MMA_R8(256, 256)
TREEATTN_MMA_R16(64, 64)
TREEATTN_MMA_R16(96, 96)
TREEATTN_MMA_R16(128, 128)

TREEATTN_ABI(decode_mma)
