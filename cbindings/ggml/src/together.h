// A node that all threads of a graph compute together, as ggml's own operators are: thread 0 makes the step ready, all enter it.
#pragma once

#include "ggml_abi.h"
#include "shape.h"
#include "stats.h"

namespace treeattn_ggml {

enum class Together {
  kComputed,  // or failed, with NaN for an output
  kDeclined,  // thread 0 could not make it ready; nothing was written
};

// What thread `ith` of `nth` does with a node that was judged. Every thread calls it, each gets the same answer, and none
// returns before the output can be poisoned; the caller's threads meet before they come with another node. `key` is the node's
// own among those under way. A step that cannot be made ready is declined if that is allowed.
Together compute_together(const Tensor* node, const FlashParams& params, const void* key, int ith, int nth, Path path,
                          bool may_decline) noexcept;

}  // namespace treeattn_ggml
