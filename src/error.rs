//! The one error type of the library, and the status codes it maps to at the C ABI.

use std::fmt::{self, Display};

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
    /// The ranks passed different descriptors to a collective creation.
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
    /// A defect of the library, caught at its border.
    Internal = 21,
    /// The object is in use by another call that must end first.
    Busy = 22,
}

impl ErrorKind {
    /// The status code of the C ABI.
    pub fn code(self) -> i32 {
        self as i32
    }
}

/// An error: its kind, the rank it is about where there is one, and a message that names the argument, the value
/// found and the value wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    rank: Option<i32>,
    message: String,
}

impl Error {
    /// An error of `kind` with a full message.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error { kind, rank: None, message: message.into() }
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
