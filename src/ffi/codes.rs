//! The constants of the ABI. At compile time they are compared with the core's.

use crate::error::Status;
use crate::events::Kind;
use std::ffi::{CStr, c_char};

/// The result of a call, or why a stream has ended. The values never change.
#[repr(i32)]
#[allow(missing_docs)]
pub enum presence_status {
    /// Success.
    PRESENCE_OK = 0,
    /// An argument is invalid: NULL, not UTF-8, empty, too long, or with a character that is not allowed.
    PRESENCE_INVALID = -1,
    /// The client is offline: it was marked offline in this process, its last session here was closed, or another
    /// process announced or reported it.
    PRESENCE_OFFLINE = -2,
    /// The sender, stream, service, connection or queue has ended already.
    PRESENCE_CLOSED = -3,
    /// The reader cancelled the stream. A worker gets it also if the client left before the stream had begun.
    PRESENCE_CANCELLED = -4,
    /// A buffer or limit is full. A sender can send again after PRESENCE_EVENT_WRITABLE. A stream ends with it if its
    /// reader is too slow.
    PRESENCE_FULL = -5,
    /// The message is larger than presence_sender_max_message, or the request larger than max_payload of nats-server.
    PRESENCE_TOO_LARGE = -6,
    /// The stream is on level 0, and the reader would mistake the payload for something else: it begins with
    /// "__STREAM_END__" or "__STREAM_ERROR__", or looks like a JetStream acknowledgement. On a lane any payload can be
    /// sent.
    PRESENCE_RESERVED = -7,
    /// There is no connection to nats-server, or it was lost while the stream ran.
    PRESENCE_DISCONNECTED = -8,
    /// The process at the other end is gone.
    PRESENCE_PEER_GONE = -9,
    /// No worker serves the subject.
    PRESENCE_NO_RESPONDERS = -10,
    /// In use: only one thread at a time may wait on a queue. As the status of a PRESENCE_EVENT_ERROR: the worker has
    /// reached its limit of running streams and refused this one.
    PRESENCE_BUSY = -11,
    /// The timeout has passed.
    PRESENCE_TIMEOUT = -12,
    /// The worker ended the stream with an error; the event's `data` is its text.
    PRESENCE_REMOTE = -13,
    /// The handle belongs to the parent of this forked process, or the parent had connected before the fork.
    PRESENCE_FORKED = -14,
    /// A defect of this library, which remains usable.
    PRESENCE_INTERNAL = -15,
}

/// The kind of an event, with the fields that it sets besides `kind`, `status` and `tag`.
#[repr(i32)]
#[allow(missing_docs)]
pub enum presence_event_kind {
    /// A service received a request. `sender` answers it: the caller owns it and must call presence_sender_free.
    /// `client` is the client's id, or empty; `subject` is what the request was sent to; `data` is its payload.
    PRESENCE_EVENT_REQUEST = 1,
    /// A message of a stream: `stream`, `data`.
    PRESENCE_EVENT_DATA = 2,
    /// The worker ended the stream: `stream`. It is the stream's last event.
    PRESENCE_EVENT_END = 3,
    /// The stream ended in another way: `stream`; `status` is why, and `data` a text. It is the stream's last event.
    PRESENCE_EVENT_ERROR = 4,
    /// A sender was stopped: `sender`, `client`; `status` is why. Delivered at most once, after REQUEST, and never for
    /// a sender that you ended yourself. The sender must still be freed.
    PRESENCE_EVENT_STOPPED = 5,
    /// A sender that returned PRESENCE_FULL can send again: `sender`, `client`.
    PRESENCE_EVENT_WRITABLE = 6,
    /// A client came online in this process: `client`. Only in queues that were passed to presence_watch.
    PRESENCE_EVENT_ONLINE = 7,
    /// A client went offline in this process: `client`. Only in queues that were passed to presence_watch.
    PRESENCE_EVENT_OFFLINE = 8,
    /// The connection to nats-server was made: `data` is the server's host:port. Only in queues that were passed to
    /// presence_conn_watch.
    ///
    /// With a `subject`, in a service's queue: nats-server has accepted the service's subscription again.
    PRESENCE_EVENT_CONNECTED = 9,
    /// The connection to nats-server is lost: `data` is why. Streams and senders on level 0, and requests that no
    /// worker has accepted, end with PRESENCE_DISCONNECTED. The library reconnects, unless `status` is PRESENCE_CLOSED.
    /// Only in queues that were passed to presence_conn_watch.
    ///
    /// With a `subject`, in a service's queue: nats-server has refused the service's subscription or taken it back, so
    /// no requests come; `data` is why. See presence_serve.
    PRESENCE_EVENT_DISCONNECTED = 10,
    /// Something that an operator should know: `data` is a text; `status` and `tag` say what it is about.
    PRESENCE_EVENT_LOG = 11,
}

macro_rules! assert_same {
    ($($c:ident = $rust:path),* $(,)?) => { $(assert!($c as i32 == $rust as i32);)* };
}

#[rustfmt::skip]
const _: () = {
    use presence_event_kind::*;
    use presence_status::*;
    assert_same!(
        PRESENCE_OK = Status::Ok, PRESENCE_INVALID = Status::Invalid, PRESENCE_OFFLINE = Status::Offline,
        PRESENCE_CLOSED = Status::Closed, PRESENCE_CANCELLED = Status::Cancelled, PRESENCE_FULL = Status::Full,
        PRESENCE_TOO_LARGE = Status::TooLarge, PRESENCE_RESERVED = Status::Reserved,
        PRESENCE_DISCONNECTED = Status::Disconnected, PRESENCE_PEER_GONE = Status::PeerGone,
        PRESENCE_NO_RESPONDERS = Status::NoResponders, PRESENCE_BUSY = Status::Busy, PRESENCE_TIMEOUT = Status::Timeout,
        PRESENCE_REMOTE = Status::Remote, PRESENCE_FORKED = Status::Forked, PRESENCE_INTERNAL = Status::Internal,
    );
    assert!(PRESENCE_INTERNAL as i32 == 1 - Status::ALL.len() as i32);
    assert_same!(
        PRESENCE_EVENT_REQUEST = Kind::Request, PRESENCE_EVENT_DATA = Kind::Data, PRESENCE_EVENT_END = Kind::End,
        PRESENCE_EVENT_ERROR = Kind::Error, PRESENCE_EVENT_STOPPED = Kind::Stopped,
        PRESENCE_EVENT_WRITABLE = Kind::Writable, PRESENCE_EVENT_ONLINE = Kind::Online,
        PRESENCE_EVENT_OFFLINE = Kind::Offline, PRESENCE_EVENT_CONNECTED = Kind::Connected,
        PRESENCE_EVENT_DISCONNECTED = Kind::Disconnected, PRESENCE_EVENT_LOG = Kind::Log,
    );
};

const UNKNOWN: &CStr = c"unknown status";
const UNKNOWN_KIND: &CStr = c"unknown kind";
const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
    Ok(version) => version,
    Err(_) => c"",
};

/// Returns a short English text for a status. It is never NULL and need not be freed.
#[unsafe(no_mangle)]
pub extern "C" fn presence_status_text(status: i32) -> *const c_char {
    Status::from_code(status).map_or(UNKNOWN, Status::c_text).as_ptr()
}

/// Returns the name of an event's kind, such as "REQUEST", for logs. It is never NULL and need not be freed.
#[unsafe(no_mangle)]
pub extern "C" fn presence_event_kind_text(kind: i32) -> *const c_char {
    let known = Kind::ALL.into_iter().find(|known| *known as i32 == kind);
    known.map_or(UNKNOWN_KIND, Kind::c_text).as_ptr()
}

/// Returns the library's version, "major.minor.patch". It need not be freed.
#[unsafe(no_mangle)]
pub extern "C" fn presence_version() -> *const c_char {
    VERSION.as_ptr()
}
