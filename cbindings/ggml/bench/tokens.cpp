// Tokens a second of libllama without and with the plugin.
//
//     tokens MODEL PLUGIN THREADS SECONDS
//
// Reads a case from standard input:
//     TYPE DEPTH
// A sequence of DEPTH tokens lies in a cache of TYPE; single tokens are decoded after it, again and again from the same depth. Two
// contexts take turns in one process: one made before the plugin was loaded, one after. The cache is not computed, which would
// take hours, but restored: a prompt of 256 tokens is, and its rows are repeated. Prints
//     without=N with=N
// in tokens a second, medians.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "llama.h"

namespace {

constexpr int PROMPT = 256;

[[noreturn]] void fail(const std::string & message) {
    std::cerr << "tokens: " << message << std::endl;
    std::exit(1);
}

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Context {
    llama_model * model;
    llama_context * context;
    llama_batch batch = llama_batch_init(PROMPT, 0, 1);
    std::vector<double> rounds; // tokens a second, the median of each

    Context(const char * path, ggml_type type, int depth, int threads, ggml_threadpool * pool) {
        llama_model_params model_params = llama_model_default_params();
        model_params.n_gpu_layers = 0;
        model = llama_model_load_from_file(path, model_params);
        llama_context_params params = llama_context_default_params();
        params.n_ctx = uint32_t(depth + 2 * PROMPT);
        params.n_batch = params.n_ubatch = PROMPT;
        params.n_threads = params.n_threads_batch = threads;
        params.type_k = params.type_v = type;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        context = model ? llama_init_from_model(model, params) : nullptr;
        if (!context) {
            fail(std::string("no context of ") + path);
        }
        llama_attach_threadpool(context, pool, pool);
        decode(PROMPT, 0);
        restore(depth);
    }
    ~Context() {
        llama_batch_free(batch);
        llama_free(context);
        llama_model_free(model);
    }
    Context(const Context &) = delete;
    Context & operator=(const Context &) = delete;

    void decode(int tokens, int position) {
        batch.n_tokens = tokens;
        for (int i = 0; i < tokens; i++) {
            batch.token[i] = llama_token(uint32_t(position + i) * 2654435761u >> 24);
            batch.pos[i] = position + i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = i == tokens - 1;
        }
        if (llama_decode(context, batch) != 0) {
            fail("llama_decode");
        }
    }

    // As libllama saves a sequence: four numbers, 12 bytes a cell, four numbers, and of each layer's keys and then values a type,
    // the bytes of a row, and the rows.
    void restore(int depth) {
        std::vector<uint8_t> from(llama_state_seq_get_size(context, 0));
        if (llama_state_seq_get_data(context, from.data(), from.size(), 0) != from.size()) {
            fail("the cache cannot be saved");
        }
        std::vector<uint8_t> to;
        to.reserve(from.size() / PROMPT * size_t(depth + 1));
        size_t at = 0;
        const auto copy = [&](size_t bytes) {
            if (at + bytes > from.size()) {
                fail("a cache is saved otherwise than here");
            }
            to.insert(to.end(), &from[at], &from[at] + bytes);
            at += bytes;
        };
        const auto word = [](std::vector<uint8_t> & bytes, size_t place) { return reinterpret_cast<uint32_t *>(&bytes[place]); };
        copy(16);
        if (*word(to, 12) != PROMPT) {
            fail("a cache is saved otherwise than here");
        }
        *word(to, 12) = uint32_t(depth);
        for (int i = 0; i < depth; i++) {
            const uint32_t cell[3] = {uint32_t(i), 1, 0};
            to.insert(to.end(), reinterpret_cast<const uint8_t *>(cell), reinterpret_cast<const uint8_t *>(cell + 3));
        }
        at += size_t(PROMPT) * 12;
        copy(16);
        const uint32_t layers = *word(to, to.size() - 12);
        for (uint32_t i = 0; i < 2 * layers; i++) {
            copy(12);
            uint64_t row;
            std::memcpy(&row, &to[to.size() - 8], 8);
            const size_t first = at, rows = size_t(PROMPT) * row;
            if (rows == 0 || first + rows > from.size()) {
                fail("a cache is saved otherwise than here");
            }
            for (size_t left = size_t(depth) * row; left > 0;) {
                const size_t some = std::min(left, rows);
                to.insert(to.end(), &from[first], &from[first] + some);
                left -= some;
            }
            at = first + rows;
        }
        if (at != from.size() || llama_state_seq_set_data(context, to.data(), to.size(), 0) != to.size()) {
            fail("the cache cannot be restored");
        }
    }

    // Decodes tokens for `budget` seconds, each at `depth`.
    void round(int depth, double budget) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        std::vector<double> times;
        const double began = seconds();
        double now = began;
        do {
            decode(1, depth);
            llama_synchronize(context);
            const double then = now;
            now = seconds();
            times.push_back(now - then);
            llama_memory_seq_rm(llama_get_memory(context), 0, depth, -1);
        } while (now - began < budget || times.size() < 2);
        // The first wakes threads.
        times.erase(times.begin());
        std::nth_element(times.begin(), times.begin() + long(times.size() / 2), times.end());
        rounds.push_back(1 / times[times.size() / 2]);
    }
};

} // namespace

int main(int argc, char ** argv) {
    if (argc < 5) {
        std::fprintf(stderr, "usage: tokens MODEL PLUGIN THREADS SECONDS\n");
        return 2;
    }
    const int threads = std::atoi(argv[3]);
    const double budget = std::atof(argv[4]);
    llama_log_set(
        [](ggml_log_level level, const char * text, void *) {
            if (level == GGML_LOG_LEVEL_ERROR) {
                std::fputs(text, stderr);
            }
        },
        nullptr);
    std::string type_name;
    int depth;
    if (!(std::cin >> type_name >> depth)) {
        fail("no case");
    }
    ggml_type type = GGML_TYPE_COUNT;
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char * name = ggml_type_name(ggml_type(i));
        if (name && type_name == name) {
            type = ggml_type(i);
        }
    }
    if (type == GGML_TYPE_COUNT) {
        fail("no type " + type_name);
    }
    llama_backend_init();
    ggml_threadpool_params params = ggml_threadpool_params_default(threads);
    ggml_threadpool * pool = ggml_threadpool_new(&params);
    {
        Context without(argv[1], type, depth, threads, pool);
        if (!ggml_backend_load(argv[2])) {
            fail("the plugin is not loaded");
        }
        Context with(argv[1], type, depth, threads, pool);
        constexpr int ROUNDS = 5;
        for (int round = 0; round < ROUNDS; round++) {
            for (Context * context : {&without, &with}) {
                context->round(depth, budget / ROUNDS);
            }
        }
        for (const Context * context : {&without, &with}) {
            std::printf("%s", context == &without ? "without=" : " with=");
            for (size_t round = 0; round < context->rounds.size(); round++) {
                std::printf("%s%.3f", round ? "," : "", context->rounds[round]);
            }
        }
        std::printf("\n");
    }
    ggml_threadpool_free(pool);
    llama_backend_free();
    return 0;
}
