// The functions of ggml that a plugin may look for, of a ggml that the environment describes: HOST_VERSION is what ggml_version
// says; HOST_API the CPU backend's api_version; HOST_FLASH and HOST_CUSTOM the numbers of the operators; HOST_CPU=0 leaves the
// CPU backend out; HOST_F16 is the name of type 1.
//
// A function is left out by renaming it when this file is compiled (-Dggml_op_name=absent). No header of ggml is included, for
// some have other types here.

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

static const char *text(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value ? value : otherwise;
}

static int number(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

// The CPU backend's registration, of which the first field is read, and a device and a buffer type, of which the address is.
static struct {
    int api_version;
    void *others[6];
} registration;
static int device, buffer_type;

struct graph {
    int size;
    void *nodes[4];
};
struct context_params {
    size_t size;
    void *memory;
    bool no_alloc;
};

#define EXPORT __attribute__((visibility("default")))

EXPORT const char *ggml_version(void) { return text("HOST_VERSION", "0.26.0"); }

EXPORT const char *ggml_op_name(int op) {
    // The few that the plugin asks for, with others in between.
    static const char *const names[] = {"NONE", "DUP", "RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE"};
    const int flash = number("HOST_FLASH", 74), custom = number("HOST_CUSTOM", 94);
    return op == flash ? "FLASH_ATTN_EXT" : op == custom ? "CUSTOM" : op < 6 ? names[op] : op <= custom ? "OTHER" : NULL;
}

EXPORT const char *ggml_type_name(int type) {
    static const char *const names[] = {"f32", "f16", "q4_0", "q4_1", "", "", "q5_0", "q5_1", "q8_0"};
    return type == 1 ? text("HOST_F16", "f16") : type == 20 ? "iq4_nl" : type == 30 ? "bf16" : type < 9 ? names[type] : "other";
}

EXPORT int ggml_graph_n_nodes(struct graph *graph) { return graph->size; }
EXPORT void *ggml_graph_node(struct graph *graph, int i) { return graph->nodes[i]; }
EXPORT bool ggml_backend_buffer_is_host(void *buffer) { return buffer != NULL; }
EXPORT void *ggml_backend_buffer_get_type(void *buffer) { return buffer ? &buffer_type : NULL; }
EXPORT bool ggml_backend_buft_is_host(void *type) { return type != NULL; }
EXPORT size_t ggml_backend_reg_count(void) { return 1; }
EXPORT void *ggml_backend_dev_backend_reg(void *of) {
    registration.api_version = number("HOST_API", 2);
    return of ? &registration : NULL;
}
EXPORT void *ggml_backend_reg_get(size_t i) { return i == 0 ? ggml_backend_dev_backend_reg(&device) : NULL; }
EXPORT void *ggml_backend_reg_get_proc_address(void *of, const char *name) { return of && name ? NULL : NULL; }
EXPORT size_t ggml_backend_dev_count(void) { return 1; }
EXPORT void *ggml_backend_dev_get(size_t i) { return i == 0 ? &device : NULL; }
EXPORT int ggml_backend_dev_type(void *of) { return of == &device ? 0 : -1; }
EXPORT void *ggml_backend_dev_by_type(int type) { return type == 0 && number("HOST_CPU", 1) ? &device : NULL; }
EXPORT void *ggml_backend_dev_buffer_type(void *of) { return of ? &buffer_type : NULL; }

// A CPU backend or a graph of its own is refused to the plugin, which then has to do without.
EXPORT void *ggml_backend_dev_init(void *of, const char *params) { return of && params ? NULL : NULL; }
EXPORT void ggml_backend_free(void *backend) { (void)backend; }
EXPORT int ggml_backend_graph_compute(void *backend, void *graph) { return backend && graph ? -1 : -1; }
EXPORT size_t ggml_tensor_overhead(void) { return 512; }
EXPORT size_t ggml_graph_overhead(void) { return 65536; }
EXPORT void *ggml_init(struct context_params params) { return params.size ? NULL : NULL; }
EXPORT void ggml_free(void *context) { (void)context; }
EXPORT void *ggml_new_graph(void *context) { return context ? NULL : NULL; }
EXPORT void ggml_build_forward_expand(void *graph, void *node) { (void)graph, (void)node; }
EXPORT void *ggml_new_tensor_1d(void *context, int type, int64_t size) { return context && type && size ? NULL : NULL; }
