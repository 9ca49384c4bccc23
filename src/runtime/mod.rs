//! Ties a backend to a communicator: runtimes, streams, buffers, communicators, plans and their steps.
//!
//! The public Rust API lives here; the C ABI and the command line are thin layers over it. May use everything below
//! (`cpu`, `comm`, `device`, `attention`, `partial`); nothing below may use it.
//!
//! The way of a step: [`Plan::decode`] checks what the host can see ([`Step`](crate::attention::Step)), the backend
//! turns the shard into partials, `exchange` makes the merged ones of them (`execute` holds it together), and the rows are
//! rounded once into the caller's output.

mod allreduce3;
mod buffer;
mod communicator;
mod context;
mod energy;
mod exchange;
mod execute;
mod merge;
mod nccl;
mod output;
mod peer;
mod plan;
mod selfcheck;
mod stream;

pub use crate::comm::nccl::UNIQUE_ID_BYTES as NCCL_UNIQUE_ID_BYTES;
pub use crate::comm::{AllgatherCallback, CommConfig, SendrecvCallback, Transport};
pub use crate::device::{Device, DeviceInfo, DeviceKind};
pub use buffer::Buffer;
pub use communicator::{CommStatus, Communicator};
pub use context::{LogCallback, LogLevel, Runtime, RuntimeConfig};
pub use energy::energy;
pub use merge::{MergeArgs, merge_partials};
pub use plan::{Plan, PlanMemory, PlanStats, attention_supported};
pub use selfcheck::{SelfcheckConfig, SelfcheckReport, selfcheck};
pub use stream::Stream;
