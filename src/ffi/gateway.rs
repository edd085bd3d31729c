//! The gateway's side: streams requested from workers.

use super::connection::{presence_config, presence_conn};
use super::guard::{
    borrow, bytes, c_text, config_ref, guard, guard_error, guard_or, handle_known, presence_error, release,
};
use super::queue::presence_queue;
use crate::config::Config;
use std::ffi::{c_char, c_void};

/// A stream that this process requested. Made by presence_request.
pub struct presence_stream {
    _opaque: [u8; 0],
}

/// Requests a stream for a client. Its messages are PRESENCE_EVENT_DATA, with `tag`, on `queue`, and then exactly one
/// PRESENCE_EVENT_END or PRESENCE_EVENT_ERROR. Does not wait for the worker.
///
/// The client, whom the request makes known to the worker, is online here as long as the stream runs; with id_len 0 the
/// stream belongs to no client, and cannot be stopped at the worker. A mark_client_offline ends it with PRESENCE_OFFLINE.
/// Errors: PRESENCE_INVALID, PRESENCE_TOO_LARGE, PRESENCE_FULL (too much waits to be sent), PRESENCE_DISCONNECTED;
/// PRESENCE_OFFLINE with the option only_online.
/// Later errors are the status of the stream's PRESENCE_EVENT_ERROR: PRESENCE_NO_RESPONDERS where no worker serves the
/// subject, PRESENCE_BUSY where the worker had no capacity, PRESENCE_OFFLINE where this process or the worker's has learned
/// that the client is offline, PRESENCE_REMOTE with the worker's text.
///
/// # Safety
/// `subject` is NULL (PRESENCE_INVALID) or NUL-terminated; `data` is readable for `len` bytes and `client_id` for
/// `id_len`; `config` is NULL (defaults) or was made by presence_config_new; `out` is NULL (PRESENCE_INVALID) or writable;
/// `error` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_request(
    conn: *mut presence_conn,
    queue: *mut presence_queue,
    subject: *const c_char,
    data: *const c_void,
    len: usize,
    client_id: *const c_char,
    id_len: usize,
    config: *const presence_config,
    tag: u64,
    out: *mut *mut presence_stream,
    error: *mut presence_error,
) -> i32 {
    // SAFETY: the caller's promises are those of the guard's functions.
    unsafe {
        guard_error(error, || {
            let config = if config.is_null() { &Config::new() } else { config_ref(config)? };
            let (subject, data, client) =
                (c_text("subject", subject)?, bytes("data", data, len)?, bytes("client_id", client_id.cast(), id_len)?);
            handle_known(out, |known| {
                borrow(conn)?.request_registered(&borrow(queue)?, subject, data, client, config, tag, known)
            })
        })
    }
}

/// For streams requested with the option manual_credit: `bytes` of its messages that left the queue were used up, and the
/// worker may send as many more. Without that option, what leaves the queue counts as used, and this has no effect.
///
/// It may be told for many messages at once; the 64 that each counts in addition are reckoned here. 0 is for messages
/// without bytes. More than there was is the same as all. PRESENCE_CLOSED when the stream has ended.
#[unsafe(no_mangle)]
pub extern "C" fn presence_stream_consumed(stream: *mut presence_stream, bytes: usize) -> i32 {
    guard(|| borrow(stream)?.consumed(bytes as u64))
}

/// Cancels a stream that runs: it ends with PRESENCE_EVENT_ERROR and PRESENCE_CANCELLED, and its worker is notified.
///
/// On a lane this stops the stream's sender, with PRESENCE_CANCELLED, and nothing else. A worker on level 0 of the wire can
/// be stopped only by an announcement that the client is offline, which also stops the client's streams at other
/// gateways. It is made unless another stream, a session or a mark keeps the client online here; then the worker goes on.
/// Before the worker's first answer it is not known which it is: the announcement, if there is one, follows that answer, or
/// 5 seconds without one. Returns PRESENCE_CLOSED when the stream has ended already.
#[unsafe(no_mangle)]
pub extern "C" fn presence_stream_cancel(stream: *mut presence_stream) -> i32 {
    guard(|| borrow(stream)?.cancel())
}

/// Frees a stream; one that runs is cancelled. No wait that begins after this gives an event of it.
#[unsafe(no_mangle)]
pub extern "C" fn presence_stream_free(stream: *mut presence_stream) {
    guard_or((), || {
        if let Some(stream) = release(stream) {
            stream.free();
        }
        Ok(())
    });
}
