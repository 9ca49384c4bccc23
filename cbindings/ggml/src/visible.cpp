#include "visible.h"

#include <algorithm>
#include <cstring>

#include "bits.h"

namespace treeattn_ggml {
namespace {

// Masks of a step that are remembered: full and windowed layers, with room for two contexts that take turns.
constexpr size_t kEntries = 4;
// Borders between ranks are multiples of this many keys, as the library's tiles are.
constexpr int64_t kBlock = 64;
// Most elements of a gathered mask; where it would be larger, hidden keys are left to the library.
constexpr int64_t kMostGathered = int64_t{1} << 25;

const uint16_t* mask_row(const Tensor* mask, int64_t sequence, int64_t head, int64_t row) {
  const char* data = static_cast<const char*>(mask->data);
  const int64_t at = (sequence % mask->ne[3]) * static_cast<int64_t>(mask->nb[3]) + head * static_cast<int64_t>(mask->nb[2]) +
                     row * static_cast<int64_t>(mask->nb[1]);
  return reinterpret_cast<const uint16_t*>(data + at);
}

// Calls visit(elements, number of them) for all that a step reads of its mask, until one gives false.
template <typename Visit>
bool each_part(const VisibleQuestion& q, Visit visit) {
  const Tensor* mask = q.mask;
  const bool whole = mask->nb[1] == 2 * static_cast<size_t>(q.keys);
  const int64_t rows = whole ? 1 : q.query_tokens;
  const size_t n = static_cast<size_t>(q.keys) * static_cast<size_t>(whole ? q.query_tokens : 1);
  for (int64_t s = 0; s < mask->ne[3]; s++) {
    for (int64_t h = 0; h < mask->ne[2]; h++) {
      for (int64_t i = 0; i < rows; i++) {
        if (!visit(mask_row(mask, s, h, i), n)) {
          return false;
        }
      }
    }
  }
  return true;
}

int32_t cut(int64_t length, int rank, int ranks) {
  if (rank >= ranks) {
    return static_cast<int32_t>(length);
  }
  return static_cast<int32_t>(length * rank / ranks / kBlock * kBlock);
}

// The groups of a step, and whether each row sees just the keys of its group with nothing added.
class Grouping {
 public:
  Grouping(const VisibleQuestion& q, bool one_a_sequence) : q_(q), one_a_sequence_(one_a_sequence) {
    for (int32_t s = 0; s < q.sequences; s++) {
      if (q.mask == nullptr) {
        groups.push_back({s, 0, q.query_tokens, q.keys, {{0, q.keys}}});
        continue;
      }
      for (int32_t i = 0; i < q.query_tokens; i++) {
        add_row(s, i);
      }
      close();
    }
  }

  std::vector<Group> groups;
  bool masked = false;

 private:
  void add_row(int32_t s, int32_t i) {
    const size_t words = (static_cast<size_t>(q_.keys) + 63) / 64;
    row_.assign(words, 0);
    for (int64_t h = 0; h < q_.mask->ne[2]; h++) {
      if (h > 0) {
        head_.assign(words, 0);
        masked |= add_visible(mask_row(q_.mask, s, h, i), q_.keys, head_.data());
        masked |= head_ != row_;
        for (size_t w = 0; w < words; w++) {
          row_[w] |= head_[w];
        }
      } else {
        masked |= add_visible(mask_row(q_.mask, s, h, i), q_.keys, row_.data());
      }
    }
    const int64_t keys = count(row_);
    if (open_) {
      // Rows join where reading their keys together costs clearly less than reading them apart.
      const int64_t both = count_union(union_, row_);
      if (one_a_sequence_ || 4 * both <= 3 * (keys_ + keys)) {
        masked |= both != keys_ || both != keys;
        for (size_t w = 0; w < words; w++) {
          union_[w] |= row_[w];
        }
        keys_ = both;
        groups.back().rows++;
        return;
      }
      close();
    }
    groups.push_back({s, i, 1, 0, {}});
    union_ = row_;
    keys_ = keys;
    open_ = true;
  }

  void close() {
    if (open_) {
      groups.back().keys = static_cast<int32_t>(keys_);
      groups.back().runs = runs_of(union_);
      open_ = false;
    }
  }

  const VisibleQuestion& q_;
  const bool one_a_sequence_;
  Bits row_, head_, union_;
  int64_t keys_ = 0;
  bool open_ = false;
};

// Whether strides can name the keys: one group a sequence, of one run, all of which begin with the same key.
bool is_strided(const Grouping& g, int32_t sequences, int32_t& start) {
  if (static_cast<int32_t>(g.groups.size()) != sequences) {
    return false;
  }
  bool any = false;
  start = 0;
  for (const Group& group : g.groups) {
    if (group.runs.empty()) {
      continue;
    }
    if (group.runs.size() > 1 || (any && group.runs[0].begin != start)) {
      return false;
    }
    start = group.runs[0].begin;
    any = true;
  }
  return true;
}

void lay_out_strided(VisibleKeys& out, int ranks) {
  int64_t longest = 0;
  for (const Group& group : out.groups) {
    longest = std::max<int64_t>(longest, group.runs.empty() ? 0 : group.runs.back().end - out.start);
  }
  for (int r = 0; r < ranks; r++) {
    VisibleKeys::Rank& rank = out.ranks[static_cast<size_t>(r)];
    const int32_t begin = cut(longest, r, ranks), end = cut(longest, r + 1, ranks);
    rank.offset = begin;
    for (const Group& group : out.groups) {
      const int32_t length = group.runs.empty() ? 0 : group.runs.back().end - out.start;
      rank.lengths.push_back(std::clamp(length - begin, 0, end - begin));
    }
  }
}

void lay_out_lists(VisibleKeys& out, const VisibleQuestion& q, int ranks) {
  std::vector<int32_t> begins;
  for (const Group& group : out.groups) {
    begins.push_back(static_cast<int32_t>(out.indices.size()));
    const int32_t base = static_cast<int32_t>(group.sequence * q.cache_stride);
    for (const Run& run : group.runs) {
      for (int32_t key = run.begin; key < run.end; key++) {
        out.indices.push_back(base + key);
      }
    }
  }
  for (int r = 0; r < ranks; r++) {
    VisibleKeys::Rank& rank = out.ranks[static_cast<size_t>(r)];
    for (size_t g = 0; g < out.groups.size(); g++) {
      const int32_t from = cut(out.groups[g].keys, r, ranks), to = cut(out.groups[g].keys, r + 1, ranks);
      rank.lengths.push_back(to - from);
      rank.indptr.push_back(begins[g] + from);
    }
    rank.indptr.push_back(static_cast<int32_t>(out.indices.size()));
  }
}

// Gathers the mask of listed keys, for each rank by its slots.
void gather_mask(VisibleKeys& out, const VisibleQuestion& q, int32_t rows, int64_t heads) {
  for (VisibleKeys::Rank& rank : out.ranks) {
    const int64_t width = *std::max_element(rank.lengths.begin(), rank.lengths.end());
    rank.mask.assign(static_cast<size_t>(static_cast<int64_t>(out.groups.size()) * heads * rows * width), kMinusInfinity);
    rank.mask_stride[2] = 2 * width;
    rank.mask_stride[1] = heads == 1 ? 0 : 2 * width * rows;
    rank.mask_stride[0] = 2 * width * rows * heads;
    uint16_t* to = rank.mask.data();
    for (size_t g = 0; g < out.groups.size(); g++) {
      const Group& group = out.groups[g];
      const int32_t base = static_cast<int32_t>(group.sequence * q.cache_stride);
      const int32_t* list = out.indices.data() + rank.indptr[g];
      for (int64_t h = 0; h < heads; h++) {
        for (int32_t i = 0; i < rows; i++, to += width) {
          if (i >= group.rows) {
            continue;
          }
          const uint16_t* row = mask_row(q.mask, group.sequence, h, group.first_row + i);
          for (int32_t slot = 0; slot < rank.lengths[g]; slot++) {
            to[slot] = row[list[slot] - base];
          }
        }
      }
    }
  }
}

VisibleKeys answer(const VisibleQuestion& q, int ranks) {
  VisibleKeys out;
  const auto take = [&](Grouping&& g) {
    out.groups = std::move(g.groups);
    out.masked = g.masked;
  };
  Grouping grouping(q, false);
  out.lists = !is_strided(grouping, q.sequences, out.start);
  int32_t rows = 0;
  for (const Group& group : grouping.groups) {
    rows = std::max(rows, group.rows);
  }
  if (out.lists) {
    const int64_t heads = q.mask->ne[2];
    int64_t all = 0, longest = 0;
    for (const Group& group : grouping.groups) {
      all += group.keys;
      longest = std::max<int64_t>(longest, group.keys);
    }
    const int64_t gathered = static_cast<int64_t>(grouping.groups.size()) * heads * rows * longest;
    const bool fits = all <= INT32_MAX && (q.sequences == 1 || (q.cache_stride >= 0 && q.cache_stride * q.sequences <= INT32_MAX));
    if (!fits || (grouping.masked && gathered > kMostGathered)) {
      out.lists = false;
      out.start = 0;
    }
  }
  if (!out.lists && (static_cast<int32_t>(grouping.groups.size()) != q.sequences || !is_strided(grouping, q.sequences, out.start))) {
    // Hidden keys are the library's to skip: all rows of a sequence together, from the first key on, with the mask as it is.
    take(Grouping(q, true));
    out.masked = true;
    out.start = 0;
  } else {
    take(std::move(grouping));
  }

  out.ranks.resize(static_cast<size_t>(ranks));
  for (const Group& group : out.groups) {
    out.query_start.push_back(group.sequence * q.query_tokens + group.first_row);
    out.keys_visible += static_cast<int64_t>(group.rows) * group.keys;
  }
  out.query_start.push_back(q.sequences * q.query_tokens);
  out.keys_held = static_cast<int64_t>(q.sequences) * q.query_tokens * q.keys;
  if (out.lists) {
    lay_out_lists(out, q, ranks);
    if (out.masked) {
      gather_mask(out, q, rows, q.mask->ne[2]);
    }
  } else {
    lay_out_strided(out, ranks);
  }
  return out;
}

}  // namespace

bool VisibleCache::matches(const Entry& e, const VisibleQuestion& q, int ranks) {
  if (e.ranks != ranks || e.question.query_tokens != q.query_tokens || e.question.sequences != q.sequences ||
      e.question.keys != q.keys || e.question.cache_stride != q.cache_stride || (e.mask_data == nullptr) != (q.mask == nullptr)) {
    return false;
  }
  if (q.mask == nullptr) {
    return true;
  }
  if (e.mask_data != q.mask->data || std::memcmp(e.mask_ne, q.mask->ne, sizeof e.mask_ne) != 0 ||
      std::memcmp(e.mask_nb, q.mask->nb, sizeof e.mask_nb) != 0) {
    return false;
  }
  const uint16_t* copy = e.copy.data();
  return each_part(q, [&](const uint16_t* part, size_t n) {
    const bool same = std::memcmp(part, copy, 2 * n) == 0;
    copy += n;
    return same;
  });
}

const VisibleKeys& VisibleCache::find(const VisibleQuestion& q, int ranks) {
  clock_++;
  for (Entry& entry : entries_) {
    if (matches(entry, q, ranks)) {
      entry.used = clock_;
      return entry.keys;
    }
  }
  Entry fresh;
  fresh.question = q;
  fresh.question.mask = nullptr;
  fresh.ranks = ranks;
  fresh.used = clock_;
  fresh.keys = answer(q, ranks);
  if (q.mask != nullptr) {
    fresh.mask_data = q.mask->data;
    std::memcpy(fresh.mask_ne, q.mask->ne, sizeof fresh.mask_ne);
    std::memcpy(fresh.mask_nb, q.mask->nb, sizeof fresh.mask_nb);
    each_part(q, [&](const uint16_t* part, size_t n) {
      fresh.copy.insert(fresh.copy.end(), part, part + n);
      return true;
    });
  }
  if (entries_.size() < kEntries) {
    entries_.push_back(std::move(fresh));
    return entries_.back().keys;
  }
  Entry& oldest = *std::min_element(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) { return a.used < b.used; });
  oldest = std::move(fresh);
  return oldest.keys;
}

}  // namespace treeattn_ggml
