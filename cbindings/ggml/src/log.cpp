#include "log.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace treeattn_ggml {
namespace {

// A whole number of the environment between `least` and `most`; `otherwise` where there is none, with a line where it is no
// such number.
int number(const char* name, int least, int most, int otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') {
    return otherwise;
  }
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  if (*end != '\0' || value < least || value > most) {
    std::fprintf(stderr, "treeattn: %s=%s is ignored: wanted a number from %d to %d\n", name, text, least, most);
    return otherwise;
  }
  return static_cast<int>(value);
}

bool is(const char* name, const char* wanted) {
  const char* text = std::getenv(name);
  return text != nullptr && std::strcmp(text, wanted) == 0;
}

Settings read() {
  Settings s;
  const char* mode = std::getenv("TREEATTN_GGML");
  if (mode != nullptr && *mode != '\0') {
    if (std::strcmp(mode, "inline") == 0) {
      s.in_place = true;
    } else if (std::strcmp(mode, "off") == 0) {
      s.off = true;
    } else if (std::strcmp(mode, "device") == 0) {
      s.device = true;
    } else {
      std::fprintf(stderr, "treeattn: TREEATTN_GGML=%s is ignored: wanted device, inline or off\n", mode);
    }
  }
  s.ranks = number("TREEATTN_GGML_RANKS", 1, 64, 0);
  s.max_query_tokens = number("TREEATTN_GGML_MAX_QUERY_TOKENS", 1, 256, 32);
  s.any_version = is("TREEATTN_GGML_ANY_VERSION", "1");
  s.own_threads = is("TREEATTN_GGML_THREADS", "own");
  if (is("TREEATTN_GGML_LOG", "error")) {
    s.log = LogLevel::kError;
  } else if (is("TREEATTN_GGML_LOG", "warning")) {
    s.log = LogLevel::kWarning;
  }
  return s;
}

}  // namespace

const Settings& settings() {
  static const Settings read_once = read();
  return read_once;
}

void log(LogLevel level, const char* format, ...) {
  if (level > settings().log) {
    return;
  }
  char line[1024];
  va_list args;
  va_start(args, format);
  std::vsnprintf(line, sizeof line, format, args);
  va_end(args);
  const char* prefix = level == LogLevel::kError ? "error: " : level == LogLevel::kWarning ? "warning: " : "";
  std::fprintf(stderr, "treeattn: %s%s\n", prefix, line);
}

}  // namespace treeattn_ggml
