//! Handles: opaque values that name objects in a table, never addresses.
//!
//! A handle is odd and holds a tag, the object's type, its index in the table and a generation, so that a destroyed,
//! foreign or wrong-typed one is always `BadHandle`. Half of the tag differs from one loaded copy of the library to the
//! next. A slot whose generations are used up is never used again. A lookup pins the object: it lives until the call that
//! looked it up is over, also where another thread destroys it meanwhile.
//!
//! A table belongs to a process. A forked child begins with an empty one, and its handles have another tag: those that it
//! inherited name nothing, and what they named, which the child has neither threads nor the right to use, is not touched.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::RwLock;

use super::types::{treeattn_buffer_t, treeattn_comm_t, treeattn_plan_t, treeattn_runtime_t, treeattn_stream_t};
use crate::device::{PerProcess, count_forks, forks};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::{Buffer, Communicator, Plan, Runtime, Stream};

/// Bits 56 to 63: not a canonical address, so that a handle used as a pointer faults at once.
const TAG: usize = 0x7e;
const INDEX_BITS: u32 = 20;
const GENERATION_BITS: u32 = 23;
const _: () = assert!(usize::BITS == 64, "handles need 64 bits");

/// An object of the ABI: its Rust type, the C type that its handles point at, and its number in handles.
pub trait Object: Any + Send + Sync + Sized {
    /// The opaque C type.
    type C;
    /// Number of the type, 1 to 15.
    const TYPE: usize;
    /// What messages call it.
    const NAME: &'static str;
}

macro_rules! objects {
    ($($rust:ty, $c:ty, $number:literal, $name:literal;)*) => {
        $(impl Object for $rust {
            type C = $c;
            const TYPE: usize = $number;
            const NAME: &'static str = $name;
        })*
        const NAMES: &[(usize, &str)] = &[$(($number, $name)),*];
    };
}

objects! {
    Runtime, treeattn_runtime_t, 1, "runtime";
    Stream, treeattn_stream_t, 2, "stream";
    Buffer, treeattn_buffer_t, 3, "buffer";
    Communicator, treeattn_comm_t, 4, "communicator";
    Plan, treeattn_plan_t, 5, "plan";
}

/// Bits 48 to 63 of a process that was forked so many times: the tag, and a hash of where this copy of the library is loaded.
fn mark_after(forks: usize) -> usize {
    static HERE: u8 = 0;
    let page = (&raw const HERE).addr() >> 12;
    TAG << 8 | (page.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56).wrapping_add(forks) & 0xff
}

/// That of this process.
fn mark() -> usize {
    mark_after(forks())
}

struct Slot {
    generation: usize,
    kind: usize,
    object: Option<Arc<dyn Any + Send + Sync>>,
}

#[derive(Default)]
struct Table {
    slots: Vec<Slot>,
    /// Free slots, longest free first, so that generations come round late.
    free: VecDeque<usize>,
}

/// The table of this process.
static TABLE: PerProcess<RwLock<Table>> = PerProcess::new();

/// Puts an object into the table and gives its handle.
pub fn insert<T: Object>(object: T) -> Result<*mut T::C> {
    count_forks()?;
    // Before the lock: where there is no room, what the object's end does is not done under it.
    let object: Arc<dyn Any + Send + Sync> = Arc::new(object);
    let mut table = TABLE.get().write();
    let index = match table.free.pop_front() {
        Some(index) => index,
        None if table.slots.len() < 1 << INDEX_BITS && table.slots.try_reserve(1).is_ok() => {
            table.slots.push(Slot { generation: 0, kind: 0, object: None });
            table.slots.len() - 1
        }
        None => {
            let found = table.slots.len();
            let message = format!("handles: found {found} slots in use, wanted room for one more");
            return Err(Error::new(ErrorKind::NoMemory, message));
        }
    };
    let slot = &mut table.slots[index];
    slot.kind = T::TYPE;
    slot.object = Some(object);
    let value = mark() << 48 | slot.generation << (5 + INDEX_BITS) | T::TYPE << (1 + INDEX_BITS) | index << 1 | 1;
    Ok(std::ptr::without_provenance_mut(value))
}

/// As [`insert`], for all of the objects or none.
pub fn insert_all<T: Object>(objects: Vec<T>) -> Result<Vec<*mut T::C>> {
    let mut handles = Vec::with_capacity(objects.len());
    for object in objects {
        match insert(object) {
            Ok(handle) => handles.push(handle),
            Err(error) => {
                for handle in handles {
                    remove::<T>("handle", handle)?;
                }
                return Err(error);
            }
        }
    }
    Ok(handles)
}

/// The object that a handle names, pinned.
pub fn get<T: Object>(argument: &str, handle: *mut T::C) -> Result<Arc<T>> {
    let table = TABLE.get().read();
    let index = locate::<T>(&table, argument, handle.addr())?;
    let object = table.slots[index].object.clone();
    object.and_then(|object| object.downcast().ok()).ok_or_else(|| bad::<T>(argument, handle.addr(), "a destroyed one"))
}

/// As [`get`]; NULL is none.
pub fn get_optional<T: Object>(argument: &str, handle: *mut T::C) -> Result<Option<Arc<T>>> {
    if handle.is_null() { Ok(None) } else { get(argument, handle).map(Some) }
}

/// Takes the object of a handle out of the table; the handle is dead from now on. NULL is none.
pub fn remove<T: Object>(argument: &str, handle: *mut T::C) -> Result<Option<Arc<T>>> {
    if handle.is_null() {
        return Ok(None);
    }
    let mut table = TABLE.get().write();
    let index = locate::<T>(&table, argument, handle.addr())?;
    let slot = &mut table.slots[index];
    slot.generation += 1;
    let reusable = slot.generation < 1 << GENERATION_BITS;
    let object = slot.object.take();
    // Without memory for the list the slot is lost, and nothing else.
    if reusable && table.free.try_reserve(1).is_ok() {
        table.free.push_back(index);
    }
    drop(table);
    Ok(object.and_then(|object| object.downcast().ok()))
}

/// Drops an object that was removed, once no other call uses it: so this call gives back what the object holds, which may
/// take a while, and not one that never blocks. Calls that go on for longer than 0.1 s are not waited for.
pub fn drop_last<T: Object>(object: Arc<T>) {
    /// Looks at whether others use it, 100 us apart.
    const MOST: usize = 1000;
    for _ in 0..MOST {
        if Arc::strong_count(&object) == 1 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_micros(100));
    }
}

/// As [`remove`], unless `check` says that the object cannot go now: the handle then stays alive.
pub fn remove_if<T: Object>(
    argument: &str,
    handle: *mut T::C,
    check: impl FnOnce(&T) -> Result<()>,
) -> Result<Option<Arc<T>>> {
    if !handle.is_null() {
        check(&*get::<T>(argument, handle)?)?;
    }
    remove(argument, handle)
}

fn locate<T: Object>(table: &Table, argument: &str, value: usize) -> Result<usize> {
    if value == 0 {
        return Err(bad::<T>(argument, value, "NULL"));
    }
    if value & 1 == 1 && (0..forks()).any(|forks| value >> 48 == mark_after(forks)) {
        return Err(bad::<T>(argument, value, "one of the process that this one was forked from"));
    }
    if value >> 48 != mark() || value & 1 == 0 {
        return Err(bad::<T>(argument, value, "no handle of this library"));
    }
    let kind = value >> (1 + INDEX_BITS) & 0xf;
    if kind != T::TYPE {
        let name = NAMES.iter().find(|(number, _)| *number == kind).map_or("unknown", |(_, name)| name);
        return Err(bad::<T>(argument, value, &format!("a handle of type {name}")));
    }
    let index = value >> 1 & ((1 << INDEX_BITS) - 1);
    let generation = value >> (5 + INDEX_BITS) & ((1 << GENERATION_BITS) - 1);
    match table.slots.get(index) {
        Some(slot) if slot.generation == generation && slot.kind == kind && slot.object.is_some() => Ok(index),
        _ => Err(bad::<T>(argument, value, "a destroyed one")),
    }
}

fn bad<T: Object>(argument: &str, value: usize, what: &str) -> Error {
    let message = format!("{argument}: found {value:#x}, {what}; wanted a live {} handle", T::NAME);
    Error::new(ErrorKind::BadHandle, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::RuntimeConfig;

    #[test]
    fn dead_foreign_and_wrong_handles_are_told_apart() {
        let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
        let handle = insert(runtime).unwrap();
        assert_eq!(handle.addr() & 1, 1);
        assert!(get::<Runtime>("runtime", handle).is_ok());
        let error = get::<Plan>("plan", handle.cast()).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::BadHandle);
        assert!(error.message().contains("a handle of type runtime"), "{error}");
        let pinned = get::<Runtime>("runtime", handle).unwrap();
        assert!(remove::<Runtime>("runtime", handle).unwrap().is_some());
        assert!(get::<Runtime>("runtime", handle).err().unwrap().message().contains("destroyed"));
        assert!(remove::<Runtime>("runtime", handle).is_err());
        drop(pinned);
        for value in [1usize, 8, usize::MAX, mark() << 48 | 1, mark() << 48 | 1 << 21 | 0xfffff << 1 | 1] {
            let handle = std::ptr::without_provenance_mut(value);
            assert_eq!(get::<Runtime>("runtime", handle).err().unwrap().kind(), ErrorKind::BadHandle, "{value:#x}");
        }
        assert!(remove::<Runtime>("runtime", std::ptr::null_mut()).unwrap().is_none());
        // As another copy of the library would make it.
        let here = insert(Runtime::new(RuntimeConfig::default()).unwrap()).unwrap();
        assert!(get::<Runtime>("runtime", here.map_addr(|value| value ^ 1 << 50)).is_err());
        remove::<Runtime>("runtime", here).unwrap();
    }

    #[test]
    fn a_slot_is_given_up_before_its_generations_come_round() {
        let runtime = Runtime::new(RuntimeConfig::default()).unwrap();
        let first = insert(runtime.clone()).unwrap();
        let index = first.addr() >> 1 & ((1 << INDEX_BITS) - 1);
        TABLE.get().write().slots[index].generation = (1 << GENERATION_BITS) - 1;
        let last = first.map_addr(|value| value | ((1 << GENERATION_BITS) - 1) << (5 + INDEX_BITS));
        assert!(remove::<Runtime>("runtime", last).unwrap().is_some());
        assert!(!TABLE.get().read().free.contains(&index));
        assert!(get::<Runtime>("runtime", last).is_err() && get::<Runtime>("runtime", first).is_err());
    }

    #[test]
    fn random_calls_agree_with_a_model() {
        let mut state = 1u64;
        let mut draw = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        let (mut live, mut dead) = (Vec::new(), Vec::new());
        let template = Runtime::new(RuntimeConfig::default()).unwrap();
        for _ in 0..if cfg!(miri) { 2_000 } else { 1_000_000 } {
            match draw(5) {
                0 if live.len() < 50 => live.push(insert(template.clone()).unwrap()),
                1 if !live.is_empty() => {
                    let handle = live.swap_remove(draw(live.len() as u64) as usize);
                    assert!(remove::<Runtime>("runtime", handle).unwrap().is_some());
                    if dead.len() < 200 {
                        dead.push(handle);
                    }
                }
                2 if !live.is_empty() => {
                    assert!(get::<Runtime>("runtime", live[draw(live.len() as u64) as usize]).is_ok());
                }
                3 if !dead.is_empty() => {
                    let handle = dead[draw(dead.len() as u64) as usize];
                    assert!(
                        get::<Runtime>("runtime", handle).is_err() && remove::<Runtime>("runtime", handle).is_err()
                    );
                }
                _ => {
                    let value = (draw(1 << 31) << 33 | draw(1 << 31) << 2 | draw(4)) as usize;
                    let handle = std::ptr::without_provenance_mut(value);
                    if !live.contains(&handle) {
                        assert!(get::<Runtime>("runtime", handle).is_err());
                    }
                }
            }
        }
        for handle in live {
            remove::<Runtime>("runtime", handle).unwrap();
        }
    }
}
