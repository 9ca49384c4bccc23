// The backend of the device: computes the attention nodes that the scheduler gives it.
#pragma once

#include "ggml_abi.h"

namespace treeattn_ggml {

// A backend of the device; NULL after a logged line.
Backend* make_backend(Device* device);

// "ggml_backend_set_n_threads" of the registration.
void set_threads(Backend* backend, int threads);

}  // namespace treeattn_ggml
