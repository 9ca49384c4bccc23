// The time of an attention: by ggml, by the plugin in ggml's scheduler, and by the library alone.
//
//     attention POLL THREADS SECONDS
//
// POLL is that of ggml's pool: llama-server's default is 50; at 0 its threads sleep at once. Reads cases from standard input, one
// a line:
//     Q_HEADS KV_HEADS DIM TYPE KEYS LAYERS SLOTS RUN
// SLOTS query tokens, each of which sees all keys (RUN 0), or those of its slot; four slots take turns by RUN keys. A graph is
// LAYERS attentions of random keys and values of their own, with a small operator of the CPU backend between them, as a model has.
//
// Five things take turns until each had SECONDS: the graph by ggml alone, by the scheduler with the plugin (GGML_BACKEND_PATH;
// TREEATTN_GGML says how), without its attentions; and the library's own step over all keys, for one query token, on as many
// threads of its own, and by a team in an OpenMP region of this program. Prints a line a case of microseconds a layer, the median of
// each round; of the first two the small operator is taken off:
//     ggml=N,... plugin=N,... between=N,... library=N,... team=N,...

#include <omp.h>
#include <treeattn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

[[noreturn]] void fail(const std::string & message) {
    std::cerr << "attention: " << message << std::endl;
    std::exit(1);
}

void check(treeattn_status_t status) {
    if (status != TREEATTN_OK) {
        fail(treeattn_last_error_message());
    }
}

struct Case {
    int q_heads, kv_heads, dim;
    std::string type_name;
    int keys, layers, slots, run;
    ggml_type type;
};

std::istream & operator>>(std::istream & in, Case & c) {
    in >> c.q_heads >> c.kv_heads >> c.dim >> c.type_name >> c.keys >> c.layers >> c.slots >> c.run;
    c.type = GGML_TYPE_COUNT;
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char * name = ggml_type_name(ggml_type(i));
        if (name && c.type_name == name) {
            c.type = ggml_type(i);
        }
    }
    return in;
}

treeattn_dtype_t dtype_of(const std::string & name) {
    if (name == "f16") return TREEATTN_DTYPE_F16;
    if (name == "bf16") return TREEATTN_DTYPE_BF16;
    if (name == "q8_0") return TREEATTN_DTYPE_Q8_0;
    if (name == "q4_0") return TREEATTN_DTYPE_Q4_0;
    fail("no type " + name);
}

bool sees(const Case & c, int slot, int key) { return c.run == 0 || key / c.run % 4 == slot; }

using Context = std::unique_ptr<ggml_context, void (*)(ggml_context *)>;

Context context_of(size_t tensors) {
    const ggml_init_params params = {ggml_tensor_overhead() * tensors + 4 * ggml_graph_overhead_custom(tensors, false), nullptr, true};
    return Context(ggml_init(params), ggml_free);
}

// What all graphs read: queries, a mask, and the cache of each layer, [token][head][dim].
struct Inputs {
    Context context = Context(nullptr, ggml_free);
    ggml_backend_buffer_t buffer = nullptr;
    ggml_tensor * q = nullptr, * mask = nullptr;
    std::vector<ggml_tensor *> k, v;

    explicit Inputs(const Case & c) : context(context_of(size_t(4 * c.layers + 8))) {
        ggml_context * g = context.get();
        q = ggml_new_tensor_3d(g, GGML_TYPE_F32, c.dim, c.q_heads, c.slots);
        mask = ggml_new_tensor_2d(g, GGML_TYPE_F16, c.keys, c.slots);
        std::vector<ggml_tensor *> memory;
        for (int i = 0; i < 2 * c.layers; i++) {
            memory.push_back(ggml_new_tensor_3d(g, c.type, c.dim, c.kv_heads, c.keys));
            const size_t row = ggml_row_size(c.type, c.dim);
            (i % 2 ? v : k).push_back(ggml_view_3d(g, memory[size_t(i)], c.dim, c.keys, c.kv_heads, row * c.kv_heads, row, 0));
        }
        buffer = ggml_backend_alloc_ctx_tensors_from_buft(g, ggml_backend_cpu_buffer_type());
        if (!buffer) {
            fail("no memory for the cache");
        }
        std::mt19937 random(1);
        std::normal_distribution<float> normal;
        const auto fill = [&](ggml_tensor * t) {
            // A mebibyte of random values again and again, from a place of each tensor's own.
            std::vector<float> values(1 << 18);
            for (float & x : values) {
                x = normal(random);
            }
            const int64_t n = ggml_nelements(t);
            for (int64_t at = 0; at < n; at += int64_t(values.size())) {
                const int64_t some = std::min(n - at, int64_t(values.size()));
                char * to = static_cast<char *>(t->data) + ggml_row_size(t->type, at);
                if (t->type == GGML_TYPE_F32) {
                    std::memcpy(to, values.data(), size_t(some) * 4);
                } else {
                    ggml_quantize_chunk(t->type, values.data(), to, 0, some / c.dim, c.dim, nullptr);
                }
            }
        };
        fill(q);
        for (ggml_tensor * t : memory) {
            fill(t);
        }
        ggml_fp16_t * to = static_cast<ggml_fp16_t *>(mask->data);
        for (int slot = 0; slot < c.slots; slot++) {
            for (int key = 0; key < c.keys; key++) {
                *to++ = ggml_fp32_to_fp16(sees(c, slot, key) ? 0.0f : -INFINITY);
            }
        }
    }
    ~Inputs() { ggml_backend_buffer_free(buffer); }
    Inputs(const Inputs &) = delete;
    Inputs & operator=(const Inputs &) = delete;
};

// A graph in a scheduler of its own.
struct Graph {
    Context context;
    ggml_backend_sched_t scheduler;
    ggml_cgraph * graph;

    Graph(const Case & c, const Inputs & in, std::vector<ggml_backend_t> backends, bool attends)
        : context(context_of(size_t(8 * c.layers + 8))) {
        std::vector<ggml_backend_buffer_type_t> types(backends.size(), ggml_backend_cpu_buffer_type());
        scheduler = ggml_backend_sched_new(backends.data(), types.data(), int(backends.size()), size_t(8 * c.layers + 64), false, true);
        ggml_context * g = context.get();
        graph = ggml_new_graph_custom(g, size_t(8 * c.layers + 8), false);
        ggml_tensor * q = in.q;
        for (int layer = 0; layer < c.layers; layer++) {
            if (attends) {
                q = ggml_flash_attn_ext(g, ggml_permute(g, q, 0, 2, 1, 3), in.k[size_t(layer)], in.v[size_t(layer)], in.mask,
                                        1 / std::sqrt(float(c.dim)), 0, 0);
                ggml_prec_set_acc(q, GGML_PREC_F32);
            }
            q = ggml_scale(g, q, 1.5f);
        }
        ggml_build_forward_expand(graph, q);
        if (!scheduler || !ggml_backend_sched_alloc_graph(scheduler, graph)) {
            fail("the graph cannot be allocated");
        }
    }
    ~Graph() { ggml_backend_sched_free(scheduler); }
    Graph(const Graph &) = delete;
    Graph & operator=(const Graph &) = delete;

    void compute() {
        if (ggml_backend_sched_graph_compute(scheduler, graph) != GGML_STATUS_SUCCESS) {
            fail("the graph cannot be computed");
        }
    }
};

// The library's own steps over the same caches.
struct Library {
    const Case & c;
    const Inputs & in;
    int threads;
    treeattn_comm_t * comm = nullptr;
    treeattn_plan_t * plan = nullptr;
    std::vector<float> out;
    int32_t length;

    Library(treeattn_runtime_t * runtime, const Case & c, const Inputs & in, int threads, bool team)
        : c(c), in(in), threads(threads), out(size_t(c.q_heads) * size_t(c.dim)), length(c.keys) {
        const treeattn_device_t device = TREEATTN_CPU(0);
        treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
        config.threads_per_rank = team ? 1 : threads;
        config.max_team = team ? threads : 0;
        check(treeattn_comm_create_local(runtime, 1, &device, &config, &comm));
        treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
        desc.q_heads = c.q_heads;
        desc.kv_heads = c.kv_heads;
        desc.head_dim_qk = desc.head_dim_v = c.dim;
        desc.q_dtype = desc.out_dtype = TREEATTN_DTYPE_F32;
        desc.k_dtype = desc.v_dtype = dtype_of(c.type_name);
        desc.max_batch = desc.max_query_tokens = 1;
        desc.max_kv_length = c.keys;
        check(treeattn_plan_create(comm, &desc, &plan));
    }
    ~Library() {
        treeattn_plan_destroy(plan);
        treeattn_comm_destroy(comm);
    }
    Library(const Library &) = delete;
    Library & operator=(const Library &) = delete;

    treeattn_decode_args_t args(int layer) {
        treeattn_decode_args_t a = TREEATTN_DECODE_ARGS_INIT;
        a.batch = a.query_tokens = 1;
        a.kv_length = &length;
        a.q.data = in.q->data;
        a.q.bytes = a.out.bytes = out.size() * 4;
        a.out.data = out.data();
        a.k.data = in.k[size_t(layer)]->data;
        a.v.data = in.v[size_t(layer)]->data;
        a.k.bytes = a.v.bytes = ggml_row_size(c.type, int64_t(c.keys) * c.kv_heads * c.dim);
        return a;
    }
    void steps() {
        for (int layer = 0; layer < c.layers; layer++) {
            const treeattn_decode_args_t a = args(layer);
            check(treeattn_plan_decode(plan, &a, nullptr));
        }
    }
    void team_steps() {
        for (int layer = 0; layer < c.layers; layer++) {
            const treeattn_decode_args_t a = args(layer);
#pragma omp parallel num_threads(threads)
            {
                treeattn_team_t team = TREEATTN_TEAM_INIT;
                team.index = omp_get_thread_num();
                team.size = threads;
                check(treeattn_plan_decode_team(plan, team.index == 0 ? &a : nullptr, &team));
            }
        }
    }
};

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Timed {
    const char * name;
    bool ggml; // on ggml's threads, which spin after it
    std::function<void()> once;
    std::vector<double> rounds = {}; // the median of each
    size_t times = 0;
};

double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + long(values.size() / 2), values.end());
    return values[values.size() / 2];
}

// Turns of short blocks until each had `budget` seconds, so that what comes and goes meets all alike. Threads that spin after a
// block get time to sleep, and those of the pool sleep while others than ggml compute.
void take_turns(std::vector<Timed> & all, double budget, ggml_threadpool * pool) {
    constexpr int ROUNDS = 9;
    for (int round = 0; round < ROUNDS; round++) {
        for (Timed & t : all) {
            if (t.ggml) {
                ggml_threadpool_resume(pool);
            } else {
                ggml_threadpool_pause(pool);
            }
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
            std::vector<double> times;
            const double began = seconds();
            double now = began;
            do {
                t.once();
                const double then = now;
                now = seconds();
                times.push_back(now - then);
            } while (now - began < budget / ROUNDS || times.size() < 2);
            t.times += times.size();
            // The first wakes threads, and the very first makes plans.
            times.erase(times.begin());
            t.rounds.push_back(median(times));
        }
    }
}

} // namespace

int main(int argc, char ** argv) {
    if (argc < 4) {
        std::fprintf(stderr, "usage: attention POLL THREADS SECONDS\n");
        return 2;
    }
    const int threads = std::atoi(argv[2]);
    const double budget = std::atof(argv[3]);
    ggml_backend_load_all();
    ggml_backend_t plugin = nullptr;
    void (*counts)(uint64_t[6]) = nullptr;
    for (size_t i = 0; i < ggml_backend_reg_count(); i++) {
        ggml_backend_reg_t registration = ggml_backend_reg_get(i);
        if (void * found = ggml_backend_reg_get_proc_address(registration, "ggml_backend_treeattn_counts")) {
            counts = reinterpret_cast<void (*)(uint64_t[6])>(found);
            plugin = ggml_backend_dev_init(ggml_backend_reg_dev_get(registration, 0), nullptr);
            reinterpret_cast<ggml_backend_set_n_threads_t>(
                ggml_backend_reg_get_proc_address(registration, "ggml_backend_set_n_threads"))(plugin, threads);
        }
    }
    ggml_backend_t cpu = ggml_backend_cpu_init();
    if (!plugin || !cpu) {
        fail("the plugin is not loaded; set GGML_BACKEND_PATH");
    }
    ggml_backend_cpu_set_n_threads(cpu, threads);
    // As llama-server and llama-bench do it: a pool that lasts. OpenMP builds have their threads anyway.
    ggml_threadpool_params params = ggml_threadpool_params_default(threads);
    params.poll = uint32_t(std::atoi(argv[1]));
    ggml_threadpool * pool = ggml_threadpool_new(&params);
    ggml_backend_cpu_set_threadpool(cpu, pool);
    treeattn_runtime_t * runtime = nullptr;
    check(treeattn_runtime_create(nullptr, &runtime));

    std::string line;
    while (std::getline(std::cin, line)) {
        Case c;
        std::istringstream fields(line);
        if (!(fields >> c) || c.type == GGML_TYPE_COUNT) {
            fail("not a case: " + line);
        }
        const Inputs in(c);
        Graph alone(c, in, {cpu}, true), with(c, in, {plugin, cpu}, true), between(c, in, {cpu}, false);
        Library library(runtime, c, in, threads, false), team(runtime, c, in, threads, true);
        std::vector<Timed> all = {{"ggml", true, [&] { alone.compute(); }},
                                  {"plugin", true, [&] { with.compute(); }},
                                  {"between", true, [&] { between.compute(); }},
                                  {"library", false, [&] { library.steps(); }},
                                  {"team", false, [&] { team.team_steps(); }}};
        uint64_t before[6], after[6];
        counts(before);
        take_turns(all, budget, pool);
        counts(after);
        const uint64_t computed = after[0] + after[1] + after[4] - before[0] - before[1] - before[4];
        if (computed < all[1].times * uint64_t(c.layers) || after[3] != before[3]) {
            fail("not computed by the plugin: " + line);
        }
        std::vector<double> & between_rounds = all[2].rounds;
        for (size_t i = 0; i < all.size(); i++) {
            for (size_t round = 0; i < 2 && round < between_rounds.size(); round++) {
                all[i].rounds[round] -= between_rounds[round];
            }
            std::printf("%s%s=", i ? " " : "", all[i].name);
            for (size_t round = 0; round < all[i].rounds.size(); round++) {
                std::printf("%s%.2f", round ? "," : "", 1e6 * all[i].rounds[round] / c.layers);
            }
        }
        std::printf("\n");
        std::fflush(stdout);
    }
    return 0;
}
