// Hook mode: a host with one of the patches of ../patches asks the plugin on all threads of the graph before it computes a flash
// attention itself.
#pragma once

namespace treeattn_ggml {

// Sets the hook where the host has it and no other mode was asked for. Called once, when the plugin is loaded.
void set_hook();

// Whether it is set.
bool is_hooked();

}  // namespace treeattn_ggml
