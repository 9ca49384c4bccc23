//! Communicators and plans of one process: what they promise when ranks agree, differ, stay away or leave.

#[path = "../support/watchdog.rs"]
mod watchdog;

mod agreement;
mod answers;
mod arguments;
mod checked;
#[cfg(target_arch = "x86_64")]
mod floats;
mod group;
mod lifetimes;
mod memory;
mod waits;
