/*
 * 04_hopfield: a memory that is asked by attention.
 *
 * Purpose       treeattn_energy: F(zeta) = log sum_j exp(scale q.k_j + zeta.v_j) and its gradient by zeta, over keys and
 *               values that are cut over ranks.
 * How it works  4,096 patterns of 64 values, six of them letters of 8 x 8 points, are dealt out to four ranks as keys and
 *               as values. A corrupted letter x is the query. Each rank evaluates its own patterns; the (gradient, F) that
 *               come out are partials, and a merge-only plan makes them the whole. The gradient at 0 is the mean of the
 *               patterns under the softmax of scale x.k: it becomes the next x. This is the modern Hopfield network
 *               (arXiv 2008.02217), and each step lowers its energy, x.x / 2 - F / scale. Then a probe that fits two
 *               letters alike: a zeta that leans towards some points of one of them decides which is found.
 * When to use   Associative memories; a look at what attention does as a function of its values. Every evaluation is
 *               compared with float64.
 */
#include <treeattn.h>

#include "../common/check.h"
#include "../common/numeric.h"
#include "../common/ranks.h"

enum { RANKS = 4, LETTERS = 6, PATTERNS = 4096, SIDE = 8, DIM = SIDE * SIDE, MOST_STEPS = 12 };

#define SCALE 0.5 /* the inverse temperature: the larger, the more is one pattern alone */

/* Where letter n lies among the patterns. */
#define PLACE(n) ((n) * (PATTERNS / LETTERS) + 100)

static const char *const letters[LETTERS][SIDE] = {
    {"..####..", ".##..##.", ".##..##.", ".######.", ".##..##.", ".##..##.", ".##..##.", "........"},
    {".#####..", ".##..##.", ".##..##.", ".#####..", ".##..##.", ".##..##.", ".#####..", "........"},
    {"..####..", ".##..##.", ".##.....", ".##.....", ".##.....", ".##..##.", "..####..", "........"},
    {".######.", ".##.....", ".##.....", ".#####..", ".##.....", ".##.....", ".######.", "........"},
    {".##..##.", ".##..##.", ".##..##.", ".######.", ".##..##.", ".##..##.", ".##..##.", "........"},
    {"...##...", "...##...", "...##...", "...##...", "...##...", "...##...", "...##...", "........"},
};
static const char names[] = "ABCEHI";

/* What the ranks share. `x` and `zeta` are [probe, dim]; each rank leaves the merged gradient and F. */
typedef struct {
    treeattn_runtime_t *runtime;
    treeattn_plan_t *plan[RANKS];
    const float (*patterns)[DIM];
    int probes;
    float x[LETTERS][DIM], zeta[LETTERS][DIM];
    float gradient[RANKS][LETTERS][DIM], f[RANKS][LETTERS];
} memory_t;

/* One evaluation on one rank: its own patterns, then the exchange. */
static void evaluate_on(int rank, void *context)
{
    memory_t *memory = context;
    int first = rank * PATTERNS / RANKS, end = (rank + 1) * PATTERNS / RANKS;
    int32_t length = end - first;
    float gradient[LETTERS][DIM], f[LETTERS]; /* this rank's partial */
    treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
    treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
    treeattn_merge_args_t merge = TREEATTN_MERGE_ARGS_INIT;
    treeattn_tensor_t zeta = {memory->zeta, sizeof memory->zeta, {0, 0, 0, 0}};

    desc.q_heads = desc.kv_heads = 1;
    desc.head_dim_qk = desc.head_dim_v = DIM;
    desc.q_dtype = desc.k_dtype = desc.v_dtype = desc.out_dtype = TREEATTN_DTYPE_F32;
    desc.max_batch = 1;
    desc.max_query_tokens = LETTERS;
    desc.max_kv_length = PATTERNS;
    desc.scale = (float)SCALE;
    args.batch = 1;
    args.query_tokens = memory->probes;
    args.kv_length = &length;
    args.q.data = memory->x;
    args.q.bytes = sizeof memory->x;
    args.k.data = args.v.data = (void *)memory->patterns[first]; /* keys are values */
    args.k.bytes = args.v.bytes = (uint64_t)length * sizeof *memory->patterns;
    args.out.data = gradient;
    args.out.bytes = sizeof gradient;
    args.lse.data = f;
    args.lse.bytes = sizeof f;
    CHECK(treeattn_energy(memory->runtime, TREEATTN_CPU(0), &desc, &args, &zeta, NULL));

    merge.query_tokens = memory->probes;
    merge.o_dtype = TREEATTN_DTYPE_F32;
    merge.o = args.out;
    merge.lse = args.lse;
    merge.out.data = memory->gradient[rank];
    merge.out.bytes = sizeof memory->gradient[rank];
    merge.out_lse.data = memory->f[rank];
    merge.out_lse.bytes = sizeof memory->f[rank];
    CHECK(treeattn_plan_merge(memory->plan[rank], &merge, NULL));
}

/* One evaluation on all ranks, compared with float64: attention to keys (x, zeta / scale) and (k, v) laid end to end. */
static void evaluate(memory_t *memory, worst_t *worst)
{
    double q[2 * DIM], k[2 * DIM];
    row_t truth;
    int probe, rank, j, i;
    ranks_run(RANKS, evaluate_on, memory);
    for (rank = 1; rank < RANKS; rank++)
        REQUIRE(memcmp(memory->gradient[rank], memory->gradient[0], sizeof(float) * DIM * (size_t)memory->probes) == 0,
                "rank %d has other bits", rank);
    for (probe = 0; probe < memory->probes; probe++) {
        for (i = 0; i < DIM; i++) {
            q[i] = memory->x[probe][i];
            q[DIM + i] = memory->zeta[probe][i] / SCALE;
        }
        row_begin(&truth);
        for (j = 0; j < PATTERNS; j++) {
            for (i = 0; i < DIM; i++)
                k[i] = k[DIM + i] = memory->patterns[j][i];
            row_add(&truth, q, k, k, 2 * DIM, SCALE);
        }
        row_end(&truth, 2 * DIM);
        worst_row(worst, &truth, memory->gradient[0][probe], memory->f[0][probe], DIM);
    }
}

/* Feeds the gradient back until nothing moves, and tells the energy of every probe at every step. */
static void retrieve(memory_t *memory, worst_t *worst)
{
    double before[LETTERS], moved = 1.0;
    int step, probe, i;
    for (probe = 0; probe < LETTERS; probe++)
        before[probe] = INFINITY;
    printf("step");
    for (probe = 0; probe < memory->probes; probe++)
        printf("   probe %d", probe + 1);
    printf("      moved\n");
    for (step = 0; step < MOST_STEPS && moved > 1e-3; step++) {
        evaluate(memory, worst);
        moved = 0.0;
        printf("%4d", step);
        for (probe = 0; probe < memory->probes; probe++) {
            double energy = -memory->f[0][probe] / SCALE;
            for (i = 0; i < DIM; i++) {
                double x = memory->x[probe][i], next = memory->gradient[0][probe][i];
                energy += 0.5 * x * x;
                moved = fmax(moved, fabs(next - x));
            }
            printf(" %9.3f", energy);
            REQUIRE(energy <= before[probe] + 1e-3, "the energy rises from %g to %g", before[probe], energy);
            before[probe] = energy;
        }
        memcpy(memory->x, memory->gradient[0], sizeof memory->x);
        printf("  %9.1e\n", moved);
    }
    REQUIRE(moved <= 1e-3, "still moving by %g after %d steps", moved, step);
    printf("\n");
}

/* The letter that has the most points in common with row `probe` of x. */
static char nearest(const memory_t *memory, int probe)
{
    double best = -INFINITY;
    int letter, i, found = 0;
    for (letter = 0; letter < LETTERS; letter++) {
        double overlap = 0.0;
        for (i = 0; i < DIM; i++)
            overlap += (double)memory->patterns[PLACE(letter)][i] * (double)memory->x[probe][i];
        if (overlap > best) {
            best = overlap;
            found = letter;
        }
    }
    return names[found];
}

/* Rows of points, side by side. */
static void draw(const char *title, const float (*x)[DIM], int count)
{
    int row, n, column;
    for (row = 0; row < SIDE; row++) {
        printf("%-12s", row == 0 ? title : "");
        for (n = 0; n < count; n++) {
            printf("%s", n > 0 ? "   " : "");
            for (column = 0; column < SIDE; column++) {
                float value = x[n][row * SIDE + column];
                putchar(value > 0.33f ? '#' : value < -0.33f ? '.' : '?');
            }
        }
        printf("\n");
    }
    printf("\n");
}

int main(void)
{
    static float patterns[PATTERNS][DIM];
    treeattn_device_t devices[RANKS];
    treeattn_comm_t *comms[RANKS];
    treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
    memory_t *memory = must_alloc(sizeof *memory);
    worst_t worst = {0};
    uint64_t random = 4;
    int j, i, rank;

    /* The letters lie among noise, far apart: no rank holds all. */
    for (j = 0; j < PATTERNS; j++)
        for (i = 0; i < DIM; i++)
            patterns[j][i] = random_unit(&random) > 0.0 ? 1.0f : -1.0f;
    for (j = 0; j < LETTERS; j++)
        for (i = 0; i < DIM; i++)
            patterns[PLACE(j)][i] = letters[j][i / SIDE][i % SIDE] == '#' ? 1.0f : -1.0f;
    memory->patterns = (const float (*)[DIM])patterns;

    CHECK(treeattn_runtime_create(NULL, &memory->runtime));
    for (rank = 0; rank < RANKS; rank++)
        devices[rank] = TREEATTN_CPU(0);
    CHECK(treeattn_comm_create_local(memory->runtime, RANKS, devices, NULL, comms));
    desc.q_heads = 1;
    desc.kv_heads = 0; /* merges what treeattn_energy yields */
    desc.head_dim_v = DIM;
    desc.out_dtype = TREEATTN_DTYPE_F32;
    desc.max_query_tokens = LETTERS;
    CHECK(treeattn_plan_create_all(RANKS, comms, &desc, memory->plan));
    printf("%d patterns of %d values on %d ranks, %d of them letters; scale %g\n\n", PATTERNS, DIM, RANKS, LETTERS,
           SCALE);

    /* 1. Every letter with its last three rows lost and a few points of the rest turned over. */
    memory->probes = LETTERS;
    for (j = 0; j < LETTERS; j++)
        for (i = 0; i < DIM; i++) {
            int flipped = random_unit(&random) > 0.85;
            memory->x[j][i] = i >= 5 * SIDE ? 0.0f : flipped ? -patterns[PLACE(j)][i] : patterns[PLACE(j)][i];
        }
    draw("probes", (const float (*)[DIM])memory->x, LETTERS);
    retrieve(memory, &worst);
    draw("found", (const float (*)[DIM])memory->x, LETTERS);
    for (j = 0; j < LETTERS; j++)
        REQUIRE(nearest(memory, j) == names[j], "probe %d should be %c, found %c", j + 1, names[j], nearest(memory, j));

    /* 2. What A and H have in common, three times: alone, and with a zeta for and against the first row of A. */
    memory->probes = 3;
    for (j = 0; j < 3; j++)
        for (i = 0; i < DIM; i++) {
            float a = patterns[PLACE(0)][i], h = patterns[PLACE(4)][i];
            memory->x[j][i] = a == h ? a : 0.0f;
            memory->zeta[j][i] = i < SIDE && j > 0 ? (j == 1 ? 0.5f : -0.5f) * (a - h) : 0.0f;
        }
    draw("A or H?", (const float (*)[DIM])memory->x, 3);
    printf("zeta        none       A's first  H's first\n\n");
    evaluate(memory, &worst);
    memcpy(memory->x, memory->gradient[0], sizeof memory->x);
    draw("gradient", (const float (*)[DIM])memory->x, 3);
    REQUIRE(nearest(memory, 1) == 'A' && nearest(memory, 2) == 'H', "found %c and %c", nearest(memory, 1),
            nearest(memory, 2));

    for (rank = 0; rank < RANKS; rank++) {
        CHECK(treeattn_plan_destroy(memory->plan[rank]));
        CHECK(treeattn_comm_destroy(comms[rank]));
    }
    CHECK(treeattn_runtime_destroy(memory->runtime));
    free(memory);
    return worst_verdict(&worst);
}
