// Decode for wide heads: up to 576 dims of q and k and 512 of v, of one 16-bit type, with terms; `view`: where V is a view of K.
#include "wide_step.cuh"

#define TREEATTN_WIDE(VIEW, TYPE, IS_VIEW, BF16)                                                                      \
    namespace treeattn {                                                                                              \
    using Wide##VIEW##_##TYPE = WideMma<IS_VIEW, BF16>;                                                               \
    }                                                                                                                 \
    TREEATTN_WIDE_KERNEL(treeattn_decode_wide##VIEW##_##TYPE, treeattn::Wide##VIEW##_##TYPE)
TREEATTN_WIDE(, bf16, false, true)
TREEATTN_WIDE(, f16, false, false)
TREEATTN_WIDE(_view, bf16, true, true)
TREEATTN_WIDE(_view, f16, true, false)

TREEATTN_TERMS_ABI(decode_wide)
