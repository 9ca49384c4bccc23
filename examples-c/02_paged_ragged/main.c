/*
 * 02_paged_ragged: a paged cache, sequences of different lengths, tokens dealt to the ranks in turn.
 *
 * Purpose       What a serving engine does from step to step: tokens are appended, pages are taken from a free list,
 *               sequences come and pause, and now and then several tokens of a sequence are verified at once.
 * How it works  Three ranks. Tokens go to them in runs of four by position (interleaved placement), so a sequence
 *               grows on all ranks alike. Each rank keeps its tokens in pages of eight slots that a block table names.
 *               For every new token the placement helpers say which rank holds it and in which slot. One plan, causal,
 *               serves every step, whatever the lengths. One thread drives all ranks, each on a stream of its own:
 *               decode enqueues, synchronize waits.
 * When to use   With a vLLM-style paged cache, or any cache in which the newest token must not always land on the
 *               same rank.
 */
#include <treeattn.h>

#include "../common/check.h"
#include "../common/numeric.h"

enum {
    WORLD = 3,
    RUN = 4, /* consecutive tokens that go to one rank */
    PAGE = 8,
    SEQUENCES = 4,
    Q_HEADS = 8,
    KV_HEADS = 2,
    DIM = 64,
    LONGEST = 1024,             /* tokens of a sequence on all ranks */
    MAX_PAGES = LONGEST / PAGE, /* of a sequence on one rank, at most */
    POOL = SEQUENCES * MAX_PAGES,
    MOST_QUERIES = 16,
    TOKEN = KV_HEADS * DIM
};

/* The part of the cache that one rank holds. */
typedef struct {
    uint16_t *k, *v; /* f16 [page, slot, kv head, dim] */
    int32_t table[SEQUENCES][MAX_PAGES];
    int32_t length[SEQUENCES];
    int32_t free_pages[POOL];
    int free_count;
} shard_t;

typedef struct {
    treeattn_placement_t placement;
    shard_t shard[WORLD];
    int32_t length[SEQUENCES];     /* of each sequence on all ranks */
    double *k[SEQUENCES];          /* what was stored, by global position, for the check */
    double *v[SEQUENCES];
    uint64_t random;
} cache_t;

static void cache_init(cache_t *cache)
{
    int rank, page;
    cache->placement.kind = TREEATTN_PLACEMENT_INTERLEAVED;
    cache->placement.interleave = RUN;
    cache->random = 1;
    for (rank = 0; rank < WORLD; rank++) {
        shard_t *shard = &cache->shard[rank];
        shard->k = must_alloc(sizeof *shard->k * POOL * PAGE * TOKEN);
        shard->v = must_alloc(sizeof *shard->v * POOL * PAGE * TOKEN);
        /* What no token has been written to may hold anything: here, a NaN. It is never used. */
        memset(shard->k, 0xFF, sizeof *shard->k * POOL * PAGE * TOKEN);
        memset(shard->v, 0xFF, sizeof *shard->v * POOL * PAGE * TOKEN);
        memset(shard->table, 0xFF, sizeof shard->table);
        shard->free_count = POOL;
        for (page = 0; page < POOL; page++) /* 7 shares no factor with POOL: every page once, out of order */
            shard->free_pages[page] = page * 7 % POOL;
    }
    for (page = 0; page < SEQUENCES; page++) {
        cache->k[page] = must_alloc(sizeof(double) * LONGEST * TOKEN);
        cache->v[page] = must_alloc(sizeof(double) * LONGEST * TOKEN);
    }
}

/* Appends one token of random keys and values to a sequence. */
static void cache_append(cache_t *cache, int sequence)
{
    int32_t position = cache->length[sequence]++, length = cache->length[sequence], rank, slot, *page;
    shard_t *shard;
    size_t at;
    int i;

    REQUIRE(length <= LONGEST, "sequence %d is full", sequence);
    CHECK(treeattn_placement_owner(&cache->placement, WORLD, length, position, &rank));
    CHECK(treeattn_placement_local_slot(&cache->placement, WORLD, length, position, &slot));
    shard = &cache->shard[rank];
    page = &shard->table[sequence][slot / PAGE];
    if (*page < 0) {
        REQUIRE(shard->free_count > 0, "rank %d has no free page", rank);
        *page = shard->free_pages[--shard->free_count];
    }
    at = ((size_t)*page * PAGE + (size_t)(slot % PAGE)) * TOKEN;
    for (i = 0; i < TOKEN; i++) {
        shard->k[at + (size_t)i] = double_to_half(2.0 * random_unit(&cache->random));
        shard->v[at + (size_t)i] = double_to_half(random_unit(&cache->random));
        cache->k[sequence][position * TOKEN + i] = half_to_double(shard->k[at + (size_t)i]);
        cache->v[sequence][position * TOKEN + i] = half_to_double(shard->v[at + (size_t)i]);
    }
    CHECK(treeattn_placement_local_length(&cache->placement, WORLD, rank, length, &shard->length[sequence]));
}

/* Checks one sequence's rows: query token i of n sees the keys up to its own position. */
static void check(const cache_t *cache, int sequence, int n, const float *q, const float *out, const float *lse,
                  worst_t *worst)
{
    int token, head, i;
    for (token = 0; token < n; token++) {
        int visible = cache->length[sequence] - n + token + 1, key;
        for (head = 0; head < Q_HEADS; head++) {
            int row_at = token * Q_HEADS + head, kv_at = head / (Q_HEADS / KV_HEADS) * DIM;
            double query[DIM];
            row_t row;
            for (i = 0; i < DIM; i++)
                query[i] = q[row_at * DIM + i];
            row_begin(&row);
            for (key = 0; key < visible; key++)
                row_add(&row, query, cache->k[sequence] + key * TOKEN + kv_at,
                        cache->v[sequence] + key * TOKEN + kv_at, DIM, 1.0 / sqrt(DIM));
            row_end(&row, DIM);
            worst_row(worst, &row, out + row_at * DIM, lse[row_at], DIM);
        }
    }
}

int main(void)
{
    static const int prompt[SEQUENCES] = {1000, 37, 0, 250};
    static const struct {
        const char *what;
        int fresh[SEQUENCES]; /* tokens appended to each sequence, and queried */
    } steps[] = {
        {"one token each, one sequence empty", {1, 1, 0, 1}},
        {"the empty sequence begins", {1, 1, 1, 1}},
        {"one token each", {1, 1, 1, 1}},
        {"drafts of 4 and 3 tokens, a pause", {4, 1, 0, 3}},
        {"one token each", {1, 1, 1, 1}},
    };
    treeattn_runtime_t *runtime;
    treeattn_comm_t *comms[WORLD];
    treeattn_plan_t *plans[WORLD];
    treeattn_stream_t *streams[WORLD];
    treeattn_device_t devices[WORLD];
    treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
    cache_t *cache = must_alloc(sizeof *cache);
    float *q = must_alloc(sizeof *q * MOST_QUERIES * Q_HEADS * DIM), *out[WORLD], *lse[WORLD];
    worst_t all = {0};
    size_t step;
    int rank, sequence, i;

    cache_init(cache);
    for (sequence = 0; sequence < SEQUENCES; sequence++)
        for (i = 0; i < prompt[sequence]; i++)
            cache_append(cache, sequence);

    CHECK(treeattn_runtime_create(NULL, &runtime));
    for (rank = 0; rank < WORLD; rank++) {
        devices[rank] = TREEATTN_CPU(0);
        CHECK(treeattn_stream_create(runtime, devices[rank], &streams[rank]));
        out[rank] = must_alloc(sizeof **out * MOST_QUERIES * Q_HEADS * DIM);
        lse[rank] = must_alloc(sizeof **lse * MOST_QUERIES * Q_HEADS);
    }
    CHECK(treeattn_comm_create_local(runtime, WORLD, devices, NULL, comms));

    desc.q_heads = Q_HEADS;
    desc.kv_heads = KV_HEADS;
    desc.head_dim_qk = desc.head_dim_v = DIM;
    desc.q_dtype = desc.out_dtype = TREEATTN_DTYPE_F32;
    desc.k_dtype = desc.v_dtype = TREEATTN_DTYPE_F16;
    desc.kv_layout = TREEATTN_KV_LAYOUT_BLOCK_TABLE;
    desc.page_size = PAGE;
    desc.placement = cache->placement;
    desc.max_batch = SEQUENCES;
    desc.max_query_tokens = MOST_QUERIES;
    desc.max_kv_length = LONGEST; /* of a sequence on one rank */
    desc.causal = 1;
    CHECK(treeattn_plan_create_all(WORLD, comms, &desc, plans));

    printf("%d ranks, runs of %d tokens, pages of %d slots, %d query heads, %d kv heads of %d\n\n", WORLD, RUN, PAGE,
           Q_HEADS, KV_HEADS, DIM);
    printf("step  %-34s  queries  tokens in all       keys by rank  max |error| (of bound)\n", "what");
    printf("----  %.34s  -------  -------------  -----------------  ----------------------\n",
           "----------------------------------");

    for (step = 0; step < sizeof steps / sizeof *steps; step++) {
        int32_t query_start[SEQUENCES + 1] = {0};
        int tokens = 0, keys[WORLD] = {0}, total = 0;
        worst_t worst = {0};

        /* The new tokens join the cache first: each is a key for itself and for those after it. */
        for (sequence = 0; sequence < SEQUENCES; sequence++) {
            for (i = 0; i < steps[step].fresh[sequence]; i++)
                cache_append(cache, sequence);
            query_start[sequence + 1] = tokens += steps[step].fresh[sequence];
            total += cache->length[sequence];
        }
        for (i = 0; i < tokens * Q_HEADS * DIM; i++)
            q[i] = (float)(2.0 * random_unit(&cache->random));

        for (rank = 0; rank < WORLD; rank++) {
            shard_t *shard = &cache->shard[rank];
            treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
            args.batch = SEQUENCES;
            args.query_tokens = tokens;
            args.query_start = query_start;
            args.kv_length = shard->length;
            args.global_length = cache->length; /* causal: positions are global */
            args.block_table = &shard->table[0][0];
            args.max_pages = MAX_PAGES;
            args.num_pages = POOL;
            args.q.data = q;
            args.q.bytes = sizeof *q * (size_t)tokens * Q_HEADS * DIM;
            args.k.data = shard->k;
            args.v.data = shard->v;
            args.k.bytes = args.v.bytes = sizeof *shard->k * POOL * PAGE * TOKEN;
            args.out.data = out[rank];
            args.out.bytes = sizeof **out * (size_t)tokens * Q_HEADS * DIM;
            args.lse.data = lse[rank];
            args.lse.bytes = sizeof **lse * (size_t)tokens * Q_HEADS;
            /* `args` itself may go; what it points to must stay until the stream is done. */
            CHECK(treeattn_plan_decode(plans[rank], &args, streams[rank]));
            for (sequence = 0; sequence < SEQUENCES; sequence++)
                keys[rank] += shard->length[sequence];
        }
        for (rank = 0; rank < WORLD; rank++)
            CHECK(treeattn_stream_synchronize(streams[rank]));

        for (rank = 0; rank < WORLD; rank++)
            for (sequence = 0; sequence < SEQUENCES; sequence++) {
                int at = query_start[sequence] * Q_HEADS;
                check(cache, sequence, steps[step].fresh[sequence], q + at * DIM, out[rank] + at * DIM, lse[rank] + at,
                      &worst);
            }
        printf("%4zu  %-34s  %7d  %13d  %5d %5d %5d  %11.1e (%3.0f %%)\n", step, steps[step].what, tokens, total,
               keys[0], keys[1], keys[2], worst.out, 100.0 * worst.out_share);
        all.out_share = fmax(all.out_share, worst.out_share);
        all.lse_share = fmax(all.lse_share, worst.lse_share);
    }
    printf("\n");

    for (rank = 0; rank < WORLD; rank++) {
        CHECK(treeattn_plan_destroy(plans[rank]));
        CHECK(treeattn_stream_destroy(streams[rank]));
        CHECK(treeattn_comm_destroy(comms[rank]));
        free(cache->shard[rank].k);
        free(cache->shard[rank].v);
        free(out[rank]);
        free(lse[rank]);
    }
    CHECK(treeattn_runtime_destroy(runtime));
    for (sequence = 0; sequence < SEQUENCES; sequence++) {
        free(cache->k[sequence]);
        free(cache->v[sequence]);
    }
    free(cache);
    free(q);
    return worst_verdict(&all);
}
