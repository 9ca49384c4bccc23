// A plugin for ggml that computes flash attention of few queries in float64: the reference of what libllama decodes. ggml's own
// attention is none, for it rounds the query to the cache's precision (to 8 bits for quantised caches) and sums in f16.
//
// With EXACT_LAST_BIT set every value is moved to the float next to it, up or down: what a decoder does with the smallest
// difference there is. Written against this version's own headers; takes what libtreeattn's plugin takes.

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "reference.h"

#include <cstdlib>

namespace {

const char * name(ggml_backend_t) { return "exact"; }
void free_backend(ggml_backend_t backend) { delete backend; }

ggml_status compute(ggml_backend_t, ggml_cgraph * graph) {
    static const bool last_bit = std::getenv("EXACT_LAST_BIT") != nullptr;
    for (int n = 0; n < graph->n_nodes; n++) {
        ggml_tensor * node = graph->nodes[n];
        if (node->op != GGML_OP_FLASH_ATTN_EXT || (node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
            continue;
        }
        Attention a = {node->src[0], node->src[1], node->src[2], node->src[3], node->src[4], 0, 0, 0};
        std::memcpy(&a.scale, node->op_params, 3 * sizeof(float));
        exact_attention(a, [&](int64_t s, int64_t h, int64_t i, const ExactRow & row) {
            float * out = reinterpret_cast<float *>(static_cast<char *>(node->data) + s * node->nb[3] + i * node->nb[2] + h * node->nb[1]);
            std::copy(row.out.begin(), row.out.end(), out);
            for (size_t d = 0; last_bit && d < row.out.size(); d++) {
                uint32_t bits;
                std::memcpy(&bits, &out[d], sizeof bits);
                // Up or down by a bit of a product that has nothing to do with the value.
                out[d] = std::nextafter(out[d], bits * 2654435761u >> 31 ? INFINITY : -INFINITY);
            }
        });
    }
    return GGML_STATUS_SUCCESS;
}

const char * device_name(ggml_backend_dev_t) { return "exact"; }
void memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = 0; }
enum ggml_backend_dev_type type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; }
void properties(ggml_backend_dev_t, ggml_backend_dev_props * props) {
    *props = {};
    props->name = props->description = "exact";
    props->type = GGML_BACKEND_DEVICE_TYPE_ACCEL;
}

ggml_backend_t init(ggml_backend_dev_t device, const char *) {
    static ggml_guid guid = {0x65, 0x78, 0x61, 0x63, 0x74};
    ggml_backend * backend = new ggml_backend{};
    backend->guid = &guid;
    backend->device = device;
    backend->iface.get_name = name;
    backend->iface.free = free_backend;
    backend->iface.graph_compute = compute;
    return backend;
}

ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t) {
    return ggml_backend_dev_buffer_type(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
}

bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    switch (op->op) {
    case GGML_OP_NONE:
    case GGML_OP_RESHAPE:
    case GGML_OP_VIEW:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE: return true;
    case GGML_OP_FLASH_ATTN_EXT: return op->src[0]->ne[1] <= 32;
    default: return false;
    }
}

bool supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t buft) { return ggml_backend_buft_is_host(buft); }

const char * registration_name(ggml_backend_reg_t) { return "exact"; }
size_t devices(ggml_backend_reg_t) { return 1; }

ggml_backend_dev_t device(ggml_backend_reg_t registration, size_t) {
    static ggml_backend_device made = [&] {
        ggml_backend_device d = {};
        d.reg = registration;
        d.iface.get_name = d.iface.get_description = device_name;
        d.iface.get_memory = memory;
        d.iface.get_type = type;
        d.iface.get_props = properties;
        d.iface.init_backend = init;
        d.iface.get_buffer_type = buffer_type;
        d.iface.supports_op = supports_op;
        d.iface.supports_buft = supports_buft;
        return d;
    }();
    return &made;
}

} // namespace

extern "C" ggml_backend_reg_t ggml_backend_init(void) {
    static ggml_backend_reg made = {GGML_BACKEND_API_VERSION, {registration_name, devices, device, nullptr}, nullptr};
    return &made;
}
