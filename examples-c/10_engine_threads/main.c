/*
 * 10_engine_threads: attention on the engine's own threads.
 *
 * Purpose       An engine has threads already. Two sets of threads on the same cores wait for each other, so let the library
 *               compute on the engine's.
 * How it works  The same steps over one cache are done three times, each time on as many threads: on threads of the library;
 *               by an executor, the engine's parallel-for, here OpenMP's; and by a team of threads, all of which run every
 *               operator one after the other with a spinning barrier between them, as those of ggml do. Before each step, all
 *               of the engine's threads do a little work of their own, which stands for the other operators of a layer. All
 *               outputs have to be the same bits; they are compared with float64. Arguments, where the defaults are not
 *               wanted: how many keys the cache has, and how many steps are done.
 * When to use   Whenever the engine's threads do not sleep during attention. An executor where the engine can start work on its
 *               threads from one of them; a team where all of them come by anyway.
 */
#include <treeattn.h>

#ifdef _OPENMP
#include <omp.h>
#endif
#include <sched.h>
#include <unistd.h>

#include "../common/check.h"
#include "../common/numeric.h"
#include "../common/ranks.h"

enum { KEYS = 4096, HEADS = 32, KV_HEADS = 8, DIM = 128, STEPS = 32, WARM = 4, MOST_THREADS = 16 };
enum { ROW = HEADS * DIM, KV_ROW = KV_HEADS * DIM };

typedef struct {
    int threads, steps;
    uint16_t *q, *k, *v; /* f16 [step, head, dim]; [token, kv head, dim] */
    int32_t length;
    float *out[3], *lse[3]; /* of each way: [step, head, dim], [step, head] */
    double times[STEPS];
} job_t;

static treeattn_decode_args_t step_args(job_t *job, int way, int step)
{
    treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
    args.batch = args.query_tokens = 1;
    args.kv_length = &job->length;
    args.q.data = job->q + (size_t)step * ROW;
    args.q.bytes = ROW * sizeof *job->q;
    args.k.data = job->k;
    args.v.data = job->v;
    args.k.bytes = args.v.bytes = (uint64_t)job->length * KV_ROW * sizeof *job->k;
    args.out.data = job->out[way] + (size_t)step * ROW;
    args.out.bytes = ROW * sizeof(float);
    args.lse.data = job->lse[way] + (size_t)step * HEADS;
    args.lse.bytes = HEADS * sizeof(float);
    return args;
}

/* A plan whose steps run on `threads` threads of the library or on those of an executor, and on teams of up to `max_team`. */
static treeattn_plan_t *plan_make(treeattn_runtime_t *runtime, const job_t *job, const treeattn_executor_t *executor,
                                  int threads, int max_team, treeattn_comm_t **comm)
{
    treeattn_device_t device = TREEATTN_CPU(0);
    treeattn_comm_config_t config = TREEATTN_COMM_CONFIG_INIT;
    treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
    treeattn_plan_t *plan;
    config.executor = executor;
    config.threads_per_rank = threads;
    config.max_team = max_team;
    CHECK(treeattn_comm_create_local(runtime, 1, &device, &config, comm));
    desc.q_heads = HEADS;
    desc.kv_heads = KV_HEADS;
    desc.head_dim_qk = desc.head_dim_v = DIM;
    desc.q_dtype = desc.k_dtype = desc.v_dtype = TREEATTN_DTYPE_F16;
    desc.out_dtype = TREEATTN_DTYPE_F32;
    desc.max_batch = desc.max_query_tokens = 1;
    desc.max_kv_length = job->length;
    CHECK(treeattn_plan_create(*comm, &desc, &plan));
    return plan;
}

static void plan_unmake(treeattn_plan_t *plan, treeattn_comm_t *comm)
{
    CHECK(treeattn_plan_destroy(plan));
    CHECK(treeattn_comm_destroy(comm));
}

/* What a thread of the engine does in its other operators: about 20 us of arithmetic. */
static double other_work(int thread)
{
    double x = thread + 1.0;
    int i;
    for (i = 0; i < 10000; i++)
        x = x * 0.999 + 0.5;
    return x;
}

/* The engine with OpenMP. Built without it, the loops are plain ones. */
static int32_t parallel(void *ctx, int32_t n, void (*task)(void *data, int32_t i), void *data)
{
    int32_t i;
    (void)ctx;
#pragma omp parallel for schedule(static, 1) num_threads(n)
    for (i = 0; i < n; i++)
        task(data, i);
    return 0;
}

/* The steps of `way` 0 (own threads) or 1 (executor): the engine's thread that comes first calls the library. */
static void run_with_openmp(job_t *job, int way, treeattn_plan_t *plan)
{
    double sink = 0.0;
    int step, thread;
    for (step = -WARM; step < job->steps; step++) {
        treeattn_decode_args_t args = step_args(job, way, step < 0 ? 0 : step);
        double start;
#pragma omp parallel for schedule(static, 1) num_threads(job->threads) reduction(+ : sink)
        for (thread = 0; thread < job->threads; thread++)
            sink += other_work(thread);
        start = seconds();
        CHECK(treeattn_plan_decode(plan, &args, NULL));
        if (step >= 0)
            job->times[step] = seconds() - start;
    }
    REQUIRE(sink > 0.0, "the other work gave %g", sink);
}

/* A barrier that spins. It gives its core away now and then, so that more threads than cores come through, too. */
typedef struct {
    int size;
    int count, round; /* through the __sync built-ins only */
} spin_t;

static void spin_wait(void *ctx)
{
    spin_t *spin = ctx;
    int round = __sync_fetch_and_add(&spin->round, 0), looks;
    if (__sync_add_and_fetch(&spin->count, 1) == spin->size) {
        __sync_fetch_and_and(&spin->count, 0);
        __sync_fetch_and_add(&spin->round, 1);
        return;
    }
    for (looks = 1; __sync_fetch_and_add(&spin->round, 0) == round; looks++)
        if (looks % 256 == 0)
            sched_yield();
}

/* A thread of the engine that runs every operator with all the others. */
typedef struct {
    job_t *job;
    treeattn_plan_t *plan;
    spin_t *spin;
    int index;
    pthread_t thread;
} member_t;

static void *member_main(void *argument)
{
    member_t *member = argument;
    job_t *job = member->job;
    treeattn_team_t team = TREEATTN_TEAM_INIT;
    double sink = 0.0;
    int step;
    team.index = member->index;
    team.size = job->threads;
    team.barrier = spin_wait;
    team.ctx = member->spin;
    for (step = -WARM; step < job->steps; step++) {
        treeattn_decode_args_t args = step_args(job, 2, step < 0 ? 0 : step);
        double start;
        sink += other_work(member->index);
        spin_wait(member->spin);
        start = seconds();
        CHECK(treeattn_plan_decode_team(member->plan, &args, &team));
        if (member->index == 0 && step >= 0)
            job->times[step] = seconds() - start;
        spin_wait(member->spin); /* the next operator needs the whole output */
    }
    REQUIRE(sink > 0.0, "the other work gave %g", sink);
    return NULL;
}

static void run_with_team(job_t *job, treeattn_plan_t *plan)
{
    spin_t spin = {0, 0, 0};
    member_t members[MOST_THREADS];
    int i;
    spin.size = job->threads;
    for (i = 0; i < job->threads; i++) {
        members[i].job = job;
        members[i].plan = plan;
        members[i].spin = &spin;
        members[i].index = i;
        REQUIRE(pthread_create(&members[i].thread, NULL, member_main, &members[i]) == 0, "thread %d", i);
    }
    for (i = 0; i < job->threads; i++)
        pthread_join(members[i].thread, NULL);
}

static void report(const char *way, job_t *job)
{
    double middle = 1e3 * median(job->times, job->steps);
    printf("%-42s  %10.3f\n", way, middle);
}

static uint16_t *random_halves(size_t count, uint64_t seed)
{
    uint16_t *values = must_alloc(count * sizeof *values);
    size_t i;
    for (i = 0; i < count; i++)
        values[i] = double_to_half(random_unit(&seed));
    return values;
}

/* Compares some rows of what the first way gave with float64. */
static void check(const job_t *job, worst_t *worst)
{
    double q[DIM], k[DIM], v[DIM];
    int step, head, token, d;
    for (step = 0; step < job->steps; step += 13) {
        for (head = 0; head < HEADS; head += 9) {
            size_t at = (size_t)(head / (HEADS / KV_HEADS)) * DIM;
            row_t row;
            row_begin(&row);
            for (d = 0; d < DIM; d++)
                q[d] = half_to_double(job->q[(size_t)step * ROW + (size_t)head * DIM + (size_t)d]);
            for (token = 0; token < job->length; token++) {
                for (d = 0; d < DIM; d++) {
                    k[d] = half_to_double(job->k[(size_t)token * KV_ROW + at + (size_t)d]);
                    v[d] = half_to_double(job->v[(size_t)token * KV_ROW + at + (size_t)d]);
                }
                row_add(&row, q, k, v, DIM, 1.0 / sqrt(DIM));
            }
            row_end(&row, DIM);
            worst_row(worst, &row, job->out[0] + (size_t)step * ROW + (size_t)head * DIM,
                      job->lse[0][step * HEADS + head], DIM);
        }
    }
}

int main(int argc, char **argv)
{
    treeattn_runtime_t *runtime;
    treeattn_comm_t *comm;
    treeattn_plan_t *plan;
    treeattn_executor_t executor = TREEATTN_EXECUTOR_INIT;
    job_t *job = must_alloc(sizeof *job);
    worst_t worst = {0, 0, 0, 0};
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    int way;

    job->threads = cores < 2 ? 2 : cores > MOST_THREADS ? MOST_THREADS : (int)cores;
    job->length = argc > 1 ? atoi(argv[1]) : KEYS;
    job->steps = argc > 2 ? atoi(argv[2]) : STEPS;
    REQUIRE(argc <= 3 && job->length >= 1 && job->length <= KEYS && job->steps >= 1 && job->steps <= STEPS,
            "usage: %s [KEYS, 1 to %d [STEPS, 1 to %d]]", argv[0], KEYS, STEPS);
    job->q = random_halves((size_t)job->steps * ROW, 1);
    job->k = random_halves((size_t)job->length * KV_ROW, 2);
    job->v = random_halves((size_t)job->length * KV_ROW, 3);
    for (way = 0; way < 3; way++) {
        job->out[way] = must_alloc(sizeof(float) * job->steps * ROW);
        job->lse[way] = must_alloc(sizeof(float) * job->steps * HEADS);
    }
    CHECK(treeattn_runtime_create(NULL, &runtime));
    printf("%d steps over %d keys, %d/%d heads of %d, f16, on %d threads\n\n", job->steps, job->length, HEADS, KV_HEADS, DIM,
           job->threads);
    printf("%-42s  %10s\n------------------------------------------  ----------\n", "who computes", "ms a step");

    plan = plan_make(runtime, job, NULL, job->threads, 0, &comm);
    run_with_openmp(job, 0, plan);
    plan_unmake(plan, comm);
    report("threads of the library, beside OpenMP's", job);

    executor.threads = job->threads;
    executor.parallel = parallel;
    plan = plan_make(runtime, job, &executor, 0, 0, &comm);
    run_with_openmp(job, 1, plan);
    plan_unmake(plan, comm);
#ifdef _OPENMP
    report("an executor: OpenMP's threads", job);
#else
    report("an executor (built without OpenMP: serial)", job);
#endif

    /* One thread: of the library's own there is none. */
    plan = plan_make(runtime, job, NULL, 1, job->threads, &comm);
    run_with_team(job, plan);
    plan_unmake(plan, comm);
    report("a team of threads with a spinning barrier", job);

    for (way = 1; way < 3; way++) {
        REQUIRE(memcmp(job->out[way], job->out[0], sizeof(float) * job->steps * ROW) == 0, "way %d has other bits", way);
        REQUIRE(memcmp(job->lse[way], job->lse[0], sizeof(float) * job->steps * HEADS) == 0, "way %d has other bits", way);
    }
    printf("\nAll three gave the same bits.\n");
    check(job, &worst);

    for (way = 0; way < 3; way++) {
        free(job->out[way]);
        free(job->lse[way]);
    }
    free(job->q);
    free(job->k);
    free(job->v);
    free(job);
    CHECK(treeattn_runtime_destroy(runtime));
    return worst_verdict(&worst);
}
