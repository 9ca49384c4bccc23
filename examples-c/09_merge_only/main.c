/*
 * 09_merge_only: an engine that keeps its own attention kernel and uses the library to merge.
 *
 * Purpose       Adopt the exchange without touching the kernel: anything that yields outputs and a log-sum-exp for the
 *               keys it saw can be merged exactly, within a process and across ranks.
 * How it works  The "engine" here is a plain C loop that attends a run of keys and returns a normalised output and a
 *               log-sum-exp to base 2, as FlashInfer does, and +inf for a row without keys, as some kernels do.
 *               1. treeattn_merge_partials: the partials of five runs, side by side in one buffer, become one.
 *               2. A merge-only plan (kv_heads = 0): each of four ranks brings the partial of its own shard, one of
 *                  them empty, and every rank gets the merged output, in natural log.
 * When to use   When the kernel stays (a vendor's, a fused one, an odd cache format), or to put split-KV inside a
 *               device on the same footing as ranks.
 */
#include <treeattn.h>

#include "../common/check.h"
#include "../common/numeric.h"
#include "../common/ranks.h"

enum { RANKS = 4, SPLITS = 5, TOKENS = 3, HEADS = 6, DIM = 80, KEYS = 700, ROWS = TOKENS * HEADS };

/* Queries [token, head, dim]; keys and values [key, head, dim]; the truth for every row. */
static double q[ROWS][DIM], k[KEYS][HEADS][DIM], v[KEYS][HEADS][DIM];
static row_t truth[ROWS];

/* The engine's kernel: attends keys first to end - 1; out [token, head, dim], lse2 [token, head] to base 2. */
static void engine_attention(int first, int end, float *out, float *lse2)
{
    row_t row;
    int r, key, i;
    for (r = 0; r < ROWS; r++) {
        row_begin(&row);
        for (key = first; key < end; key++)
            row_add(&row, q[r], k[key][r % HEADS], v[key][r % HEADS], DIM, 1.0 / sqrt(DIM));
        row_end(&row, DIM);
        for (i = 0; i < DIM; i++)
            out[r * DIM + i] = (float)row.out[i];
        lse2[r] = first == end ? INFINITY : (float)(row_lse(&row) / log(2.0));
    }
}

static void make_problem(void)
{
    uint64_t random = 9;
    int r, key, i;
    for (r = 0; r < ROWS; r++)
        for (i = 0; i < DIM; i++)
            q[r][i] = (float)(3.0 * random_unit(&random));
    for (key = 0; key < KEYS; key++)
        for (r = 0; r < HEADS; r++)
            for (i = 0; i < DIM; i++) {
                k[key][r][i] = (float)random_unit(&random);
                v[key][r][i] = (float)random_unit(&random);
            }
    for (r = 0; r < ROWS; r++) {
        row_begin(&truth[r]);
        for (key = 0; key < KEYS; key++)
            row_add(&truth[r], q[r], k[key][r % HEADS], v[key][r % HEADS], DIM, 1.0 / sqrt(DIM));
        row_end(&truth[r], DIM);
    }
}

/* What every merge here has in common. */
static treeattn_merge_args_t merge_args(void)
{
    treeattn_merge_args_t args = TREEATTN_MERGE_ARGS_INIT;
    args.query_tokens = TOKENS;
    args.o_dtype = TREEATTN_DTYPE_F32;
    args.lse_base = 2; /* the lse that come out are natural */
    args.flags = TREEATTN_MERGE_PLUS_INF_IS_EMPTY;
    args.out.bytes = sizeof(float) * ROWS * DIM;
    args.out_lse.bytes = sizeof(float) * ROWS;
    return args;
}

static worst_t compare(const float *out, const float *lse)
{
    worst_t worst = {0};
    int r;
    for (r = 0; r < ROWS; r++)
        worst_row(&worst, &truth[r], out + r * DIM, lse[r], DIM);
    return worst;
}

static void report(const char *what, int partials, worst_t worst, worst_t *all)
{
    printf("%-36s  %8d  %8.1e (%3.0f %%)  %8.1e (%3.0f %%)\n", what, partials, worst.out, 100.0 * worst.out_share,
           worst.lse, 100.0 * worst.lse_share);
    all->out_share = fmax(all->out_share, worst.out_share);
    all->lse_share = fmax(all->lse_share, worst.lse_share);
}

/* One rank of the second part. */
typedef struct {
    treeattn_plan_t *plan[RANKS];
    float out[RANKS][ROWS * DIM], lse[RANKS][ROWS];
} exchange_t;

static void merge_on(int rank, void *context)
{
    /* The cut points of the shards; rank 2 holds nothing. */
    static const int cut[RANKS + 1] = {0, 300, 460, 460, KEYS};
    exchange_t *exchange = context;
    treeattn_merge_args_t args = merge_args();
    float *o = must_alloc(sizeof *o * ROWS * DIM), *lse2 = must_alloc(sizeof *lse2 * ROWS);

    engine_attention(cut[rank], cut[rank + 1], o, lse2);
    args.o.data = o; /* [token, head, dim] */
    args.o.bytes = sizeof *o * ROWS * DIM;
    args.lse.data = lse2; /* [token, head] */
    args.lse.bytes = sizeof *lse2 * ROWS;
    args.out.data = exchange->out[rank];
    args.out_lse.data = exchange->lse[rank];
    CHECK(treeattn_plan_merge(exchange->plan[rank], &args, NULL));
    free(o);
    free(lse2);
}

int main(void)
{
    treeattn_device_t cpu = TREEATTN_CPU(0), devices[RANKS];
    treeattn_merge_args_t args = merge_args();
    treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
    treeattn_runtime_t *runtime;
    treeattn_comm_t *comms[RANKS];
    exchange_t *exchange = must_alloc(sizeof *exchange);
    float *o = must_alloc(sizeof *o * SPLITS * ROWS * DIM), *lse2 = must_alloc(sizeof *lse2 * SPLITS * ROWS);
    worst_t all = {0};
    int i;

    make_problem();
    CHECK(treeattn_runtime_create(NULL, &runtime));
    printf("%d keys, %d query tokens, %d heads of %d; partials from the engine's own kernel, lse to base 2\n\n", KEYS,
           TOKENS, HEADS, DIM);
    printf("%-36s  partials    max |out error|    max |lse error|\n", "what");
    printf("------------------------------------  --------  -----------------  -----------------\n");

    /* 1. Five runs of keys on one device: partials [split, token, head, dim] and [split, token, head]. */
    for (i = 0; i < SPLITS; i++)
        engine_attention(i * KEYS / SPLITS, (i + 1) * KEYS / SPLITS, o + i * ROWS * DIM, lse2 + i * ROWS);
    args.heads = HEADS;
    args.head_dim = DIM;
    args.out_dtype = TREEATTN_DTYPE_F32;
    args.o.data = o;
    args.o.bytes = sizeof *o * SPLITS * ROWS * DIM;
    args.lse.data = lse2;
    args.lse.bytes = sizeof *lse2 * SPLITS * ROWS;
    args.out.data = exchange->out[0];
    args.out_lse.data = exchange->lse[0];
    CHECK(treeattn_merge_partials(runtime, cpu, &args, SPLITS, NULL));
    report("treeattn_merge_partials, one device", SPLITS, compare(exchange->out[0], exchange->lse[0]), &all);

    /* 2. Four ranks, each with the partial of its shard. */
    for (i = 0; i < RANKS; i++)
        devices[i] = cpu;
    CHECK(treeattn_comm_create_local(runtime, RANKS, devices, NULL, comms));
    desc.q_heads = HEADS;
    desc.kv_heads = 0; /* merge only */
    desc.head_dim_v = DIM;
    desc.out_dtype = TREEATTN_DTYPE_F32;
    desc.max_query_tokens = TOKENS;
    CHECK(treeattn_plan_create_all(RANKS, comms, &desc, exchange->plan));
    ranks_run(RANKS, merge_on, exchange);
    for (i = 1; i < RANKS; i++)
        REQUIRE(memcmp(exchange->out[i], exchange->out[0], sizeof exchange->out[0]) == 0, "rank %d", i);
    report("treeattn_plan_merge, four ranks", RANKS, compare(exchange->out[0], exchange->lse[0]), &all);
    printf("\nAll ranks hold the same bits. In brackets: the largest error as a share of the bound.\n");

    for (i = 0; i < RANKS; i++) {
        CHECK(treeattn_plan_destroy(exchange->plan[i]));
        CHECK(treeattn_comm_destroy(comms[i]));
    }
    CHECK(treeattn_runtime_destroy(runtime));
    free(exchange);
    free(o);
    free(lse2);
    return worst_verdict(&all);
}
