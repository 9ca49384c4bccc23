/* How the examples deal with errors: say where, which call, which status and what the library said; then exit. */
#ifndef EXAMPLES_CHECK_H
#define EXAMPLES_CHECK_H

#include <stdio.h>
#include <stdlib.h>

#include <treeattn.h>

/* Runs a call of the library and exits with a full report if it did not succeed. */
#define CHECK(call)                                                                                             \
    do {                                                                                                        \
        treeattn_status_t check_status_ = (call);                                                               \
        if (check_status_ != TREEATTN_OK) {                                                                     \
            fprintf(stderr, "%s:%d: %s\n    returned %s: %s\n", __FILE__, __LINE__, #call,                      \
                    treeattn_status_string(check_status_), treeattn_last_error_message());                      \
            exit(1);                                                                                            \
        }                                                                                                       \
    } while (0)

/* Exits if something that the example relies on is not so. */
#define REQUIRE(condition, ...)                                                                                 \
    do {                                                                                                        \
        if (!(condition)) {                                                                                     \
            fprintf(stderr, "%s:%d: %s does not hold: ", __FILE__, __LINE__, #condition);                       \
            fprintf(stderr, __VA_ARGS__);                                                                       \
            fputc('\n', stderr);                                                                                \
            exit(1);                                                                                            \
        }                                                                                                       \
    } while (0)

/* malloc that exits rather than returning NULL. */
static inline void *must_alloc(size_t bytes)
{
    void *memory = calloc(1, bytes ? bytes : 1);
    REQUIRE(memory != NULL, "no memory for %zu bytes", bytes);
    return memory;
}

#endif
