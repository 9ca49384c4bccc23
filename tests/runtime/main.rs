//! Communicators and plans of one process: what they promise when ranks agree, differ, stay away or leave.

#[path = "../support/watchdog.rs"]
mod watchdog;

mod agreement;
mod answers;
mod group;
mod lifetimes;
mod memory;
mod waits;
