//! The worker's side: services, and the senders that answer their requests.

use super::connection::presence_conn;
use super::guard::{
    borrow, bytes, c_text, check_aligned, free_sender, guard, guard_error, guard_or, guard_value, handle, lengths,
    limit, presence_error, release, sender_ref, write_out,
};
use super::queue::presence_queue;
use crate::error::{Error, Status};
use std::ffi::{c_char, c_void};
use std::ptr;

/// A subject that this process serves. Made by presence_serve.
pub struct presence_service {
    _opaque: [u8; 0],
}

/// The worker's end of one stream. It comes with PRESENCE_EVENT_REQUEST, and is freed by presence_sender_free.
///
/// It may be used from any thread, before and after the next wait. Whatever ends it, it stays ended.
pub struct presence_sender {
    _opaque: [u8; 0],
}

/// Serves a subject: each request for it is a PRESENCE_EVENT_REQUEST, with `tag`, on `queue`.
///
/// Requests are spread over all processes that serve the subject in the same `group`; NULL or "" is no group: each of
/// them gets every request. The subject may have wildcards. At most `max_streams` streams (0: 10,000) run at once; a
/// request beyond is answered with "server busy". It waits until the server has the subscription; without a connection
/// now it returns at once, and it is done later. Offline announcements are listened to from now on.
///
/// Where nats-server refuses the subscription, this fails with the server's words: PRESENCE_DISCONNECTED (permissions) or
/// PRESENCE_FULL (max_subscriptions). Where it refuses later, or takes the subscription back when its configuration
/// changes, PRESENCE_EVENT_DISCONNECTED with `tag` comes on `queue`, once; it is tried again with the delays of a
/// reconnect, and PRESENCE_EVENT_CONNECTED with `tag` comes when the server has the subscription again. Streams that run
/// are not touched.
///
/// # Safety
/// `subject` is NULL (PRESENCE_INVALID) or NUL-terminated, `group` is NULL or NUL-terminated; `out` is NULL
/// (PRESENCE_INVALID) or writable; `error` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_serve(
    conn: *mut presence_conn,
    queue: *mut presence_queue,
    subject: *const c_char,
    group: *const c_char,
    max_streams: u32,
    tag: u64,
    out: *mut *mut presence_service,
    error: *mut presence_error,
) -> i32 {
    // SAFETY: the caller's promises are those of the guard's functions.
    unsafe {
        guard_error(error, || {
            let group = if group.is_null() { "" } else { c_text("group", group)? };
            handle(out, || borrow(conn)?.serve(&borrow(queue)?, c_text("subject", subject)?, group, max_streams, tag))
        })
    }
}

/// Takes no more requests. Streams that run go on. A second call is PRESENCE_CLOSED.
#[unsafe(no_mangle)]
pub extern "C" fn presence_service_stop(service: *mut presence_service) -> i32 {
    guard(|| borrow(service)?.stop())
}

/// Stops a service and frees it. Its senders live on.
#[unsafe(no_mangle)]
pub extern "C" fn presence_service_free(service: *mut presence_service) {
    guard_or((), || {
        if let Some(service) = release(service) {
            service.close();
        }
        Ok(())
    });
}

/// Sends one message of the stream. Never blocks: PRESENCE_FULL when there is no room now.
///
/// Once the client is offline this is PRESENCE_OFFLINE, for ever. Others: PRESENCE_TOO_LARGE (more than
/// presence_sender_max_message) and, on level 0, PRESENCE_RESERVED, after which the stream goes on; PRESENCE_CLOSED; on a
/// lane PRESENCE_CANCELLED and PRESENCE_PEER_GONE, on level 0 PRESENCE_DISCONNECTED. After PRESENCE_FULL a
/// PRESENCE_EVENT_WRITABLE comes when the sender can try again: once the reader has taken some messages, or half of
/// send_buffer_bytes is free.
///
/// # Safety
/// `sender` is NULL (PRESENCE_INVALID) or not freed yet; `data` is readable for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_send(sender: *mut presence_sender, data: *const c_void, len: usize) -> i32 {
    // SAFETY: the caller's promises are those of sender_ref and bytes.
    guard(|| unsafe { sender_ref(sender)?.send(bytes("data", data, len)?) })
}

/// Sends several messages of the stream, up to the first that is refused. Never blocks.
///
/// `data` has them one behind the other, `lens` the length of each. Returns how many were sent: fewer than `count` when one
/// was refused after others were sent (the next call tells why); when the first is refused, what presence_sender_send
/// would return for it. 0 for `count` 0.
///
/// # Safety
/// `sender` is NULL (PRESENCE_INVALID) or not freed yet; `lens` is readable for `count` elements and `data` for their sum.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_send_many(
    sender: *mut presence_sender,
    data: *const c_void,
    lens: *const usize,
    count: usize,
) -> i64 {
    let sent = guard_value(|| -> Result<usize, Status> {
        // SAFETY: the caller's promises are those of sender_ref, lengths and bytes.
        unsafe {
            let (sender, lengths) = (sender_ref(sender)?, lengths(lens, count)?);
            let sum = lengths.iter().try_fold(0, |sum: usize, length| sum.checked_add(*length));
            let data = bytes("data", data, sum.unwrap_or(usize::MAX))?;
            sender.send_many(data, lengths)
        }
    });
    match sent {
        Ok(count) => i64::try_from(count).unwrap_or(i64::MAX),
        Err(status) => status.into(),
    }
}

/// As presence_sender_send, but where that would be PRESENCE_FULL it waits for room, at most `timeout_ms`.
///
/// PRESENCE_TIMEOUT when there was none in that time; the sender's end, by whomever, ends the wait too.
///
/// # Safety
/// As presence_sender_send; it is not freed while this waits.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_send_wait(
    sender: *mut presence_sender,
    data: *const c_void,
    len: usize,
    timeout_ms: i64,
) -> i32 {
    // SAFETY: the caller's promises are those of sender_ref and bytes.
    guard(|| unsafe { sender_ref(sender)?.send_wait(bytes("data", data, len)?, limit(timeout_ms)) })
}

/// Ends the stream with an error, whose text the reader gets. NULL with `len` 0 is no text. Any bytes are taken; what
/// nats-server does not take in one message is cut off, and on a lane, where there is no room for more, all but 256 bytes.
///
/// PRESENCE_CLOSED when it has ended already; why it was stopped, when it was.
///
/// # Safety
/// `sender` is NULL (PRESENCE_INVALID) or not freed yet; `message` is readable for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_error(
    sender: *mut presence_sender,
    message: *const c_char,
    len: usize,
) -> i32 {
    // SAFETY: the caller's promises are those of sender_ref and bytes.
    guard(|| unsafe { sender_ref(sender)?.error(bytes("message", message.cast(), len)?) })
}

/// Ends the stream. Once more is fine, and after presence_sender_error: PRESENCE_OK. Why it was stopped, when it was.
///
/// # Safety
/// `sender` is NULL (PRESENCE_INVALID) or not freed yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_end(sender: *mut presence_sender) -> i32 {
    // SAFETY: the caller's promise is sender_ref's.
    guard(|| unsafe { sender_ref(sender)?.end() })
}

/// Whether the sender may send no more, for whatever reason. true for NULL.
///
/// # Safety
/// `sender` is NULL or not freed yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_is_closed(sender: *const presence_sender) -> bool {
    // SAFETY: the caller's promise is sender_ref's.
    guard_or(true, || unsafe { Ok(sender_ref(sender)?.is_closed()) })
}

/// Returns how large a message may be, in bytes: the max_payload of the present nats-server, less 64. It is the same on
/// lanes and on level 0. 0 for NULL.
///
/// # Safety
/// `sender` is NULL or not freed yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_max_message(sender: *const presence_sender) -> usize {
    // SAFETY: the caller's promise is sender_ref's.
    guard_or(0, || unsafe { Ok(sender_ref(sender)?.max_message()) })
}

/// How many messages were sent (accepted) so far. 0 for NULL.
///
/// # Safety
/// `sender` is NULL or not freed yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_send_count(sender: *const presence_sender) -> u64 {
    // SAFETY: the caller's promise is sender_ref's.
    guard_or(0, || unsafe { Ok(sender_ref(sender)?.send_count()) })
}

/// The sender's status word: 0 while it may send; then, for ever, the presence_status that says why not, as uint32_t.
///
/// Reading it is the cheapest way to ask: an aligned 32-bit load, relaxed and atomic, from any thread, until the sender
/// is freed. NULL for NULL.
///
/// # Safety
/// `sender` is NULL or not freed yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_status_word(sender: *const presence_sender) -> *const u32 {
    // SAFETY: the caller's promise is sender_ref's.
    guard_or(ptr::null(), || unsafe { Ok(sender_ref(sender)?.status_word().as_ptr()) })
}

/// Reads a header of the request, by its name as it was sent. `*value` (not NUL-terminated) is NULL when there is none, and valid
/// until the sender is freed. Of several with the name it is the first.
///
/// # Safety
/// `sender` is NULL (PRESENCE_INVALID) or not freed yet; `name` is NULL (PRESENCE_INVALID) or NUL-terminated; `value` and
/// `len` are NULL (PRESENCE_INVALID) or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_header(
    sender: *const presence_sender,
    name: *const c_char,
    value: *mut *const c_char,
    len: *mut usize,
) -> i32 {
    // SAFETY: the caller's promises are those of the guard's functions.
    guard(|| unsafe {
        let (sender, name) = (sender_ref(sender)?, c_text("name", name)?);
        if value.is_null() || len.is_null() {
            return Err(Error::invalid("value or len is NULL"));
        }
        check_aligned("value", value)?;
        check_aligned("len", len)?;
        let header = sender.header(name);
        write_out(len, || Ok(header.map_or(0, str::len)))?;
        // An empty one has an address, too.
        let start = |header: &str| if header.is_empty() { c"".as_ptr() } else { header.as_ptr().cast() };
        write_out(value, || Ok(header.map_or(ptr::null(), start)))
    })
}

/// Frees a sender. A stream that was not ended is ended with an error, which the reader gets. Its status word is gone.
///
/// # Safety
/// `sender` is NULL or not freed yet, and no other thread uses it or its status word any longer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_free(sender: *mut presence_sender) {
    // SAFETY: the caller's promise is free_sender's.
    guard_or((), || unsafe { free_sender(sender) });
}
