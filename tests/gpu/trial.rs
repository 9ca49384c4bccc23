//! Tests as functions that panic, in this process or in one of their own. Each says how long it took.

use std::process::{Command, ExitCode, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use libtest_mimic::{Failed, Trial};
use treeattn::attention::Dtype;
use treeattn::runtime::{Communicator, DeviceKind, Plan, Runtime, RuntimeConfig};

use crate::mirror::GPU;
use crate::numerics::shape;
use crate::support::full;

/// Names the one test that the process was started for.
const ALONE: &str = "TREEATTN_TEST_ALONE";

/// Why tests of a GPU cannot run here.
pub fn missing() -> Option<String> {
    let runtime = Runtime::new(RuntimeConfig::default()).ok()?;
    if runtime.device_count(DeviceKind::Cuda) == Ok(0) {
        return Some("no GPU".into());
    }
    let comm = Communicator::create_local(&runtime, &[GPU], &Default::default());
    let desc = shape(8, 2, 64, Dtype::Bf16);
    comm.and_then(|comm| Plan::create(&comm[0], &desc).map(drop)).err().map(|error| error.to_string())
}

/// A test in this process, beside others.
pub fn test(name: impl Into<String>, body: impl FnOnce() + Send + 'static) -> Trial {
    let name = name.into();
    let timed_name = name.clone();
    Trial::test(name, move || {
        timed(&timed_name, || {
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).map_err(|panic| {
                let text = panic.downcast_ref::<String>().cloned();
                Failed::from(text.or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string())).unwrap_or_default())
            })
        })
    })
}

/// Environment variables.
pub type Variables = &'static [(&'static str, &'static str)];

/// A test in a process of its own, which [`alone`] runs there, with these variables set.
pub fn apart(name: &'static str, variables: Variables) -> Trial {
    Trial::test(name, move || timed(name, || run_apart(name, variables)))
}

/// The same, for tests of which one runs at a time.
#[allow(dead_code)] // not every executable has such
pub fn in_turn(name: &'static str, variables: Variables) -> Trial {
    static TURN: Mutex<()> = Mutex::new(());
    Trial::test(name, move || {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        timed(name, || run_apart(name, variables))
    })
}

/// Runs a test and says how long it took; `run.sh` makes a table of these lines.
fn timed(name: &str, body: impl FnOnce() -> Result<(), Failed>) -> Result<(), Failed> {
    let began = Instant::now();
    let result = body();
    println!("\ntook {:8.2} s {name}", began.elapsed().as_secs_f64());
    result
}

/// The longest that a test in a process of its own may take. One that hangs is ended, and the others still run.
fn most() -> Duration {
    Duration::from_secs(if full() { 570 } else { 150 })
}

fn run_apart(name: &str, variables: Variables) -> Result<(), Failed> {
    let mut command = Command::new(std::env::current_exe()?);
    command.env(ALONE, name).envs(variables.iter().copied()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn()?;
    let id = child.id();
    let (ended, end) = mpsc::channel();
    let reading = std::thread::spawn(move || ended.send(child.wait_with_output()));
    let received = end.recv_timeout(most());
    let in_time = received.is_ok();
    let output = match received {
        Ok(output) => output?,
        Err(_) => {
            // SAFETY: ends the process just started, which nobody has waited for yet.
            unsafe { libc::kill(id as libc::pid_t, libc::SIGKILL) };
            end.recv()??
        }
    };
    let _ = reading.join();
    print!("{}", String::from_utf8_lossy(&output.stdout));
    if output.status.success() {
        return Ok(());
    }
    let late = if in_time { String::new() } else { format!("killed after {:?}, ", most()) };
    Err(format!("{late}{}: {}", output.status, String::from_utf8_lossy(&output.stderr)).into())
}

/// Runs the one test that the process was started for, if it was.
pub fn alone(bodies: &[(&str, fn())]) -> Option<ExitCode> {
    let name = std::env::var(ALONE).ok()?;
    let Some((_, body)) = bodies.iter().find(|(known, _)| *known == name) else { return Some(ExitCode::FAILURE) };
    body();
    Some(ExitCode::SUCCESS)
}
