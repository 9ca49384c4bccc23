// Decodes with libllama, as a server would: prompts in chunks, then one token a sequence and step. Whether the plugin is used
// is up to the environment (GGML_BACKEND_PATH, TREEATTN_GGML...), so that a run without it is the reference of one with it.
//
// Reads cases from standard input, one a line:
//     MODEL TYPE_K TYPE_V SLOTS UNIFIED FLASH THREADS OUTPUT REFERENCE
// SLOTS sequences in one cache (UNIFIED 1) or in one each (0); FLASH is `on` or `auto`. Writes the logits of each step to OUTPUT,
// f32 [64][SLOTS][256]. With a REFERENCE (another case's OUTPUT, `-` for none) each step is fed the tokens that the reference
// chose, so that a choice by a hair does not send the rest elsewhere. Prints a line a case:
//     OUTPUT honest=N inline=N left=N failed=N hook=N threads=N ms=N
// with what the plugin's counters rose by, or `no plugin` in their place, and the milliseconds of the decode steps.
//
// With an argument N cases run N at a time, each on a thread and in a context of its own; the counters are those of all N.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"
#include "reference.h"

namespace {

constexpr int STEPS = 64;
constexpr int VOCABULARY = 256;
// A prompt: four chunks of more tokens than a draft has, and one of fewer.
constexpr int CHUNKS[] = {40, 40, 40, 40, 8};

constexpr const char * COUNTERS[] = {"honest", "inline", "left", "failed", "hook", "threads"};

using Counts = void (*)(uint64_t[6]);

[[noreturn]] void fail(const std::string & message) {
    std::cerr << "decode: " << message << std::endl;
    std::exit(1);
}

// The plugin's counters; null where no plugin is loaded.
Counts plugin_counts() {
    for (size_t i = 0; i < ggml_backend_reg_count(); i++) {
        void * found = ggml_backend_reg_get_proc_address(ggml_backend_reg_get(i), "ggml_backend_treeattn_counts");
        if (found) {
            return reinterpret_cast<Counts>(found);
        }
    }
    return nullptr;
}

ggml_type type_of(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char * candidate = ggml_type_name(static_cast<ggml_type>(i));
        if (candidate && name == candidate) {
            return static_cast<ggml_type>(i);
        }
    }
    fail("no type " + name);
}

struct Case {
    std::string model, type_k, type_v, flash, output, reference;
    int slots = 0, unified = 0, threads = 0;
};

std::istream & operator>>(std::istream & in, Case & c) {
    return in >> c.model >> c.type_k >> c.type_v >> c.slots >> c.unified >> c.flash >> c.threads >> c.output >> c.reference;
}

void add(llama_batch & batch, llama_token token, llama_pos position, int sequence, bool wanted) {
    const int i = batch.n_tokens++;
    batch.token[i] = token;
    batch.pos[i] = position;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = sequence;
    batch.logits[i] = wanted;
}

llama_token best(const float * logits) {
    return static_cast<llama_token>(std::max_element(logits, logits + VOCABULARY) - logits);
}

// A callback of libllama's scheduler: asks for every attention of few queries, and judges what was computed.
bool judge(ggml_tensor * node, bool asked, void * worst) {
    // In place, the plugin puts what ggml keeps of a custom operator (three words) before the parameters of the attention.
    const size_t first = node->op == GGML_OP_CUSTOM ? 24 : 0;
    if ((first == 0 && node->op != GGML_OP_FLASH_ATTN_EXT) || node->src[0]->ne[1] > 32) {
        return !asked;
    }
    if (asked) {
        return true;
    }
    Attention a = {node->src[0], node->src[1], node->src[2], node->src[3], node->src[4], 0, 0, 0};
    std::memcpy(&a.scale, reinterpret_cast<const char *>(node->op_params) + first, 3 * sizeof(float));
    double largest = 0, far = 0;
    exact_attention(a, [&](int64_t s, int64_t h, int64_t i, const ExactRow & row) {
        const float * out = reinterpret_cast<const float *>(static_cast<const char *>(node->data) + s * node->nb[3] +
                                                            i * node->nb[2] + h * node->nb[1]);
        for (size_t d = 0; d < row.out.size(); d++) {
            largest = std::max(largest, std::fabs(row.out[d]));
            const double distance = std::fabs(row.out[d] - out[d]);
            far = std::isfinite(distance) ? std::max(far, distance) : INFINITY;
        }
    });
    *static_cast<double *>(worst) = std::max(*static_cast<double *>(worst), far / largest);
    return true;
}

// Gives how far an attention was from float64, at most.
double run(const Case & c) {
    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers = 0;
    llama_model * model = llama_model_load_from_file(c.model.c_str(), model_params);
    if (!model) {
        fail("cannot load " + c.model);
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 1024;
    params.n_batch = params.n_ubatch = 128;
    params.n_seq_max = c.slots;
    params.kv_unified = c.unified != 0;
    params.n_threads = params.n_threads_batch = c.threads;
    params.type_k = type_of(c.type_k);
    params.type_v = type_of(c.type_v);
    params.flash_attn_type = c.flash == "auto" ? LLAMA_FLASH_ATTN_TYPE_AUTO : LLAMA_FLASH_ATTN_TYPE_ENABLED;
    double worst = 0;
    params.cb_eval = judge;
    params.cb_eval_user_data = &worst;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) {
        fail("no context for " + c.output);
    }

    std::vector<float> reference;
    if (c.reference != "-") {
        reference.resize(size_t(STEPS) * c.slots * VOCABULARY);
        std::ifstream file(c.reference, std::ios::binary);
        if (!file.read(reinterpret_cast<char *>(reference.data()), reference.size() * sizeof(float))) {
            fail("cannot read " + c.reference);
        }
    }

    llama_batch batch = llama_batch_init(128, 0, 1);
    std::vector<llama_token> next(c.slots);
    // The slots take turns, so that a slot's keys lie scattered in a unified cache.
    int position = 0;
    uint32_t random = 1;
    for (const int chunk : CHUNKS) {
        for (int slot = 0; slot < c.slots; slot++) {
            batch.n_tokens = 0;
            for (int i = 0; i < chunk; i++) {
                random = random * 1664525u + 1013904223u;
                add(batch, random >> 24, position + i, slot, i == chunk - 1);
            }
            if (llama_decode(context, batch) != 0) {
                fail("prompt of " + c.output);
            }
            next[slot] = random >> 16 & 0xff;
        }
        position += chunk;
    }

    std::vector<float> logits;
    for (int step = 0; step < STEPS; step++) {
        batch.n_tokens = 0;
        for (int slot = 0; slot < c.slots; slot++) {
            add(batch, next[slot], position + step, slot, true);
        }
        if (llama_decode(context, batch) != 0) {
            fail("step of " + c.output);
        }
        for (int slot = 0; slot < c.slots; slot++) {
            const float * row = llama_get_logits_ith(context, slot);
            const size_t at = logits.size();
            logits.insert(logits.end(), row, row + VOCABULARY);
            next[slot] = best(reference.empty() ? row : &reference[at]);
        }
    }

    std::ofstream file(c.output, std::ios::binary);
    file.write(reinterpret_cast<const char *>(logits.data()), logits.size() * sizeof(float));
    if (!file) {
        fail("cannot write " + c.output);
    }
    llama_batch_free(batch);
    llama_free(context);
    llama_model_free(model);
    return worst;
}

void run_together(const std::vector<Case> & cases, Counts counts) {
    uint64_t before[6] = {}, after[6] = {};
    if (counts) {
        counts(before);
    }
    std::vector<double> far(cases.size());
    std::vector<std::thread> others;
    for (size_t i = 1; i < cases.size(); i++) {
        others.emplace_back([&, i] { far[i] = run(cases[i]); });
    }
    far[0] = run(cases[0]);
    for (std::thread & other : others) {
        other.join();
    }
    if (counts) {
        counts(after);
    }
    for (size_t i = 0; i < cases.size(); i++) {
        std::cout << cases[i].output;
        for (int j = 0; counts && j < 6; j++) {
            std::cout << ' ' << COUNTERS[j] << '=' << after[j] - before[j];
        }
        std::cout << (counts ? "" : " no plugin") << " far=" << far[i] << std::endl;
    }
}

} // namespace

int main(int argc, char ** argv) {
    const size_t at_once = argc > 1 ? size_t(std::max(1, std::atoi(argv[1]))) : 1;
    llama_log_set(
        [](ggml_log_level level, const char * text, void *) {
            if (level == GGML_LOG_LEVEL_ERROR) {
                std::fputs(text, stderr);
            }
        },
        nullptr);
    // Before any call that would load backends by itself: what `llama-bench` and `llama-cli` do.
    ggml_backend_load_all();
    llama_backend_init();
    const Counts counts = plugin_counts();
    std::string line;
    std::vector<Case> cases;
    while (std::getline(std::cin, line)) {
        Case c;
        std::istringstream fields(line);
        if (!(fields >> c)) {
            fail("not a case: " + line);
        }
        cases.push_back(c);
        if (cases.size() == at_once) {
            run_together(cases, counts);
            cases.clear();
        }
    }
    if (!cases.empty()) {
        run_together(cases, counts);
    }
    llama_backend_free();
    return 0;
}
