//! The types of the ABI: handles, and the structures that functions fill.

use std::ffi::{c_char, c_void};

/// A connection to nats-server. It reconnects whenever it is lost, until presence_close.
pub struct presence_conn {
    _opaque: [u8; 0],
}

/// A queue of events. Any number of services, streams and watches may use the same queue.
pub struct presence_queue {
    _opaque: [u8; 0],
}

/// A subject that this process serves.
pub struct presence_service {
    _opaque: [u8; 0],
}

/// The worker's end of one stream. Each PRESENCE_EVENT_REQUEST has one.
///
/// The caller owns it and must call presence_sender_free. It may be used from any thread, before and after the next
/// wait on the queue. Once it has ended, it never sends again.
pub struct presence_sender {
    _opaque: [u8; 0],
}

/// The gateway's end of one stream, which this process requested.
pub struct presence_stream {
    _opaque: [u8; 0],
}

/// One of a client's connections to this process, such as a browser tab.
pub struct presence_session {
    _opaque: [u8; 0],
}

/// Options for presence_connect and presence_request.
///
/// *Thread safety*: only one thread at a time may use it.
pub struct presence_config {
    _opaque: [u8; 0],
}

/// What presence_request needs. Set what a request has, and leave the rest 0 or NULL:
/// `struct presence_request_args args = {.size = sizeof args, .subject = "count"};`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct presence_request_args {
    /// sizeof(struct presence_request_args). Later versions may add fields after the last one.
    pub size: usize,
    /// The subject that workers serve.
    pub subject: *const c_char,
    /// The request's payload, or NULL.
    pub data: *const c_void,
    /// The length of `data`.
    pub data_len: usize,
    /// The client's id, or NULL if the stream belongs to no client.
    pub client: *const c_char,
    /// The length of `client`.
    pub client_len: usize,
    /// The tag of the stream's events, such as the address of the caller's own data of this stream.
    pub tag: u64,
    /// Options, or NULL for the defaults.
    pub config: *const presence_config,
}

/// The size of a presence_error's message, including the NUL.
pub const PRESENCE_ERROR_MESSAGE: usize = 508;

/// Filled by a call that fails.
#[repr(C)]
pub struct presence_error {
    /// The presence_status that the call returned.
    pub status: i32,
    /// Which value was wrong and what would be right. UTF-8, NUL-terminated, truncated if it is too long.
    pub message: [c_char; PRESENCE_ERROR_MESSAGE],
}

/// Something that happened. Which fields are set depends on `kind`; the others are 0 or NULL. A field that is set is
/// not NULL, even if its length is 0.
///
/// `client`, `subject` and `data` are not NUL-terminated. They are valid until the next wait on the same queue, or
/// until the queue is freed. For as long, `sender` and `stream` name the handles that the event is about, which the
/// caller may have freed.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct presence_event {
    /// A presence_event_kind. Later versions may add kinds: ignore those that you do not know.
    pub kind: i32,
    /// A presence_status.
    pub status: i32,
    /// The number that was passed to presence_serve, presence_request, presence_watch, presence_conn_watch or
    /// presence_sender_set_tag.
    pub tag: u64,
    /// REQUEST: a new sender, which the caller owns. STOPPED, WRITABLE: the sender that the event is about.
    pub sender: *mut presence_sender,
    /// DATA, END, ERROR: the stream that the event is about.
    pub stream: *mut presence_stream,
    /// REQUEST, STOPPED, WRITABLE, ONLINE, OFFLINE: the client's id. It is empty for a request without a client.
    pub client: *const c_char,
    /// The length of `client`.
    pub client_len: usize,
    /// REQUEST: the subject that the request was sent to. CONNECTED, DISCONNECTED: the service's subject, or NULL if
    /// the event is about the connection.
    pub subject: *const c_char,
    /// The length of `subject`.
    pub subject_len: usize,
    /// REQUEST, DATA: the payload. ERROR, CONNECTED, DISCONNECTED, LOG: a text.
    pub data: *const u8,
    /// The length of `data`.
    pub data_len: usize,
    /// ERROR: the code that the worker passed to presence_sender_error_code; 0 if it passed none.
    pub error_code: i32,
    /// 0.
    pub reserved: [u32; 3],
}
