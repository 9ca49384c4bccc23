// A stand-in for ggml of any version: loads the plugin as ggml's registry does and lets it compute one attention through the
// interfaces that the version has.
//
//     host PLUGIN [inline|attend]
//
// What it is comes from the environment: see stand_in.c, where the exported functions are. HOST_OFFSET is that of graph_compute
// in a backend. Prints `refused`, or `taken` and the largest distance from float64. `attend` calls treeattn_ggml_attend on three
// threads, as a host that is no ggml that the plugin knows.

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include "reference.h"

namespace {

std::string text(const char * name, const char * otherwise) {
    const char * value = std::getenv(name);
    return value ? value : otherwise;
}
int number(const char * name, int otherwise) { return std::atoi(text(name, std::to_string(otherwise).c_str()).c_str()); }

// Laid out as in ggml up to 0.26; of a backend only what every version has.
struct Registration {
    int api_version;
    const char * (*get_name)(Registration *);
    size_t (*get_device_count)(Registration *);
    struct Device * (*get_device)(Registration *, size_t);
    void * (*get_proc_address)(Registration *, const char *);
    void * context;
};
struct Device {
    void * get_name, * get_description, * get_memory, * get_type, * get_props;
    char * (*init_backend)(Device *, const char *);
    void * get_buffer_type, * get_host_buffer_type, * buffer_from_host_ptr;
    bool (*supports_op)(Device *, const ggml_tensor *);
    void * others[5];
    Registration * reg;
    void * context;
};
struct Graph {
    int size;
    ggml_tensor * nodes[4];
};

} // namespace

// What reference.h wants of ggml: nothing here is quantised.
extern "C" const ggml_type_traits * ggml_get_type_traits(ggml_type) { std::abort(); }
extern "C" float ggml_fp16_to_fp32(ggml_fp16_t) { std::abort(); }

namespace {

ggml_tensor tensor(int64_t n0, int64_t n1, int64_t n2, std::vector<float> & data) {
    ggml_tensor t = {};
    t.ne[0] = n0;
    t.ne[1] = n1;
    t.ne[2] = n2;
    t.ne[3] = 1;
    t.nb[0] = 4;
    for (int i = 1; i < 4; i++) {
        t.nb[i] = t.nb[i - 1] * t.ne[i - 1];
    }
    data.resize(n0 * n1 * n2);
    t.data = data.data();
    return t;
}

// An attention of four heads, and its result.
struct Inputs {
    std::vector<float> q_data, k_data, v_data, out;
    ggml_tensor q = tensor(64, 2, 4, q_data), k = tensor(64, 100, 2, k_data), v = tensor(64, 100, 2, v_data);
    ggml_tensor node = tensor(64, 4, 2, out);
    Attention attention = {&q, &k, &v, nullptr, nullptr, 0.125f, 0, 0};

    Inputs() {
        uint32_t random = 1;
        for (std::vector<float> * data : {&q_data, &k_data, &v_data}) {
            for (float & x : *data) {
                random = random * 1664525u + 1013904223u;
                x = float(int32_t(random)) / float(1u << 31);
            }
        }
    }

    // Prints how far the result is from float64.
    int judge() const {
        double worst = 0;
        exact_attention(attention, [&](int64_t, int64_t h, int64_t i, const ExactRow & row) {
            for (int d = 0; d < 64; d++) {
                worst = std::max(worst, std::fabs(row.out[d] - out[(i * 4 + h) * 64 + d]));
            }
        });
        std::printf("taken %.1e\n", worst);
        return worst < 1e-6 ? 0 : 1;
    }
};

// As ../src/hook.cpp and the patch for ik_llama.cpp have it.
struct PlainTensor {
    int32_t type, reserved;
    int64_t ne[4];
    size_t nb[4];
    void * data;
};

PlainTensor plain(const ggml_tensor & t) {
    PlainTensor p = {t.type, 0, {}, {}, t.data};
    std::memcpy(p.ne, t.ne, sizeof p.ne);
    std::memcpy(p.nb, t.nb, sizeof p.nb);
    return p;
}

int attend(void * library) {
    using Attend = int (*)(const PlainTensor *, const float *, int, int);
    const auto function = reinterpret_cast<Attend>(dlsym(library, "treeattn_ggml_attend"));
    if (!function) {
        std::printf("no treeattn_ggml_attend\n");
        return 1;
    }
    Inputs inputs;
    PlainTensor tensors[6] = {plain(inputs.q), plain(inputs.k), plain(inputs.v), {}, {}, plain(inputs.node)};
    const auto on_three_threads = [&](int expected) {
        int answers[3] = {-1, -1, -1};
        std::thread threads[3];
        for (int i = 0; i < 3; i++) {
            threads[i] = std::thread([&, i] { answers[i] = function(tensors, &inputs.attention.scale, i, 3); });
        }
        for (std::thread & thread : threads) {
            thread.join();
        }
        return std::count(answers, answers + 3, expected) == 3;
    };
    for (int step = 0; step < 20; step++) {
        if (!on_three_threads(1)) {
            std::printf("left to the host\n");
            return 1;
        }
    }
    // A type that the library does not read is the host's, and nothing is written.
    tensors[1].type = 133;
    const float before = inputs.out[0];
    if (!on_three_threads(0) || inputs.out[0] != before) {
        std::printf("not left to the host\n");
        return 1;
    }
    return inputs.judge();
}

} // namespace

int main(int argc, char ** argv) {
    if (argc < 2) {
        return 2;
    }
    const int flash = number("HOST_FLASH", 74), custom = number("HOST_CUSTOM", 94), api = number("HOST_API", 2);
    void * library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        std::printf("dlopen: %s\n", dlerror());
        return 1;
    }
    const std::string mode = argc > 2 ? argv[2] : "";
    if (mode == "attend") {
        return attend(library);
    }
    // As the registry does it: the score first, where there is one.
    if (auto score = reinterpret_cast<int (*)()>(dlsym(library, "ggml_backend_score")); score && score() == 0) {
        std::printf("refused\n");
        return 0;
    }
    auto init = reinterpret_cast<Registration * (*)()>(dlsym(library, "ggml_backend_init"));
    Registration * registration = init ? init() : nullptr;
    if (!registration) {
        std::printf("refused\n");
        return 0;
    }
    if (registration->api_version != api || registration->get_device_count(registration) != 1) {
        std::printf("api_version %d\n", registration->api_version);
        return 1;
    }

    Device * device = registration->get_device(registration, 0);
    Inputs inputs;
    ggml_tensor & node = inputs.node;
    node.op = ggml_op(flash);
    node.flags = 16; // to be computed, where the version has that flag
    node.src[0] = &inputs.q;
    node.src[1] = &inputs.k;
    node.src[2] = &inputs.v;
    std::memcpy(node.op_params, &inputs.attention.scale, 3 * sizeof(float));

    const bool in_place = mode == "inline";
    const bool supported = device->supports_op(device, &node);
    if (in_place) {
        if (supported || node.op != ggml_op(custom)) {
            std::printf("not taken in place\n");
            return 1;
        }
        // ggml_custom_op_params, as the CPU backend calls it: one thread.
        void (*function)(ggml_tensor *, int, int, void *);
        void * data;
        std::memcpy(&function, node.op_params, sizeof function);
        std::memcpy(&data, reinterpret_cast<char *>(node.op_params) + 16, sizeof data);
        function(&node, 0, 1, data);
    } else {
        if (!supported) {
            std::printf("not supported\n");
            return 1;
        }
        char * backend = device->init_backend(device, nullptr);
        if (!backend) {
            std::printf("no backend\n");
            return 1;
        }
        // Behind the guid; `free` is the second function of the interface in every version.
        int (*compute)(char *, Graph *);
        void (*free_backend)(char *);
        std::memcpy(&compute, backend + 8 + number("HOST_OFFSET", 96), sizeof compute);
        std::memcpy(&free_backend, backend + 16, sizeof free_backend);
        Graph graph = {1, {&node}};
        if (compute(backend, &graph) != 0) {
            std::printf("not computed\n");
            return 1;
        }
        free_backend(backend);
    }
    return inputs.judge();
}
