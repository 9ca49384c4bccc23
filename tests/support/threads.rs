//! The threads of this process, as the kernel lists them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What the name of every thread of the library begins with.
pub const PREFIX: &str = "treeattn-";

/// The process runs on one core from now on, and so do its new threads: see [`come_and_go`].
pub fn on_one_core() {
    // SAFETY: cpu_set_t is plain data for which zero is a value; the calls read and write the set given.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let size = size_of::<libc::cpu_set_t>();
        assert_eq!(libc::sched_getaffinity(0, size, &mut set), 0);
        let first = (0..libc::CPU_SETSIZE as usize).find(|&core| libc::CPU_ISSET(core, &set)).unwrap();
        libc::CPU_ZERO(&mut set);
        libc::CPU_SET(first, &mut set);
        assert_eq!(libc::sched_setaffinity(0, size, &set), 0);
    }
}

/// The threads that are not at their end, by number, with their names. One that was joined may still be listed by the
/// kernel for a moment, but is at its end.
pub fn alive() -> BTreeMap<String, String> {
    /// `PF_EXITING` of Linux.
    const EXITING: u64 = 4;
    let mut found = BTreeMap::new();
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let Ok(stat) = std::fs::read_to_string(task.path().join("stat")) else { continue };
        // "number (name) state ...": the flags are the seventh word after the name.
        let (Some(open), Some(close)) = (stat.find('('), stat.rfind(')')) else { continue };
        let words: Vec<&str> = stat[close + 1..].split_whitespace().collect();
        let Some(flags) = words.get(6).and_then(|word| word.parse::<u64>().ok()) else { continue };
        if flags & EXITING == 0 {
            found.insert(task.file_name().to_string_lossy().into_owned(), stat[open + 1..close].to_string());
        }
    }
    found
}

/// The names of the threads that were not there before.
fn others(before: &BTreeMap<String, String>) -> Vec<String> {
    alive().into_iter().filter(|(id, _)| !before.contains_key(id)).map(|(_, name)| name).collect()
}

/// Has the threads that were not there before run only while this one waits. Whoever tells such a thread to end, and does not
/// wait for it, keeps the only core, so that the thread is still there.
fn hold_back_others(before: &BTreeMap<String, String>) {
    for id in alive().keys().filter(|id| !before.contains_key(*id)) {
        let parameters = libc::sched_param { sched_priority: 0 };
        // SAFETY: reads a local; the number is that of a thread of this process. One that has ended is an error, which
        // changes nothing.
        unsafe { libc::sched_setscheduler(id.parse().unwrap(), libc::SCHED_IDLE, &parameters) };
    }
}

/// Makes things, and ends them: every thread that comes with them has the library's name, at least `least` do, and none is
/// left the moment that they are gone. `what` is for messages.
pub fn come_and_go<T>(what: &str, least: usize, make: impl Fn() -> T) {
    for round in 0..20 {
        let before = alive();
        let made = make();
        let mut new = others(&before);
        // A thread has its maker's name until it has run.
        let own = std::fs::read_to_string("/proc/self/comm").unwrap();
        let began = Instant::now();
        while new.iter().any(|name| name == own.trim()) && began.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(1));
            new = others(&before);
        }
        assert!(new.len() >= least, "{what}, round {round}: found the threads {new:?}, wanted {least}");
        assert!(new.iter().all(|name| name.starts_with(PREFIX)), "{what}, round {round}: found {new:?}");
        hold_back_others(&before);
        drop(made);
        let left = others(&before);
        assert!(left.is_empty(), "{what}, round {round}: found {left:?} after the end, wanted none");
    }
}
