//! How a command ends: what it may fail with, and where its text goes.

use std::io::{ErrorKind, Write};

/// What a command may fail with.
pub type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Prints text to standard output at once. A reader that has left ends the program quietly.
pub fn print(text: &str) -> Outcome<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        result => Ok(result?),
    }
}
