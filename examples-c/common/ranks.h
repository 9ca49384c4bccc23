/* One thread per rank: how an engine drives CPU ranks on NULL streams. */
#ifndef EXAMPLES_RANKS_H
#define EXAMPLES_RANKS_H

#include <pthread.h>
#include <time.h>

#include "check.h"

#define MAX_RANKS 64

typedef struct {
    void (*body)(int rank, void *context);
    void *context;
    int rank;
} rank_thread_t;

static inline void *rank_thread_main(void *argument)
{
    rank_thread_t *thread = argument;
    thread->body(thread->rank, thread->context);
    return NULL;
}

/* Runs body(rank, context) for ranks 0 to world - 1 at the same time and waits for all of them. */
static inline void ranks_run(int world, void (*body)(int rank, void *context), void *context)
{
    pthread_t handles[MAX_RANKS];
    rank_thread_t threads[MAX_RANKS];
    int rank;
    REQUIRE(world >= 1 && world <= MAX_RANKS, "world = %d", world);
    for (rank = 0; rank < world; rank++) {
        threads[rank].body = body;
        threads[rank].context = context;
        threads[rank].rank = rank;
        REQUIRE(pthread_create(&handles[rank], NULL, rank_thread_main, &threads[rank]) == 0, "rank %d", rank);
    }
    for (rank = 0; rank < world; rank++)
        pthread_join(handles[rank], NULL);
}

/* Seconds of a clock that never jumps. */
static inline double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static inline int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The middle of n times; sorts them. */
static inline double median(double *times, int n)
{
    qsort(times, (size_t)n, sizeof *times, compare_doubles);
    return times[n / 2];
}

#endif
