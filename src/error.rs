//! Errors: a fixed status, and a message that has the wrong value. `Status` is the header's presence_status.

use std::borrow::Cow;
use std::fmt;

/// The result of a call, or why a stream has ended. The values never change.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Success.
    Ok = 0,
    /// An argument is invalid: NULL, not UTF-8, empty, too long, or with a character that is not allowed.
    Invalid = -1,
    /// The client is offline: it was marked offline in this process, its last session here was closed, or another
    /// process announced or reported it.
    Offline = -2,
    /// The sender, stream, service, connection or queue has ended already.
    Closed = -3,
    /// The reader cancelled the stream. A worker gets it also if the client left before the stream had begun.
    Cancelled = -4,
    /// A buffer or limit is full. A sender can send again after PRESENCE_EVENT_WRITABLE. A stream ends with it if its
    /// reader is too slow.
    Full = -5,
    /// The message is larger than presence_sender_max_message, or the request larger than max_payload of nats-server.
    TooLarge = -6,
    /// The stream is on level 0, and the reader would mistake the payload for something else: it begins with
    /// "__STREAM_END__" or "__STREAM_ERROR__", or looks like a JetStream acknowledgement. On a lane any payload can be
    /// sent.
    Reserved = -7,
    /// There is no connection to nats-server, or it was lost while the stream ran.
    Disconnected = -8,
    /// The process at the other end is gone.
    PeerGone = -9,
    /// No worker serves the subject.
    NoResponders = -10,
    /// In use: only one thread at a time may wait on a queue. As the status of a PRESENCE_EVENT_ERROR: the worker has
    /// reached its limit of running streams and refused this one.
    Busy = -11,
    /// The timeout has passed.
    Timeout = -12,
    /// The worker ended the stream with an error; the event's `data` is its text.
    Remote = -13,
    /// The handle belongs to the parent of this forked process, or the parent had connected before the fork.
    Forked = -14,
    /// A defect of this library, which remains usable.
    Internal = -15,
}

impl Status {
    /// Every status: the one with code `-n` is at index `n`.
    ///
    /// cbindgen:ignore
    pub const ALL: [Status; 16] = [
        Status::Ok,
        Status::Invalid,
        Status::Offline,
        Status::Closed,
        Status::Cancelled,
        Status::Full,
        Status::TooLarge,
        Status::Reserved,
        Status::Disconnected,
        Status::PeerGone,
        Status::NoResponders,
        Status::Busy,
        Status::Timeout,
        Status::Remote,
        Status::Forked,
        Status::Internal,
    ];

    /// Returns the number of this status in the C ABI.
    #[must_use]
    pub const fn code(self) -> i32 {
        self as i32
    }

    /// Returns the status with this number.
    #[must_use]
    pub fn from_code(code: i32) -> Option<Status> {
        let index = usize::try_from(code.checked_neg()?).ok()?;
        Status::ALL.get(index).copied()
    }

    /// Returns its meaning in a few words, NUL-terminated for C.
    pub(crate) const fn c_text(self) -> &'static std::ffi::CStr {
        match self {
            Status::Ok => c"ok",
            Status::Invalid => c"invalid argument",
            Status::Offline => c"client is offline",
            Status::Closed => c"already ended",
            Status::Cancelled => c"cancelled",
            Status::Full => c"buffer or limit is full",
            Status::TooLarge => c"payload too large",
            Status::Reserved => c"payload begins like a marker of level 0",
            Status::Disconnected => c"not connected to nats-server",
            Status::PeerGone => c"the process at the other end is gone",
            Status::NoResponders => c"nobody serves the subject",
            Status::Busy => c"busy: in use, or at its limit",
            Status::Timeout => c"timed out",
            Status::Remote => c"the worker ended the stream with an error",
            Status::Forked => c"not usable in a forked process",
            Status::Internal => c"defect in nats-presence",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.c_text().to_str().unwrap_or_default())
    }
}

/// A status, and a message that says which value was wrong and what would be right. It never has a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// What kind of error it is.
    pub status: Status,
    /// For people: its wording may change.
    pub message: Cow<'static, str>,
}

impl Error {
    pub(crate) fn new(status: Status, message: impl Into<Cow<'static, str>>) -> Error {
        Error { status, message: message.into() }
    }

    pub(crate) fn invalid(message: impl Into<Cow<'static, str>>) -> Error {
        Error::new(Status::Invalid, message)
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Error {
        Error::new(status, status.c_text().to_str().unwrap_or_default())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// What fallible calls return.
pub type Result<T, E = Error> = std::result::Result<T, E>;
