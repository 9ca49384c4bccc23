//! Ranks on GPUs that write into each other's memory: windows, and how such ranks fail together.
//!
//! A step's exchange is one kernel a rank (`kernels/exchange.cu`). It pushes into the windows of all ranks and reads its own;
//! `windows` owns these and says in an [`ExchangeView`](crate::partial::ExchangeView) where they are. What is not a step
//! (the agreement on a plan, the setup) goes over another [`Bootstrap`](super::bootstrap::Bootstrap): the local group of a
//! process, or NCCL between processes.
//!
//! | module | purpose | uses |
//! |---|---|---|
//! | `geometry` | the size of a window | |
//! | `local` | a window of this process | `geometry` |
//! | `process` | sees other processes end | |
//! | `remote` | windows of other processes: notices to their owners, and their release | `local`, `process` |
//! | `windows` | the windows of a group | the above |
//! | `nodes` | which ranks share a node, and which meet over NCCL | |
//! | `offer` | how ranks of several processes open each other's windows | `windows` |
//! | `exits` | ends a rank's waits for ranks whose processes have ended | `windows` |
//! | `rank` | one rank's end of a group | `windows`, `exits` |
//!
//! Faults go both ways through words in mapped host memory: a kernel that gives up says why, once and for good, and a word
//! from the host ends every wait. So an abort, or a rank that leaves, ends waits on a GPU as it does on the CPU, and
//! nothing here ever waits for a device.

mod exits;
mod geometry;
mod local;
mod nodes;
mod offer;
mod process;
mod rank;
mod remote;
mod windows;

pub(crate) use nodes::Nodes;
pub(crate) use offer::Offer;
pub(crate) use rank::GpuRank;
pub(crate) use windows::Windows;
