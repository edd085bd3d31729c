//! The worker's side: services, and the senders that answer their requests.

use super::boundary::{guard, guard_error, guard_or, guard_value, limit};
use super::codes::presence_status;
use super::handles::{borrow, create, release};
use super::raw::{
    bytes, c_text, check_aligned, check_out, concatenated, free_sender, sender_ref, text_start, write_out,
};
use super::types::{presence_conn, presence_error, presence_queue, presence_sender, presence_service};
use crate::error::{Error, Status};
use crate::worker::service::Service;
use std::ffi::{c_char, c_void};
use std::ptr;

/// Serves a subject: each request is a PRESENCE_EVENT_REQUEST with `tag` in `queue`. The subject may have wildcards.
/// Also does what presence_listen_offline does.
///
/// Processes that serve the subject in the same `group` share the requests: each request goes to one of them. NULL or
/// "" is no group: each request goes to all. At most `max_streams` streams run at once (0: 10,000); further requests
/// are answered with "server busy".
///
/// Waits until nats-server has the subscription. Without a connection it returns at once, and the subscription is made
/// after the reconnect. If nats-server refuses the subscription later, or takes it back when its configuration changes,
/// one PRESENCE_EVENT_DISCONNECTED with `tag` and the subject comes to `queue`. The subscription is tried again with
/// the delays of a reconnect, and a PRESENCE_EVENT_CONNECTED with `tag` and the subject reports success. Running
/// streams go on.
///
/// Returns PRESENCE_OK; PRESENCE_INVALID, PRESENCE_TIMEOUT, PRESENCE_CLOSED; PRESENCE_DISCONNECTED (permissions) or
/// PRESENCE_FULL (max_subscriptions), with the text of nats-server, if it refuses the subscription.
///
/// The caller owns `*out` and must call presence_service_free.
#[must_use]
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
) -> presence_status {
    // SAFETY: the caller's promises are those of guard_error, c_text and create.
    unsafe {
        guard_error(error, || {
            let group = if group.is_null() { "" } else { c_text("group", group)? };
            create(out, || borrow(conn)?.serve(&borrow(queue)?, c_text("subject", subject)?, group, max_streams, tag))
        })
    }
}

/// Stops a service: it accepts no more requests. Running streams go on.
///
/// Returns PRESENCE_OK, or PRESENCE_CLOSED if it was stopped before.
#[unsafe(no_mangle)]
pub extern "C" fn presence_service_stop(service: *mut presence_service) -> presence_status {
    guard(|| borrow(service)?.stop())
}

/// Stops a service and frees it. Its senders go on, and must still be freed.
#[unsafe(no_mangle)]
pub extern "C" fn presence_service_free(service: *mut presence_service) {
    let close = |service: &Service| {
        service.close();
    };
    guard_or((), || release(service, close));
}

/// Sets the tag of the sender's PRESENCE_EVENT_STOPPED and PRESENCE_EVENT_WRITABLE, such as the address of the caller's
/// own data of this stream. Until then they have the tag of the service.
///
/// A wait that returns a PRESENCE_EVENT_REQUEST returns no later event of its sender. So if the tag is set before the
/// next wait, no event has the tag of the service.
///
/// Returns PRESENCE_OK or PRESENCE_INVALID.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_set_tag(sender: *mut presence_sender, tag: u64) -> presence_status {
    // SAFETY: the caller's promise is sender_ref's.
    guard(|| unsafe {
        sender_ref(sender)?.set_tag(tag);
        Ok::<_, Status>(())
    })
}

/// Sends one message of the stream. Never blocks.
///
/// Returns PRESENCE_OK; PRESENCE_OFFLINE once the client is offline, and for ever after; PRESENCE_FULL if the message
/// does not fit now: a PRESENCE_EVENT_WRITABLE comes when to try again, which is when the reader has taken some
/// messages, or when half of send_buffer_bytes is free.
///
/// PRESENCE_TOO_LARGE (see presence_sender_max_message) and, on level 0, PRESENCE_RESERVED concern this message only,
/// and the stream goes on. Other statuses are why it has ended: PRESENCE_CLOSED; on a lane PRESENCE_CANCELLED and
/// PRESENCE_PEER_GONE; on level 0 PRESENCE_DISCONNECTED.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_send(
    sender: *mut presence_sender,
    data: *const c_void,
    len: usize,
) -> presence_status {
    // SAFETY: the caller's promises are those of sender_ref and bytes.
    guard(|| unsafe { sender_ref(sender)?.send(bytes("data", data, len)?) })
}

/// Sends several messages of the stream, up to the first that is refused. Never blocks.
///
/// `data` contains the messages one after the other, and `lens` their `count` lengths.
///
/// Returns how many were sent. If that is fewer than `count`, the next call returns why. If the first one is refused,
/// returns what presence_sender_send would return for it.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_send_many(
    sender: *mut presence_sender,
    data: *const c_void,
    lens: *const usize,
    count: usize,
) -> i64 {
    let sent = guard_value(|| -> Result<usize, Status> {
        // SAFETY: the caller's promises are those of sender_ref and concatenated.
        unsafe {
            let sender = sender_ref(sender)?;
            let (data, lengths) = concatenated("data", data, lens, count)?;
            sender.send_many(data, lengths)
        }
    });
    match sent {
        Ok(count) => i64::try_from(count).unwrap_or(i64::MAX),
        Err(status) => status.code().into(),
    }
}

/// As presence_sender_send, but where that would return PRESENCE_FULL this blocks until the message is sent, for at
/// most `timeout_ms`. The end of the stream ends the wait too.
///
/// Returns what presence_sender_send returns, but PRESENCE_TIMEOUT in place of PRESENCE_FULL.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_send_wait(
    sender: *mut presence_sender,
    data: *const c_void,
    len: usize,
    timeout_ms: i64,
) -> presence_status {
    // SAFETY: the caller's promises are those of sender_ref and bytes.
    guard(|| unsafe { sender_ref(sender)?.send_wait(bytes("data", data, len)?, limit(timeout_ms)) })
}

/// Ends the stream with an error. The reader gets `message`, which may be any bytes, or NULL with `len` 0 for no text.
/// It is truncated to what nats-server takes in one message, and on a lane without capacity for more to 256 bytes.
///
/// Returns PRESENCE_OK; PRESENCE_CLOSED if the stream has ended already; why it was stopped, if it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_error(
    sender: *mut presence_sender,
    message: *const c_char,
    len: usize,
) -> presence_status {
    // SAFETY: the caller's promises are those of sender_ref and bytes.
    guard(|| unsafe { sender_ref(sender)?.error(bytes("message", message.cast(), len)?) })
}

/// As presence_sender_error, and the reader also gets `code` as the `error_code` of its PRESENCE_EVENT_ERROR. The code is
/// a number that the application chooses, from 1 to 2147483647; 0 is no code. Readers that do not know codes get the
/// text.
///
/// Returns what presence_sender_error returns; PRESENCE_INVALID for a negative code, and the stream goes on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_error_code(
    sender: *mut presence_sender,
    code: i32,
    message: *const c_char,
    len: usize,
) -> presence_status {
    // SAFETY: the caller's promises are those of sender_ref and bytes.
    guard(|| unsafe { sender_ref(sender)?.error_with_code(code, bytes("message", message.cast(), len)?) })
}

/// Ends the stream.
///
/// Returns PRESENCE_OK, also if the caller has ended it before; why it was stopped, if it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_end(sender: *mut presence_sender) -> presence_status {
    // SAFETY: the caller's promise is sender_ref's.
    guard(|| unsafe { sender_ref(sender)?.end() })
}

/// Returns true if the stream has ended, for whatever reason, so that no message can be sent. True for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_is_closed(sender: *const presence_sender) -> bool {
    // SAFETY: the caller's promise is sender_ref's.
    guard_or(true, || unsafe { Ok(sender_ref(sender)?.is_closed()) })
}

/// Returns the size limit of a message, in bytes: max_payload of the present nats-server, less 64. It is the same on
/// lanes and on level 0. 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_max_message(sender: *const presence_sender) -> usize {
    // SAFETY: the caller's promise is sender_ref's.
    guard_or(0, || unsafe { Ok(sender_ref(sender)?.max_message()) })
}

/// Returns how many messages were sent so far. 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_send_count(sender: *const presence_sender) -> u64 {
    // SAFETY: the caller's promise is sender_ref's.
    guard_or(0, || unsafe { Ok(sender_ref(sender)?.send_count()) })
}

/// Returns the address of the sender's status word, or NULL for NULL. The word is 0 while the stream runs. When the
/// stream ends, it becomes, for ever, the presence_status that says why, as a uint32_t.
///
/// Reading it is the cheapest way to see whether the client has left: use a relaxed atomic load of 32 bits, from any
/// thread, until the sender is freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_status_word(sender: *const presence_sender) -> *const u32 {
    // SAFETY: the caller's promise is sender_ref's.
    guard_or(ptr::null(), || unsafe { Ok(sender_ref(sender)?.status_word().as_ptr()) })
}

/// Reads a header of the request. `name` is compared as it was sent. If there are several with this name, reads the
/// first.
///
/// `*value` is not NUL-terminated, and valid until the sender is freed. It is NULL if there is no such header.
///
/// Returns PRESENCE_OK or PRESENCE_INVALID.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_header(
    sender: *const presence_sender,
    name: *const c_char,
    value: *mut *const c_char,
    len: *mut usize,
) -> presence_status {
    // SAFETY: the caller's promises are those of sender_ref, c_text and write_out.
    guard(|| unsafe {
        let (sender, name) = (sender_ref(sender)?, c_text("name", name)?);
        if value.is_null() || len.is_null() {
            return Err(Error::invalid("value or len is NULL"));
        }
        check_aligned("value", value)?;
        check_aligned("len", len)?;
        let header = sender.header(name);
        write_out(len, || Ok(header.map_or(0, str::len)))?;
        write_out(value, || Ok(header.map_or(ptr::null(), text_start)))
    })
}

/// Reads the request's header number `index`, counted from 0. A name that has several values is as many headers, in the
/// order of the values. `Connect-ID` is the first one, if the request has a client.
///
/// `*name` and `*value` are not NUL-terminated, and valid until the sender is freed. They are NULL if there are not so
/// many headers.
///
/// Returns PRESENCE_OK or PRESENCE_INVALID.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_header_at(
    sender: *const presence_sender,
    index: usize,
    name: *mut *const c_char,
    name_len: *mut usize,
    value: *mut *const c_char,
    value_len: *mut usize,
) -> presence_status {
    // SAFETY: the caller's promises are those of sender_ref and write_out.
    guard(|| unsafe {
        let sender = sender_ref(sender)?;
        check_out(name).and(check_out(name_len)).and(check_out(value)).and(check_out(value_len))?;
        let header = sender.header_at(index);
        write_out(name_len, || Ok(header.map_or(0, |(name, _)| name.len())))?;
        write_out(value_len, || Ok(header.map_or(0, |(_, value)| value.len())))?;
        write_out(name, || Ok(header.map_or(ptr::null(), |(name, _)| text_start(name))))?;
        write_out(value, || Ok(header.map_or(ptr::null(), |(_, value)| text_start(value))))
    })
}

/// Returns the request's reply subject, and its length in `*len`. It is not NUL-terminated, and valid until the sender
/// is freed. NULL for NULL.
///
/// It is for logs and for peers on level 0: on a lane, what is published to it is ignored. Answer with
/// presence_sender_send.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_reply(sender: *const presence_sender, len: *mut usize) -> *const c_char {
    // SAFETY: the caller's promises are those of sender_ref and write_out.
    guard_or(ptr::null(), || unsafe {
        let reply = sender_ref(sender)?.reply();
        write_out(len, || Ok(reply.len()))?;
        Ok(text_start(reply))
    })
}

/// Frees a sender. A stream that has not ended ends with an error at the reader.
///
/// *Thread safety*: no other thread may use the sender or its status word any longer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_sender_free(sender: *mut presence_sender) {
    // SAFETY: the caller's promise is free_sender's.
    guard_or((), || unsafe { free_sender(sender) });
}
