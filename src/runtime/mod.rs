//! The objects of the API: runtimes, streams, buffers, communicators, plans; and the self-check beside them.
//!
//! The public Rust API lives here; the C ABI and the command line are thin layers over it. May use everything below
//! (`route`, `cpu`, `cuda`, `comm`, `device`, `attention`, `partial`); nothing below may use it.
//!
//! A step's way: [`Plan::decode`] checks what the host can see ([`Step`](crate::attention::Step)), the stream runs or
//! enqueues it, and the plan's route does the rest.
//!
//! `context` is the runtime object, which all others know. `stream`, `buffer` and `communicator` do not know each other;
//! `issued` says on which streams ranks exchange. `merge` and `energy` need a stream only; `nccl` and
//! `transport` make communicators. `plan`
//! uses communicators and streams; `plan_creation` makes a plan on all ranks, `agreement` compares what they make, and
//! `plan_team` runs its steps on an engine's team. `selfcheck` uses them all.

mod agreement;
mod buffer;
mod communicator;
mod context;
mod energy;
mod issued;
mod merge;
mod nccl;
mod plan;
mod plan_creation;
mod plan_team;
mod selfcheck;
mod stream;
mod transport;

pub use crate::attention::merge::MergeArgs;
pub use crate::comm::nccl::UNIQUE_ID_BYTES as NCCL_UNIQUE_ID_BYTES;
pub use crate::comm::{AllgatherCallback, CommConfig, SendrecvCallback, Transport};
pub use crate::device::{BarrierCallback, EngineExecutor, ParallelCallback, TaskCallback, TeamMember};
pub use crate::device::{Device, DeviceInfo, DeviceKind};
pub use buffer::Buffer;
pub use communicator::{CommStatus, Communicator};
pub use context::{LogCallback, LogLevel, Runtime, RuntimeConfig};
pub use energy::energy;
pub use merge::merge_partials;
pub use nccl::nccl_library;
pub use plan::{Plan, PlanMemory, PlanStats, attention_supported};
pub use selfcheck::{SelfcheckConfig, SelfcheckReport, selfcheck};
pub use stream::Stream;
