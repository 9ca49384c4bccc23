/* What the C tests share: checks that report and go on, guard bytes, handles that are none. */
#ifndef TREEATTN_TESTS_CHECK_H
#define TREEATTN_TESTS_CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <treeattn.h>

static int check_failures = 0;

/* Fails the program, but goes on. Main thread only; threads hand their results back. */
#define CHECK(condition) check_that((condition) != 0, #condition, __FILE__, __LINE__)

/*
 * The call gives `status`, and an error's message begins with the function, holds `text`, and says what was found and
 * what was wanted.
 */
#define CHECK_STATUS(call, status, text) check_status((call), (status), (text), #call, __FILE__, __LINE__)
#define CHECK_OK(call) CHECK_STATUS(call, TREEATTN_OK, "")
#define CHECK_INVALID(call, text) CHECK_STATUS(call, TREEATTN_ERROR_INVALID_ARGUMENT, text)
#define CHECK_UNSUPPORTED(call, text) CHECK_STATUS(call, TREEATTN_ERROR_UNSUPPORTED, text)
#define CHECK_PARENT_DESTROYED(call, text) CHECK_STATUS(call, TREEATTN_ERROR_PARENT_DESTROYED, text)

/*
 * `call` uses `handle`, which runs through everything that is no live handle of `type`: NULL (unless `null_is_fine`),
 * foreign values, `dead` (destroyed) and `other` (a live one of another type).
 */
#define CHECK_BAD_HANDLES(type, null_is_fine, dead, other, text, call)                                       \
  do {                                                                                                       \
    for (int which_ = (null_is_fine) ? 1 : 0; which_ < CHECK_BAD_HANDLE_COUNT; which_++) {                   \
      type *handle = (type *)check_bad_handle(which_, (void *)(dead), (void *)(other));                      \
      check_status((call), TREEATTN_ERROR_BAD_HANDLE, text, #call, __FILE__, __LINE__);                      \
    }                                                                                                        \
  } while (0)

/* What nobody wrote to holds this. */
#define CHECK_GUARD 0xA5

static inline void check_that(int condition, const char *what, const char *file, int line) {
  if (!condition) {
    check_failures++;
    printf("%s:%d: %s does not hold\n", file, line, what);
  }
}

static inline void check_status(treeattn_status_t found, treeattn_status_t wanted, const char *text,
                                const char *call, const char *file, int line) {
  const char *message = found == TREEATTN_OK ? "" : treeattn_last_error_message();
  if (found != wanted) {
    check_failures++;
    printf("%s:%d: %s gave %s (%s), wanted %s\n", file, line, call, treeattn_status_string(found), message,
           treeattn_status_string(wanted));
    return;
  }
  if (wanted == TREEATTN_OK) {
    return;
  }
  size_t name = strcspn(call, "(");
  int named = strncmp(call, "treeattn_", 9) != 0 || (strncmp(message, call, name) == 0 && message[name] == ':');
  int complete = strstr(message, "found") != NULL &&
                 (strstr(message, "wanted") != NULL || strstr(message, "this build supports") != NULL);
  if (wanted != TREEATTN_ERROR_INVALID_ARGUMENT && wanted != TREEATTN_ERROR_UNSUPPORTED &&
      wanted != TREEATTN_ERROR_BAD_HANDLE && wanted != TREEATTN_ERROR_PARENT_DESTROYED) {
    complete = 1;
  }
  if (!named || !complete || strstr(message, text) == NULL) {
    check_failures++;
    printf("%s:%d: %s gave the message \"%s\", wanted the function's name, \"%s\", found and wanted\n", file, line,
           call, message, text);
  }
}

enum { CHECK_BAD_HANDLE_COUNT = 8 };

static inline void *check_bad_handle(int which, void *dead, void *other) {
  static int64_t foreign[2];
  switch (which) {
    case 0: return NULL;
    case 1: return dead;
    case 2: return other;
    case 3: return foreign;
    case 4: return (void *)((uintptr_t)foreign | 1);
    case 5: return (void *)(uintptr_t)1;
    case 6: return (void *)UINTPTR_MAX;
    /* One bit away from a handle that was alive. */
    default: return (void *)((uintptr_t)dead ^ (uintptr_t)1 << 40);
  }
}

static inline void check_fill(void *bytes, size_t n) { memset(bytes, CHECK_GUARD, n); }

static inline int check_untouched(const void *bytes, size_t n) {
  for (size_t i = 0; i < n; i++) {
    if (((const unsigned char *)bytes)[i] != CHECK_GUARD) {
      return 0;
    }
  }
  return 1;
}

/* A value that no call gave, for results that must stay untouched. */
#define CHECK_NO_HANDLE(type) ((type *)(uintptr_t)0x1234)

static inline int check_report(const char *name) {
  if (check_failures != 0) {
    printf("%s: %d checks failed\n", name, check_failures);
    return 1;
  }
  printf("%s: ok\n", name);
  return 0;
}

#endif
