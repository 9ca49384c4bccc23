#include "log.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>

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

// Which of the words the environment has, counted from 0; -1 where it has none, with a line where it has another.
int word(const char* name, std::initializer_list<const char*> words) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') {
    return -1;
  }
  std::string wanted;
  int at = 0;
  for (const char* word : words) {
    if (std::strcmp(text, word) == 0) {
      return at;
    }
    wanted += at == 0 ? "" : at + 1 == static_cast<int>(words.size()) ? " or " : ", ";
    wanted += word;
    at++;
  }
  std::fprintf(stderr, "treeattn: %s=%s is ignored: wanted %s\n", name, text, wanted.c_str());
  return -1;
}

Settings read() {
  Settings s;
  const int mode = word("TREEATTN_GGML", {"device", "inline", "off"});
  s.device = mode == 0;
  s.in_place = mode == 1;
  s.off = mode == 2;
  s.ranks = number("TREEATTN_GGML_RANKS", 1, 64, 0);
  s.max_query_tokens = number("TREEATTN_GGML_MAX_QUERY_TOKENS", 1, 256, 32);
  s.any_version = word("TREEATTN_GGML_ANY_VERSION", {"1"}) == 0;
  s.own_threads = word("TREEATTN_GGML_THREADS", {"own"}) == 0;
  const int level = word("TREEATTN_GGML_LOG", {"error", "warning", "info"});
  s.log = level < 0 ? LogLevel::kInfo : static_cast<LogLevel>(level);
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
