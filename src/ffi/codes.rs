//! The numbers of the ABI, under the names that C sees. They are the core's, checked at compile time.

use crate::error::Status;
use crate::events::Kind;
use std::ffi::{CStr, c_char};

/// How a call ended, or why a stream did. The numbers are fixed for ever.
#[repr(i32)]
#[allow(missing_docs)]
pub enum presence_status {
    /// Done.
    PRESENCE_OK = 0,
    /// An argument is wrong: NULL, not UTF-8, empty, too long, or with a character that may not be there.
    PRESENCE_INVALID = -1,
    /// The client is offline: it was marked so in this process, its last session here was closed, or another process announced
    /// or reported it.
    PRESENCE_OFFLINE = -2,
    /// The sender, stream, service, connection or queue has ended already.
    PRESENCE_CLOSED = -3,
    /// The stream was cancelled by its reader. A worker sees it, too, where the client left before the stream had begun.
    PRESENCE_CANCELLED = -4,
    /// No room. A sender has it again at PRESENCE_EVENT_WRITABLE; a stream whose reader was too slow ends with it.
    PRESENCE_FULL = -5,
    /// The message is larger than presence_sender_max_message, or the request larger than nats-server's max_payload.
    PRESENCE_TOO_LARGE = -6,
    /// The stream is on level 0 of the wire, and the other end would take the payload for something else: it begins with
    /// "__STREAM_END__" or "__STREAM_ERROR__", or has the form of a JetStream acknowledgement. On a lane any payload is sent.
    PRESENCE_RESERVED = -7,
    /// There is no connection to nats-server now, or it was lost while the stream ran.
    PRESENCE_DISCONNECTED = -8,
    /// The process at the other end is gone.
    PRESENCE_PEER_GONE = -9,
    /// Nobody serves the subject.
    PRESENCE_NO_RESPONDERS = -10,
    /// In use: a queue has one waiter at a time. As the status of a PRESENCE_EVENT_ERROR: the worker runs as many streams as it
    /// may, and refused this one.
    PRESENCE_BUSY = -11,
    /// The time given was over.
    PRESENCE_TIMEOUT = -12,
    /// The worker ended the stream with an error; the event's data is its text.
    PRESENCE_REMOTE = -13,
    /// The handle belongs to the parent of this forked process, or the parent had connected before the fork.
    PRESENCE_FORKED = -14,
    /// A defect of this library. It remains usable.
    PRESENCE_INTERNAL = -15,
}

/// What an event tells.
#[repr(i32)]
#[allow(missing_docs)]
pub enum presence_event_kind {
    /// A request arrived at a service: `sender` belongs to the receiver from now on, who frees it; `client` is the
    /// request's client (empty: anonymous), `subject` the one it came on, `data` its payload.
    PRESENCE_EVENT_REQUEST = 1,
    /// A message of a stream: `stream`, `data`.
    PRESENCE_EVENT_DATA = 2,
    /// The worker ended the stream. Nothing follows for it.
    PRESENCE_EVENT_END = 3,
    /// The stream ended otherwise: `status` is why, `data` a text for people. Nothing follows for it.
    PRESENCE_EVENT_ERROR = 4,
    /// A sender may send no more: `sender`, `client`, and `status` is why. It still has to be freed. Comes once, behind its
    /// REQUEST; not where the sender was ended here.
    PRESENCE_EVENT_STOPPED = 5,
    /// A sender that was refused with PRESENCE_FULL may try again: `sender`.
    PRESENCE_EVENT_WRITABLE = 6,
    /// A client came online in this process: `client`. Only on queues given to presence_watch.
    PRESENCE_EVENT_ONLINE = 7,
    /// A client went offline in this process: `client`. Only on queues given to presence_watch.
    PRESENCE_EVENT_OFFLINE = 8,
    /// The connection has reached nats-server: `data` is its address, as host:port. Only on queues given to presence_conn_watch, as the next.
    ///
    /// With a `subject`, on a service's queue and with its `tag`: nats-server has the service's subscription again.
    PRESENCE_EVENT_CONNECTED = 9,
    /// The connection to nats-server is lost: `data` is why. Until it was made again, streams and senders end with
    /// PRESENCE_DISCONNECTED. With `status` PRESENCE_CLOSED it will not be made again.
    ///
    /// With a `subject`, on a service's queue and with its `tag`: nats-server refuses the service's subscription or has
    /// taken it back, and no requests come; `data` is why. See presence_serve.
    PRESENCE_EVENT_DISCONNECTED = 10,
    /// Something that people should know: `data` is a text; `status` and `tag` say what it is about.
    PRESENCE_EVENT_LOG = 11,
}

const _: () = {
    use presence_event_kind::*;
    use presence_status::*;
    const fn same(c: [i32; 16], rust: [Status; 16]) -> bool {
        let mut index = 0;
        while index < c.len() {
            if c[index] != rust[index].code() {
                return false;
            }
            index += 1;
        }
        true
    }
    assert!(same(
        [
            PRESENCE_OK as i32,
            PRESENCE_INVALID as i32,
            PRESENCE_OFFLINE as i32,
            PRESENCE_CLOSED as i32,
            PRESENCE_CANCELLED as i32,
            PRESENCE_FULL as i32,
            PRESENCE_TOO_LARGE as i32,
            PRESENCE_RESERVED as i32,
            PRESENCE_DISCONNECTED as i32,
            PRESENCE_PEER_GONE as i32,
            PRESENCE_NO_RESPONDERS as i32,
            PRESENCE_BUSY as i32,
            PRESENCE_TIMEOUT as i32,
            PRESENCE_REMOTE as i32,
            PRESENCE_FORKED as i32,
            PRESENCE_INTERNAL as i32,
        ],
        Status::ALL
    ));
    assert!(Kind::Request as i32 == PRESENCE_EVENT_REQUEST as i32);
    assert!(Kind::Data as i32 == PRESENCE_EVENT_DATA as i32);
    assert!(Kind::End as i32 == PRESENCE_EVENT_END as i32);
    assert!(Kind::Error as i32 == PRESENCE_EVENT_ERROR as i32);
    assert!(Kind::Stopped as i32 == PRESENCE_EVENT_STOPPED as i32);
    assert!(Kind::Writable as i32 == PRESENCE_EVENT_WRITABLE as i32);
    assert!(Kind::Online as i32 == PRESENCE_EVENT_ONLINE as i32);
    assert!(Kind::Offline as i32 == PRESENCE_EVENT_OFFLINE as i32);
    assert!(Kind::Connected as i32 == PRESENCE_EVENT_CONNECTED as i32);
    assert!(Kind::Disconnected as i32 == PRESENCE_EVENT_DISCONNECTED as i32);
    assert!(Kind::Log as i32 == PRESENCE_EVENT_LOG as i32);
};

const UNKNOWN: &CStr = c"unknown status";
const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
    Ok(version) => version,
    Err(_) => c"",
};

/// What a status means, in a few English words. Never NULL; static, not to be freed.
#[unsafe(no_mangle)]
pub extern "C" fn presence_status_text(status: i32) -> *const c_char {
    Status::from_code(status).map_or(UNKNOWN, Status::c_text).as_ptr()
}

/// The library's version, "major.minor.patch". Static, not to be freed.
#[unsafe(no_mangle)]
pub extern "C" fn presence_version() -> *const c_char {
    VERSION.as_ptr()
}
