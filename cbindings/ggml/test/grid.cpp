// ggml's flash attention over its whole space, computed by the scheduler with the plugin beside the CPU backend, against
// float64:
//
//     grid CASES THREADS EXPECTED WHOSE [ONE]
//
// EXPECTED is `honest`, `inline` or `hook`: which of the plugin's counters has to rise for every case that the plugin must take.
// WHOSE threads are to compute: `own`, or `ggml`, where there is one of them for each rank. ONE runs a single case of the CASES
// and prints it. Case i is the same in every run.
//
// Each case runs twice in one graph with new queries and a new mask in the same memory, as a decode step after the other. Rows
// of the cache that no query sees, and rows behind the cache, are NaN in half of the cases. Prints a line for each pair of
// dimensions and those cases that failed; ends with 1 where one failed.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "reference.h"

namespace {

constexpr float INF = INFINITY;
// ggml's own tolerance, and the most query tokens that the plugin takes.
constexpr double MOST_NMSE = 5e-4;
constexpr int MOST_DECODE = 32;

enum class Mask { none, causal, slots, window, sparse, values };
const char * const MASK_NAMES[] = {"none", "causal", "slots", "window", "sparse", "values"};

struct Case {
    int dim_k, dim_v, keys, queries, kv_heads, group, sequences;
    ggml_type type_k, type_v;
    Mask mask;
    int mask_heads, mask_sequences, mask_rows;
    bool sinks, view, permuted, permuted_q, nan;
    float max_bias, softcap;
    int spare; // rows of the cache behind those that are attended

    int heads() const { return kv_heads * group; }
    bool decode() const { return queries <= MOST_DECODE; }
    double work() const { return double(sequences) * heads() * queries * keys * (dim_k + dim_v); }

    std::string text() const {
        char line[400];
        std::snprintf(line, sizeof line,
                      "%d/%d keys %d queries %d heads %d/%d sequences %d %s/%s mask %s[%d,%d,%d] sinks %d bias %g softcap %g%s%s%s%s "
                      "spare %d",
                      dim_k, dim_v, keys, queries, heads(), kv_heads, sequences, ggml_type_name(type_k), ggml_type_name(type_v),
                      MASK_NAMES[int(mask)], mask_rows, mask_heads, mask_sequences, sinks, max_bias, softcap, view ? " V in K" : "",
                      permuted ? " [token][head]" : " [head][token]", permuted_q ? "" : " q [head][token]", nan ? " NaN" : "", spare);
        return line;
    }
};

using Random = std::mt19937_64;

template <typename T, size_t N> T pick(Random & random, const T (&from)[N]) { return from[random() % N]; }

constexpr std::pair<int, int> DIMENSIONS[] = {{40, 40},   {64, 64},   {72, 72},   {80, 80},   {96, 96},   {128, 128},
                                              {192, 128}, {192, 192}, {256, 256}, {320, 256}, {512, 512}, {576, 512}};
constexpr ggml_type TYPES[] = {GGML_TYPE_F16,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,  GGML_TYPE_F32,
                               GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL};

Case make_case(int index) {
    // What a prompt costs the reference; a few cases may cost more, so that the largest shapes occur.
    for (int attempt = 0;; attempt++) {
        Random random(uint64_t(index) * 1000003 + attempt);
        Case c;
        std::tie(c.dim_k, c.dim_v) = DIMENSIONS[index % std::size(DIMENSIONS)];
        const int keys[] = {1, 113, 256, 512, 1024}, queries[] = {1, 1, 1, 3, 8, 32, 75}, kv_heads[] = {1, 2, 4, 8},
                  groups[] = {1, 2, 4, 5, 8, 16}, sequences[] = {1, 1, 3};
        c.keys = pick(random, keys);
        c.queries = pick(random, queries);
        c.kv_heads = pick(random, kv_heads);
        c.group = pick(random, groups);
        c.sequences = pick(random, sequences);
        c.type_k = pick(random, TYPES);
        c.type_v = random() % 4 ? c.type_k : pick(random, TYPES);
        c.mask = Mask(random() % 6);
        c.sinks = random() % 3 == 0;
        c.softcap = random() % 4 == 0 ? 10.0f : 0.0f;
        c.permuted = random() % 4 != 0;
        c.permuted_q = random() % 4 != 0;
        c.nan = random() % 2 && c.decode();
        c.spare = random() % 3 == 0 ? 0 : int(random() % 100);
        c.view = false;
        if ((c.dim_k == 576 || c.dim_k == 320) && random() % 4) {
            c.kv_heads = 1;
            c.view = true;
            c.type_v = c.type_k;
        }
        const int heads[] = {1, 1, 1, c.heads(), c.kv_heads};
        c.mask_heads = pick(random, heads);
        c.mask_sequences = random() % 2 ? 1 : c.sequences;
        c.mask_rows = c.queries + (random() % 4 ? 0 : int(random() % 20));
        c.max_bias = c.mask != Mask::none && random() % 3 == 0 ? 8.0f : 0.0f;
        const auto whole_blocks = [](ggml_type type, int dim) { return dim % ggml_blck_size(type) == 0; };
        if (!whole_blocks(c.type_k, c.dim_k) || !whole_blocks(c.type_v, c.dim_v)) {
            continue;
        }
        if (c.work() < (attempt % 8 == 7 ? 2e8 : 3e7)) {
            return c;
        }
    }
}

// Rows of a cache in a type of ggml's.
void fill_rows(ggml_type type, int64_t rows, int dim, Random & random, uint8_t * out) {
    std::normal_distribution<float> normal;
    const size_t row_size = ggml_row_size(type, dim);
    std::vector<float> row(dim);
    for (int64_t r = 0; r < rows; r++) {
        for (float & x : row) {
            x = normal(random);
        }
        uint8_t * to = out + r * row_size;
        if (type == GGML_TYPE_F32) {
            std::memcpy(to, row.data(), row_size);
        } else {
            ggml_quantize_chunk(type, row.data(), to, 0, 1, dim, nullptr);
        }
    }
}

// The mask of one step as float, [sequences][heads][rows][keys] of the mask's own sizes.
std::vector<float> make_mask(const Case & c, Random & random) {
    std::vector<float> mask(size_t(c.mask_sequences) * c.mask_heads * c.mask_rows * c.keys, -INF);
    std::normal_distribution<float> normal;
    const auto f16 = [](float x) { return ggml_fp16_to_fp32(ggml_fp32_to_fp16(x)); };
    std::vector<int> slot(c.keys);
    for (int s = 0; s < c.mask_sequences; s++) {
        const int padding = c.keys > 8 && random() % 2 ? int(random() % (c.keys / 2)) : 0;
        const int length = c.keys - padding;
        for (int j = 0, run = 0, now = 0; j < c.keys; j++) {
            if (run-- == 0) {
                run = int(random() % 60);
                now = int(random() % 4);
            }
            slot[j] = now;
        }
        for (int h = 0; h < c.mask_heads; h++) {
            for (int i = 0; i < c.queries; i++) {
                const int last = std::max(0, length - c.queries + i);
                float * row = &mask[((size_t(s) * c.mask_heads + h) * c.mask_rows + i) * c.keys];
                const bool hidden_whole = c.mask == Mask::sparse && random() % 5 == 0;
                for (int j = 0; j < c.keys; j++) {
                    bool seen = true;
                    switch (c.mask) {
                    case Mask::causal: seen = j <= last; break;
                    case Mask::slots: seen = j <= last && slot[j] == i % 4; break;
                    case Mask::window: seen = j <= last && j > last - 70; break;
                    case Mask::sparse: seen = !hidden_whole && random() % 10 == 0; break;
                    default: break;
                    }
                    if (seen) {
                        row[j] = c.mask == Mask::values ? f16(normal(random)) : c.max_bias > 0 ? f16(float(-std::abs(last - j))) : 0.0f;
                    }
                }
            }
        }
    }
    return mask;
}

// Largest distance of a result from float64 by two measures.
struct Errors {
    double nmse = 0, bound = 0;
    void add(const Errors & other) {
        nmse = std::max(nmse, other.nmse);
        bound = std::max(bound, other.bound);
    }
};

// The result of a case [sequence][query][head][dim_v] against float64.
Errors compare(const Attention & a, const std::vector<float> & result) {
    double squares = 0, errors = 0, worst = 0;
    exact_attention(a, [&](int64_t s, int64_t h, int64_t i, const ExactRow & row) {
        const size_t dim = row.out.size();
        const float * out = &result[((s * a.q->ne[1] + i) * a.q->ne[2] + h) * dim];
        const double unit = std::exp2(-24) * (4 + 2 * row.largest);
        for (size_t d = 0; d < dim; d++) {
            const double error = std::fabs(out[d] - row.out[d]);
            squares += row.out[d] * row.out[d];
            errors += error * error;
            if (error != 0) {
                worst = std::max(worst, std::isfinite(out[d]) ? error / std::max(unit * row.magnitude[d], 1e-30) : INFINITY);
            }
        }
    });
    Errors e;
    e.nmse = errors == 0 ? 0 : std::isfinite(errors) ? errors / std::max(squares, 1e-30) : INFINITY;
    e.bound = worst;
    return e;
}

using Counts = void (*)(uint64_t[6]);

struct Machine {
    ggml_backend_t plugin = nullptr, cpu = nullptr;
    ggml_backend_sched_t scheduler = nullptr;
    Counts counts = nullptr;
};

bool make_machine(int threads, Machine & m) {
    ggml_backend_load_all();
    for (size_t i = 0; i < ggml_backend_reg_count(); i++) {
        ggml_backend_reg_t registration = ggml_backend_reg_get(i);
        void * found = ggml_backend_reg_get_proc_address(registration, "ggml_backend_treeattn_counts");
        if (!found) {
            continue;
        }
        m.counts = reinterpret_cast<Counts>(found);
        m.plugin = ggml_backend_dev_init(ggml_backend_reg_dev_get(registration, 0), nullptr);
        auto set = reinterpret_cast<ggml_backend_set_n_threads_t>(
            ggml_backend_reg_get_proc_address(registration, "ggml_backend_set_n_threads"));
        if (m.plugin && set) {
            set(m.plugin, threads);
        }
    }
    m.cpu = ggml_backend_cpu_init();
    if (!m.plugin || !m.cpu) {
        std::fprintf(stderr, "grid: the plugin is not loaded; set GGML_BACKEND_PATH\n");
        return false;
    }
    ggml_backend_cpu_set_n_threads(m.cpu, threads);
    ggml_backend_t backends[] = {m.plugin, m.cpu};
    // As llama.cpp has it: buffers of the CPU's default type for both.
    ggml_backend_buffer_type_t types[] = {ggml_backend_cpu_buffer_type(), ggml_backend_cpu_buffer_type()};
    m.scheduler = ggml_backend_sched_new(backends, types, 2, 64, false, true);
    return m.scheduler != nullptr;
}

struct Result {
    Errors errors;
    uint64_t counts[6] = {};
    std::string failure;
};

// A row of the cache is a token's heads side by side (permuted), or a head's tokens lie behind each other.
struct Cache {
    ggml_tensor * memory = nullptr; // what is allocated
    ggml_tensor * view = nullptr;   // [dim, keys, heads, sequences]
    std::vector<uint8_t> bytes;
};

void make_cache(ggml_context * context, const Case & c, ggml_type type, int dim, Random & random, Cache & cache) {
    const int64_t rows = c.keys + c.spare, heads = c.kv_heads;
    const size_t row = ggml_row_size(type, dim);
    if (c.permuted) {
        cache.memory = ggml_new_tensor_4d(context, type, dim, heads, rows, c.sequences);
        cache.view = ggml_view_4d(context, cache.memory, dim, c.keys, heads, c.sequences, row * heads, row, row * heads * rows, 0);
    } else {
        cache.memory = ggml_new_tensor_4d(context, type, dim, rows, heads, c.sequences);
        cache.view = ggml_view_4d(context, cache.memory, dim, c.keys, heads, c.sequences, row, row * rows, row * heads * rows, 0);
    }
    const int64_t all = int64_t(c.sequences) * heads * c.keys;
    std::vector<uint8_t> packed(all * row);
    fill_rows(type, all, dim, random, packed.data());
    cache.bytes.assign(row * rows * heads * c.sequences, c.nan ? 0xff : 0);
    for (int64_t s = 0; s < c.sequences; s++) {
        for (int64_t h = 0; h < heads; h++) {
            for (int64_t j = 0; j < c.keys; j++) {
                const int64_t to = c.permuted ? (s * rows + j) * heads + h : (s * heads + h) * rows + j;
                std::memcpy(&cache.bytes[to * row], &packed[((s * heads + h) * c.keys + j) * row], row);
            }
        }
    }
}

// The bytes of a cache with NaN in the rows that no query of their sequence sees.
std::vector<uint8_t> with_nan(const Case & c, const Cache & cache, ggml_type type, int dim, const std::vector<float> & mask) {
    std::vector<uint8_t> bytes = cache.bytes;
    if (!c.nan || c.mask == Mask::none) {
        return bytes;
    }
    const int64_t rows = c.keys + c.spare, heads = c.kv_heads;
    const size_t row = ggml_row_size(type, dim);
    for (int64_t s = 0; s < c.sequences; s++) {
        for (int64_t j = 0; j < c.keys; j++) {
            bool seen = false;
            for (int h = 0; h < c.mask_heads; h++) {
                for (int i = 0; i < c.queries; i++) {
                    seen |= mask[((size_t(s % c.mask_sequences) * c.mask_heads + h) * c.mask_rows + i) * c.keys + j] != -INF;
                }
            }
            for (int64_t h = 0; !seen && h < heads; h++) {
                const int64_t to = c.permuted ? (s * rows + j) * heads + h : (s * heads + h) * rows + j;
                std::memset(&bytes[to * row], 0xff, row);
            }
        }
    }
    return bytes;
}

Result run(const Case & c, int index, const Machine & m) {
    Random random(uint64_t(index) + 77);
    std::normal_distribution<float> normal;
    const auto context_of = [](size_t tensors) {
        ggml_init_params params = {ggml_tensor_overhead() * tensors + ggml_graph_overhead(), nullptr, true};
        return std::unique_ptr<ggml_context, void (*)(ggml_context *)>(ggml_init(params), ggml_free);
    };
    const auto inputs = context_of(16), steps = context_of(16);
    Result result;

    // As llama.cpp makes them: queries [dim, heads, queries, sequences] in memory, seen as [dim, queries, heads, sequences].
    ggml_tensor * q = c.permuted_q ? ggml_new_tensor_4d(inputs.get(), GGML_TYPE_F32, c.dim_k, c.heads(), c.queries, c.sequences)
                                   : ggml_new_tensor_4d(inputs.get(), GGML_TYPE_F32, c.dim_k, c.queries, c.heads(), c.sequences);
    ggml_tensor * q_view = c.permuted_q ? ggml_permute(inputs.get(), q, 0, 2, 1, 3) : q;
    Cache k, v;
    make_cache(inputs.get(), c, c.type_k, c.dim_k, random, k);
    if (c.view) {
        v.view = ggml_view_4d(inputs.get(), k.view, c.dim_v, c.keys, c.kv_heads, c.sequences, k.view->nb[1], k.view->nb[2],
                              k.view->nb[3], 0);
    } else {
        make_cache(inputs.get(), c, c.type_v, c.dim_v, random, v);
    }
    ggml_tensor * mask = nullptr;
    if (c.mask != Mask::none) {
        mask = ggml_new_tensor_4d(inputs.get(), GGML_TYPE_F16, c.keys, c.mask_rows, c.mask_heads, c.mask_sequences);
    }
    ggml_tensor * sinks = c.sinks ? ggml_new_tensor_1d(inputs.get(), GGML_TYPE_F32, c.heads()) : nullptr;
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(inputs.get(), ggml_backend_cpu_buffer_type());
    if (!buffer) {
        result.failure = "no memory";
        return result;
    }

    // In-place mode changes the node, so that its parameters are kept here.
    const Attention attention = {q_view, k.view, v.view, mask, sinks, float(1.0 / std::sqrt(double(c.dim_k))), c.max_bias, c.softcap};
    ggml_tensor * node = ggml_flash_attn_ext(steps.get(), q_view, k.view, v.view, mask, attention.scale, c.max_bias, c.softcap);
    ggml_prec_set_acc(node, GGML_PREC_F32);
    if (sinks) {
        ggml_flash_attn_ext_add_sinks(node, sinks);
    }
    ggml_set_output(node);
    ggml_cgraph * graph = ggml_new_graph_custom(steps.get(), 16, false);
    ggml_build_forward_expand(graph, node);

    uint64_t before[6];
    m.counts(before);
    ggml_backend_sched_reset(m.scheduler);
    if (!ggml_backend_sched_alloc_graph(m.scheduler, graph)) {
        result.failure = "the graph cannot be allocated";
    }
    std::vector<float> sink_values(c.sinks ? c.heads() : 0);
    for (float & x : sink_values) {
        x = 2 * normal(random);
    }
    if (sinks) {
        ggml_backend_tensor_set(sinks, sink_values.data(), 0, ggml_nbytes(sinks));
    }
    const size_t q_rows = size_t(c.sequences) * c.queries * c.heads();
    for (int step = 0; step < 2 && result.failure.empty(); step++) {
        std::vector<float> queries(q_rows * c.dim_k), out(q_rows * c.dim_v);
        for (float & x : queries) {
            x = normal(random);
        }
        ggml_backend_tensor_set(q, queries.data(), 0, ggml_nbytes(q));
        std::vector<float> mask_values;
        if (mask) {
            mask_values = make_mask(c, random);
            std::vector<ggml_fp16_t> half(mask_values.size());
            ggml_fp32_to_fp16_row(mask_values.data(), half.data(), int64_t(half.size()));
            ggml_backend_tensor_set(mask, half.data(), 0, ggml_nbytes(mask));
        }
        const auto set_cache = [&](const Cache & cache, ggml_type type, int dim) {
            const std::vector<uint8_t> bytes = with_nan(c, cache, type, dim, mask_values);
            ggml_backend_tensor_set(cache.memory, bytes.data(), 0, bytes.size());
        };
        set_cache(k, c.type_k, c.dim_k);
        if (!c.view) {
            set_cache(v, c.type_v, c.dim_v);
        }
        if (ggml_backend_sched_graph_compute(m.scheduler, graph) != GGML_STATUS_SUCCESS) {
            result.failure = "the graph cannot be computed";
            break;
        }
        ggml_backend_tensor_get(node, out.data(), 0, ggml_nbytes(node));
        result.errors.add(compare(attention, out));
    }
    m.counts(result.counts);
    for (int i = 0; i < 6; i++) {
        result.counts[i] -= before[i];
    }
    ggml_backend_buffer_free(buffer);
    return result;
}

// Left to ggml: prompts; a mask of some of the heads, repeated over them by modulo, which no model has; fewer heads than ranks.
bool must_be_taken(const Case & c, int ranks) {
    return c.decode() && (c.mask_heads == 1 || c.mask_heads == c.heads() || c.mask == Mask::none) && c.heads() >= ranks;
}

} // namespace

int main(int argc, char ** argv) {
    if (argc < 5) {
        std::fprintf(stderr, "usage: grid CASES THREADS honest|inline|hook own|ggml [ONE]\n");
        return 2;
    }
    const int cases = std::atoi(argv[1]), threads = std::atoi(argv[2]), one = argc > 5 ? std::atoi(argv[5]) : -1;
    const int expected = std::strcmp(argv[3], "inline") == 0 ? 1 : std::strcmp(argv[3], "hook") == 0 ? 4 : 0;
    const bool on_threads = std::strcmp(argv[4], "ggml") == 0;
    const char * ranks_text = std::getenv("TREEATTN_GGML_RANKS");
    const int ranks = ranks_text ? std::atoi(ranks_text) : 1;
    Machine machine;
    if (!make_machine(threads, machine)) {
        return 1;
    }
    struct Row {
        int cases = 0, taken = 0, decode = 0;
        Errors plugin, ggml;
    };
    std::map<std::pair<int, int>, Row> rows;
    int failures = 0;
    for (int i = 0; i < cases; i++) {
        if (one >= 0 && i != one) {
            continue;
        }
        const Case c = make_case(i);
        const Result result = run(c, i, machine);
        // Both steps, none on another path, and none that failed.
        const uint64_t * counts = result.counts;
        const bool taken = counts[expected] == 2 && counts[0] + counts[1] + counts[4] == 2 && counts[3] == 0;
        const bool enough = std::min(ranks, c.heads()) <= threads;
        std::string failure = result.failure;
        if (failure.empty() && must_be_taken(c, ranks) && !taken) {
            failure = "not computed by the plugin";
        } else if (failure.empty() && !taken && counts[0] + counts[1] + counts[3] + counts[4] != 0) {
            failure = "computed by the plugin in part";
        } else if (failure.empty() && taken && counts[5] != (on_threads && enough ? 2 : 0)) {
            failure = "computed on other threads";
        } else if (failure.empty() && !(result.errors.nmse <= MOST_NMSE)) {
            failure = "too far from float64 (NMSE)";
        } else if (failure.empty() && taken && !(result.errors.bound <= 1)) {
            failure = "outside of the library's bound";
        }
        Row & row = rows[{c.dim_k, c.dim_v}];
        row.cases++;
        row.decode += must_be_taken(c, ranks);
        row.taken += taken;
        (taken ? row.plugin : row.ggml).add(result.errors);
        if (!failure.empty() && ++failures <= 20) {
            std::printf("case %d: %s: %s: NMSE %.1e, error/bound %.2f, counts %d %d %d %d %d %d\n", i, failure.c_str(),
                        c.text().c_str(), result.errors.nmse, result.errors.bound, int(counts[0]), int(counts[1]), int(counts[2]),
                        int(counts[3]), int(counts[4]), int(counts[5]));
        } else if (one >= 0) {
            std::printf("case %d: %s: NMSE %.1e, error/bound %.2f, %s\n", i, c.text().c_str(), result.errors.nmse,
                        result.errors.bound, taken ? "plugin" : "ggml");
        }
    }
    std::printf("  dims      cases  decode  plugin  NMSE     error/bound  NMSE of ggml's own\n");
    int total = 0, taken = 0;
    for (const auto & [dims, row] : rows) {
        std::printf("  %3d/%-3d %7d %7d %7d  %.1e  %11.2f  %.1e\n", dims.first, dims.second, row.cases, row.decode, row.taken,
                    row.plugin.nmse, row.plugin.bound, row.ggml.nmse);
        total += row.cases;
        taken += row.taken;
    }
    std::printf("  %d cases, %d by the plugin, %d failed\n", total, taken, failures);
    ggml_backend_sched_free(machine.scheduler);
    ggml_backend_free(machine.plugin);
    ggml_backend_free(machine.cpu);
    return failures == 0 && taken > 0 ? 0 : 1;
}
