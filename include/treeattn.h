/*
 * libtreeattn: exact decode attention over a KV cache that is sharded along the sequence.
 *
 * SPDX-License-Identifier: MIT OR Apache-2.0
 * Generated from src/ffi; do not edit.
 *
 * WHAT IT DOES
 *
 * An inference engine holds a KV cache that is too large, or too slow to read, for one device, split along the sequence
 * over ranks (CPU workers, GPUs). For each decode step it hands every rank the queries and the rank's own shard of keys
 * and values. Each rank attends its shard, which gives a partial: a normalised output and the log-sum-exp (lse) of its
 * scores. Partials merge by an associative operation, so they merge in a tree, and every rank gets the output that
 * attention over the whole cache would give (Tree Attention, arXiv 2408.04093). This is also known as decode context
 * parallelism. It is not the tree mask of speculative decoding.
 *
 * OBJECTS
 *
 *   treeattn_runtime_t   what a process sets up once
 *   treeattn_comm_t      one rank's end of a communicator; a rank has a device and a shard
 *   treeattn_plan_t      a shape made ready on one rank: allocates everything, serves all layers of that shape
 *   treeattn_stream_t    an in-order queue of steps
 *   treeattn_buffer_t    memory of a device; a convenience, every call takes raw pointers
 *
 * Objects are handles, not addresses. A handle that was destroyed, or is of another type or no handle at all, is
 * TREEATTN_ERROR_BAD_HANDLE and never a crash. Destroying NULL does nothing. Objects may be destroyed in any order: one
 * whose parent is gone begins nothing more (TREEATTN_ERROR_PARENT_DESTROYED), and can still be destroyed; where the runtime
 * is gone, treeattn_stream_synchronize, treeattn_comm_abort and treeattn_comm_status go on serving. The order that never
 * waits for anybody else's step: communicators, plans, streams, runtime.
 *
 * Handles belong to a process: after fork() those of the parent are TREEATTN_ERROR_BAD_HANDLE in the child, at once and in
 * every call, and what they name is not touched. The child may make objects of its own, unless another thread was inside a
 * call of the library when it was forked. dlclose comes after the last object is destroyed.
 *
 * A STEP
 *
 *   treeattn_runtime_t *runtime;
 *   treeattn_comm_t *comms[2];
 *   treeattn_plan_t *plans[2];
 *   treeattn_device_t devices[2] = {TREEATTN_CPU(0), TREEATTN_CPU(0)};
 *   treeattn_attention_desc_t desc = TREEATTN_ATTENTION_DESC_INIT;
 *   treeattn_decode_args_t args = TREEATTN_DECODE_ARGS_INIT;
 *
 *   treeattn_runtime_create(NULL, &runtime);
 *   treeattn_comm_create_local(runtime, 2, devices, NULL, comms);
 *   desc.q_heads = 32; desc.kv_heads = 8; desc.head_dim_qk = desc.head_dim_v = 128;
 *   desc.q_dtype = desc.k_dtype = desc.v_dtype = desc.out_dtype = TREEATTN_DTYPE_F16;
 *   desc.max_batch = desc.max_query_tokens = 1;
 *   desc.max_kv_length = 65536;                              // most tokens of a sequence on one rank
 *   treeattn_plan_create_all(2, comms, &desc, plans);
 *
 *   // then, on a thread of its own for each rank r, once a layer and token:
 *   args.batch = args.query_tokens = 1;
 *   args.q.data = q;        args.q.bytes = q_bytes;          // [token, query head, dim], packed: all strides are zero
 *   args.k.data = k[r];     args.k.bytes = kv_bytes;         // [sequence, token, kv head, dim]: this rank's tokens
 *   args.v.data = v[r];     args.v.bytes = kv_bytes;
 *   args.out.data = out[r]; args.out.bytes = out_bytes;      // [token, query head, dim]: the same bits on every rank
 *   args.kv_length = &length[r];
 *   if (treeattn_plan_decode(plans[r], &args, NULL) != TREEATTN_OK)
 *       fputs(treeattn_last_error_message(), stderr);
 *
 * THREADS
 *
 * Calls on one communicator and its plans are the caller's to serialise; treeattn_comm_abort, treeattn_comm_status and
 * treeattn_last_error_message may come from any thread at any time. All ranks issue the exchanging calls (plan creation,
 * decode, merge) of one communicator in the same order. With a NULL stream a step of a CPU plan runs on the calling
 * thread and waits there for the other ranks, so each local rank needs a thread of its own. With a stream it is only
 * enqueued, so one thread can drive them all: step k on every rank before step k + 1 on any. A plan is in flight on one
 * stream at a time. One CPU stream does not serve two ranks of a communicator at a time, whose steps would wait for each other,
 * nor do two CPU streams serve one rank: such a step is refused, however the ranks of the process came to their communicator.
 * A rank computes on threads of its own, or on the engine's: by its parallel-for (treeattn_executor_t) or as a team of threads
 * that all enter the step (treeattn_plan_decode_team). Then the library starts none to compute.
 * The library's own threads block all signals, and end with the object that they serve. A thread that calls the library
 * needs 256 KiB of stack: a step of a CPU rank takes 32 KiB of it, GPU drivers, NCCL and callbacks what they take.
 *
 * ERRORS
 *
 * Calls return a status; treeattn_last_error_message() names the argument, the value found and the value wanted.
 * Outputs come last. A call that is refused before it begins leaves them as they were. A step that began and failed, and
 * every later step on its communicator, writes NaN to all of them (but for INVALID_DATA and MISMATCH of a step, which are of
 * a sequence: NaN in its rows alone). What the host can see is checked before anything is
 * enqueued. What a step alone sees (lengths, positions, tables) is checked during it, before any address is formed from
 * it: such a sequence gets NaN, the status is TREEATTN_ERROR_INVALID_DATA, everything else is good.
 *
 * Every wait for other ranks has a deadline. One that expires breaks the communicator (TREEATTN_ERROR_TIMEOUT): for all of
 * its ranks at once where they live in one process, or are GPUs that reach each other's memory; over an engine's transport
 * or NCCL for this rank, while the others end by their own deadlines. A broken communicator stays broken; a new one can be
 * made in the same process. A rank that is refused a step leaves its peers waiting for it: correct the call and issue it
 * again within the deadline, or end their wait with treeattn_comm_abort.
 *
 * No call aborts, exits or traps, but where the heap has not even the few KiB left that a call or its message needs: then the
 * process ends. What a plan or a buffer asks for is TREEATTN_ERROR_NO_MEMORY. A defect of the library comes back as TREEATTN_ERROR_INTERNAL (after the usual panic line
 * on stderr: the library installs no panic hook). Every call computes under the usual floating-point settings (round to
 * nearest, no traps, no flush to zero), whatever the caller's are, and leaves those as they were.
 *
 * ENVIRONMENT
 *
 * Read once, when a process makes its first runtime, so that a later setenv neither matters nor races: TREEATTN_CPU_ISA
 * (treeattn_runtime_config_t), TREEATTN_GPU_EXCHANGE (the form of the exchange between GPUs: "memory", "push", "single", or "nccl": over NCCL),
 * VIRTUAL_ENV and PATH (where to look for NCCL), and, for tests, TREEATTN_SYSFS (a folder whose NUMA nodes count in place of
 * those of /sys). What has to differ between objects is a field of a config.
 *
 * POINTERS
 *
 * Each is NULL or valid for what its parameter says. Tensors and index arrays of a step are the caller's, in memory of
 * the plan's device, valid and unchanged until the step is done; structs of arguments are copied at once. NULL and
 * misaligned pointers are refused; that others are good is the caller's word.
 *
 * STRUCTS
 *
 * Every struct starts with struct_size, but for those held by value in others (treeattn_tensor_t,
 * treeattn_placement_t), which never change. Set one up with its TREEATTN_..._INIT macro, in C and in C++: zero is the
 * default of every other field. In C the macro is an initialiser; to assign it afterwards takes a cast:
 * args = (treeattn_decode_args_t)TREEATTN_DECODE_ARGS_INIT. Structs grow at their end: a library that is newer than the
 * header takes the shorter struct; an older one takes the longer, if the fields it does not know are zero, and else
 * refuses it. A struct_size below that of the first version of a struct, such as that of a pointer, is refused. Of a
 * longer struct that the library fills, the fields that it does not know stay as they are.
 *
 * UNITS
 *
 * Durations are int64 nanoseconds, and the names of their fields and parameters end in _ns. Sizes and strides are bytes;
 * lengths and positions are tokens.
 */

#ifndef TREEATTN_H
#define TREEATTN_H

#include <stddef.h>
#include <stdint.h>
#if defined(_WIN32)
#error "libtreeattn supports Linux and other Unix systems"
#endif

/** A device of a kind: TREEATTN_DEVICE(TREEATTN_DEVICE_CUDA, 1). */
#define TREEATTN_DEVICE(kind, ordinal) ((treeattn_device_t)(((int32_t)(kind)) * 65536 + (int32_t)(ordinal)))
/**
 * CPU device n. 0: all processors of the machine, on any node. Where there are several NUMA nodes, 1 and up: a node each
 * (TREEATTN_CPU_NODE), of which treeattn_runtime_device_count counts those that this process may use.
 */
#define TREEATTN_CPU(n) TREEATTN_DEVICE(TREEATTN_DEVICE_CPU, n)
/**
 * The n-th NUMA node. A rank there has its threads on the node's processors, as many as there are over the ranks on it if
 * `threads_per_rank` is 0, and a stream its thread; the memory of a buffer comes from the node as long as it has some. A step
 * with a NULL stream computes a part on the calling thread, wherever that runs: pass a stream of the node, or bind the thread.
 * Since 0.2.
 */
#define TREEATTN_CPU_NODE(n) TREEATTN_CPU(1 + (n))
/** CUDA device n, by the driver's ordinal. */
#define TREEATTN_CUDA(n) TREEATTN_DEVICE(TREEATTN_DEVICE_CUDA, n)

/** The header's version as one number that grows: 10203 is 1.2.3. */
#define TREEATTN_VERSION (TREEATTN_VERSION_MAJOR * 10000 + TREEATTN_VERSION_MINOR * 100 + TREEATTN_VERSION_PATCH)

/*
 * Initial values: struct_size set, everything else 0. In C they are initialisers, in C++ values.
 */
#ifdef __cplusplus
namespace treeattn_detail {
template <typename T>
inline T sized() {
  T value = T();
  value.struct_size = sizeof(T);
  return value;
}
}  // namespace treeattn_detail
#define TREEATTN_INIT_(type) (treeattn_detail::sized<type>())
#else
#define TREEATTN_INIT_(type) { .struct_size = sizeof(type) }
#endif
#define TREEATTN_RUNTIME_CONFIG_INIT TREEATTN_INIT_(treeattn_runtime_config_t)
#define TREEATTN_DEVICE_INFO_INIT TREEATTN_INIT_(treeattn_device_info_t)
#define TREEATTN_COMM_CONFIG_INIT TREEATTN_INIT_(treeattn_comm_config_t)
#define TREEATTN_EXECUTOR_INIT TREEATTN_INIT_(treeattn_executor_t)
#define TREEATTN_COMM_STATUS_INIT TREEATTN_INIT_(treeattn_comm_status_t)
#define TREEATTN_ATTENTION_DESC_INIT TREEATTN_INIT_(treeattn_attention_desc_t)
#define TREEATTN_DECODE_ARGS_INIT TREEATTN_INIT_(treeattn_decode_args_t)
#define TREEATTN_TEAM_INIT TREEATTN_INIT_(treeattn_team_t)
#define TREEATTN_MERGE_ARGS_INIT TREEATTN_INIT_(treeattn_merge_args_t)
#define TREEATTN_PLAN_MEMORY_INIT TREEATTN_INIT_(treeattn_plan_memory_t)
#define TREEATTN_PLAN_STATS_INIT TREEATTN_INIT_(treeattn_plan_stats_t)
#define TREEATTN_TRANSPORT_INIT TREEATTN_INIT_(treeattn_transport_t)
#define TREEATTN_SELFCHECK_CONFIG_INIT TREEATTN_INIT_(treeattn_selfcheck_config_t)
#define TREEATTN_SELFCHECK_REPORT_INIT TREEATTN_INIT_(treeattn_selfcheck_report_t)

/**
 * Flag of `treeattn_attention_desc_t`: keys and values older than the step's own tokens do not change while earlier
 * work of the stream runs, so that a step may read them early.
 */
#define TREEATTN_ATTENTION_KV_STABLE 1

/**
 * Flag of `treeattn_attention_desc_t`: every step that exchanges compares what the ranks passed: the queries bit by bit (by
 * a 64-bit sum), query tokens and their positions, `global_length`, and that the keys of all ranks together are the positions
 * 0 to `global_length` - 1, each once (with explicit placement by their number and the sums of their first three powers).
 * Ranks that do not fit together get TREEATTN_ERROR_MISMATCH, which names argument and sequence, and the rank at which
 * it shows: one that differs from most, or one whose keys begin where others end or do not (with explicit placement none for
 * positions that are held twice or by no rank); the outputs of that sequence are
 * NaN on every rank, the others are good, and the communicator stays usable. Keys at or beyond `global_length` do not fit
 * either, but with TREEATTN_ATTENTION_SURPLUS_KEYS: there those that `query_position` lets a query see have to be held once, too,
 * and the others do not count (with explicit placement none do, since nodes of a tree of drafts may share a position). Such
 * plans need `global_length`, and `kv_start` or `kv_position` where their placement has one, also where they are not causal.
 * Sinks, slopes, mask factors, masks and scales are not compared. Merges of partials and `treeattn_plan_partial` check nothing,
 * and neither do plans that exchange nothing. On CPUs the step returns the error, or the
 * stream does; on GPUs it is told as TREEATTN_ERROR_INVALID_DATA is, by `treeattn_comm_status`, once, and a captured step checks
 * in every replay. Not on GPUs whose steps go over NCCL (TREEATTN_ERROR_UNSUPPORTED). Since 0.2.
 */
#define TREEATTN_ATTENTION_CHECKED 2

/**
 * Flag of `treeattn_attention_desc_t`, with `causal` = 1: sequences may hold keys past `global_length`, such as those of
 * drafts that were rolled back; causality hides them from all queries at positions below it, which are all but those that
 * `query_position` puts elsewhere. Without it such a step is refused on CPUs, where it may be that a rank's lengths are
 * stale, but with explicit placement, whose positions only CHECKED plans hold against `global_length`. Since 0.2.
 */
#define TREEATTN_ATTENTION_SURPLUS_KEYS 4

/**
 * Flag of `treeattn_attention_desc_t`, with CSR pages: each kv head has lists of pages of its own, as where heads select the
 * keys that they attend (with `page_size` = 1: lists of keys). See `page_index_head_stride` of `treeattn_decode_args_t`. Not with
 * TREEATTN_ATTENTION_CHECKED. Since 0.2.
 */
#define TREEATTN_ATTENTION_PAGES_BY_HEAD 8

/** Flag of `treeattn_merge_args_t`: an incoming lse of +inf means an empty partial, as -inf does. */
#define TREEATTN_MERGE_PLUS_INF_IS_EMPTY 1

/** Flag of `treeattn_merge_args_t`: an incoming lse that is NaN means an empty partial, as -inf does. Since 0.2. */
#define TREEATTN_MERGE_NAN_IS_EMPTY 2

/** Version of the header, to compare with `treeattn_version`. */
#define TREEATTN_VERSION_MAJOR 0

/** See `TREEATTN_VERSION_MAJOR`. */
#define TREEATTN_VERSION_MINOR 2

/** See `TREEATTN_VERSION_MAJOR`. */
#define TREEATTN_VERSION_PATCH 0

/**
 * Version of the binary interface, to compare with `treeattn_abi_version`. It grows when something is added;
 * nothing is taken away within one soname.
 */
#define TREEATTN_ABI_VERSION 2

/**
 * Flag of `treeattn_transport_t`: callbacks may also come from the threads of CPU streams, so that steps of this
 * communicator may be enqueued. Without it a step with a stream is refused.
 */
#define TREEATTN_TRANSPORT_STREAM_THREADS 1

/**
 * Flag of `treeattn_executor_t`: the tasks of a call run at the same time, each on a thread of its own, so that they may wait
 * for each other. Without it the library never makes them wait; this version never does. Since 0.2.
 */
#define TREEATTN_EXECUTOR_CONCURRENT 1

/** Memory of a device, a convenience. Made by `treeattn_buffer_alloc`. */
typedef struct treeattn_buffer_t treeattn_buffer_t;

/** One rank's end of a communicator. Made by one of the calls `treeattn_comm_create_*` and `treeattn_comm_wrap_nccl`. */
typedef struct treeattn_comm_t treeattn_comm_t;

/** A shape made ready on one rank. Made by `treeattn_plan_create`. */
typedef struct treeattn_plan_t treeattn_plan_t;

/** A process's use of the library. Made by `treeattn_runtime_create`. */
typedef struct treeattn_runtime_t treeattn_runtime_t;

/** An in-order queue of steps on one device. Made by `treeattn_stream_create`. */
typedef struct treeattn_stream_t treeattn_stream_t;

/** Outcome of a call: `TREEATTN_OK` or a positive `TREEATTN_ERROR_` code. */
typedef int32_t treeattn_status_t;

/** The call did what it says. */
#define TREEATTN_OK 0

/** An argument is outside what the call accepts. */
#define TREEATTN_ERROR_INVALID_ARGUMENT 1

/** A handle is NULL, foreign, destroyed or of another type. */
#define TREEATTN_ERROR_BAD_HANDLE 2

/** The object that this one was made from has been destroyed. Destroying this one still works. */
#define TREEATTN_ERROR_PARENT_DESTROYED 3

/** A valid request for something that this build does not do; the message names the field. */
#define TREEATTN_ERROR_UNSUPPORTED 4

/** A library or device that the request needs is not on this machine. */
#define TREEATTN_ERROR_UNAVAILABLE 5

/**
 * The ranks passed different descriptors to a collective creation; the message names the field and the ranks. Or different
 * inputs to a step of a plan with TREEATTN_ATTENTION_CHECKED; then the communicator stays usable.
 */
#define TREEATTN_ERROR_MISMATCH 6

/** The ranks issued different exchanging calls. The communicator is broken. On CPUs the message tells what they issued. */
#define TREEATTN_ERROR_DESYNC 7

/** A rank did not come before the deadline. The communicator is broken (unless the wait was for a full stream). */
#define TREEATTN_ERROR_TIMEOUT 8

/** A rank was seen to leave. The communicator is broken. */
#define TREEATTN_ERROR_PEER_LOST 9

/** The communicator was aborted. It is broken. */
#define TREEATTN_ERROR_ABORTED 10

/**
 * A length, position or table entry read during the step is out of range. The outputs of that sequence are NaN on
 * every rank, all others are good, and the communicator stays usable.
 */
#define TREEATTN_ERROR_INVALID_DATA 11

/** Host memory could not be had. */
#define TREEATTN_ERROR_NO_MEMORY 12

/** Device memory could not be had. */
#define TREEATTN_ERROR_NO_DEVICE_MEMORY 13

/** The call cannot be made while a stream is being captured; the capture is intact. */
#define TREEATTN_ERROR_CAPTURING 14

/** A CUDA call failed. */
#define TREEATTN_ERROR_CUDA 15

/** The CUDA context is lost; only destroy calls still work on its objects. */
#define TREEATTN_ERROR_CUDA_FATAL 16

/** An asynchronous CUDA error was pending before the call. */
#define TREEATTN_ERROR_CUDA_PRIOR 17

/** An NCCL call failed. */
#define TREEATTN_ERROR_NCCL 18

/** A callback of the engine's transport failed. */
#define TREEATTN_ERROR_TRANSPORT 19

/** The operating system refused something (a thread, a file). */
#define TREEATTN_ERROR_SYSTEM 20

/** A defect of the library, caught before it reached the caller. The process goes on; please report it. */
#define TREEATTN_ERROR_INTERNAL 21

/** The object is in use by another call that must end first. */
#define TREEATTN_ERROR_BUSY 22

/** The engine's executor did not do what it promised. Since 0.2. */
#define TREEATTN_ERROR_EXECUTOR 23

/** What `treeattn_runtime_create` takes. */
typedef struct treeattn_runtime_config_t {
    /** sizeof(treeattn_runtime_config_t). */
    size_t struct_size;
    /**
     * Instruction set of the CPU backend: "scalar", "avx2", "avx512" or "neon". NULL: what the environment variable
     * TREEATTN_CPU_ISA said when the process made its first runtime, else the best that the machine has. A word there that
     * cannot be served is ignored, as `isa` of treeattn_device_info_t then says.
     */
    const char *cpu_isa;
} treeattn_runtime_config_t;

/** What kind of device. */
typedef int32_t treeattn_device_kind_t;

/** The processors of this machine: together the device with ordinal 0, those of NUMA node n that with ordinal 1 + n. */
#define TREEATTN_DEVICE_CPU 0

/** A CUDA GPU, by the driver's ordinal. */
#define TREEATTN_DEVICE_CUDA 1

/** A device: kind * 65536 + ordinal. Make it with `TREEATTN_CPU(n)`, `TREEATTN_CUDA(n)` or `TREEATTN_DEVICE(kind, n)`. */
typedef int32_t treeattn_device_t;

/** What a device is. Filled by `treeattn_runtime_device_info`. */
typedef struct treeattn_device_info_t {
    /** sizeof(treeattn_device_info_t). */
    size_t struct_size;
    /** The device. */
    treeattn_device_t device;
    /** Processor cores that this process may use, or streaming multiprocessors. */
    int32_t units;
    /** Its memory in bytes. */
    uint64_t memory;
    /** Its maker's name for it; cut where it is longer. */
    char name[128];
    /** The instruction set in use, and why where it was asked for; or the compute capability. Cut where it is longer. */
    char isa[256];
} treeattn_device_info_t;

/** How weighty a log line is. */
typedef int32_t treeattn_log_level_t;

/** Something failed. */
#define TREEATTN_LOG_ERROR 1

/** Something works, but not as asked. */
#define TREEATTN_LOG_WARNING 2

/** A choice that the library made. */
#define TREEATTN_LOG_INFO 3

/**
 * Receives log lines. Called from any thread, also the library's own, with a text that is valid during the call; must
 * not call the library, unwind or jump out.
 */
typedef void (*treeattn_log_callback_t)(treeattn_log_level_t level, const char *message, void *user_data);

/**
 * The engine's own parallel-for (OpenMP, a pool): what a CPU rank computes its steps with, instead of threads of the library,
 * which then starts none to compute. Set up with TREEATTN_EXECUTOR_INIT. The bits are those of as many threads of the
 * library's own.
 */
typedef struct treeattn_executor_t {
    /** sizeof(treeattn_executor_t). */
    size_t struct_size;
    /**
     * Passed to `parallel`. Stays valid until the communicator and all its plans are destroyed, and the steps enqueued on
     * them are done.
     */
    void *ctx;
    /** Into how many tasks work is cut, 1 to 1,024: as many as `parallel` runs at a time. */
    int32_t threads;
    /** TREEATTN_EXECUTOR_ flags. */
    uint32_t flags;
    /**
     * Calls `task(data, i)` once for every i from 0 to n - 1, on whatever threads, the calling one among them or not, and
     * returns 0 when all have returned. n is `threads`. Required.
     *
     * Runs on the thread that called the library, inside that call, or on that of a CPU stream; a step takes one call or a few.
     * One call runs at a time for a rank; those of several ranks, which share the function where
     * `treeattn_comm_create_local` made them, may meet and do not wait for each other. It must not call the library, unwind
     * or jump out. The library waits for it as long as it takes: no deadline ends it.
     *
     * Another return value, a task that is left out, runs twice or has a number that was not asked for is
     * TREEATTN_ERROR_EXECUTOR of the step, after the tasks that have begun have ended; the message says which. A task
     * takes 64 KiB of stack, keeps the thread's floating-point settings, does not unwind, and may safely be called too often, or
     * when `parallel` has returned or everything is destroyed: it then does nothing.
     */
    int32_t (*parallel)(void *ctx, int32_t n, void (*task)(void *data, int32_t i), void *data);
} treeattn_executor_t;

/** How a communicator waits and what it may use. The same on every rank. */
typedef struct treeattn_comm_config_t {
    /** sizeof(treeattn_comm_config_t). */
    size_t struct_size;
    /**
     * How long creating the communicator and its plans may wait for the other ranks, in nanoseconds, at most a year.
     * 0: 30 s.
     */
    int64_t setup_timeout_ns;
    /** How long a step may wait for the other ranks, in nanoseconds, at most a year. 0: 10 s. */
    int64_t step_timeout_ns;
    /**
     * Worker threads of a CPU rank, the calling thread among them. 0: the cores of its device over the local ranks on that
     * device, at least 1, or the `threads` of the executor.
     */
    int32_t threads_per_rank;
    /**
     * Ranks of the same group count as one node: TREE merges within a node first, and GPUs reach each other's memory within a
     * node only, with TREE between them by default. This one may differ from rank to rank. 0 over an engine's transport or
     * NCCL: the ranks of a machine are a node. Over NCCL all ranks name a group or none does (MISMATCH).
     */
    int32_t node_group;
    /** Path of the NCCL library to load. NULL: looked for. */
    const char *nccl_path;
    /** `treeattn_comm_create_local` only: the group of each of its n ranks. NULL: `node_group` for all. */
    const int32_t *node_groups;
    /**
     * The engine's threads, to compute the steps of CPU ranks on; read during the call. `threads_per_rank` is then 0 or its
     * `threads`. May differ from rank to rank. NULL: the library's own threads, and on GPUs. Since 0.2.
     */
    const struct treeattn_executor_t *executor;
    /**
     * The most members of a team that runs steps of this rank (`treeattn_plan_decode_team`), at most 1,024. 0: as many as the
     * rank has threads. The scratch of plans grows with it. May differ from rank to rank. 0 on GPUs. Since 0.2.
     */
    int32_t max_team;
    /** Zero; keeps the size a multiple of 8. */
    int32_t reserved;
} treeattn_comm_config_t;

/**
 * The engine's own way to exchange small blobs in host memory (MPI, gloo, sockets): what
 * `treeattn_comm_create_from_transport` takes. Steps of GPUs do not use it.
 *
 * Threads: a callback runs on the thread that called the library, inside that call, and on the threads of CPU streams
 * only with TREEATTN_TRANSPORT_STREAM_THREADS. One callback of a communicator runs at a time; those of two
 * communicators may meet. It may block, must not call the library but for `treeattn_comm_abort` and
 * `treeattn_comm_status`, and must not unwind or jump out.
 *
 * Deadline: `timeout_ns` is what is left of the step's or the setup's time; `*abort` becomes 1 on an abort from any
 * thread, and by the library's own clock once the time is over. A callback returns, with anything but 0, when either
 * has come: it looks at both at least every 100 ms, `*abort` as a volatile or an atomic. So no call outlasts its
 * deadline by more than a second; one that waits for neither holds its caller for as long as it waits.
 *
 * Memory: `send` and `recv` are the library's, of any alignment, and do not overlap; `recv` may hold anything after a
 * callback that failed. Both are gone when it has returned: an operation that cannot be cancelled (an MPI request)
 * needs buffers of its own.
 */
typedef struct treeattn_transport_t {
    /** sizeof(treeattn_transport_t). */
    size_t struct_size;
    /**
     * Passed to every callback. Stays valid until the communicator and all its plans are destroyed, and the steps
     * enqueued on them are done.
     */
    void *ctx;
    /**
     * Gathers `bytes` bytes (1 to 1 MiB, the same on every rank) from every rank into `recv` (world * bytes), in rank
     * order. Returns 0 when done, else anything: the call then fails with TREEATTN_ERROR_TRANSPORT, TIMEOUT or
     * ABORTED, and the communicator is broken on this rank. Required.
     */
    int32_t (*allgather)(void *ctx, const void *send, void *recv, size_t bytes, int64_t timeout_ns, const int32_t *abort);
    /**
     * Sends `send_bytes` bytes to rank `to` and receives `recv_bytes` from rank `from` at once; otherwise as
     * `allgather`. Where one of the sizes is 0 nothing goes that way, and that peer makes no call for it. NULL:
     * TREEATTN_ALGORITHM_TREE and TREEATTN_ALGORITHM_RING, which need it, are TREEATTN_ERROR_UNSUPPORTED.
     */
    int32_t (*sendrecv)(void *ctx,
                        const void *send,
                        size_t send_bytes,
                        int32_t to,
                        void *recv,
                        size_t recv_bytes,
                        int32_t from,
                        int64_t timeout_ns,
                        const int32_t *abort);
    /** TREEATTN_TRANSPORT_ flags. */
    uint32_t flags;
    /** Zero; keeps the size a multiple of 8. */
    uint32_t reserved;
} treeattn_transport_t;

/** The health of a communicator. Filled by `treeattn_comm_status`. */
typedef struct treeattn_comm_status_t {
    /** sizeof(treeattn_comm_status_t). */
    size_t struct_size;
    /** TREEATTN_OK, why the communicator is broken, or TREEATTN_ERROR_INVALID_DATA or TREEATTN_ERROR_MISMATCH of a step. */
    treeattn_status_t code;
    /** The rank that the error is about, -1 if none. */
    int32_t rank;
    /**
     * Steps of all plans of this rank that exchanged, each counted once whatever its algorithm and size: completed on a CPU,
     * enqueued on a GPU. (`steps` of `treeattn_plan_stats_t` counts those of one plan, also without exchange.)
     */
    uint64_t step;
    /**
     * The plan of the last step by its number on the communicator (from 1; see `treeattn_plan_stats_t`), 0 before the
     * first; with INVALID_DATA the plan that met it.
     */
    uint64_t plan;
    /** The first sequence that `rank` found bad data in, or in which ranks do not fit together; -1 if none. */
    int32_t sequence;
    /** 1: no exchange will succeed any more; destroy the communicator and make a new one. */
    int32_t broken;
    /**
     * The message that goes with `code`; empty if there is none, cut where it is longer. With INVALID_DATA every rank is told
     * the argument, the sequence and the rank that met it; the value found and the values wanted only that rank, on a GPU
     * once the step has ended, and not of an entry beyond the first 65,536 of its sequence.
     */
    char message[512];
} treeattn_comm_status_t;

/** Element type of a tensor. 0 is no type: where a field has a default, 0 selects it, elsewhere it is refused. */
typedef int32_t treeattn_dtype_t;

/** IEEE binary32, 4 bytes. */
#define TREEATTN_DTYPE_F32 1

/** IEEE binary16, 2 bytes. */
#define TREEATTN_DTYPE_F16 2

/** bfloat16, 2 bytes. */
#define TREEATTN_DTYPE_BF16 3

/** OCP fp8 with 4 exponent bits of bias 7 and no infinities (e4m3fn), 1 byte: 0x7f and 0xff are NaN. Keys and values. */
#define TREEATTN_DTYPE_F8_E4M3 4

/** OCP fp8 with 5 exponent bits of bias 15, the upper half of an f16, 1 byte: with infinities and NaN. Keys and values. */
#define TREEATTN_DTYPE_F8_E5M2 5

/**
 * ggml blocks of 32 values, 34 bytes: an f16 scale d and 32 int8 q, value d * q. Keys and values.
 *
 * Of all ggml types: blocks run along the head dimension, which is a multiple of 32, one behind the other (last stride: the
 * bytes of a block); addresses and strides are multiples of 2, and blocks need no more alignment than that. Bytes and values
 * are ggml's own: integers are little-endian, products are exact in f32, and a sum with a minimum is rounded to f32 once. Of
 * 4 bits, byte i holds value i in its low half and value i + 16 in its high half.
 */
#define TREEATTN_DTYPE_Q8_0 6

/** ggml blocks of 32 values, 18 bytes: an f16 scale d and 32 times 4 bits q, value d * (q - 8). Keys and values. */
#define TREEATTN_DTYPE_Q4_0 7

/**
 * int8, 1 byte. Keys and values; the values are those of `k_scale` and `v_scale` times these whole numbers, and a step without
 * these scales is refused. Since 0.2.
 */
#define TREEATTN_DTYPE_INT8 8

/** ggml blocks of 32 values, 20 bytes: f16 d, f16 m and 32 times 4 bits q, value d * q + m. Keys and values. Since 0.2. */
#define TREEATTN_DTYPE_Q4_1 9

/**
 * ggml blocks of 32 values, 22 bytes: f16 d, 32 times the fifth bit, 32 times 4 bits, value d * (q - 16). Keys and values.
 * Since 0.2.
 */
#define TREEATTN_DTYPE_Q5_0 10

/**
 * ggml blocks of 32 values, 24 bytes: f16 d, f16 m, 32 times the fifth bit, 32 times 4 bits, value d * q + m. Keys and values.
 * Since 0.2.
 */
#define TREEATTN_DTYPE_Q5_1 11

/**
 * ggml blocks of 32 values, 18 bytes: f16 d and 32 times 4 bits q, value `d * t[q]` with ggml's table t of 16 whole numbers.
 * Keys and values. Since 0.2.
 */
#define TREEATTN_DTYPE_IQ4_NL 12

/** How keys and values are laid out in memory. */
typedef int32_t treeattn_kv_layout_t;

/** Tensors [sequence, token, kv head, dim] with any byte strides. The default. */
#define TREEATTN_KV_LAYOUT_STRIDED 0

/** Pages [page, slot, kv head, dim] named by a table int32 [batch, max_pages], as in vLLM. */
#define TREEATTN_KV_LAYOUT_BLOCK_TABLE 1

/** Pages [page, slot, kv head, dim] named by compressed rows (indptr, indices, last_page_len), as in FlashInfer. */
#define TREEATTN_KV_LAYOUT_CSR_PAGES 2

/** Which rank holds which token. */
typedef int32_t treeattn_placement_kind_t;

/** Each rank holds one run of consecutive tokens; where it begins comes with each step (`kv_start`). The default. */
#define TREEATTN_PLACEMENT_CONTIGUOUS 0

/** Runs of `interleave` tokens go to the ranks in turn; 1 is round robin. */
#define TREEATTN_PLACEMENT_INTERLEAVED 1

/** Every local slot carries its own global position (`kv_position`). */
#define TREEATTN_PLACEMENT_EXPLICIT 2

/** Which rank holds which token. Frozen: no struct_size. */
typedef struct treeattn_placement_t {
    /** The kind. */
    treeattn_placement_kind_t kind;
    /** Tokens a run with TREEATTN_PLACEMENT_INTERLEAVED, at least 1; else 0. */
    int32_t interleave;
} treeattn_placement_t;

/** What an additional mask holds. */
typedef int32_t treeattn_mask_kind_t;

/** No mask. The default. */
#define TREEATTN_MASK_NONE 0

/** Added to the scaled scores; -inf hides. */
#define TREEATTN_MASK_ADDITIVE 1

/** Bytes; non-zero is visible. */
#define TREEATTN_MASK_BOOLEAN 2

/** What each rank passes as q. */
typedef int32_t treeattn_query_input_t;

/** All heads on every rank. The default. */
#define TREEATTN_QUERY_INPUT_REPLICATED 0

/**
 * Each rank its own heads (see `treeattn_head_range`), as a tensor-parallel projection leaves them: a step begins with an exchange
 * that brings every rank those of all heads, a rank without keys or heads included, under the step's deadline. The outputs have
 * the bits that they have with all heads on every rank. Not with TREEATTN_OUTPUT_LOCAL, nor on GPUs with
 * TREEATTN_ALGORITHM_ALLREDUCE3 or over several nodes. `treeattn_plan_partial`, which exchanges nothing, takes all heads.
 * Since 0.2.
 */
#define TREEATTN_QUERY_INPUT_SCATTERED 1

/** Who gets the merged output. */
typedef int32_t treeattn_output_t;

/** Every rank, all heads, the same bits. The default. */
#define TREEATTN_OUTPUT_REPLICATED 0

/** Each rank, its own heads only (see `treeattn_head_range`): for a tensor-parallel output projection. */
#define TREEATTN_OUTPUT_SCATTERED 1

/** No exchange: each rank gets the output over its own shard. */
#define TREEATTN_OUTPUT_LOCAL 2

/**
 * Each rank, its own part of every row, all heads: its shard's output times exp(own lse - merged lse). The parts of all ranks add
 * up to the output, as they do in an engine's all-reduce after the output projection; the lse is the merged one, the same bits on
 * every rank. Between ranks travel 8 bytes a row and head, whatever `wire_dtype`. With TREEATTN_ALGORITHM_AUTO or
 * TREEATTN_ALGORITHM_ONE_SHOT; on CPUs, and on GPUs that write into each other's memory. Since 0.2.
 */
#define TREEATTN_OUTPUT_WEIGHTED 3

/** How partials meet. All are exact. */
typedef int32_t treeattn_algorithm_t;

/** The library chooses; `treeattn_plan_stats` says which and why. The default. */
#define TREEATTN_ALGORITHM_AUTO 0

/**
 * Every rank sends its partial to every rank, each merges all, in one step. GPUs that cannot reach each other's memory do so
 * by one allgather of NCCL, which takes each GPU once; once a step has failed, graphs that were captured from it must not be
 * replayed.
 */
#define TREEATTN_ALGORITHM_ONE_SHOT 1

/** Each rank merges its own heads of all partials, then sends the merged heads to all. */
#define TREEATTN_ALGORITHM_TWO_SHOT 2

/**
 * A tree over nodes (see `node_group`): within each node first, then between them, then back. On CPUs between nodes by recursive
 * doubling; needs the transport's `sendrecv`. On GPUs through the memory of a node's GPUs first, then by one allgather of NCCL
 * among ranks of different nodes, whose GPUs differ, too; of one node there is none. There what ONE_SHOT says of failed steps
 * holds, too.
 */
#define TREEATTN_ALGORITHM_TREE 3

/**
 * The paper's three reductions (a maximum, two sums): a baseline. GPUs make them over NCCL, which takes each GPU once; once
 * a step has failed, graphs that were captured from it must not be replayed.
 */
#define TREEATTN_ALGORITHM_ALLREDUCE3 4

/** Keys and values are passed from rank to rank: a baseline. Needs the transport's `sendrecv`. */
#define TREEATTN_ALGORITHM_RING 5

/** Which bits are promised to be the same. */
typedef int32_t treeattn_reproducibility_t;

/** Same plan, same inputs: same bits, every run, on every rank. The default. */
#define TREEATTN_REPRODUCIBILITY_REPEATABLE 0

/** A row's bits do not depend on its neighbours in the batch. No plan serves it yet: TREEATTN_ERROR_UNSUPPORTED. */
#define TREEATTN_REPRODUCIBILITY_BATCH_INVARIANT 1

/** The same bits for any number of ranks. No plan serves it yet: TREEATTN_ERROR_UNSUPPORTED. */
#define TREEATTN_REPRODUCIBILITY_CANONICAL 2

/**
 * An attention shape: what stays the same from step to step, and is the same on every rank.
 *
 * `kv_heads` = 0 describes a merge-only plan: the engine makes the partials, and only `q_heads`, `head_dim_v`,
 * `max_query_tokens`, `out_dtype`, `wire_dtype`, `output` and `algorithm` count. A field whose capability this build
 * lacks is TREEATTN_ERROR_UNSUPPORTED, by name.
 *
 * The score of a query at global position i and a key at j, of query head h, is
 *
 * `s = cap(scale * q.k) - slope[h] * |i - j| + factor[h] * mask[i][j]`, where `cap(x) = softcap * tanh(x / softcap)`,
 *
 * and the output is the mean of the values under the softmax of the scores of the keys that the query sees, with `exp(sink[h])`
 * in its denominator. Terms that are off drop out, the others may be combined; this is also the order of ggml (whose ALiBi is
 * `factor[h] * mask`) and of FlashAttention. A key that `causal`, `window`, or a mask of -inf or boolean 0 hides has no influence
 * on the row, whatever it holds. Scores times log2 e have to be within float32: one above makes its row NaN, one below weighs
 * nothing. "Accuracy" in README.md has the error that no output exceeds.
 */
typedef struct treeattn_attention_desc_t {
    /** sizeof(treeattn_attention_desc_t). */
    size_t struct_size;
    /** Query heads, at least 1. */
    int32_t q_heads;
    /** Key and value heads, a divisor of `q_heads`. 0: a merge-only plan. */
    int32_t kv_heads;
    /** Dimension of q and k, 1 to 1024. */
    int32_t head_dim_qk;
    /** Dimension of v and of the output, 1 to 1024. May differ from `head_dim_qk`. */
    int32_t head_dim_v;
    /** Element type of q: f32, f16 or bf16. */
    treeattn_dtype_t q_dtype;
    /** Element type of k. */
    treeattn_dtype_t k_dtype;
    /** Element type of v. */
    treeattn_dtype_t v_dtype;
    /** Element type of the output: f32, f16 or bf16. */
    treeattn_dtype_t out_dtype;
    /** Layout of k and v. */
    treeattn_kv_layout_t kv_layout;
    /** Tokens a page, at least 1; 0 for the strided layout. */
    int32_t page_size;
    /** Which rank holds which token. */
    struct treeattn_placement_t placement;
    /** Most sequences in a step, at least 1. */
    int32_t max_batch;
    /** Most query tokens in a step, all sequences together, at least 1. */
    int32_t max_query_tokens;
    /**
     * Most tokens of one sequence on one rank, at least 1. Costs no memory but with TREEATTN_ALGORITHM_RING, whose blocks it
     * sizes.
     */
    int32_t max_kv_length;
    /** Multiplies q.k; 0: 1/sqrt(head_dim_qk). */
    float scale;
    /**
     * 1: a query does not see keys at later global positions. Its own token is a key like the others: put it into the
     * cache first.
     */
    int32_t causal;
    /**
     * A query at global position p sees no key before p - window + 1: with `causal` = 1 the last `window` keys up to its
     * own, its own token among them, whatever ranks hold them. With `causal` = 0 it sees all later keys, too. 0: no window.
     * Keys outside the windows of all query tokens of a sequence are not read, but for explicit positions on GPUs. At least 0.
     */
    int32_t window;
    /** Scores become softcap * tanh(score / softcap), after `scale`. 0: off. Finite, at least 0. */
    float softcap;
    /** 1: the slope of the query head (`alibi_slopes`) times the distance of the global positions is subtracted. */
    int32_t alibi;
    /**
     * 1: a sink for each query head joins the softmax of every row, once and not per rank (`sinks` of
     * `treeattn_decode_args_t`): lse = log(exp(sink) + sum_j exp(s_j)), and the outputs shrink accordingly. A row that sees no
     * key is 0 with lse = sink; rows of no sequence stay 0 with lse -inf. The partial of rank 0 holds the sinks, also with
     * TREEATTN_OUTPUT_LOCAL and from `treeattn_plan_partial`, so that merging all partials counts them once.
     */
    int32_t sinks;
    /** A mask of the step (`mask` of `treeattn_decode_args_t`), beside `causal` and `window`: a key is seen where all agree. */
    treeattn_mask_kind_t mask;
    /** Element type of an additive mask: f16 or f32; 0 with none and with a boolean one. */
    treeattn_dtype_t mask_dtype;
    /** What each rank passes as q. */
    treeattn_query_input_t query_input;
    /** Who gets the merged output. */
    treeattn_output_t output;
    /** How partials meet. */
    treeattn_algorithm_t algorithm;
    /** Which bits are promised to be the same. */
    treeattn_reproducibility_t reproducibility;
    /**
     * Element type of partial outputs on their way between ranks: f32, f16 or bf16. 0: f32. Finite values
     * beyond its range travel as its largest number. The lse always travels as f32, two of them but with ALLREDUCE3 on GPUs.
     */
    treeattn_dtype_t wire_dtype;
    /** TREEATTN_ATTENTION_ flags. */
    uint32_t flags;
    /** Zero; keeps the size a multiple of 8. */
    uint32_t reserved;
} treeattn_attention_desc_t;

/**
 * A caller's buffer with byte strides; what the dimensions are is said where the tensor is used. Frozen: no
 * struct_size.
 *
 * All strides zero means packed, row-major; how many tokens a packed cache has room for is said at `kv_capacity` of
 * `treeattn_decode_args_t`. Otherwise every stride is taken as it is, so that a zero broadcasts (inputs only, and not the
 * elements of a row of keys or values). The library touches nothing outside `bytes` bytes from `data`.
 */
typedef struct treeattn_tensor_t {
    /** First element, on the plan's device. Aligned to the element (to 4 bytes at most). */
    void *data;
    /** Bytes from `data` that the library may touch. */
    uint64_t bytes;
    /**
     * Byte strides, outermost dimension first, each at least 0 and a multiple of the element's size; those past the last
     * dimension are ignored.
     */
    int64_t stride[4];
} treeattn_tensor_t;

/**
 * The arguments of one decode step on one rank. Pointers are to memory of the plan's device.
 *
 * Lengths, starts, positions and tables are read while the step runs, and checked there before any address is formed
 * from them: what is out of range gives NaN for that sequence and TREEATTN_ERROR_INVALID_DATA. Rows that see no key, and
 * rows from `query_start[batch]` on, are valid padding: out 0, lse -inf. A position, start or `global_length` on which nothing
 * depends may be anything. Of a `query_start` that does not ascend the first bad sequence is named; sequences behind it that begin
 * before all that came are bad, too, and a row that two of them claim belongs to the first.
 *
 * An argument that the layout or the placement has no use for (a block table with a strided cache, `kv_start` with
 * interleaved placement) is TREEATTN_ERROR_INVALID_ARGUMENT. On CPUs, whose memory the call can read, so is what cannot be
 * meant: `k.bytes` too small for the lengths, `max_pages` or `num_pages` 0; `query_start[0]` other than 0; of a sequence with
 * queries and a `global_length` also kv_start + length above it and, with interleaved placement, a length other than what
 * the rank holds of it (for `treeattn_plan_partial` and `treeattn_energy`: more than that); of plans that are CHECKED the
 * ranks find the latter together, as MISMATCH. What lies in a GPU's memory the
 * call cannot read: there the former are INVALID_DATA of the step, but for `query_start[0]` (rows before it get 0 and an lse of
 * -inf), and the latter are looked at only by steps of plans that are CHECKED.
 */
typedef struct treeattn_decode_args_t {
    /** sizeof(treeattn_decode_args_t). */
    size_t struct_size;
    /** Sequences in this step, 0 to `max_batch`. */
    int32_t batch;
    /** Query tokens of all sequences together, 0 to `max_query_tokens`: an upper bound of `query_start[batch]`. */
    int32_t query_tokens;
    /**
     * Queries [token, query head, dim]; with TREEATTN_QUERY_INPUT_SCATTERED the rank's own heads only, but for
     * `treeattn_plan_partial`.
     */
    struct treeattn_tensor_t q;
    /**
     * Keys [sequence, token, kv head, dim], or [page, slot, kv head, dim]. Packed (all strides 0) and strided, the tokens of a
     * sequence are as many as `kv_capacity` says. `bytes` may end where the tokens of the last sequence do. Last
     * stride 0 with dim above 1 is refused.
     */
    struct treeattn_tensor_t k;
    /** Values, as the keys. May be a view of the keys. */
    struct treeattn_tensor_t v;
    /**
     * Output [token, query head, dim]; with a scattered output the rank's own heads only. Its `bytes` bytes, gaps between rows
     * included, overlap those of no input and not those of `lse`. No two elements share a byte: each dimension steps over the
     * whole of those with smaller strides.
     */
    struct treeattn_tensor_t out;
    /** Natural log-sum-exp of the scaled scores, f32 [token, query head], heads as `out`. data NULL: not wanted. */
    struct treeattn_tensor_t lse;
    /**
     * `int32 [batch + 1]`: first query token of each sequence, ascending from 0. NULL: query_tokens / batch each, which then
     * leaves no remainder.
     */
    const int32_t *query_start;
    /**
     * `int32 [batch]`: tokens of each sequence on this rank, 0 to `max_kv_length`. NULL only for CSR pages, which take exactly
     * one of `kv_length` and `last_page_len`.
     */
    const int32_t *kv_length;
    /**
     * `int32 [batch]`: tokens of each sequence on all ranks together, this step's query tokens included. Required where
     * global positions matter (causal, window, ALiBi) and `query_position` is NULL; elsewhere welcome, since the lengths of
     * this rank are held against it. Keys past it: see TREEATTN_ATTENTION_SURPLUS_KEYS.
     */
    const int32_t *global_length;
    /** `int32 [batch]`, contiguous placement: global position of local slot 0. NULL: 0, with one rank. */
    const int32_t *kv_start;
    /** int32, explicit placement: global position of each local slot; row b begins at element b * kv_position_stride. */
    const int32_t *kv_position;
    /** Elements between the rows of `kv_position`. 0: `max_kv_length`. */
    int64_t kv_position_stride;
    /** `int32 [query_tokens]`: global position of each query token. NULL: the last of the sequence, in order. */
    const int32_t *query_position;
    /** `int32 [batch, max_pages]`, block table layout: the pages of each sequence. Entries past its length are unused. */
    const int32_t *block_table;
    /** Entries of a row of `block_table`. */
    int32_t max_pages;
    /** Pages that exist in k and v. */
    int32_t num_pages;
    /** `int32 [batch + 1]`, CSR pages: first entry of each sequence in `page_indices`. */
    const int32_t *page_indptr;
    /** `int32 [num_page_indices]`, CSR pages: the pages, sequence after sequence. */
    const int32_t *page_indices;
    /** Entries of `page_indices`. */
    int64_t num_page_indices;
    /** `int32 [batch]`, CSR pages: tokens in each sequence's last page, 1 to page_size, instead of `kv_length`. */
    const int32_t *last_page_len;
    /**
     * Scales of keys, f32 [sequence or page, token or slot, kv head], of any `k_dtype`: key = scale * what k holds. Strides are
     * taken as they are, any may be 0: {0, 0, 0} is one scale for all, {0, 0, 4} one a kv head. `bytes` may end where the
     * last sequence does, as those of k; nothing past a length is read. A scale that is no finite number makes NaN of what
     * sees it. Products of queries with what k holds have to be within f32. Each rank has its own. data NULL: 1, but with
     * TREEATTN_DTYPE_INT8, whose keys need scales, TREEATTN_ERROR_INVALID_ARGUMENT.
     */
    struct treeattn_tensor_t k_scale;
    /** Scales of values, as `k_scale`: value = scale * what v holds. */
    struct treeattn_tensor_t v_scale;
    /** `f32 [query head]`: the slopes of `alibi`, at any stride. Required with `alibi` = 1, the same on every rank; NULL without. */
    struct treeattn_tensor_t alibi_slopes;
    /**
     * `f32 [query head]`: logits that join the softmax, not scaled. Required where the plan has sinks. The same on every rank.
     * -inf is none. NaN and +inf make their rows NaN. NULL without sinks.
     */
    struct treeattn_tensor_t sinks;
    /**
     * Mask [sequence, query head, query token of the sequence, local slot] of `mask_dtype`, or bytes of a boolean one.
     * Strides are taken as they are, 0 broadcasts; all four 0 is refused. Slots are those of this rank: the element for the
     * key in its slot s of sequence b, whatever pages it lies in. Additive: added to the score; -inf hides, whatever the
     * factor; NaN makes the rows NaN that would see the key. Boolean: 0 hides, all else is visible. `bytes` covers what the
     * lengths and query tokens of the step reach; elements past a length are not read, so that rows may be padded. On
     * CPUs tiles of 64 keys that are hidden from all rows are not read; on GPUs a mask that does not reach so far is
     * TREEATTN_ERROR_INVALID_DATA of the sequence. data NULL: no sequence with queries has keys here.
     */
    struct treeattn_tensor_t mask;
    /**
     * Tokens that a packed strided k or v (all strides 0) has room for in each sequence: it is [batch, kv_capacity, kv head,
     * dim]. May be 0 for one sequence, and where `bytes` is just the size of [batch or `max_batch`, `max_kv_length`, kv head,
     * dim] or, with batch = `max_batch`, of fewer tokens. 0 where k and v have strides, and in other layouts. Since 0.2.
     */
    int32_t kv_capacity;
    /** Zero; keeps the size a multiple of 8. */
    int32_t reserved;
    /**
     * `f32 [query head]`, additive masks: what their values are multiplied by, as the slopes of ggml's ALiBi. data NULL: 1. The
     * same on every rank. Since 0.2.
     */
    struct treeattn_tensor_t mask_factor;
    /**
     * With TREEATTN_ATTENTION_PAGES_BY_HEAD, elements between the lists of kv heads in `page_indices`: kv head h reads the page of
     * slot s of sequence b from entry `page_indptr[b] + h * page_index_head_stride + s / page_size`. All heads of a sequence have
     * the same number of tokens; a mask takes out what a head lacks. 0: they share their lists. `num_page_indices` counts the
     * entries of all heads. Entries past a list are not read. Since 0.2.
     */
    int64_t page_index_head_stride;
    /**
     * With TREEATTN_ATTENTION_PAGES_BY_HEAD and explicit placement, elements between the rows of kv heads in `kv_position`: that of
     * kv head h of sequence b begins at element b * kv_position_stride + h * kv_position_head_stride. 0: they share them. Since
     * 0.2.
     */
    int64_t kv_position_head_stride;
} treeattn_decode_args_t;

/** One thread of an engine's team, of which every thread enters `treeattn_plan_decode_team`. Set up with TREEATTN_TEAM_INIT. */
typedef struct treeattn_team_t {
    /** sizeof(treeattn_team_t). */
    size_t struct_size;
    /** Which member this thread is, 0 to size - 1, each once. */
    int32_t index;
    /**
     * Members of the team in this step, the same for all, 1 to the `max_team` of the communicator. May differ from step to step,
     * once the step before has returned on all of its members.
     */
    int32_t size;
    /**
     * The team's barrier: returns when every member has called it as often as this one. Called only when all members have come,
     * by each of them equally often. Only how members wait: what they wait for the library sees itself. It must not call the
     * library, unwind or jump out. One function for all members; NULL, for all: they spin for at most 20 us, then sleep.
     */
    void (*barrier)(void *ctx);
    /** Passed to `barrier`; each member has its own. */
    void *ctx;
} treeattn_team_t;

/**
 * Partials to merge and where the result goes.
 *
 * For `treeattn_merge_partials` o is [partial, token, head, dim] and lse [partial, token, head]; for
 * `treeattn_plan_merge` each rank passes its own partial, o [token, head, dim] and lse [token, head].
 */
typedef struct treeattn_merge_args_t {
    /** sizeof(treeattn_merge_args_t). */
    size_t struct_size;
    /** Query tokens. */
    int32_t query_tokens;
    /** Heads of the partials. 0: the plan's `q_heads`. */
    int32_t heads;
    /** Elements of a row. 0: the plan's `head_dim_v`. */
    int32_t head_dim;
    /** Element type of `o`: f32, f16 or bf16. */
    treeattn_dtype_t o_dtype;
    /** Element type of `out`. 0: the plan's `out_dtype`; for `treeattn_merge_partials` that of `o`. */
    treeattn_dtype_t out_dtype;
    /** Base of the incoming lse: 0 for e, or 2. */
    int32_t lse_base;
    /** TREEATTN_MERGE_ flags. */
    uint32_t flags;
    /** Base of the outgoing lse: 0 for e, or 2. Since 0.2; zero before. */
    int32_t out_lse_base;
    /**
     * Outputs of the partials, normalised unless there is a `sum`. A row that is empty (its lse is -inf, or what a flag or
     * `kv_length` says) is never read.
     */
    struct treeattn_tensor_t o;
    /**
     * Log-sum-exps of the partials, f32, at any strides. NaN makes its row NaN, and so does +inf, unless
     * TREEATTN_MERGE_NAN_IS_EMPTY or TREEATTN_MERGE_PLUS_INF_IS_EMPTY says that such a partial is empty.
     */
    struct treeattn_tensor_t lse;
    /**
     * Merged output [token, head, dim]; with a scattered plan the rank's own heads. Its `bytes` bytes overlap those of no other
     * tensor.
     */
    struct treeattn_tensor_t out;
    /** Merged log-sum-exp to the base `out_lse_base`, f32 [token, head]. data NULL: not wanted. */
    struct treeattn_tensor_t out_lse;
    /**
     * For partials of the form (max, sum), f32 as `lse`: o is then sum_j exp(s_j - m) v_j, `lse` holds m (to the base `lse_base`; it
     * need not be the maximum) and this sum_j exp(s_j - m). Pairs side by side are two tensors of the same strides. An m of -inf
     * or a sum of 0 is an empty partial, whose o is not read. data NULL: `lse` holds log-sum-exps. Since 0.2.
     */
    struct treeattn_tensor_t sum;
    /**
     * `int32 [batch + 1]`, on the device, read during the step: first token of each sequence, ascending from 0 (else, on CPUs,
     * TREEATTN_ERROR_INVALID_ARGUMENT; on GPUs rows then count to the last sequence that begins at or before them). Rows of tokens from
     * `query_start[batch]` on are padding: empty, whatever `lse` and o hold. NULL: with `kv_length` query_tokens / batch each,
     * which then leaves no remainder. Since 0.2.
     */
    const int32_t *query_start;
    /**
     * `int32 [batch]`, on the device, read during the step: keys of each sequence on this rank. Rows of sequences with 0 or less are
     * empty, whatever `lse` and o hold. NULL: nothing is known of keys. Since 0.2.
     */
    const int32_t *kv_length;
    /** Sequences that `query_start` and `kv_length` tell of; 0 without both. Since 0.2. */
    int32_t batch;
    /** Zero; keeps the size a multiple of 8. */
    int32_t reserved;
} treeattn_merge_args_t;

/**
 * Memory that a plan holds, in bytes. None of it depends on the length of the cache, but for the blocks of
 * TREEATTN_ALGORITHM_RING. Filled by `treeattn_plan_memory`.
 */
typedef struct treeattn_plan_memory_t {
    /** sizeof(treeattn_plan_memory_t). */
    size_t struct_size;
    /** Scratch of the backend and this rank's partials. */
    uint64_t workspace;
    /** This rank's window, shared by all plans of the communicator. */
    uint64_t window;
} treeattn_plan_memory_t;

/** What a plan has done so far. Filled by `treeattn_plan_stats`. */
typedef struct treeattn_plan_stats_t {
    /** sizeof(treeattn_plan_stats_t). */
    size_t struct_size;
    /** The number of this plan on its communicator, from 1. */
    uint64_t plan;
    /** Calls of decode, partial and merge on this plan that ran, or were enqueued on a GPU. */
    uint64_t steps;
    /**
     * What their exchanges took: rounds among all ranks, levels of the tree, hops of the ring. A step that is larger than
     * the window takes several.
     */
    uint64_t rounds;
    /** Messages sent to peers. */
    uint64_t messages;
    /**
     * Bytes of partials, queries, keys and values sent to peers, each peer counted; headers are not. A peer of the same process
     * that reads a part of what lies in shared memory was sent that part.
     */
    uint64_t bytes_sent;
    /** The most bytes held at once, workspace and window. */
    uint64_t peak_memory;
    /** The exchange algorithm in use. */
    treeattn_algorithm_t algorithm;
    /** Element type of partial outputs between ranks. */
    treeattn_dtype_t wire_dtype;
    /** First head of this rank's merged output. */
    int32_t head_begin;
    /** One past its last head. */
    int32_t head_end;
    /** Why the algorithm was chosen; cut where it is longer. */
    char reason[256];
    /**
     * Of `peak_memory`, the bytes that the exchange works on: this rank's partial and those that it receives or, with
     * TREEATTN_ALGORITHM_RING, blocks of keys and values, with room for their scales and masks, and the partials of
     * some. Windows are not among them.
     */
    uint64_t exchange_memory;
} treeattn_plan_stats_t;

/** The sizes of a self-check. 0 is the default of every field. */
typedef struct treeattn_selfcheck_config_t {
    /** sizeof(treeattn_selfcheck_config_t). */
    size_t struct_size;
    /** Local ranks that the sequences are sharded over. 0: 2 on a CPU, 1 on a GPU. */
    int32_t ranks;
    /**
     * Sequences, at most the descriptor's `max_batch`. The first has `kv_length` keys, the others random lengths up to
     * that. 0: 2 where the descriptor has room.
     */
    int32_t batch;
    /** Query tokens of each sequence; batch * query_tokens is at most the descriptor's `max_query_tokens`. 0: 1. */
    int32_t query_tokens;
    /**
     * Keys of the first sequence on all ranks together; each rank's part is at most the descriptor's `max_kv_length`.
     * 0: 300, or `max_kv_length` where that is less.
     */
    int32_t kv_length;
    /** Seed of the random inputs. */
    uint64_t seed;
    /**
     * Where each rank lives, `[ranks]`, `ranks` not 0: CPUs only or GPUs only, one of them several times where several ranks
     * live on it. NULL: all on the `device` of the call. Read during the call only. Since 0.2.
     */
    const treeattn_device_t *devices;
} treeattn_selfcheck_config_t;

/** What a self-check found. Filled by `treeattn_selfcheck`. */
typedef struct treeattn_selfcheck_report_t {
    /** sizeof(treeattn_selfcheck_report_t). */
    size_t struct_size;
    /** 1: every output is within its bounds and all bits repeat. */
    int32_t passed;
    /** 1: a second run gave the same bits, and all ranks hold the same where all hold the whole output. */
    int32_t same_bits;
    /** Output rows (query token x head, of every rank) compared. */
    uint64_t rows;
    /** The largest error of an output element over the usual one ("Accuracy" in README.md); at most 3 in a check that passes. */
    double max_error_ratio;
    /** The same for the log-sum-exps. */
    double max_lse_error_ratio;
    /** Share of the outputs that are the float64 answer correctly rounded; 1 for f32 outputs, where it is not asked. */
    double correctly_rounded;
    /** Root of the summed squared errors over that of the summed squared outputs. */
    double relative_l2;
    /** The first thing found wrong, or a line that says what passed; cut where it is longer. */
    char message[256];
} treeattn_selfcheck_report_t;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/* Version and error text ------------------------------------------------------------------------------------------- */

/**
 * The version of the library that is loaded, for example "0.2.0".
 *
 * @return a text that is never freed; never NULL.
 *
 * Ownership: the library's. Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
 */
const char *treeattn_version(void);

/**
 * The version of the binary interface of the library that is loaded.
 *
 * A program made with a header whose TREEATTN_ABI_VERSION is higher than this uses calls or fields that the library
 * may not have.
 *
 * @return the number, at least 1.
 *
 * Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
 */
int32_t treeattn_abi_version(void);

/**
 * The name of a status code, for example "TIMEOUT" for TREEATTN_ERROR_TIMEOUT.
 *
 * @param status any value.
 * @return a text that is never freed; "UNKNOWN" for a value that is no code of this version; never NULL.
 *
 * Ownership: the library's. Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
 */
const char *treeattn_status_string(treeattn_status_t status);

/**
 * Why the calling thread's last failing call failed: the call, the argument, the value found and the value wanted.
 *
 * Calls that succeed leave it as it is. Errors of enqueued work are told by `treeattn_stream_synchronize` and
 * `treeattn_comm_status`.
 *
 * @return a text, empty before the first failure; never NULL.
 *
 * Ownership: the library's; valid until the next call of this thread that fails, or the thread's end. Thread safety:
 * any thread, any time; each sees its own. Does not block; capture-safe. Since 0.1.
 */
const char *treeattn_last_error_message(void);

/* Runtimes, devices, logging, streams and buffers ------------------------------------------------------------------ */

/**
 * Creates a runtime: what a process sets up once, before anything else.
 *
 * @param config  NULL for defaults. Read during the call only.
 * @param runtime where the handle goes.
 * @return TREEATTN_OK; INVALID_ARGUMENT (a word that names no instruction set); UNAVAILABLE (an instruction set that
 *         this machine lacks); NO_MEMORY.
 *
 * Ownership: the caller destroys the runtime. It may be destroyed before the objects made from it.
 * Thread safety: any thread; the runtime may be used by all threads at once. Does not block. Since 0.1.
 */
treeattn_status_t treeattn_runtime_create(const struct treeattn_runtime_config_t *config,
                                          struct treeattn_runtime_t **runtime);

/**
 * Destroys a runtime. Objects made from it return PARENT_DESTROYED from now on, but for what ends or awaits steps that are
 * under way: `treeattn_stream_synchronize`, `treeattn_comm_abort`, `treeattn_comm_status` and the destruction of each.
 *
 * The log callback is not called any more when this returns.
 *
 * @param runtime NULL is fine.
 * @return TREEATTN_OK; BAD_HANDLE.
 *
 * Thread safety: any thread. Waits for a log call that is under way. Not capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_runtime_destroy(struct treeattn_runtime_t *runtime);

/**
 * How many devices of a kind this build can use on this machine.
 *
 * @param runtime the runtime.
 * @param kind    TREEATTN_DEVICE_CPU (one device, and where there are several NUMA nodes one more for each) or
 *                TREEATTN_DEVICE_CUDA (0 without a driver).
 * @param count   where the number goes.
 * @return TREEATTN_OK; BAD_HANDLE; INVALID_ARGUMENT.
 *
 * Thread safety: any thread. Does not block; capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_runtime_device_count(struct treeattn_runtime_t *runtime,
                                                treeattn_device_kind_t kind,
                                                int32_t *count);

/**
 * Tells what a device is.
 *
 * @param runtime the runtime.
 * @param device  TREEATTN_CPU(0), TREEATTN_CPU_NODE(n), TREEATTN_CUDA(n).
 * @param info    set up with TREEATTN_DEVICE_INFO_INIT; filled.
 * @return TREEATTN_OK; BAD_HANDLE; INVALID_ARGUMENT; UNAVAILABLE (no such GPU, or no driver; the message names what is
 *         missing).
 *
 * Thread safety: any thread. Does not block; capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_runtime_device_info(struct treeattn_runtime_t *runtime,
                                               treeattn_device_t device,
                                               struct treeattn_device_info_t *info);

/**
 * Sets the receiver of log lines, or removes it.
 *
 * The library logs which communicators and plans it made and what it chose for them (INFO), bad data and mismatches of steps
 * (WARNING) and, on CPUs, steps that failed, once for each rank of a communicator that broke (ERROR). It logs nothing on the
 * way of a step that goes well, and nowhere else: it touches no global logger and no stream of the process.
 *
 * @param runtime   the runtime.
 * @param callback  NULL removes. Called from any thread, several at once; must not call the library, unwind or jump.
 * @param user_data passed to the callback.
 * @return TREEATTN_OK; BAD_HANDLE.
 *
 * Ownership: user_data stays the caller's and has to live until another callback is set or the runtime is destroyed.
 * Thread safety: any thread. Waits until no call of the former callback is under way. Not capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_runtime_set_log_callback(struct treeattn_runtime_t *runtime,
                                                    treeattn_log_callback_t callback,
                                                    void *user_data);

/**
 * Creates a stream: an in-order queue of steps on a device.
 *
 * On the CPU it has a thread of its own, so that one thread of the engine can drive several ranks: enqueue the step on
 * every rank's stream, then synchronise them. It holds 1,024 steps; enqueueing into a full one waits. On a GPU it is a
 * CUDA stream that does not wait for the legacy default stream.
 *
 * @param runtime the runtime.
 * @param device  the device.
 * @param stream  where the handle goes.
 * @return TREEATTN_OK; BAD_HANDLE; INVALID_ARGUMENT; UNAVAILABLE; NO_MEMORY; SYSTEM (no thread to be had); CUDA,
 *         CUDA_PRIOR, CUDA_FATAL; CAPTURING.
 *
 * Ownership: the caller destroys the stream. Thread safety: any thread; a stream may be used by several threads.
 * Does not block. Not capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_stream_create(struct treeattn_runtime_t *runtime,
                                         treeattn_device_t device,
                                         struct treeattn_stream_t **stream);

/**
 * Makes a stream of a CUDA stream of the caller's, on which steps are then enqueued.
 *
 * @param runtime     the runtime.
 * @param device      the CUDA device of the stream.
 * @param cuda_stream a cudaStream_t or CUstream of the device's primary context, which is that of the CUDA runtime API;
 *                    NULL is the legacy default stream.
 * @param stream      where the handle goes.
 * @return TREEATTN_OK; BAD_HANDLE; INVALID_ARGUMENT (no CUDA device; a stream of another context); UNAVAILABLE; CUDA,
 *         CUDA_PRIOR, CUDA_FATAL.
 *
 * Ownership: the caller destroys the stream; cuda_stream stays the caller's and has to live as long. Thread safety: any
 * thread. Does not block. Capture-safe: also while cuda_stream is captured. Since 0.1.
 */
treeattn_status_t treeattn_stream_wrap_cuda(struct treeattn_runtime_t *runtime,
                                            treeattn_device_t device,
                                            void *cuda_stream,
                                            struct treeattn_stream_t **stream);

/**
 * Waits until everything enqueued so far is done, also where the runtime is destroyed.
 *
 * @param stream the stream.
 * @return TREEATTN_OK; BAD_HANDLE; or the first error of a step that was enqueued on this stream, of whichever rank and
 *         plan, since the last call by any thread, whose message tells of those of other steps, and which are then
 *         forgotten (a broken communicator stays broken, and its later calls say so). On
 *         a GPU: CUDA, CUDA_FATAL; CAPTURING; why communicators are broken whose steps were enqueued here; what steps
 *         found in their data comes from treeattn_comm_status().
 *
 * Thread safety: any thread. Blocks; every step that it waits for has a deadline. Not capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_stream_synchronize(struct treeattn_stream_t *stream);

/**
 * Destroys a stream when everything enqueued is done. A wrapped CUDA stream lives on.
 *
 * @param stream NULL is fine.
 * @return TREEATTN_OK; BAD_HANDLE; CAPTURING, and the stream lives on.
 *
 * Thread safety: any thread but the library's own. Blocks; every step that it waits for has a deadline. Not
 * capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_stream_destroy(struct treeattn_stream_t *stream);

/**
 * Allocates zeroed memory of a device, aligned to 64 bytes. A convenience: every call takes raw pointers.
 *
 * @param runtime the runtime.
 * @param device  the device.
 * @param bytes   how many, at least 1.
 * @param buffer  where the handle goes.
 * @return TREEATTN_OK; BAD_HANDLE; INVALID_ARGUMENT; UNAVAILABLE; NO_MEMORY; NO_DEVICE_MEMORY; CUDA, CUDA_PRIOR,
 *         CUDA_FATAL; CAPTURING.
 *
 * Ownership: the caller destroys the buffer. Thread safety: any thread. May block on the device's allocator. Not
 * capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_buffer_alloc(struct treeattn_runtime_t *runtime,
                                        treeattn_device_t device,
                                        size_t bytes,
                                        struct treeattn_buffer_t **buffer);

/**
 * The address of a buffer's first byte, on its device.
 *
 * @param buffer the buffer.
 * @param data   where the address goes.
 * @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT.
 *
 * Ownership: the memory is the buffer's, valid until it is destroyed. Thread safety: any thread. Does not block;
 * capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_buffer_data(struct treeattn_buffer_t *buffer, void **data);

/**
 * Copies host memory into a buffer.
 *
 * @param buffer the buffer.
 * @param offset first byte in the buffer.
 * @param source host memory; NULL only with 0 bytes. May overlap the buffer.
 * @param bytes  how many; offset + bytes is at most the buffer's size.
 * @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT, with nothing copied; CUDA, CUDA_PRIOR,
 *         CUDA_FATAL; CAPTURING.
 *
 * Thread safety: any thread; who else uses the bytes meanwhile is the caller's affair. Blocks until copied. Not
 * capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_buffer_upload(struct treeattn_buffer_t *buffer,
                                         size_t offset,
                                         const void *source,
                                         size_t bytes);

/**
 * Copies from a buffer to host memory.
 *
 * @param buffer the buffer.
 * @param offset first byte in the buffer.
 * @param target host memory; NULL only with 0 bytes. May overlap the buffer.
 * @param bytes  how many; offset + bytes is at most the buffer's size.
 * @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT, with nothing copied; CUDA, CUDA_PRIOR,
 *         CUDA_FATAL; CAPTURING.
 *
 * Thread safety: any thread; work that still writes the bytes is not waited for: synchronise its stream first. Blocks
 * until copied. Not capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_buffer_download(struct treeattn_buffer_t *buffer, size_t offset, void *target, size_t bytes);

/**
 * Destroys a buffer and frees its memory. On the CPU enqueued work that uses it is not waited for; on a GPU it is, at
 * most 10 seconds (what is not done by then is freed when it is).
 *
 * @param buffer NULL is fine.
 * @return TREEATTN_OK; BAD_HANDLE; CAPTURING, and the buffer lives on.
 *
 * Thread safety: any thread. May block on the device's allocator. Not capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_buffer_destroy(struct treeattn_buffer_t *buffer);

/* Communicators ---------------------------------------------------------------------------------------------------- */

/**
 * Creates a communicator whose ranks all live in this process, and gives every rank's end of it.
 *
 * GPUs reach each other's memory and show it here by an exchange. Where they cannot, steps go over NCCL, which takes each GPU
 * once; `treeattn_comm_describe` says why (`no_windows`). Plans that need the memory (TWO_SHOT, CHECKED), and all where there
 * is no NCCL, are UNSUPPORTED. Steps are kernels that wait for each other on the device: one thread may drive all ranks,
 * step k on all before step k + 1 on any. Ranks that share a GPU divide its multiprocessors; then
 * CUDA_DEVICE_MAX_CONNECTIONS=32 keeps their streams apart.
 *
 * @param runtime the runtime.
 * @param n       number of ranks, 1 to 1,024; of GPUs more than 64 exchange over NCCL.
 * @param devices each rank's device; a device may appear several times. CPUs and GPUs do not mix.
 * @param config  NULL for defaults.
 * @param comms   where the n handles go, rank by rank.
 * @return TREEATTN_OK; BAD_HANDLE; INVALID_ARGUMENT; UNSUPPORTED; UNAVAILABLE; NO_MEMORY; SYSTEM (no thread to be
 *         had). On an error no communicator is left.
 *
 * Ownership: the caller destroys each of the n. Thread safety: any thread. Does not block, but on GPUs while they show
 * that they reach each other, at most 5 s. Not capture-safe.
 * Since 0.1.
 */
treeattn_status_t treeattn_comm_create_local(struct treeattn_runtime_t *runtime,
                                             int32_t n,
                                             const treeattn_device_t *devices,
                                             const struct treeattn_comm_config_t *config,
                                             struct treeattn_comm_t **comms);

/**
 * Creates this rank's end of a communicator whose ranks the engine connects: other processes, other machines.
 *
 * Collective: every rank calls it, in its own process or on a thread of its own, with the same world and config.
 *
 * @param runtime   the runtime.
 * @param callbacks the engine's allgather and, if it has one, its sendrecv; set up with TREEATTN_TRANSPORT_INIT. The
 *                  struct is read during the call; what `ctx` points to outlives the communicator and its plans.
 * @param world     number of ranks, 1 to 4,096.
 * @param rank      this rank, 0 to world - 1: its index in what the allgather gathers.
 * @param device    this rank's device: CPUs on all ranks, or CUDA devices on all. GPUs use the allgather to set up the
 *                  communicator and its plans only; their steps go as those of treeattn_comm_create_nccl do.
 * @param config    NULL for defaults. `threads_per_rank` = 0 is the cores of the machine over its ranks.
 * @param comm      where the handle goes.
 * @return TREEATTN_OK; BAD_HANDLE; INVALID_ARGUMENT; UNSUPPORTED; UNAVAILABLE; MISMATCH: the allgather brings other
 *         ranks, or another world, than the arguments say, or ranks are on devices of two kinds; DESYNC: a rank uses another version of the library;
 *         TRANSPORT: a callback failed; TIMEOUT: it did not end before the setup deadline; NO_MEMORY; SYSTEM. An error
 *         is of this rank; peers that still wait for it end by their deadlines.
 *
 * Ownership: the caller destroys the communicator. Thread safety: any thread; callbacks run on this one. Blocks until
 * all ranks have come, at most the setup deadline and 1 s. Not capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_comm_create_from_transport(struct treeattn_runtime_t *runtime,
                                                      const struct treeattn_transport_t *callbacks,
                                                      int32_t world,
                                                      int32_t rank,
                                                      treeattn_device_t device,
                                                      const struct treeattn_comm_config_t *config,
                                                      struct treeattn_comm_t **comm);

/**
 * Which rank a communicator is.
 *
 * @param comm the communicator.
 * @param rank where the number goes, 0 to world - 1.
 * @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT.
 *
 * Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_comm_rank(struct treeattn_comm_t *comm, int32_t *rank);

/**
 * How many ranks a communicator has.
 *
 * @param comm  the communicator.
 * @param world where the number goes.
 * @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT.
 *
 * Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_comm_world(struct treeattn_comm_t *comm, int32_t *world);

/**
 * Describes a communicator as JSON: ranks, links, capacities, the algorithm table.
 *
 * As snprintf: the text is cut where cap is too small, and always ended where cap is not 0.
 *
 * @param comm   the communicator.
 * @param buf    where the text goes; NULL with cap = 0 to ask for the size only.
 * @param cap    size of buf in bytes.
 * @param needed where the size of the whole text goes, its end included; NULL if not wanted.
 * @return TREEATTN_OK, also where the text was cut; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT.
 *
 * Thread safety: any thread, any time. Does not block. Since 0.1.
 */
treeattn_status_t treeattn_comm_describe(struct treeattn_comm_t *comm, char *buf, size_t cap, size_t *needed);

/**
 * Tells the health of a communicator: whether it is broken and why, or which bad data a step met.
 *
 * Serves also where the runtime is destroyed. INVALID_DATA is told once: by the call with a NULL stream that met it; else
 * by this call or, of a step on a CPU stream, by `treeattn_stream_synchronize`, whichever comes first. A broken
 * communicator stays broken.
 *
 * @param comm   the communicator.
 * @param status set up with TREEATTN_COMM_STATUS_INIT; filled.
 * @return TREEATTN_OK, whatever `status->code` is; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT.
 *
 * Thread safety: any thread, any time, also while another waits in a step. Never blocks or synchronises; capture-safe.
 * Since 0.1.
 */
treeattn_status_t treeattn_comm_status(struct treeattn_comm_t *comm,
                                       struct treeattn_comm_status_t *status);

/**
 * Breaks a communicator: every wait on it ends at once with ABORTED, on all ranks of a process and of GPUs that reach each
 * other's memory, and so does every later call. Over an engine's transport or NCCL it reaches this rank only, and ends its
 * callback; the peers end by their deadlines. Serves also where the runtime is destroyed.
 *
 * @param comm the communicator.
 * @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED.
 *
 * Thread safety: any thread, any time, also while another waits in a step. Does not block. Since 0.1.
 */
treeattn_status_t treeattn_comm_abort(struct treeattn_comm_t *comm);

/**
 * Leaves a communicator and destroys this rank's end. Peers that need this rank from now on get PEER_LOST (over an
 * engine's transport what the transport gives, or TIMEOUT); plans made from it return PARENT_DESTROYED and can still be
 * destroyed.
 *
 * @param comm NULL is fine.
 * @return TREEATTN_OK; BAD_HANDLE.
 *
 * Thread safety: any thread. A step of this rank that is under way ends at once with PARENT_DESTROYED and NaN, and its
 * peers get PEER_LOST. Where all come before it has ended it is whole, on all ranks; between GPUs on those that have its part
 * already. Does not wait for the other ranks. Not capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_comm_destroy(struct treeattn_comm_t *comm);

/* Communicators over NCCL ------------------------------------------------------------------------------------------ */

/**
 * Gives a fresh name for a communicator to be: one rank asks for it and brings its 128 bytes to all others in any way
 * (a file, a pipe, MPI), then every rank calls `treeattn_comm_create_nccl` with it. A name serves once.
 *
 * NCCL is the one in this process, else libnccl.so.2, else the one that pip installed in $VIRTUAL_ENV or beside the python
 * of $PATH. Where it is elsewhere, the program loads it first: dlopen is enough.
 *
 * @param runtime the runtime.
 * @param out     where the 128 bytes go: an `ncclUniqueId`.
 * @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT; UNAVAILABLE: there is no NCCL of version 2.18 or
 *         later, the message says where it was looked for and what was found; NCCL: what NCCL says, for example that
 *         there is no network interface to listen on.
 *
 * NCCL listens in this process, on a socket and a thread of its own, until all ranks have come: the process stays until
 * then. Thread safety: any thread. Does not wait for other ranks; loads NCCL the first time. Not capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_nccl_unique_id(struct treeattn_runtime_t *runtime,
                                          uint8_t *out);

/**
 * Creates this rank's end of a communicator whose ranks NCCL connects: one GPU a rank, in processes or on threads of
 * their own, on one machine or several.
 *
 * Collective: every rank calls it, with the same id, world and config, and its own rank and GPU.
 *
 * @param runtime the runtime.
 * @param id      the 128 bytes that `treeattn_nccl_unique_id` gave one of the ranks.
 * @param world   number of ranks, 1 to 4,096.
 * @param rank    this rank, 0 to world - 1.
 * @param device  this rank's GPU.
 * @param config  NULL for defaults. `nccl_path` names the NCCL to load; `node_groups` and `executor` are NULL.
 * @param comm    where the handle goes.
 * @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT; UNSUPPORTED: not a GPU; UNAVAILABLE: no such
 *         GPU, or no NCCL of version 2.18 or later; CAPTURING; TIMEOUT: a rank did not come before the setup deadline;
 *         MISMATCH: the ranks run different versions of this library or of NCCL; NCCL: what NCCL says, for example that a
 *         GPU is used twice; NO_MEMORY; NO_DEVICE_MEMORY; CUDA; CUDA_FATAL; CUDA_PRIOR; SYSTEM. An error is of this
 *         rank; peers that still wait for it end by their deadlines.
 *
 * Ownership: the caller destroys the communicator; the id may be freed at once. Thread safety: any thread; one thread
 * that makes several ranks would wait for itself, so that each needs one of its own. Blocks until all ranks have come, at
 * most the setup deadline and 1 s. Not capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_comm_create_nccl(struct treeattn_runtime_t *runtime,
                                            const uint8_t *id,
                                            int32_t world,
                                            int32_t rank,
                                            treeattn_device_t device,
                                            const struct treeattn_comm_config_t *config,
                                            struct treeattn_comm_t **comm);

/**
 * Creates this rank's end of a communicator with the ranks of an NCCL communicator that the engine has.
 *
 * Collective: every rank of `nccl_comm` calls it, each on its own communicator, with the same config. A communicator of
 * the library's own is split off with ncclCommSplit; the given one is never used again by the library, and may go before
 * the result does.
 *
 * @param runtime   the runtime.
 * @param nccl_comm the engine's `ncclComm_t`, of the NCCL that is loaded in this process (where there are several
 *                  copies, `nccl_path` of the config says which). Nobody else uses it during the call.
 * @param device    the GPU of `nccl_comm`.
 * @param config    NULL for defaults; `node_groups` and `executor` are NULL.
 * @param comm      where the handle goes.
 * @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT: also where `nccl_comm` is of another device;
 *         UNSUPPORTED: not a GPU; UNAVAILABLE: no such GPU, or no NCCL in this process, or one before 2.18; otherwise as
 *         `treeattn_comm_create_nccl`. After TIMEOUT `nccl_comm` may still be in use by the split: abort it before it is
 *         destroyed.
 *
 * Ownership: the caller destroys the communicator, and keeps `nccl_comm`. Thread safety: any thread. Blocks until all
 * ranks have come, at most the setup deadline and 1 s. Not capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_comm_wrap_nccl(struct treeattn_runtime_t *runtime,
                                          void *nccl_comm,
                                          treeattn_device_t device,
                                          const struct treeattn_comm_config_t *config,
                                          struct treeattn_comm_t **comm);

/* Plans: support queries, creation, steps, reports ----------------------------------------------------------------- */

/**
 * Tells whether a device serves a shape. Local: asks no other rank, makes nothing.
 *
 * @param runtime the runtime.
 * @param device  the device.
 * @param desc    the shape. Read during the call only.
 * @return TREEATTN_OK: a plan can be made; UNSUPPORTED: the message names the field; INVALID_ARGUMENT: the shape makes
 *         no sense anywhere; BAD_HANDLE; UNAVAILABLE.
 *
 * Thread safety: any thread. Does not block; capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_attention_supported(struct treeattn_runtime_t *runtime,
                                               treeattn_device_t device,
                                               const struct treeattn_attention_desc_t *desc);

/**
 * Creates a plan: everything that a shape needs on one rank, allocated once. Its memory does not depend on the length
 * of the cache, and one plan serves all layers of a shape.
 *
 * Collective: every rank calls it, with the same descriptor, each from a thread or process of its own. Where one
 * thread holds all local ranks, see `treeattn_plan_create_all`.
 *
 * @param comm this rank's end of the communicator.
 * @param desc the shape. Read during the call only.
 * @param plan where the handle goes.
 * @return TREEATTN_OK; INVALID_ARGUMENT or UNSUPPORTED, by field; MISMATCH: the ranks' descriptors differ, or one could
 *         not make its plan; TIMEOUT: a rank did not come before the setup deadline; NO_MEMORY; BAD_HANDLE;
 *         PARENT_DESTROYED; or what broke the communicator.
 *
 * Ownership: the caller destroys the plan, before or after the communicator. Thread safety: calls on one communicator
 * are the caller's to serialise. Blocks until all ranks have come, at most the setup deadline. During a capture:
 * CAPTURING. Since 0.1.
 */
treeattn_status_t treeattn_plan_create(struct treeattn_comm_t *comm,
                                       const struct treeattn_attention_desc_t *desc,
                                       struct treeattn_plan_t **plan);

/**
 * Creates the plans of all ranks of a local communicator from one thread.
 *
 * @param n     number of ranks, all of the communicator.
 * @param comms every rank's end, each once.
 * @param desc  the shape. Read during the call only.
 * @param plans where the n handles go, in the order of comms.
 * @return as `treeattn_plan_create`. On an error no plan is left.
 *
 * Ownership: the caller destroys each of the n. Thread safety: as `treeattn_plan_create`. Waits for no other call; between
 * GPUs, plans whose steps go over NCCL have it connect the ranks, on threads of the library, at most the setup deadline.
 * During a capture: CAPTURING. Since 0.1.
 */
treeattn_status_t treeattn_plan_create_all(int32_t n,
                                           struct treeattn_comm_t *const *comms,
                                           const struct treeattn_attention_desc_t *desc,
                                           struct treeattn_plan_t **plans);

/**
 * One step: attends this rank's shard, exchanges the partials, and writes the exact output over all ranks' keys.
 *
 * Collective: all ranks of the communicator issue the same steps in the same order, with the same `batch` and
 * `query_tokens`. A thread that drives several ranks enqueues a step on all of them before the next one on any.
 * Allocates nothing.
 *
 * @param plan   the plan; in flight on one stream at a time.
 * @param args   the step. The struct is read during the call; what it points to has to stay valid, and unchanged by
 *               others, until the step is done.
 * @param stream where to enqueue; of the plan's device. NULL on a CPU plan: the step runs on the calling thread, and each
 *               local rank then needs a thread of its own. NULL on a CUDA plan is INVALID_ARGUMENT; the legacy default
 *               stream is `treeattn_stream_wrap_cuda` of NULL. A CPU stream serves one rank of a communicator at a time:
 *               INVALID_ARGUMENT while it holds a step of another one. A rank has steps on one CPU stream at a time: BUSY,
 *               also with a NULL stream, while another one holds a step of it.
 * @return TREEATTN_OK; refused, with nothing enqueued or written, while the peers wait for this rank: INVALID_ARGUMENT or
 *         UNSUPPORTED, by field; BAD_HANDLE; PARENT_DESTROYED; BUSY: another call of this rank that exchanges is under
 *         way, or enqueued elsewhere. What broke the communicator (TIMEOUT, DESYNC, PEER_LOST, ABORTED, ...), with NaN in
 *         all of the output; PARENT_DESTROYED, too, where the communicator is destroyed within the step. With a NULL stream
 *         also INVALID_DATA and, of a CHECKED plan, MISMATCH: the output is written, with NaN in the sequence that the
 *         message names, and in others that are bad. With a stream the errors of the step itself come from
 *         `treeattn_stream_synchronize` or `treeattn_comm_status`.
 *
 * Thread safety: calls on one communicator are the caller's to serialise. With a stream it enqueues (and waits only
 * for room in a full one or, on a broken communicator, for what is enqueued on a CPU stream; at most the step
 * deadline); with NULL it blocks, at most the step deadline. Capture-safe on CUDA streams. Since 0.1.
 */
treeattn_status_t treeattn_plan_decode(struct treeattn_plan_t *plan,
                                       const struct treeattn_decode_args_t *args,
                                       struct treeattn_stream_t *stream);

/**
 * One step of a CPU plan on a team of the engine's threads: each of them calls this, with an index of its own, and all leave
 * with the same status. The library starts no thread. The bits are those of `treeattn_plan_decode` on as many threads.
 *
 * Member 0 computes as the others do, and waits for the other ranks; `args` counts with it alone, once all members have come.
 * Members wait for each other, each at most the step deadline. Those that cannot meet, because one does not come, two have one
 * index, or sizes differ, are broken off for good: later calls on the plan return what they returned; make another plan.
 * `treeattn_plan_decode` goes on serving, between steps of teams.
 *
 * @param plan the plan, of a CPU rank.
 * @param args as for `treeattn_plan_decode`, from member 0; what the others pass is not looked at, and may be NULL.
 * @param team this thread's number and the team. Read during the call.
 * @return as `treeattn_plan_decode` with a NULL stream, the same for all members. INVALID_ARGUMENT: also an index or a size that is
 *         out of range, or that does not fit those of the others; where others wait for such a member, their wait ends with the
 *         same status. TIMEOUT: also a member that did not come, whose index the message names; then the output is NaN, if
 *         member 0 came, and a plan that exchanges breaks its communicator. UNSUPPORTED on GPUs.
 *
 * Thread safety: a plan has one team at a time; otherwise as `treeattn_plan_decode`. Blocks: until all members have come at most
 * the step deadline, then until the step has ended. Not capture-safe. Since 0.2.
 */
treeattn_status_t treeattn_plan_decode_team(struct treeattn_plan_t *plan,
                                            const struct treeattn_decode_args_t *args,
                                            const struct treeattn_team_t *team);

/**
 * This rank's partial alone: the output and lse over its own shard, all heads. No exchange, so that it serves on a broken
 * communicator, too.
 *
 * @param plan   the plan, with any output mode.
 * @param args   as for `treeattn_plan_decode`; `out` and `lse` hold all query heads.
 * @param stream as for `treeattn_plan_decode`.
 * @return as `treeattn_plan_decode`, without the errors of an exchange.
 *
 * Thread safety, blocking, capture: as `treeattn_plan_decode`; waits for no other rank. Since 0.1.
 */
treeattn_status_t treeattn_plan_partial(struct treeattn_plan_t *plan,
                                        const struct treeattn_decode_args_t *args,
                                        struct treeattn_stream_t *stream);

/**
 * The exchange alone: every rank passes a partial that the engine made and gets the merged output.
 *
 * Collective, as `treeattn_plan_decode`. Serves plans of any shape; one with kv_heads = 0 can do nothing else.
 *
 * @param plan   the plan.
 * @param args   the rank's own partial, o [token, head, dim] and lse [token, head], all query heads; kept valid until
 *               the step is done.
 * @param stream as for `treeattn_plan_decode`.
 * @return as `treeattn_plan_decode`, without INVALID_DATA.
 *
 * Thread safety, blocking, capture: as `treeattn_plan_decode`. Since 0.1.
 */
treeattn_status_t treeattn_plan_merge(struct treeattn_plan_t *plan,
                                      const struct treeattn_merge_args_t *args,
                                      struct treeattn_stream_t *stream);

/**
 * Tells the memory that a plan holds.
 *
 * @param plan   the plan.
 * @param memory set up with TREEATTN_PLAN_MEMORY_INIT; filled.
 * @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT.
 *
 * Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_plan_memory(struct treeattn_plan_t *plan, struct treeattn_plan_memory_t *memory);

/**
 * Tells what a plan has done so far, which algorithm it uses and why.
 *
 * @param plan  the plan.
 * @param stats set up with TREEATTN_PLAN_STATS_INIT; filled.
 * @return TREEATTN_OK; BAD_HANDLE; PARENT_DESTROYED; INVALID_ARGUMENT.
 *
 * Thread safety: any thread, any time. Does not block or synchronise; capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_plan_stats(struct treeattn_plan_t *plan, struct treeattn_plan_stats_t *stats);

/**
 * Destroys a plan when its enqueued work is done, waiting for it at most the step deadline.
 *
 * @param plan NULL is fine.
 * @return TREEATTN_OK; BAD_HANDLE; TIMEOUT: work is still under way; the handle is gone, but what that work points to
 *         has to stay valid until its stream is synchronised.
 *
 * Thread safety: any thread. Blocks, at most the step deadline. During a capture: CAPTURING. Since 0.1.
 */
treeattn_status_t treeattn_plan_destroy(struct treeattn_plan_t *plan);

/* Calls that need no communicator: merging in one place, the energy, and the helpers of placement ------------------ */

/**
 * Merges n partials that lie in one place (splits of a cache, passes of a kernel) into one. No communicator.
 *
 * @param runtime the runtime.
 * @param device  where the tensors are.
 * @param args    o [partial, token, head, dim] and lse [partial, token, head]; `heads` and `head_dim` are required.
 *                What it points to has to stay valid until the merge is done.
 * @param n       number of partials, at least 1.
 * @param stream  where to enqueue. NULL on the CPU: runs on the calling thread.
 * @return TREEATTN_OK; INVALID_ARGUMENT or UNSUPPORTED, by field, with nothing enqueued or written; BAD_HANDLE;
 *         UNAVAILABLE; TIMEOUT: the stream was full.
 *
 * Thread safety: any thread. With a stream it enqueues, with NULL it blocks until done; waits for nobody.
 * Capture-safe on CUDA streams. Since 0.1.
 */
treeattn_status_t treeattn_merge_partials(struct treeattn_runtime_t *runtime,
                                          treeattn_device_t device,
                                          const struct treeattn_merge_args_t *args,
                                          int32_t n,
                                          struct treeattn_stream_t *stream);

/**
 * The energy F(zeta) = log sum_j exp(scale q.k_j + zeta.v_j) of every query token and head, and its gradient by zeta.
 *
 * F(0) is the log-sum-exp of attention and the gradient at 0 its output: the mean of the values under the softmax of the
 * scores; zeta tilts the weights. F is convex. With k = v as stored patterns and zeta = 0, a call is one retrieval step
 * of a modern Hopfield network.
 *
 * (gradient, F) is a partial of the keys that are passed: those of several shards, each evaluated at the same zeta,
 * become the whole by `treeattn_merge_partials`, or between ranks by `treeattn_plan_merge`. Sinks join F as they join the
 * softmax, with a value of 0: where partials are merged, have them (`sinks` = 1) in one of the shards only.
 *
 * @param runtime the runtime.
 * @param device  where the tensors are; a CPU device in this version.
 * @param desc    the shape; `output`, `algorithm` and `wire_dtype` do not count. Read during the call only.
 * @param args    q, k, v and what describes them as for `treeattn_plan_decode` with one rank; `out` gets the gradient
 *                [token, query head, head_dim_v] and `lse` gets F, both for all query heads. Of a shard of several
 *                where positions matter, pass `kv_start` or explicit positions.
 * @param zeta    f32 [token, query head, head_dim_v]; shares no byte with the outputs. NULL, or data NULL: 0.
 * @param stream  where to enqueue. NULL: runs on the calling thread.
 * @return TREEATTN_OK; INVALID_ARGUMENT or UNSUPPORTED, by field, with nothing enqueued or written; INVALID_DATA: a
 *         length, position or page is out of range, and the outputs of its sequence are NaN; NO_MEMORY; SYSTEM;
 *         BAD_HANDLE; UNAVAILABLE; TIMEOUT: the stream was full.
 *
 * Thread safety: any thread. With a stream it enqueues, with NULL it blocks until done; waits for nobody. Allocates
 * scratch for the call and, where there are many keys, starts a thread a core for it. Not capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_energy(struct treeattn_runtime_t *runtime,
                                  treeattn_device_t device,
                                  const struct treeattn_attention_desc_t *desc,
                                  const struct treeattn_decode_args_t *args,
                                  const struct treeattn_tensor_t *zeta,
                                  struct treeattn_stream_t *stream);

/**
 * The heads that a rank owns in a scattered output: floor(rank * heads / world) up to floor((rank + 1) * heads /
 * world), possibly none.
 *
 * @param heads number of heads, at least 0.
 * @param world number of ranks, at least 1.
 * @param rank  0 to world - 1.
 * @param first where the first head goes.
 * @param count where the number of heads goes.
 * @return TREEATTN_OK; INVALID_ARGUMENT.
 *
 * Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_head_range(int32_t heads, int32_t world, int32_t rank, int32_t *first, int32_t *count);

/**
 * The rank that holds a global position.
 *
 * Contiguous placement here means the even split: rank r holds positions floor(r * L / world) up to floor((r + 1) * L
 * / world). An engine that cuts elsewhere knows its own cuts.
 *
 * @param placement     contiguous or interleaved.
 * @param world         number of ranks, at least 1.
 * @param global_length tokens of the sequence on all ranks.
 * @param position      0 to global_length - 1.
 * @param owner         where the number goes.
 * @return TREEATTN_OK; INVALID_ARGUMENT.
 *
 * Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_placement_owner(const struct treeattn_placement_t *placement,
                                           int32_t world,
                                           int32_t global_length,
                                           int32_t position,
                                           int32_t *owner);

/**
 * How many tokens of a sequence a rank holds. Note that local(L - k) is not local(L) - k: always ask.
 *
 * @param placement     as for `treeattn_placement_owner`.
 * @param world         number of ranks, at least 1.
 * @param rank          0 to world - 1.
 * @param global_length tokens of the sequence on all ranks.
 * @param length        where the number goes.
 * @return TREEATTN_OK; INVALID_ARGUMENT.
 *
 * Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_placement_local_length(const struct treeattn_placement_t *placement,
                                                  int32_t world,
                                                  int32_t rank,
                                                  int32_t global_length,
                                                  int32_t *length);

/**
 * The slot in which the owner of a global position holds it.
 *
 * @param placement     as for `treeattn_placement_owner`.
 * @param world         number of ranks, at least 1.
 * @param global_length tokens of the sequence on all ranks.
 * @param position      0 to global_length - 1.
 * @param slot          where the number goes.
 * @return TREEATTN_OK; INVALID_ARGUMENT.
 *
 * Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_placement_local_slot(const struct treeattn_placement_t *placement,
                                                int32_t world,
                                                int32_t global_length,
                                                int32_t position,
                                                int32_t *slot);

/**
 * The global position of a rank's local slot.
 *
 * @param placement     as for `treeattn_placement_owner`.
 * @param world         number of ranks, at least 1.
 * @param rank          0 to world - 1.
 * @param global_length tokens of the sequence on all ranks.
 * @param slot          0 to the rank's local length - 1.
 * @param position      where the number goes.
 * @return TREEATTN_OK; INVALID_ARGUMENT.
 *
 * Thread safety: any thread, any time. Does not block; capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_placement_global_position(const struct treeattn_placement_t *placement,
                                                     int32_t world,
                                                     int32_t rank,
                                                     int32_t global_length,
                                                     int32_t slot,
                                                     int32_t *position);

/* The self-check --------------------------------------------------------------------------------------------------- */

/**
 * Runs a shape on this machine: random inputs, sharded over local ranks, decoded twice, and held against float64 under
 * the library's error bounds.
 *
 * @param runtime the runtime.
 * @param device  where the ranks live; those of `config->devices`, the first of which this is, live where that says.
 * @param desc    the shape. Read during the call only.
 * @param config  the sizes; NULL for defaults.
 * @param report  set up with TREEATTN_SELFCHECK_REPORT_INIT; filled.
 * @return TREEATTN_OK where the check could be run (look at `report->passed`); INVALID_ARGUMENT or UNSUPPORTED, by
 *         field; BAD_HANDLE; UNAVAILABLE; NO_MEMORY; SYSTEM (no thread to be had); or what a step returned.
 *
 * Thread safety: any thread. Blocks, for a time in proportion to query rows x keys: the reference is float64. Starts
 * and joins its own threads. Not capture-safe. Since 0.1.
 */
treeattn_status_t treeattn_selfcheck(struct treeattn_runtime_t *runtime,
                                     treeattn_device_t device,
                                     const struct treeattn_attention_desc_t *desc,
                                     const struct treeattn_selfcheck_config_t *config,
                                     struct treeattn_selfcheck_report_t *report);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* TREEATTN_H */
