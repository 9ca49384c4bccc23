/* Reads .npy files: version 1 to 3, little endian, C order, up to four dimensions. */
#ifndef EXAMPLES_NPY_H
#define EXAMPLES_NPY_H

#include <stdint.h>
#include <string.h>

#include "check.h"

typedef struct {
    char type[4];    /* as NumPy writes it: "f2", "f4", "f8", ... */
    int dims;        /* number of dimensions */
    size_t shape[4]; /* outermost first; 1 past the last */
    size_t bytes;    /* of data */
    void *data;      /* to be freed by the caller */
} npy_t;

/* The text behind 'key': in the header, or an exit. */
static inline const char *npy_field(const char *header, const char *key, const char *path)
{
    const char *at = strstr(header, key);
    REQUIRE(at != NULL, "%s has no %s in its header", path, key);
    at = strchr(at + strlen(key), ':');
    REQUIRE(at != NULL, "%s has a broken header", path);
    return at + 1;
}

/* Loads a file whose element type must be `type`. */
static inline npy_t npy_load(const char *path, const char *type)
{
    npy_t array = {{0}, 0, {1, 1, 1, 1}, 0, NULL};
    unsigned char lead[12] = {0};
    size_t length, elements = 1;
    char *header;
    const char *at;
    FILE *file = fopen(path, "rb");

    REQUIRE(file != NULL, "cannot open %s", path);
    REQUIRE(fread(lead, 1, 10, file) == 10 && memcmp(lead, "\x93NUMPY", 6) == 0, "%s is no .npy file", path);
    length = lead[8] | (size_t)lead[9] << 8;
    if (lead[6] > 1) {
        REQUIRE(fread(lead + 10, 1, 2, file) == 2, "%s is cut short", path);
        length |= (size_t)lead[10] << 16 | (size_t)lead[11] << 24;
    }
    header = must_alloc(length + 1);
    REQUIRE(fread(header, 1, length, file) == length, "%s is cut short", path);

    at = npy_field(header, "'descr'", path);
    at += strspn(at, " '");
    REQUIRE((*at == '<' || *at == '|') && strlen(at) > 3, "%s is not little endian", path);
    memcpy(array.type, at + 1, 2);
    REQUIRE(strcmp(array.type, type) == 0, "%s holds %s, wanted %s", path, array.type, type);
    at = npy_field(header, "'fortran_order'", path);
    at += strspn(at, " ");
    REQUIRE(strncmp(at, "False", 5) == 0, "%s is in Fortran order", path);
    at = strchr(npy_field(header, "'shape'", path), '(');
    REQUIRE(at != NULL, "%s has no shape", path);
    for (at++; *at && *at != ')';) {
        char *end;
        unsigned long long extent = strtoull(at, &end, 10);
        REQUIRE(end != at && array.dims < 4, "%s has a shape that is not read here", path);
        array.shape[array.dims++] = (size_t)extent;
        elements *= (size_t)extent;
        at = end + strspn(end, ", ");
    }
    free(header);

    array.bytes = elements * (size_t)(array.type[1] - '0');
    array.data = must_alloc(array.bytes);
    REQUIRE(fread(array.data, 1, array.bytes, file) == array.bytes, "%s is cut short", path);
    fclose(file);
    return array;
}

#endif
