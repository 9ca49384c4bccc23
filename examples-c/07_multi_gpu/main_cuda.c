/*
 * 07_multi_gpu: one sequence over all GPUs of this process, driven by one thread.
 *
 * Purpose       A cache too long for one GPU, or read too slowly by it: each GPU holds a share of the tokens, and one step
 *               leaves every GPU with the exact output of the whole.
 * How it works  One communicator a GPU from treeattn_comm_create_local, one plan a GPU from treeattn_plan_create_all. The
 *               thread enqueues step i on every GPU before step i + 1 on any: GPUs wait for each other inside a step. The
 *               step is captured into a graph on each GPU, and replayed. Outputs are compared with float64 and, bit by
 *               bit, between GPUs. Then the same with the paper's three allreduces, which need NCCL.
 * When to use   Engines that drive several GPUs from one process. With one process a GPU: 08_nccl_processes.
 */
#include "../common/gpu.h"

enum { TOKENS = 32768, STEPS = 200, MOST = 8 };

/* One GPU's end of everything. */
typedef struct {
    gpu_t gpu;
    treeattn_stream_t *stream;
    cudaGraphExec_t graph;
} rank_t;

static void use(int device) { CUDA(cudaSetDevice(device)); }

/* A step on each of the `world` GPUs, captured, replayed and timed. 0 if all is well. */
static int run(treeattn_runtime_t *runtime, treeattn_comm_t **comms, int world, const sequence_t *sequence,
               treeattn_algorithm_t algorithm, const char *name)
{
    treeattn_attention_desc_t desc = gpu_desc(sequence);
    treeattn_plan_t *plans[MOST];
    rank_t ranks[MOST];
    float *out[MOST], *lse[MOST], ms = 0;
    cudaEvent_t begin, end;
    worst_t worst;
    int r, i, different = 0;

    desc.algorithm = algorithm;
    if (treeattn_plan_create_all(world, comms, &desc, plans) != TREEATTN_OK) {
        printf("%-10s   %s\n", name, treeattn_last_error_message());
        return 0; /* no way between these GPUs, or no NCCL */
    }
    for (r = 0; r < world; r++) {
        cudaGraph_t graph;
        treeattn_decode_args_t args;
        use(r);
        ranks[r].gpu = gpu_make(sequence, r, world);
        CHECK(treeattn_stream_wrap_cuda(runtime, TREEATTN_CUDA(r), ranks[r].gpu.stream, &ranks[r].stream));
        args = gpu_args(&ranks[r].gpu);
        CUDA(cudaStreamBeginCapture(ranks[r].gpu.stream, cudaStreamCaptureModeThreadLocal));
        CHECK(treeattn_plan_decode(plans[r], &args, ranks[r].stream));
        CUDA(cudaStreamEndCapture(ranks[r].gpu.stream, &graph));
        CUDA(cudaGraphInstantiateWithFlags(&ranks[r].graph, graph, 0));
        CUDA(cudaGraphDestroy(graph));
    }
    for (i = 0; i <= STEPS; i++) {
        if (i == 1) { /* the first has warmed everything up */
            use(0);
            CUDA(cudaEventCreate(&begin));
            CUDA(cudaEventCreate(&end));
            CUDA(cudaEventRecord(begin, ranks[0].gpu.stream));
        }
        for (r = 0; r < world; r++) {
            use(r);
            CUDA(cudaGraphLaunch(ranks[r].graph, ranks[r].gpu.stream));
        }
    }
    use(0);
    CUDA(cudaEventRecord(end, ranks[0].gpu.stream));
    for (r = 0; r < world; r++) {
        use(r);
        CHECK(treeattn_stream_synchronize(ranks[r].stream));
        out[r] = must_alloc(Q_ROW * sizeof(float));
        lse[r] = must_alloc(HEADS * sizeof(float));
        CUDA(cudaMemcpy(out[r], ranks[r].gpu.out, Q_ROW * sizeof(float), cudaMemcpyDeviceToHost));
        CUDA(cudaMemcpy(lse[r], ranks[r].gpu.lse, HEADS * sizeof(float), cudaMemcpyDeviceToHost));
        different += memcmp(out[r], out[0], Q_ROW * sizeof(float)) != 0;
    }
    use(0);
    CUDA(cudaEventElapsedTime(&ms, begin, end));
    CUDA(cudaEventDestroy(begin));
    CUDA(cudaEventDestroy(end));
    memset(&worst, 0, sizeof worst);
    sequence_check(sequence, out[0], lse[0], &worst);
    printf("%-10s   %9.1f   %15.1e (%3.0f %%)   %s\n", name, 1000.0 * (double)ms / STEPS, worst.out,
           100.0 * worst.out_share, different ? "no" : "yes");
    for (r = 0; r < world; r++) {
        use(r);
        CUDA(cudaGraphExecDestroy(ranks[r].graph));
        CHECK(treeattn_plan_destroy(plans[r]));
        CHECK(treeattn_stream_destroy(ranks[r].stream));
        gpu_free(&ranks[r].gpu);
        free(out[r]);
        free(lse[r]);
    }
    /* NCCL promises no bits. */
    return worst.out_share > 1.0 || worst.lse_share > 1.0 || (different && algorithm == TREEATTN_ALGORITHM_AUTO);
}

int main(void)
{
    treeattn_runtime_t *runtime;
    treeattn_device_t devices[MOST];
    treeattn_comm_t *comms[MOST];
    int32_t count = 0;
    int world, r, failed;
    sequence_t sequence;

    CHECK(treeattn_runtime_create(NULL, &runtime));
    CHECK(treeattn_runtime_device_count(runtime, TREEATTN_DEVICE_CUDA, &count));
    if (count < 2) {
        printf("found %d GPUs, wanted 2 or more: nothing to show\n", count);
        CHECK(treeattn_runtime_destroy(runtime));
        return 77;
    }
    world = count < MOST ? count : MOST;
    sequence = sequence_make(TOKENS);
    for (r = 0; r < world; r++)
        devices[r] = TREEATTN_CUDA(r);
    CHECK(treeattn_comm_create_local(runtime, world, devices, NULL, comms));
    printf("%d tokens over %d GPUs\n\n", TOKENS, world);
    printf("algorithm    us a step   max |out error| (of bound)   same bits on all GPUs\n");
    printf("----------   ---------   --------------------------   ---------------------\n");
    failed = run(runtime, comms, world, &sequence, TREEATTN_ALGORITHM_AUTO, "AUTO");
    failed += run(runtime, comms, world, &sequence, TREEATTN_ALGORITHM_ALLREDUCE3, "ALLREDUCE3");
    for (r = 0; r < world; r++)
        CHECK(treeattn_comm_destroy(comms[r]));
    CHECK(treeattn_runtime_destroy(runtime));
    printf(failed ? "\nFAILED\n" : "\nok\n");
    return failed != 0;
}
