//! The one error type of the library, and the status codes it maps to at the C ABI.

use std::fmt::{self, Display};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// `Result` of every fallible call of the library.
pub type Result<T> = std::result::Result<T, Error>;

macro_rules! errors {
    ($($(#[$doc:meta])* $name:ident = $code:literal),* $(,)?) => {
        /// What went wrong. The discriminant is the status code of the C ABI; values are never reused.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(i32)]
        pub enum ErrorKind { $($(#[$doc])* $name = $code),* }

        impl ErrorKind {
            /// Every kind, in the order of the codes.
            pub const ALL: &'static [ErrorKind] = &[$(ErrorKind::$name),*];

            /// The kind with this status code, if there is one.
            pub fn from_code(code: i32) -> Option<ErrorKind> {
                match code { $($code => Some(ErrorKind::$name),)* _ => None }
            }
        }
    };
}

errors! {
    /// An argument is outside what the call accepts.
    InvalidArgument = 1,
    /// A handle is null, foreign, destroyed or of another type.
    BadHandle = 2,
    /// The object that this one was made from has been destroyed.
    ParentDestroyed = 3,
    /// A valid request for something that this build does not do.
    Unsupported = 4,
    /// A library or device that the request needs is not on this machine.
    Unavailable = 5,
    /// The ranks passed different descriptors to a collective creation, or inputs that do not fit together to a step of a
    /// checked plan.
    Mismatch = 6,
    /// The ranks issued different exchanging calls; the communicator is broken.
    Desync = 7,
    /// A rank did not come before the deadline; the communicator is broken.
    Timeout = 8,
    /// A rank was seen to exit; the communicator is broken.
    PeerLost = 9,
    /// The communicator was aborted; it is broken.
    Aborted = 10,
    /// A length, position or table entry read during the step is out of range; outputs of that sequence are NaN.
    InvalidData = 11,
    /// Host memory could not be had.
    NoMemory = 12,
    /// Device memory could not be had.
    NoDeviceMemory = 13,
    /// The call cannot be made while a stream is being captured.
    Capturing = 14,
    /// A CUDA call failed.
    Cuda = 15,
    /// The CUDA context is lost; only destroy calls still work on its objects.
    CudaFatal = 16,
    /// An asynchronous CUDA error was pending before the call.
    CudaPrior = 17,
    /// An NCCL call failed.
    Nccl = 18,
    /// A callback of the engine's transport failed.
    Transport = 19,
    /// The operating system refused something (threads, files).
    System = 20,
    /// A defect of the library, caught before it reached the caller.
    Internal = 21,
    /// The object is in use by another call that must end first.
    Busy = 22,
    /// The engine's executor did not do what it promised.
    Executor = 23,
}

impl ErrorKind {
    /// The status code of the C ABI.
    pub fn code(self) -> i32 {
        self as i32
    }

    /// Its name at the C ABI, for example "PEER_LOST".
    pub fn name(self) -> String {
        let mut name = String::new();
        for letter in format!("{self:?}").chars() {
            if letter.is_ascii_uppercase() && !name.is_empty() {
                name.push('_');
            }
            name.push(letter.to_ascii_uppercase());
        }
        name
    }
}

/// An error: its kind, the rank it is about where there is one, and a message that names the argument, the value
/// found and the value wanted.
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    rank: Option<i32>,
    message: String,
    /// Of an error that is told once, by whichever call comes first: whether it was. Clones share it.
    told: Option<Arc<AtomicBool>>,
}

impl PartialEq for Error {
    fn eq(&self, other: &Self) -> bool {
        (self.kind, self.rank, &self.message) == (other.kind, other.rank, &other.message)
    }
}

impl Eq for Error {}

impl Error {
    /// An error of `kind` with a full message.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error { kind, rank: None, message: message.into(), told: None }
    }

    /// An invalid argument: its name, the value found, the value wanted.
    pub fn invalid(argument: impl Display, found: impl Display, wanted: impl Display) -> Self {
        Self::new(ErrorKind::InvalidArgument, format!("{argument}: found {found}, wanted {wanted}"))
    }

    /// A field that this build does not serve: its name, the value found, what is served.
    pub fn unsupported(field: impl Display, found: impl Display, wanted: impl Display) -> Self {
        Self::new(ErrorKind::Unsupported, format!("{field}: found {found}, this build supports {wanted}"))
    }

    /// Names the rank that the error is about.
    #[must_use]
    pub fn with_rank(mut self, rank: i32) -> Self {
        self.rank = Some(rank);
        self
    }

    /// Has this error, and all clones of it, told by one call only.
    #[must_use]
    pub(crate) fn told_once(mut self) -> Self {
        self.told = Some(Arc::default());
        self
    }

    /// Claims the telling of this error: whether nobody has before. Of one that is not told once everybody may.
    pub(crate) fn claim(&self) -> bool {
        self.told.as_ref().is_none_or(|told| !told.swap(true, Ordering::Relaxed))
    }

    /// What went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The rank that the error is about (a missing, lost or desynchronised one).
    pub fn rank(&self) -> Option<i32> {
        self.rank
    }

    /// The message for people.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.message)
    }
}

impl std::error::Error for Error {}

/// Work that goes on after the call which began it has returned, and may fail then.
pub(crate) trait LateError: Send + Sync {
    /// Why it failed, if it did. Does not wait for it.
    fn late_error(&self) -> Option<Error>;
}

/// Errors of several steps, told as one.
#[derive(Debug, Default)]
pub(crate) struct ErrorList {
    /// Each with how often it came.
    errors: Vec<(Error, u64)>,
    /// Errors that there was no room for.
    more: u64,
}

impl ErrorList {
    /// Most different errors that are kept.
    const MOST: usize = 16;

    /// Adds the error of one more step.
    pub fn push(&mut self, error: Error) {
        match self.errors.iter().position(|(known, _)| *known == error && known.told.is_none()) {
            Some(known) => self.errors[known].1 += 1,
            None if self.errors.len() < ErrorList::MOST => self.errors.push((error, 1)),
            None => self.more += 1,
        }
    }

    /// All that nobody was told yet, and forgets them: the first, with what the others said in its message.
    pub fn take(&mut self) -> Option<Error> {
        let ErrorList { errors, more } = std::mem::take(self);
        let mut errors = errors.into_iter().filter(|(error, _)| error.claim());
        let (mut all, times) = errors.next()?;
        let steps = |times: u64| if times > 1 { format!(" ({times} steps)") } else { String::new() };
        all.message.push_str(&steps(times));
        for (error, times) in errors {
            all.message.push_str(&format!("; then {}: {}{}", error.kind.name(), error.message, steps(times)));
        }
        if more > 0 {
            all.message.push_str(&format!("; and {more} steps more failed"));
        }
        Some(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_several_steps_are_told_as_one() {
        let mut list = ErrorList::default();
        assert_eq!(list.take(), None);
        let late = Error::new(ErrorKind::Timeout, "rank 1 did not come").with_rank(1);
        list.push(late.clone());
        assert_eq!((list.take(), list.take()), (Some(late.clone()), None));
        list.push(late.clone());
        list.push(late.clone());
        list.push(Error::invalid("n", 3, 4));
        let all = list.take().unwrap();
        assert_eq!((all.kind(), all.rank()), (ErrorKind::Timeout, Some(1)));
        let wanted = "rank 1 did not come (2 steps); then INVALID_ARGUMENT: n: found 3, wanted 4";
        assert_eq!(all.message(), wanted);
        (0..1000).for_each(|n| list.push(Error::invalid("n", n, 4)));
        assert!(list.take().unwrap().message().ends_with("; and 984 steps more failed"));
    }

    #[test]
    fn an_error_that_is_told_once_is_told_by_whoever_comes_first() {
        let mut list = ErrorList::default();
        for first in [true, false] {
            let bad = Error::new(ErrorKind::InvalidData, "kv_length").told_once();
            list.push(bad.clone());
            list.push(Error::invalid("n", 3, 4));
            if first {
                assert!(bad.claim());
                assert_eq!(list.take(), Some(Error::invalid("n", 3, 4)));
            } else {
                assert_eq!(list.take().unwrap().kind(), ErrorKind::InvalidData);
            }
            assert!(!bad.claim());
        }
    }
}
