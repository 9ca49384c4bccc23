//! Handles, and what runtimes and communicators are made with and tell of themselves.

use std::ffi::{c_char, c_void};

use crate::ffi::codes::{treeattn_device_t, treeattn_log_level_t, treeattn_status_t};

/// A process's use of the library. Made by `treeattn_runtime_create`.
pub struct treeattn_runtime_t {
    _private: [u8; 0],
}

/// An in-order queue of steps on one device. Made by `treeattn_stream_create`.
pub struct treeattn_stream_t {
    _private: [u8; 0],
}

/// Memory of a device, a convenience. Made by `treeattn_buffer_alloc`.
pub struct treeattn_buffer_t {
    _private: [u8; 0],
}

/// One rank's end of a communicator. Made by one of the calls `treeattn_comm_create_*` and `treeattn_comm_wrap_nccl`.
pub struct treeattn_comm_t {
    _private: [u8; 0],
}

/// A shape made ready on one rank. Made by `treeattn_plan_create`.
pub struct treeattn_plan_t {
    _private: [u8; 0],
}

/// Receives log lines. Called from any thread, also the library's own, with a text that is valid during the call; must
/// not call the library, unwind or jump out.
pub type treeattn_log_callback_t =
    Option<unsafe extern "C" fn(level: treeattn_log_level_t, message: *const c_char, user_data: *mut c_void)>;

/// What `treeattn_runtime_create` takes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_runtime_config_t {
    /// sizeof(treeattn_runtime_config_t).
    pub struct_size: usize,
    /// Instruction set of the CPU backend: "scalar", "avx2", "avx512" or "neon". NULL: what the environment variable
    /// TREEATTN_CPU_ISA said when the process made its first runtime, else the best that the machine has. A word there that
    /// cannot be served is ignored, as `isa` of treeattn_device_info_t then says.
    pub cpu_isa: *const c_char,
}

/// What a device is. Filled by `treeattn_runtime_device_info`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_device_info_t {
    /// sizeof(treeattn_device_info_t).
    pub struct_size: usize,
    /// The device.
    pub device: treeattn_device_t,
    /// Processor cores that this process may use, or streaming multiprocessors.
    pub units: i32,
    /// Its memory in bytes.
    pub memory: u64,
    /// Its maker's name for it; cut where it is longer.
    pub name: [c_char; 128],
    /// The instruction set in use, and why where it was asked for; or the compute capability. Cut where it is longer.
    pub isa: [c_char; 256],
}

/// The engine's own parallel-for (OpenMP, a pool): what a CPU rank computes its steps with, instead of threads of the library,
/// which then starts none to compute. Set up with TREEATTN_EXECUTOR_INIT. The bits are those of as many threads of the
/// library's own.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_executor_t {
    /// sizeof(treeattn_executor_t).
    pub struct_size: usize,
    /// Passed to `parallel`. Stays valid until the communicator and all its plans are destroyed, and the steps enqueued on
    /// them are done.
    pub ctx: *mut c_void,
    /// Into how many tasks work is cut, 1 to 1,024: as many as `parallel` runs at a time.
    pub threads: i32,
    /// TREEATTN_EXECUTOR_ flags.
    pub flags: u32,
    /// Calls `task(data, i)` once for every i from 0 to n - 1, on whatever threads, the calling one among them or not, and
    /// returns 0 when all have returned. n is `threads`. Required.
    ///
    /// Runs on the thread that called the library, inside that call, or on that of a CPU stream; a step takes one call or a few.
    /// One call runs at a time for a rank; those of several ranks, which share the function where
    /// `treeattn_comm_create_local` made them, may meet and do not wait for each other. It must not call the library, unwind
    /// or jump out. The library waits for it as long as it takes: no deadline ends it.
    ///
    /// Another return value, a task that is left out, runs twice or has a number that was not asked for is
    /// TREEATTN_ERROR_EXECUTOR of the step, after the tasks that have begun have ended; the message says which. A task
    /// takes 64 KiB of stack, keeps the thread's floating-point settings, does not unwind, and may safely be called too often, or
    /// when `parallel` has returned or everything is destroyed: it then does nothing.
    pub parallel: Option<
        unsafe extern "C" fn(
            ctx: *mut c_void,
            n: i32,
            task: Option<unsafe extern "C" fn(data: *mut c_void, i: i32)>,
            data: *mut c_void,
        ) -> i32,
    >,
}

/// How a communicator waits and what it may use. The same on every rank.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_comm_config_t {
    /// sizeof(treeattn_comm_config_t).
    pub struct_size: usize,
    /// How long creating the communicator and its plans may wait for the other ranks, in nanoseconds, at most a year.
    /// 0: 30 s.
    pub setup_timeout_ns: i64,
    /// How long a step may wait for the other ranks, in nanoseconds, at most a year. 0: 10 s.
    pub step_timeout_ns: i64,
    /// Worker threads of a CPU rank, the calling thread among them. 0: the cores of its device over the local ranks on that
    /// device, at least 1, or the `threads` of the executor.
    pub threads_per_rank: i32,
    /// Ranks of the same group count as one node: TREE merges within a node first, and GPUs reach each other's memory within a
    /// node only, with TREE between them by default. This one may differ from rank to rank. 0 over an engine's transport or
    /// NCCL: the ranks of a machine are a node. Over NCCL all ranks name a group or none does (MISMATCH).
    pub node_group: i32,
    /// Path of the NCCL library to load. NULL: looked for.
    pub nccl_path: *const c_char,
    /// `treeattn_comm_create_local` only: the group of each of its n ranks. NULL: `node_group` for all.
    pub node_groups: *const i32,
    /// The engine's threads, to compute the steps of CPU ranks on; read during the call. `threads_per_rank` is then 0 or its
    /// `threads`. May differ from rank to rank. NULL: the library's own threads, and on GPUs. Since 0.2.
    pub executor: *const treeattn_executor_t,
    /// The most members of a team that runs steps of this rank (`treeattn_plan_decode_team`), at most 1,024. 0: as many as the
    /// rank has threads. The scratch of plans grows with it. May differ from rank to rank. 0 on GPUs. Since 0.2.
    pub max_team: i32,
    /// Zero; keeps the size a multiple of 8.
    pub reserved: i32,
}

/// The health of a communicator. Filled by `treeattn_comm_status`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_comm_status_t {
    /// sizeof(treeattn_comm_status_t).
    pub struct_size: usize,
    /// TREEATTN_OK, why the communicator is broken, or TREEATTN_ERROR_INVALID_DATA or TREEATTN_ERROR_MISMATCH of a step.
    pub code: treeattn_status_t,
    /// The rank that the error is about, -1 if none.
    pub rank: i32,
    /// Steps of all plans of this rank that exchanged, each counted once whatever its algorithm and size: completed on a CPU,
    /// enqueued on a GPU. (`steps` of `treeattn_plan_stats_t` counts those of one plan, also without exchange.)
    pub step: u64,
    /// The plan of the last step by its number on the communicator (from 1; see `treeattn_plan_stats_t`), 0 before the
    /// first; with INVALID_DATA the plan that met it.
    pub plan: u64,
    /// The first sequence that `rank` found bad data in, or in which ranks do not fit together; -1 if none.
    pub sequence: i32,
    /// 1: no exchange will succeed any more; destroy the communicator and make a new one.
    pub broken: i32,
    /// The message that goes with `code`; empty if there is none, cut where it is longer. With INVALID_DATA every rank is told
    /// the argument, the sequence and the rank that met it; the value found and the values wanted only that rank, on a GPU
    /// once the step has ended, and not of an entry beyond the first 65,536 of its sequence.
    pub message: [c_char; 512],
}

/// The engine's own way to exchange small blobs in host memory (MPI, gloo, sockets): what
/// `treeattn_comm_create_from_transport` takes. Steps of GPUs do not use it.
///
/// Threads: a callback runs on the thread that called the library, inside that call, and on the threads of CPU streams
/// only with TREEATTN_TRANSPORT_STREAM_THREADS. One callback of a communicator runs at a time; those of two
/// communicators may meet. It may block, must not call the library but for `treeattn_comm_abort` and
/// `treeattn_comm_status`, and must not unwind or jump out.
///
/// Deadline: `timeout_ns` is what is left of the step's or the setup's time; `*abort` becomes 1 on an abort from any
/// thread, and by the library's own clock once the time is over. A callback returns, with anything but 0, when either
/// has come: it looks at both at least every 100 ms, `*abort` as a volatile or an atomic. So no call outlasts its
/// deadline by more than a second; one that waits for neither holds its caller for as long as it waits.
///
/// Memory: `send` and `recv` are the library's, of any alignment, and do not overlap; `recv` may hold anything after a
/// callback that failed. Both are gone when it has returned: an operation that cannot be cancelled (an MPI request)
/// needs buffers of its own.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct treeattn_transport_t {
    /// sizeof(treeattn_transport_t).
    pub struct_size: usize,
    /// Passed to every callback. Stays valid until the communicator and all its plans are destroyed, and the steps
    /// enqueued on them are done.
    pub ctx: *mut c_void,
    /// Gathers `bytes` bytes (1 to 1 MiB, the same on every rank) from every rank into `recv` (world * bytes), in rank
    /// order. Returns 0 when done, else anything: the call then fails with TREEATTN_ERROR_TRANSPORT, TIMEOUT or
    /// ABORTED, and the communicator is broken on this rank. Required.
    pub allgather: Option<
        unsafe extern "C" fn(
            ctx: *mut c_void,
            send: *const c_void,
            recv: *mut c_void,
            bytes: usize,
            timeout_ns: i64,
            abort: *const i32,
        ) -> i32,
    >,
    /// Sends `send_bytes` bytes to rank `to` and receives `recv_bytes` from rank `from` at once; otherwise as
    /// `allgather`. Where one of the sizes is 0 nothing goes that way, and that peer makes no call for it. NULL:
    /// TREEATTN_ALGORITHM_TREE and TREEATTN_ALGORITHM_RING, which need it, are TREEATTN_ERROR_UNSUPPORTED.
    pub sendrecv: Option<
        unsafe extern "C" fn(
            ctx: *mut c_void,
            send: *const c_void,
            send_bytes: usize,
            to: i32,
            recv: *mut c_void,
            recv_bytes: usize,
            from: i32,
            timeout_ns: i64,
            abort: *const i32,
        ) -> i32,
    >,
    /// TREEATTN_TRANSPORT_ flags.
    pub flags: u32,
    /// Zero; keeps the size a multiple of 8.
    pub reserved: u32,
}
