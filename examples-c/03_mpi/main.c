/*
 * 03_mpi: one process a rank, connected by MPI.
 *
 * Purpose       Ranks on several processes, or several machines: the library exchanges partials through the engine's
 *               own communication, here MPI, and opens no connection of its own.
 * How it works  transport.h has two callbacks, an allgather and a sendrecv, which give up at their deadline.
 *               treeattn_comm_create_from_transport makes a communicator of them; plans and decode steps are those of
 *               every other example. A sequence of 1,000 tokens is decoded from the first token on; the cache grows by
 *               one token a step, in runs of 8 tokens a rank. All outputs are compared with float64, and all ranks have
 *               to hold the same bits.
 *               With --kill RANK that rank kills itself half-way. The others get TREEATTN_ERROR_TIMEOUT within the
 *               deadline, find out who is left, make a new communicator and go on with the step that failed.
 * When to use   CPU ranks on several machines; an engine that has MPI, gloo or sockets already. See README.md.
 */
#include <signal.h>
#include <unistd.h>

#include <mpi.h>
#include <treeattn.h>

#include "../common/check.h"
#include "../common/numeric.h"
#include "../common/ranks.h"
#include "transport.h"

enum { STEPS = 1000, HEADS = 8, KV_HEADS = 2, DIM = 64, ROW = KV_HEADS * DIM, RUN = 8 };

/* ---- The engine ------------------------------------------------------------------------------------------------ */

typedef struct {
    treeattn_runtime_t *runtime;
    transport_t *transport;
    treeattn_comm_t *comm;
    treeattn_plan_t *plan;
    treeattn_placement_t placement;
    float (*k)[ROW], (*v)[ROW]; /* this rank's tokens, [slot][kv head, dim] */
    float (*out)[HEADS * DIM];  /* of every step */
    float (*lse)[HEADS];
} engine_t;

/* `count` numbers of token `token`: what a model would compute. */
static void token_values(int token, int kind, float *to, int count)
{
    uint64_t random = (uint64_t)token * 3 + (uint64_t)kind;
    int i;
    for (i = 0; i < count; i++)
        to[i] = (float)(2.0 * random_unit(&random));
}

/* Puts a token into the cache of the rank that holds it. */
static void append(engine_t *engine, int token)
{
    int32_t owner, slot;
    CHECK(treeattn_placement_owner(&engine->placement, engine->transport->world, STEPS, token, &owner));
    if (owner != engine->transport->rank)
        return;
    CHECK(treeattn_placement_local_slot(&engine->placement, engine->transport->world, STEPS, token, &slot));
    token_values(token, 1, engine->k[slot], ROW);
    token_values(token, 2, engine->v[slot], ROW);
}

/* Collective: a plan for this cache. Where the library does not have the algorithm, all ranks hear of it. */
static treeattn_status_t plan_make(engine_t *engine, treeattn_algorithm_t algorithm)
{
    treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
    desc.q_heads = HEADS;
    desc.kv_heads = KV_HEADS;
    desc.head_dim_qk = desc.head_dim_v = DIM;
    desc.q_dtype = desc.k_dtype = desc.v_dtype = desc.out_dtype = TREEATTN_DTYPE_F32;
    desc.placement = engine->placement;
    desc.max_batch = desc.max_query_tokens = 1;
    desc.max_kv_length = STEPS;
    desc.algorithm = algorithm;
    return treeattn_plan_create(engine->comm, &desc, &engine->plan);
}

/* Connects to the ranks of the transport; the cache holds `tokens` tokens afterwards. */
static void engine_connect(engine_t *engine, transport_t *transport, int tokens)
{
    treeattn_transport_t callbacks = TREEATTN_TRANSPORT_INIT;
    treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
    int token;

    engine->transport = transport;
    callbacks.ctx = transport;
    callbacks.allgather = allgather;
    callbacks.sendrecv = sendrecv;
    config.step_timeout_ns = SECOND;
    config.threads_per_rank = 1;
    CHECK(treeattn_comm_create_from_transport(engine->runtime, &callbacks, transport->world, transport->rank,
                                              TREEATTN_CPU(0), &config, &engine->comm));
    CHECK(plan_make(engine, TREEATTN_ALGORITHM_AUTO));
    for (token = 0; token < tokens; token++)
        append(engine, token);
}

static void engine_disconnect(engine_t *engine)
{
    CHECK(treeattn_plan_destroy(engine->plan));
    CHECK(treeattn_comm_destroy(engine->comm));
    transport_free(engine->transport);
}

/* One token: its query against all keys so far, on all ranks; or against this rank's keys alone. */
static treeattn_status_t attend(engine_t *engine, int token, int alone)
{
    treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
    float q[HEADS * DIM];
    int32_t length;
    CHECK(treeattn_placement_local_length(&engine->placement, engine->transport->world, engine->transport->rank,
                                          token + 1, &length));
    token_values(token, 0, q, HEADS * DIM);
    args.batch = args.query_tokens = 1;
    args.kv_length = &length;
    args.q.data = q;
    args.q.bytes = sizeof q;
    args.k.data = engine->k;
    args.v.data = engine->v;
    args.k.bytes = args.v.bytes = (uint64_t)length * sizeof *engine->k;
    args.out.data = engine->out[token];
    args.out.bytes = sizeof *engine->out;
    args.lse.data = engine->lse[token];
    args.lse.bytes = sizeof *engine->lse;
    return alone ? treeattn_plan_partial(engine->plan, &args, NULL) : treeattn_plan_decode(engine->plan, &args, NULL);
}

/* ---- Measuring and checking ------------------------------------------------------------------------------------ */

typedef struct {
    double step[STEPS], gather[STEPS], own[STEPS];
} times_t;

/* The allgather of a step without the library, polled in the same way; the attention of a step without the exchange. */
static void measure_parts(engine_t *engine, int token, times_t *times)
{
    const transport_t *t = engine->transport;
    static unsigned char *send, *recv;
    static size_t send_size, recv_size;
    const int32_t never = 0;
    MPI_Request request;
    double start = seconds();
    CHECK(attend(engine, token, 1));
    times->own[token] = seconds() - start;
    REQUIRE(reserve(&send, &send_size, t->bytes) && reserve(&recv, &recv_size, t->bytes * (size_t)t->world), "memory");
    memset(send, 0, t->bytes);
    start = seconds();
    MPI(MPI_Iallgather(send, (int)t->bytes, MPI_BYTE, recv, (int)t->bytes, MPI_BYTE, t->comm, &request));
    REQUIRE(poll_until(&request, 1, 10 * SECOND, &never) == 0, "the allgather failed");
    times->gather[token] = seconds() - start;
}

static worst_t compare(const engine_t *engine, int token)
{
    worst_t worst = {0};
    double q[DIM], k[DIM], v[DIM];
    float row[HEADS * DIM], keys[ROW], values[ROW];
    row_t truth;
    int head, key, i;
    token_values(token, 0, row, HEADS * DIM);
    for (head = 0; head < HEADS; head++) {
        int g = head / (HEADS / KV_HEADS);
        for (i = 0; i < DIM; i++)
            q[i] = row[head * DIM + i];
        row_begin(&truth);
        for (key = 0; key <= token; key++) {
            token_values(key, 1, keys, ROW);
            token_values(key, 2, values, ROW);
            for (i = 0; i < DIM; i++) {
                k[i] = keys[g * DIM + i];
                v[i] = values[g * DIM + i];
            }
            row_add(&truth, q, k, v, DIM, 1.0 / sqrt(DIM));
        }
        row_end(&truth, DIM);
        worst_row(&worst, &truth, engine->out[token] + head * DIM, engine->lse[token][head], DIM);
    }
    return worst;
}

/* A number that differs where any bit of a step's outputs does. */
static uint64_t hash(const engine_t *engine, int token)
{
    const unsigned char *parts[2] = {(const void *)engine->out[token], (const void *)engine->lse[token]};
    const size_t sizes[2] = {sizeof *engine->out, sizeof *engine->lse};
    uint64_t sum = UINT64_C(0xcbf29ce484222325);
    size_t part, i;
    for (part = 0; part < 2; part++)
        for (i = 0; i < sizes[part]; i++)
            sum = (sum ^ parts[part][i]) * UINT64_C(0x100000001b3);
    return sum;
}

/* Checks all steps, a share on each rank, and tells every rank the worst. */
static worst_t check_all(const engine_t *engine)
{
    static uint64_t mine[STEPS], low[STEPS], high[STEPS];
    const transport_t *t = engine->transport;
    worst_t worst = {0};
    double all[4];
    int token;
    for (token = 0; token < STEPS; token++) {
        mine[token] = hash(engine, token);
        if (token % (4 * t->world) == 4 * t->rank) {
            worst_t step = compare(engine, token);
            worst.out = fmax(worst.out, step.out);
            worst.lse = fmax(worst.lse, step.lse);
            worst.out_share = fmax(worst.out_share, step.out_share);
            worst.lse_share = fmax(worst.lse_share, step.lse_share);
        }
    }
    MPI(MPI_Allreduce(mine, low, STEPS, MPI_UINT64_T, MPI_MIN, t->comm));
    MPI(MPI_Allreduce(mine, high, STEPS, MPI_UINT64_T, MPI_MAX, t->comm));
    REQUIRE(memcmp(low, high, sizeof low) == 0, "ranks hold different bits");
    all[0] = worst.out, all[1] = worst.lse, all[2] = worst.out_share, all[3] = worst.lse_share;
    MPI(MPI_Allreduce(MPI_IN_PLACE, all, 4, MPI_DOUBLE, MPI_MAX, t->comm));
    worst.out = all[0], worst.lse = all[1], worst.out_share = all[2], worst.lse_share = all[3];
    return worst;
}

static void report(times_t *times, const transport_t *t)
{
    double step = 1e6 * median(times->step, STEPS), gather = 1e6 * median(times->gather, STEPS);
    double own = 1e6 * median(times->own, STEPS);
    printf("median of %d, us, rank 0\n", STEPS);
    printf("  decode step                                %8.1f\n", step);
    printf("  MPI_Iallgather alone, %6zu bytes a rank   %8.1f\n", t->bytes, gather);
    printf("  attention of the rank's own keys alone     %8.1f\n", own);
    printf("  step - allgather                           %8.1f\n", step - gather);
    printf("  step - allgather - attention               %8.1f\n\n", step - gather - own);
}

/* The last token again with every way in which partials can meet; those that go from neighbour to neighbour use
 * `sendrecv`. Takes the errors into `worst`. */
static void other_algorithms(engine_t *engine, double *times, worst_t *worst)
{
    static const struct {
        treeattn_algorithm_t code;
        const char *name;
    } all[] = {{TREEATTN_ALGORITHM_ONE_SHOT, "ONE_SHOT"}, {TREEATTN_ALGORITHM_TWO_SHOT, "TWO_SHOT"},
               {TREEATTN_ALGORITHM_TREE, "TREE"}, {TREEATTN_ALGORITHM_ALLREDUCE3, "ALLREDUCE3"},
               {TREEATTN_ALGORITHM_RING, "RING"}};
    const int token = STEPS - 1, last = engine->transport->world > 1 ? (int)(sizeof all / sizeof *all) : 0;
    int i, step;
    for (i = 0; i < last; i++) {
        treeattn_plan_stats_t stats = TREEATTN_PLAN_STATS_INIT;
        treeattn_status_t status = plan_make(engine, all[i].code);
        worst_t one;
        if (status == TREEATTN_ERROR_UNSUPPORTED)
            continue;
        CHECK(status);
        for (step = 0; step < STEPS; step++) {
            double start = seconds();
            CHECK(attend(engine, token, 0));
            times[step] = seconds() - start;
        }
        CHECK(treeattn_plan_stats(engine->plan, &stats));
        one = compare(engine, token);
        worst->out_share = fmax(worst->out_share, one.out_share);
        worst->lse_share = fmax(worst->lse_share, one.lse_share);
        if (engine->transport->rank == 0) {
            if (i == 0)
                printf("of a step, rank 0      median us     rounds   messages       bytes\n");
            printf("  %-20s  %8.1f  %9.1f  %9.1f  %10.1f\n", all[i].name, 1e6 * median(times, STEPS),
                   (double)stats.rounds / STEPS, (double)stats.messages / STEPS, (double)stats.bytes_sent / STEPS);
        }
        CHECK(treeattn_plan_destroy(engine->plan));
        engine->plan = NULL;
    }
    if (engine->transport->rank == 0)
        printf("\n");
}

int main(int argc, char **argv)
{
    engine_t engine = {0};
    times_t *times = must_alloc(sizeof *times);
    transport_t *transport;
    MPI_Comm comm;
    worst_t worst;
    int threads, token, me, failed, kill_rank = -1;
    double start;

    REQUIRE(argc == 1 || (argc == 3 && strcmp(argv[1], "--kill") == 0), "usage: %s [--kill RANK]", argv[0]);
    if (argc == 3)
        kill_rank = (int)strtol(argv[2], NULL, 10);
    /* The callbacks run on this thread, inside its calls of the library; on no other. */
    MPI(MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &threads));
    REQUIRE(threads >= MPI_THREAD_FUNNELED, "MPI without MPI_THREAD_FUNNELED");
    MPI(MPI_Comm_dup(MPI_COMM_WORLD, &comm));
    transport = transport_make(comm);
    REQUIRE(transport->world <= MAX_RANKS, "more than %d ranks", MAX_RANKS);
    REQUIRE(kill_rank < transport->world, "there is no rank %d to kill", kill_rank);
    me = transport->rank;

    engine.placement.kind = TREEATTN_PLACEMENT_INTERLEAVED;
    engine.placement.interleave = RUN;
    engine.k = must_alloc(sizeof *engine.k * STEPS);
    engine.v = must_alloc(sizeof *engine.v * STEPS);
    engine.out = must_alloc(sizeof *engine.out * STEPS);
    engine.lse = must_alloc(sizeof *engine.lse * STEPS);
    CHECK(treeattn_runtime_create(NULL, &engine.runtime));
    engine_connect(&engine, transport, 0);
    if (me == 0)
        printf("%d ranks, a process each; %d decode steps; %d query and %d kv heads of %d, f32; runs of %d tokens a "
               "rank\n\n", transport->world, STEPS, HEADS, KV_HEADS, DIM, RUN);

    for (token = 0; token < STEPS; token++) {
        treeattn_status_t status;
        append(&engine, token);
        if (token == STEPS / 2 && me == kill_rank)
            raise(SIGKILL);
        start = seconds();
        status = attend(&engine, token, 0);
        times->step[token] = seconds() - start;
        if (status != TREEATTN_OK) {
            /* The communicator is broken; this process is not. */
            REQUIRE(kill_rank >= 0, "step %d: %s: %s", token, treeattn_status_string(status),
                    treeattn_last_error_message());
            printf("rank %d, step %d: %s after %.1f s\n", me, token, treeattn_status_string(status),
                   times->step[token]);
            fflush(stdout);
            comm = survivors(engine.transport);
            engine_disconnect(&engine);
            transport = transport_make(comm);
            engine_connect(&engine, transport, token + 1); /* the lost tokens are computed again */
            printf("rank %d is rank %d of %d now and goes on\n", me, transport->rank, transport->world);
            fflush(stdout);
            CHECK(attend(&engine, token, 0));
        } else if (kill_rank < 0) {
            float out[HEADS * DIM], lse[HEADS];
            memcpy(out, engine.out[token], sizeof out);
            memcpy(lse, engine.lse[token], sizeof lse);
            measure_parts(&engine, token, times);
            memcpy(engine.out[token], out, sizeof out);
            memcpy(engine.lse[token], lse, sizeof lse);
        }
    }

    worst = check_all(&engine);
    me = engine.transport->rank;
    if (me == 0 && kill_rank < 0)
        report(times, engine.transport);
    if (kill_rank < 0) {
        CHECK(treeattn_plan_destroy(engine.plan));
        engine.plan = NULL;
        other_algorithms(&engine, times->step, &worst);
    }
    engine_disconnect(&engine);
    CHECK(treeattn_runtime_destroy(engine.runtime));
    free(engine.k);
    free(engine.v);
    free(engine.out);
    free(engine.lse);
    free(times);
    failed = me == 0 ? worst_verdict(&worst) : worst.out_share > 1.0 || worst.lse_share > 1.0;
    if (kill_rank >= 0) {
        /* MPI_Finalize waits for all ranks that there were, and in some runs for ever for the one that was lost. */
        fflush(stdout);
        _exit(failed);
    }
    MPI(MPI_Finalize());
    return failed;
}
