//! Events out of the library: the queue, what it delivers, and whom to ask for it.

use super::gateway::presence_stream;
use super::guard::{
    borrow, give_sender, guard, guard_or, guard_value, handle, limit, pointer, release, sender_pointer, slice_out,
};
use super::worker::presence_sender;
use crate::error::Result;
use crate::events::{Event, Kind, Queue};
use crate::presence::registry;
use std::ffi::{c_char, c_int};
use std::ptr;

/// Where events arrive. Any number of services, streams and watches may share one. Made by presence_queue_new.
pub struct presence_queue {
    _opaque: [u8; 0],
}

/// Something that happened. Which fields are set depends on `kind`; the others are 0 or NULL. What is set is not NULL, even
/// where its length is 0.
///
/// `client`, `subject` and `data` (none of them NUL-terminated), and `sender` and `stream` as names of handles already
/// freed, are valid until the next wait on the same queue, or until the queue is freed.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct presence_event {
    /// A presence_event_kind. More may come: ignore what you do not know.
    pub kind: i32,
    /// A presence_status.
    pub status: i32,
    /// The caller's number, from presence_serve, presence_request, presence_watch or presence_conn_watch.
    pub tag: u64,
    /// REQUEST: belongs to the receiver from now on. STOPPED, WRITABLE: which.
    pub sender: *mut presence_sender,
    /// DATA, END, ERROR: which.
    pub stream: *mut presence_stream,
    /// REQUEST, STOPPED, WRITABLE, ONLINE, OFFLINE: the client's id; empty for an anonymous one.
    pub client: *const c_char,
    /// Bytes in `client`.
    pub client_len: usize,
    /// REQUEST: the subject it came on. CONNECTED, DISCONNECTED: the service's subject; NULL where the connection is meant.
    pub subject: *const c_char,
    /// Bytes in `subject`.
    pub subject_len: usize,
    /// REQUEST, DATA: the payload. ERROR, DISCONNECTED, LOG: a text.
    pub data: *const u8,
    /// Bytes in `data`.
    pub data_len: usize,
    /// 0.
    pub reserved: [u64; 2],
}

/// Makes a queue.
///
/// # Safety
/// `out` is NULL (PRESENCE_INVALID) or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_queue_new(out: *mut *mut presence_queue) -> i32 {
    // SAFETY: the caller's promise is handle's.
    guard(|| unsafe { handle(out, || Ok(Queue::new())) })
}

/// A file descriptor that is readable (poll, epoll, kqueue, asyncio, libuv) as long as events wait in the queue.
///
/// It belongs to the queue: do not read, write or close it. A negative presence_status when there is none to be had.
#[unsafe(no_mangle)]
pub extern "C" fn presence_queue_fd(queue: *const presence_queue) -> c_int {
    match guard_value(|| borrow(queue)?.fd()) {
        Ok(fd) => fd,
        Err(status) => status,
    }
}

/// Waits for events, and takes up to `max` of them into `events`. What an earlier wait gave becomes invalid now.
///
/// Returns how many were taken; 0 when `timeout_ms` passed or presence_queue_wake was called; or PRESENCE_INVALID,
/// PRESENCE_BUSY (another thread is waiting), PRESENCE_CLOSED (the queue was freed), PRESENCE_FORKED.
///
/// # Safety
/// `events` is writable for `max` elements. While another thread still reads what an earlier wait gave, do not wait.
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
        Err(status) => status.into(),
    }
}

/// Makes the thread that waits on the queue return, or the next one that would.
#[unsafe(no_mangle)]
pub extern "C" fn presence_queue_wake(queue: *mut presence_queue) {
    guard_or((), || {
        borrow(queue)?.wake();
        Ok(())
    });
}

/// Frees a queue with all that waits in it. A thread waiting on it gets PRESENCE_CLOSED, and has left when this returns. What
/// its last wait gave is valid no longer: no thread may be at its events.
///
/// Services and streams that use it go on without telling anybody; requests that arrive are answered with an error.
#[unsafe(no_mangle)]
pub extern "C" fn presence_queue_free(queue: *mut presence_queue) {
    guard_or((), || {
        if let Some(queue) = release(queue) {
            queue.close();
        }
        Ok(())
    });
}

/// Has the queue tell from now on, with `tag`, when clients come online and go offline in this process.
///
/// A queue watches once; a second call changes its tag. At most 65,536 such events wait; then they are dropped, and a
/// PRESENCE_EVENT_LOG with PRESENCE_FULL says so.
#[unsafe(no_mangle)]
pub extern "C" fn presence_watch(queue: *mut presence_queue, tag: u64) -> i32 {
    guard(|| -> Result<()> {
        registry::watch(&borrow(queue)?, tag);
        Ok(())
    })
}

/// Where a field's bytes are. An empty slice of Rust's has an address that is none, which Go, for one, does not bear: it is
/// that of an empty text in a field that this kind of event has, and NULL in one that it has not.
#[inline]
fn start(bytes: &[u8], is_meant: bool) -> *const u8 {
    match (bytes.is_empty(), is_meant) {
        (false, _) => bytes.as_ptr(),
        (true, true) => c"".as_ptr().cast(),
        (true, false) => ptr::null(),
    }
}

/// An event as C sees it. The sender of a request passes to the receiver here.
#[inline]
fn export(event: &Event<'_>) -> presence_event {
    let sender = match event.kind {
        Kind::Request => event.sender().map(give_sender),
        Kind::Stopped | Kind::Writable => event.sender().as_ref().map(sender_pointer),
        _ => None,
    };
    let stream = match event.kind {
        Kind::Data | Kind::End | Kind::Error => Some(pointer(event.handle_id())),
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
        reserved: [0; 2],
    }
}
