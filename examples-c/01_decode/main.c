/*
 * 01_decode: exact attention over a KV cache that is sharded over ranks.
 *
 * Purpose       The smallest complete use of the library, on real activations: create a communicator, create a plan
 *               once, decode one token per step, read the answer on every rank.
 * How it works  Queries, keys and values of two layers of a text encoder (512 tokens, 12 heads of 32, f16) are loaded
 *               from .npy files. The 512 keys are cut into one run of tokens a rank, with no copy: each rank's tensors
 *               point into the one array. Each rank has a thread. A step hands the library one query token and the
 *               rank's own shard, and every rank gets the output over all 512 keys. The same is done for every token
 *               and for 1, 2, 3, 4 and 8 ranks; all outputs are compared with float64. With an argument, for so many
 *               tokens alone.
 * When to use   Whenever a sequence's cache is larger, or slower to read, than one device allows.
 */
#include <treeattn.h>

#include "../common/check.h"
#include "../common/npy.h"
#include "../common/numeric.h"
#include "../common/ranks.h"

#ifndef DATA_DIR
#define DATA_DIR "../tests/data/minilm"
#endif

enum { TOKENS = 512, HEADS = 12, DIM = 32, ROW = HEADS * DIM, MOST_RANKS = 8 };

/* What the ranks share, and what each leaves behind. */
typedef struct {
    int world, steps;
    const uint16_t *q, *k, *v; /* f16 [token, head, dim] */
    treeattn_plan_t *plans[MOST_RANKS];
    float *out[MOST_RANKS]; /* [token, head, dim], from each rank */
    float *lse[MOST_RANKS]; /* [token, head] */
    double times[TOKENS];   /* of each step, on rank 0 */
} job_t;

/* Decodes every token on one rank. */
static void decode_on(int rank, void *context)
{
    job_t *job = context;
    int first = rank * TOKENS / job->world, end = (rank + 1) * TOKENS / job->world, token;
    int32_t length = end - first; /* keys of this rank */
    treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;

    args.batch = 1;
    args.query_tokens = 1;
    args.kv_length = &length;
    /* All strides zero: packed. Only the bytes named here are ever touched. */
    args.k.data = (void *)(job->k + (size_t)first * ROW);
    args.v.data = (void *)(job->v + (size_t)first * ROW);
    args.k.bytes = args.v.bytes = (uint64_t)length * ROW * sizeof *job->k;
    args.q.bytes = ROW * sizeof *job->q;
    args.out.bytes = ROW * sizeof **job->out;
    args.lse.bytes = HEADS * sizeof **job->lse;

    for (token = 0; token < job->steps; token++) {
        double start = seconds();
        args.q.data = (void *)(job->q + (size_t)token * ROW);
        args.out.data = job->out[rank] + (size_t)token * ROW;
        args.lse.data = job->lse[rank] + (size_t)token * HEADS;
        CHECK(treeattn_plan_decode(job->plans[rank], &args, NULL));
        if (rank == 0)
            job->times[token] = seconds() - start;
    }
}

/* Runs all steps on `world` ranks; the outputs are left in `job`. */
static void decode_all(treeattn_runtime_t *runtime, int world, job_t *job)
{
    treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
    treeattn_device_t devices[MOST_RANKS];
    treeattn_comm_t *comms[MOST_RANKS];
    int rank;

    for (rank = 0; rank < world; rank++)
        devices[rank] = TREEATTN_CPU(0);
    CHECK(treeattn_comm_create_local(runtime, world, devices, NULL, comms));

    desc.q_heads = desc.kv_heads = HEADS;
    desc.head_dim_qk = desc.head_dim_v = DIM;
    desc.q_dtype = desc.k_dtype = desc.v_dtype = TREEATTN_DTYPE_F16;
    desc.out_dtype = TREEATTN_DTYPE_F32;
    desc.max_batch = desc.max_query_tokens = 1;
    desc.max_kv_length = TOKENS; /* on one rank */
    CHECK(treeattn_plan_create_all(world, comms, &desc, job->plans));

    job->world = world;
    ranks_run(world, decode_on, job);

    for (rank = 0; rank < world; rank++) {
        CHECK(treeattn_plan_destroy(job->plans[rank]));
        CHECK(treeattn_comm_destroy(comms[rank]));
    }
}

/* The float64 answers of a layer. The stored ones, made by other code, have to be these, rounded to float. */
static row_t *reference(const job_t *job, const npy_t *out, const npy_t *lse)
{
    row_t *rows = must_alloc(sizeof *rows * TOKENS * HEADS);
    double *k = must_alloc(sizeof *k * TOKENS * ROW), *v = must_alloc(sizeof *v * TOKENS * ROW), q[DIM];
    size_t i;
    int token, head, key;

    for (i = 0; i < (size_t)TOKENS * ROW; i++) {
        k[i] = half_to_double(job->k[i]);
        v[i] = half_to_double(job->v[i]);
    }
    for (token = 0; token < job->steps; token++) {
        for (head = 0; head < HEADS; head++) {
            row_t *row = &rows[token * HEADS + head];
            const float *stored = (const float *)out->data + (size_t)token * ROW + (size_t)head * DIM;
            float stored_lse = ((const float *)lse->data)[token * HEADS + head];
            for (i = 0; i < DIM; i++)
                q[i] = half_to_double(job->q[(size_t)token * ROW + (size_t)head * DIM + i]);
            row_begin(row);
            for (key = 0; key < TOKENS; key++) {
                size_t at = (size_t)key * ROW + (size_t)head * DIM;
                row_add(row, q, k + at, v + at, DIM, 1.0 / sqrt(DIM));
            }
            row_end(row, DIM);
            for (i = 0; i < DIM; i++)
                REQUIRE(fabs(row->out[i] - stored[i]) <= 0x1p-23 * fabs(stored[i]) + 1e-12,
                        "stored output %g, float64 here %g", stored[i], row->out[i]);
            REQUIRE(fabs(row_lse(row) - stored_lse) <= 0x1p-23 * fabs(stored_lse), "stored lse %g, float64 here %g",
                    stored_lse, row_lse(row));
        }
    }
    free(k);
    free(v);
    return rows;
}

static npy_t load(int layer, const char *what, const char *type)
{
    char path[512];
    npy_t array;
    snprintf(path, sizeof path, "%s/layer%d_%s.npy", DATA_DIR, layer, what);
    array = npy_load(path, type);
    REQUIRE(array.shape[0] == TOKENS && array.shape[1] == HEADS, "%s has another shape", path);
    return array;
}

int main(int argc, char **argv)
{
    static const int worlds[] = {1, 2, 3, 4, 8}, layers[] = {0, 5};
    treeattn_runtime_t *runtime;
    job_t *job = must_alloc(sizeof *job);
    worst_t all = {0};
    size_t l, w;
    int rank, token, head;

    job->steps = argc > 1 ? atoi(argv[1]) : TOKENS;
    REQUIRE(argc <= 2 && job->steps >= 1 && job->steps <= TOKENS, "usage: %s [STEPS, 1 to %d]", argv[0], TOKENS);
    CHECK(treeattn_runtime_create(NULL, &runtime));
    for (rank = 0; rank < MOST_RANKS; rank++) {
        job->out[rank] = must_alloc(sizeof(float) * TOKENS * ROW);
        job->lse[rank] = must_alloc(sizeof(float) * TOKENS * HEADS);
    }
    printf("%d tokens, %d heads of %d, f16; %d decode steps of one token each\n\n", TOKENS, HEADS, DIM, job->steps);
    printf("layer  ranks  keys/rank    max |out error|    max |lse error|  same bits  us/step\n");
    printf("-----  -----  ---------  -----------------  -----------------  ---------  -------\n");

    for (l = 0; l < sizeof layers / sizeof *layers; l++) {
        npy_t q = load(layers[l], "q", "f2"), k = load(layers[l], "k", "f2"), v = load(layers[l], "v", "f2");
        npy_t out = load(layers[l], "out", "f4"), lse = load(layers[l], "lse", "f4");
        row_t *rows;
        job->q = q.data;
        job->k = k.data;
        job->v = v.data;
        rows = reference(job, &out, &lse);

        for (w = 0; w < sizeof worlds / sizeof *worlds; w++) {
            int world = worlds[w];
            worst_t worst = {0};
            char keys[32];
            decode_all(runtime, world, job);
            for (token = 0; token < job->steps; token++)
                for (head = 0; head < HEADS; head++)
                    worst_row(&worst, &rows[token * HEADS + head], job->out[0] + token * ROW + head * DIM,
                              job->lse[0][token * HEADS + head], DIM);
            for (rank = 1; rank < world; rank++) {
                REQUIRE(memcmp(job->out[rank], job->out[0], sizeof(float) * job->steps * ROW) == 0, "rank %d", rank);
                REQUIRE(memcmp(job->lse[rank], job->lse[0], sizeof(float) * job->steps * HEADS) == 0, "rank %d", rank);
            }
            if (TOKENS % world)
                snprintf(keys, sizeof keys, "%d-%d", TOKENS / world, TOKENS / world + 1);
            else
                snprintf(keys, sizeof keys, "%d", TOKENS / world);
            printf("%5d  %5d  %9s  %8.1e (%3.0f %%)  %8.1e (%3.0f %%)  %9s  %7.1f\n", layers[l], world, keys, worst.out,
                   100.0 * worst.out_share, worst.lse, 100.0 * worst.lse_share, "yes", 1e6 * median(job->times, job->steps));
            all.out_share = fmax(all.out_share, worst.out_share);
            all.lse_share = fmax(all.lse_share, worst.lse_share);
        }
        free(rows);
        free(q.data);
        free(k.data);
        free(v.data);
        free(out.data);
        free(lse.data);
    }
    printf("\nIn brackets: the largest error as a share of the promised bound.\n");
    for (rank = 0; rank < MOST_RANKS; rank++) {
        free(job->out[rank]);
        free(job->lse[rank]);
    }
    free(job);
    CHECK(treeattn_runtime_destroy(runtime));
    return worst_verdict(&all);
}
