// Lines on stderr, and what the environment says. Read once, when the plugin is loaded.
#pragma once

namespace treeattn_ggml {

enum class LogLevel { kError, kWarning, kInfo };

// Prints "treeattn: ..." as one line. Safe from any thread.
void log(LogLevel level, const char* format, ...) __attribute__((format(printf, 2, 3)));

struct Settings {
  bool device = false;       // TREEATTN_GGML=device: also where the host has the hook
  bool in_place = false;     // TREEATTN_GGML=inline
  bool off = false;          // TREEATTN_GGML=off
  int ranks = 0;             // TREEATTN_GGML_RANKS; 0: one a NUMA node
  bool any_version = false;  // TREEATTN_GGML_ANY_VERSION=1
  int max_query_tokens = 32; // TREEATTN_GGML_MAX_QUERY_TOKENS
  bool own_threads = false;  // TREEATTN_GGML_THREADS=own: the library's threads also where the engine's could be used
  LogLevel log = LogLevel::kInfo;  // TREEATTN_GGML_LOG=error, warning, info
};

const Settings& settings();

}  // namespace treeattn_ggml
