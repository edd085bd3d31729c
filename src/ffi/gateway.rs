//! The gateway's side: streams requested from workers.

use super::boundary::{guard, guard_error, guard_or};
use super::codes::presence_status;
use super::handles::{borrow, create_registered, release};
use super::raw::{bytes, c_text, config_ref, request_args, text_start, write_out};
use super::types::{presence_conn, presence_error, presence_queue, presence_request_args, presence_stream};
use crate::config::Config;
use crate::gateway::stream::Stream;
use std::ffi::c_char;
use std::ptr;

/// Requests a stream for a client from a worker that serves `args->subject`. Does not wait for the worker.
///
/// Each message of the stream is a PRESENCE_EVENT_DATA with `args->tag` in `queue`. Exactly one PRESENCE_EVENT_END or
/// PRESENCE_EVENT_ERROR follows. The library keeps nothing of `args`.
///
/// The request tells the worker the client's id. The client is online in this process while the stream runs, and
/// mark_client_offline ends the stream with PRESENCE_OFFLINE. Without a client (`args->client_len` is 0), no mark stops
/// the stream's worker.
///
/// Returns PRESENCE_OK; PRESENCE_INVALID, PRESENCE_TOO_LARGE, PRESENCE_FULL (the send buffer is full),
/// PRESENCE_DISCONNECTED, PRESENCE_CLOSED; with the option only_online PRESENCE_OFFLINE.
///
/// Later errors are the `status` of the PRESENCE_EVENT_ERROR: PRESENCE_NO_RESPONDERS (no worker serves the subject),
/// PRESENCE_BUSY (the worker has no capacity), PRESENCE_OFFLINE (the client is offline in this process or the
/// worker's), PRESENCE_REMOTE (the worker ended the stream with this text, and with `error_code` if that is not 0),
/// PRESENCE_FULL, PRESENCE_TIMEOUT, PRESENCE_PEER_GONE, PRESENCE_DISCONNECTED, PRESENCE_CANCELLED, PRESENCE_CLOSED.
///
/// The caller owns `*out` and must call presence_stream_free.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_request(
    conn: *mut presence_conn,
    queue: *mut presence_queue,
    args: *const presence_request_args,
    out: *mut *mut presence_stream,
    error: *mut presence_error,
) -> presence_status {
    // SAFETY: the caller's promises are those of guard_error, request_args, config_ref, c_text, bytes and
    // create_registered.
    unsafe {
        guard_error(error, || {
            let args = request_args(args)?;
            let config = if args.config.is_null() { &Config::new() } else { config_ref(args.config)? };
            let subject = c_text("subject", args.subject)?;
            let data = bytes("data", args.data, args.data_len)?;
            let client = bytes("client", args.client.cast(), args.client_len)?;
            create_registered(out, |register| {
                borrow(conn)?.request_registered(&borrow(queue)?, subject, data, client, config, args.tag, register)
            })
        })
    }
}

/// Returns the tag that was passed to presence_request. 0 for NULL and for a stream that was freed.
#[unsafe(no_mangle)]
pub extern "C" fn presence_stream_tag(stream: *const presence_stream) -> u64 {
    guard_or(0, || Ok(borrow(stream)?.tag()))
}

/// Returns the client's id, and its length in `*len`. It is not NUL-terminated, and valid until the stream is freed.
/// NULL for NULL and for a stream that was freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_stream_client(stream: *const presence_stream, len: *mut usize) -> *const c_char {
    guard_or(ptr::null(), || {
        let stream = borrow(stream)?;
        let client = stream.client();
        // SAFETY: the caller's promise is write_out's.
        unsafe { write_out(len, || Ok(client.len())) }?;
        Ok(text_start(client))
    })
}

/// Reports that `bytes` of the stream's messages, which have left the queue, were consumed, so that the worker may send
/// as many more. Only for streams with the option manual_credit: for others, messages that leave the queue are
/// consumed, and this has no effect.
///
/// One call may report many messages; the 64 bytes that each counts in addition are added here. Report 0 for messages
/// without bytes. More than there was counts as all.
///
/// Returns PRESENCE_OK, or PRESENCE_CLOSED if the stream has ended.
#[unsafe(no_mangle)]
pub extern "C" fn presence_stream_consumed(stream: *mut presence_stream, bytes: usize) -> presence_status {
    guard(|| borrow(stream)?.consumed(bytes as u64))
}

/// Cancels a running stream: it ends with a PRESENCE_EVENT_ERROR whose status is PRESENCE_CANCELLED, and the worker is
/// notified.
///
/// On a lane this stops the stream's sender, with PRESENCE_CANCELLED, and nothing else. A worker on level 0 can be
/// stopped only by announcing the client offline, which also stops the client's streams at other gateways. The
/// announcement is made unless another stream, a session or a mark keeps the client online here; then the worker goes
/// on. Before the worker's first answer it is not known which of the two it is: the announcement, if there is one,
/// follows that answer, or 5 seconds without one.
///
/// Returns PRESENCE_OK, or PRESENCE_CLOSED if the stream has ended already.
#[unsafe(no_mangle)]
pub extern "C" fn presence_stream_cancel(stream: *mut presence_stream) -> presence_status {
    guard(|| borrow(stream)?.cancel())
}

/// Frees a stream. One that runs is cancelled. No wait that begins after this returns an event of it.
#[unsafe(no_mangle)]
pub extern "C" fn presence_stream_free(stream: *mut presence_stream) {
    guard_or((), || release(stream, Stream::free));
}
