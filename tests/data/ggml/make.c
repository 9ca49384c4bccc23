/* Blocks made by ggml's own quantisers, each file followed by what ggml's own dequantisers make of them. */
#include "ggml-quants.h"
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define BLOCKS 16
static uint64_t state = 1;
static float draw(void) {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return (float)((double)(state >> 33) / 1073741824.0 - 1.0);
}
#define MAKE(name, block_t)                                                        \
  do {                                                                             \
    block_t blocks[BLOCKS];                                                        \
    float wide[BLOCKS * 32];                                                       \
    memset(blocks, 0, sizeof(blocks));                                             \
    quantize_row_##name##_ref(values, blocks, BLOCKS * 32);                        \
    dequantize_row_##name(blocks, wide, BLOCKS * 32);                              \
    FILE *f = fopen("out/" #name ".bin", "wb");                                    \
    fwrite(blocks, 1, sizeof(blocks), f);                                          \
    fwrite(wide, 1, sizeof(wide), f);                                              \
    fclose(f);                                                                     \
    printf(#name " %zu bytes a block\n", sizeof(block_t));                         \
  } while (0)
void ggml_abort(const char *file, int line, const char *format, ...) { printf("%s:%d: %s\n", file, line, format); exit(1); }
int main(void) {
  float values[BLOCKS * 32];
  for (int b = 0; b < BLOCKS; b++) {
    /* Ordinary, large and small blocks, one of zeros, one of equal values, one with an outlier, some off centre. */
    float size = b < 8 ? 1.0f : ldexpf(1.0f, 3 * (b - 11)), centre = b % 4 == 3 ? 5.0f * size : 0.0f;
    for (int i = 0; i < 32; i++) {
      values[b * 32 + i] = b == 4 ? 0.0f : b == 5 ? -0.75f : b == 6 && i == 17 ? 40.0f : centre + size * draw();
    }
  }
  MAKE(q8_0, block_q8_0);
  MAKE(q4_0, block_q4_0);
  MAKE(q4_1, block_q4_1);
  MAKE(q5_0, block_q5_0);
  MAKE(q5_1, block_q5_1);
  MAKE(iq4_nl, block_iq4_nl);
  return 0;
}
