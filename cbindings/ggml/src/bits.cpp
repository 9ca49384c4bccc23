#include "bits.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace treeattn_ggml {
namespace {

// Bit i: element i of 64 is hidden. `added` gets bits that are set where one is neither 0 nor -inf.
#if defined(__SSE2__)
uint64_t hidden_of_64(const uint16_t* at, uint64_t& added) {
  const __m128i infinity = _mm_set1_epi16(static_cast<short>(kMinusInfinity));
  uint64_t hidden = 0, zero = 0;
  for (int part = 0; part < 4; part++) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 16 * part));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 16 * part + 8));
    const __m128i h = _mm_packs_epi16(_mm_cmpeq_epi16(a, infinity), _mm_cmpeq_epi16(b, infinity));
    // Twice the element loses the sign: 0 and -0 are the same.
    const __m128i none = _mm_setzero_si128();
    const __m128i z = _mm_packs_epi16(_mm_cmpeq_epi16(_mm_add_epi16(a, a), none), _mm_cmpeq_epi16(_mm_add_epi16(b, b), none));
    hidden |= static_cast<uint64_t>(static_cast<uint32_t>(_mm_movemask_epi8(h))) << (16 * part);
    zero |= static_cast<uint64_t>(static_cast<uint32_t>(_mm_movemask_epi8(z))) << (16 * part);
  }
  added |= ~(hidden | zero);
  return hidden;
}
#else
uint64_t hidden_of_64(const uint16_t* at, uint64_t& added) {
  uint64_t hidden = 0, zero = 0;
  for (int i = 0; i < 64; i++) {
    hidden |= static_cast<uint64_t>(at[i] == kMinusInfinity) << i;
    zero |= static_cast<uint64_t>((at[i] & 0x7fff) == 0) << i;
  }
  added |= ~(hidden | zero);
  return hidden;
}
#endif

}  // namespace

bool add_visible(const uint16_t* row, int32_t keys, uint64_t* bits) {
  uint64_t added = 0;
  int32_t key = 0;
  for (; key + 64 <= keys; key += 64) {
    bits[key / 64] |= ~hidden_of_64(row + key, added);
  }
  for (; key < keys; key++) {
    if (row[key] != kMinusInfinity) {
      bits[key / 64] |= uint64_t{1} << (key % 64);
      added |= static_cast<uint64_t>((row[key] & 0x7fff) != 0);
    }
  }
  return added != 0;
}

int64_t count(const Bits& bits) {
  int64_t n = 0;
  for (const uint64_t word : bits) {
    n += __builtin_popcountll(word);
  }
  return n;
}

int64_t count_union(const Bits& a, const Bits& b) {
  int64_t n = 0;
  for (size_t i = 0; i < a.size(); i++) {
    n += __builtin_popcountll(a[i] | b[i]);
  }
  return n;
}

std::vector<Run> runs_of(const Bits& bits) {
  std::vector<Run> runs;
  for (size_t i = 0; i < bits.size(); i++) {
    const int32_t base = static_cast<int32_t>(64 * i);
    uint64_t rest = bits[i];
    while (rest != 0) {
      const int first = __builtin_ctzll(rest);
      const uint64_t from = ~(rest >> first);
      const int length = from == 0 ? 64 - first : __builtin_ctzll(from);
      const Run run{base + first, base + first + length};
      if (!runs.empty() && runs.back().end == run.begin) {
        runs.back().end = run.end;
      } else {
        runs.push_back(run);
      }
      if (first + length >= 64) {
        break;
      }
      rest &= ~uint64_t{0} << (first + length);
    }
  }
  return runs;
}

}  // namespace treeattn_ggml
