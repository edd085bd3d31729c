//! The constants of the ABI. At compile time they are compared with the core's.

use crate::error::Status;
use crate::events::Kind;
use std::ffi::{CStr, c_char};

/// The result of a call, or why a stream has ended. The values never change.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// The core's constants are those of the ABI.
macro_rules! same {
    ($core:ident, $abi:ident: $($rust:ident = $c:ident),* $(,)?) => {
        const _: () = { $(assert!($core::$rust as i32 == $abi::$c as i32);)* };

        impl From<$core> for $abi {
            fn from(core: $core) -> $abi {
                match core {
                    $($core::$rust => $abi::$c,)*
                }
            }
        }
    };
}

#[rustfmt::skip]
same!(Status, presence_status:
    Ok = PRESENCE_OK, Invalid = PRESENCE_INVALID, Offline = PRESENCE_OFFLINE, Closed = PRESENCE_CLOSED,
    Cancelled = PRESENCE_CANCELLED, Full = PRESENCE_FULL, TooLarge = PRESENCE_TOO_LARGE, Reserved = PRESENCE_RESERVED,
    Disconnected = PRESENCE_DISCONNECTED, PeerGone = PRESENCE_PEER_GONE, NoResponders = PRESENCE_NO_RESPONDERS,
    Busy = PRESENCE_BUSY, Timeout = PRESENCE_TIMEOUT, Remote = PRESENCE_REMOTE, Forked = PRESENCE_FORKED,
    Internal = PRESENCE_INTERNAL,
);

#[rustfmt::skip]
same!(Kind, presence_event_kind:
    Request = PRESENCE_EVENT_REQUEST, Data = PRESENCE_EVENT_DATA, End = PRESENCE_EVENT_END,
    Error = PRESENCE_EVENT_ERROR, Stopped = PRESENCE_EVENT_STOPPED, Writable = PRESENCE_EVENT_WRITABLE,
    Online = PRESENCE_EVENT_ONLINE, Offline = PRESENCE_EVENT_OFFLINE, Connected = PRESENCE_EVENT_CONNECTED,
    Disconnected = PRESENCE_EVENT_DISCONNECTED, Log = PRESENCE_EVENT_LOG,
);

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
