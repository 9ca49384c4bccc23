// In-place mode: a FLASH_ATTN_EXT becomes a custom operator that the CPU backend runs on its own threads.
#pragma once

#include "ggml_abi.h"
#include "shape.h"

namespace treeattn_ggml {

// Turns a judged node into a custom operator, if the node is sure to run on the CPU and everything that could fail is made
// already. Called when the scheduler asks for it.
void take_in_place(Tensor* node, const FlashParams& params);

}  // namespace treeattn_ggml
