/*
 * A transport over MPI, the part that an engine copies: an allgather over MPI_Iallgather and a sendrecv over MPI_Isend and
 * MPI_Irecv, polled with MPI_Test so that they can give up at their deadline. And who is left when a rank is lost.
 */
#ifndef EXAMPLES_MPI_TRANSPORT_H
#define EXAMPLES_MPI_TRANSPORT_H

#include <limits.h>
#include <sched.h>
#include <string.h>
#include <time.h>

#include <mpi.h>

#include "../common/check.h"
#include "../common/ranks.h"

#define SECOND INT64_C(1000000000)

/* Exits if an MPI call that has nothing to do with lost ranks fails. */
#define MPI(call) REQUIRE((call) == MPI_SUCCESS, "MPI failed")

/* One rank's way to the others. */
typedef struct {
    MPI_Comm comm;
    int rank, world;
    /* MPI cannot cancel a collective. One that was given up still writes here, and not into memory that the library
     * frees: these two are not freed while `pending`. */
    unsigned char *send, *recv;
    size_t send_size, recv_size;
    int pending;
    size_t bytes; /* of the last allgather, to measure the same one without the library */
} transport_t;

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * SECOND + now.tv_nsec;
}

/* Room for `bytes`; 0 if there is none. */
static int reserve(unsigned char **buffer, size_t *size, size_t bytes)
{
    if (*size < bytes) {
        unsigned char *more = realloc(*buffer, bytes);
        if (more == NULL)
            return 0;
        *buffer = more;
        *size = bytes;
    }
    return 1;
}

/* Polls requests until all are done (0), one fails (2), or the time is over or the library says stop (1). */
static int32_t poll_until(MPI_Request *requests, int count, int64_t timeout_ns, const int32_t *abort_word)
{
    int64_t until = now_ns() + timeout_ns;
    int done = 0;
    for (;;) {
        if (MPI_Testall(count, requests, &done, MPI_STATUSES_IGNORE) != MPI_SUCCESS)
            return 2;
        if (done)
            return 0;
        if (*(const volatile int32_t *)abort_word != 0 || now_ns() >= until)
            return 1;
        sched_yield(); /* there may be more ranks than cores */
    }
}

static int32_t allgather(void *ctx, const void *send, void *recv, size_t bytes, int64_t timeout_ns,
                         const int32_t *abort_word)
{
    transport_t *t = ctx;
    size_t all = bytes * (size_t)t->world;
    MPI_Request request;
    int32_t code;
    if (t->pending || bytes > INT_MAX)
        return 3;
    if (!reserve(&t->send, &t->send_size, bytes) || !reserve(&t->recv, &t->recv_size, all))
        return 4;
    t->bytes = bytes;
    memcpy(t->send, send, bytes);
    if (MPI_Iallgather(t->send, (int)bytes, MPI_BYTE, t->recv, (int)bytes, MPI_BYTE, t->comm, &request) != MPI_SUCCESS)
        return 2;
    code = poll_until(&request, 1, timeout_ns, abort_word);
    t->pending = code != 0;
    if (code == 0)
        memcpy(recv, t->recv, all);
    return code;
}

static int32_t sendrecv(void *ctx, const void *send, size_t send_bytes, int32_t to, void *recv, size_t recv_bytes,
                        int32_t from, int64_t timeout_ns, const int32_t *abort_word)
{
    enum { TAG = 1 };
    transport_t *t = ctx;
    /* Where a size is 0 nothing goes that way, and the peer makes no such call. */
    MPI_Request requests[2] = {MPI_REQUEST_NULL, MPI_REQUEST_NULL};
    int32_t code;
    if (t->pending || send_bytes > INT_MAX || recv_bytes > INT_MAX)
        return 3;
    if (!reserve(&t->send, &t->send_size, send_bytes) || !reserve(&t->recv, &t->recv_size, recv_bytes))
        return 4;
    if (send_bytes > 0)
        memcpy(t->send, send, send_bytes);
    if (recv_bytes > 0 && MPI_Irecv(t->recv, (int)recv_bytes, MPI_BYTE, from, TAG, t->comm, &requests[0]) != MPI_SUCCESS)
        return 2;
    t->pending = 1;
    if (send_bytes > 0 && MPI_Isend(t->send, (int)send_bytes, MPI_BYTE, to, TAG, t->comm, &requests[1]) != MPI_SUCCESS)
        return 2;
    code = poll_until(requests, 2, timeout_ns, abort_word);
    t->pending = code != 0;
    if (code == 0 && recv_bytes > 0)
        memcpy(recv, t->recv, recv_bytes);
    return code;
}

/* Takes over `comm`, whose errors come back as codes from now on. */
static transport_t *transport_make(MPI_Comm comm)
{
    transport_t *t = must_alloc(sizeof *t);
    t->comm = comm;
    MPI(MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN));
    MPI(MPI_Comm_rank(comm, &t->rank));
    MPI(MPI_Comm_size(comm, &t->world));
    return t;
}

/* What an operation under way still uses is left alone: MPI gives no way to end it. */
static void transport_free(transport_t *t)
{
    if (t->pending)
        return;
    MPI(MPI_Comm_free(&t->comm));
    free(t->send);
    free(t->recv);
    free(t);
}

/* The ranks of `t` that still answer, as a communicator; ranks ask each other for at most two seconds. Engines know
 * better ways: a scheduler that says who is alive, or MPI's own fault tolerance where it is built in. */
static MPI_Comm survivors(const transport_t *t)
{
    enum { TAG = 2, WAIT_S = 2 };
    static int mine, theirs[MAX_RANKS];
    MPI_Request send[MAX_RANKS], recv[MAX_RANKS];
    int alive[MAX_RANKS], rank, count = 0, waiting = 1, arrived[MAX_RANKS] = {0};
    int64_t until = now_ns() + WAIT_S * SECOND;
    MPI_Group all, left;
    MPI_Comm comm;
    for (rank = 0; rank < t->world; rank++) {
        send[rank] = recv[rank] = MPI_REQUEST_NULL;
        if (rank != t->rank) {
            MPI(MPI_Irecv(&theirs[rank], 1, MPI_INT, rank, TAG, t->comm, &recv[rank]));
            MPI(MPI_Isend(&mine, 1, MPI_INT, rank, TAG, t->comm, &send[rank]));
        }
    }
    while (waiting && now_ns() < until) {
        waiting = 0;
        for (rank = 0; rank < t->world; rank++) {
            if (!arrived[rank])
                MPI_Test(&recv[rank], &arrived[rank], MPI_STATUS_IGNORE);
            waiting |= !arrived[rank];
        }
        sched_yield();
    }
    for (rank = 0; rank < t->world; rank++)
        if (arrived[rank])
            alive[count++] = rank;
    MPI(MPI_Comm_group(t->comm, &all));
    MPI(MPI_Group_incl(all, count, alive, &left));
    MPI(MPI_Comm_create_group(t->comm, left, TAG, &comm)); /* the lost rank takes no part */
    MPI(MPI_Group_free(&all));
    MPI(MPI_Group_free(&left));
    return comm;
}

#endif
