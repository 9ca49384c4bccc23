//! Threads of `device`: their names, and that the owner of a thread outlives it.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::executor::Executor;
use super::queue::Queue;
use super::workers::Workers;

/// Long enough for anyone who does not wait to be gone first.
const LATE: Duration = Duration::from_millis(100);

/// Ends late, and counts when it has: as a value of a thread, it is dropped at the end of that.
struct LateEnd(Arc<AtomicUsize>);

impl Drop for LateEnd {
    fn drop(&mut self) {
        std::thread::sleep(LATE);
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

thread_local! {
    static END: Cell<Option<LateEnd>> = const { Cell::new(None) };
}

#[test]
fn workers_are_named_and_joined() {
    let workers = Workers::new(3, "threads-test", false).unwrap();
    let (ended, names) = (Arc::new(AtomicUsize::new(0)), Mutex::new(Vec::new()));
    workers
        .run(&|i| {
            if i > 0 {
                END.set(Some(LateEnd(Arc::clone(&ended))));
                names.lock().unwrap().push(std::thread::current().name().unwrap_or_default().to_string());
            }
        })
        .unwrap();
    let mut names = names.into_inner().unwrap();
    names.sort();
    assert_eq!(names, ["threads-test-1", "threads-test-2"]);
    drop(workers);
    assert_eq!(ended.load(Ordering::SeqCst), 2, "dropping waits for the end of every thread");
}

#[test]
fn the_thread_of_a_queue_is_named_and_joined() {
    let ended = Arc::new(AtomicUsize::new(0));
    let theirs = Arc::clone(&ended);
    let name = Arc::new(Mutex::new(String::new()));
    let its_name = Arc::clone(&name);
    let queue = Queue::new(1, "threads-queue").unwrap();
    let task = move || {
        END.set(Some(LateEnd(theirs)));
        *its_name.lock().unwrap() = std::thread::current().name().unwrap_or_default().to_string();
        Ok(())
    };
    queue.push(task, Duration::from_secs(20)).unwrap();
    queue.synchronize().unwrap();
    assert_eq!(*name.lock().unwrap(), "threads-queue");
    drop(queue);
    assert_eq!(ended.load(Ordering::SeqCst), 1, "dropping waits for the end of the thread");
}
