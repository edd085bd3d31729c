//! The queue that events are read from.

use super::boundary::{guard, guard_or, guard_value, limit};
use super::codes::presence_status;
use super::handles::{borrow, create, pointer, release};
use super::raw::{into_sender_pointer, sender_pointer, slice_out};
use super::types::{presence_event, presence_queue};
use crate::error::Result;
use crate::events::{Event, Kind, Queue};
use std::ffi::c_int;
use std::ptr;

/// Creates a queue.
///
/// Returns PRESENCE_OK. The caller owns `*out` and must call presence_queue_free.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_queue_new(out: *mut *mut presence_queue) -> presence_status {
    // SAFETY: the caller's promise is create's.
    guard(|| unsafe { create(out, || Ok(Queue::new())) })
}

/// Returns a file descriptor that is readable (poll, epoll, asyncio, libuv) while a wait would return at once, or a
/// negative presence_status: PRESENCE_FULL if the system has no file descriptor left.
///
/// The queue owns it: do not read, write or close it.
#[unsafe(no_mangle)]
pub extern "C" fn presence_queue_fd(queue: *const presence_queue) -> c_int {
    match guard_value(|| borrow(queue)?.fd()) {
        Ok(fd) => fd,
        Err(status) => status.code(),
    }
}

/// Waits for events, and fills `events` with up to `max` of them. The events of the last wait become invalid.
///
/// Returns how many there are; 0 if `timeout_ms` passed or presence_queue_wake was called; or PRESENCE_INVALID,
/// PRESENCE_BUSY (another thread waits), PRESENCE_CLOSED (the queue was freed), PRESENCE_FORKED.
///
/// *Thread safety*: one thread at a time may wait, and not while another one still reads the events of the last wait.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_queue_wait(
    queue: *mut presence_queue,
    events: *mut presence_event,
    max: usize,
    timeout_ms: i64,
) -> i64 {
    let taken = guard_value(|| {
        let queue = borrow(queue)?;
        // SAFETY: the caller's promise is slice_out's.
        let mut events = unsafe { slice_out(events, max) }?.iter_mut();
        queue.wait(max, limit(timeout_ms), |event| {
            if let Some(slot) = events.next() {
                slot.write(export(&event));
            }
        })
    });
    match taken {
        Ok(count) => i64::try_from(count).unwrap_or(i64::MAX),
        Err(status) => status.code().into(),
    }
}

/// Makes the thread that waits on the queue return 0, or else the next wait.
#[unsafe(no_mangle)]
pub extern "C" fn presence_queue_wake(queue: *mut presence_queue) {
    guard_or((), || -> Result<()> {
        borrow(queue)?.wake();
        Ok(())
    });
}

/// Frees a queue and the events in it. A thread that waits on it gets PRESENCE_CLOSED, and has left when this returns.
///
/// Services and streams that use the queue go on without events. Requests, queued and new, are answered with an error.
///
/// *Thread safety*: no thread may still read the events of the last wait.
#[unsafe(no_mangle)]
pub extern "C" fn presence_queue_free(queue: *mut presence_queue) {
    guard_or((), || release(queue, Queue::close));
}

/// The address of a field's bytes. That of an empty slice in Rust is no valid address, which Go, for one, rejects: so
/// an empty field has the address of an empty text if this kind of event has the field, and NULL otherwise.
#[inline]
fn start(bytes: &[u8], has_field: bool) -> *const u8 {
    match (bytes.is_empty(), has_field) {
        (false, _) => bytes.as_ptr(),
        (true, true) => c"".as_ptr().cast(),
        (true, false) => ptr::null(),
    }
}

/// An event for C. The caller owns the sender of a request from here on.
#[inline]
fn export(event: &Event<'_>) -> presence_event {
    let sender = match event.kind {
        Kind::Request => event.sender().map(into_sender_pointer),
        Kind::Stopped | Kind::Writable => event.sender().as_ref().map(sender_pointer),
        _ => None,
    };
    let stream = match event.kind {
        Kind::Data | Kind::End | Kind::Error => Some(pointer(event.handle_id)),
        _ => None,
    };
    let has_client =
        matches!(event.kind, Kind::Request | Kind::Stopped | Kind::Writable | Kind::Online | Kind::Offline);
    let has_data = matches!(event.kind, Kind::Request | Kind::Data | Kind::Error | Kind::Log);
    presence_event {
        kind: event.kind as i32,
        status: event.status.code(),
        tag: event.tag,
        sender: sender.unwrap_or(ptr::null_mut()),
        stream: stream.unwrap_or(ptr::null_mut()),
        client: start(event.client.as_bytes(), has_client).cast(),
        client_len: event.client.len(),
        subject: start(event.subject, event.kind == Kind::Request).cast(),
        subject_len: event.subject.len(),
        data: start(event.data, has_data),
        data_len: event.data.len(),
        error_code: event.error_code,
        reserved: [0; 3],
    }
}
