//! Named points at which tests force panics, failed allocations and delays (feature `fault-injection`; without it a
//! point is nothing).
//!
//! A fault is armed by a text `point[#key]=action[@skip][*times]`: action is `panic`, `fail` (the point answers
//! `NoMemory`) or `delay:MILLISECONDS`; `#key` limits it to one rank (or worker), `@skip` passes over the first hits,
//! `*times` fires that often (default 1, `*all` always). Several are separated by `;`. The environment variable
//! `TREEATTN_FAULTS` arms at the first point met. Faults are armed for the whole process.

use crate::error::Result;

/// A point that stands for no rank or worker.
pub(crate) const NO_KEY: i32 = -1;

/// A point by name.
#[inline(always)]
pub(crate) fn point(name: &'static str) -> Result<()> {
    point_at(name, NO_KEY)
}

/// A point by name and rank or worker.
#[cfg(not(feature = "fault-injection"))]
#[inline(always)]
pub(crate) fn point_at(_name: &'static str, _key: i32) -> Result<()> {
    Ok(())
}

#[cfg(feature = "fault-injection")]
pub(crate) use armed::point_at;
#[cfg(feature = "fault-injection")]
pub use armed::{arm, disarm};

#[cfg(feature = "fault-injection")]
mod armed {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Mutex, MutexGuard, Once, PoisonError};
    use std::time::Duration;

    use crate::error::{Error, ErrorKind, Result};

    #[derive(Clone, Copy)]
    enum Action {
        Panic,
        Fail,
        Delay(Duration),
    }

    struct Fault {
        point: String,
        key: Option<i32>,
        action: Action,
        skip: u64,
        times: u64,
    }

    static ANY: AtomicBool = AtomicBool::new(false);
    static FAULTS: Mutex<Vec<Fault>> = Mutex::new(Vec::new());
    static FROM_ENVIRONMENT: Once = Once::new();

    fn faults() -> MutexGuard<'static, Vec<Fault>> {
        FAULTS.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Arms the faults of a text (see the module) beside those already armed.
    pub fn arm(text: &str) -> Result<()> {
        let parsed: Vec<Fault> =
            text.split(';').map(str::trim).filter(|part| !part.is_empty()).map(parse).collect::<Result<_>>()?;
        faults().extend(parsed);
        ANY.store(true, Ordering::Release);
        Ok(())
    }

    /// Forgets every armed fault.
    pub fn disarm() {
        ANY.store(false, Ordering::Release);
        faults().clear();
    }

    pub(crate) fn point_at(name: &'static str, key: i32) -> Result<()> {
        FROM_ENVIRONMENT.call_once(|| {
            if let Ok(text) = std::env::var("TREEATTN_FAULTS")
                && let Err(error) = arm(&text)
            {
                panic!("TREEATTN_FAULTS: {error}");
            }
        });
        if !ANY.load(Ordering::Acquire) {
            return Ok(());
        }
        let action = faults().iter_mut().find_map(|fault| {
            if fault.point != name || fault.key.is_some_and(|k| k != key) || fault.times == 0 {
                return None;
            }
            if fault.skip > 0 {
                fault.skip -= 1;
                return None;
            }
            fault.times = fault.times.saturating_sub(u64::from(fault.times != u64::MAX));
            Some(fault.action)
        });
        match action {
            None => Ok(()),
            Some(Action::Panic) => panic!("injected panic at {name}"),
            Some(Action::Fail) => {
                Err(Error::new(ErrorKind::NoMemory, format!("injected allocation failure at {name}")))
            }
            Some(Action::Delay(time)) => {
                std::thread::sleep(time);
                Ok(())
            }
        }
    }

    fn parse(text: &str) -> Result<Fault> {
        let bad = || Error::invalid("fault", text, "point[#key]=panic|fail|delay:MS[@skip][*times]");
        let (point, rest) = text.split_once('=').ok_or_else(bad)?;
        let (rest, times) = match rest.split_once('*') {
            Some((rest, "all")) => (rest, u64::MAX),
            Some((rest, times)) => (rest, times.parse().map_err(|_| bad())?),
            None => (rest, 1),
        };
        let (action, skip) = match rest.split_once('@') {
            Some((action, skip)) => (action, skip.parse().map_err(|_| bad())?),
            None => (rest, 0),
        };
        let action = match action {
            "panic" => Action::Panic,
            "fail" => Action::Fail,
            _ => {
                let ms = action.strip_prefix("delay:").ok_or_else(bad)?;
                Action::Delay(Duration::from_millis(ms.parse().map_err(|_| bad())?))
            }
        };
        let (point, key) = match point.split_once('#') {
            Some((point, key)) => (point, Some(key.parse().map_err(|_| bad())?)),
            None => (point, None),
        };
        if point.is_empty() {
            return Err(bad());
        }
        Ok(Fault { point: point.to_string(), key, action, skip, times })
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_fault_fires_after_its_skips_and_as_often_as_asked() {
            arm("test.point#3=fail@1*2; test.delay=delay:0").unwrap();
            let hits: Vec<bool> = (0..5).map(|_| point_at("test.point", 3).is_err()).collect();
            assert_eq!(hits, [false, true, true, false, false]);
            assert!(point_at("test.point", 2).is_ok());
            assert!(point_at("test.delay", -1).is_ok());
            for bad in ["x", "=panic", "x=burn", "x=delay:y", "x#y=fail", "x=fail*many", "x=fail@some"] {
                assert_eq!(arm(bad).unwrap_err().kind(), ErrorKind::InvalidArgument, "{bad}");
            }
        }
    }
}
