//! Ranks over an engine's transport: here a mesh of sockets between threads. What happens when ranks fail, also between
//! processes, is in tests/faults.

#[path = "../support/mesh.rs"]
mod mesh;
#[path = "../support/watchdog.rs"]
mod watchdog;

mod answers;
mod faults;
mod ranks;
mod statistics;
mod streams;
mod waits;
