/*
 * 08_nccl_processes: one sequence over several GPUs, one process a GPU.
 *
 * Purpose       How most engines run: a process for each GPU, of which each holds a share of the cache's tokens.
 * How it works  The program starts itself once a GPU. Rank 0 asks for a name of the communicator, 128 bytes, and writes it
 *               to a file; the others read it there (an engine may send it in any way). treeattn_comm_create_nccl brings
 *               the processes together; plans and steps are those of every communicator. Each rank compares its output with
 *               float64. Then the same with the paper's three allreduces.
 * When to use   One process a GPU, on one machine or several. Engines that have an ncclComm_t already pass it to
 *               treeattn_comm_wrap_nccl instead.
 */
#include <fcntl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../common/gpu.h"

enum { TOKENS = 32768, STEPS = 200, MOST = 8, ID_BYTES = 128 };

/* A file that appears whole: written under another name first. */
static void write_id(const char *path, const uint8_t *id)
{
    char temporary[512];
    FILE *file;
    snprintf(temporary, sizeof temporary, "%s.part", path);
    file = fopen(temporary, "wb");
    REQUIRE(file != NULL && fwrite(id, 1, ID_BYTES, file) == ID_BYTES && fclose(file) == 0, "%s", temporary);
    REQUIRE(rename(temporary, path) == 0, "%s", path);
}

/* Waits for the file, for at most half a minute. */
static void read_id(const char *path, uint8_t *id)
{
    int tries;
    for (tries = 0; tries < 3000; tries++) {
        const struct timespec pause = {0, 10000000};
        FILE *file = fopen(path, "rb");
        if (file != NULL) {
            REQUIRE(fread(id, 1, ID_BYTES, file) == ID_BYTES, "%s", path);
            fclose(file);
            return;
        }
        nanosleep(&pause, NULL);
    }
    REQUIRE(tries < 3000, "rank 0 wrote no %s", path);
}

/* A step, captured, replayed and timed. 0 if all is well. */
static int run(treeattn_runtime_t *runtime, treeattn_comm_t *comm, int rank, int world, const sequence_t *sequence,
               treeattn_algorithm_t algorithm, const char *name)
{
    treeattn_attention_desc_t desc = gpu_desc(sequence);
    treeattn_plan_t *plan;
    treeattn_stream_t *stream;
    treeattn_decode_args_t args;
    gpu_t gpu;
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    cudaEvent_t begin, end;
    float *out, *lse, ms = 0;
    worst_t worst;
    int i;

    desc.algorithm = algorithm;
    if (treeattn_plan_create(comm, &desc, &plan) != TREEATTN_OK) {
        if (rank == 0)
            printf("%-10s   %s\n", name, treeattn_last_error_message());
        return 0; /* on every rank: no way between these GPUs */
    }
    gpu = gpu_make(sequence, rank, world);
    CHECK(treeattn_stream_wrap_cuda(runtime, TREEATTN_CUDA(rank), gpu.stream, &stream));
    args = gpu_args(&gpu);
    CUDA(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeThreadLocal));
    CHECK(treeattn_plan_decode(plan, &args, stream));
    CUDA(cudaStreamEndCapture(gpu.stream, &graph));
    CUDA(cudaGraphInstantiateWithFlags(&replay, graph, 0));
    CUDA(cudaEventCreate(&begin));
    CUDA(cudaEventCreate(&end));
    for (i = 0; i <= STEPS; i++) {
        if (i == 1) /* the first has warmed everything up */
            CUDA(cudaEventRecord(begin, gpu.stream));
        CUDA(cudaGraphLaunch(replay, gpu.stream));
    }
    CUDA(cudaEventRecord(end, gpu.stream));
    CHECK(treeattn_stream_synchronize(stream));
    CUDA(cudaEventElapsedTime(&ms, begin, end));
    out = must_alloc(Q_ROW * sizeof(float));
    lse = must_alloc(HEADS * sizeof(float));
    CUDA(cudaMemcpy(out, gpu.out, Q_ROW * sizeof(float), cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(lse, gpu.lse, HEADS * sizeof(float), cudaMemcpyDeviceToHost));
    memset(&worst, 0, sizeof worst);
    sequence_check(sequence, out, lse, &worst);
    if (rank == 0)
        printf("%-10s   %9.1f   %15.1e (%3.0f %%)\n", name, 1000.0 * (double)ms / STEPS, worst.out,
               100.0 * worst.out_share);
    fflush(stdout);
    free(out);
    free(lse);
    CUDA(cudaEventDestroy(begin));
    CUDA(cudaEventDestroy(end));
    CUDA(cudaGraphExecDestroy(replay));
    CUDA(cudaGraphDestroy(graph));
    CHECK(treeattn_plan_destroy(plan));
    CHECK(treeattn_stream_destroy(stream));
    gpu_free(&gpu);
    return worst.out_share > 1.0 || worst.lse_share > 1.0;
}

/* One rank's process. */
static int rank_main(int rank, int world, const char *path)
{
    treeattn_runtime_t *runtime;
    treeattn_comm_t *comm;
    uint8_t id[ID_BYTES];
    sequence_t sequence;
    int failed;

    CHECK(treeattn_runtime_create(NULL, &runtime));
    if (rank == 0) {
        treeattn_status_t status = treeattn_nccl_unique_id(runtime, id);
        if (status == TREEATTN_ERROR_UNAVAILABLE) {
            printf("%s\n", treeattn_last_error_message());
            memset(id, 0, sizeof id); /* tells the others */
        } else {
            CHECK(status);
        }
        write_id(path, id);
    } else {
        read_id(path, id);
    }
    if (id[0] == 0 && memcmp(id, id + 1, ID_BYTES - 1) == 0) {
        CHECK(treeattn_runtime_destroy(runtime));
        return 77;
    }
    CUDA(cudaSetDevice(rank));
    sequence = sequence_make(TOKENS);
    CHECK(treeattn_comm_create_nccl(runtime, id, world, rank, TREEATTN_CUDA(rank), NULL, &comm));
    failed = run(runtime, comm, rank, world, &sequence, TREEATTN_ALGORITHM_AUTO, "AUTO");
    failed += run(runtime, comm, rank, world, &sequence, TREEATTN_ALGORITHM_ALLREDUCE3, "ALLREDUCE3");
    CHECK(treeattn_comm_destroy(comm));
    CHECK(treeattn_runtime_destroy(runtime));
    return failed != 0;
}

int main(int argc, char **argv)
{
    treeattn_runtime_t *runtime;
    pid_t children[MOST];
    int32_t count = 0;
    char path[256];
    int world, r, failed = 0, skipped = 0;

    if (argc == 5 && strcmp(argv[1], "--rank") == 0)
        return rank_main(atoi(argv[2]), atoi(argv[3]), argv[4]);
    CHECK(treeattn_runtime_create(NULL, &runtime));
    CHECK(treeattn_runtime_device_count(runtime, TREEATTN_DEVICE_CUDA, &count));
    CHECK(treeattn_runtime_destroy(runtime));
    if (count < 2) {
        printf("found %d GPUs, wanted 2 or more: nothing to show\n", count);
        return 77;
    }
    world = count < MOST ? count : MOST;
    snprintf(path, sizeof path, "/tmp/treeattn-nccl-id-%ld", (long)getpid());
    printf("%d tokens over %d processes, a GPU each\n\n", TOKENS, world);
    printf("algorithm    us a step   max |out error| (of bound)\n");
    printf("----------   ---------   --------------------------\n");
    fflush(stdout);
    for (r = 0; r < world; r++) {
        children[r] = fork();
        REQUIRE(children[r] >= 0, "fork of rank %d", r);
        if (children[r] == 0) {
            char rank[16], ranks[16];
            snprintf(rank, sizeof rank, "%d", r);
            snprintf(ranks, sizeof ranks, "%d", world);
            /* A fresh image: CUDA does not outlive a fork. */
            execl("/proc/self/exe", argv[0], "--rank", rank, ranks, path, (char *)NULL);
            _exit(127);
        }
    }
    for (r = 0; r < world; r++) {
        int status = 0;
        waitpid(children[r], &status, 0);
        if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
            skipped++;
        else
            failed += !WIFEXITED(status) || WEXITSTATUS(status) != 0;
    }
    unlink(path);
    if (skipped == world)
        return 77;
    printf(failed ? "\nFAILED\n" : "\nok: every output is within its bound on every rank\n");
    return failed != 0;
}
