/* A program that knows only the installed header and library. Prints the version and whether an answer came back. */
#include <stdio.h>
#include <string.h>

#include <treeattn.h>

#define TRY(call)                                                                     \
    if ((call) != TREEATTN_OK) {                                                      \
        fprintf(stderr, "%s: %s\n", #call, treeattn_last_error_message());            \
        return 1;                                                                     \
    }

int main(void)
{
    treeattn_runtime_t *runtime = NULL;
    treeattn_comm_t *comm = NULL;
    treeattn_plan_t *plan = NULL;
    treeattn_device_t cpu = TREEATTN_CPU(0);
    treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
    treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
    /* Two keys with equal scores: the output is the mean of their values. */
    float q[4] = {0, 0, 0, 0}, k[8] = {1, 2, 3, 4, 5, 6, 7, 8}, v[8] = {1, 2, 3, 4, 3, 6, 9, 12}, out[4];
    const float want[4] = {2, 4, 6, 8};
    int32_t length = 2;

    TRY(treeattn_runtime_create(NULL, &runtime));
    TRY(treeattn_comm_create_local(runtime, 1, &cpu, NULL, &comm));
    desc.q_heads = desc.kv_heads = 1;
    desc.head_dim_qk = desc.head_dim_v = 4;
    desc.q_dtype = desc.k_dtype = desc.v_dtype = desc.out_dtype = TREEATTN_DTYPE_F32;
    desc.max_batch = desc.max_query_tokens = 1;
    desc.max_kv_length = 2;
    TRY(treeattn_plan_create(comm, &desc, &plan));
    args.batch = args.query_tokens = 1;
    args.kv_length = &length;
    args.q.data = q;
    args.q.bytes = sizeof q;
    args.k.data = k;
    args.k.bytes = sizeof k;
    args.v.data = v;
    args.v.bytes = sizeof v;
    args.out.data = out;
    args.out.bytes = sizeof out;
    TRY(treeattn_plan_decode(plan, &args, NULL));
    TRY(treeattn_plan_destroy(plan));
    TRY(treeattn_comm_destroy(comm));
    TRY(treeattn_runtime_destroy(runtime));
    if (memcmp(out, want, sizeof want) != 0) {
        fprintf(stderr, "out = {%g, %g, %g, %g}, wanted {2, 4, 6, 8}\n", out[0], out[1], out[2], out[3]);
        return 1;
    }
    printf("treeattn %s: {%g, %g, %g, %g}\n", treeattn_version(), out[0], out[1], out[2], out[3]);
    return 0;
}
