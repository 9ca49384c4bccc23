// Rows of an f16 mask as bits: which keys are visible, and whether anything is added to the visible ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "visible.h"

namespace treeattn_ggml {

constexpr uint16_t kMinusInfinity = 0xfc00;

using Bits = std::vector<uint64_t>;

// Sets the bits of the first `keys` elements of `row` that are not -inf, beside those that are set. Gives whether one of
// them is neither 0 nor -0.
bool add_visible(const uint16_t* row, int32_t keys, uint64_t* bits);

int64_t count(const Bits& bits);
int64_t count_union(const Bits& a, const Bits& b);

// The runs of set bits, in order.
std::vector<Run> runs_of(const Bits& bits);

}  // namespace treeattn_ggml
