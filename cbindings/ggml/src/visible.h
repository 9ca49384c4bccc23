// Which keys the rows of a step see: runs and lists of visible keys, found in ggml's additive mask, cut into one part a rank.
#pragma once

#include <cstdint>
#include <vector>

#include "ggml_abi.h"

namespace treeattn_ggml {

// Consecutive keys [begin, end) of a sequence's cache.
struct Run {
  int32_t begin;
  int32_t end;
};

// Consecutive query tokens of one sequence that see about the same keys: a sequence of the library's step.
struct Group {
  int32_t sequence;  // of ggml's tensors
  int32_t first_row;
  int32_t rows;
  int32_t keys;  // in the runs
  std::vector<Run> runs;
};

// What a step attends, in the form in which the library takes it, for every rank.
struct VisibleKeys {
  std::vector<Group> groups;
  bool lists = false;   // keys named one by one; otherwise one run [start, start + length) of each sequence
  bool masked = false;  // some row sees other keys than its group, or something is added to a score
  int32_t start = 0;    // without lists: the first key of every group
  int64_t keys_held = 0;     // rows times keys of the cache
  int64_t keys_visible = 0;  // rows times keys that are attended

  std::vector<int32_t> query_start;  // [groups + 1]
  std::vector<int32_t> indices;      // with lists: the keys, group after group, as rows of the whole cache
  struct Rank {
    int32_t offset = 0;                // without lists: keys from start on that belong to ranks before
    std::vector<int32_t> lengths;      // [groups]
    std::vector<int32_t> indptr;       // with lists: [groups + 1]
    std::vector<uint16_t> mask;        // with lists: f16 [group, head, row, slot]
    int64_t mask_stride[3] = {0, 0, 0};  // bytes between groups, heads, rows
  };
  std::vector<Rank> ranks;
};

// Of a step: its mask (NULL: none), and how it is laid out.
struct VisibleQuestion {
  const Tensor* mask;
  int32_t query_tokens;  // of each sequence
  int32_t sequences;
  int32_t keys;           // that the cache's view holds of each sequence
  int64_t cache_stride;   // rows of the cache from one sequence to the next; -1: no whole number, so that there are no lists
};

// Answers, and keeps the answers of the last masks with a copy of each, so that the layers of a step that share a mask pay a
// comparison each. Not thread safe: one an engine.
class VisibleCache {
 public:
  // Valid until the next call. May throw std::bad_alloc.
  const VisibleKeys& find(const VisibleQuestion& question, int ranks);

 private:
  struct Entry {
    VisibleQuestion question{};
    int64_t mask_ne[kMaxDims] = {0, 0, 0, 0};
    size_t mask_nb[kMaxDims] = {0, 0, 0, 0};
    const void* mask_data = nullptr;
    int ranks = 0;
    uint64_t used = 0;
    std::vector<uint16_t> copy;
    VisibleKeys keys;
  };
  static bool matches(const Entry& entry, const VisibleQuestion& question, int ranks);

  std::vector<Entry> entries_;
  uint64_t clock_ = 0;
};

}  // namespace treeattn_ggml
