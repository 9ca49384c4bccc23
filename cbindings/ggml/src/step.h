// A node of ggml's as one step of the library.
#pragma once

#include "runtime.h"

namespace treeattn_ggml {

// Fills the engine's args for a node that was judged, whose tensors have their data now, and finds its plans. NULL after a
// logged line. May throw std::bad_alloc.
const Plans* prepare_step(Engine& engine, const Tensor* node, const FlashParams& params);

// Fills the output of a node with NaN, so that a step that failed is never taken for a result.
void poison(const Tensor* node);

}  // namespace treeattn_ggml
