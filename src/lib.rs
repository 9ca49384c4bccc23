//! libtreeattn: exact decode attention over a KV cache that is sharded along the sequence.
//!
//! Each rank (a GPU, a set of CPU workers, a process) attends its own shard and yields a partial, (output,
//! log-sum-exp); partials meet by an associative merge, so they meet in a tree (Tree Attention, arXiv 2408.04093).
//! Also known as decode context parallelism; not the tree *mask* of speculative decoding.
//!
//! The Rust API: a [`Runtime`](runtime::Runtime) a process, a [`Communicator`](runtime::Communicator) a rank, a
//! [`Plan`](runtime::Plan) a shape and rank, and [`Plan::decode`](runtime::Plan::decode) for every layer of every step, with
//! [`DecodeArgs`](attention::DecodeArgs). `examples/decode.rs` shows them at work. Every call returns a [`Result`]; none
//! panics or ends the process. README.md says what is accepted, what errors leave behind, and who runs and waits where.
//!
//! The modules; each may use those below it:
//!
//! | module | holds |
//! |---|---|
//! | `ffi` | the C ABI, one file a section of `include/treeattn.h` |
//! | [`runtime`] | runtimes, streams, buffers, communicators, plans: the Rust API |
//! | `route` | what a plan does with a step, from this rank's shard to the merged output |
//! | [`cpu`], `cuda`, `comm` | the two backends that attend a shard; how ranks find each other, exchange and fail together |
//! | [`device`] | devices, worker threads, queues, host memory; the CUDA driver |
//! | [`partial`] | the monoid of partials, where they lie in memory, and the epoch protocol |
//! | [`attention`] | shapes, tensors, steps, placement, the float64 reference |
//! | [`cost`] | what a step takes, predicted |
//! | [`error`], [`fault`] | the one error type; named points at which tests inject faults |
//!
//! # A step's way
//!
//! One rank on a CPU, without a stream: eight modules, three of which it comes back to. Results and errors return by the same
//! calls.
//!
//! | | module | does, in these files |
//! |---|---|---|
//! | 1 | `ffi` | `plan`, with `handle`, `memory` and `convert`: reads the C struct once, into [`DecodeArgs`](attention::DecodeArgs) |
//! | 2 | [`runtime`] | `plan`: is the plan open, and can it attend |
//! | 3 | [`attention`] | `capability` (by way of `route::choose`), `step`, `step_room`, `step_arrays`: a checked [`Step`](attention::Step) |
//! | 4 | [`runtime`] again | `plan`, `stream`: where it runs, and what becomes of an error |
//! | 5 | `route` | `alone`, `host::shard`: scratch for the partial |
//! | 6 | [`cpu`] | `backend`, `sequences`, `partition`: reads and checks the step's arrays, shares out the work |
//! | 7 | [`device`] | `workers`: a part on each thread |
//! | 8 | [`cpu`] again | `slice`, `worker`, `task`, `kernel`, `sums`: attends |
//! | 9 | `route` again | `host::shard`: takes rows from the scratch |
//! | 10 | [`partial`] | `host_rows`: writes them to the output |
//! | 11 | `comm` | `board`: counts the step, for the communicator's status |
//!
//! Over windows of GPUs in one launch: the same down to 4, where `comm` (`gpu::rank`) says whether the group is whole; `route`
//! (`windows::route`) adds the view of the windows and the step's fingerprint; `cuda` (`backend`, `terms`) checks pointers and
//! fills the kernel's parameters; [`device`] (`cuda::module`) launches; `route` and `comm` count. The kernel attends, pushes and
//! merges (`kernels/README.md`). Seven modules, three of which it comes back to. Between several CPU ranks, `host::exchange` and
//! an end of `comm` stand between 8 and 9.
//!
//! # What something new touches
//!
//! - An element type: `attention::{dtype, format, block}`, which define it; on CPUs `cpu::simd::codec` and
//!   `cpu::kernel::table`; on GPUs `kernels/abi.cuh` and `kernels/widen.cuh`, beside `cuda::abi`, which compares the two sides;
//!   `ffi::{codes, layout}`. A faster kernel of its own is one more `.cu` and its choice in `cuda::kernels`.
//! - A rule for scores: `attention::{score, descriptor, capability}`, where the reference finds it; on CPUs `cpu::shape`,
//!   `cpu::task` and `cpu::kernel::modify`; on GPUs `kernels/weigh.cuh` and the parameters (`kernels/params.cuh`,
//!   `cuda::{params, terms, abi}`); `ffi::{types::shape, convert, layout}`. One that brings numbers a head or a key also
//!   `attention::{decode_args, step, unused_args}`.
//! - A route: its file in `route`, a line of `route::choose`. If it has a name of its own, `Algorithm` in
//!   `attention::descriptor`, a line of `route::algorithms` and `ffi::{codes, layout}`.
//!
//! And the tests: lists in `tests/constants.rs`, `tests/support/random.rs` and `tests/gpu/space.rs` name every case.

pub mod attention;
pub(crate) mod comm;
pub mod cost;
pub mod cpu;
pub(crate) mod cuda;
pub mod device;
pub mod error;
pub mod fault;
pub mod ffi;
pub mod partial;
pub(crate) mod route;
pub mod runtime;

pub use error::{Error, ErrorKind, Result};
